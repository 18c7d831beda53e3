import copy
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from safetensors.torch import load_file

from training.checkpoint import (
    RunFolder,
    claim_run_folder,
    compare_with_run,
    is_whole,
    load_training,
    read_state,
    replace_folder,
    save_training,
    write_json,
)
from training.launch import RunError

MODEL = {"weight": torch.arange(6.0).reshape(2, 3)}


def save(folder, step, keep=3):
    state = {"step": step, "global_batch_size": 8, "data": "abc"}
    return folder.save(MODEL, {"optimizer": {"state": {}, "lr": 0.1}}, state, keep=keep)


@pytest.fixture
def folder(tmp_path):
    result = RunFolder(tmp_path / "run")
    result.checkpoints.mkdir(parents=True)
    return result


def test_a_checkpoint_holds_what_was_saved_and_nothing_is_left_beside_it(folder):
    path = save(folder, 12)
    assert path.name == "step_00000012" and is_whole(path) and read_state(path)["step"] == 12
    assert torch.equal(load_file(path / "model.safetensors")["weight"], MODEL["weight"])
    assert torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["lr"] == 0.1
    assert os.listdir(folder.checkpoints) == ["step_00000012"]


def test_a_moving_average_is_part_of_the_checkpoint(folder):
    """It is loaded as it was saved; and a checkpoint without its file is incomplete."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.mul_(0.5).add_(1)
    accelerator, state = Accelerator(cpu=True), {"step": 3}
    optimizer = torch.optim.AdamW(model.parameters())
    alone = SimpleNamespace(gather=lambda here: here)  # a Crew without its signal handlers
    save_training(folder, accelerator, alone, model, optimizer, state, keep=1, ema=ema)
    path = folder.find("latest")
    assert sorted(read_state(path)["files"]) == ["ema.safetensors", "model.safetensors", "optimizer.pt"]
    assert (path / "ema.safetensors").stat().st_mode == (path / "state.json").stat().st_mode
    other_model, other_ema = (torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2))
    load_training(path, accelerator, other_model, torch.optim.AdamW(other_model.parameters()), ema=other_ema)
    for loaded, saved in ((other_model, model), (other_ema, ema)):
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    (path / "ema.safetensors").unlink()
    assert not is_whole(path)


def test_a_whole_checkpoint_is_not_written_again(folder):
    path = save(folder, 12)
    before = path.stat().st_ino, (path / "model.safetensors").stat().st_mtime_ns
    assert save(folder, 12) == path
    assert (path.stat().st_ino, (path / "model.safetensors").stat().st_mtime_ns) == before


def test_the_newest_are_kept(folder):
    for step in (5, 100, 20, 1000):
        save(folder, step, keep=2)
    assert [path.name for path in folder.whole_checkpoints()] == ["step_00000100", "step_00001000"]
    assert sorted(os.listdir(folder.checkpoints)) == ["step_00000100", "step_00001000"]


@pytest.mark.parametrize("damage", ["no state", "cut state", "cut model", "no optimizer"])
def test_an_incomplete_checkpoint_is_never_found_but_replaced(folder, damage):
    save(folder, 1)
    path = save(folder, 2)
    if damage == "no state":
        (path / "state.json").unlink()
    elif damage == "cut state":
        (path / "state.json").write_text('{"step": 2, "fi')
    elif damage == "cut model":
        os.truncate(path / "model.safetensors", 50)
    else:
        (path / "optimizer.pt").unlink()
    assert folder.find("latest").name == "step_00000001"
    with pytest.raises(RunError, match="incomplete"):
        folder.find("step_00000002")
    assert is_whole(save(folder, 2))


def test_what_resume_finds(folder, tmp_path):
    assert folder.find(None) is None and folder.find("auto") is None
    with pytest.raises(RunError, match="no whole checkpoint"):
        folder.find("latest")
    with pytest.raises(RunError, match="is no folder"):
        folder.find("step_00000007")
    first = save(folder, 1)
    second = save(folder, 2)
    assert folder.find("latest") == folder.find("auto") == second
    assert folder.find("step_00000001") == folder.find(str(first)) == first
    with pytest.raises(RunError, match=r"already holds a run.*--resume_from_checkpoint latest.*--experiment_name"):
        folder.find(None)
    finished = RunFolder(tmp_path / "finished")
    write_json(tmp_path / "metrics.json", {})
    finished.path.mkdir()
    write_json(finished.path / "metrics.json", {})
    for wanted in (None, "auto"):
        with pytest.raises(RunError, match="already holds a run"):
            finished.find(wanted)
    with pytest.raises(RunError, match="is of another run"):
        finished.find(str(first))
    with pytest.raises(RunError, match="is no folder"):
        folder.find("")


def test_leftovers_are_removed(folder):
    save(folder, 1)
    (folder.checkpoints / ".saving_step_00000002").mkdir()
    (save(folder, 3) / "state.json").unlink()  # as a kill leaves it while old checkpoints are removed
    (folder.path / "log.jsonl").write_text("{}\n")
    save(folder, 5)
    write_json(folder.path / "metrics.json", {})
    folder.clear_beyond(1)
    assert os.listdir(folder.checkpoints) == ["step_00000001"] and (folder.path / "log.jsonl").exists()
    assert not (folder.path / "metrics.json").exists()
    for name in ("predictions", "model", "best", "reconstructions", "tensorboard"):
        (folder.path / name).mkdir()
        (folder.path / name / "file").touch()
    (folder.path / ".new_best").mkdir()
    folder.clear_beyond(1)
    assert {"model", "best", "predictions"} < {*os.listdir(folder.path)} and not (folder.path / ".new_best").exists()
    folder.clear_beyond(0)
    assert os.listdir(folder.path) == ["checkpoints"] and os.listdir(folder.checkpoints) == []


def test_one_writer_until_its_process_ends(folder):
    code = (
        "import sys; from pathlib import Path; from training.checkpoint import RunFolder; "
        f"folder = RunFolder(Path({str(folder.path)!r})); folder.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match="being written to by another run"):
        folder.lock()
    other.kill()
    other.wait()
    folder.lock()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is not writable"):
        RunFolder(tmp_path / "file" / "run").lock()


def test_a_failed_save_leaves_the_earlier_checkpoint_and_says_so(folder, monkeypatch):
    save(folder, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.checkpoint.torch.save", full)
    with pytest.raises(RunError, match=r"step 2 could not be written.*the disk is full.*step_00000001 is whole"):
        save(folder, 2)
    assert os.listdir(folder.checkpoints) == ["step_00000001"] and is_whole(folder.find("latest"))


def test_all_differences_to_the_run_are_listed(folder):
    path = save(folder, 1)
    flags = {"seed": 0, "img_size": [64, 64], "mask_ratio": 0.75, "num_workers": 2, "path_to_data": "a"}
    (folder.path / "args.json").write_text(json.dumps({"flags": flags}))
    assert compare_with_run(path, dict(flags, num_workers=7, path_to_data="b"), "abc", defaults={}) == []
    errors = compare_with_run(path, dict(flags, seed=1, img_size=[32, 64]), "other", defaults={})
    assert len(errors) == 3
    assert errors[0].startswith("--seed 1 differs from the run to resume, which has 0")
    assert errors[1].startswith("--img_size 32 64 differs from the run to resume, which has 64 64")
    assert "is not the data set of the run" in errors[2]
    newer = dict(flags, tf32=True)  # a flag that the run did not know yet
    assert compare_with_run(path, newer, "abc", defaults={"tf32": True}) == []
    assert "--tf32 True differs" in compare_with_run(path, newer, "abc", defaults={"tf32": False})[0]
    (folder.path / "args.json").unlink()
    assert "cannot be read" in compare_with_run(path, flags, "abc", defaults={})[0]


def test_the_run_folder_is_claimed(folder):
    Accelerator(cpu=True)
    path = save(folder, 1)
    checkpoint, state, errors = claim_run_folder(folder, "latest", write=False)
    assert (checkpoint, state["step"], errors) == (path, 1, [])
    assert not (folder.path / ".lock").exists()
    checkpoint, state, errors = claim_run_folder(folder, None, write=True)
    assert checkpoint is None and state == {} and len(errors) == 1 and "already holds a run" in errors[0]
    assert (folder.path / ".lock").exists()


def fill(text):
    def write(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)

    return write


def content(target):
    """What a folder holds, and that nothing lies beside it."""
    assert os.listdir(target.parent) == [target.name] and os.listdir(target) == ["deep"]
    return (target / "deep" / "file").read_text()


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "run" / "best"
    for text in ("first", "second"):
        replace_folder(target, fill(text))
        assert content(target) == text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "run" / "best"

    def fail(folder):
        (folder / "half").write_text("")
        raise error

    with pytest.raises(type(error)):
        replace_folder(target, fail)
    assert os.listdir(tmp_path / "run") == []
    replace_folder(target, fill("old"))
    with pytest.raises(type(error)):
        replace_folder(target, fail)
    assert content(target) == "old"


def test_a_failed_exchange_takes_the_old_folder_back(tmp_path, monkeypatch):
    target, rename = tmp_path / "run" / "best", type(tmp_path).rename
    replace_folder(target, fill("old"))

    def refuse(path, to):
        if path.name == ".new_best":
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(target, fill("new"))
    assert content(target) == "old"


@pytest.mark.parametrize("moment", ["write", "exchange"])
def test_what_a_kill_left_is_cleaned_up(tmp_path, moment):
    """Killed while it writes, the old folder stands; killed within the exchange, the next attempt takes it back."""
    target = tmp_path / "run" / "best"
    code = (
        "import os, signal, sys; from pathlib import Path; from training.checkpoint import replace_folder\n"
        "def kill(*args): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def write(text, then=lambda: None):\n"
        "    def fill(folder):\n"
        "        (folder / 'deep').mkdir(); (folder / 'deep' / 'file').write_text(text); then()\n"
        "    return fill\n"
        "replace_folder(Path(sys.argv[1]), write('old'))\n"
        "if sys.argv[2] == 'write': replace_folder(Path(sys.argv[1]), write('new', then=kill))\n"
        "rename = Path.rename\n"
        "Path.rename = lambda path, to: kill() if path.name == '.new_best' else rename(path, to)\n"
        "replace_folder(Path(sys.argv[1]), write('new'))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, target, moment], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert ".new_best" in os.listdir(target.parent) and target.exists() == (moment == "write")

    def fail(folder):
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        replace_folder(target, fail)
    assert content(target) == "old"
    replace_folder(target, fill("newer"))
    assert content(target) == "newer"


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2} and os.listdir(tmp_path) == ["a.json"]
