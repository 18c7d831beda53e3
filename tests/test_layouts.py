"""Tests of the layouts of weights, against the libraries that write them, and of settings read from parameters."""

import re
from functools import partial

import pytest
import timm
import torch
from random_modules import build_autoencoder, randomize
from test_weights import (
    BEIT,
    EXTRAS,
    IMAGES,
    LINEAR,
    NOISE,
    SIZES_OF_SMALL,
    THEIR_DECODER,
    THEIRS,
    new_autoencoder,
    new_classifier,
    new_encoder,
    new_segmenter,
    official,
    stock_segmenter,
    trained,
    trained_classifier,
    written_by,
)
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    PixioConfig,
    PixioModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling.export import to_transformers
from modeling.files import Stored, WeightsError, read_stored
from modeling.layouts import model_settings, rename, to_ours
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights, open_weights


def modules_of_5(model, folder):
    return model.state_dict()


def files_of_5(model, folder):
    return written_by(model, folder)


def files_of_4(model, folder):
    wrong, right = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."
    return {name.replace(wrong, right): value for name, value in written_by(model, folder).items()}


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5, files_of_4])
def test_autoencoder_of_transformers(state_of, tmp_path):
    theirs = randomize(ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **THEIR_DECODER)))
    ours, encoder = new_autoencoder(), new_encoder()
    state = state_of(theirs, tmp_path)
    report = load_weights(ours, state)
    expected, output = theirs(IMAGES, noise=NOISE), ours(IMAGES, NOISE)
    torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)
    assert torch.equal(output.mask, expected.mask)
    assert (report.layout, report.loaded) == ("transformers' ViTMAE", len(ours.state_dict()))
    assert report.missing == report.ignored == report.resized == ()

    report = load_weights(encoder, state)  # the encoder alone
    assert torch.equal(encoder(IMAGES), ours.encoder(IMAGES))
    assert report.loaded == len(encoder.state_dict())
    assert set(report.ignored) == {name for name in ours.state_dict() if not name.startswith("encoder.")}


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
@pytest.mark.parametrize("pooler", [True, False])
def test_vit_of_transformers(state_of, pooler, tmp_path):
    theirs = randomize(ViTModel(ViTConfig(**THEIRS), add_pooling_layer=pooler))
    ours = new_encoder()
    report = load_weights(ours, state_of(theirs, tmp_path))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).last_hidden_state, rtol=0, atol=1e-5)
    assert report.ignored == (("vit.pooler.dense.bias", "vit.pooler.dense.weight") if pooler else ())
    assert report.layout == "transformers' ViT"


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_of_transformers(pooling, state_of, tmp_path):
    vit, beit = (ViTForImageClassification, ViTConfig), (BeitForImageClassification, BeitConfig)
    theirs, config = beit if pooling == "mean" else vit
    theirs = randomize(theirs(config(**THEIRS, **(BEIT if pooling == "mean" else {}), num_labels=5)))
    state = state_of(theirs, tmp_path)
    ours, encoder = new_classifier(pooling), new_classifier(pooling).encoder
    report = load_weights(ours, state)
    expected = theirs(IMAGES, output_hidden_states=True)
    torch.testing.assert_close(ours(IMAGES), expected.logits, rtol=0, atol=1e-5)
    assert report.layout == ("transformers' BEiT" if pooling == "mean" else "transformers' ViT")
    assert (report.loaded, report.ignored) == (len(ours.state_dict()), ())
    report = load_weights(encoder, state)  # the encoder alone
    assert torch.equal(encoder(IMAGES), ours.encoder(IMAGES))
    head = {name for name in ours.state_dict() if not name.startswith("encoder.")}
    assert set(report.ignored) == head and len(head) == (4 if pooling == "mean" else 2)
    settings = model_settings(to_ours(state)[1])
    assert [settings[name] for name in ("num_classes", "pooling", "probe")] == [5, pooling, False]
    if state_of is files_of_5:
        weights = open_weights(tmp_path)
        assert weights.stored.classes is None and weights.stored.num_heads == 2  # the classes were not named
        assert weights.sizes == SIZES_OF_SMALL and weights.grid == weights.stored.grid == (4, 4)


def older_files(model, folder):
    """Return the saved parameters under the names of transformers' first version of Pixio."""
    names = [(".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."), (".intermediate.dense.", ".mlp.fc1.")]
    names += [(".attention.output.", ".attention.o_proj."), (".output.dense.", ".mlp.fc2."), (".o_proj.", ".output.")]
    return {rename(name, names): value for name, value in written_by(model, folder).items()}


