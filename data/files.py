"""Samples that are files: all images below a folder, those that a list names, or those that a user's words mean."""

import contextlib
import csv
import errno
import glob
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.index import DataError, Names, cached, first_few, number_labels, with_labels

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".jp2"),
    *(".npy", ".jpe", ".pbm", ".pnm"),
)
COLUMNS = {"path": "a path", "label": "a whole number from 0, or a name", "mask": "a path"}
CACHED_FROM = 20_000  # samples: fewer are found at once
CHECKED = 100_000  # paths of a list, at most: looking at millions would take minutes on a slow file system
THREADS = 8  # that look at folders and files: over a network they wait; on a local disk they hinder each other
CLOCK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system in use (FAT); NFS and ext4 have finer ones
PAUSES = (0.1, 1.0)  # seconds before a file is tried again that could not be read
OF_THE_PATH = {
    getattr(errno, name) for name in ["ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "ELOOP"]
}


class FileSource:
    """Files in the order in which they are listed, whatever their names, which are relative to `root`."""

    def __init__(self, names: Names | Sequence[bytes], root: str | Path = ""):
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None  # (N,), int32
        self._names = names if isinstance(names, Names) else Names.from_list(names)

    def __len__(self) -> int:
        return len(self._names)

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: files are read when they are wanted."""

    def name(self, index: int) -> str:
        """The path of an image."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def fetch(self, indices: Sequence[int]) -> list[bytes | OSError]:
        """The encoded images, or why one could not be read."""
        return [read_file(self.name(index)) for index in indices]

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
        return self._names.digest()


class FolderSource(FileSource):
    """All images below a folder, those files named `suffixes`, ordered by the bytes of their relative paths.

    Where each lies in a folder of its own below `root`, that folder's name is its class; otherwise `labels` is None.
    What has been found is kept in the folder `cache`, and used until one of the folders changes. Raises DataError for a
    folder that does not exist, cannot be read, or holds no image.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...] = SUFFIXES, *, cache: Path | None = None):
        if not os.path.isdir(root):
            raise DataError(_no_folder(os.fspath(root)))
        key = f"folder {os.path.abspath(root)} {' '.join(suffixes)}"
        meta, arrays = cached(cache, key, fresh=_holds_still, build=partial(_find, os.fsencode(root), suffixes))
        super().__init__(Names(arrays["names"], arrays["ends"]), Path(root))
        self.classes, self.labels = meta["classes"], arrays.get("labels")


class ListSource(FileSource):
    """The images that a list names, in its order: NAME.csv whose header has `path`, or JSONL with that key.

    Paths are absolute, or relative to the list's folder. The list may have a `label` for every image (whole numbers
    from 0, or names) and a `mask`, a path; other columns are passed over. What has been read is kept in the folder
    `cache`, and used until the list changes. With `check`, some paths are looked at. Raises DataError for a list that
    cannot be read or lists nothing, and for what it lists that cannot be used.
    """

    def __init__(self, path: str | Path, *, cache: Path | None = None, check: bool = True):
        path = os.fspath(path)
        build = partial(_index_list, path)
        meta, arrays = cached(cache, f"list {os.path.abspath(path)}", fresh=_holds_still, build=build)
        super().__init__(Names(arrays["names"], arrays["ends"]), os.path.dirname(path))
        self.classes, self.labels = meta["classes"], arrays.get("labels")
        self.has_masks = "masks" in arrays
        self._masks = Names(arrays["masks"], arrays["mask_ends"]) if self.has_masks else Names.from_list([])
        for what, named in (("path", self.name), ("mask", self.mask_name))[: self.has_masks + 1] if check else ():
            _expect_files(path, what, named, len(self))

    def mask_name(self, index: int) -> str:
        """The path of an image's mask."""
        return os.path.join(self.root, os.fsdecode(self._masks[index]))

    def fetch_masks(self, indices: Sequence[int]) -> list[bytes | OSError]:
        """The encoded masks, or why one could not be read."""
        return [read_file(self.mask_name(index)) for index in indices]

    def fingerprint(self) -> str:
        """Equal for two lists of the same paths, masks and labels; without these two, that of a folder's images."""
        masks = self._masks.digest() if self.has_masks else None
        return with_labels(super().fingerprint(), self.labels, self.classes, masks)


