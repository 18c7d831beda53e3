"""Read the samples in a list: a table of paths, and perhaps labels and masks, in CSV or JSON lines."""

import contextlib
import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np

from data.files import THREADS, FileSource
from data.index import DataError, Names, first_few, number_labels, with_labels
from data.values import text_encoding

JSON = (".jsonl", ".ndjson")
LISTS = (".csv", ".tsv", *JSON)
COLUMNS = ["path", "label", "mask"]
LONGEST_LINE = 2**25  # bytes of a JSON object
CHECKED = 100_000  # maximum number of paths: on a slow file system, millions would take minutes
SOME_TEXT = re.compile(r"\S")
BACKSLASH = "\\"  # separates folders in paths from Windows


class ListSource(FileSource):
    """Read the images of a list in its order: a CSV file with a column `path`, or JSON lines with that key.

    Paths are absolute, relative to the list's folder, or begin with ~/. The list may have columns `label` (whole
    numbers from 0, or names) and `mask` (paths); others are ignored. Raises DataError for a list that cannot be read or
    is empty, and for missing images.
    """

    def __init__(self, path: str | Path):
        self._path = path = os.fspath(path)
        table, self.label_errors = _read_list(path)
        if table["path"].null_count == len(table):
            names = ", ".join(_read_header(path)[0]) or "(unknown)"
            expected = "expected `path` in every row, and perhaps `label` and `mask`"
            raise DataError(f"{path} lists no image in its columns {names}; {expected}")
        super().__init__(Names.from_arrow(table["path"]), os.path.dirname(path))
        if not self.label_errors:
            labels = number_labels(table["label"], lambda row: f"row {row + 1}", path)
            self.labels, self.classes, self.label_errors = labels
        masks = Names.from_arrow(table["mask"])
        self._masks = FileSource(masks if len(masks.buffer) else [], self.root)
        self.mask_name, self.fetch_masks = self._masks.name, self._masks.fetch
        _check_files(path, "path", self)

    def read_columns(self, names: Sequence[str]) -> dict:
        """Return columns as pyarrow arrays of text or lists, with one value per image. Raises DataError."""
        with _readable(self._path):
            if not self._path.lower().endswith(JSON):
                table = _read_csv(self._path, names)
                return {name: table[name] for name in names}
            rows = _read_objects(self._path)
            return {name: _to_arrow([row.get(name) for row in rows]) for name in names}

    @property
    def column_names(self) -> list[str]:
        """The names of the list's columns."""
        if self._path.lower().endswith(JSON):
            return list(dict.fromkeys(name for row in _read_objects(self._path) for name in row))
        return [name.strip() for name in _read_header(self._path)[0]]

    @property
    def title(self) -> str:
        """The name of the list in messages."""
        return self._path

    @cached_property
    def has_masks(self) -> bool:
        """Return True if all images have masks. Raises DataError if only some have, or if files are missing."""
        _check_files(self._path, "mask", self._masks)
        return len(self._masks) > 0

    def fingerprint(self) -> str:
        """Return digits that are equal for equal paths, masks and labels; for paths alone, those of a folder."""
        masks = self._masks.fingerprint() if len(self._masks) else None
        return with_labels(super().fingerprint(), self.labels, self.classes, masks)


