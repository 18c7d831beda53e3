"""Write files and folders atomically, and record which files of a folder this project wrote."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from training.launch import RunError

MARKER = ".mae-accelerate.json"  # in folders that `replace_folder` wrote: the version, and the names of these files
VERSION = 1


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a JSON Lines file, [] if it is missing; invalid lines, as after a kill, are left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def own_files(folder: Path) -> list[str] | None:
    """Return the files that `replace_folder` wrote into a folder, with its marker; None if it has no marker."""
    try:
        return [*json.loads((folder / MARKER).read_text())["files"], MARKER]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of a folder, and the folders that this leaves empty. All other files stay."""
    paths = [folder / name for name in names]
    for path in paths:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
    for path in sorted({folder, *(path.parent for path in paths)}, reverse=True):
        with contextlib.suppress(OSError):  # not empty, or gone
            path.rmdir()


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Replace the folder atomically: readers see the old or the new one, or none for a moment, never a mixture.

    Files that this project did not write stay. If `target` is a link, the folder that it points to is replaced.

    Args:
        target: the folder; unchanged if writing fails.
        write: fills the empty folder that it is called with.

    Raises:
        RunError: if `target` is a file, or the path beside it that the exchange needs is taken.
    """
    target = target.resolve()
    if target.is_file():
        raise RunError(f"{target} is in the way, a file that was not written by this project; move it")
    clear_beside(target)
    work = _beside(target)
    try:
        work.mkdir(parents=True)
        write_json(work / MARKER, {"version": VERSION, "files": []})
        new = work / "new"
        new.mkdir()
        write(new)
        own = [path.relative_to(new).as_posix() for path in sorted(new.rglob("*")) if not path.is_dir()]
        _keep_others(target, new, replaced={*own, *(own_files(target) or [])})
        write_json(new / MARKER, {"version": VERSION, "files": own})
        for path in (*(new / name for name in own), new):
            sync(path)
        if target.exists():
            target.rename(work / "old")
        new.rename(target)
        sync(target.parent)
    finally:
        clear_beside(target)


def _keep_others(old: Path, new: Path, *, replaced: set[str]) -> None:
    """Copy the files and folders of `old` that are not `replaced` to `new`, as hard links where possible."""
    folders = {str(parent) for name in replaced for parent in Path(name).parents}
    for path in sorted(old.rglob("*")) if old.is_dir() else []:
        name = path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            if str(name) not in folders:
                (new / name).mkdir(exist_ok=True)
        elif name.as_posix() not in replaced:
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, new / name, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, new / name, follow_symlinks=False)


def _beside(target: Path) -> Path:
    """Return the path where `replace_folder` keeps the new and the old folder while it swaps them."""
    return target.with_name(f".{target.name}.replacing")


def clear_beside(target: Path) -> None:
    """Clean up after a replacement that failed or was killed: restore the old folder if the new one is not there.

    Raises:
        RunError: if the path beside `target` holds something that this project did not write.
    """
    target = target.resolve()
    work = _beside(target)
    if not work.exists():
        return
    ours = {MARKER, f".{MARKER}.tmp"}  # a kill may come before the marker is whole
    if own_files(work) is None and (not work.is_dir() or {path.name for path in work.iterdir()} - ours):
        raise RunError(f"{work} is in the way, and was not written by this project; move it")
    if (work / "old").exists() and not target.exists():
        (work / "old").rename(target)
    for path in (work / "new", work / "old", work):  # the marker last
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def alone_at(target: Path) -> Iterator[None]:
    """Make this process the only writer of the folder `target` inside the `with` block.

    Raises:
        RunError: if another process writes it, or for any OSError in the block except for a full disk.
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
