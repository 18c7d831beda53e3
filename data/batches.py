"""Samples -> batches: what runs in the loader's worker processes."""

import gc
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data.decode import DamagedImage, PixelFormat
from data.masking import mask_noise
from data.sampling import sample_generator
from data.sources import Fetched, Source, image_of
from data.transforms import empty_images, evaluation, pretraining, training

FIXED_EPOCH = 2**32 - 1  # the "epoch" of validation: its noise is the same in every epoch and run


class PretrainingBatch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor  # (B, C, H, W), uint8, or float32 in [0, 1]
    noise: torch.Tensor  # (B, L), float32: the K smallest values of a row mark the patches that are kept
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read


class ClassificationBatch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor  # (B, C, H, W), uint8, or float32 in [0, 1]
    labels: torch.Tensor  # (B,), int64: the classes of what `images` shows
    indices: list[int]  # the samples that were asked for: one that is in `damaged` shows another image
    damaged: list[tuple[int, str]]  # index and reason of every image that could not be read


def readable(
    source: Source,
    index: int,
    data: Fetched,
    pixels: PixelFormat,
    damaged: list[tuple[int, str]],
    min_sides: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, int]:
    """The image (C, H, W) that `data` encodes, or the next one that can be read, and its index; appends to `damaged`.

    Where none can be read, the image is one black pixel, with the index of the first: the run will stop.
    """
    for _ in range(len(source)):
        try:
            return image_of(data, pixels, min_sides), index
        except DamagedImage as error:
            damaged.append((index, str(error)))
        index = (index + 1) % len(source)
        (data,) = source.fetch([index])
    return empty_images(1, pixels.channels, (1, 1), pixels.dtype)[0].zero_(), index


def read_images(
    source: Source,
    items: list[tuple[int, int]],
    pixels: PixelFormat,
    damaged: list[tuple[int, str]],
    min_sides: tuple[int, int] | None = None,
) -> Iterator[tuple[int, int, torch.Tensor, int]]:
    """For every (epoch, sample index) of `items`: the two, the image (C, H, W) and the index of the image that it is.

    That is another one where the sample's own cannot be read, see `readable`. An image that stands several times in a
    row is read and decoded once.
    """
    encoded = source.fetch([index for index, _ in groupby(index for _, index in items)])
    for data, (index, views) in zip(encoded, groupby(items, key=itemgetter(1)), strict=True):
        image, shown = readable(source, index, data, pixels, damaged, min_sides)
        for epoch, _ in views:
            yield epoch, index, image, shown


def least_sides(size: tuple[int, int], crop_scale: float) -> tuple[int, int]:
    """The sides (height, width) of an image from which a crop of the share `crop_scale` of its area, at any proportions
    that are drawn, is not enlarged to `size`."""
    side = math.ceil(max(size) / math.sqrt(crop_scale * 3 / 4))
    return side, side


class PretrainingDataset(Dataset):
    """Takes a list of (epoch, sample index) and fills one batch buffer.

    A sample's crop, flip and mask are drawn from (seed, epoch, index) alone; with `train=False` the crop is the centre.
    A damaged image is replaced by the next readable one. `crop_scale` is that of `transforms.pretraining`, `crop_ratio`
    that of `transforms.evaluation`. With `fast`, crops may be cut from a JPEG that is decoded at a smaller scale.
    """

    def __init__(
        self,
        source: Source,
        *,
        img_size: tuple[int, int],
        pixels: PixelFormat,
        grid: tuple[int, int],
        num_kept: int,
        mask_strategy: str,
        seed: int,
        train: bool,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: float = 1.0,
        fast: bool = False,
    ):
        self.source, self.img_size, self.pixels = source, img_size, pixels
        self.grid, self.num_kept, self.mask_strategy = grid, num_kept, mask_strategy
        self.seed, self.train = seed, train
        self.crop_scale, self.crop_ratio = crop_scale, crop_ratio
        self.min_sides = least_sides(img_size, crop_scale[0]) if fast and train else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[tuple[int, int]]) -> PretrainingBatch:
        images = empty_images(len(items), self.pixels.channels, self.img_size, self.pixels.dtype)
        noise = np.empty((len(items), self.grid[0] * self.grid[1]), dtype=np.float32)
        damaged: list[tuple[int, str]] = []
        samples = read_images(self.source, items, self.pixels, damaged, self.min_sides)
        for row, (epoch, index, image, _) in enumerate(samples):
            rng = sample_generator(self.seed, epoch, index)
            self.crop(image, rng, out=images[row])
            noise[row] = mask_noise(self.mask_strategy, rng, self.grid, self.num_kept)
        return PretrainingBatch(images, torch.from_numpy(noise), damaged)

    def crop(self, image: torch.Tensor, rng: np.random.Generator, *, out: torch.Tensor) -> None:
        """(C, H, W) of any size -> (C, *img_size), written into `out`."""
        if self.train:
            pretraining(image, rng, self.img_size, scale=self.crop_scale, out=out)
        else:
            out.copy_(evaluation(image, self.img_size, crop_ratio=self.crop_ratio))


