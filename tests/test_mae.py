"""Tests of the autoencoder against transformers' ViTMAEForPreTraining, and of the pixels that it may see."""

import math

import pytest
import torch
from random_modules import build_autoencoder, new_encoder, randomize
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from data.batches import Normalization
from modeling.position import resize_positions
from modeling.targets import NormalizedPixels, Pixels
from modeling.vit import SIZES, VisionTransformer, patchify, unpatchify
from modeling.weights import load_weights

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


def transformers_model(size: dict, *, mask_ratio: float = 0.75) -> ViTMAEForPreTraining:
    """Return a model in which every parameter is random, including position tables, tokens, biases and norms."""
    config = ViTMAEConfig(
        hidden_size=size["embed_dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["embed_dim"],
        patch_size=size["patch_size"],
        layer_norm_eps=1e-6,
        mask_ratio=mask_ratio,
    )
    model = ViTMAEForPreTraining(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("name, batch, mask_ratio", [("tiny", 4, 0.75), ("tiny", 2, 0.6), ("base", 1, 0.75)])
def test_loss_prediction_and_mask_equal_transformers(name, batch, mask_ratio):
    theirs = transformers_model(SIZES[name], mask_ratio=mask_ratio)
    ours = build_autoencoder(VisionTransformer(**SIZES[name]), mask_ratio=mask_ratio).eval()
    load_weights(ours, theirs.state_dict())
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 224, 224, generator=generator)
    noise = torch.rand(batch, 196, generator=generator)
    for norm_pix_loss in (True, False):
        theirs.config.norm_pix_loss = norm_pix_loss
        ours.target = (NormalizedPixels if norm_pix_loss else Pixels)(ours.encoder)
        with torch.inference_mode():
            expected, output = theirs(images, noise=noise), ours(images, noise)
        assert torch.equal(output.mask, expected.mask)
        torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)


def test_images_of_another_size_equal_transformers():
    theirs = transformers_model(SIZES["tiny"])
    ours = build_autoencoder(VisionTransformer(**SIZES["tiny"])).eval()
    load_weights(ours, theirs.state_dict())
    images, noise, table = torch.randn(2, 3, 96, 96), torch.rand(2, 36), theirs.decoder.decoder_pos_embed.data
    # transformers resizes the decoder's positions as one row and not as an image, so give it a table of the new size
    patches = table[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, (6, 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    theirs.decoder.decoder_pos_embed.data = torch.cat([table[:, :1], patches], dim=1)
    theirs.config.norm_pix_loss = True
    with torch.inference_mode():
        expected = theirs(images, noise=noise, interpolate_pos_encoding=True)
        output = ours(images, noise)
    assert torch.equal(output.mask, expected.mask) and (output.mask == 0).sum() == 2 * 9
    torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(decoder="cross", target="hog", predict_ratio=0.5)])
def test_images_of_another_size_equal_those_of_a_model_of_that_size(options):
    """Loss, gradients and operations equal those of a model whose position tables have been resized."""
    large, small = (
        randomize(build_autoencoder(new_encoder(**SMALL | dict(img_size=size)), **DECODER | options))
        for size in (32, (24, 16))
    )
    tables = {
        name: resize_positions(table, (4, 4), (3, 2))
        for name, table in large.state_dict().items()
        if name.endswith("pos_embed")
    }
    small.load_state_dict(large.state_dict() | tables)
    images, noise = torch.rand(2, 3, 24, 16), torch.rand(2, 6)
    losses = [model(images, noise, loss_only=True) for model in (large, small)]
    assert len(tables) == 2 and torch.equal(*losses)
    for loss in losses:
        loss.backward()
    pairs = zip(large.parameters(), small.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs if one.requires_grad)
    assert large.training_flops((24, 16)) == small.training_flops() < large.training_flops()


