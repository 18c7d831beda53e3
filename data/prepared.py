"""Read prepared folders: shards of encoded images or decoded pixels that prepare_data.py writes.

A prepared folder has prepared.json, damaged.jsonl and a folder for each split. With --format jpeg, a split is a data
set of the library `datasets` with the columns image and, if available, label and mask. With --format array, .bin files
hold the pixels (H, W, C) of one image after the other, uint8 or, with a value range, float32. The .npy files offsets
(in bytes), heights, widths and labels have an entry per image; names and name_ends are the arrays of `index.Names`.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from data.decode import PixelFormat
from data.index import DataError, Names, StoredSource, first_few

VERSION = 1
PREPARED, PREPARING = "prepared.json", "preparing"
PLAN = f"{PREPARING}/plan.json"
SETTINGS = ("format", "short_side", "quality", "channels", "value_range", "nodata", "max_pixels")  # in prepared.json
REMEDY = "give another folder, or remove this one and prepare it again with prepare_data.py"


def is_prepared(folder: str | Path) -> bool:
    """Return True if prepare_data.py has started or finished writing this folder."""
    return (Path(folder) / PREPARED).is_file() or (Path(folder) / PLAN).is_file()


def read_prepared(folder: str | Path) -> dict:
    """Read the prepared.json of a folder. Raises DataError if it is damaged or a shard does not have its full size."""
    path = Path(folder) / PREPARED
    if not path.is_file():
        raise DataError(f"{folder} is not completely prepared; repeat the command of prepare_data.py, which continues")
    try:
        prepared = json.loads(path.read_text())
        version, shards = prepared["version"], prepared.get("shards", [])
        damaged = [shard["file"] for shard in shards if os.path.getsize(path.parent / shard["file"]) != shard["bytes"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {REMEDY}") from None
    if version != VERSION:
        raise DataError(f"{folder} was prepared by another version: {version}, expected {VERSION}; {REMEDY}")
    if damaged:
        files = first_few(damaged, len(damaged))
        raise DataError(f"{folder}: {len(damaged)} of {len(shards)} shards have a wrong size ({files}); {REMEDY}")
    return prepared


def keeps_files(settings: dict) -> bool:
    """Return True if all images are stored byte for byte as in their files."""
    return settings["format"] == "jpeg" and settings["short_side"] is None and settings["quality"] is None


def open_prepared(folder: str | Path, pixels: PixelFormat) -> dict:
    """Open the sources "train" and, if there is one, "validation" of a prepared folder.

    Raises DataError if it is unfinished, damaged, of another version, or has other pixels than requested.
    """
    prepared = read_prepared(folder)
    if errors := _check_pixels(prepared, pixels):
        raise DataError("\n".join(f"{folder} {error}" for error in errors))
    try:
        return {split: _open_split(Path(folder, split), prepared) for split in prepared["fingerprint"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({type(error).__name__}: {error}); {REMEDY}") from None


def _open_split(folder: Path, prepared: dict):
    if prepared["format"] == "array":
        return ArraySource(folder, prepared)
    from data.arrow import ArrowSource, Columns  # here, because pyarrow takes long to import

    features = json.loads((folder / "dataset_info.json").read_text())["features"]
    label, mask = (name if name in features else None for name in ("label", "mask"))
    columns = Columns("image", label, mask, features.get("label", {}).get("names", []))
    files = [str(folder.parent / shard["file"]) for shard in _shards_of(prepared, folder.name)]
    return ArrowSource(files, str(folder), columns, _fingerprint(prepared, folder.name))


def _shards_of(prepared: dict, split: str) -> list[dict]:
    return [shard for shard in prepared["shards"] if shard["file"].startswith(f"{split}/")]


def _check_pixels(prepared: dict, pixels: PixelFormat) -> list[str]:
    """Return why a prepared folder cannot be read as `pixels`, one message per reason."""
    if keeps_files(prepared):
        return []
    errors, channels, stored_range = [], prepared["channels"], prepared["value_range"]
    is_array = prepared["format"] == "array"
    if pixels.channels not in ({channels} if is_array else {channels, 1}):  # colour JPEGs can be decoded as grey
        errors.append(
            f"has images of {channels} channels, expected {pixels.channels}; give --input_channels {channels}"
        )
    if is_array and (stored_range is None) != (pixels.value_range is None):
        remedy = "give --value_range {!r} {!r}".format(*stored_range) if stored_range else "leave out --value_range"
        errors.append(f"holds {prepared['dtype']} pixels; {remedy}, or prepare again")
    if pixels.validity and (not is_array or stored_range is None):
        errors.append("has filled pixels without data; give --validity none, or prepare the files as they are")
    return errors


def _fingerprint(prepared: dict, split: str) -> str:
    """Return the original source's fingerprint if its files are kept, else one derived from it and the settings."""
    source = prepared["fingerprint"][split]
    if keeps_files(prepared):
        return source
    settings = [source, *(prepared[name] for name in (*SETTINGS, "dtype", "damaged"))]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


class ArraySource(StoredSource):
    """Read a split of decoded images from memory-mapped files."""

    def __init__(self, folder: Path, prepared: dict):
        self._arguments = folder, prepared
        self._folder, self._dtype, self._channels = folder, np.dtype(prepared["dtype"]), prepared["channels"]
        self.classes, shards = prepared["classes"][folder.name], _shards_of(prepared, folder.name)
        self._offsets, self._heights, self._widths, names, ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("offsets", "heights", "widths", "names", "name_ends")
        )
        self._names = Names(names, ends)
        self._firsts = [0, *accumulate(shard["samples"] for shard in shards)]  # the first sample of each shard
        # Copy-on-write, because torch warns about read-only memory
        self._shards = [
            np.memmap(folder.parent / shard["file"], mode="c") if shard["bytes"] else np.empty(0, np.uint8)
            for shard in shards
        ]
        self.labels = np.load(folder / "labels.npy") if (folder / "labels.npy").is_file() else None

    def __reduce__(self):  # other processes map the files themselves
        return ArraySource, self._arguments

    def __len__(self) -> int:
        return self._firsts[-1]

    def name(self, index: int) -> str:
        """Return the folder and the image's name in the original data set."""
        return os.path.join(self._folder, os.fsdecode(self._names[index]))

    def fetch(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Return the images' pixels (H, W, C), uint8 or float32, as views of the files."""
        return [self._pixels(int(index)) for index in indices]

    def _pixels(self, index: int) -> np.ndarray:
        shape = (int(self._heights[index]), int(self._widths[index]), self._channels)
        shard = self._shards[bisect_right(self._firsts, index) - 1]
        return np.ndarray(shape, self._dtype, shard, int(self._offsets[index]))

    def size_in_bytes(self) -> float:
        """Return the size of all shards in bytes."""
        return sum(shard.nbytes for shard in self._shards)

    def fingerprint(self) -> str:
        """Return digits that depend on the original source's fingerprint and the settings; see `_fingerprint`."""
        return _fingerprint(self._arguments[1], self._folder.name)
