"""Samples -> batches: what runs in the loader's worker processes."""

import signal
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.decode import DamagedImage, decode
from data.masking import mask_noise
from data.sampling import sample_generator
from data.sources import Source
from data.transforms import evaluation, pretraining

FIXED_EPOCH = 2**32 - 1  # the "epoch" of validation: its noise is the same in every epoch and run


class PretrainingBatch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor  # (B, C, H, W), uint8
    noise: torch.Tensor  # (B, L), float32: the K smallest values of a row mark the patches that are kept
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read


class PretrainingDataset(Dataset):
    """Takes a list of (epoch, sample index) and fills one batch buffer.

    A sample's crop, flip and mask are drawn from (seed, epoch, index) alone; with `train=False` the crop is the centre.
    An image that stands several times in a row is read and decoded once. A damaged one is replaced by the next readable
    one. `crop_scale` is that of `transforms.pretraining`, `crop_ratio` that of `transforms.evaluation`.
    """

    def __init__(
        self,
        source: Source,
        *,
        img_size: tuple[int, int],
        channels: int,
        grid: tuple[int, int],
        num_kept: int,
        mask_strategy: str,
        seed: int,
        train: bool,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: float = 1.0,
    ):
        self.source, self.img_size, self.channels = source, img_size, channels
        self.grid, self.num_kept, self.mask_strategy = grid, num_kept, mask_strategy
        self.seed, self.train = seed, train
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[tuple[int, int]]) -> PretrainingBatch:
        images = torch.empty(len(items), self.channels, *self.img_size, dtype=torch.uint8)
        noise = np.empty((len(items), self.grid[0] * self.grid[1]), dtype=np.float32)
        damaged: list[tuple[int, str]] = []
        encoded = iter(self.source.fetch([index for index, _ in groupby(index for _, index in items)]))
        row = 0
        for index, views in groupby(items, key=lambda item: item[1]):
            image = self.readable(index, next(encoded), damaged)
            for epoch, _ in views:
                rng = sample_generator(self.seed, epoch, index)
                images[row] = self.crop(image, rng)
                noise[row] = mask_noise(self.mask_strategy, rng, self.grid, self.num_kept)
                row += 1
        return PretrainingBatch(images, torch.from_numpy(noise), damaged)

    def crop(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """(C, H, W) of any size -> (C, *img_size)."""
        if self.train:
            return pretraining(image, rng, self.img_size, scale=self.crop_scale)
        return evaluation(image, self.img_size, crop_ratio=self.crop_ratio)

    def readable(self, index: int, data: bytes | np.ndarray | OSError, damaged: list) -> torch.Tensor:
        """The image (C, H, W) that `data` encodes, or the next one that can be read; appends to `damaged`."""
        for _ in range(len(self.source)):
            try:
                if isinstance(data, OSError):
                    raise DamagedImage(data.strerror or str(data))
                if isinstance(data, np.ndarray):
                    return torch.from_numpy(data).permute(2, 0, 1)
                return decode(data, self.channels)
            except DamagedImage as error:
                damaged.append((index, str(error)))
            index = (index + 1) % len(self.source)
            (data,) = self.source.fetch([index])
        return torch.zeros(self.channels, *self.img_size, dtype=torch.uint8)  # none can be read: the run will stop


class Normalization:
    """Between uint8 images (B, C, H, W) and what a model sees, on the device, in float32."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() / 255 - self.mean) / self.std

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back to [0, 1]."""
        return images * self.std + self.mean


def _keep_working(worker_id: int) -> None:
    """Workers outlive the signals that ask the run to stop: the step in progress still needs their batches."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_it_is(batch):
    return batch


def make_loader(dataset: Dataset, batches, *, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """A loader over lists of (epoch, index); it draws nothing from the global generators."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_keep_working,
        generator=torch.Generator().manual_seed(0),
    )
