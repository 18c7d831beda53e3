"""Where samples come from. One indexable interface: `len(source)`, `fetch(indices)`, `name(index)`, `fingerprint()`,
`size_in_bytes()`, `prepare()` once before the first fetch, and, where the data have classes, `labels` (N,) and
`classes` (otherwise None and []).

Paths and labels are kept in flat buffers, so that worker processes share them without copies.
"""

import contextlib
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import shapes

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".jp2")


class DataError(ValueError):
    """Data that cannot be used: what was given, what was expected, and the remedy, in one line."""


class FileSource:
    """Files in the order in which they are listed, whatever their names; `paths` are relative to `root`."""

    def __init__(self, paths: Sequence[bytes], root: str | Path = ""):
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None
        self._paths = b"".join(paths)
        self._ends = np.cumsum([len(path) for path in paths])

    def __len__(self) -> int:
        return len(self._ends)

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: files are read when they are wanted."""

    def name(self, index: int) -> str:
        """The path of an image."""
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._paths[start : self._ends[index]]))

    def fetch(self, indices: list[int]) -> list[bytes | OSError]:
        """The encoded images, or why one could not be read."""
        return [self._read(Path(self.name(index))) for index in indices]

    @staticmethod
    def _read(path: Path) -> bytes | OSError:
        try:
            return path.read_bytes()
        except OSError as error:
            return error

    def size_in_bytes(self) -> float:
        """About what all images take on disk, from some of them."""
        some = [index * len(self) // 200 for index in range(200)] if len(self) > 200 else range(len(self))
        sizes = []
        for index in some:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(self.name(index)).st_size)
        return len(self) * sum(sizes) / max(1, len(sizes))

    def fingerprint(self) -> str:
        """Equal for two data sets with the same relative paths, wherever they lie."""
        return hashlib.sha256(self._paths + self._ends.tobytes()).hexdigest()[:16]


class FolderSource(FileSource):
    """All images below a folder, those files named `suffixes`, ordered by the bytes of their relative paths.

    Where each lies in a folder of its own below `root`, that folder's name is its class; otherwise `labels` is None.
    Raises DataError for a folder that does not exist, cannot be read, or holds no image.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...] = SUFFIXES):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root} is no folder; --path_to_data takes a folder of images or builtin:shapes")
        try:
            paths = sorted(self._scan(os.fsencode(self.root), suffixes))
        except OSError as error:
            raise DataError(
                f"{os.fsdecode(error.filename)} cannot be read ({error.strerror}); check its permissions"
            ) from None
        if not paths:
            raise DataError(f"{root} holds no image; expected files named {', '.join(suffixes)}")
        super().__init__(paths, self.root)
        folders = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        if None not in folders:
            names = sorted(set(folders))
            numbers = {name: number for number, name in enumerate(names)}
            self.classes = [os.fsdecode(name) for name in names]
            self.labels = np.array([numbers[folder] for folder in folders])

    @staticmethod
    def _scan(root: bytes, suffixes: tuple[str, ...]) -> list[bytes]:
        """Relative paths of the images below `root`, in no order; hidden files and folders are passed over."""
        found, folders = [], [b""]
        while folders:
            folder = folders.pop()
            here = os.path.join(root, folder)
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    path = os.path.join(folder, entry.name)
                    if entry.is_dir():
                        if entry.is_symlink() and _holds(entry.path, here):
                            continue  # a link to a folder that holds it
                        folders.append(path)
                    elif os.path.splitext(entry.name)[1].lower().decode(errors="replace") in suffixes:
                        found.append(path)
        return found


def _holds(outer: bytes, inner: bytes) -> bool:
    """Whether the folder `inner` is `outer` or lies below it, links resolved."""
    return os.path.join(os.path.realpath(inner), b"").startswith(os.path.join(os.path.realpath(outer), b""))


def find_images(words: Sequence[str]) -> tuple[FileSource, list[str]]:
    """The files that `words` mean, in the order of the words, and what is wrong with them, a line each.

    A word is a file, whatever its name; a folder, which stands for all images below it, as FolderSource finds them; or
    a pattern (* ? [...], and ** for folders of any depth), which stands for what it matches, in the order of the bytes
    and each file once.
    """
    paths, errors = [], []
    for word in words:
        try:
            if os.path.isfile(word):
                paths.append(os.fsencode(word))
            elif os.path.isdir(word):
                paths += _below(word)
            elif os.path.exists(word):
                errors.append(f"{word} is neither a file nor a folder; give one of these")
            elif not glob.has_magic(word):
                errors.append(f"{word!r}: no such file or folder; expected images; correct the path")
            else:
                found = {path for match in glob.iglob(os.fsencode(word), recursive=True) for path in _matched(match)}
                if not found:
                    errors.append(f"{word} matches no image; correct the pattern")
                paths += sorted(found)
        except DataError as error:
            errors.append(str(error))
    return FileSource(paths), errors


def _below(folder: str | bytes) -> list[bytes]:
    """The paths of all images below a folder. Raises DataError."""
    source = FolderSource(os.fsdecode(folder))
    return [os.fsencode(source.name(index)) for index in range(len(source))]


def _matched(path: bytes) -> list[bytes]:
    """The file that a pattern has matched, or the images below the folder."""
    if not os.path.isdir(path):
        return [path]
    with contextlib.suppress(DataError):  # no image below it
        return _below(path)
    return []


class ShapesSource:
    """A split of the built-in scenes, drawn at the start and kept: 64 x 64, with `labels` and `masks`."""

    def __init__(self, split: str, channels: int):
        self.classes = list(shapes.CLASSES)
        self.split, self.channels = split, channels
        self.size = shapes.TRAIN_IMAGES if split == "train" else shapes.VALIDATION_IMAGES

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Draws all scenes, with a progress bar where asked for."""
        self.images, self.labels, self.masks = shapes.draw_split(self.split, processes=processes, progress=progress)
        if self.channels == 1:  # luminance of ITU-R BT.601, as Pillow converts
            self.images = (self.images @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)[..., None]

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        """A name for messages."""
        return f"builtin:shapes/{self.split}/{index}"

    def fetch(self, indices: list[int]) -> list[np.ndarray]:
        """The images, uint8 (64, 64, C)."""
        return [self.images[index] for index in indices]

    def size_in_bytes(self) -> float:
        """What all images take in memory."""
        return len(self) * shapes.SIZE * shapes.SIZE * self.channels

    def fingerprint(self) -> str:
        """Equal for the same scenes."""
        return f"builtin:shapes/{self.split}/{len(self)}"


Source = FolderSource | ShapesSource


def describe_data(train: Source, validation: Source | None) -> dict[str, int]:
    """How much data there is, for args.json: images to train on, their bytes on disk (about), images held out."""
    held_out = len(validation) if validation else 0
    return {"images": len(train), "bytes": round(train.size_in_bytes()), "held_out": held_out}


def open_sources(path_to_data: str, channels: int) -> tuple[Source, Source | None]:
    """The training source, and the validation source where there is one.

    `path_to_data` is `builtin:shapes`, a folder that holds `train/` and perhaps `val/` or `validation/`, or any folder
    of images. Raises DataError.
    """
    if path_to_data == "builtin:shapes":
        return ShapesSource("train", channels), ShapesSource("validation", channels)
    if path_to_data.startswith("builtin:"):
        raise DataError(f"--path_to_data {path_to_data} is unknown; the built-in data set is builtin:shapes")
    root = Path(path_to_data)
    if not (root / "train").is_dir():
        return FolderSource(root), None
    validation = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    return FolderSource(root / "train"), FolderSource(validation) if validation else None
