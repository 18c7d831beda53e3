"""Samples in tar shards, as WebDataset names them: the members of a sample follow each other and share a name up to the
first dot, such as dog/0001.jpg, dog/0001.cls and dog/0001.seg.png.

The headers of all shards are read once. Images are then read from where they lie in the shards, in any order.
"""

import errno
import glob
import hashlib
import json
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data.files import CLOCK, OF_THE_PATH, PAUSES, SUFFIXES
from data.index import DataError, Names, cached, first_few, number_labels, with_labels
from data.pool import mapping

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = {suffix.removeprefix(".") for suffix in SUFFIXES}
MASKS = {"seg.png", "mask.png", "seg", "mask"}
MAX_OPEN = 256  # shards that a process holds open; common limits are 1024 files
NAMED_ERRORS = 3  # more shards that are damaged are only counted
BUFFER = 4096  # bytes that are read at once: the headers and labels between two images
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
EXPECTED = "expected tar shards, such as train-{0000..0146}.tar"


class TarSource:
    """The samples of tar shards that have an image, in the order in which they lie there.

    `pattern` is a path with ranges {0000..0146}, lists {a,b} and * ?, or several of these, joined by :: or in a list. A
    sample's image is its first member named .jpg, .png, .webp, .npy, ..., or where there is none, the first that ends
    like .left.jpg; its label is .cls, or `label` or `cls` in .json; its mask .seg.png, .mask.png, .seg or .mask. The
    index is kept in the folder `cache`, and used until a shard changes. Raises DataError for shards that are missing,
    cut, compressed, or hold no image.
    """

    def __init__(self, pattern: str | Sequence[str], *, cache: Path | None = None):
        patterns = pattern.split("::") if isinstance(pattern, str) else list(pattern)
        self.shards = expand(patterns)
        key = "tar " + json.dumps([os.path.abspath(shard) for shard in self.shards])
        meta, arrays = cached(cache, key, fresh=partial(_holds_still, self.shards), build=partial(_index, self.shards))
        self.classes, self.labels = meta["classes"], arrays.get("labels")
        self._shard_of, self._images, self._masks = arrays["shard"], arrays["images"], arrays.get("masks")
        self._names = Names(arrays["names"], arrays["ends"])
        self._mask_names = Names(arrays["mask_names"], arrays["mask_ends"]) if self.has_masks else None
        self._open: dict[int, _Descriptor] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # another process opens the shards itself

    def __len__(self) -> int:
        return len(self._shard_of)

    @property
    def has_masks(self) -> bool:
        """Whether there is a mask for every image."""
        return self._masks is not None

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: images are read when they are wanted."""

    def name(self, index: int) -> str:
        """The path of the shard and the image's name in it."""
        return f"{self.shards[self._shard_of[index]]}/{os.fsdecode(self._names[index])}"

    def mask_name(self, index: int) -> str:
        """The path of the shard and the mask's name in it."""
        return f"{self.shards[self._shard_of[index]]}/{os.fsdecode(self._mask_names[index])}"

    def fetch(self, indices: Sequence[int]) -> list[bytes | OSError]:
        """The encoded images, or why one could not be read."""
        return [self._read(int(self._shard_of[index]), *self._images[index].tolist()) for index in indices]

    def fetch_masks(self, indices: Sequence[int]) -> list[bytes | OSError]:
        """The encoded masks, or why one could not be read."""
        return [self._read(int(self._shard_of[index]), *self._masks[index].tolist()) for index in indices]

    def _read(self, shard: int, offset: int, size: int) -> bytes | OSError:
        """A part of a shard; what may be a file system's bad moment is tried again."""
        for pause in (*PAUSES, None):
            try:
                # A descriptor that is shared with the process this one was forked from has no position that matters.
                data = os.pread(self._descriptor(shard).number, size, offset)
                if len(data) == size:
                    return data
                return OSError(errno.EIO, f"{self.shards[shard]} has been cut since it was indexed")
            except OSError as error:
                self._open.pop(shard, None)
                if pause is None or error.errno in OF_THE_PATH:
                    return error
            time.sleep(pause)

    def _descriptor(self, shard: int) -> "_Descriptor":
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open)))  # the oldest, which closes it
            self._open[shard] = _Descriptor(self.shards[shard])
        return self._open[shard]

    def size_in_bytes(self) -> float:
        """What all images and masks take in the shards."""
        return float(sum(places[:, 1].sum() for places in (self._images, self._masks) if places is not None))

    def fingerprint(self) -> str:
        """Equal for equal labels and images and masks of equal names and sizes in the same order, in any shards."""
        masks = _digest(self._mask_names, self._masks) if self.has_masks else None
        return with_labels(_digest(self._names, self._images), self.labels, self.classes, masks)


