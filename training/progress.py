"""Report a run while it trains: the bar, log.jsonl, damaged images, losses that are not finite."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.files import read_lines
from training.launch import RunError
from training.plan import Plan, Stage
from training.sharding import whole
from training.trackers import track
from training.wording import in_bytes, in_time, several

BAR = dict(dynamic_ncols=True, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30)


class Progress:
    """The progress bar and the log of a run, on the main process. A step counts once it is completed.

    A line of log.jsonl has `step`, `epoch`, and either the metrics of a validation or those of one training step:
        loss: mean over that step's global batch, all micro-batches and processes
        learning_rate: of the step; that of the head if layers have different ones
        grad_norm: of all gradients together, before clipping
        images_per_second: since the last line, over all processes, without validation and saving
        data_wait: share of that time in which the main process waited for the loader

    Args:
        log_every: steps between two lines of the log.
        start_step: the step of the checkpoint that the run resumes, or 0.
        seconds: the time that the run took before it was resumed.
    """

    def __init__(
        self, accelerator, folder: Path, plan: Plan, *, log_every: int, start_step: int = 0, seconds: float = 0.0
    ):
        self.accelerator, self.path, self.plan, self.log_every = accelerator, folder / "log.jsonl", plan, log_every
        self.start_time = time.perf_counter() - seconds
        self.first_bad_step = torch.full((), -1, device=accelerator.device)
        total = plan.length.total_steps
        hidden = not accelerator.is_main_process or not total
        self.bar = tqdm(total=total, initial=start_step, unit="step", disable=hidden, **BAR)
        self.restart_clock(start_step)

    def restart_clock(self, step: int) -> None:
        """Measure speed and waiting from now on, after `step` steps."""
        self.waited, self.clock_step, self.clock_time = 0.0, step, time.perf_counter()

    @property
    def seconds(self) -> float:
        """The time that the run has taken, over all its resumptions."""
        return time.perf_counter() - self.start_time

    def timed(self, batches: Iterator) -> Iterator:
        """Yield from the loader, and count the time until it answers as waiting for data."""
        start = time.perf_counter()
        for item in batches:
            self.waited += time.perf_counter() - start
            yield item
            start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside, such as validation or saving, out of the measured speed."""
        start = time.perf_counter()
        yield
        self.clock_time += time.perf_counter() - start

    def step(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> bool:
        """Note a completed step, and write a line at step 1, every `log_every` steps and at the last one.

        Only these steps wait for the device. `loss` is this process's mean over the step; the line has the global mean.

        Returns:
            True if a line was written.

        Raises:
            RunError: if a loss or gradient norm since the last line was not finite.
        """
        grad_norm, finite = whole(grad_norm), torch.isfinite(loss)
        if self.accelerator.scaler is None:  # under fp16 the loss scaler skips steps with an infinite norm
            finite = finite & torch.isfinite(grad_norm)
        self.first_bad_step = torch.where((self.first_bad_step < 0) & ~finite, step, self.first_bad_step)
        self.bar.update(1)
        if step != 1 and step % self.log_every and step != self.plan.length.total_steps:
            return False
        loss = self.accelerator.reduce(loss, "mean")
        self.check_finite()
        elapsed = time.perf_counter() - self.clock_time
        images = (step - self.clock_step) * self.plan.batch.global_size
        norm = grad_norm.item()
        line = {
            "step": step,
            "epoch": step / self.plan.length.steps_per_epoch,
            "loss": loss.item(),
            "learning_rate": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,  # JSON has no infinity, which fp16's skipped steps have
            "images_per_second": round(images / elapsed, 2),
            "data_wait": round(self.waited / elapsed, 4),
        }
        self.restart_clock(step)
        self.bar.set_postfix_str(
            f"loss {line['loss']:.4f}, lr {learning_rate:.2e}, {line['images_per_second']:.0f} images/s, "
            f"data wait {line['data_wait']:.0%}"
        )
        self.write(line)
        return True

    def check_finite(self) -> None:
        """Raise RunError if a loss or gradient norm was not finite, on any process; waits for the device."""
        bad_step = int(self.accelerator.gather(self.first_bad_step).max())
        if bad_step >= 0:
            raise RunError(
                f"the loss or gradient norm of step {bad_step} is not finite; it is not saved: resume with "
                "--resume_from_checkpoint auto, and if it happens again take a lower learning rate, a longer warmup, "
                "--max_grad_norm 1 or another --mixed_precision"
            )

    def write(self, line: dict) -> None:
        """Append a line to log.jsonl, and send its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        track(self.accelerator, lambda tracker: tracker.log(numbers, step=line["step"]))

    def picture(self, path: Path, name: str, step: int) -> None:
        """Send a picture file to the trackers."""
        if self.accelerator.trackers:  # which the main process alone has
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, C)
            track(self.accelerator, lambda tracker: tracker.log_images({name: pixels}, step=step))

    def say(self, text: str) -> None:
        """Print a line above the bar, on the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)


