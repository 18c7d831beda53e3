"""Tests of demo.py: its results against predict.py and metrics.json, its page in a browser, and its Space."""

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import sys
import time
import tomllib
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import ROOT, TINY, Start, finish, metrics_of, run, run_each
from packaging.specifiers import SpecifierSet
from PIL import Image
from random_modules import build_autoencoder, new_encoder, randomize
from safetensors.torch import load_file

import demo
import push_to_hub
from modeling.classifier import Classifier
from modeling.detector import Detector
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_detector,
    export_encoder,
    export_segmenter,
)
from modeling.inspection import complementary_noise, keep_patches
from modeling.upernet import Segmenter
from training.card import find_record
from training.files import MARKER, replace_folder
from training.heatmaps import class_legend, heat_map, object_list, overlay
from training.launch import RunError
from training.metrics import reconstruction_metrics
from training.ports import free_port
from training.upload import upload

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
BANDS = dict(mean=[0.1, 0.2, 0.3, 0.4, 0.5], std=[0.2] * 5, value_range=[-1, 3])
STATISTICS = dict(mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.25])
CLASSES = ["a cat", "Käse", "<b>owl</b>"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Return a folder of exported small models with random weights."""
    root = tmp_path_factory.mktemp("models")
    decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = randomize(build_autoencoder(new_encoder(**SIZE), **decoder))
    export_autoencoder(model, root / "mae", **STATISTICS)
    export_encoder(model.encoder, root / "encoder", **STATISTICS)
    flat = dict(SIZE, img_size=(16, 32), in_channels=1)
    model = randomize(build_autoencoder(new_encoder(**flat), target="pixels", **decoder))
    export_autoencoder(model, root / "flat", mean=[0.45], std=[0.25])
    model = randomize(build_autoencoder(new_encoder(**SIZE), target="hog", **decoder))
    export_autoencoder(model, root / "hog", **STATISTICS)
    for pooling in ("mean", "attentive"):
        model = randomize(Classifier(new_encoder(**SIZE), 3, pooling=pooling, num_queries=4))
        export_classifier(model, root / pooling, classes=CLASSES, crop_ratio=0.875, **STATISTICS)
    model = randomize(Segmenter(new_encoder(**SIZE), 3, head_width=16))
    export_segmenter(model, root / "segmenter", classes=CLASSES, resize=[96, 48], **STATISTICS)
    model = randomize(Detector(new_encoder(**SIZE), 3, width=8))
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias += torch.tensor([0, 0, 0, 2])  # some boxes score more than half
    export_detector(model, root / "detector", classes=CLASSES, class_ids=[2, 7, 9], **STATISTICS)
    model = randomize(build_autoencoder(new_encoder(**SIZE, in_channels=5), **decoder))
    export_autoencoder(model, root / "bands", **BANDS)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Return the paths of images of several sizes."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for i, size in enumerate([(40, 40), (61, 40), (40, 77)]):
        pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


def opened(path, max_pixels=10**6) -> demo.PageModel:
    return demo.PageModel(path, device=torch.device("cpu"), max_pixels=max_pixels)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# Results


@pytest.mark.parametrize("name", ["mae", "flat"])
def test_reconstructions_are_those_of_predict_py(name, models, photos, tmp_path):
    model = opened(models / name)
    mask = dict(mask_ratio=0.6, strategy="block", seed=3)
    flags = ["--mask_ratio", 0.6, "--mask_strategy", "block", "--seed", 3, "--output", "out", "--batch_size", 1]
    run("predict.py", models / name, *photos, *flags, cwd=tmp_path)
    for index, (path, line) in enumerate(zip(photos, lines_of(tmp_path / "out"), strict=True)):
        inputs = model.prepare(path.read_bytes())
        result = model.reconstruct(inputs.whole, *model.draw_mask(index, **mask))
        assert {key: line[key] for key in result.metrics} == result.metrics  # to the last bit
        grid = np.asarray(Image.open(tmp_path / "out" / line["reconstruction"]))
        width, height = result.tiles[0].size
        scale = round(144 / width)
        for column, tile in enumerate(result.tiles):
            left = 8 + column * (width * scale + 8)
            shown = grid[48 : 48 + height * scale : scale, left : left + width * scale : scale]
            assert np.array_equal(shown, np.asarray(tile.convert("RGB")))
    assert result.num_kept == int(model.num_patches * 0.4) and np.isnan(result.errors).sum() == result.num_kept


def test_the_baseline_is_the_mean_colour_of_the_visible_patches(models, photos):
    model = opened(models / "mae")
    whole = model.prepare(photos[0].read_bytes()).whole
    noise, num_kept = model.draw_mask(0, mask_ratio=0.5, strategy="random", seed=0)
    result = model.reconstruct(whole, noise, num_kept)
    assert result.baseline["masked_psnr"] == result.metrics["masked_psnr_visible_mean"]
    visible = np.isnan(result.errors).repeat(8, 0).repeat(8, 1)
    colour = whole.numpy()[:, visible].mean(axis=1) / 255
    flat = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    expected = reconstruction_metrics(whole[None] / 255, flat, torch.from_numpy(~visible).float()[None, None])
    assert result.baseline == {name: pytest.approx(value.item(), rel=1e-3) for name, value in expected.items()}
    assert model.reconstruct(whole, noise, num_kept, everywhere=True).baseline is None


def test_held_out_images_score_as_in_metrics_json(image_folder, tmp_path, monkeypatch):
    """The examples of a run are its validation images, each with its mask of validation."""
    run("pretrain_mae.py", *TINY, "--path_to_data", image_folder, "--max_steps", 2, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert demo.newest_run("work_dir") == "work_dir/pretrain_mae" and demo.newest_run("nothing") is None
    model, metrics = opened("work_dir/pretrain_mae"), metrics_of(Path("work_dir/pretrain_mae"))
    examples, caption = demo.find_examples(model)
    assert len(examples) == 11 and caption == f"Validation images of {image_folder.name}"
    assert model.name == "pretrain_mae"
    results = []
    for (name, index, data), tile in examples:
        assert max(tile.size) <= 256
        assert Path(name).read_bytes() == data
        mask = model.draw_mask(index, mask_ratio=model.mask_ratio, strategy="random", seed=0)
        results.append(model.reconstruct(model.prepare(data).whole, *mask).metrics)
    for name in results[0]:
        assert np.mean([result[name] for result in results]) == pytest.approx(metrics[name], rel=1e-6)


@pytest.mark.parametrize(("data", "words"), [("gone", "cannot be read"), ("all", "no image"), ("damaged", "no image")])
def test_drawn_scenes_replace_what_is_not_held_out(data, words, models, photos, tmp_path, capsys):
    """The data is gone, has no validation images, or none of them can be read."""
    for name in ("all/a", "damaged/train/a", "damaged/val/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(photos[0].read_bytes()[: 60 if "val" in name else None])
    run_folder = write_record(tmp_path / "run", models, path_to_data=str(tmp_path / data))
    examples, caption = demo.find_examples(opened(run_folder / "checkpoints/step_2"))
    assert len(examples) == 12 and "Drawn scenes" in caption and examples[1][0].data.shape == (64, 64, 3)
    said = capsys.readouterr().out
    assert words in said and "drawn scenes are shown instead" in said


def test_examples_of_a_detector_are_held_out_images(models, photos, tmp_path):
    for split, number in (("train", 0), ("val", 1)):
        for kind in ("images", "labels"):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
        shutil.copy(photos[number], tmp_path / "data/images" / split)
        (tmp_path / "data/labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data/data.yaml").write_text(f"names: {json.dumps(CLASSES)}")
    run_folder = write_record(tmp_path / "run", models, "detector", path_to_data=str(tmp_path / "data"))
    examples, caption = demo.find_examples(opened(run_folder / "checkpoints/step_2"))
    assert caption == "Validation images of data" and [example.data for example, _ in examples] == [
        photos[1].read_bytes()
    ]


def write_record(folder: Path, models: Path, name: str = "mae", **flags) -> Path:
    """Write the args.json and a checkpoint of a run, and return its folder."""
    shutil.copytree(models / name, folder / "checkpoints/step_2")
    record = {key: {} for key in ("command", "data", "machine", "processes", "versions")}
    (folder / "args.json").write_text(json.dumps(dict(record, flags=flags)))
    return folder


def test_only_the_files_of_a_run_are_its_record(models, tmp_path):
    """An args.json of another program is ignored."""
    (tmp_path / "args.json").write_text("[]")
    folder = write_record(tmp_path / "run", models, seed=7)
    assert find_record(folder / "checkpoints/step_2/config.json").flags == {"seed": 7}
    model = opened(folder / "checkpoints/step_2")
    assert model.record.flags == {"seed": 7} and model.name == "run/checkpoints/step_2"
    shutil.copytree(models / "mae", tmp_path / "mae")
    (tmp_path / "mae/args.json").write_text("{}")
    for path in (tmp_path / "mae", folder / "checkpoints"):
        assert find_record(path) is None
    assert opened(tmp_path / "mae").name == "mae"


def test_clicks_turn_patches_over(models, photos):
    model = opened(models / "mae")
    whole, mask = model.prepare(photos[0].read_bytes()).whole, dict(mask_ratio=0.75, strategy="random", seed=0)
    noise, num_kept = model.draw_mask(0, **mask)
    places = [((i % 4 + 0.5) / 4, (i // 4 + 0.5) / 4) for i in range(16)]
    kept = set(noise[0].argsort()[:num_kept].tolist())
    for clicked in ({1, 2, 7}, kept - {min(kept)}):
        noise, count = model.draw_mask(0, **mask, clicks=[places[i] for i in clicked])
        result = model.reconstruct(whole, noise, count)
        assert {*np.flatnonzero(np.isnan(result.errors))} == kept ^ clicked and count == len(kept ^ clicked)
    twice, count = model.draw_mask(0, **mask, clicks=[places[3], places[3]])
    assert torch.equal(twice, model.draw_mask(0, **mask)[0]) and count == num_kept
    for strategy, ratio in (("random", 0.01), ("grid", 0.99)):  # at least one patch is kept, and one removed
        assert 1 <= model.draw_mask(0, mask_ratio=ratio, strategy=strategy, seed=0)[1] <= 15
    assert model.draw_mask(0, **mask, clicks=[places[i] for i in sorted(kept)])[1] == 1


@torch.no_grad()
def test_every_patch_is_predicted_while_it_is_hidden(models, photos):
    model = opened(models / "mae")
    whole = model.prepare(photos[1].read_bytes()).whole
    noise, num_kept = model.draw_mask(0, mask_ratio=0.5, strategy="random", seed=0)
    result = model.reconstruct(whole, noise, num_kept, everywhere=True)
    mae, images = keep_patches(model.model, num_kept), model.normalize(whole[None])
    filled = torch.zeros(1, 3, 32, 32)
    for each in complementary_noise(noise, num_kept):
        _, prediction, removed = mae(images, each)
        filled += model.normalize.undo(mae.reconstruct(images, prediction)) * mae.pixel_mask(removed)
    expected = (filled[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(expected - np.asarray(result.tiles[2])).max() <= 1 and np.isfinite(result.errors).all()
    for name, everywhere in (("masked_psnr", False), ("prediction_psnr", True)):
        blind, seeing = (
            model.reconstruct(whole, noise, num_kept, true_statistics=truth, everywhere=everywhere).metrics[name]
            for truth in (False, True)
        )
        assert blind != seeing


def test_classes_and_labels_are_those_of_predict_py(models, photos, tmp_path):
    for name in ("mean", "attentive"):
        run("predict.py", models / name, *photos, "--output", name, cwd=tmp_path)
        model = opened(models / name)
        for path, line in zip(photos, lines_of(tmp_path / name), strict=True):
            expected = {entry["class"]: entry["probability"] for entry in line["classes"]}
            assert model.classify(model.prepare(path.read_bytes()).view) == pytest.approx(expected, rel=1e-5)
    run("predict.py", models / "segmenter", *photos, "--output", "segmenter", cwd=tmp_path)
    model = opened(models / "segmenter")
    for path in photos:
        labels = model.segment(model.prepare(path.read_bytes()))
        assert np.array_equal(labels + 1, np.asarray(Image.open(tmp_path / "segmenter/labels" / path.name)))


def test_objects_are_those_of_predict_py(models, photos, tmp_path):
    run("predict.py", models / "detector", *photos, "--output", "out", cwd=tmp_path)
    model, counts = opened(models / "detector"), []
    for path, line in zip(photos, lines_of(tmp_path / "out"), strict=True):
        inputs = model.prepare(path.read_bytes())
        records = model.detect(inputs)
        numbers = {2: 1, 7: 2, 9: 3}
        expected = [{**each, "category_id": numbers[each["category_id"]]} for each in line["objects"]]
        for each in expected:
            del each["class"]
        assert records == expected
        drawn, records = model.draw_objects(inputs, records, 0.5)
        assert records == [each for each in expected if each["score"] >= 0.5]
        written = np.asarray(Image.open(tmp_path / "out" / line["overlay"]))
        assert np.array_equal(written[8 : 8 + drawn.height, 8 : 8 + drawn.width], np.asarray(drawn))
        counts.append((len(records), len(expected)))
    assert all(0 < shown < total for shown, total in counts)


def test_nearest_images(models, photos, tmp_path):
    (tmp_path / "damaged.png").write_bytes(photos[0].read_bytes()[:60])
    source = demo.find_images([*map(str, photos), str(tmp_path)])[0]
    for name in ("mae", "mean"):
        model = opened(models / name)
        model.index(source)
        run("predict.py", models / name, *photos, "--features", f"{name}.npy", cwd=tmp_path)
        assert np.array_equal(model.bank[0].numpy(), np.load(tmp_path / f"{name}.npy"))
        results = model.nearest(model.prepare(photos[2].read_bytes()).view)
        assert results[0][1] == "1.000 2.png" and len(results) == 3


def test_features_and_attention(models, photos):
    for name, maps in (("mae", 2), ("encoder", 2), ("hog", 2), ("attentive", 4), ("segmenter", 2)):
        model = opened(models / name)
        assert model.reconstructs == (name == "mae")
        pair = [model.prepare(path.read_bytes()) for path in photos[:2]]
        features, colours, attention = model.look(pair)
        assert features.shape == (2, 16, 32) and [picture.size for picture in colours] == [(4, 4)] * 2
        assert [len(tiles) for tiles in attention] == [maps] * 2
        values, place = model.compare(features, 1, 0.6, 0.1)
        one = features[1, 2].numpy()
        for image in range(2):
            rows = features[image].numpy()
            expected = rows @ one / np.linalg.norm(rows, axis=1) / np.linalg.norm(one)
            np.testing.assert_allclose(values[image].ravel(), expected, rtol=0, atol=1e-5)
        assert place == (0, 2)


def test_colours_and_attention_are_those_of_predict_py(models, photos, tmp_path):
    for name in ("mae", "attentive"):
        for flag in ("pca", "attention"):
            run("predict.py", models / name, *photos[:2], f"--{flag}", "--output", f"{name} {flag}", cwd=tmp_path)
        model = opened(models / name)
        _, colours, attention = model.look([model.prepare(path.read_bytes()) for path in photos[:2]])
        for path, patches, tiles in zip(photos, colours, attention, strict=False):
            written = np.asarray(Image.open(next((tmp_path / f"{name} pca").rglob(path.name))))
            assert np.array_equal(written[8:136:32, 144:272:32], np.asarray(patches))
            written = np.asarray(Image.open(next((tmp_path / f"{name} attention").rglob(path.name))))
            for column, tile in enumerate(tiles, start=1):
                left = 8 + 136 * column
                assert np.array_equal(written[8:136, left : left + 128], np.asarray(tile))


def test_images_that_cannot_be_read_have_a_reason(models, photos):
    several = [opened(models / "mae", max_pixels=2000), opened(models / "flat")]
    for data in (b"", b"no image", photos[0].read_bytes()[:60], Image.new("L", (1, 9)).tobytes()):
        assert isinstance(demo.pick(several, "x", 0, data), str) and demo.pick(several, "x", 0, data)
    choice = demo.pick(several, "x", 0, photos[1].read_bytes())
    assert choice.inputs[0] == "40 x 61 pixels, more than the 2000 allowed; raise --max_pixels"
    assert choice.inputs[1].whole.shape == (1, 16, 32)


def test_colours_and_legends():
    picture = np.asarray(heat_map(np.array([[0, 0.5], [1, np.nan]]), 0, 1)).tolist()
    assert picture == [[[12, 8, 60], [190, 50, 84]], [[252, 244, 170], [225, 225, 225]]]
    labels, colours = np.array([[0, 2], [2, 2]], np.uint8), np.array([[200, 0, 0], [0, 9, 0], [0, 0, 100]], np.uint8)
    image = np.full((1, 4, 4), 40, np.uint8)
    blended = np.asarray(overlay(image, labels, colours, 0.5))
    assert blended[0, 0].tolist() == [120, 20, 20] and blended[3, 3].tolist() == [20, 20, 70]
    legend = class_legend(labels, CLASSES, colours)
    assert "&lt;b&gt;owl&lt;/b&gt; 75.0 %" in legend and "Käse" not in legend and "rgb(200, 0, 0)" in legend
    assert legend.index("owl") < legend.index("a cat")
    records = [dict(category_id=3, score=0.876, bbox=[1.2, 2.6, 30.0, 4.0])]
    listed = object_list(records, CLASSES, colours)
    assert "rgb(0, 0, 100)" in listed and "&lt;b&gt;owl&lt;/b&gt;</td><td>87.6 %</td><td>30 x 4 at 1, 3<" in listed
    assert object_list([], CLASSES, colours) == "no object"


def test_bad_input_is_an_error_in_one_line(models, photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    mae = models / "mae"
    detector = [models / "detector", "--nearest", photos[0].parent]
    starts = [[], [empty], [mae, "--nearest", "nowhere"], [mae, "--nearest", empty], [mae, "--host", "300.1.1.1"]]
    ends = run_each("demo.py", [*starts, detector], cwd=tmp_path, code=2)
    words = (
        "make one with: accelerate",
        "without weights",
        "nowhere",
        "no image",
        "--host 300.1.1.1 is not an address",
    )
    words += ("is a segmentation model or a detector, whose encoder has no norm",)
    for said, expected in zip(ends, words, strict=True):
        (line,) = said.strip().splitlines()
        assert line.startswith("error: ") and expected in line


def test_ports(monkeypatch):
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as taken:
            try:
                taken.bind((host, 0))
            except OSError:
                continue  # this machine has no IPv6
            taken.listen()
            port = taken.getsockname()[1]
            candidate, errors = free_port(host, port)
            assert port < candidate < port + 100 and not errors
    for host, expected in (
        ("300.1.1.1", "is not an address"),
        ("192.0.2.1", "cannot be used"),
        ("a..b", "is not an address"),
    ):
        (error,) = free_port(host, 7860)[1]
        assert error.startswith(f"--host {host} ") and expected in error


# The page without a browser


@pytest.fixture(scope="module")
def tabs():
    pytest.importorskip("gradio")
    from training import tabs

    return tabs


def test_uploads_are_limited(models, photos, tabs, tmp_path):
    """gradio limits uploads only; large files given by path are refused, and addresses are not downloaded."""
    from training.app import _choose_file, build_page

    model = opened(models / "mae")
    pick = partial(demo.pick, [model])
    large = tmp_path / "large.png"
    with open(large, "wb") as file:
        file.truncate(21_000_000)
    before = pick("x", 0, photos[0].read_bytes())
    after, line = _choose_file(pick, str(large), before)
    assert after is before and "error: large.png: larger than 20 MB" in line
    page = build_page([model], [], "", pick)
    components = [block for block in page.blocks.values() if hasattr(block, "preprocess")]
    for component in components:  # an event can send a file to each of them
        with pytest.raises(gradio_error(), match="not downloaded"):
            asyncio.run(component.async_move_resource_to_block_cache("http://127.0.0.1:9/a.png"))
    assert len(components) > 20


def gradio_error() -> type[Exception]:
    import gradio

    return gradio.Error


def test_without_an_image_nothing_is_drawn(tabs):
    """A page has no image if it has no examples, or after its session was dropped."""
    skipped = tabs.gr.skip()
    assert tabs.if_chosen(lambda choice: 1 / 0, None) == skipped
    event = SimpleNamespace(index=(3, 3))
    assert tabs._click_of((32, 32))(None, 50, "random", 0, None, event) is None
    for features in (None, {1: None}):
        assert tabs._similarity_of(None, 0, 0)(features, event) == skipped


def test_opacity_before_the_classes_of_an_image(models, photos, tabs):
    segmenter = [opened(models / "segmenter")]
    one, other = (demo.pick(segmenter, "x", 0, photo.read_bytes()) for photo in photos[:2])
    compute, draw = (lambda model, inputs: model.segment(inputs)), tabs._draw_classes
    labels, picture, legend = tabs._compute_and_draw(segmenter, [0], compute, draw, one, 60)
    for results in (None, labels):
        assert tabs._draw_again(segmenter, [0], draw, other, results, 50) == tabs.gr.skip()
    again = tabs._draw_again(segmenter, [0], draw, one, labels, 60)
    assert again[1] == legend and np.array_equal(np.asarray(again[0]), np.asarray(picture))


def test_models_that_cannot_read_an_image_say_so(models, photos, tabs):
    several = [opened(models / "mean"), opened(models / "mean", max_pixels=10)]
    several[1].bank = several[0].bank = True
    choice = demo.pick(several, "x", 0, photos[0].read_bytes())
    reason = "`mean` cannot read this image: 40 x 40 pixels, more than the 10 allowed"
    assert reason in tabs._classify(several, [0, 1], choice)[5] and reason in tabs._nearest(several, [1], choice)[1]
    assert tabs.in_markdown("<b>a|b</b>\n*c*") == r"\<b\>a\|b\<\/b\> \*c\*"


def test_segmenters_show_attention_alone(models, photos, tabs):
    """Their encoder has no final norm, so neither the page nor predict.py shows feature colours."""
    both = [opened(models / "segmenter"), opened(models / "mae")]
    choice = demo.pick(both, "x", 0, photos[0].read_bytes())
    features, *outputs = tabs._look(both, [0, 1], lambda: None, choice, None)
    segmenter, mae = outputs[:9], outputs[9:]
    assert [*features] == [1] and segmenter[1:3] == [None] * 2 and segmenter[4:7] == [None, None, ""]
    assert segmenter[0] is not None and len(segmenter[7]) == 2 and all(mae)


def test_only_the_picture_that_is_clicked_is_enlarged(models, photos, tabs):
    mae = [opened(models / "mae")]
    choice = demo.pick(mae, "x", 0, photos[0].read_bytes())
    outputs = tabs._reconstruct(mae, [0], choice, 75, "random", 0, True, None)
    assert len(outputs) == 7
    assert [each.size for each in outputs[:5]] == [(32, 32), (512, 512), (32, 32), (32, 32), (4, 4)]


def test_true_patch_statistics_are_named(models, photos, tabs):
    mae = [opened(models / "mae")]
    choice = demo.pick(mae, "x", 0, photos[0].read_bytes())
    for draw, clicks in ((tabs._reconstruct, [None]), (tabs._fill, [])):
        leaky, honest = (draw(mae, [0], choice, 75, "random", 0, truth, *clicks) for truth in (True, False))
        assert tabs.LEAKS in leaky[-2] and tabs.LEAKS not in honest[-2]
        assert not np.array_equal(np.asarray(leaky[-3]), np.asarray(honest[-3]))  # error maps


# The page


@pytest.fixture(scope="module")
def server(browser, models, photos, tmp_path_factory):
    """Yield the address of a page with five models, started on a port in use, and its temporary folder."""
    cwd = tmp_path_factory.mktemp("server")
    names = [models / name for name in ("mae", "flat", "attentive", "segmenter", "detector")]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*names, "--nearest", photos[0].parent, "--port", port, "--max_pixels", 10**6]
        process = start_page(ROOT / "demo.py", *words, cwd=cwd)
        address = address_of(process)
        said = process.streams[0].read_text()
        assert f"port {port} is in use" in said and address != f"http://127.0.0.1:{port}"
    yield address, cwd / "tmp"
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # as under nohup
    process.send_signal(signal.SIGTERM if ignored else signal.SIGHUP)
    finish(process, 0)
    assert not list((cwd / "tmp").iterdir())  # the server has removed its files


def start_page(script: Path, *words, cwd: Path, **variables: str) -> Start:
    """Start a script whose temporary files are in `cwd`/tmp."""
    (cwd / "tmp").mkdir()
    return Start(script, *words, cwd=cwd, TMPDIR=str(cwd / "tmp"), PYTHONUNBUFFERED="1", **variables)


def address_of(process: Start) -> str:
    """Wait until the page is served, and return its address."""
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end:
        said = process.streams[0].read_text() if process.streams[0].exists() else ""
        if found := re.search(r"^demo: (http://127\.0\.0\.1:\d+)", said, re.MULTILINE):
            return found[1]
        time.sleep(0.1)
    process.kill()
    raise AssertionError([path.read_text() for path in process.streams])


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """Control the page of one visitor in the browser."""

    def __init__(self, browser, address, width=1280, text="4 of 16 patches are seen"):
        self.context = browser.new_context(viewport=dict(width=width, height=900))
        self.page, self.outside = self.context.new_page(), []
        self.page.set_default_timeout(240_000)  # the cores may be busy
        self.page.on("request", lambda request: self.outside.append(request.url))
        self.page.goto(address)
        self.wait(text)

    def wait(self, text: str | re.Pattern) -> None:
        self.page.get_by_text(text).locator("visible=true").first.wait_for()

    def click(self, locator, text: str, **options) -> None:
        """Click until a text is shown; clicks are repeated, because the page may replace the picture meanwhile."""
        found = self.page.get_by_text(text).locator("visible=true").first
        for turn in range(2400):
            if found.is_visible():
                return
            if turn % 100 == 0:
                locator.click(**options)
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{text} is not shown")

    def tab(self, name: str) -> None:
        self.page.locator("button[role=tab]", has_text=name).locator("visible=true").first.click()

    def upload(self, path: Path, text: str) -> None:
        """Upload a file in place of the previous one, and wait for a text."""
        clear = self.page.get_by_label("Remove Image").or_(self.page.get_by_label("Clear")).locator("visible=true")
        if clear.count():
            clear.first.click()
        self.page.locator("input[type=file]").first.set_input_files(path)
        self.wait(text)

    def picture(self, label: str) -> np.ndarray:
        """Return the first picture with a label, as the server sent it."""
        place = self.page.locator(".pixels", has=self.page.get_by_text(label, exact=True)).locator("visible=true").first
        body = self.context.request.get(place.locator("img").get_attribute("src")).body()
        return np.asarray(Image.open(io.BytesIO(body)))

    def pixels(self, label: str) -> np.ndarray:
        """Return the first picture with a label at its own size of 32 x 32 pixels."""
        pixels = self.picture(label)
        return pixels[:: len(pixels) // 32, :: len(pixels) // 32]

    def set_number(self, percent: int) -> None:
        field = self.page.locator("input[type=number]").locator("visible=true").first
        field.fill(str(percent))
        field.press("Enter")


def test_a_visitor(server, browser, models, photos, tmp_path):
    """A visitor uses every tab and uploads good and bad files; nothing is requested from another server."""
    address, folder = server
    visitor = Page(browser, address)
    page = visitor.page
    visitor.set_number(50)
    visitor.wait("8 of 16 patches are seen")
    sees = visitor.pixels("encoder sees")
    removed = (sees.reshape(4, 8, 4, 8, 3) == 128).all(axis=(1, 3, 4))
    row, column = np.argwhere(removed)[-1]
    shown = page.locator(".clickable img").locator("visible=true").first
    side = shown.bounding_box()["width"] / 4
    shown.click(position=dict(x=(column + 0.5) * side, y=(row + 0.5) * side))
    visitor.wait("9 of 16 patches are seen")
    changed = (visitor.pixels("encoder sees").reshape(4, 8, 4, 8, 3) == 128).all(axis=(1, 3, 4)) != removed
    assert np.argwhere(changed).tolist() == [[row, column]]
    page.get_by_text("Undo clicks").click()
    visitor.wait("8 of 16 patches are seen")

    visitor.upload(photos[2], "image: 2.png")
    model = opened(models / "mae")
    whole = model.prepare(photos[2].read_bytes()).whole
    mask = model.draw_mask(0, mask_ratio=0.5, strategy="random", seed=0)
    expected = model.reconstruct(whole, *mask)
    for scores in (expected.metrics, expected.baseline):
        for part in ("masked", "prediction", "pasted"):
            visitor.wait(f"{scores[f'{part}_psnr']:.2f} dB, {scores[f'{part}_ssim']:.3f}")
    labels = ("original", "encoder sees", "prediction", "with visible patches")
    for label, tile in zip(labels, expected.tiles, strict=True):
        assert np.array_equal(visitor.pixels(label), np.asarray(tile))

    (tmp_path / "damaged.png").write_bytes(photos[0].read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("L", (1200, 1200)).save(tmp_path / "huge.png")
    for name in ("damaged.png", "text.jpg", "huge.png"):
        visitor.upload(tmp_path / name, f"error: {name}: ")
    assert np.array_equal(visitor.pixels("original"), np.asarray(expected.tiles[0]))

    visitor.tab("Fill everything")
    mask_of_fill = model.draw_mask(0, mask_ratio=0.75, strategy="random", seed=0)
    filled = model.reconstruct(whole, *mask_of_fill, everywhere=True)
    visitor.wait(f"{filled.metrics['prediction_psnr']:.2f} dB, {filled.metrics['prediction_ssim']:.3f}")
    assert np.array_equal(visitor.pixels("every patch predicted"), np.asarray(filled.tiles[2]))
    page.get_by_label("True patch statistics").locator("visible=true").uncheck()
    filled = model.reconstruct(whole, *mask_of_fill, everywhere=True, true_statistics=False)
    visitor.wait(f"{filled.metrics['prediction_psnr']:.2f} dB, {filled.metrics['prediction_ssim']:.3f}")
    visitor.tab("Classify")
    visitor.wait("a cat")
    visitor.tab("Segment")
    visitor.wait(re.compile(r"\d\.\d %"))
    visitor.tab("Detect")
    detector = opened(models / "detector")
    inputs = detector.prepare(photos[2].read_bytes())
    for percent in (50, 20):
        visitor.set_number(percent)
        drawn, records = detector.draw_objects(inputs, detector.detect(inputs), percent / 100)
        visitor.wait(f"{100 * records[-1]['score']:.1f} %")
        assert page.locator("tr", has_text=" at ").locator("visible=true").count() == len(records)
        assert np.array_equal(visitor.picture("objects"), np.asarray(drawn))
    visitor.tab("Look inside")
    visitor.wait("cosine similarity to row 3, column 3 of the first image")
    patch = page.locator(".clickable img").locator("visible=true").nth(1)
    visitor.click(patch, "cosine similarity to row 1, column 1 of the second image", position=dict(x=2, y=2))
    visitor.tab("Nearest")
    visitor.wait("1.000 2.png")
    assert all(url.startswith((address, "data:", "blob:")) for url in visitor.outside)
    assert list(folder.rglob("*.png"))  # kept until the server ends
    visitor.context.close()


def test_two_visitors_at_once_do_not_mix(server, browser):
    one, other = Page(browser, server[0]), Page(browser, server[0], width=390)
    before = one.pixels("original")
    one.page.locator(".examples button img").nth(3).click()
    one.wait("image: scene 3")
    for _ in range(2400):  # until it is drawn: on a busy machine, this drawing may come after that of the new number
        if not np.array_equal(one.pixels("original"), before):
            break
        one.page.wait_for_timeout(100)
    one.set_number(50)
    other.set_number(25)
    one.wait("8 of 16 patches are seen")
    other.wait("12 of 16 patches are seen")
    assert not np.array_equal(one.pixels("original"), other.pixels("original"))
    assert other.page.evaluate("document.documentElement.scrollWidth") == 390  # a phone's width is enough
    for visitor, is_wide in ((one, True), (other, False)):  # models are side by side, or below each other
        names = visitor.page.locator("h3").locator("visible=true")
        (left, top), (x, y) = ((box["x"], box["y"]) for box in (names.nth(i).bounding_box() for i in range(2)))
        assert (x > left + 400 and y == top) if is_wide else (x == left and y > top + 300)
    for visitor in (one, other):
        visitor.context.close()


def test_files_of_other_channels_and_values(browser, models, photos, tabs, tmp_path, monkeypatch):
    from training.app import _launch, build_page

    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)  # as on a machine that answers late
    model = [opened(models / "bands")]
    (port, _), rng = free_port("127.0.0.1", 7890), np.random.default_rng(0)
    page = build_page(model, *demo.find_examples(model[0]), partial(demo.pick, model))
    address, _ = _launch(page, "127.0.0.1", port, share=False)
    try:
        visitor = Page(browser, address, text="Your image: TIFF or .npy")
        tifffile.imwrite(tmp_path / "five.tif", rng.normal(1, 1, (40, 50, 5)).astype(np.float32))
        np.save(tmp_path / "five.npy", rng.normal(1, 1, (5, 40, 50)))
        for name in ("five.tif", "five.npy"):
            visitor.upload(tmp_path / name, f"image: {name}")
            whole = model[0].prepare((tmp_path / name).read_bytes()).whole
            result = model[0].reconstruct(whole, *model[0].draw_mask(0, mask_ratio=0.75, strategy="random", seed=0))
            visitor.wait(f"{result.metrics['masked_psnr']:.2f} dB, {result.metrics['masked_ssim']:.3f}")
            assert np.array_equal(visitor.pixels("original"), np.asarray(result.tiles[0]))
        visitor.upload(photos[0], "error: 0.png: has 3 channels, expected 5")
        assert np.array_equal(visitor.pixels("original"), np.asarray(result.tiles[0]))
        visitor.context.close()
    finally:
        page.close(verbose=False)


# A Space


def test_a_space_runs_by_itself(models, photos, hub, tmp_path, monkeypatch):
    """The uploaded folder serves the page without this repository and the packages for training and evaluation."""
    hub.enter(monkeypatch, tmp_path)
    folder = tmp_path / "space"
    words = [models / "mae", "--output", folder, "--space", "owner/mae-demo", "--license", "apache-2.0"]
    push_to_hub.main([str(word) for word in words])
    files = hub.files("spaces/owner/mae-demo")
    assert {"app.py", "demo.py", "LICENSE", "README.md", "requirements.txt", "model/model.safetensors"} <= files.keys()
    assert files["data/files.py"] == (ROOT / "data/files.py").read_bytes()
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    expected = dict(title="mae-demo", sdk="gradio", app_file="app.py", license="apache-2.0", python_version="3.12")
    assert front.items() >= expected.items() and f"gradio>={front['sdk_version']}" in files["requirements.txt"].decode()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert SpecifierSet(project["requires-python"]).contains(front["python_version"])
    assert all(
        Path(name).suffix in (".py", ".jinja", ".txt") or "/" not in name for name in files if "model/" not in name
    )
    for line in files["requirements.txt"].decode().splitlines():
        assert line in (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-demo.txt").read_text()
    ours, theirs = (load_file(path / "model.safetensors") for path in (models / "mae", folder / "model"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    blocked = ("timm", "transformers", "datasets", "evaluate", "wandb", "matplotlib", "tensorboard")
    paths = [folder, *(path for path in sys.path if Path(path) not in (ROOT, ROOT / "tests"))]
    code = f"import runpy, sys; sys.path[:] = {[*map(str, paths)]!r}; sys.modules.update(dict.fromkeys({blocked!r})); "
    (tmp_path / "start.py").write_text(code + f"runpy.run_path({str(folder / 'app.py')!r}, run_name='__main__')")
    process = start_page(tmp_path / "start.py", cwd=tmp_path, GRADIO_SERVER_PORT="7941")
    try:
        outputs = first_outputs(address_of(process))
        tiles = [output["url"] for output in outputs if isinstance(output, dict) and output.get("url")]
        with urllib.request.urlopen(tiles[1]) as answer:
            sees = np.asarray(Image.open(io.BytesIO(answer.read())))[::16, ::16]
        assert (sees.reshape(4, 8, 4, 8, 3) == 128).all(axis=(1, 3, 4)).sum() == 12 and len(tiles) == 5
        assert "4 of 16 patches are seen" in outputs[-2]
    finally:
        process.terminate()
        finish(process, 0)


def first_outputs(address: str) -> list:
    """Return the outputs of the first tab, requested as a browser does."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    events = config["dependencies"]
    (load,) = (event for event in events if any("load" in target for target in event["targets"]))
    first = next(event for event in events if event["trigger_after"] == load["id"])
    for event in (load, first):
        data = [values[component] for component in event["inputs"]]
        body = json.dumps(dict(data=data, fn_index=event["id"], session_hash="visitor")).encode()
        request = urllib.request.Request(f"{address}/gradio_api/queue/join", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request).close()
        with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=visitor") as lines:
            messages = (json.loads(line[6:]) for line in lines if line.startswith(b"data: "))
            outputs = next(message for message in messages if message["msg"] == "process_completed")["output"]
    return outputs["data"]


def push_space(root: Path, *names: str) -> str:
    """Upload a Space of these files to owner/app, and return the address of the commit."""

    def write(folder: Path) -> None:
        for name in ("README.md", *names):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"---\ntags:\n- mae-accelerate\n---\n{name}")

    replace_folder(root / "space", write)
    options = dict(private=False, revision=None, message="Weights", repo_type="space")
    return upload(root / "space", "owner/app", **options)


