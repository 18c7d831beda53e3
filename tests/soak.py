"""Kill pre-training repeatedly at random points, and check that nothing is lost but the work since the last save.

    python tests/soak.py --kills 100

kills a random process of a tiny run by SIGKILL: in a step, a save, a removal of old checkpoints, a validation or the
start, or while log.jsonl is written; the last time, while the results are written. Some kills hit a loader worker
instead, or close the terminal, upon which the run saves. All other processes must end by themselves. The same command
then resumes the run. After each kill, the checkpoint that `auto` picks must be whole, not older than the last save, and
equal to that of an undisturbed run. At the end, all results of the run must be equal to those of the undisturbed run.
The script prints a line per kill, and exits with code 1 if a check fails.

    python tests/soak.py --launcher 12 --launch_flags="--rdzv_backend c10d"

counts how often `accelerate launch --max_restarts 1` finishes such a run after a process is killed in a step.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from armed import POINTS
from conftest import ROOT, TINY, TWO_PROCESSES, environment, finish_several, run_several, start_several, write_images
from safetensors.torch import load_file

from training.run_folder import MODEL, OPTIMIZER, RunFolder, read_state

ARMED, SAVE_STEPS = "tests/armed.py", 2
FLAGS = [
    *("--per_gpu_batch_size", 4, "--gradient_accumulation_steps", 2, "--drop_path", 0.1, "--warmup_steps", 2),
    *("--validate_every", 1, "--save_checkpoint_steps", SAVE_STEPS),
]
KEPT = 2  # checkpoints that the killed run keeps
PATIENCE = 60  # seconds in which the other processes must end
LEFT_OVER = 30  # seconds in which everything that they started must end
TIMES = {"seconds", "images_per_second", "data_wait"}  # values that may differ from the undisturbed run


class Lost(Exception):
    """An error after which the soak test cannot continue."""


def same(one, other) -> bool:
    """Return True if two nested values of checkpoints are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def timeless(values: dict) -> dict:
    return {name: value for name, value in values.items() if name not in TIMES}


def checkpoint_differences(checkpoint: Path, reference: Path) -> Iterator[str]:
    """Yield how a checkpoint differs from that of the same step in the undisturbed run."""
    other = reference / "checkpoints" / checkpoint.name
    try:
        states = [timeless(read_state(folder)) for folder in (checkpoint, other)]
        weights = [load_file(folder / MODEL) for folder in (checkpoint, other)]
        optimizers = [torch.load(folder / OPTIMIZER, weights_only=True) for folder in (checkpoint, other)]
    except Exception as error:  # a broken file raises many types
        yield f"{checkpoint.name} does not load: {error}"
        return
    for states_ in states:
        states_["files"] = sorted(states_["files"])
    for what, pair in (("state", states), ("weights", weights), ("optimizer", optimizers)):
        if not same(*pair):
            yield f"the {what} of {checkpoint.name} differ from the undisturbed run's"


def lines_of(folder: Path) -> list[dict]:
    """Return the complete lines of a run's log without times; [] if there is no log."""
    path = folder / "log.jsonl"
    *lines, _ = path.read_text().split("\n") if path.exists() else [""]
    return [timeless(json.loads(line)) for line in lines]


def kill_violations(folder: Path, reference: Path, saves: list[str]) -> Iterator[str]:
    """Yield what is wrong with a run folder after a kill; `saves` are the names of the saved checkpoints."""
    found = RunFolder(folder).find("auto")
    picked, last = found.name if found else "", max(saves, default="")
    if picked < last:
        yield f"auto picks {picked or 'nothing'}, and {last} had been saved"
    lines, expected = lines_of(folder), lines_of(reference)
    if lines != expected[: len(lines)]:
        yield "log.jsonl differs from the undisturbed run's"
    if found:
        step = read_state(found)["step"]
        if max((line["step"] for line in lines), default=0) < step:
            yield f"log.jsonl lacks lines before {found.name}"
        yield from checkpoint_differences(found, reference)


