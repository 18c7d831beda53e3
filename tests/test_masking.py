import numpy as np
import pytest

from data.masking import MASK_STRATEGIES, mask_noise

GRIDS = [(14, 14), (8, 8), (4, 8), (7, 5), (1, 9), (2, 2)]


def kept(strategy, grid, ratio, seed=0):
    num_kept = int(grid[0] * grid[1] * (1 - ratio))
    noise = mask_noise(strategy, np.random.default_rng(seed), grid, num_kept)
    assert noise.shape == (grid[0] * grid[1],) and noise.dtype == np.float32
    assert noise.min() >= 0 and noise.max() < 1.0001
    result = np.zeros(noise.size, dtype=bool)
    result[np.argsort(noise, kind="stable")[:num_kept]] = True
    return result.reshape(grid)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_noise_keeps_exactly_the_wanted_number_and_is_repeatable(strategy, grid, ratio):
    first = kept(strategy, grid, ratio, seed=1)
    assert first.sum() == int(grid[0] * grid[1] * (1 - ratio))
    np.testing.assert_array_equal(first, kept(strategy, grid, ratio, seed=1))


def test_random_keeps_every_patch_equally_often():
    shares = np.mean([kept("random", (8, 8), 0.75, seed) for seed in range(2000)], axis=0)
    assert abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_grid_keeps_one_patch_of_every_two_by_two():
    cells = kept("grid", (14, 14), 0.75).reshape(7, 2, 7, 2)
    assert cells[:, 0, :, 0].all() and cells.sum() == 49


def test_grid_keeps_two_of_every_two_by_two_at_half():
    assert (kept("grid", (8, 8), 0.5).reshape(4, 2, 4, 2).sum(axis=(1, 3)) == 2).all()


def equal_neighbours(mask):
    return np.mean([np.mean(mask[1:] == mask[:-1]), np.mean(mask[:, 1:] == mask[:, :-1])])


def test_block_removes_connected_regions():
    block = np.mean([equal_neighbours(kept("block", (14, 14), 0.5, seed)) for seed in range(50)])
    random = np.mean([equal_neighbours(kept("random", (14, 14), 0.5, seed)) for seed in range(50)])
    assert abs(random - 0.5) < 0.02 and block > 0.8


def test_what_is_kept_under_block_was_never_in_a_rectangle_but_the_last():
    """At least one whole rectangle of 16 or more removed patches is there, whatever the last one gave back."""
    for seed in range(20):
        removed = ~kept("block", (14, 14), 0.75, seed)
        window = np.lib.stride_tricks.sliding_window_view(removed, (3, 3)).all(axis=(2, 3))
        assert window.any()
