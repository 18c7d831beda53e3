"""What a run says of itself while it runs: the bar, log.jsonl, trackers, damaged images, losses that are not finite."""

import contextlib
import importlib.util
import json
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from training.arguments import RunError


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
        finite = torch.isfinite(loss)
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
                "--resume_from_checkpoint latest, and where it returns take a lower learning rate, a longer warmup, "
                "--max_grad_norm 1 or another --mixed_precision"
            )

    def write(self, line: dict) -> None:
        """Appends a line to log.jsonl and sends its numbers to the trackers."""
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"}
        self.accelerator.log(numbers, step=line["step"])

    def say(self, text: str) -> None:
        """Prints a line above the bar, on the main process."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """Removes the bar's claim on the terminal."""
        self.bar.close()


def truncate_log(folder: Path, step: int) -> None:
    """Removes the lines of log.jsonl beyond a step: what a resumed run is about to write again."""
    path = folder / "log.jsonl"
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(ValueError):  # a line that a kill cut short
            line = json.loads(text)
            # The validation of the checkpoint's own step came after the save, and is repeated
            if line["step"] < step or (line["step"] == step and "val_loss" not in line):
                kept.append(text + "\n")
    temporary = path.with_name(".log.jsonl.tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


class DamagedImages:
    """Names each damaged image once in `damaged.jsonl`, and ends a run that has too many."""

    def __init__(self, folder: Path, num_samples: int, *, is_main_process: bool):
        self.path, self.is_main_process = folder / "damaged.jsonl", is_main_process
        self.limit = min(max(10, num_samples // 100), num_samples - 1)
        self.num_samples = num_samples
        self.named = set()
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            with contextlib.suppress(ValueError):  # a line that a kill cut short
                self.named.add(json.loads(text)["path"])
        if self.named and is_main_process and not self.path.read_text().endswith("\n"):
            with open(self.path, "a") as file:
                file.write("\n")

    def add(self, found: list[tuple[str, str]]) -> None:
        """Notes (path, reason) pairs, the same on all processes. Raises RunError beyond the limit."""
        for path, reason in found:
            if path in self.named:
                continue
            self.named.add(path)
            if self.is_main_process:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"path": path, "reason": reason}) + "\n")
        if len(self.named) > self.limit:
            raise RunError(
                f"{len(self.named)} of {self.num_samples} images are damaged, more than the {self.limit} allowed; "
                f"{self.path} names them: repair or remove them"
            )


def start_wandb(accelerator, folder: Path, *, project: str, run_name: str | None, flags: dict) -> None:
    """Starts a Weights & Biases run whose id is kept in the run folder, so that a resumption continues its curves.

    Where wandb is missing or refuses, the run goes on without it, with one warning.
    """
    if not accelerator.is_main_process:
        return
    if importlib.util.find_spec("wandb") is None:
        print("warning: not logging to wandb: the package is not installed; pip install wandb", file=sys.stderr)
        return
    id_file = folder / "wandb_run_id"
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flags.items()}
    options = {"name": run_name, "id": run_id, "resume": "allow", "dir": str(folder)}
    try:
        accelerator.init_trackers(project, config=config, init_kwargs={"wandb": options})
    except Exception as error:  # not logged in, no network: whatever it is, it is no reason not to train
        accelerator.trackers = []
        print(f"warning: not logging to wandb: {' '.join(str(error).split())}", file=sys.stderr)
        return
    id_file.write_text(run_id + "\n")