def _no_folder(path: str) -> str:
    """What is wrong with a path that was to be a folder, in one line."""
    if os.path.exists(path):
        return f"{path} is a file; expected a folder of images, a list (.csv, .jsonl), shards (.tar) or .parquet files"
    hint = f"; did you mean hf:{path}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else ""
    return f"{path} is no folder; expected one of images, or another form of data that --help lists{hint}"


def read_file(path: str) -> bytes | OSError:
    """A file's content, or why it cannot be read; what may be a file system's bad moment is tried again."""
    for pause in (*PAUSES, None):
        try:
            with open(path, "rb", buffering=0, opener=_open) as file:
                return file.read() or b""  # None: a pipe
        except OSError as error:
            if pause is None or error.errno in OF_THE_PATH:
                return error
        time.sleep(pause)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that is named as an image would be waited for


def _in_threads(function: Callable, items: Sequence) -> list:
    """[function(item) for item in items]."""
    parts = [items[start : start + 64] for start in range(0, len(items), 64)]
    with ThreadPoolExecutor(THREADS) as pool:
        return [result for part in pool.map(lambda part: [function(item) for item in part], parts) for result in part]


def _stamp(path: str | bytes) -> list[int]:
    """What changes with a file, or with the names in a folder."""
    stat = os.stat(path)
    return [stat.st_mtime_ns, stat.st_size]


def _holds_still(meta: dict) -> bool:
    """Whether an index is worth keeping, and the files and folders `seen` for it are as they were.

    One that changed just before may have changed again since, within the same tick of the file system's clock.
    """
    seen = meta["seen"]
    if meta["count"] < CACHED_FROM or max(changed for changed, _ in seen.values()) > meta["start"] - CLOCK:
        return False
    try:
        return _in_threads(_stamp, list(seen)) == list(seen.values())
    except OSError:
        return False


class _Run(NamedTuple):
    """Images that follow each other in one folder."""

    folder: bytes  # relative
    paths: bytes  # relative, one after the other
    lengths: np.ndarray  # (n,), int64


def _find(root: bytes, suffixes: tuple[str, ...]) -> tuple[dict, dict[str, np.ndarray]]:
    """The index of all images below `root`, for `cached`. Raises DataError."""
    start, base = time.time_ns(), os.path.abspath(root)
    known, folders, seen = {}, [b""], {}  # known: what each folder holds, in order
    endings = frozenset(map(str.encode, suffixes))
    with ThreadPoolExecutor(THREADS) as pool:
        while folders:  # of one depth
            try:
                scanned = list(pool.map(partial(_scan, root, endings), folders))
            except OSError as error:
                where = os.fsdecode(error.filename)
                raise DataError(f"{where} cannot be read ({error.strerror}); check its permissions") from None
            known |= {folder: parts for folder, (_, parts) in zip(folders, scanned, strict=True)}
            seen |= {os.fsdecode(os.path.join(base, f)): stamp for f, (stamp, _) in zip(folders, scanned, strict=True)}
            folders = [part for _, parts in scanned for part in parts if isinstance(part, bytes)]
    runs, waiting = [], [b""]
    while waiting:
        part = waiting.pop()
        if isinstance(part, bytes):
            waiting += reversed(known.pop(part))
        else:
            runs.append(part)
    if not runs:
        expected = f"expected files named {', '.join(suffixes)}{_other_data(root)}"
        raise DataError(f"{os.fsdecode(root)} holds no image; {expected}")
    lengths = np.concatenate([run.lengths for run in runs])
    arrays = {"names": np.frombuffer(b"".join(run.paths for run in runs), np.uint8), "ends": np.cumsum(lengths)}
    classes = []
    if all(run.folder for run in runs):
        tops = [run.folder.partition(b"/")[0] for run in runs]
        classes = sorted(set(tops))
        numbers = {name: number for number, name in enumerate(classes)}
        numbers = np.array([numbers[top] for top in tops], dtype=np.int32)
        arrays["labels"] = np.repeat(numbers, [len(run.lengths) for run in runs])
    meta = {"seen": seen, "start": start, "count": len(lengths), "classes": [os.fsdecode(name) for name in classes]}
    return meta, arrays


