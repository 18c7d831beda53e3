import os
import time
from collections import namedtuple

import psutil
import pytest
from conftest import ROOT, TINY, Start, run_code, steps_in

from data.pool import WorkerError, check_shared_memory, mapping


def square(number):
    return number, os.getpid()


def test_several_processes_give_the_same_in_the_same_order():
    with mapping(1) as in_order:
        assert list(in_order(square, range(9))) == [(number, os.getpid()) for number in range(9)]
    with mapping(2) as in_order:
        found = list(in_order(square, range(9)))
    assert [number for number, _ in found] == [*range(9)] and os.getpid() not in {pid for _, pid in found}


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    code = tmp_path / "code.py"
    code.write_text(
        f"import sys, time\nsys.path[0] = {str(ROOT)!r}\nfrom data.pool import mapping\n"
        "with mapping(3) as in_order:\n"
        "    list(in_order(abs, range(99)))\n"
        "    open('ready', 'w').close()\n"
        "    time.sleep(300)\n"
    )
    process = Start(code, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 3
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


LOADER = """
import os, resource, signal, sys, tempfile
import torch
from torch.utils.data import Dataset
from data.batches import make_loader
from training.launch import run_script

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds until a dead worker is noticed; 5 outside of tests

def fail_to_share(*_):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

class Images(Dataset):
    def __getitems__(self, indices):
        if indices == [5]:
            {worker}
        return torch.zeros(9)

def main():
    {main}
    for batch in make_loader(Images(), [[index] for index in range(60)], num_workers=2):
        kept.append(batch)
    print("all", len(kept))

kept = []
run_script(main)
"""
KILL = "os.kill(os.getpid(), signal.{})"


@pytest.mark.parametrize(
    ("worker", "main", "expected"),
    [
        (
            KILL.format("SIGKILL"),
            "pass",
            "a loader worker ended by SIGKILL (killed, as when memory runs out); give",
        ),
        (
            KILL.format("SIGSEGV"),
            "pass",
            "a loader worker ended by SIGSEGV; give fewer --num_workers or a smaller batch",
        ),
        (KILL.format("SIGBUS"), "pass", "/dev/shm is too small for the loader's batches ("),
        ("os._exit(3)", "pass", "a loader worker ended by exit code 3; give fewer --num_workers"),
        (
            "torch.UntypedStorage._share_fd_cpu_ = fail_to_share",
            "pass",
            "/dev/shm is too small for the loader's batches",
        ),
        (
            "pass",
            "tempfile.tempdir = os.path.abspath('x' * 99); os.mkdir(tempfile.tempdir)",
            "is too long a path for",
        ),
        ("pass", "resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))", "more than 60 files are open, most of them"),
        ("pass", "resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))", "more than 9 files are open, most of them"),
        (KILL.format("SIGTERM"), "pass", None),  # a step still needs the batches
        (KILL.format("SIGHUP"), "pass", None),
    ],
)
def test_workers_that_cannot_work_end_the_run_with_one_line(tmp_path, worker, main, expected):
    end = run_code(LOADER.format(worker=worker, main=main), cwd=tmp_path, code=1 if expected else 0)
    if expected is None:
        assert end.stdout == "all 60\n"
    else:
        (line,) = (line for line in end.stderr.splitlines() if line.startswith("error: "))
        assert expected in line and "--resume_from_checkpoint auto" in line and "Traceback" not in end.stderr


def test_an_error_in_a_worker_keeps_its_traceback(tmp_path):
    end = run_code(LOADER.format(worker="raise KeyError('a bug')", main="pass"), cwd=tmp_path, code=1)
    assert "Traceback" in end.stderr and "a bug" in end.stderr


def test_a_report_that_fails_ends_the_process_all_the_same(tmp_path):
    """The workers are still alive, and a normal exit of Python would wait for them."""
    text = LOADER.format(worker="pass", main="import traceback; traceback.format_exception = None")
    run_code(text.replace("kept.append(batch)", "raise ValueError"), cwd=tmp_path, code=1)


def test_the_room_for_batches_is_checked(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("data.pool.shutil.disk_usage", lambda path: usage(64_000_000))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    check_shared_memory(1_000_000, 16)
    with pytest.raises(WorkerError, match=r"64 MB free, and --num_workers 17 needs 68 MB .* give --num_workers 16,"):
        check_shared_memory(1_000_000, 17)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(WorkerError, match=r"give --num_workers 4, a smaller batch, .*--shm-size") as error:
        check_shared_memory(1_000_000, 16)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("script", ["pretrain_mae", "finetune_classifier"])
def test_batches_that_do_not_fit_are_refused_before_the_first_step(image_folder, tmp_path, script):
    """The check uses the true size of a batch: 8 images of 32 x 32 pixels."""
    code = (
        "import runpy, sys, data.pool\nfrom collections import namedtuple\n"
        "data.pool.shutil.disk_usage = lambda path, usage=namedtuple('usage', 'free'): usage(390_000)\n"
        f"sys.argv[0] = '{ROOT / script}.py'\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    model = TINY if script == "pretrain_mae" else [*TINY[: TINY.index("--decoder_embed_dim")], "--log_every", 1]
    flags = [*model, "--path_to_data", image_folder, "--max_steps", 2]
    run_code(code, *flags, "--num_workers", 3, cwd=tmp_path)
    end = run_code(code, *flags, "--num_workers", 4, "--experiment_name", "more", cwd=tmp_path, code=2)
    assert "--num_workers 4 needs 0 MB for batches of 0.0 MB; give --num_workers 3" in end.stderr
    assert "Traceback" not in end.stderr and steps_in(tmp_path / "work_dir" / "more") == 0
