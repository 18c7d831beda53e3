"""Make batches for detection from images and their objects: large-scale jittering, masks of crops, and data sets.

Boxes are (x1, y1, x2, y2) and sizes (height, width), in pixels. Inputs are squares of `side` pixels: images are resized
by an antialiased bilinear filter, placed at the upper left corner, and padded with `fill`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from pycocotools import mask as coco_masks
from torchvision.transforms.v2 import functional as F

from data.batches import SourceDataset
from data.decode import DamagedImage, PixelFormat
from data.objects import Objects, ObjectSource, SceneObjects
from data.sampling import sample_generator
from data.transforms import empty_images

SHOWN = 0.5  # minimum score of the detections in pictures
SMALLEST = 1.0  # pixels: boxes with a shorter side in a crop are left out


class DetectionBatch(NamedTuple):
    """A micro-batch for detection, with the objects of all images in one list of n."""

    images: torch.Tensor  # (B, C, S, S), uint8, or float32 in [0, 1]
    sizes: list[tuple[int, int]]  # sizes of the images without their padding
    counts: list[int]  # number of objects in each image
    boxes: torch.Tensor  # (n, 4), float32
    labels: torch.Tensor  # (n,), int64: from 1, as 0 is the background
    masks: torch.Tensor | None  # (pixels,), uint8, 0 or 1: the part of each mask in its box, concatenated
    seeds: list[int]  # for the random numbers of the model, one per image
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read

    def targets(self, device: torch.device) -> list[dict]:
        """Return the objects of each image on `device`, as `modeling.detector.Detector` expects them."""
        parts = {name: getattr(self, name).to(device, non_blocking=True) for name in ("boxes", "labels")}
        if self.masks is not None:
            parts["masks"] = paste_masks(self.masks.to(device, non_blocking=True), self.boxes, self.images.shape[-1])
        parts = {name: part.split(self.counts) for name, part in parts.items()}
        columns = zip(*parts.values(), strict=True)
        return [{**dict(zip(parts, own, strict=True)), "seed": s} for own, s in zip(columns, self.seeds, strict=True)]


def paste_masks(pixels: torch.Tensor, boxes: torch.Tensor, side: int) -> torch.Tensor:
    """Return masks (n, side, side) from the concatenated pixels in their boxes (n, 4) of whole numbers."""
    masks, start = pixels.new_zeros(len(boxes), side, side), 0
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        h, w = y2 - y1, x2 - x1
        mask[y1:y2, x1:x2] = pixels[start : start + h * w].view(h, w)
        start += h * w
    return masks


class EvaluationImage(NamedTuple):
    """A sample for evaluation."""

    index: int
    image: torch.Tensor  # (C, S, S), uint8, or float32 in [0, 1]: the model's input
    size: tuple[int, int]  # size of the image in `image`, without its padding
    original: tuple[int, int]  # size of the image in its file
    objects: Objects | None  # in pixels of the file's image; None if it is damaged
    damaged: str | None  # why the image could not be read


def fill_of(mean: Sequence[float], value_range: Sequence[float] | None) -> list[float]:
    """Return the padding value of each channel, which becomes 0 when it is normalized."""
    return [value if value_range else round(255 * value) for value in mean]


def fit(image: torch.Tensor, side: int, fill: Sequence[float]) -> tuple[torch.Tensor, tuple[int, int]]:
    """Resize an image (C, H, W) to a longer side of `side`; return it padded (C, side, side), and its new size."""
    size = _scaled_size(image.shape[1:], side)
    return _padded(F.resize(image, size), side, fill), size


def _scaled_size(size: Sequence[int], longer: float) -> tuple[int, int]:
    return tuple(max(1, round(each * longer / max(size))) for each in size)


def _padded(image: torch.Tensor, side: int, fill: Sequence[float]) -> torch.Tensor:
    return F.pad(image, [0, 0, side - image.shape[2], side - image.shape[1]], fill=list(fill))


def fit_and_size(
    image: torch.Tensor, index: int, *, side: int, fill: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of a detector (C, side, side), and the image's size in it and original size, as tensors."""
    view, size = fit(image, side, fill)
    return view, torch.tensor(size), torch.tensor(image.shape[1:])


