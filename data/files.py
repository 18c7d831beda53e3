"""Read samples that are files: all images below a folder, the images of a list, or files named on a command line."""

import contextlib
import csv
import glob
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from data.index import DataError, Names, StoredSource, cached, first_few, number_labels, with_labels

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".jp2"),
    *(".npy", ".jpe", ".pbm", ".pnm"),
)
COLUMNS = ["path", "label", "mask"]  # of a list
LONGEST_LINE = 2**25  # bytes of a line of JSON
CACHED_FROM = 20_000  # images of a folder; fewer are found quickly
CHECKED = 100_000  # paths of a list at most: on a slow file system, millions would take minutes
THREADS = 8  # that scan folders and files: on a network they wait, on a local disk more would slow each other down
CLOCK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system (FAT); those of NFS and ext4 are finer
PAUSES = (0.1, 1.0)  # seconds before reading a file is retried
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class FileSource(StoredSource):
    """Read files in the order of their names, which are relative to `root`."""

    def __init__(self, names: Names | Sequence[bytes], root: str | Path = ""):
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None  # (N,), int32
        self._names = names if isinstance(names, Names) else Names.from_list(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def fetch(self, indices: Sequence[int]) -> list[bytes | OSError]:
        return [read_file(self.name(index)) for index in indices]

    def size_in_bytes(self) -> float:
        """Estimate the size of all images from at most 200 of them."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, min(len(self), 200)).astype(int):
            with contextlib.suppress(OSError):
                sizes.append(os.stat(self.name(index)).st_size)
        return len(self) * sum(sizes) / max(1, len(sizes))

    def fingerprint(self) -> str:
        """Return digits equal for equal relative paths in the same order, wherever the folder is."""
        return self._names.digest()


class FolderSource(FileSource):
    """Read all images below a folder, files named `suffixes`, in the order of the bytes of their relative paths.

    If each image is in a folder below `root`, the topmost of these names its class; otherwise `labels` is None. The
    index is cached in the folder `cache` until one of the folders changes. Raises DataError for a folder that does not
    exist, cannot be read, or has no image.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...] = SUFFIXES, *, cache: Path | None = None):
        if os.path.isfile(root):
            expected = "expected a folder of images, a list (.csv, .jsonl), shards (.tar) or .parquet files"
            raise DataError(f"{root} is a file; {expected}")
        if not os.path.isdir(root):
            hint = f"; did you mean hf:{root}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)) else ""
            raise DataError(f"{root} is no folder; expected one of images, or other data that --help lists{hint}")
        key = f"folder {os.path.abspath(root)} {' '.join(suffixes)}"
        meta, arrays = cached(cache, key, fresh=_is_fresh, build=partial(_index_folder, os.fsencode(root), suffixes))
        super().__init__(Names(arrays["names"], arrays["ends"]), Path(root))
        self.classes, self.labels = meta["classes"], arrays.get("labels")


class ListSource(FileSource):
    """Read the images of a list, in its order: a CSV file with a column `path`, or JSON lines with that key.

    Paths are absolute, or relative to the list's folder. The list may have a `label` for every image (whole numbers
    from 0, or names) and a `mask`, a path; other columns are ignored. Raises DataError for a list that cannot be read
    or is empty, and for missing files.
    """

    def __init__(self, path: str | Path):
        path = os.fspath(path)
        table = _read_list(path)
        if table["path"].null_count == len(table):
            names = ", ".join(_column_names(path)) or "(unknown)"
            expected = "expected `path` in every row, and perhaps `label` and `mask`"
            raise DataError(f"{path} lists no image in its columns {names}; {expected}")
        super().__init__(Names.from_arrow(table["path"]), os.path.dirname(path))
        if table["label"].null_count < len(table):
            self.labels, self.classes = number_labels(table["label"], lambda row: f"row {row + 1}", path)
        self.has_masks = table["mask"].null_count < len(table)
        self._masks = FileSource(Names.from_arrow(table["mask"]) if self.has_masks else [], self.root)
        self.mask_name, self.fetch_masks = self._masks.name, self._masks.fetch
        _check_files(path, "path", self)
        _check_files(path, "mask", self._masks)

    def fingerprint(self) -> str:
        """Return digits equal for equal paths, masks and labels; with paths alone, equal to a folder's."""
        masks = self._masks.fingerprint() if self.has_masks else None
        return with_labels(super().fingerprint(), self.labels, self.classes, masks)


