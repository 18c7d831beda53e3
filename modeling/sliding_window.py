"""Segment whole images of any size in bounded memory, without gradients.

A `model` here is any function of images (B, C, H, W) that returns logits (B, N, H, W), such as a `Segmenter` in
evaluation mode.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from modeling.upernet import resize

BATCH_SIZE = 8  # windows per forward pass, but at least one of each image
MAP_VALUES = 2**25  # values of the class maps that `labels_at` has in memory at a time: 128 MiB


def windows(size: tuple[int, int], window: int) -> list[tuple[int, int]]:
    """Return (top, left) of the windows that cover an image of `size` (H, W), row by row, two thirds of a side apart.

    All have min(window, H) x min(window, W) pixels. The last windows of a row or column end at the edge, as in
    mmsegmentation.
    """
    stride = max(1, 2 * window // 3)
    ends = [max(0, side - window) for side in size]
    tops, lefts = ([min(at, end) for at in range(0, end + stride, stride)] for end in ends)
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def sliding_window(model: Callable, images: torch.Tensor, *, window: int) -> torch.Tensor:
    """Return the logits (B, N, H, W), float32, of images (B, C, H, W): at each pixel the mean over its windows."""
    size = images.shape[-2:]
    height, width = (min(window, side) for side in size)
    parts = [(..., slice(top, top + height), slice(left, left + width)) for top, left in windows(size, window)]
    total, counts = None, images.new_zeros(size, dtype=torch.float32)
    positions = max(1, BATCH_SIZE // len(images))
    for start in range(0, len(parts), positions):
        group = parts[start : start + positions]
        logits = model(torch.cat([images[part] for part in group]))
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *size, dtype=torch.float32)
        for part, part_logits in zip(group, logits.split(len(images)), strict=True):
            total[part] += part_logits
            counts[part] += 1
    return total.div_(counts)


def labels_at(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the best class of each pixel (H, W), uint8, of logits (N, h, w) resized bilinearly to `size` (H, W).

    This equals the argmax of all resized maps, but resizes a few classes at a time (at most MAP_VALUES values, at least
    one class) and keeps the best so far. N is at most 256.
    """
    best = logits.new_full(tuple(size), -torch.inf, dtype=torch.float32)
    labels = torch.zeros_like(best, dtype=torch.uint8)
    portion = max(1, MAP_VALUES // (size[0] * size[1]))
    for first in range(0, len(logits), portion):
        # Images of one channel, because PyTorch's rounding depends on the number of channels
        maps = resize(logits[first : first + portion, None].float(), size)[:, 0]
        for number, values in enumerate(maps, start=first):  # in place: faster than the maximum of all for large maps
            labels.masked_fill_(values > best, number)
            torch.maximum(values, best, out=best)
    return labels


@torch.no_grad()
def predict(
    model: Callable, views: list[torch.Tensor], size: tuple[int, int], *, window: int | None, flip: bool
) -> torch.Tensor:
    """Return the best class of each pixel (B, H, W), uint8, from the same images at one or several sizes.

    One view without `flip` gives the argmax of its logits, resized to `size`. The class probabilities of several views
    are averaged at a common size, as in mmsegmentation's multi-scale testing. It is `size`, or that of the largest view
    if smaller, so that memory does not depend on the annotation's size.

    Args:
        views: the normalized images at each size, (B, C, h_i, w_i).
        size: H and W of the result.
        window: side of sliding windows in pixels; None: the model sees whole views.
        flip: also average over mirrored views.
    """
    logits_of = model if window is None else partial(sliding_window, model, window=window)
    if len(views) == 1 and not flip:
        scores = logits_of(views[0])
    else:
        common = min(size, max((view.shape[-2:] for view in views), key=math.prod), key=math.prod)
        scores = 0
        for view in views:  # a sum, whose argmax is that of the mean
            scores = scores + resize(logits_of(view).float(), common).softmax(dim=1)
            if flip:
                scores += resize(logits_of(view.flip(-1)).flip(-1).float(), common).softmax(dim=1)
    return torch.stack([labels_at(image_scores, size) for image_scores in scores])
