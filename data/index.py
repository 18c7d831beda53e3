"""The index of a data set: names and labels in flat arrays that processes share, and a cache for what is slow to do."""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

FORMAT = 1  # of a cache's entries: those of another format are not looked at
UNUSED_DAYS = 90  # after which an entry is removed
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
CLASS_NUMBER = re.compile("0*[0-9]{1,6}")  # more would be no numbers of classes


class DataError(ValueError):
    """Data that cannot be used: what was given, what was expected, and the remedy, in one line for each fault."""


class Names:
    """N byte strings, one after the other in `buffer` (M,), uint8; number i ends before byte `ends[i]`, (N,), int64.

    No Python object is kept for any of them, so that worker processes share all of them without copies.
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray):
        self.buffer, self.ends = buffer, ends

    @classmethod
    def from_list(cls, names: Sequence[bytes]) -> "Names":
        """Copies a list."""
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    @classmethod
    def from_arrow(cls, texts) -> "Names":
        """Copies a pyarrow Array or ChunkedArray of strings or bytes; what is null becomes empty."""
        import pyarrow as pa

        buffers, ends, total = [], [np.empty(0, np.int64)], 0
        for chunk in texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]:
            chunk = chunk.cast(pa.large_binary()).fill_null(b"")
            _, offsets, buffer = chunk.buffers()
            if len(chunk):
                offsets = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
                if buffer:
                    buffers.append(np.frombuffer(buffer, np.uint8)[offsets[0] : offsets[-1]])
                ends.append(offsets[1:] + (total - offsets[0]))
                total = int(ends[-1][-1])
        return cls(np.concatenate([np.empty(0, np.uint8), *buffers]), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].tobytes()

    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal names in the same order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.buffer))
        digest.update(np.ascontiguousarray(self.ends))
        return digest.hexdigest()[:16]


def with_labels(images: str, labels: np.ndarray | None, classes: Sequence[str], masks: str | None) -> str:
    """The fingerprint of a data set: `images`, that of its images; with labels or masks, one that follows from all.

    `masks` is a digest of the masks, None where there are none.
    """
    if labels is None and masks is None:
        return images
    masks = Names.from_list([]).digest() if masks is None else masks
    numbers = b"" if labels is None else labels.tobytes() + "\n".join(classes).encode()
    return hashlib.sha256(f"{images} {masks} ".encode() + numbers).hexdigest()[:16]


def first_few(words: Iterable[str], count: int) -> str:
    """The first three of `count` words, and how many more there are: "a, b, c and 4 more"."""
    shown = list(islice(words, 3))
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def number_labels(texts, where: Callable[[int], str]) -> tuple[np.ndarray, list[str]]:
    """The class of every sample (N,), int32, and the names of the classes, from labels as texts.

    `texts` is a list, or a pyarrow Array or ChunkedArray, of texts or integers. If all are whole numbers from 0, these
    are the classes, and their names are the numbers from 0 to the largest. If none is a number, classes are numbered in
    the order of the bytes of their names. `where(index)` names a sample's place in messages, such as "line 7".
    Raises DataError.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not isinstance(texts, pa.Array | pa.ChunkedArray):
        texts = pa.array(texts, pa.large_string())
    texts = pc.utf8_trim_whitespace(texts.cast(pa.large_string()).fill_null(""))
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    encoded = texts.dictionary_encode()
    codes, values = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()

    def places(chosen: np.ndarray) -> str:
        rows = np.flatnonzero(chosen[codes])
        return first_few((f"{where(int(row))}: {values[codes[row]]!r}" for row in rows), len(rows))

    empty = np.array([not value for value in values], dtype=bool)
    number = np.array([bool(NUMBER.fullmatch(value)) for value in values], dtype=bool)
    unfit = number & np.array([not CLASS_NUMBER.fullmatch(value) for value in values], dtype=bool)
    faults = []
    if empty.any():
        faults.append(f"labels that are empty ({places(empty)}); expected one for every image; fill them in")
    if unfit.any():
        faults.append(
            f"labels that number no class ({places(unfit)}); expected whole numbers from 0 to 999999, or names"
        )
    if number.any() and not (number | empty).all():
        faults.append(
            f"labels that are numbers ({places(number)}) and others that are names ({places(~number & ~empty)}); "
            "expected only numbers or only names; change the fewer ones"
        )
    if faults:
        raise DataError("\n".join(faults))
    if number.any():
        numbers = np.array([int(value) for value in values], dtype=np.int32)
        return numbers[codes], [str(number) for number in range(numbers.max() + 1)]
    classes = sorted(values, key=str.encode)
    rank = {name: number for number, name in enumerate(classes)}
    return np.array([rank[value] for value in values], dtype=np.int32)[codes], classes


