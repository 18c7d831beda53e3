"""Read data sets with the library `datasets`: from the Hub, from a folder of save_to_disk, or from Parquet files.

Images, labels and masks stay in memory-mapped Arrow files and are not decoded here. Code that comes with a data set is
never run.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.files import choose_splits, note_test, read_file
from data.index import DataError, Names, StoredSource, default_cache, number_labels, with_labels

PREFIX = "hf:"
NAME = re.compile(r"hf:([^/:@]+/[^/:@]+)(?::([^@]+))?(?:@(.+))?")
# Names of columns, in order of preference
IMAGE_COLUMNS = ("image", "img", "pixel_values", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
MASK_COLUMNS = ("mask", "annotation", "label", "segmentation", "seg_map", "labels")
END = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream

logging.getLogger("datasets.packaged_modules.parquet.parquet").disabled = True  # it also logs the errors that it raises


class EncodedColumn:
    """A column of encoded files: binary values, or structs with `bytes` and perhaps `path`."""

    def __init__(self, column: pa.ChunkedArray):
        self.paths, self.files = None, column
        if pa.types.is_struct(column.type):
            self.files = pc.struct_field(column, "bytes")
            if "path" in [field.name for field in column.type]:
                self.paths = pc.struct_field(column, "path")
        self.sizes = pc.binary_length(self.files).cast(pa.int64()).fill_null(-1).to_numpy()  # -1: outside the table

    def path(self, index: int) -> str | None:
        return self.paths[index].as_py() if self.paths is not None else None

    def read(self, index: int) -> memoryview | bytes | OSError:
        """Return the encoded file, or the error in reading it."""
        file = self.files[index]
        if file.is_valid:
            return memoryview(file.as_buffer())
        path = self.path(index)
        return read_file(path) if path else OSError(errno.ENODATA, "the row has neither bytes nor a path")

    def digest(self) -> str:
        """Return digits that are equal for equal file names and sizes in the same order, in any folder."""
        digest = hashlib.sha256(self.sizes.tobytes())
        if self.paths is not None:
            names = pc.replace_substring_regex(self.paths, "^.*/", "")  # folders differ between machines
            digest.update(Names.from_arrow(names).digest().encode())
        return digest.hexdigest()[:16]

    def size_in_bytes(self) -> float:
        """Return the size of all files in bytes, estimated for those outside the table."""
        outside, sizes = np.flatnonzero(self.sizes < 0), []
        for row in outside[:: max(1, len(outside) // 200)]:
            with contextlib.suppress(OSError, TypeError):  # no such file, no path
                sizes.append(os.stat(self.path(int(row))).st_size)
        return float(self.sizes.clip(0).sum()) + len(outside) * sum(sizes) / max(1, len(sizes))


class Columns(NamedTuple):
    """The names of a table's columns for images, labels and masks, and the class names of labels that are numbers."""

    image: str
    label: str | None = None
    mask: str | None = None
    classes: Sequence[str] = ()


