"""Tests of the comparison of exported models across libraries, which precedes a push to the Hub."""

import pytest
import torch
from random_modules import build_autoencoder
from safetensors.torch import load_file, save_file

from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_classifier, export_encoder, export_segmenter
from modeling.parity import differences
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer

ENCODER, MAE = "transformers AutoModel", "transformers ViTMAEForPreTraining"
OWN, OWN_MAE = "this project", "this project, pretraining/"
CLASSES = ["ant", "bee", "cat"]


def exported(kind: str, folder, **change):
    """Export a model with random parameters to `folder`, and return the model."""
    torch.manual_seed(0)
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    encoder = VisionTransformer(**size | change)
    statistics = dict(mean=[0.5] * encoder.in_channels, std=[0.5] * encoder.in_channels)
    model = encoder
    if kind == "autoencoder":
        model = build_autoencoder(encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    elif kind == "classifier":
        model = Classifier(encoder, 3, custom_weight_init=False)
    elif kind == "segmenter":
        model = Segmenter(encoder, 3, head_width=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.eval()
    if kind == "classifier":
        export_classifier(model, folder, classes=CLASSES, crop_ratio=1.0, **statistics)
    elif kind == "segmenter":
        export_segmenter(model, folder, classes=CLASSES, resize=(128, 32), **statistics)
    else:
        export_encoder(encoder, folder, **statistics)
    if kind == "autoencoder":
        export_autoencoder(model, folder / "pretraining", **statistics)
    return model


WIDE = dict(img_size=(16, 32), in_channels=4)
SEVERAL = dict(num_cls_tokens=3)


@pytest.mark.parametrize(
    "kind, change, libraries, notes",
    [
        ("encoder", {}, [ENCODER, "timm", OWN], 0),
        ("autoencoder", {}, [ENCODER, "timm", OWN, MAE, OWN_MAE], 0),
        ("autoencoder", WIDE, [ENCODER, "timm", OWN, OWN_MAE], 1),
        ("classifier", {}, ["transformers AutoModelForImageClassification", "timm", OWN], 0),
        ("classifier", WIDE, ["transformers AutoModelForImageClassification", "timm", OWN], 0),
        ("segmenter", {}, ["transformers UperNetForSemanticSegmentation", OWN], 1),
        ("encoder", SEVERAL, [ENCODER, OWN], 1),
        ("encoder", SEVERAL | WIDE, [OWN], 2),
        ("encoder", SEVERAL | dict(mlp_ratio=2.5), [OWN], 2),
        ("autoencoder", SEVERAL, [ENCODER, OWN, OWN_MAE], 2),
        ("classifier", SEVERAL, [OWN], 1),
        ("segmenter", SEVERAL, [OWN], 1),
    ],
)
def test_what_the_libraries_agree_on(kind, change, libraries, notes, tmp_path):
    model = exported(kind, tmp_path, **change)
    found, told = differences(tmp_path, model)
    assert list(found) == libraries and len(told) == notes
    assert all(distance <= 1e-5 for distance in found.values()), found


@pytest.mark.parametrize(
    "kind, file, part, wrong",
    [
        ("autoencoder", "model.safetensors", "blocks.2.attn.qkv.weight", ["timm", OWN]),
        ("autoencoder", "transformers_model.safetensors", "encoder.layer.2.output.dense.weight", [ENCODER]),
        ("autoencoder", "pretraining/model.safetensors", "decoder.decoder_pred.weight", [MAE, OWN_MAE]),
        ("classifier", "model.safetensors", "head.bias", ["timm", OWN]),
        ("segmenter", "transformers_model.safetensors", "decode_head.classifier.bias", None),
    ],
)
def test_a_wrong_parameter_is_found_where_it_is(kind, file, part, wrong, tmp_path):
    model = exported(kind, tmp_path)
    state = load_file(tmp_path / file)
    state[part].view(-1)[1] += 10
    save_file(state, tmp_path / file, metadata={"format": "pt"})
    found, _ = differences(tmp_path, model)
    wrong = wrong or ["transformers UperNetForSemanticSegmentation"]
    assert [library for library, distance in found.items() if distance > 1e-3] == wrong
    if {OWN, OWN_MAE} & {*wrong}:
        return  # this project refuses to load weights that are not finite
    state[part] = torch.full_like(state[part], torch.nan)
    save_file(state, tmp_path / file, metadata={"format": "pt"})
    found, _ = differences(tmp_path, model)
    assert [library for library, distance in found.items() if not distance <= 1e-4] == wrong
