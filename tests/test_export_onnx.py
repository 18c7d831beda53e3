"""Tests of export_onnx.py: from weights to predictions in ONNX Runtime, and error messages."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import run_code
from random_modules import build_autoencoder, new_encoder, randomize

import export_onnx
import predict
from data.batches import ListedDataset, centre_crop
from data.decode import PixelFormat
from data.files import find_images
from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_detector,
    export_encoder,
    export_segmenter,
)
from modeling.trained import open_trained
from modeling.upernet import Segmenter

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
STATISTICS = dict(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with a random model of each kind."""
    folder, names = tmp_path_factory.mktemp("models"), ["ant", "bee", "cat"]
    classifier = randomize(Classifier(new_encoder(**SIZE), 3))
    export_classifier(classifier, folder / "classifier", classes=names, crop_ratio=0.875, **STATISTICS)
    segmenter = randomize(Segmenter(new_encoder(**SIZE | dict(depth=4)), 3, head_width=8))
    export_segmenter(segmenter, folder / "segmenter", classes=names, resize=(128, 32), **STATISTICS)
    export_encoder(randomize(new_encoder(**SIZE)), folder / "encoder", **STATISTICS)
    export_detector(Detector(new_encoder(**SIZE), 3, width=8), folder / "detector", classes=names, **STATISTICS)
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    for target in ("normalized", "hog"):
        model = randomize(build_autoencoder(new_encoder(**SIZE), target=target, **decoder))
        export_autoencoder(model, folder / target, **STATISTICS)
    return folder


def export(*words) -> None:
    export_onnx.main([str(word) for word in words])


def errors_of(*words, capsys) -> list[str]:
    """Return the error messages of bad input, and check that the exit code is 2."""
    with pytest.raises(SystemExit) as end:
        export(*words)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and stderr.count("\n") == stderr.count("error: ")
    return stderr.splitlines()


def test_a_classifier_of_photographs(models, real_images, tmp_path, monkeypatch):
    """ONNX Runtime and predict.py agree on the same pixels, and the file has the metadata of the model."""
    monkeypatch.chdir(tmp_path)
    export(models / "classifier", "classifier.onnx", "--raw_pixels")
    session = onnxruntime.InferenceSession("classifier.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == ["ant", "bee", "cat"] and facts["task"] == "classes"
    for name, value in STATISTICS.items():
        assert json.loads(facts[name]) == pytest.approx(value)
    known = {name: json.loads(facts[name]) for name in ("img_size", "channels", "patch_size", "value_range")}
    assert known == {"img_size": [32, 32], "channels": 3, "patch_size": 8, "value_range": [0, 255]}
    assert [facts[name] for name in ("crop_ratio", "raw_pixels", "dynamic_size", "weights", "opset", "torch")] == [
        *("0.875", "true", "false", "float32", "18", torch.__version__)
    ]

    paths = [str(path) for path in sorted((real_images / "imagenet_sample" / "val").rglob("*.*"))[:5]]
    predict.main([str(models / "classifier"), *paths, "--num_workers", "0"])
    lines = [json.loads(line) for line in Path("predictions/predictions.jsonl").read_text().splitlines()]
    source, _ = find_images(paths)
    crop = partial(centre_crop, size=(32, 32), crop_ratio=0.875)
    (images,) = ListedDataset(source, pixels=PixelFormat(), prepare=crop).__getitems__(range(5)).inputs
    (probabilities,) = session.run(["probabilities"], {"images": images.contiguous().numpy()})
    for line, row in zip(lines, probabilities, strict=True):
        named = {entry["class"]: entry["probability"] for entry in line["classes"]}
        np.testing.assert_allclose([named[name] for name in ("ant", "bee", "cat")], row, rtol=0, atol=1e-6)


def test_features_of_an_autoencoder_at_another_size_in_half_precision(models, tmp_path, capsys):
    path = tmp_path / "features.onnx"
    export(models / "normalized", path, "--features", "--half", "--img_size", 48, 64)
    assert "features, cls_tokens, patch_tokens; difference from the model" in capsys.readouterr().out
    assert b"decoder" not in path.read_bytes()
    session = onnxruntime.InferenceSession(path)
    images = torch.randn(2, 3, 48, 64)
    features, _, patch_tokens = session.run(None, {"images": images.numpy()})
    trained = open_trained(models / "normalized", whole=False, img_size=(48, 64))
    with torch.no_grad():
        tokens = trained.model(images)
    for output, expected in ((features, tokens[:, 1:].mean(dim=1)), (patch_tokens, tokens[:, 1:])):
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=5e-3)
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["task"], facts["weights"], facts["img_size"]) == ("features", "float16", "[48, 64]")
    assert "classes" not in facts


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["segmenter", "normalized", "encoder"])
def test_other_models(models, kind, tmp_path):
    export(models / kind, tmp_path / "model.onnx")
    facts = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert facts["task"] == {"segmenter": "segmentation", "normalized": "reconstruction", "encoder": "features"}[kind]
    assert ("resize" in facts) is ("classes" in facts) is (kind == "segmenter")
    assert facts.get("uses_true_patch_statistics") == ("true" if kind == "normalized" else None)


