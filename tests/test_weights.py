"""Reading weights: every layout against the library that wrote it, and refusals that say what is wrong."""

import math
import re
from pathlib import Path

import pytest
import timm
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling.classifier import Classifier
from modeling.export import export_segmenter, to_transformers
from modeling.files import Stored, WeightsError, find_weights, read_state_dict, read_stored
from modeling.mae import MaskedAutoencoder
from modeling.upernet import Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import (
    SegmenterKind,
    classifier_kind,
    encoder_grid,
    encoder_sizes,
    load_weights,
    segmenter_kind,
    to_ours,
)

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
DECODER = dict(decoder_embed_dim=16, decoder_depth=3, decoder_num_heads=2)
THEIRS = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    image_size=32,
    patch_size=8,
    layer_norm_eps=1e-6,
)
THEIR_DECODER = dict(
    decoder_hidden_size=16,
    decoder_num_hidden_layers=3,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=64,
    norm_pix_loss=True,
)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """`module` in evaluation mode with every parameter random, so that no two could be swapped unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def new_encoder(**change) -> VisionTransformer:
    return VisionTransformer(**SMALL | change).eval()


def new_autoencoder(*, decoder: dict | None = None, **change) -> MaskedAutoencoder:
    return MaskedAutoencoder(new_encoder(**change), **DECODER | (decoder or {})).eval()


def new_classifier(pooling: str = "mean", *, num_classes: int = 5, linear_probe: bool = False, **change) -> Classifier:
    return Classifier(new_encoder(**change), num_classes, pooling=pooling, linear_probe=linear_probe).eval()


def official(model: MaskedAutoencoder | Classifier) -> dict[str, torch.Tensor]:
    """The names of the official code: one flat module."""
    return {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}


def written_by(model, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return read_state_dict(folder)


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))


# Layouts


def modules_of_5(model, folder):
    return model.state_dict()


def files_of_5(model, folder):
    return written_by(model, folder)


def files_of_4(model, folder):
    wrong, right = "decoder.decoder_encoder.layer.", "decoder.decoder_layers."
    return {name.replace(wrong, right): value for name, value in written_by(model, folder).items()}


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5, files_of_4])
def test_autoencoder_of_transformers(state_of, tmp_path):
    theirs = randomised(ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **THEIR_DECODER)))
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
    theirs = randomised(ViTModel(ViTConfig(**THEIRS), add_pooling_layer=pooler))
    ours = new_encoder()
    report = load_weights(ours, state_of(theirs, tmp_path))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).last_hidden_state, rtol=0, atol=1e-5)
    assert report.ignored == (("vit.pooler.dense.bias", "vit.pooler.dense.weight") if pooler else ())
    assert report.layout == "transformers' ViT"


BEIT = dict(use_absolute_position_embeddings=True, use_mean_pooling=True, layer_scale_init_value=0.0, drop_path_rate=0)


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_of_transformers(pooling, state_of, tmp_path):
    vit, beit = (ViTForImageClassification, ViTConfig), (BeitForImageClassification, BeitConfig)
    theirs, config = beit if pooling == "mean" else vit
    theirs = randomised(theirs(config(**THEIRS, **(BEIT if pooling == "mean" else {}), num_labels=5)))
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
    assert classifier_kind(state) == (5, pooling, False)
    assert encoder_sizes(state) == SIZES_OF_SMALL | dict(num_heads=None) and encoder_grid(state) == (4, 4)
    assert encoder_grid(state, Stored(grid=(2, 8))) == (2, 8)
    stored = read_stored(tmp_path) if state_of is files_of_5 else Stored()
    if state_of is files_of_5:
        assert stored.classes is None and stored.num_heads == 2 and stored.grid == (4, 4)  # nobody named the classes
        assert encoder_sizes(state, stored) == SIZES_OF_SMALL


SIZES_OF_SMALL = dict(embed_dim=32, depth=2, num_heads=2, mlp_ratio=4.0, patch_size=8, in_channels=3)


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
def test_encoder_of_transformers_autoencoder(state_of, tmp_path):
    theirs = randomised(ViTMAEModel(ViTMAEConfig(**THEIRS, mask_ratio=0.0)))
    ours = new_encoder()
    load_weights(ours, state_of(theirs, tmp_path))
    expected = theirs(IMAGES, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    torch.testing.assert_close(ours(IMAGES), expected, rtol=0, atol=1e-5)


def test_timm():
    theirs = randomised(timm.create_model("vit_base_patch16_224", num_classes=5, **SMALL))
    ours = new_encoder()
    report = load_weights(ours, theirs.state_dict())
    torch.testing.assert_close(ours(IMAGES), theirs.forward_features(IMAGES), rtol=0, atol=1e-5)
    assert report.ignored == ("head.bias", "head.weight")


def test_official_autoencoder_and_ours():
    source, ours, encoder = randomised(new_autoencoder()), new_autoencoder(), new_encoder()
    for layout, state in (("the official MAE", official(source)), ("this project", source.state_dict())):
        report = load_weights(ours, state)
        assert report.layout == layout and report.ignored == ()
        assert torch.equal(ours(IMAGES, NOISE).prediction, source(IMAGES, NOISE).prediction)
        report = load_weights(encoder, state)
        assert torch.equal(encoder(IMAGES), source.encoder(IMAGES))
        assert len(report.ignored) == len(ours.state_dict()) - len(encoder.state_dict())
    load_weights(encoder, source.encoder.state_dict())


def test_renaming_loses_nothing_and_leaves_its_argument_alone():
    state = official(randomised(new_autoencoder())) | {"head.weight": torch.ones(1), "something": torch.ones(1)}
    before = dict(state)
    _, renamed = to_ours(state)
    assert sorted(map(id, renamed.values())) == sorted(map(id, state.values()))
    load_weights(new_autoencoder(img_size=64), official(new_autoencoder()))  # resizes
    assert state == before


# Positions of another size


def test_positions_are_resized_as_transformers_does():
    theirs = randomised(ViTModel(ViTConfig(**THEIRS)))
    for img_size, name in (((48, 48), "6x6"), ((24, 64), "3x8"), ((16, 64), "2x8")):
        ours = new_encoder(img_size=img_size)
        images = torch.randn(2, 3, *img_size)
        same_count = math.prod(ours.grid) == 16  # cannot be told from a table of this very grid
        report = load_weights(ours, theirs.state_dict(), stored=Stored((4, 4) if same_count else None))
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
        assert report.resized == (f"encoder.pos_embed 4x4 -> {name}",)


@pytest.mark.parametrize(("img_size", "name"), [((64, 64), "8x8"), ((24, 64), "3x8")])
def test_both_tables_of_an_autoencoder_are_resized_as_transformers_does(img_size, name, tmp_path):
    theirs = randomised(ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **THEIR_DECODER)))
    ours = new_autoencoder(img_size=img_size)
    report = load_weights(ours, written_by(theirs, tmp_path))
    assert report.resized == (f"encoder.pos_embed 4x4 -> {name}", f"decoder_pos_embed 4x4 -> {name}")
    for resized, table in (
        (ours.encoder.pos_embed, theirs.vit.embeddings.position_embeddings),
        (ours.decoder_pos_embed, theirs.decoder.decoder_pos_embed),
    ):  # by ViTModel's method, as that of ViTMAE's decoder takes the grid for a line
        embeddings = ViTModel(ViTConfig(**THEIRS | dict(hidden_size=table.shape[2]))).embeddings
        embeddings.position_embeddings.data = table.data
        expected = embeddings.interpolate_pos_encoding(torch.empty_like(resized), *img_size)
        torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    ours(torch.randn(1, 3, *img_size), torch.rand(1, math.prod(ours.encoder.grid)))


def test_the_stored_grid():
    state = new_encoder(img_size=(16, 48)).state_dict()  # 2 x 6, which is no square
    with pytest.raises(WeightsError, match=r"12 positions, which are no grid of \(3, 3\)"):
        load_weights(new_encoder(), state)
    with pytest.raises(WeightsError, match=r"12 positions, which are no grid of \(4, 4\)"):
        load_weights(new_encoder(img_size=(16, 48)), state, stored=Stored((4, 4)))
    assert load_weights(new_encoder(), state, stored=Stored((2, 6))).resized == ("encoder.pos_embed 2x6 -> 4x4",)
    assert load_weights(new_encoder(img_size=(16, 48)), state).resized == ()


# Refusals


def refused(model, state, **options) -> str:
    """The message; and nothing was copied."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, state, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return str(error.value)


