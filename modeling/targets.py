"""Targets that a masked autoencoder predicts (He et al. 2021, section 3, "Reconstruction target", and table 1d).

Each target is a class here and an entry of TARGETS. Legend: as in mae.py, N patches; T is the width of a target.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from modeling.vit import Grid, VisionTransformer, patchify, unpatchify


class Target(nn.Module):
    """Base class of targets, which define the loss of predictions and how they become pixels.

    Args:
        encoder: its patch size and channels define the patches.
        width: T, for targets with a variable width.
    """

    name = ""  # value of --target
    title = ""  # name in messages
    invertible = True  # whether predictions can be turned into pixels, for pictures and PSNR
    uses_true_patch_statistics = False  # whether `invert` needs the mean and variance of each true patch
    whole_image = False  # whether `forward` needs all patches, in row-major order, and their grid

    def __init__(self, encoder: VisionTransformer, width: int | None = None):
        super().__init__()
        self.width = encoder.patch_size**2 * encoder.in_channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the target of patches, in float32: (B, N, P*P*C) -> (B, N, T)."""
        raise NotImplementedError

    def invert(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Turn predictions (B, N, T) for patches (B, N, P*P*C) into pixels (B, N, P*P*C)."""
        raise NotImplementedError

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the loss () of predictions (B, N, T), in float32: by default the mean squared error."""
        return (prediction.float() - target).square().mean()


class PixelTarget(Target):
    """Base class of pixel targets; `valid` (B, N, P*P) says which pixels count, None: all."""

    def loss(self, prediction: torch.Tensor, target: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean over images () of the mean squared error of their valid pixels, which is 0 without any."""
        error = (prediction.float() - target).square()
        if valid is None:
            return error.mean()
        error = error.unflatten(-1, (valid.shape[-1], -1)).mean(dim=-1) * valid  # (B, N, P*P)
        return (error.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)).mean()


class Pixels(PixelTarget):
    """Predict the pixels of a patch."""

    name, title = "pixels", "plain pixels"

    def forward(self, patches: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return patches.float()

    def invert(
        self, prediction: torch.Tensor, patches: torch.Tensor, valid: torch.Tensor | None = None
    ) -> torch.Tensor:
        return prediction


class NormalizedPixels(PixelTarget):
    """Predict pixels that are normalized by the mean and standard deviation of the valid pixels of their patch."""

    name, title = "normalized", "pixels normalized per patch"
    uses_true_patch_statistics = True

    def forward(self, patches: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        patches = patches.float()
        variance, mean = self.var_mean(patches, valid)
        return (patches - mean) / (variance + 1e-6).sqrt()

    def invert(
        self,
        prediction: torch.Tensor,
        patches: torch.Tensor,
        valid: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn predictions into pixels; `weights` (B, N, N) average the statistics of other patches for each patch."""
        variance, mean = self.var_mean(patches.float(), valid)
        if weights is not None:
            variance, mean = weights @ variance, weights @ mean
        return prediction * (variance + 1e-6).sqrt() + mean

    @staticmethod
    def var_mean(patches: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the variance, unbiased as in the official code, and mean of patches (B, N, P*P*C), each (B, N, 1)."""
        if valid is None:
            return torch.var_mean(patches, dim=-1, keepdim=True)
        weights = valid.float().repeat_interleave(patches.shape[-1] // valid.shape[-1], dim=-1)
        count = weights.sum(dim=-1, keepdim=True)
        mean = (patches * weights).sum(dim=-1, keepdim=True) / count.clamp(min=1)
        squares = ((patches - mean).square() * weights).sum(dim=-1, keepdim=True)
        return squares / (count - 1).clamp(min=1), mean


class PrincipalComponents(Target):
    """Predict the coefficients of a patch's first principal components, by default 96 as in the paper.

    `fit` computes the components, which are buffers and therefore part of every checkpoint.
    """

    name = "pca"

    def __init__(self, encoder: VisionTransformer, width: int | None = None):
        super().__init__(encoder)
        size = self.width
        self.width = min(96, size) if width is None else width
        if self.width > size:
            raise ValueError(f"{width} components of patches of {size} values; expected at most {size}")
        self.title = f"{self.width} principal components of patches"
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("components", torch.zeros(self.width, size))

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Compute the components from batches of patches (B, L, P*P*C), in float64."""
        count, total, products = 0, 0.0, 0.0
        for patches in batches:
            patches = patches.flatten(0, 1).double()
            count, total, products = count + len(patches), total + patches.sum(0), products + patches.T @ patches
        mean = total / count
        vectors = torch.linalg.eigh(products / count - mean.outer(mean)).eigenvectors  # in order of ascending variance
        self.mean.copy_(mean)
        self.components.copy_(vectors.T.flip(0)[: self.width])

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        with torch.autocast(patches.device.type, enabled=False):
            return F.linear(patches.float() - self.mean, self.components)

    def invert(self, prediction: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        return prediction @ self.components + self.mean


class HOG(Target):
    """Predict histograms of oriented gradients (Wei et al. 2022, "MaskFeat", section 3.2).

    Each cell of 8 x 8 pixels has a histogram of 9 orientations for each channel, scaled to an L2 norm of 1. If 8 does
    not divide the patch size, a patch is one cell. Predictions cannot be turned into pixels.
    """

    name, num_bins, epsilon = "hog", 9, 1e-5
    invertible, whole_image = False, True

    def __init__(self, encoder: VisionTransformer, width: int | None = None):
        super().__init__(encoder)
        self.patch_size, self.grid = encoder.patch_size, encoder.grid
        self.cell = 8 if self.patch_size % 8 == 0 else self.patch_size
        self.width = (self.patch_size // self.cell) ** 2 * encoder.in_channels * self.num_bins
        self.title = f"HOG, {self.num_bins} orientations in cells of {self.cell} x {self.cell} pixels"

    def forward(self, patches: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        images = unpatchify(patches.float(), self.patch_size, grid or self.grid)  # gradients cross borders of patches
        rows = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1))  # 0 at the borders of the image
        columns = F.pad(images[..., 2:] - images[..., :-2], (1, 1))
        magnitude = torch.hypot(rows, columns)
        angle = torch.atan2(rows, columns) * (self.num_bins / torch.pi)  # all bins cover a half turn
        bins = angle.floor() % self.num_bins
        histograms = [F.avg_pool2d(magnitude * (bins == i), self.cell) for i in range(self.num_bins)]
        cells = torch.stack(histograms, dim=2)  # (B, C, bins, H / cell, W / cell)
        cells = cells / (cells.square().sum(2, keepdim=True) + self.epsilon**2).sqrt()
        return patchify(cells.flatten(1, 2), self.patch_size // self.cell)


class TeacherFeatures(Target):
    """Predict the layer-normalized patch tokens, `width` wide, of a frozen encoder, see `modeling.teacher`.

    The loss is smooth L1. The tokens are computed outside the model, which therefore does not contain the teacher.
    """

    name, invertible = "teacher", False

    def __init__(self, encoder: VisionTransformer, width: int | None = None):
        super().__init__(encoder)
        self.width = width
        self.title = f"the teacher's patch tokens, {width} wide"

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        raise TypeError("patches alone have no features of a teacher; pass them to the model as `features`")

    def loss(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.smooth_l1_loss(prediction.float(), target)


TARGETS = {kind.name: kind for kind in (NormalizedPixels, Pixels, PrincipalComponents, HOG, TeacherFeatures)}
