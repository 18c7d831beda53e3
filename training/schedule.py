"""The learning rate as a function of the optimizer step."""

import math

DROPS = (8 / 9, 26 / 27)  # shares of a run


def learning_rate_at(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, minimum: float = 0.0, linear: bool = False
) -> float:
    """Return the learning rate of a step: linear from 0 over the warmup, then half a cosine down to the minimum.

    Loshchilov & Hutter 2016; with `linear`, a straight line instead, the "poly" schedule of power 1 of segmentation.

    Args:
        step: counts from 0. The learning rate is 0 at step 0 of a warmup, `peak` at step `warmup_steps` and
            `minimum` at step `total_steps` - 1.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    remaining = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * remaining


def stepped_learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, minimum: float = 0.0
) -> float:
    """Return the learning rate of a step: linear from 0 over the warmup, then `peak`, times 0.1 at each of DROPS.

    As in ViTDet (Li et al. 2022, appendix A.2). Arguments as in `learning_rate_at`; it does not fall below `minimum`.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    drops = sum(step >= round(share * total_steps) for share in DROPS)
    return max(minimum, peak * 0.1**drops)


def is_due(step: int, *every: float) -> bool:
    """Return True if an event that happens every so many steps (0: never), or any of several, is due after `step`."""
    return step > 0 and any(steps and step % steps == 0 for steps in every)
