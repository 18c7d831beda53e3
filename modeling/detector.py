"""Detect objects with a plain encoder, window attention, a pyramid of its last map, and torchvision's R-CNN heads.

ViTDet (Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527), with
Faster R-CNN (Ren et al. 2015) for boxes or Mask R-CNN (He et al. 2017) for boxes and masks.

Legend: B batch, C channels, S side of the square input in pixels, h w patches, T class tokens, D width of the encoder.
Boxes are (x1, y1, x2, y2) in pixels of the input; class 0 is the background in torchvision's heads.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from modeling.position import cut_biases
from modeling.vit import Attention, EncoderWithHead, Grid, VisionTransformer

HEADS = ("mask_rcnn", "faster_rcnn")
NUM_GLOBAL = 4  # number of blocks with global attention
LEVELS = ("0", "1", "2", "3", "4")  # levels of the pyramid, with strides of 1/4, 1/2, 1, 2 and 4 patches
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
ANCHOR_CELLS = 8  # side of an anchor, in cells of its level: 32 to 512 pixels for patches of 16

LayerNorm = partial(LayerNorm2d, eps=1e-6)


def global_blocks(depth: int) -> list[int]:
    """Return the indices of the blocks with global attention: the last of each quarter of the encoder."""
    count = min(NUM_GLOBAL, depth)
    return [round(depth * (number + 1) / count) - 1 for number in range(count)]


class WindowAttention(Attention):
    """Apply an encoder's attention within windows of `window` x `window` patches: (B, T + h*w, D) -> same shape.

    The grid is padded with zeros at the right and the bottom to whole windows. Class tokens take part in each window,
    and their mean over the windows is returned. The table of a relative position bias covers the offsets in a window,
    which do not depend on the grid.
    """

    def __init__(self, attention: Attention, window: int):
        super().__init__(attention.qkv.in_features, attention.num_heads)
        self.window = window
        state, name = attention.state_dict(), "relative_position_bias_table"
        if attention.bias_grid:
            self.add_relative_position_bias((window, window))
            state[name] = cut_biases(state[name], attention.bias_grid, self.bias_grid)
        self.load_state_dict(state)

    def forward(self, x: torch.Tensor, last: None = None, grid: Grid | None = None) -> torch.Tensor:
        (h, w), side, count = grid, self.window, x.shape[1] - grid[0] * grid[1]
        patches = F.pad(x[:, count:].unflatten(1, grid), (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = patches.shape[1] // side, patches.shape[2] // side
        patches = patches.unflatten(2, (columns, side)).unflatten(1, (rows, side))  # (B, rows, side, columns, side, D)
        windows = patches.transpose(2, 3).reshape(-1, side * side, x.shape[2])
        cls_tokens = x[:, :count].repeat_interleave(rows * columns, dim=0)
        x = super().forward(torch.cat([cls_tokens, windows], dim=1), grid=(side, side))
        cls_tokens = x[:, :count].unflatten(0, (-1, rows * columns)).mean(dim=1)
        patches = x[:, count:].unflatten(1, (side, side)).unflatten(0, (-1, rows, columns)).transpose(2, 3)
        patches = patches.flatten(3, 4).flatten(1, 2)[:, :h, :w]
        return torch.cat([cls_tokens, patches.flatten(1, 2)], dim=1)


class SimplePyramid(nn.Module):
    """Make five maps (B, width, ., .), 4 to 1/4 times as large, from one (B, D, h, w) (section 3 of ViTDet)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        double = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        scales = (
            [double(dim, dim // 2), LayerNorm(dim // 2), nn.GELU(), double(dim // 2, dim // 4)],
            [double(dim, dim // 2)],
            [],
            [nn.MaxPool2d(kernel_size=2)],
        )
        self.levels = nn.ModuleList()
        for layers, channels in zip(scales, (dim // 4, dim // 2, dim, dim), strict=True):
            layers += [nn.Conv2d(channels, width, kernel_size=1, bias=False), LayerNorm(width)]
            layers += [nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False), LayerNorm(width)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = [level(x) for level in self.levels]
        return *maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2)


class PyramidAlign(MultiScaleRoIAlign):
    """Pool the features of boxes from the pyramid of square inputs.

    torchvision derives the strides from the sizes of the images, which here exclude the padding to a square.
    """

    def __init__(self, side: int, output_size: int):
        super().__init__(LEVELS[:-1], output_size, sampling_ratio=2)
        self.side = side

    def forward(self, x: dict, boxes: list[torch.Tensor], image_shapes: list[Grid]) -> torch.Tensor:
        return super().forward(x, boxes, [(self.side, self.side)])


def return_float32(module: nn.Module, inputs: tuple, outputs):
    """Convert the outputs of a module to float32, as a forward hook, so that losses and boxes are float32 too."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float()
    return tuple(return_float32(module, inputs, part) for part in outputs)


class Detector(EncoderWithHead):
    """Find objects in square images (B, C, S, S).

    Losses are computed per image and averaged, so a micro-batch of any size trains as ViTDet does with one image per
    GPU. Heads and their settings are torchvision's, with ViTDet's depths and norms.

    Args:
        encoder: for square images; it loses its final norm, so load weights into it afterwards.
        num_classes: number of classes without the background.
        masks: predict masks too.
        window: side of the attention windows, in patches. 0, or a grid that fits in one window: global attention only.
        width: channels of the pyramid and the heads; the fully connected layer has four times as many.
        num_regions: regions per image that train the heads; half as many anchors train the proposals.

    Raises:
        ValueError: if the images are not squares of a multiple of four patches a side, or the patch size is not a power
            of two of at least 4.
    """

    default_window, default_width, default_regions = 14, 256, 512

    def __init__(
        self,
        encoder: VisionTransformer,
        num_classes: int,
        *,
        masks: bool = True,
        window: int = default_window,
        width: int = default_width,
        num_regions: int = default_regions,
    ):
        super().__init__()
        side, patch_size = encoder.img_size[0], encoder.patch_size
        if encoder.img_size[1] != side or patch_size & (patch_size - 1) or patch_size < 4 or side % (4 * patch_size):
            raise ValueError(
                f"images of {encoder.img_size} pixels in patches of {patch_size}; expected square images "
                "with a multiple of 4 patches a side; patches of 4, 8, 16 or 32"
            )
        self.num_classes, self.window, self.width, self.head = num_classes, window, width, HEADS[not masks]
        self.frozen_encoder = False
        self.encoder = encoder
        encoder.norm = nn.Identity()
        if 0 < window < encoder.grid[0]:
            for index in {*range(encoder.depth)} - {*global_blocks(encoder.depth)}:
                encoder.blocks[index].attn = WindowAttention(encoder.blocks[index].attn, window)
        self.fpn = SimplePyramid(encoder.embed_dim, width)
        self.rpn = self._build_proposals(num_regions // 2)
        self.roi_heads = self._build_heads(num_regions, masks=masks)
        self.requires_grad_(True)

    def _build_proposals(self, num_anchors: int) -> RegionProposalNetwork:
        finest = self.encoder.patch_size // 4 * ANCHOR_CELLS
        sizes = tuple((finest * 2**level,) for level in range(len(LEVELS)))
        head = RPNHead(self.width, len(ASPECT_RATIOS), conv_depth=2)
        head.register_forward_hook(return_float32)
        return RegionProposalNetwork(
            AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
            head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=num_anchors,
            positive_fraction=0.5,
            pre_nms_top_n=dict(training=2000, testing=1000),  # of each level
            post_nms_top_n=dict(training=1000, testing=1000),
            nms_thresh=0.7,
        )

    def _build_heads(self, num_regions: int, *, masks: bool) -> RoIHeads:
        side, width, count = self.encoder.img_size[0], self.width, self.num_classes + 1
        layers, of_masks = [width] * 4, {}
        if masks:
            of_masks = dict(mask_roi_pool=PyramidAlign(side, 14))
            of_masks["mask_head"] = MaskRCNNHeads(width, layers, dilation=1, norm_layer=LayerNorm)
            of_masks["mask_predictor"] = MaskRCNNPredictor(width, width, count)
            of_masks["mask_predictor"].register_forward_hook(return_float32)
        predictor = FastRCNNPredictor(4 * width, count)
        predictor.register_forward_hook(return_float32)
        return RoIHeads(
            PyramidAlign(side, 7),
            FastRCNNConvFCHead((width, 7, 7), layers, [4 * width], norm_layer=LayerNorm),
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=num_regions,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            **of_masks,
        )

    def freeze_encoder(self) -> None:
        """Train only the pyramid and heads; the encoder stays in evaluation mode and autograd stores nothing of it."""
        self.frozen_encoder = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Detector":
        """Set the mode of all modules, except a frozen encoder."""
        super().train(mode)
        self.encoder.train(mode and not self.frozen_encoder)
        return self

    def compile_features(self) -> None:
        """Compile encoder and pyramid, but not the heads, whose input sizes vary."""
        self.features = torch.compile(self.features, fullgraph=True, dynamic=False)

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the five maps (B, width, ., .) of the pyramid."""
        return self.fpn(self.encoder.forward_layers(images, [self.encoder.depth - 1])[0])

    def forward(
        self, images: torch.Tensor, sizes: list[Grid] | None = None, targets: list[dict] | None = None
    ) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Return losses with targets (in training mode), detections without, or without sizes the pyramid's maps.

        Args:
            sizes: height and width of each image without its padding.
            targets: for each image `boxes` (n, 4), `labels` (n,) from 1, `masks` (n, S, S), 0 or 1, and the `seed` that
                its regions are drawn with.

        Returns:
            Losses () by name; or for each image `boxes` (n, 4), `labels` (n,) from 1, `scores` (n,) and, if the model
            predicts them, `masks` (n, 1, 28, 28): probabilities inside their box.
        """
        maps = self.features(images)
        if sizes is None:
            return maps
        results, count = [], len(sizes)
        for number in range(count):
            own = slice(number, number + 1)
            levels = {name: level[own] for name, level in zip(LEVELS, maps, strict=True)}
            target = targets and targets[own]
            if target:
                torch.manual_seed(target[0]["seed"])  # an image gets the same regions in any micro-batch
            # torchvision makes anchors in the maps' precision, and bfloat16 is too coarse for coordinates
            float32 = {name: level.float() for name, level in levels.items()}
            proposals, losses = self.rpn(ImageList(images[own], sizes[own]), float32, target)
            detections, others = self.roi_heads(levels, proposals, sizes[own], target)
            results.append({**losses, **others} if target else detections[0])
        if targets is None:
            return results
        return {name: sum(losses[name] for losses in results) / count for name in results[0]}


def in_original_pixels(detections: dict[str, torch.Tensor], size: Grid, original: Grid) -> dict[str, torch.Tensor]:
    """Return the detections of an image of `original` height and width that was resized to `size`.

    Boxes are scaled. Masks (n, 1, 28, 28) become an iterator over masks of the original size, uint8, 0 or 1, because
    all of them at once would take gigabytes for large images.
    """
    (height, width), (h, w) = original, size
    boxes = detections["boxes"] * detections["boxes"].new_tensor([width / w, height / h] * 2)
    scaled = {**detections, "boxes": boxes}
    if "masks" in detections:
        scaled["masks"] = (_paste(*each, original) for each in zip(detections["masks"], boxes, strict=True))
    return scaled


def _paste(mask: torch.Tensor, box: torch.Tensor, size: Grid) -> torch.Tensor:
    return (paste_masks_in_image(mask[None], box[None], size)[0, 0] >= 0.5).byte()