class ArrowSource(StoredSource):
    """Read the rows of a table as samples: a pyarrow Table, or Arrow files, which each process maps itself.

    `name` names the data set in messages; `fingerprint` replaces the fingerprint of the table. Raises DataError for
    damaged or empty tables.
    """

    def __init__(
        self, table: pa.Table | Sequence[str | Path], name: str, columns: Columns, fingerprint: str | None = None
    ):
        self._arguments = table, name, columns, fingerprint
        self._table = table = map_files(table) if isinstance(table, list | tuple) else table
        try:  # wrong offsets would crash the process
            table.select([column for column in columns[:3] if column]).validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{name} has damaged Arrow data ({_one_line(error)}); write or download it again") from None
        self._name, self._fingerprint, self.has_masks = name, fingerprint, columns.mask is not None
        self._images = EncodedColumn(table[columns.image])
        self._masks = EncodedColumn(table[columns.mask]) if columns.mask else None
        if not len(self):
            raise DataError(f"{name} holds no image; expected a row for each")
        self.labels, self.classes, self.label_errors = _read_labels(table, columns, name)
        kind = table.schema.field(columns.label).type if columns.label else None
        # Earlier versions did not read float and boolean labels; their pre-training runs must keep their fingerprints
        is_new = kind is not None and (pa.types.is_floating(kind) or pa.types.is_boolean(kind))
        self._counted_labels = None if is_new else self.labels

    def __reduce__(self):  # other processes map the files themselves
        return ArrowSource, self._arguments

    def __len__(self) -> int:
        return len(self._images.sizes)

    def name(self, index: int) -> str:
        path = self._images.path(index)
        return f"{self._name}/{index}" + (f" ({path})" if path else "")

    def mask_name(self, index: int) -> str:
        return f"{self._name}/{index} (mask{f' {path}' if (path := self._masks.path(index)) else ''})"

    @property
    def column_names(self) -> list[str]:
        """Return the names of the table's columns."""
        return self._table.column_names

    def read_columns(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Return columns of the table, with one value per image. Raises DataError if they are damaged."""
        table = self._table.select(list(names))
        try:
            table.validate(full=True)
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._name} has damaged Arrow data ({_one_line(error)}); write it again") from None
        return {name: table[name] for name in names}

    @property
    def title(self) -> str:
        """Return the name of the table in messages."""
        return self._name

    def names_in_lists(self, column: str) -> list[str]:
        """Return the class names for a column with lists of class numbers, [] if the table states none."""
        feature = _read_features(self._table.schema).get(column) or {}
        inner = feature[0] if isinstance(feature, list) else feature.get("feature") or {}
        return list(inner.get("names") or [])

    def fetch(self, indices: Sequence[int]) -> list[memoryview | bytes | OSError]:
        return [self._images.read(int(index)) for index in indices]

    def fetch_masks(self, indices: Sequence[int]) -> list[memoryview | bytes | OSError]:
        return [self._masks.read(int(index)) for index in indices]

    def size_in_bytes(self) -> float:
        return sum(column.size_in_bytes() for column in (self._images, self._masks) if column)

    def fingerprint(self) -> str:
        """Return digits that are equal for equal labels, and equal file names and sizes in the same order.

        The folder does not matter, nor do float or boolean labels, see `with_labels`.
        """
        masks = self._masks.digest() if self._masks else None
        return self._fingerprint or with_labels(self._images.digest(), self._counted_labels, self.classes, masks)


def _read_labels(table: pa.Table, columns: Columns, name: str) -> tuple[np.ndarray | None, list[str], list[str]]:
    """Return the class of each row, the names of the classes, and error messages, as `number_labels` does."""
    if columns.label is None:
        return None, [], []
    column, classes = table[columns.label], list(columns.classes)
    labels, own_classes, errors = number_labels(column, lambda row: f"row {row}", name)
    if labels is None or not classes or not pa.types.is_integer(column.type):
        return labels, own_classes, errors
    if labels.max() >= len(classes):
        text = f"{name} has the label {labels.max()}; expected 0 to {len(classes) - 1}, as it names the classes"
        return None, [], [text]
    return labels, classes, []


def map_files(files: Sequence[str | Path]) -> pa.Table:
    """Map files in Arrow's stream format into memory as one table. Raises DataError for missing or truncated files."""
    tables = []
    for file in files:
        try:
            mapped = pa.memory_map(str(file))
            if mapped.size() <= len(END) or mapped.read_at(len(END), mapped.size() - len(END)) != END:
                raise ValueError("it is truncated or not an Arrow stream")
            tables.append(pa.ipc.open_stream(mapped).read_all())
        except (pa.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({_one_line(error)}); write or download it again") from None
    return pa.concat_tables(tables)


def choose_columns(schema: pa.Schema, name: str) -> Columns:
    """Choose the columns of images, labels and masks by type and name. Raises DataError if no image column is clear."""
    features = _read_features(schema)
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    images = [field.name for field in schema if kinds.get(field.name) == "Image" and _is_encoded(field.type)]
    images = images or [field.name for field in schema if _is_encoded(field.type)]
    image = _first_of(IMAGE_COLUMNS, images) or _single([column for column in images if column not in MASK_COLUMNS])
    if image is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        expected = f"expected one of images called {', '.join(IMAGE_COLUMNS)}, or a single one"
        raise DataError(f"{name} has the columns {columns}; {expected}; rename it")
    labels = [field.name for field in schema if _is_label(field.type)]
    label = _first_of(LABEL_COLUMNS, labels) or _single(
        [column for column in labels if kinds.get(column) == "ClassLabel"]
    )
    mask = _first_of(MASK_COLUMNS, [column for column in images if column != image])
    classes = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    return Columns(image, label, mask, classes or [])


def _read_features(schema: pa.Schema) -> dict:
    """Return the features that `datasets` stored in a table's schema, {} for tables of other programs."""
    return json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})


