"""Join the processes of a run, and let them agree, for example on when to stop."""

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
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from training.arguments import in_seconds
from training.launch import RunError, fail, is_main_process, prepare_compiler, resolve_precision, set_speed
from training.wording import in_one_line

# Flags that may differ between machines: workers and paths; the data themselves are compared by fingerprint
MACHINE_FLAGS = {"num_workers", "cache_dir", "path_to_data", "path_to_validation_data", "path_to_classes"}
ECHO_SECONDS = 2  # another SIGTERM within this time counts as the same one
STALL_SECONDS = 30  # after a SIGTERM, a step that waits this long for data ends the process


def start_accelerator(
    mixed_precision: str | None, *, tf32: bool, compiled: bool, deterministic: bool
) -> tuple[Accelerator, list[str]]:
    """Join this process with the others of the run, and set torch's process-wide options.

    DDP keeps gradients as views of the buckets that it exchanges, which saves a copy. Each bucket splits the graph of
    torch.compile, so compiled runs have fewer and larger ones. Settings that cannot work exit with code 2.

    Args:
        mixed_precision, tf32, compiled, deterministic: the flags.

    Returns:
        The accelerator, and error messages, one per problem.
    """
    if errors := check_settings(precision := resolve_precision(mixed_precision)):
        fail(errors, show=is_main_process())
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=100 if compiled else 25)
    if not dist.is_initialized():  # an earlier run of this process may have had other settings
        AcceleratorState._reset_state(reset_partial_state=True)
    waiting = threading.Timer(15, report_waiting)
    waiting.daemon = True
    waiting.start()
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[views])
    except (ValueError, ImportError) as error:  # such as a WORLD_SIZE without the variables that belong to it
        remedy = "use accelerate launch with one of accelerate_configs/"
        fail([f"Accelerate does not start with these settings ({in_one_line(error)}); {remedy}"])
    finally:
        waiting.cancel()
    errors = check_processes(accelerator.num_processes, accelerator.device)
    if errors:  # each of them would go on as a run of its own
        fail(errors, show=is_main_process())
    set_speed(accelerator.device, tf32=tf32, deterministic=deterministic)
    return accelerator, prepare_compiler(accelerator.device) if compiled else []


def check_settings(precision: str) -> list[str]:
    """Return error messages for settings of Accelerate's file or launcher that the scripts do not support."""
    remedy = "leave it out (FSDP2, accelerate_configs/fsdp2.yaml, splits models over GPUs)"
    errors = [
        f"Accelerate is configured for {name}, which does not work here; {remedy}"
        for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes")
    ]
    version = os.environ.get("FSDP_VERSION", "1")  # Accelerate's default
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and version != "2":
        errors.append(f"Accelerate is configured for FSDP {version}; only 2 works: set fsdp_version: 2")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        errors.append(
            f"Accelerate is configured for the dynamo_backend {backend}, which would compile more than the training "
            "step; set it to no, and give --compile"
        )
    if precision not in ("no", "bf16", "fp16"):
        errors.append(
            f"Accelerate is configured for the precision {precision}, which does not work here; give "
            "--mixed_precision bf16, fp16 or no"
        )
    return errors


