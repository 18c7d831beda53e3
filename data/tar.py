"""Read samples from tar shards in the layout of WebDataset.

The members of a sample follow each other and share their name up to the first dot: dog/0001.jpg, dog/0001.cls and
dog/0001.seg.png. If that rule would join numbered images, such as frame.0001.jpg and frame.0002.jpg, or would find more
kinds of images than samples, the last dot ends the shared name. The headers of all shards are read once; then images
are read at their offsets in any order.
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
from functools import cached_property, partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from data.decode import is_image
from data.files import IMAGE_SUFFIXES, LITTER, SIDECARS, is_unchanged, retry, stamp
from data.index import DataError, Names, StoredSource, cached, first_few, number_labels, with_labels
from data.pool import mapping
from data.values import describe_start, is_pointer

IMAGE_ENDINGS = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
TEXT_ENDINGS = {suffix.removeprefix(".") for suffix in SIDECARS}
MASK_ENDINGS = {"seg.png", "mask.png", "seg", "mask"}
MAX_OPEN = 256  # shards that a process keeps open; systems usually allow 1024 files
BUFFER = 4096  # bytes read at once: enough for the headers and labels between two images
WORKERS = 8  # processes that index shards
EXPECTED = "expected tar shards, such as train-{0000..0146}.tar"


class TarSource(StoredSource):
    """Read the samples of tar shards that have an image, in the order of the shards.

    The image is the first member named .jpg, .png, .webp, .npy, ...; without one, it is the first named like .left.jpg
    or whose first bytes are those of an image. The label is .cls, or `label` or `cls` in .json. The mask is .seg.png,
    .mask.png, .seg or .mask. `pattern` is a path with ranges {0000..0146}, alternatives {a,b} and * ?, or several such
    paths joined by ::. The index is cached in the folder `cache` until a shard changes. Raises DataError if shards are
    missing or damaged, or if none has an image.
    """

    def __init__(self, pattern: str, *, cache: Path | None = None):
        self.shards = expand(pattern.split("::"))
        key = "tar " + json.dumps([os.path.abspath(shard) for shard in self.shards])
        meta, arrays = cached(cache, key, fresh=is_unchanged, build=partial(_index, self.shards))
        self.classes, self.labels, self.label_errors = meta["classes"], arrays.get("labels"), meta["label_errors"]
        self.notes, self._mask_error = meta["notes"], meta["mask_error"]
        self._shard_of, self._images, self._masks = arrays["shard"], arrays["images"], arrays.get("masks")
        self._names = Names(arrays["names"], arrays["ends"])
        self._mask_names = Names(arrays["mask_names"], arrays["mask_ends"]) if self._masks is not None else None
        self._open: dict[int, FileIO] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}  # each process opens the shards for itself

    @cached_property
    def has_masks(self) -> bool:
        """Return True if all images have masks. Raises DataError if only some have."""
        if self._mask_error:
            raise DataError(self._mask_error)
        return self._masks is not None

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
        """Return the size of all images and masks in bytes."""
        return float(sum(places[:, 1].sum() for places in (self._images, self._masks) if places is not None))

    def fingerprint(self) -> str:
        """Return digits that are equal for equal labels, names and sizes in the same order, in any shards."""
        masks = _digest(self._mask_names, self._masks) if self._masks is not None else None
        return with_labels(_digest(self._names, self._images), self.labels, self.classes, masks)


def _digest(names: Names, places: np.ndarray) -> str:
    sizes = np.ascontiguousarray(places[:, 1])
    return hashlib.sha256(names.digest().encode() + sizes.tobytes()).hexdigest()[:16]


def expand(patterns: Sequence[str]) -> list[str]:
    """Return the paths of the shards that patterns match, in their order; matches of * and ? are sorted by bytes.

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
    """Expand each {0..9} and {a,b} in a pattern as a shell does; leave other braces unchanged."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not braces:
        return [pattern]
    first, last, words = braces.groups()
    choices = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: braces.start()], _expand_braces(pattern[braces.end() :])
    return [before + choice + rest for choice in choices for rest in after]


def _index(shards: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """Build the index of all shards, for `cached`. Raises DataError."""
    start, seen = time.time_ns(), {os.path.abspath(shard): stamp(shard) for shard in shards}
    parts, notes = _index_shards(shards, by_last_dot=False), []
    # A sample may have several views, such as .left.jpg, with few different endings. If there are more endings than
    # samples, or if they are numbers, as for the frames of a clip, they belong to the names of the samples
    endings, joined = set().union(*(part.endings for part in parts)), sum(part.joined for part in parts)
    has_numbers = any(part.extra for part in parts) and any(ending[:1].isdigit() for ending in endings)
    if len(endings) > joined or has_numbers:
        parts = _index_shards(shards, by_last_dot=True)
        notes = ["samples    named up to the last dot, as up to the first they would share names"]
    if extra := sum(part.extra for part in parts):
        read = sorted(set().union(*(part.read for part in parts)))
        image = "image" if extra == 1 else "images"
        notes.append(f"left out   {extra:,} further {image} of samples whose .{first_few(read, len(read))} is read")
    parts = [part.samples for part in parts]
    all_shards, samples = first_few(shards, len(shards)), pa.concat_tables(parts)
    if not len(samples):
        raise DataError(f"{all_shards} holds no image; expected members named .jpg, .png, .webp, .npy, ...")
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(part) for part in parts])
    images, names = _places_and_names(samples["image"])
    arrays = {"shard": shard_of, "images": images, "names": names.buffer, "ends": names.ends}

    def where(row: int) -> str:
        return f"{shards[shard_of[row]]}/{os.fsdecode(names[row])}"

    meta = {"start": start, "seen": seen, "notes": notes, "mask_error": ""}
    without = np.flatnonzero(samples["mask"].is_null())
    if 0 < len(without) < len(samples):
        few = first_few(map(where, without), len(without))
        meta["mask_error"] = f"{all_shards} has images without a mask: {few}; expected a mask for all images or none"
    elif not len(without):
        masks, mask_names = _places_and_names(samples["mask"])
        arrays |= {"masks": masks, "mask_names": mask_names.buffer, "mask_ends": mask_names.ends}
    labels, meta["classes"], meta["label_errors"] = number_labels(samples["label"], where, all_shards)
    return meta, arrays if labels is None else arrays | {"labels": labels}


class Shard(NamedTuple):
    """The index of a shard."""

    samples: pa.Table  # `image` and `mask` with name, offset and size in bytes, and `label`, a text; null if absent
    extra: int  # number of images that are not read, because their sample has another
    joined: int  # number of samples without an image like .jpg, but with others like .left.jpg
    endings: set[str]  # of all images in those samples that have no label, such as 0001.cls, to show where a name ends
    read: set[str]  # endings of the images that are read in samples with several


def _index_shards(shards: list[str], *, by_last_dot: bool) -> list[Shard]:
    """Index shards in worker processes. Raises DataError."""
    with mapping(min(len(shards), WORKERS)) as in_order:
        indexed = in_order(partial(index_shard, by_last_dot=by_last_dot), shards)
        parts = list(tqdm(indexed, "indexing", len(shards), unit="shard", delay=2, leave=False))
    errors = [part for part in parts if isinstance(part, str)]
    if errors:
        more = [f"and {len(errors) - 3:,} more shards like these"] if len(errors) > 3 else []
        raise DataError("\n".join(errors[:3] + more))
    return parts


def _places_and_names(members: pa.ChunkedArray) -> tuple[np.ndarray, Names]:
    """Return the offsets and sizes of images or masks in bytes, (N, 2) int64, and their names."""
    offsets, sizes, names = (pc.struct_field(members, field) for field in ("offset", "size", "name"))
    return np.stack([offsets.to_numpy(), sizes.to_numpy()], axis=1), Names.from_arrow(names)


def index_shard(path: str, *, by_last_dot: bool = False) -> Shard | str:
    """Return the index of a shard, or an error message of one line."""
    samples, key = [], None
    try:
        with open(path, "rb", buffering=BUFFER) as file:
            for member in files_in(file):
                name = member.name.removeprefix("./")
                if LITTER.search(os.fsencode(name)):
                    continue
                stem, ending = split_name(name, by_last_dot=by_last_dot)
                if key != stem:
                    key = stem
                    samples.append({"endings": []})
                _add_member(samples[-1], member, ending.lower(), file)
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter two from numbers in damaged headers
        with open(path, "rb") as file:
            if is_pointer(start := file.read(64)):
                return f"{path} is {describe_start(start)}"
        return f"{path} is compressed, truncated or damaged ({error}); decompress it, or download it again"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); check its permissions"
    place = pa.struct({"name": pa.large_binary(), "offset": pa.int64(), "size": pa.int64()})
    schema = pa.schema({"image": place, "mask": place, "label": pa.large_string()})
    samples = [sample for sample in samples if sample["endings"]]
    joined = [sample for sample in samples if "image" not in sample]
    for sample in joined:
        sample["image"] = sample["other"]
    extra = sum(len(sample["endings"]) - 1 for sample in samples)
    endings = {ending for sample in joined if "label" not in sample for ending in sample["endings"]}
    several = [sample["endings"] for sample in samples if len(sample["endings"]) > 1]
    read = {next((ending for ending in own if ending in IMAGE_ENDINGS), own[0]) for own in several}
    return Shard(pa.Table.from_pylist(samples, schema), extra, len(joined), endings, read)


def split_name(name: str, *, by_last_dot: bool) -> tuple[str, str]:
    """Split a member's name at the first or last dot; the endings of masks, such as seg.png, always stay whole."""
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    if by_last_dot and not ending.lower().endswith(tuple(MASK_ENDINGS)):
        stem, dot, ending = base.rpartition(".") if dot else (base, "", "")
    elif by_last_dot:
        ending = max((mask for mask in MASK_ENDINGS if ending.lower().endswith(mask)), key=len)
        stem = base[: -len(ending) - 1]
    return folder + slash + stem, ending


def files_in(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of a tar in order, reading only headers; `file` is then at the content of the member.

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
    """Add an image, mask or label to a sample; `ending` is the part of the member's name after the sample's name."""
    last = ending.rpartition(".")[2]
    kind = "mask" if ending in MASK_ENDINGS else "image" if ending in IMAGE_ENDINGS else "other"  # such as .depth.png
    if ending == "cls":
        sample["label"] = file.read(member.size).decode(errors="replace").strip() or None
    elif ending == "json":
        with contextlib.suppress(ValueError, AttributeError, RecursionError):  # no JSON, no object, nested too deeply
            content = json.loads(file.read(member.size) if not sample.get("label") else b"{}")
            label = content.get("label", content.get("cls"))
            sample["label"] = str(label).encode() if isinstance(label, int | float | str) else sample.get("label")
    elif kind != "other" or last in IMAGE_ENDINGS or (last not in TEXT_ENDINGS and is_image(file.read(32), last)):
        name = os.fsencode(member.name.removeprefix("./"))
        sample.setdefault(kind, {"name": name, "offset": member.offset_data, "size": member.size})
        if kind != "mask":
            sample["endings"].append(ending)
