"""Data sets of the library `datasets`: on the Hub, written by save_to_disk, or in Parquet files.

Images, labels and masks stay in Arrow files that are mapped into memory, and nothing is decoded here. No code that
comes with a data set is ever run.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.files import FileSource
from data.index import DataError, Names, default_cache, first_few, number_labels, with_labels

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "hf:"
EXPECTED = f"expected {PREFIX}OWNER/NAME[:CONFIG][@REVISION]"
# What columns are called, the likeliest first
IMAGES = ("image", "img", "pixel_values", "jpg", "png")
LABELS = ("label", "labels", "fine_label", "class", "cls")
MASKS = ("mask", "annotation", "label", "segmentation", "seg_map", "labels")
HELD_OUT = ("validation", "val", "valid", "dev", "test")  # what a split to measure by is called, the likeliest first
NOTHING = "the row has neither bytes nor a path"
SAMPLED = 200  # files whose size is looked at
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


class EncodedColumn:
    """The encoded files in a column of a table: of binary, or of structs that have `bytes`, `path` or both.

    Kept are an address and a size a row, so that a file is found at once, however many chunks the column has.
    """

    def __init__(self, column: "pa.ChunkedArray"):
        import pyarrow as pa
        import pyarrow.compute as pc

        self.paths, self._column = None, column
        if pa.types.is_struct(column.type):
            fields = [field.name for field in column.type]
            if "path" in fields:
                self.paths = pc.struct_field(column, "path")
            nothing = pa.chunked_array([pa.nulls(len(column), pa.binary())])
            self._column = pc.struct_field(column, "bytes") if "bytes" in fields else nothing
        found = [_locate(chunk) for chunk in self._column.chunks if len(chunk)]
        self._addresses = np.concatenate([np.empty(0, np.int64), *(addresses for addresses, _ in found)])
        self.sizes = np.concatenate([np.empty(0, np.int64), *(sizes for _, sizes in found)])  # -1 where there is none

    def path(self, index: int) -> str | None:
        """Where the file lies, or lay."""
        return self.paths[index].as_py() if self.paths is not None else None

    def read(self, index: int) -> memoryview | bytes | OSError:
        """The encoded file, as a view of the table where it is in there, or why it could not be read."""
        import pyarrow as pa

        size = int(self.sizes[index])
        if size >= 0:
            return memoryview(pa.foreign_buffer(int(self._addresses[index]), size, base=self._column))
        path = self.path(index)
        return FileSource([os.fsencode(path)]).fetch([0])[0] if path else OSError(errno.ENODATA, NOTHING)

    def digest(self) -> str:
        """Equal for files of equal names and sizes in the same order, wherever they lie."""
        import pyarrow.compute as pc

        digest = hashlib.sha256(self.sizes.tobytes())
        if self.paths is not None:
            names = pc.replace_substring_regex(self.paths, "^.*/", "")  # folders differ between machines
            digest.update(Names.from_arrow(names).digest().encode())
        return digest.hexdigest()[:16]

    def size_in_bytes(self) -> float:
        """What all files take, about for those that are not in the table."""
        outside = np.flatnonzero(self.sizes < 0)
        sizes = [0]
        for row in outside[:: max(1, len(outside) // SAMPLED)]:
            with contextlib.suppress(OSError, TypeError):  # no such file, no path
                sizes.append(os.stat(self.path(int(row))).st_size)
        return float(self.sizes[self.sizes > 0].sum()) + len(outside) * sum(sizes) / max(1, len(sizes) - 1)


def _locate(array: "pa.Array") -> tuple[np.ndarray, np.ndarray]:
    """The address in memory and the size in bytes of every value of an array of binary; size -1 for null."""
    import pyarrow as pa

    dtype = np.int64 if pa.types.is_large_binary(array.type) else np.int32
    _, offsets, values = array.buffers()
    ends = np.frombuffer(offsets, dtype)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    sizes = np.diff(ends)
    if ends[0] < 0 or sizes.min() < 0 or ends[-1] > (values.size if values else 0):  # which Arrow does not look at
        raise DataError("damaged Arrow data: values that lie elsewhere; write or download them again")
    if array.null_count:
        sizes[array.is_null().to_numpy(zero_copy_only=False)] = -1
    return ends[:-1] + (values.address if values else 0), sizes


class ArrowSource:
    """Samples that are rows: images in the column `image`, and where named labels in `label` and masks in `mask`.

    `table` is a pyarrow Table, or the Arrow files that make one, which another process maps itself. `name` stands in
    messages. Labels that are numbers have the names `classes`, where these are given. Labels are left out where some
    are hidden (-1 or null). Raises DataError.
    """

    def __init__(
        self,
        table: "pa.Table | Sequence[str | Path]",
        *,
        name: str,
        image: str,
        label: str | None = None,
        mask: str | None = None,
        classes: Sequence[str] = (),
    ):
        self._table, self._name, self._columns = table, name, [image, mask]
        table = self._open()
        self.labels, self.classes = None, []
        if label is not None:
            self.labels, self.classes = _labels(table[label], list(classes), name)

    def _open(self) -> "pa.Table":
        table = map_files(self._table) if isinstance(self._table, list | tuple) else self._table
        image, mask = self._columns
        self._images = EncodedColumn(table[image])
        self._masks = EncodedColumn(table[mask]) if mask else None
        if not len(self):
            raise DataError(f"{self._name} holds no image; expected a row for each")
        return table

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_images", "_masks")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        self._open()

    def __len__(self) -> int:
        return len(self._images.sizes)

    @property
    def has_masks(self) -> bool:
        """Whether there is a mask for every image."""
        return self._masks is not None

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: files are read when they are wanted."""

    def name(self, index: int) -> str:
        """The row, and the name of the file that the image was."""
        path = self._images.path(index)
        return f"{self._name}/{index}" + (f" ({path})" if path else "")

    def mask_name(self, index: int) -> str:
        """The row, and the name of the file that the mask was."""
        return f"{self._name}/{index} (mask{f' {path}' if (path := self._masks.path(index)) else ''})"

    def fetch(self, indices: Sequence[int]) -> list[memoryview | bytes | OSError]:
        """The encoded images, or why one could not be read."""
        return [self._images.read(int(index)) for index in indices]

    def fetch_masks(self, indices: Sequence[int]) -> list[memoryview | bytes | OSError]:
        """The encoded masks, or why one could not be read."""
        return [self._masks.read(int(index)) for index in indices]

    def size_in_bytes(self) -> float:
        """What all images and masks take."""
        return sum(column.size_in_bytes() for column in (self._images, self._masks) if column)

    def fingerprint(self) -> str:
        """Equal for equal labels and images and masks of equal names and sizes in the same order, wherever they lie."""
        masks = self._masks.digest() if self._masks else None
        return with_labels(self._images.digest(), self.labels, self.classes, masks)


