"""Segment images with an encoder and UperNet (Xiao et al. 2018, arXiv 1807.10221) or a linear head.

The heads have the parameter names of transformers' `UperNetForSemanticSegmentation`.

Legend: B batch, C channels, H W pixels, h w patches, D width of the encoder, N classes.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from modeling.batch_norm import BatchNorm
from modeling.vit import EncoderWithHead, VisionTransformer

POOL_SCALES = (1, 2, 3, 6)  # bins a side of UperNet's pyramid pooling
IGNORED = 255  # label of pixels without a class


def default_layers(depth: int, count: int) -> list[int]:
    """Return the `count` blocks, from 0, that feed a head; ValueError for an encoder of fewer blocks.

    They are the last; but four stand at a third, half, two thirds and the end of an encoder of six blocks or more, as
    in the published recipes (3, 5, 7, 11 of 12).
    """
    if depth < count:
        raise ValueError(f"a head on {count} blocks of an encoder of {depth}; expected at least {count}")
    if count != 4 or depth < 6:
        return list(range(depth - count, depth))
    return [round(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps (B, C, h, w) bilinearly to (B, C, *size); on a GPU in float32 and NCHW, as the loss needs logits."""
    if maps.is_cuda:
        maps = maps.float().contiguous()  # here, because they are small yet
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def resize_features(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize a head's maps (B, C, h, w) bilinearly to (B, C, *size); on a GPU by matrix products.

    A GPU's interpolation sums gradients in the type of the maps and in no fixed order. In bfloat16, enlarging 16 times
    would lose a fifth of a gradient, so autocast returns float32, twice the memory and time.
    """
    if maps.shape[2:] == size:
        return maps
    return resize_by_products(maps, size) if maps.is_cuda else resize(maps, size)


def resize_by_products(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize maps (B, C, h, w) bilinearly to (B, C, *size), in NHWC: first the rows, then the columns."""
    (h, w), (height, width) = maps.shape[2:], size
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, mode="linear")[0].T.to(maps.dtype)
        for old, new in ((h, height), (w, width))
    )  # (height, h) and (width, w): the weights of the old rows and columns
    x = maps.permute(0, 2, 3, 1).flatten(2)  # (B, h, w * C)
    x = (rows @ x).unflatten(2, (w, -1))  # (B, height, w, C)
    return (columns @ x).permute(0, 3, 1, 2)


def segmentation_loss(
    logits: torch.Tensor, masks: torch.Tensor, *, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cross-entropy, in float32, of logits (B, N, H, W) and masks (B, H, W) in which 255 is ignored.

    The sum over valid pixels is divided by the number of all pixels: the mean over equal micro-batches is then that of
    the whole batch, and a mask without a valid pixel gives 0. `class_weights` (N,) multiply the losses of their class
    and do not change the divisor.
    """
    logits, masks = logits.float(), masks.long()
    if torch.are_deterministic_algorithms_enabled():  # the GPU's kernel for maps is not
        logits, masks = logits.movedim(1, -1).flatten(0, 2), masks.flatten()
    total = F.cross_entropy(logits, masks, weight=class_weights, ignore_index=IGNORED, reduction="sum")
    return total / masks.numel()


class FeaturePyramid(nn.Module):
    """Rescale four maps (B, D, h, w) by 4, 2, 1 and 1/2 (Bao et al. 2021, "BEiT", appendix)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fpn1 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
            BatchNorm(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
        )
        self.fpn2 = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.fpn4 = nn.MaxPool2d(kernel_size=2)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], self.fpn4(maps[3])]


