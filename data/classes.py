"""Read class names, and their colours in masks, from the file formats of many programs."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import count, dropwhile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.index import DataError, first_few
from data.values import text_encoding

ADE20K = Path("ade20k")  # instead of a file: the classes of ADE20K
MAX_CLASSES = 254  # a byte has 256 values, of which void takes 0 in files and 255 in memory

# Columns of tables, without spaces, hyphens and underscores, in order of preference
NAMES = ("name", "names", "classname", "labelname", "class", "classes", "label", "labels", "category", "readable")
NUMBERS = ("id", "idx", "index", "number", "value", "pixelvalue", "classid", "labelid", "class", "label", "trainid")
COLOURS = ("color", "colour", "rgb", "colorrgb", "colourrgb")
CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))

# Forms of lines without a header; all lines must have the form of the first one
NUMBER, NAME = r"(?P<number>\d+)(?:\s*[,;:=)]\s*|\.?\s+)", r"(?P<name>[^\d\s].*?)"
COLOUR = r"\(?(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)\)?"
FORMS = {
    "a number, a colour and a name": f"{NUMBER}{COLOUR}[\\s,;:]+{NAME}[\\s,;:]*",
    "a colour and a name": f"{COLOUR}[\\s,;:]+{NAME}[\\s,;:]*",
    "a number, a name and a colour": f"{NUMBER}{NAME}[\\s,;:]+{COLOUR}[\\s,;:]*",
    "a name and a colour": f"{NAME}[\\s,;:]+{COLOUR}[\\s,;:]*",
    "a number and a name": f"{NUMBER}(?P<name>.+)",
    "a name and a number": f"{NAME}\\s*[,;:=\\t]\\s*(?P<number>\\d+)",
    "a name": "(?P<name>.+)",
}


class Row(NamedTuple):
    """A class as a file describes it."""

    text: str  # as in the file, for messages
    name: str
    number: int | None  # its label in masks
    colour: tuple[int, ...] | None  # red, green and blue in masks


def ade20k_classes() -> tuple[list[str], np.ndarray]:
    """Return the names and the colours, uint8 (150, 3), of ADE20K's 150 classes in the order of their labels."""
    lines = Path(__file__).with_name("ade20k.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=3) for line in lines if not line.startswith("#")]
    return [row[3] for row in rows], np.array([row[:3] for row in rows]).astype(np.uint8)


def read_classes(path: Path, first_label: int = 1) -> tuple[list[str], np.ndarray | None, list[str]]:
    """Read the class names in the order of their labels; those of ADE20K if `path` is ADE20K.

    A file has a name on each line, with or without its number or colour before or after it; or it is a table with a
    header; or JSON: a list of names or of objects with a name, or an object that maps numbers to names or names to
    numbers. Lines at the top that begin with # are comments.

    Args:
        first_label: the label of the first class in masks; numbers in the file must start with it.

    Returns:
        The names; their colours in masks, uint8 (N, 3), None if the file has none; and error messages.
    """
    if path == ADE20K:
        return ade20k_classes()[0], None, []
    if not path.exists():
        remedy = (
            f"write a line for each class, the first for label {first_label}, or give another --path_to_classes FILE"
        )
        return [], None, [f"{path} is missing; {remedy}" + (" (label 0 is void)" if first_label else "")]
    try:
        rows = _read_rows(path)
        _check_numbers(path, rows, first_label)
    except DataError as error:
        return [], None, [str(error)]
    names, errors = [row.name for row in rows], []
    if len(names) > MAX_CLASSES:
        errors.append(f"{path} names {len(names)} classes; expected at most {MAX_CLASSES}, as masks have 8 bits")
    if len(names) == 1:
        errors.append(f"{path} names one class; expected at least 2: add one for everything else, such as background")
    for what, values in (("classes", names), ("the colours of classes", [row.colour for row in rows])):
        if repeated := [str(value) for value, times in Counter(values).items() if value and times > 1]:
            errors.append(f"{path} names {what} twice: {first_few(repeated, len(repeated))}; give each its own")
    has_colours = bool(rows) and rows[0].colour is not None
    return names, np.array([row.colour for row in rows], np.uint8) if has_colours else None, errors


def _check_numbers(path: Path, rows: list[Row], first_label: int) -> None:
    """Sort numbered rows in place. Raises DataError unless their numbers count up from `first_label`."""
    if not rows or rows[0].number is None:
        return
    rows.sort(key=lambda row: row.number)
    for row, number in zip(rows, count(first_label)):
        if row.number != number:
            raise DataError(
                f"{path} has the line {row.text!r}; expected the numbers {first_label}, {first_label + 1}, ... without "
                f"gaps, or none at all; give --mask_offset {1 - first_label} if the masks have these numbers"
            )


def _read_rows(path: Path) -> list[Row]:
    """Return the classes in the order of the file. Raises DataError."""
    is_json = path.suffix.lower() == ".json"
    try:
        data = path.read_bytes()
        text = data.decode(text_encoding(data))
        content = json.loads(text) if is_json else None
    except (OSError, ValueError) as error:
        what = "JSON" if is_json else "text in UTF-8 with a class on each line"
        raise DataError(f"{path} cannot be read ({error}); expected {what}") from None
    if is_json:
        return list(_rows_of_json(path, content))
    lines = [line.strip() for line in text.rstrip().splitlines()]
    lines = list(dropwhile(lambda line: line.startswith("#"), lines))
    if late := [line for line in lines if line.startswith("#")]:
        remedy = "put a name in quotes, and remove what is a comment"
        raise DataError(f"{path} has the line {late[0]!r} below the first class; {remedy}")
    first = lines[0] if lines else ""
    delimiter = next((each for each in "\t,;" if each in first), ",")
    header = [_key(cell) for cell in next(csv.reader([first], delimiter=delimiter), [])]
    if len(header) == 1 and header[0] in NAMES:
        return _rows_of_lines(path, lines[1:])
    known, words = {*NAMES, *NUMBERS, *COLOURS, *sum(CHANNELS, ())}, {_key(word) for word in first.split()}
    has_name = bool({*header} & {*NAMES})
    if has_name and len({*header} & known) > 1:
        return _rows_of_table(path, header, lines[1:], delimiter)
    if (has_name and len(header) > 1) or (words & {*NAMES} and len(words) > 1 and words <= known):
        raise DataError(
            f"{path} begins with {first!r}, which may be a header or a class; give a header a column `id` or `rgb` "
            "beside `name` and commas or tabs between them, and put the name of a class in quotes"
        )
    return _rows_of_lines(path, lines)


def _rows_of_lines(path: Path, lines: list[str]) -> list[Row]:
    """Return the classes from lines without a header. Raises DataError for a line in another form than the first."""
    if "" in lines or not lines:
        what = "an empty line" if lines else "no line"
        raise DataError(f"{path} has {what}; expected one name per line, from the first label on")
    form = next(form for form in FORMS if re.fullmatch(FORMS[form], lines[0]))
    rows = []
    for line in lines:
        found = re.fullmatch(FORMS[form], line)
        if not found:
            raise DataError(f"{path} has the line {line!r}; expected {form}, as on the line {lines[0]!r}")
        rows.append(_row(path, line, found.groupdict()))
    return rows


def _rows_of_table(path: Path, header: list[str], lines: list[str], delimiter: str) -> list[Row]:
    rows = []
    for line in filter(None, lines):  # some writers leave a blank line after each row
        cells = next(csv.reader([line], delimiter=delimiter))
        if len(cells) != len(header):
            expected = f"expected {len(header)} columns, as in the header; put names with {delimiter!r} in quotes"
            raise DataError(f"{path} has the line {line!r} of {len(cells)} columns; {expected}")
        rows.append(_row(path, line, dict(zip(header, cells, strict=True))))
    return rows


def _rows_of_json(path: Path, content) -> Iterator[Row]:
    if isinstance(content, dict):
        inner = (content[key] for key in ("id2label", "label2id", "categories") if key in content)
        content = next((each for each in inner if isinstance(each, list | dict)), content)
    if isinstance(content, dict):
        for key, value in content.items():
            number, name = (key, value) if key.isdecimal() else (value, key)
            yield _row(path, f"{key}: {value}", {"name": name, "number": number})
    elif isinstance(content, list):
        for value in content:
            record = {_key(key): value[key] for key in value} if isinstance(value, dict) else {"name": value}
            yield _row(path, str(value), record)
    else:
        raise DataError(f"{path} holds {type(content).__name__}; expected a list of names, or an object of them")


def _row(path: Path, text: str, record: dict) -> Row:
    """Return the class in a line, table row or JSON object, whose columns `record` maps to values."""
    name_column = next((key for key in NAMES if key in record), None)
    name = record.get(name_column)
    if not isinstance(name, str) or not name.strip(" \"'"):
        raise DataError(f"{path} has the line {text!r} without a name; expected one for each class")
    name = " ".join(name.split())
    name = name[1:-1] if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name
    number = next((record[key] for key in NUMBERS if key in record and key != name_column), None)
    if number is not None and not re.fullmatch(r"\s*-?\d+\s*", str(number)):
        raise DataError(f"{path} has the line {text!r} with the number {number!r}; expected a whole number")
    columns = next((keys for keys in (*((key,) for key in COLOURS), *CHANNELS) if {*keys} <= {*record}), None)
    return Row(text, name, None if number is None else int(number), columns and _colour(path, text, record, columns))


def _colour(path: Path, text: str, record: dict, columns: tuple[str, ...]) -> tuple[int, ...]:
    values = re.findall(r"-?[\d.]+", " ".join(str(record[column]) for column in columns))
    if len(values) != 3 or not all(re.fullmatch(r"\d{1,3}", value) and int(value) < 256 for value in values):
        raise DataError(f"{path} has the line {text!r}, whose colour is not three whole numbers from 0 to 255")
    return tuple(map(int, values))


def _key(cell) -> str:
    return re.sub(r"[\s_-]", "", str(cell)).casefold()
