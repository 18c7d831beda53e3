"""The run folder: its lock, which files are the run's own, and its checkpoints.

A checkpoint is whole or absent: it is written to a temporary folder beside its place, synced, and renamed.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.files import clear_beside, own_files, remove_files, sync, write_json
from training.launch import InputError, RunError
from training.wording import in_one_line

FORMAT = "mae-accelerate run 1"  # in args.json: the mark of a run's folder
MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"
FILES = (MODEL, EMA, OPTIMIZER)
CHECKPOINT = "step_" + 8 * "[0-9]"  # others, such as a copy step_00000100_keep, are the user's
PICTURES, EVENTS = "step_*.png", "events.out.tfevents.*"
# Names that a run removes or overwrites, so that a folder that is not a run's must not have them
NAMES = ("args.json", "best", "checkpoints", "damaged.jsonl", "encoder", "hub", "hub.log", "log.jsonl")
NAMES += ("metrics.json", "model", "predictions", "reconstructions", "tensorboard", "wandb_run_id")


class RunFolder:
    """The folder WORKING_DIRECTORY/EXPERIMENT_NAME, which one run at a time writes to."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = None
        self._created: list[Path] = []

    def lock(self) -> None:
        """Make this process the only writer of the folder until it ends.

        Raises:
            InputError: if the folder has a writer, cannot be written to, or holds files that no run wrote.
        """
        try:
            if foreign := self.foreign_files():
                raise InputError(
                    f"{self.path} holds files that no run wrote ({', '.join(foreign[:3])}"
                    f"{', ...' if foreign[3:] else ''}), or a run without its args.json; give another "
                    "--experiment_name or --working_directory"
                )
            paths = (self.checkpoints, self.path / ".lock", self.path, *self.path.parents)
            created = [path for path in paths if not path.exists()]
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.checkpoints).close()
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 - stays open until the process ends
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader workers
            if not os.fstat(self._lock.fileno()).st_nlink:  # another start released its folder
                raise BlockingIOError
            self.checkpoints.mkdir(exist_ok=True)  # another start may have released it before the lock
            self._created = created
        except BlockingIOError:
            raise InputError(
                f"{self.path} is being written to by another run; wait for it or give another --experiment_name"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.path} is not writable or cannot be locked ({error.strerror}); give another --working_directory"
            ) from None

    def release(self) -> None:
        """Remove what `lock` created, for a start that is refused; a folder that holds anything else stays."""
        for path in self._created:
            with contextlib.suppress(OSError):  # not empty, or gone
                path.rmdir() if path.is_dir() else path.unlink()

    def foreign_files(self) -> list[str]:
        """Return the names of files that no run wrote and that a run would remove or overwrite."""
        try:
            args = json.loads((self.path / "args.json").read_text())
            if args.get("format") == FORMAT or {"flags", "versions"} <= args.keys():  # older runs have no format
                return []
        except (OSError, ValueError, AttributeError):
            pass
        present = {path.name for path in self.path.glob("*")}  # links to missing files too
        if self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):  # created before args.json
            present -= {self.checkpoints.name}
        return [name for name in NAMES if name in present]

    def whole_checkpoints(self) -> list[Path]:
        """Return the folders of all whole checkpoints, the oldest first."""
        return sorted(path for path in self.checkpoints.glob(CHECKPOINT) if is_whole(path))

    def find(self, name: str | None, *, resumable: bool = True) -> Path | None:
        """Return the checkpoint that --resume_from_checkpoint names, or None for a fresh start.

        Raises:
            InputError: if there is no such checkpoint, or a fresh start would overwrite a run.
        """
        whole = self.whole_checkpoints()
        finished = (self.path / "metrics.json").exists()
        if finished and not whole and name in (None, "latest", "auto"):
            raise InputError(
                f"{self.path} already holds a run, which is finished and has no checkpoint; give another "
                "--experiment_name"
            )
        if name is None:
            if whole:
                remedy = "continue it with --resume_from_checkpoint latest or give" if resumable else "give"
                raise InputError(f"{self.path} already holds a run; {remedy} another --experiment_name")
            return None
        if name in ("latest", "auto"):
            if whole or name == "auto":
                return whole[-1] if whole else None
            raise InputError(
                f"--resume_from_checkpoint latest found no whole checkpoint in {self.checkpoints}; "
                "leave the flag out, or give auto, to start the run"
            )
        path = self.checkpoints / name if (self.checkpoints / name).is_dir() else Path(name)
        if not path.is_dir() or not name:
            raise InputError(
                f"--resume_from_checkpoint {name} is not a folder; expected latest, auto or one of "
                f"{', '.join(p.name for p in whole) or 'the checkpoints of a run (there are none)'}"
            )
        if path.resolve().parent != self.checkpoints.resolve():
            raise InputError(
                f"the checkpoint {path} belongs to another run than {self.path}; continue that one, by its "
                "--working_directory and --experiment_name"
            )
        if not is_whole(path):
            raise InputError(f"the checkpoint {path} is incomplete; resume from another one, or give latest")
        return path

    def clear_beyond(self, step: int) -> None:
        """Remove what the run wrote beyond the step to start from.

        These are later checkpoints, the final metrics and the rest of a save or removal that was killed; from step 0
        also log, pictures and models of a start that left no checkpoint. All other files stay.
        """
        if not (self.path / "args.json").exists():  # nothing here is a run's, see `lock`
            return
        (self.path / "metrics.json").unlink(missing_ok=True)
        for path in self.checkpoints.glob(f".saving_{CHECKPOINT}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in sorted(self.checkpoints.glob(CHECKPOINT)):
            if not (path / STATE).exists() or (is_whole(path) and read_state(path)["step"] > step):
                remove_checkpoint(path)
        for name in ("encoder", "model", "best"):
            clear_beside(self.path / name)
        if step == 0:
            for name in ("log.jsonl", "damaged.jsonl", "wandb_run_id"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("encoder", "model", "best"):
                remove_files(self.path / name, own_files(self.path / name) or [])
            for name, pattern in (("reconstructions", PICTURES), ("predictions", PICTURES), ("tensorboard", EVENTS)):
                remove_files(self.path / name, [path.name for path in (self.path / name).glob(pattern)])

    def save(
        self,
        model: dict[str, torch.Tensor],
        optimizer: dict,
        state: dict,
        *,
        keep: int,
        ema: dict[str, torch.Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of `state["step"]`, then remove all but the `keep` newest.

        Args:
            model: a state dict.
            optimizer: a state dict that torch.load(weights_only=True) can read.
            state: the content of state.json.
            keep: the number of checkpoints to keep.
            ema: the state dict of the model's moving average.

        Raises:
            RunError: if the checkpoint cannot be written; earlier ones stay.
        """
        target = self.checkpoints / f"step_{state['step']:08d}"
        if is_whole(target):  # with the same content: the flags determine it
            return target
        temporary = self.checkpoints / f".saving_{target.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write_checkpoint(temporary, {MODEL: model} | ({EMA: ema} if ema else {}), optimizer, state)
            _move_checkpoint(temporary, target)
        except Exception as error:  # safetensors and torch wrap a full disk in errors of their own
            free = shutil.disk_usage(self.path).free if self.path.exists() else math.inf
            full = free < 2**16 or getattr(error, "errno", None) == errno.ENOSPC
            problem, remedy = ("the disk is full", "make room") if full else (in_one_line(error), "make it writable")
            shutil.rmtree(temporary, ignore_errors=True)
            whole = self.whole_checkpoints()
            raise RunError(
                f"the checkpoint of step {state['step']} could not be written to {self.checkpoints} ({problem}); "
                f"{remedy} and give --resume_from_checkpoint auto: "
                f"{whole[-1].name + ' is whole' if whole else 'no earlier checkpoint exists'}"
            ) from error
        for path in self.whole_checkpoints()[:-keep]:
            remove_checkpoint(path)
        return target


def _write_checkpoint(folder: Path, weights: dict[str, dict], optimizer: dict, state: dict) -> None:
    """Write the files of a checkpoint, and sync them; `weights` maps file names to state dicts."""
    folder.mkdir()
    for name, tensors in weights.items():
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    torch.save(optimizer, folder / OPTIMIZER)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    write_json(folder / STATE, {**state, "files": sizes})
    for name in weights:  # safetensors makes its files readable by the owner alone
        shutil.copymode(folder / STATE, folder / name)
    for path in (*folder.iterdir(), folder):
        sync(path)


def _move_checkpoint(folder: Path, target: Path) -> None:
    """Move a checkpoint to `target`, which may hold an incomplete one and files that no run wrote."""
    remove_checkpoint(target)
    if target.exists():
        for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
            path.rename(target / path.name)
        folder.rmdir()
        sync(target)
    else:
        folder.rename(target)
    sync(target.parent)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, state.json first, so that a half-removed folder is never taken for a whole one."""
    remove_files(path, (STATE, *FILES))


def is_whole(path: Path) -> bool:
    """Return True if the folder holds a checkpoint with all its files at their full size."""
    try:
        files = read_state(path)["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_state(checkpoint: Path) -> dict:
    """Return the state.json of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())
