"""Tests of ONNX files: ONNX Runtime gives the same outputs as the modules, for every kind of model."""

import copy
import functools
import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from random_modules import build_autoencoder, new_encoder, randomize
from torch import nn

from modeling import deploy
from modeling.classifier import Classifier
from modeling.deploy import Deployed, DeployError, dynamic_size_misfit, largest_difference, task_of, to_onnx
from modeling.mae import MaskedAutoencoder
from modeling.trained import Trained
from modeling.upernet import Segmenter

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(-1, 1, 1)


def small(depth: int = 2, **options):
    return new_encoder(img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, **options)


def autoencoder(**options):
    return build_autoencoder(small(), decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, **options)


def numbers():
    model = Classifier(small(), 2, problem="numbers")
    model.set_scale((np.array([1e5, -3], np.float32), np.array([2e4, 0.5], np.float32)))
    return model


MODELS = {
    "encoder": lambda: small(num_cls_tokens=2),
    "mean": lambda: Classifier(small(), 5),
    "attentive": lambda: Classifier(small(1), 5, pooling="attentive", num_queries=4, probe=True),
    "labels": lambda: Classifier(small(), 3, pooling="cls", probe=True, problem="labels"),
    "numbers": numbers,
    "linear": lambda: Segmenter(small(), 5, head="linear"),
    "biases": lambda: Segmenter(small(relative_position_bias=True, layer_scale=0.5), 5, head="linear"),
    "upernet": lambda: Segmenter(small(4, relative_position_bias=True), 5, head_width=8),
    "dpt": lambda: Segmenter(small(4), 5, head="dpt", head_width=8),
    "normalized": autoencoder,
    "cross": lambda: autoencoder(decoder="cross", decoder_inputs="weighted", target="pca", width=20),
}


def open_model(kind: str, **facts) -> Trained:
    model = randomize(MODELS[kind]())
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_buffers():
        if name.endswith(("running_mean", "target.mean", "components")):
            value += 0.1 * torch.randn(value.shape, generator=generator)
        elif name.endswith("running_var"):
            value += torch.rand(value.shape, generator=generator)
    statistics = dict(mean=MEAN.flatten().tolist(), std=STD.flatten().tolist())
    names = dict(model=model, path=kind, layout="", class_names=None, crop_ratio=0.875, resize=None, masks={})
    return Trained(**names, **statistics, **{"value_range": None} | facts)


def run(content: bytes, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    feed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), inputs, strict=True)}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, feed)), strict=True))


@torch.no_grad()
def expected_outputs(model: nn.Module, images: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    if isinstance(model, MaskedAutoencoder):
        _, prediction, mask = model(images, noise)
        pixels = model.reconstruct(images, prediction) * STD + MEAN
        mask = F.interpolate(mask.reshape(-1, 1, *model.encoder.grid), scale_factor=model.encoder.patch_size)
        return {"reconstruction": pixels, "mask": mask}
    if isinstance(model, Segmenter):
        logits = model(images)
        return {"logits": logits, "labels": logits.max(dim=1).indices.byte()}
    if isinstance(model, Classifier):
        logits = model(images)
        if model.problem == "numbers":
            return {"numbers": logits * model.number_std + model.number_mean}
        probabilities = logits.sigmoid() if model.problem == "labels" else logits.softmax(dim=-1)
        return {"logits": logits, "probabilities": probabilities}
    tokens, n = model(images), model.num_cls_tokens
    return {"features": tokens[:, n:].mean(dim=1), "cls_tokens": tokens[:, :n], "patch_tokens": tokens[:, n:]}


def assert_equal_outputs(content: bytes, model: nn.Module, shape: tuple[int, ...], *, atol: float) -> None:
    """Compare outputs on raw pixels; the noise has repeated values, so the sort must be stable."""
    generator = torch.Generator().manual_seed(shape[0])
    coarse = torch.randint(0, 256, (*shape[:2], 4, 4), generator=generator, dtype=torch.uint8)
    images = F.interpolate(coarse.float(), size=shape[2:], mode="bilinear").round().byte()
    noise = torch.randint(0, 4, (len(images), 16), generator=generator).float()
    is_autoencoder = isinstance(model, MaskedAutoencoder)
    outputs = run(content, images, noise) if is_autoencoder else run(content, images)
    expected = expected_outputs(model, (images / 255 - MEAN) / STD, noise)
    assert list(outputs) == list(expected)
    for name, wanted in expected.items():
        scale = wanted.abs().max().clamp(min=1) if wanted.is_floating_point() else 1
        assert outputs[name].dtype == wanted.dtype
        torch.testing.assert_close(outputs[name], wanted, rtol=0, atol=atol * float(scale))


SLOW = ("encoder", "mean", "numbers", "linear", "biases", "dpt", "cross")  # an export takes five seconds
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW]


@functools.cache
def file_of(kind: str) -> tuple[Trained, Deployed, bytes]:
    trained = open_model(kind)
    deployed = Deployed(trained, task_of(trained, features=False), raw_pixels=True)
    return trained, deployed, to_onnx(deployed, {})


