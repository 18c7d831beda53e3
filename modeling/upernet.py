"""Segment images with an encoder and UperNet (Xiao et al. 2018, arXiv 1807.10221), DPT or a linear head.

UperNet and the linear head have the parameter names of transformers' `UperNetForSemanticSegmentation`, and DPT has
nearly those of `DPTForSemanticSegmentation`.

Legend: B batch, C channels, H W pixels, h w patches, D width of the encoder, N classes.
"""

import copy
import re

import torch
import torch.nn.functional as F
from torch import nn

from modeling.batch_norm import BatchNorm
from modeling.vit import EncoderWithHead, VisionTransformer

POOL_SCALES = (1, 2, 3, 6)  # bins per side in UperNet's pyramid pooling
IGNORED = 255  # label of pixels without a class


def default_layers(depth: int, count: int) -> list[int]:
    """Return the indices of the `count` blocks that feed a head; raise ValueError if `depth` is smaller.

    They are the last blocks. But with six or more blocks, four are taken at a third, half, two thirds and the end, as
    in the published recipes (3, 5, 7, 11 of 12).
    """
    if depth < count:
        raise ValueError(f"a head on {count} blocks of an encoder of {depth}; expected at least {count}")
    if count != 4 or depth < 6:
        return list(range(depth - count, depth))
    return [round(depth * share) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]


def resize(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool = False) -> torch.Tensor:
    """Resize maps (B, C, h, w) bilinearly to (B, C, *size); on a GPU to float32 and NCHW, which the loss needs."""
    if maps.is_cuda:
        maps = maps.float().contiguous()  # here, because the maps are still small
    if maps.shape[2:] == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def resize_features(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool = False) -> torch.Tensor:
    """Resize a head's maps (B, C, h, w) bilinearly to (B, C, *size); on a GPU by matrix products.

    Interpolation on a GPU sums gradients in the type of the maps and in no fixed order. In bfloat16, enlarging 16 times
    would lose a fifth of a gradient. Autocast therefore uses float32, which takes twice the memory and time.
    """
    if maps.shape[2:] == size:
        return maps
    return (resize_by_products if maps.is_cuda else resize)(maps, size, align_corners=align_corners)


def resize_by_products(maps: torch.Tensor, size: tuple[int, int], *, align_corners: bool = False) -> torch.Tensor:
    """Resize maps (B, C, h, w) bilinearly to (B, C, *size), in NHWC: first the rows, then the columns."""
    (h, w), (height, width) = maps.shape[2:], size
    options = dict(mode="linear", align_corners=align_corners)
    rows, columns = (
        F.interpolate(torch.eye(old, device=maps.device)[None], size=new, **options)[0].T.to(maps.dtype)
        for old, new in ((h, height), (w, width))
    )  # (height, h) and (width, w): the weights of the old rows and columns
    x = maps.permute(0, 2, 3, 1).flatten(2)  # (B, h, w * C)
    x = (rows @ x).unflatten(2, (w, -1))  # (B, height, w, C)
    return (columns @ x).permute(0, 3, 1, 2)


