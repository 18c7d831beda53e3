"""Save and load checkpoints, and compare their run with the one that resumes it.

model.safetensors   weights and buffers
ema.safetensors     their moving average, if the run keeps one
optimizer.pt        the optimizer's state, and the loss scaler's under fp16
state.json          step, epoch, global and micro-batch size, data fingerprint, seconds; written last, with the size of
                    every file
"""

import contextlib
import json
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import nn

from training.arguments import FREE_FLAGS
from training.files import write_json
from training.launch import InputError, RunError
from training.run_folder import EMA, FORMAT, MODEL, OPTIMIZER, RunFolder, is_whole, read_state
from training.sharding import gather_state, share_of
from training.wording import as_typed


def claim_run_folder(
    folder: RunFolder, name: str | None, *, write: bool, resumable: bool = True
) -> tuple[Path | None, dict, list[str]]:
    """Lock the run folder and find the checkpoint to resume, on the main process; every process must call it.

    Args:
        name: --resume_from_checkpoint.
        write: whether the run writes to the folder, which is then locked.
        resumable: whether error messages may suggest resuming; False for an evaluation.

    Returns:
        The checkpoint or None, its state or {}, and error messages.
    """
    answer = [None, {}, []]
    if PartialState().is_main_process:
        try:
            if write:
                folder.lock()
            answer[0] = folder.find(name, resumable=resumable)
            answer[1] = read_state(answer[0]) if answer[0] else {}
        except InputError as error:
            answer[2] = [str(error)]
    checkpoint, state, errors = broadcast_object_list(answer)
    if checkpoint and not is_whole(checkpoint):
        errors = [
            f"the checkpoint {checkpoint} is not visible on {platform.node()}; give a --working_directory on a file "
            "system that all machines share"
        ]
        checkpoint = None
    return checkpoint, state, errors


def save_training(
    folder: RunFolder, accelerator, crew, model, optimizer, state: dict, *, keep: int, ema: nn.Module | None = None
) -> None:
    """Save a checkpoint for `load_training`. Every process must call this; the main process writes.

    Raises:
        RunError: on all processes, if the checkpoint cannot be written.
    """
    failures, is_main = [], accelerator.is_main_process
    weights = gather_state(accelerator.unwrap_model(model).state_dict(), keep=is_main)
    moments = optimizer.state_dict()
    moments["state"] = gather_state(moments["state"], keep=is_main)
    states = {"optimizer": moments}
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


def load_training(checkpoint: Path, accelerator, model, optimizer, *, ema: nn.Module | None = None) -> None:
    """Load weights, optimizer and loss scaler into the prepared objects, and the moving average into `ema`.

    The checkpoint may come from a sharded or unsharded run with any number of processes.

    Raises:
        RunError: if the optimizer's file is missing, damaged, or would run code.
    """
    model = accelerator.unwrap_model(model)
    present = model.state_dict()
    # Older runs named the decoder's parameters decoder_X in place of decoder.X
    weights = {re.sub("^decoder_", "decoder.", name): tensor for name, tensor in load_file(checkpoint / MODEL).items()}
    model.load_state_dict({name: share_of(tensor, present.get(name)) for name, tensor in weights.items()})
    if ema is not None:
        ema.load_state_dict(load_file(checkpoint / EMA))
    try:
        states = torch.load(checkpoint / OPTIMIZER, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, FileNotFoundError, RuntimeError) as error:  # RuntimeError: truncated
        raise RunError(
            f"{checkpoint / OPTIMIZER} is missing, damaged, or holds objects that run code when they are read; resume "
            "from another checkpoint of the run"
        ) from error
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in states["optimizer"]["state"].items():
        moments.update({key: share_of(value, parameters[index]) for key, value in moments.items()})
    optimizer.load_state_dict(states["optimizer"])
    if accelerator.scaler is not None and "scaler" in states:
        accelerator.scaler.load_state_dict(states["scaler"])


def saved_flags(checkpoint: Path | None) -> dict:
    """Return the flags in args.json of the run that a checkpoint belongs to, {} without a checkpoint.

    Raises:
        InputError: if the file cannot be read.
    """
    if checkpoint is None:
        return {}
    path = checkpoint.parent.parent / "args.json"
    try:
        flags = json.loads(path.read_text())["flags"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} of the run to resume cannot be read; expected the file written at its start"
        ) from None
    if "norm_pix_loss" in flags:  # of an older run
        flags["target"] = "normalized" if flags.pop("norm_pix_loss") else "pixels"
    return {"num_cls_tokens": 1, **flags}  # older runs do not store it


def compare_with_run(
    checkpoint: Path, flags: dict, fingerprint: str, *, before: dict, derived: Collection[str] = ()
) -> list[str]:
    """Return error messages for flags and data that differ from those of the run to resume.

    Args:
        flags: the flags to continue the run with.
        fingerprint: the fingerprint of the training data.
        before: the flags of the run to resume, with defaults for flags that did not exist when it was saved.
        derived: flags that were not given and follow from others; they are named only if no other flag differs.
    """
    different = [name for name in flags if name not in FREE_FLAGS and flags[name] != before.get(name)]
    different = [name for name in different if name not in derived] or different
    errors = [
        f"--{name} {as_typed(flags[name])} differs from the run to resume, which has {as_typed(before.get(name))}; "
        "resume with the same value, or start another --experiment_name"
        for name in different
    ]
    if read_state(checkpoint)["data"] != fingerprint:
        errors.append(
            f"--path_to_data {flags['path_to_data']} is not the data set of the run to resume "
            f"({before['path_to_data']}): its images differ in number or names; give that data set"
        )
    return errors


def check_outside(path: str | None, folder: Path) -> None:
    """Raise InputError for weights inside the run folder, which the run would write to."""
    if path and Path(path).resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path} lies in {folder}, which this run would write to; give another --experiment_name")


def describe_environment(processes: int) -> dict:
    """Return command, number of processes, versions, git revision and machine, for args.json."""
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


def note_start(folder: Path, content: dict, step: int, processes: int, *, fresh: bool) -> None:
    """Write args.json of a new run, or append an entry to its `resumed` list.

    Args:
        content: the content of a new file beside the environment: flags, classes, data.
        step, processes: the step that the run starts from, and the number of its processes.
    """
    path, environment = folder / "args.json", describe_environment(processes)
    if not fresh:
        content = json.loads(path.read_text())
        environment = {"resumed": [*content.get("resumed", []), {"step": step, **environment}]}
    write_json(path, {"format": FORMAT, **content, **environment})