def _other_data(root: bytes) -> str:
    """What to give instead of a folder that holds data of another kind; "" where it does not."""
    if glob.glob(os.path.join(glob.escape(root), b"*.tar")):
        return "; of tar shards give a pattern, 'FOLDER/*.tar'"
    if tables := glob.glob(os.path.join(glob.escape(root), b"*", b"*.parquet")):
        return f"; of Parquet files give '{os.fsdecode(os.path.dirname(min(tables)))}'"
    return ""


def _scan(root: bytes, endings: frozenset[bytes], folder: bytes) -> tuple[list[int], list[bytes | _Run]]:
    """The stamp of a folder, and what it holds in the order of bytes: folders, and images between them.

    Hidden files and folders are passed over. A folder sorts by its name with "/", as the paths below it do.
    """
    here, names = os.path.join(root, folder), []
    stamp = _stamp(here)
    with os.scandir(here) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and _leads_back(root, folder, entry.path)):
                    names.append(name + b"/")
            elif name[name.rfind(b".") :].lower() in endings:
                names.append(name)
    names.sort()
    prefix, parts = os.path.join(folder, b""), []
    for are_folders, group in groupby(names, key=lambda name: name.endswith(b"/")):
        paths = [prefix + name for name in group]
        if are_folders:
            parts += [path[:-1] for path in paths]
        else:
            parts.append(_Run(folder, b"".join(paths), np.array([len(path) for path in paths], dtype=np.int64)))
    return stamp, parts


def _leads_back(root: bytes, folder: bytes, link: bytes) -> bool:
    """Whether a link in `folder` leads to a folder that holds one of those on the way to it, so that the walk would go
    in circles."""
    target = os.path.join(os.path.realpath(link), b"")
    way = [root]
    for name in folder.split(b"/"):
        way.append(os.path.join(way[-1], name))
    return any(os.path.join(os.path.realpath(passed), b"").startswith(target) for passed in way)


def _index_list(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The index of a list, for `cached`. Raises DataError."""
    import pyarrow as pa

    start = time.time_ns()
    try:
        seen = {os.path.abspath(path): _stamp(path)}
        columns = _read_columns(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); expected a list of images") from None
    count = len(columns["path"])
    if not count:
        raise DataError(f"{path} lists no image; expected a path in every line, below a header in CSV")
    if columns["path"].null_count == count:
        names = ", ".join(next(_rows(path))[1]) or "nothing"
        raise DataError(f"{path} has no `path`, but {names}; expected path, and perhaps label and mask")

    def where(row: int) -> str:
        line, _ = next(islice(_rows(path), row, None), (f"of row {row + 1}", None))
        return f"line {line}"

    arrays, classes = {}, []
    for column, buffer, ends in (("path", "names", "ends"), ("mask", "masks", "mask_ends")):
        texts = columns[column]
        if texts.null_count < count:
            _expect_paths(path, column, texts, where)
            names = Names.from_arrow(texts)
            arrays |= {buffer: names.buffer, ends: names.ends}
    if columns["label"].null_count < count:
        try:
            arrays["labels"], classes = number_labels(columns["label"], where)
        except DataError as error:
            raise DataError("\n".join(f"{path} has {fault}" for fault in str(error).splitlines())) from None
    del columns, texts
    pa.default_memory_pool().release_unused()  # several times what the index takes
    return {"seen": seen, "start": start, "count": count, "classes": classes}, arrays


def _read_columns(path: str) -> dict:
    """The columns path, label and mask of a list, each a pyarrow ChunkedArray of texts (numbers from JSON may be
    integers), which is null where a row has no such thing. Raises OSError, DataError."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.json

    types = dict.fromkeys(COLUMNS, pa.large_string())
    try:
        if not _is_json(path):
            written = {name.strip(): name for name in _header(path)}
            columns = [written.get(name, name) for name in types]
            options = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.large_string()),
                include_columns=columns,
                include_missing_columns=True,
                strings_can_be_null=False,
            )
            table = pa.csv.read_csv(path, pa.csv.ReadOptions(block_size=2**24), convert_options=options)
            table = table.rename_columns(list(types))
        else:
            try:
                table = _read_json(path, types)
            except pa.ArrowInvalid:
                table = _read_json(path, types | {"label": pa.int64()})
            table.validate(full=True)  # UTF-8
    except (pa.ArrowException, csv.Error):
        # What Arrow does not take is read more patiently: it is told where it goes wrong, if it does.
        rows = [row for _, row in _rows(path)]
        columns = {name: [row.get(name) for row in rows] for name in types}
        return {name: pa.chunked_array([pa.array(texts, pa.large_string())]) for name, texts in columns.items()}
    return {name: table[name] for name in types}


