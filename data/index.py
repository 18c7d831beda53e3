"""Names and labels of a data set in flat arrays that processes share, and a cache for indices."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

FORMAT = 3  # version of cache entries; others are ignored
TAG = "CACHEDIR.TAG"  # marks cache entries of this project (https://bford.info/cachedir/)
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# an index of masked-autoencoders\n"
REAL_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
CLASS_NUMBER = re.compile(r"0*([0-9]{1,6})(\.0*)?")  # pandas writes 3.0 where a column has gaps
NO_LABEL = re.compile(r"|-1(\.0*)?|nan", re.IGNORECASE)


class DataError(ValueError):
    """Report data that cannot be used, one line per problem: what is wrong, what was expected, what to do."""


class StoredSource:
    """Base class of sources, with the defaults of data without labels."""

    labels: np.ndarray | None = None  # (N,), indices of `classes`, -1 without a label; None if no sample has one
    label_errors: Sequence[str] = ()  # reasons why the labels cannot be used; `labels` is then None
    notes: Sequence[str] = ()  # lines for the plan

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        pass


class Names:
    """N byte strings, concatenated in `buffer` (M,), uint8; string i ends before byte `ends[i]`, (N,), int64.

    There is no Python object per string, so worker processes share all of them without copies.
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray):
        self.buffer, self.ends = buffer, ends

    @classmethod
    def from_list(cls, names: Sequence[bytes]) -> "Names":
        """Copy a list of byte strings."""
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(np.frombuffer(b"".join(names), dtype=np.uint8), ends)

    @classmethod
    def from_arrow(cls, texts) -> "Names":
        """Copy a pyarrow Array or ChunkedArray of strings or bytes; null becomes empty."""
        import pyarrow as pa

        texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
        texts = texts.cast(pa.large_binary()).fill_null(b"")
        _, offsets, buffer = texts.buffers()
        if not len(texts):
            return cls.from_list([])
        offsets = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        buffer = np.frombuffer(buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
        return cls(buffer.copy(), offsets[1:] - offsets[0])

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.buffer[start : self.ends[index]].tobytes()

    def digest(self) -> str:
        """Return 16 hexadecimal digits that are equal for equal names in the same order."""
        digest = hashlib.sha256(np.ascontiguousarray(self.buffer))
        digest.update(np.ascontiguousarray(self.ends))
        return digest.hexdigest()[:16]


def with_labels(images: str, labels: np.ndarray | None, classes: Sequence[str], masks: str | None) -> str:
    """Return the fingerprint of a data set from its labels and the fingerprints of its images and masks.

    Without labels and masks, it is that of the images. Labels are ignored if some images have none: earlier versions
    did not read them, and pre-training runs on such data must be able to resume.
    """
    labels = None if labels is not None and labels.min() < 0 else labels
    if labels is None and masks is None:
        return images
    masks = Names.from_list([]).digest() if masks is None else masks
    numbers = b"" if labels is None else labels.tobytes() + "\n".join(classes).encode()
    return hashlib.sha256(f"{images} {masks} ".encode() + numbers).hexdigest()[:16]


def first_few(words: Iterable[str], count: int) -> str:
    """Return the first three of `count` words and the number of the others: "a, b, c and 4 more"."""
    first = list(islice(words, 3))
    return ", ".join(first) + (f" and {count - len(first):,} more" if count > len(first) else "")


def number_labels(texts, where: Callable[[int], str], source: str) -> tuple[np.ndarray | None, list[str], list[str]]:
    """Return the class of every sample (N,) int32, the names of the classes, and error messages.

    If all labels are whole numbers from 0, they are the classes, whose names are the numbers from 0 to the largest. If
    none is a number, classes are numbered in the byte order of their names. Samples without a label, or with -1 or nan
    (in any case), get -1. Other numbers, numbers mixed with names, and text that is not UTF-8 are errors. With errors,
    or if no sample has a label, the first two results are None and [].

    `texts` is a pyarrow Array or ChunkedArray of strings or numbers. For messages, `where` returns the place of a
    sample, such as "line 7", and `source` is the name of the data set.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = pc.utf8_trim_whitespace(texts.cast(pa.large_string()).fill_null(""))
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    encoded = texts.dictionary_encode()
    codes, values = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()

    def places(chosen: np.ndarray) -> str:
        rows = np.flatnonzero(chosen[codes])
        return first_few((f"{where(int(row))}: {values[codes[row]]!r}" for row in rows), len(rows))

    none = np.array([bool(NO_LABEL.fullmatch(value)) for value in values], dtype=bool)
    number = ~none & np.array([bool(REAL_NUMBER.fullmatch(value)) for value in values], dtype=bool)
    unfit = number & np.array([not CLASS_NUMBER.fullmatch(value) for value in values], dtype=bool)
    garbled = np.array(["\ufffd" in value for value in values], dtype=bool)
    errors = []
    if unfit.any():
        errors.append(f"has labels that are not class numbers ({places(unfit)}); expected 0 to 999999, or names")
    if garbled.any():
        errors.append(f"has labels that are not text ({places(garbled)}); expected UTF-8")
    name = ~(number | none | garbled)
    fit = number & ~unfit
    if fit.any() and name.any():
        errors.append(
            f"has labels that are numbers ({places(fit)}) and labels that are names ({places(name)}); "
            "expected one kind; change the less frequent one"
        )
    if errors or none.all():
        return None, [], [f"{source} {error}" for error in errors]
    if number.any():
        numbers = [-1 if none[code] else int(CLASS_NUMBER.fullmatch(value)[1]) for code, value in enumerate(values)]
        return np.array(numbers, dtype=np.int32)[codes], [str(number) for number in range(max(numbers) + 1)], []
    classes = sorted((value for value in values if not NO_LABEL.fullmatch(value)), key=str.encode)
    rank = {name: number for number, name in enumerate(classes)}
    return np.array([rank.get(value, -1) for value in values], dtype=np.int32)[codes], classes, []


def default_cache() -> Path:
    """Return the default folder for cached indices."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "masked-autoencoders").expanduser()
    except RuntimeError:  # the user has no home, as in containers
        return Path(tempfile.gettempdir(), f"masked-autoencoders-{os.getuid()}")


def check_cache(cache: str | Path) -> None:
    """Create the folder `cache` if needed. Raises DataError if it is not writable."""
    try:
        os.makedirs(cache, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise DataError(f"{cache} cannot hold a cache ({error.strerror}); give another --cache_dir") from None


def cached(
    cache: Path | None,
    key: str,
    *,
    fresh: Callable[[dict], bool],
    build: Callable[[], tuple[dict, dict[str, np.ndarray]]],
) -> tuple[dict, dict[str, np.ndarray]]:
    """Return the result of `build()`, from the folder `cache` if it was built before.

    The result is a dict for JSON and arrays by name. Cached arrays are memory-mapped and read-only, so processes share
    them. One process builds while the others wait. `key` identifies the result. `fresh(dict)` returns True if a result
    is valid; a new result that is not valid is not stored. If `cache` is None or not writable, each call builds.
    """
    if cache is None:
        return build()
    entry = cache / f"index-{hashlib.sha256(f'{FORMAT} {key}'.encode(errors='surrogateescape')).hexdigest()[:32]}"
    with contextlib.ExitStack() as stack:
        try:
            check_cache(cache)
            if result := _load(entry, fresh):
                return result
            lock = stack.enter_context(open(entry.with_suffix(".lock"), "a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except (DataError, OSError) as error:  # also a file system without locks
            print(f"note: {cache}: nothing is cached ({error})", file=sys.stderr)
            return build()
        if result := _load(entry, fresh):  # another process has built it meanwhile
            return result
        meta, arrays = build()
        if fresh(meta):
            try:
                _store(entry, meta, arrays)
            except OSError as error:
                print(f"note: {cache}: nothing is cached ({error})", file=sys.stderr)
        return meta, arrays


def _load(entry: Path, fresh: Callable[[dict], bool]) -> tuple[dict, dict[str, np.ndarray]] | None:
    """Load an entry; return None if it is absent, damaged or not fresh."""
    try:
        stored = json.loads((entry / "meta.json").read_text())
        if fresh(stored["meta"]):
            return stored["meta"], {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in stored["arrays"]}
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        pass
    return None


def _store(entry: Path, meta: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write an entry in place of an older one. Raises OSError if its path is not a cache entry."""
    if entry.exists() and not ((entry / TAG).is_file() and (entry / TAG).read_text() == SIGNATURE):
        raise FileExistsError(errno.EEXIST, "not an index of this project", str(entry))
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}.", dir=entry.parent) as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        for name, array in arrays.items():
            write_array(new / f"{name}.npy", array)
        (new / TAG).write_text(SIGNATURE)
        (new / "meta.json").write_text(json.dumps({"meta": meta, "arrays": list(arrays)}))
        with contextlib.suppress(FileNotFoundError):
            os.rename(entry, old)
        os.rename(new, entry)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file and sync it to the disk."""
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
