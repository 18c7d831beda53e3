"""Read images from files: all images below a folder, or the files that are named on a command line."""

import contextlib
import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from data.decode import is_image
from data.index import DataError, Names, StoredSource, cached, first_few

IMAGE_SUFFIXES = (  # files with these count as images; their content is not checked before a run reads them
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".jp2"),
    *(".npy", ".jpe", ".pbm", ".pnm", ".avif", ".tga"),
)
SIDECARS = (".txt", ".json", ".xml", ".csv")  # large data sets may have one beside each image; not checked for images
LITTER = re.compile(  # files of systems, browsers and editors; matches paths as bytes, those of folders ending in /
    rb"(?:^|/)(?:\..+|@eaDir|@Recycle|@Recently-Snapshot|#recycle|#snapshot|__MACOSX|\$RECYCLE\.BIN|RECYCLER"
    rb"|System Volume Information|lost\+found|FOUND\.\d{3}|(?:eh)?thumbs(?:_vista)?\.db|desktop\.ini"
    rb"|Network Trash Folder|Temporary Items)(?:/|$)"
    rb"|(?:~|\.(?:bak|tmp|part|partial|crdownload|download|thm|[^./]+_original))$",
    re.IGNORECASE,
)
# Names of splits, in order of preference
TRAINING = ("train", "training", "trainval")
HELD_OUT = ("val", "validation", "valid", "dev", "eval", "evaluation", "holdout", "test", "testing")
SPLIT = re.compile(rf"({'|'.join(TRAINING + HELD_OUT)})([-_ ]?(set|images?|data|\d{{4}}))?", re.IGNORECASE)
CACHED_FROM = 20_000  # images in a folder; smaller folders are scanned quickly
THREADS = 8  # for scanning: more help on network file systems, but slow each other down on local disks
CLOCK = 2 * 10**9  # nanoseconds: resolution of the coarsest file system clock (FAT); NFS and ext4 are finer
MAX_WORDS = 5  # of a command line that get an error message; the others are counted
PAUSES = (0.1, 1.0)  # seconds before reading a file is retried
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class FileSource(StoredSource):
    """Read files with the given names, relative to `root`, in this order."""

    def __init__(self, names: Names | Sequence[bytes], root: str | Path = ""):
        self.root = root
        self.classes: list[str] = []
        self.labels: np.ndarray | None = None  # (N,), int32
        self._names = names if isinstance(names, Names) else Names.from_list(names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def relative_names(self) -> list[bytes]:
        """The names of all files, relative to `root`."""
        return [self._names[index] for index in range(len(self))]

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def fetch(self, indices: Sequence[int]) -> list[bytes | OSError]:
        return [read_file(self.name(index)) for index in indices]

    def size_in_bytes(self) -> float:
        """Estimate the size of all images in bytes from at most 200 of them."""
        sizes = []
        for index in np.linspace(0, len(self) - 1, min(len(self), 200)).astype(int):
            with contextlib.suppress(OSError):
                sizes.append(os.stat(self.name(index)).st_size)
        return len(self) * sum(sizes) / max(1, len(sizes))

    def fingerprint(self) -> str:
        """Return digits that are equal for equal relative paths in the same order, wherever the folder is."""
        return self._names.digest()


class FolderSource(FileSource):
    """Read all images below a folder, in the order of the bytes of their relative paths.

    Images are the files with one of `suffixes`; by default, those with one of IMAGE_SUFFIXES, and others whose first
    bytes are those of an image. The topmost folder below `root` names the class of its images; images in `root` itself
    have no label. The index of a large folder is cached in the folder `cache` until a folder in it changes. Raises
    DataError for a folder that does not exist, cannot be read, or has no image.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...] | None = None, *, cache: Path | None = None):
        if os.path.isfile(root):
            expected = "expected a folder of images, a list (.csv, .jsonl), shards (.tar) or .parquet files"
            raise DataError(f"{root} is a file; {expected}; --data_format says what a file of another name is")
        if not os.path.isdir(root):
            hint = f"; did you mean hf:{root}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(root)) else ""
            raise DataError(f"{root} is not a folder; expected one of images, or other data that --help lists{hint}")
        key = f"folder {os.path.abspath(root)} {' '.join(suffixes or ['by content'])}"
        meta, arrays = cached(
            cache, key, fresh=is_fresh_index, build=partial(_index_folder, os.fsencode(root), suffixes)
        )
        super().__init__(Names(arrays["names"], arrays["ends"]), Path(root))
        self.classes, self.labels = meta["classes"], arrays.get("labels")
        count, text = meta["left_out"]
        self.notes = [f"left out   {count:,} below {root}: {text}"] if count else []


def choose_splits(names: Iterable[str]) -> tuple[str | None, str | None]:
    """Return the names of the training split and of the validation split, None for one that is missing.

    Case does not matter, and `set`, `images`, `data` or a year may follow: val, Valid, test_set, train2017.
    """
    names = list(names)
    return _likeliest(names, TRAINING), _likeliest(names, HELD_OUT)


def _likeliest(names: list[str], words: tuple[str, ...]) -> str | None:
    """Return the name that begins with the earliest of `words`, None if no name is one of them."""
    matches = [match for name in names if (match := SPLIT.fullmatch(name)) and match[1].lower() in words]
    ranked = sorted((words.index(match[1].lower()), match[0] not in words, match[0]) for match in matches)
    return ranked[0][2] if ranked else None


def find_splits(root: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the folders of "train" and, if there is one, "validation", and lines for the plan.

    They are in `root` or, as in ADE20K, in root/images (case does not matter). Without a training folder, `root` is it.
    """
    for base in (root, *sorted(path for path in root.glob("*") if path.name.lower() == "images")):
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            names = [entry.name for entry in entries if _is_folder(entry)]
            names = [name for name in names if not LITTER.search(os.fsencode(f"{name}/"))]
            train, held_out = choose_splits(names)
            if train:
                parts = {"train": base / train} | ({"validation": base / held_out} if held_out else {})
                unused = sorted({*names} - {train, held_out})
                notes = [f"not read   {first_few(unused, len(unused))} in {base}, beside {train}"] if unused else []
                return parts, notes + note_test(held_out)
    return {"train": root}, []


def note_test(held_out: str | None) -> list[str]:
    """Return a line for the plan if the test split is used for validation, as there is no other."""
    is_test = held_out is not None and held_out.lower().startswith("test")
    return [f"validation {held_out}, as there is no other split for it"] if is_test else []


def retry(read: Callable[[], bytes]) -> bytes | OSError:
    """Return the result or the error of `read`, which is retried after errors that may be temporary."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except OSError as error:
            if pause is None or isinstance(error, PERMANENT):
                return error
        time.sleep(pause)


def read_file(path: str) -> bytes | OSError:
    """Return a file's content, or the error from reading it."""

    def read() -> bytes:
        # O_NONBLOCK, because a named pipe would wait for a writer
        with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read() or b""  # an empty pipe gives None

    return retry(read)


def stamp(path: str | bytes) -> list[int]:
    """Return the modification time (ns) and size (bytes) of a file or folder, which change with its content."""
    stat = os.stat(path)
    return [stat.st_mtime_ns, stat.st_size]


def is_unchanged(meta: dict) -> bool:
    """Return True if all files and folders that an index was built from, meta["seen"], still have their stamps.

    A file that changed just before the start may have changed again within one tick of the file system's clock.
    """
    seen = meta["seen"]
    if max(changed for changed, _ in seen.values()) > meta["start"] - CLOCK:
        return False
    try:
        with ThreadPool(THREADS) as pool:
            return pool.map(stamp, seen) == list(seen.values())
    except OSError:
        return False


def is_fresh_index(meta: dict) -> bool:
    """Return True for an index of at least CACHED_FROM images that is unchanged."""
    return meta["count"] >= CACHED_FROM and is_unchanged(meta)


def _index_folder(root: bytes, suffixes: tuple[str, ...] | None) -> tuple[dict, dict[str, np.ndarray]]:
    """Build the index of all images below `root`, for `cached`. Raises DataError."""
    start, base = time.time_ns(), os.path.abspath(root)
    paths, folders, seen, left_out = [], [b""], {}, Counter()
    with ThreadPool(THREADS) as pool:
        while folders:  # all folders of one depth
            try:
                scanned = pool.map(partial(_scan, root, suffixes), folders)
            except OSError as error:
                path = os.fsdecode(error.filename)
                raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
            for folder, (time_and_size, _, images, others) in zip(folders, scanned, strict=True):
                seen[os.fsdecode(os.path.join(base, folder))] = time_and_size
                paths += images
                left_out += others
            folders = [folder for _, subfolders, *_ in scanned for folder in subfolders]
    if not paths:
        others = f" (left out: {_describe_left_out(left_out)})" if left_out else ""
        named = ", ".join(suffixes or IMAGE_SUFFIXES) + ("" if suffixes else ", or others that begin as images do")
        raise DataError(
            f"{os.fsdecode(root)} holds no image{others}; expected files named {named}; for tar shards or Parquet "
            "files give a pattern, such as 'FOLDER/*.tar'"
        )
    paths.sort()
    names, classes = Names.from_list(paths), []
    arrays = {"names": names.buffer, "ends": names.ends}
    if any(b"/" in path for path in paths):
        tops = [path.partition(b"/")[0] if b"/" in path else None for path in paths]
        classes = sorted({*tops} - {None})
        numbers = {name: number for number, name in enumerate(classes)}
        arrays["labels"] = np.array([numbers.get(top, -1) for top in tops], np.int32)
    meta = {"seen": seen, "start": start, "count": len(paths), "classes": [os.fsdecode(name) for name in classes]}
    return meta | {"left_out": [left_out.total(), _describe_left_out(left_out)]}, arrays


def _describe_left_out(left_out: Counter) -> str:
    """Return the most frequent kinds of files and folders that are left out, with their counts from `_scan`."""
    kinds = sorted(left_out, key=lambda kind: (-left_out[kind], kind))
    return first_few((f"{left_out[kind]:,} {kind}" for kind in kinds), len(kinds))


def _scan(root: bytes, suffixes: tuple[str, ...] | None, folder: bytes) -> tuple[list[int], list, list, Counter]:
    """Return a folder's stamp, its folders and images relative to `root`, and the counts of others by kind."""
    path, endings = os.path.join(root, folder), tuple(map(str.encode, suffixes or IMAGE_SUFFIXES))
    time_and_size, folders, images, left_out = stamp(path), [], [], Counter()
    with os.scandir(path) as entries:
        for entry in entries:
            is_folder = _is_folder(entry)
            if entry.name.lower().endswith(endings) and not entry.name.startswith(b".") and not is_folder:
                images.append(os.path.join(folder, entry.name))
                continue
            suffix = os.fsdecode(os.path.splitext(entry.name)[1].lower())
            if LITTER.search(entry.name + b"/" * is_folder):
                left_out["hidden" if entry.name.startswith(b".") else "system or temporary"] += 1
            elif is_folder:
                if not (entry.is_symlink() and _is_loop(entry.path)):
                    folders.append(os.path.join(folder, entry.name))
            elif suffixes is None and _begins_as_image(entry, suffix):
                images.append(os.path.join(folder, entry.name))
            else:
                left_out[f"{suffix or 'without suffix'} (no image)"] += 1
    return time_and_size, folders, images, left_out


def _is_folder(entry: os.DirEntry) -> bool:
    """Return True for a folder or a link to one, and False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _begins_as_image(entry: os.DirEntry, suffix: str) -> bool:
    """Return True if the first bytes of a file with an unknown suffix are those of an image."""
    with contextlib.suppress(OSError):
        if suffix not in SIDECARS and entry.is_file():
            with open(entry.path, "rb", 0) as file:
                return is_image(file.read(32), suffix)
    return False


def _is_loop(link: bytes) -> bool:
    """Return True if a link leads to a folder that contains the link."""
    link = Path(os.fsdecode(link))
    target = link.resolve()
    return any(folder.resolve().is_relative_to(target) for folder in link.parents)


def find_images(words: Sequence[str]) -> tuple[FileSource, list[str]]:
    """Return the images that words on a command line name, and error messages for words without images.

    A word is a file with any name; a folder, for all images below it, see FolderSource; or a pattern (* ? [...], and **
    for folders of any depth), for all its matches, sorted by bytes.
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
    if len(errors) > MAX_WORDS:
        errors[MAX_WORDS:] = [f"and {len(errors) - MAX_WORDS:,} more words like these"]
    return FileSource(paths), errors
