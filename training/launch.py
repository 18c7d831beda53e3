"""Start and end a script's process: exit codes, precision, threads, the compiler."""

import contextlib
import errno
import inspect
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import psutil
import torch


class RunError(Exception):
    """An error that ends the run with exit code 1 and one line: what happened, what was expected, the remedy."""


class InputError(ValueError):
    """An error in flags, data, weights or run folder, found before the first step: exit code 2, a line per problem."""


class Stopped(Exception):
    """The end, with exit code 0, of a run that was asked to stop or of a dry run; raised on all processes together."""


def check(errors: list[str]) -> None:
    """Raise InputError with one line per problem, unless there is none."""
    if errors:
        raise InputError("\n".join(errors))


def fail(errors: list[str], *, show: bool = True) -> NoReturn:
    """Print one `error:` line per problem if `show` (on the main process), and exit with code 2."""
    if show:
        for error in dict.fromkeys(errors):
            print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Restore signal handlers and torch's deterministic mode after a run, for programs that call a script's `main`.

    A decorator of `main`.
    """
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers, wakeup = {number: signal.getsignal(number) for number in numbers}, signal.set_wakeup_fd(-1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        torch.use_deterministic_algorithms(deterministic)


def run_script(main: Callable[[], None], *, remedy: str | None = None) -> None:
    """Run a script's `main`, and turn its end into an exit code and, for known causes, one `error:` line.

    If `main` does not return, Python's shutdown is skipped: it would wait for loader workers and other processes.

    Args:
        main: the script's main function, called without arguments.
        remedy: what to do after an interruption or a full disk; by default to resume the run.
    """
    sys.stdout, sys.stderr = _drop_unwritable(sys.stdout, sys.__stdout__), _drop_unwritable(sys.stderr, sys.__stderr__)
    code = 1
    try:
        inspect.unwrap(main)()  # without `put_back`: the signal handlers stay until this process ends
        end_workers()
        return
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):  # as Python does
            print(code, file=sys.stderr)
            code = 1
    except Stopped:
        code = 0
    except BaseException as error:
        try:
            code = _report(error, remedy)
        finally:  # even if the report fails: loader workers keep Python from ending
            _leave(code)
    _leave(code)


class _Output(io.FileIO):
    """A stream that drops what cannot be written: a terminal or pipe that is gone must not end a run."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _drop_unwritable(stream: io.TextIOWrapper | None, original: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Return a stream over `_Output` for sys.stdout or sys.stderr; `stream` if it is not the process's `original`."""
    if stream is None:  # closed by the shell
        return open(os.devnull, "w")
    if stream is not original:
        return stream
    raw = io.BufferedWriter(_Output(stream.fileno(), "wb", closefd=False))
    options = dict(line_buffering=stream.line_buffering, write_through=stream.write_through)
    return io.TextIOWrapper(raw, stream.encoding, errors="backslashreplace", **options)  # file names may be any bytes


def _leave(code: int) -> NoReturn:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        end_workers()
    finally:
        os._exit(code)


