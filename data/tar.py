"""Read samples from tar shards in the layout of WebDataset.

The members of a sample follow each other and share their name up to the first dot: dog/0001.jpg, dog/0001.cls and
dog/0001.seg.png. The headers of all shards are read once; images are then read from their places in any order.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data.files import SUFFIXES, is_unchanged, retry, stamp
from data.index import DataError, Names, StoredSource, cached, first_few, number_labels, with_labels
from data.pool import mapping

IMAGES = {suffix.removeprefix(".") for suffix in SUFFIXES}
MASKS = {"seg.png", "mask.png", "seg", "mask"}
MAX_OPEN = 256  # shards that a process keeps open; the usual limit is 1024 files
BUFFER = 4096  # bytes read at once: the headers and labels between two images
WORKERS = 8  # processes that index shards
EXPECTED = "expected tar shards, such as train-{0000..0146}.tar"


class TarSource(StoredSource):
    """Read the samples of tar shards that have an image, in the order of the shards.

    The image is the first member named .jpg, .png, .webp, .npy, ..., or else the first named like .left.jpg; the label
    is .cls, or `label` or `cls` in .json; the mask is .seg.png, .mask.png, .seg or .mask. `pattern` is a path with
    ranges {0000..0146}, alternatives {a,b} and * ?, or several, joined by ::. The index is cached in the folder `cache`
    until a shard changes. Raises DataError for shards that are missing, damaged or without images.
    """

    def __init__(self, pattern: str, *, cache: Path | None = None):
        self.shards = expand(pattern.split("::"))
        key = "tar " + json.dumps([os.path.abspath(shard) for shard in self.shards])
        meta, arrays = cached(cache, key, fresh=is_unchanged, build=partial(_index, self.shards))
        self.classes, self.labels = meta["classes"], arrays.get("labels")
        self._shard_of, self._images, self._masks = arrays["shard"], arrays["images"], arrays.get("masks")
        self.has_masks = self._masks is not None
        self._names = Names(arrays["names"], arrays["ends"])
        self._mask_names = Names(arrays["mask_names"], arrays["mask_ends"]) if self.has_masks else None
        self._open: dict[int, FileIO] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # each process opens the shards itself

    def __len__(self) -> int:
        return len(self._shard_of)

    def name(self, index: int) -> str:
        return f"{self.shards[self._shard_of[index]]}/{os.fsdecode(self._names[index])}"

    def mask_name(self, index: int) -> str:
        return f"{self.shards[self._shard_of[index]]}/{os.fsdecode(self._mask_names[index])}"

    def fetch(self, indices: Sequence[int]) -> list[bytes | OSError]:
        return self._read_all(self._images, indices)

    def fetch_masks(self, indices: Sequence[int]) -> list[bytes | OSError]:
        return self._read_all(self._masks, indices)

    def _read_all(self, places: np.ndarray, indices: Sequence[int]) -> list[bytes | OSError]:
        return [retry(partial(self._read, int(self._shard_of[index]), *places[index].tolist())) for index in indices]

    def _read(self, shard: int, offset: int, size: int) -> bytes | OSError:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()  # the oldest
            self._open[shard] = FileIO(self.shards[shard])
        try:
            # pread() ignores the position in the file, which forked processes share.
            return os.pread(self._open[shard].fileno(), size, offset)
        except OSError:
            self._open.pop(shard).close()
            raise

    def size_in_bytes(self) -> float:
        """Return the size of all images and masks in the shards."""
        return float(sum(places[:, 1].sum() for places in (self._images, self._masks) if places is not None))

    def fingerprint(self) -> str:
        """Return digits equal for equal labels, names and sizes in the same order, however they are sharded."""
        masks = _digest(self._mask_names, self._masks) if self.has_masks else None
        return with_labels(_digest(self._names, self._images), self.labels, self.classes, masks)


def _digest(names: Names, places: np.ndarray) -> str:
    sizes = np.ascontiguousarray(places[:, 1])
    return hashlib.sha256(names.digest().encode() + sizes.tobytes()).hexdigest()[:16]


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the shards that patterns name, in their order; matches of * and ? are ordered by bytes.

    Raises DataError for missing shards.
    """
    shards, missing = [], []
    for path in (path for pattern in patterns for path in _expand_braces(pattern)):
        matches = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True), key=os.fsencode)
        if not matches and glob.has_magic(path):
            raise DataError(f"{path} matches no shard; {EXPECTED}; correct the pattern")
        shards += matches
        missing += [] if matches else [path]
    if missing:
        count = f"{len(missing):,} of {len(missing) + len(shards):,} shards are missing"
        few = first_few(missing, len(missing))
        raise DataError(f"{count}: {few}; {EXPECTED}; correct the pattern, or download them")
    return shards


