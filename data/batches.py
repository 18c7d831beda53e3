"""Turn samples into batches: the data sets that run in the loader's worker processes, and the loader."""

import gc
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_max_pool2d
from torch.utils.data import DataLoader, Dataset

from data.augment import RandAugment
from data.decode import DamagedImage, PixelFormat
from data.masking import mask_noise
from data.pool import check_shared_memory, guarded_batches, report_unsent, watch_parent
from data.sampling import StepSampler, sample_generator
from data.sources import Source, read_image
from data.transforms import CentreCrop, RandomCrop, empty_images, split_validity

FIXED_EPOCH = 2**32 - 1  # the "epoch" of validation, so that its noise is always the same


class PretrainingBatch(NamedTuple):
    """A micro-batch for pre-training."""

    images: torch.Tensor  # (B, C, H, W), uint8, or float32 in [0, 1]
    noise: torch.Tensor  # (B, L), float32: the K smallest values of a row mark the visible patches
    valid: torch.Tensor | None  # (B, 1, H, W), bool: which pixels are valid; None: all
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read


class ClassificationBatch(NamedTuple):
    """A micro-batch for classification."""

    images: torch.Tensor  # (B, C, H, W), uint8, or float32 in [0, 1]; or features (B, N, D), see data/features.py
    labels: torch.Tensor  # classes (B,), int64; or targets (B, T), float32
    indices: list[int]  # the requested samples; for those in `damaged`, image and label are another sample's
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read


class SourceDataset(Dataset):
    """Base class of data sets whose samples `read` decodes from a source."""

    min_sides = None

    def __init__(self, source: Source, pixels: PixelFormat):
        self.source, self.pixels = source, pixels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int):
        """Return a decoded sample. Raises DamagedImage."""
        return read_image(self.source, index, self.pixels, self.min_sides)

    def first_readable(self, index: int, damaged: list[tuple[int, str]]) -> tuple:
        """Return the first readable sample from `index` on, and its index; append the others to `damaged`.

        If no sample can be read, return None and `index`; the run then stops.
        """
        for _ in range(len(self)):
            try:
                return self.read(index), index
            except DamagedImage as error:
                damaged.append((index, str(error)))
            index = (index + 1) % len(self)
        return None, index


class ImageDataset(SourceDataset):
    """Base class of data sets that take a list of (epoch, sample index) and cut one crop for each item.

    All random numbers depend on (seed, epoch, index) alone. A damaged image is replaced by the next readable one.
    """

    def __init__(self, source: Source, pixels: PixelFormat, crop: RandomCrop | CentreCrop, seed: int):
        super().__init__(source, pixels)
        self.crop, self.min_sides, self.seed = crop, crop.min_sides, seed

    def cut_crops(self, items: list[tuple[int, int]]) -> tuple[torch.Tensor, list, list[tuple[int, str]]]:
        """Return crops (B, C, *crop.size), the generator and the image index of each, and the damaged images.

        An image is decoded once for consecutive items of the same index.
        """
        images = empty_images(len(items), self.pixels.decoded_channels, self.crop.size, self.pixels.dtype)
        samples, damaged = [], []
        for index, views in groupby(items, key=itemgetter(1)):
            image, image_index = self.first_readable(index, damaged)
            for epoch, _ in views:
                rng, out = sample_generator(self.seed, epoch, index), images[len(samples)]
                samples.append((rng, image_index))
                if image is None:
                    out.zero_()
                else:
                    self.crop(image, rng, out=out)
        return images, samples, damaged