@pytest.mark.parametrize("kind", ["labels", "upernet", "normalized", *SLOW])
def test_every_kind_of_model(kind):
    trained, deployed, content = file_of(kind)
    for count in (1, 5):
        assert_equal_outputs(content, trained.model, (count, 3, 32, 32), atol=1e-5)
    assert largest_difference(content, trained, deployed) <= 1e-5


@pytest.mark.parametrize("kind", ["attentive", pytest.param("linear", marks=pytest.mark.slow)])
def test_images_of_any_size(kind):
    trained = open_model(kind)
    deployed = Deployed(trained, task_of(trained, features=False), raw_pixels=True)
    content = to_onnx(deployed, {}, dynamic_size=True)
    for shape in ((1, 3, 32, 32), (3, 3, 64, 24), (2, 3, 56, 120)):
        assert_equal_outputs(content, trained.model, shape, atol=1e-5)
    assert largest_difference(content, trained, deployed, dynamic_size=True) <= 1e-5


HALF = ["numbers", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("upernet", "normalized", "cross"))]


@pytest.mark.parametrize("kind", HALF)
def test_half_precision(kind):
    """Outputs are accurate to 5e-3, also numbers beyond float16's range, and the model itself stays in float32."""
    trained = open_model(kind)
    deployed = Deployed(trained, task_of(trained, features=False), raw_pixels=True, half=True)
    content = to_onnx(deployed, {})
    assert {parameter.dtype for parameter in trained.model.parameters()} == {torch.float32}
    assert_equal_outputs(content, trained.model, (2, 3, 32, 32), atol=5e-3)
    assert 1e-6 < largest_difference(content, trained, deployed) < 5e-3


def test_normalized_images_and_metadata():
    """A model with a value range takes raw values and clips them; the file contains the given metadata."""
    trained = open_model("mean", value_range=(-100.0, 4000.0))
    raw = Deployed(trained, "features", raw_pixels=True)
    content = to_onnx(raw, {"task": "features", "classes": ["ä", "b"], "mean": [0.5]})
    session = onnxruntime.InferenceSession(content)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["ä", "b"] and json.loads(facts["mean"]) == [0.5]
    assert (facts["task"], facts["opset"], facts["torch"]) == ("features", "18", torch.__version__)
    assert b"site-packages" not in content and b"deploy.py" not in content  # no paths of this machine
    assert [known.shape for known in session.get_inputs()] == [["batch", 3, 32, 32]]
    images = torch.rand(2, 3, 32, 32)
    features = run(content, images * 4400 - 200)["features"]  # beyond both ends, where data loading clips
    inside = ((images * 4400 - 100) / 4100).clamp(0, 1)
    with torch.no_grad():
        expected = trained.model.pool(trained.model.encoder((inside - MEAN) / STD))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)


def test_what_has_no_file(monkeypatch):
    upernet, biases, mae, linear = (open_model(kind) for kind in ("upernet", "biases", "normalized", "linear"))
    assert "UperNet" in dynamic_size_misfit(upernet, "segmentation")
    assert "position bias" in dynamic_size_misfit(biases, "segmentation")
    assert "noise" in dynamic_size_misfit(mae, "reconstruction") and not dynamic_size_misfit(mae, "features")
    assert not dynamic_size_misfit(linear, "segmentation")
    monkeypatch.setattr(deploy, "MAX_BYTES", 80_000)
    with pytest.raises(
        DeployError, match=r"expected at most 8e-05 GB, the limit of an ONNX file; export them in half precision$"
    ):
        to_onnx(Deployed(linear, "segmentation"), {})
    with pytest.raises(DeployError, match="of an ONNX file; give a smaller model"):
        monkeypatch.setattr(deploy, "MAX_BYTES", 50_000)
        to_onnx(Deployed(linear, "segmentation", half=True), {})


def test_an_operation_without_an_onnx_form(monkeypatch):
    trained = open_model("mean")
    monkeypatch.setattr(Classifier, "answer", lambda self, logits: torch.linalg.eigvalsh(logits.mT @ logits))
    with pytest.raises(DeployError, match=r"^has an operation without an ONNX form \(No ONNX .*\); give another"):
        to_onnx(Deployed(trained, "classes"), {})
    monkeypatch.setattr(Classifier, "answer", lambda self, logits: logits[: int(logits.argmax())])  # dynamic shape
    with pytest.raises(DeployError, match=r"^has an operation without an ONNX form \(.+\); give another"):
        to_onnx(Deployed(trained, "classes"), {})


@torch.no_grad()
def test_differences_are_seen():
    """A small change of a bias and outputs that are not finite show in the largest difference."""
    trained, deployed, content = file_of("upernet")
    other = trained._replace(model=copy.deepcopy(trained.model))
    for change, low, high in ((0.0, 0.0, 1e-5), (0.01, 1e-4, 0.01), (torch.nan, torch.inf, torch.inf)):
        other.model.decode_head.classifier.bias[2] += change
        assert low <= largest_difference(content, other, deployed) <= high
