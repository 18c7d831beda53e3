import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.columns import TargetSource, targets_of
from data.sources import ShapesSource
from data.transforms import build_mixing
from training.objectives import Labels, balance, build_objective


def test_balanced_labels_weigh_positives_and_negatives_alike():
    """The loss equals that of a loop. With outputs of 0, a label's positives cost as much as its negatives."""
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 3)) < [0.1, 0.5, 0.8]).astype(np.uint8)
    labels[0] = 1
    objective = build_objective("labels", list("abc"), labels=labels, positive_weights="balanced")
    outputs, targets = torch.from_numpy(rng.normal(size=(40, 3))).float(), torch.from_numpy(labels).float()
    weights, total, unweighted = balance(labels), 0.0, 0.0
    for row, own in zip(outputs.sigmoid().double().tolist(), labels.tolist(), strict=True):
        total -= sum(w * np.log(p) if y else np.log(1 - p) for p, y, w in zip(row, own, weights, strict=True))
        unweighted -= sum(np.log(p) if y else np.log(1 - p) for p, y in zip(row, own, strict=True))
    assert objective.loss(outputs, targets).item() == pytest.approx(total / 120, rel=1e-5)
    assert np.allclose(weights * labels.sum(axis=0), 40 - labels.sum(axis=0))
    rows = objective.to_rows(outputs, targets, torch.empty(0))
    assert np.mean([row[2] for row in rows]) == pytest.approx(unweighted / 120, rel=1e-5)


@pytest.mark.parametrize(("name", "expected"), [("l1", F.l1_loss), ("l2", F.mse_loss), ("huber", F.huber_loss)])
def test_numbers_are_standardized_and_come_back_in_their_units(name, expected):
    values = np.random.default_rng(0).normal([1e6, 0.1], [10, 1e-3], (50, 2))
    objective = build_objective("numbers", ["a", "b"], labels=values, regression_loss=name)
    source = TargetSource(ShapesSource("train", 3), ["a", "b"], values)
    targets = torch.from_numpy(targets_of(source, ["a", "b"], objective.scale))
    assert targets.mean().abs() < 1e-2 and targets.std(dim=0, correction=0).numpy() == pytest.approx([1, 1], abs=1e-5)
    outputs = torch.randn(50, 2)
    assert objective.loss(outputs, targets) == expected(outputs, targets)
    true, predicted, losses = zip(*objective.to_rows(outputs, targets, torch.empty(0)), strict=True)
    assert np.allclose(true, values, rtol=1e-9, atol=1e-5) and np.mean(losses) == pytest.approx(
        expected(outputs, targets).item(), rel=1e-5
    )
    assert np.allclose(predicted, outputs.double().numpy() * values.std(axis=0) + values.mean(axis=0))


def test_mixing_mixes_labels_as_it_mixes_images():
    """The channels of each image have the values of its labels, so mixed images and mixed labels must be equal."""
    torch.manual_seed(0)
    np.random.seed(0)
    options = dict(mixup_alpha=0.8, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=3, multi_label=True)
    _, mix = build_mixing(0.0, device=torch.device("cpu"), **options)
    labels = torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]])
    images, mixed = mix(labels[:, :, None, None].expand(4, 3, 8, 8).clone(), labels.clone())
    assert torch.allclose(images[:, :, 0, 0], mixed) and not torch.equal(mixed, labels)
    assert Labels(list("abc")).loss(torch.zeros(4, 3), mixed).item() == pytest.approx(np.log(2))
