"""Find what fits into the memory of a GPU and of the machine."""

import os
from collections.abc import Callable

import psutil
import torch

from training.launch import RunError
from training.wording import in_bytes


def check_memory(flag: str, size: int) -> None:
    """Raise RunError if this machine lacks the memory for `size` bytes per process, which `flag` needs."""
    processes, free = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), psutil.virtual_memory().available
    if size * processes > free:
        words = f"{in_bytes(size)} of memory in each of {processes} processes of this machine"
        raise RunError(f"{flag} needs {words}, of which {in_bytes(free)} are free; leave it out")


def check_device(device: torch.device) -> list[str]:
    """Return an error message for --micro_batch_size auto on a device where trying sizes does not work."""
    if device.type != "cpu":  # on a CPU the kernel kills a process that takes too much
        return []
    return ["--micro_batch_size auto tries what fits on a GPU, and this run is on a CPU; give a number"]


def fit_micro_batch(sizes: list[int], try_step: Callable[[int], None], *, device: torch.device, any_process) -> int:
    """Return the largest micro-batch of the rising `sizes` that fits on the GPU of every process.

    Args:
        try_step: takes a training step with a micro-batch of this size.
        any_process: returns True on all processes if its argument is true on any of them.

    Raises:
        RunError: if not even the smallest size fits.
    """
    for size in reversed(sizes):
        if not any_process(not fits_on_gpu(try_step, size, device)):
            return size
    remedy = "give --gradient_checkpointing, a smaller model or smaller images"
    raise RunError(f"a micro-batch of {sizes[0]} does not fit on the GPU; {remedy}")


def fits_on_gpu(try_step: Callable[[int], None], size: int, device: torch.device) -> bool:
    """Return True if a training step with a micro-batch of `size` fits while 5 % of the memory stay free.

    Libraries and fragmentation take that share in a longer run.
    """
    spare = None
    try:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            spare = torch.empty(total // 20, dtype=torch.uint8, device=device)
        try_step(size)
    except torch.OutOfMemoryError:
        return False
    finally:
        del spare
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # a dry run reports the peak of its own steps
    return True
