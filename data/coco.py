"""Read object annotations in COCO's format, whose boxes are x, y, width and height in pixels."""

import json
import math
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from data.files import FolderSource, is_fresh_index, stamp
from data.index import DataError, Names, cached, first_few
from data.objects import Entry, ObjectPacker, ObjectSource

LARGEST = 1e15  # pixels, safely in the range where float64 is exact


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST  # also rejects NaN


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
    """Return True for polygons and for RLE, whose counts may be numbers or compressed."""
    try:
        if not isinstance(value, dict):
            return all(len(each) % 2 == 0 and math.isfinite(math.fsum(each)) for each in value)
        (height, width), counts = value["size"], value["counts"]
        if isinstance(counts, str):
            counts = _decompress(counts.encode())
        return min(counts) >= 0 and sum(counts) == height * width
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _decompress(counts: bytes) -> list[int]:
    """Return the counts of a compressed RLE. Raises ValueError for errors, which pycocotools does not check.

    From the fourth on, a count is stored as its difference to the count two before it. Numbers are written in digits of
    five bits and a bit for "more follow", the lowest digit first, each as the character 48 + digit.
    """
    numbers, number, shift = [], 0, 0
    for character in counts:
        digit = character - 48
        if not 0 <= digit < 64:
            raise ValueError(f"character {character} in a compressed RLE")
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            number -= (digit & 16) << (shift - 4)  # the sign
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number = shift = 0
    if shift:
        raise ValueError("a compressed RLE that is cut off")
    return numbers


def _is_packed(value) -> bool:
    return value is None or isinstance(value, tuple)


SIDE, NUMBER = (_is_side, "a whole number from 1"), (_is_class, "a whole number")
KEYS = {  # list in a file -> key of its records -> (check of the value, description of the expected value)
    "images": {"id": (_is_id, "a number"), "file_name": (_is_name, "a name"), "height": SIDE, "width": SIDE},
    "annotations": {
        "image_id": (_is_id, "a number"),
        "category_id": NUMBER,
        "bbox": (_is_box, "four numbers: x, y, width, height"),
        "iscrowd": (_is_class, "0 or 1"),
        "area": (_is_area, "a number of pixels"),
        "segmentation": (_is_packed, "polygons of x, y, x, y, ... or RLE with counts and size"),
    },
    "categories": {"id": NUMBER, "name": (_is_name, "a name")},
}
OPTIONAL = {"iscrowd", "area", "segmentation"}
UNIQUE = (("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name"))


def open_coco(root: Path, split: str, file: Path, cache: Path | None) -> ObjectSource:
    """Open a split of a folder in COCO's layout. Raises DataError.

    The objects of many images are cached in the folder `cache` until the file or the names of the images change. One
    process parses the file; the others and later runs share its arrays.
    """
    folder = next((path for path in (root / split, root / "images" / split) if path.is_dir()), None)
    if folder is None:
        raise DataError(f"{file} has no images: expected them in {root / split}")
    images = FolderSource(folder, cache=cache)
    inputs = [str(file), images.fingerprint()]  # messages name the file
    meta, arrays = cached(
        cache,
        f"objects {os.path.abspath(file)}",
        fresh=lambda meta: meta["inputs"] == inputs and is_fresh_index(meta),
        build=partial(_index_objects, file, images, inputs),
    )
    names, objects = (Names(arrays[part], arrays[f"{part}_ends"]) for part in ("names", "objects"))
    options = {name: meta[name] for name in ("classes", "class_ids", "lacks_masks")}
    source = ObjectSource(folder, names, objects, sizes=arrays["sizes"], **options)
    source.image_ids, source.notes = meta["image_ids"], meta["notes"]
    return source


