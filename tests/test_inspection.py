"""Tests of attention, features, colours and masks of modeling/inspection.py against timm, transformers and NumPy."""

import math

import numpy as np
import pytest
import timm
import torch
from random_modules import build_autoencoder, new_encoder, randomize
from transformers import PixioConfig, PixioModel, ViTConfig, ViTModel

from modeling.inspection import (
    attention_maps,
    complementary_noise,
    feature_colours,
    fill,
    keep_patches,
    patch_features,
    similarities,
)
from modeling.mae import MaskedAutoencoder
from modeling.vit import VisionTransformer, patchify
from modeling.weights import load_weights

SMALL = dict(img_size=(16, 40), patch_size=8, embed_dim=32, depth=2, num_heads=4)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def images_of(encoder, count=2) -> torch.Tensor:
    return torch.randn(count, encoder.in_channels, *encoder.img_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> MaskedAutoencoder:
    return randomize(build_autoencoder(VisionTransformer(**SMALL), **DECODER))


# Features and attention


@pytest.mark.parametrize("num_cls_tokens", [1, 3])
def test_attention_and_features_equal_transformers(num_cls_tokens):
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    if num_cls_tokens == 1:
        theirs = ViTModel(ViTConfig(**sizes, intermediate_size=128, layer_norm_eps=1e-6), add_pooling_layer=False)
    else:
        theirs = PixioModel(PixioConfig(**sizes, n_cls_tokens=num_cls_tokens))
    theirs.set_attn_implementation("eager")
    randomize(theirs)
    ours = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_cls_tokens=num_cls_tokens
    )
    load_weights(ours, theirs.state_dict())
    images = images_of(ours.eval())
    with torch.no_grad():
        expected = theirs(images, output_attentions=True)
    maps, n = attention_maps(ours, images), num_cls_tokens
    assert maps.shape == (2, 4, 16) and not maps.requires_grad and maps.std() > 1e-3
    torch.testing.assert_close(maps, expected.attentions[-1][:, :, :n, n:].mean(dim=2), rtol=0, atol=1e-5)
    features = patch_features(ours, images)
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, expected.last_hidden_state[:, n:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("img_size", [(16, 40), (24, 24)])
def test_attention_with_a_relative_position_bias_equals_timm(img_size):
    """For images of another size than the encoder's, positions and biases are resized."""
    args = SMALL | dict(img_size=img_size)
    options = dict(use_abs_pos_emb=True, use_rel_pos_bias=True, init_values=0.1, global_pool="token")
    theirs = randomize(timm.create_model("beit_base_patch16_224", **args, **options), std=0.3)
    ours = new_encoder(**args, relative_position_bias=True, layer_scale=0.1).eval()
    state = theirs.state_dict()
    for k in range(2):
        q, v = state[f"blocks.{k}.attn.q_bias"], state[f"blocks.{k}.attn.v_bias"]
        state[f"blocks.{k}.attn.qkv.bias"] = torch.cat([q, torch.zeros(32), v])
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    seen, images = [], images_of(ours)
    attention = theirs.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        theirs(images)
    torch.testing.assert_close(attention_maps(ours, images), seen[0][:, :, 0, 1:], rtol=0, atol=1e-5)
    assert attention_maps(ours, torch.randn(1, 3, 32, 24)).shape == (1, 4, 12)


def test_looking_changes_nothing(model):
    encoder, images = model.encoder, images_of(model.encoder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(0)
    attention_maps(encoder, images), patch_features(encoder, images)
    fill(keep_patches(model, 3), images, torch.rand(2, 10))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == settings
    assert all(parameter.grad is None for parameter in model.parameters())


# Colours and similarities


def test_colours_equal_the_components_of_numpy():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 40, 8)) @ np.diag([9, 5, 3, 1, 1, 1, 1, 1]) @ rng.normal(size=(8, 8)) + 4
    rows = features.reshape(-1, 8)
    _, _, components = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    signs = np.sign([row[np.abs(row).argmax()] for row in components[:3]])
    values = (rows - rows.mean(axis=0)) @ components[:3].T * signs
    ordered = np.sort(values, axis=0)
    low, high = ordered[round(0.02 * 119)], ordered[round(0.98 * 119)]
    expected = np.clip((values - low) / (high - low), 0, 1).reshape(3, 40, 3)
    colours = feature_colours(torch.from_numpy(features).float())
    assert colours.dtype == torch.float32
    np.testing.assert_allclose(colours, expected, rtol=0, atol=1e-4)
    assert colours.min() == 0 and colours.max() == 1
    own = feature_colours(torch.from_numpy(features[:1]).float())
    assert (own - colours[:1]).abs().max() > 0.05  # the colours depend on all images