def segmentation_loss(
    logits: torch.Tensor, masks: torch.Tensor, *, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the cross-entropy, in float32, of logits (B, N, H, W) and masks (B, H, W) in which 255 is ignored.

    The sum over valid pixels is divided by the number of all pixels. The mean over micro-batches of equal size is then
    that of the global batch, and a mask without a valid pixel gives 0. `class_weights` (N,) multiply the losses of
    their classes and do not change the divisor.
    """
    logits, masks = logits.float(), masks.long()
    if torch.are_deterministic_algorithms_enabled():  # the GPU's kernel for maps is nondeterministic
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
    """Apply a convolution that keeps the size, BatchNorm and ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = BatchNorm(out_channels)
        self.activation = nn.ReLU()


class AveragePool(nn.AdaptiveAvgPool2d):
    """Average maps (B, D, h, w) over n x n bins: (B, D, n, n); with deterministic algorithms one bin at a time."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            return super().forward(maps)
        n = self.output_size
        rows, columns = ([slice(i * side // n, -(-(i + 1) * side // n)) for i in range(n)] for side in maps.shape[2:])
        bins = [torch.stack([maps[..., row, column].mean((2, 3)) for column in columns], dim=-1) for row in rows]
        return torch.stack(bins, dim=-2)


class UperNetHead(nn.Module):
    """Predict logits (B, N, h, w), at the size of the first and largest of the four maps of a feature pyramid.

    The smallest map is pooled to 1, 2, 3 and 6 bins per side (Zhao et al. 2016, "Pyramid Scene Parsing Network"). Each
    map is added to the next larger one, and all maps are concatenated (section 3 of the paper).
    """

    title = "UperNet"
    num_layers = 4  # number of the encoder's blocks whose outputs the neck sees
    neck = FeaturePyramid
    default_width, default_auxiliary_weight = 512, 0.4  # channels, and loss weight of the auxiliary head
    plain_encoder = False  # True: it must have no relative position bias and no LayerScale
    min_patches = 2  # per side, because the pyramid halves it
    min_batch = 2  # images, because some BatchNorms see one value per image
    own_parameter = "fpn.fpn2.weight"  # a parameter that only this head has
    model_type = "upernet"  # in transformers

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

    def to_transformers(self) -> dict[str, torch.Tensor]:
        """Return the parameters of the equivalent head of transformers, under its names."""
        return self.state_dict(prefix="decode_head.")


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

    Class attributes are as in UperNetHead. There is no width to choose and no auxiliary head.
    """

    title = "linear head"
    num_layers, neck = 1, nn.Identity
    default_width = default_auxiliary_weight = None
    plain_encoder = False
    min_patches = min_batch = 1
    own_parameter = "decode_head.batch_norm.running_var"
    model_type = "upernet"

    def __init__(self, dim: int, num_classes: int, width: None):
        super().__init__()
        self.batch_norm = BatchNorm(dim)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        return self.classifier(self.batch_norm(maps[-1]))

    def to_transformers(self) -> dict[str, torch.Tensor]:
        """Return the parameters of an equivalent UperNet head with one level.

        BatchNorm is folded into the classifier, z = W x + b. The bottleneck, with twice as many channels as classes,
        returns relu(z) and relu(-z). The next convolution keeps them, and the classifier subtracts them, which gives z.
        All 3x3 weights are zero except those in the middle.
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
                f"{name}.batch_norm.running_var": torch.ones_like(shift) - 1e-5,  # BatchNorm adds 1e-5 again
                f"{name}.batch_norm.num_batches_tracked": torch.tensor(0),
            }
        return {f"decode_head.{name}": value for name, value in state.items()}


class ResidualUnit(nn.Module):
    """Add two 3x3 convolutions, each after a ReLU and before a BatchNorm: (B, D, h, w) -> (B, D, h, w)."""

    def __init__(self, dim: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False)
        self.batch_norm1 = BatchNorm(dim)
        self.convolution2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=False)
        self.batch_norm2 = BatchNorm(dim)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        x = self.batch_norm1(self.convolution1(F.relu(maps)))
        return maps + self.batch_norm2(self.convolution2(F.relu(x)))


class Fusion(nn.Module):
    """Add a `level` to maps (B, D, h, w), except in the first fusion, and double their size.

    (Lin et al. 2016, "RefineNet", section 3.2.)
    """

    def __init__(self, dim: int, *, first: bool):
        super().__init__()
        self.residual_layer1 = None if first else ResidualUnit(dim)
        self.residual_layer2 = ResidualUnit(dim)
        self.projection = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, maps: torch.Tensor, level: torch.Tensor | None = None) -> torch.Tensor:
        if level is not None:
            maps = maps + self.residual_layer1(resize_features(level, maps.shape[2:]))
        x, (h, w) = self.residual_layer2(maps), maps.shape[2:]
        return self.projection(resize_features(x, (2 * h, 2 * w), align_corners=True))


class DPTHead(nn.Module):
    """Predict logits (B, N, 16h, 16w) from four maps (Ranftl et al. 2021, "Vision Transformers for Dense Prediction").

    Maps are projected, resized by 4, 2, 1 and 1/2 ("reassemble"; strides of 4 to 32 pixels for patches of 16), and
    fused from the smallest to the largest (section 3 of the paper). The residual units have BatchNorms, as in the paper
    for segmentation. An odd h or w counts as one more. Class attributes are as in UperNetHead, without auxiliary head.
    """

    title = "DPT"
    num_layers, neck = 4, nn.Identity
    default_width, default_auxiliary_weight = 256, None
    plain_encoder = True  # as in transformers
    min_patches, min_batch = 3, 1  # BatchNorms then see at least 2 x 2 values per image
    own_parameter = "decode_head.fusion.0.projection.weight"
    model_type = "dpt"

    def __init__(self, dim: int, num_classes: int, width: int):
        super().__init__()
        scales = (
            nn.ConvTranspose2d(width, width, kernel_size=4, stride=4),
            nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
            nn.Identity(),
            nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1),
        )
        self.projections = nn.ModuleList([nn.Conv2d(dim, width, kernel_size=1) for _ in scales])
        self.scales = nn.ModuleList(scales)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False) for _ in scales])
        self.fusion = nn.ModuleList([Fusion(width, first=i == 0) for i in range(len(scales))])
        self.bottleneck = ConvModule(width, width, 3)
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, num_classes, kernel_size=1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        stages = zip(self.projections, self.scales, self.convs, maps, strict=True)
        *larger, x = [conv(scale(projection(level))) for projection, scale, conv, level in stages]
        x = self.fusion[0](x)
        for fusion, level in zip(self.fusion[1:], reversed(larger), strict=True):
            x = fusion(x, level)
        logits = self.classifier(self.dropout(self.bottleneck(x)))
        return resize(logits, (2 * x.shape[2], 2 * x.shape[3]), align_corners=True)

    def to_transformers(self) -> dict[str, torch.Tensor]:
        """Return the parameters for transformers' DPT, whose first fusion has an unused unit."""
        names = [
            (r"^projections\.(\d)", r"neck.reassemble_stage.layers.\1.projection"),
            (r"^scales\.(\d)", r"neck.reassemble_stage.layers.\1.resize"),
            (r"^convs", "neck.convs"),
            (r"^fusion", "neck.fusion_stage.layers"),
            (r"^bottleneck\.conv", "head.head.0"),
            (r"^bottleneck\.batch_norm", "head.head.1"),
            (r"^classifier", "head.head.4"),
        ]
        state = self.state_dict()
        unit = {name: value for name, value in state.items() if name.startswith("fusion.1.residual_layer1.")}
        state |= {name.replace("fusion.1", "fusion.0"): value for name, value in unit.items()}
        for ours, theirs in names:
            state = {re.sub(ours, theirs, name): value for name, value in state.items()}
        return state


HEADS = {"upernet": UperNetHead, "linear": LinearHead, "dpt": DPTHead}


def initialize_head(module: nn.Module) -> None:
    """Initialize a head as mmsegmentation does; for `model.apply`.

    Convolutions before a ReLU get He's normal distribution (fan out), and classifiers a standard deviation of 0.01.
    """
    if isinstance(module, ConvModule):
        nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, (*HEADS.values(), AuxiliaryHead)):
        nn.init.normal_(module.classifier.weight, std=0.01)
        nn.init.zeros_(module.classifier.bias)


