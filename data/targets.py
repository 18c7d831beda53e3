"""Read targets that are no single class: several labels for each image, or numbers, from the columns of a table."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data.index import REAL_NUMBER, DataError, StoredSource, first_few
from data.sources import Source, check_classes, labels_in

LABEL_COLUMNS = ("label", "labels")  # the first that a table has is the default of --label_columns
YES, NO = ("1", "true"), ("0", "false")


class TargetSource(StoredSource):
    """Hold the samples of a source with a row of targets for each.

    `labels` is (N, T): 0 and 1 in uint8, or numbers in float64. `classes` are the T names of labels or columns.
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

        Labels are one column of lists, of names or of class numbers, or columns that hold 1 or true where an image has
        the label of the column's name, and 0 or false where it has not. Numbers are one column or several.

        Args:
            target: "labels" or "numbers".
            path: --path_to_data, for messages.
            columns: their names; by default `names` if the table has them as columns, or the first of LABEL_COLUMNS.
            names: labels that there may be, or columns that there must be, in this order: those of the training.

        Raises:
            DataError: for data without columns, and for a value that is missing or of another kind.
        """
        known = getattr(source, "column_names", None)
        if known is None:
            expected = "a list (CSV or JSON lines), Parquet, or a data set of the library datasets"
            raise DataError(
                f"--path_to_data {path} has no columns, from which --target {target} is read; expected {expected}"
            )
        if not columns:
            columns = names if names and {*names} <= {*known} else [n for n in LABEL_COLUMNS if n in known][:1]
        if missing := [name for name in columns or LABEL_COLUMNS if name not in known]:
            raise DataError(
                f"{path} has no column {' or '.join(missing)}; it has {', '.join(known)}; name the {target} by "
                "--label_columns"
            )
        table = source.read_columns(columns)
        if target == "numbers":
            values = np.stack([_read_numbers(path, source, *item) for item in table.items()], axis=1)
        elif len(table) > 1 or not _holds_lists(table[columns[0]]):
            if len(table) == 1 and names is None:
                column = columns[0]
                raise DataError(
                    f"{path} has one label per image in the column {column}; expected lists of labels; give --target "
                    "classes, or several columns of 0 and 1 by --label_columns"
                )
            values = np.stack([_read_flags(path, source, *item) for item in table.items()], axis=1)
        else:
            return cls(source, *_read_lists(path, source, columns[0], table[columns[0]], names))
        if names is not None and list(columns) != list(names):
            raise DataError(
                f"{path} has the columns {' '.join(columns)}; expected {' '.join(names)}, those of the training"
            )
        return cls(source, columns, values)


def read_targets(
    target: str, path: str, columns: Sequence[str] | None, train: Source, validation: Source | None
) -> tuple[Source, Source]:
    """Return the sources of training and held-out images with what --target says; classes are checked only.

    Raises:
        DataError: for images without targets, and for targets from which nothing can be learned.
    """
    if target == "classes":
        for source in filter(None, (train, validation)):
            _refuse_lists(path, source)
        check_classes(path, train, validation)
        return train, validation
    if validation is None:
        remedy = "give --path_to_validation_data, or data with a split for validation"
        raise DataError(f"--path_to_data {path} has no validation images; {remedy}")
    train = TargetSource.read(target, path, train, columns, names=None)
    validation = TargetSource.read(target, path, validation, columns, train.classes)
    _check_targets(path, train, validation)
    return train, validation


def targets_of(source: Source, names: Sequence[str], scale: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Return what a loss sees of the samples: classes (N,) as indices of `names`, labels or numbers (N, T).

    Numbers are standardized by `scale`, their mean and standard deviation (T,).
    """
    if not isinstance(source, TargetSource):
        return labels_in(source, names)
    return source.labels if scale is None else ((source.labels - scale[0]) / scale[1]).astype(np.float32)


def _refuse_lists(path: str, source: Source) -> None:
    """Raise DataError for a source without classes whose labels are lists."""
    known = [] if source.classes else getattr(source, "column_names", [])
    for name in [name for name in LABEL_COLUMNS if name in known]:
        if _holds_lists(source.read_columns([name])[name]):
            raise DataError(f"{path} has lists in the column {name}; expected a class per image; give --target labels")


