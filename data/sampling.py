"""Sample order and random seeds: all random numbers of a sample are a function of (seed, epoch, sample index).

Each step takes a slice of its epoch's permutation, so resuming at any step is free and needs no saved generator state.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch

# The first word of each seed, so that no two purposes share a random stream. Seeds always have four words below 2^32,
# because NumPy pads shorter seeds with zeros and splits larger words.
ORDER, SAMPLE, MODEL = 0, 1, 2


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator from which sample `index` draws its crop, flip and mask in epoch `epoch`."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


def model_seed(seed: int, step: int, position: int) -> int:
    """Return the seed of the model's own random numbers (drop path, dropout, mixing, erasing) for a micro-batch.

    The micro-batch starts at image `position` of the global batch of optimizer step `step`.
    """
    return int(np.random.SeedSequence((MODEL, seed, step, position)).generate_state(1, np.uint64)[0])


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the permutation of the samples in epoch `epoch`: (num_samples,), int64."""
    return np.random.default_rng((ORDER, seed, epoch, 0)).permutation(num_samples)


def seed_host(seed: int) -> None:
    """Seed the global generators of `random`, NumPy and torch on the CPU, with 0 <= seed < 2**64."""
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32])  # NumPy takes words of 32 bits
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seed the global generators of `random`, NumPy and torch, on all devices, with 0 <= seed < 2**64."""
    seed_host(seed)
    torch.manual_seed(seed)


def spread(count: int, total: int) -> list[int]:
    """Return at most `count` indices, evenly spread over range(total)."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


class StepSampler:
    """Yield the micro-batches of one process, lists of (epoch, sample index), for the optimizer steps `steps`.

    Step s of an epoch takes the samples [s * G, (s + 1) * G) of its permutation, where G is the global batch size; each
    process takes a contiguous share of them. The rest of a permutation after floor(num_samples / G) steps is not used.

    With `views` > 1 (repeated augmentation, Hoffer et al. 2020), each sample occurs `views` times in a row, and an
    epoch has floor(num_samples * views / G) steps. View v in epoch e has the epoch number e * views + v, and so equals
    the view of that epoch with one view. `views` must divide the micro-batch, so that it has all views of a sample.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        steps: range,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        views: int = 1,
    ):
        self.num_samples, self.seed, self.views, self.steps = num_samples, seed, views, steps
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.steps_per_epoch = num_samples * views // global_batch_size
        per_process = global_batch_size // num_processes
        first = process_index * per_process
        self.positions = range(first, first + per_process, micro_batch_size)  # of its micro-batches

    def __len__(self) -> int:
        return len(self.steps) * len(self.positions)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, -1
        for step in self.steps:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_samples), epoch
            for position in self.positions:
                start = step_in_epoch * self.global_batch_size + position
                numbers = range(start, start + self.micro_batch_size)
                yield [(epoch * self.views + n % self.views, int(order[n // self.views])) for n in numbers]

    def model_seeds(self) -> Iterator[int]:
        """Yield the `model_seed` of each micro-batch."""
        return (model_seed(self.seed, step, position) for step in self.steps for position in self.positions)