def test_every_missing_and_unexpected_parameter_is_named():
    state = randomised(new_encoder()).state_dict()
    block = [name for name in state if name.startswith("blocks.1.") and "fc1" not in name]
    holed = {name: value for name, value in state.items() if name not in block}
    message = refused(new_encoder(), holed)
    assert all(f"encoder.{name} is missing" in message for name in block) and message.count("missing") == len(block)
    message = refused(new_encoder(), state | {f"extra.{name}": state[name] for name in block})
    assert all(f"extra.{name} is unexpected" in message for name in block) and message.count("unexp") == len(block)


def test_every_wrong_shape_is_named():
    state = randomised(new_encoder()).state_dict()
    message = refused(new_encoder(), state | {"cls_token": torch.ones(1, 1, 64), "norm.weight": torch.ones(7)})
    assert "encoder.cls_token is (1, 1, 64) instead of (1, 1, 32)" in message
    assert "encoder.norm.weight is (7,) instead of (32,)" in message and message.count("instead of") == 2
    assert "(32, 192) instead of (32, 3, 8, 8)" in refused(  # a projection that is flat
        new_encoder(), state | {"patch_embed.proj.weight": state["patch_embed.proj.weight"].flatten(1)}
    )


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (
            dict(embed_dim=64, depth=3),
            dict(),
            "have an encoder of 64 x 3 with patches of 8, the model 32 x 2 with patches of 8; "
            "give --encoder_embed_dim 64 --encoder_depth 3 with the --encoder_num_heads of its training",
        ),
        (
            dict(depth=3, decoder=dict(decoder_depth=2)),
            dict(),
            "have an encoder of 32 x 3 with patches of 8, the model 32 x 2 with patches of 8; "
            "a decoder of 16 x 2, the model 16 x 3; give --encoder_depth 3, --decoder_depth 2",
        ),
        (
            dict(decoder=dict(decoder_embed_dim=32)),
            dict(),
            "have a decoder of 32 x 3, the model 16 x 3; "
            "give --decoder_embed_dim 32 with the --decoder_num_heads of its training",
        ),
        (
            dict(patch_size=4, img_size=16),
            dict(in_channels=1),
            "have an encoder of 32 x 2 with patches of 4, the model 32 x 2 with patches of 8; "
            "3 input channels, the model 1; "
            "give --patch_size 4, --adapt_channels to convert them (or --input_channels 3)",
        ),
        (
            dict(mlp_ratio=85 / 32, decoder=dict(decoder_mlp_ratio=2)),
            dict(),
            "have an encoder of 32 x 2 with patches of 8 and an MLP ratio of 2.6563, "
            "the model 32 x 2 with patches of 8 and an MLP ratio of 4; "
            "a decoder of 16 x 3 with an MLP ratio of 2, the model 16 x 3 with an MLP ratio of 4; "
            "give --encoder_mlp_ratio 2.6563, --decoder_mlp_ratio 2",
        ),
    ],
)
def test_other_sizes_are_told_in_words(there, here, words):
    state = official(randomised(new_autoencoder(**there)))
    assert refused(new_autoencoder(**here), state) == f"weights of the official MAE {words}"
    load_weights(new_autoencoder(**there), state)