def test_colours_of_features_without_variance_are_grey():
    constant = torch.full((2, 5, 8), 0.1)
    assert (feature_colours(constant) == 0.5).all()
    assert (feature_colours(constant[:1, :1]) == 0.5).all()
    line = constant + torch.linspace(0, 1, 10).reshape(2, 5, 1)  # varies in one direction
    colours = feature_colours(line)
    assert (colours[..., 1:] == 0.5).all() and (colours[..., 0].flatten().diff() > 0).all()


def test_similarities_by_hand():
    features = torch.randn(2, 6, 8)
    result, patch = similarities(features, 1, 4), features[1, 4]
    assert result.shape == (2, 6) and result[1, 4] == pytest.approx(1)
    for image in range(2):
        for i in range(6):
            other = features[image, i]
            assert result[image, i].item() == pytest.approx(
                (other @ patch / other.norm() / patch.norm()).item(), abs=1e-6
            )


# Masks


@pytest.mark.parametrize("num_patches", [2, 9, 196, 197])
def test_every_number_of_patches_can_be_kept(num_patches):
    encoder = VisionTransformer(img_size=(1, num_patches), patch_size=1, embed_dim=4, depth=1, num_heads=1)
    model = build_autoencoder(encoder, decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1, mask_ratio=0.5)
    for num_kept in range(1, num_patches):
        assert keep_patches(model, num_kept).num_kept == num_kept
    assert model.mask_ratio == 0.5
    for num_kept in (0, num_patches):
        with pytest.raises(ValueError, match=f"{num_kept} of {num_patches} patches would be visible"):
            keep_patches(model, num_kept)


def test_ones_own_mask_is_noise(model):
    removed = torch.zeros(2, 10)
    removed[0, [0, 3, 9]] = 1
    removed[1, [5, 6, 7]] = 1
    assert torch.equal(keep_patches(model, 7)(images_of(model.encoder), removed).mask, removed)


@pytest.mark.parametrize("num_kept", range(1, 10))
def test_complementary_masks_remove_every_patch(num_kept, model):
    noise = torch.rand(3, 10, generator=torch.Generator().manual_seed(num_kept))
    noises, images = complementary_noise(noise, num_kept), images_of(model.encoder, 3)
    model = keep_patches(model, num_kept)
    masks = torch.stack([model(images, each).mask for each in noises])
    assert (masks.sum(dim=2) == 10 - num_kept).all() and masks.any(dim=0).all()
    assert len(masks) == math.ceil(10 / (10 - num_kept))  # the fewest possible
    assert torch.equal(masks[0], model(images, noise).mask)


@pytest.mark.parametrize("true_statistics", [True, False])
@pytest.mark.parametrize("num_kept", [1, 2, 7])
@torch.no_grad()
def test_filled_patches_are_predicted_while_they_are_hidden(num_kept, true_statistics, model):
    """The result equals loops over masks and patches. A patch's own pixels change at most its statistics."""
    model, images = keep_patches(model, num_kept), images_of(model.encoder)
    noise, options = (
        torch.rand(2, 10, generator=torch.Generator().manual_seed(3)),
        dict(true_statistics=true_statistics),
    )
    filled = patchify(fill(model, images, noise, **options), 8)
    patches, places = patchify(images, 8), torch.cartesian_prod(torch.arange(2), torch.arange(5)).float()
    outputs = [model(images, each) for each in complementary_noise(noise, num_kept)]
    for image in range(2):
        for patch in range(10):
            own = []
            for output in (output for output in outputs if output.mask[image, patch]):
                near = 1 / (places - places[patch]).square().sum(dim=1) * (output.mask[image] == 0)
                near = torch.eye(10)[patch] if true_statistics else near.nan_to_num(0) / near.nan_to_num(0).sum()
                mean, deviation = near @ patches[image].mean(dim=1), (near @ patches[image].var(dim=1) + 1e-6).sqrt()
                own.append(output.prediction[image, patch] * deviation + mean)
            torch.testing.assert_close(filled[image, patch], torch.stack(own).mean(dim=0), rtol=1e-4, atol=1e-5)
    changed = images.clone()
    changed[:, :, 8:, 16:24] += torch.randn(8, 8, generator=torch.Generator().manual_seed(4))  # patch 7
    other = patchify(fill(model, changed, noise, **options), 8)
    assert torch.equal(other[:, 7], filled[:, 7]) != true_statistics and not torch.equal(other[:, :7], filled[:, :7])
    changed = images.clone()
    changed[:, :, 8:, 16:24] += 1  # changes only the mean of patch 7
    other = patchify(fill(model, changed, noise, **options), 8)
    torch.testing.assert_close(other[:, 7] - filled[:, 7], torch.full((2, 192), float(true_statistics)))
