"""Tests of loading weights: every layout against the library that wrote it, and error messages."""

import ast
import math
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from random_modules import build_autoencoder, randomize
from random_modules import new_encoder as build_encoder
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_encoder, export_segmenter, to_transformers
from modeling.files import Stored, WeightsError, read_state_dict
from modeling.layouts import model_settings, to_ours
from modeling.mae import MaskedAutoencoder
from modeling.position import resize_positions
from modeling.upernet import Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights, open_weights, start_from

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2)
THEIRS = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
THEIRS |= dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
THEIR_DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=3, decoder_num_attention_heads=2)
THEIR_DECODER |= dict(decoder_intermediate_size=64, norm_pix_loss=True)
BEIT = dict(use_absolute_position_embeddings=True, use_mean_pooling=True, layer_scale_init_value=0.0, drop_path_rate=0)
SIZES_OF_SMALL = dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=4.0, patch_size=8, in_channels=3, num_cls_tokens=1)


def new_encoder(**change) -> VisionTransformer:
    return build_encoder(**SMALL | change).eval()


def new_autoencoder(*, decoder: dict | None = None, **change) -> MaskedAutoencoder:
    return build_autoencoder(new_encoder(**change), **DECODER | (decoder or {})).eval()


def new_classifier(pooling: str = "mean", *, num_classes: int = 5, probe: bool = False, **change) -> Classifier:
    return Classifier(new_encoder(**change), num_classes, pooling=pooling, probe=probe).eval()


def official(model: MaskedAutoencoder | Classifier) -> dict[str, torch.Tensor]:
    """Return the parameters under the names of the official code, which has one flat module."""
    return {n.removeprefix("encoder.").replace("decoder.", "decoder_"): t for n, t in model.state_dict().items()}


def written_by(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return read_state_dict(folder)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))


# Positions of another size


def test_positions_are_resized_as_transformers_does():
    theirs = randomize(ViTModel(ViTConfig(**THEIRS)))
    for img_size, name in (((48, 48), "6x6"), ((24, 64), "3x8"), ((16, 64), "2x8")):
        ours = new_encoder(img_size=img_size)
        images = torch.randn(2, 3, *img_size)
        same_count = math.prod(ours.grid) == 16  # 16 positions might be a table of this grid
        report = load_weights(ours, theirs.state_dict(), stored=Stored((4, 4) if same_count else None))
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
        assert report.resized == (f"encoder.pos_embed 4x4 -> {name}",)


def test_positions_of_several_class_tokens_stay_as_they_are():
    theirs, ours = (randomize(new_autoencoder(img_size=side, num_cls_tokens=3)) for side in (32, 48))
    report = load_weights(ours, theirs.state_dict())
    assert report.resized == ("encoder.pos_embed 4x4 -> 6x6", "decoder.pos_embed 4x4 -> 6x6")
    for mine, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        assert torch.equal(mine.pos_embed[:, :3], other.pos_embed[:, :3])
        expected = resize_positions(other.pos_embed[:, 2:], (4, 4), (6, 6))[:, 1:]
        assert torch.equal(mine.pos_embed[:, 3:], expected)


@pytest.mark.parametrize(("img_size", "name"), [((64, 64), "8x8"), ((24, 64), "3x8")])
def test_both_tables_of_an_autoencoder_are_resized_as_transformers_does(img_size, name, tmp_path):
    theirs = randomize(ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **THEIR_DECODER)))
    ours = new_autoencoder(img_size=img_size)
    report = load_weights(ours, written_by(theirs, tmp_path))
    assert report.resized == (f"encoder.pos_embed 4x4 -> {name}", f"decoder.pos_embed 4x4 -> {name}")
    for resized, table in (
        (ours.encoder.pos_embed, theirs.vit.embeddings.position_embeddings),
        (ours.decoder.pos_embed, theirs.decoder.decoder_pos_embed),
    ):  # ViTModel's method is the reference, as that of ViTMAE's decoder treats the grid as a line
        embeddings = ViTModel(ViTConfig(**THEIRS | dict(hidden_size=table.shape[2]))).embeddings
        embeddings.position_embeddings.data = table.data
        expected = embeddings.interpolate_pos_encoding(torch.empty_like(resized), *img_size)
        torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    ours(torch.randn(1, 3, *img_size), torch.rand(1, math.prod(ours.encoder.grid)))