class PretrainingDataset(ImageDataset):
    """Make a PretrainingBatch from a list of (epoch, sample index).

    A crop has `grid` = (h, w) patches, of which `num_kept` stay visible; `mask_strategy` and `mask_block` are those of
    `mask_noise`, and `options` those of ImageDataset.
    """

    def __init__(
        self,
        source: Source,
        *,
        grid: tuple[int, int],
        num_kept: int,
        mask_strategy: str,
        mask_block: int = 1,
        **options,
    ):
        super().__init__(source, **options)
        self.grid = grid
        self.draw_noise = partial(mask_noise, mask_strategy, grid=grid, num_kept=num_kept, block=mask_block)

    def __getitems__(self, items: list[tuple[int, int]]) -> PretrainingBatch:
        images, samples, damaged = self.cut_crops(items)
        noise, valid = torch.from_numpy(np.stack([self.draw_noise(rng) for rng, _ in samples])), None
        if self.pixels.validity:
            images, valid = split_validity(images)
            holds_data = adaptive_max_pool2d(valid.float(), self.grid).flatten(1)  # (B, L)
            noise += 2 * (1 - holds_data)  # patches without a valid pixel are masked first
        return PretrainingBatch(images, noise, valid, damaged)


class ClassificationDataset(ImageDataset):
    """Make a ClassificationBatch from a list of (epoch, sample index).

    `labels` are the classes (N,), int64, or targets (N, T), float32, of all samples. `augment` is applied to the crops;
    `options` are those of ImageDataset.
    """

    def __init__(self, source: Source, labels: np.ndarray, *, augment: RandAugment | None = None, **options):
        super().__init__(source, **options)
        self.labels, self.augment = labels, augment

    def __getitems__(self, items: list[tuple[int, int]]) -> ClassificationBatch:
        images, samples, damaged = self.cut_crops(items)
        if self.augment:
            for image, (rng, _) in zip(images.permute(0, 2, 3, 1).numpy(), samples, strict=True):
                image[:] = self.augment(image, int(rng.integers(2**64, dtype=np.uint64)))
        labels = torch.from_numpy(self.labels[[index for _, index in samples]])
        return ClassificationBatch(images, labels, [index for _, index in items], damaged)


class ListedBatch(NamedTuple):
    """A batch of images that are prepared for a model."""

    indices: list[int]  # of the images that could be read
    inputs: tuple[torch.Tensor, ...]  # (B, ...) each; () if no image could be read
    damaged: list[tuple[int, str]]  # index and reason of the others


class ListedDataset(SourceDataset):
    """Prepare a list of samples for a model; images that cannot be read are reported, not replaced.

    `prepare(image, index)` turns an upright image (C, H, W) of any size into a tuple of tensors, whose shapes must be
    equal within a batch. It may raise DamagedImage. Only one image at a time is in memory at full size.
    """

    def __init__(self, source: Source, *, pixels: PixelFormat, prepare: Callable[[torch.Tensor, int], tuple]):
        super().__init__(source, pixels)
        self.prepare = prepare

    def __getitems__(self, indices: Sequence[int]) -> ListedBatch:
        intact, prepared, damaged = [], [], []
        for index in indices:
            try:
                prepared.append(self.prepare(self.read(index), index))
                intact.append(index)
            except DamagedImage as error:
                damaged.append((index, str(error)))
        inputs = tuple(torch.stack(parts) for parts in zip(*prepared, strict=True))
        return ListedBatch(intact, inputs, damaged)


def centre_crop(image: torch.Tensor, index: int, *, size: tuple[int, int], crop_ratio: float) -> tuple[torch.Tensor]:
    """Return the input of an encoder or a classifier as a tuple: (crop (C, *size),)."""
    return (CentreCrop(size, crop_ratio)(image),)