def _first_of(names: Sequence[str], columns: list[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _single(columns: list[str]) -> str | None:
    return columns[0] if len(columns) == 1 else None


def _is_encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        return "bytes" in fields and _is_encoded(fields["bytes"])
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    kinds = ("integer", "floating", "boolean", "string", "large_string")
    return any(getattr(pa.types, f"is_{name}")(kind) for name in kinds)


def holds_images(path: Path) -> bool:
    """Return True if a Parquet file has a column of images (see `choose_columns`) or cannot be read."""
    import pyarrow.parquet as pq

    try:
        return bool(choose_columns(pq.read_schema(path), str(path)))
    except DataError:
        return False
    except (pa.ArrowException, OSError):
        return True  # loading it reports the error


def open_datasets(path: str | Path, *, cache: Path | None = None) -> dict[str, ArrowSource]:
    """Open the sources "train" and, if there is one (see `choose_splits`), "validation" of a data set.

    `path` is hf:OWNER/NAME[:CONFIG][@REVISION]; a folder that save_to_disk wrote; or Parquet files, given by folder,
    name or pattern. Converted data is stored in `cache`/datasets or, if `cache` is None or the default cache, in the
    cache of `datasets`. Raises DataError.
    """
    path = str(path)
    try:
        loaded = _load(path, str(cache / "datasets") if cache and cache != default_cache() else None)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises nearly any type
        reason = _one_line(error.__cause__ or error)
        remedy = "correct the path, or get its files again"
        if os.path.isdir(path):
            remedy += "; for images beside them give --data_format folder"
        raise DataError(f"{path}: could not be loaded ({reason}); {remedy}") from error
    splits = {name: [file["filename"] for file in split.cache_files] for name, split in loaded.items() if len(split)}
    train, held_out = choose_splits(splits)
    train = train or _single([*splits])
    if train is None:
        names = ", ".join(splits) or "no splits"
        raise DataError(f"{path} has {names}; expected a split called train, or a single one")
    sources = {
        part: ArrowSource(splits[name], f"{path}/{name}", choose_columns(map_files(splits[name]).schema, path))
        for part, name in (("train", train), ("validation", held_out if held_out != train else None))
        if name
    }
    sources["train"].notes = note_test(held_out) if len(sources) > 1 else []
    return sources


def _load(path: str, cache: str | None) -> dict:
    """Return the splits of a data set: name -> `datasets.Dataset`. Raises DataError and the errors of `datasets`."""
    import datasets

    if path.startswith(PREFIX):
        return _load_from_hub(path, cache)
    if any(os.path.isfile(os.path.join(path, name)) for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(path)
        return saved if isinstance(saved, dict) else {"train": saved}
    name = glob.escape(os.path.abspath(path)) if os.path.exists(path) else os.path.abspath(path)
    place = {"data_dir": name} if os.path.isdir(path) else {"data_files": name}
    return datasets.load_dataset("parquet", cache_dir=cache, keep_in_memory=False, **place)


def _load_from_hub(path: str, cache: str | None) -> dict:
    """Download and convert a data set, or load it from the cache without a network. Raises as `_load` does."""
    import datasets
    from huggingface_hub import HfApi, errors

    match = NAME.fullmatch(path)
    if not match:
        raise DataError(f"{path}: not a data set name; expected {PREFIX}OWNER/NAME[:CONFIG][@REVISION]; correct it")
    repository, config, revision = match.groups()
    try:
        HfApi().auth_check(repository, repo_type="dataset")
        commit = HfApi().dataset_info(repository, revision=revision).sha
    except errors.HfHubHTTPError as error:  # no such data set or revision, or no access
        remedy = "correct the name, or log in with hf auth login; for a gated data set request access on its page"
        raise DataError(f"{path}: the Hub refuses it ({_one_line(error)}); {remedy}") from error
    except (errors.HTTPError, OSError):
        commit = None  # no network
    was_offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = was_offline or commit is None  # otherwise `datasets` would retry for a minute
    try:
        splits = datasets.load_dataset(repository, config, revision=commit, cache_dir=cache, keep_in_memory=False)
    except ConnectionError as error:
        reason = "the Hub cannot be reached, and it is not in the cache; connect, or give a local path"
        raise DataError(f"{path}: {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
    folders = {Path(file["filename"]).parent for split in splits.values() for file in split.cache_files}
    if commit is None and revision and not all(revision in folder.parts for folder in folders):
        raise DataError(f"{path}: the Hub cannot be reached, and the cache holds {folders.pop().name}; connect")
    return splits


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