def test_the_stored_grid():
    state = new_encoder(img_size=(16, 48)).state_dict()  # 2 x 6, which is no square
    with pytest.raises(WeightsError, match=r"12 positions, which do not fit a grid of \(3, 3\)"):
        load_weights(new_encoder(), state)
    with pytest.raises(WeightsError, match=r"12 positions, which do not fit a grid of \(4, 4\)"):
        load_weights(new_encoder(img_size=(16, 48)), state, stored=Stored((4, 4)))
    assert load_weights(new_encoder(), state, stored=Stored((2, 6))).resized == ("encoder.pos_embed 2x6 -> 4x4",)
    assert load_weights(new_encoder(img_size=(16, 48)), state).resized == ()


# Refusals


def refusal(model, state, **options) -> WeightsError:
    """Return the error, and check that nothing was copied."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, state, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return error.value


def refused(model, state, **options) -> str:
    return str(refusal(model, state, **options))


def test_every_missing_and_unexpected_parameter_is_named():
    state = randomize(new_encoder()).state_dict()
    block = [name for name in state if name.startswith("blocks.1.") and "fc1" not in name]
    holed = {name: value for name, value in state.items() if name not in block}
    message = refused(new_encoder(), holed)
    assert all(f"encoder.{name} is missing" in message for name in block) and message.count("missing") == len(block)
    message = refused(new_encoder(), state | {f"extra.{name}": state[name] for name in block})
    assert all(f"extra.{name} is unexpected" in message for name in block) and message.count("unexp") == len(block)


def test_every_wrong_shape_is_named():
    state = randomize(new_encoder()).state_dict()
    message = refused(new_encoder(), state | {"cls_token": torch.ones(1, 1, 64), "norm.weight": torch.ones(7)})
    assert "encoder.cls_token is (1, 1, 64) instead of (1, 1, 32)" in message
    assert "encoder.norm.weight is (7,) instead of (32,)" in message and message.count("instead of") == 2


@pytest.mark.parametrize(
    ("there", "here", "settings"),
    [
        (dict(embed_dim=64, depth=3), {}, dict(encoder_embed_dim=64, encoder_depth=3, encoder_num_heads="N")),
        (dict(depth=3, decoder=dict(decoder_depth=2)), {}, dict(encoder_depth=3, decoder_depth=2)),
        (dict(decoder=dict(decoder_embed_dim=32)), {}, dict(decoder_embed_dim=32, decoder_num_heads="N")),
        (dict(patch_size=4, img_size=16), dict(in_channels=1), dict(patch_size=4, adapt_channels=True)),
        (
            dict(mlp_ratio=85 / 32, decoder=dict(decoder_mlp_ratio=2)),
            {},
            dict(encoder_mlp_ratio=2.6563, decoder_mlp_ratio=2.0),
        ),
        (dict(num_cls_tokens=3), {}, dict(num_cls_tokens=3)),
    ],
)
def test_other_sizes_are_refused_with_those_that_fit(there, here, settings):
    state = official(randomize(new_autoencoder(**there)))
    error = refusal(new_autoencoder(**here), state)
    assert error.settings == settings
    names = {*settings} - {"encoder_num_heads", "decoder_num_heads", "adapt_channels"}
    assert all(f"{name} is {settings[name]} instead of " in error.message for name in names)
    load_weights(new_autoencoder(**there), state)


def test_an_error_shows_its_message_and_settings():
    state = official(randomize(new_autoencoder(in_channels=1, embed_dim=64, num_heads=4)))
    assert refused(new_autoencoder(), state, stored=Stored(num_heads=4)) == (
        "weights of the official MAE do not fit the model: encoder_embed_dim is 64 instead of 32, input_channels is 1 "
        "instead of 3, encoder_num_heads is 4 instead of 2; set encoder_embed_dim=64, encoder_num_heads=4, "
        "adapt_channels=True"
    )
    error = WeightsError("wrong", dict(pooling="mean", layers=[0, 1]))
    assert str(pickle.loads(pickle.dumps(error))) == "wrong; set pooling=mean, layers=[0, 1]"
    assert str(WeightsError("wrong")) == "wrong" and WeightsError("wrong").settings == {}


@pytest.mark.parametrize("num_heads", [None, 32])
def test_the_number_of_heads_of_a_known_size(num_heads):
    with torch.device("meta"):  # shapes without values
        large, base = VisionTransformer(**SIZES["large"]), VisionTransformer(**SIZES["base"])
    with pytest.raises(WeightsError) as error:
        load_weights(base, large.state_dict(), stored=Stored(num_heads=num_heads))
    fitting = dict(encoder_embed_dim=1024, encoder_depth=24, encoder_num_heads=num_heads or 16)
    assert error.value.settings == fitting


def test_no_message_of_the_package_names_a_flag():
    for file in (Path(__file__).parent.parent / "modeling").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, str) and "--" in node.value), file


def test_a_hole_is_not_taken_for_another_depth():
    state = official(randomize(new_autoencoder()))
    holed = {name: value for name, value in state.items() if not name.startswith("decoder_blocks.1.")}
    message = refused(new_autoencoder(), holed)
    assert "decoder.blocks.1.norm1.weight is missing" in message and message.count("is missing") == 12


def test_near_relatives_are_refused():
    unbiased = timm.create_model("vit_base_patch16_224", **SMALL, qkv_bias=False)
    assert "encoder.blocks.1.attn.qkv.bias is missing" in refused(new_encoder(), unbiased.state_dict())
    scaled = timm.create_model("vit_base_patch16_224", **SMALL, init_values=1.0)
    assert "encoder.blocks.0.ls1.gamma is unexpected" in refused(new_encoder(), scaled.state_dict())
    for change, name in ((dict(layer_scale_init_value=0.1), "layer_scale"), ({}, "relative_position_bias")):
        config = BeitConfig(**THEIRS, **BEIT | dict(use_relative_position_bias=not change) | change)
        error = refusal(new_classifier().encoder, BeitModel(config).state_dict())
        assert (
            f"{name} is True instead of False; only an encoder of a segmenter or detector can have this"
            in error.message
        )
        assert error.settings == {name: True} and isinstance(error.settings[name], float if change else bool)
    files = to_transformers({f"encoder.{name}": value for name, value in new_encoder().state_dict().items()})
    del files["vit.encoder.layer.0.attention.attention.value.bias"]
    assert "blocks.0.attn.qkv.bias is (64,) instead of (96,)" in refused(new_encoder(), files)


def test_report_is_one_line():
    state = official(new_autoencoder()) | {"head.weight": torch.ones(1)}
    line = str(load_weights(new_encoder(img_size=64), state))
    assert line == (
        "weights of the official MAE: 30 loaded, 0 missing, 45 ignored (decoder, head, mask_token), resized: "
        "encoder.pos_embed 4x4 -> 8x8"
    )


def test_checkpoints_of_older_versions_have_other_names_of_the_decoder():
    model = randomize(new_autoencoder())
    state = {re.sub("^decoder.", "decoder_", name): value for name, value in model.state_dict().items()}
    again = new_autoencoder()
    assert {"encoder.norm.bias", "decoder_norm.bias", "mask_token"} < state.keys()
    assert load_weights(again, state).layout == "this project"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


# Classifiers


def trained_classifier(pooling: str = "mean", **change) -> Classifier:
    """Return a classifier with random parameters and, in a linear probe, random BatchNorm statistics."""
    model = randomize(new_classifier(pooling, **change))
    if model.probe:
        model.head_norm.running_mean.normal_(std=3)
        model.head_norm.running_var.uniform_(0.1, 3)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("source_pooling", ["mean", "cls"])
def test_the_encoder_of_a_classifier(source_pooling):
    source = trained_classifier(source_pooling)
    ours = new_classifier("mean").encoder
    for state in (source.state_dict(), official(source)):
        report = load_weights(ours, state)
        source.encoder.norm = torch.nn.Identity()
        assert torch.equal(ours(IMAGES), source.encoder(IMAGES))
    heads = "fc_norm, head" if source_pooling == "mean" else "encoder.norm, head"
    assert f"4 ignored ({heads})" in str(report)


def test_mean_pooling_leaves_the_norm_of_an_encoder_out():
    state, ours = randomize(new_encoder()).state_dict(), new_classifier().encoder
    report = load_weights(ours, state)
    assert report.ignored == ("encoder.norm.bias", "encoder.norm.weight") and report.loaded == len(state) - 2
    assert str(report).endswith("2 ignored (encoder.norm: the head does not use it)")


def test_an_encoder_without_norm_is_for_mean_pooling():
    state = trained_classifier("mean").state_dict()
    assert refused(new_classifier("cls").encoder, state) == (
        "weights of this project lost their final norm in fine-tuning; set pooling=mean"
    )
    message = refused(new_autoencoder(), state)  # pre-training has no such setting
    assert message.endswith("in fine-tuning; give the weights that they were fine-tuned from")


def test_a_head_that_does_not_fit():
    state = trained_classifier("mean").state_dict()
    for model, given, settings in (
        (new_classifier("cls", num_classes=7), official(trained_classifier()), dict(num_classes=5, pooling="mean")),
        (new_classifier(probe=True), state, dict(probe=False)),
        (new_classifier(embed_dim=64), state, dict(encoder_embed_dim=32, encoder_num_heads="N")),
        (new_segmenter(head=LINEAR), new_segmenter().state_dict(), dict(head="upernet", head_width=12, auxiliary=True)),
    ):
        assert refusal(model, given).settings == settings
    del state["head.bias"]
    assert "head.bias is missing" in refused(new_classifier(), state)
    for holder in (new_encoder(), new_autoencoder()):
        assert "head.weight is missing" in refused(new_classifier(), holder.state_dict())


# Segmentation

NAMES = ["ant", "bee", "cat", "dog", "eel"]
EXTRAS = dict(relative_position_bias=True, layer_scale=0.5)
LINEAR = dict(head="linear")


def new_segmenter(num_classes: int = 5, *, head: dict | None = None, **change) -> Segmenter:
    head = dict(head_width=12) | (head or {})
    return Segmenter(new_encoder(**dict(depth=4) | change), num_classes, **head).eval()


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """Set all parameters of `model` and the statistics of its BatchNorms to random values, and return it."""
    randomize(model)
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.nn.init.uniform_(buffer, 0.3, 2)
    return model


def stock_segmenter(**change) -> UperNetForSemanticSegmentation:
    """Return transformers' UperNet with a BEiT encoder and the sizes of `new_segmenter`."""
    backbone = THEIRS | BEIT | dict(num_hidden_layers=4, add_fpn=True, batch_norm_eps=1e-5)
    backbone["out_features"] = [f"stage{i}" for i in (1, 2, 3, 4)]
    config = UperNetConfig(backbone_config=BeitConfig(**backbone | change), hidden_size=12, num_labels=5)
    return trained(UperNetForSemanticSegmentation(config))


