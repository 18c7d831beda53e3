"""Run pre-training as `python pretrain_mae.py FLAGS` does, and kill it at a given point of its work, as `kill -9` does.

    python tests/armed.py FLAGS --kill POINT CALL SECONDS
    python tests/armed.py FLAGS --send SIGTERM POINT CALL

The process is killed SECONDS after the CALL-th call of the function of POINT or, if SECONDS is 0, directly before or
after that call. At points of the place `worker`, a loader worker is killed instead; at those of `terminal`, stdout and
stderr break and the process gets SIGHUP. --send sends another signal. Without these flags, nothing is killed. The file
`saves` gets a line for each checkpoint that is renamed to its final name.
"""

import functools
import importlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # as for a script in the root; soak.py needs it, too


class Point(NamedTuple):
    """A point where a process may be killed: at one of the first `calls` calls, and up to `delay` seconds later."""

    place: str  # kind of work, or "worker" or "terminal"
    target: str  # MODULE:NAME of a function
    calls: int = 1  # so few that a start takes at most six steps before its kill
    delay: float = 0.0
    after: bool = False  # kill after the call, not before it; only if the delay is 0
    of: str = ""  # count only calls whose first argument is a path with this in its file name
    main: bool = False  # only the main process reaches it
    resumed: bool = False  # only a resumed start reaches it


POINTS = {
    "any moment of a step": Point("step", "training.optimizer:set_learning_rate", 6, 0.05),
    "forward": Point("step", "modeling.mae:MaskedAutoencoder.forward", 12, 0.003),
    "backward and all-reduce": Point("step", "accelerate:Accelerator.backward", 12, 0.01),
    "optimizer": Point("step", "torch.optim:AdamW.step", 6, 0.002),
    "agreement to stop": Point("step", "training.processes:Crew.any", 6, 0.001),
    "any moment of a save": Point("saving", "training.checkpoint:save_training", 3, 0.02),
    "weights written": Point("saving", "training.run_folder:save_file", 3, 0.002, main=True),
    "optimizer written": Point("saving", "torch:save", 3, 0.004, main=True),
    "state written": Point("saving", "training.files:write_json", 3, 0.002, of="state.json", main=True),
    "synced": Point("saving", "training.files:sync", 12, main=True),
    "before the rename": Point("saving", "pathlib:Path.rename", 3, of=".saving_", main=True),
    "after the rename": Point("saving", "pathlib:Path.rename", 3, of=".saving_", after=True, main=True),
    "before a removal": Point("pruning", "training.run_folder:remove_checkpoint", main=True),
    "state.json removed": Point("pruning", "pathlib:Path.unlink", of="state.json", after=True, main=True),
    "half removed": Point("pruning", "os:unlink", of="optimizer.pt", after=True, main=True),
    "removed": Point("pruning", "training.run_folder:remove_checkpoint", after=True, main=True),
    "worker, in a step": Point("worker", "accelerate:Accelerator.backward", 8),
    "worker, in a save": Point("worker", "training.checkpoint:save_training", 2),
    "terminal, in a step": Point("terminal", "accelerate:Accelerator.backward", 8),
    "terminal, in a save": Point("terminal", "training.checkpoint:save_training", 2),
    "terminal, in a validation": Point("terminal", "training.metrics:reconstruction_metrics", 2),
    "measuring": Point("validation", "training.metrics:reconstruction_metrics", 2, 0.02),
    "picture": Point("validation", "training.pictures:reconstruction_grid", delay=0.02, main=True),
    "run folder found": Point("start", "training.checkpoint:claim_run_folder", delay=0.05),
    "flags compared": Point("start", "training.processes:Crew.differences", delay=0.02),
    "model prepared": Point("start", "accelerate:Accelerator.prepare", delay=0.02),
    "run folder cleared": Point("start", "training.run_folder:RunFolder.clear_beyond", delay=0.005, main=True),
    "start noted": Point("start", "training.checkpoint:note_start", delay=0.02, main=True),
    "checkpoint loaded": Point("start", "training.checkpoint:load_training", delay=0.01, resumed=True),
    "line written": Point("log", "training.progress:Progress.write", 6, 0.001, main=True),
    "after a line": Point("log", "training.progress:Progress.write", 6, after=True, main=True),
    "log shortened": Point("log", "training.progress:truncate_log", delay=0.002, main=True),
    "before its exchange": Point("log", "pathlib:Path.replace", of=".log.jsonl.", main=True, resumed=True),
    "after its exchange": Point("log", "pathlib:Path.replace", of=".log.jsonl.", after=True, main=True, resumed=True),
    "results marked": Point("finish", "pathlib:Path.replace", 2, of=".mae-accelerate.json", main=True),
    "encoder written": Point("finish", "modeling.export:export_encoder", delay=0.02, main=True),
    "autoencoder written": Point("finish", "modeling.export:export_autoencoder", delay=0.005, main=True),
    "before the metrics": Point("finish", "training.files:write_json", of="metrics.json", main=True),
    "after the metrics": Point("finish", "training.files:write_json", of="metrics.json", after=True, main=True),
}


def surround(target: str, of: str, *, before: Callable = lambda *_: None, after: Callable = lambda *_: None) -> None:
    """Patch a function so that `before` and `after` are called around every call of it, with its arguments."""
    module, _, name = target.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args, **options):
        meant = not of or of in Path(args[0]).name
        if meant:
            before(*args)
        value = function(*args, **options)
        if meant:
            after(*args)
        return value

    setattr(owner, name, call)


def killer() -> Callable[[float], None]:
    """Return a function that kills this process after some seconds; a fork does it, so that nothing can delay it."""
    reader, writer = os.pipe()
    process = os.getpid()
    if os.fork() == 0:
        os.close(writer)
        if seconds := os.read(reader, 100):  # empty if the process has ended
            time.sleep(float(seconds))
            os.kill(process, signal.SIGKILL)
        os._exit(0)
    return lambda seconds: os.write(writer, str(seconds).encode())


def kill_worker() -> None:
    psutil.Process().children()[0].kill()


def lose_terminal() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)
    os.kill(os.getpid(), signal.SIGHUP)


def arm(name: str, call: int, seconds: float, number: int = signal.SIGKILL) -> None:
    """Kill this process, or its worker or terminal, `seconds` after the `call`-th call at the point `name`."""
    calls, point, kill = 0, POINTS[name], killer() if seconds else None
    at_once = {"worker": kill_worker, "terminal": lose_terminal}.get(point.place, lambda: os.kill(os.getpid(), number))

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == call:
            kill(seconds) if kill else at_once()

    surround(point.target, point.of, **{"after" if point.after else "before": count})


def note(path: Path, target: Path) -> None:
    with open("saves", "a") as file:
        file.write(f"{Path(target).name}\n")


def main() -> None:
    surround("pathlib:Path.rename", ".saving_", after=note)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    if sys.argv[-4] == "--kill":
        *sys.argv[:], _, name, call, seconds = sys.argv
        arm(name, int(call), float(seconds))
    elif sys.argv[-4] == "--send":
        *sys.argv[:], _, number, name, call = sys.argv
        arm(name, int(call), 0, signal.Signals[number])
    sys.argv[0] = str(ROOT / "pretrain_mae.py")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
