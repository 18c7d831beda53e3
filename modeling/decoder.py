"""Decoders of a masked autoencoder: from the encoded tokens of the kept patches to a prediction of the others.

Legend: B batch, C channels, L patches, K kept patches, D width, P patch side.
"""

import torch
from torch import nn

from modeling.position import sincos_positions
from modeling.vit import Block, VisionTransformer, initialize_like_paper, run_blocks


class Decoder(nn.Module):
    """Predict patches with a light transformer over the encoded kept patches and mask tokens (He et al. 2021).

    Args:
        encoder: the one whose tokens are decoded; only its sizes are read.
        custom_weight_init: initialize as the paper does instead of as PyTorch does.

    `new_mask_token` is the initial value (1, 1, D) of the mask token, which is a parameter of the autoencoder.

    Raises:
        ValueError: if `depth` is 0, or `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"a decoder of {depth} blocks; expected at least 1")
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a decoder width of {embed_dim}")
        self.embed_dim, self.depth, self.num_heads, self.mlp_ratio = embed_dim, depth, num_heads, mlp_ratio

        self.embed = nn.Linear(encoder.embed_dim, embed_dim)
        self.new_mask_token = torch.zeros(1, 1, embed_dim).normal_(std=0.02)
        self.pos_embed = nn.Parameter(sincos_positions(encoder.grid, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pred = nn.Linear(embed_dim, encoder.patch_size**2 * encoder.in_channels)
        if custom_weight_init:
            self.apply(initialize_like_paper)

    def forward(
        self,
        tokens: torch.Tensor,
        order: torch.Tensor,
        mask_token: torch.Tensor,
        last: int | None = None,
        *,
        checkpointed: bool = False,
    ) -> torch.Tensor:
        """Predict patches from encoded tokens (B, 1 + K, D) and the order of patches (B, L), kept ones first.

        Attention is permutation-equivariant and positions are added per patch, so the tokens stay in this order.
        `checkpointed` is that of `run_blocks`. Returns (B, L, P*P*C), or (B, M, P*P*C) with `last=M`, in this order.
        """
        x = self.embed(tokens)
        positions = self.pos_embed.squeeze(0)
        mask_tokens = mask_token.to(x.dtype).expand(x.shape[0], 1 + order.shape[1] - x.shape[1], -1)
        x = torch.cat(
            [x[:, :1] + positions[:1], torch.cat([x[:, 1:], mask_tokens], dim=1) + positions[1 + order]], dim=1
        )
        x = run_blocks(self.blocks, x, checkpointed=checkpointed, last=last or order.shape[1])
        return self.pred(self.norm(x))