def _labels(column: "pa.ChunkedArray", classes: list[str], name: str) -> tuple[np.ndarray | None, list[str]]:
    """The class of every row, int32, and the classes' names; None and [] where labels are hidden."""
    import pyarrow as pa

    if pa.types.is_integer(column.type):
        numbers = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        if -1 in numbers:
            return None, []
        if classes and not 0 <= numbers.min() <= numbers.max() < len(classes):
            wrong = numbers[(numbers < 0) | (numbers >= len(classes))][0]
            raise DataError(
                f"{name} has the label {wrong}; expected 0 to {len(classes) - 1}, as it names {len(classes)}"
            )
        if classes:
            return numbers.astype(np.int32), classes
    try:
        return number_labels(column, where=lambda row: f"row {row}")
    except DataError as error:
        raise DataError("\n".join(f"{name} has {line}" for line in str(error).splitlines())) from None


def map_files(files: Sequence[str | Path]) -> "pa.Table":
    """The table in Arrow files (streams), mapped into memory. Raises DataError for one that is missing or cut."""
    import pyarrow as pa

    if missing := [str(file) for file in files if not os.path.isfile(file)]:
        raise DataError(f"{first_few(missing, len(missing))}: no such file; expected {len(files)}; write them again")
    tables = []
    for file in files:
        try:
            mapped = pa.memory_map(str(file))
            whole = mapped.size() > len(END) and mapped.read_at(len(END), mapped.size() - len(END)) == END
            tables.append(pa.ipc.open_stream(mapped).read_all() if whole else None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"{file} cannot be read ({_line(error)}); expected an Arrow stream; write it again"
            ) from None
        if not whole:
            raise DataError(f"{file} is cut, or no Arrow stream; write or download it again")
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise DataError(f"{files[0]} and those beside it differ in their columns ({_line(error)})") from None


class Columns(NamedTuple):
    """ArrowSource's arguments."""

    image: str
    label: str | None
    mask: str | None
    classes: list[str]


