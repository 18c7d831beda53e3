"""Tests of the run folder, its checkpoints, and folders that are replaced atomically."""

import os
import shutil
import signal

import pytest
import torch
from conftest import run_code
from safetensors.torch import load_file

from training.files import MARKER, alone_at, clear_beside, own_files, replace_folder, write_json
from training.launch import InputError, RunError
from training.run_folder import RunFolder, is_whole, read_state

MODEL = {"weight": torch.arange(6.0).reshape(2, 3)}


def save(folder, step, keep=3):
    state = {"step": step, "global_batch_size": 8, "data": "abc"}
    return folder.save(MODEL, {"optimizer": {"state": {}, "lr": 0.1}}, state, keep=keep)


def fill(folder, *names):
    """Write files that contain their own names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_in(folder):
    """Return the texts of all files below a folder, by path."""
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
    "tensorboard/events.out.tfevents.1.a",
    "hub.log",
]


@pytest.mark.parametrize("names", [*([name] for name in OTHERS), ["args.json"], OTHERS])
def test_the_folder_of_something_else_is_refused_and_stays_as_it_is(tmp_path, names):
    fill(tmp_path, *names, "a.txt", "job.log")
    before, first = files_in(tmp_path), sorted(names)[0].partition("/")[0]
    with pytest.raises(InputError, match=rf"holds files that no run wrote \({first}.*--experiment_name"):
        RunFolder(tmp_path).lock()
    RunFolder(tmp_path).clear_beyond(0)
    assert files_in(tmp_path) == before and (tmp_path / "checkpoints").exists() == any("step" in n for n in names)


@pytest.mark.parametrize("names", [[], ["slurm/7.out", "log.txt", "1.err", "job.sh", "config/a.yaml", ".hidden"]])
def test_a_folder_without_names_of_a_run_is_taken_and_keeps_its_files(tmp_path, names):
    fill(tmp_path / "run", *names)
    for _ in range(2):  # the second start finds the files of the first
        RunFolder(tmp_path / "run").lock()
    write_json(tmp_path / "run" / "args.json", {"flags": {}, "versions": {}})
    RunFolder(tmp_path / "run").clear_beyond(0)
    assert {*files_in(tmp_path / "run")} == {*names, ".lock", "args.json"}


def test_a_refused_start_removes_the_folders_that_it_created(tmp_path):
    refused = RunFolder(tmp_path / "work_dir" / "run")
    refused.lock()
    refused.release()
    assert not any(tmp_path.iterdir())
    fill(tmp_path, "work_dir/run/job.log")
    refused.lock()
    refused.release()
    assert files_in(tmp_path) == {"work_dir/run/job.log": "work_dir/run/job.log"}
    assert [path.name for path in (tmp_path / "work_dir" / "run").iterdir()] == ["job.log"]


def test_a_folder_that_is_released_while_another_run_locks_it_is_refused(tmp_path, monkeypatch):
    first = RunFolder(tmp_path / "run")
    first.lock()
    monkeypatch.setattr("fcntl.lockf", lambda *_: first.release())  # between the second run's open and its lock
    second = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="is being written to by another run"):
        second.lock()
    monkeypatch.undo()
    RunFolder(tmp_path / "run").lock()
    second.release()  # it never held the lock
    assert (tmp_path / "run" / ".lock").exists()


RESULTS = ("encoder", "model", "best")


def test_a_run_that_left_no_checkpoint_starts_anew_and_files_of_others_stay(folder):
    for name in RESULTS:
        replace_folder(folder.path / name, lambda new: fill(new, "config.json", "pretraining/model.safetensors"))
    pictures = [f"{name}/step_00000002.png" for name in ("reconstructions", "predictions")]
    fill(folder.path, "log.jsonl", "damaged.jsonl", "wandb_run_id", "tensorboard/events.out.tfevents.1.a", *pictures)
    fill(folder.path, "checkpoints/.saving_step_00000002/a", "checkpoints/step_00000001/model.safetensors")
    others = [f"{name}/{file}" for name in RESULTS for file in ("notes.txt", "pretraining/a.onnx", "mine/b")]
    others += ["predictions/predictions.jsonl", "predictions/labels/step_1.png", "reconstructions/best.png"]
    others += ["tensorboard/other/events.out.tfevents.2.b", "checkpoints/step_00000001/merged.pt", "notes.txt"]
    fill(folder.path, *others)
    folder.lock()
    assert folder.find(None) is None and folder.find("auto") is None
    folder.clear_beyond(0)
    assert {*files_in(folder.path)} == {"args.json", ".lock", *others}
    save(folder, 1)  # replaces the partly removed checkpoint
    assert folder.find("auto").name == "step_00000001"
    assert (folder.checkpoints / "step_00000001" / "merged.pt").read_text() == "checkpoints/step_00000001/merged.pt"


@pytest.mark.parametrize("call", range(1, 4))
def test_a_kill_in_a_save_leaves_the_files_of_others(folder, monkeypatch, call):
    def rename(path, to):
        calls.append(path)
        if len(calls) == call:
            raise KeyboardInterrupt
        os.rename(path, to)

    calls = []
    fill(folder.checkpoints / "step_00000001", "merged.pt", "notes/a")
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("pathlib.Path.rename", rename)
        save(folder, 1)
    assert folder.find("auto") is None
    folder.clear_beyond(0)
    assert files_in(folder.checkpoints) == {f"step_00000001/{name}": name for name in ("merged.pt", "notes/a")}
    assert is_whole(save(folder, 1)) and os.listdir(folder.checkpoints) == ["step_00000001"]


def test_old_checkpoints_leave_the_files_of_others(folder):
    fill(save(folder, 1), "merged.pt")
    save(folder, 2, keep=1)
    assert files_in(folder.checkpoints / "step_00000001") == {"merged.pt": "merged.pt"}
    assert [path.name for path in folder.whole_checkpoints()] == ["step_00000002"]


def test_copies_of_checkpoints_under_other_names_are_the_users(folder):
    names = ["step_00000001_keep", "step_best"]
    for name in names:
        shutil.copytree(save(folder, 1), folder.checkpoints / name)
    fill(folder.checkpoints, "step_half/model.safetensors", ".saving_mine/a")
    before = {path for path in folder.checkpoints.rglob("*") if "step_00000001" not in path.parts}
    save(folder, 2, keep=1)
    assert folder.find("latest").name == "step_00000002" and folder.find("step_best").name == "step_best"
    folder.clear_beyond(0)
    assert {*folder.checkpoints.rglob("*")} == before


@pytest.mark.parametrize("content", [{"flags": {}, "versions": {}}, {"format": "mae-accelerate run 1"}])
def test_runs_are_recognized_by_their_mark_and_older_ones_by_their_flags_and_versions(folder, content):
    write_json(folder.path / "args.json", content)
    fill(folder.path, "log.jsonl", "notes.txt")
    folder.lock()
    write_json(folder.path / "args.json", {"flags": {}})  # from another program
    with pytest.raises(InputError, match="holds files that no run wrote"):
        RunFolder(folder.path).lock()


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
    fill(folder.path, "checkpoints/.saving_step_00000002/a", "log.jsonl", "metrics.json", "best/a")
    fill(folder.path / ".best.replacing", MARKER, "new/a")
    write_json(folder.path / ".best.replacing" / MARKER, {"version": 1, "files": []})
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
        assert {*files_in(target.parent)} == ({f"best/{name}", f"best/{MARKER}"} if name else set())


@pytest.mark.parametrize("moment", ["mark", "write", "exchange", "clean"])
def test_the_attempt_after_a_kill_takes_the_old_folder_back(tmp_path, moment):
    code = f"""
