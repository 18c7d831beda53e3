"""Tests of recipes/slurm/ as a cluster runs it, with stand-ins for srun and scontrol."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment, finish, log_of, wait_for

BATCH_FILES = sorted((ROOT / "recipes" / "slurm").glob("*.sbatch"))
# Start the tasks, pass signals on to all of their processes as Slurm does, and exit with the highest exit code
SRUN = """#!{python} -S
import os, signal, subprocess, sys

number = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("--"))
options = dict(word[2:].split("=", 1) for word in sys.argv[1:number])
assert options["kill-on-bad-exit"] == "1" and options["open-mode"] == "append"
tasks = []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    path = options["output"].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", str(rank))
    variables = dict(os.environ, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank))
    log = dict(stdout=open(path, "a"), stderr=subprocess.STDOUT)
    tasks.append(subprocess.Popen(sys.argv[number:], env=variables, start_new_session=True, **log))
signal.signal(signal.SIGUSR1, lambda number, frame: [os.killpg(task.pid, number) for task in tasks])
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/sh
case "$1 $2" in
"show hostnames") printf '127.0.0.1\\nother\\n' ;;
"requeue Incomplete") echo "$3" >>requeued ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Return a function that runs train.sbatch in `tmp_path`, as sbatch does for two tasks on one machine."""
    for name, text in (("srun", SRUN.replace("{python}", sys.executable)), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    job = next(job for job in range(os.getpid() % 10000, 20000) if is_free(10000 + job))
    variables = dict(SLURM_JOB_ID=str(job), SLURM_JOB_NAME="run", SLURM_JOB_NODELIST="node[1-2]", SLURM_NTASKS="2")
    variables |= dict(SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="3", PATH=path)

    def start(*words) -> subprocess.Popen:
        command = ["bash", str(ROOT / "recipes/slurm/train.sbatch"), *map(str, words)]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=tmp_path, env=environment(**variables), **options)

    return start


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("path", BATCH_FILES, ids=lambda path: path.name)
def test_a_shell_can_read_it(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.slow  # 40 seconds
def test_a_job_stops_is_queued_again_and_finishes(submit, image_folder, tmp_path):
    flags = ["--path_to_data", image_folder, *TINY, "--max_steps", 120, "--save_checkpoint_interval", 0]
    folder, requeued = tmp_path / "work_dir/run", tmp_path / "requeued"
    job = submit(ROOT / "pretrain_mae.py", *flags)
    wait_for(1, folder, job)
    job.send_signal(signal.SIGTERM)  # only to the shell
    said = finish(job, 0).stdout
    assert "stopped and saved" in said and len(requeued.read_text().splitlines()) == 1
    (checkpoint,) = (folder / "checkpoints").iterdir()
    logs = sorted((folder / "slurm").iterdir())
    assert "2 processes" in logs[0].read_text() and "stopped by SIGUSR1" in logs[0].read_text()
    assert len(logs) == 2 and not (folder / "metrics.json").exists()

    assert "finished" in finish(submit(ROOT / "pretrain_mae.py", *flags), 0).stdout
    assert f"resuming from work_dir/run/checkpoints/{checkpoint.name}" in logs[0].read_text()
    assert [line["step"] for line in log_of(folder) if "loss" in line] == list(range(1, 121))
    assert (folder / "metrics.json").exists() and len(requeued.read_text().splitlines()) == 1


def test_a_job_that_fails_is_not_queued_again_and_passes_its_code_on(submit, tmp_path):
    (tmp_path / "fail.py").write_text("raise SystemExit(2)")  # the code for bad flags
    done = finish(submit("fail.py", "--path_to_data", "images"), 2)
    assert "exit code 2" in done.stdout and not (tmp_path / "requeued").exists()
    for flag in ("--experiment_name", "--working_directory=there"):
        assert "--job-name" in finish(submit("fail.py", flag, "x"), 2).stderr


def test_each_task_knows_its_place_and_what_saves_nothing_is_not_queued_again(submit, tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"]
    (tmp_path / "tell.py").write_text(f"import os, sys\nprint(*map(os.environ.get, {names}), sys.argv[1:])")
    said = finish(submit("tell.py", "--path_to_data", "my images", "--num_workers", 1), 0).stdout
    assert "not queued again" in said and not (tmp_path / "requeued").exists()
    for rank, log in enumerate(sorted((tmp_path / "work_dir/run/slurm").iterdir())):
        before = ["--resume_from_checkpoint", "auto", "--num_workers", "3", "--path_to_data", "my images"]
        after = ["--num_workers", "1", "--working_directory", "work_dir", "--experiment_name", "run"]
        assert log.read_text() == f"{rank} {rank} 2 2 127.0.0.1 bf16 {before + after}\n"
