"""Compute the features of a frozen encoder once, to train a head on them in place of images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batches import ClassificationBatch, ClassificationDataset

CHUNK = 1024  # rows that each process sends at a time


class FeatureDataset(Dataset):
    """Make a ClassificationBatch from a list of (epoch, sample index), with features (B, N, D) in place of images."""

    def __init__(self, source, features: torch.Tensor, labels: np.ndarray, damaged: dict[int, str]):
        self.source, self.features, self.labels, self.damaged = source, features, labels, damaged

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, items: list[tuple[int, int]]) -> ClassificationBatch:
        indices = [index for _, index in items]
        damaged = [(index, self.damaged[index]) for index in indices if index in self.damaged]
        return ClassificationBatch(self.features[indices], torch.from_numpy(self.labels[indices]), indices, damaged)


def encode_dataset(
    dataset: ClassificationDataset,
    encode: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    *,
    read: Callable,
    share: slice,
    gather: Callable[[list], list],
) -> FeatureDataset:
    """Compute the features of all samples, shared among the processes; each then holds all of them in float32.

    Args:
        encode: maps images (B, C, H, W), as the loader yields them, to features (B, *shape).
        read: returns an iterator over the batches of this process's `share` of a data set's indices.
        gather: joins the lists of all processes.
    """
    features, labels, damaged = torch.empty(len(dataset), *shape), dataset.labels.copy(), []
    for batch in read(dataset, range(len(dataset))):
        features[batch.indices] = encode(batch.images).float().cpu()
        labels[batch.indices] = batch.labels  # a damaged image is replaced by another one, with its label
        damaged += batch.damaged
    step = share.step or 1
    for first in range(0, len(dataset) if step > 1 else 0, CHUNK * step):
        places = slice(first, min(first + CHUNK * step, len(dataset)))
        own = features[places][share.start :: step].clone(), labels[places][share.start :: step]
        for rank, (part, part_labels) in enumerate(gather([own])):
            features[places][rank::step], labels[places][rank::step] = part, part_labels
    return FeatureDataset(dataset.source, features, labels, dict(gather(damaged)))
