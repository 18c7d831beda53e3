"""Vision Transformer (Dosovitskiy et al. 2020), with the parameter names of timm and of the official MAE.

Legend: B batch, C channels, H W pixels, h w patches, L = h * w, K visible patches, T class tokens, N tokens, D width,
P patch side.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

from modeling.position import resize_biases, resize_positions, sincos_positions

Grid = tuple[int, int]  # h and w
SIZES = {
    "tiny": dict(embed_dim=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(embed_dim=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(embed_dim=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(embed_dim=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16, patch_size=14),
}


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut images (B, C, H, W) into patches (B, L, P*P*C), in row-major order, pixels as (row, column, channel)."""
    b, c, height, width = images.shape
    h, w = height // patch_size, width // patch_size
    x = images.reshape(b, c, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w, patch_size * patch_size * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: Grid) -> torch.Tensor:
    """Join patches (B, L, P*P*C) to images (B, C, H, W); the inverse of `patchify`."""
    b, (h, w) = patches.shape[0], grid
    x = patches.reshape(b, h, w, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, h * patch_size, w * patch_size)


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Select the patches or tokens (B, N, D) at `indices` (B, K); returns (B, K, D)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def initialize_like_paper(module: nn.Module) -> None:
    """Set Xavier-uniform weights and zero biases of Linear layers, 1 and 0 of norms; for `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbedding):  # like the equivalent Linear layer
        nn.init.xavier_uniform_(module.proj.weight.data.flatten(1))
        nn.init.zeros_(module.proj.bias)


class PatchEmbedding(nn.Module):
    """Project patches to tokens: (B, K, P*P*C) -> (B, K, D).

    The weight is stored as that of a convolution, as in other libraries, and applied as a matrix product, so that
    masked patches are not embedded.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P*P*C), in the order of `patchify`
        return F.linear(patches, weight, self.proj.bias)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Attend from queries (B, heads, M, d) to keys and values (B, heads, N, d); returns (B, heads, M, d)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # PyTorch's CPU attention is faster in float32: a step of ViT-B takes 8 % less time.
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)
    bias = bias if bias is None else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias)  # softmax statistics stay in float32 under bf16


class Attention(nn.Module):
    """Apply multi-head self-attention (Vaswani et al. 2017, section 3.2.2): (B, N, D) -> (B, N, D).

    With `last=M`, only the last M tokens are queries, and the output is (B, M, D).
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_grid: Grid | None = None
        self.register_parameter("relative_position_bias_table", None)

    def add_relative_position_bias(self, grid: Grid) -> None:
        """Add a learned bias, initially zero, to the scores of each head (Bao et al. 2021, "BEiT", appendix).

        Its table is for this `grid` and is resized for other grids.
        """
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        table = torch.zeros(offsets + 3, self.num_heads)  # the last three: cls to patch, patch to cls, cls to cls
        self.bias_grid, self.relative_position_bias_table = grid, nn.Parameter(table)

    def bias_table(self, grid: Grid) -> torch.Tensor:
        """Return the table of the relative position bias, resized to `grid`: ((2h-1)*(2w-1) + 3, heads)."""
        return resize_biases(self.relative_position_bias_table, self.bias_grid, grid)

    def relative_position_bias(self, grid: Grid, num_cls_tokens: int = 1) -> torch.Tensor:
        """Return the bias (heads, T + L queries, T + L keys) for `grid`; class tokens come first.

        Class tokens share their entries of the table.
        """
        (h, w), table = grid, self.bias_table(grid)
        offsets = table[:-3].T.reshape(-1, 2 * h - 1, 2 * w - 1)  # of the query's row and column minus the key's
        # The biases of a query at (y, x) are the h x w window of `offsets` at (y, x), in reverse order of the keys.
        # Windows are used because indexing would sum gradients in a nondeterministic order.
        windows = offsets.unfold(1, h, 1).unfold(2, w, 1).flip(3, 4)  # (heads, h, w, h, w)
        cls_to_patch, patch_to_cls, cls_to_cls = table[-3:, :, None, None]  # (heads, 1, 1) each
        n = num_cls_tokens
        cls = torch.cat([cls_to_cls.expand(-1, n, n), cls_to_patch.expand(-1, n, h * w)], dim=2)
        patches = torch.cat([patch_to_cls.expand(-1, h * w, n), windows.reshape(-1, h * w, h * w)], dim=2)
        return torch.cat([cls, patches], dim=1)

    def project(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values (B, heads, N, D / heads) of tokens (B, N, D)."""
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        return [part.transpose(1, 2) for part in qkv.unbind(2)]

    def forward(self, x: torch.Tensor, last: int | None = None, grid: Grid | None = None) -> torch.Tensor:
        b, n, d = x.shape
        q, k, v = self.project(x)
        q = q if last is None else q[:, :, n - last :]
        bias = self.relative_position_bias(grid, n - grid[0] * grid[1]) if self.bias_grid else None
        x = attend(q, k, v, bias)
        return self.proj(x.transpose(1, 2).reshape(b, -1, d))