def _header(path: str) -> list[str]:
    """The names of a CSV's columns, as they are written."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        return next(filter(None, csv.reader(file)), [])


def _is_json(path: str) -> bool:
    return not path.lower().endswith(".csv")


def _read_json(path: str, types: dict):
    import pyarrow as pa

    options = pa.json.ParseOptions(explicit_schema=pa.schema(types), unexpected_field_behavior="ignore")
    return pa.json.read_json(path, pa.json.ReadOptions(block_size=2**24), options)


def _rows(path: str) -> Iterator[tuple[int, dict]]:
    """The rows of a list with the numbers of their lines. Raises DataError at the first that is not as it must be."""
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")

    try:
        if _is_json(path):
            for line in lines():
                if line.strip():
                    yield number, _checked(json.loads(line))
        else:
            rows = filter(None, csv.reader(lines(), strict=True))
            header = [name.strip() for name in next(rows, [])]
            for row in rows:
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields below a header of {len(header)}")
                yield number, dict(zip(header, row, strict=True))
    except (ValueError, csv.Error, RecursionError) as error:
        form = "a JSON object in every line" if _is_json(path) else "CSV with a header"
        expected = "" if isinstance(error, DataError) else f"; expected {form}, in UTF-8"
        raise DataError(f"{path}, line {number}: {error}{expected}; correct the line") from None


def _checked(row: object) -> dict:
    """A row of JSON, its label as text. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("no object")
    texts = {column: row.get(column) for column in COLUMNS}
    if type(texts["label"]) is int:
        texts["label"] = str(texts["label"])
    for column, text in texts.items():
        if not isinstance(text, str | None):
            raise DataError(f"{column} is {json.dumps(text)}; expected {COLUMNS[column]}")
        (text or "").encode()  # half a surrogate pair is no text either
    return row | {column: text for column, text in texts.items() if column in row}


def _expect_paths(path: str, column: str, texts, where: Callable[[int], str]) -> None:
    """Raises DataError where there are rows in which a column holds nothing that may be a path."""
    import pyarrow.compute as pc

    texts = texts.fill_null("")
    rows = np.flatnonzero(pc.or_(pc.equal(pc.binary_length(texts), 0), pc.match_substring(texts, "\0")).to_numpy())
    if len(rows):
        places = first_few((where(int(row)) for row in rows), len(rows))
        raise DataError(f"{path} has no {column} in {places}; expected one in every row; correct these or remove them")


def _expect_files(path: str, column: str, name: Callable[[int], str], count: int) -> None:
    """Raises DataError where files that a list names are not there."""
    rows = range(count) if count <= CHECKED else np.linspace(0, count - 1, CHECKED).astype(int)
    there = _in_threads(lambda row: os.path.isfile(name(row)), rows)
    missing = [row for row, is_there in zip(rows, there, strict=True) if not is_there]
    if missing:
        looked_at = f"{count:,}" if count <= CHECKED else f"the {CHECKED:,} that were looked at, of {count:,},"
        places = first_few(map(name, missing), len(missing))
        raise DataError(
            f"{path}: {len(missing):,} of {looked_at} are no files, column {column}: {places}; expected paths that are "
            "absolute, or relative to the list's folder; correct the list"
        )


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
