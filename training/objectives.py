"""Objectives of a classifier: one class for each image, several labels, or numbers.

An objective has a loss, turns outputs into one row per image, and scores the rows. Legend: B batch, T outputs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from training.pictures import confusion_matrix
from training.scores import score_classification, score_labels, score_numbers

NUM_NAMED = 3  # columns that `Numbers.describe` names


class Classes:
    """One class for each image: cross-entropy."""

    best, scale = "top1", None  # the metric that chooses best/, and the scale of the targets

    def __init__(self, names: Sequence[str], *, label_smoothing: float = 0.0):
        self.names, self.label_smoothing = names, label_smoothing

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss () of outputs (B, T) and classes (B,), or soft labels (B, T) after mixing."""
        smoothing = self.label_smoothing if targets.ndim == 1 else 0.0
        return F.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def to_rows(self, outputs: torch.Tensor, targets: torch.Tensor, present: torch.Tensor) -> list[tuple]:
        """Return a row for `score` per image: class, best classes, the best one of the `present` ones, loss."""
        losses = F.cross_entropy(outputs, targets, reduction="none").tolist()
        rankings = outputs.topk(min(5, len(self.names))).indices.tolist()
        best_present = present[outputs[:, present].argmax(dim=1)].tolist()
        return list(zip(targets.tolist(), rankings, best_present, losses, strict=True))

    def score(self, rows: list[tuple]) -> dict:
        """Return the metrics, see `score_classification`."""
        return score_classification(rows, self.names)

    def draw(self, path: Path, rows: list[tuple], *, title: str) -> bool:
        """Draw the confusion matrix, unless there are too many classes to read it; return whether it was drawn."""
        labels, predictions = [row[0] for row in rows], [row[1][0] for row in rows]
        return confusion_matrix(path, labels, predictions, self.names, title=title)

    def describe(self, scores: dict) -> str:
        """Return the accuracies in words."""
        texts = {
            "most_frequent_class": "most frequent class: {:.2f} %",
            "subset_top1": "among the data's classes: {:.2f} %",
        }
        notes = "; ".join(text.format(scores[name]) for name, text in texts.items() if name in scores)
        return f"top-1 {scores['top1']:.2f} %{f' ({notes})' if notes else ''}, top-5 {scores['top5']:.2f} %"


class Labels:
    """Several labels for each image: binary cross-entropy.

    Args:
        positive_weights: the weight (T,) in the loss of each label's positive images; None for 1.
    """

    best, scale = "mean_ap", None

    def __init__(self, names: Sequence[str], *, positive_weights: torch.Tensor | None = None):
        self.names, self.positive_weights = names, positive_weights

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss () of outputs (B, T) and labels (B, T) from 0 to 1."""
        return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=self.positive_weights)

    def to_rows(self, outputs: torch.Tensor, targets: torch.Tensor, present: torch.Tensor) -> list[tuple]:
        """Return a row for `score` per image: labels, their probabilities, and the loss without weights."""
        losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1).tolist()
        labels, probabilities = targets.to(torch.uint8).cpu().numpy(), outputs.sigmoid().cpu().numpy()
        return list(zip(labels, probabilities, losses, strict=True))

    def score(self, rows: list[tuple]) -> dict:
        """Return the metrics, see `score_labels`."""
        return score_labels(rows, self.names)

    def draw(self, path: Path, rows: list[tuple], *, title: str) -> bool:
        """Draw nothing, and return False."""
        return False

    def describe(self, scores: dict) -> str:
        """Return the means over the labels in words."""
        titles = {"mean_ap": "mAP", "mean_auroc": "AUROC", "mean_f1": "F1"}
        return ", ".join(f"{title} {in_words(scores[name], '{:.2f} %')}" for name, title in titles.items())


LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "huber": F.huber_loss}


class Numbers:
    """Numbers for each image, standardized by the mean and standard deviation of the training images.

    Args:
        scale: mean and standard deviation (T,), by which the targets are standardized.
        loss: a key in LOSSES; Huber's threshold is one standard deviation.
    """

    best = "mean_r2"

    def __init__(self, names: Sequence[str], scale: tuple[np.ndarray, np.ndarray], *, loss: str = "l2"):
        self.names, self.scale, self.loss = names, scale, LOSSES[loss]

    def to_rows(self, outputs: torch.Tensor, targets: torch.Tensor, present: torch.Tensor) -> list[tuple]:
        """Return a row for `score` per image: true and predicted values in the columns' own units, loss."""
        losses = self.loss(outputs, targets, reduction="none").mean(dim=1).tolist()
        mean, std = (np.asarray(part, np.float64) for part in self.scale)
        true, predicted = (part.cpu().double().numpy() * std + mean for part in (targets, outputs))
        return list(zip(true, predicted, losses, strict=True))

    def score(self, rows: list[tuple]) -> dict:
        """Return the metrics, see `score_numbers`."""
        return score_numbers(rows, self.names)

    def draw(self, path: Path, rows: list[tuple], *, title: str) -> bool:
        """Draw nothing, and return False."""
        return False

    def describe(self, scores: dict) -> str:
        """Return the mean errors of the first columns, and R2, in words."""
        errors = [f"{name} {scores['per_column_mae'][name]:.4g}" for name in self.names[:NUM_NAMED]]
        remainder = ", ..." if len(self.names) > NUM_NAMED else ""
        r2 = in_words(scores["mean_r2"], "{:.4f}")
        return f"mean absolute error: {', '.join(errors)}{remainder}; R2 {r2}"


def in_words(value: float | None, form: str) -> str:
    """Return a value formatted, or "unknown"."""
    return "unknown" if value is None else form.format(value)


def build_objective(
    target: str,
    names: Sequence[str],
    *,
    labels: np.ndarray | None = None,
    scale: tuple[np.ndarray, np.ndarray] | None = None,
    label_smoothing: float = 0.0,
    positive_weights: str | None = None,
    regression_loss: str | None = None,
    device: torch.device | None = None,
) -> Classes | Labels | Numbers:
    """Return the objective of --target.

    Args:
        labels: labels or numbers (N, T) of the training images, for --positive_weights balanced or the scale.
        scale: mean and standard deviation (T,) of a trained model's numbers; None for those of `labels`.
    """
    if target == "classes":
        return Classes(names, label_smoothing=label_smoothing)
    if target == "labels":
        weights = torch.from_numpy(balance(labels)).float().to(device) if positive_weights == "balanced" else None
        return Labels(names, positive_weights=weights)
    if scale is None:  # float32, as in the model that stores it
        scale = labels.mean(axis=0).astype(np.float32), labels.std(axis=0).astype(np.float32)
    return Numbers(names, scale, loss=regression_loss or "l2")


def balance(labels: np.ndarray) -> np.ndarray:
    """Return the ratio (T,) of images without a label to images with it, for each label of (N, T)."""
    positives = labels.sum(axis=0, dtype=np.int64)
    return (len(labels) - positives) / positives
