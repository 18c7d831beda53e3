"""Open images with annotated objects: folders in the layouts of COCO, Pascal VOC and YOLO, and the built-in scenes."""

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from data.coco import open_coco
from data.decode import DamagedImage, PixelFormat, decode
from data.files import FolderSource, choose_splits, note_test
from data.index import DataError, first_few
from data.objects import Entry, ObjectPacker, ObjectSource, SceneObjects
from data.sources import NUM_CHECKED, check_pixels, kind_of_data, open_cache, open_sources

LAYOUTS = (
    "COCO's (annotations/instances_train2017.json and train2017/), Pascal VOC's (Annotations/, JPEGImages/, "
    "ImageSets/Main/train.txt) or YOLO's (images/train/, labels/train/ and data.yaml)"
)


def open_objects(
    path_to_data: str,
    pixels: PixelFormat,
    *,
    validation: str | None = None,
    class_file: str | None = None,
    cache: str | None = None,
) -> tuple[ObjectSource | SceneObjects, ObjectSource | SceneObjects]:
    """Open the training and the validation images of a folder, see LAYOUTS, or of builtin:shapes.

    `validation` is another folder: its validation split is used, or else its training split. `class_file` names the
    classes of Pascal VOC and YOLO, one per line. Raises DataError with one line per problem.
    """
    if kind_of_data(path_to_data) == "builtin":
        open_sources(path_to_data, pixels)  # refuses other names and formats
        for flag, value in {"--path_to_validation_data": validation, "--path_to_classes": class_file}.items():
            if value is not None:
                raise DataError(f"{flag} {value} does not go with {path_to_data}, which has its own; leave it out")
        return tuple(SceneObjects(split, pixels.channels) for split in ("train", "validation"))
    folder, opened, errors = open_cache(cache), [], []
    roots = dict.fromkeys(Path(path) for path in (path_to_data, validation or path_to_data))
    splits = {root: _splits_of(root, class_file, folder) for root in roots}
    for root, is_training in zip((Path(path_to_data), Path(validation or path_to_data)), (True, False), strict=True):
        train, held_out, open_split = splits[root]
        name = train if is_training else held_out or (train if validation else None)
        if name is None:
            lacks = "training split" if is_training else "validation split; give --path_to_validation_data"
            errors.append(f"{root} has no {lacks}; expected {LAYOUTS}")
            continue
        try:
            source = open_split(name)
        except DataError as error:
            errors.append(str(error))
            continue
        if duplicates := sorted({each for each in source.classes if source.classes.count(each) > 1}):
            errors.append(
                f"{root} has classes of the same name: {first_few(duplicates, len(duplicates))}; rename one of each"
            )
        source.notes = [*source.notes, *(note_test(name) if not is_training else [])]
        opened.append(source)
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))
    ours, theirs = (source.classes for source in opened)
    if ours != theirs:
        other = next((name for name in theirs if name not in ours), next((n for n in ours if n not in theirs), "order"))
        remedy = "give both the same classes, those of Pascal VOC and YOLO by --path_to_classes FILE"
        raise DataError(f"the classes of training and validation images differ ({other}); {remedy}")
    for source in opened:
        check_pixels(source, pixels)
        check_sizes(source, pixels)
    return tuple(opened)


