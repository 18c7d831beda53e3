"""Tests of the encoder against timm and transformers, and of its initialization against the formula."""

import math
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from random_modules import new_encoder
from random_modules import randomize as randomize_by
from torch import nn
from transformers import PixioConfig, PixioModel

from modeling.vit import SIZES, Attention, VisionTransformer, patchify, take, unpatchify
from modeling.weights import load_weights

randomize = partial(randomize_by, std=0.02)
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)


def test_patchify_by_hand():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)
    assert patches.shape == (2, 2 * 3, 2 * 2 * 3)
    for h in range(2):
        for w in range(3):
            pixels = [images[1, c, 2 * h + y, 2 * w + x].item() for y in range(2) for x in range(2) for c in range(3)]
            assert patches[1, h * 3 + w].tolist() == pixels
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_those_of_timm(name):
    size = SIZES[name]
    assert size["depth"] == {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}[name]
    with torch.device("meta"):  # names and shapes only
        theirs = timm.create_model(f"vit_{name}_patch{size['patch_size']}_224", num_classes=0)
        ours = VisionTransformer(**size)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    assert ours.num_heads == theirs.blocks[0].attn.num_heads


def test_features_equal_timm_base():
    theirs = randomize(timm.create_model("vit_base_patch16_224", num_classes=0))
    ours = VisionTransformer(**SIZES["base"]).eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.forward_features(images), ours(images), rtol=0, atol=0)


@pytest.mark.parametrize("img_size, channels", [(64, 3), ((32, 96), 4)])
def test_taps_equal_timm(img_size, channels):
    args = dict(img_size=img_size, patch_size=16)
    theirs = randomize(timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=channels, **args))
    ours = VisionTransformer(**SIZES["tiny"] | args, in_channels=channels).eval()
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, channels, *ours.img_size, generator=torch.Generator().manual_seed(1))
    indices = [11, 3, 0, 7]
    with torch.inference_mode():
        maps = ours.forward_layers(images, indices)
        taken = theirs.get_intermediate_layers(images, n=sorted(indices), reshape=True, norm=False)
        torch.testing.assert_close(ours(images), theirs.forward_features(images), rtol=0, atol=1e-5)
    for index, feature_map in zip(indices, maps, strict=True):
        assert feature_map.shape == (2, 192, *ours.grid)
        torch.testing.assert_close(feature_map, taken[sorted(indices).index(index)], rtol=0, atol=1e-5)


def test_patch_embedding_is_the_convolution_it_stores():
    model = VisionTransformer(**SMALL | dict(in_channels=4, img_size=(16, 40)))
    images = torch.randn(2, 4, 16, 40)
    conv = F.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    torch.testing.assert_close(model.patch_embed(patchify(images, 8)), conv.flatten(2).transpose(1, 2))


def test_embedding_some_patches_is_taking_some_tokens():
    model = randomize(VisionTransformer(**SMALL))
    patches = patchify(torch.randn(2, 3, 32, 32), 8)
    kept = torch.tensor([[5, 0, 11], [15, 3, 2]])
    every, some = model.embed(patches), model.embed(take(patches, kept), kept)
    assert some.shape == (2, 4, 32)
    torch.testing.assert_close(some[:, 0], every[:, 0])
    for image in range(2):
        torch.testing.assert_close(some[image, 1:], every[image, 1:][kept[image]])


def new_pixio(num_cls_tokens: int) -> PixioModel:
    """Return transformers' Pixio with the sizes of SMALL; the positions of its class tokens are random too."""
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
    return randomize(PixioModel(PixioConfig(**sizes, n_cls_tokens=num_cls_tokens)))


@pytest.mark.parametrize("num_cls_tokens", [2, 8])
def test_several_class_tokens_equal_pixio(num_cls_tokens):
    """Tokens and gradients agree, and so do maps of images of another size, for which positions are resized."""
    theirs, ours = new_pixio(num_cls_tokens), VisionTransformer(**SMALL, num_cls_tokens=num_cls_tokens)
    load_weights(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected, tokens = theirs(images), ours(images)
    torch.testing.assert_close(tokens, expected.last_hidden_state, rtol=0, atol=1e-5)
    cls_tokens, patches = ours.split(tokens)
    assert patches.shape == (2, 16, 32)
    torch.testing.assert_close(cls_tokens.mean(dim=1), expected.pooler_output, rtol=0, atol=1e-5)
    for output in (expected.last_hidden_state, tokens):
        output.pow(3).sum().backward()
    embeddings = theirs.embeddings
    pairs = [(ours.cls_token, embeddings.cls_token), (ours.norm.weight, theirs.layernorm.weight)]
    pairs += [(ours.patch_embed.proj.weight, embeddings.patch_embeddings.projection.weight)]
    for mine, other in pairs:
        scale = other.grad.abs().max()
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-5)
    images = torch.randn(2, 3, 48, 64)
    (last,) = ours.forward_layers(images, [3])
    last = ours.norm(last.flatten(2).transpose(1, 2))
    torch.testing.assert_close(last, theirs(images).last_hidden_state[:, num_cls_tokens:], rtol=0, atol=1e-5)


