import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from training.arguments import RunError
from training.checkpoint import RunFolder, compare_with_run, is_whole, read_state, write_json

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
    folder.clear_beyond(0)
    assert os.listdir(folder.checkpoints) == [] and not (folder.path / "log.jsonl").exists()


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
    with pytest.raises(RunError, match=r"step 2 could not be written.*No space left.*step_00000001 is whole"):
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


def test_json_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2} and os.listdir(tmp_path) == ["a.json"]
