"""Annotated objects of images, and the sources that give them.

Boxes are (x1, y1, x2, y2) in pixels of the image, from its left upper corner. Sizes are (height, width).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_masks

from data.decode import DamagedImage
from data.files import FileSource
from data.index import Names, first_few
from data.shapes import CLASSES
from data.sources import ShapesSource


class Objects(NamedTuple):
    """Hold the annotated objects of an image."""

    boxes: np.ndarray  # (n, 4), float64
    labels: np.ndarray  # (n,), int64: classes from 0
    crowd: np.ndarray  # (n,), bool: groups that are no single object; nobody trains on them, and they are not scored
    areas: np.ndarray  # (n,), float64: pixels, by which objects are small, medium or large
    masks: list | None  # of each object polygons [[x, y, x, y, ...], ...] or COCO's RLE; None in data of boxes alone


class Entry(NamedTuple):
    """Hold an object as a source stores it: five values in JSON."""

    box: list[float]  # x1, y1, x2, y2, in pixels, or relative to width and height
    label: int
    crowd: bool = False
    area: float | None = None  # None: that of the box
    mask: list | dict | None = None  # polygons or RLE, in the box's units


class ObjectSource(FileSource):
    """Read images, and give the objects in them.

    Args:
        names: of the files, relative to `root`.
        entries: of each image, stored as JSON in one flat array, which worker processes share without copies.
        sizes: (H, W) of the images as their annotations say; None where they say none, and are relative to it.
        classes: names of the classes.
        class_ids: the numbers of the classes in the annotations.
        lacks_masks: why masks cannot be used, see `lack_of_masks`; "" if every object has one.
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
        lacks_masks: str,
    ):
        super().__init__(names, root)
        self.objects_of = Names.from_list([json.dumps(part).encode() for part in entries])
        self.sizes = None if sizes is None else np.array(sizes, np.int64).reshape(-1, 2)
        self.classes, self.class_ids, self.lacks_masks = classes, class_ids, lacks_masks
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
        own_areas = np.array([np.nan if entry.area is None else entry.area for entry in entries])
        masks = None
        if not self.lacks_masks:
            masks = [entry.mask for entry in entries]
            masks = masks if self.sizes is not None else [_scaled(polygons, scale) for polygons in masks]
        return Objects(
            boxes,
            np.array([entry.label for entry in entries], np.int64),
            np.array([entry.crowd for entry in entries], bool),
            np.where(np.isnan(own_areas), areas, own_areas * scale.prod()),
            masks,
        )

    def fingerprint(self) -> str:
        content = f"{super().fingerprint()} {self.objects_of.digest()} {self.classes}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _scaled(polygons: list, scale: np.ndarray) -> list:
    return [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in polygons]


class SceneObjects(ShapesSource):
    """Give the objects of the built-in scenes, as far as no other hides them."""

    lacks_masks, class_ids = "", list(range(1, len(CLASSES) + 1))

    @property
    def image_ids(self) -> list[int]:
        """Return the numbers of the images."""
        return list(range(1, len(self) + 1))

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Return the objects in a scene; see ObjectSource."""
        labels = np.unique(self.masks[index])
        labels = labels[labels > 0]
        masks = [coco_masks.encode(np.asfortranarray(self.masks[index] == label, np.uint8)) for label in labels]
        boxes = coco_masks.toBbox(masks).reshape(-1, 4) if masks else np.zeros((0, 4))
        boxes[:, 2:] += boxes[:, :2]
        areas = np.array([coco_masks.area(mask) for mask in masks], np.float64)
        return Objects(boxes, labels.astype(np.int64) - 1, np.zeros(len(labels), bool), areas, masks)


class BoxFilter:
    """Collect the objects of a split, leave out what has no area, and count that."""

    def __init__(self, where: str):
        self.where, self.left_out = where, []

    def keep(self, entries: Iterable[Entry], size: tuple[float, float], name: str) -> list[Entry]:
        """Return the entries whose box has an area inside an image of this size."""
        usable, (height, width) = [], size
        for entry in entries:
            x1, y1, x2, y2 = entry.box
            is_inside = min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0)
            if is_inside and all(map(math.isfinite, entry.box)):
                usable.append(entry)
            else:
                self.left_out.append(name)
        return usable

    @property
    def notes(self) -> list[str]:
        """Return a line of the plan if something was left out."""
        count, names = len(self.left_out), dict.fromkeys(self.left_out)
        text = f"left out   {count} boxes outside their image or of no area in {self.where}: "
        return [text + first_few(names, len(names))] if count else []


def lack_of_masks(entries: Iterable[list[Entry]], names: Sequence[str], where: str) -> str:
    """Return why masks cannot be used: objects without one, counted and named; "" if every object has one."""
    single = [(name, entry) for name, part in zip(names, entries, strict=True) for entry in part if not entry.crowd]
    without_mask = [name for name, entry in single if not entry.mask]
    if len(without_mask) == len(single):
        return f"the annotations in {where} have boxes alone"
    unique = dict.fromkeys(without_mask)
    text = f"{len(without_mask)} of {len(single)} objects in {where} have no mask: {first_few(unique, len(unique))}"
    return text if without_mask else ""


def masks_note(lacks_masks: str) -> list[str]:
    """Return a line of the plan if some objects have a mask and others none."""
    return [f"boxes only {lacks_masks}"] if "have no mask" in lacks_masks else []
