"""Classify images with an encoder, pooled tokens and a linear head (He et al. 2021, section 4 and appendix A.1).

Legend: B batch, C channels, H W pixels, h w patches, L = h * w, T class tokens, D width, Q queries.
"""

import numpy as np
import torch
from torch import nn

from modeling.vit import EncoderWithHead, VisionTransformer


class AttentivePooling(nn.Module):
    """Pool tokens (B, L, D) to (B, D) by attention from learned queries.

    Efficient probing (Psomas et al. 2026, "Attention, Please!", arXiv 2506.10178): the tokens are the keys without a
    projection, and each query pools its own share of the values' channels.

    Raises:
        ValueError: if `num_queries` does not divide `dim`.
    """

    def __init__(self, dim: int, num_queries: int):
        super().__init__()
        if dim % num_queries:
            raise ValueError(f"{num_queries} queries do not divide a width of {dim}")
        self.queries = nn.Parameter(torch.empty(1, num_queries, dim).normal_(std=0.02))
        self.value = nn.Linear(dim, dim, bias=False)

    def attention(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the attention (B, Q, L) of each query to tokens (B, L, D)."""
        return (self.queries @ tokens.transpose(1, 2) / tokens.shape[-1] ** 0.5).softmax(dim=-1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        values = self.value(tokens).unflatten(-1, (self.queries.shape[1], -1)).transpose(1, 2)  # (B, Q, L, D / Q)
        return (self.attention(tokens).unsqueeze(2) @ values).flatten(1)


class Classifier(EncoderWithHead):
    """Classify images with an encoder and a linear head: (B, C, H, W) -> logits (B, num_classes).

    All parameters train, including positions, unless `probe` or `train_last_blocks` freezes them.

    Args:
        encoder: becomes a part of the classifier. With "mean" pooling it loses its final norm, so load weights into it
            afterwards.
        pooling: "mean", the mean of the patch tokens, followed by a norm (`fc_norm`); "cls", the mean of the class
            tokens after the encoder's norm; or "attentive", AttentivePooling of the patch tokens after that norm.
        probe: train only the head and attentive pooling. A BatchNorm without parameters precedes the head (appendix
            A.1, "Linear probing"), and the encoder stays in evaluation mode.
        num_queries: number of queries of attentive pooling; it must divide the encoder's width.
        problem: "classes", "labels" (several per image) or "numbers" (regression). Numbers are standardized by the
            buffers `number_mean` and `number_std` (num_classes,), which start at 0 and 1.
        custom_weight_init: initialize the head as the official code does, with a standard deviation of 2e-5, or of 0.01
            for a probe, instead of as PyTorch does.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        pooling: str = "mean",
        probe: bool = False,
        num_queries: int = 32,
        problem: str = "classes",
        custom_weight_init: bool = True,
    ):
        super().__init__()
        self.num_classes, self.pooling, self.probe, self.problem = num_classes, pooling, probe, problem
        if problem == "numbers":
            self.register_buffer("number_mean", torch.zeros(num_classes))
            self.register_buffer("number_std", torch.ones(num_classes))

        dim = encoder.embed_dim
        self.encoder = encoder
        if pooling == "mean":
            encoder.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if pooling == "mean" else nn.Identity()
        self.attentive_pool = AttentivePooling(dim, num_queries) if pooling == "attentive" else nn.Identity()
        self.head_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if probe else nn.Identity()
        self.head = nn.Linear(dim, num_classes)
        if custom_weight_init:
            nn.init.normal_(self.head.weight, std=0.01 if probe else 2e-5)
            nn.init.zeros_(self.head.bias)

        self.requires_grad_(not probe)
        self.attentive_pool.requires_grad_(True)
        self.head.requires_grad_(True)

    def train(self, mode: bool = True) -> "Classifier":
        """Set training or evaluation mode; the encoder of a probe stays in evaluation mode."""
        super().train(mode)
        self.encoder.train(mode and not self.probe)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, num_classes) of images (B, C, H, W) or of the output of `encode_for_head`."""
        return self.classify(images if images.ndim == 3 else self.encoder(images))

    def encode_for_head(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens that `classify` needs: (B, T + 1, D) for "mean", (B, T, D) for "cls", or (B, T + L, D)."""
        tokens = self.encoder(images)
        cls_tokens, patches = self.encoder.split(tokens)
        if self.pooling == "mean":
            return torch.cat([cls_tokens, patches.mean(dim=1, keepdim=True)], dim=1)
        return cls_tokens if self.pooling == "cls" else tokens

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, num_classes) of the encoder's tokens (B, T + L, D) or those of `encode_for_head`."""
        return self.head(self.head_norm(self.pool(tokens)))

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pool the encoder's tokens (B, T + L, D) to the input (B, D) of the head, or of the BatchNorm of a probe."""
        cls_tokens, patches = self.encoder.split(tokens)
        if self.pooling == "attentive":
            return self.attentive_pool(patches)
        return self.fc_norm((patches if self.pooling == "mean" else cls_tokens).mean(dim=1))

    @property
    def pooled(self) -> str:
        """The input of the head, in words."""
        cls = "the mean class token" if self.encoder.num_cls_tokens > 1 else "the class token"
        return {"cls": cls, "mean": "the mean patch token", "attentive": "attentive pooling"}[self.pooling]

    def set_scale(self, scale: tuple[np.ndarray, np.ndarray] | None) -> None:
        """Set the mean and standard deviation (num_classes,) of the target numbers; do nothing for None."""
        if scale is not None:
            self.number_mean.copy_(torch.from_numpy(scale[0]))
            self.number_std.copy_(torch.from_numpy(scale[1]))

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The mean and standard deviation of the numbers, as in `set_scale`; None for other problems."""
        return (self.number_mean.cpu().numpy(), self.number_std.cpu().numpy()) if self.problem == "numbers" else None

    def answer(self, logits: torch.Tensor) -> torch.Tensor:
        """Turn logits (B, num_classes) into probabilities of classes or labels, or into numbers in their units."""
        if self.problem == "numbers":
            return logits.float() * self.number_std + self.number_mean
        return logits.sigmoid() if self.problem == "labels" else logits.softmax(dim=1)

    def attention_maps(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the attention (B, Q, h, w) of the pooling's queries to the patches among tokens (B, T + L, D)."""
        return self.attentive_pool.attention(self.encoder.split(tokens)[1]).unflatten(-1, self.encoder.grid)

    def train_last_blocks(self, n: float) -> None:
        """Freeze all parameters except the head, the last `n` blocks and the norm (section 4.3, "Partial fine-tuning").

        With `n` = 0.5, the MLP of the last block takes the place of the blocks, without the norm before it.

        Raises:
            ValueError: if `n` is another fraction, negative, or more than the blocks of the encoder.
        """
        depth = self.encoder.depth
        if n != 0.5 and (n % 1 or not 0 <= n <= depth):
            raise ValueError(f"the last {n:g} of {depth} blocks; expected 0, 0.5 or a whole number up to {depth}")
        blocks = self.encoder.blocks
        last = [blocks[-1].mlp] if n == 0.5 else blocks[depth - int(n) :]
        self.requires_grad_(False)
        for module in (self.head, self.fc_norm, self.encoder.norm, *last):
            module.requires_grad_(True)