def _expand_braces(pattern: str) -> list[str]:
    """Expand each {0..9} and {a,b} of a pattern as a shell does; other braces stay."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    first, last, words = braces.groups()
    choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: braces.start()], _expand_braces(pattern[braces.end() :])
    return [before + choice + rest for choice in choices for rest in after]


def _index(shards: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """Build the index of all shards for `cached`. Raises DataError."""
    start, seen = time.time_ns(), {os.path.abspath(shard): stamp(shard) for shard in shards}
    with mapping(min(len(shards), WORKERS)) as in_order:
        progress = tqdm(in_order(index_shard, shards), "indexing", len(shards), unit="shard", delay=2, leave=False)
        parts = list(progress)
    errors = [part for part in parts if isinstance(part, str)]
    if errors:
        more = [f"and {len(errors) - 3:,} more shards like these"] if len(errors) > 3 else []
        raise DataError("\n".join(errors[:3] + more))
    all_shards, samples = first_few(shards, len(shards)), pa.concat_tables(parts)
    if not len(samples):
        raise DataError(f"{all_shards} holds no image; expected members named .jpg, .png, .webp, .npy, ...")
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part) for part in parts])
    images, names = _places_and_names(samples["image"])
    arrays = {"shard": shard_of, "images": images, "names": names.buffer, "ends": names.ends}

    def where(row: int) -> str:
        return f"{shards[shard_of[row]]}/{os.fsdecode(names[row])}"

    without = np.flatnonzero(samples["mask"].is_null())
    if len(without) < len(samples):
        if len(without):
            few = first_few(map(where, without), len(without))
            raise DataError(f"{all_shards} has images without a mask: {few}; expected a mask for all images or none")
        masks, mask_names = _places_and_names(samples["mask"])
        arrays |= {"masks": masks, "mask_names": mask_names.buffer, "mask_ends": mask_names.ends}
    classes = []
    if samples["label"].null_count < len(samples):
        arrays["labels"], classes = number_labels(samples["label"], where, all_shards)
    return {"start": start, "seen": seen, "classes": classes}, arrays


def _places_and_names(members: pa.ChunkedArray) -> tuple[np.ndarray, Names]:
    """Return offsets and sizes (N, 2) int64 of images or masks, and their names."""
    offsets, sizes, names = (pc.struct_field(members, field) for field in ("offset", "size", "name"))
    return np.stack([offsets.to_numpy(), sizes.to_numpy()], axis=1), Names.from_arrow(names)


def index_shard(path: str) -> pa.Table | str:
    """Return the samples of a shard, or an error message in one line.

    Each row is a sample: `image` and `mask` with name, offset and size in bytes, and `label`, a text; null if absent.
    """
    samples, key = [], None
    try:
        with open(path, "rb", buffering=BUFFER) as file:
            for member in files_in(file):
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, ending = base.partition(".")
                if not dot or not stem:
                    continue
                if key != folder + slash + stem:
                    key = folder + slash + stem
                    samples.append({})
                _add_member(samples[-1], member, ending.lower(), file)
    except UnicodeDecodeError:
        return f"{path}/{key}.cls is no text; expected UTF-8 in .cls"
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter two from numbers in damaged headers
        return f"{path} is compressed, truncated or damaged ({error}); decompress it, or download it again"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); check its permissions"
    place = pa.struct({"name": pa.large_binary(), "offset": pa.int64(), "size": pa.int64()})
    schema = pa.schema({"image": place, "mask": place, "label": pa.large_string()})
    for sample in samples:
        if "other" in sample:
            sample.setdefault("image", sample["other"])
    return pa.Table.from_pylist([sample for sample in samples if "image" in sample], schema)


def files_in(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar in their order, reading only headers; `file` is then at the file's content.

    Raises the errors of tarfile, and ReadError if the last member or the end mark is incomplete.
    """
    end = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # a shard may have millions
            if not member.offset_data <= tar.offset <= end:  # the offset of the next header
                raise tarfile.ReadError(f"it ends before the member at byte {member.offset:,} does")
            if member.isfile() and not member.issparse():
                yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no tar header at byte {tar.offset:,}")


def _add_member(sample: dict, member: tarfile.TarInfo, ending: str, file: BinaryIO) -> None:
    """Add an image, mask or label to a sample; `ending` is the member's name after the first dot."""
    kind = "mask" if ending in MASKS else "image" if ending in IMAGES else "other"  # such as .depth.png
    if kind != "other" or ending.rpartition(".")[2] in IMAGES:
        name = os.fsencode(member.name.removeprefix("./"))
        sample.setdefault(kind, {"name": name, "offset": member.offset_data, "size": member.size})
    elif ending == "cls":
        sample["label"] = file.read(member.size).decode().strip() or None
    elif ending == "json" and not sample.get("label"):
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # no JSON, no object, nested too deeply
            content = json.loads(file.read(member.size))
            label = content.get("label", content.get("cls"))
            sample["label"] = str(label).encode() if isinstance(label, int | float | str) else None
