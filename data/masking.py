"""Which patches are removed. A mask strategy is a way to draw noise: the K patches with the smallest noise are kept.

Legend: h w grid of patches, L = h * w, K kept patches.
"""

import math

import numpy as np


def block_noise(rng: np.random.Generator, grid: tuple[int, int], num_kept: int) -> np.ndarray:
    """Large rectangles are removed until L - K patches are gone (Bao et al. 2021, BEiT, algorithm 1).

    The last rectangle gives back at random what it removed too much, so that exactly K are kept.
    """
    h, w = grid
    num_removed = h * w - num_kept
    removed = np.zeros(grid, dtype=bool)
    last = removed
    while removed.sum() < num_removed:
        last = removed.copy()
        area = rng.uniform(min(16, num_removed), max(16, num_removed - removed.sum()))
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        height = min(h, max(1, round(math.sqrt(area * ratio))))
        width = min(w, max(1, round(math.sqrt(area / ratio))))
        top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
        removed[top : top + height, left : left + width] = True
    rank = removed.astype(np.float32) + last  # 0 kept, 1 the last rectangle's, 2 removed before it
    return (rank.reshape(-1) + rng.random(h * w, dtype=np.float32)) / np.float32(3)


def grid_noise(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """A regular lattice: at 75 %, one patch of every 2 x 2 is kept (He et al. 2021, figure 6).

    At other ratios, or on a grid with an odd side, the places of the 2 x 2 cells are taken one after another (a
    diagonal first), and the one that is needed in part is drawn from at random.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    rank = np.array([[0, 2], [3, 1]])[rows % 2, columns % 2]
    return (rank.astype(np.float32) + rng.random(rank.size, dtype=np.float32)) / np.float32(4)


MASK_STRATEGIES = ("random", "block", "grid")


def mask_noise(strategy: str, rng: np.random.Generator, grid: tuple[int, int], num_kept: int) -> np.ndarray:
    """The noise (L,), float32 in [0, 1), of one image under one of `MASK_STRATEGIES`."""
    if strategy == "block":
        return block_noise(rng, grid, num_kept)
    if strategy == "grid":
        return grid_noise(rng, grid)
    return rng.random(grid[0] * grid[1], dtype=np.float32)  # any K patches alike (He et al. 2021, section 3)
