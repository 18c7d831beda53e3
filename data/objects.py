"""Annotated objects of images, and the sources that read them.

Boxes are (x1, y1, x2, y2) in pixels from the upper left corner of the image. Sizes are (height, width).
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
from data.index import DataError, Names, first_few
from data.shapes import CLASSES
from data.sources import ShapesSource


class Objects(NamedTuple):
    """The annotated objects of an image."""

    boxes: np.ndarray  # (n, 4), float64
    labels: np.ndarray  # (n,), int64: classes from 0
    crowd: np.ndarray  # (n,), bool: groups of objects, which are neither used for training nor scored
    areas: np.ndarray  # (n,), float64: pixels; they decide if an object counts as small, medium or large
    masks: list | None  # polygons [[x, y, x, y, ...], ...] or COCO's RLE for each object; None for data without masks


class Entry(NamedTuple):
    """An annotated object."""

    box: list[float]  # x1, y1, x2, y2, in pixels, or relative to width and height
    label: int
    crowd: bool = False
    area: float | None = None  # in the box's units; None: the area of the box
    mask: str | None = None  # JSON of polygons or RLE, in the box's units; lists of numbers take six times the memory


class ObjectSource(FileSource):
    """Read images and their annotated objects.

    Args:
        names: names of the files, relative to `root`.
        objects: the objects of each image, packed by ObjectPacker in one flat array, which worker processes share.
        sizes: (H, W) of each image in the annotations; None if the annotations are relative to the size.
        classes: names of the classes.
        class_ids: numbers of the classes in the annotations.
        lacks_masks: reason why masks cannot be used, see ObjectPacker; "" if each object has one.
    """

    def __init__(
        self,
        root: Path,
        names: Names | list[bytes],
        objects: Names,
        *,
        sizes: Sequence[tuple[int, int]] | None,
        classes: list[str],
        class_ids: list[int],
        lacks_masks: str,
    ):
        super().__init__(names, root)
        self.objects_of = objects
        self.sizes = None if sizes is None else np.asarray(sizes, np.int64).reshape(-1, 2)
        self.classes, self.class_ids, self.lacks_masks = classes, class_ids, lacks_masks
        self.image_ids = list(range(1, len(self) + 1))  # numbers of the images in the annotations

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Return the objects of an image that has this size. Raises DamagedImage if its annotations have another."""
        (height, width), scale = size, np.ones(2)
        if self.sizes is None:
            scale = np.array([width, height])
        elif tuple(self.sizes[index]) != (height, width):
            h, w = self.sizes[index]
            raise DamagedImage(f"has {height} x {width} pixels, and its annotations are for {h} x {w}")
        records = json.loads(self.objects_of[index])
        boxes, labels, crowd, areas, masks = (
            map(list, zip(*records, strict=True)) if records else ([] for _ in range(5))
        )
        boxes = np.reshape(boxes, (-1, 4)) * np.tile(scale, 2)
        areas, of_boxes = np.array(areas, np.float64), (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        if self.lacks_masks:
            masks = None
        elif self.sizes is None:
            masks = [_scaled(polygons, scale) for polygons in masks]
        return Objects(
            boxes,
            np.array(labels, np.int64),
            np.array(crowd, bool),
            np.where(np.isnan(areas), of_boxes, areas * scale.prod()),
            masks,
        )

    def fingerprint(self) -> str:
        content = f"{super().fingerprint()} {self.objects_of.digest()} {self.classes}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _scaled(polygons: list, scale: np.ndarray) -> list:
    return [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in polygons]


class SceneObjects(ShapesSource):
    """Read the built-in scenes and their objects, whose masks and boxes cover the visible parts."""

    lacks_masks, class_ids = "", list(range(1, len(CLASSES) + 1))

    @property
    def image_ids(self) -> list[int]:
        """The numbers of the images."""
        return list(range(1, len(self) + 1))

    def objects(self, index: int, size: tuple[int, int]) -> Objects:
        """Return the objects of a scene; `size` is not used."""
        labels = np.unique(self.masks[index])
        labels = labels[labels > 0]
        masks = [coco_masks.encode(np.asfortranarray(self.masks[index] == label, np.uint8)) for label in labels]
        boxes = coco_masks.toBbox(masks).reshape(-1, 4) if masks else np.zeros((0, 4))
        boxes[:, 2:] += boxes[:, :2]
        areas = np.array([coco_masks.area(mask) for mask in masks], np.float64)
        return Objects(boxes, labels.astype(np.int64) - 1, np.zeros(len(labels), bool), areas, masks)


class ObjectPacker:
    """Pack the objects of a split into bytes, image by image; leave out and count objects without an area.

    `where` names the annotations in messages.
    """

    def __init__(self, where: str):
        self.where, self.buffer, self.ends = where, bytearray(), []
        self.left_out: list[str] = []  # name of the image of each box that was left out
        self.num_single, self.without_mask = 0, []  # objects that are no crowds; the image of each without mask

    def add(self, entries: Iterable[Entry], size: tuple[float, float], name: str) -> None:
        """Pack the next image's objects, except boxes without an area inside `size` (height, width)."""
        records, (height, width) = [], size
        for entry in entries:
            x1, y1, x2, y2 = entry.box
            is_inside = min(x2, width) > max(x1, 0) and min(y2, height) > max(y1, 0)
            if not is_inside or not all(map(math.isfinite, entry.box)):
                self.left_out.append(name)
                continue
            records.append(f"{json.dumps(entry[:4])[:-1]}, {entry.mask or 'null'}]")
            self.num_single += not entry.crowd
            self.without_mask += [] if entry.crowd or entry.mask else [name]
        self.buffer += f"[{', '.join(records)}]".encode()
        self.ends.append(len(self.buffer))

    @property
    def objects(self) -> Names:
        """The objects of all images, as an argument of ObjectSource. Raises DataError if all are crowds or left out."""
        if not self.num_single:
            count = f"{len(self.left_out)} boxes outside their image or of no area" if self.left_out else "only crowds"
            raise DataError(f"{self.where} has no objects that can be scored ({count}); give images with objects")
        return Names(np.frombuffer(self.buffer, np.uint8), np.array(self.ends, np.int64))

    @property
    def lacks_masks(self) -> str:
        """The reason why masks cannot be used, with the objects that have none; "" if each object has one."""
        count = len(self.without_mask)
        if count == self.num_single:
            return f"the annotations in {self.where} have only boxes"
        images = dict.fromkeys(self.without_mask)
        text = f"{count} of {self.num_single} objects in {self.where} have no mask: {first_few(images, len(images))}"
        return text if count else ""

    @property
    def notes(self) -> list[str]:
        """Lines for the plan: boxes that were left out, and objects without a mask if only some have none."""
        count, images = len(self.left_out), dict.fromkeys(self.left_out)
        text = f"left out   {count} boxes outside their image or of no area in {self.where}: "
        notes = [text + first_few(images, len(images))] if count else []
        return notes + ([f"boxes only {self.lacks_masks}"] if 0 < len(self.without_mask) < self.num_single else [])
