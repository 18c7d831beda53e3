"""Reading weights: every layout against the library that wrote it, and refusals that say what is wrong."""

import argparse
import math
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BeitConfig,
    BeitModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from modeling.mae import MaskedAutoencoder
from modeling.vit import VisionTransformer
from modeling.weights import WeightsError, load_weights, read_state_dict, to_ours

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


def new_autoencoder(**change) -> MaskedAutoencoder:
    return MaskedAutoencoder(new_encoder(**change), **DECODER).eval()


def official(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
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


@pytest.mark.parametrize("state_of", [modules_of_5, files_of_5])
def test_classifier_of_transformers(state_of, tmp_path):
    theirs = randomised(ViTForImageClassification(ViTConfig(**THEIRS)))
    ours = new_encoder()
    report = load_weights(ours, state_of(theirs, tmp_path))
    torch.testing.assert_close(ours(IMAGES), theirs.vit(IMAGES).last_hidden_state, rtol=0, atol=1e-5)
    assert report.ignored == ("classifier.bias", "classifier.weight")


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
        report = load_weights(ours, theirs.state_dict(), old_grid=(4, 4) if same_count else None)
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5)
        assert report.resized == (f"encoder.pos_embed 4x4 -> {name}",)


def test_both_tables_of_an_autoencoder_are_resized():
    ours = new_autoencoder(img_size=64)
    report = load_weights(ours, new_autoencoder().state_dict())
    assert report.resized == ("encoder.pos_embed 4x4 -> 8x8", "decoder_pos_embed 4x4 -> 8x8")
    ours(torch.randn(1, 3, 64, 64), torch.rand(1, 64))


def test_old_grid():
    state = new_encoder(img_size=(16, 48)).state_dict()  # 2 x 6, which is no square
    with pytest.raises(WeightsError, match=r"12 positions, which are no grid of \(3, 3\) \(give old_grid\)"):
        load_weights(new_encoder(), state)
    with pytest.raises(WeightsError, match=r"12 positions, which are no grid of \(4, 4\)"):
        load_weights(new_encoder(img_size=(16, 48)), state, old_grid=(4, 4))
    assert load_weights(new_encoder(), state, old_grid=(2, 6)).resized == ("encoder.pos_embed 2x6 -> 4x4",)
    assert load_weights(new_encoder(img_size=(16, 48)), state).resized == ()


# Refusals


