"""Tests of the detector: window attention and pyramid against independent code, its losses, and its files."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from random_modules import build_autoencoder, new_encoder, randomize
from torchvision.ops import roi_align

from modeling.classifier import Classifier
from modeling.detector import (
    LEVELS,
    Detector,
    PyramidAlign,
    SimplePyramid,
    WindowAttention,
    global_blocks,
    in_original_pixels,
)
from modeling.export import export_detector, export_encoder
from modeling.files import WeightsError
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import SIZES, Attention
from modeling.weights import load_weights, open_weights, resize_patches, start_from

SMALL = dict(img_size=64, patch_size=8, embed_dim=32, depth=5, num_heads=2)
STATISTICS = dict(mean=[0.5] * 3, std=[0.25] * 3)


def new_detector(num_classes: int = 3, *, encoder: dict | None = None, **change) -> Detector:
    torch.manual_seed(0)
    return Detector(new_encoder(**SMALL | (encoder or {})), num_classes, **dict(window=3, width=8) | change)


def target(*boxes, seed: int = 0) -> dict:
    """Return the objects of a 64 x 64 image; their masks fill their boxes."""
    masks = torch.zeros(len(boxes), 64, 64, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    labels = 1 + torch.arange(len(boxes)) % 3
    return dict(boxes=torch.tensor(boxes).float().reshape(-1, 4), labels=labels, masks=masks, seed=seed)


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
VALID = [(64, 48), (40, 64), (64, 64)]
TARGETS = [target([4, 4, 30, 40], [20, 10, 44, 60], seed=5), target(seed=6), target([0, 0, 64, 20], seed=7)]


def test_global_blocks_are_those_of_the_paper():
    assert global_blocks(SIZES["base"]["depth"]) == [2, 5, 8, 11]
    assert global_blocks(SIZES["large"]["depth"]) == [5, 11, 17, 23]
    assert global_blocks(SIZES["huge"]["depth"]) == [7, 15, 23, 31]
    assert global_blocks(2) == [0, 1] and global_blocks(6) == [1, 2, 3, 5]


def bias_of(table, grid, query, key):
    """Return the bias (heads,) in BEiT's table between two patches, each a (row, column)."""
    (h, w), (dy, dx) = grid, (query[0] - key[0], query[1] - key[1])
    return table[(dy + h - 1) * (2 * w - 1) + dx + w - 1]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("grid, num_cls_tokens", [((7, 10), 1), ((8, 4), 2)])
