"""Read targets other than a single class from the columns of a table: several labels per image, or numbers."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.index import REAL_NUMBER, DataError, StoredSource, first_few
from data.sources import Source, check_classes, labels_in

LABEL_COLUMNS = ("label", "labels")  # default of --label_columns: the first such column, in any case
YES, NO = ("1", "true"), ("0", "false")


class TargetSource(StoredSource):
    """A source with a row of targets for each sample.

    `labels` is (N, T): 0 and 1 as uint8, or numbers as float64. `classes` are the T names of labels or columns.
    """

    def __init__(self, source: Source, names: Sequence[str], values: np.ndarray):
        self._source, self.classes, self.labels = source, list(names), values
        self.prepare, self.notes = source.prepare, source.notes
        self.fetch, self.name, self.size_in_bytes = source.fetch, source.name, source.size_in_bytes

    def __len__(self) -> int:
        return len(self._source)

    def fingerprint(self) -> str:
        targets = np.ascontiguousarray(self.labels).tobytes() + "\n".join(self.classes).encode()
        return hashlib.sha256(f"targets {self._source.fingerprint()} ".encode() + targets).hexdigest()[:16]

    @classmethod
    def read(
        cls, target: str, path: str, source: Source, columns: Sequence[str] | None, names: Sequence[str] | None
    ) -> "TargetSource":
        """Read the targets of a source.

        Labels are one column with lists of names or class numbers; or several columns, each with the name of a label,
        that hold 1 or true for images with this label and 0 or false for others. Numbers are one column or several.

        Args:
            target: "labels" or "numbers".
            path: --path_to_data, for messages.
            columns: their names; by default `names` if the table has all of them, or the first column in LABEL_COLUMNS.
            names: names of the training's targets: the labels that lists may contain, or the columns, in this order.

        Raises:
            DataError: the data has no columns or other ones or unknown labels, or a value is missing or not valid.
        """
        table_columns = getattr(source, "column_names", None)
        if table_columns is None:
            expected = "a list (CSV or JSON lines), Parquet, or a data set of the library datasets"
            raise DataError(
                f"--path_to_data {path} has no columns, from which --target {target} is read; expected {expected}"
            )
        if not columns:
            has_names = names and {*names} <= {*table_columns}
            columns = names if has_names else [name for name in table_columns if name.lower() in LABEL_COLUMNS][:1]
        if missing := [name for name in columns or LABEL_COLUMNS if name not in table_columns]:
            raise DataError(
                f"{source.title} has no column {' or '.join(missing)}; it has {', '.join(table_columns)}; name the "
                f"{target} by --label_columns"
            )
        table = source.read_columns(columns)
        if target == "numbers":
            values = np.stack([_read_numbers(source, *item) for item in table.items()], axis=1)
        elif len(table) == 1 and _holds_lists(table[columns[0]]):
            return cls(source, *_read_lists(source, columns[0], table[columns[0]], names))
        else:
            values = np.stack([_read_flags(source, *item) for item in table.items()], axis=1)
        if names is not None and list(columns) != list(names):
            raise DataError(
                f"{source.title} has the columns {' '.join(columns)}; expected {' '.join(names)}, those of the training"
            )
        return cls(source, columns, values)


def read_targets(
    target: str, path: str, columns: Sequence[str] | None, train: Source, validation: Source | None
) -> tuple[Source, Source]:
    """Return the training and validation sources with the targets of --target; for classes, only check the sources.

    Raises:
        DataError: images have no targets, or a target has the same value in all training or all validation images.
    """
    if target == "classes":
        for source in filter(None, (train, validation)):
            _refuse_lists(source)
        check_classes(path, train, validation)
        return train, validation
    if validation is None:
        remedy = "give --path_to_validation_data, or data with a split for validation"
        raise DataError(f"--path_to_data {path} has no validation images; {remedy}")
    train = TargetSource.read(target, path, train, columns, names=None)
    validation = TargetSource.read(target, path, validation, columns, train.classes)
    is_constant = (train.labels == train.labels[:1]).all(axis=0)
    if is_constant.any():
        names = [train.classes[index] for index in np.flatnonzero(is_constant)]
        values = first_few((f"{value:g}" for value in train.labels[0, is_constant]), len(names))
        raise DataError(
            f"{path} has the same value in all training images for {first_few(names, len(names))}: {values}; expected "
            "values that differ; leave the column out, or add images"
        )
    check_held_out(path, validation)
    return train, validation


def check_held_out(path: str, source: TargetSource) -> None:
    """Raise DataError if all validation images have the same targets, so that no metric is meaningful."""
    if (source.labels == source.labels[:1]).all():
        images = f"{len(source)} validation image{'' if len(source) == 1 else 's'}"
        raise DataError(f"{path} has the same targets in all of {images}; expected targets that differ")


def targets_of(source: Source, names: Sequence[str], scale: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Return the targets of the loss: classes (N,), int64, as indices of `names`, or targets (N, T), float32.

    Numbers are standardized by `scale`, their means and standard deviations (T,).
    """
    if not isinstance(source, TargetSource):
        return labels_in(source, names).astype(np.int64)
    return (source.labels if scale is None else (source.labels - scale[0]) / scale[1]).astype(np.float32)