class ConvModule(nn.Sequential):
    """Apply a convolution of the same size, BatchNorm and ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = BatchNorm(out_channels)
        self.activation = nn.ReLU()


class AveragePool(nn.AdaptiveAvgPool2d):
    """Average maps (B, D, h, w) over bins (B, D, *output_size); with deterministic algorithms one by one."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(maps)
        n = self.output_size
        rows, columns = ([slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side in maps.shape[2:])
        bins = [torch.stack([maps[..., row, column].mean((2, 3)) for column in columns], dim=-1) for row in rows]
        return torch.stack(bins, dim=-2)


class UperNetHead(nn.Module):
    """Predict logits (B, N, h, w) from the four maps of a feature pyramid, at the size of the first, the largest.

    The smallest map is pooled to 1, 2, 3 and 6 bins a side (Zhao et al. 2016, "Pyramid Scene Parsing Network"), each
    map is added to the next larger one, and all are concatenated (section 3 of the paper).
    """

    title = "UperNet"
    num_layers = 4  # blocks of the encoder whose outputs the neck sees
    neck = FeaturePyramid
    default_width, default_auxiliary_weight = 512, 0.4  # channels, and loss weight of the auxiliary head
    min_patches = 2  # a side, which the pyramid halves
    min_batch = 2  # images, for BatchNorms that see one value of each
    own_parameter = "fpn.fpn2.weight"  # of files with this head

    def __init__(self, dim: int, num_classes: int, width: int):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            [nn.Sequential(AveragePool(bins), ConvModule(dim, width, 1)) for bins in POOL_SCALES]
        )
        self.bottleneck = ConvModule(dim + len(POOL_SCALES) * width, width, 3)
        self.lateral_convs = nn.ModuleList([ConvModule(dim, width, 1) for _ in range(3)])
        self.fpn_convs = nn.ModuleList([ConvModule(width, width, 3) for _ in range(3)])
        self.fpn_bottleneck = ConvModule(4 * width, width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        smallest = maps[-1]
        pooled = [resize_features(module(smallest), smallest.shape[2:]) for module in self.psp_modules]
        x = self.bottleneck(torch.cat([smallest, *pooled], dim=1))
        levels = [x]  # from small to large
        for larger, lateral, conv in reversed([*zip(maps[:3], self.lateral_convs, self.fpn_convs, strict=True)]):
            x = lateral(larger) + resize_features(x, larger.shape[2:])
            levels.append(conv(x))
        joined = torch.cat([resize_features(level, maps[0].shape[2:]) for level in reversed(levels)], dim=1)
        return self.classifier(self.dropout(self.fpn_bottleneck(joined)))

    def to_upernet(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the UperNet head that computes the same, which other libraries load: its own."""
        return self.state_dict()


class AuxiliaryHead(nn.Module):
    """Predict logits (B, N, h, w) from the pyramid's third map, for an auxiliary loss (FCN, Long et al. 2014)."""

    def __init__(self, dim: int, num_classes: int, width: int = 256):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim, width, 3))
        self.dropout = nn.Dropout2d(0.1)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.dropout(self.convs(maps[2])))


class LinearHead(nn.Module):
    """Predict logits (B, N, h, w) from the last map: BatchNorm and one linear layer (Oquab et al. 2023, "DINOv2").

    Class attributes as in UperNetHead; it has no width to choose and no auxiliary head.
    """

    title = "linear head"
    num_layers, neck = 1, nn.Identity
    default_width = default_auxiliary_weight = None
    min_patches = min_batch = 1
    own_parameter = "decode_head.batch_norm.running_var"

    def __init__(self, dim: int, num_classes: int, width: None):
        super().__init__()
        self.batch_norm = BatchNorm(dim)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.batch_norm(maps[-1]))

    def to_upernet(self) -> dict[str, torch.Tensor]:
        """Return the parameters of an UperNet head of one level that computes the same.

        BatchNorm is folded into the classifier, z = W x + b. The bottleneck, twice as wide as there are classes,
        returns relu(z) and relu(-z), the next convolution keeps them, and their difference is z. All 3x3 weights are
        zero except those in the middle.
        """
        norm, classifier = copy.deepcopy(self.batch_norm).cpu().double(), copy.deepcopy(self.classifier).cpu().double()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = classifier.weight.flatten(1)  # (N, D)
        bias = classifier.bias + weight @ (norm.bias - norm.running_mean * scale)
        weight, eye = weight * scale, torch.eye(len(bias))
        state = {"classifier.weight": torch.cat([eye, -eye], dim=1)[:, :, None, None], "classifier.bias": 0 * bias}
        for name, middle, shift in (
            ("bottleneck", torch.cat([weight, -weight]), torch.cat([bias, -bias])),
            ("fpn_bottleneck", torch.eye(2 * len(bias)), torch.zeros(2 * len(bias))),
        ):
            state |= {
                f"{name}.conv.weight": F.pad(middle[:, :, None, None], (1, 1, 1, 1)),
                f"{name}.batch_norm.weight": torch.ones_like(shift),
                f"{name}.batch_norm.bias": shift,
                f"{name}.batch_norm.running_mean": torch.zeros_like(shift),
                f"{name}.batch_norm.running_var": torch.ones_like(shift) - 1e-5,  # BatchNorm adds it again
                f"{name}.batch_norm.num_batches_tracked": torch.tensor(0),
            }
        return state


