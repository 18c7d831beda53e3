"""What a run will be, known before its first step: batch, length, learning rate; and what it will take."""

import argparse
import math
import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import nn

from training.launch import RunError
from training.wording import in_bytes, in_time, several


class BatchPlan(NamedTuple):
    """How many images an optimizer step takes: over all processes, of one process, and in one forward pass."""

    global_size: int
    per_process: int
    micro: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of a process in one optimizer step."""
        return self.per_process // self.micro


def plan_batch(
    *,
    global_batch_size: int | None,
    per_gpu_batch_size: int | None,
    micro_batch_size: int | str | None,
    gradient_accumulation_steps: int | None,
    num_processes: int,
    held: int | None,
    default: int | None = None,
) -> tuple[BatchPlan, list[str]]:
    """The batch that the flags ask for, or `held`, the global batch of the checkpoint to resume; and what is wrong.

    A flag that was not given is None; without any, the global batch is the `default`, or 256 images a process. A
    micro-batch of "auto" is all images of a process, until `memory.fit_micro_batch` finds what fits.
    """
    errors = []
    if micro_batch_size == "auto":
        if gradient_accumulation_steps:
            errors.append(
                f"--micro_batch_size auto finds what --gradient_accumulation_steps {gradient_accumulation_steps} says; "
                "give one of them"
            )
        micro_batch_size = None
    global_size, per_process = global_batch_size, per_gpu_batch_size
    if not (held or global_size or per_process):
        global_size = default or 256 * num_processes
    if global_size and global_size % num_processes and global_size != held:
        errors.append(
            f"--global_batch_size {global_size} is not divided by {num_processes} processes; "
            f"take a multiple of {num_processes}"
        )
    elif global_size and per_process and global_size != per_process * num_processes:
        errors.append(
            f"--global_batch_size {global_size} and --per_gpu_batch_size {per_process} x {num_processes} processes "
            f"= {per_process * num_processes} do not agree; give one of them"
        )
    if global_size is None and per_process is not None:
        global_size = per_process * num_processes
    if held and global_size and global_size != held:
        errors.append(
            f"the batch flags mean {global_size} images per optimizer step, the checkpoint has {held}; give "
            + (f"--per_gpu_batch_size {held // num_processes}" if per_process else f"--global_batch_size {held}")
        )
    if held and held % num_processes:
        errors.append(
            f"the checkpoint's global batch of {held} images is not divided by {num_processes} processes; start "
            f"{max(n for n in range(1, num_processes) if held % n == 0)} of them, or another number that divides it"
        )
    global_size = held or global_size
    per_process = max(1, global_size // num_processes)

    micro, accumulation = micro_batch_size, gradient_accumulation_steps
    if micro and accumulation and micro * accumulation != per_process:
        errors.append(
            f"--micro_batch_size {micro} x --gradient_accumulation_steps {accumulation} = {micro * accumulation} "
            f"is not the batch of {per_process} images per process; give one of them"
        )
    elif micro and per_process % micro:
        fitting = max(size for size in range(1, min(micro, per_process) + 1) if per_process % size == 0)
        errors.append(
            f"--micro_batch_size {micro} does not divide the batch of {per_process} images per process; give {fitting}"
        )
    elif not micro and per_process % (accumulation or 1):
        errors.append(
            f"--gradient_accumulation_steps {accumulation} does not divide the batch of {per_process} images a process"
        )
    micro = micro or max(1, per_process // (accumulation or 1))
    return BatchPlan(global_size, per_process, micro), errors


class LengthPlan(NamedTuple):
    """Optimizer steps of an epoch, of the run, and of its warmup."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


