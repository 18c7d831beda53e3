"""Tests of opening weights of any layout, compared with the libraries that wrote them."""

import json
from functools import partial

import pytest
import timm
import torch
from random_modules import build_autoencoder, randomize
from safetensors.torch import save_file
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from modeling import export
from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_encoder, export_segmenter, to_official
from modeling.files import Stored, WeightsError, read_state_dict, read_stored
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import load_weights

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96)
SIZE |= dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
BEIT = dict(use_absolute_position_embeddings=True, layer_scale_init_value=0.0, use_mean_pooling=True, drop_path_rate=0)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
DECODER |= dict(decoder_intermediate_size=64)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOISE = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))


def written(model, folder, processor: dict | None = None):
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@torch.inference_mode()
def test_an_autoencoder_of_transformers(tmp_path):
    config = ViTMAEConfig(**SIZE, **DECODER, mask_ratio=0.5, norm_pix_loss=False)
    theirs = randomize(ViTMAEForPreTraining(config))
    ours = open_trained(written(theirs, tmp_path))
    assert isinstance(ours.model, MaskedAutoencoder) and not ours.model.training
    assert (ours.model.mask_ratio, ours.model.target.name) == (0.5, "pixels")
    assert ours.model.encoder.num_heads == 4 and ours.model.decoder.num_heads == 2
    torch.testing.assert_close(ours.model(IMAGES, NOISE).loss, theirs(IMAGES, noise=NOISE).loss, rtol=0, atol=1e-5)
    assert ours.assumed == (f"images normalized by the mean {MEAN} and the standard deviation {STD}",)
    assert (ours.mean, ours.std) == (MEAN, STD)
    encoder = open_trained(tmp_path, whole=False)
    assert isinstance(encoder.model, VisionTransformer) and encoder.classes == [] and encoder.resize is None


@torch.inference_mode()
def test_classifiers_of_transformers(tmp_path):
    processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    names = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}
    for model, config, pooling in (
        (ViTForImageClassification, ViTConfig(**SIZE, **names), "cls"),
        (BeitForImageClassification, BeitConfig(**SIZE, **BEIT, **names), "mean"),
    ):
        theirs = randomize(model(config))
        ours = open_trained(written(theirs, tmp_path / pooling, processor))
        assert isinstance(ours.model, Classifier) and ours.model.pooling == pooling
        torch.testing.assert_close(ours.model(IMAGES), theirs(IMAGES).logits, rtol=0, atol=1e-5)
        assert (ours.classes, ours.crop_ratio) == (["ant", "bee", "cat"], 0.875)
        assert ours.assumed == ("images resized bicubically with their aspect ratio, and cropped to their centre",)
        assert (ours.mean, ours.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@torch.inference_mode()
def test_a_segmenter_of_transformers(tmp_path):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    for bias, scale in ((True, 0.5), (False, 0.0)):
        extras = dict(use_relative_position_bias=bias, layer_scale_init_value=scale)
        backbone = BeitConfig(**SIZE, **BEIT | extras, batch_norm_eps=1e-5, out_features=stages, add_fpn=True)
        config = UperNetConfig(backbone_config=backbone, hidden_size=12, num_labels=5, auxiliary_in_channels=32)
        theirs = randomize(UperNetForSemanticSegmentation(config))
        ours = open_trained(written(theirs, tmp_path / str(bias)))
        assert isinstance(ours.model, Segmenter) and ours.model.layers == [0, 1, 2, 3]
        torch.testing.assert_close(ours.model(IMAGES), theirs(IMAGES).logits, rtol=0, atol=1e-4)
        assert ours.resize == (128, 32) and len(ours.classes) == 5
        assert "images that fit 128 x 32 pixels in evaluation" in ours.assumed


@torch.inference_mode()
def test_files_of_timm_and_of_the_official_code(tmp_path):
    for pool, pooling in (("avg", "mean"), ("token", "cls")):
        theirs = randomize(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=3, global_pool=pool))
        torch.save({"model": theirs.state_dict()}, tmp_path / "finetuned.pth")
        ours = open_trained(tmp_path / "finetuned.pth", given=Stored(num_heads=3))
        images = torch.randn(1, 3, 224, 224)
        assert ours.model.pooling == pooling and ours.classes == ["LABEL_0", "LABEL_1", "LABEL_2"]
        torch.testing.assert_close(ours.model(images), theirs(images), rtol=0, atol=1e-5)
        assert "unnamed classes" in ours.assumed and ours.crop_ratio == 0.875
        head = {"mean": "a head on the mean of the patch tokens", "cls": "a head on the cls token"}
        assert head[pooling] in ours.assumed
        assert "images resized bicubically with their aspect ratio, and cropped to their centre" in ours.assumed

    encoder = VisionTransformer(**SIZES["tiny"] | dict(depth=12), img_size=32)
    model = randomize(build_autoencoder(encoder, decoder_depth=2, target="pixels"))
    torch.save({"model": to_official(model.state_dict())}, tmp_path / "mae.pth")
    for given, same in ((Stored(target="pixels"), True), (Stored(), False)):
        ours = open_trained(tmp_path / "mae.pth", given=given)
        images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 4)
        assert torch.equal(ours.model(images, noise).loss, model(images, noise).loss) is same
        assert ours.layout == "the official MAE" and "decoder_num_heads 16, as in the paper" in ours.assumed
    assert torch.equal(open_trained(tmp_path / "mae.pth", whole=False).model(images), encoder(images))


def test_the_size_of_evaluation_is_that_of_the_run(tmp_path):
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    model, names = Segmenter(encoder, 2, head_width=8), ["ant", "bee"]
    for resize in ((200, 40), (100, 30)):
        export_segmenter(model, tmp_path / "model", classes=names, resize=resize, mean=MEAN, std=STD)
        assert open_trained(tmp_path).resize == resize and open_trained(tmp_path).assumed == ()