@torch.inference_mode()
def test_biases_are_resized_as_the_model_does_it_for_other_images():
    source, ours = trained(new_segmenter(**EXTRAS)), new_segmenter(img_size=64, **EXTRAS)
    load_weights(ours.encoder, source.encoder.state_dict())
    for block, other in zip(ours.encoder.blocks, source.encoder.blocks, strict=True):
        assert torch.equal(block.attn.relative_position_bias_table[-3:], other.attn.relative_position_bias_table[-3:])
    flat = trained(new_segmenter(img_size=(16, 64), **EXTRAS))  # 2 x 8 patches, as many as 4 x 4
    ours = new_segmenter(**EXTRAS)
    report = load_weights(ours, flat.state_dict(), stored=Stored((2, 8)))
    torch.testing.assert_close(ours(IMAGES), flat(IMAGES), rtol=0, atol=1e-4)
    assert report.resized == ("encoder.pos_embed 2x8 -> 4x4", "4 relative position biases 2x8 -> 4x4")
    message = refused(new_segmenter(**EXTRAS), flat.state_dict())  # without the stored grid
    assert "relative_position_bias_table is (48, 2) instead of (52, 2)" in message


def test_biases_and_scales_of_an_encoder_may_be_new():
    state = official(randomize(new_autoencoder(depth=4)))
    ours = new_segmenter(**EXTRAS)
    report = load_weights(ours.encoder, state)
    for name, value in ours.encoder.state_dict().items():
        if name not in state:
            assert torch.equal(value, torch.full_like(value, 0.5 if "gamma" in name else 0.0))
    assert len(report.missing) == 4 * 3 and report.loaded == len(ours.encoder.state_dict()) - 12
    assert str(report).endswith("newly initialized: relative position bias, layer scale")
    biased = trained(new_segmenter(relative_position_bias=True)).state_dict()
    report = load_weights(ours.encoder, biased)
    assert str(report).endswith(", newly initialized: layer scale") and len(report.missing) == 8
    assert torch.equal(
        ours.encoder.blocks[1].attn.relative_position_bias_table,
        biased["encoder.blocks.1.attn.relative_position_bias_table"],
    )
    del biased["encoder.blocks.1.attn.relative_position_bias_table"]  # a single missing table is an error
    message = refused(ours.encoder, biased)
    assert "do not fit: encoder.blocks.1.attn.relative_position_bias_table is missing; give" in message