def test_gradients_equal_transformers():
    size = SIZES["tiny"] | dict(depth=2)
    theirs = transformers_model(size)
    theirs.config.norm_pix_loss = True
    ours = build_autoencoder(VisionTransformer(**size))
    load_weights(ours, theirs.state_dict())
    images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, 196)
    ours(images, noise).loss.backward()
    theirs(images, noise=noise).loss.backward()
    pairs = [
        (ours.mask_token, theirs.decoder.mask_token),
        (ours.encoder.cls_token, theirs.vit.embeddings.cls_token),
        (ours.encoder.patch_embed.proj.weight, theirs.vit.embeddings.patch_embeddings.projection.weight),
        (ours.decoder.pred.weight, theirs.decoder.decoder_pred.weight),
    ]
    for mine, other in pairs:
        scale = other.grad.abs().max()
        torch.testing.assert_close(mine.grad / scale, other.grad / scale, rtol=0, atol=1e-5)
    assert ours.encoder.pos_embed.grad is None and ours.decoder.pos_embed.grad is None


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = build_autoencoder(VisionTransformer(**SMALL), **DECODER)
    return model, torch.randn(3, 3, 32, 32), torch.rand(3, 16)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_several_class_tokens_pass_through_encoder_and_decoder(kind):
    """The prediction equals that of a plain computation with all patches in image order."""
    encoder = new_encoder(**SMALL, num_cls_tokens=3)
    model = randomize(build_autoencoder(encoder, **DECODER, decoder=kind))
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    output, kept = model(images, noise), noise[0].argsort().argsort() < 4
    x = encoder.patch_embed(patchify(images, 8))[:, kept] + encoder.pos_embed[:, 3:][:, kept]
    x = torch.cat([encoder.cls_token + encoder.pos_embed[:, :3], x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    x, decoder, positions = encoder.norm(x), model.decoder, model.decoder.pos_embed
    patches = model.mask_token.repeat(1, 16, 1)
    if kind == "self":
        x = decoder.embed(x)
        patches[:, kept] = x[:, 3:]
        patches = torch.cat([x[:, :3], patches], dim=1) + positions
        for block in decoder.blocks:
            patches = block(patches)
        patches = patches[:, 3:]
    else:
        patches = patches + positions[:, 3:]
        for block in decoder.blocks:
            patches = block(patches, x)
    torch.testing.assert_close(output.prediction, decoder.pred(decoder.norm(patches)), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(images, noise, loss_only=True), output.loss)
    output.loss.backward()
    assert (encoder.cls_token.grad.norm(dim=2) > 0).all()


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.6, 0.9, 0.1])
def test_number_of_kept_patches(ratio):
    model = build_autoencoder(VisionTransformer(**SMALL), **DECODER, mask_ratio=ratio)
    mask = model(torch.randn(2, 3, 32, 32), torch.rand(2, 16)).mask
    assert (mask == 0).sum(dim=1).tolist() == [int(16 * (1 - ratio))] * 2


def test_prediction_does_not_see_removed_patches(small):
    model, images, noise = small
    output = model(images, noise)
    removed = model.pixel_mask(output.mask).bool()
    changed = model(torch.where(removed, torch.randn_like(images) * 100, images), noise)
    assert torch.equal(changed.prediction, output.prediction)
    assert changed.loss != output.loss
    brighter = model(torch.where(removed, images, images + 1), noise)  # visible patches do count
    assert not torch.equal(brighter.prediction, output.prediction)


@pytest.mark.parametrize("target", [NormalizedPixels, Pixels])
def test_loss_counts_removed_patches_only(small, target):
    model, images, noise = small
    model.target = target(model.encoder)
    loss, prediction, mask = model(images, noise)
    error = (prediction - model.target(patchify(images, 8))).square().mean(dim=-1)
    torch.testing.assert_close(loss, error[mask == 1].mean())
    assert not torch.isclose(loss, error.mean(), rtol=1e-4)