def test_the_flags_that_an_error_gives_are_those_that_fit():
    state = new_encoder(embed_dim=48, num_heads=2, mlp_ratio=113 / 48).state_dict()
    message = refused(new_encoder(), state)
    ratio = float(message.partition("--encoder_mlp_ratio ")[2].split()[0])
    load_weights(new_encoder(embed_dim=48, mlp_ratio=ratio), state)


@pytest.mark.parametrize(
    ("there", "here", "flags"),
    [
        (
            SIZES["large"],
            SIZES["base"],
            "--model large (or --encoder_embed_dim 1024 --encoder_depth 24 --encoder_num_heads 16)",
        ),
        (
            SIZES["huge"],
            SIZES["base"],
            "--model huge (or --encoder_embed_dim 1280 --encoder_depth 32 --encoder_num_heads 16) --patch_size 14",
        ),
        (
            SIZES["huge"] | dict(patch_size=16),  # which --model huge alone does not have
            SIZES["base"],
            "--model huge (or --encoder_embed_dim 1280 --encoder_depth 32 --encoder_num_heads 16) --patch_size 16",
        ),
        (SIZES["tiny"], SIZES["tiny"] | dict(depth=4), "--model tiny (or --encoder_depth 12)"),
        (SIZES["base"], SIZES["base"] | dict(patch_size=8), "--patch_size 16"),
    ],
)
def test_other_sizes_are_told_by_their_name(there, here, flags):
    with torch.device("meta"):  # shapes without numbers
        there, model = VisionTransformer(**there), VisionTransformer(**here)
    with pytest.raises(WeightsError) as error:
        load_weights(model, there.state_dict())
    assert str(error.value).endswith(f"; give {flags}")


def test_a_hole_is_not_taken_for_another_depth():
    state = official(randomised(new_autoencoder()))
    holed = {name: value for name, value in state.items() if not name.startswith("decoder_blocks.1.")}
    message = refused(new_autoencoder(), holed)
    assert "decoder_blocks.1.norm1.weight is missing" in message and message.count("is missing") == 12


def test_an_encoder_is_no_autoencoder():
    message = refused(new_autoencoder(), randomised(new_encoder()).state_dict())
    assert "mask_token is missing" in message and "decoder_blocks.2.attn.qkv.weight is missing" in message
    assert message.endswith("they hold no decoder: give those of a whole autoencoder")


def test_near_relatives_are_refused():
    unbiased = timm.create_model("vit_base_patch16_224", **SMALL, qkv_bias=False)
    assert "encoder.blocks.1.attn.qkv.bias is missing" in refused(new_encoder(), unbiased.state_dict())
    scaled = timm.create_model("vit_base_patch16_224", **SMALL, init_values=1.0)
    assert "encoder.blocks.0.ls1.gamma is unexpected" in refused(new_encoder(), scaled.state_dict())
    beit = BeitModel(BeitConfig(**THEIRS, use_absolute_position_embeddings=True))  # with its layer scale
    assert "have layer scale, the model none; give --layer_scale 1 " in refused(new_classifier(), beit.state_dict())
    biased = BeitModel(BeitConfig(**THEIRS, **BEIT | dict(use_relative_position_bias=True)))
    message = refused(new_classifier().encoder, biased.state_dict())
    assert "have relative position bias, the model none; give --relative_position_bias in segmentation" in message
    files = to_transformers({f"encoder.{name}": value for name, value in new_encoder().state_dict().items()})
    del files["vit.encoder.layer.0.attention.attention.value.bias"]
    assert "blocks.0.attn.qkv.bias is (64,) instead of (96,)" in refused(new_encoder(), files)


