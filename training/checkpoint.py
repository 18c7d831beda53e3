"""The run folder: its lock, its checkpoints, and what a resumption must find there.

A checkpoint is whole or absent: it is written to a temporary folder beside its place, synced, and renamed.
"""

import contextlib
import errno
import fcntl
import json
import os
import pickle
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from training.arguments import FREE_FLAGS
from training.launch import RunError
from training.sharding import is_sharded, read_moments, share_of, whole_tensors, write_moments

MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"
SHARDS = "optimizer"  # a folder, in place of OPTIMIZER, where the optimizer's state is split over processes


class RunFolder:
    """`WORKING_DIRECTORY/EXPERIMENT_NAME`, of which one run at a time is the writer."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = None

    def lock(self) -> None:
        """Makes this process the writer, until it ends. Raises RunError where the folder has one or is not writable."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.checkpoints).close()
            self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise RunError(
                f"{self.path} is not writable ({error.strerror}); give another --working_directory"
            ) from None
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, not inherited by loader workers
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"{self.path} cannot be locked ({error.strerror}); give a --working_directory on a file system "
                    "with locks"
                ) from None
            raise RunError(
                f"{self.path} is being written to by another run; wait for it or give another --experiment_name"
            ) from None

    def whole_checkpoints(self) -> list[Path]:
        """The folders of all whole checkpoints, the oldest first."""
        return sorted(path for path in self.checkpoints.glob("step_*") if is_whole(path))

    def find(self, wanted: str | None) -> Path | None:
        """The checkpoint that --resume_from_checkpoint names, or None for a fresh start. Raises RunError."""
        whole = self.whole_checkpoints()
        finished = (self.path / "metrics.json").exists()
        if wanted is None or (wanted == "auto" and finished and not whole):
            if whole or finished:
                raise RunError(
                    f"{self.path} already holds a run; continue it with --resume_from_checkpoint latest or give "
                    "another --experiment_name"
                )
            return None
        if wanted in ("latest", "auto"):
            if whole or wanted == "auto":
                return whole[-1] if whole else None
            raise RunError(
                f"--resume_from_checkpoint latest found no whole checkpoint in {self.checkpoints}; "
                "leave the flag out, or give auto, to start the run"
            )
        path = self.checkpoints / wanted if (self.checkpoints / wanted).is_dir() else Path(wanted)
        if not path.is_dir() or not wanted:
            raise RunError(
                f"--resume_from_checkpoint {wanted} is no folder; expected latest, auto or one of "
                f"{', '.join(p.name for p in whole) or 'the checkpoints of a run (there are none)'}"
            )
        if path.resolve().parent != self.checkpoints.resolve():
            raise RunError(
                f"the checkpoint {path} is of another run than {self.path}; continue that one, by its "
                "--working_directory and --experiment_name"
            )
        if not is_whole(path):
            raise RunError(f"the checkpoint {path} is incomplete; resume from another one, or give latest")
        return path

    def clear_beyond(self, step: int) -> None:
        """Removes what lies beyond the step to start from: later checkpoints, the final metrics, what a kill left of a
        save or a removal; from step 0 also the log, pictures and models of an earlier start that left no checkpoint."""
        (self.path / "metrics.json").unlink(missing_ok=True)
        half_removed = [path for path in self.checkpoints.glob("step_*") if not (path / STATE).exists()]
        for path in [*self.checkpoints.glob(".saving_*"), *half_removed]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.whole_checkpoints():
            if read_state(path)["step"] > step:
                _remove(path)
        for name in ("model", "best"):
            _clear_beside(self.path / name)
        if step == 0:
            for name in ("log.jsonl", "damaged.jsonl", "wandb_run_id"):
                (self.path / name).unlink(missing_ok=True)
            for name in ("reconstructions", "predictions", "model", "best", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)

    def place_of(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / f"step_{step:08d}"

    def save(
        self,
        model: dict[str, torch.Tensor],
        optimizer: dict | Path,
        state: dict,
        *,
        keep: int,
        ema: dict[str, torch.Tensor] | None = None,
    ) -> Path:
        """Writes the checkpoint of `state["step"]`, then removes all but the `keep` newest. Raises RunError where that
        fails, and has lost nothing then.

        `model` is a state dict, `ema` that of its moving average where there is one, `optimizer` what
        torch.load(weights_only=True) can read, or a folder of shards that moves into the checkpoint; `state` goes to
        state.json.
        """
        target = self.place_of(state["step"])
        if is_whole(target):  # a run is a function of its flags
            return target
        temporary = self.checkpoints / f".saving_{target.name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            weights = {MODEL: model} if ema is None else {MODEL: model, EMA: ema}
            for name, tensors in weights.items():
                tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(tensors, temporary / name, metadata={"format": "pt"})
            if isinstance(optimizer, Path):
                optimizer.rename(temporary / SHARDS)
            else:
                torch.save(optimizer, temporary / OPTIMIZER)
            files = [path for path in temporary.rglob("*") if path.is_file()]
            sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
            write_json(temporary / STATE, {**state, "files": sizes})
            for name in weights:  # safetensors leaves it readable by the owner alone
                shutil.copymode(temporary / STATE, temporary / name)
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            shutil.rmtree(target, ignore_errors=True)  # an incomplete folder of that name
            temporary.rename(target)
            _sync(self.checkpoints)
        except Exception as error:  # safetensors and torch wrap a full disk in errors of their own
            left = [temporary, optimizer] if isinstance(optimizer, Path) else [temporary]
            raise self.failure(state["step"], error, remove=left) from error
        for path in self.whole_checkpoints()[:-keep]:
            _remove(path)
        return target

    def failure(self, step: int, error: Exception, *, remove: list[Path]) -> RunError:
        """What to say of a checkpoint that could not be written. Removes the folders with what there is of it."""
        full = shutil.disk_usage(self.path).free < 2**16 or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if full else " ".join(str(error).split()) or type(error).__name__
        for path in remove:
            shutil.rmtree(path, ignore_errors=True)
        whole = self.whole_checkpoints()
        return RunError(
            f"the checkpoint of step {step} could not be written to {self.checkpoints} ({reason}); "
            f"{'make room' if full else 'make it writable'} and give --resume_from_checkpoint auto: "
            f"{whole[-1].name + ' is whole' if whole else 'no earlier checkpoint exists'}"
        )


def _remove(checkpoint: Path) -> None:
    (checkpoint / STATE).unlink()  # first, so that a half-removed folder is never taken for a checkpoint
    shutil.rmtree(checkpoint)


def is_whole(path: Path) -> bool:
    """Whether a folder holds a checkpoint with all its files at their full size."""
    try:
        files = json.loads((path / STATE).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def read_state(checkpoint: Path) -> dict:
    """The state.json of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def claim_run_folder(folder: RunFolder, wanted: str | None, *, write: bool) -> tuple[Path | None, dict, list[str]]:
    """Finds the checkpoint to resume, on the main process: its path or None, its state or {}, errors. Locks the run
    folder, too, where the run will `write`. Every process must call it, once Accelerate has started."""
    found = [None, {}, []]
    if PartialState().is_main_process:
        try:
            if write:
                folder.lock()
            found[0] = folder.find(wanted)
            found[1] = read_state(found[0]) if found[0] else {}
        except RunError as error:
            found[2] = [str(error)]
    checkpoint, state, errors = broadcast_object_list(found)
    if checkpoint and not is_whole(checkpoint):
        errors = [
            f"the checkpoint {checkpoint} is not seen on {platform.node()}; give a --working_directory on a file "
            "system that all machines share"
        ]
        checkpoint = None
    return checkpoint, state, errors


def check_place(flag, path, folder):
    """What is wrong with weights, given by `flag`, that lie in the run folder that is to be written, in a list."""
    if not path or not Path(path).resolve().is_relative_to(folder.resolve()):
        return []
    return [f"{flag} {path} lies in {folder}, which this run would write to; give another --experiment_name"]


def save_training(
    folder: RunFolder, accelerator, crew, model, optimizer, state: dict, *, keep: int, ema: nn.Module | None = None
) -> None:
    """Saves what `load_training` loads, from the main process: `ema`, the model's moving average, too where there is
    one. Where the model is sharded, each process writes its share of the optimizer's state.

    Every process must call it, and raises RunError where one could not write.
    """
    failures, is_main = [], accelerator.is_main_process
    model = accelerator.unwrap_model(model)
    if is_sharded(model):
        if crew.any(is_main and is_whole(folder.place_of(state["step"]))):
            return
        states, weights = _write_shards(folder, crew, model, optimizer, state["step"], is_main=is_main), {}
        for name, tensor in whole_tensors(model):
            if is_main:
                weights[name] = tensor.cpu()
    elif is_main:
        states, weights = {"optimizer": optimizer.state_dict()}, model.state_dict()
        if accelerator.scaler is not None:
            states["scaler"] = accelerator.scaler.state_dict()
    if is_main:
        try:
            folder.save(weights, states, state, keep=keep, ema=None if ema is None else ema.state_dict())
        except RunError as error:
            failures.append(str(error))
    failures = crew.gather(failures)
    if failures:
        raise RunError(failures[0])


def _write_shards(folder: RunFolder, crew, model, optimizer, step: int, *, is_main: bool) -> Path:
    """Writes the optimizer's state into a folder beside the checkpoints, which it returns. Raises RunError where a
    process fails, on all of them, and where the main process does not see what the others wrote."""
    shards, failures = folder.checkpoints / f".saving_{SHARDS}_{step:08d}", []
    try:
        write_moments(shards, model, optimizer, crew.group)
        written = {path.name for path in shards.glob("*")}
        unseen = {*crew.gather([*written])} - written
        if is_main and unseen:
            raise OSError(f"{', '.join(sorted(unseen))} of another machine cannot be seen from here")
    except Exception as error:
        if is_main:
            failures.append(str(folder.failure(step, error, remove=[shards])))
    failures = crew.gather(failures)
    if failures:
        raise RunError(failures[0])
    return shards


def load_training(checkpoint: Path, accelerator, model, optimizer, *, ema: nn.Module | None = None) -> None:
    """Loads weights (every one of them), optimizer and loss scaler into the prepared objects, sharded or not, as it
    was saved from either and from any number of processes; and into `ema`. Raises RunError for an optimizer's file that
    is damaged or would run code."""
    model = accelerator.unwrap_model(model)
    present = model.state_dict()
    weights = load_file(checkpoint / MODEL)
    model.load_state_dict({name: share_of(tensor, present.get(name)) for name, tensor in weights.items()})
    if ema is not None:
        ema.load_state_dict(load_file(checkpoint / EMA))
    sharded = (checkpoint / SHARDS).is_dir()
    try:
        if sharded:
            moments = read_moments(checkpoint / SHARDS, model, optimizer)
            states = {"optimizer": {**optimizer.state_dict(), "state": moments}}
        else:
            states = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError) as error:
        raise RunError(
            f"{checkpoint / (SHARDS if sharded else OPTIMIZER)}: refused, as it is damaged or holds objects that run "
            "code when they are read; resume from another checkpoint of the run"
        ) from error
    if is_sharded(model) and not sharded:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, moments in states["optimizer"]["state"].items():
            moments.update({key: share_of(value, parameters[number]) for key, value in moments.items()})
    optimizer.load_state_dict(states["optimizer"])
    if accelerator.scaler is not None and "scaler" in states:
        accelerator.scaler.load_state_dict(states["scaler"])


def compare_with_run(checkpoint: Path, flags: dict, fingerprint: str | None, *, defaults: dict) -> list[str]:
    """What differs between a checkpoint's run and the flags (and data) that are to continue it, a line each.

    `fingerprint` is the data set's, None where it could not be opened. A flag that the run did not know yet, as it is
    older, had its default.
    """
    path = checkpoint.parent.parent / "args.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return [f"{path} of the run to resume cannot be read; expected the file that the run wrote at its start"]
    before = {**defaults, **saved["flags"]}
    errors = [
        f"--{name} {_shown(flags[name])} differs from the run to resume, which has {_shown(before.get(name))}; "
        "resume with the same, or start another --experiment_name"
        for name in flags
        if name not in FREE_FLAGS and flags[name] != before.get(name)
    ]
    if fingerprint is not None and read_state(checkpoint)["data"] != fingerprint:
        errors.append(
            f"--path_to_data {flags['path_to_data']} is not the data set of the run to resume "
            f"({saved['flags']['path_to_data']}): its images differ in number or names; give that data set"
        )
    return errors


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_environment(processes: int) -> dict:
    """What was typed, versions, git revision and machine, for args.json of a run of so many processes."""
    revision = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        here = Path(__file__).parent
        revision = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=here, text=True, stderr=subprocess.DEVNULL
        ).strip()
    packages = ("torchvision", "accelerate", "numpy", "pillow", "safetensors")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "processes": processes,
        "versions": {**versions, **{name: metadata.version(name) for name in packages}},
        "git_revision": revision,
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "gpus": gpus},
        "threads": torch.get_num_threads(),
    }


def note_start(folder: Path, told: dict, step: int, processes: int, *, fresh: bool) -> None:
    """Writes args.json of a run that starts, or adds to it that the run goes on after `step`: by what command, on how
    many processes, of what machine. `told` is what else the file of a new run holds."""
    path, environment = folder / "args.json", describe_environment(processes)
    if not fresh:
        told = json.loads(path.read_text())
        environment = {"resumed": [*told.get("resumed", []), {"step": step, **environment}]}
    write_json(path, {**told, **environment})


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replaces the folder `target` by what `write(folder)` puts into an empty one.

    It is the old one or the new one and whole, or absent; where `write` fails, or the disk, it is as it was.
    """
    _clear_beside(target)
    new, old = _beside(target)
    try:
        new.mkdir(parents=True)
        write(new)
        for path in (*new.rglob("*"), new):
            _sync(path)
        if target.exists():
            target.rename(old)
        new.rename(target)
        _sync(target.parent)
    finally:
        _clear_beside(target)


@contextlib.contextmanager
def alone_at(target: Path) -> Iterator[None]:
    """Makes this process the only one that writes the folder `target`, while the block lasts. Raises RunError where
    another one is, and where the block cannot write."""
    path = target.with_name(f".{target.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise RunError(f"{target} is being written by another process; wait for it") from None
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{target} cannot be written ({error.strerror or error}); give another folder") from error


def _beside(target: Path) -> tuple[Path, Path]:
    """Where `replace_folder` keeps the new and the old one while it exchanges them."""
    return target.with_name(f".new_{target.name}"), target.with_name(f".old_{target.name}")


def _clear_beside(target: Path) -> None:
    """Removes what a replacement that failed or was killed left, or takes the old folder back."""
    new, old = _beside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Makes sure that a file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
