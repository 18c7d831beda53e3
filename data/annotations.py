"""Objects in images: sources of COCO, Pascal VOC and YOLO folders and of the built-in scenes.

Boxes are (x1, y1, x2, y2) in pixels of the image, from its left upper corner. Sizes are (height, width).
"""

import hashlib
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from pycocotools import mask as coco_masks

from data.decode import DamagedImage, PixelFormat, decode
from data.files import FileSource, FolderSource, choose_splits, note_test
from data.index import DataError, Names, first_few
from data.shapes import CLASSES
from data.sources import NUM_CHECKED, ShapesSource, check_pixels, kind_of_data, open_cache, open_sources

LAYOUTS = (
    "COCO's (annotations/instances_train2017.json and train2017/), Pascal VOC's (Annotations/, JPEGImages/, "
    "ImageSets/Main/train.txt) or YOLO's (images/train/, labels/train/ and data.yaml)"
)
COCO_KEYS = {  # of a JSON file, and of the records of each
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


class Objects(NamedTuple):
    """Hold the annotated objects of an image."""

    boxes: np.ndarray  # (n, 4), float64
    labels: np.ndarray  # (n,), int64: classes from 0
    crowd: np.ndarray  # (n,), bool: groups that are no single object; nobody trains on them, and they are not scored
    areas: np.ndarray  # (n,), float64: pixels, by which objects are small, medium or large
    masks: list | None  # of each object polygons [[x, y, x, y, ...], ...] or COCO's RLE; None in data of boxes alone


class Entry(NamedTuple):
    """Hold an object as it is kept: five or six values in JSON."""

    box: list[float]  # x1, y1, x2, y2, in pixels, or relative to width and height
    label: int
    crowd: bool = False
    area: float | None = None  # None: that of the box
    mask: list | dict | None = None  # polygons or RLE, in the box's units


class ObjectSource(FileSource):
    """Read images, and give the objects in them.

    Args:
        names: of the files, relative to `root`.
        entries: of each image, kept as JSON in one flat array, which worker processes share without copies.
        sizes: (H, W) of the images as their annotations say; None where they say none, and are relative to it.
        classes: names of the classes.
        class_ids: the numbers of the classes in the annotations.
        has_masks: every object has one.
    """

    def __init__(
        self,
        root: Path,
        names: list[bytes],
        entries: Iterable[list[Entry]],
        *,
        sizes: list[tuple[int, int]] | None,
        classes: list[str],
        class_ids: list[int],
        has_masks: bool,
    ):
        super().__init__(names, root)
        self.objects_of = Names.from_list([json.dumps(part).encode() for part in entries])
        self.sizes = None if sizes is None else np.array(sizes, np.int64).reshape(-1, 2)
        self.classes, self.class_ids, self.has_masks = classes, class_ids, has_masks
        self.image_ids = list(range(1, len(self) + 1))  # numbers of the images in the annotations

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Return the objects in an image of this size. Raises DamagedImage if they are annotated for another size."""
        (height, width), scale = size, np.ones(2)
        if self.sizes is None:
            scale = np.array([width, height])
        elif tuple(self.sizes[index]) != (height, width):
            h, w = self.sizes[index]
            raise DamagedImage(f"has {height} x {width} pixels, and its annotations are for {h} x {w}")
        entries = [Entry(*values) for values in json.loads(self.objects_of[index])]
        boxes = np.array([entry.box for entry in entries]).reshape(-1, 4) * np.tile(scale, 2)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        given = np.array([np.nan if entry.area is None else entry.area for entry in entries])
        masks = None
        if self.has_masks:
            masks = [entry.mask for entry in entries]
            masks = masks if self.sizes is not None else [_scaled(polygons, scale) for polygons in masks]
        return Objects(
            boxes,
            np.array([entry.label for entry in entries], np.int64),
            np.array([entry.crowd for entry in entries], bool),
            np.where(np.isnan(given), areas, given * scale.prod()),
            masks,
        )

    def fingerprint(self) -> str:
        content = f"{super().fingerprint()} {self.objects_of.digest()} {self.classes}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _scaled(polygons: list, scale: np.ndarray) -> list:
    return [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in polygons]


class SceneObjects(ShapesSource):
    """Give the objects of the built-in scenes, as far as no other hides them."""

    has_masks, class_ids = True, list(range(1, len(CLASSES) + 1))

    @property
    def image_ids(self) -> list[int]:
        """Return the numbers of the images."""
        return list(range(1, len(self) + 1))

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Return the objects in a scene; see ObjectSource."""
        labels, inside = np.unique(self.masks[index]), []
        labels = labels[labels > 0]
        inside = [coco_masks.encode(np.asfortranarray(self.masks[index] == label, np.uint8)) for label in labels]
        boxes = coco_masks.toBbox(inside).reshape(-1, 4) if inside else np.zeros((0, 4))
        boxes[:, 2:] += boxes[:, :2]
        areas = np.array([coco_masks.area(mask) for mask in inside], np.float64)
        return Objects(boxes, labels.astype(np.int64) - 1, np.zeros(len(labels), bool), areas, inside)


class Boxes:
    """Collect the objects of a split, leave out what has no area, and count that."""

    def __init__(self, where: str):
        self.where, self.left_out = where, []

    def keep(self, entries: Iterable[Entry], size: tuple[float, float], name: str) -> list[Entry]:
        """Return the entries whose box has an area inside an image of this size."""
        kept, (height, width) = [], size
        for entry in entries:
            x1, y1, x2, y2 = entry.box
            if min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0):
                kept.append(entry)
            else:
                self.left_out.append(name)
        return kept

    @property
    def notes(self) -> list[str]:
        """Return a line of the plan if something was left out."""
        count, names = len(self.left_out), dict.fromkeys(self.left_out)
        text = f"left out   {count} boxes outside their image or of no area in {self.where}: "
        return [text + first_few(names, len(names))] if count else []