def test_an_unknown_layout_is_refused():
    with pytest.raises(WeightsError, match=r"without an encoder, or .* layout \(layer1.weight, layer2.weight, ...\)"):
        to_ours({"layer1.weight": torch.ones(1), "layer2.weight": torch.ones(1)})


def test_report_is_one_line():
    state = official(new_autoencoder()) | {"head.weight": torch.ones(1)}
    line = str(load_weights(new_encoder(img_size=64), state))
    assert line == (
        "weights of the official MAE: 30 loaded, 0 missing, 45 ignored (decoder_blocks, decoder_embed, decoder_norm, "
        "decoder_pos_embed, decoder_pred, head, mask_token), resized: encoder.pos_embed 4x4 -> 8x8"
    )


# Classifiers


def trained_classifier(pooling: str = "mean", **change) -> Classifier:
    """A classifier whose every number is random, the statistics of a linear probe too."""
    model = randomised(new_classifier(pooling, **change))
    if model.linear_probe:
        model.head_norm.running_mean.normal_(std=3)
        model.head_norm.running_var.uniform_(0.1, 3)
    return model


def official_linear_probe(model: Classifier) -> dict[str, torch.Tensor]:
    """The names of the official code, whose head is a sequence of norm and layer."""
    return {
        name.replace("head.", "head.1.").replace("head_norm.", "head.0."): value
        for name, value in official(model).items()
    }


KINDS = [(pooling, linear_probe) for pooling in ("mean", "cls") for linear_probe in (False, True)]


@torch.inference_mode()
@pytest.mark.parametrize(("pooling", "linear_probe"), KINDS)
def test_a_whole_classifier(pooling, linear_probe):
    source = trained_classifier(pooling, linear_probe=linear_probe)
    theirs = official_linear_probe(source) if linear_probe else official(source)
    layouts = {"this project": source.state_dict(), "a timm or MAE classifier": theirs}
    for layout, state in layouts.items():
        ours = new_classifier(pooling, linear_probe=linear_probe)
        report = load_weights(ours, state)
        assert torch.equal(ours(IMAGES), source(IMAGES)) and report.layout == layout
        assert report.loaded == len(state) and report.ignored == report.missing == report.resized == ()
        assert classifier_kind(state) == (5, pooling, linear_probe)
        assert encoder_sizes(state, Stored(num_heads=2)) == SIZES_OF_SMALL


@torch.inference_mode()
def test_a_classifier_for_other_images():
    source, ours = trained_classifier(), new_classifier(img_size=64, in_channels=1)
    report = load_weights(ours, source.state_dict(), adapt_channels=True)
    assert report.resized == ("encoder.pos_embed 4x4 -> 8x8",)
    assert report.adapted == ("encoder.patch_embed.proj.weight 3 -> 1 channels",)


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
    state, ours = randomised(new_encoder()).state_dict(), new_classifier().encoder
    report = load_weights(ours, state)
    assert report.ignored == ("encoder.norm.bias", "encoder.norm.weight") and report.loaded == len(state) - 2
    assert "2 ignored (encoder.norm), resized" in str(report)
    assert not any("norm" in name and "blocks" not in name for name in ours.state_dict())


def test_an_encoder_without_norm_is_for_mean_pooling():
    state = trained_classifier("mean").state_dict()
    assert refused(new_classifier("cls").encoder, state) == (
        "weights of this project were trained with mean pooling, so their encoder has no norm; give --pooling mean"
    )
    message = refused(new_autoencoder(), state, new_decoder=True)  # pre-training has no such flag
    assert message.endswith("so their encoder has no norm; give those that it was fine-tuned from")
    del state["fc_norm.weight"]
    assert "encoder.norm.weight is missing" in refused(new_encoder(), state)


def test_a_head_that_does_not_fit():
    state = trained_classifier("mean").state_dict()
    message = refused(new_classifier(num_classes=7), state)
    assert message == "weights of this project have a head of 5 classes, the model 7; give --num_classes 5"
    message = refused(new_classifier("cls", num_classes=7), official(trained_classifier()))
    assert message == (
        "weights of a timm or MAE classifier have a head of 5 classes, the model 7; mean pooling, the model cls; "
        "give --num_classes 5, --pooling mean"
    )
    assert refused(new_classifier(), trained_classifier("cls").state_dict()).endswith("give --pooling cls")
    probe = trained_classifier(linear_probe=True).state_dict()
    assert refused(new_classifier(), probe).endswith("have the BatchNorm of a linear probe; give --linear_probe")
    message = refused(new_classifier(linear_probe=True), state)
    assert message.endswith("have no BatchNorm of a linear probe; give no --linear_probe")
    for holder in (new_encoder(), new_autoencoder()):
        message = refused(new_classifier(), holder.state_dict())
        assert message.endswith("hold no classifier's head; give those of a trained classifier")
    message = refused(new_classifier(embed_dim=64), state)  # the size comes first
    assert (
        "have an encoder of 32 x 2 with patches of 8, the model 64 x 2" in message and "--encoder_embed_dim" in message
    )
    message = refused(new_classifier(in_channels=1), state)
    assert message.endswith("give --adapt_channels to convert them (or --input_channels 3)")
    assert refused(new_classifier(), state, stored=Stored(num_heads=4)).endswith("give --encoder_num_heads 4")
    del state["head.bias"]
    assert "head.bias is missing" in refused(new_classifier(), state)


