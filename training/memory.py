"""The largest micro-batch that fits into memory."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from training.launch import RunError
from training.plan import BatchPlan, Memory
from training.wording import in_bytes

CGROUPS = Path("/sys/fs/cgroup")
SHARE = 0.8  # of the memory that is free on a CPU: the rest is for loader workers, and for others


def available_memory(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes that the processes of this machine may still take: what is free, or less where a container or a queue
    limits them (control groups, version 2)."""
    free = psutil.virtual_memory().available
    if not own.exists():
        return free
    for line in own.read_text().splitlines():
        group = cgroups / line.rpartition(":")[2].lstrip("/")
        for folder in (group, *group.parents):
            limit, used = folder / "memory.max", folder / "memory.current"
            if limit.exists() and used.exists() and limit.read_text().strip() != "max":
                free = min(free, int(limit.read_text()) - int(used.read_text()) + _cached(folder / "memory.stat"))
    return max(0, free)


def _cached(statistics: Path) -> int:
    """Bytes of files that the kernel keeps in memory until somebody needs it; they count as used."""
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))


def fit_micro_batch(
    batch: BatchPlan,
    memory: Memory,
    try_step: Callable[[int], None],
    *,
    allowed: Callable[[int], bool],
    held: int | None,
    accelerator,
    crew,
) -> BatchPlan:
    """`batch` in the largest micro-batches that fit into memory on every process; the global batch stays.

    On a GPU `try_step(size)` is a training step, of which is seen whether it fits; on a CPU, where the kernel kills
    what takes too much, `memory` tells. `allowed` says of which sizes micro-batches may be. A run that is resumed keeps
    the size that it `held`, as others round differently, unless that is too large. Raises RunError where not even the
    smallest fits.
    """
    on_cpu = accelerator.device.type == "cpu"
    free = SHARE * available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else 0

    def fits(size: int) -> bool:
        if on_cpu:
            return not crew.any(memory.fixed + size * memory.per_image > free)
        return not crew.any(not fits_on_gpu(try_step, size, accelerator.device))

    sizes = [size for size in range(1, batch.per_process + 1) if batch.per_process % size == 0 and allowed(size)]
    sizes = [size for size in sizes if size <= held] if held in sizes else sizes
    micro = sizes[-1] if fits(sizes[-1]) else largest(sizes[:-1], fits)
    accelerator.step = 0  # the micro-batches of the trials are not counted
    if micro is None:
        raise RunError(
            f"a micro-batch of {sizes[0]} does not fit into memory: it takes about "
            f"{in_bytes(memory.fixed + sizes[0] * memory.per_image)} a process; give --gradient_checkpointing, a "
            "smaller model or image, or more memory"
        )
    return batch._replace(micro=micro)


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the rising `sizes` that fits, where all below it do; None where none does."""
    low, high = 0, len(sizes)  # those before `low` fit, those from `high` on do not
    while low < high:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle + 1
        else:
            high = middle
    return sizes[low - 1] if low else None


def fits_on_gpu(try_step: Callable[[int], None], size: int, device: torch.device) -> bool:
    """Whether a training step of so many images fits, beside 5 % of the memory, which libraries and fragmentation take
    in a longer run."""
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
    return True