class Rehearsal:
    """The timing of --dry_run: a step to compile and start workers, some to empty the loader's stock, then 10 seconds.

    The loader workers read `read_ahead` steps ahead; this stock would hide that they are slow. As in training, steps
    are launched ahead of the device, which is waited for at the end of each phase. Each stage that `walk` goes through
    is timed like this.
    """

    def __init__(self, progress: Progress, crew, *, read_ahead: int):
        self.progress, self.crew, self.steps, self.losses = progress, crew, 0, 0.0
        self.all_phases = [(0.0, 1), (3.0, 1 + read_ahead), (10.0, 3)]  # minimum seconds and steps of each phase
        self.phases = list(self.all_phases)
        self.stages = [Stage((), range(progress.clock_step, progress.plan.length.total_steps))]
        self.timings = []  # per stage: timed steps, seconds and data wait (s) of a step
        progress.restart_clock(0)

    def walk(self, stages: list[Stage], load: Callable) -> Iterator:
        """Yield from the batches of each stage, `load(stage)`, until it is timed, even if it has fewer steps."""
        self.stages = stages
        for number, stage in enumerate(stages):
            batches = load(stage._replace(steps=range(stage.steps.start, 2**40)))
            while len(self.timings) == number:
                yield next(batches)
            del batches  # and the workers with it, before those of the next stage start

    def completed(self, loss: torch.Tensor) -> bool:
        """Note a step; after the last one, print the times and the memory, and return True.

        Raises:
            RunError: if a loss so far is not finite.
        """
        self.steps += 1
        self.losses = self.losses + loss  # not finite once a loss is not
        progress, (at_least, min_steps) = self.progress, self.phases[0]
        spent, steps = time.perf_counter() - progress.clock_time, self.steps - progress.clock_step
        enough = (spent > at_least and steps >= min_steps) or spent > 6 * at_least > 0  # few, slow steps
        if not self.crew.any(enough or self.crew.signal_name is not None):
            return False
        if self.crew.any(not math.isfinite(self.losses.item())):  # waits for the device
            raise RunError("a loss of the dry run is not finite; look at the data, or take another --mixed_precision")
        if len(self.phases) > 1:
            self.phases.pop(0)
            progress.restart_clock(self.steps)
            return False
        spent = time.perf_counter() - progress.clock_time  # with the steps that the device had not done
        self.timings.append((steps, spent / steps, progress.waited / steps))
        if len(self.timings) < len(self.stages):
            self.phases = list(self.all_phases)
            progress.restart_clock(self.steps)
            return False
        self.report()
        return True

    def report(self) -> None:
        """Print the mean time of a step over the run, the time of the run, and the peak memory."""
        progress, device = self.progress, self.progress.accelerator.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        counts, times, waits = zip(*self.timings, strict=True)
        steps = [len(stage.steps) for stage in self.stages]
        weights = [max(1, number) for number in steps]  # a run that is finished has no step left
        seconds, waited = fmean(times, weights), fmean(waits, weights)
        lines = [
            f"dry run    {sum(counts)} steps timed after {self.steps - sum(counts)}: {seconds:.3g} s a step, "
            f"{progress.plan.batch.global_size / seconds:.4g} images/s, data wait {waited / seconds:.0%}, "
            f"peak memory {in_bytes(peak)}"
        ]
        if len(steps) > 1:
            names = [" x ".join(map(str, stage.size)) for stage in self.stages]
            parts = zip(names, times, steps, strict=True)
            lines += [f"{name}: {each:.3g} s a step, {several(number, 'step')}" for name, each, number in parts]
        left = f"{sum(steps)} steps take {in_time(seconds * sum(steps))}"
        lines.append(f"{left}, without validation and saving; nothing was written")
        progress.say(f"\n{' ' * 11}".join(lines))


def truncate_log(folder: Path, step: int) -> dict[str, float]:
    """Remove the lines of log.jsonl beyond a step, and return the metrics of the validation after that step."""
    path = (folder / "log.jsonl").resolve()  # a link stays
    lines = [line for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_name(".log.jsonl.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
    measured = [line for line in lines if line["step"] == step and "loss" not in line]
    return {name: value for line in measured for name, value in line.items() if name not in ("step", "epoch")}


def best_of(folder: Path, metric: str) -> tuple[float, int | None]:
    """Return the highest value of a metric in log.jsonl and the first step that reached it; -inf, None without one."""
    lines = [line for line in read_lines(folder / "log.jsonl") if line.get(metric) is not None]
    best = max(lines, key=lambda line: line[metric], default={})
    return best.get(metric, -math.inf), best.get("step")


class DamagedImages:
    """The damaged images of a run, each named once in damaged.jsonl; too many of them end the run.

    Args:
        num_samples: number of images of the run.
        is_main_process: whether this process writes the file.
        replace: whether damaged images are replaced; otherwise the first one ends the run.
    """

    def __init__(self, folder: Path, num_samples: int, *, is_main_process: bool, replace: bool = True):
        self.path, self.num_samples = folder / "damaged.jsonl", num_samples
        self.is_main_process, self.replace = is_main_process, replace
        self.names = {image["path"] for image in read_lines(self.path)}
        if is_main_process and self.path.exists() and not self.path.read_text().endswith("\n"):
            with open(self.path, "a") as file:
                file.write("\n")  # after a line that a kill cut short

    def add(self, images: list[tuple[str, str]]) -> None:
        """Note (path, reason) pairs, the same on all processes.

        Raises:
            RunError: for too many images (over 1 % and over 10, or all), or for any without `replace`.
        """
        new = {path: reason for path, reason in images if path not in self.names}
        if new and self.is_main_process:
            with open(self.path, "a") as file:
                file.writelines(json.dumps({"path": path, "reason": new[path]}) + "\n" for path in new)
            if self.replace and not self.names:
                path = next(iter(new))
                tqdm.write(f"note: {path} is damaged ({new[path]}) and replaced; {self.path} lists all", sys.stderr)
        self.names |= new.keys()
        if images and not self.replace:
            path, reason = images[0]
            raise RunError(f"{path} is damaged ({reason}), and --on_damaged error allows none; repair or remove it")
        limit = min(max(10, self.num_samples // 100), self.num_samples - 1)
        if len(self.names) > limit:
            raise RunError(
                f"{len(self.names)} of {self.num_samples} images are damaged, more than the {limit} allowed; "
                f"{self.path} names them and says why: repair or remove them"
            )
