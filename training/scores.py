"""How good predictions are, over a whole data set, as metrics of the library `evaluate` that need no network.

Importing `evaluate` takes seconds: a script imports this file where it evaluates.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence

import evaluate
import numpy as np
from datasets import Features, Value
from datasets import Sequence as ListOf


class ClassificationScores(evaluate.Metric):
    """Accuracies and the mean loss, from one row an image.

    `predictions`: (N, K) class numbers, the best first, K = min(5, number of classes); `references`: (N,) labels;
    `losses`: (N,). `add_batch` takes arrays, lists or tensors on a CPU. Everything stays in memory.

    `compute(classes=[names])` returns `val_loss`; `top1`, `top5` in percent; `per_class_accuracy`: name -> the percent
    of the class's images whose best prediction is right, None for a class without images. The order of rows makes no
    difference, not even in the last digit.
    """

    def __init__(self):
        with tempfile.TemporaryDirectory() as unused:  # `evaluate` wants a folder even where it writes nothing
            super().__init__(keep_in_memory=True, cache_dir=unused, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": ListOf(Value("int64")),
            "references": Value("int64"),
            "losses": Value("float64"),
        }
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy, accuracy of each class, mean loss.",
            citation="",
            inputs_description="",
            features=Features(features),
        )

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


class SegmentationScores(evaluate.Metric):
    """Mean IoU, and accuracies, from one row an image: its areas (see `metrics.segmentation_areas`), which are all that
    these scores depend on and take no memory to speak of, unlike masks.

    `intersections`, `prediction_areas`, `label_areas`: (M, N) pixels of each of N classes, whole numbers, of M images.
    `add_batch` takes arrays, lists or tensors on a CPU.

    `compute(classes=[names])` returns, in percent and over all images together: `mean_iou`, the mean of intersection /
    union over the classes that occur in an annotation or a prediction; `mean_accuracy`, the mean of intersection /
    label area over the classes that occur in an annotation; `overall_accuracy`, of all annotated pixels;
    `per_class_iou` and `per_class_accuracy`: name -> its value, None for a class that does not occur. Sums are exact,
    so the order of rows makes no difference. Raises ValueError where no pixel at all is annotated.
    """

    def __init__(self):
        with tempfile.TemporaryDirectory() as unused:  # `evaluate` wants a folder even where it writes nothing
            super().__init__(keep_in_memory=True, cache_dir=unused, seed=0)

    def _info(self) -> evaluate.MetricInfo:
        names = ("intersections", "prediction_areas", "label_areas")
        return evaluate.MetricInfo(
            description="Mean IoU, mean accuracy, accuracy of all pixels, IoU and accuracy of each class.",
            citation="",
            inputs_description="",
            features=Features({name: ListOf(Value("int64")) for name in names}),
        )

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
    """The mean of those that are not None."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known)