class MLP(nn.Module):
    """Apply two Linear layers with an exact GELU between them: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Apply a pre-norm transformer block: (B, N, D) -> (B, N, D), or (B, M, D) with `last=M`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = nn.Identity()
        self.register_parameter("gamma_1", None)
        self.register_parameter("gamma_2", None)

    def add_layer_scale(self, value: float) -> None:
        """Multiply each residual branch by learned weights per channel, initially `value`.

        (Touvron et al. 2021, "Going deeper with Image Transformers", section 2.)
        """
        for name in ("gamma_1", "gamma_2"):
            setattr(self, name, nn.Parameter(torch.full((self.norm1.normalized_shape[0],), float(value))))

    def forward(self, x: torch.Tensor, last: int | None = None, grid: Grid | None = None) -> torch.Tensor:
        attended = self.attn(self.norm1(x), last, grid)
        attended = attended if self.gamma_1 is None else self.gamma_1 * attended
        x = (x if last is None else x[:, x.shape[1] - last :]) + self.drop_path(attended)
        hidden = self.mlp(self.norm2(x))
        hidden = hidden if self.gamma_2 is None else self.gamma_2 * hidden
        return x + self.drop_path(hidden)


def run_blocks(
    blocks: list[nn.Module], x: torch.Tensor, *, checkpointed: bool, last: int | None = None, grid: Grid | None = None
) -> torch.Tensor:
    """Run tokens (B, N, D) through all blocks; returns (B, N, D), or the last tokens (B, M, D) with `last=M`.

    If `checkpointed`, only block inputs are stored for the backward pass, which recomputes the rest (Chen et al. 2016,
    "Training Deep Nets with Sublinear Memory Cost"). A relative position bias needs the patches' `grid`.
    """
    for block in blocks:
        queries = last if block is blocks[-1] else None
        x = checkpoint(block, x, queries, grid, use_reentrant=False) if checkpointed else block(x, queries, grid)
    return x


def training_flops(model: nn.Module, *inputs: torch.Tensor, img_size: Grid | None = None, **options) -> float:
    """Return the floating-point operations of the matrix products of a training step, per image.

    PyTorch counts them in a step on the "meta" device, with images of the encoder's size or of `img_size` (H and W).
    The backward pass of frozen layers counts only where gradients pass through them. Recomputation by gradient
    checkpointing does not count. `inputs` follow the images, and are on the "meta" device with a batch size of two.
    """
    tensors = [*model.parameters(), *model.buffers()]
    empty = {id(t): torch.empty_like(t, device="meta", requires_grad=t.requires_grad) for t in tensors}
    model = copy.deepcopy(model, empty).train()
    encoder = getattr(model, "encoder", model)
    encoder.gradient_checkpointing = False
    size = (2, encoder.in_channels, *(img_size or encoder.img_size))  # two, because BatchNorm needs them
    images = torch.empty(size, device="meta")
    with FlopCounterMode(display=False) as counter:
        outputs = model(images, *inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.sum() for output in outputs if output.requires_grad).backward()
    return counter.get_total_flops() / len(images)


class VisionTransformer(nn.Module):
    """Encode images (B, C, H, W) as tokens (B, T + L, D), class tokens first.

    Positions are the fixed sine-cosine table, a parameter without gradient by default. If `gradient_checkpointing` is
    set, activations are recomputed in the backward pass to save memory in training.

    Args:
        img_size: H and W, or the side of square images, in pixels.
        num_cls_tokens: T; more than one as in Pixio (Yang et al. 2025, arXiv 2512.15715).

    Raises:
        ValueError: if `patch_size` does not divide `img_size`, or `num_heads` or 4 does not divide `embed_dim`.
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
        num_cls_tokens: int = 1,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if any(side % patch_size for side in self.img_size):
            raise ValueError(
                f"an image of {self.img_size} pixels does not split into patches of {patch_size}; give multiples of it"
            )
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {embed_dim}")
        self.grid = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.patch_size, self.in_channels, self.embed_dim = patch_size, in_channels, embed_dim
        self.depth, self.num_heads, self.mlp_ratio = depth, num_heads, mlp_ratio
        self.num_cls_tokens = num_cls_tokens
        self.relative_position_bias, self.layer_scale = False, None  # see `add_extras`

        self.patch_embed = PatchEmbedding(patch_size, in_channels, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, num_cls_tokens, embed_dim).normal_(std=0.02))
        positions = sincos_positions(self.grid, embed_dim, prefix_tokens=num_cls_tokens)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList([Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def initialize(self, custom: bool = True) -> "VisionTransformer":
        """Initialize the weights as the paper does (appendix A.1) if `custom`, and return the encoder itself."""
        return self.apply(initialize_like_paper) if custom else self

    def add_extras(
        self, *, drop_path: float = 0.0, relative_position_bias: bool = False, layer_scale: float | None = None
    ) -> "VisionTransformer":
        """Add the options of fine-tuning recipes to every block, and return the encoder itself.

        Args:
            drop_path: stochastic depth rate of the last block; rates grow linearly from 0 at the first block.
            relative_position_bias: add a relative position bias to the attention.
            layer_scale: initial value of LayerScale; None for no LayerScale.
        """
        self.relative_position_bias, self.layer_scale = relative_position_bias, layer_scale
        for i, block in enumerate(self.blocks):
            rate = drop_path * i / max(1, self.depth - 1)
            block.drop_path = StochasticDepth(rate, mode="row") if rate else nn.Identity()
            if relative_position_bias:
                block.attn.add_relative_position_bias(self.grid)
            if layer_scale is not None:
                block.add_layer_scale(layer_scale)
        return self

    def embed(self, patches: torch.Tensor, indices: torch.Tensor | None = None, grid: Grid | None = None):
        """Embed patches (B, K, P*P*C), all of the grid or those at `indices` (B, K), as tokens (B, T + K, D).

        Positions are resized if the patches form another `grid` than the model's own.
        """
        table = resize_positions(self.pos_embed, self.grid, grid or self.grid, prefix_tokens=self.num_cls_tokens)
        cls_positions, positions = self.split(table)
        if indices is not None:
            positions = positions.squeeze(0)[indices]  # (B, K, D)
        x = self.patch_embed(patches) + positions
        cls_tokens = (self.cls_token + cls_positions).expand(x.shape[0], -1, -1)
        return torch.cat([cls_tokens.to(x.dtype), x], dim=1)

    def grid_of(self, images: torch.Tensor) -> Grid:
        """Return the grid of whole patches in images (B, C, H, W)."""
        return images.shape[2] // self.patch_size, images.shape[3] // self.patch_size

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split tokens (B, T + K, D) into class tokens (B, T, D) and patch tokens (B, K, D)."""
        return tokens[:, : self.num_cls_tokens], tokens[:, self.num_cls_tokens :]

    def encode(self, tokens: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Apply all blocks and the final norm: (B, N, D) -> (B, N, D); the patches form `grid`, or the encoder's."""
        checkpointed = self.gradient_checkpointing and self.training
        return self.norm(run_blocks(self.blocks, tokens, checkpointed=checkpointed, grid=grid or self.grid))

    def encode_layers(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return the tokens (B, N, D) before the first and after every block, the last ones after the final norm."""
        checkpointed, layers = self.gradient_checkpointing and self.training, [tokens]
        for block in self.blocks:
            tokens = run_blocks([block], tokens, checkpointed=checkpointed, grid=self.grid)
            layers.append(tokens)
        return [*layers[:-1], self.norm(tokens)]

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, C, H, W) as tokens (B, T + L, D) after the final norm, like timm's method of this name.

        Positions and relative position biases are resized to the patches' grid.
        """
        grid = self.grid_of(images)
        return self.encode(self.embed(patchify(images, self.patch_size), grid=grid), grid)

    forward = forward_features

    def forward_layers(self, images: torch.Tensor, indices: list[int]) -> list[torch.Tensor]:
        """Return one feature map (B, D, h, w) for each block in `indices` (from 0), without the final norm.

        Images (B, C, H, W) may have any size of at least one patch. A remainder beyond whole patches is cut off, and
        positions and biases are resized to the patches' grid, as in transformers' BEiT.
        """
        side, (height, width), (h, w) = self.patch_size, images.shape[2:], self.grid_of(images)
        if not h * w:
            raise ValueError(f"an image of {height} x {width} pixels is smaller than a patch of {side}; enlarge it")
        x = self.embed(patchify(images[:, :, : h * side, : w * side], side), grid=(h, w))
        checkpointed, maps, start = self.gradient_checkpointing and self.training, {}, 0
        for i in sorted(indices):
            x = run_blocks(self.blocks[start : i + 1], x, checkpointed=checkpointed, grid=(h, w))
            maps[i], start = self.split(x)[1].transpose(1, 2).reshape(x.shape[0], -1, h, w), i + 1
        return [maps[i] for i in indices]


class EncoderWithHead(nn.Module):
    """Base class of models with a head on an `encoder`, with the methods that training scripts need."""

    @property
    def num_layers(self) -> int:
        """The `layer_index` of the head."""
        return self.encoder.depth + 1

    def layer_index(self, name: str) -> int:
        """Return a parameter's layer: 0 for embeddings, k + 1 for block k, `num_layers` for the final norm and head.

        Layer-wise learning-rate decay uses it (Clark et al. 2020; Bao et al. 2021, "BEiT").
        """
        if name.startswith(("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")):
            return 0
        return int(name.split(".")[2]) + 1 if name.startswith("encoder.blocks.") else self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters, besides biases and norms, without weight decay."""
        scales = {name for name, _ in self.named_parameters() if name.endswith((".gamma_1", ".gamma_2"))}
        return {"encoder.pos_embed", "encoder.cls_token"} | scales

    def training_flops(self) -> float:
        """Return the floating-point operations of the matrix products of a training step, per image."""
        return training_flops(self)
