"""Tests of runs that are killed: a short version of `python tests/soak.py`, and one kill during a validation."""

import os
import signal

from conftest import TINY, log_of, run
from soak import soak


def test_a_run_that_is_killed_again_and_again_loses_nothing(tmp_path, capsys):
    violations = soak(tmp_path, kills=5, processes=2, seed=35)
    told = capsys.readouterr().out
    assert not violations
    for place in ("saving", "pruning", "validation", "step", "finish"):
        assert f" {place} " in told, told


def test_the_picture_of_a_validation_that_was_killed_is_drawn_again(image_folder, tmp_path):
    """The validation is at a step with a checkpoint, from which the resumed run goes on."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 5, "--resume_from_checkpoint", "auto"]
    run("tests/armed.py", *flags, "--kill", "picture", 1, 0, cwd=tmp_path, code=-signal.SIGKILL)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    assert os.listdir(folder / "checkpoints") == ["step_00000005"]
    run("pretrain_mae.py", *flags, cwd=tmp_path)
    assert os.listdir(folder / "reconstructions") == ["step_00000005.png"]
    assert len([line for line in log_of(folder) if "val_loss" in line]) == 1
