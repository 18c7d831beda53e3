"""Starting and ending a process of a script: exit codes, precision, threads, the compiler."""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch


class RunError(Exception):
    """Something that ends the run with one line: what happened, what was expected, the remedy."""


def fail(errors: list[str], *, show: bool = True) -> NoReturn:
    """Refuses bad input: prints one `error:` line each (`show`: on the main process) and ends with exit code 2."""
    if show:
        for error in dict.fromkeys(errors):
            print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def run_script(main: Callable[[], None], *, remedy: str | None = None) -> None:
    """Runs a script's `main`. What ends it with a known cause ends in one line, and no failure waits for anybody.

    `remedy` is what to do after an interruption or when there is room again, by default to resume the run. A failed
    process leaves without Python's farewell, which would wait for loader workers and for other processes.
    """
    own = False  # whether the other processes do not know it
    try:
        main()
        return
    except RunError as error:
        report, code = str(error), 1
    except OSError as error:
        report, code = traceback.format_exc(), 1
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            report = (
                f"{error.filename or 'a file of the run'} could not be written (the disk is full); make room and "
                + (remedy or "continue with --resume_from_checkpoint auto: whole checkpoints stay whole")
            )
            own = True  # a disk of this machine, maybe
    except KeyboardInterrupt:  # of a run, the second one: the first finishes the step and saves
        report, code = "interrupted before the step was saved; continue with --resume_from_checkpoint auto", 130
        report = f"interrupted; {remedy}" if remedy else report
    except Exception as error:
        report, code = traceback.format_exc(), 1
        own = lost_process(error) or out_of_memory(error)
        if out_of_memory(error):
            told = " ".join(str(error).split())[:200] or type(error).__name__
            report = f"out of memory ({told}); " + (
                remedy
                or "give --micro_batch_size auto or a smaller one, or --gradient_checkpointing, and continue with "
                "--resume_from_checkpoint auto"
            )
        elif own:
            report = (
                f"process {os.environ.get('RANK', 0)} stops, as another one of the run is gone: failed (its message "
                "says why), killed, out of memory, or with its machine; continue with --resume_from_checkpoint auto"
            )
    if "Traceback" in report:
        print(f"\n{report}", file=sys.stderr)
    elif own or is_main_process():
        print(f"\nerror: {report}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_process(error: BaseException) -> bool:
    """Whether an exception says that another process of the run does not answer any more."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    if isinstance(error, torch.distributed.DistNetworkError | torch.distributed.DistBackendError):
        return True
    told = ("by peer", "Broken pipe", "Connection refused", "Timed out waiting", "remote process exited")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in told)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice, on a GPU or a CPU."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def is_main_process() -> bool:
    """Whether this process is the one that speaks, known before Accelerate is."""
    return os.environ.get("RANK", "0") == "0"


def resolve_precision(wanted: str | None) -> str:
    """`no`, `bf16` or `fp16`: the flag, else Accelerate's own choice, else what the device does best.

    The launcher always sets its variable, so that its default `no` cannot be told from a choice.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted or launched != "no":
        return wanted or launched
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "no"


def set_speed(device: torch.device, *, tf32: bool) -> None:
    """Settings of torch that the whole process has: threads on a CPU, TF32 on a GPU."""
    if device.type == "cpu":
        use_all_cores()
    else:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")


def prepare_compiler(device: torch.device) -> list[str]:
    """Makes torch.compile draw random numbers as it is done without it (of drop path). Returns why it cannot work
    here, found by compiling something small."""
    import torch._inductor.config
    import torchmetrics.functional.image  # noqa: F401 - validation's; importing it later recompiles, in torch 2.8

    torch._inductor.config.fallback_random = True
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # which one depends on what is missing: a C++ compiler, Triton, a driver
        reason = str(error).strip().partition("\n")[0]
        return [
            f"--compile found no working compiler ({reason}); install "
            f"{'g++ or set CXX' if device.type == 'cpu' else 'triton and gcc'}, or leave the flag out"
        ]
    return []


def cores_per_process() -> int:
    """CPU cores of this machine that each of its processes may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def use_all_cores() -> None:
    """Undoes the one thread that `accelerate launch` gives a process on a CPU where nobody said how many."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(cores_per_process())
