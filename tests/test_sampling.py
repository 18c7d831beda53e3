import random

import numpy as np
import pytest
import torch

from data.sampling import StepSampler, epoch_order, model_seed, sample_generator, seed_everything


def batches(**options):
    defaults = dict(global_batch_size=8, micro_batch_size=8, steps=range(7), seed=3)
    return list(StepSampler(21, **{**defaults, **options}))


def test_every_epoch_is_a_permutation_of_its_own():
    orders = [epoch_order(0, epoch, 100) for epoch in range(3)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert not np.array_equal(epoch_order(1, 0, 100), orders[0])


def test_the_rest_of_an_epoch_is_not_used():
    drawn = batches()  # 21 images in batches of 8: two steps per epoch
    assert [batch[0][0] for batch in drawn] == [0, 0, 1, 1, 2, 2, 3]
    assert len({index for batch in drawn[:2] for _, index in batch}) == 16


@pytest.mark.parametrize("start", range(8))
def test_starting_at_a_step_equals_going_there(start):
    assert batches(steps=range(start, 7)) == batches()[start:]


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (1, 2), (2, 4), (2, 2), (4, 1)])
def test_any_split_of_the_global_batch_has_the_same_samples(processes, micro):
    parts = [batches(micro_batch_size=micro, num_processes=processes, process_index=rank) for rank in range(processes)]
    per_step = 8 // processes // micro
    for step, whole in enumerate(batches()):
        joined = [item for part in parts for b in part[step * per_step : (step + 1) * per_step] for item in b]
        assert joined == whole


@pytest.mark.parametrize(("processes", "micro"), [(1, 4), (2, 2)])
def test_repeated_views_stand_together_and_are_those_of_later_epochs(processes, micro):
    options = dict(steps=range(10), views=2, num_processes=processes, micro_batch_size=micro)
    parts = [batches(process_index=rank, **options) for rank in range(processes)]
    for batch in [batch for part in parts for batch in part]:
        epochs, indices = zip(*batch, strict=True)
        assert indices[::2] == indices[1::2] and len(set(indices)) == micro // 2
        assert all(odd == even + 1 and even % 2 == 0 for even, odd in zip(epochs[::2], epochs[1::2], strict=True))
    first_epoch = batches(steps=range(5), views=2)  # 21 images, twice each, in batches of 8: five steps per epoch
    assert {epoch for batch in first_epoch for epoch, _ in batch} == {0, 1}
    assert len({index for batch in first_epoch for _, index in batch}) == 20
    assert batches(steps=range(6), views=2)[5][0][0] == 2


def test_each_micro_batch_has_a_seed_of_its_step_and_position():
    options = dict(global_batch_size=8, micro_batch_size=2, steps=range(2, 7), seed=3)
    sampler = StepSampler(21, **options)
    seeds = [model_seed(3, step, position) for step in range(2, 7) for position in (0, 2, 4, 6)]
    assert len(sampler) == len(list(sampler)) == 20 and list(sampler.model_seeds()) == seeds
    parts = [StepSampler(21, **options, process_index=rank, num_processes=2).model_seeds() for rank in range(2)]
    first, second = map(list, parts)
    assert [seed for i in range(0, 10, 2) for seed in (*first[i : i + 2], *second[i : i + 2])] == seeds


def test_randomness_is_a_function_of_seed_epoch_and_index():
    streams = [epoch_order(3, 5, 10).tolist(), sample_generator(3, 5, 0).permutation(10).tolist()]
    assert streams[0] != streams[1]
    draws = {key: sample_generator(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(set(draws.values())) == 4
    assert sample_generator(0, 1, 0).random() == draws[0, 1, 0]
    assert len({model_seed(0, step, position) for step in range(5) for position in (0, 8)}) == 10


def draws():
    return random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(()).item()


def test_seeding_takes_any_64_bits():
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1, model_seed(0, 1, 2)]
    drawn = []
    for seed in seeds:
        seed_everything(seed)
        drawn.append(draws())
        seed_everything(seed)
        assert draws() == drawn[-1]
    *others, of_torch = zip(*drawn, strict=True)
    assert all(len(set(numbers)) == len(seeds) for numbers in others)
    assert len(set(of_torch)) == len({seed % 2**32 for seed in seeds})  # torch's CPU generator uses no more bits