@torch.inference_mode()
@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5, older_files])
def test_pixio_of_transformers(state_of, tmp_path):
    sizes = {name: value for name, value in THEIRS.items() if name != "intermediate_size"}
    theirs = randomize(PixioModel(PixioConfig(**sizes, n_cls_tokens=3)))
    ours = new_encoder(num_cls_tokens=3)
    report = load_weights(ours, state_of(theirs, tmp_path))
    assert report.layout == "transformers' Pixio" and (report.missing, report.ignored) == ((), ())
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).last_hidden_state, rtol=0, atol=1e-5)
    if state_of is files_of_5:
        weights = open_weights(tmp_path)
        assert weights.sizes == SIZES_OF_SMALL | dict(num_cls_tokens=3) and weights.grid == (4, 4)
        (tmp_path / "config.json").unlink()
        assert open_weights(tmp_path).grid == (4, 4)  # the class tokens are not part of the grid


def test_official_autoencoder_and_ours():
    source, ours, encoder = randomize(new_autoencoder()), new_autoencoder(), new_encoder()
    for layout, state in (("the official MAE", official(source)), ("this project", source.state_dict())):
        report = load_weights(ours, state)
        assert report.layout == layout and report.ignored == ()
        assert torch.equal(ours(IMAGES, NOISE).prediction, source(IMAGES, NOISE).prediction)
        report = load_weights(encoder, state)
        assert torch.equal(encoder(IMAGES), source.encoder(IMAGES))
        assert len(report.ignored) == len(ours.state_dict()) - len(encoder.state_dict())
    load_weights(encoder, source.encoder.state_dict())


def test_renaming_loses_nothing_and_leaves_its_argument_alone():
    state = official(randomize(new_autoencoder())) | {"head.weight": torch.ones(1), "something": torch.ones(1)}
    before = dict(state)
    _, renamed = to_ours(state)
    assert sorted(map(id, renamed.values())) == sorted(map(id, state.values()))
    load_weights(new_autoencoder(img_size=64), official(new_autoencoder()))  # resizes position embeddings
    assert state == before


@torch.inference_mode()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_whole_classifier(pooling):
    source = trained_classifier(pooling)
    for layout, state in (("this project", source.state_dict()), ("a timm or MAE classifier", official(source))):
        ours = new_classifier(pooling)
        report = load_weights(ours, state)
        assert torch.equal(ours(IMAGES), source(IMAGES)) and report.layout == layout
        assert report.loaded == len(state) and report.ignored == report.missing == report.resized == ()
        settings = model_settings(to_ours(state)[1])
        assert [settings[name] for name in ("num_classes", "pooling", "probe")] == [5, pooling, False]


def segmenter_settings(state: dict) -> tuple:
    names = ("num_classes", "head", "head_width", "auxiliary", "relative_position_bias", "layer_scale")
    return tuple(model_settings(state)[name] for name in names)


STOCK_EXTRAS = dict(use_relative_position_bias=True, layer_scale_init_value=0.5)


@torch.inference_mode()
@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
@pytest.mark.parametrize("there, here", [(STOCK_EXTRAS, EXTRAS), ({}, {}), (dict(use_mean_pooling=False), {})])
def test_segmenter_of_transformers(there, here, state_of, tmp_path):
    theirs, ours = stock_segmenter(**there), new_segmenter(**here)
    state = state_of(theirs, tmp_path)
    report = load_weights(ours, state)
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, rtol=0, atol=1e-4)
    assert (report.layout, report.loaded) == ("transformers' UperNet", len(ours.state_dict()))
    unused = any(re.match(r"backbone\.(beit\.)?layernorm\.", name) for name in state)  # in some versions and settings
    norm = ("encoder.norm.bias", "encoder.norm.weight") if unused else ()
    assert report.ignored == norm and report.missing == report.resized == ()
    assert segmenter_settings(to_ours(state)[1]) == (5, "upernet", 12, True, bool(here), bool(here))
    if state_of is files_of_5:
        assert read_stored(tmp_path) == Stored((4, 4), 2, layers=[0, 1, 2, 3])

    for img_size, name in (((48, 48), "6x6"), ((24, 64), "3x8")):  # the encoder alone, at other image sizes
        segmenter = new_segmenter(img_size=img_size, **here)
        report = load_weights(segmenter.encoder, state)
        images = torch.randn(2, 3, *img_size)
        maps = theirs.backbone(images).feature_maps[2]
        torch.testing.assert_close(segmenter.encoder.forward_layers(images, [2])[0], maps, rtol=0, atol=1e-5)
        biases = (f"4 relative position biases 4x4 -> {name}",) if here else ()
        assert report.resized == (f"encoder.pos_embed 4x4 -> {name}", *biases)
        heads = {name for name in ours.state_dict() if not name.startswith("encoder.")}
        assert set(report.ignored) == heads | set(norm)


