"""Masked autoencoder: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3.

Legend: B batch, C channels, H W pixels, L patches, K visible patches, M predicted patches, D width, P patch side,
T outputs per patch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from modeling.decoder import Decoder
from modeling.targets import NormalizedPixels, Target
from modeling.vit import Grid, VisionTransformer, patchify, take, training_flops, unpatchify


class MAEOutput(NamedTuple):
    """The outputs of `MaskedAutoencoder.forward`."""

    loss: torch.Tensor  # (), float32
    prediction: torch.Tensor  # (B, L, T), in the space of the target
    mask: torch.Tensor  # (B, L), 1: masked, 0: visible


class MaskedAutoencoder(nn.Module):
    """Encode the visible patches of an image, and predict a target of the masked ones with a light decoder.

    Args:
        encoder, decoder: become parts of the model; the decoder uses gradient checkpointing if the encoder does.
        target: what is predicted for a patch; None: pixels normalized per patch.
        mask_ratio: share of the patches that is masked.
        predict_ratio: share of the masked patches that `forward` predicts with `loss_only`.

    Raises:
        ValueError: if `mask_ratio` leaves no patch visible or masked, or `predict_ratio` predicts none.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: Decoder,
        target: Target | None = None,
        *,
        mask_ratio: float = 0.75,
        predict_ratio: float = 1.0,
    ):
        super().__init__()
        self.mask_ratio, self.predict_ratio = mask_ratio, predict_ratio
        self.mask_token = nn.Parameter(decoder.new_mask_token)
        self.encoder, self.decoder, self.target = encoder, decoder, target or NormalizedPixels(encoder)
        num_patches = encoder.grid[0] * encoder.grid[1]
        if not 0 < self.num_kept < num_patches:
            raise ValueError(
                f"a mask ratio of {mask_ratio} keeps {self.num_kept} of {num_patches} patches; expected some, not all"
            )
        if not self.num_predicted:
            raise ValueError(f"a ratio of {predict_ratio} predicts none of {num_patches - self.num_kept} patches")

    def count(self, num_patches: int) -> tuple[int, int]:
        """Return K and M for an image of `num_patches` patches."""
        num_kept = int(num_patches * (1 - self.mask_ratio))
        return num_kept, round((num_patches - num_kept) * self.predict_ratio)

    @property
    def num_kept(self) -> int:
        """K, the number of visible patches, for images of the encoder's size."""
        return self.count(math.prod(self.encoder.grid))[0]

    @property
    def num_predicted(self) -> int:
        """M, the number of masked patches predicted with `loss_only`, for images of the encoder's size."""
        return self.count(math.prod(self.encoder.grid))[1]

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        *,
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        features: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        loss_only: bool = False,
    ) -> MAEOutput | torch.Tensor:
        """Reconstruct images (B, C, H, W); patches with the K smallest values of `noise` (B, L) are visible.

        Images may have another size than the encoder's. Positions are then resized, and `count` gives K and M.

        Args:
            normalize: normalizes patches (B, N, P*P*C) of raw images, after they are selected as 8-bit pixels.
            features: the target (B, L, T) of all patches, such as a teacher's; None: computed from the images.
            valid: which pixels (B, 1, H, W) count in the loss of a pixel target; None: all. `noise` must mask the
                patches without a valid pixel, see `PretrainingDataset`.
            loss_only: return only the loss (), over M masked patches, and predict no other patches.
        """
        patches, grid = patchify(images, self.encoder.patch_size), self.encoder.grid_of(images)
        order, num_kept = noise.argsort(dim=1, stable=True), self.count(noise.shape[1])[0]  # visible patches first
        pixels = None if valid is None else patchify(valid, self.encoder.patch_size)  # (B, L, P*P)
        if loss_only:
            order = self.leave_out(order, None if valid is None else pixels.any(dim=2))
        kept, removed = (take(patches, part) for part in (order[:, :num_kept], order[:, num_kept:]))
        if normalize is not None:
            kept, removed = normalize(kept), normalize(removed)
        tokens = self.encoder.embed(kept, order[:, :num_kept], grid)
        tokens = self.encoder.encode_layers(tokens) if self.decoder.reads_layers else self.encoder.encode(tokens)
        checkpointed = self.encoder.gradient_checkpointing and self.training
        last = removed.shape[1] if loss_only else None
        prediction = self.decoder(tokens, order, self.mask_token, last, grid=grid, checkpointed=checkpointed)
        if features is None and self.target.whole_image:
            features = self.target(patches if normalize is None else normalize(patches), grid)
        options = {} if valid is None else {"valid": take(pixels, order[:, num_kept:])}
        target = self.target(removed, **options) if features is None else take(features, order[:, num_kept:])
        loss = self.target.loss(prediction[:, -removed.shape[1] :], target, **options)
        if loss_only:
            return loss
        restore = order.argsort(dim=1)  # position of each patch in `order`
        return MAEOutput(loss, take(prediction, restore), mask=(restore >= num_kept).float())

    def leave_out(self, order: torch.Tensor, holds_data: torch.Tensor | None = None) -> torch.Tensor:
        """Remove the masked patches that are not predicted from the order of patches: (B, L) -> (B, K + M).

        The M predicted ones are evenly spaced in the order of the noise, so they are a random share under every mask
        strategy. With `holds_data` (B, L), they are spaced over the masked patches with valid pixels, which come first.
        """
        num_kept, num_predicted = self.count(order.shape[1])
        kept, removed = order[:, :num_kept], order[:, num_kept:]
        if num_predicted == removed.shape[1]:
            return order
        counts = removed.shape[1]
        if holds_data is not None:
            counts = holds_data.gather(1, removed).sum(dim=1, keepdim=True).clamp(min=num_predicted)  # (B, 1)
        chosen = torch.arange(num_predicted, device=order.device) * counts // num_predicted  # (M,) or (B, M)
        return torch.cat([kept, removed.gather(1, chosen.expand(len(order), -1))], dim=1)

    def reconstruct(
        self,
        images: torch.Tensor,
        prediction: torch.Tensor,
        valid: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Turn a prediction (B, L, T) into images (B, C, H, W) in the space of `images`.

        If the target is normalized, this uses the true mean and standard deviation of the `valid` pixels (B, 1, H, W)
        of each patch. They show detail but leak information about masked patches. With `mask` (B, L), 1: masked, the
        statistics are interpolated from the visible patches instead, see `nearness`, which leaks nothing.
        """
        side = self.encoder.patch_size
        options = {} if valid is None else {"valid": patchify(valid, side)}
        if mask is not None and self.target.uses_true_patch_statistics:
            options["weights"] = self.nearness(mask)
        pixels = self.target.invert(prediction.float(), patchify(images, side), **options)
        return unpatchify(pixels, side, self.encoder.grid)

    def nearness(self, mask: torch.Tensor) -> torch.Tensor:
        """Return interpolation weights (B, L, L) of the visible patches of `mask` (B, L), 1: masked; rows sum to 1.

        Row i has the weights for patch i by inverse squared distance: nearly 1 of patch i itself if it is visible.
        """
        rows, columns = (torch.arange(side, device=mask.device) for side in self.encoder.grid)
        places = torch.cartesian_prod(rows, columns).float()  # (L, 2)
        distances = (places[:, None] - places).square().sum(dim=-1).clamp(min=1e-6)  # not 0
        weights = (1 - mask[:, None]) / distances
        return weights / weights.sum(dim=-1, keepdim=True)

    def pixel_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask of patches (B, L) into a mask of pixels (B, 1, H, W)."""
        side = self.encoder.patch_size
        return unpatchify(mask.unsqueeze(-1).expand(-1, -1, side * side), side, self.encoder.grid)

    def training_flops(self, img_size: Grid | None = None) -> float:
        """Return the floating-point operations of the matrix products of a training step, per image.

        `img_size` is H and W of the images; None: the encoder's.
        """
        height, width = img_size or self.encoder.img_size
        num_patches = height * width // self.encoder.patch_size**2
        noise, features = (torch.empty(2, num_patches, *size, device="meta") for size in ((), (self.target.width,)))
        return training_flops(self, noise, img_size=(height, width), features=features, loss_only=True)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters, besides biases and norms, without weight decay: none in the paper."""
        return set()
