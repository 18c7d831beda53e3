"""Mask strategies. Each is a way to draw noise: the K patches with the smallest noise are kept, the others removed.

A picture can say which patches are removed, too. Legend: h w grid of patches, L = h * w, K kept patches.
"""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps

from data.decode import DamagedImage, PixelFormat, decode, open_image
from data.transforms import CentreCrop


def block_noise(rng: np.random.Generator, grid: tuple[int, int], num_kept: int) -> np.ndarray:
    """Remove large rectangles until L - K patches are gone (Bao et al. 2021, BEiT, algorithm 1): noise (L,).

    Patches of the last rectangle are kept at random, so that exactly K are kept.
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
    rank = removed.astype(np.float32) + last  # 0: kept, 1: in the last rectangle, 2: removed before it
    return (rank.reshape(-1) + rng.random(h * w, dtype=np.float32)) / np.float32(3)


def grid_noise(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Keep a regular lattice: at 75 %, one patch of every 2 x 2 (He et al. 2021, figure 6): noise (L,).

    At other ratios, or on a grid with an odd side, the four positions in a 2 x 2 cell are kept one after another (a
    diagonal first), and the last of them in a random part of the cells.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    rank = np.array([[0, 2], [3, 1]])[rows % 2, columns % 2]
    return (rank.astype(np.float32) + rng.random(rank.size, dtype=np.float32)) / np.float32(4)


def random_noise(rng: np.random.Generator, grid: tuple[int, int], block: int = 1) -> np.ndarray:
    """Remove patches uniformly (He et al. 2021, section 3), or whole blocks of `block` x `block`: noise (L,).

    Where K is no multiple of a block's patches, one block keeps a random part of them.
    """
    noise = rng.random(grid[0] * grid[1], dtype=np.float32)
    if block == 1:
        return noise
    rows, columns = grid[0] // block, grid[1] // block
    rank = rng.permutation(rows * columns).astype(np.float32).reshape(rows, columns)  # blocks with the lowest are kept
    return (rank.repeat(block, 0).repeat(block, 1).reshape(-1) + noise) / np.float32(rank.size)


MASK_STRATEGIES = ("random", "block", "grid")


def mask_noise(
    strategy: str, rng: np.random.Generator, grid: tuple[int, int], num_kept: int, *, block: int = 1
) -> np.ndarray:
    """Draw the noise (L,), float32 in [0, 1], of one image under one of `MASK_STRATEGIES`.

    `block` is for "random": the side of the blocks, in patches, that are removed as a whole.
    """
    if strategy == "block":
        return block_noise(rng, grid, num_kept)
    if strategy == "grid":
        return grid_noise(rng, grid)
    if strategy == "random":
        return random_noise(rng, grid, block)
    raise ValueError(f"mask strategy {strategy!r} is unknown; expected one of {', '.join(MASK_STRATEGIES)}")


def read_removed(path: str, max_pixels: int) -> torch.Tensor:
    """Return which pixels a picture removes, the white ones: (H, W), bool. Raises DamagedImage.

    What is transparent counts as black.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedImage(error.strerror) from None
    (white,) = decode(data, PixelFormat(channels=1, max_pixels=max_pixels))
    with contextlib.suppress(DamagedImage), open_image(data, max_pixels) as image:  # Pillow does not read every TIFF
        if image.has_transparency_data:
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
            white = white * (torch.from_numpy(np.array(alpha)) / 255)
    return white > 127


def removed_patches(removed: torch.Tensor, size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Return 1 for each patch of which at least half is removed, otherwise 0: (L,), float32, which serves as noise.

    The patches are those of an image of the same size as the pixels `removed` (H, W), after `CentreCrop(size)`.
    """
    box, new_size, corner = CentreCrop(size).place(*removed.shape)
    shares = []  # of each pixel's row or column in those of the patches, (h, H) and (w, W)
    for axis, length in enumerate(removed.shape):
        edges = corner[axis] + size[axis] / grid[axis] * torch.arange(grid[axis] + 1, dtype=torch.float64)
        edges = box[axis] + edges * box[2 + axis] / new_size[axis]  # in the pixels of the picture
        first, last, pixels = edges[:-1, None], edges[1:, None], torch.arange(length)
        shares.append(((last.minimum(pixels + 1) - first.maximum(pixels)).clamp(min=0) / (last - first)).float())
    share = shares[0] @ removed.float() @ shares[1].T
    return (share.flatten() > 0.5 - 1e-5).float()  # sums of float32 are not exact
