"""Tests of position tables against the written-out formula, transformers, and a handwritten bicubic filter."""

import math

import numpy as np
import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEModel

from modeling.position import resize_positions, sincos_positions


@pytest.mark.parametrize("grid", [(14, 14), (3, 5), (1, 7)])
@pytest.mark.parametrize("dim", [8, 192])
def test_sincos_is_the_formula(grid, dim):
    expected = [[0.0] * dim]  # the cls token
    for row in range(grid[0]):
        for column in range(grid[1]):
            position = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                position += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            expected.append(position)
    table = sincos_positions(grid, dim)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim) and table.dtype == torch.float32
    torch.testing.assert_close(table[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_prefix_tokens_are_zero_and_come_first():
    table = sincos_positions((2, 2), 8, prefix_tokens=3)
    assert torch.equal(table[:, :3], torch.zeros(1, 3, 8))
    assert torch.equal(table[:, 3:], sincos_positions((2, 2), 8, prefix_tokens=0))


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="a width of 6; sine-cosine positions need a multiple of 4"):
        sincos_positions((2, 2), 6)


@pytest.mark.parametrize("size", [(96, 96), (32, 80), (40, 24)])
def test_resizing_equals_transformers(size):
    config = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    embeddings = ViTMAEModel(ViTMAEConfig(image_size=56, patch_size=8, **config)).embeddings
    torch.nn.init.normal_(embeddings.position_embeddings, generator=torch.Generator().manual_seed(0))
    new_grid = (size[0] // 8, size[1] // 8)
    theirs = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + math.prod(new_grid), 16), *size)
    ours = resize_positions(embeddings.position_embeddings, (7, 7), new_grid)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def cubic_filter(old: int, new: int) -> np.ndarray:
    """Return the matrix (new, old) of cubic convolution (Keys 1981, a = -0.75) at new cell centres, edges repeated."""
    a, weights = -0.75, np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - j)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            weights[i, min(max(j, 0), old - 1)] += weight
    return weights


@pytest.mark.parametrize("old_grid, new_grid", [((3, 5), (6, 4)), ((14, 14), (32, 32)), ((8, 4), (4, 8))])
def test_resizing_equals_cubic_convolution(old_grid, new_grid):
    table = torch.randn(1, 2 + math.prod(old_grid), 6, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(table, old_grid, new_grid, prefix_tokens=2)
    assert torch.equal(resized[:, :2], table[:, :2])
    grid = table[0, 2:].numpy().astype(np.float64).reshape(*old_grid, 6)
    expected = np.einsum(
        "ih,jw,hwd->ijd", cubic_filter(old_grid[0], new_grid[0]), cubic_filter(old_grid[1], new_grid[1]), grid
    )
    np.testing.assert_allclose(resized[0, 2:].numpy(), expected.reshape(-1, 6), rtol=0, atol=1e-5)


def test_the_same_grid_comes_back_as_it_is_and_types_are_kept():
    table = sincos_positions((4, 4), 8)
    assert resize_positions(table, (4, 4), (4, 4)) is table
    assert resize_positions(table.bfloat16(), (4, 4), (2, 8)).dtype == torch.bfloat16


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="16 positions does not fit a grid of 3 x 5"):
        resize_positions(sincos_positions((4, 4), 8), (3, 5), (8, 8))
