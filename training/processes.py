"""The processes of a run: how they start, and what they agree on: when to stop, and whatever one of them found."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from training.arguments import in_seconds
from training.launch import RunError, fail, is_main_process, prepare_compiler, resolve_precision, set_speed

# Flags that may differ between machines: their cores, and where their data lie, which are compared themselves
OF_MACHINES = {"num_workers", "cache_dir", "path_to_data", "path_to_validation_data", "path_to_classes"}


def start_accelerator(mixed_precision: str | None, *, tf32: bool, compiled: bool) -> tuple[Accelerator, list[str]]:
    """Joins this process with the others of the run, and sets what the whole process has; what is wrong with that. The
    arguments are the flags.

    DDP lets gradients be views of the buckets that it exchanges: one copy of them less.
    """
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    others = threading.Timer(15, say_who_is_missing)
    others.daemon = True
    others.start()
    try:
        accelerator = Accelerator(mixed_precision=resolve_precision(mixed_precision), kwargs_handlers=[views])
    except ValueError as error:  # such as a WORLD_SIZE without the variables that belong to it
        fail(
            [
                f"the environment names processes that cannot be started ({error}); use accelerate launch with one of "
                "accelerate_configs/"
            ]
        )
    finally:
        others.cancel()
    errors = check_processes(accelerator.num_processes, accelerator.device)
    if errors:  # each of them would go on as a run of its own
        fail(errors, show=is_main_process())
    set_speed(accelerator.device, tf32=tf32)
    return accelerator, prepare_compiler(accelerator.device) if compiled else []


def say_who_is_missing() -> None:
    """What a process waits for that has not found the others yet."""
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if int(told["WORLD_SIZE"] or 1) > 1:
        print(
            "process {RANK} of {WORLD_SIZE} waits for the others at {MASTER_ADDR}:{MASTER_PORT}".format(**told),
            file=sys.stderr,
            flush=True,
        )


def check_processes(started: int, device: torch.device) -> list[str]:
    """What is wrong where the environment asks for more processes than `started`, in a list.

    Some ways to ask for several processes start one without a word, or several that do not know of each other; each
    would train on all samples, and the others' work be lost.
    """
    asked = {name: int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")}
    asked |= {name: int(os.environ.get(name) or 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}
    name, most = max(asked.items(), key=lambda item: item[1])
    if most > started:
        what = f"the environment asks for {most} processes ({name}), and this one knows of {started}"
    elif started == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ) and "RANK" not in os.environ:
        what = "accelerate launch was asked for several processes (MASTER_PORT is set), and started one"
    else:
        return []
    if name == "SLURM_STEP_NUM_TASKS" and most > started:
        return [f"{what}; start them as recipes/slurm/train.sbatch does"]
    if torch.cuda.is_available() and device.type != "cpu":
        return [f"{what}; start them with accelerate_configs/multi_gpu.yaml"]
    return [
        f"{what}; on CPUs start them with ACCELERATE_USE_CPU=true accelerate launch --config_file "
        "accelerate_configs/cpu_2_processes.yaml; for one, give --num_processes 1 and unset these variables"
    ]


class Crew:
    """The processes of a run, of which each notes SIGTERM, SIGUSR1 and Ctrl-C, and a time limit; the loop asks once a
    step.

    Several agree by one integer over a group on the CPU, so that the device is never waited for. A second Ctrl-C ends
    its process at once. The `time_limit`, as HH:MM, counts from the start of the process.
    """

    def __init__(self, time_limit: str | None = None):
        self.signal_name: str | None = None
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None
        self.time_limit, self._born = time_limit, psutil.Process().create_time()
        self._seconds, self._asked = in_seconds(time_limit) if time_limit else None, time.time()
        self._steps: deque[float] = deque(maxlen=100)  # seconds
        self._longest_save, self._stopping = 0.0, False

    def begin(self) -> None:
        """The loop begins: what was before is no step."""
        self._asked = time.time()

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def _age(self) -> float:
        return time.time() - self._born

    def _time_is_up(self, after_step: bool) -> bool:
        """Whether another step and a save might not end within the limit: the longest of late, and a reserve of 5 % of
        the limit, from 15 seconds to 5 minutes, for the first save and for leaving."""
        if self._seconds is None:
            return False
        now = time.time()
        if after_step:
            self._steps.append(now - self._asked)
        self._asked = now
        reserve = min(max(self._seconds / 20, 15), 300)
        return self._age + max(self._steps, default=0) + self._longest_save + reserve > self._seconds

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Notes how long a save takes."""
        start = time.time()
        yield
        now = time.time()
        self._longest_save, self._asked = max(self._longest_save, now - start), self._asked + now - start

    def wanted(self, *, after_step: bool = False) -> bool:
        """Whether any process was asked to stop, or the time is up; from then on always."""
        self._stopping = self._stopping or self.any(self._time_is_up(after_step) or self.signal_name is not None)
        return self._stopping

    def farewell(self, step: int, *, start_step: int) -> str:
        """Why the run, which went on from `start_step`, stopped after `step`. Every process must ask. Raises RunError
        where the time limit is too short to get on."""
        signals = self.gather([self.signal_name] if self.signal_name else [])
        late = self.any(self._seconds is not None and self._age > self._seconds)
        if not signals and (step == start_step or (late and step == start_step + 1)):
            raise RunError(
                f"--time_limit {self.time_limit} is too short: the start and "
                f"{'a validation' if step == start_step else 'one step'} take {self._age:.0f} seconds; step {step} is "
                "saved: continue with a longer one"
            )
        reason = signals[0] if signals else f"--time_limit {self.time_limit}"
        return f"stopped by {reason} after step {step}, which is saved; continue with --resume_from_checkpoint auto"

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any process. Every process must ask."""
        if self.group is None:
            return here
        value = torch.tensor(int(here))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def gather(self, here: list) -> list:
        """The lists of all processes, joined. Every process must ask."""
        if self.group is None:
            return here
        parts: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, here, group=self.group)
        return [item for part in parts for item in part]

    def differences(self, flags: dict, data: list[str | None]) -> list[str]:
        """In what the processes differ that must be the same on all, a line each: `flags`, and the fingerprints of the
        `data` for training and validation. Every process must ask."""
        told = {name: value for name, value in flags.items() if name not in OF_MACHINES}
        first, *others = self.gather([(told, data, f"process {self.rank} on {socket.gethostname()}")])
        errors = []
        for flags_there, data_there, place in others:
            errors += [
                f"--{name} is {value} on {first[2]} and {flags_there.get(name)} on {place}; give all processes the same"
                for name, value in first[0].items()
                if flags_there.get(name) != value
            ]
            for part, here, there in zip(("train on", "validate"), first[1], data_there, strict=True):
                if here != there:
                    errors.append(
                        f"the images to {part} are others on {place} than on {first[2]}, or have other labels; "
                        "give all processes the same data"
                    )
        return errors

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.group else 0