def retry(read: Callable[[], bytes]) -> bytes | OSError:
    """Return the result or the error of `read`, which is called again after errors that may be temporary."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is None or isinstance(error, PERMANENT):
                return error
        time.sleep(pause)


def read_file(path: str) -> bytes | OSError:
    """Return a file's content, or the error in reading it."""

    def read() -> bytes:
        # O_NONBLOCK, as a named pipe would wait for a writer
        with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read() or b""  # an empty pipe gives None

    return retry(read)


def stamp(path: str | bytes) -> list[int]:
    """Return the time and size of a file or folder, which change with its content."""
    stat = os.stat(path)
    return [stat.st_mtime_ns, stat.st_size]


def is_unchanged(meta: dict) -> bool:
    """Return True if all that was `seen` for an index still has its stamp.

    A file that changed just before may have changed again within the same tick of the file system's clock.
    """
    seen = meta["seen"]
    if max(changed for changed, _ in seen.values()) > meta["start"] - CLOCK:
        return False
    try:
        with ThreadPool(THREADS) as pool:
            return pool.map(stamp, seen) == list(seen.values())
    except OSError:
        return False


def _is_fresh(meta: dict) -> bool:
    return meta["count"] >= CACHED_FROM and is_unchanged(meta)


def _index_folder(root: bytes, suffixes: tuple[str, ...]) -> tuple[dict, dict[str, np.ndarray]]:
    """Build the index of all images below `root` for `cached`. Raises DataError."""
    start, base = time.time_ns(), os.path.abspath(root)
    paths, folders, seen = [], [b""], {}
    with ThreadPool(THREADS) as pool:
        while folders:  # of one depth
            try:
                scanned = pool.map(partial(_scan, root, suffixes), folders)
            except OSError as error:
                path = os.fsdecode(error.filename)
                raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
            for folder, (time_and_size, _, images) in zip(folders, scanned, strict=True):
                seen[os.fsdecode(os.path.join(base, folder))] = time_and_size
                paths += images
            folders = [folder for _, subfolders, _ in scanned for folder in subfolders]
    if not paths:
        raise DataError(
            f"{os.fsdecode(root)} holds no image; expected files named {', '.join(suffixes)}; for tar shards or "
            "Parquet files give a pattern, such as 'FOLDER/*.tar'"
        )
    paths.sort()
    names, classes = Names.from_list(paths), []
    arrays = {"names": names.buffer, "ends": names.ends}
    if all(b"/" in path for path in paths):
        tops = [path.partition(b"/")[0] for path in paths]
        classes = sorted(set(tops))
        numbers = {name: number for number, name in enumerate(classes)}
        arrays["labels"] = np.array([numbers[top] for top in tops], np.int32)
    meta = {"seen": seen, "start": start, "count": len(paths), "classes": [os.fsdecode(name) for name in classes]}
    return meta, arrays


def _scan(root: bytes, suffixes: tuple[str, ...], folder: bytes) -> tuple[list[int], list[bytes], list[bytes]]:
    """Return the stamp of a folder, and its folders and images, relative to `root`; hidden ones are ignored."""
    path, endings = os.path.join(root, folder), tuple(map(str.encode, suffixes))
    time_and_size, folders, images = stamp(path), [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and _is_loop(entry.path)):
                    folders.append(os.path.join(folder, entry.name))
            elif entry.name.lower().endswith(endings):
                images.append(os.path.join(folder, entry.name))
    return time_and_size, folders, images


