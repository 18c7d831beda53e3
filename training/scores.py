"""Score predictions on a whole data set, with metrics of the library `evaluate` that work offline.

Importing `evaluate` takes seconds, so scripts import this module in their evaluation.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from typing import ClassVar

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf


class Scores(evaluate.Metric):
    """Compute metrics from one row per image, which are kept in memory. Their order does not matter."""

    columns: ClassVar[dict]  # name -> type of what `compute` takes besides `classes`

    def __init__(self):
        with tempfile.TemporaryDirectory() as unused:  # `evaluate` needs a folder, even to write nothing
            super().__init__(keep_in_memory=True, cache_dir=unused, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=Features(self.columns))


class ClassificationScores(Scores):
    """Compute `val_loss`, `top1` and `top5` in percent, and `per_class_accuracy`: name -> percent, None without images.

    `predictions` (N, K) are class numbers, the best first, K = min(5, number of classes); `references` (N,) are labels.
    """

    columns: ClassVar = dict(predictions=ListOf(Value("int64")), references=Value("int64"), losses=Value("float64"))

    def _compute(self, *, predictions, references, losses, classes: Sequence[str]) -> dict:
        predictions, references = np.asarray(predictions), np.asarray(references)
        hits = predictions == references[:, None]  # (N, K)
        images = np.bincount(references, minlength=len(classes))
        right = np.bincount(references[hits[:, 0]], minlength=len(classes))
        return {
            "val_loss": math.fsum(losses) / len(losses),
            "top1": 100 * int(hits[:, 0].sum()) / len(hits),
            "top5": 100 * int(hits[:, :5].sum()) / len(hits),
            "per_class_accuracy": {
                name: 100 * int(r) / int(n) if n else None for name, r, n in zip(classes, right, images, strict=True)
            },
        }


class SegmentationScores(Scores):
    """Compute mean IoU and accuracies, in percent over all images together, from areas in place of masks.

    The columns (M, N) are pixels of N classes in M images, as `metrics.segmentation_areas` counts them. `mean_iou` is
    averaged over the classes in an annotation or a prediction, `mean_accuracy` over those in an annotation;
    `per_class_iou` and `per_class_accuracy` are None for an absent class. Raises ValueError if no pixel is annotated.
    """

    columns: ClassVar = {name: ListOf(Value("int64")) for name in ("intersections", "prediction_areas", "label_areas")}

    def _compute(self, *, intersections, prediction_areas, label_areas, classes: Sequence[str]) -> dict:
        hits, predicted, labelled = (
            np.sum(np.asarray(rows, dtype=np.int64), axis=0).tolist()
            for rows in (intersections, prediction_areas, label_areas)
        )
        if not sum(labelled):
            raise ValueError(f"{len(label_areas)} annotations are entirely void; expected a pixel with a class in one")
        iou, accuracy = {}, {}
        for name, hit, of_prediction, of_label in zip(classes, hits, predicted, labelled, strict=True):
            union = of_prediction + of_label - hit
            iou[name] = 100 * hit / union if union else None
            accuracy[name] = 100 * hit / of_label if of_label else None
        return {
            "mean_iou": _mean(iou.values()),
            "mean_accuracy": _mean(accuracy.values()),
            "overall_accuracy": 100 * sum(hits) / sum(labelled),
            "per_class_iou": iou,
            "per_class_accuracy": accuracy,
        }


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)


def score_classification(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return the scores of metrics.json from a row per image: index, label, best classes, loss."""
    _, labels, rankings, losses = zip(*rows, strict=True)
    columns: ClassVar = dict(predictions=rankings, references=labels, losses=losses)
    return ClassificationScores().compute(classes=classes, **columns)


def score_segmentation(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return the scores of metrics.json from a row per image: index, areas as `metrics.segmentation_areas` gives."""
    intersections, predicted, labelled = zip(*(areas for _, areas in rows), strict=True)
    columns: ClassVar = dict(intersections=intersections, prediction_areas=predicted, label_areas=labelled)
    return SegmentationScores().compute(classes=classes, **columns)