import os; from contextlib import nullcontext; from pathlib import Path; from training.files import replace_folder
target, rename = Path("run/best"), Path.rename
kill = lambda *args, **at: os.kill(os.getpid(), 9)
replace_folder(target, lambda folder: (folder / "old").touch())
(target / "mine").touch()
def write(folder):
    if {moment!r} == "write":
        kill()
    (folder / "new").touch()
    if {moment!r} == "clean":
        1 / 0
if {moment!r} == "mark":
    os.fsync = kill
if {moment!r} == "exchange":
    Path.rename = lambda path, to: kill() if path.name == "new" else rename(path, to)
scandir = os.scandir
os.scandir = lambda path: nullcontext(sorted(scandir(path), key=lambda entry: entry.name))  # the marker first
os.rmdir = kill
replace_folder(target, write)
"""
    run_code(code, cwd=tmp_path, code=-signal.SIGKILL)
    target = tmp_path / "run" / "best"
    assert ".best.replacing" in os.listdir(target.parent) and target.exists() == (moment != "exchange")
    with pytest.raises(ZeroDivisionError):
        replace_folder(target, lambda folder: 1 / 0)
    assert {*files_in(target.parent)} == {"best/old", "best/mine", f"best/{MARKER}"}


def test_a_replaced_folder_keeps_what_others_put_there(tmp_path):
    """Own files that the new folder lacks are removed; an empty folder, a link and a Git repository stay."""
    target = tmp_path / "hub"
    replace_folder(target, lambda folder: fill(folder, "config.json", "pretraining/model.safetensors"))
    fill(target, "notes.txt", ".git/HEAD", "pretraining/convert.py")
    (target / "empty").mkdir()
    (target / "link").symlink_to("notes.txt")
    for text in ("one", "two"):
        replace_folder(target, lambda folder, text=text: (folder / "config.json").write_text(text))
    names = {"config.json", "notes.txt", ".git/HEAD", "pretraining/convert.py", "link", MARKER}
    assert {*files_in(target)} == names and (target / "config.json").read_text() == "two"
    assert (target / "empty").is_dir() and (target / "link").is_symlink() and os.listdir(tmp_path) == ["hub"]
    replace_folder(target, lambda folder: fill(folder, "config.json"))
    assert own_files(target) == ["config.json", MARKER]


def test_a_link_to_a_replaced_folder_stays(tmp_path):
    """Such a link may lead to a larger disk."""
    link, real = tmp_path / "run" / "hub", tmp_path / "disk" / "hub"
    fill(real, "notes.txt")
    link.parent.mkdir()
    link.symlink_to(real)
    for names in (["config.json"], ["model.safetensors"]):
        replace_folder(link, lambda folder, names=names: fill(folder, *names))
        assert link.is_symlink() and {*files_in(real)} == {"notes.txt", *names, MARKER}
    fill(real.parent, f".hub.replacing/{MARKER}")  # left by a killed call
    clear_beside(link)
    assert os.listdir(real.parent) == ["hub"] and os.listdir(link.parent) == ["hub"]


def test_what_lies_beside_a_replaced_folder_stays(tmp_path):
    """Their names are like those of unfinished replacements."""
    fill(tmp_path, ".new_hub/mine", ".old_hub/mine", "hub/config.json", "encoder")
    with pytest.raises(RunError, match=r"encoder is in the way, a file .*; move it"):
        replace_folder(tmp_path / "encoder", lambda folder: fill(folder, "config.json"))
    assert (tmp_path / "encoder").read_text() == "encoder"
    (tmp_path / "encoder").unlink()
    replace_folder(tmp_path / "hub", lambda folder: fill(folder, "config.json"))
    assert {".new_hub/mine", ".old_hub/mine"} <= files_in(tmp_path).keys()
    fill(tmp_path, ".hub.replacing/old/mine")
    with pytest.raises(RunError, match=r"\.hub\.replacing is in the way, and was not written by this project; move it"):
        replace_folder(tmp_path / "hub", lambda folder: fill(folder, "config.json"))
    assert ".hub.replacing/old/mine" in files_in(tmp_path)


def test_a_checkpoint_of_a_folder_that_is_gone_is_an_error_of_one_line(folder):
    shutil.rmtree(folder.path)
    with pytest.raises(RunError, match=r"the checkpoint of step 3 could not be written to .*No such file"):
        save(folder, 3)
