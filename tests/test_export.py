"""Tests of exported folders: transformers, timm and this project load all parameters and compute the same numbers."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from random_modules import build_autoencoder
from random_modules import new_encoder as build_encoder
from random_modules import randomize as randomize_by
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BeitForImageClassification,
    PixioModel,
    TimmWrapperForImageClassification,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    ViTModel,
    pipeline,
)

from modeling import export
from modeling.classifier import Classifier
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_encoder,
    export_segmenter,
    to_official,
    to_transformers,
)
from modeling.files import Stored, read_state_dict, read_stored
from modeling.layouts import to_ours
from modeling.trained import open_trained
from modeling.upernet import HEADS, Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights

randomize = partial(randomize_by, std=0.02)
MEAN, STD = [0.485, 0.456, 0.406, 0.5], [0.229, 0.224, 0.225, 0.25]
ENCODERS = {
    "tiny, 2 blocks": SIZES["tiny"] | dict(depth=2),
    "128 x 4, 64 pixels": dict(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    "32 x 64, 4 channels": dict(img_size=(32, 64), patch_size=8, in_channels=4, embed_dim=128, depth=4, num_heads=4),
    "a thin MLP": dict(img_size=48, patch_size=16, in_channels=1, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.5),
}


def new_encoder(size: dict) -> VisionTransformer:
    """Return an encoder in which every parameter is random."""
    return randomize(VisionTransformer(**size))


def assert_equal(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def statistics(encoder: VisionTransformer) -> dict:
    return dict(mean=MEAN[: encoder.in_channels], std=STD[: encoder.in_channels])


@pytest.fixture(scope="module", params=ENCODERS)
def exported(request, tmp_path_factory):
    encoder = new_encoder(ENCODERS[request.param])
    folder = tmp_path_factory.mktemp("encoder") / "new" / "folder"
    export_encoder(encoder, folder, **statistics(encoder))
    return encoder, folder


@torch.inference_mode()
def test_three_libraries_load_the_encoder_and_agree(exported):
    encoder, folder = exported
    images = torch.randn(2, encoder.in_channels, *encoder.img_size, generator=torch.Generator().manual_seed(1))
    features = encoder(images)

    theirs, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(theirs, ViTModel) and not any(info.values()), info
    output = theirs.eval()(images)
    torch.testing.assert_close(output.last_hidden_state, features, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.pooler_output, features[:, 0], rtol=0, atol=1e-5)

    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs.load_state_dict(read_state_dict(folder), strict=True)
    torch.testing.assert_close(theirs.forward_features(images), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(images), features[:, 0], rtol=0, atol=1e-5)

    for path in (folder, folder / "transformers_model.safetensors"):
        assert torch.equal(open_trained(path, given=read_stored(folder)).model(images), features)


def test_timm_reads_the_file_and_knows_the_input(exported):
    encoder, folder = exported
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_equal(model.state_dict(), encoder.state_dict())  # not timm's own initialization
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (encoder.in_channels, *encoder.img_size)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)
    assert (list(config["mean"]), list(config["std"])) == tuple(statistics(encoder).values())


@pytest.mark.parametrize(
    "size, name", [(size, f"vit_{size}_patch{SIZES[size]['patch_size']}_224") for size in SIZES] + [(None, None)]
)
def test_architecture_is_one_of_timms(size, name):
    args = SIZES[size] if size else ENCODERS["128 x 4, 64 pixels"]
    with torch.device("meta"):
        encoder = VisionTransformer(**args)
    architecture = export._timm_config(encoder, MEAN, STD)["architecture"]
    assert architecture == (name or "vit_base_patch16_224") and timm.is_model(architecture)


def test_both_image_processors_do_the_evaluation_transform(tmp_path):
    encoder = new_encoder(SIZES["tiny"] | dict(depth=1))
    export_encoder(encoder, tmp_path, **statistics(encoder))
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.size["shortest_edge"] == 256
    theirs = processor(image, return_tensors="pt").pixel_values
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    timms = timm.data.create_transform(**timm.data.resolve_data_config(model=model))(image)
    assert theirs.shape == (1, 3, 224, 224)
    assert (theirs[0] - timms).abs().mean() < 0.5 / 255 / 0.22  # one rounds to uint8, the other does not


def test_image_processor_of_other_sizes(exported):
    encoder, folder = exported
    if encoder.in_channels == 3:
        image = Image.new("RGB", (100, 80))
        pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values
        assert pixels.shape == (1, 3, *encoder.img_size)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    height, width = encoder.img_size
    resized = config["size"]
    if height == width:
        assert resized == {"shortest_edge": {224: 256, 64: 73, 48: 54}[height]}  # rounded down, as timm does
    else:
        assert resized == {"height": 36, "width": 73}
    assert config["crop_size"] == {"height": height, "width": width}


@pytest.mark.parametrize("target, mask_ratio", [("normalized", 0.75), ("pixels", 0.6)])
@pytest.mark.parametrize("size", ["tiny, 2 blocks", "128 x 4, 64 pixels", "a thin MLP"])
def test_transformers_loads_the_autoencoder_and_agrees(size, target, mask_ratio, tmp_path):
    encoder = VisionTransformer(**ENCODERS[size])
    settings = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=4, decoder_mlp_ratio=3.0)
    model = build_autoencoder(encoder, **settings, target=target, mask_ratio=mask_ratio)
    randomize(model)
    export_encoder(encoder, tmp_path, **statistics(encoder))
    export_autoencoder(model, tmp_path / "pretraining", **statistics(encoder))
    images = torch.randn(2, encoder.in_channels, *encoder.img_size, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(2, encoder.grid[0] * encoder.grid[1], generator=torch.Generator().manual_seed(2))

    places = [((tmp_path / "pretraining",), {}), ((tmp_path,), dict(subfolder="pretraining"))]
    for args, kwargs in places:
        theirs, info = ViTMAEForPreTraining.from_pretrained(*args, **kwargs, output_loading_info=True)
        assert not any(info.values()), info
        with torch.inference_mode():
            expected, output = theirs.eval()(images, noise=noise), model(images, noise)
        assert torch.equal(output.mask, expected.mask)
        torch.testing.assert_close(output.prediction, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)
    assert theirs.config.norm_pix_loss is (target == "normalized")

    again = build_autoencoder(VisionTransformer(**ENCODERS[size]), **settings)
    load_weights(again, read_state_dict(tmp_path / "pretraining"))
    assert_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("grid", [(1, 3), (7, 7), (14, 14), (5, 10), (13, 31)])
def test_the_mask_ratio_keeps_as_many_patches(grid, tmp_path):
    size = dict(img_size=(2 * grid[0], 2 * grid[1]), patch_size=2, embed_dim=4, depth=1, num_heads=1)
    encoder = VisionTransformer(**size)
    num_patches = grid[0] * grid[1]
    for kept in range(1, num_patches, max(1, num_patches // 20)):
        decoder = dict(decoder_embed_dim=4, decoder_depth=1, decoder_num_heads=1)
        model = build_autoencoder(encoder, **decoder, mask_ratio=1 - (kept + 0.3) / num_patches)
        assert model.num_kept == kept
        export_autoencoder(model, tmp_path, **statistics(encoder))
        ratio = json.loads((tmp_path / "config.json").read_text())["mask_ratio"]
        assert int(num_patches * (1 - ratio)) == kept


def test_an_autoencoder_that_is_not_square_is_for_this_project_alone(tmp_path):
    size, decoder = ENCODERS["32 x 64, 4 channels"], dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = randomize(build_autoencoder(VisionTransformer(**size), **decoder))
    export_autoencoder(model, tmp_path, **statistics(model.encoder))
    assert_equal(open_trained(tmp_path).model.state_dict(), model.state_dict())


def test_renaming_and_back_is_bit_equal():
    model = randomize(build_autoencoder(VisionTransformer(**ENCODERS["32 x 64, 4 channels"]), decoder_depth=2))
    state = model.state_dict()
    theirs = to_transformers(state)
    assert len(theirs) == len(state) + 2 * 2 * (4 + 2)  # qkv weight and bias of each block become three each
    assert not theirs.keys() & state.keys()
    assert_equal(to_ours(theirs)[1], state)
    for kind in ("mean", "cls"):
        state = new_classifier(SHAPES["square"], KINDS[kind]).state_dict()
        assert_equal(to_ours(to_transformers(state))[1], state)
    state = new_segmenter("upernet, bias, layer scale").state_dict()
    theirs = to_transformers(state)
    heads = [name for name in state if "_head." in name]
    assert len(heads) > 50 and theirs.keys() & state.keys() == set(heads)
    assert_equal(to_ours({name.replace("vit.", "backbone.", 1): value for name, value in theirs.items()})[1], state)


@torch.inference_mode()
def test_files_of_the_official_code_and_of_timm_come_back_bit_equal(tmp_path):
    """Check the round trips ours -> official -> ours -> official and timm -> ours -> timm."""
    for size in ("128 x 4, 64 pixels", "32 x 64, 4 channels"):
        model = randomize(build_autoencoder(VisionTransformer(**ENCODERS[size]), decoder_depth=2))
        official = to_official(model.state_dict())
        assert {"pos_embed", "blocks.0.attn.qkv.weight", "decoder_blocks.1.mlp.fc2.bias"} <= official.keys()
        torch.save({"model": official}, tmp_path / "mae.pth")
        layout, ours = to_ours(read_state_dict(tmp_path / "mae.pth"))
        again = build_autoencoder(VisionTransformer(**ENCODERS[size]), decoder_depth=2)
        load_weights(again, read_state_dict(tmp_path / "mae.pth"), stored=Stored(grid=model.encoder.grid))
        assert layout == "the official MAE" and ours.keys() == model.state_dict().keys()
        assert_equal(to_official(again.state_dict()), official)
    for kind in ("mean", "cls"):
        theirs = timm.create_model(
            "vit_tiny_patch16_224", depth=2, num_classes=7, global_pool={"mean": "avg", "cls": "token"}[kind]
        )
        encoder = VisionTransformer(**SIZES["tiny"] | dict(depth=2))
        ours = Classifier(encoder, 7, pooling=kind)
        load_weights(ours, randomize(theirs).state_dict())
        assert_equal(to_official(ours.state_dict()), theirs.state_dict())


# Classifiers

NAMES = ["ant", "bee", "a cat", "døg", "eel", "fox", "gnu"]
SHAPES = {
    "ViT-Ti": SIZES["tiny"],
    "square": dict(img_size=64, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    "grey, a thin MLP": dict(
        img_size=48, patch_size=16, in_channels=1, embed_dim=64, depth=2, num_heads=2, mlp_ratio=2.5
    ),
    "four channels": dict(img_size=32, patch_size=8, in_channels=4, embed_dim=64, depth=2, num_heads=2),
    "32 x 64": ENCODERS["32 x 64, 4 channels"] | dict(in_channels=3),
    "16 x 64, as many patches as a square": dict(
        img_size=(16, 64), patch_size=8, in_channels=4, embed_dim=64, depth=2, num_heads=2
    ),
}
KINDS = {
    "mean": dict(pooling="mean"),
    "cls": dict(pooling="cls"),
    "mean, linear probe": dict(pooling="mean", probe=True),
    "cls, linear probe": dict(pooling="cls", probe=True),
}


def new_classifier(size: dict, kind: dict) -> Classifier:
    """Return a classifier with random parameters and random BatchNorm statistics."""
    model = randomize(Classifier(VisionTransformer(**size), len(NAMES), **kind, custom_weight_init=False))
    if model.probe:
        torch.manual_seed(3)
        model.head_norm.running_mean.normal_(std=2)
        model.head_norm.running_var.uniform_(0.01, 3)
    return model


def write(model: Classifier, folder: Path, crop_ratio: float = 0.875) -> Path:
    export_classifier(model, folder, classes=NAMES, **statistics(model.encoder), crop_ratio=crop_ratio)
    return folder


def pictures(model: Classifier) -> torch.Tensor:
    encoder = model.encoder
    return torch.randn(4, encoder.in_channels, *encoder.img_size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_attentive_pooling_is_for_this_project_and_its_encoder_for_all(tmp_path):
    model = new_classifier(SHAPES["32 x 64"], dict(pooling="attentive", probe=True, num_queries=4))
    folder, images = write(model, tmp_path, crop_ratio=0.9), pictures(model)
    again = open_trained(folder)
    torch.testing.assert_close(again.model(images), model(images), rtol=0, atol=1e-5)
    assert again.class_names == NAMES and again.crop_ratio == 0.9 and not again.assumed
    assert (again.mean, again.std) == tuple(statistics(model.encoder)[name] for name in ("mean", "std"))
    with pytest.raises(ValueError, match="attentive_probe"):  # no encoder with a random head
        AutoModelForImageClassification.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder / "encoder").eval()
    torch.testing.assert_close(encoder(images).last_hidden_state, model.encoder(images), rtol=0, atol=1e-5)
    encoder = VisionTransformer(**SHAPES["32 x 64"]).eval()  # another training can start from the classifier
    report = load_weights(encoder, read_state_dict(folder), stored=read_stored(folder))
    assert not report.missing and {"attentive_pool.queries", "head.weight"} <= {*report.ignored}
    torch.testing.assert_close(encoder(images), model.encoder(images), rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("img_size", [32, (16, 32)])
def test_an_encoder_of_several_class_tokens_is_a_pixio(img_size, tmp_path):
    """The encoder, alone or of a classifier that keeps its final norm, opens again and, if square, equals a Pixio."""
    size = dict(img_size=img_size, patch_size=8, in_channels=4, embed_dim=32, depth=2, num_heads=2, num_cls_tokens=3)
    encoder = randomize(VisionTransformer(**size))
    head = new_classifier(size, dict(pooling="cls", probe=True))
    export_encoder(encoder, tmp_path / "alone", **statistics(encoder))
    export_classifier(head, tmp_path / "head", classes=NAMES, **statistics(encoder), crop_ratio=0.9)
    for folder, model in (("alone", encoder), ("head/encoder", head.encoder)):
        images = torch.randn(2, 4, *encoder.img_size)
        again = open_trained(tmp_path / folder)
        assert torch.equal(again.model(images), model(images)) and not again.assumed
        assert not (tmp_path / folder / "transformers_model.safetensors").exists()
        if img_size == 32:
            theirs = AutoModel.from_pretrained(tmp_path / folder)
            assert isinstance(theirs, PixioModel) and theirs.config.n_cls_tokens == 3
            output, tokens = theirs(images), model(images)
            torch.testing.assert_close(output.last_hidden_state, tokens, rtol=0, atol=1e-5)
            torch.testing.assert_close(output.pooler_output, tokens[:, :3].mean(dim=1), rtol=0, atol=1e-5)
    again = open_trained(tmp_path / "head")
    torch.testing.assert_close(again.model(images), head(images), rtol=0, atol=1e-5)
    assert again.model.pooling == "cls" and again.class_names == NAMES and not again.assumed
    with pytest.raises(ValueError, match="vit_classifier"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "head")


@torch.inference_mode()
@pytest.mark.parametrize("head", HEADS)
def test_heads_on_several_class_tokens_are_for_this_project(head, tmp_path):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_cls_tokens=3)
    options = dict(layers=[0, 1, 2, 4][-HEADS[head].num_layers :], head_width=HEADS[head].default_width and 16)
    model = randomize(Segmenter(VisionTransformer(**size), len(NAMES), head=head, **options))
    export_segmenter(model, tmp_path, classes=NAMES, **statistics(model.encoder), resize=(128, 32))
    again, images = open_trained(tmp_path), torch.randn(2, 3, 48, 32)
    assert torch.equal(again.model(images), model(images)) and not again.assumed
    assert again.model.layers == options["layers"] and again.class_names == NAMES
    with pytest.raises(ValueError, match="vit_segmenter"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_three_libraries_load_the_classifier_and_agree(shape, kind, tmp_path):
    model = new_classifier(SHAPES[shape], KINDS[kind])
    folder, images = write(model, tmp_path / "new" / "folder"), pictures(model)
    logits = model(images)
    assert (logits.amax(dim=0) - logits.amin(dim=0)).max() > 0.05  # they depend on the image

    theirs, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    square = model.encoder.img_size[0] == model.encoder.img_size[1]
    stock = BeitForImageClassification if model.pooling == "mean" else ViTForImageClassification
    assert type(theirs) is (stock if square else TimmWrapperForImageClassification)
    torch.testing.assert_close(theirs.eval()(images).logits, logits, rtol=0, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id["gnu"] == 6

    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs.load_state_dict(read_state_dict(folder), strict=True)
    torch.testing.assert_close(theirs(images), logits, rtol=0, atol=1e-5)
    assert theirs.pretrained_cfg["label_names"] == NAMES and theirs.num_classes == len(NAMES)
    assert theirs.global_pool == {"mean": "avg", "cls": "token"}[model.pooling]

    files = [folder, folder / "transformers_model.safetensors"] if square else [folder]
    stored = read_stored(folder)
    for path in files:
        again = open_trained(path, given=stored).model
        assert (again.num_classes, again.pooling, again.probe) == (len(NAMES), model.pooling, False)
        torch.testing.assert_close(again(images), logits, rtol=0, atol=1e-5)
    assert stored == Stored(
        model.encoder.grid,
        model.encoder.num_heads,
        None,
        *statistics(model.encoder).values(),
        NAMES,
        model.pooling,
        crop_ratio=0.875,
    )


def test_reading_what_was_written_is_bit_equal(tmp_path):
    for kind in ("mean", "cls"):
        model = new_classifier(SHAPES["square"], KINDS[kind])
        assert_equal(open_trained(write(model, tmp_path)).model.state_dict(), model.state_dict())


def test_the_pipeline_gives_the_names_and_the_probabilities(tmp_path):
    for shape, kind in (("square", "mean"), ("square", "cls, linear probe"), ("32 x 64", "mean"), ("32 x 64", "cls")):
        model = new_classifier(SHAPES[shape], KINDS[kind])
        folder = write(model, tmp_path)
        small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((200, 150), Image.Resampling.BICUBIC)
        answers = pipeline("image-classification", model=str(folder))(image, top_k=len(NAMES))

        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
        transform = timm.data.create_transform(**timm.data.resolve_data_config(model=theirs))
        with torch.inference_mode():
            expected = model(transform(image)[None]).softmax(dim=1)[0]
        assert [answer["label"] for answer in answers] == [NAMES[k] for k in expected.argsort(descending=True)]
        assert [answer["score"] for answer in answers] == pytest.approx(
            sorted(expected.tolist(), reverse=True), abs=3e-3
        )


@pytest.mark.parametrize(("crop_ratio", "resized"), [(0.875, 73), (1.0, 64), (0.9, 71)])
def test_the_crop_ratio_reaches_both_libraries(crop_ratio, resized, tmp_path):
    model = new_classifier(SHAPES["square"], KINDS["mean"])
    folder = write(model, tmp_path, crop_ratio)
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == resized
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = timm.data.resolve_data_config(model=theirs)
    assert config["crop_pct"] == crop_ratio
    assert timm.data.create_transform(**config).transforms[0].size == resized


def test_folding_happens_in_double_precision(tmp_path):
    """A mean of a thousand standard deviations costs float32 half of its digits. The model itself does not change."""
    model = new_classifier(SHAPES["square"], KINDS["cls, linear probe"])
    model.head_norm.running_mean.fill_(1.0)
    model.head_norm.running_var.fill_(1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = read_state_dict(write(model, tmp_path))
    weight = model.head.weight.detach().double() / math.sqrt(1e-6 + 1e-6)
    bias = model.head.bias.detach().double() - weight.sum(dim=1)
    torch.testing.assert_close(state["head.weight"].double(), weight, rtol=2e-7, atol=0)
    torch.testing.assert_close(state["head.bias"].double(), bias, rtol=2e-7, atol=0)
    assert not any(name.startswith("head_norm") for name in state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_are_float32_on_the_cpu_and_say_pt(tmp_path):
    encoder = new_encoder(ENCODERS["a thin MLP"]).bfloat16()
    export_encoder(encoder, tmp_path / "encoder", **statistics(encoder))
    write(new_classifier(SHAPES["square"], KINDS["mean, linear probe"]).bfloat16(), tmp_path / "model")
    weights = ["model.safetensors", "transformers_model.safetensors"]
    for folder in tmp_path.iterdir():
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted([*weights, "config.json", "preprocessor_config.json"])
        for name in weights:
            with safe_open(folder / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                assert all(file.get_tensor(key).dtype == torch.float32 for key in file.keys())  # noqa: SIM118
    assert encoder.cls_token.dtype == torch.bfloat16


# Segmentation

SEGMENTERS = {
    "upernet": (dict(head="upernet", layers=[0, 2, 3, 4], head_width=24), dict()),
    "upernet, bias, layer scale": (dict(head_width=24), dict(relative_position_bias=True, layer_scale=0.5)),
    "upernet, a zero layer scale, no auxiliary head": (dict(head_width=16, auxiliary=False), dict(layer_scale=0.0)),
    "linear": (dict(head="linear"), dict()),
    "linear, bias, layer scale": (
        dict(head="linear", layers=[3]),
        dict(relative_position_bias=True, layer_scale=1.0),
    ),
    "dpt": (dict(head="dpt", layers=[0, 2, 3, 4], head_width=24), dict()),
}


def new_segmenter(kind: str, **change) -> Segmenter:
    """Return a segmentation model with random parameters and random BatchNorm statistics."""
    options, extras = SEGMENTERS[kind]
    size = dict(img_size=48, patch_size=8, embed_dim=32, depth=5, num_heads=2, mlp_ratio=3.0)
    torch.manual_seed(4)
    model = randomize(Segmenter(build_encoder(**size | extras | change), len(NAMES), **options))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.3, 3)
        else:
            buffer.fill_(7)  # the number of batches
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.data.normal_()
        elif name.endswith("classifier.weight"):
            parameter.data.normal_(std=0.1)
    return model


def write_segmenter(model: Segmenter, folder: Path) -> Path:
    export_segmenter(model, folder, classes=NAMES, resize=(192, 48), **statistics(model.encoder))
    return folder


@torch.inference_mode()
@pytest.mark.parametrize("kind", SEGMENTERS)
def test_transformers_loads_the_segmenter_and_agrees(kind, tmp_path):
    model = new_segmenter(kind)
    folder = write_segmenter(model, tmp_path / "new" / "folder")
    theirs, info = AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.architectures == [type(theirs).__name__]
    assert theirs.config.id2label == dict(enumerate(NAMES)) and theirs.config.label2id["gnu"] == 6
    own, larger = torch.randn(2, 3, 48, 48), torch.randn(2, 3, 64, 100)
    for images in [own] if kind == "dpt" else [own, larger]:  # transformers' DPT resizes positions differently
        logits = model(images)
        assert logits.std(dim=(0, 2, 3)).min() > 0.03  # they depend on the image
        expected = torch.nn.functional.interpolate(theirs.eval()(images).logits, images.shape[2:], mode="bilinear")
        torch.testing.assert_close(expected, logits, rtol=0, atol=1e-4)
    if model.auxiliary:
        maps = theirs.backbone(own).feature_maps
        auxiliary = model.auxiliary_head(model.fpn(model.encoder.forward_layers(own, model.layers)))
        torch.testing.assert_close(theirs.auxiliary_head(maps), auxiliary, rtol=0, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("kind", SEGMENTERS)
def test_reading_a_segmenter_that_was_written(kind, tmp_path):
    model = new_segmenter(kind)
    folder, images = write_segmenter(model, tmp_path), torch.randn(1, 3, 48, 48)
    stored = read_stored(folder)
    known = dict(layers=model.layers, resize=[192, 48])
    assert stored == Stored((6, 6), 2, None, *statistics(model.encoder).values(), NAMES, **known)
    files = [folder, folder / "transformers_model.safetensors"]
    for path in files if model.head == "upernet" else files[:1]:
        again = open_trained(path, given=stored).model
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=1e-4)
        assert again.state_dict().keys() == model.state_dict().keys()
        if path == folder:  # bit-equal, with BatchNorm and auxiliary head
            assert_equal(again.state_dict(), model.state_dict())


def test_the_pipeline_names_the_classes_of_an_image(tmp_path):
    model = new_segmenter("linear")
    folder = write_segmenter(model, tmp_path)
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((100, 80), Image.Resampling.BICUBIC)
    answers = pipeline("image-segmentation", model=str(folder))(image)

    processor = AutoImageProcessor.from_pretrained(folder)
    labels = Image.fromarray(np.array([[0, 1], [7, 255]], dtype=np.uint8).repeat(24, 0).repeat(24, 1))
    inputs = processor(image, segmentation_maps=labels, return_tensors="pt")
    assert inputs["labels"].unique().tolist() == [0, 6, 255] and inputs["labels"][0, 0, 0] == 255
    pixels = torch.from_numpy(np.array(image.resize((48, 48), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(MEAN[:3])[:, None, None]) / torch.tensor(STD[:3])[:, None, None]
    assert (inputs["pixel_values"][0] - pixels).abs().max() < 1.1 / 255 / 0.22  # rounded differently
    with torch.inference_mode():
        logits = torch.nn.functional.interpolate(model(inputs["pixel_values"]), size=(80, 100), mode="bilinear")
    expected = logits[0].argmax(dim=0).numpy()
    assert {answer["label"] for answer in answers} == {NAMES[k] for k in np.unique(expected)} and len(answers) > 2
    for answer in answers:
        assert ((np.array(answer["mask"]) > 0) == (expected == NAMES.index(answer["label"]))).mean() > 0.999


def test_files_of_a_segmenter(tmp_path):
    model = new_segmenter("upernet").bfloat16()
    names = ["config.json", "model.safetensors", "preprocessor_config.json", "transformers_model.safetensors"]
    assert sorted(path.name for path in write_segmenter(model, tmp_path).iterdir()) == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["backbone_config"]["out_features"] == ["stage1", "stage3", "stage4", "stage5"]
    assert config["backbone_config"]["batch_norm_eps"] == model.fpn.fpn1[1].eps
    for name in ("model.safetensors", "transformers_model.safetensors"):
        state = load_file(tmp_path / name)
        counts = {name for name in state if name.endswith("num_batches_tracked")}
        assert len(counts) == 14 and {state[name].dtype for name in counts} == {torch.int64}
        assert {value.dtype for name, value in state.items() if name not in counts} == {torch.float32}


def test_exporting_needs_neither_transformers_nor_timm():
    code = "import sys; sys.modules.update(transformers=None, timm=None); import modeling.export"
    subprocess.run([sys.executable, "-c", code], cwd=Path(export.__file__).parent.parent, check=True)
