"""The plan of a run, known before its first step: batch, steps, learning rate."""

from typing import NamedTuple

import torch

from training.launch import InputError, check
from training.resolve import ImageFormat, in_range
from training.wording import in_bytes, several


class BatchPlan(NamedTuple):
    """Images of an optimizer step: over all processes, of one process, and of one forward pass."""

    global_size: int
    per_process: int
    micro: int

    @property
    def accumulation(self) -> int:
        """The micro-batches of a process in one optimizer step."""
        return self.per_process // self.micro


class LengthPlan(NamedTuple):
    """Optimizer steps of an epoch, of the run, and of its warmup."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


class Stage(NamedTuple):
    """Optimizer steps on images of one size."""

    size: tuple[int, int]  # H and W in pixels
    steps: range


class Plan(NamedTuple):
    """Batch, length and learning rate of a run."""

    batch: BatchPlan
    length: LengthPlan
    learning_rate: float  # the peak
    min_learning_rate: float

    @property
    def schedule(self) -> dict:
        """The arguments of `learning_rate_at`."""
        steps = dict(total_steps=self.length.total_steps, warmup_steps=self.length.warmup_steps)
        return dict(peak=self.learning_rate, minimum=self.min_learning_rate, **steps)

    @property
    def flags(self) -> dict:
        """The plan as resolved flags, for args.json."""
        batch, length = self.batch, self.length
        return dict(
            global_batch_size=batch.global_size,
            per_gpu_batch_size=batch.per_process,
            micro_batch_size=batch.micro,
            gradient_accumulation_steps=batch.accumulation,
            max_steps=length.total_steps,
            warmup_steps=length.warmup_steps,
            learning_rate=self.learning_rate,
        )


def plan_batch(
    *,
    global_batch_size: int | None,
    per_gpu_batch_size: int | None,
    micro_batch_size: int | str | None,
    gradient_accumulation_steps: int | None,
    num_processes: int,
    checkpoint_size: int | None = None,
    default: int | None = None,
) -> BatchPlan:
    """Return the batch that the flags ask for; a flag that was not given is None.

    Args:
        micro_batch_size: "auto" means all images of a process, until `memory.fit_micro_batch` finds what fits.
        checkpoint_size: the global batch of the checkpoint to resume, which takes precedence; see `compare_batch`.
        default: the global batch if no flag gives one; None for 256 images per process.

    Raises:
        InputError: for contradictions, one line each.
    """
    errors = []
    micro = None if micro_batch_size == "auto" else micro_batch_size
    accumulation, per_process = gradient_accumulation_steps, per_gpu_batch_size
    given = global_batch_size or (per_process or 0) * num_processes
    global_size = checkpoint_size or given or default or 256 * num_processes
    if global_batch_size and per_process and global_batch_size != per_process * num_processes:
        errors.append(
            f"--global_batch_size {global_batch_size} and --per_gpu_batch_size {per_process} x {num_processes} "
            f"processes = {per_process * num_processes} do not agree; give one of them"
        )
    elif checkpoint_size and checkpoint_size % num_processes:
        fewer = max(n for n in range(1, num_processes) if checkpoint_size % n == 0)
        errors.append(
            f"the checkpoint's global batch of {checkpoint_size} images is not divisible by {num_processes} processes; "
            f"start {fewer} of them, or another number that divides it"
        )
    elif global_size % num_processes:
        errors.append(
            f"--global_batch_size {global_size} is not divisible by {num_processes} processes; "
            f"take a multiple of {num_processes}"
        )
    per_process = max(1, global_size // num_processes)
    if micro and accumulation and micro * accumulation != per_process:
        errors.append(
            f"--micro_batch_size {micro} x --gradient_accumulation_steps {accumulation} = {micro * accumulation} "
            f"is not the batch of {per_process} images per process; give one of them"
        )
    elif micro and per_process % micro:
        largest = max(size for size in range(1, min(micro, per_process) + 1) if per_process % size == 0)
        errors.append(
            f"--micro_batch_size {micro} does not divide the batch of {per_process} images per process; give {largest}"
        )
    elif not micro and per_process % (accumulation or 1):
        errors.append(
            f"--gradient_accumulation_steps {accumulation} does not divide the batch of {per_process} images per "
            "process; give a number that does"
        )
    check(errors)
    return BatchPlan(global_size, per_process, micro or per_process // (accumulation or 1))


def compare_batch(
    global_batch_size: int | None, per_gpu_batch_size: int | None, checkpoint_size: int, num_processes: int
) -> list[str]:
    """Return an error message if the batch flags mean another global batch than that of the checkpoint to resume."""
    global_size = global_batch_size or (per_gpu_batch_size or 0) * num_processes
    if global_size in (0, checkpoint_size):
        return []
    remedy = f"--global_batch_size {checkpoint_size}"
    remedy = f"--per_gpu_batch_size {checkpoint_size // num_processes}" if per_gpu_batch_size else remedy
    return [f"the batch flags mean {global_size} images per step, the checkpoint has {checkpoint_size}; give {remedy}"]


def plan_learning_rate(given: float | None, base: float | None, minimum: float, global_batch_size: int) -> float:
    """Return the peak: `given`, or `base` * global batch size / 256 if that is None (Goyal et al. 2017).

    Raises:
        InputError: if the minimum is above the peak.
    """
    peak = base * global_batch_size / 256 if given is None else given
    if minimum > peak:
        raise InputError(f"--min_learning_rate {minimum:g} is above the peak of {peak:g}; take a lower one")
    return peak


def plan_length(
    *,
    epochs: int | None,
    max_steps: int | None,
    warmup_epochs: float | None,
    warmup_steps: int | None,
    num_samples: int,
    global_batch_size: int,
    recipe_epochs: tuple[int, int] = (0, 1),
    recipe_steps: tuple[int, int] | None = None,
) -> LengthPlan:
    """Return the length that the flags ask for; a flag that was not given is None.

    The default warmup is the recipe's; in a run shorter than the recipe it is the same share of the steps.

    Args:
        recipe_epochs: warmup and length of the recipe in epochs.
        recipe_steps: the same in optimizer steps, for a recipe that counts steps.

    Raises:
        InputError: for fewer samples than one global batch, or a warmup that is not shorter than the run.
    """
    steps_per_epoch = num_samples // global_batch_size
    if not steps_per_epoch:
        raise InputError(
            f"an epoch has {num_samples} images, fewer than one global batch of {global_batch_size}; "
            "give a smaller batch or more images"
        )
    total_steps = max_steps or epochs * steps_per_epoch
    if warmup_steps is not None:
        flag, warmup = f"--warmup_steps {warmup_steps}", warmup_steps
    elif warmup_epochs is not None:
        flag, warmup = f"--warmup_epochs {warmup_epochs:g}", round(warmup_epochs * steps_per_epoch)
    else:
        warmup, length = recipe_steps or (epochs * steps_per_epoch for epochs in recipe_epochs)
        return LengthPlan(steps_per_epoch, total_steps, min(warmup, total_steps * warmup // length))
    if warmup and warmup >= total_steps:
        raise InputError(f"{flag} is {warmup} steps, not shorter than the run of {total_steps}; give a shorter one")
    return LengthPlan(steps_per_epoch, total_steps, warmup)


def describe_images(path_to_data: str, train, validation, *, targets: str = "", views: int = 1) -> list[str]:
    """Return the plan's lines about the data.

    Args:
        targets: "10 classes", "5 labels" or the like; "" if there are none.
        views: number of views of each image that is read.
    """
    images = f"{len(train)} images" + (f" {'of' if 'classes' in targets else 'with'} {targets}" if targets else "")
    repeated = f", {views} views of each" if views > 1 else ""
    validated = f"{len(validation)} for validation" if validation else "none for validation: training images are used"
    size = "generated" if path_to_data.startswith("builtin:") else f"about {in_bytes(train.size_in_bytes())}"
    lines = [f"data       {path_to_data}: {images} ({size}){repeated}, {validated}"]
    lines += [note for source in (train, validation) for note in getattr(source, "notes", ())]
    for word, source, kind in (("untrained ", train, "training"), ("unmeasured", validation, "validation")):
        if "classes" in targets and getattr(source, "labels", None) is not None:
            present = {source.classes[label] for label in {*source.labels.tolist()}}
            absent = [name for name in train.classes if name not in present]
            names = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            line = f"{word} {len(absent)} of {len(train.classes)} classes, without {kind} images: {names}"
            lines += [line] if absent else []
    return lines


def describe_run(
    plan: Plan, images: ImageFormat, accelerator, speed: list[str], *, decay: str | None = None
) -> list[str]:
    """Return the lines of the plan that every script prints.

    Args:
        speed: options that change the speed of a step, in words, such as "TF32".
        decay: how the learning rate falls, in words; None for a cosine to its minimum.
    """
    (batch, length), on_cpu = plan[:2], accelerator.device.type == "cpu"
    values = "8 bits" if images.value_range is None else in_range(images.value_range)
    values += "" if images.nodata is None else f", no data at {images.nodata:g}"
    mean, std = (" ".join(f"{value:.3g}" for value in channels) for channels in (images.mean, images.std))
    precision = ", ".join([accelerator.mixed_precision.replace("no", "float32"), *speed])
    threads = f", {several(torch.get_num_threads(), 'thread')}" if on_cpu else ""
    return [
        f"input      {values}, normalized by mean {mean} and standard deviation {std}",
        f"batch      {batch.global_size} = {several(accelerator.num_processes, 'process')} x "
        f"{several(batch.accumulation, 'micro-batch')} x {batch.micro}",
        f"steps      {length.total_steps}, {length.steps_per_epoch} per epoch, {length.warmup_steps} warmup",
        f"lr         peak {plan.learning_rate:.3g}, {decay or f'cosine to {plan.min_learning_rate:g}'}",
        f"precision  {precision} on {accelerator.device}{threads}",
    ]
