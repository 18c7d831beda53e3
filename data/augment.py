"""RandAugment on arrays: the random draws of timm and, up to rounding, its pixels, in about half the time.

Images are (H, W, C) uint8 with 1 or 3 channels. An operation takes an image, a level in [0, 1] ([-1, 1] for those in
`SIGNED`) and the fill values of the areas that a rotation, shear or shift leaves empty.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

GREYS = Image.frombytes("L", (256, 1), bytes(range(256)))  # an operation applied to it gives a look-up table


class RandAugment:
    """Apply two operations, each half the time, as timm's "rand-m{magnitude}-mstd0.5-inc1" with bicubic interpolation.

    For the same seed the result equals timm's after `sampling.seed_everything`, up to rounding. (Cubuk et al. 2019;
    MAE, table 9.)

    Args:
        magnitude: the mean level of an operation, from 0 to 10.
        mean: the fill value of empty areas for each channel, in [0, 1].
    """

    def __init__(self, magnitude: int, mean: Sequence[float]):
        self.magnitude, self.fill = magnitude, tuple(min(255, round(255 * value)) for value in mean)
        self._draws, self._choices = random.Random(), np.random.RandomState()  # creating them is slow

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        """Return the augmented image for a seed below 2**64."""
        draws = self._draws
        draws.seed(seed)
        self._choices.seed([seed % 2**32, seed // 2**32])
        for number in self._choices.randint(len(OPERATIONS), size=2):
            if draws.random() > 0.5:
                continue
            operation, level = OPERATIONS[number], max(0.0, min(draws.gauss(self.magnitude, 0.5), 10.0)) / 10
            if operation in SIGNED and draws.random() > 0.5:
                level = -level
            image = operation(image, level, self.fill)
        return image


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _look_up(image: np.ndarray, table: Image.Image) -> np.ndarray:
    """Replace each value by its entry in a table of 256 pixels."""
    return np.frombuffer(image.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _factor(level: float) -> float:
    return max(0.1, 1.0 + 0.9 * level)


def _auto_contrast(image, level, fill):
    return np.asarray(ImageOps.autocontrast(_to_pillow(image))).reshape(image.shape)


def _equalize(image, level, fill):
    return np.asarray(ImageOps.equalize(_to_pillow(image))).reshape(image.shape)


def _invert(image, level, fill):
    return 255 - image


def _rotate(image, level, fill):
    picture = _to_pillow(image).rotate(30 * level, resample=Image.Resampling.BICUBIC, fillcolor=fill)
    return np.asarray(picture).reshape(image.shape)


def _posterize(image, level, fill):
    return image & np.uint8(256 - 2 ** (4 + int(4 * level)))


def _solarize(image, level, fill):
    return _look_up(image, ImageOps.solarize(GREYS, 256 - int(256 * level)))


def _solarize_add(image, level, fill):
    added = int(110 * level)
    return _look_up(image, GREYS.point([value + added * (value < 128) for value in range(256)]))


def _color(image, level, fill):
    return np.asarray(ImageEnhance.Color(_to_pillow(image)).enhance(_factor(level))).reshape(image.shape)


def _contrast(image, level, fill):
    mean = int(np.asarray(_to_pillow(image).convert("L")).mean() + 0.5)
    return _look_up(image, Image.blend(Image.new("L", GREYS.size, mean), GREYS, _factor(level)))


def _brightness(image, level, fill):
    return _look_up(image, Image.blend(Image.new("L", GREYS.size), GREYS, _factor(level)))


def _sharpness(image, level, fill):
    wide, smooth = image.astype(np.int16), image.copy()
    columns = wide[:-2] + wide[1:-1] + wide[2:]
    sums = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth[1:-1, 1:-1] = (2 * sums + 13) // 26  # Pillow's SMOOTH: weights of 1, and 5 in the centre
    blend = smooth + np.float32(_factor(level)) * (wide - smooth)  # as Image.blend computes it
    return blend.clip(0, 255).astype(np.uint8)


def _move_lines(image: np.ndarray, shifts: np.ndarray, fill: tuple[int, ...], axis: int) -> np.ndarray:
    """Sample each column at y + shifts[x] (axis 0), or each row at x + shifts[y] (axis 1), bicubically.

    A single shift applies to all lines.

    The four weights of a line, which are those of Pillow's affine transforms, form a depthwise convolution. Pillow
    filters each pixel in both directions in double precision; fewer than 10 in 10,000 values differ, each by 1.
    """
    (height, width, channels), size, starts = image.shape, image.shape[axis], np.floor(shifts).astype(int)
    sources = starts[:, None] + np.arange(-1, size + 2)
    sources = np.minimum(np.maximum(sources, 0), size - 1)  # (lines, size + 3), edges repeated
    if len(shifts) == 1:
        pixels = image.take(sources[0], axis=axis)
    else:
        numbers = np.arange(len(shifts))[:, None]
        indices = numbers * width + sources if axis else (sources * width + numbers).T
        pixels = image.reshape(-1, channels).take(indices, axis=0)
    pixels = torch.from_numpy(pixels).flatten(1).float()
    d = shifts - starts
    weights = [-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2]
    weights = torch.from_numpy(np.stack(weights, axis=1).astype(np.float32))[:, None, None]
    weights = weights.expand(image.shape[1 - axis], 1, 1, 4)
    if axis:
        values = F.conv2d(pixels[None, :, None], weights, dilation=(1, channels), groups=height)[0, :, 0]
    else:  # columns as channels, in channels-last memory
        weights = weights.repeat_interleave(channels, dim=0).transpose(2, 3)
        values = F.conv2d(pixels[None, :, None].permute(0, 3, 1, 2), weights, groups=width * channels)
        values = values[0, :, :, 0].T
    values = values.add_(2e-4).clamp_(0, 255)  # Pillow truncates; rounding errors must not lower exact values
    result = values.numpy().astype(np.uint8, order="C").reshape(image.shape)
    colour = np.array(fill, dtype=np.uint8)
    lines = result.swapaxes(0, axis)[None] if len(shifts) == 1 else result.swapaxes(0, 1 - axis)
    for line, shift in zip(lines, shifts.tolist(), strict=True):
        if shift < -0.5:
            line[: math.ceil(-0.5 - shift)] = colour
        elif shift >= 0.5:
            line[math.ceil(size - 0.5 - shift) :] = colour
    return result


def _shear_x(image, level, fill):
    return _move_lines(image, 0.3 * level * (np.arange(image.shape[0]) + 0.5), fill, 1)


def _shear_y(image, level, fill):
    return _move_lines(image, 0.3 * level * (np.arange(image.shape[1]) + 0.5), fill, 0)


def _translate_x(image, level, fill):
    return _move_lines(image, np.array([0.45 * level * image.shape[1]]), fill, 1)


def _translate_y(image, level, fill):
    return _move_lines(image, np.array([0.45 * level * image.shape[0]]), fill, 0)


OPERATIONS: tuple[Callable, ...] = (  # in timm's order, because they are drawn by number
    *(_auto_contrast, _equalize, _invert, _rotate, _posterize, _solarize, _solarize_add, _color, _contrast),
    *(_brightness, _sharpness, _shear_x, _shear_y, _translate_x, _translate_y),
)
SIGNED = {_rotate, _color, _contrast, _brightness, _sharpness, _shear_x, _shear_y, _translate_x, _translate_y}
