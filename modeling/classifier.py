"""Classify images with an encoder, pooled tokens and a linear head (He et al. 2021, section 4 and appendix A.1).

Legend: B batch, C channels, H W pixels, L patches, D width.
"""

import torch
from torch import nn

from modeling.vit import EncoderWithHead, VisionTransformer


class Classifier(EncoderWithHead):
    """Classify images with an encoder and a linear head: (B, C, H, W) -> logits (B, num_classes).

    All parameters train, positions too, unless `linear_probe` or `train_last_blocks` say otherwise.

    Args:
        encoder: becomes a part of the classifier; with "mean" pooling it loses its final norm, so load weights into it
            afterwards.
        pooling: "mean" of the patch tokens, with the norm (`fc_norm`) after it, or the "cls" token after the norm.
        linear_probe: train the head alone, behind a BatchNorm without parameters (appendix A.1, "Linear probing").
        custom_weight_init: draw the head's weight from N(0, 2e-5), for a linear probe from N(0, 0.01), as the official
            code does, instead of PyTorch's initialization.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        pooling: str = "mean",
        linear_probe: bool = False,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        self.num_classes, self.pooling, self.linear_probe = num_classes, pooling, linear_probe

        dim = encoder.embed_dim
        self.encoder = encoder
        if pooling == "mean":
            encoder.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pooling == "mean" else nn.Identity()
        self.head_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if linear_probe else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        if custom_weight_init:
            nn.init.normal_(self.head.weight, std=0.01 if linear_probe else 2e-5)
            nn.init.zeros_(self.head.bias)

        self.requires_grad_(not linear_probe)
        self.head.requires_grad_(True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W)."""
        return self.head(self.head_norm(self.features(images)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return the pooled and normed tokens (B, D) of images (B, C, H, W), before any BatchNorm."""
        tokens = self.encoder(images)
        pooled = tokens[:, 1:].mean(dim=1) if self.pooling == "mean" else tokens[:, 0]
        return self.fc_norm(pooled)

    def train_last_blocks(self, n: float) -> None:
        """Freeze all but the head, the last `n` blocks and the norm (section 4.3, "Partial fine-tuning").

        `n` is 0.5 for the MLP of the last block alone, without its norm.

        Raises:
            ValueError: for other fractions, and for more blocks than the encoder has.
        """
        depth = self.encoder.depth
        if n != 0.5 and (n % 1 or not 0 <= n <= depth):
            raise ValueError(f"the last {n:g} of {depth} blocks; expected 0, 0.5 or a whole number up to {depth}")
        blocks = self.encoder.blocks
        last = [blocks[-1].mlp] if n == 0.5 else blocks[depth - int(n) :]
        self.requires_grad_(False)
        for module in (self.head, self.fc_norm, self.encoder.norm, *last):
            module.requires_grad_(True)
