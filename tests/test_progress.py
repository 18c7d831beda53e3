import json
import sys
from itertools import repeat
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, log_of, run_code
from PIL import Image

from training.launch import RunError
from training.plan import BatchPlan, LengthPlan, Plan, Stage
from training.progress import DamagedImages, Progress, Rehearsal, best_of, truncate_log
from training.trackers import finish_trackers, start_trackers

FLAGS = {"seed": 3, "learning_rate": 1e-3, "img_size": [32, 48], "pin_memory": False, "max_steps": None}
PLAN = Plan(BatchPlan(8, 8, 8), LengthPlan(10, 100, 0), 1e-3, 0.0)


def begin(folder, trackers=(), *, start_step=0, log_every=1):
    """Return the progress of a run that starts, or resumes, with trackers."""
    accelerator = Accelerator(cpu=True)
    options = dict(project="p", run_name=None, flags=FLAGS, start_step=start_step)
    start_trackers(accelerator, folder, [*trackers], **options)
    progress = Progress(accelerator, folder, PLAN, log_every=log_every, start_step=start_step)
    progress.bar.close()  # no test looks at it
    return progress


def go(progress, first, last, *, offset=0.0):
    """Log some steps, with a validation and its picture every ten steps."""
    path = progress.path.with_name("picture.png")
    Image.fromarray(np.full((6, 8, 3), 200, np.uint8)).save(path)
    for step in range(first, last + 1):
        progress.write({"step": step, "epoch": step / 10, "loss": step + offset, "note": "no number"})
        if step % 10 == 0:
            progress.write({"step": step, "epoch": step / 10, "val_loss": step + offset})
            progress.picture(path, "reconstructions", step)


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test sets."""
    result = SimpleNamespace(now=0.0)
    monkeypatch.setattr("training.progress.time.perf_counter", lambda: result.now)
    return result


def test_speed_counts_neither_validation_nor_saving(tmp_path, clock):
    progress, norm = begin(tmp_path, log_every=4), torch.tensor(2.0)

    def loader():
        for number in range(9):
            clock.now += 1
            yield number

    for step, _ in enumerate(progress.timed(loader()), 1):
        clock.now += 3
        assert progress.step(step, torch.tensor(float(step)), norm, 0.5) == (step in (1, 4, 8))
        with progress.paused():
            clock.now += 100
    assert step == 9 and progress.seconds == clock.now
    expected = dict(learning_rate=0.5, grad_norm=2.0, images_per_second=2.0, data_wait=0.25)
    assert log_of(tmp_path) == [dict(step=n, epoch=n / 10, loss=float(n), **expected) for n in (1, 4, 8)]


def test_an_infinite_norm_under_a_loss_scaler_is_null(tmp_path, clock):
    progress = begin(tmp_path)
    progress.accelerator.scaler = object()
    clock.now += 1
    assert progress.step(1, torch.tensor(2.0), torch.tensor(float("inf")), 0.5)
    assert log_of(tmp_path)[0]["grad_norm"] is None


@pytest.mark.parametrize(
    "step_seconds, steps, report",
    [
        (1, 17, "dry run    11 steps timed after 6: 1 s a step, 8 images/s, data wait 50%, peak memory "),
        (30, 5, "dry run    3 steps timed after 2: 30 s a step, 0.2667 images/s, "),
    ],
)
def test_a_rehearsal_times_what_is_not_in_stock(tmp_path, clock, capsys, step_seconds, steps, report):
    progress = begin(tmp_path, start_step=40)
    crew = SimpleNamespace(any=bool, signal_name=None)
    rehearsal = Rehearsal(progress, crew, read_ahead=4)
    for step in range(1, steps + 1):
        clock.now += step_seconds
        progress.waited += step_seconds / 2
        assert rehearsal.completed(torch.tensor(1.0)) == (step == steps)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].startswith(report) and lines[1].startswith(f"60 steps take {step_seconds}")
    assert not (tmp_path / "log.jsonl").exists()
    crew.signal_name, rehearsal = "SIGTERM", Rehearsal(progress, crew, read_ahead=4)
    assert not rehearsal.completed(torch.tensor(1.0)) and not rehearsal.completed(torch.tensor(1.0))
    with pytest.raises(RunError, match="a loss of the dry run is not finite"):
        rehearsal.completed(torch.tensor(float("nan")))


def test_a_rehearsal_times_each_stage(tmp_path, clock, capsys):
    """The step time and the data wait are means over the remaining steps of the run."""
    progress, crew, loaded = begin(tmp_path), SimpleNamespace(any=bool, signal_name=None), []
    rehearsal = Rehearsal(progress, crew, read_ahead=0)
    stages = [Stage((16, 16), range(2, 3)), Stage((32, 32), range(3, 6))]

    def load(stage):
        loaded.append(stage.steps.start)
        return repeat(1 if stage.size == (16, 16) else 3)

    for seconds in rehearsal.walk(stages, load):
        clock.now += seconds
        progress.waited += 0.5
        if rehearsal.completed(torch.tensor(1.0)):
            break
    # Each stage runs one step, then more than three seconds, then more than ten
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    report = "dry run    15 steps timed after 8: 2.5 s a step, 3.2 images/s, data wait 20%, peak memory "
    assert loaded == [2, 3] and lines[0].startswith(report)
    assert lines[1:3] == ["16 x 16: 1 s a step, 1 step", "32 x 32: 3 s a step, 3 steps"]
    assert lines[3] == "4 steps take 10 seconds, without validation and saving; nothing was written"


def test_a_rehearsal_waits_for_the_device_at_the_end_of_a_phase(tmp_path, clock, monkeypatch, capsys):
    waits, item = [], torch.Tensor.item

    def finish(losses):
        """Take a second for the steps that were launched."""
        waits.append(rehearsal.steps)
        clock.now += 1
        return item(losses)

    def rehearse(bad_step):
        for step in range(1, 100):
            clock.now += 0.5
            if rehearsal.completed(torch.tensor(float("nan") if step == bad_step else 1.0)):
                return

    monkeypatch.setattr(torch.Tensor, "item", finish)
    crew = SimpleNamespace(any=bool, signal_name=None)
    rehearsal = Rehearsal(begin(tmp_path), crew, read_ahead=4)
    rehearse(bad_step=None)
    assert waits == [1, 8, 29]  # steps of half a second: one, more than three seconds, more than ten
    assert "dry run    21 steps timed after 8: 0.548 s a step" in capsys.readouterr().out
    rehearsal = Rehearsal(begin(tmp_path), crew, read_ahead=4)
    with pytest.raises(RunError, match="a loss of the dry run is not finite"):
        rehearse(bad_step=11)
    assert waits[3:] == [1, 8, 29]


def test_the_log_is_cut_at_the_checkpoint(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 4, "top1": 2.0}, {"step": 5, "loss": 1.0}]
    lines += [{"step": 5, "epoch": 1.0, "top1": 2.0}, {"step": 5, "knn_top1": 40.0}, {"step": 6, "loss": 0.5}]
    (tmp_path / "log.jsonl").symlink_to("disk.jsonl")
    (tmp_path / "disk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7, "lo')
    assert truncate_log(tmp_path, 5) == {"top1": 2.0, "knn_top1": 40.0}
    assert log_of(tmp_path) == lines[:5] and (tmp_path / "log.jsonl").is_symlink()
    assert best_of(tmp_path, "top1") == (2.0, 4) and truncate_log(tmp_path, 1) == {}
    (tmp_path / "log.jsonl").unlink()
    assert truncate_log(tmp_path, 5) == {} and best_of(tmp_path, "top1") == (float("-inf"), None)


def test_damaged_images_are_named_once_and_limited(tmp_path, capsys):
    damaged = DamagedImages(tmp_path, 50, is_main_process=True)
    damaged.add([("a.jpg", "truncated"), ("b.jpg", "empty"), ("a.jpg", "truncated")])
    assert capsys.readouterr().err.count("note: ") == 1
    with open(damaged.path, "a") as file:
        file.write('{"path": "/cu')  # as a kill leaves it
    again = DamagedImages(tmp_path, 50, is_main_process=True)
    again.add([("a.jpg", "truncated"), ("c.jpg", "empty")])
    lines = damaged.path.read_text().splitlines()
    assert [json.loads(line)["path"] for line in (*lines[:2], lines[3])] == ["a.jpg", "b.jpg", "c.jpg"]
    again.add([(f"{i}.jpg", "empty") for i in range(7)])
    with pytest.raises(RunError, match="11 of 50 images are damaged, more than the 10 allowed; "):
        again.add([("x.jpg", "empty")])


@pytest.mark.parametrize("num_samples, limit", [(3, 2), (5000, 50)])  # one image must be readable; one percent
def test_the_limit_of_damaged_images(tmp_path, num_samples, limit):
    damaged = DamagedImages(tmp_path, num_samples, is_main_process=False)
    damaged.add([(f"{i}.jpg", "empty") for i in range(limit)])
    with pytest.raises(RunError, match=f"{limit + 1} of {num_samples} images .* more than the {limit} allowed"):
        damaged.add([("x.jpg", "empty")])
    assert not damaged.path.exists()


# Trackers


def test_wandb_offline_keeps_the_id_of_the_run_and_goes_back_without_warnings(tmp_path):
    pytest.importorskip("wandb")
    code = f"""