def test_weights_without_an_encoder():
    decoder = {n: t for n, t in new_autoencoder().state_dict().items() if not n.startswith("encoder.")}
    head = {n: t for n, t in new_classifier().state_dict().items() if not n.startswith("encoder.")}
    for state, found in (
        (decoder, "mask_token, decoder_pos_embed"),
        (head, "fc_norm.weight, fc_norm.bias, head.weight"),
    ):
        for use in (to_ours, encoder_sizes, classifier_kind, lambda state: load_weights(new_encoder(), state)):
            with pytest.raises(
                WeightsError, match=rf"without an encoder, or of an unknown layout \({found}.*\); expected"
            ):
                use(state)
    holed = new_encoder().state_dict()
    del holed["blocks.0.mlp.fc1.weight"]
    with pytest.raises(WeightsError, match=r"do not tell the sizes of an encoder \(encoder.blocks.0.*\); expected"):
        encoder_sizes(holed)


# Segmentation

NAMES = ["ant", "bee", "cat", "dog", "eel"]
EXTRAS = dict(relative_position_bias=True, layer_scale=0.5)
LINEAR = dict(head="linear")


def new_segmenter(num_classes: int = 5, *, head: dict | None = None, **change) -> Segmenter:
    head = dict(head_width=12) | (head or {})
    return Segmenter(new_encoder(**dict(depth=4) | change), num_classes, **head).eval()


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with every number random, the statistics of its BatchNorms too."""
    randomised(model)
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.nn.init.uniform_(buffer, 0.3, 2)
    return model


def stock_segmenter(**change) -> UperNetForSemanticSegmentation:
    """transformers' UperNet with a BEiT, of the sizes of `new_segmenter`."""
    backbone = THEIRS | BEIT | dict(num_hidden_layers=4, add_fpn=True, batch_norm_eps=1e-5)
    backbone["out_features"] = [f"stage{i}" for i in (1, 2, 3, 4)]
    config = UperNetConfig(backbone_config=BeitConfig(**backbone | change), hidden_size=12, num_labels=5)
    return trained(UperNetForSemanticSegmentation(config))


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
    unused = any(re.match(r"backbone\.(beit\.)?layernorm\.", name) for name in state)  # of some versions and settings
    norm = ("encoder.norm.bias", "encoder.norm.weight") if unused else ()
    assert report.ignored == norm and report.missing == report.resized == ()
    assert segmenter_kind(state) == SegmenterKind(5, "upernet", 12, True, bool(here), bool(here))
    if state_of is files_of_5:
        assert read_stored(tmp_path) == Stored((4, 4), 2, layers=[0, 1, 2, 3])

    for img_size, name in (((48, 48), "6x6"), ((24, 64), "3x8")):  # the encoder alone, for other images
        segmenter = new_segmenter(img_size=img_size, **here)
        report = load_weights(segmenter.encoder, state)
        images = torch.randn(2, 3, *img_size)
        maps = theirs.backbone(images).feature_maps[2]
        torch.testing.assert_close(segmenter.encoder.forward_layers(images, [2])[0], maps, rtol=0, atol=1e-5)
        biases = (f"4 relative position biases 4x4 -> {name}",) if here else ()
        assert report.resized == (f"encoder.pos_embed 4x4 -> {name}", *biases)
        heads = {name for name in ours.state_dict() if not name.startswith("encoder.")}
        assert set(report.ignored) == heads | set(norm)


@torch.inference_mode()
def test_biases_are_resized_as_the_model_does_it_for_other_images():
    source, ours = trained(new_segmenter(**EXTRAS)), new_segmenter(img_size=64, **EXTRAS)
    load_weights(ours.encoder, source.encoder.state_dict())
    for block, other in zip(ours.encoder.blocks, source.encoder.blocks, strict=True):
        assert torch.equal(block.attn.relative_position_bias_table[-3:], other.attn.relative_position_bias_table[-3:])
    flat = trained(new_segmenter(img_size=(16, 64), **EXTRAS))  # 2 x 8, which holds as many patches
    ours = new_segmenter(**EXTRAS)
    report = load_weights(ours, flat.state_dict(), stored=Stored((2, 8)))
    torch.testing.assert_close(ours(IMAGES), flat(IMAGES), rtol=0, atol=1e-4)
    assert report.resized == ("encoder.pos_embed 2x8 -> 4x4", "4 relative position biases 2x8 -> 4x4")
    message = refused(new_segmenter(**EXTRAS), flat.state_dict())  # nobody tells
    assert "relative_position_bias_table is (48, 2) instead of (52, 2)" in message