def refused(model, state) -> str:
    """The message; and nothing was copied."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as error:
        load_weights(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return str(error.value)


def test_every_missing_and_unexpected_parameter_is_named():
    deep, shallow = randomised(new_encoder(depth=3)), randomised(new_encoder())
    block = [f"encoder.blocks.2.{name}" for name in deep.blocks[2].state_dict()]
    message = refused(new_encoder(depth=3), shallow.state_dict())
    assert all(f"{name} is missing" in message for name in block) and message.count("is missing") == len(block)
    message = refused(new_encoder(), deep.state_dict())
    assert all(f"{name} is unexpected" in message for name in block) and message.count("unexpected") == len(block)


def test_every_wrong_shape_is_named():
    message = refused(new_encoder(), randomised(new_encoder(embed_dim=64)).state_dict())
    assert "encoder.cls_token is (1, 1, 64) instead of (1, 1, 32)" in message
    assert message.count("instead of") == len(new_encoder().state_dict())
    message = refused(new_encoder(), randomised(new_encoder(patch_size=4, img_size=16)).state_dict())
    assert message.count("instead of") == 1 and "(32, 3, 4, 4) instead of (32, 3, 8, 8)" in message


def test_an_encoder_is_no_autoencoder():
    message = refused(new_autoencoder(), randomised(new_encoder()).state_dict())
    assert "mask_token is missing" in message and "decoder_blocks.2.attn.qkv.weight is missing" in message


def test_near_relatives_are_refused():
    unbiased = timm.create_model("vit_base_patch16_224", **SMALL, qkv_bias=False)
    assert "encoder.blocks.1.attn.qkv.bias is missing" in refused(new_encoder(), unbiased.state_dict())
    scaled = timm.create_model("vit_base_patch16_224", **SMALL, init_values=1.0)
    assert "encoder.blocks.0.ls1.gamma is unexpected" in refused(new_encoder(), scaled.state_dict())
    beit = BeitModel(BeitConfig(**THEIRS, use_absolute_position_embeddings=True))
    assert "qkv.bias is (64,) instead of (96,)" in refused(new_encoder(), beit.state_dict())  # it has no key bias


def test_an_unknown_layout_is_refused():
    with pytest.raises(WeightsError, match=r"unknown layout \(layer1.weight, layer2.weight, ...\)"):
        to_ours({"layer1.weight": torch.ones(1), "layer2.weight": torch.ones(1)})


def test_report_is_one_line():
    state = official(new_autoencoder()) | {"head.weight": torch.ones(1)}
    line = str(load_weights(new_encoder(img_size=64), state))
    assert line == (
        "weights of the official MAE: 30 loaded, 0 missing, 45 ignored (decoder_blocks, decoder_embed, decoder_norm, "
        "decoder_pos_embed, decoder_pred, head, mask_token), resized: encoder.pos_embed 4x4 -> 8x8"
    )


# Files


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.pt", "a.bin", "model.safetensors", "pytorch_model.bin"])
def test_files_and_folders(name, tmp_path):
    state = new_encoder().state_dict()
    if name.endswith(".safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save(state, tmp_path / name)
    paths = [tmp_path / name, str(tmp_path / name)] + ([tmp_path] if "model" in name else [])
    for path in paths:
        read = read_state_dict(path)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_wrappers_are_taken_off(prefix, wrapper, tmp_path):
    state = new_autoencoder().state_dict()
    wrapped = {prefix + name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in state.items()}
    torch.save({wrapper: wrapped, "epoch": 3} if wrapper else wrapped, tmp_path / "a.pth")
    assert read_state_dict(tmp_path / "a.pth").keys() == state.keys()


def test_a_training_checkpoint_of_the_official_code(tmp_path):
    state = official(new_autoencoder())
    args = argparse.Namespace(lr=1.5e-4, output_dir="here")
    torch.save({"model": state, "optimizer": {"step": 3}, "epoch": 7, "args": args}, tmp_path / "checkpoint-7.pth")
    assert read_state_dict(tmp_path / "checkpoint-7.pth").keys() == state.keys()


class Hostile:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(zipped, tmp_path):
    file, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    content = {"model": new_encoder().state_dict(), "args": Hostile(trace)}
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"args": Hostile(trace)}, protocol=2))
    with pytest.raises(WeightsError, match=r"hostile\.pth: refused.*expected tensors.*safetensors"):
        read_state_dict(file)
    assert not trace.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert trace.exists()  # the file does run code where it is let


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_a_cut_file_is_refused_wherever_it_is_cut(name, tmp_path):
    file = tmp_path / name
    state = new_encoder().state_dict()
    save_file(state, file) if name == "a.safetensors" else torch.save(state, file)
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=f"{name}: ") as error:
            read_state_dict(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, {"model": {}}, [torch.ones(1)], {"a": 1}, {"model": {"a": "b"}}])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: holds no state dict"):
        read_state_dict(tmp_path / "a.pth")


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(WeightsError, match=r"nothing\.pth: no such file"):
        read_state_dict(tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match=r"a folder without weights; expected model\.safetensors or"):
        read_state_dict(tmp_path)


def test_half_precision_files_load_into_float32(tmp_path):
    source, ours = randomised(new_encoder()), new_encoder()
    save_file({name: value.bfloat16() for name, value in source.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(ours, load_file(tmp_path / "a.safetensors"))
    assert ours.cls_token.dtype == torch.float32
    torch.testing.assert_close(ours.cls_token, source.cls_token, rtol=0.01, atol=0)
