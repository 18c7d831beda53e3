"""Tests of the segmenter: UperNet and DPT against transformers, its loss by hand, and its cost as torch counts it."""

import copy
import math

import pytest
import torch
from random_modules import new_encoder
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BeitConfig, DPTConfig, UperNetConfig, UperNetForSemanticSegmentation
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTSemanticSegmentationHead

from modeling.upernet import (
    HEADS,
    POOL_SCALES,
    AveragePool,
    ConvModule,
    Segmenter,
    default_layers,
    resize,
    resize_by_products,
    segmentation_loss,
)
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2)
BEIT = dict(relative_position_bias=True, layer_scale=0.1)
BF16 = torch.bfloat16


def new_segmenter(num_classes: int = 7, *, encoder: dict | None = None, **change) -> Segmenter:
    return Segmenter(new_encoder(**SMALL | (encoder or {})), num_classes, **dict(head_width=24) | change)


def randomized(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Move every parameter and statistic, so that no two could be swapped unnoticed; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value += std * torch.randn(value.shape, generator=generator)
    return module.eval()


# Parity


def both(size: dict, num_classes: int, *, layers: list[int], head_width: int, bias: bool, std: float = 0.1):
    """Return our segmenter and transformers' with the same random weights."""
    backbone = BeitConfig(
        image_size=size["img_size"],
        patch_size=size["patch_size"],
        hidden_size=size["embed_dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["embed_dim"],
        layer_norm_eps=1e-6,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=bias,
        layer_scale_init_value=0.5 if bias else 0.0,
        drop_path_rate=0.0,
        add_fpn=True,
        batch_norm_eps=1e-5,
        out_features=[f"stage{layer + 1}" for layer in layers],
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=head_width, num_labels=num_classes)
    theirs = randomized(UperNetForSemanticSegmentation(config), std)
    encoder = new_encoder(**size, relative_position_bias=bias, layer_scale=1.0 if bias else None)
    ours = Segmenter(encoder, num_classes, layers=layers, head_width=head_width).eval()
    load_weights(ours, theirs.state_dict())
    return ours, theirs


def assert_equal_outputs(ours: Segmenter, theirs: nn.Module, images: torch.Tensor) -> None:
    pyramid = ours.fpn(ours.encoder.forward_layers(images, ours.layers))
    expected = theirs.backbone(images).feature_maps
    for one, other in zip(pyramid, expected, strict=True):
        assert other.std() > 0.3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.auxiliary_head(pyramid), theirs.auxiliary_head(expected), rtol=0, atol=1e-4)
    logits = theirs(images).logits
    assert logits.std() > 0.3
    torch.testing.assert_close(ours(images), logits, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_pyramid_and_logits_equal_transformers(bias):
    ours, theirs = both(SMALL, 7, layers=[0, 2, 3, 4], head_width=24, bias=bias)
    for height, width in ((32, 32), (72, 64), (48, 32), (16, 64), (45, 61)):  # 16 x 64 has as many patches as 32 x 32
        assert_equal_outputs(ours, theirs, torch.randn(2, 3, height, width))


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("bias", "shape"), [(False, (512, 512)), (True, (512, 683))])
def test_pyramid_and_logits_of_a_base_model_equal_transformers(bias, shape):
    size = SIZES["base"] | dict(img_size=512)
    ours, theirs = both(size, 150, layers=default_layers(12, 4), head_width=512, bias=bias, std=0.02)
    assert_equal_outputs(ours, theirs, torch.randn(1, 3, *shape))


@torch.inference_mode()
def test_the_linear_head_by_hand():
    model = randomized(new_segmenter(head="linear"))
    images = torch.randn(2, 3, 32, 48)
    (features,) = model.encoder.forward_layers(images, [4])
    norm, classifier = model.decode_head.batch_norm, model.decode_head.classifier
    centred = (features - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    scaled = centred * norm.weight[:, None, None] + norm.bias[:, None, None]
    logits = torch.einsum("nd,bdhw->bnhw", classifier.weight[:, :, 0, 0], scaled) + classifier.bias[:, None, None]
    expected = nn.functional.interpolate(logits, scale_factor=8, mode="bilinear")
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert model.layers == [4] and not model.auxiliary
    names = {name for name in model.state_dict() if not name.startswith("encoder.")}
    norms = {f"batch_norm.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert names == {f"decode_head.{name}" for name in norms | {"classifier.weight", "classifier.bias"}}


@torch.inference_mode()
def test_the_logits_of_dpt_equal_transformers():
    """Compare the neck and the head on maps with even, odd and unequal sides."""
    model = randomized(new_segmenter(head="dpt"))
    config = DPTConfig(
        hidden_size=32,
        num_labels=7,
        neck_hidden_sizes=[24] * 4,
        fusion_hidden_size=24,
        readout_type="ignore",
        use_batch_norm_in_fusion_residual=True,
    )
    theirs = nn.ModuleDict({"neck": DPTNeck(config), "head": DPTSemanticSegmentationHead(config)}).eval()
    theirs.load_state_dict(model.decode_head.to_transformers())
    for h, w in ((4, 4), (6, 8), (5, 7), (3, 6), (1, 2)):
        maps = torch.randn(4, 2, 32, h, w)
        tokens = [nn.functional.pad(level.flatten(2).transpose(1, 2), (0, 0, 1, 0)) for level in maps]
        expected = theirs["head"](theirs["neck"](tokens, h, w))
        assert expected.std() > 0.1
        torch.testing.assert_close(model.decode_head(maps), expected, rtol=0, atol=1e-4)
        logits = model(torch.randn(2, 3, 8 * h, 8 * w))
        assert logits.shape == (2, 7, 8 * h, 8 * w)


# Training


def test_outputs_and_dropout_in_training():
    model = randomized(new_segmenter()).train()
    images = torch.randn(2, 3, 32, 48)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 7, 32, 48)
    for head, output in ((model.decode_head, logits), (model.auxiliary_head, auxiliary)):
        assert (head.dropout.p, type(head.dropout)) == (0.1, nn.Dropout2d)
        head.dropout.p = 0.0
        assert not torch.allclose(model(images)[output is auxiliary], output)
    again = model(images)
    assert all(map(torch.equal, again, model(images)))  # nothing else is random
    assert model.eval()(images).shape == (2, 7, 32, 48)
    assert new_segmenter(auxiliary=False).train()(images).shape == (2, 7, 32, 48)
    assert new_segmenter(head="linear").train()(images).shape == (2, 7, 32, 48)
    assert new_segmenter(head="dpt").train()(images[:1, :, :24, :24]).shape == (1, 7, 24, 24)  # the smallest input


def test_blocks_above_the_highest_layer_are_frozen():
    model = new_segmenter(encoder=dict(depth=6), layers=[0, 1, 2, 4])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"encoder.blocks.5.{name}" for name, _ in model.encoder.blocks[5].named_parameters()}
    for head in HEADS:
        model = randomized(new_segmenter(head=head, encoder=BEIT | dict(depth=5))).train()
        outputs = model(torch.randn(2, 3, 32, 32))
        sum(one.square().sum() for one in (outputs if head == "upernet" else [outputs])).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), name


