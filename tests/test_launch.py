import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, run_code

from training import launch
from training.wording import as_flags, in_bytes, in_one_line, in_time, several

RUN = """
import errno, sys
import torch
from training import launch
from training.launch import RunError, Stopped, fail, run_script

def main():
    print("started")
    {}

run_script(main, remedy={!r})
"""


@pytest.mark.parametrize(
    "statement, remedy, code, expected",
    [
        ("raise Stopped", None, 0, ""),
        ("fail(['b is bad', 'a is bad', 'b is bad'])", None, 2, "error: b is bad\nerror: a is bad\n"),
        ("fail(['b is bad'], show=False)", None, 2, ""),
        ("raise SystemExit", None, 0, ""),
        ("raise SystemExit(3)", None, 3, ""),
        ("raise SystemExit('no')", None, 1, "no\n"),
        ("raise RunError('the data are gone; mount them')", None, 1, "\nerror: the data are gone; mount them\n"),
        ("raise KeyboardInterrupt", None, 130, "\nerror: interrupted before the step was saved; continue with --"),
        ("raise KeyboardInterrupt", "start it again", 130, "\nerror: interrupted; start it again\n"),
        ("raise OSError(errno.ENOSPC, 'full', 'a.bin')", None, 1, "\nerror: a.bin could not be written (the disk is"),
        ("raise torch.OutOfMemoryError('CUDA is\\nfull')", None, 1, "\nerror: out of memory (CUDA is full); give"),
        ("torch.empty(2**50)", None, 1, "\nerror: out of memory ("),
        (
            "raise RuntimeError('x_cuda does not have a deterministic implementation, but you set')",
            *(None, 1, "\nerror: --deterministic: x_cuda does not have a deterministic implementation; leave"),
        ),
        ("raise MemoryError", "close programs", 1, "\nerror: out of memory (MemoryError); close programs\n"),
        ("raise RuntimeError('Connection closed by peer')", None, 1, "\nTraceback (most recent call last):"),
    ],
)
def test_the_end_of_a_script(tmp_path, statement, remedy, code, expected):
    end = run_code(RUN.format(statement, remedy), cwd=tmp_path, code=code)
    assert end.stdout == "started\n" and (end.stderr.startswith(expected) if expected else not end.stderr)
    if "RunError" in statement:  # only the main process prints it
        assert not run_code(RUN.format(statement, remedy), cwd=tmp_path, code=code, RANK="1").stderr


def test_precision_is_the_flag_or_what_accelerate_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launch.resolve_precision(None) == "no" and launch.resolve_precision("fp16") == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch.resolve_precision(None) == "bf16" and launch.resolve_precision("no") == "no"