def _read_list(path: str) -> tuple:
    """Return a list's columns path, label and mask as a pyarrow Table, null if absent, and error messages for labels.

    Raises DataError.
    """
    import pyarrow.compute as pc  # here, because it takes long to import

    with _readable(path):
        table, errors = _read_json(path) if path.lower().endswith(JSON) else (_read_csv(path), [])
    for name in ("path", "mask"):
        expanded = pc.replace_substring_regex(table[name], "^~/", os.path.expanduser("~/"))
        table = table.set_column(table.column_names.index(name), name, expanded)
    return table, errors


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn the errors that libraries raise while they read a list into DataError."""
    try:
        yield
    except (OSError, ValueError, csv.Error) as error:
        expected = "expected CSV with a header, or a JSON object in every line, in UTF-8; correct the list"
        raise DataError(f"{path} cannot be read ({' '.join(str(error).split())}); {expected}") from None


def _read_csv(path: str, targets: Sequence[str] = ()):
    """Return COLUMNS and the columns `targets` of a table with commas, tabs or semicolons between its cells."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as arrow_csv

    header, delimiter = _read_header(path)
    names = {name.strip().lower(): name for name in header}
    names |= {name.strip(): name for name in header if name.strip() not in COLUMNS}
    result_names = [*COLUMNS, *(name for name in targets if name not in COLUMNS)]
    columns = [names.get(name, name) for name in result_names]
    parse = arrow_csv.ParseOptions(
        delimiter=delimiter,
        newlines_in_values=True,
        invalid_row_handler=lambda row: "error" if row.text.strip(" \t,;") else "skip",
    )
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.large_string()), include_columns=columns, include_missing_columns=True
    )
    table = arrow_csv.read_csv(_as_utf8(path), None, parse, convert)
    table = pa.table([pc.utf8_trim_whitespace(column) for column in table.columns], result_names)
    filled = [pc.greater(pc.utf8_length(table[name].fill_null("")), 0) for name in COLUMNS]
    return table.filter(pc.or_(pc.or_(*filled[:2]), filled[2]))  # spreadsheets end in rows of commas


def _read_json(path: str) -> tuple:
    """Return the columns of a list of JSON objects, and error messages for labels, which are then null."""
    import pyarrow as pa
    import pyarrow.json as arrow_json

    text, errors = pa.large_string(), []
    for label in (pa.int64(), pa.float64(), pa.bool_(), text, None):
        schema = pa.schema({"path": text, "label": label, "mask": text} if label else {"path": text, "mask": text})
        parse = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
        try:
            table = arrow_json.read_json(_as_utf8(path), arrow_json.ReadOptions(block_size=LONGEST_LINE), parse)
            return (table, []) if label else (table.append_column("label", pa.nulls(len(table), text)), errors[:1])
        except pa.ArrowInvalid as error:
            errors.append(f"{path} has labels that cannot be read ({' '.join(str(error).split())})")
            if label is None:
                raise


def _read_objects(path: str) -> list[dict]:
    """Return the objects of a list in JSON; a line may have several."""
    text, decoder, rows, position = Path(path).read_text(_encoding(path)), json.JSONDecoder(), [], 0
    while start := SOME_TEXT.search(text, position):
        row, position = decoder.raw_decode(text, start.start())
        rows.append(row)
    return rows


def _to_arrow(values: list):
    """Return JSON values as a pyarrow array: of lists if all are lists or null, otherwise of text."""
    import pyarrow as pa

    known = [value for value in values if value is not None]
    if known and all(isinstance(value, list) for value in known):
        return pa.chunked_array([pa.array(values)])
    texts = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def _encoding(path: str) -> str:
    with open(path, "rb") as file:
        return text_encoding(file.read(2))


def _as_utf8(path: str):
    """Return the path of a list, or its content in UTF-8 if it is in UTF-16, which PowerShell writes."""
    import pyarrow as pa

    return path if _encoding(path) != "utf-16" else pa.BufferReader(Path(path).read_text("utf-16").encode())


def _read_header(path: str) -> tuple[list[str], str]:
    """Return the names in a CSV header and their delimiter, or the keys in the first line of JSON and ""."""
    with open(path, encoding=_encoding(path), errors="replace") as file:
        line = next(filter(str.strip, file), "")
        if path.lower().endswith(JSON):
            with contextlib.suppress(ValueError):  # an object in several lines, or several in one
                return list(json.loads(line)), ""
            return [], ""
        delimiter = max(",\t;", key=line.count)
        delimiter = delimiter if delimiter in line else "\x1f"  # one column, whose paths may have commas
        file.seek(0)
        return next(filter(None, csv.reader(file, delimiter=delimiter)), []), delimiter


def _check_files(path: str, column: str, source: FileSource) -> None:
    """Raise DataError if paths of a list are empty or files do not exist; at most CHECKED files are checked."""
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
            "expected paths that are absolute, or relative to the list's folder"
            f"{', with / between folders' if BACKSLASH in files else ''}; correct the list"
        )
