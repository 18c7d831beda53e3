"""Augmentation of whole micro-batches, on their device: erasing, mixup and CutMix."""

from collections.abc import Callable

import torch
from torch import nn


def build_mixing(random_erase: float, *, device: torch.device, **options) -> tuple[Callable, Callable | None]:
    """Return what is done to normalized images of a micro-batch.

    Args:
        random_erase: the probability of erasing a part of an image.
        options: those of timm's Mixup; an alpha of 0 turns mixup or CutMix off.

    Returns:
        Erasing, images -> images; and mixing, images, labels (B,) -> images, soft labels (B, num_classes), or None.
    """
    from timm.data.mixup import Mixup
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(random_erase, mode="pixel", device=device) if random_erase else nn.Identity()
    return erase, Mixup(**options) if options["mixup_alpha"] or options["cutmix_alpha"] else None