class Segmenter(EncoderWithHead):
    """Segment images with at least the head's `min_patches` per side: (B, C, H, W) -> logits (B, N, H, W).

    All parameters train, except blocks after the last of `layers`, which never run, and those that are frozen.

    Args:
        encoder: becomes a part of the segmenter and loses its final norm, so load weights into it afterwards.
        head: one of HEADS: "upernet" or "dpt", on the outputs of four blocks, or "linear", on that of one block.
        layers: ascending indices of these blocks; None: `default_layers`.
        head_width: channels of the head's layers; None: the head's default.
        auxiliary: add an auxiliary head, for training, if the head takes one.
        custom_weight_init: initialize the heads as mmsegmentation does instead of as PyTorch does.

    Raises:
        ValueError: if `layers` do not fit the head and the encoder.
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
        self.frozen_encoder = False

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

    def freeze_encoder(self) -> None:
        """Train only the head; the encoder stays in evaluation mode and autograd stores nothing of it."""
        self.frozen_encoder = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the mode of all modules, except a frozen encoder."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen_encoder)
        return self

    def synchronize_batch_norms(self) -> None:
        """Make every BatchNorm use the statistics of all processes in training."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.synchronized = True

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, N, H, W) of images (B, C, H, W), in training also those of an auxiliary head."""
        maps = self.fpn(self.encoder.forward_layers(images, self.layers))
        logits = resize(self.decode_head(maps), images.shape[2:])
        if self.training and self.auxiliary:
            return logits, resize(self.auxiliary_head(maps), images.shape[2:])
        return logits