def choose_columns(schema: "pa.Schema", name: str) -> Columns:
    """Which columns hold images, labels and masks, by their types and names. Raises DataError where that is unclear."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [field.name for field in schema if kinds.get(field.name) == "Image" and _is_encoded(field.type)]
    images = images or [field.name for field in schema if _is_encoded(field.type)]
    image = _named(IMAGES, images) or _only([column for column in images if column not in MASKS])
    if image is None:
        types = {field.name: kinds.get(field.name, "Value") for field in schema}
        types |= {field.name: field.type for field in schema if types[field.name] == "Value"}
        described = ", ".join(f"{column} ({kind})" for column, kind in types.items())
        raise DataError(
            f"{name} has the columns {described}; expected one of images called {', '.join(IMAGES[:-1])} or "
            f"{IMAGES[-1]}, or a single one: rename it"
        )
    labels = [field.name for field in schema if _is_label(field.type)]
    label = _named(LABELS, labels) or _only([column for column in labels if kinds.get(column) == "ClassLabel"])
    mask = _named(MASKS, [column for column in images if column != image])
    classes = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return Columns(image, label, mask, classes or [])


def _named(names: Sequence[str], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _only(columns: list[str]) -> str | None:
    return columns[0] if len(columns) == 1 else None


def _is_encoded(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and _is_encoded(fields["bytes"])
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def open_datasets(path: str | Path, *, cache: Path | None = None) -> dict[str, ArrowSource]:
    """The sources "train" and, where there is one, "validation" of a data set of the library `datasets`.

    `path` is hf:OWNER/NAME[:CONFIG][@REVISION]; a folder that save_to_disk wrote; a folder of Parquet files, or such
    files by name or pattern. Held out is the first split of HELD_OUT. What `datasets` converts goes to its own cache,
    or to `cache` where that is not the default. Raises DataError.
    """
    path = str(path)
    if path.startswith(PREFIX):
        splits = _from_hub(path, cache)
    elif any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        splits = _from_disk(Path(path))
    else:
        splits = _from_parquet(path, cache)
    return {
        part: ArrowSource(files, name=f"{path}/{split}", **choose_columns(map_files(files).schema, path)._asdict())
        for part, (split, files) in _parts(splits, path).items()
    }


def _parts(splits: dict[str, list[str]], path: str) -> dict[str, tuple[str, list[str]]]:
    """The split, and its files, for "train" and for "validation"."""
    splits = {name: files for name, files in splits.items() if files}
    train = "train" if "train" in splits else _only([*splits])
    if train is None:
        names = ", ".join(splits) or "no splits"
        raise DataError(f"{path} has {names}; expected a split called train, or a single one")
    held_out = _named(HELD_OUT, [name for name in splits if name != train])
    chosen = {"train": train} | ({"validation": held_out} if held_out else {})
    return {part: (split, splits[split]) for part, split in chosen.items()}


def _from_disk(folder: Path) -> dict[str, list[str]]:
    """The Arrow files of each split that save_to_disk wrote."""
    folders = {"train": folder}
    try:
        if (folder / "dataset_dict.json").is_file():
            names = json.loads((folder / "dataset_dict.json").read_text())["splits"]
            folders = {name: folder / name for name in names}
        states = {name: json.loads((split / "state.json").read_text()) for name, split in folders.items()}
        return {
            name: [str(folders[name] / file["filename"]) for file in state["_data_files"]]
            for name, state in states.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {_line(error)}"
        raise DataError(f"{folder} is not as save_to_disk writes it ({what}); write it again") from None


def _from_parquet(path: str, cache: Path | None) -> dict[str, list[str]]:
    """Converts Parquet files, whose splits are told by their names and folders."""
    if os.path.isdir(path):
        found = sorted(Path(path).rglob("*.parquet"), key=os.fsencode)
        files = {str(file): _split(file.relative_to(path)) for file in found}
        if any(files.values()):  # where names tell splits, a file that has none is something else
            files = {file: split for file, split in files.items() if split}
    else:
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True), key=os.fsencode)
        files = dict.fromkeys(found)
    if not files:
        raise DataError(f"{path} holds no Parquet file; expected files named .parquet, or what save_to_disk writes")
    splits: dict[str, list[str]] = {}
    for file, split in files.items():
        splits.setdefault(split or "train", []).append(file)
    chosen = {split: files for split, files in _parts(splits, path).values()}
    for file in (file for files in chosen.values() for file in files):
        _check_parquet(file)
    chosen = {split: [glob.escape(os.path.abspath(file)) for file in files] for split, files in chosen.items()}
    with _clear_errors(path):
        return _load("parquet", cache, data_files=chosen)


def _check_parquet(file: str) -> None:
    """Raises DataError for a file that is damaged or has no column of images, before anything is converted."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is cut, or no Parquet file ({_line(error)}); write or download it again") from None
    choose_columns(schema, file)