def test_the_encoder_of_a_segmenter():
    source = trained(new_segmenter())
    ours = new_classifier("mean", depth=4).encoder
    report = load_weights(ours, source.state_dict())
    assert torch.equal(ours(IMAGES), source.encoder(IMAGES))
    assert "ignored (auxiliary_head, decode_head, fpn)" in str(report)
    whole, state = new_autoencoder(depth=4), source.state_dict()
    words = "weights of this project lost their final norm in fine-tuning; "
    assert refused(new_classifier("cls", depth=4).encoder, state) == f"{words}set pooling=mean"
    assert refused(whole, state) == f"{words}give the weights that they were fine-tuned from"
    extras = trained(new_segmenter(**EXTRAS)).state_dict()
    for holder in (new_segmenter().encoder, new_classifier("cls", depth=4).encoder, whole):
        error = refusal(holder, extras)
        assert error.settings == dict(relative_position_bias=True, layer_scale=1.0)
        assert error.message.endswith("others need weights of a plain ViT or MAE")


def test_the_linear_head_as_an_upernet_is_for_transformers_alone(tmp_path):
    statistics = dict(mean=[0.5] * 3, std=[0.5] * 3)
    export_segmenter(trained(new_segmenter(head=LINEAR)), tmp_path, classes=NAMES, resize=(128, 32), **statistics)
    state = read_state_dict(tmp_path / "transformers_model.safetensors")
    assert "head" not in model_settings(to_ours(state)[1])
    load_weights(new_segmenter().encoder, state)


