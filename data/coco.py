"""Annotations of objects as COCO has them. Boxes in its files are x, y, width and height in pixels."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

from data.files import FolderSource
from data.index import DataError, first_few
from data.objects import BoxFilter, Entry, ObjectSource, lack_of_masks, masks_note


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_side(value) -> bool:
    return _is_number(value) and value >= 1 and value == int(value)


def _is_id(value) -> bool:
    return isinstance(value, int | str)


def _is_class(value) -> bool:
    return isinstance(value, int)


def _is_name(value) -> bool:
    return isinstance(value, str) and bool(value)


def _is_box(value) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _is_area(value) -> bool:
    return value is None or (_is_number(value) and value >= 0)


def _is_mask(value) -> bool:
    """Return True for polygons, RLE whose counts are numbers or compressed, and none."""
    try:
        if not isinstance(value, dict):
            return value is None or all(len(each) % 2 == 0 and math.isfinite(math.fsum(each)) for each in value)
        (height, width), counts = value["size"], value["counts"]
        return isinstance(counts, str) or (min(counts) >= 0 and sum(counts) == height * width)
    except (KeyError, TypeError, ValueError):
        return False


SIDE, NUMBER = (_is_side, "a whole number from 1"), (_is_class, "a whole number")
KEYS = {  # list in a file -> key of its records -> check of the value, and what is expected
    "images": {"id": (_is_id, "a number"), "file_name": (_is_name, "a name"), "height": SIDE, "width": SIDE},
    "annotations": {
        "image_id": (_is_id, "a number"),
        "category_id": NUMBER,
        "bbox": (_is_box, "four numbers: x, y, width, height"),
        "iscrowd": (_is_class, "0 or 1"),
        "area": (_is_area, "a number of pixels"),
        "segmentation": (_is_mask, "polygons of x, y, x, y, ... or RLE with counts and size"),
    },
    "categories": {"id": NUMBER, "name": (_is_name, "a name")},
}
OPTIONAL = {"iscrowd", "area", "segmentation"}
UNIQUE = (("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name"))


def open_coco(root: Path, split: str, file: Path, cache: Path | None) -> ObjectSource:
    """Open a split of a folder laid out like COCO's. Raises DataError."""
    content = _read_coco(file)
    folder = next((path for path in (root / split, root / "images" / split) if path.is_dir()), None)
    if folder is None:
        raise DataError(f"{file} has no images: expected them in {root / split}")
    records = {os.fsencode(record["file_name"]): record for record in content["images"]}
    files = FolderSource(folder, cache=cache)
    names = files.relative_names
    categories = sorted(content["categories"], key=lambda record: record["id"])
    numbers = {record["id"]: number for number, record in enumerate(categories)}
    objects = {record["id"]: [] for record in content["images"]}
    errors = []
    if absent := sorted(map(os.fsdecode, records.keys() - {*names})):
        errors.append(f"{file} lists images that {folder} lacks: {first_few(absent, len(absent))}; add them")
    for key, ids in (("image_id", objects), ("category_id", numbers)):
        if wrong := sorted({record[key] for record in content["annotations"]} - ids.keys(), key=str):
            errors.append(f"{file} has annotations of an unknown {key}: {first_few(map(str, wrong), len(wrong))}")
    if errors:
        raise DataError("\n".join(errors))
    for record in content["annotations"]:
        objects[record["image_id"]].append(record)
    listed = [name for name in names if name in records]
    boxes, entries, sizes = BoxFilter(str(file)), [], []
    for name in listed:
        record = records[name]
        sizes.append((int(record["height"]), int(record["width"])))
        own = [_to_entry(file, each, numbers, sizes[-1]) for each in objects[record["id"]]]
        entries.append(boxes.keep(own, sizes[-1], os.fsdecode(name)))
    source = ObjectSource(
        folder,
        listed,
        entries,
        sizes=sizes,
        classes=[record["name"] for record in categories],
        class_ids=[record["id"] for record in categories],
        lacks_masks=lack_of_masks(entries, [*map(os.fsdecode, listed)], str(file)),
    )
    source.image_ids = [records[name]["id"] for name in listed]
    others = [os.fsdecode(name) for name in names if name not in records]
    text = f"not read   {len(others)} images in {folder} that {file.name} does not list: "
    source.notes = [*([text + first_few(others, len(others))] if others else []), *boxes.notes]
    source.notes += masks_note(source.lacks_masks)
    return source


def _read_coco(file: Path) -> dict:
    """Return the content of a file, each record of which is checked. Raises DataError."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected annotations as COCO's") from None
    errors = []
    for key in KEYS:
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list):
            raise DataError(f"{file} has no list {key!r}; expected {', '.join(KEYS)}, as in COCO's files")
        if not records:
            errors.append(f"{file} has an empty list {key!r}; give annotated images")
        errors += [f"{file}: {key} {problem}" for problem in [_find_problem(key, records)] if problem]
    if errors:
        raise DataError("\n".join(errors))
    for key, name in UNIQUE:
        if duplicates := _find_duplicates(record[name] for record in content[key]):
            errors.append(
                f"{file}: {key} with the same {name}: {first_few(duplicates, len(duplicates))}; keep one of each"
            )
    if errors:
        raise DataError("\n".join(errors))
    return content


def _find_problem(key: str, records: list) -> str | None:
    """Return what is wrong with the first record that cannot be used."""
    for record in records:
        if not isinstance(record, dict):
            return f"with {str(record)[:60]}; expected an object with {', '.join(KEYS[key])}"
        for name, (is_fit, expected) in KEYS[key].items():
            if name in record and not is_fit(record[name]):
                return f"with the {name} {str(record[name])[:60]}; expected {expected}"
            if name not in record and name not in OPTIONAL:
                return f"without {name!r}, such as {str(record)[:80]}; add it"
    return None


def _find_duplicates(values: Iterable) -> list[str]:
    """Return the values that occur more than once."""
    previous, duplicates = set(), {}
    for value in values:
        if value in previous:
            duplicates[str(value)] = None
        previous.add(value)
    return [*duplicates]


def _to_entry(file: Path, record: dict, numbers: dict[int, int], size: tuple[int, int]) -> Entry:
    x, y, width, height = map(float, record["bbox"])
    crowd, mask = bool(record.get("iscrowd", 0)), record.get("segmentation")
    if isinstance(mask, dict) and tuple(mask["size"]) != size:
        words = "{} x {} pixels in an image of {} x {}".format(*mask["size"], *size)
        raise DataError(f"{file}: annotations with RLE of {words}; give masks of the image's size")
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if len(polygon) >= 6]  # others have no area
    if crowd and not mask:  # COCO's arithmetic needs one
        mask = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    box = [x, y, x + width, y + height]
    return Entry(box, numbers[record["category_id"]], crowd, record.get("area"), mask or None)
