"""Files and folders that are whole or absent."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from training.launch import RunError


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSON Lines file, none if it is missing. A line that a kill cut short is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder atomically: readers see the old or the new one, or none for a moment, never a mixture.

    Args:
        target: the folder. If writing fails, it is as it was.
        write: fills the empty folder that it is called with.
    """
    clear_beside(target)
    new, old = _beside(target)
    try:
        new.mkdir(parents=True)
        write(new)
        for path in (*new.rglob("*"), new):
            sync(path)
        if target.exists():
            target.rename(old)
        new.rename(target)
        sync(target.parent)
    finally:
        clear_beside(target)


def _beside(target: Path) -> tuple[Path, Path]:
    """Return where `replace_folder` keeps the new and the old folder while it swaps them."""
    return target.with_name(f".new_{target.name}"), target.with_name(f".old_{target.name}")


def clear_beside(target: Path) -> None:
    """Clean up after a replacement that failed or was killed: restore the old folder if the new one is not there."""
    new, old = _beside(target)
    if old.exists() and not target.exists():
        old.rename(target)
    for path in (new, old):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone_at(target: Path) -> Iterator[None]:
    """Make this process the only writer of the folder `target` inside the `with` block.

    Raises:
        RunError: if another process writes it, or the block cannot.
    """
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


def sync(path: Path) -> None:
    """Wait until the content of a file or folder has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