def test_positions_of_class_tokens_are_zero():
    one, three = VisionTransformer(**SMALL), VisionTransformer(**SMALL, num_cls_tokens=3)
    assert three.cls_token.shape == (1, 3, 32) and not three.pos_embed[:, :3].any()
    assert torch.equal(three.pos_embed[:, 2:], one.pos_embed)


def test_initialization_is_the_papers():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES["tiny"] | dict(depth=2)).initialize()
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights["patch_embed.proj"] = model.patch_embed.proj.weight.flatten(1)  # (D, P*P*C), as a Linear layer
    assert len(weights) == 2 * 4 + 1
    for name, weight in weights.items():
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name  # uniform distribution
        assert abs(weight.mean()) < 0.02 * bound, name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
    tokens = torch.stack([VisionTransformer(**SMALL | dict(depth=1)).cls_token.detach() for _ in range(100)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05) and abs(tokens.mean()) < 0.002
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_without_the_papers_initialization_layers_keep_pytorchs():
    model = VisionTransformer(**SIZES["tiny"] | dict(depth=1)).initialize(custom=False)
    fc1, proj = model.blocks[0].mlp.fc1, model.patch_embed.proj
    for layer, fan_in in ((fc1, 192), (proj, 768)):  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), weights and biases alike
        assert 0.95 / math.sqrt(fan_in) < layer.weight.abs().max() <= 1 / math.sqrt(fan_in) + 1e-7
        assert layer.bias.any()


def test_drop_path_grows_linearly_as_in_timm():
    model = new_encoder(**SMALL, drop_path=0.3)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=4, drop_path_rate=0.3)
    rates = [getattr(block.drop_path, "p", 0.0) for block in model.blocks]
    assert rates == pytest.approx([getattr(block.drop_path1, "drop_prob", 0.0) for block in theirs.blocks])
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_drop_path_drops_whole_branches_of_a_sample_in_training_only():
    torch.manual_seed(0)
    model = randomize(new_encoder(**SMALL | dict(depth=2), drop_path=0.5))
    plain = VisionTransformer(**SMALL | dict(depth=2)).eval()
    plain.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), plain(images))

    # Each of the two branches of the last block is doubled or dropped: all four outcomes occur.
    x, block = model.blocks[0](model.embed(patchify(images, 8))), model.blocks[1]
    outcomes = []
    for attention in (0, 2):
        middle = x + attention * block.attn(block.norm1(x))
        outcomes += [middle + mlp * block.mlp(block.norm2(middle)) for mlp in (0, 2)]
    dropped = block.train()(x.expand(64, -1, -1))
    fits = torch.stack([(dropped - outcome).abs().amax(dim=(1, 2)) < 1e-5 for outcome in outcomes])
    assert (fits.sum(dim=0) == 1).all() and fits.any(dim=1).all()


# Relative position bias and LayerScale

BEIT = dict(relative_position_bias=True, layer_scale=0.1)


