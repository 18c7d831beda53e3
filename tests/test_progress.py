import importlib.machinery
import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, run_code
from PIL import Image

from training.launch import RunError
from training.progress import DamagedImages, Progress, truncate_log
from training.trackers import finish_trackers, start_trackers
from training.wording import in_bytes, in_time

FLAGS = {"seed": 3, "learning_rate": 1e-3, "img_size": [32, 48], "pin_memory": False, "max_steps": None}


def begin(folder: Path, names: list[str], *, start_step: int = 0) -> Progress:
    """A started run, or its resumption."""
    accelerator = Accelerator(cpu=True)
    sizes = dict(total_steps=100, steps_per_epoch=10, global_batch_size=8, log_every=1, start_step=start_step)
    start_trackers(accelerator, folder, names, project="p", run_name=None, flags=FLAGS, start_step=start_step)
    progress = Progress(accelerator, folder, **sizes)
    progress.close()  # no test looks at the bar
    return progress


def go(progress: Progress, first: int, last: int, *, offset: float = 0.0) -> None:
    """Writes the lines of some steps, with a validation and its picture every ten."""
    path = progress.path.with_name("picture.png")
    Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(path)
    for step in range(first, last + 1):
        progress.write({"step": step, "epoch": step / 10, "loss": step + offset, "note": "no number"})
        if step % 10 == 0:
            progress.write({"step": step, "epoch": step / 10, "val_loss": step + offset})
            progress.picture(path, "reconstructions", step)


def script(code: str, folder: Path, **variables: str) -> str:
    """What `code`, run in a process of its own after this file's names, prints on stderr. Nobody is logged in there."""
    home = folder / "home"
    home.mkdir()
    names = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; from test_progress import *"
    variables = {"HOME": str(home), "NETRC": str(home / "netrc"), **variables}
    return run_code(f"{names}\n{dedent(code)}", cwd=folder, **variables).stderr