# A new decoder


def encoders_of_several_layouts() -> list[dict[str, torch.Tensor]]:
    source = randomize(new_encoder())
    named = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    head = {"head.weight": torch.ones(1)}
    return [source.state_dict() | head, named, randomize(ViTModel(ViTConfig(**THEIRS))).state_dict()]


@pytest.mark.parametrize("state", encoders_of_several_layouts())
def test_a_new_decoder(state):
    expected, ours = new_encoder(), randomize(new_autoencoder())
    load_weights(expected, state)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    report = load_weights(ours, state)
    assert torch.equal(ours.encoder(IMAGES), expected(IMAGES))
    decoder = tuple(name for name in before if not name.startswith("encoder."))
    assert report.missing == decoder and report.loaded == len(expected.state_dict())
    assert all(torch.equal(ours.state_dict()[name], before[name]) for name in decoder)
    line = str(report)
    assert "30 loaded, 44 missing" in line and "\n" not in line
    assert line.endswith(", newly initialized: decoder")


def test_a_new_decoder_is_not_for_weights_that_hold_one_or_a_part_of_one():
    source, ours = randomize(new_autoencoder()), new_autoencoder()
    assert load_weights(ours, official(source)).missing == ()
    assert torch.equal(ours(IMAGES, NOISE).prediction, source(IMAGES, NOISE).prediction)
    for kept in ("mask_token", "decoder.pred.bias", "decoder.blocks.2."):
        part = {n: v for n, v in source.state_dict().items() if n.startswith(("encoder.", kept))}
        message = refused(new_autoencoder(), part)
        assert "decoder.embed.weight is missing" in message and f"{kept} is missing" not in message
    holed = source.encoder.state_dict()
    del holed["norm.bias"]
    assert "do not fit: encoder.norm.bias is missing; give" in refused(new_autoencoder(), holed)


# Channels


