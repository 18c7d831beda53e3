"""Measure features: nearest neighbours, a linear classifier in closed form, and their effective rank.

Legend: N images of the bank, M queries, D width of the features.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

NUM_UNLABELLED = 25_600  # images whose features RankMe needs (Garrido et al. 2023, section 4)


def own_features(
    run, embed: Callable, dataset, labels: np.ndarray | None, *, width: int, read: Callable, most: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and classes of this process's share of a dataset, damaged images left out: (N, D), (N,).

    Args:
        embed: images (B, C, H, W), as the loader yields them -> features (B, D).
        labels: the class of each sample of the dataset; None for features of NUM_UNLABELLED images at most, all of
            class 0.
        width: D.
        read: returns this process's batches of the given indices of a dataset.
        most: number of images at most, evenly spread over the dataset; None for all.
    """
    most = most or len(dataset)
    if labels is None:
        most, labels = min(most, NUM_UNLABELLED), np.zeros(len(dataset), np.int64)
    indices = np.arange(0, len(dataset), -(-len(dataset) // most))
    own = indices[run.process_index :: run.num_processes]
    features, damaged = [torch.empty(0, width, device=run.device)], set()
    for batch in read(dataset, indices):
        features.append(embed(batch.images))
        damaged.update(index for index, _ in batch.damaged)
    intact = torch.tensor([i for i, index in enumerate(own) if index not in damaged], dtype=torch.long)
    return torch.cat(features)[intact], torch.from_numpy(labels[own]).to(run.device)[intact]


def score_features(
    bank: tuple[torch.Tensor, torch.Tensor],
    queries: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    num_classes: int,
    crew,
) -> tuple[dict[str, float], str]:
    """Return `rankme` and, with queries, the accuracies of classifying them by their features, in percent.

    Each process passes its share of the images, and searches its own share of the bank. k-NN takes 200 neighbours, or
    as many as the smallest class has images if that is fewer.

    Args:
        bank: features (N, D) and classes (N,) of training images.
        queries: features (M, D) and classes (M,) of validation images.

    Returns:
        `rankme`, `knn_top1` and `linear_top1`, the last by `linear_vote`; and the same in words.
    """
    bank, bank_labels = bank
    sums = sum(crew.gather([linear_sums(bank, bank_labels, max(1, num_classes)).cpu()]))
    width = bank.shape[1]
    metrics = {"rankme": rank_me(sums[:width, :width])}
    text = f"RankMe {metrics['rankme']:.1f} of {width}"
    if queries is None:
        return metrics, f"{text}; no labels for k-NN"
    queries, labels = (torch.cat(crew.gather([part.cpu()])) for part in queries)
    counts = sum(crew.gather([torch.bincount(bank_labels, minlength=num_classes).cpu()]))
    k = min(200, int(counts[counts > 0].min()))
    similarity, classes = nearest(bank, bank_labels, queries.to(bank.device), k)  # in this process's share
    similarity, classes = (torch.cat(crew.gather([part.cpu()]), dim=1) for part in (similarity, classes))
    similarity, order = similarity.topk(k)
    votes = {
        "knn_top1": knn_vote(similarity, classes.gather(1, order), num_classes),
        "linear_top1": linear_vote(sums, queries),
    }
    metrics |= {name: 100 * (vote == labels).double().mean().item() for name, vote in votes.items()}
    knn, linear = metrics["knn_top1"], metrics["linear_top1"]
    return metrics, f"top-1 {knn:.2f} % by {k} nearest neighbours, {linear:.2f} % by a linear classifier; {text}"


def rank_me(moment: torch.Tensor) -> float:
    """Return RankMe of features Z (N, D), given Z^T Z (D, D) in float64: from 1 to D, NaN if Z is not finite.

    It is exp(entropy) of the normalized singular values (Garrido et al. 2023, arXiv 2210.02885, equation 1).
    """
    if not moment.isfinite().all():
        return float("nan")
    values = torch.linalg.eigvalsh(moment).clamp(min=0).sqrt()
    shares = values / values.sum() + 1e-7
    return (-(shares * shares.log()).sum()).exp().item()


def nearest(
    bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine similarities and classes of the k members of the bank nearest to each query, the nearest first.

    (N, D), (N,), (M, D) -> (M, min(k, N)), (M, min(k, N))
    """
    bank, queries = F.normalize(bank), F.normalize(queries)
    chunk = max(1, 2**26 // max(1, len(bank)))  # queries at a time: their similarities take 256 MiB at most
    results = [(part @ bank.T).topk(min(k, len(bank))) for part in queries.split(chunk)]
    return torch.cat([part.values for part in results]), bank_labels[torch.cat([part.indices for part in results])]


def knn_vote(similarity: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the class of each query (M,) by a vote of its neighbours (M, k), weighted by exp(similarity / 0.07).

    Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
    """
    votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
    return votes.scatter_add_(1, labels, (similarity / 0.07).exp()).argmax(dim=1)


def linear_sums(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the sums that `linear_vote` needs: (N, D), (N,) -> (D + 1, D + 1 + num_classes), float64.

    The sums of several parts of the data can be added.
    """
    dim = features.shape[1]
    sums = torch.zeros(dim + 1, dim + 1 + num_classes, dtype=torch.float64, device=features.device)
    for part, part_labels in zip(features.split(8192), labels.split(8192), strict=True):  # float64 takes much memory
        x = torch.cat([part, torch.ones_like(part[:, :1])], dim=1).double()
        sums[:, : dim + 1] += x.T @ x
        sums[:, dim + 1 :].T.index_add_(0, part_labels, x)
    return sums


def linear_vote(sums: torch.Tensor, queries: torch.Tensor, *, ridge: float = 1e-3) -> torch.Tensor:
    """Return the class of each query (M,) by ridge regression on one-hot classes, in closed form.

    `ridge` is the penalty on weights of features scaled to variance 1.
    """
    dim = len(sums) - 1
    count, total, moments = sums[dim, dim], sums[dim], sums[:dim]
    mean, class_mean = total[:dim] / count, total[dim + 1 :] / count
    covariance = moments[:, :dim] / count - mean.outer(mean)
    with_classes = moments[:, dim + 1 :] / count - mean.outer(class_mean)
    penalty = ridge * covariance.diagonal().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + penalty.diag(), with_classes)  # (D, num_classes)
    return ((queries.double() - mean) @ weight + class_mean).argmax(dim=1)