def test_biases_and_scales_of_an_encoder_may_be_new():
    state = official(randomised(new_autoencoder(depth=4)))
    ours = new_segmenter(**EXTRAS)
    report = load_weights(ours.encoder, state)
    for name, value in ours.encoder.state_dict().items():
        if name not in state:
            assert torch.equal(value, torch.full_like(value, 0.5 if "gamma" in name else 0.0))
    assert len(report.missing) == 4 * 3 and report.loaded == len(ours.encoder.state_dict()) - 12
    assert str(report).endswith(
        "resized: none, relative position bias, layer scale: newly initialised (12 parameters missing)"
    )
    biased = trained(new_segmenter(relative_position_bias=True)).state_dict()
    report = load_weights(ours.encoder, biased)
    assert str(report).endswith(", layer scale: newly initialised (8 parameters missing)")
    assert torch.equal(
        ours.encoder.blocks[1].attn.relative_position_bias_table,
        biased["encoder.blocks.1.attn.relative_position_bias_table"],
    )
    del biased["encoder.blocks.1.attn.relative_position_bias_table"]  # a hole is no plan
    message = refused(ours.encoder, biased)
    assert "do not fit: encoder.blocks.1.attn.relative_position_bias_table is missing; give" in message


def test_the_encoder_of_a_segmenter():
    source = trained(new_segmenter())
    ours = new_classifier("mean", depth=4).encoder
    report = load_weights(ours, source.state_dict())
    assert torch.equal(ours(IMAGES), source.encoder(IMAGES))
    assert "ignored (auxiliary_head, decode_head, fpn), resized: none" in str(report)
    whole, state = new_autoencoder(depth=4), source.state_dict()
    words = "weights of this project were trained for segmentation, so their encoder has no norm; give "
    assert refused(new_classifier("cls", depth=4).encoder, state) == f"{words}--pooling mean"
    assert refused(whole, state, new_decoder=True) == f"{words}those that it was fine-tuned from"
    message = refused(new_classifier(depth=4), state)
    assert message.endswith("hold no classifier's head; give those of a trained classifier")
    extras = trained(new_segmenter(**EXTRAS)).state_dict()
    for holder in (new_segmenter().encoder, new_classifier("cls", depth=4).encoder, new_classifier(depth=4), whole):
        assert refused(holder, extras) == (
            "weights of this project have relative position bias and layer scale, the model none; "
            "give --relative_position_bias --layer_scale 1 in segmentation, elsewhere those of a plain ViT or MAE"
        )


def test_a_segmenter_that_does_not_fit():
    state = trained(new_segmenter()).state_dict()
    linear = trained(new_segmenter(head=LINEAR)).state_dict()
    extras = trained(new_segmenter(layer_scale=1.0)).state_dict()
    for model, given, words in (
        (new_segmenter(7), state, "have a head of 5 classes, the model 7; give data of 5 classes"),
        (new_segmenter(head=LINEAR), state, "have the head upernet, the model linear; give --head upernet"),
        (new_segmenter(), linear, "have the head linear, the model upernet; give --head linear"),
        (
            new_segmenter(head=dict(head_width=16, auxiliary=False)),
            state,
            "have a head of width 12, the model 16; an auxiliary head; give --head_width 12, --auxiliary_weight 0.4",
        ),
        (
            new_segmenter(relative_position_bias=True),
            trained(new_segmenter(head=dict(auxiliary=False))).state_dict(),
            "have no auxiliary head; no relative position bias; give --auxiliary_weight 0, --no-relative_position_bias",
        ),
        (new_segmenter(), extras, "have layer scale; give --layer_scale 1"),
        (
            new_segmenter(relative_position_bias=True, layer_scale=1.0),
            extras,
            "have no relative position bias; give --no-relative_position_bias",
        ),
        (new_segmenter(head=LINEAR, layer_scale=1.0), linear, "have no layer scale; give --layer_scale 0"),
    ):
        assert refused(model, given) == f"weights of this project {words}"
    stored = Stored(layers=[0, 2, 3, 4])
    deeper = new_segmenter(depth=5, head=dict(layers=[1, 2, 3, 4]))
    message = refused(deeper, trained(new_segmenter(depth=5)).state_dict(), stored=stored)
    assert message.endswith("have a head on the layers 0 2 3 4, the model on 1 2 3 4; give --layers 0 2 3 4")
    assert "--encoder_depth 4" in refused(new_segmenter(depth=5), state)  # the size comes first
    for holder in (new_encoder(depth=4), new_classifier(depth=4)):
        message = refused(new_segmenter(), holder.state_dict())
        assert "hold no head of segmentation (upernet or linear); give those of a trained segmentation model" in message
    for hole in ("decode_head.bottleneck.batch_norm.running_var", "fpn.fpn1.3.bias"):
        message = refused(new_segmenter(), {name: value for name, value in state.items() if name != hole})
        assert f"do not fit: {hole} is missing; give" in message
    load_weights(new_segmenter(), state, stored=Stored((4, 4), 2, layers=[0, 1, 2, 3]))