@pytest.mark.parametrize(("drop_path", "checkpointed"), [(0.0, False), (0.3, False), (0.3, True)])
def test_the_loss_alone_has_the_same_value_and_gradients(drop_path, checkpointed):
    encoder = new_encoder(**SMALL, drop_path=drop_path, gradient_checkpointing=checkpointed)
    model = build_autoencoder(encoder, **{**DECODER, "decoder_depth": 2})
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    results = []
    for loss_only in (False, True):
        torch.manual_seed(0)
        output = model(images, noise, loss_only=loss_only)
        loss = output if loss_only else output.loss
        model.zero_grad()
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    (whole, gradients), (part, own_gradients) = results
    torch.testing.assert_close(part, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(own_gradients, gradients, rtol=1e-5, atol=1e-7)


def test_patches_of_8_bit_images_are_normalized_as_the_images_are(small):
    model, images, noise = small
    normalize = Normalization([0.1, 0.5, 0.8], [0.2, 0.3, 0.4], torch.device("cpu"))
    for pixels in (torch.randint(0, 256, images.shape, dtype=torch.uint8), torch.rand_like(images)):
        expected = model(normalize(pixels), noise)
        output = model(pixels, noise, normalize=normalize.patches)
        assert all(torch.equal(one, other) for one, other in zip(output, expected, strict=True))


def test_targets_have_mean_0_and_unbiased_variance_1(small):
    model, images, _ = small
    target = model.target(patchify(images * 5 + 3, 8))
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(3, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=-1, correction=1), torch.ones(3, 16), rtol=0, atol=1e-4)
    faint = 1e-3 * patchify(images, 8).double()  # where the epsilon matters
    variance = (faint - faint.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) / 191
    expected = (faint - faint.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(model.target(faint).double(), expected, rtol=0, atol=1e-4)
    flat = torch.full((1, 16, 192), 0.7)
    assert model.target(flat).abs().max() < 1e-3  # a flat patch gives no NaN and nothing large


@pytest.mark.parametrize("target", [NormalizedPixels, Pixels])
def test_reconstructing_the_target_is_the_image(small, target):
    model, images, _ = small
    model.target = target(model.encoder)
    patches = patchify(images, 8)
    torch.testing.assert_close(model.reconstruct(images, model.target(patches)), images, rtol=0, atol=1e-5)


def test_pixel_mask_is_the_patches(small):
    model, _, _ = small
    mask = (torch.rand(2, 16) < 0.5).float()
    pixels = model.pixel_mask(mask)
    assert pixels.shape == (2, 1, 32, 32)
    assert torch.equal(pixels[:, 0], mask.reshape(2, 4, 4).repeat_interleave(8, 1).repeat_interleave(8, 2))


def test_images_that_are_not_square_with_four_channels():
    encoder = VisionTransformer(**SMALL | dict(img_size=(24, 64), in_channels=4))
    model = build_autoencoder(encoder, **DECODER)
    images = torch.randn(2, 4, 24, 64)
    output = model(images, torch.rand(2, 24))
    assert output.prediction.shape == (2, 24, 8 * 8 * 4) and output.mask.shape == (2, 24)
    assert model.reconstruct(images, output.prediction).shape == images.shape
    output.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing and output.loss.isfinite()


def test_loss_stays_in_float32_under_bfloat16(small):
    model, images, noise = small
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, noise)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(images, noise).loss, rtol=0.02, atol=0)
    output.loss.backward()


