"""Tests of the classifier: its logits equal timm's, and every mode trains the right parameters."""

import math

import pytest
import timm
import torch
from random_modules import new_encoder, randomize
from torch import nn

from modeling.classifier import Classifier
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
POOLINGS = {"mean": "avg", "cls": "token"}  # ours: timm's
BLOCK = [
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
]


def new_classifier(pooling: str = "mean", *, num_classes: int = 5, encoder: dict | None = None, **change) -> Classifier:
    return Classifier(new_encoder(**SMALL | (encoder or {})), num_classes, pooling=pooling, **change)


def base(pooling: str = "mean", **change) -> Classifier:
    """Return a classifier of ViT-B without weights (on the meta device)."""
    with torch.device("meta"):
        return Classifier(VisionTransformer(**SIZES["base"]), 1000, pooling=pooling, **change)


# Logits


@torch.inference_mode()
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("size", [dict(), dict(img_size=(16, 64), in_channels=4)])
def test_logits_equal_timms(pooling, size):
    torch.manual_seed(0)
    ours = new_classifier(pooling, encoder=size).eval()
    named = {"in_chans" if key == "in_channels" else key: value for key, value in (SMALL | size).items()}
    args = dict(num_classes=5, global_pool=POOLINGS[pooling], **named)
    theirs = randomize(timm.create_model("vit_base_patch16_224", **args))
    report = load_weights(ours, theirs.state_dict())
    assert report.loaded == len(theirs.state_dict()) and report.ignored == report.missing == ()
    images = torch.randn(3, ours.encoder.in_channels, *ours.encoder.img_size)
    expected = theirs(images)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)


def test_mean_pooling_leaves_the_cls_token_out():
    model = randomize(new_classifier())
    tokens = torch.randn(2, 17, 32)
    model.encoder.forward = lambda images: tokens
    before = model(torch.empty(0))
    tokens[:, 0] += 1
    assert torch.equal(model(torch.empty(0)), before)


@torch.inference_mode()
@pytest.mark.parametrize("pooling", [*POOLINGS, "attentive"])
def test_pooling_with_several_class_tokens(pooling):
    """The cls head uses the mean of the class tokens, other heads none; cached features give the same logits."""
    model = randomize(new_classifier(pooling, encoder=dict(num_cls_tokens=3), num_queries=4))
    images = torch.randn(2, 3, 32, 32)
    tokens = model.encoder(images)
    expected = {
        "mean": lambda: model.fc_norm(tokens[:, 3:].mean(dim=1)),
        "cls": lambda: (tokens[:, 0] + tokens[:, 1] + tokens[:, 2]) / 3,
        "attentive": lambda: model.attentive_pool(tokens[:, 3:]),
    }[pooling]()
    torch.testing.assert_close(model.pool(tokens), expected)
    torch.testing.assert_close(model(model.encode_for_head(images)), model(images))
    if pooling == "attentive":
        assert model.attention_maps(tokens).shape == (2, 4, 4, 4)


def test_the_batch_norm_of_a_linear_probe():
    model = randomize(new_classifier("cls", probe=True)).train()
    images = torch.randn(64, 3, 32, 32)
    with torch.inference_mode():
        features = model.encoder(images)[:, 0].double()
        logits = model(images)
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    expected = nn.functional.linear((features - mean) / (variance + 1e-6).sqrt(), model.head.weight.double())
    torch.testing.assert_close(logits.double(), expected + model.head.bias.double(), rtol=0, atol=1e-4)
    assert not list(model.head_norm.parameters())


def test_attentive_pooling_is_a_loop_over_queries():
    """Attentive pooling has D * D + Q * D parameters, as published."""
    model = randomize(new_classifier("attentive", probe=True, num_queries=4))
    pool, tokens = model.attentive_pool, torch.randn(3, 16, 32)
    parts, share = [], 32 // 4
    for number, query in enumerate(pool.queries[0]):
        weights = torch.softmax(tokens @ query / 32**0.5, dim=1)  # (B, L)
        values = tokens @ pool.value.weight[number * share : (number + 1) * share].T
        parts.append((weights[:, :, None] * values).sum(dim=1))
    torch.testing.assert_close(pool(tokens), torch.cat(parts, dim=1), rtol=0, atol=1e-5)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == 32 * 32 + 4 * 32 + 5 * 32 + 5
    images = torch.randn(2, 3, 32, 32)
    tokens = model.encoder(images)
    torch.testing.assert_close(model.pool(tokens), pool(tokens[:, 1:]))
    assert model.attention_maps(tokens).shape == (2, 4, *model.encoder.grid)
    torch.testing.assert_close(model.attention_maps(tokens).sum(dim=(2, 3)), torch.ones(2, 4))
    with pytest.raises(ValueError, match="5 queries do not divide a width of 32"):
        new_classifier("attentive", num_queries=5)