def converted(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert images of N channels to those that the model of the checkpoint, with `channels`, must see."""
    n = images.shape[1]
    if n <= channels:
        return images[:, [i % n for i in range(channels)]]
    return torch.stack([images[:, i::channels].mean(dim=1) for i in range(channels)], dim=1)


def predicted(pixels: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Convert predictions (B, L, P*P*old) to those (B, L, P*P*new) that the adapted model must make."""
    pixels = pixels.reshape(*pixels.shape[:2], 64, old)
    if new >= old:
        return pixels[..., [j % old for j in range(new)]].flatten(2)
    return torch.stack([pixels[..., j::new].mean(dim=-1) for j in range(new)], dim=-1).flatten(2)


@torch.inference_mode()
@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4), (4, 3), (4, 2), (2, 5)])
def test_other_channels(old, new):
    source = randomize(new_autoencoder(in_channels=old))
    ours, encoder = new_autoencoder(in_channels=new), new_encoder(in_channels=new)
    report = load_weights(ours, source.state_dict(), adapt_channels=True)
    names = ("encoder.patch_embed.proj.weight", "decoder.pred.weight", "decoder.pred.bias")
    assert report.adapted == tuple(f"{name} {old} -> {new} channels" for name in names)
    assert f"adapted: encoder.patch_embed.proj.weight {old} -> {new} channels, decoder.pred" in str(report)
    assert report.missing == report.resized == () and report.loaded == len(ours.state_dict())

    images = torch.randn(2, new, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.encoder(images), source.encoder(converted(images, old)), rtol=0, atol=1e-5)
    expected = predicted(source(converted(images, old), NOISE).prediction, old, new)
    torch.testing.assert_close(ours(images, NOISE).prediction, expected, rtol=0, atol=1e-5)

    grey = images[:, :1]  # equal channels give equal tokens, whatever the numbers of channels
    tokens = ours.encoder(grey.expand(-1, new, -1, -1))
    torch.testing.assert_close(tokens, source.encoder(grey.expand(-1, old, -1, -1)), rtol=0, atol=1e-5)

    report = load_weights(encoder, source.state_dict(), adapt_channels=True)  # the encoder alone
    assert torch.equal(encoder(images), ours.encoder(images)) and len(report.adapted) == 1


def test_other_channels_are_refused_unless_asked_for():
    state = official(randomize(new_autoencoder()))
    for model in (new_autoencoder(in_channels=1), new_encoder(in_channels=1)):
        assert refused(model, state).endswith("input_channels is 3 instead of 1; set adapt_channels=True")
    assert load_weights(new_autoencoder(), state, adapt_channels=True).adapted == ()  # nothing to adapt
    message = refused(new_autoencoder(in_channels=1), state | {"decoder_pred.bias": torch.ones(7)}, adapt_channels=True)
    assert "decoder.pred.bias is (7,) instead of (64,)" in message


def test_channels_size_and_decoder_change_at_once():
    source, ours = randomize(new_encoder()), new_autoencoder(in_channels=1, img_size=64)
    report = load_weights(ours, source.state_dict(), adapt_channels=True)
    assert (len(report.adapted), len(report.resized), len(report.missing)) == (1, 1, 44)
    assert str(report) == (
        "weights of a timm or MAE encoder: 30 loaded, 44 missing, 0 ignored, resized: encoder.pos_embed 4x4 -> 8x8, "
        "adapted: encoder.patch_embed.proj.weight 3 -> 1 channels, newly initialized: decoder"
    )


def test_starting_from_weights_reports_other_statistics(tmp_path):
    source, ours = randomize(new_autoencoder()), new_autoencoder()
    export_encoder(source.encoder, tmp_path / "encoder", mean=[0.1] * 3, std=[0.2] * 3)
    weights = open_weights(tmp_path, whole=False)
    line = start_from(weights, ours, mean=[0.1] * 3, std=[0.2] * 3)
    assert line.endswith(", newly initialized: decoder")
    line = start_from(weights, ours, mean=[0.5] * 3, std=[0.2] * 3)
    assert line.endswith(
        "; the weights were trained with mean [0.1, 0.1, 0.1] and std [0.2, 0.2, 0.2], this run has mean "
        "[0.5, 0.5, 0.5] and std [0.2, 0.2, 0.2]"
    )
    export_autoencoder(source, tmp_path / "encoder" / "pretraining", mean=[0.1] * 3, std=[0.2] * 3)
    start_from(open_weights(tmp_path, whole=True), ours, mean=[0.1] * 3, std=[0.2] * 3)
    assert torch.equal(ours(IMAGES, NOISE).prediction, source(IMAGES, NOISE).prediction)
    save_file({"encoder.blocks.0.norm1.bias": torch.ones(2)}, tmp_path / "part.safetensors")
    with pytest.raises(WeightsError, match=r"part.safetensors: weights of this project do not show the sizes"):
        open_weights(tmp_path / "part.safetensors")