def masked_crop(
    image: torch.Tensor,
    index: int,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    num_kept: int,
    mask_strategy: str,
    mask_block: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input of a masked autoencoder: (crop (C, *size), noise (L,)).

    The noise depends on (seed, index) alone. With seed 0 and the mask options of the training, validation has the same.
    """
    noise = mask_noise(mask_strategy, sample_generator(seed, FIXED_EPOCH, index), grid, num_kept, block=mask_block)
    return CentreCrop(size)(image), torch.from_numpy(noise)


def own_mask_crop(
    image: torch.Tensor, index: int, *, size: tuple[int, int], noise: torch.Tensor, mask_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the input of a masked autoencoder for a mask from a picture of `mask_size`: (crop, noise (L,)).

    Raises DamagedImage if the picture has neither the size of the image nor that of the crop.
    """
    if tuple(image.shape[1:]) != mask_size != size:
        sizes = ("{} x {}".format(*each) for each in (image.shape[1:], mask_size, size))
        message = "is {} pixels (height x width), but the mask {}; expected a mask of that size, or of the crop's {}"
        raise DamagedImage(message.format(*sizes))
    return CentreCrop(size)(image), noise


class Normalization:
    """Normalize images (B, C, H, W), uint8 or float32 in [0, 1], on `device` in float32."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous()  # batches are in channels-last memory
        scaled = images if images.is_floating_point() else images.float() / 255
        return (scaled - self.mean) / self.std

    def patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Normalize patches (B, L, P*P*C) with values ordered by row, column and channel, as `__call__` does images."""
        scaled = patches if patches.is_floating_point() else patches.float() / 255
        scaled = scaled.unflatten(-1, (-1, len(self.mean)))  # (B, L, P*P, C)
        return ((scaled - self.mean.flatten()) / self.std.flatten()).flatten(-2)

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images in [0, 1] from normalized ones."""
        return images * self.std + self.mean


def _begin_work(worker_id: int) -> None:
    """Make a worker end with the run, but ignore signals to stop: the current step still needs its batches."""
    watch_parent()  # the loader's own check does not run while a batch waits to be taken
    report_unsent()
    os.nice(5)  # the main process, which launches the device's work, has priority
    gc.freeze()  # the garbage collector would write to memory that the worker shares with its parent, and so copy it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch):
    return batch


class Loader(DataLoader):
    """A loader whose dead workers end the run with one line, see `guarded_batches`."""

    def __iter__(self) -> Iterator:
        return guarded_batches(super().__iter__)


def make_loader(dataset: Dataset, batches, *, num_workers: int, pin_memory: bool = False) -> Loader:
    """Make a loader over lists of (epoch, index) that draws nothing from the global generators."""
    return Loader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_begin_work,
        generator=torch.Generator().manual_seed(0),
    )


def training_batches(
    dataset: Dataset,
    sampler: StepSampler,
    *,
    num_workers: int,
    pin_memory: bool = False,
    largest: Dataset | None = None,
    check: bool = True,
) -> Iterator[tuple[int, NamedTuple]]:
    """Return an iterator over (model seed, micro-batch); the workers start at once.

    The seed is for the model's own draws in that forward pass, see `sampling.model_seed`. With `check`, WorkerError is
    raised if the batches, or those of the later data set `largest` if given, do not fit in shared memory.
    """
    if num_workers and check:
        sample = (dataset if largest is None else largest).__getitems__([(0, 0)])
        tensors = [part for part in sample if isinstance(part, torch.Tensor)]
        size = sum(part.untyped_storage().nbytes() for part in tensors) * sampler.micro_batch_size
        check_shared_memory(size, num_workers)
    loader = make_loader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)
    return zip(sampler.model_seeds(), loader, strict=True)


def own_batches(
    dataset: Dataset,
    indices: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    process_index: int,
    num_processes: int,
    watch: Callable[[range], Iterable[int]],
    pin_memory: bool = False,
) -> Iterator:
    """Yield this process's share of the samples `indices` in batches, with FIXED_EPOCH as the epoch.

    `watch` wraps the range over the batches, which is the same on all processes: it shows a bar, or ends early.
    """
    own = [(FIXED_EPOCH, int(index)) for index in indices[process_index::num_processes]]
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    loader = iter(make_loader(dataset, batches, num_workers=num_workers, pin_memory=pin_memory))
    for _ in watch(range(math.ceil(len(indices) / num_processes / batch_size))):
        batch = next(loader, None)
        if batch is not None:
            yield batch