HEADS = {"upernet": UperNetHead, "linear": LinearHead}


def initialize_head(module: nn.Module) -> None:
    """Initialize a head as mmsegmentation does; for `model.apply`.

    Convolutions before a ReLU are drawn from He's normal distribution (fan out), classifiers from N(0, 0.01).
    """
    if isinstance(module, ConvModule):
        nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, (*HEADS.values(), AuxiliaryHead)):
        nn.init.normal_(module.classifier.weight, std=0.01)
        nn.init.zeros_(module.classifier.bias)


class Segmenter(EncoderWithHead):
    """Segment images with an encoder and a head: (B, C, H, W) -> logits (B, N, H, W), at least two patches a side.

    All parameters train, except blocks above the highest of `layers`, which never run.

    Args:
        encoder: becomes a part of the segmenter and loses its final norm, so load weights into it afterwards.
        head: one of HEADS: "upernet", on the outputs of four blocks, or "linear", on those of one.
        layers: these blocks, from 0, in rising order; by default `default_layers`.
        head_width: channels of the head's layers; None for its default.
        auxiliary: add an auxiliary head, for training, if the head takes one.
        custom_weight_init: initialize the heads as mmsegmentation does instead of as PyTorch does.

    Raises:
        ValueError: for layers that do not fit head and encoder.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        head: str = "upernet",
        layers: list[int] | None = None,
        head_width: int | None = None,
        auxiliary: bool = True,
        custom_weight_init: bool = True,
    ):
        super().__init__()
        kind = HEADS[head]
        count, width = kind.num_layers, head_width or kind.default_width
        layers = default_layers(encoder.depth, count) if layers is None else layers
        if len(layers) != count or list(layers) != sorted({*layers} & {*range(encoder.depth)}):
            raise ValueError(
                f"layers {' '.join(map(str, layers))} for the head {head}; expected {count} from 0 to "
                f"{encoder.depth - 1}, each above the one before"
            )
        self.num_classes, self.head, self.layers, self.head_width = num_classes, head, list(layers), width
        self.auxiliary = auxiliary and kind.default_auxiliary_weight is not None

        dim = encoder.embed_dim
        self.encoder = encoder
        encoder.norm = nn.Identity()
        self.fpn = kind.neck(dim)
        self.decode_head = kind(dim, num_classes, width)
        self.auxiliary_head = AuxiliaryHead(dim, num_classes) if self.auxiliary else None
        if custom_weight_init:
            self.apply(initialize_head)

        self.requires_grad_(True)
        encoder.blocks[layers[-1] + 1 :].requires_grad_(False)

    def synchronize_batch_norms(self) -> None:
        """Let every BatchNorm train on the statistics of the micro-batches of all processes."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.synchronized = True

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, N, H, W) of images (B, C, H, W); in training, with an auxiliary head, both logits."""
        maps = self.fpn(self.encoder.forward_layers(images, self.layers))
        logits = resize(self.decode_head(maps), images.shape[2:])
        if self.training and self.auxiliary:
            return logits, resize(self.auxiliary_head(maps), images.shape[2:])
        return logits