@pytest.mark.parametrize(
    "theirs",
    [
        {"Dockerfile": "", "README.md": "---\nsdk: docker\n---\n"},
        {"index.html": "", "README.md": "---\nsdk: static\n---\n- mae-accelerate\n"},
        {"main.py": ""},
    ],
)
def test_apps_of_others_are_not_replaced(theirs, hub, tmp_path, monkeypatch):
    hub.enter(monkeypatch, tmp_path)
    (tmp_path / "theirs").mkdir()
    for name, text in theirs.items():
        (tmp_path / "theirs" / name).write_text(text)
    hub.add("spaces/owner/app", tmp_path / "theirs")
    with pytest.raises(RunError, match="owner/app holds another app; give another --space"):
        push_space(tmp_path, "app.py")
    assert hub.files("spaces/owner/app").keys() == theirs.keys()


def test_a_second_upload_deletes_what_the_first_wrote(hub, tmp_path, monkeypatch):
    """A new Space contains only a README. Files that its owner adds are kept in every folder."""
    hub.enter(monkeypatch, tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/README.md").write_text("---\nsdk: gradio\n---\n")
    hub.add("spaces/owner/app", tmp_path / "new")
    push_space(tmp_path, "app.py", "model/old.json", "data/old.py")
    names = {MARKER, "README.md", "app.py", "model/old.json", "data/old.py"}
    assert hub.files("spaces/owner/app").keys() == names
    shutil.copytree(tmp_path / "space", tmp_path / "edited")
    for name in ("config.json", "model/mine.json", "data/mine.py"):  # config.json does not make a Space a model
        (tmp_path / "edited" / name).write_text("mine")
    hub.add("spaces/owner/app", tmp_path / "edited")
    push_space(tmp_path, "app.py", "model/new.json")
    kept = {MARKER, "README.md", "app.py", "model/new.json", "config.json", "model/mine.json", "data/mine.py"}
    assert hub.files("spaces/owner/app").keys() == kept


def test_names_of_spaces_and_contradictions_are_errors(models, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    for words, expected in (
        (
            ["--space", "mae"],
            "--space 'mae' is not a valid repository name (the owner is missing); expected OWNER/NAME",
        ),
        (["--space", "owner/a--b"], "--space 'owner/a--b' is not a valid repository name"),
        (["--space", "owner/a", "--repo_id", "owner/b"], "--repo_id and --space are two uploads"),
    ):
        with pytest.raises(SystemExit, match="2"):
            push_to_hub.main([str(word) for word in (models / "mae", *out, *words)])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and expected in line
    assert not (tmp_path / "out").exists()