@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_encoder_computes_as_in_evaluation_and_keeps_nothing(head):
    model = randomized(new_segmenter(head=head, encoder=dict(drop_path=0.9, gradient_checkpointing=True)))
    model.freeze_encoder()
    images, maps, saved = torch.randn(2, 3, 32, 32), [], []
    expected = model.encoder.forward_layers(images, model.layers)
    model.train().fpn.register_forward_pre_hook(lambda _, inputs: maps.extend(inputs[0]))
    assert model.decode_head.training and not any(module.training for module in model.encoder.modules())
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        outputs = model(images)
    assert all(map(torch.equal, maps, expected)) and not any(level.requires_grad for level in maps)
    tokens = 2 * 17 * 32  # no hidden layer of an MLP (17, 128) and no qkv (3 x tokens) is saved for backward
    assert not any(value.shape[1:] == (17, 128) or value.numel() == 3 * tokens for value in saved)
    compiled = copy.deepcopy(model)
    compiled.compile(fullgraph=True, dynamic=False, backend="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(images)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(images), expected)
    sum(one.sum() for one in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is None} == {"encoder"}


def random_masks(count: int, size: int = 32, *, classes: int = 7) -> torch.Tensor:
    """Return masks, uint8 (count, size, size); the ignored share falls from all of the first to none of the last."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.randint(classes, (count, size, size), generator=generator, dtype=torch.uint8)
    ignored = torch.rand(count, size, size, generator=generator) < torch.linspace(1, 0, count)[:, None, None]
    return masks.masked_fill(ignored, 255)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_by_hand(weighted):
    logits, masks = 3 * torch.randn(3, 7, 5, 4), random_masks(3, 5)[:, :, :4]
    weights = torch.rand(7) + 0.5 if weighted else None
    total = 0.0
    for image, y, x in torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(4)).tolist():
        label = masks[image, y, x].item()
        if label != 255:
            scores = logits[image, :, y, x].double()
            loss = math.log(scores.exp().sum()) - scores[label].item()
            total += loss * (weights[label].item() if weighted else 1)
    expected = total / (3 * 5 * 4)
    assert segmentation_loss(logits, masks, class_weights=weights).item() == pytest.approx(expected, rel=1e-6)
    assert segmentation_loss(logits.bfloat16(), masks, class_weights=weights).dtype == torch.float32


def test_masks_without_a_valid_pixel_contribute_nothing():
    logits = torch.randn(2, 7, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_gradients_do_not_depend_on_micro_batches():
    model = randomized(new_segmenter(encoder=BEIT))
    images, masks = torch.randn(16, 3, 32, 32), random_masks(16)
    gradients = []
    for count in (1, 4):
        model.zero_grad()
        for some, some_masks in zip(images.chunk(count), masks.chunk(count), strict=True):
            (segmentation_loss(model(some), some_masks) / count).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {n for n, _ in model.named_parameters() if not n.startswith("auxiliary_head.")}
    for name, whole in gradients[0].items():
        if not name.endswith("classifier.bias"):
            assert whole.norm() > 0, name
    one, four = (torch.cat([g.flatten() for g in some.values()]) for some in gradients)
    assert (one - four).norm() < 1e-5 * one.norm()


def test_synchronized_batch_norms_keep_all_names():
    model = randomized(new_segmenter())
    state = copy.deepcopy(model.state_dict())
    model.synchronize_batch_norms()
    assert all(torch.equal(value, state.pop(name)) for name, value in model.state_dict().items()) and not state
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 1 + 4 + 1 + 3 + 3 + 1 + 1 and all(norm.synchronized for norm in norms)


@pytest.mark.parametrize(("old", "new"), [((1, 1), (4, 6)), ((3, 3), (16, 17)), ((4, 5), (32, 40)), ((9, 7), (5, 9))])
@pytest.mark.parametrize("align_corners", [False, True])
def test_resizing_by_products_equals_interpolation(old, new, align_corners):
    maps, grad, results = torch.randn(2, 5, *old), torch.rand(2, 5, *new), []
    for function, dtype in ((resize, torch.float32), (resize_by_products, torch.float32), (resize_by_products, BF16)):
        leaf = maps.to(dtype).requires_grad_()
        resized = function(leaf, new, align_corners=align_corners)
        results.append((resized.float(), torch.autograd.grad(resized, leaf, grad.to(dtype))[0].float()))
    torch.testing.assert_close(results[1], results[0])
    for one, other in zip(results[2], results[0], strict=True):
        assert (one - other).norm() < 5e-3 * other.norm()
    assert resized.dtype == BF16 and resized.is_contiguous(memory_format=torch.channels_last)


# Parameters


def test_the_layer_of_every_parameter():
    model = new_segmenter(encoder=BEIT)
    block = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = {f"{layer}.{kind}" for layer in block for kind in ("weight", "bias")}
    block |= {"gamma_1", "gamma_2", "attn.relative_position_bias_table"}
    embeddings = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected = {f"encoder.{name}": 0 for name in embeddings}
    for k in range(5):
        expected |= {f"encoder.blocks.{k}.{name}": k + 1 for name in block}
    found = {name: model.layer_index(name) for name, _ in model.named_parameters()}
    rest = {name for name in found if name.startswith(("fpn.", "decode_head.", "auxiliary_head."))}
    assert len(rest) == 8 + 13 * 3 + 2 * 2 and model.num_layers == 6
    assert found == expected | dict.fromkeys(rest, 6)


def test_what_weight_decay_leaves_alone():
    embeddings = {"encoder.cls_token", "encoder.pos_embed"}
    assert new_segmenter().no_weight_decay() == embeddings
    scales = {f"encoder.blocks.{k}.gamma_{i}" for k in range(5) for i in (1, 2)}
    assert new_segmenter(encoder=BEIT).no_weight_decay() == embeddings | scales


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (4, [0, 1, 2, 3]),
        (5, [1, 2, 3, 4]),
        (6, [1, 2, 3, 5]),
        (12, [3, 5, 7, 11]),
        (24, [7, 11, 15, 23]),
        (32, [10, 15, 20, 31]),
    ],
)
def test_default_layers(depth, layers):
    assert default_layers(depth, 4) == layers


def test_default_layers_increase_for_every_depth():
    for depth in range(4, 200):
        layers = default_layers(depth, 4)
        assert layers == sorted({*layers}) and len(layers) == 4 and layers[0] >= 0 and layers[-1] == depth - 1
    with pytest.raises(ValueError, match="a head on 4 blocks of an encoder of 3; expected at least 4"):
        default_layers(3, 4)


def test_initialization_of_the_heads():
    torch.manual_seed(0)
    for head in HEADS:
        encoder = VisionTransformer(**SMALL)
        before = copy.deepcopy(encoder.state_dict())
        model = Segmenter(encoder, 150, head=head, head_width=64)
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
        heads = [model.decode_head, model.auxiliary_head] if model.auxiliary else [model.decode_head]
        for one in heads:
            assert one.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not one.classifier.bias.any()
            for name, module in one.named_modules():
                if isinstance(module, ConvModule):  # He et al. 2015, for the backward pass
                    conv = module.conv
                    std = math.sqrt(2 / (conv.out_channels * conv.kernel_size[0] ** 2))
                    assert conv.weight.std().item() == pytest.approx(std, rel=0.05), name
    plain = new_segmenter(150, custom_weight_init=False)
    bound = 1 / math.sqrt(24)
    assert 0.9 * bound < plain.decode_head.classifier.weight.abs().max() <= bound
    assert plain.decode_head.classifier.bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(layers=[0, 1, 3, 5]), "layers 0 1 3 5 for the head upernet; expected 4 from 0 to 4, each above the one"),
        (dict(layers=[-1, 1, 3, 4]), "layers -1 1 3 4"),
        (dict(layers=[0, 3, 1, 4]), "layers 0 3 1 4"),
        (dict(layers=[0, 1, 1, 4]), "layers 0 1 1 4"),
        (dict(layers=[0, 1, 4]), "layers 0 1 4 for the head upernet; expected 4"),
        (dict(head="linear", layers=[3, 4]), "layers 3 4 for the head linear; expected 1"),
        (dict(encoder=dict(depth=3)), "a head on 4 blocks of an encoder of 3"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        new_segmenter(**change)


# Costs


@pytest.mark.parametrize(("head", "extras"), [("upernet", {}), ("upernet", BEIT), ("linear", {}), ("dpt", {})])
def test_flops_of_a_step_are_those_that_torch_counts(head, extras):
    size = SIZES["tiny"] | dict(img_size=96, depth=4, drop_path=0.2)
    model = Segmenter(new_encoder(**size, **extras), 10, head=head, head_width=64)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flops = model.eval().training_flops()
    assert torch.equal(torch.get_rng_state(), random) and not model.training  # counting changes nothing
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    images, masks = torch.randn(4, 3, 96, 96), random_masks(4, 96)
    # Attention runs as plain products, because older versions of torch do not count it on a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outputs = model.train()(images)
        sum(segmentation_loss(one, masks) for one in (outputs if model.auxiliary else [outputs])).backward()
    assert flops == counter.get_total_flops() / 4


@pytest.mark.parametrize("bins", POOL_SCALES)
def test_deterministic_pooling_averages_the_same_pixels(bins):
    maps, pool = torch.randn(2, 3, 7, 10, requires_grad=True), AveragePool(bins)
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        pooled = pool(maps)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), maps)))
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(results[1], results[0])


def test_the_deterministic_loss_is_the_same():
    logits, masks, losses = torch.randn(2, 4, 6, 5), torch.randint(0, 4, (2, 6, 5), dtype=torch.uint8), []
    masks[0, :2] = 255
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        losses.append(segmentation_loss(logits, masks, class_weights=torch.tensor([1.0, 2.0, 0.5, 0.0])))
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*losses)
