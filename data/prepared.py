"""Reads what prepare_data.py writes: shards of encoded images, which the library datasets loads too, or shards of
decoded pixels, which are mapped into memory.

A prepared folder has prepared.json, damaged.jsonl and a folder for each split. As `jpeg` that is what `datasets`'
save_to_disk writes, with the columns image, and where there are such label and mask. As `array` the pixels (H, W, C),
uint8 or with a value range float32, of one image after the other lie in .bin files, and offsets (of bytes in that
file), heights, widths, labels, names and name_ends in .npy files, with an entry for each image.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from data.arrow import ArrowSource
from data.decode import PixelFormat
from data.index import DataError, Names

VERSION = 1
PREPARED, PREPARING = "prepared.json", "preparing"
PLAN = f"{PREPARING}/plan.json"
SETTINGS = ("format", "short_side", "quality", "channels", "value_range", "nodata", "max_pixels")  # of prepared.json
AGAIN = "remove the folder and prepare it again, with prepare_data.py"


def is_prepared(folder: str | Path) -> bool:
    """Whether prepare_data.py has begun, or finished, to write this folder."""
    return (Path(folder) / PREPARED).is_file() or (Path(folder) / PLAN).is_file()


def read_prepared(folder: str | Path) -> dict:
    """The prepared.json of a folder whose shards are all there, at their full size. Raises DataError."""
    path = Path(folder) / PREPARED
    if not path.is_file():
        raise DataError(f"{folder} is not prepared to the end; repeat the command of prepare_data.py, which goes on")
    try:
        found = json.loads(path.read_text())
        version, shards = found["version"], found.get("shards", [])
        wrong = [shard["file"] for shard in shards if _size(path.parent / shard["file"]) != shard["bytes"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from None
    if version != VERSION:
        raise DataError(f"{folder} was prepared by another version: {version}, expected {VERSION}; {AGAIN}")
    if wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise DataError(f"{folder}: {len(wrong)} of {len(shards)} shards are missing or cut ({names}); {AGAIN}")
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def keeps_files(settings: dict) -> bool:
    """Whether images are kept as they were encoded, all of them, byte for byte."""
    return settings["format"] == "jpeg" and settings["short_side"] is None and settings["quality"] is None


def open_prepared(folder: str | Path, pixels: PixelFormat) -> dict[str, "ArrowSource | ArraySource"]:
    """The sources "train" and, where there is one, "validation" of a prepared folder.

    Raises DataError where it is unfinished, of another version, has lost shards, or holds other pixels than asked for.
    """
    found = read_prepared(folder)
    errors = _other_pixels(found, pixels)
    if errors:
        raise DataError("\n".join(f"{folder} {error}" for error in errors))
    sources = {}
    try:
        for split in found["fingerprint"]:
            shards = [shard for shard in found["shards"] if shard["file"].startswith(f"{split}/")]
            shared = dict(shards=shards, fingerprint=_fingerprint(found, split))
            if found["format"] == "jpeg":
                sources[split] = PreparedImages(Path(folder, split), **shared)
            else:
                shared |= dict(dtype=found["dtype"], channels=found["channels"], classes=found["classes"][split])
                sources[split] = ArraySource(Path(folder, split), **shared)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({type(error).__name__}: {error}); {AGAIN}") from None
    return sources


def _other_pixels(found: dict, pixels: PixelFormat) -> list[str]:
    """Why a prepared folder cannot be read as `pixels`, a line each."""
    if keeps_files(found):
        return []
    errors, channels, stored = [], found["channels"], found["value_range"]
    readable = {channels} if found["format"] == "array" else {channels, 1}  # grey is made of colour, as of any JPEG
    if pixels.channels not in readable:
        errors.append(
            f"has images of {channels} channels, expected {pixels.channels}; give --input_channels {channels}"
        )
    if found["format"] == "array" and stored is None and pixels.value_range is not None:
        errors.append("was prepared without --value_range, as 8-bit pixels; leave it out, or prepare again with it")
    if found["format"] == "array" and stored is not None and pixels.value_range is None:
        errors.append("holds {} pixels; give --value_range {!r} {!r}".format(found["dtype"], *stored))
    return errors


def _fingerprint(found: dict, split: str) -> str:
    """The source's own, where each of its files was kept; otherwise one that follows from it and the settings."""
    source = found["fingerprint"][split]
    if keeps_files(found):
        return source
    settings = [source, *(found[name] for name in (*SETTINGS, "dtype", "damaged"))]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


class PreparedImages(ArrowSource):
    """A split that holds encoded images."""

    def __init__(self, folder: Path, *, shards: list[dict], fingerprint: str):
        features = json.loads((folder / "dataset_info.json").read_text())["features"]
        columns = {name: name for name in ("image", "label", "mask") if name in features}
        classes = features.get("label", {}).get("names", [])
        files = [str(folder.parent / shard["file"]) for shard in shards]
        super().__init__(files, name=str(folder), classes=classes, **columns)
        self._fingerprint = fingerprint

    def fingerprint(self) -> str:
        """Equal for equal samples; that of the files' own source, where they were kept as they are."""
        return self._fingerprint


class ArraySource:
    """A split that holds decoded images, mapped into memory."""

    def __init__(
        self, folder: Path, *, shards: list[dict], dtype: str, channels: int, classes: list[str], fingerprint: str
    ):
        self._folder, self._dtype, self._channels = folder, np.dtype(dtype), channels
        self._given = dict(shards=shards, dtype=dtype, channels=channels, classes=classes, fingerprint=fingerprint)
        index = ("offsets", "heights", "widths", "names", "name_ends")
        self._offsets, self._heights, self._widths, names, ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in index
        )
        self._names = Names(names, ends)
        self._firsts = [0, *accumulate(shard["samples"] for shard in shards)]  # sample with which a shard begins
        # Copy-on-write, since torch warns about memory that cannot be written to
        self._shards = [
            np.memmap(folder.parent / shard["file"], mode="c") if shard["bytes"] else np.empty(0, np.uint8)
            for shard in shards
        ]
        if not len(self) == len(self._offsets) == len(self._heights) == len(self._widths) == len(ends):
            raise ValueError(f"an index of other than {len(self)} images")
        self.classes = classes
        self.labels = np.load(folder / "labels.npy") if (folder / "labels.npy").is_file() else None

    def __reduce__(self):  # a process that does not share this one's memory maps the files itself
        return partial(ArraySource, self._folder, **self._given), ()

    def __len__(self) -> int:
        return self._firsts[-1]

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: pixels are read when they are wanted."""

    def name(self, index: int) -> str:
        """The folder and the image's name in the data set that it was made from."""
        return os.path.join(self._folder, os.fsdecode(self._names[index]))

    def fetch(self, indices: Sequence[int]) -> list[np.ndarray]:
        """The images' pixels (H, W, C), uint8 or float32, as views of the files."""
        return [self._pixels(int(index)) for index in indices]

    def _pixels(self, index: int) -> np.ndarray:
        shape = (int(self._heights[index]), int(self._widths[index]), self._channels)
        shard = self._shards[bisect_right(self._firsts, index) - 1]
        return np.ndarray(shape, self._dtype, shard, int(self._offsets[index]))

    def size_in_bytes(self) -> float:
        """What all images take on disk."""
        return sum(shard["bytes"] for shard in self._given["shards"])

    def fingerprint(self) -> str:
        """Follows from the source that the pixels were made from, and how."""
        return self._given["fingerprint"]