def test_lines_beyond_the_checkpoint_are_removed(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 4, "val_loss": 2.0}, {"step": 5, "loss": 1.0}]
    lines += [{"step": 5, "val_loss": 1.0}, {"step": 5, "knn_top1": 40.0}, {"step": 6, "loss": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 7, "lo')
    assert truncate_log(tmp_path, 5) == {"val_loss": 1.0, "knn_top1": 40.0}
    kept = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == lines[:5]
    assert truncate_log(tmp_path, 1) == truncate_log(tmp_path / "nothing here", 5) == {}


def test_tensorboard_continues_a_curve_without_the_steps_that_were_discarded(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    progress = begin(tmp_path, ["tensorboard"])
    go(progress, 1, 23)
    progress = begin(tmp_path, ["tensorboard"], start_step=20)  # the first was killed after step 23
    go(progress, 21, 25, offset=0.5)
    progress.write({"step": 26, "epoch": 2.6, "loss": float("nan")})
    finish_trackers(progress.accelerator)

    assert not [path for path in (tmp_path / "tensorboard").iterdir() if path.is_dir()]  # one run, not one a start
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    curve = {event.step: event.value for event in events.Scalars("loss")}
    assert len(curve) == len(events.Scalars("loss")) == 26 and np.isnan(curve.pop(26))
    assert curve == {step: step + 0.5 * (step > 20) for step in range(1, 26)}
    assert sorted(events.Tags()["scalars"]) == ["epoch", "loss", "val_loss"]
    assert [event.step for event in events.Scalars("val_loss")] == [10, 20]
    assert [(event.step, event.width, event.height) for event in events.Images("reconstructions")] == [
        (10, 8, 6),
        (20, 8, 6),
    ]
    table = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| img_size | `32 48` |" in table and "| seed | `3` |" in table and "max_steps" not in table


def test_wandb_offline_keeps_the_run_s_id_and_goes_back_in_silence(tmp_path):
    pytest.importorskip("wandb")
    code = """
    progress = begin(Path.cwd(), ["wandb"])
    go(progress, 1, 13)
    go(progress, 11, 12)  # as where wandb knows of steps beyond the checkpoint
    run = progress.accelerator.get_tracker("wandb", unwrap=True)
    assert run.summary["step"] == 12 and run.summary["loss"] == 12 and "note" not in run.summary.keys()
    assert run.config["img_size"] == "32 48" and run.config["seed"] == 3 and run.config["pin_memory"] is False
    finish_trackers(progress.accelerator)
    progress = begin(Path.cwd(), ["wandb"], start_step=10)
    assert progress.accelerator.get_tracker("wandb", unwrap=True).id == run.id
    finish_trackers(progress.accelerator)
    """
    said = script(code, tmp_path, WANDB_MODE="offline")
    assert "warning: " not in said and "Tried to log" not in said
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/reconstructions_*.png"))


def test_wandb_without_a_login_costs_one_warning_and_leaves_tensorboard(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    code = """
    progress = begin(Path.cwd(), ["wandb", "tensorboard"])
    go(progress, 1, 10)
    assert [tracker.name for tracker in progress.accelerator.trackers] == ["tensorboard"]
    finish_trackers(progress.accelerator)
    """
    said = script(code, tmp_path)
    warnings = [line for line in said.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: not logging to wandb: ")
    assert warnings[0].endswith("; run `wandb login`, or set WANDB_MODE=offline")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 11
    assert list((tmp_path / "tensorboard").iterdir()) and not (tmp_path / "wandb_run_id").exists()


@pytest.mark.parametrize("spec", [None, importlib.machinery.ModuleSpec("a folder", None)])
def test_trackers_that_are_not_installed_cost_a_warning_each(tmp_path, monkeypatch, capsys, spec):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    progress = begin(tmp_path, ["wandb", "tensorboard"])
    go(progress, 1, 10)
    finish_trackers(progress.accelerator)
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        f"warning: not logging to {name}: the package is not installed; pip install {name}"
        for name in ("wandb", "tensorboard")
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "picture.png"}


def test_a_tracker_that_cannot_start_costs_a_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where a folder should be")
    progress = begin(tmp_path, ["tensorboard"])
    go(progress, 1, 2)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and warnings[0].startswith("warning: not logging to tensorboard: ")


class Recorder:
    """A tracker that fails at one of its methods."""

    def __init__(self, name: str, fails_at: str | None = None):
        self.name, self.fails_at, self.calls = name, fails_at, []

    def __getattr__(self, method: str):
        def call(*args, **kwargs):
            self.calls.append(method)
            if method == self.fails_at:
                raise OSError("the quota\nis used up.")

        return call


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_a_tracker_that_fails_in_the_run_is_dropped_with_one_warning(tmp_path, capsys, method):
    progress = begin(tmp_path, [])
    first, second = Recorder("first", method), Recorder("second")
    progress.accelerator.trackers += [first, second]
    go(progress, 1, 20)
    finish_trackers(progress.accelerator)
    assert first.calls.count(method) == 1 and first.calls[-1] == method
    assert second.calls.count("log") == 22 and second.calls.count("log_images") == 2 and second.calls[-1] == "finish"
    assert [line for line in capsys.readouterr().err.splitlines() if "warning" in line] == [
        "warning: not logging to first any more: the quota is used up; log.jsonl has the rest"
    ]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 22
    assert not progress.accelerator.trackers


def test_damaged_images_are_named_once_and_limited(tmp_path):
    damaged = DamagedImages(tmp_path, 50, is_main_process=True)
    damaged.add([("a.jpg", "truncated"), ("b.jpg", "empty"), ("a.jpg", "truncated")])
    again = DamagedImages(tmp_path, 50, is_main_process=True)
    again.add([("a.jpg", "truncated"), ("c.jpg", "empty")])
    lines = [json.loads(line) for line in (tmp_path / "damaged.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == ["a.jpg", "b.jpg", "c.jpg"] and lines[1]["reason"] == "empty"
    with open(tmp_path / "damaged.jsonl", "a") as file:
        file.write('{"path": "/cu')
    assert DamagedImages(tmp_path, 50, is_main_process=True).named == {"a.jpg", "b.jpg", "c.jpg"}
    again.add([(f"{i}.jpg", "empty") for i in range(7)])
    with pytest.raises(RunError, match="11 of 50 images are damaged, more than the 10 allowed"):
        again.add([("x.jpg", "empty")])


def test_of_few_images_one_must_be_readable(tmp_path):
    damaged = DamagedImages(tmp_path, 3, is_main_process=True)
    damaged.add([("a.jpg", "empty"), ("b.jpg", "empty")])
    with pytest.raises(RunError, match="3 of 3 images are damaged, more than the 2 allowed"):
        damaged.add([("c.jpg", "empty")])


def test_the_limit_is_one_percent_of_a_large_set(tmp_path):
    damaged = DamagedImages(tmp_path, 5000, is_main_process=False)
    damaged.add([(f"{i}.jpg", "empty") for i in range(50)])
    assert not (tmp_path / "damaged.jsonl").exists()
    with pytest.raises(RunError):
        damaged.add([("x.jpg", "empty")])


def test_sizes_and_times_for_people():
    assert [in_bytes(count) for count in (1.79e9, 4.5e6, 830, 2.4e12)] == ["1.79 GB", "4.5 MB", "0.83 kB", "2.4e+03 GB"]
    assert [in_time(seconds) for seconds in (0.25, 90, 148_680)] == ["0.25 seconds", "1.5 minutes", "41.3 hours"]