@pytest.mark.parametrize("probe", [False, True])
def test_the_encoder_of_a_probe_is_never_in_training_mode(probe):
    model = new_classifier(probe=probe).train()
    assert model.training and model.head_norm.training and model.encoder.training is not probe
    assert not model.eval().head_norm.training


# Trained parameters


def blocks(first: int, last: int = 11) -> set[str]:
    return {f"encoder.blocks.{k}.{name}" for k in range(first, last + 1) for name in BLOCK}


HEAD = {"head.weight", "head.bias"}
NORM = {"mean": {"fc_norm.weight", "fc_norm.bias"}, "cls": {"encoder.norm.weight", "encoder.norm.bias"}}
EMBEDDINGS = {
    "encoder.cls_token",
    "encoder.pos_embed",
    "encoder.patch_embed.proj.weight",
    "encoder.patch_embed.proj.bias",
}
LAST_MLP = {f"encoder.blocks.11.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("everything", EMBEDDINGS | blocks(0) | HEAD),
        ("linear probe", HEAD),
        (0, HEAD),
        (0.5, LAST_MLP | HEAD),
        (1, blocks(11) | HEAD),
        (4, blocks(8) | HEAD),
        (4.0, blocks(8) | HEAD),
        (12, blocks(0) | HEAD),
    ],
)
def test_what_trains_in_every_mode(pooling, mode, expected):
    model = base(pooling, probe=mode == "linear probe")
    every = EMBEDDINGS | blocks(0) | HEAD | NORM[pooling]
    assert {name for name, _ in model.named_parameters()} == every and len(every) == 4 + 12 * 12 + 2 + 2
    if not isinstance(mode, str):
        model.train_last_blocks(mode)
    expected = expected if mode == "linear probe" else expected | NORM[pooling]
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected


@pytest.mark.parametrize("mode", ["everything", "linear probe", 0, 0.5, 1, 2])
def test_gradients_reach_what_trains_and_nothing_else(mode):
    model = randomize(new_classifier(probe=mode == "linear probe")).train()
    if not isinstance(mode, str):
        model.train_last_blocks(mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({f"head_norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")} & {*before})


# Initialization and errors


@pytest.mark.parametrize(("probe", "std"), [(False, 2e-5), (True, 0.01)])
def test_initialization_of_the_head(probe, std):
    torch.manual_seed(0)
    model = new_classifier("cls", num_classes=1000, probe=probe)
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.02) and not model.head.bias.any()
    plain = new_classifier(num_classes=1000, probe=probe, custom_weight_init=False)
    bound = 1 / math.sqrt(32)
    assert 0.99 * bound < plain.head.weight.abs().max() <= bound and plain.head.bias.any()


@pytest.mark.parametrize("n", [4, -1, 1.5, 0.25, -0.5, math.nan, math.inf])
def test_blocks_that_are_not_there(n):
    model = new_classifier()
    with pytest.raises(ValueError, match=r"the last .* of 3 blocks; expected 0, 0\.5 or a whole number up to 3"):
        model.train_last_blocks(n)
    assert all(parameter.requires_grad for parameter in model.parameters())


# Costs


def in_mode(mode, **change) -> Classifier:
    """Return a small classifier that trains "everything", a "linear probe", or the last `mode` blocks."""
    size = SIZES["tiny"] | dict(img_size=112, depth=4)
    model = Classifier(new_encoder(**size, **change), 10, probe=mode == "linear probe")
    if not isinstance(mode, str):
        model.train_last_blocks(mode)
    return model


def test_flops_by_hand():
    block, patches, head = 197 * 12 * 768**2 + 2 * 197**2 * 768, 196 * 768 * 768, 768 * 1000
    assert base().training_flops() == 6 * (patches + 12 * block + head) - 2 * patches  # images have no gradient
    model = base()
    model.train_last_blocks(4)
    assert model.training_flops() == 2 * patches + 2 * 8 * block + 6 * (4 * block + head)
    model.train_last_blocks(0.5)
    mlp = 197 * 8 * 768**2
    assert model.training_flops() == 2 * (patches + 12 * block - mlp) + 6 * (mlp + head) - mlp
    assert base(probe=True).training_flops() == 2 * (patches + 12 * block) + 4 * head


@pytest.mark.parametrize("mode", ["everything", 2, 0])
def test_gradient_checkpointing_changes_no_gradient(mode):
    plain, saving = in_mode(mode), in_mode(mode, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 112, 112)
    for model in (plain, saving):
        model(images).square().sum().backward()
    for one, other in zip(plain.parameters(), saving.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("pooling", ["mean", "cls", "attentive"])
def test_heads_see_the_same_of_images_and_of_what_was_encoded_for_them(pooling):
    model = randomize(new_classifier(pooling, probe=True, num_queries=4)).eval()
    images = torch.randn(3, 3, 32, 32)
    encoded = model.encode_for_head(images)
    torch.testing.assert_close(model(encoded), model(images))
    assert encoded.shape == (3, {"mean": 2, "cls": 1, "attentive": 17}[pooling], 32)
