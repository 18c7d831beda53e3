import copy
import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from training.checkpoint import (
    check_outside,
    claim_run_folder,
    compare_with_run,
    load_training,
    note_start,
    save_training,
    saved_flags,
)
from training.launch import InputError, RunError
from training.run_folder import RunFolder, is_whole, read_state

ALONE = SimpleNamespace(gather=lambda here: here)  # a Crew without its signal handlers
FLAGS = {"seed": 0, "img_size": [64, 64], "mask_ratio": 0.75, "num_workers": 2, "path_to_data": "a"}


def build():
    """Return a model with buffers and its optimizer, after one step."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def run(tmp_path):
    """Return a run folder with one checkpoint, and the model, optimizer and moving average that it holds."""
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    note_start(folder.path, {"flags": FLAGS}, 0, 1, fresh=True)
    (model, optimizer), accelerator = build(), Accelerator(cpu=True)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5).add_(1)
    state = {"step": 3, "data": "abc"}
    save_training(folder, accelerator, ALONE, model, optimizer, state, keep=1, ema=average)
    checkpoint = folder.find("latest")
    return SimpleNamespace(folder=folder, checkpoint=checkpoint, model=model, optimizer=optimizer, average=average)


def test_weights_optimizer_and_moving_average_are_loaded_as_they_were_saved(run):
    files = sorted(read_state(run.checkpoint)["files"])
    assert files == ["ema.safetensors", "model.safetensors", "optimizer.pt"]
    assert len({(run.checkpoint / name).stat().st_mode for name in [*files[:2], "state.json"]}) == 1
    (model, optimizer), (average, _) = build(), build()
    load_training(run.checkpoint, Accelerator(cpu=True), model, optimizer, ema=average)
    for loaded, saved in ((model, run.model), (average, run.average)):
        torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)
    states = [one.state_dict()["state"] for one in (optimizer, run.optimizer)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    (run.checkpoint / "ema.safetensors").unlink()
    assert not is_whole(run.checkpoint)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"cut"), lambda path: torch.save({"a": print}, path)])
def test_a_file_that_is_damaged_or_runs_code_is_refused(run, damage):
    damage(run.checkpoint / "optimizer.pt")
    with pytest.raises(RunError, match=r"optimizer.pt is missing, damaged, or holds objects that run code"):
        load_training(run.checkpoint, Accelerator(cpu=True), *build())


def test_the_run_folder_is_claimed(run, monkeypatch):
    lock = run.folder.path / ".lock"
    checkpoint, state, errors = claim_run_folder(run.folder, "latest", write=False)
    assert (checkpoint, state["step"], errors) == (run.checkpoint, 3, []) and not lock.exists()
    checkpoint, state, errors = claim_run_folder(run.folder, None, write=True)
    assert (checkpoint, state) == (None, {}) and "already holds a run" in errors[0] and lock.exists()
    monkeypatch.setattr("training.checkpoint.is_whole", lambda path: False)  # as another machine may see it
    checkpoint, _, (error,) = claim_run_folder(run.folder, "latest", write=False)
    assert checkpoint is None and "is not visible on" in error


def test_all_differences_to_the_run_are_listed(run):
    def compare(data="abc", known=None, **flags):
        before = {**(known or {}), **saved_flags(run.checkpoint)}
        return compare_with_run(run.checkpoint, {**FLAGS, **flags}, data, before=before, derived={"max_steps"})

    assert compare(num_workers=7, path_to_data="b") == []
    errors = compare("other", seed=1, img_size=[32, 64])
    assert len(errors) == 3
    assert errors[0].startswith("--seed 1 differs from the run to resume, which has 0")
    assert errors[1].startswith("--img_size 32 64 differs from the run to resume, which has 64 64")
    assert "is not the data set of the run" in errors[2]
    assert compare(known={"tf32": True}, tf32=True) == []  # a flag that the run did not know yet
    (cause,) = compare(known={"max_steps": 6, "epochs": 2}, max_steps=9, epochs=3)
    assert cause.startswith("--epochs 3 differs") and "--max_steps 9" in compare(known={"max_steps": 6}, max_steps=9)[0]
    assert "--tf32 True differs" in compare(known={"tf32": False}, tf32=True)[0]


def test_the_flags_of_a_run_must_be_readable(run):
    older = {"num_cls_tokens": 1}  # for runs that had no such flag
    assert saved_flags(None) == {} and saved_flags(run.checkpoint) == FLAGS | older
    for content in ("{", "[]", "{}"):
        (run.folder.path / "args.json").write_text(content)
        with pytest.raises(InputError, match=r"args.json of the run to resume cannot be read"):
            saved_flags(run.checkpoint)


def test_args_json_notes_each_start(run):
    for step in (3, 9):
        note_start(run.folder.path, {"flags": "not those"}, step, 2, fresh=False)
    content = json.loads((run.folder.path / "args.json").read_text())
    assert content["flags"] == FLAGS and content["processes"] == 1 and content["versions"]["torch"] == torch.__version__
    assert [(start["step"], start["processes"]) for start in content["resumed"]] == [(3, 2), (9, 2)]
    assert {"command", "versions", "git_revision", "machine", "threads"} <= content["resumed"][0].keys()


def test_weights_in_the_run_folder_are_refused(run, tmp_path):
    check_outside(str(tmp_path / "run_2" / "encoder"), run.folder.path)
    with pytest.raises(InputError, match="which this run would write to; give another --experiment_name"):
        check_outside(str(run.folder.path / "sub" / ".." / "encoder"), run.folder.path)