def test_window_attention_is_attention_in_each_padded_window(grid, num_cls_tokens, with_bias):
    torch.manual_seed(0)
    attention, side, heads, dim = Attention(16, 2), 4, 2, 16
    if with_bias:
        attention.add_relative_position_bias(grid)
    randomize(attention, 1.0).double()
    x = torch.randn(2, num_cls_tokens + grid[0] * grid[1], dim).double()
    ours = WindowAttention(attention, side).double()(x, grid=grid)

    patches, cls_tokens = torch.zeros(2, 8, -(-grid[1] // 4) * 4, dim).double(), x[:, :num_cls_tokens]
    patches[:, : grid[0], : grid[1]] = x[:, num_cls_tokens:].reshape(2, *grid, dim)
    expected, cls_outputs = torch.zeros_like(patches), []
    places = [(row, column) for row in range(side) for column in range(side)]
    bias = torch.zeros(heads, num_cls_tokens + 16, num_cls_tokens + 16).double()
    if with_bias:
        table = attention.relative_position_bias_table
        bias[:, num_cls_tokens:, :num_cls_tokens] = table[-2][:, None, None]
        bias[:, :num_cls_tokens, num_cls_tokens:] = table[-3][:, None, None]
        bias[:, :num_cls_tokens, :num_cls_tokens] = table[-1][:, None, None]
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                bias[:, num_cls_tokens + i, num_cls_tokens + j] = bias_of(table, grid, query, key)
    for top in range(0, patches.shape[1], side):
        for left in range(0, patches.shape[2], side):
            window = patches[:, top : top + side, left : left + side].reshape(2, side * side, dim)
            tokens = torch.cat([cls_tokens, window], dim=1)
            q, k, v = attention.qkv(tokens).reshape(2, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / math.sqrt(dim // heads) + bias).softmax(dim=-1)
            output = attention.proj((weights @ v).transpose(1, 2).reshape(2, -1, dim))
            expected[:, top : top + side, left : left + side] = output[:, num_cls_tokens:].reshape(2, side, side, dim)
            cls_outputs.append(output[:, :num_cls_tokens])
    expected = expected[:, : grid[0], : grid[1]].reshape(2, -1, dim)
    expected = torch.cat([torch.stack(cls_outputs).mean(dim=0), expected], dim=1)
    torch.testing.assert_close(ours, expected)


def test_the_bias_of_a_window_does_not_change_with_the_grid(tmp_path):
    model = randomize(new_detector(window=5, encoder=dict(relative_position_bias=True)), 1.0)
    export_detector(model, tmp_path, classes=["a", "b", "c"], **STATISTICS)
    name, (_, last, *_) = "relative_position_bias_table", global_blocks(5)
    tables = [block.attn.relative_position_bias_table for block in model.encoder.blocks]
    assert [len(table) for table in tables] == [84 if i == 2 else 228 for i in range(5)], last
    for side, window in ((96, 5), (96, 3), (32, 5)):  # a 4 x 4 grid has no windows
        encoder = new_detector(window=window, encoder=dict(img_size=side, relative_position_bias=True)).encoder
        weights = open_weights(tmp_path)
        load_weights(encoder, weights.state, stored=weights.stored)
        new, size = encoder.blocks[2].attn.state_dict()[name], 2 * min(window, side // 8) - 1
        expected = tables[2][:-3].reshape(9, 9, -1)[(9 - size) // 2 :, (9 - size) // 2 :][:size, :size].flatten(0, 1)
        assert torch.equal(new, torch.cat([expected, tables[2][-3:]]))
    larger = open_trained(tmp_path, img_size=(96, 96)).model.encoder
    assert torch.equal(larger.blocks[2].attn.relative_position_bias_table, tables[2])
    assert len(larger.blocks[last].attn.relative_position_bias_table) == 23 * 23 + 3


def test_only_global_blocks_see_beyond_their_window():
    model = new_detector(encoder=dict(depth=8))
    windowed = [isinstance(block.attn, WindowAttention) for block in model.encoder.blocks]
    assert windowed == [i not in (1, 3, 5, 7) for i in range(8)]
    attention = model.encoder.blocks[0].attn
    x = torch.randn(1, 1 + 64, 32)
    changed = x.clone()
    changed[:, 1 + 63] += 1  # the last patch, in another window than the first
    difference = (attention(changed, grid=(8, 8)) - attention(x, grid=(8, 8))).abs().amax(dim=2)[0, 1:].reshape(8, 8)
    assert difference[6:, 6:].min() > 1e-5 and difference[:6].max() == difference[:, :6].max() == 0


def test_without_windows_features_are_those_of_the_encoder():
    """The same holds for windows of the whole grid or more. Positions are resized to another grid."""
    encoder = randomize(new_encoder(**SMALL))
    state = encoder.state_dict()
    for window in (0, 8, 14):
        model = new_detector(window=window, width=8).eval()
        load_weights(model.encoder, state)
        maps = []
        model.fpn.register_forward_pre_hook(lambda module, inputs, maps=maps: maps.append(inputs[0]))
        model(IMAGES)
        assert torch.equal(maps[0], encoder.forward_layers(IMAGES, [4])[0])
    larger = new_detector(encoder=dict(img_size=128))
    assert "encoder.pos_embed 8x8 -> 16x16" in load_weights(larger.encoder, state).resized


def layer_norm(x, norm):
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_the_pyramid_is_that_of_the_paper():
    torch.manual_seed(0)
    pyramid, x = randomize(SimplePyramid(16, 8)), torch.randn(2, 16, 6, 6)
    maps = pyramid(x)
    assert [tuple(level.shape[1:]) for level in maps] == [(8, s, s) for s in (24, 12, 6, 3, 2)]
    first, second, *_ = pyramid.levels
    up = [F.conv_transpose2d(x, level[0].weight, level[0].bias, stride=2) for level in (first, second)]
    up[0] = F.gelu(layer_norm(up[0], first[1]))
    up[0] = F.conv_transpose2d(up[0], first[3].weight, first[3].bias, stride=2)
    expected = []
    for level, scaled in zip(pyramid.levels, (*up, x, F.max_pool2d(x, 2)), strict=True):
        *_, conv1, norm1, conv3, norm3 = level
        inner = layer_norm(F.conv2d(scaled, conv1.weight), norm1)
        expected.append(layer_norm(F.conv2d(inner, conv3.weight, padding=1), norm3))
    expected.append(expected[-1][:, :, ::2, ::2])
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (20, 64)])
def test_boxes_are_cut_at_the_strides_of_the_padded_image(size):
    """torchvision alone would infer strides that are too small for the second size."""
    maps = {name: torch.randn(1, 4, 64 >> i, 64 >> i) for i, name in enumerate(LEVELS)}
    boxes = torch.tensor([[2.0, 3.0, 17.0, 15.0], [0.0, 0.0, 64.0, 20.0]])
    ours = PyramidAlign(64, 7)(maps, [boxes], [size])
    for number, (name, scale) in enumerate((("0", 1.0), ("1", 0.5))):  # the areas of the boxes choose the level
        own = [boxes[number : number + 1]]
        expected = roi_align(maps[name], own, 7, spatial_scale=scale, sampling_ratio=2)
        torch.testing.assert_close(ours[number : number + 1], expected)


def test_anchors_stand_on_the_patches():
    model = new_detector().eval()
    images = torch.zeros(1, 3, 64, 64)
    maps = list(model(images))
    from torchvision.models.detection.image_list import ImageList

    (anchors,) = model.rpn.anchor_generator(ImageList(images, [(64, 64)]), maps)
    assert len(anchors) == 3 * sum(level.shape[2] * level.shape[3] for level in maps)
    square = anchors[1]  # ratio 1, at the first cell of stride 2
    assert square.tolist() == [-8, -8, 8, 8] and (anchors[4] - square).tolist() == [2, 0, 2, 0]


@pytest.mark.parametrize("head", ["mask_rcnn", "faster_rcnn"])
def test_losses_do_not_depend_on_the_micro_batch(head):
    """One image has no objects. Every parameter has a gradient, as DDP needs."""
    model = new_detector(masks=head == "mask_rcnn", num_regions=32).train()
    assert model.head == head
    losses = model(IMAGES, VALID, TARGETS)
    sum(losses.values()).backward()
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}
    assert losses.keys() == names | ({"loss_mask"} if head == "mask_rcnn" else set())
    assert all(parameter.grad is not None for parameter in model.parameters())
    parts = [model(IMAGES[i : i + 1], VALID[i : i + 1], TARGETS[i : i + 1]) for i in (2, 0, 1)]
    for name, loss in losses.items():
        torch.testing.assert_close(sum(part[name] for part in parts) / 3, loss)
    others = model(IMAGES, VALID, [one | {"seed": one["seed"] + 9} for one in TARGETS])
    assert others["loss_objectness"] != losses["loss_objectness"]


def test_losses_and_boxes_are_float32_in_lower_precision():
    model, anchors = new_detector(num_regions=16).train(), []
    model.rpn.anchor_generator.register_forward_hook(lambda module, inputs, outputs: anchors.extend(outputs))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(IMAGES, VALID, TARGETS)
        detections = model.eval()(IMAGES, VALID)
    assert len(anchors) == 6 and all(each.dtype == torch.float32 for each in anchors)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(part["boxes"].dtype == part["masks"].dtype == torch.float32 for part in detections)


@torch.no_grad()
def test_detections_are_inside_their_image_and_scale_to_it():
    model = new_detector().eval()
    for (h, w), one in zip(VALID, model(IMAGES, VALID), strict=True):
        assert len(one["boxes"]) and one["labels"].min() >= 1 and one["labels"].max() <= 3
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([w, h, w, h])).all()
    detections = dict(boxes=torch.tensor([[8.0, 4.0, 24.0, 20.0]]), masks=torch.ones(1, 1, 28, 28))
    scaled = in_original_pixels(detections, (32, 64), (64, 96))
    (mask,) = scaled["masks"]
    assert scaled["boxes"].tolist() == [[12, 8, 36, 40]] and mask.shape == (64, 96) and mask.dtype == torch.uint8
    rows, columns = mask.nonzero().T
    assert abs(rows.min() - 8) <= 1 and abs(rows.max() - 39) <= 1
    assert abs(columns.min() - 12) <= 1 and abs(columns.max() - 35) <= 1


def test_a_frozen_encoder_keeps_its_weights_and_its_mode():
    model = new_detector(encoder=dict(drop_path=0.5), num_regions=16)
    model.freeze_encoder()
    sum(model.train()(IMAGES, VALID, TARGETS).values()).backward()
    assert not model.encoder.training and all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.fpn.parameters())


def test_a_compiled_encoder_computes_the_same(monkeypatch):
    """Encoder and pyramid compile into one graph; the eager backend skips code generation."""
    model = new_detector().eval()
    expected = model(IMAGES)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model.compile_features()
    for ours, theirs in zip(model(IMAGES), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sizes_that_have_no_strides_are_refused():
    sizes = (dict(img_size=(64, 32)), dict(img_size=70, patch_size=14), dict(patch_size=2), dict(img_size=56))
    for encoder in sizes:
        with pytest.raises(ValueError, match="expected square images with a multiple of 4 patches a side"):
            new_detector(encoder=encoder)


@pytest.mark.parametrize("masks", [True, False])
def test_an_exported_detector_opens_as_it_was(tmp_path, masks):
    extras = dict(relative_position_bias=True, layer_scale=0.1)
    model = randomize(new_detector(masks=masks, window=5, width=12, encoder=extras), 0.01)
    export_detector(model, tmp_path, classes=["a", "b", "c"], value_range=(0, 1000), **STATISTICS)
    trained = open_trained(tmp_path)
    assert isinstance(trained.model, Detector) and trained.classes == ["a", "b", "c"] and not trained.assumed
    assert (trained.model.window, trained.model.width, trained.model.head) == (5, 12, model.head)
    assert trained.mean == STATISTICS["mean"] and trained.value_range == (0, 1000)
    assert trained.categories == {1: "a", 2: "b", 3: "c"}
    expected, ours = model.state_dict(), trained.model.state_dict()
    assert expected.keys() == ours.keys() and all(torch.equal(expected[name], ours[name]) for name in expected)
    with torch.no_grad():
        for ours, theirs in zip(trained.model(IMAGES, VALID), model(IMAGES, VALID), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_detector_gives_its_encoder_to_another(tmp_path):
    model = randomize(new_detector(), 0.01)
    export_detector(model, tmp_path, classes=["a", "b", "c"], **STATISTICS)
    weights = open_weights(tmp_path)
    other = new_detector(7, masks=False)
    report = load_weights(other.encoder, weights.state, stored=weights.stored)
    assert {name.partition(".")[0] for name in report.ignored} == {"fpn", "rpn", "roi_heads"}
    assert torch.equal(other.encoder.blocks[0].attn.qkv.weight, model.encoder.blocks[0].attn.qkv.weight)
    with pytest.raises(WeightsError, match="lost their final norm"):
        load_weights(new_encoder(**SMALL), weights.state)


@pytest.mark.parametrize("model", ["classifier", "segmenter", "autoencoder"])
def test_what_else_starts_from_a_detector(tmp_path, model):
    """A classifier and a segmenter load its encoder; an autoencoder refuses it, because the final norm is missing."""
    detector = randomize(new_detector(encoder=dict(relative_position_bias=model == "segmenter")), 0.01)
    export_detector(detector, tmp_path, classes=["a", "b", "c"], **STATISTICS)
    weights = open_weights(tmp_path)
    if model == "autoencoder":
        decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
        with pytest.raises(WeightsError, match="lost their final norm in fine-tuning; give the weights that they were"):
            start_from(weights, build_autoencoder(new_encoder(**SMALL), target="pixels", **decoder), **STATISTICS)
        return
    if model == "classifier":
        encoder = Classifier(new_encoder(**SMALL), 3, pooling="mean").encoder
    else:
        encoder = Segmenter(new_encoder(**SMALL, relative_position_bias=True), 3, head="linear").encoder
    report = start_from(weights, encoder, **STATISTICS)
    assert "ignored (fpn, roi_heads, rpn)" in report and " 0 missing" in report
    for ours, theirs in zip(encoder.blocks, detector.encoder.blocks, strict=True):
        assert torch.equal(ours.mlp.fc1.weight, theirs.mlp.fc1.weight)


def test_patches_of_another_side_see_the_same_colour(tmp_path):
    encoder = randomize(new_encoder(**SMALL | dict(patch_size=7, img_size=56)))
    export_encoder(encoder, tmp_path, **STATISTICS)
    weights = resize_patches(open_weights(tmp_path), 8)
    assert weights.sizes["patch_size"] == 8
    larger = new_encoder(**SMALL).eval()
    load_weights(larger, weights.state, stored=weights.stored)
    # A smooth image: one horizontal ramp, which both sizes divide into 8 x 8 patches
    ramp = torch.linspace(0, 1, 8 * 7 * 8)[None, None, None].expand(1, 3, 8 * 7 * 8, -1)
    images = [F.interpolate(ramp, size=(side, side), mode="area") for side in (56, 64)]
    old, new = encoder(images[0]), larger(images[1])
    assert (old - new).norm() < 0.02 * old.norm()
    assert json.loads((tmp_path / "config.json").read_text())["patch_size"] == 7


def test_smaller_patches_average_and_leave_the_weights_as_they_are(tmp_path):
    """Stripes of one pixel average out in patches of half the side."""
    encoder = new_encoder(**SMALL)
    stripes = torch.ones(8).mul(torch.tensor([1.0, -1.0]).repeat(4)).expand_as(encoder.patch_embed.proj.weight)
    encoder.patch_embed.proj.weight.data.copy_(stripes)
    export_encoder(encoder, tmp_path, **STATISTICS)
    weights = open_weights(tmp_path)
    (name,) = (name for name in weights.state if name.endswith("proj.weight") and weights.state[name].ndim == 4)
    before = weights.state[name].clone()
    resized = resize_patches(weights, 4)
    assert torch.equal(weights.state[name], before) and resized.state is not weights.state
    inner = resized.state["encoder.patch_embed.proj.weight"][..., 1:-1]
    assert inner.shape[2:] == (4, 2) and inner.abs().max() < 0.2 * (8 / 4) ** 2