def _refuse_lists(source: Source) -> None:
    """Raise DataError if a source without classes has lists as labels."""
    names = [] if source.classes else getattr(source, "column_names", [])
    for name in [name for name in names if name.lower() in LABEL_COLUMNS]:
        if _holds_lists(source.read_columns([name])[name]):
            raise DataError(
                f"{source.title} has lists in the column {name}; expected a class per image; give --target labels"
            )


def _holds_lists(column) -> bool:
    import pyarrow as pa

    return any(getattr(pa.types, f"is_{kind}")(column.type) for kind in ("list", "large_list", "fixed_size_list"))


def _raise_bad_value(source: Source, column: str, row: int, value, expected: str) -> None:
    what = "no value" if value in (None, "") else repr(value)
    raise DataError(
        f"{source.title} has {what} in the column {column} of row {row + 1} ({source.name(row)}); expected {expected}; "
        "correct it, or leave the row out"
    )


def _as_text(source: Source, name: str, column, expected: str):
    """Return a column as text, "" where it is null. Raises DataError if it cannot be converted."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        return pc.utf8_trim_whitespace(column.cast(pa.large_string()).fill_null(""))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise DataError(
            f"{source.title} has {column.type} in the column {name}; expected {expected}; correct --label_columns"
        ) from None


def _read_numbers(source: Source, name: str, column) -> np.ndarray:
    """Return a column as float64 (N,). Raises DataError for the first value that is not a finite number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = _as_text(source, name, column, "a number")
    is_number = pc.match_substring_regex(text, f"^({REAL_NUMBER.pattern})$")
    values = pc.if_else(is_number, text, "nan").cast(pa.float64()).to_numpy()
    if len(rows := np.flatnonzero(~np.isfinite(values))):
        _raise_bad_value(source, name, rows[0], text[int(rows[0])].as_py(), "a number")
    return values


def _read_flags(source: Source, name: str, column) -> np.ndarray:
    """Return a column of 0 and 1 as uint8 (N,). Raises DataError for the first other value."""
    import pyarrow.compute as pc

    text = pc.utf8_lower(_as_text(source, name, column, "0 or 1"))
    encoded = pc.replace_substring_regex(text, r"\.0*$", "").combine_chunks().dictionary_encode()  # pandas writes 1.0
    numbers = [1 if value in YES else 0 if value in NO else 2 for value in encoded.dictionary.to_pylist()]
    values = np.array(numbers, np.uint8)[encoded.indices.to_numpy()]
    if len(rows := np.flatnonzero(values == 2)):
        expected = "0 or 1, or lists of labels (for one class per image give --target classes)"
        _raise_bad_value(source, name, rows[0], column[int(rows[0])].as_py(), expected)
    return values


def _read_lists(source: Source, name: str, column, names: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """Return the label names in a column of lists, and 1 where an image has a label, else 0: uint8 (N, T)."""
    import pyarrow.compute as pc

    column = column.combine_chunks()
    if column.null_count:
        row = column.is_null().index(True).as_py()
        _raise_bad_value(source, name, row, None, "a list of labels, [] for none")
    rows, values = pc.list_parent_indices(column).to_numpy(), pc.list_flatten(column).to_pylist()
    kind = type(values[0]) if values else str
    for row, value in zip(rows, values, strict=True):
        if type(value) is not kind or kind not in (str, int):
            _raise_bad_value(source, name, int(row), value, "names, or class numbers, in all lists")
    labels = sorted({*values}) if kind is int else sorted({*values}, key=str.encode)
    class_names = source.names_in_lists(name) if kind is int and hasattr(source, "names_in_lists") else []
    if class_names:
        if labels[0] < 0 or labels[-1] >= len(class_names):
            raise DataError(
                f"{source.title} has labels from {labels[0]} to {labels[-1]} in the column {name}, which names "
                f"{len(class_names)} classes; expected 0 to {len(class_names) - 1}; correct them"
            )
        values, labels = [class_names[value] for value in values], class_names
    labels, values = [str(label) for label in labels], [str(value) for value in values]
    numbers = {label: number for number, label in enumerate(labels if names is None else names)}
    if unknown := sorted({*values} - numbers.keys()):
        raise DataError(
            f"{source.title} has labels that the training images or the model lack "
            f"({first_few(unknown, len(unknown))}); leave them out"
        )
    if not numbers:
        raise DataError(f"{source.title} has only empty lists in the column {name}; expected labels in some")
    flags = np.zeros((len(column), len(numbers)), np.uint8)
    flags[rows, [numbers[value] for value in values]] = 1
    return list(numbers), flags
