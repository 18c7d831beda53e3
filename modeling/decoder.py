"""Decoders of a masked autoencoder, which predict masked patches from the encoded visible patches.

Legend: B batch, C channels, L patches, K visible patches, M predicted patches, S class tokens, N tokens, D width,
E width of the encoder, P patch side, T outputs per patch.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling.position import resize_positions, sincos_positions
from modeling.vit import MLP, Block, Grid, VisionTransformer, attend, initialize_like_paper, run_blocks


class Decoder(nn.Module):
    """Predict patches with a light transformer over encoded visible patches and mask tokens (He et al. 2021).

    Args:
        encoder: the encoder whose tokens are decoded; only its sizes are used.
        depth: number of blocks; None: `default_depth`.
        num_outputs: T, the number of values predicted for a patch; None: the number of its pixel values, P*P*C.
        custom_weight_init: initialize as the paper does instead of as PyTorch does.

    `new_mask_token` is the initial value (1, 1, D) of the mask token, which is a parameter of the autoencoder.

    Raises:
        ValueError: if `depth` is below 1, or `num_heads` or 4 does not divide `embed_dim`.
    """

    title = "decoder"
    default_depth = 8
    reads_layers = False  # whether `forward` takes the tokens of all encoder layers, see `encode_layers`

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        embed_dim: int = 512,
        depth: int | None = None,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_outputs: int | None = None,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        depth = self.default_depth if depth is None else depth
        if depth < 1:
            raise ValueError(f"a decoder of {depth} blocks; expected at least 1")
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a decoder width of {embed_dim}")
        self.embed_dim, self.depth, self.num_heads, self.mlp_ratio = embed_dim, depth, num_heads, mlp_ratio

        self.num_cls_tokens, self.grid = encoder.num_cls_tokens, encoder.grid
        positions = sincos_positions(encoder.grid, embed_dim, prefix_tokens=self.num_cls_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.add_blocks(encoder.embed_dim)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pred = nn.Linear(embed_dim, num_outputs or encoder.patch_size**2 * encoder.in_channels)
        if custom_weight_init:
            self.apply(initialize_like_paper)

    def add_blocks(self, encoder_dim: int) -> None:
        """Create the layers before the final norm, and the initial mask token."""
        self.embed = nn.Linear(encoder_dim, self.embed_dim)
        self.new_mask_token = torch.zeros(1, 1, self.embed_dim).normal_(std=0.02)
        blocks = [Block(self.embed_dim, self.num_heads, self.mlp_ratio) for _ in range(self.depth)]
        self.blocks = nn.ModuleList(blocks)

    def positions(self, grid: Grid | None) -> torch.Tensor:
        """Return the positions (S + L, D) of class tokens and patches, resized if `grid` is not the encoder's."""
        return resize_positions(
            self.pos_embed, self.grid, grid or self.grid, prefix_tokens=self.num_cls_tokens
        ).squeeze(0)

    def forward(
        self,
        tokens: torch.Tensor,
        order: torch.Tensor,
        mask_token: torch.Tensor,
        last: int | None = None,
        *,
        grid: Grid | None = None,
        checkpointed: bool = False,
    ) -> torch.Tensor:
        """Predict patches from encoded tokens (B, S + K, E) and the order of patches (B, L), visible ones first.

        Returns (B, L, T), or (B, M, T) for the last M patches with `last=M`, in this order. Attention is
        permutation-equivariant and positions are added per patch, so the tokens stay in this order too. Positions are
        resized if the patches form another `grid` than the encoder's. `checkpointed` is as in `run_blocks`.
        """
        n, positions = self.num_cls_tokens, self.positions(grid)
        cls_tokens, kept = self.embed(tokens).split([n, tokens.shape[1] - n], dim=1)
        mask_tokens = mask_token.to(kept.dtype).expand(kept.shape[0], order.shape[1] - kept.shape[1], -1)
        patches = torch.cat([kept, mask_tokens], dim=1) + positions[n + order]
        x = torch.cat([cls_tokens + positions[:n], patches], dim=1)
        x = run_blocks(self.blocks, x, checkpointed=checkpointed, last=last or order.shape[1])
        return self.pred(self.norm(x))


class CrossAttention(nn.Module):
    """Attend from queries (B, M, D) to tokens (B, N, E): -> (B, M, D) (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, dim: int, encoder_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(encoder_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, M, D / heads)
        kv = self.kv(tokens).unflatten(2, (2, self.num_heads, -1))
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))  # (B, heads, N, D / heads)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """Apply a pre-norm block of cross-attention and an MLP to queries (B, M, D), given tokens (B, N, E)."""

    def __init__(self, dim: int, encoder_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, encoder_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), tokens)
        return x + self.mlp(self.norm2(x))


class CrossDecoder(Decoder):
    """Predict each patch independently: mask tokens attend to the encoded visible patches, not to each other.

    (Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders", CrossMAE, arXiv 2401.14391, section 3.)

    Args:
        inputs: "last": every block reads the encoder's final tokens. "weighted": each block reads its own learned
            weighted sum, normalized, of the tokens before the first and after every block of the encoder. Unlike in
            the published code, the last of these have passed the encoder's norm, so that this norm trains too.
        options: the arguments of Decoder.
    """

    title = "cross-attention decoder"
    default_depth = 12

    def __init__(self, encoder: VisionTransformer, *, inputs: str = "last", **options):
        super().__init__(encoder, **options)
        self.reads_layers = inputs == "weighted"
        if self.reads_layers:
            k = encoder.depth + 1
            self.layer_weights = nn.Parameter(torch.empty(self.depth, k).normal_(std=k**-0.5))
            norms = [nn.LayerNorm(encoder.embed_dim, eps=1e-6) for _ in range(self.depth)]
            self.input_norms = nn.ModuleList(norms)

    def add_blocks(self, encoder_dim: int) -> None:
        """Create the layers before the final norm, and the initial mask token."""
        self.new_mask_token = torch.zeros(1, 1, self.embed_dim).normal_(std=0.02)
        sizes = (self.embed_dim, encoder_dim, self.num_heads, self.mlp_ratio)
        self.blocks = nn.ModuleList([CrossBlock(*sizes) for _ in range(self.depth)])

    def forward(
        self,
        tokens: torch.Tensor | list[torch.Tensor],
        order: torch.Tensor,
        mask_token: torch.Tensor,
        last: int | None = None,
        *,
        grid: Grid | None = None,
        checkpointed: bool = False,
    ) -> torch.Tensor:
        """Predict patches as `Decoder.forward` does, visible ones too, from their positions and all encoded tokens.

        `tokens` are (B, S + K, E), or with `reads_layers` the list that `VisionTransformer.encode_layers` returns.
        """
        predicted = order if last is None else order[:, order.shape[1] - last :]
        x = mask_token + self.positions(grid)[self.num_cls_tokens + predicted]  # (B, M, D)
        inputs = self.weigh(tokens) if self.reads_layers else [tokens] * self.depth
        for block, own in zip(self.blocks, inputs, strict=True):
            x = checkpoint(block, x, own, use_reentrant=False) if checkpointed else block(x, own)
        return self.pred(self.norm(x))

    def weigh(self, layers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return, for each block, the normalized weighted sum (B, N, E) of the layers' tokens."""
        sums = torch.einsum("jk,kbne->jbne", self.layer_weights, torch.stack(layers))
        return [norm(tokens) for norm, tokens in zip(self.input_norms, sums, strict=True)]


DECODERS = {"self": Decoder, "cross": CrossDecoder}