def _is_loop(link: bytes) -> bool:
    """Return True if a link leads to a folder that contains one on the way to it."""
    link = Path(os.fsdecode(link))
    target = link.resolve()
    return any(folder.resolve().is_relative_to(target) for folder in link.parents)


def _read_list(path: str):
    """Return the columns path, label and mask of a list as a pyarrow Table, null where absent. Raises DataError."""
    import pyarrow as pa  # here, because it takes long to import
    import pyarrow.csv as arrow_csv
    import pyarrow.json as arrow_json

    text, errors = pa.large_string(), []
    try:
        if path.lower().endswith(".csv"):
            names = {name.strip(): name for name in _column_names(path)}
            columns = [names.get(name, name) for name in COLUMNS]
            convert = arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, text), include_columns=columns, include_missing_columns=True
            )
            table = arrow_csv.read_csv(path, None, arrow_csv.ParseOptions(newlines_in_values=True), convert)
            return table.rename_columns(COLUMNS)
        for label in (pa.int64(), text):
            schema = pa.schema({"path": text, "label": label, "mask": text})
            parse = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            try:
                return arrow_json.read_json(path, arrow_json.ReadOptions(block_size=LONGEST_LINE), parse)
            except pa.ArrowInvalid as error:
                errors.append(error)
        raise next((error for error in errors if "Column(/label)" not in str(error)), errors[0])
    except (OSError, ValueError, csv.Error) as error:
        expected = "expected CSV with a header, or a JSON object in every line, in UTF-8; correct the list"
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); {expected}") from None


def _column_names(path: str) -> list[str]:
    """Return the names in the header of CSV, or the keys in the first line of JSON."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        if path.lower().endswith(".csv"):
            return next(filter(None, csv.reader(file)), [])
        with contextlib.suppress(ValueError):  # an object in several lines, or several in one
            return list(json.loads(next(filter(str.strip, file))))
        return []


def _check_files(path: str, column: str, source: FileSource) -> None:
    """Raise DataError if paths of a list are empty, or if files, at most CHECKED of them, do not exist."""
    if len(empty := np.flatnonzero(np.diff(source._names.ends, prepend=0) == 0)):
        places = first_few((f"row {row + 1}" for row in empty), len(empty))
        raise DataError(f"{path} has no {column} in {places}; expected one in every row; correct or remove these")
    rows = np.linspace(0, len(source) - 1, min(len(source), CHECKED)).astype(int)
    with ThreadPool(THREADS) as pool:
        exist = pool.map(lambda row: os.path.isfile(source.name(row)), rows)
    missing = [row for row, exists in zip(rows, exist, strict=True) if not exists]
    if missing:
        files = first_few(map(source.name, missing), len(missing))
        raise DataError(
            f"{path}: {len(missing):,} of {len(rows):,} checked files in the column {column} do not exist: {files}; "
            "expected paths that are absolute, or relative to the list's folder; correct the list"
        )


def find_images(words: Sequence[str]) -> tuple[FileSource, list[str]]:
    """Return the files that words on a command line name, and error messages, one per word.

    A word is a file with any name; a folder, for all images below it, see FolderSource; or a pattern (* ? [...], and **
    for folders of any depth), for all matches in the order of their bytes, each file once.
    """
    paths, errors = [], []
    for word in words:
        images, error = set(), f"{word!r}: no such file or folder; expected images; correct the path"
        if glob.has_magic(word):
            error = f"{word} matches no image; correct the pattern"
        for match in [word] if os.path.exists(word) else glob.iglob(word, recursive=True):
            if os.path.isfile(match):
                images.add(os.fsencode(match))
                continue
            try:
                source = FolderSource(match)
                images |= {os.fsencode(source.name(index)) for index in range(len(source))}
            except DataError as no_images:
                error = str(no_images)
        paths += sorted(images)
        errors += [] if images else [error]
    return FileSource(paths), errors
