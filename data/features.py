"""Features of a frozen encoder, computed once, in place of images."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from data.batches import ClassificationBatch, ClassificationDataset
from data.index import DataError


class FeatureDataset(Dataset):
    """Make a ClassificationBatch of a list of (epoch, sample index), with features (B, N, D) in place of images."""

    def __init__(self, dataset: ClassificationDataset, features: torch.Tensor, replaced: dict, damaged: dict):
        self.source, self.labels = dataset.source, dataset.labels.copy()
        self.features, self.damaged = features, damaged
        for index, label in replaced.items():
            self.labels[index] = label

    def __len__(self) -> int:
        return len(self.features)

    def __getitems__(self, items: list[tuple[int, int]]) -> ClassificationBatch:
        indices = [index for _, index in items]
        damaged = [(index, self.damaged[index]) for index in indices if index in self.damaged]
        labels = torch.from_numpy(self.labels[indices])
        labels = labels.long() if labels.ndim == 1 else labels.float()
        return ClassificationBatch(self.features[indices], labels, indices, damaged)


def cache_features(
    dataset: ClassificationDataset,
    embed: Callable[[torch.Tensor], torch.Tensor],
    shape: Sequence[int],
    *,
    folder: Path,
    read: Callable,
    gather: Callable[[list], list],
    is_main_process: bool,
) -> FeatureDataset:
    """Compute the features of all samples; the processes share them in a file of `folder` that no name keeps alive.

    Args:
        embed: images (B, C, H, W), as the loader yields them -> features (B, *shape).
        read: returns the batches of a dataset's indices that are this process's share.
        gather: returns the members of all processes' lists.

    Raises:
        DataError: if the disk has no room for them.
    """
    path, size = folder / ".features", math.prod((len(dataset), *shape))
    errors = []
    if is_main_process:
        free = shutil.disk_usage(folder).free
        if 4 * size > free:
            need = f"{4 * size / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free"
            errors = [f"--cache_features needs {need}; leave it out, or give another --working_directory"]
        else:
            path.write_bytes(b"")
    if errors := gather(errors):
        raise DataError(errors[0])
    features = torch.from_file(str(path), shared=True, size=size).view(len(dataset), *shape)
    gather([])  # all processes have the file
    if is_main_process:
        path.unlink()
    replaced, damaged = [], []
    for batch in read(dataset, range(len(dataset))):
        features[batch.indices] = embed(batch.images).float().cpu()
        reasons = dict(batch.damaged)
        labels = zip(batch.indices, batch.labels.tolist(), strict=True)
        replaced += [(index, label) for index, label in labels if index in reasons]
        damaged += reasons.items()
    replaced, damaged = (dict(gather(part)) for part in (replaced, damaged))  # after which all features are there
    return FeatureDataset(dataset, features, replaced, damaged)
