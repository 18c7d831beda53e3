"""Vision Transformer (Dosovitskiy et al. 2020), with the parameter names of timm and of the official MAE.

Legend: B batch, C channels, H W pixels, h w patches, L = h * w, K kept patches, N tokens, D width, P patch side.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from modeling.position import resize_positions, sincos_positions

SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, L, P*P*C): patches in rows, the pixels of each ordered row, column, channel."""
    b, c, height, width = images.shape
    h, w = height // patch_size, width // patch_size
    x = images.reshape(b, c, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, patch_size * patch_size * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """(B, L, P*P*C) -> (B, C, H, W): the inverse of `patchify`."""
    b, (h, w) = patches.shape[0], grid
    x = patches.reshape(b, h, w, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch_size, w * patch_size)


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Patches or tokens (B, N, D) at `indices` (B, K) -> (B, K, D)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def initialize_like_paper(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for Linear layers, 1 and 0 for norms; for `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbedding):  # seen as the Linear layer that it is
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
        nn.init.zeros_(module.proj.bias)


class PatchEmbedding(nn.Module):
    """Patches to tokens: (B, K, P*P*C) -> (B, K, D).

    Holds the weight as a convolution, as every library stores it, and applies it as the matrix product it is: so the
    patches that a mask removes are never embedded.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C), in the order of `patchify`
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2): (B, N, D) -> (B, N, D), or (B, M, D) of the last
    M tokens where they alone are wanted.

    With `bias_grid`, each head adds to its attention scores a learned number for the offset of two patches, zero at
    first (Bao et al. 2021, "BEiT", appendix): a table for a grid of that size, which others have resized.
    """

    def __init__(self, dim: int, num_heads: int, *, bias_grid: tuple[int, int] | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_grid, table = bias_grid, None
        if bias_grid:
            offsets = (2 * bias_grid[0] - 1) * (2 * bias_grid[1] - 1)
            table = nn.Parameter(torch.zeros(offsets + 3, num_heads))  # cls to patch, patch to cls, cls to cls: last
        self.register_parameter("relative_position_bias_table", table)

    def relative_position_bias(self, grid: tuple[int, int]) -> torch.Tensor:
        """(heads, 1 + L, 1 + L), queries first, for a grid of this size; the cls token stands before the patches."""
        (h, w), table = self.bias_grid, self.relative_position_bias_table
        offsets = table[:-3].T.reshape(1, -1, 2 * h - 1, 2 * w - 1)  # of the query's row and column minus the key's
        if grid != self.bias_grid:
            h, w = grid
            offsets = F.interpolate(offsets, size=(2 * h - 1, 2 * w - 1), mode="bilinear", align_corners=False)
        # A query at (y, x) finds the keys of all rows and columns in the h x w window at (y, x), the last ones first:
        # windows instead of indices, as the gradients of indices are summed in an order that changes.
        windows = offsets.squeeze(0).unfold(1, h, 1).unfold(2, w, 1).flip(3, 4)  # (heads, h, w, h, w)
        cls_to_patch, patch_to_cls, cls_to_cls = table[-3:, :, None, None]  # (heads, 1, 1) each
        cls = torch.cat([cls_to_cls, cls_to_patch.expand(-1, 1, h * w)], dim=2)
        patches = torch.cat([patch_to_cls.expand(-1, h * w, 1), windows.reshape(-1, h * w, h * w)], dim=2)
        return torch.cat([cls, patches], dim=1)

    def forward(self, x: torch.Tensor, last: int | None = None, grid: tuple[int, int] | None = None) -> torch.Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, heads, N, D / heads)
        q = q if last is None else q[:, :, n - last :]
        bias = self.relative_position_bias(grid) if self.bias_grid else None
        if x.device.type == "cpu" and q.dtype == torch.bfloat16:
            # torch's attention on a CPU is faster in float32: a step of ViT-B takes 8 % less
            with torch.autocast("cpu", enabled=False):
                x = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)
        else:
            bias = bias if bias is None else bias.to(q.dtype)
            x = F.scaled_dot_product_attention(q, k, v, bias)  # softmax statistics stay in float32 under bf16
        return self.proj(x.transpose(1, 2).reshape(b, -1, d))


class MLP(nn.Module):
    """Two layers with an exact GELU between: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: (B, N, D) -> (B, N, D), or (B, M, D) of the last M tokens.

    With `layer_scale`, each branch is multiplied by a learned weight per channel that starts there (Touvron et al.
    2021, "Going deeper with Image Transformers", section 2).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        *,
        bias_grid: tuple[int, int] | None = None,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, bias_grid=bias_grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.register_parameter(name, scale)

    def forward(self, x: torch.Tensor, last: int | None = None, grid: tuple[int, int] | None = None) -> torch.Tensor:
        attended = self.attn(self.norm1(x), last, grid)
        attended = attended if self.gamma_1 is None else self.gamma_1 * attended
        x = (x if last is None else x[:, x.shape[1] - last :]) + self.drop_path(attended)
        changed = self.mlp(self.norm2(x))
        changed = changed if self.gamma_2 is None else self.gamma_2 * changed
        return x + self.drop_path(changed)


def run_blocks(
    blocks: nn.ModuleList,
    x: torch.Tensor,
    *,
    checkpointed: bool,
    last: int | None = None,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """(B, N, D) -> (B, N, D) through all blocks, or (B, M, D) where the last M tokens alone are wanted.

    Blocks with a relative position bias need the `grid` that the patches form.

    Where `checkpointed`, the backward pass finds each block's input alone and computes the rest again (Chen et al.
    2016, "Training Deep Nets with Sublinear Memory Cost"), with the same random draws.
    """
    for block in blocks:
        wanted = last if block is blocks[-1] else None
        x = checkpoint(block, x, wanted, grid, use_reentrant=False) if checkpointed else block(x, wanted, grid)
    return x


def embedding_multiply_adds(encoder: "VisionTransformer", patches: int) -> int:
    """Of embedding this many patches of an image."""
    return patches * encoder.patch_embed.proj.weight[0].numel() * encoder.embed_dim


def block_multiply_adds(block: Block, tokens: int, last: int | None = None) -> tuple[int, int]:
    """Of a block's attention and of its MLP, per image, for all tokens or where the last ones alone are wanted."""
    dim, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
    queries = last or tokens
    return tokens * 3 * dim**2 + queries * dim**2 + 2 * tokens * queries * dim, queries * 2 * dim * hidden


def block_activation_bytes(block: Block, tokens: int, *, half_precision: bool) -> tuple[int, int]:
    """Memory per image, about, of what a block's attention and its MLP keep for the backward pass.

    Each keeps, per token and channel, the input of its norm in float32 and, in the precision of matrix products, the
    norm's output; the attention also queries, keys, values and its output, the MLP two hidden layers.
    """
    size = 2 if half_precision else 4
    on_cpu = block.mlp.fc1.weight.device.type == "cpu"
    attention = 18 if half_precision and on_cpu else 4 * size  # in float32 there, and its output once more
    values, hidden = tokens * block.mlp.fc1.in_features, tokens * block.mlp.fc1.out_features
    return (4 + size + attention) * values, (4 + size) * values + 2 * size * hidden


class VisionTransformer(nn.Module):
    """The encoder: images (B, C, H, W) -> tokens (B, 1 + L, D), the cls token first.

    `drop_path` is the rate of the last block; it grows linearly from 0 at the first. Positions are the fixed
    sine-cosine table, a parameter that takes no gradient until somebody asks for one. `custom_weight_init` is the
    paper's initialisation (appendix A.1); without it, layers keep PyTorch's own. `gradient_checkpointing` trades a
    second forward pass for the memory of activations, in training. `relative_position_bias` and `layer_scale` (the
    start of its weights) add to each block what `Attention` and `Block` tell of them.

    Raises ValueError for an image side that the patch size, or a width that the heads, does not divide.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        custom_weight_init: bool = True,
        gradient_checkpointing: bool = False,
        relative_position_bias: bool = False,
        layer_scale: float | None = None,
    ):
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(side % patch_size for side in self.img_size):
            raise ValueError(f"an image of {self.img_size} pixels is not divided by patches of {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"a width of {embed_dim} is not divided by {num_heads} heads")
        self.grid = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.patch_size, self.in_channels, self.embed_dim = patch_size, in_channels, embed_dim
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.relative_position_bias, self.layer_scale = relative_position_bias, layer_scale

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim).normal_(std=0.02))
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, embed_dim), requires_grad=False)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        added = dict(bias_grid=self.grid if relative_position_bias else None, layer_scale=layer_scale)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio, rate, **added) for rate in rates])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        if custom_weight_init:
            self.apply(initialize_like_paper)

    def embed(
        self, patches: torch.Tensor, kept: torch.Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Patches (B, L, P*P*C) and the indices of those to keep (B, K), all by default -> tokens (B, 1 + K, D).

        Positions are resized where the patches form another `grid` than the model's own.
        """
        table = resize_positions(self.pos_embed, self.grid, grid or self.grid)
        positions = table[:, 1:]
        if kept is not None:
            patches = take(patches, kept)
            positions = positions.squeeze(0)[kept]  # (B, K, D)
        x = self.patch_embed(patches) + positions
        cls_token = (self.cls_token + table[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """All blocks and the final norm: (B, N, D) -> (B, N, D).

        Raises ValueError where blocks have a relative position bias and the tokens are not those of all patches.
        """
        if self.relative_position_bias and tokens.shape[1] != self.pos_embed.shape[1]:
            raise ValueError(
                f"{tokens.shape[1]} of {self.pos_embed.shape[1]} tokens in an encoder with a relative position bias, "
                "which needs all; leave the bias out of an encoder that sees some patches only"
            )
        checkpointed = self.gradient_checkpointing and self.training
        return self.norm(run_blocks(self.blocks, tokens, checkpointed=checkpointed, grid=self.grid))

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 1 + L, D), after the final norm; equal to timm's method of the same name."""
        return self.encode(self.embed(patchify(images, self.patch_size)))

    forward = forward_features

    def forward_layers(self, images: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        """(B, C, H, W) -> one map (B, D, h, w) for each 0-based block index, in the order given, without final norm.

        Images may be of any size: what a side has beyond whole patches is cut off, and positions and biases are resized
        to the patches' grid, as transformers' BEiT does it. Raises ValueError for images without a whole patch.
        """
        side, (height, width) = self.patch_size, images.shape[2:]
        h, w = height // side, width // side
        if not h * w:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than a patch of {side}; enlarge it")
        x = self.embed(patchify(images[:, :, : h * side, : w * side], side), grid=(h, w))
        checkpointed, maps, done = self.gradient_checkpointing and self.training, {}, 0
        for i in sorted(indices):
            x = run_blocks(self.blocks[done : i + 1], x, checkpointed=checkpointed, grid=(h, w))
            maps[i], done = x[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, h, w), i + 1
        return [maps[i] for i in indices]
