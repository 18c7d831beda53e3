"""What a classifier is trained for: one class for each image, several labels, or numbers.

Each objective is a loss, and says how outputs become answers and how these are scored. Legend: B batch, T outputs.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from training.pictures import confusion_matrix
from training.scores import score_classification, score_labels, score_numbers

NUM_NAMED = 3  # columns in a line of text


class Classes:
    """One class for each image: cross-entropy. Set `present`, the classes of the validation images, on their device."""

    best, scale = "top1", None

    def __init__(self, names: Sequence[str], *, label_smoothing: float = 0.0):
        self.names, self.label_smoothing, self.present = names, label_smoothing, torch.arange(len(names))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss () of outputs (B, T) and classes (B,), or soft labels (B, T) after mixing."""
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def answers(self, outputs: torch.Tensor, targets: torch.Tensor) -> list[tuple]:
        """Return for each image what `score` needs: class, best classes, the best one of those present, loss."""
        losses = F.cross_entropy(outputs, targets, reduction="none").tolist()
        rankings = outputs.topk(min(5, len(self.names))).indices.tolist()
        best_present = self.present[outputs[:, self.present].argmax(dim=1)].tolist()
        return list(zip(targets.tolist(), rankings, best_present, losses, strict=True))

    def score(self, answers: list[tuple]) -> dict:
        """Return the metrics, see `score_classification`."""
        return score_classification(answers, self.names)

    def draw(self, path: Path, answers: list[tuple], *, title: str) -> bool:
        """Draw the confusion matrix, unless there are too many classes to read it; return whether it was drawn."""
        labels, predictions = [answer[0] for answer in answers], [answer[1][0] for answer in answers]
        return confusion_matrix(path, labels, predictions, self.names, title=title)

    def describe(self, scores: dict) -> str:
        """Return the accuracies in words."""
        subset = f" ({scores['subset_top1']:.2f} % among the classes of the data)" if "subset_top1" in scores else ""
        return f"top-1 {scores['top1']:.2f} %{subset}, top-5 {scores['top5']:.2f} %"


class Labels:
    """Several labels for each image: binary cross-entropy.

    Args:
        positive_weights: the weight of each label's positive images in the loss; None for 1.
    """

    best, scale = "mean_ap", None

    def __init__(self, names: Sequence[str], *, positive_weights: np.ndarray | None = None):
        self.names, self.weights = names, None
        if positive_weights is not None:
            self.weights = torch.from_numpy(positive_weights).float()

    def _losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.weights is not None:
            self.weights = self.weights.to(outputs.device)  # a copy, for which the device waits, at the first step only
        return F.binary_cross_entropy_with_logits(outputs, targets.float(), pos_weight=self.weights, reduction="none")

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss () of outputs (B, T) and labels (B, T) from 0 to 1."""
        return self._losses(outputs, targets).mean()

    def answers(self, outputs: torch.Tensor, targets: torch.Tensor) -> list[tuple]:
        """Return for each image what `score` needs: labels, their probabilities, loss."""
        losses = self._losses(outputs, targets).mean(dim=1).tolist()
        return list(zip(targets.int().tolist(), outputs.sigmoid().tolist(), losses, strict=True))

    def score(self, answers: list[tuple]) -> dict:
        """Return the metrics, see `score_labels`."""
        return score_labels(answers, self.names)

    def describe(self, scores: dict) -> str:
        """Return the means over the labels in words."""
        return ", ".join(f"{title} {scores[name]:.2f} %" for name, title in LABEL_SCORES.items())


LABEL_SCORES = {"mean_ap": "mAP", "mean_auroc": "AUROC", "mean_f1": "F1"}
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class Numbers:
    """Numbers for each image, standardized by the mean and standard deviation of the training images.

    Args:
        scale: mean and standard deviation (T,), float64, by which the targets are standardized.
        loss: a key in LOSSES; Huber's threshold is one standard deviation.
    """

    best = "mean_r2"

    def __init__(self, names: Sequence[str], scale: tuple[np.ndarray, np.ndarray], *, loss: str = "l2"):
        self.names, self.scale = names, scale
        self.loss, self._losses = LOSSES[loss], partial(LOSSES[loss], reduction="none")

    def answers(self, outputs: torch.Tensor, targets: torch.Tensor) -> list[tuple]:
        """Return for each image what `score` needs: true and predicted values in the columns' own units, loss."""
        losses = self._losses(outputs, targets).mean(dim=1).tolist()
        mean, std = self.scale
        true, predicted = (part.cpu().double().numpy() * std + mean for part in (targets, outputs))
        return list(zip(true.tolist(), predicted.tolist(), losses, strict=True))

    def score(self, answers: list[tuple]) -> dict:
        """Return the metrics, see `score_numbers`."""
        return score_numbers(answers, self.names)

    def describe(self, scores: dict) -> str:
        """Return the mean errors of the first columns, and R2, in words."""
        errors = [f"{name} {scores['per_column_mae'][name]:.4g}" for name in self.names[:NUM_NAMED]]
        more = ", ..." if len(self.names) > NUM_NAMED else ""
        return f"mean absolute error: {', '.join(errors)}{more}; R2 {scores['mean_r2']:.4f}"


def build_objective(
    target: str,
    names: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    scale: tuple[np.ndarray, np.ndarray] | None = None,
    label_smoothing: float = 0.0,
    positive_weights: str | None = None,
    regression_loss: str | None = None,
) -> Classes | Labels | Numbers:
    """Return the objective of --target.

    Args:
        labels: those of the training images (N, T), which balance labels, and standardize numbers unless a trained
            model gives the `scale`.
    """
    if target == "classes":
        return Classes(names, label_smoothing=label_smoothing)
    if target == "labels":
        return Labels(names, positive_weights=balance(labels) if positive_weights == "balanced" else None)
    return Numbers(names, scale or (labels.mean(axis=0), labels.std(axis=0)), loss=regression_loss or "l2")


def balance(labels: np.ndarray) -> np.ndarray:
    """Return for each label of (N, T) how many images lack it for one that has it: (T,)."""
    positives = labels.sum(axis=0, dtype=np.int64)
    return (len(labels) - positives) / positives
