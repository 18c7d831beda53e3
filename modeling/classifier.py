"""A classifier: an encoder, its pooled tokens, a linear head (He et al. 2021, section 4 and appendix A.1).

Legend: B batch, C channels, H W pixels, L patches, D width.
"""

import torch
from torch import nn

from modeling.vit import VisionTransformer, block_activation_bytes, block_multiply_adds, embedding_multiply_adds

POOLINGS = ("mean", "cls")
EMBEDDINGS = ("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")


class Classifier(nn.Module):
    """An encoder and a head: images (B, C, H, W) -> logits (B, num_classes).

    "mean" pooling takes the mean of the patch tokens, and has its norm (`fc_norm`) after it instead of the encoder's
    before it; "cls" takes the cls token behind the encoder's norm. A `linear_probe` trains the head alone, behind a
    BatchNorm without parameters (appendix A.1, "Linear probing"). Otherwise everything trains, positions too, until
    `train_last_blocks` says less. `custom_weight_init` draws the head's weight from N(0, 2e-5), of a linear probe
    N(0, 0.01), as the official code; without it, the head keeps PyTorch's own.

    The encoder becomes a part of the classifier: mean pooling takes its norm off, so weights are to be loaded into it
    afterwards, when this is known. Raises ValueError for another pooling and for fewer than two classes.
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
        if pooling not in POOLINGS:
            raise ValueError(f"a pooling of {pooling!r}; expected {' or '.join(POOLINGS)}")
        if num_classes < 2:
            raise ValueError(f"{num_classes} classes; expected at least 2")
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
        """(B, C, H, W) -> logits (B, num_classes)."""
        return self.head(self.head_norm(self.features(images)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> what the head classifies (B, D), of a linear probe before its BatchNorm: the pooled tokens,
        behind the norm."""
        tokens = self.encoder(images)
        pooled = tokens[:, 1:].mean(dim=1) if self.pooling == "mean" else tokens[:, 0]
        return self.fc_norm(pooled)

    def train_last_blocks(self, n: float) -> None:
        """Freezes all but the head, the last `n` blocks and the norm (section 4.3, "Partial fine-tuning").

        0.5 is the MLP of the last block alone, without its norm. Raises ValueError for other fractions, and for more
        blocks than there are.
        """
        depth = self.encoder.depth
        if n != 0.5 and (n % 1 or not 0 <= n <= depth):
            raise ValueError(f"the last {n:g} of {depth} blocks; expected 0, 0.5 or a whole number up to {depth}")
        blocks = self.encoder.blocks
        last = [blocks[-1].mlp] if n == 0.5 else blocks[depth - int(n) :]
        self.requires_grad_(False)
        for module in (self.head, self.fc_norm, self.encoder.norm, *last):
            module.requires_grad_(True)

    @property
    def num_layers(self) -> int:
        """The `layer_index` of the head."""
        return self.encoder.depth + 1

    def layer_index(self, name: str) -> int:
        """The layer of a parameter, for layer-wise decay of the learning rate (Clark et al. 2020; Bao et al. 2021,
        "BEiT"): the embeddings are 0, block k (from 0) is k + 1, the head and the norm before it come last."""
        if name.startswith(EMBEDDINGS):
            return 0
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Names, beyond biases and norms, that weight decay leaves alone."""
        return {"encoder.pos_embed", "encoder.cls_token"}

    def training_flops(self) -> float:
        """Floating-point operations of a training step per image, of the matrix products: 2 for a multiply-add, and
        the backward pass costs twice the forward pass, from the first layer on that trains."""
        encoder = self.encoder
        patches = encoder.grid[0] * encoder.grid[1]
        parts = [(encoder.patch_embed, embedding_multiply_adds(encoder, patches))]
        for block in encoder.blocks:
            parts += zip((block.attn, block.mlp), block_multiply_adds(block, 1 + patches), strict=True)
        parts.append((self.head, self.head.weight.numel()))
        flops, trains = 0.0, False
        for module, multiply_adds in parts:
            trains = trains or _trains(module)
            flops += (6 if trains else 2) * multiply_adds
        return flops

    def activation_bytes(self, *, half_precision: bool) -> float:
        """Memory per image, about, of what the forward pass keeps for the backward pass: nothing before the first
        layer that trains; with gradient checkpointing each block's input, and one block at a time the rest."""
        tokens = 1 + self.encoder.grid[0] * self.encoder.grid[1]
        whole, inputs = [], 4 * tokens * self.encoder.embed_dim
        for block in self.encoder.blocks:
            attention, mlp = block_activation_bytes(block, tokens, half_precision=half_precision)
            if _trains(block.attn):
                whole.append(attention + mlp)
            elif _trains(block.mlp):  # whose norm does not, and keeps no input
                whole.append(mlp - inputs)
        if not self.encoder.gradient_checkpointing:
            return sum(whole)
        return len(whole) * inputs + max(whole, default=0)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
