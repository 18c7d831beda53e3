"""Tests of every kind of teacher against the library that it comes from."""

import json

import pytest
import torch
import transformers
from random_modules import new_encoder, randomize
from safetensors.torch import load_file, save_file

from modeling.export import export_encoder
from modeling.files import WeightsError
from modeling.teacher import open_teacher

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
VISION = SIZE | dict(intermediate_size=64)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, vocab_size=20)
TEXT |= dict(bos_token_id=0, eos_token_id=1)
TOWERS = {  # class -> its configuration
    "Dinov2Model": dict(SIZE),
    "Dinov2WithRegistersModel": dict(SIZE),
    "DINOv3ViTModel": VISION | dict(num_register_tokens=2),
    "CLIPVisionModel": VISION,
    "SiglipVisionModel": VISION,
    "CLIPModel": dict(text_config=TEXT, vision_config=VISION, projection_dim=8),
    "SiglipModel": dict(text_config=TEXT, vision_config=VISION),
}
STATISTICS = dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])


def write_tower(folder, name, **changes):
    """Write a small model of transformers with random weights, and return it."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = randomize(kind(kind.config_class(**TOWERS[name] | changes)))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers(name, tmp_path):
    model = write_tower(tmp_path, name)
    vision = getattr(model, "vision_model", model)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in STATISTICS.values())
    teacher = open_teacher(str(tmp_path), grid=(4, 4), in_channels=3)
    with torch.no_grad():
        tokens = vision((images / 255 - mean) / std).last_hidden_state[:, -16:]
    mean, variance = tokens.mean(-1, keepdim=True), tokens.var(-1, keepdim=True, correction=0)
    features = teacher(images)
    torch.testing.assert_close(features, (tokens - mean) / (variance + 1e-5).sqrt(), rtol=0, atol=1e-5)
    assert teacher.width == 32
    assert not features.requires_grad and not any(p.requires_grad for p in teacher.parameters())
    other = open_teacher(str(tmp_path), grid=(2, 3), in_channels=3)
    assert other(torch.rand(2, 3, 64, 96)).shape == (2, 6, 32)  # images of another size and patch size
    assert other.fingerprint() == teacher.fingerprint()
    smaller = open_teacher(str(tmp_path), grid=(2, 2), in_channels=3)
    assert torch.equal(teacher(images[:, :, :16, :16], (2, 2)), smaller(images[:, :, :16, :16]))
    torch.nn.init.zeros_(next(other.parameters()))
    assert other.fingerprint() != teacher.fingerprint()


def test_an_encoder_of_this_project(tmp_path):
    encoder = randomize(new_encoder(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, in_channels=4))
    export_encoder(encoder, tmp_path, mean=[0.5] * 4, std=[0.25] * 4)
    teacher = open_teacher(str(tmp_path), grid=(4, 4), in_channels=4)
    images = torch.rand(2, 4, 32, 32)
    with torch.no_grad():
        tokens = encoder((images - 0.5) / 0.25)[:, 1:]
    torch.testing.assert_close(teacher(images), torch.nn.functional.layer_norm(tokens, (32,)), rtol=0, atol=1e-5)
    assert not teacher(images).requires_grad
    # The student has patches of 4 pixels and the teacher of 8, so the teacher sees the image at twice its size.
    resized = open_teacher(str(tmp_path), grid=(8, 8), in_channels=4)
    assert "images of 64 x 64" in resized.description and resized(images).shape == (2, 64, 32)
    smaller = open_teacher(str(tmp_path), grid=(2, 2), in_channels=4)
    assert torch.equal(teacher(images[:, :, :16, :16], (2, 2)), smaller(images[:, :, :16, :16]))
    with pytest.raises(WeightsError, match="input_channels of the teacher is 4 instead of 3; give another teacher"):
        open_teacher(str(tmp_path), grid=(4, 4), in_channels=3)
    open_teacher(str(tmp_path), grid=(4, 4), in_channels=4, value_range=(0, 10000))  # the teacher states no range
    export_encoder(encoder, tmp_path, mean=[0.5] * 4, std=[0.25] * 4, value_range=(0, 1000))
    with pytest.raises(
        WeightsError, match="teacher needs pixels from 0 to 1000, but the data have 0 to 255; give another"
    ):
        open_teacher(str(tmp_path), grid=(4, 4), in_channels=4)


@pytest.mark.parametrize("fault", ["missing", "not finite", "one mean"])
def test_damaged_towers(tmp_path, fault):
    """Damage is an error, although transformers only warns and draws missing weights at random."""
    write_tower(tmp_path, "Dinov2Model")
    path, processor = tmp_path / "model.safetensors", tmp_path / "preprocessor_config.json"
    state = load_file(path)
    name = next(name for name in state if name.endswith("fc1.weight"))
    if fault == "missing":
        state.pop(name)
    elif fault == "not finite":
        state[name] = torch.full_like(state[name], torch.nan)
    else:
        processor.write_text(json.dumps(json.loads(processor.read_text()) | {"image_mean": [0.5]}))
    save_file(state, path, metadata={"format": "pt"})
    expected = {"missing": f"missing or misshapen weights: .*{name}", "not finite": "weights that are not finite"}
    with pytest.raises(WeightsError, match=expected.get(fault, "expected lists of 3 numbers in image_mean")):
        open_teacher(str(tmp_path), grid=(4, 4), in_channels=3)


def test_towers_that_cannot_be_used(tmp_path):
    write_tower(tmp_path, "Dinov2Model", num_channels=4)
    with pytest.raises(WeightsError, match=f"{tmp_path}: input_channels of the teacher is 4 instead of 3"):
        open_teacher(str(tmp_path), grid=(4, 4), in_channels=3)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(WeightsError, match=f"^{tmp_path}: cannot be read .* expected config.json"):
        open_teacher(str(tmp_path), grid=(4, 4), in_channels=4)
    with pytest.raises(WeightsError, match="no such file or folder"):
        open_teacher("nowhere", grid=(4, 4), in_channels=3)


def test_no_code_of_a_folder_is_run(tmp_path):
    write_tower(tmp_path, "Dinov2Model")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "remote.Config", "AutoModel": "remote.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "remote.py").write_text("raise SystemExit('run')\n")
    assert open_teacher(str(tmp_path), grid=(4, 4), in_channels=3).width == 32


def test_a_teacher_on_the_hub(hub, tmp_path, monkeypatch):
    write_tower(tmp_path / "tower", "DINOv3ViTModel")
    hub.enter(monkeypatch, tmp_path)
    hub.add("owner/tower", tmp_path / "tower")
    local, remote = (
        open_teacher(path, grid=(4, 4), in_channels=3) for path in (str(tmp_path / "tower"), "hf:owner/tower")
    )
    assert remote.fingerprint() == local.fingerprint()
