"""Masked autoencoder: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", section 3.

Legend: B batch, C channels, H W pixels, L patches, K kept patches, D width, P patch side.
"""

from typing import NamedTuple

import torch
from torch import nn

from modeling.position import sincos_positions
from modeling.vit import (
    Block,
    VisionTransformer,
    block_activation_bytes,
    block_multiply_adds,
    embedding_multiply_adds,
    initialize_like_paper,
    patchify,
    run_blocks,
    take,
    unpatchify,
)


class MAEOutput(NamedTuple):
    """What `MaskedAutoencoder.forward` returns."""

    loss: torch.Tensor  # (), float32
    prediction: torch.Tensor  # (B, L, P*P*C), in the space of the target; or of the removed patches alone
    mask: torch.Tensor  # (B, L), 1 = removed, 0 = kept


class MaskedAutoencoder(nn.Module):
    """An encoder that sees the kept patches only, and a light decoder that predicts the pixels of the removed ones.

    The decoder checkpoints its gradients where the encoder does.

    Raises ValueError for a mask ratio that keeps or removes nothing, a decoder without blocks, or a decoder width that
    its heads do not divide.
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
            raise ValueError(f"a decoder width of {decoder_embed_dim} is not divided by {decoder_num_heads} heads")
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
                if name != "encoder":  # which initialised itself
                    module.apply(initialize_like_paper)

    def forward(self, images: torch.Tensor, noise: torch.Tensor, *, removed_only: bool = False) -> MAEOutput:
        """Normalised images (B, C, H, W) and the noise (B, L) whose K smallest values mark the kept patches.

        With `removed_only` the prediction is (B, L - K, P*P*C): of the removed patches, in the order of their noise.
        That is all that the loss needs, so training asks for no more.
        """
        patches = patchify(images, self.encoder.patch_size)
        order = noise.argsort(dim=1, stable=True)  # kept patches first
        tokens = self.encoder.encode(self.encoder.embed(patches, order[:, : self.num_kept]))
        removed = order[:, self.num_kept :]
        prediction = self.decode(tokens, order, removed.shape[1] if removed_only else None)
        loss = self.loss(take(patches, removed), prediction[:, -removed.shape[1] :])
        restore = order.argsort(dim=1)  # where each patch stands in `order`
        mask = (restore >= self.num_kept).float()
        return MAEOutput(loss, prediction if removed_only else take(prediction, restore), mask)

    def decode(self, tokens: torch.Tensor, order: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """Encoded tokens (B, 1 + K, D) and the patches' order (B, L), kept ones first -> predictions (B, L, P*P*C) in
        that order, or (B, M, P*P*C) of the last M.

        Blocks do not care for the order of tokens: each patch has its position added, wherever it stands.
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
        """Mean squared error of removed patches (B, L - K, P*P*C), in float32 (section 3, "Reconstruction target")."""
        return (prediction.float() - self.target(patches)).square().mean()

    def target(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches (B, L, P*P*C) -> what is predicted, in float32: their pixels, each patch normalised where asked."""
        patches = patches.float()
        if not self.norm_pix_loss:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # the unbiased variance, as the official code
        return (patches - mean) / (variance + 1e-6).sqrt()

    def reconstruct(self, images: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        """A prediction (B, L, P*P*C) as images (B, C, H, W) in the space of `images`.

        Where the target was normalised, the true mean and deviation of each patch undo it: that shows detail, but
        leaks the answer to whoever looks.
        """
        prediction = prediction.float()
        if self.norm_pix_loss:
            patches = patchify(images, self.encoder.patch_size).float()
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        return unpatchify(prediction, self.encoder.patch_size, self.encoder.grid)

    def pixel_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """A mask of patches (B, L) as one of pixels (B, 1, H, W)."""
        side = self.encoder.patch_size
        return unpatchify(mask.unsqueeze(-1).expand(-1, -1, side * side), side, self.encoder.grid)

    def training_flops(self) -> float:
        """Floating-point operations of a training step per image, of the matrix products: 2 for a multiply-add, and
        the backward pass costs twice the forward pass."""
        encoder, decoder_dim = self.encoder, self.decoder_embed.out_features
        pixels, num_removed = self.decoder_pred.out_features, encoder.grid[0] * encoder.grid[1] - self.num_kept
        multiply_adds = embedding_multiply_adds(encoder, self.num_kept)
        multiply_adds += (1 + self.num_kept) * encoder.embed_dim * decoder_dim + num_removed * decoder_dim * pixels
        for block, tokens in self._blocks_and_tokens():
            last = num_removed if block is self.decoder_blocks[-1] else None
            multiply_adds += sum(block_multiply_adds(block, tokens, last))
        return 6.0 * multiply_adds

    def activation_bytes(self, *, half_precision: bool) -> float:
        """Memory per image, about, of what the forward pass keeps for the backward pass; with gradient checkpointing
        that is each block's input, and one block at a time the rest."""
        blocks = self._blocks_and_tokens()
        whole = [sum(block_activation_bytes(block, n, half_precision=half_precision)) for block, n in blocks]
        inputs = [4 * n * block.mlp.fc1.in_features for block, n in blocks]
        return sum(inputs) + max(whole) if self.encoder.gradient_checkpointing else sum(whole)

    def _blocks_and_tokens(self) -> list[tuple[Block, int]]:
        """All blocks, each with the number of its tokens."""
        num_patches = self.encoder.grid[0] * self.encoder.grid[1]
        blocks = [(block, 1 + self.num_kept) for block in self.encoder.blocks]
        return blocks + [(block, 1 + num_patches) for block in self.decoder_blocks]

    def no_weight_decay(self) -> set[str]:
        """Names, beyond biases and norms, that weight decay leaves alone: none, as the official recipe has it."""
        return set()