def check_sizes(source: ObjectSource, pixels: PixelFormat) -> None:
    """Read a few images, spread over the source; raise DataError if a size differs from the one in the annotations."""
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
    """Return the names of a folder's training and validation splits, None if absent, and a function that opens one."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; expected {LAYOUTS}, or builtin:shapes")
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
            classes = dict(enumerate(_read_classes(root, class_file))) or _yolo_classes(root)
            return *choose_splits(pairs), partial(_open_pair, pairs, classes, cache)
    raise DataError(f"{root} has no annotations of objects; expected {LAYOUTS}, or builtin:shapes")


# Pascal VOC


def _voc_classes(root: Path, lists: list[Path]) -> list[str]:
    """Return the sorted names of the classes in the annotations of the splits that `lists` name."""
    names = (
        each.findtext("name") for path in lists for _, tree in _read_voc(root, path) for each in tree.iter("object")
    )
    return sorted({name.strip() for name in names if name and name.strip()})


def _read_voc(root: Path, split: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    for line in split.read_text().splitlines():
        if line.strip():
            stem = re.sub(r"\s+-?[01]$", "", line.strip())  # -1, 0 or 1 in lists for one class
            path = root / "Annotations" / f"{stem}.xml"
            try:
                yield stem, ElementTree.parse(path).getroot()
            except (OSError, ElementTree.ParseError) as error:
                raise DataError(f"{path} cannot be read ({error}); expected XML in Pascal VOC's format") from None


def open_voc(root: Path, split: Path, classes: list[str]) -> ObjectSource:
    """Open a split of a folder in Pascal VOC's layout; objects marked as difficult become crowd objects."""
    packer, names, sizes = ObjectPacker(str(split)), [], []
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
        packer.add(own, size, stem)
    if not names:
        raise DataError(f"{split} lists no image; expected one name on each line")
    if duplicates := [os.fsdecode(name) for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{split} lists images twice: {first_few(duplicates, len(duplicates))}; keep one of each")
    options = dict(classes=classes, class_ids=list(range(1, len(classes) + 1)), lacks_masks=packer.lacks_masks)
    source = ObjectSource(images, names, packer.objects, sizes=sizes, **options)
    source.notes = packer.notes
    return source


# YOLO


def _read_classes(root: Path, class_file: str | None) -> list[str]:
    """Return the class names in a file with one per line, by default classes.txt; [] if there is no file."""
    path = Path(class_file or root / "classes.txt")
    if not class_file and not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected the name of a class on each line") from None


def _yolo_classes(root: Path) -> dict[int, str]:
    """Return the names of the classes by their numbers, which may have gaps. Raises DataError if there are none."""
    for path in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            names = (yaml.safe_load(path.read_text()) or {}).get("names")
            names = names if isinstance(names, dict) else dict(enumerate(names or []))
            names = {int(number): str(name) for number, name in names.items()}
        except (yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); expected YAML with `names`, by numbers") from None
        if names:
            return dict(sorted(names.items()))
    raise DataError(f"{root} does not name its classes; expected `names` in data.yaml, or --path_to_classes FILE")


def _open_pair(
    pairs: dict[str, tuple[Path, Path]], classes: dict[int, str], cache: Path | None, split: str
) -> ObjectSource:
    return open_yolo(*pairs[split], classes, cache)


def open_yolo(images: Path, labels: Path, classes: dict[int, str], cache: Path | None) -> ObjectSource:
    """Open a split of a folder in YOLO's layout, whose coordinates are relative to the image's size."""
    files, packer = FolderSource(images, cache=cache), ObjectPacker(str(labels))
    names, numbers = files.relative_names, {number: label for label, number in enumerate(classes)}
    for name in names:
        path = labels / Path(os.fsdecode(name)).with_suffix(".txt")
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:  # an image without objects
            lines = []
        own = [_yolo_entry(path, line, numbers) for line in lines if line.strip()]
        packer.add(own, (1.0, 1.0), os.fsdecode(name))
    options = dict(classes=[*classes.values()], class_ids=[*classes], lacks_masks=packer.lacks_masks)
    source = ObjectSource(images, names, packer.objects, sizes=None, **options)
    source.notes = [*files.notes, *packer.notes]
    return source


def _yolo_entry(path: Path, line: str, numbers: dict[int, int]) -> Entry:
    try:
        label, *values = line.split()
        label, values = int(label), [float(value) for value in values]
        is_box = len(values) == 4
        if label not in numbers or not (is_box or (len(values) >= 6 and len(values) % 2 == 0)):
            raise ValueError
    except ValueError:
        expected = f"expected a class ({first_few(map(str, numbers), len(numbers))}), and x y width height or a polygon"
        raise DataError(f"{path} has the line {line!r}; {expected}") from None
    label = numbers[label]
    if is_box:
        x, y, width, height = values
        return Entry([x - width / 2, y - height / 2, x + width / 2, y + height / 2], label)
    xs, ys = values[::2], values[1::2]
    area = abs(sum(x * v - u * y for x, y, u, v in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))) / 2
    return Entry([min(xs), min(ys), max(xs), max(ys)], label, False, area or None, json.dumps([values]))