def results_of(folder: Path) -> dict:
    """Return the content of a finished run's files by name; checkpoints are left out, args.json and the log empty."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.parent.name != "checkpoints"]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    found |= {name: b"" for name in ("args.json", "log.jsonl")}  # args.json lists the starts
    found["metrics.json"] = timeless(json.loads(found["metrics.json"]))
    return found


def end_violations(folder: Path, reference: Path) -> Iterator[str]:
    """Yield how a finished run differs from the undisturbed one."""
    if lines_of(folder) != lines_of(reference):
        yield "log.jsonl differs from the undisturbed run's"
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (folder, reference)]
    expected = [name for name in names[1] if int(name[-8:]) % SAVE_STEPS == 0][-KEPT:]
    if names[0] != expected:
        yield f"checkpoints/ holds {names[0]}, not {expected}"
    for checkpoint in RunFolder(folder).whole_checkpoints():
        yield from checkpoint_differences(checkpoint, reference)
    ours, theirs = results_of(folder), results_of(reference)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name} differs from the undisturbed run's, or one of them lacks it"


class Soak:
    """A run in `folder` that is killed and resumed, and an undisturbed one beside it. Violations are printed at once
    and collected in `violations`."""

    def __init__(self, folder: Path, *, kills: int, processes: int, seed: int):
        self.kills, self.processes, self.random = kills, processes, random.Random(seed)
        self.violations: list[str] = []
        self.counts: Counter = Counter()
        self.longest = 0.0  # seconds: longest time until the other processes had ended
        write_images(folder / "images" / "train", 20 * processes)  # five steps per epoch
        write_images(folder / "images" / "val", 2 * processes + 1, seed=1)
        self.flags = [*TINY, *FLAGS, "--path_to_data", folder / "images", "--max_steps", 6 * kills]
        self.cwd, reference = folder / "killed", folder / "undisturbed"
        for cwd in (self.cwd, reference):
            cwd.mkdir()
        every = ["--keep_checkpoints", 10**6, "--save_checkpoint_steps", 1]  # because a stop saves at any step
        run_several(processes, ARMED, *self.flags, *every, cwd=reference)
        self.run, self.reference = (cwd / "work_dir" / "pretrain_mae" for cwd in (self.cwd, reference))

    def saves(self) -> list[str]:
        """Return the names of the saved checkpoints in the order of their saves."""
        path = self.cwd / "saves"
        return path.read_text().split() if path.exists() else []

    def start(self, **options) -> list:
        flags = [*self.flags, "--keep_checkpoints", KEPT, "--resume_from_checkpoint", "auto"]
        return start_several(self.processes, ARMED, *flags, cwd=self.cwd, **options)

    def violated(self, where: str, what: str) -> None:
        self.violations.append(f"{where}: {what}")
        print(f"VIOLATION {self.violations[-1]}", flush=True)

    def __call__(self) -> list[str]:
        """Kill and resume the run to its end, and return the violations."""
        places = []
        for number in range(1, self.kills + 1):
            if not places:
                places = sorted({point.place for point in POINTS.values()} - {"finish"})
                self.random.shuffle(places)
            try:
                self.kill(number, "finish" if number == self.kills else places.pop())
            except Lost as error:
                self.violated(f"kill {number}", f"{error}; the soak cannot go on")
                return self.violations
        try:
            finish_several(self.start())
        except AssertionError as error:
            self.violated("the end", str(error))
            return self.violations
        for what in end_violations(self.run, self.reference):
            self.violated("the end", what)
        return self.violations

    def kill(self, number: int, place: str) -> None:
        """Start the run, kill one of its processes, and check what is left. Raises Lost."""
        draw, before = self.random, RunFolder(self.run).whole_checkpoints()
        fitting = [name for name, point in POINTS.items() if point.place == place and (before or not point.resumed)]
        name = draw.choice(fitting)
        point = POINTS[name]
        rank = 0 if point.main else draw.randrange(self.processes)
        call, delay = draw.randint(1, point.calls), round(draw.uniform(0, point.delay), 4)
        workers = ["--num_workers", 2] if place == "worker" else []
        own = {other: workers for other in range(self.processes)} | {rank: [*workers, "--kill", name, call, delay]}
        processes = self.start(own=own)
        try:
            self.wait(processes, rank, {"worker": 1, "terminal": 0}.get(place, -signal.SIGKILL))
            outputs = [process.communicate() for process in processes]
        finally:
            for process in processes:
                process.kill()
        last = max((line["step"] for line in lines_of(self.run)), default=0)
        print(
            f"kill {number:3}: {place:10} {name:25} process {rank}, after step {last}; the run was resumed from "
            f"{before[-1].name if before else 'nothing'}",
            flush=True,
        )
        self.counts[place] += 1
        where = f"kill {number}, {name} of process {rank}, after step {last}"
        for other, (process, (out, err)) in enumerate(zip(processes, outputs, strict=True)):
            told = "another process of the run is gone" in err and "Traceback" not in err
            done = place in ("finish", "terminal") and process.returncode == 0  # others may be done, or all stop
            if other != rank and not (process.returncode == 1 and told) and not done:
                self.violated(where, f"process {other} ended with {process.returncode}\n{out}\n{err}")
        if place == "worker" and "error: a loader worker ended by SIGKILL" not in outputs[rank][1]:
            self.violated(where, f"no error reports the killed worker\n{outputs[rank][1]}")
        if left := self.left_over():
            self.violated(where, f"{left} processes are left after {LEFT_OVER} seconds")
        for what in kill_violations(self.run, self.reference, self.saves()):
            self.violated(where, what)

    def left_over(self) -> int:
        """Wait until all processes that the run started have ended; return the number that are left."""
        end = time.monotonic() + LEFT_OVER
        while True:
            places = [process.info["cwd"] for process in psutil.process_iter(["cwd", "status"])]
            count = places.count(str(self.cwd))
            if not count or time.monotonic() > end:
                return count
            time.sleep(0.05)

    def wait(self, processes: list, rank: int, code: int) -> None:
        """Wait for process `rank` to end with `code`, and for the others to end. Raises Lost if they do not."""
        end = time.monotonic() + PATIENCE + self.kills  # the last start takes all remaining steps
        while processes[rank].poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        killed = time.monotonic()
        if (ended := processes[rank].returncode) != code:
            processes[rank].kill()
            out, err = processes[rank].communicate()
            raise Lost(f"process {rank} should have ended with {code}, and not {ended or 'at all'}\n{out}\n{err}")
        while any(process.poll() is None for process in processes):
            if time.monotonic() > killed + PATIENCE:
                raise Lost(f"the processes other than {rank} were still running {PATIENCE} seconds after the kill")
            time.sleep(0.01)
        self.longest = max(self.longest, time.monotonic() - killed)


def soak(folder: Path, *, kills: int, processes: int, seed: int) -> list[str]:
    """Kill a run `kills` times in the empty `folder`; print and return the violations, one line each."""
    test = Soak(folder, kills=kills, processes=processes, seed=seed)
    violations = test()
    places = ", ".join(f"{place} {count}" for place, count in sorted(test.counts.items()))
    print(
        f"{sum(test.counts.values())} kills of {processes} processes, seed {seed} ({places}); the others ended within "
        f"{test.longest:.1f} seconds; {len(violations) or 'no'} violations"
    )
    return violations


def launched(folder: Path, reference: Path, command: list, draw: random.Random) -> tuple[str, float]:
    """Start a run of two processes by a launcher in `folder`, and kill one of them in a step. Return the outcome, "" if
    it finished equal to the undisturbed run, and the seconds until the other process had ended."""
    run, at, rank = folder / "work_dir" / "pretrain_mae", draw.randint(5, 40), draw.randrange(2)
    with open(folder / "said", "w+") as said:
        launcher = subprocess.Popen(command, cwd=folder, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        try:
            while launcher.poll() is None and max((line["step"] for line in lines_of(run)), default=0) < at:
                time.sleep(0.005)
            ranks = {child.environ().get("RANK"): child for child in psutil.Process(launcher.pid).children()}
            time.sleep(draw.uniform(0, 0.03))
            ranks[str(rank)].kill()
            killed = time.monotonic()
            ranks[str(1 - rank)].wait(PATIENCE)
            seconds = time.monotonic() - killed
            try:
                code = launcher.wait(2 * PATIENCE)
            except subprocess.TimeoutExpired:
                code = f"none, as it hung for {2 * PATIENCE} seconds"
        finally:
            for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
                process.kill()
            launcher.kill()
        said.seek(0)
        words = said.read()
    print(f"process {rank} killed after step {at}, the other ended {seconds:.1f} seconds later; ", end="")
    if code == 0:
        return "; ".join(end_violations(run, reference)), seconds
    causes = re.findall(r"^.*refused.*$", words, re.MULTILINE) or re.findall(r"^.*rror: \S.*$", words, re.MULTILINE)
    resumed = ", after it was resumed" if "resuming from" in words else ""
    return f"exit {code}{resumed}: {causes[-1] if causes else words[-500:]}", seconds


def launch_often(folder: Path, *, trials: int, seed: int, launch_flags: list[str]) -> None:
    """Count how many of `trials` runs `accelerate launch --max_restarts 1` finishes after a kill, bit-equal."""
    test = Soak(folder, kills=20, processes=2, seed=seed)
    flags = [*test.flags, "--keep_checkpoints", KEPT, "--resume_from_checkpoint", "auto"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES, "--max_restarts", "1"]
    command = [str(word) for word in (*launcher, *launch_flags, ROOT / "pretrain_mae.py", *flags)]
    ends, longest = Counter(), 0.0
    for number in range(1, trials + 1):
        cwd = folder / str(number)
        cwd.mkdir()
        end, seconds = launched(cwd, test.reference, command, test.random)
        print(f"start {number:2}: {end or 'finished, bit-equal'}", flush=True)
        ends[end] += 1
        longest = max(longest, seconds)
    print(
        f"{ends['']} of {trials} were restarted and finished bit-equal, the other process ended within {longest:.1f} "
        f"seconds: accelerate launch --max_restarts 1 {' '.join(launch_flags)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="times that a process is killed (default 20)")
    parser.add_argument("--processes", type=int, default=2, help="processes of the run (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the kills (default 0)")
    parser.add_argument("--launcher", type=int, metavar="N", help="count restarts by the launcher instead, of N kills")
    parser.add_argument("--launch_flags", type=str.split, default=[], help="further flags of accelerate launch")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder in which both runs stay")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.keep:
            args.keep.mkdir(parents=True)
        folder = (args.keep or Path(folder)).resolve()
        if args.launcher:
            launch_often(folder, trials=args.launcher, seed=args.seed, launch_flags=args.launch_flags)
            return
        violations = soak(folder, kills=args.kills, processes=args.processes, seed=args.seed)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
