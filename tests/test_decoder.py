"""Tests of the cross-attention decoder against torch's attention, and of predicting a share of the masked patches."""

import numpy as np
import pytest
import torch
from random_modules import build_autoencoder, new_encoder, randomize
from torch import nn
from torch.nn import functional as F

from data.masking import MASK_STRATEGIES, mask_noise
from modeling.decoder import CrossBlock, CrossDecoder
from modeling.export import export_autoencoder
from modeling.files import WeightsError
from modeling.trained import open_trained
from modeling.vit import take
from modeling.weights import load_weights

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
SIZES = dict(decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2)
CROSS = dict(decoder="cross", **SIZES)
KINDS = {"last": CROSS, "weighted": CROSS | dict(decoder_inputs="weighted"), "self": SIZES}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(3, 16, generator=torch.Generator().manual_seed(2))


class TorchBlock(nn.Module):
    """A CrossBlock with `nn.MultiheadAttention`: attention parameters are copied, norms and MLP are shared."""

    def __init__(self, block: CrossBlock):
        super().__init__()
        dim, encoder_dim = block.attn.q.in_features, block.attn.kv.in_features
        heads = block.attn.num_heads
        self.attention = nn.MultiheadAttention(dim, heads, kdim=encoder_dim, vdim=encoder_dim, batch_first=True)
        (key, value), (key_bias, value_bias) = block.attn.kv.weight.chunk(2), block.attn.kv.bias.chunk(2)
        parameters = dict(q_proj_weight=block.attn.q.weight, k_proj_weight=key, v_proj_weight=value)
        parameters["in_proj_bias"] = torch.cat([block.attn.q.bias, key_bias, value_bias])
        parameters |= {"out_proj.weight": block.attn.proj.weight, "out_proj.bias": block.attn.proj.bias}
        self.attention.load_state_dict({name: value.detach() for name, value in parameters.items()})
        self.own = block

    def forward(self, x, tokens):
        queries = self.own.norm1(x)
        x = x + self.attention(queries, tokens, tokens, need_weights=False)[0]
        return x + self.own.mlp.fc2(F.gelu(self.own.mlp.fc1(self.own.norm2(x))))


