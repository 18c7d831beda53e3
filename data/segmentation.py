"""Make batches for semantic segmentation: sizes, augmentation, data sets of image and mask pairs, and class colours.

Masks are uint8 (H, W) with 0 .. N-1 for the classes and 255 (IGNORED) for void. Sizes are (height, width), in pixels.
Images are resized by an antialiased bilinear filter.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data.batches import SourceDataset
from data.classes import ade20k_classes
from data.decode import DamagedImage, PixelFormat, decode
from data.masks import IGNORED, check_size, decode_labels, to_classes
from data.pairs import PairSource
from data.sampling import sample_generator
from data.transforms import empty_images

SCALES = (0.5, 2.0)  # range of the random resizing in training
MAX_SHARE = 0.75  # maximum share of a class in a crop; otherwise another crop is drawn


def palette(num_classes: int) -> np.ndarray:
    """Return a colour for each class, uint8 (N, 3).

    150 classes have ADE20K's colours, fewer have a subset of these, and more have additional ones. A subset, or the
    additional colours, are chosen one by one, each as far as possible from all colours before it.
    """
    known = ade20k_classes()[1].astype(np.int64)
    steps = np.arange(16, 256, 32)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    colours, others = (list(known), grid) if num_classes >= len(known) else ([known[0]], known)
    distances = ((others[:, None] - np.array(colours)) ** 2).sum(2).min(1)  # to the nearest chosen colour
    while len(colours) < num_classes:
        colours.append(others[distances.argmax()])
        distances = np.minimum(distances, ((others - colours[-1]) ** 2).sum(1))
    return np.array(colours, dtype=np.uint8)


def keep_ratio(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """Return the largest size (h, w) of the same aspect ratio with sides of at most `long` and `short` pixels."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def view_sizes(
    height: int,
    width: int,
    *,
    mode: str,
    scales: Sequence[float],
    resize: tuple[int, int],
    crop_size: int,
    patch_size: int,
) -> list[tuple[int, int]]:
    """Return the sizes at which a model sees an image in evaluation, one for each of `scales`.

    With `mode` "slide", the image fits `resize` (long side, short side) times the scale, aspect ratio kept; with
    "whole", it becomes a square of `crop_size` times the scale. Sides over which no window of `crop_size` slides are
    rounded to whole patches, at least two, as a feature pyramid needs.
    """
    if mode == "slide":
        long, short = resize
        sizes = [keep_ratio(height, width, round(long * scale), round(short * scale)) for scale in scales]
    else:
        sizes = [(crop_size * scale, crop_size * scale) for scale in scales]

    def fit(side: float) -> int:
        slides = mode == "slide" and side > crop_size
        return side if slides else max(2, round(side / patch_size)) * patch_size

    return [(fit(height), fit(width)) for height, width in sizes]