def test_the_kind_of_a_segmenter():
    for head, kind in (
        (dict(head_width=16, auxiliary=False), ("upernet", 16, False)),
        (dict(), ("upernet", 12, True)),
        (LINEAR, ("linear", 0, False)),
    ):
        for extras in ({}, dict(relative_position_bias=True), dict(layer_scale=0.1)):
            state = new_segmenter(3, head=head, **extras).state_dict()
            kinds = ("relative_position_bias" in extras, "layer_scale" in extras)
            assert segmenter_kind(state) == SegmenterKind(3, *kind, *kinds)
            assert classifier_kind(state) is None and encoder_sizes(state)["depth"] == 4
    for model in (new_encoder(), new_classifier(), new_autoencoder()):
        assert segmenter_kind(model.state_dict()) is None


def test_numbers_that_follow_from_the_grid_are_left_out():
    """Older files of BEiT hold them, as buffers of every block."""
    model = trained(new_segmenter(relative_position_bias=True))
    state = {f"encoder.blocks.{i}.attn.relative_position_index": torch.zeros(17, 17).long() for i in range(4)}
    theirs = to_transformers(model.state_dict())
    theirs = {name.replace("vit.", "backbone.", 1): value for name, value in theirs.items()}
    index = "backbone.encoder.layer.{}.attention.attention.relative_position_bias.relative_position_index"
    for more in (state | model.state_dict(), theirs | {index.format(i): torch.zeros(17, 17).long() for i in range(4)}):
        again = new_segmenter(relative_position_bias=True)
        load_weights(again, more)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_the_linear_head_as_an_upernet_is_for_transformers_alone(tmp_path):
    statistics = dict(mean=[0.5] * 3, std=[0.5] * 3)
    export_segmenter(trained(new_segmenter(head=LINEAR)), tmp_path, classes=NAMES, resize=(128, 32), **statistics)
    state = read_state_dict(tmp_path / "transformers_model.safetensors")
    assert segmenter_kind(state) is None
    assert refused(new_segmenter(head=LINEAR), state).endswith("as model.safetensors has them")
    load_weights(new_segmenter().encoder, state)


# Sizes that weights tell


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_known_encoders(name):
    with torch.device("meta"):
        timms = timm.create_model(f"vit_{name}_patch{SIZES[name]['patch_size']}_224", num_classes=1000).state_dict()
        size = SIZES[name]
        theirs = ViTModel(
            ViTConfig(
                hidden_size=size["embed_dim"],
                num_hidden_layers=size["depth"],
                num_attention_heads=size["num_heads"],
                intermediate_size=4 * size["embed_dim"],
                patch_size=size["patch_size"],
            )
        ).state_dict()
    for state in (timms, theirs):
        assert encoder_sizes(state) == size | dict(mlp_ratio=4.0, in_channels=3)
        assert encoder_sizes(state, Stored(num_heads=1))["num_heads"] == 1
    assert classifier_kind(timms) == (1000, "cls", False) and classifier_kind(theirs) is None


def test_sizes_of_other_encoders():
    thin = dict(img_size=48, patch_size=16, in_channels=4, embed_dim=48, depth=3, num_heads=3, mlp_ratio=113 / 48)
    for state in (VisionTransformer(**thin).state_dict(), MaskedAutoencoder(VisionTransformer(**thin)).state_dict()):
        sizes = encoder_sizes(state)
        assert sizes.pop("num_heads") is None and classifier_kind(state) is None
        load_weights(VisionTransformer(img_size=48, num_heads=3, **sizes), state)


# A new decoder


def encoders_of_several_layouts() -> list[dict[str, torch.Tensor]]:
    source = randomised(new_encoder())
    named = {f"encoder.{name}": value for name, value in source.state_dict().items()}
    head = {"head.weight": torch.ones(1)}
    return [source.state_dict() | head, named, randomised(ViTModel(ViTConfig(**THEIRS))).state_dict()]


@pytest.mark.parametrize("state", encoders_of_several_layouts())
def test_a_new_decoder(state):
    expected, ours = new_encoder(), randomised(new_autoencoder())
    load_weights(expected, state)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    report = load_weights(ours, state, new_decoder=True)
    assert torch.equal(ours.encoder(IMAGES), expected(IMAGES))
    decoder = tuple(name for name in before if not name.startswith("encoder."))
    assert report.missing == decoder and report.loaded == len(expected.state_dict())
    assert all(torch.equal(ours.state_dict()[name], before[name]) for name in decoder)
    line = str(report)
    assert "30 loaded, 44 missing" in line and "\n" not in line
    assert line.endswith("decoder: newly initialised (44 parameters missing)")


