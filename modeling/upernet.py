"""Semantic segmentation: an encoder below UperNet (Xiao et al. 2018, arXiv 1807.10221) or below a linear head.

Parameters of the heads have the names of transformers' `UperNetForSemanticSegmentation`.

Legend: B batch, C channels, H W pixels, h w patches, D width of the encoder, N classes.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from modeling.vit import VisionTransformer, block_activation_bytes

HEADS = ("upernet", "linear")
EMBEDDINGS = ("encoder.patch_embed.", "encoder.cls_token", "encoder.pos_embed")
IGNORED = 255  # the label of pixels that no loss sees


def default_layers(depth: int) -> list[int]:
    """The 0-based blocks whose outputs make the feature pyramid: those at a third, half, two thirds and the end, as
    the published recipes have them (3, 5, 7, 11 of 12). Raises ValueError for fewer than four blocks."""
    if depth < 4:
        raise ValueError(f"a feature pyramid of {depth} blocks; expected at least 4, or a linear head")
    if depth < 6:  # where rounding would name one twice
        return list(range(depth - 4, depth))
    return [round(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) -> (B, C, *size), bilinear."""
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def segmentation_loss(
    logits: torch.Tensor, masks: torch.Tensor, *, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy in float32 of logits (B, N, H, W) and masks (B, H, W), whose pixels of 255 are ignored.

    The sum over the valid pixels is divided by the number of all pixels, ignored ones included: so the mean over equal
    micro-batches is that of the whole batch, and a mask without a valid pixel gives 0. `class_weights` (N,) multiply
    the pixels of their class, and the sum is divided as before.
    """
    total = F.cross_entropy(logits.float(), masks.long(), weight=class_weights, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


class FeaturePyramid(nn.Module):
    """Four maps (B, D, h, w) -> the same at 4, 2, 1 and 1/2 times their size (Bao et al. 2021, "BEiT", appendix)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.fpn4 = nn.MaxPool2d(kernel_size=2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], self.fpn4(maps[3])]


class ConvModule(nn.Sequential):
    """A convolution that keeps the size, BatchNorm, ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()


class UperNetHead(nn.Module):
    """The four maps of a feature pyramid, the largest first -> logits (B, N, h, w) at the size of the largest.

    The smallest is pooled to 1, 2, 3 and 6 bins a side (Zhao et al. 2016, "Pyramid Scene Parsing Network"); then each
    map is added to the next larger one, and all are joined (section 3 of the paper).
    """

    def __init__(self, dim: int, num_classes: int, width: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvModule(dim, width, 1)) for bins in (1, 2, 3, 6)]
        )
        self.bottleneck = ConvModule(dim + 4 * width, width, 3)
        self.lateral_convs = nn.ModuleList([ConvModule(dim, width, 1) for _ in range(3)])
        self.fpn_convs = nn.ModuleList([ConvModule(width, width, 3) for _ in range(3)])
        self.fpn_bottleneck = ConvModule(4 * width, width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        smallest = maps[-1]
        pooled = [resize(module(smallest), smallest.shape[2:]) for module in self.psp_modules]
        x = self.bottleneck(torch.cat([smallest, *pooled], dim=1))
        levels = [x]  # the smallest first
        for larger, lateral, conv in reversed([*zip(maps[:3], self.lateral_convs, self.fpn_convs, strict=True)]):
            x = lateral(larger) + resize(x, larger.shape[2:])
            levels.append(conv(x))
        joined = torch.cat([resize(level, maps[0].shape[2:]) for level in reversed(levels)], dim=1)
        return self.classifier(self.dropout(self.fpn_bottleneck(joined)))


class AuxiliaryHead(nn.Module):
    """The pyramid's third map -> logits (B, N, h, w): a small fully convolutional network (Long et al. 2014), whose
    loss guides the encoder in training."""

    def __init__(self, dim: int, num_classes: int, width: int = 256):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim, width, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.dropout(self.convs(maps[2])))


class LinearHead(nn.Module):
    """The last map -> logits (B, N, h, w): BatchNorm and a classifier of each patch (Oquab et al. 2023, "DINOv2",
    section 7.4)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.batch_norm(maps[-1]))


def initialize_head(module: nn.Module) -> None:
    """As mmsegmentation: convolutions before a ReLU from He's normal distribution over their outputs (fan out),
    classifiers from N(0, 0.01), biases 0; all else keeps PyTorch's own. For `model.apply`."""
    if isinstance(module, ConvModule):
        nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, UperNetHead | AuxiliaryHead | LinearHead):
        nn.init.normal_(module.classifier.weight, std=0.01)
        nn.init.zeros_(module.classifier.bias)


