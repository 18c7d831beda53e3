"""Segmentation of whole images, whatever their size, in bounded memory.

A `model` here is any function of images (B, C, H, W) that returns logits (B, N, H, W), such as a `Segmenter` in
evaluation mode. No gradients are kept.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

MAP_VALUES = 2**25  # of the class maps that `labels_at` has in memory at a time: 128 MB


def windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[int, int]]:
    """The (top, left) of the windows that cover an image of `size` (H, W), row by row.

    All have min(window, H) x min(window, W) pixels: the last ones of a row or column are moved back to end at the edge,
    as mmsegmentation does. Raises ValueError for a stride that would leave gaps.
    """
    if not 1 <= stride <= window:
        raise ValueError(f"stride {stride} with windows of {window} pixels; expected 1 to {window}, or it leaves gaps")
    ends = [max(0, side - window) for side in size]
    tops, lefts = ([min(at, end) for at in range(0, end + stride, stride)] for end in ends)
    return [(top, left) for top in tops for left in lefts]


@torch.no_grad()
def sliding_window(
    model: Callable, images: torch.Tensor, *, window: int, stride: int, batch_size: int = 8
) -> torch.Tensor:
    """The logits (B, N, H, W), float32, of images (B, C, H, W): the mean over the windows that hold a pixel.

    The model sees about `batch_size` windows at a time, at least one of each image; besides their logits only the
    result is in memory. Raises ValueError as `windows` does.
    """
    size = images.shape[-2:]
    height, width = (min(window, side) for side in size)
    parts = [(..., slice(top, top + height), slice(left, left + width)) for top, left in windows(size, window, stride)]
    total, counts = None, images.new_zeros(size, dtype=torch.float32)
    positions = max(1, batch_size // len(images))
    for start in range(0, len(parts), positions):
        group = parts[start : start + positions]
        logits = model(torch.cat([images[part] for part in group]))
        if total is None:
            total = logits.new_zeros(len(images), logits.shape[1], *size, dtype=torch.float32)
        for part, own_logits in zip(group, logits.split(len(images)), strict=True):
            total[part] += own_logits
            counts[part] += 1
    return total.div_(counts)


def labels_at(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The best class of each pixel (H, W), uint8, of logits (N, h, w) resized bilinearly to `size` (H, W).

    The same as resizing all and then the argmax, where the first of equals wins, but without N maps of the full size:
    some classes at a time (at least one, MAP_VALUES values at most), and the best so far. N is 256 at most.
    """
    best = logits.new_full(tuple(size), -torch.inf, dtype=torch.float32)
    labels = torch.zeros_like(best, dtype=torch.uint8)
    portion = max(1, MAP_VALUES // (size[0] * size[1]))
    for first in range(0, len(logits), portion):
        # As images of one channel: how torch rounds would depend on the number of channels
        maps = _resized(logits[first : first + portion, None], size)[:, 0]
        if portion < 8:  # large maps one by one and in place: the maximum of a few takes four times as long
            for number, values in enumerate(maps, start=first):
                labels.masked_fill_(values > best, number)
                torch.maximum(values, best, out=best)
        else:
            values, indices = maps.max(dim=0)
            labels = torch.where(values > best, (indices + first).to(torch.uint8), labels)
            best = torch.maximum(values, best)
    return labels


@torch.no_grad()
def predict(
    model: Callable,
    views: list[torch.Tensor],
    size: tuple[int, int],
    *,
    window: int | None,
    stride: int | None,
    flip: bool,
) -> torch.Tensor:
    """The best class of each pixel (B, H, W), uint8, at `size` (H, W), from the same images at one or several sizes.

    `views`: normalised images (B, C, h_i, w_i). The model sees them whole, or through a sliding window where `window`
    is given; with `flip` also mirrored. One view without `flip`: the argmax of its logits resized to `size`. Several:
    the mean of their class probabilities, each from logits resized to a common size first, as mmsegmentation's
    multi-scale testing does. The common size is `size`, or the largest view's where that is smaller (the mean is then
    resized to `size`), so that memory depends on the views alone and not on the annotation's size.
    """

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        if window is None:
            return model(images)
        return sliding_window(model, images, window=window, stride=stride)

    if len(views) == 1 and not flip:
        scores = logits_of(views[0])
    else:
        common = min([size, max((view.shape[-2:] for view in views), key=_area)], key=_area)
        scores = 0
        for view in views:  # a sum instead of the mean, whose argmax is the same
            scores = scores + _resized(logits_of(view), common).softmax(dim=1)
            if flip:
                scores += _resized(logits_of(view.flip(-1)).flip(-1), common).softmax(dim=1)
    return torch.stack([labels_at(own_scores, size) for own_scores in scores])


def _resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps.float(), size=tuple(size), mode="bilinear", align_corners=False)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
