"""Which sample when, and its random seed: everything a run draws is a function of (seed, epoch, sample index).

One permutation an epoch is sliced at the position, so that resuming at any step costs nothing and replays nothing, and
no generator's state has to be saved. Libraries that draw from the global generators do so inside `seeded`.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

# The first word of every seed, so that no two purposes share a stream; all seeds have four words below 2^32, as NumPy
# pads shorter ones with zeros and splits larger words.
ORDER, SAMPLE, MODEL = 0, 1, 2


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator from which sample `index` draws its crop, flip and mask in epoch `epoch`."""
    return np.random.default_rng((SAMPLE, seed, epoch, index))


def model_seed(seed: int, step: int, position: int) -> int:
    """The seed of what the model draws (drop path, dropout) in the forward pass of step `step` that starts at the
    image `position` of the global batch."""
    return int(np.random.SeedSequence((MODEL, seed, step, position)).generate_state(1, np.uint64)[0])


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The permutation of epoch `epoch`: (num_samples,), int64."""
    return np.random.default_rng((ORDER, seed, epoch, 0)).permutation(num_samples)


def _seed_host(seed: int) -> None:
    random.seed(seed)
    np.random.seed([seed % 2**32, seed // 2**32])  # it takes words of 32 bits
    torch.default_generator.manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Seeds the global generators of `random`, NumPy and torch, on all devices, with 0 <= seed < 2**64."""
    _seed_host(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside from `random`, NumPy or torch depends on `seed` (0 <= seed < 2**64) alone.

    Afterwards these generators, and that of the current CUDA device, stand where they stood before.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # A device that nobody has used yet is left alone: torch.manual_seed would keep the seed for it until it starts.
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        _seed_host(seed)
        if on_device is not None:
            torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)


class StepSampler:
    """Yields, for one process, the micro-batches of optimizer steps `start_step` .. `total_steps` - 1.

    A micro-batch is a list of (epoch, sample index). Step s takes the samples [s * G, (s + 1) * G) of its epoch's
    permutation, G the global batch; each process takes a contiguous share of them. What is left of a permutation after
    floor(num_samples / G) steps is not used.

    With `views` > 1 (repeated augmentation, Hoffer et al. 2020), every sample stands that many times in a row, and its
    view v in epoch e is the one of epoch e * views + v without: an epoch has floor(num_samples * views / G) steps.
    `views` divides the micro-batch, so that all views of a sample are in one.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        total_steps: int,
        start_step: int = 0,
        seed: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        views: int = 1,
    ):
        self.num_samples, self.seed, self.views = num_samples, seed, views
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.start_step, self.total_steps = start_step, total_steps
        self.per_process = global_batch_size // num_processes
        self.first_position = process_index * self.per_process
        self.steps_per_epoch = num_samples * views // global_batch_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * (self.per_process // self.micro_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, -1
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_samples), epoch
            first = step_in_epoch * self.global_batch_size + self.first_position
            for start in range(first, first + self.per_process, self.micro_batch_size):
                positions = range(start, start + self.micro_batch_size)
                yield [(epoch * self.views + p % self.views, int(order[p // self.views])) for p in positions]
