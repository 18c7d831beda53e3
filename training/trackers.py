"""Log to Weights & Biases and TensorBoard, in addition to log.jsonl."""

import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate.tracking import TensorBoardTracker, WandBTracker
from tqdm import tqdm

from training.wording import in_one_line

REMEDIES = {
    "wandb": "pip install wandb and run `wandb login`, or set WANDB_MODE=offline",
    "tensorboard": "pip install --upgrade tensorboard",
}


def start_trackers(
    accelerator, folder: Path, names: list[str], *, project: str, run_name: str | None, flags: dict, start_step: int
) -> None:
    """Start the trackers `names` ("wandb", "tensorboard") on the main process, for Progress to write to.

    A tracker that is missing, not logged in or fails prints a warning; training goes on. `flags` become its
    configuration; `start_step` is the step of the checkpoint that the run resumes from, or 0.
    """
    if not accelerator.is_main_process:
        return
    for name in names:
        try:
            tracker = WandB(folder, project, run_name) if name == "wandb" else TensorBoard(folder, start_step)
            tracker.start()
            tracker.store_init_configuration(flags)
            accelerator.trackers.append(tracker)
        except Exception as error:  # no failure of a tracker may stop the training
            tqdm.write(f"warning: not logging to {name}: {in_one_line(error)}; {REMEDIES[name]}", sys.stderr)


def finish_trackers(accelerator) -> None:
    """Finish all trackers. Call this last: it may wait for an upload."""
    track(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers.clear()


class WandB(WandBTracker):
    """Log to Weights & Biases; the run id in `wandb_run_id` of the run folder lets a resumed run continue its curves.

    wandb's own steps cannot go back, as a resumed run does after a kill: it would drop the repeated steps. So the step
    is logged as a value, which is the x axis of every curve. Offline, wandb keeps a folder for each start.
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
        self.run.config.update(values, allow_val_change=True)  # offline, Accelerate 1.10's own would start a second run

    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        self.run.log({**values, "step": step}, **kwargs)


class TensorBoard(TensorBoardTracker):
    """Write event files to `tensorboard/` in the run folder; a resumed run removes the points after its checkpoint."""

    def __init__(self, folder: Path, start_step: int):
        super().__init__("tensorboard", folder, purge_step=start_step + 1)
        self.start_step = start_step

    def store_init_configuration(self, values: dict) -> None:
        """Add the flags as a table; Accelerate's hyperparameters would add a run at each start."""
        rows = [f"| {name} | `{value}` |" for name, value in values.items()]
        self.writer.add_text("flags", "\n".join(["| flag | value |", "|---|---|", *rows]), self.start_step)

    def log_images(self, values: dict, step: int | None = None, **kwargs) -> None:
        super().log_images(values, step, dataformats="NHWC", **kwargs)


def track(accelerator, act: Callable) -> None:
    """Call `act` with each tracker; one that fails is dropped with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # a full quota, a lost process, ...
            accelerator.trackers.remove(tracker)
            warning = f"warning: not logging to {tracker.name} any more: {in_one_line(error)}; log.jsonl has the rest"
            tqdm.write(warning, sys.stderr)