def test_what_bias_and_scale_add():
    plain, added = VisionTransformer(**SMALL), new_encoder(**SMALL, **BEIT)
    new = {n: p for n, p in added.named_parameters() if n not in plain.state_dict()}
    assert len(added.state_dict()) == len(plain.state_dict()) + len(new)
    for k in range(4):
        table = new.pop(f"blocks.{k}.attn.relative_position_bias_table")
        assert table.shape == (7 * 7 + 3, 2) and not table.any()
        for name in ("gamma_1", "gamma_2"):
            assert torch.equal(new.pop(f"blocks.{k}.{name}"), torch.full((32,), 0.1))
    assert not new

    neutral = new_encoder(**SMALL, **BEIT | dict(layer_scale=1.0)).eval()
    neutral.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(neutral(images), plain.eval()(images), rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("img_size", [32, (16, 40)])
def test_features_with_bias_and_scale_equal_timms_beit(img_size):
    args = SMALL | dict(img_size=img_size)
    beit = dict(use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1, global_pool="token")
    theirs = randomize(timm.create_model("beit_base_patch16_224", **args, **beit), std=0.3)
    ours = new_encoder(**args, **BEIT).eval()
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    for k in range(4):
        q, v = state.pop(f"blocks.{k}.attn.q_bias"), state.pop(f"blocks.{k}.attn.v_bias")
        state[f"blocks.{k}.attn.qkv.bias"] = torch.cat([q, torch.randn(32), v])  # a softmax cancels any key bias
    state = {name: value for name, value in state.items() if name in ours.state_dict()}
    ours.load_state_dict(state)
    images = torch.randn(2, 3, *ours.img_size)
    expected = theirs.forward_features(images)
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=2e-5)
    last = ours.norm(ours.forward_layers(images, [3])[0].flatten(2).transpose(1, 2))
    torch.testing.assert_close(last, expected[:, 1:], rtol=0, atol=2e-5)
    other = torch.randn(2, 3, 48, 24)
    last = ours.norm(ours.forward_layers(other, [3])[0].flatten(2).transpose(1, 2))
    torch.testing.assert_close(ours(other)[:, 1:], last, rtol=0, atol=2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert (ours(images) - expected).abs().mean() < 0.02


def test_the_bias_of_two_patches_is_that_of_their_offset():
    attention = Attention(8, 2)
    attention.add_relative_position_bias((2, 3))
    table = nn.init.normal_(attention.relative_position_bias_table).detach()
    for h, w in ((2, 3), (3, 2), (1, 4)):
        bias = attention.relative_position_bias((h, w))
        assert bias.shape == (2, 1 + h * w, 1 + h * w)
        offsets = table[:15].T.reshape(1, 2, 3, 5)
        offsets = F.interpolate(offsets, size=(2 * h - 1, 2 * w - 1), mode="bilinear", align_corners=False)[0]
        for query in range(h * w):
            for key in range(h * w):
                (y, x), (row, column) = divmod(query, w), divmod(key, w)
                expected = offsets[:, y - row + h - 1, x - column + w - 1]
                torch.testing.assert_close(bias[:, 1 + query, 1 + key], expected)
        assert (bias[:, 0, 1:] == table[15, :, None]).all() and (bias[:, 1:, 0] == table[16, :, None]).all()
        assert torch.equal(bias[:, 0, 0], table[17])


def test_class_tokens_share_their_biases():
    attention = Attention(8, 2)
    attention.add_relative_position_bias((2, 3))
    nn.init.normal_(attention.relative_position_bias_table)
    one, three = attention.relative_position_bias((2, 3)), attention.relative_position_bias((2, 3), 3)
    places = [0, 0, 0, *range(1, 7)]
    assert torch.equal(three, one[:, places][:, :, places])
    model = randomize(new_encoder(**SMALL, **BEIT, num_cls_tokens=3))
    images = torch.randn(2, 3, 32, 32)
    last = model.norm(model.forward_layers(images, [3])[0].flatten(2).transpose(1, 2))
    torch.testing.assert_close(last, model(images)[:, 3:])


@pytest.mark.parametrize("change", [dict(), BEIT])
def test_layers_of_images_of_other_sizes(change):
    """The remainder beyond whole patches is cut off."""
    model = randomize(new_encoder(**SMALL, **change))
    images = torch.randn(2, 3, 43, 70)
    maps = model.forward_layers(images, [3, 0, 2])
    assert [tuple(one.shape) for one in maps] == 3 * [(2, 32, 5, 8)]
    cut = model.forward_layers(images[:, :, :40, :64], [2, 0])
    assert torch.equal(maps[2], cut[0]) and torch.equal(maps[1], cut[1])
    with pytest.raises(ValueError, match="an image of 43 x 7 pixels is smaller than a patch of 8"):
        model.forward_layers(images[..., :7], [0])


@pytest.mark.parametrize("change", [dict(), BEIT])
def test_layers_under_gradient_checkpointing_have_the_same_gradients(change):
    plain = new_encoder(**SMALL, **change, drop_path=0.5)
    saving = new_encoder(**SMALL, **change, drop_path=0.5, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images, kept = torch.randn(4, 3, 32, 48), []
    for model in (plain, saving):
        torch.manual_seed(0)
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            maps = model.forward_layers(images, [1, 3])
        sum(one.square().sum() for one in maps).backward()
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name
    assert plain.blocks[2].attn.qkv.weight.grad.any()
    assert kept[1] < 0.2 * kept[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(img_size=30), r"an image of \(30, 30\) pixels does not split into patches of 8"),
        (dict(img_size=(32, 36)), r"\(32, 36\) pixels"),
        (dict(num_heads=3), "3 heads do not divide a width of 32"),
        (dict(embed_dim=30), "a width of 30; .* a multiple of 4"),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**SMALL | change)