def training_sample(
    image: torch.Tensor,
    objects: Objects,
    rng: np.random.Generator,
    *,
    side: int,
    scales: tuple[float, float],
    fill: Sequence[float],
    masks: bool,
) -> tuple[torch.Tensor, tuple[int, int], np.ndarray, np.ndarray, list[np.ndarray] | None]:
    """Augment an image (C, H, W) and its objects for training by large-scale jittering (Ghiasi et al. 2021), as ViTDet.

    The image is resized to a longer side of `side` times a factor drawn from `scales`. It is cropped to a square at a
    random place, or padded to one, and mirrored half the time. Crowd objects, and boxes with a side shorter than
    SMALLEST, are left out. With `masks`, boxes are computed from the cropped masks.

    Returns:
        The image (C, side, side), its size without the padding, boxes (n, 4), labels (n,) from 1, and the part of each
        mask in its box (height, width), uint8 or bool, or None without `masks`.
    """
    mirrored, factor = rng.random() < 0.5, rng.uniform(*scales)
    old, new = image.shape[1:], _scaled_size(image.shape[1:], side * factor)
    top, left = (int(rng.integers(max(0, each - side) + 1)) for each in new)
    h, w = (min(each, side) for each in new)
    image = F.resize(image, new)[:, top : top + h, left : left + w]
    image = _padded(image.flip(2) if mirrored else image, side, fill)

    numbers = np.flatnonzero(~objects.crowd)
    ratio, start = np.array([new[1] / old[1], new[0] / old[0]]), np.array([left, top])
    boxes = (objects.boxes[numbers].reshape(-1, 2, 2) * ratio - start).clip(0, [w, h])
    if mirrored:
        boxes[:, :, 0] = w - boxes[:, ::-1, 0]
    boxes, labels, parts = boxes.reshape(-1, 4), objects.labels[numbers] + 1, None
    if masks:
        cuts = (_cut_mask(objects.masks[number], old, new, (top, left, h, w), ratio) for number in numbers)
        parts, boxes = [], np.zeros((len(numbers), 4))
        for box, cut in zip(boxes, cuts, strict=True):
            cut = cut[:, ::-1] if mirrored else cut
            box[:] = _box_of(cut)
            x1, y1, x2, y2 = box.astype(int)
            parts.append(cut[y1:y2, x1:x2].copy())  # a view would keep the whole cut in memory
    visible = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) >= SMALLEST
    parts = [parts[number] for number in np.flatnonzero(visible)] if masks else None
    return image, (h, w), boxes[visible], labels[visible], parts


def _cut_mask(
    mask: list | dict, old: tuple[int, int], new: tuple[int, int], box: tuple[int, int, int, int], ratio: np.ndarray
) -> np.ndarray:
    """Return the part (h, w), uint8 or bool, of a mask in the `box` (top, left, h, w) of an image resized to `new`.

    `old` is the image's original size. Polygons are resized before they are rasterized.
    """
    top, left, h, w = box
    if isinstance(mask, list):
        polygons = [(np.reshape(each, (-1, 2)) * ratio - (left, top)).ravel().tolist() for each in mask]
        return coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, h, w)))
    pixels = F.resize(torch.from_numpy(255 * decode_rle(mask, old))[None], new)[0]
    return (pixels[top : top + h, left : left + w] >= 128).numpy()


def decode_rle(mask: dict, size: tuple[int, int]) -> np.ndarray:
    """Return a mask (H, W), uint8, from COCO's RLE, whose counts are numbers or compressed."""
    if isinstance(mask["counts"], list):
        mask = coco_masks.frPyObjects(mask, *size)
    return np.ascontiguousarray(coco_masks.decode(mask))


def _box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box around a mask (H, W), all zeros if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def as_truths(objects: Objects) -> list[dict]:
    """Return the objects of an image as annotations in COCO's format, with classes from 1."""
    boxes = np.concatenate([objects.boxes[:, :2], objects.boxes[:, 2:] - objects.boxes[:, :2]], axis=1)
    columns = zip(boxes.tolist(), objects.labels.tolist(), objects.crowd.tolist(), objects.areas.tolist(), strict=True)
    names, records = ("bbox", "category_id", "iscrowd", "area"), []
    for number, (box, label, crowd, area) in enumerate(columns):
        records.append(dict(zip(names, (box, label + 1, int(crowd), area), strict=True)))
        if objects.masks is not None and objects.masks[number] is not None:
            records[-1]["segmentation"] = objects.masks[number]
    return records


