"""Mask strategies, which draw noise: the K patches with the smallest noise stay visible, the others are masked.

A picture can also say which patches are masked. Legend: h, w grid of patches, L = h * w, K visible patches (kept).
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
    """Mask large rectangles until L - K patches are masked (Bao et al. 2021, BEiT, algorithm 1): noise (L,).

    A random part of the last rectangle stays visible, so that exactly K patches are visible.
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
    rank = removed.astype(np.float32) + last  # 0: visible, 1: in the last rectangle, 2: masked before it
    return (rank.reshape(-1) + rng.random(h * w, dtype=np.float32)) / np.float32(3)


def grid_noise(rng: np.random.Generator, grid: tuple[int, int]) -> np.ndarray:
    """Keep a regular lattice visible: at a ratio of 75 %, one of 2 x 2 patches (He et al. 2021, figure 6): noise (L,).

    At other ratios, or on a grid with an odd side, the four positions in a 2 x 2 cell become visible in a fixed order
    (a diagonal first), and the last of these positions only in a random part of the cells.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    rank = np.array([[0, 2], [3, 1]])[rows % 2, columns % 2]
    return (rank.astype(np.float32) + rng.random(rank.size, dtype=np.float32)) / np.float32(4)


def random_noise(rng: np.random.Generator, grid: tuple[int, int], block: int = 1) -> np.ndarray:
    """Mask patches uniformly at random (He et al. 2021, section 3), or blocks of `block` x `block` patches: noise (L,).

    If K is not a multiple of the patches in a block, a random part of one block stays visible.
    """
    noise = rng.random(grid[0] * grid[1], dtype=np.float32)
    if block == 1:
        return noise
    rows, columns = grid[0] // block, grid[1] // block
    rank = rng.permutation(rows * columns).astype(np.float32).reshape(rows, columns)  # the lowest are visible
    return (rank.repeat(block, 0).repeat(block, 1).reshape(-1) + noise) / np.float32(rank.size)


MASK_STRATEGIES = ("random", "block", "grid")


def mask_noise(
    strategy: str, rng: np.random.Generator, grid: tuple[int, int], num_kept: int, *, block: int = 1
) -> np.ndarray:
    """Draw the noise (L,), float32 in [0, 1], for one image by one of `MASK_STRATEGIES`.

    `block`, for "random" only, is the side, in patches, of the blocks that are masked as a whole.
    """
    if strategy == "block":
        return block_noise(rng, grid, num_kept)
    if strategy == "grid":
        return grid_noise(rng, grid)
    if strategy == "random":
        return random_noise(rng, grid, block)
    raise ValueError(f"mask strategy {strategy!r} is unknown; expected one of {', '.join(MASK_STRATEGIES)}")


def read_removed(path: str, max_pixels: int) -> torch.Tensor:
    """Return the pixels that a picture masks, the white ones: (H, W), bool. Raises DamagedImage.

    Transparent pixels count as black.
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
    """Return 1 for each patch of which at least half is masked, otherwise 0: (L,), float32, which serves as noise.

    The patches are those of an image of the same size as the masked pixels `removed` (H, W), after `CentreCrop(size)`.
    """
    box, new_size, corner = CentreCrop(size).place(*removed.shape)
    shares = []  # share of each row and column of pixels in those of the patches, (h, H) and (w, W)
    for axis, length in enumerate(removed.shape):
        edges = corner[axis] + size[axis] / grid[axis] * torch.arange(grid[axis] + 1, dtype=torch.float64)
        edges = box[axis] + edges * box[2 + axis] / new_size[axis]  # in pixels of the picture
        first, last, pixels = edges[:-1, None], edges[1:, None], torch.arange(length)
        shares.append(((last.minimum(pixels + 1) - first.maximum(pixels)).clamp(min=0) / (last - first)).float())
    share = shares[0] @ removed.float() @ shares[1].T
    return (share.flatten() > 0.5 - 1e-5).float()  # sums of float32 are not exact
