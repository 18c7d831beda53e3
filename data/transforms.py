"""Image to network input, of its type: the crop of pre-training, that of training a classifier with RandAugment, and
the centre crop of evaluation.

Pure functions: what is random comes from the generator that is passed in. Images are (C, H, W), uint8, or float32 in
[0, 1]; sizes are (height, width) and boxes (top, left, height, width), all in pixels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps

from data.sampling import seeded


def random_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A box (top, left, h, w) inside a height x width image, distributed as torchvision's RandomResizedCrop.

    `scale` bounds the box's share of the area, `ratio` its width / height, uniform in the logarithm. Ten draws that do
    not fit end in the central box of the nearest ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def empty_images(count: int, channels: int, size: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Room for images (count, channels, *size), in memory (count, *size, channels), as decoders and the resizing want
    it."""
    return torch.empty(count, *size, channels, dtype=dtype).permute(0, 3, 1, 2)


def resized_crop(
    image: torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int], out: torch.Tensor | None = None
) -> torch.Tensor:
    """The box (top, left, h, w) of `image`, resized to `size` by antialiased bicubic: (C, *size), of its type.

    As in torchvision, nothing outside the box enters the result; a box of that very size comes back bit for bit. The
    result is written into `out`, where that is given; an image of `empty_images` is filled fastest.
    """
    top, left, h, w = box
    crop = image[:, top : top + h, left : left + w]
    if (h, w) == tuple(size):
        return crop if out is None else out.copy_(crop)
    if out is None:
        out = empty_images(1, len(image), size, image.dtype)[0]
    elif not out.permute(1, 2, 0).is_contiguous():  # torch would write beside others
        return out.copy_(resized_crop(image, box, size))
    if crop.is_contiguous():  # planes, which no decoder makes, and which torch cannot resize to pixels
        crop = crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    # As torch.nn.functional.interpolate, which has no `out` and lays some results out otherwise: a third of the time
    torch.ops.aten._upsample_bicubic2d_aa.out(crop[None], size, False, None, None, out=out[None])
    return out.clamp_(0, 1) if out.is_floating_point() else out  # a cubic filter overshoots at edges


def pretraining(
    image: torch.Tensor,
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A random resized crop, mirrored half the time (MAE, appendix A.1): (C, H, W) -> (C, *size), written into `out`
    where that is given."""
    crop = resized_crop(image, random_crop_box(rng, *image.shape[1:], scale=scale), size, out)
    if rng.random() < 0.5:
        crop = crop.flip(2) if out is None else out.copy_(crop.flip(2))
    return crop


def training(
    image: torch.Tensor,
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    augment: Callable[[Image.Image], Image.Image] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A random resized crop, mirrored half the time, then `augment`ed: (C, H, W) -> (C, *size), written into `out`
    where that is given.

    `augment`, for uint8 alone, takes and returns a PIL image of mode RGB, or L where C is 1. It may draw from the
    global generators of `random`, NumPy and torch, which are seeded from `rng` for it and restored.
    """
    crop = pretraining(image, rng, size, scale=scale, out=out)
    if augment is None:
        return crop
    pixels = crop.permute(1, 2, 0).numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))
    with seeded(int(rng.integers(2**64, dtype=np.uint64))):
        picture = augment(picture)
    augmented = torch.from_numpy(np.array(picture).reshape(pixels.shape)).permute(2, 0, 1)
    return augmented if out is None else out.copy_(augmented)


def rand_augment(magnitude: int, size: tuple[int, int], mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """timm's RandAugment "rand-m{magnitude}-mstd0.5-inc1", as its create_transform builds it for bicubic images of
    `size` (Cubuk et al. 2019; MAE, table 9).

    It takes and returns a PIL image of mode RGB, or L where `mean` has one entry, and draws from the global generators.
    What a turned or shifted image leaves open is filled with `mean`, one value in [0, 1] a channel.
    """
    from timm.data.auto_augment import rand_augment_transform

    options = dict(
        translate_const=int(min(size) * 0.45),
        img_mean=tuple(min(255, round(255 * value)) for value in mean),
        interpolation=Image.Resampling.BICUBIC,
    )
    augment = rand_augment_transform(f"rand-m{magnitude}-mstd0.5-inc1", options)
    for operation in augment.ops:
        if operation.name == "PosterizeIncreasing":
            operation.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's operation, which keeps 0 bits at a drawn magnitude of 10: that is black, but Pillow 13 refuses it."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def evaluation(image: torch.Tensor, size: tuple[int, int], *, crop_ratio: float = 1.0) -> torch.Tensor:
    """The centre of `image`, proportions kept: (C, H, W) of any H x W -> (C, *size).

    The image is resized until it just covers size / crop_ratio, then `size` is cut from its centre: (224, 224) with
    crop_ratio 0.875 is torchvision's Resize(256) and CenterCrop(224). Raises ValueError unless 0 < crop_ratio <= 1.
    """
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"crop_ratio is {crop_ratio}; expected more than 0 and at most 1")
    cover_h, cover_w = (math.floor(side / crop_ratio + 1e-6) for side in size)
    height, width = image.shape[1:]
    # Strips lose their ends first, far from what is kept: 1 x 100000 pixels would be resized to 224 x 22400000.
    cut_h = max(0, height - 8 * math.ceil(width * cover_h / cover_w)) // 2
    cut_w = max(0, width - 8 * math.ceil(height * cover_w / cover_h)) // 2
    image = image[:, cut_h : height - cut_h, cut_w : width - cut_w]
    height, width = image.shape[1:]
    if height * cover_w <= width * cover_h:
        new_h, new_w = cover_h, width * cover_h // height
    else:
        new_h, new_w = height * cover_w // width, cover_w
    image = resized_crop(image, (0, 0, height, width), (new_h, new_w))
    top, left = round((new_h - size[0]) / 2), round((new_w - size[1]) / 2)
    return image[:, top : top + size[0], left : left + size[1]]
