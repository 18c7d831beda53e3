"""The run folder, its checkpoints, and the files and folders that are whole or absent."""

import os
import signal

import pytest
import torch
from conftest import run_code
from safetensors.torch import load_file

from training.files import alone_at, replace_folder, write_json
from training.launch import InputError
from training.run_folder import RunFolder, is_whole, read_state

MODEL = {"weight": torch.arange(6.0).reshape(2, 3)}


def save(folder, step, keep=3):
    state = {"step": step, "global_batch_size": 8, "data": "abc"}
    return folder.save(MODEL, {"optimizer": {"state": {}, "lr": 0.1}}, state, keep=keep)


def fill(folder, *names):
    """Write files, each of which holds its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_in(folder):
    """Return the text of all files below a folder, by their paths."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a run that has started."""
    result = RunFolder(tmp_path / "run")
    result.checkpoints.mkdir(parents=True)
    write_json(result.path / "args.json", {"flags": {}, "versions": {}})
    return result


OTHERS = [
    "model/net.py",
    "best/best.pt",
    "predictions/a.csv",
    "checkpoints/step_1000/w.bin",
    "log.jsonl",
    "metrics.json",
]


@pytest.mark.parametrize("names", [*([name] for name in OTHERS), ["args.json"], OTHERS])
def test_the_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path, names):
    fill(tmp_path, *names, "slurm/7.out", "job.log")
    before, first = files_in(tmp_path), sorted(names)[0].partition("/")[0]
    with pytest.raises(InputError, match=rf"holds files that no run wrote \({first}.*--experiment_name"):
        RunFolder(tmp_path).lock()
    RunFolder(tmp_path).clear_beyond(0)
    assert files_in(tmp_path) == before and (tmp_path / "checkpoints").exists() == any("step" in n for n in names)


@pytest.mark.parametrize("names", [[], ["slurm/7.out", "train.log", "1.out", "1.err", ".hidden"]])
def test_a_folder_with_the_logs_of_the_job_is_taken(tmp_path, names):
    fill(tmp_path / "run", *names)
    for _ in range(2):  # the second start finds what the first has made
        RunFolder(tmp_path / "run").lock()
    assert {*files_in(tmp_path / "run")} == {*names, ".lock"}


def test_the_folder_of_a_run_that_left_no_checkpoint_is_reused(folder):
    results = ("log.jsonl", "damaged.jsonl", "predictions/1.png", "best/a", "model/a", "tensorboard/a", ".new_best/a")
    fill(folder.path, *results, "checkpoints/.saving_step_00000002/a", "checkpoints/step_00000001/model.safetensors")
    folder.lock()
    assert folder.find(None) is None and folder.find("auto") is None
    folder.clear_beyond(0)
    assert {*files_in(folder.path)} == {"args.json", ".lock"} and not list(folder.checkpoints.iterdir())


def test_a_disk_that_is_full_is_reported_by_the_caller(tmp_path):
    with pytest.raises(OSError, match="No space"), alone_at(tmp_path / "run"):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_holds_what_was_saved_and_nothing_is_left_beside_it(folder):
    path = save(folder, 12)
    assert path.name == "step_00000012" and is_whole(path) and read_state(path)["step"] == 12
    assert torch.equal(load_file(path / "model.safetensors")["weight"], MODEL["weight"])
    assert torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["lr"] == 0.1
    before = path.stat().st_ino, (path / "model.safetensors").stat().st_mtime_ns
    assert save(folder, 12) == path  # not written again
    assert (path.stat().st_ino, (path / "model.safetensors").stat().st_mtime_ns) == before
    for step in (100, 20, 1000):
        save(folder, step, keep=2)
    assert sorted(os.listdir(folder.checkpoints)) == ["step_00000100", "step_00001000"]


@pytest.mark.parametrize("name, size", [("state.json", 0), ("state.json", 15), ("model.safetensors", 50)])
def test_an_incomplete_checkpoint_is_replaced(folder, name, size):
    save(folder, 1)
    os.truncate(save(folder, 2) / name, size)
    assert folder.find("latest").name == "step_00000001"
    with pytest.raises(InputError, match="incomplete; resume from another one"):
        folder.find("step_00000002")
    (folder.checkpoints / "step_00000002" / "optimizer.pt").unlink()
    assert is_whole(save(folder, 2))


def test_the_checkpoint_to_resume(folder, tmp_path):
    with pytest.raises(InputError, match="no whole checkpoint"):
        folder.find("latest")
    for name in ("step_00000007", ""):
        with pytest.raises(InputError, match=r"is not a folder; expected latest, auto or one of .*there are none"):
            folder.find(name)
    first, second = save(folder, 1), save(folder, 2)
    assert folder.find("latest") == folder.find("auto") == second
    assert folder.find("step_00000001") == folder.find(str(first)) == first
    finished = RunFolder(tmp_path / "finished")
    fill(finished.path, "metrics.json")
    with pytest.raises(InputError, match=r"already holds a run.*--resume_from_checkpoint latest.*--experiment_name"):
        folder.find(None)
    for name in (None, "auto", "latest"):
        with pytest.raises(InputError, match=r"already holds a run, .* no checkpoint; give another --experiment_name"):
            finished.find(name)
    with pytest.raises(InputError, match="belongs to another run"):
        finished.find(str(first))


def test_a_resumption_removes_what_lies_beyond_its_checkpoint(folder):
    save(folder, 1)
    (save(folder, 3) / "state.json").unlink()  # as a kill leaves it while old checkpoints are removed
    save(folder, 5)
    fill(folder.path, "checkpoints/.saving_step_00000002/a", "log.jsonl", "metrics.json", "best/a", ".new_best/a")
    folder.clear_beyond(1)
    assert os.listdir(folder.checkpoints) == ["step_00000001"]
    assert sorted(os.listdir(folder.path)) == ["args.json", "best", "checkpoints", "log.jsonl"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_folder_is_replaced_or_stays(tmp_path, error):
    def fail(folder):
        fill(folder, "half")
        raise error

    target = tmp_path / "run" / "best"
    for name in (None, "deep/old", "deep/new"):
        if name:
            replace_folder(target, lambda folder, name=name: fill(folder, name))
        with pytest.raises(type(error)):
            replace_folder(target, fail)
        assert {*files_in(target.parent)} == ({f"best/{name}"} if name else set())


@pytest.mark.parametrize("moment", ["write", "exchange"])
def test_the_attempt_after_a_kill_takes_the_old_folder_back(tmp_path, moment):
    code = f"""
import os; from pathlib import Path; from training.files import replace_folder
target, rename = Path("run/best"), Path.rename
kill = lambda *args: os.kill(os.getpid(), 9)
replace_folder(target, lambda folder: (folder / "old").touch())
Path.rename = lambda path, to: kill() if path.name == ".new_best" else rename(path, to)
replace_folder(target, kill if {moment!r} == "write" else lambda folder: (folder / "new").touch())
"""
    run_code(code, cwd=tmp_path, code=-signal.SIGKILL)
    target = tmp_path / "run" / "best"
    assert ".new_best" in os.listdir(target.parent) and target.exists() == (moment == "write")
    with pytest.raises(ZeroDivisionError):
        replace_folder(target, lambda folder: 1 / 0)
    assert {*files_in(target.parent)} == {"best/old"}
