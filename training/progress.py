"""What a run says of itself while it runs: the bar, log.jsonl, trackers, damaged images, losses that are not finite."""

import contextlib
import importlib.util
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image
from tqdm import tqdm

from training.arguments import RunError
from training.sharding import whole


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
        _track(self.accelerator, lambda tracker: tracker.log(numbers, step=line["step"]))

    def picture(self, path: Path, name: str, step: int) -> None:
        """Sends a picture that was written to a file to the trackers."""
        if self.accelerator.trackers:  # so on the main process alone
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, C)
            _track(self.accelerator, lambda tracker: tracker.log_images({name: pixels}, step=step))

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


def start_trackers(
    accelerator, folder: Path, names: list[str], *, project: str, run_name: str | None, flags: dict, start_step: int
) -> None:
    """Starts each of the trackers `names` ("wandb", "tensorboard"), on the main process, for Progress to write to.

    One that is not installed, not logged in or refuses costs one warning; the run and the other tracker go on. The
    flags become its configuration: numbers and text, lists joined by spaces, without those that were not given.
    `start_step` is the step of the checkpoint that the run continues, or 0.
    """
    if not accelerator.is_main_process:
        return
    given = {name: value for name, value in flags.items() if value is not None}
    config = {name: value if isinstance(value, int | float) else _as_text(value) for name, value in given.items()}
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: merely a folder of that name, as wandb itself makes
            _warn(f"not logging to {name}: the package is not installed; pip install {name}")
            continue
        try:
            tracker = WandB(folder, project, run_name) if name == "wandb" else TensorBoard(folder, start_step)
            tracker.start()
            tracker.store_init_configuration(config)
        except Exception as error:  # whatever it is, it is no reason not to train
            remedy = {
                "wandb": "run `wandb login`, or set WANDB_MODE=offline",
                "tensorboard": f"make {folder} writable, or pip install --upgrade tensorboard",
            }
            _warn(f"not logging to {name}: {_reason(error)}; {remedy[name]}")
        else:
            accelerator.trackers.append(tracker)


def finish_trackers(accelerator) -> None:
    """Ends what `start_trackers` started. It may wait for an upload: whatever the run writes should be written."""
    _track(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


class WandB(WandBTracker):
    """A Weights & Biases run whose id is kept in `wandb_run_id` of the run folder: a resumption continues its curves.

    wandb's own steps cannot go back, as a resumption does after a kill: it would drop what comes again, with a warning
    each time. So the step is logged as a value, which wandb takes as the x axis of every curve; where a run goes back,
    its points are there twice. Offline, wandb keeps a folder for each start.
    """

    def __init__(self, folder: Path, project: str, run_name: str | None):
        self.id_file = folder / "wandb_run_id"
        known_id = self.id_file.read_text().strip() if self.id_file.exists() else None
        super().__init__(
            project,
            name=run_name,
            id=known_id or secrets.token_hex(4),
            resume="allow" if known_id else None,  # offline, wandb warns that it ignores it
            dir=str(folder),
        )

    def start(self) -> None:
        super().start()
        self.id_file.write_text(self.init_kwargs["id"] + "\n")
        self.run.define_metric("step", hidden=True)
        self.run.define_metric("*", step_metric="step")

    def store_init_configuration(self, values: dict) -> None:
        self.run.config.update(values, allow_val_change=True)  # Accelerate 1.10 starts a second run offline

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        self.run.log({**values, "step": step}, **kwargs)


class TensorBoard(TensorBoardTracker):
    """Event files in `tensorboard` of the run folder. Those of a resumption tell TensorBoard to forget the points
    beyond its checkpoint, which come again."""

    def __init__(self, folder: Path, start_step: int):
        super().__init__("tensorboard", folder, purge_step=start_step + 1)
        self.start_step = start_step

    def store_init_configuration(self, values: dict) -> None:
        """Adds a table, among the texts. Accelerate's hyperparameters would be a run of their own, at each start."""
        rows = [f"| {name} | `{value}` |" for name, value in values.items()]
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]), self.start_step)
        self.writer.flush()

    def log_images(self, values: dict, step: int | None = None, **kwargs) -> None:
        super().log_images(values, step, dataformats="NHWC", **kwargs)
        self.writer.flush()


def _track(accelerator, act: Callable) -> None:
    """Calls `act` with each tracker. One that fails is dropped, with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # a full quota, a lost process: whatever it is, it is no reason not to train
            accelerator.trackers.remove(tracker)
            _warn(f"not logging to {tracker.name} any more: {_reason(error)}; log.jsonl has the rest")


def _as_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)  # above the bar, where there is one


def in_bytes(count: float) -> str:
    """A number of bytes, for people: "1.79 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def in_time(seconds: float) -> str:
    """A time, for people: "41.3 hours"."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def several(count, noun):
    """ "1 process", "2 processes", "3 channels"."""
    plural = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count} {noun}{'' if count == 1 else plural}"