def open_objects(
    path_to_data: str,
    pixels: PixelFormat,
    *,
    validation: str | None = None,
    class_file: str | None = None,
    cache: str | None = None,
) -> tuple[ObjectSource | SceneObjects, ObjectSource | SceneObjects]:
    """Open the training and the held-out images of a folder, see LAYOUTS, or of builtin:shapes.

    `validation` is another folder, whose held-out split is taken, or its only one. `class_file` names the classes of
    Pascal VOC and YOLO, one on a line. Raises DataError with a line for each problem.
    """
    if kind_of_data(path_to_data) == "builtin":
        open_sources(path_to_data, pixels)  # refuses other names and formats
        for flag, value in {"--path_to_validation_data": validation, "--path_to_classes": class_file}.items():
            if value is not None:
                raise DataError(f"{flag} {value} does not go with {path_to_data}, which has its own; leave it out")
        return tuple(SceneObjects(split, pixels.channels) for split in ("train", "validation"))
    folder, opened = open_cache(cache), []
    roots = dict.fromkeys(Path(path) for path in (path_to_data, validation or path_to_data))
    splits = {root: _splits_of(root, class_file, folder) for root in roots}
    for root, is_training in zip((Path(path_to_data), Path(validation or path_to_data)), (True, False), strict=True):
        train, held_out, open_split = splits[root]
        name = train if is_training else held_out or (train if validation else None)
        if name is None:
            lacks = "training split" if is_training else "held-out split; give --path_to_validation_data"
            raise DataError(f"{root} has no {lacks}; expected {LAYOUTS}")
        source = open_split(name)
        source.notes = [*source.notes, *(note_test(name) if not is_training else [])]
        opened.append(source)
    ours, theirs = (source.classes for source in opened)
    if ours != theirs:
        other = next((name for name in theirs if name not in ours), next((n for n in ours if n not in theirs), "order"))
        raise DataError(f"the classes of training and held-out images differ ({other}); give both the same classes")
    for source in opened:
        check_pixels(source, pixels)
        check_sizes(source, pixels)
    return tuple(opened)