def test_what_is_given_fills_gaps_and_contradicts_nothing(tmp_path):
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pth")
    given = Stored(num_heads=4, mean=[0.1] * 3, std=[0.2] * 3)
    ours = open_trained(tmp_path / "encoder.pth", given=given)
    assert (ours.model.num_heads, ours.mean, ours.std) == (4, [0.1] * 3, [0.2] * 3) and ours.assumed == ()
    export_encoder(encoder, tmp_path, mean=MEAN, std=STD)
    with pytest.raises(WeightsError, match="its num_heads is 2, but 4 was given; leave out this value"):
        open_trained(tmp_path, given=given)
    assert open_trained(tmp_path, given=Stored(num_heads=2, mean=MEAN)).model.num_heads == 2


def test_the_autoencoder_beside_an_encoder_comes_first(tmp_path):
    encoder = VisionTransformer(img_size=(16, 32), patch_size=8, in_channels=4, embed_dim=32, depth=2, num_heads=2)
    model = randomize(build_autoencoder(encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    statistics = dict(mean=[0.1, 0.2, 0.3, 0.4], std=[0.5, 0.6, 0.7, 0.8])
    export_encoder(encoder, tmp_path, **statistics)
    assert isinstance(open_trained(tmp_path).model, VisionTransformer)
    export_autoencoder(model, tmp_path / "pretraining", **statistics)
    ours = open_trained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in ours.model.state_dict().items())
    assert (ours.encoder.img_size, ours.mean, ours.std) == ((16, 32), *statistics.values())


@torch.inference_mode()
def test_another_image_size_and_other_channels(tmp_path):
    """Compare the model with one of that size into which the weights are loaded."""
    size = dict(patch_size=8, embed_dim=32, depth=4, num_heads=2)
    export_classifier = partial(export.export_classifier, classes=["ant", "bee"], crop_ratio=0.5)
    export_segmenter = partial(export.export_segmenter, classes=["ant", "bee"], resize=(200, 40))
    for new, write, folder in (
        (partial(Classifier, num_classes=2), export_classifier, tmp_path / "classifier"),
        (partial(Segmenter, num_classes=2, head_width=8), export_segmenter, tmp_path / "segmenter"),
    ):
        write(randomize(new(VisionTransformer(img_size=32, **size))), folder, mean=MEAN, std=STD)
        for img_size, channels in (((48, 48), None), ((16, 64), None), ((384, 384), 1)):
            ours = open_trained(folder, img_size=img_size, in_channels=channels)
            expected = new(VisionTransformer(img_size=img_size, in_channels=channels or 3, **size)).eval()
            load_weights(expected, read_state_dict(folder), stored=read_stored(folder), adapt_channels=True)
            images = torch.randn(1, channels or 3, *img_size)
            assert torch.equal(ours.model(images), expected(images))
            assert ours.encoder.img_size == img_size
            assert ours.mean == ([0.5] if channels else MEAN)
            assert ours.crop_ratio == (1.0 if max(img_size) > 224 else 0.875)  # not the stored 0.5
            assert ours.resize in (None, (4 * img_size[0], img_size[0]))
    flat = VisionTransformer(img_size=(16, 24), **size)  # 2 x 3 patches, which no file states
    torch.save(flat.state_dict(), tmp_path / "flat.pth")
    ours = open_trained(tmp_path / "flat.pth", given=Stored(num_heads=2), img_size=(16, 24))
    assert torch.equal(ours.encoder.pos_embed, flat.pos_embed)


def test_weights_that_make_no_module(tmp_path):
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    path = tmp_path / "vit.safetensors"

    def message(state, given=Stored(num_heads=2)) -> str:  # noqa: B008 - immutable
        save_file(state, path)
        with pytest.raises(WeightsError) as refusal:
            open_trained(path, given=given)
        text = str(refusal.value)
        assert text.startswith(f"{path}: ") and "\n" not in text
        return text

    state = encoder.state_dict()
    assert message(state, Stored()).endswith("convert the weights with push_to_hub.py; set encoder_num_heads=N")
    assert "a table of positions that is not square" in message(state | {"pos_embed": torch.ones(1, 1 + 12, 32)})
    holed = {name: value for name, value in state.items() if name != "blocks.1.mlp.fc2.bias"}
    assert "blocks.1.mlp.fc2.bias is missing" in message(holed)
    assert "(32, 32) instead of (128, 32)" in message(state | {"blocks.1.mlp.fc1.weight": torch.ones(32, 32)})
    assert "3 heads do not divide a width of 32" in message(state, Stored(num_heads=3))
    head = {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    assert "a head on the mean of normed tokens" in message(state | head, Stored(num_heads=2, pooling="mean"))
    assert "weights that are not finite" in message(state | {"norm.bias": torch.full((32,), torch.nan)})
    with pytest.raises(WeightsError, match="no such file or folder"):
        open_trained(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="correct the path, or hf:owner/name for the Hub, or download them first"):
        open_trained("owner/name")


def test_other_epsilons_of_norms_are_told_or_refused(tmp_path):
    for eps, said in ((1e-6, False), (1e-12, True)):
        config = ViTConfig(**SIZE | dict(layer_norm_eps=eps))
        ours = open_trained(written(randomize(ViTForImageClassification(config)), tmp_path))
        told = [words for words in ours.assumed if words.startswith("norms with an epsilon of 1e-6 (these")]
        assert bool(told) is said
    config = ViTConfig(**SIZE | dict(layer_norm_eps=1e-3))
    with pytest.raises(WeightsError, match=r"were trained with the epsilon 0\.001 in norms"):
        open_trained(written(ViTForImageClassification(config), tmp_path))