class ClassificationDataset(Dataset):
    """Takes a list of (epoch, sample index) and fills one batch buffer; `labels` (N,) has a class for every sample.

    A sample's crop, flip and augmentation are drawn from (seed, epoch, index) alone; with `train=False` the crop is the
    centre. A damaged image is replaced by the next readable one, with that one's label. `crop_scale` and `augment` are
    those of `transforms.training`, `crop_ratio` that of `transforms.evaluation`, `fast` as in PretrainingDataset.
    Raises ValueError where `labels` are not as many as the samples.
    """

    def __init__(
        self,
        source: Source,
        labels: np.ndarray,
        *,
        img_size: tuple[int, int],
        pixels: PixelFormat,
        seed: int,
        train: bool,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: float = 0.875,
        augment: Callable[[Image.Image], Image.Image] | None = None,
        fast: bool = False,
    ):
        if len(labels) != len(source):
            raise ValueError(f"{len(labels)} labels for {len(source)} images; expected one for each")
        self.source, self.labels, self.img_size, self.pixels = source, labels, img_size, pixels
        self.seed, self.train = seed, train
        self.crop_scale, self.crop_ratio, self.augment = crop_scale, crop_ratio, augment
        self.min_sides = least_sides(img_size, crop_scale[0]) if fast and train else None

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[tuple[int, int]]) -> ClassificationBatch:
        images = empty_images(len(items), self.pixels.channels, self.img_size, self.pixels.dtype)
        labels = torch.empty(len(items), dtype=torch.int64)
        damaged: list[tuple[int, str]] = []
        samples = read_images(self.source, items, self.pixels, damaged, self.min_sides)
        for row, (epoch, index, image, shown) in enumerate(samples):
            self.crop(image, epoch, index, out=images[row])
            labels[row] = int(self.labels[shown])
        return ClassificationBatch(images, labels, [index for _, index in items], damaged)

    def crop(self, image: torch.Tensor, epoch: int, index: int, *, out: torch.Tensor) -> None:
        """(C, H, W) of any size -> (C, *img_size), written into `out`."""
        if self.train:
            rng = sample_generator(self.seed, epoch, index)
            training(image, rng, self.img_size, scale=self.crop_scale, augment=self.augment, out=out)
        else:
            out.copy_(evaluation(image, self.img_size, crop_ratio=self.crop_ratio))


class ListedBatch(NamedTuple):
    """What became of some images that are listed."""

    indices: list[int]  # of those that could be read
    inputs: tuple[torch.Tensor, ...]  # (B, ...) each: what was prepared of them; () where there are none
    damaged: list[tuple[int, str]]  # index and reason of the others


class ListedDataset(Dataset):
    """Takes a list of sample indices and prepares those images that can be read; the others are told, not replaced.

    `prepare(image, index)` makes one or several tensors of an upright image (C, H, W) of any size; those of a
    batch have equal shapes. One image at a time is in memory at its own size.
    """

    def __init__(
        self,
        source: Source,
        *,
        pixels: PixelFormat,
        prepare: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]],
    ):
        self.source, self.pixels, self.prepare = source, pixels, prepare

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> ListedBatch:
        readable, prepared, damaged = [], [], []
        for index in indices:
            (data,) = self.source.fetch([index])
            try:
                image = image_of(data, self.pixels)
            except DamagedImage as error:
                damaged.append((index, str(error)))
                continue
            prepared.append(self.prepare(image, index))
            readable.append(index)
        inputs = tuple(torch.stack(parts) for parts in zip(*prepared, strict=True))
        return ListedBatch(readable, inputs, damaged)


def centre_crop(
    image: torch.Tensor, index: int, *, size: tuple[int, int], crop_ratio: float
) -> tuple[torch.Tensor, ...]:
    """What an encoder or a classifier sees of an image: (crop (C, *size),)."""
    return (evaluation(image, size, crop_ratio=crop_ratio),)


def masked_crop(
    image: torch.Tensor,
    index: int,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    num_kept: int,
    mask_strategy: str,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a masked autoencoder sees of an image: (crop (C, *size), noise (L,)).

    The noise is drawn from (seed, index) alone, and with the seed 0 it is that of validation.
    """
    noise = mask_noise(mask_strategy, sample_generator(seed, FIXED_EPOCH, index), grid, num_kept)
    return evaluation(image, size), torch.from_numpy(noise)


class Normalization:
    """Between images (B, C, H, W), uint8 or float32 in [0, 1], and what a model sees, on the device, in float32."""

    def __init__(self, mean: list[float], std: list[float], device: torch.device):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous()  # as models want them: batches come laid out (B, H, W, C)
        scaled = images if images.is_floating_point() else images.float() / 255
        return (scaled - self.mean) / self.std

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images back to [0, 1]."""
        return images * self.std + self.mean


def _begin_work(worker_id: int) -> None:
    """Workers outlive the signals that ask the run to stop: the step in progress still needs their batches.

    And they leave alone what they share with the process that they were forked from: to look at those objects for
    garbage is to write into them, and so to copy them.
    """
    gc.freeze()
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
        worker_init_fn=_begin_work,
        generator=torch.Generator().manual_seed(0),
    )


def own_batches(
    dataset: Dataset,
    indices: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    process_index: int,
    num_processes: int,
    stop: Callable[[], bool],
) -> Iterator:
    """Yields this process's share of the samples `indices` in batches, in the epoch of validation.

    Every process asks `stop` equally often, before each batch, and ends early where it is true.
    """
    own = [(FIXED_EPOCH, int(index)) for index in indices[process_index::num_processes]]
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    loader = iter(make_loader(dataset, batches, num_workers=num_workers))
    for _ in range(math.ceil(len(indices) / num_processes / batch_size)):
        if stop():
            return
        batch = next(loader, None)
        if batch is not None:
            yield batch