def test_a_new_decoder_is_not_for_weights_that_hold_one_or_a_part_of_one():
    source, ours = randomised(new_autoencoder()), new_autoencoder()
    assert load_weights(ours, official(source), new_decoder=True).missing == ()
    assert torch.equal(ours(IMAGES, NOISE).prediction, source(IMAGES, NOISE).prediction)
    for kept in ("mask_token", "decoder_pred.bias", "decoder_blocks.2."):
        part = {n: v for n, v in source.state_dict().items() if n.startswith(("encoder.", kept))}
        message = refused(new_autoencoder(), part, new_decoder=True)
        assert "decoder_embed.weight is missing" in message and f"{kept} is missing" not in message


def test_a_new_decoder_does_not_excuse_the_encoder():
    state = randomised(new_encoder()).state_dict()
    del state["norm.bias"]
    message = refused(new_autoencoder(), state, new_decoder=True)
    assert "do not fit: encoder.norm.bias is missing; give" in message


# Channels


def converted(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Images of N channels as the checkpoint's model, of `channels`, is to see them."""
    n = images.shape[1]
    if n <= channels:
        return images[:, [i % n for i in range(channels)]]
    return torch.stack([images[:, i::channels].mean(dim=1) for i in range(channels)], dim=1)


def predicted(pixels: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """Predictions (B, L, P*P*old) as the adapted model is to make them."""
    pixels = pixels.reshape(*pixels.shape[:2], 64, old)
    if new >= old:
        return pixels[..., [j % old for j in range(new)]].flatten(2)
    return torch.stack([pixels[..., j::new].mean(dim=-1) for j in range(new)], dim=-1).flatten(2)


@torch.inference_mode()
@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4), (4, 3), (4, 2), (2, 5)])
def test_other_channels(old, new):
    source = randomised(new_autoencoder(in_channels=old))
    ours, encoder = new_autoencoder(in_channels=new), new_encoder(in_channels=new)
    report = load_weights(ours, source.state_dict(), adapt_channels=True)
    names = ("encoder.patch_embed.proj.weight", "decoder_pred.weight", "decoder_pred.bias")
    assert report.adapted == tuple(f"{name} {old} -> {new} channels" for name in names)
    assert f"adapted: encoder.patch_embed.proj.weight {old} -> {new} channels, decoder_pred" in str(report)
    assert report.missing == report.resized == () and report.loaded == len(ours.state_dict())

    images = torch.randn(2, new, 32, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours.encoder(images), source.encoder(converted(images, old)), rtol=0, atol=1e-5)
    expected = predicted(source(converted(images, old), NOISE).prediction, old, new)
    torch.testing.assert_close(ours(images, NOISE).prediction, expected, rtol=0, atol=1e-5)

    grey = images[:, :1]  # the same in every channel: the same tokens, whatever the numbers of channels
    tokens = ours.encoder(grey.expand(-1, new, -1, -1))
    torch.testing.assert_close(tokens, source.encoder(grey.expand(-1, old, -1, -1)), rtol=0, atol=1e-5)

    report = load_weights(encoder, source.state_dict(), adapt_channels=True)  # the encoder alone
    assert torch.equal(encoder(images), ours.encoder(images)) and len(report.adapted) == 1


@torch.inference_mode()
def test_grey_from_a_folder_of_transformers(tmp_path):
    theirs = randomised(ViTMAEForPreTraining(ViTMAEConfig(**THEIRS, **THEIR_DECODER)))
    theirs.save_pretrained(tmp_path)
    ours, grey = new_autoencoder(in_channels=1), IMAGES[:, :1]
    load_weights(ours, read_state_dict(find_weights(tmp_path, whole=True)), adapt_channels=True)
    expected = theirs(grey.expand(-1, 3, -1, -1), noise=NOISE).logits.unflatten(2, (64, 3)).mean(dim=-1)
    torch.testing.assert_close(ours(grey, NOISE).prediction, expected, rtol=0, atol=1e-5)


def test_other_channels_are_refused_unless_asked_for():
    state = official(randomised(new_autoencoder()))
    for model in (new_autoencoder(in_channels=1), new_encoder(in_channels=1)):
        assert refused(model, state) == (
            "weights of the official MAE have 3 input channels, the model 1; "
            "give --adapt_channels to convert them (or --input_channels 3)"
        )
    assert load_weights(new_autoencoder(), state, adapt_channels=True).adapted == ()  # nothing to adapt
    message = refused(new_autoencoder(in_channels=1), state | {"decoder_pred.bias": torch.ones(7)}, adapt_channels=True)
    assert "decoder_pred.bias is (7,) instead of (64,)" in message


def test_channels_size_and_decoder_change_at_once():
    source, ours = randomised(new_encoder()), new_autoencoder(in_channels=1, img_size=64)
    report = load_weights(ours, source.state_dict(), adapt_channels=True, new_decoder=True)
    assert (len(report.adapted), len(report.resized), len(report.missing)) == (1, 1, 44)
    assert str(report) == (
        "weights of a timm or MAE encoder: 30 loaded, 44 missing, 0 ignored, resized: encoder.pos_embed 4x4 -> 8x8, "
        "adapted: encoder.patch_embed.proj.weight 3 -> 1 channels, "
        "decoder: newly initialised (44 parameters missing)"
    )