class Segmenter(nn.Module):
    """An encoder and a head: images (B, C, H, W) -> logits (B, N, H, W); of any size that holds two patches a side.

    "upernet" takes the outputs of four blocks (`layers`, 0-based, by default `default_layers`), and with `auxiliary`
    has a second head for training; "linear" takes those of one, the last. Everything trains but the blocks above the
    highest of `layers`, which never run. `custom_weight_init` is mmsegmentation's initialisation of the heads.

    The encoder becomes a part of the segmenter and loses its final norm, so weights are to be loaded into it
    afterwards, when this is known. Raises ValueError for an unknown head, fewer than two classes, and layers of the
    wrong number, that do not increase or that are beyond the depth.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        head: str = "upernet",
        layers: list[int] | None = None,
        head_width: int = 512,
        auxiliary: bool = True,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"a head of {head!r}; expected {' or '.join(HEADS)}")
        if num_classes < 2:
            raise ValueError(f"{num_classes} classes; expected at least 2")
        if layers is None:
            layers = default_layers(encoder.depth) if head == "upernet" else [encoder.depth - 1]
        count = 4 if head == "upernet" else 1
        if len(layers) != count or list(layers) != sorted({*layers} & {*range(encoder.depth)}):
            raise ValueError(
                f"layers {' '.join(map(str, layers))} for the head {head}; expected {count} from 0 to "
                f"{encoder.depth - 1}, each above the one before"
            )
        self.num_classes, self.head, self.layers, self.head_width = num_classes, head, list(layers), head_width
        self.auxiliary = auxiliary and head == "upernet"

        dim = encoder.embed_dim
        self.encoder = encoder
        encoder.norm = nn.Identity()
        if head == "upernet":
            self.fpn = FeaturePyramid(dim)
            self.decode_head = UperNetHead(dim, num_classes, head_width)
        else:
            self.fpn = nn.Identity()
            self.decode_head = LinearHead(dim, num_classes)
        self.auxiliary_head = AuxiliaryHead(dim, num_classes) if self.auxiliary else None
        if custom_weight_init:
            for module in (self.decode_head, self.auxiliary_head):
                if module is not None:
                    module.apply(initialize_head)

        self.requires_grad_(True)
        encoder.blocks[layers[-1] + 1 :].requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) -> logits (B, N, H, W); in training, where there is an auxiliary head, (logits, its logits)."""
        maps = self.fpn(self.encoder.forward_layers(images, self.layers))
        logits = resize(self.decode_head(maps), images.shape[2:])
        if self.training and self.auxiliary:
            return logits, resize(self.auxiliary_head(maps), images.shape[2:])
        return logits

    @property
    def num_layers(self) -> int:
        """The `layer_index` of the heads."""
        return self.encoder.depth + 1

    def layer_index(self, name: str) -> int:
        """The layer of a parameter, for layer-wise decay of the learning rate (Clark et al. 2020; Bao et al. 2021,
        "BEiT"): the embeddings are 0, block k (from 0) is k + 1, pyramid and heads come last."""
        if name.startswith(EMBEDDINGS):
            return 0
        if name.startswith("encoder.blocks."):
            return int(name.split(".")[2]) + 1
        return self.num_layers

    def no_weight_decay(self) -> set[str]:
        """Names, beyond biases and norms, that weight decay leaves alone."""
        scales = {name for name, _ in self.named_parameters() if name.endswith((".gamma_1", ".gamma_2"))}
        return {"encoder.pos_embed", "encoder.cls_token"} | scales

    def training_cost(self, *, half_precision: bool) -> tuple[float, float]:
        """Of a training step at the model's own image size, per image: floating-point operations of the matrix products
        (2 for a multiply-add, and the backward pass costs twice the forward pass), and about the bytes that the forward
        pass keeps for the backward pass.

        Both are counted in forward passes of tensors without values, of 2 and of 4 images: their difference leaves out
        what does not grow with the batch. To be called before `SyncBatchNorm` replaces BatchNorm.
        """
        counts = [self._forward_cost(images, half_precision=half_precision) for images in (2, 4)]
        flops, kept = ((more - fewer) / 2 for fewer, more in zip(*counts, strict=True))
        if self.encoder.gradient_checkpointing:  # what was counted has the blocks' inputs; one at a time has the rest
            block, tokens = self.encoder.blocks[0], self.encoder.pos_embed.shape[1]
            kept += sum(block_activation_bytes(block, tokens, half_precision=half_precision))
        return 3 * flops, kept

    def _forward_cost(self, batch_size: int, *, half_precision: bool) -> tuple[int, int]:
        """Floating-point operations of a forward pass with its loss, and the bytes that autograd keeps of it."""
        device, kept = self.encoder.pos_embed.device, {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter:
            tensors = [*self.parameters(), *self.buffers()]
            model = copy.deepcopy(self, {id(tensor): fake.from_tensor(tensor) for tensor in tensors}).train()
            images = torch.empty(batch_size, self.encoder.in_channels, *self.encoder.img_size, device=device)
            masks = torch.empty(batch_size, *self.encoder.img_size, device=device, dtype=torch.uint8)
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
                torch.autocast(device.type, torch.bfloat16, enabled=half_precision),
            ):
                outputs = model(images)
                for logits in outputs if isinstance(outputs, tuple) else (outputs,):
                    segmentation_loss(logits, masks)
        return counter.get_total_flops(), sum(size for size, _ in kept.values())