def end_workers() -> None:
    """End the loader workers that are left: they ignore SIGTERM, so Python's shutdown would wait for them for ever."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join(1)  # they hold files of the run open


def _report(error: BaseException, remedy: str | None) -> int:
    """Print why the script failed, in one line for known causes, and return the exit code."""
    resume = "continue with --resume_from_checkpoint auto"
    code, local = 1, False  # True for failures that the other processes of the run do not know of
    if isinstance(error, RunError):
        report = str(error)
    elif isinstance(error, KeyboardInterrupt):  # in training the second one: the first Ctrl-C saves the step
        report, code = f"interrupted; {remedy}" if remedy else f"interrupted before the step was saved; {resume}", 130
    else:
        report, local = "".join(traceback.format_exception(error)), True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            file = error.filename or "a file of the run"
            report = f"{file} could not be written (the disk is full); make room and "
            report += remedy or f"{resume}: earlier checkpoints are intact"
        elif hasattr(error, "exit_code"):  # data/pool.py's WorkerError, whose message has the remedy
            report, code = str(error), error.exit_code
            report += "" if code == 2 else f"; {remedy or resume}"
        elif isinstance(error, OSError) and error.errno == errno.EMFILE:
            report = f"more files are open than ulimit -n allows ({error}); raise it, or give fewer --num_workers"
        elif isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            message = " ".join(str(error).split())[:200] or type(error).__name__
            report = f"out of memory ({message}); "
            report += remedy or f"give a smaller --micro_batch_size, or --gradient_checkpointing, and {resume}"
        elif "does not have a deterministic implementation" in str(error):
            report = f"--deterministic: {str(error).partition(',')[0]}; leave the flag out"
        elif is_lost_process(error):
            report = (
                f"process {os.environ.get('RANK', 0)} stops because another process of the run is gone: it failed (see "
                f"its message), was killed, ran out of memory, or its machine is down; {resume}"
            )
    if "Traceback" in report:
        print(f"\n{report}", file=sys.stderr)
    elif local or is_main_process():
        print(f"\nerror: {report}", file=sys.stderr)
    return code


def is_lost_process(error: BaseException) -> bool:
    """Return True if the exception means that another process of the run is gone."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError):
        return True
    messages = ("by peer", "Broken pipe", "Connection refused", "Timed out waiting", "remote process exited")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in messages)


def is_main_process() -> bool:
    """Return True on the process that prints; known before Accelerate starts."""
    return os.environ.get("RANK", "0") == "0"


def resolve_precision(mixed_precision: str | None) -> str:
    """Return "no", "bf16" or "fp16": the flag, else Accelerate's value, else bf16 on a GPU that supports it.

    The launcher always sets its variable, so its default `no` cannot be told from a choice, and counts as unset.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision or launched != "no":
        return mixed_precision or launched
    return "bf16" if uses_cuda() and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def set_speed(device: torch.device, *, tf32: bool, deterministic: bool = False) -> None:
    """Set torch's process-wide options: threads on a CPU, TF32 on a GPU, deterministic algorithms."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only useful for debugging
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32  # convolutions; torch's default is True
    elif "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` sets one thread if the user sets no number
        chosen = "OMP_NUM_THREADS" in launcher_environment()
        torch.set_num_threads(1 if chosen else cores_per_process())


def launcher_environment() -> dict[str, str]:
    """Return the variables that the parent of this process was started with, {} if they cannot be read."""
    try:
        return psutil.Process().parent().environ()
    except (psutil.Error, OSError, AttributeError):  # AttributeError: no parent
        return {}


def prepare_compiler(device: torch.device) -> list[str]:
    """Make torch.compile draw the random numbers of eager mode (drop path); return an error message if it fails."""
    import torch._inductor.config
    import torchmetrics.functional.image  # noqa: F401 - for validation; in torch 2.8, importing it later recompiles

    torch._dynamo.reset()  # graphs of earlier runs in this process count towards a limit
    torch._dynamo.config.recompile_limit = 64  # each size of images has a graph of its own
    torch._inductor.config.fallback_random = True
    if hasattr(torch._inductor.config, "deterministic"):  # torch 2.8 lacks it
        torch._inductor.config.deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # its type depends on what is missing: a C++ compiler, Triton, a driver
        reason = str(error).strip().partition("\n")[0]
        return [
            f"--compile found no working compiler ({reason}); install "
            f"{'g++ or set CXX' if device.type == 'cpu' else 'triton and gcc'}, or leave the flag out"
        ]
    return []


def uses_cuda() -> bool:
    """Return True if the run is on a GPU; known before Accelerate starts."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")


def cores_per_process(*, spare: int = 0) -> int:
    """Return the number of CPU cores of this machine that each of its processes may use, without `spare` of them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (cores - spare) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def default_workers() -> int:
    """Return the default number of loader workers; on a GPU, launching and pinning keep two cores of the machine."""
    return min(32, cores_per_process(spare=2 if uses_cuda() else 0))