def _split(path: Path) -> str | None:
    """The split that the name of a file, or else of a folder that holds it, tells."""
    for part in reversed(path.parts):
        for split in ("train", *HELD_OUT):
            if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", part.lower()):
                return split
    return None


def _from_hub(path: str, cache: Path | None) -> dict[str, list[str]]:
    """Downloads and converts a data set; without a network, what is in the cache is used."""
    from huggingface_hub import HfApi, errors, utils

    name, _, revision = path.removeprefix(PREFIX).partition("@")
    repository, _, config = name.partition(":")
    if repository.count("/") != 1:
        raise DataError(f"{path}: no name of a data set; {EXPECTED}; correct it")
    if os.path.exists(repository):  # which `datasets` would take instead
        raise DataError(
            f"{path}: {repository} is a folder here, which would be read instead; start elsewhere, or give "
            f"{os.path.abspath(repository)} if you mean that"
        )
    try:
        utils.validate_repo_id(repository)
        HfApi().auth_check(repository, repo_type="dataset")
        commit = HfApi().dataset_info(repository, revision=revision or None).sha
    except errors.HFValidationError as error:
        raise DataError(f"{path}: no name that the Hub has ({_line(error)}); {EXPECTED}; correct it") from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{path}: its owner has to let you in first; ask on its page on the Hub, then log in with hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{path}: has no revision {revision}; expected a branch, tag or commit; correct it") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{path}: no such data set, or a private one; correct the name, or log in with hf auth login (and make "
            "sure that your token has not expired)"
        ) from error
    except errors.HfHubHTTPError as error:
        why = _line(error)
        raise DataError(f"{path}: the Hub refuses it ({why}); try again, or log in with hf auth login") from error
    except (errors.HTTPError, OSError):
        commit = None  # no network
    with _clear_errors(path, offline=commit is None):
        splits = _load(repository, cache, offline=commit is None, name=config or None, revision=commit)
    files = [file for files in splits.values() for file in files]
    if commit is None and revision and not all(revision in Path(file).parts for file in files):
        raise DataError(
            f"{path}: the Hub cannot be reached, and the cache holds {Path(files[0]).parent.name}; connect, or give it"
        )
    return splits


@contextlib.contextmanager
def _clear_errors(path: str, *, offline: bool = False) -> Iterator[None]:
    """Turns what `datasets` raises into DataError."""
    try:
        yield
    except ImportError as error:
        raise DataError(f"{path} is read by the library datasets, which is missing; pip install datasets") from error
    except Exception as error:  # of nearly any type
        text = str(error)
        if "Config name is missing" in text or text.startswith("BuilderConfig"):
            choices = ", ".join(re.findall(r"'([^']*)'", text[text.find("[") : text.find("]")]))
            message = f"{path}: name one of its configurations, {choices}; {EXPECTED}"
        elif offline:
            message = f"{path}: the Hub cannot be reached, and it is not in the cache; connect, or give a local path"
        else:
            message = (
                f"{path}: could not be loaded ({_line(error.__cause__ or error)}); try again, or look at its files"
            )
        raise DataError(message) from error


def _load(kind: str, cache: Path | None, *, offline: bool = False, **options) -> dict[str, list[str]]:
    """The Arrow files of each split, as `datasets` converts them."""
    import datasets

    place = str(cache / "datasets") if cache and cache != default_cache() else None
    with _silence(), contextlib.ExitStack() as stack:
        if offline:  # else it would try for a minute, and say so
            stack.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
            datasets.config.HF_HUB_OFFLINE = True
        splits = datasets.load_dataset(kind, cache_dir=place, keep_in_memory=False, **options)
    return {name: [file["filename"] for file in split.cache_files] for name, split in splits.items() if len(split)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without the messages of the libraries, as an error that follows says it, and without their bars."""
    import datasets
    import huggingface_hub

    loggers = [datasets.logging, huggingface_hub.logging]
    verbosities, silent = [each.get_verbosity() for each in loggers], datasets.are_progress_bars_disabled()
    for each in loggers:
        each.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for each, verbosity in zip(loggers, verbosities, strict=True):
            each.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
