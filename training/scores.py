"""How good predictions are, over a whole data set, as metrics of the library `evaluate` that need no network.

Importing `evaluate` takes seconds: a script imports this file where it evaluates.
"""

import math
import tempfile
from collections.abc import Sequence

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
