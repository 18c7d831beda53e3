"""Experiment trackers beside the log: Weights & Biases and TensorBoard."""

import importlib.util
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate.tracking import TensorBoardTracker, WandBTracker
from tqdm import tqdm

from training.wording import in_one_line


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
            _warn(f"not logging to {name}: {in_one_line(error)}; {remedy[name]}")
        else:
            accelerator.trackers.append(tracker)


def finish_trackers(accelerator) -> None:
    """Ends what `start_trackers` started. It may wait for an upload: whatever the run writes should be written."""
    track(accelerator, lambda tracker: tracker.finish())
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


def track(accelerator, act: Callable) -> None:
    """Calls `act` with each tracker. One that fails is dropped, with a warning."""
    for tracker in list(accelerator.trackers):
        try:
            act(tracker)
        except Exception as error:  # a full quota, a lost process: whatever it is, it is no reason not to train
            accelerator.trackers.remove(tracker)
            _warn(f"not logging to {tracker.name} any more: {in_one_line(error)}; log.jsonl has the rest")


def _as_text(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)  # above the bar, where there is one