def check_sizes(source: ObjectSource, pixels: PixelFormat) -> None:
    """Raise DataError if images have other sizes than their annotations say; some, spread over the source, are read."""
    for index in sorted({position * len(source) // NUM_CHECKED for position in range(NUM_CHECKED)}):
        try:
            image = decode(*source.fetch([index]), pixels)
        except DamagedImage:
            continue
        try:
            source.objects(index, image.shape[1:])
        except DamagedImage as error:
            raise DataError(f"{source.name(index)} {error}; give the images that were annotated") from None


def _splits_of(root: Path, class_file: str | None, cache: Path) -> tuple[str | None, str | None, Callable]:
    """Return the names of the training and the held-out split of a folder, and a function that opens one."""
    if not root.is_dir():
        raise DataError(f"{root} is no folder; expected {LAYOUTS}, or builtin:shapes")
    if files := {path.stem.removeprefix("instances_"): path for path in root.glob("annotations/instances_*.json")}:
        if class_file:
            raise DataError(
                f"--path_to_classes {class_file}: {root} names its classes in its annotations; leave it out"
            )
        return *choose_splits(files), lambda name: open_coco(root, name, files[name], cache)
    lists = {path.stem: path for path in root.glob("ImageSets/Main/*.txt")}
    if lists and (root / "Annotations").is_dir():
        train, held_out = choose_splits(lists)
        names = _read_classes(root, class_file) or _voc_classes(root, [lists[s] for s in (train, held_out) if s])
        return train, held_out, lambda name: open_voc(root, lists[name], names)
    for base, images, labels in ((root / "images", "images/{}", "labels/{}"), (root, "{}/images", "{}/labels")):
        pairs = {
            path.name: tuple(root / each.format(path.name) for each in (images, labels)) for path in base.glob("*/")
        }
        pairs = {name: pair for name, pair in pairs.items() if all(map(Path.is_dir, pair))}
        if pairs:
            names = _read_classes(root, class_file) or _yolo_classes(root)
            return *choose_splits(pairs), partial(_open_pair, pairs, names, cache)
    raise DataError(f"{root} has no annotations of objects; expected {LAYOUTS}, or builtin:shapes")


# COCO


def open_coco(root: Path, split: str, file: Path, cache: Path | None) -> ObjectSource:
    """Open a split of a folder laid out like COCO's. Raises DataError."""
    content = _read_coco(file)
    folder = next((path for path in (root / split, root / "images" / split) if path.is_dir()), None)
    if folder is None:
        raise DataError(f"{file} has no images: expected them in {root / split}")
    records = {os.fsencode(record["file_name"]): record for record in content["images"]}
    present = FolderSource(folder, cache=cache)
    names = [present._names[index] for index in range(len(present))]
    categories = sorted(content["categories"], key=lambda record: record["id"])
    numbers = {record["id"]: number for number, record in enumerate(categories)}
    objects = {record["id"]: [] for record in content["images"]}
    errors = []
    if absent := sorted(map(os.fsdecode, records.keys() - {*names})):
        errors.append(f"{file} lists images that {folder} lacks: {first_few(absent, len(absent))}; add them")
    for key, known in (("image_id", objects), ("category_id", numbers)):
        if wrong := sorted({record[key] for record in content["annotations"]} - known.keys(), key=str):
            errors.append(f"{file} has annotations of an unknown {key}: {first_few(map(str, wrong), len(wrong))}")
    if errors:
        raise DataError("\n".join(errors))
    for record in content["annotations"]:
        objects[record["image_id"]].append(record)
    listed = [name for name in names if name in records]
    boxes, entries, sizes = Boxes(str(file)), [], []
    for name in listed:
        record = records[name]
        own = [_coco_entry(file, each, numbers) for each in objects[record["id"]]]
        sizes.append((record["height"], record["width"]))
        entries.append(boxes.keep(own, sizes[-1], os.fsdecode(name)))
    single = [entry for part in entries for entry in part if not entry.crowd]
    source = ObjectSource(
        folder,
        listed,
        entries,
        sizes=sizes,
        classes=[record["name"] for record in categories],
        class_ids=[record["id"] for record in categories],
        has_masks=bool(single) and all(entry.mask for entry in single),
    )
    source.image_ids = [records[name]["id"] for name in listed]
    others = [os.fsdecode(name) for name in names if name not in records]
    text = f"not read   {len(others)} images in {folder} that {file.name} does not list: "
    source.notes = [*([text + first_few(others, len(others))] if others else []), *boxes.notes]
    return source


def _read_coco(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); expected annotations as COCO's") from None
    for key, needed in COCO_KEYS.items():
        records = content.get(key) if isinstance(content, dict) else None
        if not isinstance(records, list) or not records:
            raise DataError(f"{file} has no list {key!r}; expected {', '.join(COCO_KEYS)}, as in COCO's files")
        for record in records:
            if missing := [name for name in needed if name not in record]:
                raise DataError(f"{file}: {key} without {missing[0]!r}, such as {str(record)[:80]}; add it")
    return content


def _coco_entry(file: Path, record: dict, numbers: dict[int, int]) -> Entry:
    try:
        x, y, width, height = map(float, record["bbox"])
    except (TypeError, ValueError):
        raise DataError(f"{file} has the bbox {record['bbox']}; expected four numbers: x, y, width, height") from None
    crowd, mask = bool(record.get("iscrowd", 0)), record.get("segmentation")
    if isinstance(mask, list):
        mask = [polygon for polygon in mask if len(polygon) >= 6]  # others have no area
    box = [x, y, x + width, y + height]
    return Entry(box, numbers[record["category_id"]], crowd, record.get("area"), mask or None)


# Pascal VOC


def _voc_classes(root: Path, lists: list[Path]) -> list[str]:
    """Return the names of the classes in the annotations of these splits, sorted."""
    names = (name for path in lists for _, tree in _read_voc(root, path) for name in tree.iterfind("object/name"))
    return sorted({name.text.strip() for name in names})


def _read_voc(root: Path, split: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    for line in split.read_text().splitlines():
        if line.strip():
            stem = line.split()[0]
            path = root / "Annotations" / f"{stem}.xml"
            try:
                yield stem, ElementTree.parse(path).getroot()
            except (OSError, ElementTree.ParseError) as error:
                raise DataError(f"{path} cannot be read ({error}); expected XML as Pascal VOC's") from None


def open_voc(root: Path, split: Path, classes: list[str]) -> ObjectSource:
    """Open a split of a folder laid out like Pascal VOC's: objects that are difficult count as crowd."""
    boxes, names, entries, sizes = Boxes(str(split)), [], [], []
    images = root / "JPEGImages"
    for stem, tree in sorted(_read_voc(root, split), key=lambda item: os.fsencode(item[0])):
        path = root / "Annotations" / f"{stem}.xml"
        own, name = [], tree.findtext("filename") or f"{stem}.jpg"
        name = name if (images / name).is_file() else f"{stem}.jpg"
        try:
            size = tuple(int(tree.findtext(f"size/{side}", "")) for side in ("height", "width"))
            for record in tree.iterfind("object"):
                x1, y1, x2, y2 = (float(record.findtext(f"bndbox/{k}", "")) for k in ("xmin", "ymin", "xmax", "ymax"))
                label = classes.index(record.findtext("name", "").strip())
                own.append(Entry([x1 - 1, y1 - 1, x2, y2], label, record.findtext("difficult") == "1"))
        except ValueError as error:
            raise DataError(f"{path}: {error}; expected size, and of each object name and bndbox") from None
        if not (images / name).is_file():
            raise DataError(f"{split} lists {stem}, and {images} has no {name}; add it")
        names.append(os.fsencode(name))
        sizes.append(size)
        entries.append(boxes.keep(own, size, stem))
    if not names:
        raise DataError(f"{split} lists no image; expected one name on each line")
    options = dict(classes=classes, class_ids=list(range(1, len(classes) + 1)), has_masks=False)
    source = ObjectSource(images, names, entries, sizes=sizes, **options)
    source.notes = boxes.notes
    return source


# YOLO


def _read_classes(root: Path, class_file: str | None) -> list[str]:
    """Return the lines of a file that names the classes, by default classes.txt; [] without one."""
    path = Path(class_file or root / "classes.txt")
    if not class_file and not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the name of a class on each line") from None


def _yolo_classes(root: Path) -> list[str]:
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            names = (yaml.safe_load(path.read_text()) or {}).get("names")
        except (yaml.YAMLError, ValueError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({error}); expected YAML with `names`") from None
        if names:
            return [str(names[key]) for key in sorted(names)] if isinstance(names, dict) else list(map(str, names))
    raise DataError(f"{root} does not name its classes; expected `names` in data.yaml, or --path_to_classes FILE")


def _open_pair(pairs: dict[str, tuple[Path, Path]], classes: list[str], cache: Path | None, split: str) -> ObjectSource:
    return open_yolo(*pairs[split], classes, cache)


def open_yolo(images: Path, labels: Path, classes: list[str], cache: Path | None) -> ObjectSource:
    """Open a split of a folder laid out like YOLO's, whose coordinates are relative to the image's size."""
    present, boxes, entries = FolderSource(images, cache=cache), Boxes(str(labels)), []
    names = [present._names[index] for index in range(len(present))]
    for name in names:
        path = labels / Path(os.fsdecode(name)).with_suffix(".txt")
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:  # an image without objects
            lines = []
        own = [_yolo_entry(path, line, len(classes)) for line in lines if line.strip()]
        entries.append(boxes.keep(own, (1.0, 1.0), os.fsdecode(name)))
    masks = [entry.mask for part in entries for entry in part]
    options = dict(classes=classes, class_ids=list(range(len(classes))), has_masks=bool(masks) and all(masks))
    source = ObjectSource(images, names, entries, sizes=None, **options)
    source.notes = [*present.notes, *boxes.notes]
    return source


def _yolo_entry(path: Path, line: str, num_classes: int) -> Entry:
    try:
        label, *values = line.split()
        label, values = int(label), [float(value) for value in values]
        is_box = len(values) == 4
        if not 0 <= label < num_classes or not (is_box or (len(values) >= 6 and len(values) % 2 == 0)):
            raise ValueError
    except ValueError:
        expected = f"expected a class from 0 to {num_classes - 1}, and x y width height or a polygon"
        raise DataError(f"{path} has the line {line!r}; {expected}") from None
    if is_box:
        x, y, width, height = values
        return Entry([x - width / 2, y - height / 2, x + width / 2, y + height / 2], label)
    xs, ys = values[::2], values[1::2]
    area = abs(sum(x * v - u * y for x, y, u, v in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))) / 2
    return Entry([min(xs), min(ys), max(xs), max(ys)], label, False, area or None, [values])
