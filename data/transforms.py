"""Turn images into network inputs: crops for training and evaluation, and the mixing of micro-batches.

Crops draw random numbers only from the generator that is passed in. Images are (C, H, W), uint8 or float32 in [0, 1],
and keep their type; sizes are (height, width) and boxes (top, left, height, width), all in pixels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from data.decode import VALID_BYTE, VALID_FLOAT

CROP_RATIO = 0.875  # share of a side in an evaluation crop, as in torchvision's Resize(256) and CenterCrop(224)
ASPECT_RATIOS = (3 / 4, 4 / 3)  # width / height of random crops


def evaluation_crop_ratio(img_size: tuple[int, int]) -> float:
    """Return the crop ratio for evaluating a classifier: 1, for the whole image, above 224 pixels."""
    return CROP_RATIO if max(img_size) <= 224 else 1.0


def random_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    style: str = "torchvision",
) -> tuple[int, int, int, int]:
    """Draw a box (top, left, h, w) inside a height x width image, distributed as torchvision's RandomResizedCrop.

    `scale` is the range of the box's share of the area. The logarithm of the aspect ratio is uniform. After ten draws
    that do not fit, the central box of the nearest aspect ratio is returned. With the `style` "official", there is one
    draw, whose sides are clipped to the image's, as in the official MAE's linear probe; such boxes are larger.
    """
    low, high = map(math.log, ASPECT_RATIOS)
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if style == "official":
            h, w = max(1, min(h, height)), max(1, min(w, width))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ASPECT_RATIOS[0]:
        h = max(1, round(width / ASPECT_RATIOS[0]))
    elif width / height > ASPECT_RATIOS[1]:
        w = max(1, round(height * ASPECT_RATIOS[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def empty_images(count: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Allocate images (count, channels, *size) in channels-last memory, which decoders and `resized_crop` use."""
    return torch.empty(count, *size, channels, dtype=dtype).permute(0, 3, 1, 2)


def resized_crop(
    image: torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """Crop `image` to `box` and resize it to `size` by an antialiased bicubic filter: (C, *size).

    As in torchvision, pixels outside the box do not affect the result, and a box of the same size is copied exactly.
    The result is written to `out` if given; images from `empty_images` are filled fastest.
    """
    top, left, h, w = box
    crop = image[:, top : top + h, left : left + w]
    if (h, w) == tuple(size):
        return crop if out is None else out.copy_(crop)
    if out is None:
        out = empty_images(1, len(image), size, image.dtype)[0]
    elif not out.permute(1, 2, 0).is_contiguous():  # torch would write outside it
        return out.copy_(resized_crop(image, box, size))
    if crop.is_contiguous():  # planes, which no decoder makes, and which torch cannot resize into channels-last memory
        crop = crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # torch.nn.functional.interpolate has no `out` and returns some results in another memory layout; this takes a third
    # of its time.
    torch.ops.aten._upsample_bicubic2d_aa.out(crop[None], size, False, None, None, out=out[None])
    return out.clamp_(0, 1) if out.is_floating_point() else out  # a cubic filter overshoots


def split_validity(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split off the last channel, see `decode`: images (B, C, H, W), and True for valid pixels, (B, 1, H, W).

    A pixel of a resized image is valid if no invalid pixel affects it.
    """
    images, validity = images[:, :-1], images[:, -1:]
    valid = validity == VALID_BYTE if validity.dtype == torch.uint8 else (validity - VALID_FLOAT).abs() < 1e-3
    return images, valid


class RandomCrop(NamedTuple):
    """Cut a random resized crop, mirrored half the time (MAE, appendix A.1).

    With `fast`, a JPEG may be decoded at a smaller scale if that does not enlarge any crop, see `min_sides`.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)  # range of the crop's share of the image's area
    fast: bool = False
    style: str = "torchvision"  # see `random_crop_box`

    def __call__(self, image: torch.Tensor, rng: np.random.Generator, out: torch.Tensor | None = None) -> torch.Tensor:
        box = random_crop_box(rng, *image.shape[1:], scale=self.scale, style=self.style)
        crop = resized_crop(image, box, self.size, out)
        if rng.random() < 0.5:
            crop = crop.flip(2) if out is None else out.copy_(crop.flip(2))
        return crop

    @property
    def min_sides(self) -> tuple[int, int] | None:
        """The smallest sides (h, w) of an image from which no crop is enlarged; None to decode at full scale."""
        if not self.fast:
            return None
        side = math.ceil(max(self.size) / math.sqrt(self.scale[0] * ASPECT_RATIOS[0]))
        return side, side


class CentreCrop(NamedTuple):
    """Resize an image to the smallest size of its aspect ratio that covers size / ratio, and cut out the centre."""

    size: tuple[int, int]
    ratio: float = 1.0
    min_sides = None

    def __call__(
        self, image: torch.Tensor, rng: np.random.Generator | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        box, new_size, (top, left) = self.place(*image.shape[1:])
        image = resized_crop(image, box, new_size)
        crop = image[:, top : top + self.size[0], left : left + self.size[1]]
        return crop if out is None else out.copy_(crop)

    def place(self, height: int, width: int) -> tuple[tuple[int, int, int, int], tuple[int, int], tuple[int, int]]:
        """Return the box of a height x width image to resize, its new size, and the crop's (top, left) in that."""
        cover_h, cover_w = (math.floor(side / self.ratio + 1e-6) for side in self.size)
        # The ends of long strips are cut off first: 1 x 100000 pixels would be resized to 224 x 22400000.
        cut_h = max(0, height - 8 * math.ceil(width * cover_h / cover_w)) // 2
        cut_w = max(0, width - 8 * math.ceil(height * cover_w / cover_h)) // 2
        height, width = height - 2 * cut_h, width - 2 * cut_w
        if height * cover_w <= width * cover_h:
            new_h, new_w = cover_h, width * cover_h // height
        else:
            new_h, new_w = height * cover_w // width, cover_w
        corner = round((new_h - self.size[0]) / 2), round((new_w - self.size[1]) / 2)
        return (cut_h, cut_w, height, width), (new_h, new_w), corner


def build_mixing(random_erase: float, *, device: torch.device, **options) -> tuple[Callable, Callable | None]:
    """Return the erasing and the mixing of a micro-batch of normalized images.

    Args:
        random_erase: the probability of erasing a part of an image.
        options: options of timm's Mixup; an alpha of 0 turns mixup or CutMix off.

    Returns:
        Erasing: images -> images. Mixing: (images, labels (B,), or (B, num_classes) with `multi_label`) -> (images,
        soft labels (B, num_classes)); None if both alphas are 0.
    """
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(random_erase, mode="pixel", device=device) if random_erase else nn.Identity()
    return erase, Mixup(**options) if options["mixup_alpha"] or options["cutmix_alpha"] else None
