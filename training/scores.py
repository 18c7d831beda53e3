"""Score predictions on a whole data set, from one row per image. The order of the rows does not matter."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np


def score_classification(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return `val_loss`, `top1` and `top5` in percent, and `per_class_accuracy`: name -> percent, None without images.

    If some classes have no image, also `subset_top1`: the accuracy of the best one among those that have.

    Args:
        rows: index of the image, its label, class numbers with the best first (at least 5, or all classes), the best
            one among the classes that have images, its loss.
        classes: names.
    """
    _, labels, rankings, best_present, losses = zip(*rows, strict=True)
    labels = np.asarray(labels)
    hits = np.asarray(rankings) == labels[:, None]  # (images, class numbers of a row)
    images = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[hits[:, 0]], minlength=len(classes))
    subset = {"subset_top1": 100 * int((labels == best_present).sum()) / len(hits)} if not images.all() else {}
    return {
        "val_loss": fmean(losses),
        **subset,
        "top1": 100 * int(hits[:, 0].sum()) / len(hits),
        "top5": 100 * int(hits[:, :5].sum()) / len(hits),
        "per_class_accuracy": {
            name: 100 * int(r) / int(n) if n else None for name, r, n in zip(classes, right, images, strict=True)
        },
    }


def score_segmentation(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return mean IoU and accuracies, in percent over all images together, from areas in place of masks.

    `mean_iou` is averaged over the classes in an annotation or a prediction, `mean_accuracy` over those in an
    annotation; `per_class_iou` and `per_class_accuracy` are None for an absent class.

    Args:
        rows: index of the image, areas (3, classes) as `metrics.segmentation_areas` returns them. A pixel of one image
            at least has a class.
        classes: names.
    """
    hits, predicted, labelled = np.sum([areas for _, areas in rows], axis=0, dtype=np.int64).tolist()
    iou, accuracy = {}, {}
    for name, hit, of_prediction, of_label in zip(classes, hits, predicted, labelled, strict=True):
        union = of_prediction + of_label - hit
        iou[name] = 100 * hit / union if union else None
        accuracy[name] = 100 * hit / of_label if of_label else None
    return {
        "mean_iou": fmean(value for value in iou.values() if value is not None),
        "mean_accuracy": fmean(value for value in accuracy.values() if value is not None),
        "overall_accuracy": 100 * sum(hits) / sum(labelled),
        "per_class_iou": iou,
        "per_class_accuracy": accuracy,
    }