def default_cache() -> Path:
    """Where indices are kept unless another place is named."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "masked-autoencoders")
    except RuntimeError:  # a user without a home, as in containers
        return Path(tempfile.gettempdir(), f"masked-autoencoders-{os.getuid()}")


def check_cache(cache: str | Path) -> None:
    """Raises DataError where `cache` is no folder to write to; makes it where it is not there."""
    try:
        os.makedirs(cache, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise DataError(f"{cache} cannot hold a cache ({error.strerror}); give another --cache_dir") from None


def cached(
    cache: Path | None,
    key: str,
    *,
    fresh: Callable[[dict], bool],
    build: Callable[[], tuple[dict, dict[str, np.ndarray]]],
) -> tuple[dict, dict[str, np.ndarray]]:
    """What `build()` returns, a dict that JSON can hold and arrays by name; where it was built before, from `cache`.

    The arrays are then memory-mapped, read-only: processes share them. `key` says what was built, and `fresh(meta)`
    whether it still holds; what is not fresh when it has been built is not kept. Of several processes one builds, and
    the others wait. Without a cache, or where the default one cannot be written, it is built each time. Raises
    DataError where another one cannot be written, before anything else.
    """
    if cache is None:
        return build()
    try:
        check_cache(cache)
    except DataError as error:
        if cache != default_cache():
            raise
        _note(error)
        return build()
    entry = cache / f"index-{hashlib.sha256(f'{FORMAT} {key}'.encode(errors='surrogateescape')).hexdigest()[:32]}"
    found = _load(entry, fresh)
    if found:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(entry.with_suffix(".lock")))
        except OSError as error:  # a file system without locks
            _note(f"{cache} cannot be locked ({error.strerror}); nothing is cached")
            return build()
        found = _load(entry, fresh)  # built by another process meanwhile
        if found:
            return found
        meta, arrays = build()
        if not fresh(meta):
            return meta, arrays
        try:
            _store(entry, meta, arrays)
        except OSError as error:
            _note(f"{cache} cannot be written ({error.strerror}); nothing is cached")
            return meta, arrays
        return _load(entry, lambda meta: True) or (meta, arrays)


def _note(text: object) -> None:
    print(f"note: {text}", file=sys.stderr)


def _load(entry: Path, fresh: Callable[[dict], bool]) -> tuple[dict, dict[str, np.ndarray]] | None:
    """A whole and fresh entry, or None."""
    try:
        stored = json.loads((entry / "meta.json").read_text())
        meta, names = stored["meta"], stored["arrays"]
        if not fresh(meta):
            return None
        arrays = {name: np.asarray(np.load(entry / f"{name}.npy", mmap_mode="r")) for name in names}
        os.utime(entry / "meta.json")
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        return None
    # Pages that this process has mapped are shared with the workers that read them; others would be a worker's own.
    for array in arrays.values():
        array.reshape(-1).view(np.uint8)[:: mmap.PAGESIZE].max(initial=0)
    return meta, arrays


def _store(entry: Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Writes an entry that is whole or absent, and removes those that nobody has used for long."""
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}.", dir=entry.parent, ignore_cleanup_errors=True) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        for name, array in arrays.items():
            with open(new / f"{name}.npy", "wb") as file:
                np.save(file, array)
                os.fsync(file.fileno())
        (new / "meta.json").write_text(json.dumps({"meta": meta, "arrays": list(arrays)}))
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, old)
        os.rename(new, entry)
    for other in entry.parent.glob("index-*"):
        used = other / "meta.json" if (other / "meta.json").exists() else other
        with contextlib.suppress(OSError):
            if used.stat().st_mtime < time.time() - UNUSED_DAYS * 86_400:
                shutil.rmtree(other)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock `path` alone; the file is there only as long."""
    while True:
        file = open(path, "w")  # noqa: SIM115
        fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # who held it before has removed it, and whoever comes next makes another one
    try:
        yield
    finally:
        os.unlink(path)
        file.close()
