"""What a run says of itself while it runs: the bar, log.jsonl, trackers, damaged images, losses that are not finite."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.launch import RunError
from training.sharding import whole
from training.trackers import track


class Progress:
    """One bar and one log, on the main process. Steps are counted as completed optimizer steps.

    `seconds` is the time that the run took before it was resumed.
    """

    def __init__(
        self,
        accelerator,
        folder: Path,
        *,
        total_steps: int,
        steps_per_epoch: int,
        global_batch_size: int,
        log_every: int,
        start_step: int = 0,
        seconds: float = 0.0,
    ):
        self.accelerator, self.path = accelerator, folder / "log.jsonl"
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.global_batch_size, self.log_every = global_batch_size, log_every
        self.seconds_before, self.start_time = seconds, time.perf_counter()
        self.first_bad_step = torch.full((), -1, device=accelerator.device)
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            dynamic_ncols=True,
            leave=False,  # so that what is said last stays last
            disable=not accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self._restart_clock(start_step)

    def _restart_clock(self, step: int) -> None:
        self.waited, self.clock_step, self.clock_time = 0.0, step, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time that the run has taken, over all its resumptions."""
        return self.seconds_before + time.perf_counter() - self.start_time

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Counts the time inside neither as training nor as waiting: validation, saving."""
        start = time.perf_counter()
        yield
        self.clock_time += time.perf_counter() - start

    def step(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor, learning_rate: float) -> bool:
        """Notes a completed step; waits for the device only where a line is due: at step 1, every `log_every`, last.
        Returns whether one was due.

        `loss` is this process's mean over the step; the line has that over all processes. Raises RunError where a loss
        or gradient norm since the last line was not finite.
        """
        grad_norm, finite = whole(grad_norm), torch.isfinite(loss)
        if self.accelerator.scaler is None:  # under fp16 an infinite norm is the loss scaler's business
            finite = finite & torch.isfinite(grad_norm)
        self.first_bad_step = torch.where((self.first_bad_step < 0) & ~finite, step, self.first_bad_step)
        self.bar.update(1)
        if step != 1 and step % self.log_every and step != self.total_steps:
            return False
        loss = self.accelerator.reduce(loss, "mean")
        self.check_finite()
        elapsed = time.perf_counter() - self.clock_time
        line = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss.item(),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm.item(),
            "images_per_second": round((step - self.clock_step) * self.global_batch_size / elapsed, 2),
            "data_wait": round(self.waited / elapsed, 4),
        }
        self._restart_clock(step)
        self.bar.set_postfix_str(
            f"loss {line['loss']:.4f}, lr {learning_rate:.2e}, {line['images_per_second']:.0f} images/s, "
            f"data wait {line['data_wait']:.0%}"
        )
        self.write(line)
        return True

    def check_finite(self) -> None:
        """Raises RunError where a loss or gradient norm was not finite, on any process; waits for the device."""
        bad_step = int(self.accelerator.gather(self.first_bad_step).max())
        if bad_step >= 0:
            raise RunError(
                f"the loss or gradient norm of step {bad_step} is not finite; nothing was saved since: resume with "
                "--resume_from_checkpoint auto, and where it returns take a lower learning rate, a longer warmup, "
                "--max_grad_norm 1 or another --mixed_precision"
            )

    def write(self, line: dict) -> None:
        """Appends a line to log.jsonl and sends its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        track(self.accelerator, lambda tracker: tracker.log(numbers, step=line["step"]))

    def picture(self, path: Path, name: str, step: int) -> None:
        """Sends a picture that was written to a file to the trackers."""
        if self.accelerator.trackers:  # so on the main process alone
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, C)
            track(self.accelerator, lambda tracker: tracker.log_images({name: pixels}, step=step))

    def say(self, text: str) -> None:
        """Prints a line above the bar, on the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """Removes the bar's claim on the terminal."""
        self.bar.close()


def truncate_log(folder: Path, step: int) -> dict[str, float]:
    """Removes from log.jsonl the lines beyond a step: what a resumed run is about to write again. Returns what was
    measured, by validation, after that very step."""
    path = folder / "log.jsonl"
    kept, measured = [], {}
    if not path.exists():
        return measured
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(text + "\n")
            if line["step"] == step and "loss" not in line:
                measured.update(
                    {name: value for name, value in line.items() if name not in ("step", "epoch", "advice")}
                )
    temporary = path.with_name(".log.jsonl.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
    return measured


def best_of(folder: Path, name: str) -> tuple[float, int | None]:
    """The highest value of a metric in log.jsonl, and the step where it was first reached: -1 and None without one."""
    best, best_step = -1.0, None
    path = folder / "log.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line.get(name, -1.0) > best:
            best, best_step = line[name], line["step"]
    return best, best_step


class DamagedImages:
    """Names each damaged image once in `damaged.jsonl`, and ends a run that has too many: at the first where they are
    not to be replaced."""

    def __init__(self, folder: Path, num_samples: int, *, is_main_process: bool, replace: bool = True):
        self.path, self.is_main_process, self.replace = folder / "damaged.jsonl", is_main_process, replace
        self.limit = min(max(10, num_samples // 100), num_samples - 1)
        self.num_samples = num_samples
        self.named, self.reasons = set(), Counter()
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short
                line = json.loads(text)
                path, reason = line["path"], line["reason"]
                self.named.add(path)
                self.reasons[reason] += 1
        if self.named and is_main_process and not self.path.read_text().endswith("\n"):
            with open(self.path, "a") as file:
                file.write("\n")

    def add(self, found: list[tuple[str, str]]) -> None:
        """Notes (path, reason) pairs, the same on all processes. Raises RunError beyond the limit."""
        for path, reason in found:
            if path in self.named:
                continue
            if self.is_main_process and self.replace and not self.named:
                tqdm.write(f"note: {path} is damaged ({reason}), another is shown; {self.path} names all", sys.stderr)
            self.named.add(path)
            self.reasons[reason] += 1
            if self.is_main_process:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"path": path, "reason": reason}) + "\n")
        if found and not self.replace:
            raise RunError(
                "{} is damaged ({}), and --on_damaged error allows none; repair or remove it, or leave the flag "
                "out".format(*found[0])
            )
        if len(self.named) > self.limit:
            ((reason, count),) = self.reasons.most_common(1)
            raise RunError(
                f"{len(self.named)} of {self.num_samples} images are damaged, more than the {self.limit} allowed, "
                f"{count} of them: {reason}; {self.path} names them: repair or remove them"
            )