def training_pair(
    image: torch.Tensor,
    mask: torch.Tensor,
    rng: np.random.Generator,
    *,
    crop_size: int,
    resize: tuple[int, int],
    fill: list[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment an image (C, H, W) and its mask (H, W) to squares of `crop_size`, as mmsegmentation does for ADE20K.

    The pair is resized to fit `resize` (long side, short side) times a factor drawn from SCALES. A crop is drawn up to
    ten times, until no class fills MAX_SHARE of the pixels that are not void. It is mirrored half the time and
    distorted. Small images are padded with `fill`, one value per channel (0 .. 255, or in [0, 1] for float32), and
    their masks with void.
    """
    factor = rng.uniform(*SCALES)
    size = keep_ratio(*mask.shape, int(resize[0] * factor), int(resize[1] * factor))
    # Nearest-exact uses pixel centres, as the filter of the image does; plain nearest is off by up to half a pixel.
    mask = F.resize(mask[None], size, InterpolationMode.NEAREST_EXACT)[0]
    top, left, h, w = _crop_box(mask, rng, crop_size)
    image, mask = (each[..., top : top + h, left : left + w] for each in (F.resize(image, size), mask))
    if rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    padding = [0, 0, crop_size - w, crop_size - h]  # at the right and the bottom
    image = F.pad(photometric_distortion(image, rng), padding, fill=list(fill))
    return image, F.pad(mask[None], padding, fill=IGNORED)[0]


def _crop_box(mask: torch.Tensor, rng: np.random.Generator, crop_size: int) -> tuple[int, int, int, int]:
    height, width = (min(side, crop_size) for side in mask.shape)
    for _ in range(10):
        top, left = (int(rng.integers(side - min(side, crop_size) + 1)) for side in mask.shape)
        part = mask.numpy()[top : top + height, left : left + width]
        pixels = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if pixels.max() < MAX_SHARE * pixels.sum() or mask.shape == (height, width):
            break
    return top, left, height, width


def photometric_distortion(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Change brightness, contrast, saturation and hue, each half the time, of (C, H, W), uint8 or float32 in [0, 1].

    As in mmsegmentation, brightness adds -32 to 32 (of 255) to all values, contrast and saturation are multiplied by
    0.5 to 1.5, and the hue is rotated by -18 to 18 degrees. Contrast is changed before or after saturation and hue,
    which are changed only for three channels.
    """
    changed = rng.random(5) < 0.5
    shift, contrast, saturation, hue = rng.uniform([-32, 0.5, 0.5, -18 / 360], [32, 1.5, 1.5, 18 / 360])
    image = image.contiguous()  # makes the hue faster
    if changed[0] and image.is_floating_point():
        image = (image + shift / 255).clamp(0, 1)
    elif changed[0]:
        image = (image.to(torch.int16) + round(shift)).clamp(0, 255).to(torch.uint8)
    if changed[1] and changed[4]:
        image = _multiply(image, contrast)
    if changed[2] and len(image) == 3:
        image = F.adjust_saturation(image, saturation)
    if changed[3] and len(image) == 3:
        image = F.adjust_hue(image, hue)
    if changed[1] and not changed[4]:
        image = _multiply(image, contrast)
    return image


def _multiply(image: torch.Tensor, factor: float) -> torch.Tensor:
    return (image * factor).clamp(0, 1 if image.is_floating_point() else 255).to(image.dtype)


def view_and_preview(
    image: torch.Tensor, index: int, *, sizes: Callable[[int, int], list[tuple[int, int]]], longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of a segmenter (C, h, w), a preview to show (C, h, w), and the image's height and width.

    `sizes` maps the height and width to a list with the size of one view. The sides of the preview have at most
    `longest` pixels.
    """
    height, width = image.shape[1:]
    (view,) = sizes(height, width)
    small = max(height, width) <= longest
    preview = image if small else F.resize(image, keep_ratio(height, width, longest, longest))
    return F.resize(image, view), preview, torch.tensor([height, width])


class SegmentationBatch(NamedTuple):
    """A micro-batch for segmentation."""

    images: torch.Tensor  # (B, C, S, S), uint8, or float32 in [0, 1]
    masks: torch.Tensor  # (B, S, S), uint8: 0 .. N-1, and 255 for void
    indices: list[int]  # the requested samples; for those in `damaged`, image and mask are another sample's
    damaged: list[tuple[int, str]]  # index and reason of every image or mask that could not be read


class EvaluationPair(NamedTuple):
    """A sample for evaluation."""

    index: int
    image: torch.Tensor  # (C, H, W), uint8, or float32 in [0, 1]
    views: list[torch.Tensor]  # (C, h, w): the image at each size; [] if damaged
    mask: torch.Tensor  # (H, W), uint8: 0 .. N-1, and 255 for void
    damaged: str | None  # why image or mask could not be read; they are then one pixel, black and void


def read_pair(source: PairSource, index: int, pixels: PixelFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the image (C, H, W) and the mask (H, W) of a sample.

    Raises DamagedImage, and DataError for the errors that `check_annotations` finds.
    """
    image, name = decode(*source.fetch([index]), pixels), source.mask_name(index)
    try:
        (data,) = source.fetch_masks([index])
        options = dict(name=name, max_pixels=pixels.max_pixels)
        labels = decode_labels(data, len(source.classes), source.mask_format, **options)
    except DamagedImage as error:
        raise DamagedImage(f"its mask {name}: {error}") from None
    mask = torch.from_numpy(to_classes(labels, source.mask_format))
    check_size(name, mask.shape, image.shape[1:])
    return image, mask


class SegmentationDataset(SourceDataset):
    """Make a SegmentationBatch for training from a list of (epoch, sample index).

    The crop, flip and distortion of a sample depend on (seed, epoch, index) alone. A pair with a damaged image or mask
    is replaced by the next readable one or, if there is none, by a black image and void. `options` are `crop_size`,
    `resize` and `fill` of `training_pair`.
    """

    def __init__(self, source: PairSource, *, pixels: PixelFormat, seed: int, **options):
        super().__init__(source, pixels)
        self.seed, self.options = seed, options

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image and the mask. Raises DamagedImage."""
        return read_pair(self.source, index, self.pixels)

    def __getitems__(self, items: list[tuple[int, int]]) -> SegmentationBatch:
        size = self.options["crop_size"], self.options["crop_size"]
        images = empty_images(len(items), self.pixels.channels, size, self.pixels.dtype)
        masks = torch.empty(len(items), *size, dtype=torch.uint8)
        damaged: list[tuple[int, str]] = []
        for row, (epoch, index) in enumerate(items):
            pair, _ = self.first_readable(index, damaged)
            rng = sample_generator(self.seed, epoch, index)
            images[row], masks[row] = training_pair(*pair, rng, **self.options) if pair else (0, IGNORED)
        return SegmentationBatch(images, masks, [index for _, index in items], damaged)


class EvaluationPairs(SourceDataset):
    """Make a list of EvaluationPair from a list of (epoch, sample index); the epoch does not matter.

    `sizes` maps an image's height and width to the sizes (h, w) of its views. Damaged pairs are reported, not replaced.
    """

    def __init__(self, source: PairSource, *, pixels: PixelFormat, sizes: Callable[[int, int], list[tuple[int, int]]]):
        super().__init__(source, pixels)
        self.sizes = sizes

    def __getitems__(self, items: list[tuple[int, int]]) -> list[EvaluationPair]:
        return [self._pair(index) for _, index in items]

    def _pair(self, index: int) -> EvaluationPair:
        try:
            image, mask = read_pair(self.source, index, self.pixels)
        except DamagedImage as error:
            image = torch.zeros(self.pixels.channels, 1, 1, dtype=self.pixels.dtype)
            return EvaluationPair(index, image, [], torch.full((1, 1), IGNORED, dtype=torch.uint8), str(error))
        views = [F.resize(image, size) for size in self.sizes(*mask.shape)]
        return EvaluationPair(index, image, views, mask, None)
