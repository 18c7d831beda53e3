"""Fixed 2-D sine-cosine position tables, and the resizing of these and of relative position biases.

Legend: h w grid of patches, L = h * w, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F


def sincos_positions(grid: tuple[int, int], dim: int, *, prefix_tokens: int = 1) -> torch.Tensor:
    """Return the fixed table of He et al. 2021 (appendix A.1): (1, prefix_tokens + L, D), float32.

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] of the
    coordinate times 10000^(-i / (D/4)), i = 0 .. D/4 - 1 (Vaswani et al. 2017, section 3.5). Prefix tokens (cls) get 0.
    """
    if dim % 4:
        raise ValueError(f"a width of {dim}; sine-cosine positions need a multiple of 4")
    h, w = grid
    frequencies = 10000.0 ** (-np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    rows, columns = np.divmod(np.arange(h * w), w)
    parts = []
    for coordinate in (columns, rows):
        angles = np.outer(coordinate, frequencies)  # (L, D/4)
        parts += [np.sin(angles), np.cos(angles)]
    table = np.concatenate([np.zeros((prefix_tokens, dim)), np.concatenate(parts, axis=1)])
    return torch.from_numpy(table).float().unsqueeze(0)


def resize_positions(
    table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], *, prefix_tokens: int = 1
) -> torch.Tensor:
    """Resize a position table bicubically: (1, prefix + h*w, D) -> (1, prefix + h'*w', D).

    There is no antialiasing, as in the official code and transformers; timm's antialiasing changes values by 0.05.
    """
    if old_grid == new_grid:
        return table
    prefix, grid = table[:, :prefix_tokens], table[:, prefix_tokens:]
    if grid.shape[1] != old_grid[0] * old_grid[1]:
        raise ValueError(f"a table of {grid.shape[1]} positions does not fit a grid of {old_grid[0]} x {old_grid[1]}")
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def resize_biases(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Resize a table of relative position biases bilinearly, as transformers' BEiT does.

    ((2h-1)*(2w-1) + 3, heads) -> ((2h'-1)*(2w'-1) + 3, heads); the last three rows belong to the cls token.
    """
    if old_grid == new_grid:
        return table
    (h, w), size = old_grid, [2 * side - 1 for side in new_grid]
    offsets = table[:-3].T.reshape(1, -1, 2 * h - 1, 2 * w - 1).float()
    offsets = F.interpolate(offsets, size=size, mode="bilinear", align_corners=False)
    return torch.cat([offsets[0].flatten(1).T.to(table.dtype), table[-3:]])


def cut_biases(table: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> torch.Tensor:
    """Cut a table of relative position biases for `old_grid` to the smaller offsets in `new_grid`.

    A table for fewer rows or columns than `new_grid` is resized first. Shapes are as in `resize_biases`.
    """
    h, w = (max(sides) for sides in zip(old_grid, new_grid, strict=True))
    table = resize_biases(table, old_grid, (h, w))
    rows, columns = (slice(old - new, old + new - 1) for old, new in zip((h, w), new_grid, strict=True))
    offsets = table[:-3].unflatten(0, (2 * h - 1, 2 * w - 1))[rows, columns]
    return torch.cat([offsets.flatten(0, 1), table[-3:]])
