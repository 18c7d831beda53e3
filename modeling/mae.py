"""Masked autoencoder: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3.

Legend: B batch, C channels, H W pixels, L patches, K kept patches, D width, P patch side.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from modeling.position import sincos_positions
from modeling.vit import (
    Block,
    VisionTransformer,
    initialize_like_paper,
    patchify,
    run_blocks,
    take,
    training_flops,
    unpatchify,
)


class MAEOutput(NamedTuple):
    """Hold the results of `MaskedAutoencoder.forward`."""

    loss: torch.Tensor  # (), float32
    prediction: torch.Tensor  # (B, L, P*P*C), in the space of the target
    mask: torch.Tensor  # (B, L), 1 = removed, 0 = kept


class MaskedAutoencoder(nn.Module):
    """Encode the kept patches of an image, and predict the pixels of the removed ones with a light decoder.

    Args:
        encoder: becomes a part of the model; the decoder uses gradient checkpointing if the encoder does.
        mask_ratio: share of patches that is removed.
        norm_pix_loss: normalize each patch of the target by its own mean and standard deviation.
        custom_weight_init: initialize the decoder as the paper does instead of as PyTorch does.

    Raises:
        ValueError: if `mask_ratio` keeps or removes no patch, `decoder_depth` is 0, or `decoder_num_heads` does not
            divide `decoder_embed_dim`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        decoder_mlp_ratio: float = 4.0,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        num_patches = encoder.grid[0] * encoder.grid[1]
        self.num_kept = int(num_patches * (1 - mask_ratio))
        if not 0 < self.num_kept < num_patches:
            raise ValueError(f"a mask ratio of {mask_ratio} keeps {self.num_kept} of {num_patches} patches")
        if decoder_depth < 1:
            raise ValueError(f"a decoder of {decoder_depth} blocks; expected at least 1")
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(f"{decoder_num_heads} heads do not divide a decoder width of {decoder_embed_dim}")
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss

        self.encoder = encoder
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim).normal_(std=0.02))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(encoder.grid, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_embed_dim, decoder_num_heads, decoder_mlp_ratio) for _ in range(decoder_depth)]
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, encoder.patch_size**2 * encoder.in_channels)
        if custom_weight_init:
            for name, module in self.named_children():
                if name != "encoder":  # which is initialized already
                    module.apply(initialize_like_paper)

    def forward(
        self,
        images: torch.Tensor,
        noise: torch.Tensor,
        *,
        normalize: Callable[[torch.Tensor], torch.Tensor] | None = None,
        loss_only: bool = False,
    ) -> MAEOutput | torch.Tensor:
        """Reconstruct images (B, C, H, W); the K smallest values of `noise` (B, L) mark the kept patches.

        Args:
            normalize: normalizes patches (B, N, P*P*C) of images that are not, so that 8-bit pixels are gathered.
            loss_only: return the loss (), and predict only the removed patches, which is all that it needs.
        """
        patches = patchify(images, self.encoder.patch_size)
        order = noise.argsort(dim=1, stable=True)  # kept patches first
        kept, removed = (take(patches, part) for part in (order[:, : self.num_kept], order[:, self.num_kept :]))
        if normalize is not None:
            kept, removed = normalize(kept), normalize(removed)
        tokens = self.encoder.encode(self.encoder.embed(kept, order[:, : self.num_kept]))
        prediction = self.decode(tokens, order, removed.shape[1] if loss_only else None)
        loss = self.loss(removed, prediction[:, -removed.shape[1] :])
        if loss_only:
            return loss
        restore = order.argsort(dim=1)  # position of each patch in `order`
        return MAEOutput(loss, take(prediction, restore), mask=(restore >= self.num_kept).float())

    def decode(self, tokens: torch.Tensor, order: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Predict patches from encoded tokens (B, 1 + K, D) and the order of patches (B, L), kept ones first.

        Attention is permutation-equivariant and positions are added per patch, so the tokens stay in this order.
        Returns (B, L, P*P*C), or (B, M, P*P*C) with `last=M`, in this order.
        """
        x = self.decoder_embed(tokens)
        positions = self.decoder_pos_embed.squeeze(0)
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], order.shape[1] - self.num_kept, -1)
        x = torch.cat(
            [x[:, :1] + positions[:1], torch.cat([x[:, 1:], mask_tokens], dim=1) + positions[1 + order]], dim=1
        )
        checkpointed = self.encoder.gradient_checkpointing and self.training
        x = run_blocks(self.decoder_blocks, x, checkpointed=checkpointed, last=last or order.shape[1])
        return self.decoder_pred(self.decoder_norm(x))

    def loss(self, patches: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of removed patches (B, L - K, P*P*C), in float32 (section 3)."""
        return (prediction.float() - self.target(patches)).square().mean()

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the target of patches (B, L - K, P*P*C), in float32 (section 3, "Reconstruction target").

        `reconstruct` inverts it.
        """
        patches = patches.float()
        if not self.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # unbiased, as in the official code
        return (patches - mean) / (variance + 1e-6).sqrt()

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """Turn a prediction (B, L, P*P*C) into images (B, C, H, W) in the space of `images`.

        If the target is normalized, this uses the true mean and standard deviation of each patch, which shows detail
        but leaks information of removed patches.
        """
        prediction = prediction.float()
        if self.norm_pix_loss:
            patches = patchify(images, self.encoder.patch_size).float()
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        return unpatchify(prediction, self.encoder.patch_size, self.encoder.grid)

    def pixel_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Turn a mask of patches (B, L) into one of pixels (B, 1, H, W)."""
        side = self.encoder.patch_size
        return unpatchify(mask.unsqueeze(-1).expand(-1, -1, side * side), side, self.encoder.grid)

    def training_flops(self) -> float:
        """Return the floating-point operations of the matrix products of a training step, per image."""
        noise = torch.empty(2, self.encoder.grid[0] * self.encoder.grid[1], device="meta")
        return training_flops(self, noise, loss_only=True)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters, besides biases and norms, without weight decay: none in the paper."""
        return set()
