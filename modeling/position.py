"""Fixed 2-D sine-cosine position tables and their resizing.

Legend: h w grid of patches, L = h * w, D width.
"""

import numpy as np
import torch
import torch.nn.functional as F


def sincos_positions(grid: tuple[int, int], dim: int, *, prefix_tokens: int = 1) -> torch.Tensor:
    """The fixed table of He et al. 2021 (appendix A.1): (1, prefix_tokens + L, D), float32.

    The first half of the channels encodes the column, the second half the row; each half is [sin, cos] of the
    coordinate times 10000^(-i / (D/4)), i = 0 .. D/4 - 1 (Vaswani et al. 2017, section 3.5). Prefix tokens (cls) get 0.

    Raises ValueError where `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine table needs a width that 4 divides, not {dim}")
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
    """Bicubic resizing of a position table: (1, prefix + h*w, D) -> (1, prefix + h'*w', D).

    Without antialiasing, as the official code and transformers do it (timm's antialiased one differs by 0.05).
    """
    if old_grid == new_grid:
        return table
    prefix, grid = table[:, :prefix_tokens], table[:, prefix_tokens:]
    if grid.shape[1] != old_grid[0] * old_grid[1]:
        raise ValueError(f"a table of {grid.shape[1]} positions is no grid of {old_grid[0]} x {old_grid[1]}")
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