# Inspection


def test_the_kind_of_a_segmenter():
    for head, kind in (
        (dict(head_width=16, auxiliary=False), ("upernet", 16, False)),
        (dict(), ("upernet", 12, True)),
        (LINEAR, ("linear", None, False)),
    ):
        for extras in ({}, dict(relative_position_bias=True), dict(layer_scale=0.1)):
            state = new_segmenter(3, head=head, **extras).state_dict()
            kinds = ("relative_position_bias" in extras, "layer_scale" in extras)
            assert segmenter_settings(state) == (3, *kind, *kinds)
            assert "pooling" not in model_settings(state) and model_settings(state)["encoder_depth"] == 4
    for model in (new_encoder(), new_classifier(), new_autoencoder()):
        assert "head" not in model_settings(to_ours(model.state_dict())[1])


def test_numbers_that_follow_from_the_grid_are_left_out():
    """Older BEiT files contain the index of relative positions as a buffer of every block."""
    model = trained(new_segmenter(relative_position_bias=True))
    state = {f"encoder.blocks.{i}.attn.relative_position_index": torch.zeros(17, 17).long() for i in range(4)}
    theirs = to_transformers(model.state_dict())
    theirs = {name.replace("vit.", "backbone.", 1): value for name, value in theirs.items()}
    index = "backbone.encoder.layer.{}.attention.attention.relative_position_bias.relative_position_index"
    for more in (state | model.state_dict(), theirs | {index.format(i): torch.zeros(17, 17).long() for i in range(4)}):
        again = new_segmenter(relative_position_bias=True)
        load_weights(again, more)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_weights_without_an_encoder():
    decoder = {n: t for n, t in new_autoencoder().state_dict().items() if not n.startswith("encoder.")}
    head = {n: t for n, t in new_classifier().state_dict().items() if not n.startswith("encoder.")}
    other = {"layer1.weight": torch.ones(1), "layer2.weight": torch.ones(1)}
    for state, names in (
        (decoder, "mask_token, decoder.pos_embed"),
        (head, "fc_norm.weight, fc_norm.bias, head.weight"),
        (other, "layer1.weight, layer2.weight"),
    ):
        for use in (to_ours, partial(load_weights, new_encoder())):
            with pytest.raises(WeightsError, match=rf"without an encoder, or of an unknown layout \({names}.*expected"):
                use(state)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_known_encoders(name, tmp_path):
    size = SIZES[name] | dict(depth=1)  # one block, because these models are large
    theirs = timm.create_model(f"vit_{name}_patch{size['patch_size']}_224", num_classes=9, depth=1).state_dict()
    settings = model_settings(to_ours(theirs)[1])
    sizes = {key: settings[f"encoder_{key}"] for key in ("embed_dim", "depth", "mlp_ratio")}
    sizes |= dict(patch_size=settings["patch_size"], num_heads=size["num_heads"])
    assert sizes == size | dict(mlp_ratio=4.0) and (settings["num_classes"], settings["pooling"]) == (9, "cls")


def test_the_number_of_heads_is_the_stored_one_or_that_of_the_known_size(tmp_path):
    file = tmp_path / "tiny.pth"
    torch.save(VisionTransformer(**SIZES["tiny"] | dict(img_size=32)).state_dict(), file)
    assert open_weights(file).sizes == SIZES["tiny"] | dict(mlp_ratio=4.0, in_channels=3, num_cls_tokens=1)
    assert open_weights(file).grid == (2, 2)


def test_sizes_of_other_encoders(tmp_path):
    thin = dict(img_size=48, patch_size=16, in_channels=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=113 / 48)
    for model in (VisionTransformer(**thin), build_autoencoder(VisionTransformer(**thin))):
        torch.save(model.state_dict(), tmp_path / "thin.pth")
        sizes = open_weights(tmp_path / "thin.pth").sizes
        assert sizes.pop("num_heads") is None
        load_weights(VisionTransformer(img_size=48, num_heads=3, **sizes), model.state_dict())