def _check_targets(path: str, train: TargetSource, validation: TargetSource) -> None:
    """Raise DataError for labels or numbers that all training images share, and if all held-out images share theirs."""
    same = (train.labels == train.labels[:1]).all(axis=0)
    if same.any():
        names = [train.classes[index] for index in np.flatnonzero(same)]
        values = first_few((f"{value:g}" for value in train.labels[0, same]), len(names))
        raise DataError(
            f"{path} has the same value in all training images for {first_few(names, len(names))}: {values}; expected "
            "values that differ; leave it out, or add images"
        )
    if (validation.labels == validation.labels[:1]).all():
        what = f"{len(validation)} held-out image{'' if len(validation) == 1 else 's'}"
        raise DataError(f"{path} has the same targets in all of {what}; expected some that differ, to measure by")


def _holds_lists(column) -> bool:
    import pyarrow as pa

    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_null(column.type)


def _fail(path: str, source: Source, column: str, row: int, value, expected: str) -> None:
    what = "no value" if value in (None, "") else repr(value)
    raise DataError(
        f"{path} has {what} in the column {column} of row {row + 1} ({source.name(row)}); expected {expected}; correct "
        "it, or leave the row out"
    )


def _as_text(column):
    """Return a column as text, "" where it is null. Raises DataError if it cannot be."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.utf8_trim_whitespace(column.cast(pa.large_string()).fill_null(""))


def _read_numbers(path: str, source: Source, name: str, column) -> np.ndarray:
    """Return a column as float64 (N,). Raises DataError for the first value that is no finite number."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if _holds_lists(column):
        raise DataError(f"{path} has lists in the column {name}; expected one number per image; give --target labels")
    text = _as_text(column)
    fits = pc.match_substring_regex(text, f"^({REAL_NUMBER.pattern})$").to_numpy()
    values = pc.if_else(pa.chunked_array([pa.array(fits)]), text, "nan").cast(pa.float64()).to_numpy()
    if len(odd := np.flatnonzero(~np.isfinite(values))):
        _fail(path, source, name, odd[0], text[int(odd[0])].as_py(), "a number")
    return values


def _read_flags(path: str, source: Source, name: str, column) -> np.ndarray:
    """Return a column of 0 and 1 as uint8 (N,). Raises DataError for the first other value."""
    import pyarrow.compute as pc

    text = pc.replace_substring_regex(pc.utf8_lower(_as_text(column)), r"\.0*$", "")  # pandas writes 1.0
    encoded = text.combine_chunks().dictionary_encode()
    numbers = [1 if value in YES else 0 if value in NO else 2 for value in encoded.dictionary.to_pylist()]
    values = np.array(numbers, np.uint8)[encoded.indices.to_numpy()]
    if len(odd := np.flatnonzero(values == 2)):
        _fail(path, source, name, odd[0], column[int(odd[0])].as_py(), "0 or 1 for a label")
    return values


def _read_lists(
    path: str, source: Source, name: str, column, names: Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """Return the names of the labels in a column of lists, and which of them an image has, uint8 (N, T)."""
    import pyarrow.compute as pc

    column = column.combine_chunks()
    if column.null_count:
        row = column.is_null().index(True).as_py()
        _fail(path, source, name, row, None, "a list of labels, [] for none")
    rows = pc.list_parent_indices(column).to_numpy()
    values = pc.list_flatten(column).to_pylist()
    kinds = {type(value) for value in values}
    if kinds not in ({str}, {int}, set()):
        odd = next(
            i for i, value in enumerate(values) if type(value) not in (str, int) or type(value) is not type(values[0])
        )
        _fail(path, source, name, int(rows[odd]), values[odd], "names, or class numbers, in all lists")
    if kinds == {int}:
        own = source.names_in_lists(name) if hasattr(source, "names_in_lists") else []
        own = own or [str(number) for number in range(max(values) + 1)]
        if not 0 <= min(values) <= max(values) < len(own):
            raise DataError(f"{path} has labels from {min(values)} to {max(values)}; expected 0 to {len(own) - 1}")
        values = [own[value] for value in values]
    else:
        own = sorted({*values}, key=str.encode)
    numbers = {label: number for number, label in enumerate(own if names is None else names)}
    if unknown := sorted({*values} - numbers.keys()):
        labels = first_few(unknown, len(unknown))
        raise DataError(f"{path} has labels that the training images or the model lack ({labels}); leave them out")
    if not numbers:
        raise DataError(f"{path} has only empty lists in the column {name}; expected labels")
    flags = np.zeros((len(column), len(numbers)), np.uint8)
    flags[rows, [numbers[value] for value in values]] = 1
    return list(numbers), flags