def report_waiting() -> None:
    """Print that this process waits for the others of the run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        text = "process {RANK} of {WORLD_SIZE} waits for the others at {MASTER_ADDR}:{MASTER_PORT}"
        print(text.format(**os.environ), file=sys.stderr, flush=True)


def check_processes(num_processes: int, device: torch.device) -> list[str]:
    """Return an error message if the environment asks for more processes than `num_processes`, the number that started.

    Some launchers silently start one process, or several that do not know of each other. Each of these would train on
    all samples, and the work of all but one would be lost.
    """
    variables = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    name, most = max(((name, int(os.environ.get(name) or 1)) for name in variables), key=lambda item: item[1])
    alone = num_processes == 1 and "RANK" not in os.environ
    if most > num_processes:
        problem = f"the environment asks for {most} processes ({name}), but only {num_processes} started"
    elif alone and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= set(os.environ):
        problem = "accelerate launch was asked for several processes (MASTER_PORT is set), and started one"
    else:
        return []
    config = "cpu_2_processes.yaml and ACCELERATE_USE_CPU=true" if device.type == "cpu" else "multi_gpu.yaml"
    return [
        f"{problem}; start them with accelerate launch --config_file accelerate_configs/{config}, below Slurm as "
        "recipes/slurm/train.sbatch does; for one, give --num_processes 1 and unset these variables"
    ]


class Crew:
    """The processes of a run, each of which notes SIGTERM, SIGHUP, SIGUSR1, Ctrl-C and the time limit.

    To agree, they exchange an integer on the CPU, so the device never waits. A second Ctrl-C ends its process at once.
    So does a second SIGTERM, even while the main thread waits for another process or the device. A single SIGTERM does
    if the step's data do not come. The time limit counts from the start of the process. Every process must make the
    same calls.

    Args:
        time_limit: HH:MM, or None.
    """

    def __init__(self, time_limit: str | None = None):
        self.signal_name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, self._note)
        self._waiting_since: float | None = None
        self._wakeup = socket.socketpair()
        self._wakeup[0].settimeout(1)
        self._wakeup[1].setblocking(False)
        signal.set_wakeup_fd(self._wakeup[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch_sigterm, daemon=True).start()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None
        self.rank = dist.get_rank() if several else 0
        self.time_limit, self._start_time = time_limit, psutil.Process().create_time()
        self._limit, self._last_question = in_seconds(time_limit) if time_limit else None, time.time()
        self._step_seconds: deque[float] = deque(maxlen=100)
        self._longest_save, self._stopping = 0.0, False

    def begin(self) -> None:
        """Start the clock of the first step."""
        self._last_question = time.time()

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def watch(self, batches: Iterator) -> Iterator:
        """Yield the batches of training, and let a SIGTERM end the process if a batch does not come."""
        while True:
            self._waiting_since = time.monotonic()
            batch = next(batches, None)
            self._waiting_since = None
            if batch is None:
                return
            yield batch

    def _watch_sigterm(self) -> None:
        """End this process at a second SIGTERM, or STALL_SECONDS after the first if the step still waits for data.

        A second one within ECHO_SECONDS is an echo of the first: the launcher also got it, and passes it on.
        """
        first = None
        while True:
            number = b""
            with contextlib.suppress(TimeoutError):
                number = self._wakeup[0].recv(1)
            now, came = time.monotonic(), number == bytes([signal.SIGTERM])
            first = now if came and first is None else first
            if first is None:
                continue
            reason = "by a second SIGTERM" if came and now > first + ECHO_SECONDS else None
            if self._waiting_since and now > max(first, self._waiting_since) + STALL_SECONDS:
                reason = f"by SIGTERM, as the step waits for data that have not come for {STALL_SECONDS} seconds"
            if reason:
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, f"\nerror: ended {reason}; continue with --resume_from_checkpoint auto\n".encode())
                os._exit(128 + signal.SIGTERM)

    @property
    def _age(self) -> float:
        return time.time() - self._start_time

    def _time_is_up(self, after_step: bool) -> bool:
        """Return True if another step and a save might not end within the limit.

        The estimate adds the longest recent step, the longest save, and a reserve for the first save and the exit. The
        reserve is 5 % of the limit, but at least 15 seconds and at most 5 minutes.
        """
        if self._limit is None:
            return False
        now = time.time()
        if after_step:
            self._step_seconds.append(now - self._last_question)
        self._last_question = now
        reserve = min(max(self._limit / 20, 15), 300)
        return self._age + max(self._step_seconds, default=0) + self._longest_save + reserve > self._limit

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measure how long a save takes."""
        start = time.time()
        yield
        seconds = time.time() - start
        self._longest_save, self._last_question = max(self._longest_save, seconds), self._last_question + seconds

    def stop_requested(self, *, after_step: bool = False) -> bool:
        """Return True once any process was asked to stop, or the time is up."""
        self._stopping = self._stopping or self.any(self._time_is_up(after_step) or self.signal_name is not None)
        return self._stopping

    def describe_stop(self, step: int, *, start_step: int) -> str:
        """Return why the run, which started at `start_step`, stopped after `step`.

        Raises:
            RunError: if the time limit is too short to make progress.
        """
        signals = self.gather([self.signal_name] if self.signal_name else [])
        late = self.any(self._limit is not None and self._age > self._limit)
        if not signals and (step == start_step or (late and step == start_step + 1)):
            raise RunError(
                f"--time_limit {self.time_limit} is too short: the start and "
                f"{'a validation' if step == start_step else 'one step'} take {self._age:.0f} seconds; step {step} is "
                "saved: continue with a longer one"
            )
        reason = signals[0] if signals else f"--time_limit {self.time_limit}"
        return f"stopped by {reason} after step {step}, which is saved; continue with --resume_from_checkpoint auto"

    def any(self, here: bool) -> bool:
        """Return True if `here` is true on any process."""
        if self.group is None:
            return here
        value = torch.tensor(int(here))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def gather(self, here: list) -> list:
        """Return the lists of all processes, joined."""
        if self.group is None:
            return here
        parts: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, here, group=self.group)
        return [item for part in parts for item in part]

    def differences(self, flags: dict, fingerprints: list[str | None]) -> list[str]:
        """Return error messages for flags, and for training and validation data, that differ between processes."""
        shared = {f"--{name}": value for name, value in flags.items() if name not in MACHINE_FLAGS}
        for part, fingerprint in zip(("training", "validation"), fingerprints, strict=True):
            shared[f"the fingerprint of {part} images and labels"] = fingerprint
        (first, place), *others = self.gather([(shared, f"process {self.rank} on {socket.gethostname()}")])
        return [
            f"{name} is {value} on {place} and {other.get(name)} on {other_place}; give all processes the same"
            for other, other_place in others
            for name, value in first.items()
            if other.get(name) != value
        ]