def test_the_single_thread_of_the_launcher_is_undone_unless_the_user_chose_it(monkeypatch):
    numbers, launched = [], dict(ACCELERATE_MIXED_PRECISION="no")
    monkeypatch.setattr(launch, "cores_per_process", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    for given, variables, expected in (
        ({}, dict(OMP_NUM_THREADS="1"), []),
        ({}, dict(launched, OMP_NUM_THREADS="2"), []),
        (dict(OMP_NUM_THREADS="1"), dict(launched, OMP_NUM_THREADS="1"), [1]),
        ({}, dict(launched, OMP_NUM_THREADS="1"), [3]),
    ):
        numbers.clear()
        monkeypatch.setattr(launch, "launcher_environment", lambda given=given: given)
        monkeypatch.setattr("os.environ", variables)
        launch.set_speed(torch.device("cpu"), tf32=True)
        assert numbers == expected


def test_the_environment_of_the_launcher():
    code = "from training.launch import launcher_environment as e; print(e().get('OMP_NUM_THREADS'))"
    child = [sys.executable, "-c", f"import os; os.environ['OMP_NUM_THREADS'] = '1'; {code}"]
    for given in ({}, {"OMP_NUM_THREADS": "7"}):
        variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
        launcher = f"import os, subprocess; os.environ['OMP_NUM_THREADS'] = '1'; subprocess.run({child})"
        done = subprocess.run([sys.executable, "-c", launcher], env=variables, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == given.get("OMP_NUM_THREADS", "None"), done.stderr


def test_deterministic_algorithms(tmp_path):
    code = """
import os, torch
from training.launch import set_speed
set_speed(torch.device("cpu"), tf32=True, deterministic=True)
assert torch.are_deterministic_algorithms_enabled()
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    run_code(code, cwd=tmp_path)


def test_words():
    assert [in_bytes(count) for count in (1.79e9, 4.5e6, 830, 2.4e12)] == ["1.79 GB", "4.5 MB", "0.83 kB", "2.4e+03 GB"]
    assert [in_time(seconds) for seconds in (0.25, 90, 148_680)] == ["0.25 seconds", "1.5 minutes", "41.3 hours"]
    assert [several(1, "process"), several(2, "process"), several(0, "step")] == ["1 process", "2 processes", "0 steps"]
    assert in_one_line(ValueError("two\n  lines.")) == "two lines" and in_one_line(KeyError()) == "KeyError"
    settings = {"model": "base", "tf32": False, "pin_memory": True, "mean": [0.5, 0.25], "crop_size": 8}
    assert as_flags(settings) == "--model base --no-tf32 --pin_memory --mean 0.5 0.25 --crop_size 8"


OUTPUT = """
import os, signal, sys, time
from training.launch import run_script

def main():
    {}
    for _ in range(3):
        print("x" * 9999, flush=True)
        print("y", file=sys.stderr)
        sys.stdout.flush()
    open("finished", "w").close()

run_script(main)
"""


@pytest.mark.parametrize(
    "loss",
    [
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); os.dup2(writer, 2)",  # tee or head ended
        "master, slave = os.openpty(); os.dup2(slave, 1); os.dup2(slave, 2); os.close(master)",  # the terminal closed
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
        "os.close(1); os.close(2)",
    ],
)
def test_output_that_cannot_be_written_is_dropped(tmp_path, loss):
    run_code(OUTPUT.format(loss), cwd=tmp_path)
    assert (tmp_path / "finished").exists()


def test_a_script_without_output_runs(tmp_path):
    command = ["sh", "-c", f'exec "{sys.executable}" -c "$CODE" >&- 2>&-']
    subprocess.run(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT), CODE=OUTPUT.format("pass")), check=True)
    assert (tmp_path / "finished").exists()


def test_any_file_name_can_be_printed(tmp_path):
    text = OUTPUT.format(r"name = os.fsdecode(b'a.\xff\xfe'); print('ä', name); print(name, file=sys.stderr)")
    end = run_code(text, cwd=tmp_path, PYTHONIOENCODING="utf-8:strict")
    assert end.stdout.startswith("ä a.\\udcff\\udcfe\nx") and end.stderr.startswith("a.\\udcff\\udcfe\ny")


@pytest.mark.parametrize(
    "cores, processes, cuda, expected",
    [(16, 1, False, 16), (16, 1, True, 14), (16, 8, True, 1), (64, 1, True, 32), (64, 4, True, 15), (2, 1, True, 1)],
)
def test_a_gpu_keeps_two_cores_of_the_machine(monkeypatch, cores, processes, cuda, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert launch.default_workers() == expected
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch.default_workers() == min(32, max(1, cores // processes))


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(2)"])
def test_the_end_of_a_run_ends_its_loader_workers(tmp_path, end):
    """Workers ignore the SIGTERM of Python's shutdown, and a variable may still refer to their iterator."""
    code = """
from torch.utils.data import TensorDataset
import torch
from data.batches import make_loader
from training.launch import run_script

def main():
    global batches
    batches = iter(make_loader(torch.arange(100), [[i] for i in range(100)], num_workers=1))
    next(batches)
    {}

run_script(main)
"""
    run_code(code.format(end), cwd=tmp_path, code=2 if "2" in end else 0)