def plan_length(
    *,
    epochs: int | None,
    max_steps: int | None,
    warmup_epochs: float | None,
    warmup_steps: int | None,
    num_samples: int,
    global_batch_size: int,
    default_warmup_epochs: float = 0.0,
    default_warmup_steps: int | None = None,
) -> tuple[LengthPlan, list[str]]:
    """The length that the flags ask for, and what is wrong. A flag that was not given is None; the default warmup is in
    epochs, or otherwise in steps."""
    steps_per_epoch = num_samples // global_batch_size
    if not steps_per_epoch:
        return LengthPlan(1, 1, 0), [
            f"the data hold {num_samples} images, fewer than one global batch of {global_batch_size}; "
            "give a smaller batch or more images"
        ]
    total_steps = max_steps or epochs * steps_per_epoch
    if warmup_steps is not None:
        given, warmup = f"--warmup_steps {warmup_steps}", warmup_steps
    elif warmup_epochs is not None:
        given, warmup = f"--warmup_epochs {warmup_epochs:g}", round(warmup_epochs * steps_per_epoch)
    else:
        default = default_warmup_steps or round(default_warmup_epochs * steps_per_epoch)
        warmup = min(default, total_steps // 20)
        return LengthPlan(steps_per_epoch, total_steps, warmup), []
    errors = []
    if warmup and warmup >= total_steps:
        errors.append(
            f"{given} is {warmup} steps, not shorter than the run of {total_steps}; "
            "give a shorter warmup or a longer run"
        )
    return LengthPlan(steps_per_epoch, total_steps, warmup), errors


class Memory(NamedTuple):
    """About what a process takes, in bytes."""

    fixed: float  # weights, gradients, the optimizer's moments
    per_image: float  # what the forward pass of an image keeps for the backward pass


def needed_memory(
    model: nn.Module, activations: float, accelerator, *, optimizer: str = "adamw", averaged: bool = False
) -> Memory:
    """What training `model` takes: a weight and its copy in half precision, its moving average where one is kept, its
    gradient, its moments, and what processes exchange. Under FSDP2 a process has a share of the weights, gradients and
    moments, and a whole copy of the weights for validation. `activations` are those of an image."""
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharded, half_precision = accelerator.is_fsdp2, accelerator.mixed_precision != "no"
    shares = accelerator.num_processes if sharded else 1
    exchanged = 4 * (accelerator.num_processes > 1 and not sharded)
    fixed = (4 / shares + 4 * sharded + 2 * half_precision + 4 * averaged) * parameters
    fixed += ((4 + (8 if optimizer == "adamw" else 4)) / shares + exchanged) * trained
    return Memory(fixed, activations)


def plan_run(
    args: argparse.Namespace,
    *,
    num_samples: int | None,
    num_processes: int,
    held: int | None,
    default_batch_size: int | None = None,
    default_warmup_epochs: float = 0.0,
    default_warmup_steps: int | None = None,
) -> tuple[BatchPlan, LengthPlan | None, list[str]]:
    """Resolves the flags of batch, length and learning rate, in `args` too: both plans, and what is wrong.

    `num_samples` is what an epoch has, None where the data could not be opened; `held` is the global batch of the
    checkpoint to resume. The defaults are those of `plan_batch` and `plan_length`.
    """
    batch, errors = plan_batch(
        global_batch_size=args.global_batch_size,
        per_gpu_batch_size=args.per_gpu_batch_size,
        micro_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        num_processes=num_processes,
        held=held,
        default=default_batch_size,
    )
    args.global_batch_size, args.per_gpu_batch_size = batch.global_size, batch.per_process
    if args.micro_batch_size != "auto":
        args.micro_batch_size, args.gradient_accumulation_steps = batch.micro, batch.accumulation
    length = None
    if num_samples is not None:
        length, found = plan_length(
            epochs=args.epochs,
            max_steps=args.max_steps,
            warmup_epochs=args.warmup_epochs,
            warmup_steps=args.warmup_steps,
            num_samples=num_samples,
            global_batch_size=batch.global_size,
            default_warmup_epochs=default_warmup_epochs,
            default_warmup_steps=default_warmup_steps,
        )
        errors += found
        args.max_steps, args.warmup_steps = length.total_steps, length.warmup_steps
    if args.learning_rate is None:
        args.learning_rate = args.base_learning_rate * batch.global_size / 256
    if args.min_learning_rate > args.learning_rate:
        errors.append(
            f"--min_learning_rate {args.min_learning_rate:g} is above the peak of {args.learning_rate:g}; "
            "take a lower one"
        )
    return batch, length, errors


def describe_run(
    args: argparse.Namespace,
    batch: BatchPlan,
    length: LengthPlan,
    accelerator,
    memory: Memory,
    *,
    optimizer: str = "AdamW",
    decay: str = "cosine",
) -> list[str]:
    """The lines of the plan that every script prints: batch, length, rate, precision, memory. `decay` is how the rate
    falls."""
    values = "8 bits" if args.value_range is None else "{:.9g} to {:.9g}".format(*args.value_range)
    values += "" if args.nodata is None else f", no data at {args.nodata:g}"
    mean, std = (" ".join(f"{value:.3g}" for value in values_) for values_ in (args.mean, args.std))
    half, on_cpu = args.mixed_precision != "no", accelerator.device.type == "cpu"
    precision = args.mixed_precision.replace("no", "float32")
    if args.tf32 and not half and not on_cpu:
        precision += " (matrix products in TF32)"
    speed = [name.replace("_", " ") for name in ("compile", "gradient_checkpointing") if getattr(args, name)]
    speed += ["FSDP2"] * accelerator.is_fsdp2
    return [
        f"pixels     {values}, normalised by mean {mean} and deviation {std}",
        f"batch      {batch.global_size} = {several(accelerator.num_processes, 'process')} x "
        f"{several(batch.accumulation, 'micro-batch')} x {batch.micro}",
        f"length     {length.total_steps} steps, {length.steps_per_epoch} an epoch, {length.warmup_steps} warmup",
        f"rate       {args.learning_rate:.3g} at its peak, {decay} to {args.min_learning_rate:g}",
        f"precision  {', '.join([precision, *speed])} on {accelerator.device}"
        + (f", {several(torch.get_num_threads(), 'thread')}" if on_cpu else ""),
        f"memory     about {in_bytes(memory.fixed + batch.micro * memory.per_image)} a process: "
        f"{in_bytes(memory.fixed)} for weights, gradients and {optimizer}, {in_bytes(memory.per_image)} an image for "
        "activations",
    ]


def rehearse(train, crew, progress, *, read_ahead, left_out):
    """Times `train(step)` on real batches for some seconds, and says what the run will take, without `left_out`.

    `read_ahead` steps are trained before, as what the workers have in stock would hide that they are slow.
    """
    damaged, losses = [], []
    steps_left = progress.total_steps - progress.clock_step

    def run(first, *, seconds, at_least):
        begin, waited, step = time.perf_counter(), progress.waited, first
        while True:
            loss, _, found = train(step)
            losses.append(loss.item())  # waits for the device
            damaged.extend(found)
            step, spent = step + 1, time.perf_counter() - begin
            enough = (spent > seconds and step - first >= at_least) or spent > 6 * seconds
            if crew.any(enough or crew.signal_name is not None):
                return step, spent / (step - first), (progress.waited - waited) / spent

    first, _, _ = run(0, seconds=0, at_least=1)  # compiles, starts the workers
    warm, _, _ = run(first, seconds=3, at_least=1 + read_ahead)
    end, seconds, waited = run(warm, seconds=10, at_least=3)
    device = progress.accelerator.device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stock = "" if warm - first > read_ahead else ", too few to know the data wait"
    progress.say(
        f"dry run    {end - warm} steps timed after {warm}{stock}: {seconds:.3g} s a step, "
        f"{progress.global_batch_size / seconds:.4g} images/s, data wait {waited:.0%}, peak memory {in_bytes(peak)}\n"
        f"           {steps_left} steps take {in_time(seconds * steps_left)}, {left_out} left out; nothing was written"
    )
    if damaged:
        index, reason = damaged[0]
        progress.say(f"           {len(damaged)} damaged images were met, number {index} first: {reason}")
    if not all(map(math.isfinite, losses)):
        raise RunError("a loss of the dry run is not finite; look at the data, or take another --mixed_precision")