def plain_loss(model, images, noise, share=1.0):
    """Return the loss of a model, computed layer by layer and with TorchBlocks in the decoder."""
    encoder, decoder = model.encoder, model.decoder
    side, (h, w) = encoder.patch_size, encoder.grid
    patches = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 4, 5, 1)
    patches = patches.reshape(len(images), h * w, -1)
    order = noise.argsort(dim=1, stable=True)
    kept, removed = order[:, : model.num_kept], order[:, model.num_kept :]
    count = round(share * removed.shape[1])
    removed = removed[:, [i * removed.shape[1] // count for i in range(count)]]
    x = encoder.embed(take(patches, kept), kept)
    layers = [x]
    for block in encoder.blocks:
        x = block(x)
        layers.append(x)
    layers[-1] = encoder.norm(x)
    x = torch.stack([model.mask_token[0, 0] + decoder.pos_embed[0, 1 + row] for row in removed])
    for j, block in enumerate(decoder.blocks):
        tokens = layers[-1]
        if decoder.reads_layers:
            tokens = sum(weight * layer for weight, layer in zip(decoder.layer_weights[j], layers, strict=True))
            tokens = decoder.input_norms[j](tokens)
        x = TorchBlock(block)(x, tokens)
    target = take(patches, removed)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (decoder.pred(decoder.norm(x)) - target).square().mean()


@pytest.mark.parametrize("kind, ratio", [("last", 1.0), ("last", 1 / 3), ("weighted", 1 / 3)])
def test_loss_and_gradients_equal_torchs_attention(kind, ratio):
    model = randomize(build_autoencoder(new_encoder(**SMALL), **KINDS[kind], predict_ratio=ratio))
    loss = model(IMAGES, NOISE, loss_only=True)
    expected = plain_loss(model, IMAGES, NOISE, ratio)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    # TorchBlock's copied attention parameters pass no gradient on to the model, so compare shared parameters
    names = ["mask_token", "encoder.cls_token", "decoder.blocks.1.mlp.fc1.weight", "encoder.blocks.0.attn.qkv.weight"]
    names += ["encoder.norm.weight"] + ["decoder.layer_weights", "decoder.input_norms.0.weight"] * (kind == "weighted")
    parameters = [dict(model.named_parameters())[name] for name in names]
    gradients = [torch.autograd.grad(value, parameters) for value in (loss, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        scale = theirs.abs().max()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def test_gradients_of_cross_attention_equal_torchs():
    block = randomize(CrossBlock(16, 32, 2, 4.0))
    theirs, x, tokens = TorchBlock(block), torch.randn(2, 5, 16), torch.randn(2, 7, 32)
    block(x, tokens).square().sum().backward()
    theirs(x, tokens).square().sum().backward()
    attention, own = theirs.attention, block.attn
    key, value = own.kv.weight.grad.chunk(2)
    pairs = [(own.q.weight.grad, attention.q_proj_weight.grad), (own.proj.bias.grad, attention.out_proj.bias.grad)]
    pairs += [(key, attention.k_proj_weight.grad), (value, attention.v_proj_weight.grad)]
    for ours, other in pairs:
        torch.testing.assert_close(ours / other.abs().max(), other / other.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["last", "weighted"])
def test_a_prediction_depends_on_no_other_mask_token(kind):
    """The prediction for a patch is the same, however many patches are predicted with it."""
    model = randomize(build_autoencoder(new_encoder(**SMALL), **KINDS[kind]))
    order = NOISE.argsort(dim=1, stable=True)
    kept = order[:, :4]
    tokens = model.encoder.embed(take(torch.randn(3, 16, 192), kept), kept)
    tokens = model.encoder.encode_layers(tokens) if kind == "weighted" else model.encoder.encode(tokens)
    whole = model.decoder(tokens, order, model.mask_token)
    assert whole.shape == (3, 16, 192)  # kept patches have a prediction too
    alone = model.decoder(tokens, order[:, [0, 1, 2, 3, 9]], model.mask_token, 1)
    torch.testing.assert_close(alone, whole[:, 9:10], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_all_patches_are_predicted_unless_the_loss_alone_is_computed(kind):
    share = build_autoencoder(new_encoder(**SMALL), **KINDS[kind], predict_ratio=0.25)
    assert (share.num_kept, share.num_predicted) == (4, 3)
    whole = build_autoencoder(new_encoder(**SMALL), **KINDS[kind])
    whole.load_state_dict(share.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(share(IMAGES, NOISE), whole(IMAGES, NOISE), strict=True))
    torch.testing.assert_close(whole(IMAGES, NOISE, loss_only=True), whole(IMAGES, NOISE).loss)
    assert not torch.isclose(share(IMAGES, NOISE, loss_only=True), whole(IMAGES, NOISE, loss_only=True), rtol=1e-4)


@pytest.mark.parametrize("strategy, block", [*((name, 1) for name in MASK_STRATEGIES), ("random", 2)])
def test_every_removed_patch_is_predicted_equally_often(strategy, block):
    model = build_autoencoder(new_encoder(**SMALL | dict(img_size=64)), **CROSS, predict_ratio=1 / 3)
    assert (model.num_kept, model.num_predicted) == (16, 16)
    rng, removed, predicted = np.random.default_rng(0), np.zeros(64), np.zeros(64)
    for _ in range(3000):
        order = torch.from_numpy(mask_noise(strategy, rng, (8, 8), 16, block=block)).argsort(stable=True)
        chosen = model.leave_out(order[None])[0]
        assert torch.equal(chosen[:16], order[:16]) and len(set(chosen.tolist())) == 32
        assert set(chosen[16:].tolist()) < set(order[16:].tolist())
        removed[order[16:]] += 1
        predicted[chosen[16:]] += 1
    shares = (predicted / np.maximum(removed, 1))[removed > 0]
    assert abs(shares - 1 / 3).max() < 0.06


@pytest.mark.parametrize("kind", ["last", "weighted"])
def test_checkpointing_and_compiling_change_nothing(kind):
    results = []
    for checkpointed, compiled in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        encoder = new_encoder(**SMALL, gradient_checkpointing=checkpointed)
        model = randomize(build_autoencoder(encoder, **KINDS[kind], predict_ratio=0.5)).train()
        if compiled:
            model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        loss = model(IMAGES, NOISE, loss_only=True)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(gradient is not None for gradient in results[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_sums_of_layers_are_initialized_as_in_the_paper():
    decoder = CrossDecoder(
        new_encoder(**SMALL | dict(depth=16)), embed_dim=16, num_heads=2, depth=200, inputs="weighted"
    )
    assert decoder.layer_weights.shape == (200, 17) and len(decoder.input_norms) == 200
    assert decoder.layer_weights.std().item() == pytest.approx(17**-0.5, rel=0.05)
    assert CrossDecoder(new_encoder(**SMALL)).depth == 12


@pytest.mark.parametrize("kind", ["last", "weighted"])
def test_an_exported_autoencoder_comes_back(kind, tmp_path):
    model = randomize(build_autoencoder(new_encoder(**SMALL), **KINDS[kind], mask_ratio=0.5))
    export_autoencoder(model, tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    again = open_trained(tmp_path).model
    assert isinstance(again.decoder, CrossDecoder) and again.decoder.num_heads == 2 and again.num_kept == 8
    assert all(torch.equal(a, b) for a, b in zip(again(IMAGES, NOISE), model(IMAGES, NOISE), strict=True))
    assert load_weights(new_encoder(**SMALL), again.state_dict()).loaded == 42  # the encoder alone


def test_weights_of_another_decoder_are_refused():
    state = build_autoencoder(new_encoder(**SMALL), **CROSS).state_dict()
    with pytest.raises(WeightsError, match=r"decoder is cross instead of self .*alone fits.; set decoder=cross"):
        load_weights(build_autoencoder(new_encoder(**SMALL), **SIZES), state)
    with pytest.raises(WeightsError, match="decoder_inputs is last instead of weighted"):
        load_weights(build_autoencoder(new_encoder(**SMALL), **KINDS["weighted"]), state)


def test_a_ratio_that_predicts_nothing_is_refused():
    with pytest.raises(ValueError, match=r"a ratio of 0.04 predicts none of 12 patches"):
        build_autoencoder(new_encoder(**SMALL), **CROSS, predict_ratio=0.04)