def test_bad_input(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.onnx").write_bytes(b"mine")
    (tmp_path / "link.onnx").symlink_to("nowhere")
    refused = partial(errors_of, capsys=capsys)
    folder, path = models / "classifier", "new.onnx"
    for name in ("old.onnx", "link.onnx"):
        assert refused(folder, name) == [f"error: {name} exists and would be overwritten; give another name"]
    assert refused(folder, "model.pt") == ["error: model.pt does not end in .onnx; give OUT.onnx"]
    assert "the folder no does not exist" in refused(folder, "no/new.onnx")[0]
    assert "does not split into patches of 8" in refused(folder, path, "--img_size", 30)[0]
    assert "not allowed with" in refused(folder, path, "--img_size", 32, "--dynamic_size")[0]
    assert "which have no picture; add --features" in refused(models / "hog", path)[0]
    assert "is a detector, which has no ONNX form here" in refused(models / "detector", path)[0]
    assert "an encoder without a head; leave it out" in refused(models / "encoder", path, "--features")[0]
    all_errors = refused(models / "segmenter", "old.onnx", "--features", "--dynamic_size", "--fast")
    assert all_errors[0].startswith("error: --fast is not a flag of ")
    assert [line.partition(";")[0] for line in all_errors[1:]] == [
        "error: old.onnx exists and would be overwritten",
        f"error: --features: {models}/segmenter is a segmentation model, whose encoder has no norm",
        f"error: --dynamic_size: {models}/segmenter is a segmenter with UperNet, whose graph depends on the size",
    ]
    wrong = refused("nothing", "old.onnx", "--img_size", 1, 2, 3)
    assert "more than two values" in wrong[0] and "overwritten" in wrong[1] and "no such file" in wrong[2]
    with monkeypatch.context() as patch:
        for name in ("onnx", "onnxscript"):
            patch.setitem(sys.modules, name, None)
        words = "onnx, onnxscript are not installed; pip install onnx onnxscript"
        assert refused(folder, path) == [f"error: {words}"]
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_, **__: b"not ONNX")
    monkeypatch.setattr(export_onnx, "largest_difference", lambda *_, **__: 0.02)
    for flags, remedy in (([], "nothing was written"), (["--half"], "leave out --half")):
        with pytest.raises(export_onnx.RunError, match=f"the outputs differ by 0.02 .*{remedy}$"):
            export(folder, path, *flags)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.onnx", "old.onnx"]
    assert (tmp_path / "old.onnx").read_bytes() == b"mine"


def test_a_killed_export_leaves_no_file(models, tmp_path, monkeypatch):
    """An export that is killed while it writes leaves no model.onnx; the next one removes its temporary file."""
    content = 'b"x" * 100_000'
    code = f"""
import os, signal, sys
from pathlib import Path
import export_onnx
export_onnx.to_onnx = lambda *_, **__: {content}
export_onnx.largest_difference = lambda *_, **__: 0.0
export_onnx.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
export_onnx.main(sys.argv[1:])
"""
    path = tmp_path / "model.onnx"
    run_code(code, models / "classifier", path, cwd=tmp_path, code=-9)
    assert not path.exists()
    monkeypatch.setattr(export_onnx, "to_onnx", lambda *_, **__: eval(content))
    monkeypatch.setattr(export_onnx, "largest_difference", lambda *_, **__: 0.0)
    export(models / "classifier", path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"] and len(path.read_bytes()) == 100_000