import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
from pathlib import Path
from test_progress import begin, finish_trackers, go
progress = begin(Path.cwd(), ["wandb"])
go(progress, 1, 13)
go(progress, 11, 12)  # wandb knows of steps beyond the checkpoint
run = progress.accelerator.get_tracker("wandb", unwrap=True)
assert run.summary["step"] == 12 and run.summary["loss"] == 12 and "note" not in run.summary.keys()
assert run.config["img_size"] == [32, 48] and run.config["seed"] == 3 and run.config["pin_memory"] is False
finish_trackers(progress.accelerator)
progress = begin(Path.cwd(), ["wandb"], start_step=10)
assert progress.accelerator.get_tracker("wandb", unwrap=True).id == run.id
finish_trackers(progress.accelerator)
"""
    stderr = run_code(code, cwd=tmp_path, HOME=str(tmp_path), WANDB_MODE="offline").stderr
    assert "warning: " not in stderr and "Tried to log" not in stderr
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/reconstructions_*.png"))


def warnings_of(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]


@pytest.mark.parametrize("module", [None, ModuleType("a folder")])  # wandb creates a folder of that name
def test_trackers_that_are_not_installed_print_a_warning_each(tmp_path, monkeypatch, capsys, module):
    for name in ("wandb", "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, module)
    assert not begin(tmp_path, ["wandb", "tensorboard"]).accelerator.trackers and not list(tmp_path.iterdir())
    for line, name, remedy in zip(warnings_of(capsys), ("wandb", "tensorboard"), ("wandb and", "--up"), strict=True):
        assert f"not logging to {name}: " in line and f"; pip install {remedy}" in line


@pytest.mark.parametrize("method", ["log", "log_images", "finish"])
def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path, capsys, method):
    progress, first, second = begin(tmp_path), Mock(), Mock()
    first.name, failing = "first", getattr(first, method)
    failing.side_effect = OSError("the quota\nis used up.")
    progress.accelerator.trackers += [first, second]
    go(progress, 1, 20)
    finish_trackers(progress.accelerator)
    assert failing.call_count == 1 and first.method_calls[-1][0] == method and not progress.accelerator.trackers
    assert [second.log.call_count, second.log_images.call_count, second.finish.call_count] == [22, 2, 1]
    expected = "warning: not logging to first any more: the quota is used up; log.jsonl has the rest"
    assert warnings_of(capsys) == [expected]