def _digest(names: Names, places: np.ndarray) -> str:
    """Equal for equal names and sizes in the same order."""
    sizes = np.ascontiguousarray(places[:, 1])
    return hashlib.sha256(names.digest().encode() + sizes.tobytes()).hexdigest()[:16]


class _Descriptor:
    """An open file, until nobody needs it."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def expand(patterns: Sequence[str]) -> list[str]:
    """The shards that patterns mean, in their order; what * and ? match is in the order of its bytes.

    Raises DataError for shards that are not there.
    """
    shards, errors = [], []
    for pattern in patterns:
        paths = _braces(pattern)
        for path in paths:
            if glob.has_magic(path) and not os.path.exists(path):
                found = sorted(glob.glob(path, recursive=True), key=os.fsencode)
                if not found:
                    errors.append(f"{path} matches no shard; {EXPECTED}; correct the pattern")
                shards += found
            else:
                shards.append(path)
        missing = [path for path in paths if not glob.has_magic(path) and not os.path.isfile(path)]
        if missing:
            errors.append(
                f"{len(missing):,} of {len(paths):,} shards are missing: {first_few(missing, len(missing))}; "
                f"{EXPECTED}; correct the pattern, or fetch them"
            )
    if errors:
        raise DataError("\n".join(errors))
    return shards


def _braces(pattern: str) -> list[str]:
    """A pattern with each of its {0..9} and {a,b} written out, as a shell does; other braces stand for themselves."""
    found = re.search(r"\{(-?\d+)\.\.(-?\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        padded = any(re.match("-?0[0-9]", end) for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = words.split(",")
    before, after = pattern[: found.start()], _braces(pattern[found.end() :])
    return [before + choice + rest for choice in choices for rest in after]


def _stamps(shards: Sequence[str]) -> list[list[int]]:
    """What changes with the shards."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, shards)]


def _holds_still(shards: Sequence[str], meta: dict) -> bool:
    """Whether the shards are as they were when they were indexed, and had not changed just before."""
    stamps = meta["stamps"]
    return max(changed for _, changed in stamps) <= meta["start"] - CLOCK and stamps == _stamps(shards)


def _index(shards: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """The index of all shards, for `cached`. Raises DataError."""
    import pyarrow as pa

    start, stamps = time.time_ns(), _stamps(shards)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(len(shards), cores)
    with mapping(processes) as in_order:
        found = list(in_order(index_shard, shards))
    errors = [part for part in found if isinstance(part, str)]
    if errors:
        more = [f"and {len(errors) - NAMED_ERRORS:,} more shards like these"] if len(errors) > NAMED_ERRORS else []
        raise DataError("\n".join(errors[:NAMED_ERRORS] + more))
    all_shards, samples = first_few(shards, len(shards)), pa.concat_tables(found)
    if not len(samples):
        raise DataError(f"{all_shards}: no image in there; expected members named .jpg, .png, .webp, .npy, ...")
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part) for part in found])
    images, names = _places_and_names(samples["image"])
    arrays = {"shard": shard_of, "images": images, "names": names.buffer, "ends": names.ends}

    def where(row: int) -> str:
        return f"{shards[shard_of[row]]}/{os.fsdecode(names[row])}"

    if samples["mask"].null_count < len(samples):
        without = np.flatnonzero(samples["mask"].is_null())
        if len(without):
            few = first_few(map(where, without), len(without))
            raise DataError(f"{all_shards} has images without a mask: {few}; expected one for every image, or for none")
        masks, mask_names = _places_and_names(samples["mask"])
        arrays |= {"masks": masks, "mask_names": mask_names.buffer, "mask_ends": mask_names.ends}
    classes = []
    if samples["label"].null_count < len(samples):
        try:
            arrays["labels"], classes = number_labels(samples["label"], where)
        except pa.ArrowInvalid:
            raise DataError(f"{all_shards} has labels that are no text; expected UTF-8 in .cls") from None
        except DataError as error:
            raise DataError("\n".join(f"{all_shards} has {fault}" for fault in str(error).splitlines())) from None
    return {"start": start, "stamps": stamps, "classes": classes}, arrays