def test_initialization_of_the_decoder_is_the_papers():
    torch.manual_seed(0)
    model = build_autoencoder(VisionTransformer(**SMALL), decoder_embed_dim=256, decoder_depth=1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("encoder."):
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.99 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any() and module.eps == 1e-6, name
    tokens = torch.stack([build_autoencoder(VisionTransformer(**SMALL)).mask_token.detach() for _ in range(10)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05) and abs(tokens.mean()) < 0.002
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.pos_embed", "decoder.pos_embed"]
    plain = build_autoencoder(VisionTransformer(**SMALL), custom_weight_init=False)
    assert plain.decoder.blocks[0].mlp.fc1.bias.any() and plain.decoder.pred.bias.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mask_ratio=0.0), "keeps 16 of 16 patches"),
        (dict(mask_ratio=1.0), "keeps 0 of 16 patches"),
        (dict(mask_ratio=0.95), "keeps 0 of 16 patches"),
        (dict(decoder_depth=0), "decoder of 0 blocks"),
        (dict(decoder_num_heads=3), "3 heads do not divide a decoder width of 16"),
        (dict(decoder_embed_dim=18), "a width of 18; .* a multiple of 4"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_autoencoder(VisionTransformer(**SMALL), **DECODER | change)


def test_flops_of_a_step_by_hand():
    model = build_autoencoder(new_encoder(**SIZES["base"], gradient_checkpointing=True))
    random = torch.get_rng_state()
    blocks = 12 * (50 * 12 * 768**2 + 2 * 50**2 * 768)
    decoder = 7 * (197 * 12 * 512**2 + 2 * 197**2 * 512) + 512**2 * (3 * 197 + 9 * 147) + 2 * 197 * 147 * 512
    forward = 49 * 768**2 + blocks + 50 * 768 * 512 + decoder + 147 * 512 * 768
    assert model.training_flops() == 6 * forward - 2 * 49 * 768**2  # images have no gradient
    assert torch.equal(torch.get_rng_state(), random)


def autoencoder(target, **options):
    torch.manual_seed(0)
    model = build_autoencoder(VisionTransformer(**SMALL), **DECODER, **options)
    model.target = target(model.encoder)
    return model


def with_holes(model, count=6, seed=0):
    """Return images, noise and valid pixels: a third of the patches have no valid pixel and a third have some."""
    generator = torch.Generator().manual_seed(seed)
    side, grid = model.encoder.patch_size, model.encoder.grid
    images = torch.randn(count, 3, *model.encoder.img_size, generator=generator)
    share = torch.randint(3, (count, grid[0] * grid[1]), generator=generator) / 2  # share of valid pixels
    valid = torch.rand(count, len(share[0]), side * side, generator=generator) < share[..., None]
    noise = torch.rand(share.shape, generator=generator) + 2 * ~valid.any(dim=2)
    assert (noise < 2).sum(dim=1).min() > model.num_kept
    return images, noise, unpatchify(valid.float(), side, grid).bool()


@pytest.mark.parametrize("target", [NormalizedPixels, Pixels])
def test_the_loss_of_valid_pixels_equals_loops(target):
    small = autoencoder(target)
    images, noise, valid = with_holes(small)
    output, total = small(images, noise, valid=valid), 0.0
    patches, valid_patches = patchify(images, 8).double(), patchify(valid, 8)
    for b in range(len(images)):
        squares = []
        for i in range(len(noise[0])):
            chosen = valid_patches[b, i]
            pixels, guess = patches[b, i].view(-1, 3)[chosen], output.prediction[b, i].view(-1, 3)[chosen]
            if output.mask[b, i] and len(pixels):
                if target is NormalizedPixels:
                    pixels = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
                squares.append((guess - pixels).square().flatten())
        total = total + torch.cat(squares).mean() / len(images)
    torch.testing.assert_close(output.loss.double(), total, rtol=1e-6, atol=0)
    expected = torch.autograd.grad(total, small.decoder.pred.weight, retain_graph=True)[0]
    own = torch.autograd.grad(small(images, noise, valid=valid, loss_only=True), small.decoder.pred.weight)[0]
    torch.testing.assert_close(own, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", [NormalizedPixels, Pixels])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_patches_without_a_valid_pixel_change_nothing(target, kind):
    model = autoencoder(target, decoder=kind)
    images, noise, valid = with_holes(model)
    hidden = ~patchify(valid, 8).any(dim=2)
    patches = patchify(images, 8)
    other = unpatchify(torch.where(hidden[..., None], 100 * torch.randn(patches.shape), patches), 8, model.encoder.grid)
    results = []
    for pixels in (images, other):
        model.zero_grad()
        loss = model(pixels, noise, valid=valid, loss_only=True)
        loss.backward()
        full = model(pixels, noise, valid=valid)
        assert not (hidden & ~full.mask.bool()).any()  # no patch without data is visible
        results.append([loss, full.prediction, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True)) and results[0][-1].any()


def test_an_image_with_no_valid_target_has_no_loss():
    small = autoencoder(NormalizedPixels)
    images, noise, valid = with_holes(small, 3)
    valid[1] = False
    loss = small(images, noise, valid=valid, loss_only=True)
    alone = small(images[[0, 2]], noise[[0, 2]], valid=valid[[0, 2]], loss_only=True)
    torch.testing.assert_close(loss, alone * 2 / 3)


def test_valid_pixels_everywhere_are_all_pixels():
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    valid = torch.ones(4, 1, 32, 32, dtype=torch.bool)
    for target in (NormalizedPixels, Pixels):
        small = autoencoder(target)
        torch.testing.assert_close(small(images, noise, valid=valid).loss, small(images, noise).loss)


def test_reconstructions_use_the_statistics_of_valid_pixels():
    small = autoencoder(NormalizedPixels)
    images, _, valid = with_holes(small)
    patches, valid_patches = patchify(images, 8), patchify(valid, 8)
    target = small.target(patches, valid_patches)
    again = small.reconstruct(images, target, valid)
    torch.testing.assert_close(again.where(valid, 0), images.where(valid, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_a_share_of_the_removed_patches_is_one_of_those_with_data(kind):
    model = autoencoder(NormalizedPixels, decoder=kind, predict_ratio=0.25)  # 3 of 12 removed patches
    images, noise, valid = with_holes(model, 20)
    holds_data = patchify(valid, 8).any(dim=2)
    order = noise.argsort(dim=1)
    chosen = model.leave_out(order, holds_data)[:, model.num_kept :]
    assert chosen.shape == (20, 3) and all(len({*row}) == 3 for row in chosen.tolist())
    removed = order[:, model.num_kept :]
    counts = holds_data.gather(1, removed).sum(dim=1)
    predicted = holds_data.gather(1, chosen).sum(dim=1)
    assert torch.equal(predicted, counts.clamp(max=3)) and counts.max() > 3
    assert model(images, noise, valid=valid, loss_only=True).isfinite()


@torch.no_grad()
def test_statistics_of_kept_patches_leak_nothing_of_the_removed(small):
    model, images, noise = small
    _, prediction, mask = model(images, noise)
    changed = torch.where(model.pixel_mask(mask).bool(), torch.rand_like(images), images)
    ours = model.reconstruct(images, prediction, mask=mask)
    assert torch.equal(model.reconstruct(changed, prediction, mask=mask), ours)
    patches, expected = patchify(images, 8), torch.empty(3, 16, 192)
    for image in range(3):
        kept = [patch for patch in range(16) if not mask[image, patch]]
        for patch in range(16):
            near = [1 / max(1e-6, (patch // 4 - k // 4) ** 2 + (patch % 4 - k % 4) ** 2) for k in kept]
            mean, variance = (
                sum(w * value for w, value in zip(near, values, strict=True)) / sum(near)
                for values in ([patches[image, k].mean() for k in kept], [patches[image, k].var() for k in kept])
            )
            expected[image, patch] = prediction[image, patch] * (variance + 1e-6).sqrt() + mean
    torch.testing.assert_close(ours, unpatchify(expected, 8, (4, 4)), rtol=1e-4, atol=1e-5)
    visible = unpatchify((1 - mask)[..., None].expand(-1, -1, 192), 8, (4, 4)).bool()
    torch.testing.assert_close(ours[visible], model.reconstruct(images, prediction)[visible], rtol=1e-3, atol=1e-4)