def as_results(detections: dict[str, torch.Tensor]) -> list[dict]:
    """Return the detections in an image as results in COCO's format.

    `boxes` (n, 4) are in pixels of the original image, `labels` (n,) from 1, and `masks`, if present, an iterable of n
    masks (H, W), uint8, which may be computed one at a time.
    """
    boxes = detections["boxes"].cpu().double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
    columns = zip(boxes, detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    records = [dict(bbox=box, category_id=label, score=score) for box, label, score in columns]
    for record, mask in zip(records, detections.get("masks", ()), strict="masks" in detections):
        rle = coco_masks.encode(np.asfortranarray(mask.cpu().numpy()))
        record["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
    return records


class Drawing(NamedTuple):
    """An object to draw in a picture."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2, in pixels of the picture
    label: int  # from 0
    score: float | None  # None for an annotation
    mask: np.ndarray | None  # (h, w) of the picture, bool


def drawings(records: list[dict], original: tuple[int, int], size: tuple[int, int]) -> list[Drawing]:
    """Convert records in COCO's format of an image of size `original` to drawings for its picture of size `size`."""
    parts, (h, w) = [], size
    ratio = np.array([w / original[1], h / original[0]])
    for record in records:
        x, y, width, height = record["bbox"]
        box, mask = np.outer([1, 1], ratio).ravel() * [x, y, x + width, y + height], record.get("segmentation")
        mask = None if mask is None else _cut_mask(mask, original, size, (0, 0, h, w), ratio).astype(bool)
        parts.append(Drawing(tuple(box.tolist()), record["category_id"] - 1, record.get("score"), mask))
    return parts


class DetectionDataset(SourceDataset):
    """Make a DetectionBatch for training from a list of (epoch, sample index).

    The scale, place and flip of a sample depend on (seed, epoch, index) alone. A damaged image is replaced by the next
    readable one or, if there is none, by a black one without objects. `options` are `side`, `scales`, `fill` and
    `masks` of `training_sample`.
    """

    def __init__(self, source: ObjectSource | SceneObjects, *, pixels: PixelFormat, seed: int, **options):
        super().__init__(source, pixels)
        self.seed, self.options = seed, options

    def read(self, index: int) -> tuple[torch.Tensor, Objects]:
        """Return the image and its objects. Raises DamagedImage."""
        image = super().read(index)
        return image, self.source.objects(index, image.shape[1:])

    def __getitems__(self, items: list[tuple[int, int]]) -> DetectionBatch:
        side, masks = self.options["side"], self.options["masks"]
        images = empty_images(len(items), self.pixels.channels, (side, side), self.pixels.dtype)
        damaged: list[tuple[int, str]] = []
        sizes, seeds, columns = [], [], []
        for row, (epoch, index) in enumerate(items):
            sample, _ = self.first_readable(index, damaged)
            rng = sample_generator(self.seed, epoch, index)
            if sample is None:
                nothing = Objects(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0), [])
                sample = torch.zeros(self.pixels.channels, side, side, dtype=self.pixels.dtype), nothing
            images[row], size, *objects = training_sample(*sample, rng, **self.options)
            sizes.append(size)
            columns.append(objects)
            seeds.append(int(rng.integers(2**63)))
        boxes, labels, parts = zip(*columns, strict=True)
        pixels = [part.ravel() for own in parts for part in own] if masks else []
        return DetectionBatch(
            images,
            sizes,
            [len(part) for part in labels],
            torch.from_numpy(np.concatenate(boxes)).float(),
            torch.from_numpy(np.concatenate(labels)),
            torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels])) if masks else None,
            seeds,
            damaged,
        )


class EvaluationImages(SourceDataset):
    """Make a list of EvaluationImage from a list of (epoch, sample index); the epoch does not matter.

    Damaged images are reported, not replaced. `options` are `side` and `fill` of `fit`.
    """

    def __init__(self, source: ObjectSource | SceneObjects, *, pixels: PixelFormat, **options):
        super().__init__(source, pixels)
        self.options = options

    def __getitems__(self, items: list[tuple[int, int]]) -> list[EvaluationImage]:
        return [self._sample(index) for _, index in items]

    def _sample(self, index: int) -> EvaluationImage:
        try:
            image = self.read(index)
            objects = self.source.objects(index, image.shape[1:])
        except DamagedImage as error:
            side = self.options["side"]
            image = torch.zeros(self.pixels.channels, side, side, dtype=self.pixels.dtype)
            return EvaluationImage(index, image, (side, side), (side, side), None, str(error))
        view, size = fit(image, **self.options)
        return EvaluationImage(index, view, size, tuple(image.shape[1:]), objects, None)