def _places_and_names(members: "pa.ChunkedArray") -> tuple[np.ndarray, Names]:
    """Offsets and sizes (N, 2), int64, of the images or masks in an index, and their names."""
    import pyarrow.compute as pc

    offsets, sizes, names = (pc.struct_field(members, field) for field in ("offset", "size", "name"))
    return np.stack([offsets.to_numpy(), sizes.to_numpy()], axis=1), Names.from_arrow(names)


def index_shard(path: str) -> "pa.Table | str":
    """The samples of a shard, or why it cannot be used, in one line.

    A row is a sample: `image` and `mask` with name, offset and size in bytes, and `label`, a text; null what is not
    there.
    """
    import pyarrow as pa

    samples, key = [], None
    try:
        with open(path, "rb", buffering=BUFFER) as file:
            start = file.peek()
            for member in files_in(file):
                folder, slash, base = member.name.removeprefix("./").rpartition("/")
                stem, dot, ending = base.partition(".")
                if not dot or not stem:
                    continue
                if key != folder + slash + stem:
                    key = folder + slash + stem
                    samples.append({})
                _add(samples[-1], member, ending.lower(), file)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # of numbers in damaged headers
        packing = next((name for magic, name in PACKED.items() if start.startswith(magic)), None)
        if packing:
            return f"{path} is compressed by {packing}; expected a plain tar: decompress it"
        whole = sum("image" in sample for sample in samples[:-1])  # more of the last one may follow
        return f"{path} is cut or damaged ({error}), with {whole:,} whole samples before that; fetch it again"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); check its permissions"
    member = pa.struct({"name": pa.large_binary(), "offset": pa.int64(), "size": pa.int64()})
    schema = pa.schema({"image": member, "mask": member, "label": pa.large_binary()})
    return pa.Table.from_pylist([sample for sample in samples if "image" in sample], schema)


def files_in(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The files in a tar in their order, without links and sparse ones; only headers are read.

    When one is given, `file` is at its content. Raises what tarfile raises, and ReadError also where the last member or
    the mark at the end is not whole.
    """
    end = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # a shard may have millions
            if not member.offset_data <= tar.offset <= end:  # where the next header is
                raise tarfile.ReadError(f"it ends before the member at byte {member.offset:,} does")
            if member.isfile() and not member.issparse():
                yield member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header of a tar at byte {tar.offset:,}")


def _add(sample: dict, member: tarfile.TarInfo, ending: str, file: BinaryIO) -> None:
    """Takes what is of use of a member, whose name ends so after the first dot; `file` is at its content."""
    kind = "mask" if ending in MASKS else "image" if ending.rpartition(".")[2] in IMAGES else None
    if kind:
        better = kind == "image" and ending in IMAGES and "." in sample.get("ending", "")  # .jpg than .depth.png
        if better or kind not in sample:
            name = os.fsencode(member.name.removeprefix("./"))
            sample[kind] = {"name": name, "offset": member.offset_data, "size": member.size}
            sample |= {"ending": ending} if kind == "image" else {}
    elif ending == "cls":
        sample["label"] = file.read(member.size).strip() or None
    elif ending == "json" and not sample.get("label"):
        sample["label"] = _label_in(file.read(member.size))


def _label_in(text: bytes) -> bytes | None:
    """The label in a JSON object, as text."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    values = [found.get(key) for key in ("label", "cls")] if isinstance(found, dict) else []
    texts = [str(value).encode(errors="surrogatepass") for value in values if isinstance(value, int | float | str)]
    return texts[0] if texts else None