def _index_objects(file: Path, images: FolderSource, inputs: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """Build the index of the objects in a folder of images, for `cached`. Raises DataError."""
    start, names = time.time_ns(), images.relative_names
    file_stamp, content = _read_coco(file)
    records = {os.fsencode(record["file_name"]): record for record in content["images"]}
    categories = sorted(content["categories"], key=lambda record: record["id"])
    numbers = {record["id"]: number for number, record in enumerate(categories)}
    objects = {record["id"]: [] for record in content["images"]}
    errors = []
    if absent := sorted(map(os.fsdecode, records.keys() - {*names})):
        errors.append(f"{file} lists images that {images.root} lacks: {first_few(absent, len(absent))}; add them")
    for key, ids in (("image_id", objects), ("category_id", numbers)):
        if wrong := sorted({record[key] for record in content["annotations"]} - ids.keys(), key=str):
            errors.append(f"{file} has annotations of an unknown {key}: {first_few(map(str, wrong), len(wrong))}")
    if errors:
        raise DataError("\n".join(errors))
    for record in content["annotations"]:
        objects[record["image_id"]].append(record)
    others = [os.fsdecode(name) for name in names if name not in records]
    names = [name for name in names if name in records]
    sizes = [(int(records[name]["height"]), int(records[name]["width"])) for name in names]
    packer, image_ids = ObjectPacker(str(file)), [records[name]["id"] for name in names]
    for name, size, image_id in zip(names, sizes, image_ids, strict=True):
        entries = [_to_entry(file, record, numbers, size) for record in objects[image_id]]
        packer.add(entries, size, os.fsdecode(name))
    text = f"not read   {len(others)} images in {images.root} that {file.name} does not list: "
    meta = {"seen": {os.path.abspath(file): file_stamp}, "start": start, "count": len(names), "inputs": inputs}
    meta |= {"classes": [record["name"] for record in categories], "class_ids": [*numbers], "image_ids": image_ids}
    meta["lacks_masks"] = packer.lacks_masks
    meta["notes"] = [*([text + first_few(others, len(others))] if others else []), *packer.notes]
    names, objects = Names.from_list(names), packer.objects
    arrays = {"names": names.buffer, "names_ends": names.ends, "objects": objects.buffer, "objects_ends": objects.ends}
    return meta, arrays | {"sizes": np.array(sizes, np.int64)}


def _read_coco(file: Path) -> tuple[list[int], dict]:
    """Return the stamp and the content of a file after checking each record. Raises DataError."""
    try:
        file_stamp, content = stamp(file), json.loads(file.read_bytes(), object_hook=_pack_mask)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected annotations in COCO's format") from None
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
    return file_stamp, content


def _find_problem(key: str, records: list) -> str | None:
    """Describe the first record that cannot be used; return None if all can."""
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


def _pack_mask(record: dict) -> dict:
    """Replace the mask of an annotation by (its JSON, RLE size or None): as numbers, COCO's masks take gigabytes.

    Polygons of fewer than three corners, which have no area, are left out. Values that are no masks stay as they are.
    """
    mask = record.get("segmentation")
    if mask is not None and _is_mask(mask):
        size = tuple(mask["size"]) if isinstance(mask, dict) else None
        mask = mask if size else [polygon for polygon in mask if len(polygon) >= 6]
        record["segmentation"] = (json.dumps(mask), size) if mask else None
    return record


def _to_entry(file: Path, record: dict, numbers: dict[int, int], size: tuple[int, int]) -> Entry:
    x, y, width, height = map(float, record["bbox"])
    crowd, (mask, mask_size) = bool(record.get("iscrowd", 0)), record.get("segmentation") or (None, None)
    if mask_size not in (None, size):
        words = "{} x {} pixels in an image of {} x {}".format(*mask_size, *size)
        raise DataError(f"{file}: annotations with RLE of {words}; give masks of the image's size")
    if crowd and not mask:  # COCO's evaluation of masks needs one
        mask = json.dumps([[x, y, x + width, y, x + width, y + height, x, y + height]])
    return Entry([x, y, x + width, y + height], numbers[record["category_id"]], crowd, record.get("area"), mask)
