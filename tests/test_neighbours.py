import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.neighbours import linear_sums, linear_vote, own_features, rank_me, score_features


def test_linear_classifier_is_least_squares():
    """Without penalty, it equals torch's solver. Sums of parts add up, and the scale of features does not matter."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    features = torch.randn(200, 5, generator=generator) + F.one_hot(labels, 5)
    queries, scale = torch.randn(50, 5, generator=generator), torch.tensor([1e3, 1.0, 1e-3, 5.0, 2.0])
    sums = linear_sums(features, labels, 3)
    weight = torch.linalg.lstsq(F.pad(features, (0, 1), value=1).double(), F.one_hot(labels, 3).double()).solution
    expected = (F.pad(queries, (0, 1), value=1).double() @ weight).argmax(dim=1)
    assert torch.equal(linear_vote(sums, queries, ridge=0), expected)
    parts = linear_sums(features[:70], labels[:70], 3) + linear_sums(features[70:], labels[70:], 3)
    torch.testing.assert_close(parts, sums)
    scaled = linear_vote(linear_sums(features * scale + 7, labels, 3), queries * scale + 7)
    assert torch.equal(scaled, linear_vote(sums, queries))


def features(count, generator):
    """Return features (count, 16) that cluster weakly by 5 classes, and the classes."""
    labels = torch.randint(5, (count,), generator=generator)
    return torch.randn(count, 16, generator=generator) + 1.5 * torch.eye(16)[labels], labels


def scores_of_processes(count, tensors):
    """Return the scores that `count` processes, played by threads, compute from their shares of the tensors."""
    parts, barrier = [None] * count, threading.Barrier(count)

    def gather(rank, here):
        barrier.wait(timeout=60)
        parts[rank] = here
        barrier.wait(timeout=60)
        return [item for part in parts for item in part]

    def score(rank):
        crew = SimpleNamespace(gather=partial(gather, rank))
        bank, bank_labels, *queries = (tensor[rank::count] for tensor in tensors)
        return score_features((bank, bank_labels), tuple(queries) or None, num_classes=5, crew=crew)

    with ThreadPoolExecutor(count) as pool:
        return [*pool.map(score, range(count))]


@pytest.mark.parametrize("count", [1, 3])
def test_scores_of_any_number_of_processes_equal_a_search_in_numpy(count):
    generator = torch.Generator().manual_seed(0)
    bank, queries = features(400, generator), features(100, generator)
    k = int(torch.bincount(bank[1]).min())
    rows, others = (part[0].double().numpy() for part in (queries, bank))
    similarity = rows @ others.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(others, axis=1))
    right = 0
    for row, label in zip(similarity, queries[1].tolist(), strict=True):
        nearest_ones = np.argsort(-row)[:k]
        votes = np.bincount(bank[1][nearest_ones], np.exp(row[nearest_ones] / 0.07), minlength=5)
        right += votes.argmax() == label
    linear = (linear_vote(linear_sums(*bank, 5), queries[0]) == queries[1]).double().mean().item()
    values = np.linalg.svd(others, compute_uv=False)
    shares = values / values.sum()
    expected = {"knn_top1": pytest.approx(right), "linear_top1": pytest.approx(100 * linear)}
    expected["rankme"] = pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    for metrics, text in scores_of_processes(count, (*bank, *queries)):
        assert metrics == expected and f"{right:.2f} % by {k} nearest neighbours" in text
    for metrics, text in scores_of_processes(count, bank):
        assert metrics == {"rankme": expected["rankme"]} and text.endswith("of 16; no labels for k-NN")
    assert 50 < right < 100


def test_the_rank_of_features_that_fill_few_directions():
    directions = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:3]
    moment = directions.T @ directions  # second moments of three orthogonal features of equal length
    assert rank_me(moment) == pytest.approx(3, abs=1e-3)
    assert rank_me(torch.eye(16).double()) == pytest.approx(16, abs=1e-3)


def test_damaged_images_have_no_features():
    """The second of two processes reads images 1, 3 and 5 of 7, of which 1 and 5 are damaged."""

    def read(dataset, indices):
        own = [*indices][1::2]
        for start in (0, 2):
            part = own[start : start + 2]
            images = torch.tensor([[float(index)] * 3 for index in part])
            yield SimpleNamespace(images=images, damaged=[(index, "cut") for index in part if index in (1, 5)])

    run = SimpleNamespace(process_index=1, num_processes=2, device=torch.device("cpu"))
    values, labels = own_features(run, lambda x: 2 * x, range(7), np.arange(7) % 4, width=3, read=read)
    assert values.tolist() == [[6.0, 6.0, 6.0]] and labels.tolist() == [3]


@pytest.mark.parametrize(
    ("most", "expected"), [(None, range(7)), (7, range(7)), (4, [0, 2, 4, 6]), (2, [0, 4]), (9, range(7))]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_at_most_so_many_features_evenly_spread(most, expected, labelled):
    def read(dataset, indices):
        images = torch.tensor([[float(index)] for index in indices])
        yield SimpleNamespace(images=images, damaged=[])

    run = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    given = np.arange(7) % 4 if labelled else None
    values, labels = own_features(run, lambda x: x, range(7), given, width=1, read=read, most=most)
    assert values.flatten().tolist() == [*expected]
    assert labels.tolist() == [i % 4 if labelled else 0 for i in expected]
