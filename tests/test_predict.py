"""Test predict.py against transformers, timm, and the evaluation of the training scripts."""

import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SCENES, TINY, run, write_images
from PIL import Image, ImageOps
from random_modules import build_autoencoder
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import UperNetForSemanticSegmentation, ViTMAEForPreTraining, pipeline

import predict
import training.predictions
from data.masking import mask_noise
from data.masks import LIKE_ADE20K, decode_labels
from data.sampling import sample_generator
from data.segmentation import palette
from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_classifier, export_encoder, export_segmenter
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from training.launch import RunError
from training.predictions import picture_names, write_features, write_lines

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
COLOUR = dict(mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.25])
GREY = dict(mean=[0.45], std=[0.25])
CLASSES = ["a cat", "Käse", "dog", "owl", "eel", "fly", "gnu"]
# Width and height. transformers may crop the fourth to the sixth one pixel further left or up.
SIZES = [(40, 40), (61, 40), (40, 77), (70, 51), (35, 38), (240, 31), (9, 14), (33, 120)]
ORIENTATION = 0x0112  # in EXIF
LONG, SHORT = 96, 48  # sides of images for segmentation, larger than a window of 32 pixels


@torch.no_grad()
def randomized(module: torch.nn.Module, last: torch.nn.Module | None = None) -> torch.nn.Module:
    """Fill a module with random parameters; with `last`, its layer of logits, classes are about equally frequent."""
    generator = torch.Generator().manual_seed(3)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.copy_(
                ("norm" in name and name.endswith("weight")) + 0.2 * torch.randn(value.shape, generator=generator)
            )
    module.eval()
    if last is not None:
        channels, size = module.encoder.in_channels, module.encoder.img_size
        images = F.interpolate(torch.randn(64, channels, 4, 4, generator=generator), size=size, mode="bilinear")
        logits = module(images).transpose(0, 1).flatten(1)  # (classes, all images and pixels)
        last.bias -= logits.mean(dim=1)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Return exported folders of small models with random weights."""
    root = tmp_path_factory.mktemp("models")
    grey = dict(SIZE, in_channels=1)
    flat = dict(grey, img_size=(16, 32))

    def classifier(name, statistics, crop_ratio=0.875, pooling="mean", **size):
        model = Classifier(VisionTransformer(**size), len(CLASSES), pooling=pooling)
        randomized(model, model.head)
        export_classifier(model, root / name, classes=CLASSES, crop_ratio=crop_ratio, **statistics)

    classifier("mean", COLOUR, **SIZE)
    classifier("cls", COLOUR, pooling="cls", crop_ratio=1.0, **SIZE)
    classifier("flat classifier", GREY, **flat)
    for name, size, statistics in (("autoencoder", SIZE, COLOUR), ("flat autoencoder", flat, GREY)):
        model = randomized(
            build_autoencoder(VisionTransformer(**size), **DECODER, target="normalized" if size is SIZE else "pixels")
        )
        export_encoder(model.encoder, root / name, **statistics)
        export_autoencoder(model, root / name / "pretraining", **statistics)
    shutil.copytree(root / "autoencoder", root / "encoder", ignore=lambda *_: ["pretraining"])
    for name, size, statistics in (("segmenter", SIZE, COLOUR), ("grey segmenter", grey, GREY)):
        model = Segmenter(VisionTransformer(**size), len(SCENES), head_width=16)
        randomized(model, model.decode_head.classifier)
        export_segmenter(model, root / name, classes=SCENES, resize=[LONG, SHORT], **statistics)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Return images of several sizes, formats and modes, one of them with an EXIF orientation."""
    rng, paths = np.random.default_rng(0), []
    for i, (width, height) in enumerate(SIZES):
        small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert({2: "L", 4: "P"}.get(i, "RGB"))
        path = tmp_path_factory.getbasetemp() / "photos" / f"{i}.{'png' if i % 2 == 0 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[ORIENTATION] = 6 if i == 1 else 1
        image.save(path, exif=exif)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def predictions(models, photos, tmp_path_factory):
    """Return a function that runs predict.py, cached by arguments, and returns lines, output folder and process."""
    folder = tmp_path_factory.mktemp("predictions")

    @functools.cache
    def call(model, *flags, images=tuple(photos), code=0):
        output = folder / str(call.cache_info().misses)
        words = [models.get(model, model), *images, "--output", output, *flags]
        process = run("predict.py", *words, cwd=folder, code=code)
        return lines_of(output), output, process

    return call


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def upright(path: Path, mode: str = "RGB") -> Image.Image:
    image = Image.open(path)
    image.draft(mode, image.size)  # takes the stored luma of a JPEG for grey
    return ImageOps.exif_transpose(image).convert(mode)


def pixels_of(path: Path, mode: str = "RGB") -> torch.Tensor:
    return v2.functional.pil_to_tensor(upright(path, mode))


def normalized(pixels: torch.Tensor, statistics: dict) -> torch.Tensor:
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), **statistics)[None]


def covering(path: Path, size: tuple[int, int], crop_ratio: float, mode: str = "RGB") -> torch.Tensor:
    """Resize with torchvision until the image just covers size / crop_ratio, and crop the centre."""
    pixels = pixels_of(path, mode)
    (h, w), (cover_h, cover_w) = pixels.shape[1:], (int(side / crop_ratio) for side in size)
    new = (cover_h, w * cover_h // h) if cover_h * w >= cover_w * h else (h * cover_w // w, cover_w)
    pixels = v2.functional.resize(pixels, list(new), v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(pixels, list(size))


def as_timm_sees(name: str, path: Path) -> torch.Tensor:
    """Return the input (1, C, H, W) of the model `name` of `models`, by torchvision's transforms."""
    size, mode, statistics = ((16, 32), "L", GREY) if name.startswith("flat") else ((32, 32), "RGB", COLOUR)
    return normalized(covering(path, size, 1.0 if name == "cls" else 0.875, mode), statistics)


def probabilities_of(line: dict) -> dict[str, float]:
    return {entry["class"]: entry["probability"] for entry in line["classes"]}


# Classifiers


def same_crop(path: Path, side: int, cover: int) -> bool:
    """Return whether transformers crops as torchvision and timm do: it rounds half a pixel down, they to even."""
    width, height = upright(path).size
    margins = [length * cover // min(width, height) - side for length in (width, height)]
    return all(margin % 4 != 3 for margin in margins)


@pytest.mark.parametrize(("name", "cover"), [("mean", 36), ("cls", 32)])
def test_classes_agree_with_transformers_pipeline(name, cover, models, photos, predictions):
    lines, _, done = predictions(name, "--top_k", 100)
    assert [line["image"] for line in lines] == [str(path) for path in photos]
    theirs, compared = pipeline("image-classification", model=str(models[name]), top_k=100, device="cpu"), 0
    for line in lines:
        expected = {entry["label"]: entry["score"] for entry in theirs(line["image"])}
        ours = probabilities_of(line)
        assert ours.keys() == expected.keys() and sum(ours.values()) == pytest.approx(1, abs=1e-5)
        assert [*ours.values()] == sorted(ours.values(), reverse=True)
        if same_crop(line["image"], 32, cover):
            assert ours == pytest.approx(expected, abs=1e-4)
            compared += 1
    assert compared >= 6
    values = [[probabilities_of(line)[name] for name in CLASSES] for line in lines]
    assert np.ptp(values, axis=0).max() > 0.05  # the images differ
    assert all(f"{path}: {lines[i]['classes'][0]['class']} " in done.stdout for i, path in enumerate(photos))


@pytest.mark.parametrize("name", ["mean", "cls", "flat classifier"])
def test_classes_agree_with_timm(name, models, predictions):
    theirs = timm.create_model(f"local-dir:{models[name]}", pretrained=True).eval()
    for line in predictions(name, "--top_k", 100)[0]:
        with torch.no_grad():
            expected = theirs(as_timm_sees(name, line["image"])).softmax(dim=1)[0].tolist()
        assert probabilities_of(line) == pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=1e-4)


def test_top_k(predictions):
    for line, all_classes in zip(*(predictions("mean", "--top_k", k)[0] for k in (2, 100)), strict=True):
        assert line["classes"] == all_classes["classes"][:2]
    assert {len(line["classes"]) for line in predictions("mean")[0]} == {5}


# Segmenters


def windows_by_hand(net, path, mode, statistics):
    """Return the classes of an image's pixels by transformers' UperNet in windows of 32 pixels, 21 apart."""
    pixels = pixels_of(path, mode)
    height, width = pixels.shape[1:]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    sides = [max(1, int(side * scale + 0.5)) for side in (height, width)]
    sides = [side if side > 32 else max(2, round(side / 8)) * 8 for side in sides]
    image = normalized(v2.functional.resize(pixels, sides, antialias=True), statistics)
    total, count = 0, 0
    for top in range(0, sides[0] - 1, 21):
        for left in range(0, sides[1] - 1, 21):
            top_at, left_at = max(0, min(top, sides[0] - 32)), max(0, min(left, sides[1] - 32))
            place = (..., slice(top_at, top_at + 32), slice(left_at, left_at + 32))
            if (top and top_at <= top - 21) or (left and left_at <= left - 21):
                continue  # the previous window reached the edge
            logits = torch.zeros(1, len(SCENES), *sides)
            logits[place] = net(image[place]).logits
            seen = torch.zeros(sides)
            seen[place[1:]] = 1
            total, count = total + logits, count + seen
    return F.interpolate(total / count, size=(height, width), mode="bilinear").argmax(dim=1)[0].numpy()


@pytest.mark.parametrize("name", ["segmenter", "grey segmenter"])
@torch.no_grad()
def test_labels_agree_with_transformers_in_windows(name, models, photos, predictions):
    net = UperNetForSemanticSegmentation.from_pretrained(models[name]).eval()
    mode, statistics = ("L", GREY) if name == "grey segmenter" else ("RGB", COLOUR)
    lines, folder, _ = predictions(name)
    equal, seen = [], set()
    for path, line in zip(photos, lines, strict=True):
        labels = np.asarray(Image.open(folder / line["labels"]))
        assert labels.shape == upright(path).size[::-1]  # at the image's own size, upright
        equal.append((labels - 1 == windows_by_hand(net, path, mode, statistics)).ravel())
        seen |= {*labels.ravel().tolist()}
        counts = {entry["label"]: entry["pixels"] for entry in line["classes"]}
        assert counts == dict(zip(*(each.tolist() for each in np.unique(labels, return_counts=True)), strict=True))
        assert [*counts.values()] == sorted(counts.values(), reverse=True)
        assert all(entry["class"] == SCENES[entry["label"] - 1] for entry in line["classes"])
    assert np.concatenate(equal).mean() > 0.9995 and len(seen) > 2


def test_labels_of_whole_images_agree_with_transformers_pipeline(models, photos, predictions):
    theirs = pipeline("image-segmentation", model=str(models["segmenter"]), device="cpu")
    lines, folder, _ = predictions("segmenter", "--evaluate", "whole")
    for path, line in zip(photos, lines, strict=True):
        expected = np.zeros(upright(path).size[::-1], np.uint8)
        for entry in theirs(str(path)):
            expected[np.asarray(entry["mask"]) > 0] = 1 + SCENES.index(entry["label"])
        labels = np.asarray(Image.open(folder / line["labels"]))
        assert (labels == expected).mean() > 0.99, path
    slid = predictions("segmenter")[1] / lines[1]["labels"]
    assert (np.asarray(Image.open(slid)) != np.asarray(Image.open(folder / lines[1]["labels"]))).any()


def scores_by_hand(lines, folder, annotations, num_classes):
    """Return mean IoU and pixel accuracy of the label files, in percent."""
    joint = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for line in lines:
        labels = np.asarray(Image.open(folder / line["labels"]))
        annotation = np.asarray(Image.open(annotations / f"{Path(line['image']).stem}.png"))
        np.add.at(joint, (annotation, labels), 1)
    joint = joint[1:, 1:]  # without void
    agreed, union = joint.diagonal(), joint.sum(0) + joint.sum(1) - joint.diagonal()
    return 100 * (agreed[union > 0] / union[union > 0]).mean(), 100 * agreed.sum() / joint.sum()


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_labels_have_the_scores_of_evaluation(mode, models, scenes, predictions, tmp_path):
    flags = ["--path_to_data", scenes, "--path_to_backbone_checkpoint", models["segmenter"], "--eval_only"]
    flags += ["--mask_offset", 1]  # the model's config does not say so
    flags += ["--evaluate", mode, "--resize", LONG, SHORT, "--num_workers", 0, "--mixed_precision", "no"]
    run("finetune_segmentation.py", *flags, cwd=tmp_path)
    metrics = json.loads((tmp_path / "work_dir" / "finetune_segmentation" / "metrics.json").read_text())
    lines, folder, _ = predictions("segmenter", "--evaluate", mode, images=(scenes / "images" / "validation",))
    scores = scores_by_hand(lines, folder, scenes / "annotations" / "validation", len(SCENES))
    # Evaluation uses larger batches, so rounding may change the class of a pixel between two classes.
    assert scores == pytest.approx((metrics["mean_iou"], metrics["overall_accuracy"]), abs=5e-3)


def test_pictures_of_a_segmentation(predictions):
    lines, folder, _ = predictions("segmenter")
    for line in lines:
        stem = Path(line["image"]).stem
        assert (line["labels"], line["overlay"]) == (f"labels/{stem}.png", f"overlays/{stem}.png")
        data = (folder / line["labels"]).read_bytes()
        assert decode_labels(data, len(SCENES), LIKE_ADE20K, name="").max() <= len(SCENES)  # read as an annotation
        with Image.open(folder / line["labels"]) as picture:
            colours = np.array(picture.getpalette()).reshape(-1, 3)
            assert picture.mode == "P" and not colours[0].any()
            assert np.array_equal(colours[1 : len(SCENES) + 1], palette(len(SCENES)))
        assert Image.open(folder / line["overlay"]).width >= 160


def test_results_that_are_not_printed_are_counted(tmp_path, capsys):
    results = [(f"{i}.jpg", None if i == 1 else {"overlay": f"{i}.png"}, "cut" if i == 1 else None) for i in range(12)]
    for length, more in ((12, 2), (10, 0)):
        path = tmp_path / str(length)
        assert write_lines(path, iter(results[:length])) == length - 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "0.jpg: 0.png" and len(lines) == 9 + (more > 0)
        assert not more or lines[-1] == f"... and {more} more in {path}"


# Masked autoencoders


@pytest.fixture(scope="module")
def pretrained(image_folder, tmp_path_factory) -> Path:
    """Return a run of four steps on images of two classes."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = ["--path_to_data", image_folder, *TINY, "--max_steps", 4, "--warmup_steps", 0, "--mask_strategy", "block"]
    run("pretrain_mae.py", *flags, cwd=folder)
    return folder / "work_dir" / "pretrain_mae"


def test_reconstructions_have_the_scores_of_validation(pretrained, image_folder, predictions):
    expected = json.loads((pretrained / "metrics.json").read_text())
    lines, folder, _ = predictions(pretrained, "--mask_strategy", "block", images=(image_folder / "val",))
    assert len(lines) == 11
    names = [name for name in expected if name.endswith(("_psnr", "_ssim", "_mean"))]
    assert len(names) == 7
    for name in names:
        assert np.mean([line[name] for line in lines]) == pytest.approx(expected[name], abs=1e-4)
    assert all(line["uses_true_patch_statistics"] == expected["uses_true_patch_statistics"] for line in lines)
    assert {(folder / line["reconstruction"]).name for line in lines} == {*os.listdir(folder / "reconstructions")}


def masked_psnr(theirs, path, noise, mask):
    """Return the PSNR in dB of the removed patches of 8 x 8 pixels, by transformers."""
    images = normalized(covering(path, (32, 32), 1.0), COLOUR)
    patches = theirs.patchify(images)[0]
    with torch.no_grad():
        prediction = theirs(images, noise=torch.from_numpy(noise)[None]).logits[0]
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    prediction = prediction * (variance + 1e-6).sqrt() + mean
    pixels = [
        part.reshape(16, 64, 3) * torch.tensor(COLOUR["std"]) + torch.tensor(COLOUR["mean"])
        for part in (prediction, patches)
    ]
    error = (pixels[0].clamp(0, 1) - pixels[1]).square()[torch.from_numpy(mask)]
    return -10 * torch.log10(error.mean()).item()


@pytest.mark.parametrize(
    ("flags", "seed", "kept", "strategy"),
    [((), 0, 4, "random"), (("--seed", 9, "--mask_ratio", 0.5, "--mask_strategy", "block"), 9, 8, "block")],
)
def test_reconstructions_agree_with_transformers(flags, seed, kept, strategy, models, photos, predictions):
    theirs = ViTMAEForPreTraining.from_pretrained(
        models["autoencoder"] / "pretraining", mask_ratio=1 - kept / 16
    ).eval()
    lines, folder, _ = predictions("autoencoder", *flags)
    for i, (path, line) in enumerate(zip(photos, lines, strict=True)):
        noise = mask_noise(strategy, sample_generator(seed, 2**32 - 1, i), (4, 4), kept)
        mask = noise.argsort().argsort() >= kept
        assert line["masked_psnr"] == pytest.approx(masked_psnr(theirs, path, noise, mask), abs=2e-3)
        picture = np.asarray(Image.open(folder / line["reconstruction"])).astype(int)
        scale = 4  # 144 / 32, rounded
        masked = picture[48 : 48 + 32 * scale, 16 + 32 * scale : 16 + 64 * scale]
        grey = (masked.reshape(4, 8 * scale, 4, 8 * scale, 3) == 128).all(axis=(1, 3, 4)).ravel()
        assert np.array_equal(grey, mask)  # the removed patches


def test_autoencoders_of_grey_images_that_are_not_square(predictions):
    lines, folder, done = predictions("flat autoencoder")
    assert "2 of 8 patches seen" in done.stdout and "16 x 32 pixels, 1 channel\n" in done.stdout
    for line in lines:
        picture = np.asarray(Image.open(folder / line["reconstruction"]))
        assert (picture[..., :1] == picture).all() and line["uses_true_patch_statistics"] is False


# Features


def features_by_run(model, images, tmp_path, *flags, code=0):
    tmp_path.mkdir(exist_ok=True)
    run("predict.py", model, *images, "--features", "some/features.npy", *flags, cwd=tmp_path, code=code)
    assert sorted(os.listdir(tmp_path / "some")) == ["features.json", "features.npy"]
    assert os.listdir(tmp_path) == ["some"]  # and no predictions
    return np.load(tmp_path / "some" / "features.npy"), json.loads((tmp_path / "some" / "features.json").read_text())


@pytest.mark.parametrize("name", ["autoencoder", "encoder", "mean", "cls", "flat autoencoder"])
def test_features_agree_with_timm(name, models, photos, tmp_path):
    """Features are the mean of the patch tokens, or the input of a classifier's head."""
    theirs = timm.create_model(f"local-dir:{models[name]}", pretrained=True).eval()
    features, names = features_by_run(models[name], photos, tmp_path)
    assert features.dtype == np.float32 and features.shape == (len(photos), 32)
    assert names == [str(path) for path in photos]
    for path, row in zip(photos, features, strict=True):
        with torch.no_grad():
            tokens = theirs.forward_features(as_timm_sees(name, path))
            classified = name in ("mean", "cls")
            expected = theirs.forward_head(tokens, pre_logits=True) if classified else tokens[:, 1:].mean(dim=1)
        assert row == pytest.approx(expected[0].numpy(), abs=1e-5)
    assert np.ptp(features, axis=0).min() > 1e-3  # the images differ


# Features of patches, attention, colours


def test_features_of_patches_and_of_the_class_token_agree_with_timm(models, photos, damaged, tmp_path):
    theirs = timm.create_model(f"local-dir:{models['encoder']}", pretrained=True).eval()
    images = [photos[0], damaged[0], *photos[1:]]
    flags = ("--patch_features", "patches.npy", "--batch_size", 3)
    done = run("predict.py", models["autoencoder"], *images, *flags, cwd=tmp_path, code=1)
    run("predict.py", models["autoencoder"], *photos, "--features", "cls.npy", "--pooling", "cls", cwd=tmp_path)
    assert "task       features of 16 patches, of width 32\n" in done.stdout
    patches, cls = np.load(tmp_path / "patches.npy"), np.load(tmp_path / "cls.npy")
    assert patches.dtype == np.float32 and patches.shape == (len(photos), 16, 32) and cls.shape == (len(photos), 32)
    assert json.loads((tmp_path / "patches.json").read_text()) == [str(path) for path in photos]
    assert {*os.listdir(tmp_path)} >= {"cls.json", "cls.npy"} and not [*tmp_path.glob(".*"), *tmp_path.glob("pred*")]
    for path, tokens, token in zip(photos, patches, cls, strict=True):
        with torch.no_grad():
            expected = theirs.forward_features(as_timm_sees("encoder", path))[0].numpy()
        np.testing.assert_allclose(tokens, expected[1:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(token, expected[0], rtol=0, atol=1e-5)


def test_pooling_may_differ_from_that_of_the_head(models, photos, tmp_path):
    theirs = timm.create_model(f"local-dir:{models['cls']}", pretrained=True).eval()
    features, _ = features_by_run(models["cls"], photos, tmp_path / "a", "--pooling", "mean")
    with torch.no_grad():
        expected = [theirs.forward_features(as_timm_sees("cls", path))[0, 1:].mean(dim=0).numpy() for path in photos]
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    for name in ("mean", "cls"):
        default, _ = features_by_run(models[name], photos, tmp_path / f"{name} 1")
        same, _ = features_by_run(models[name], photos, tmp_path / f"{name} 2", "--pooling", name)
        assert np.array_equal(default, same)


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list[np.ndarray]]:
    """Return the arrays, by picture, that predict.main draws: attention maps or colours."""
    arrays = {}
    for name in ("attention_grid", "colour_picture"):
        draw = getattr(training.predictions, name)

        def record(path, *own, draw=draw):
            arrays[f"{path.parent.name}/{path.name}"] = own[-1]
            draw(path, *own)

        monkeypatch.setattr(training.predictions, name, record)
    return arrays


@pytest.mark.parametrize("name", ["autoencoder", "mean", "segmenter"])
def test_attention_agrees_with_the_weights_by_hand(name, models, photos, drawn, tmp_path):
    predict.main([str(models[name]), *map(str, photos[:5]), "--attention", "--output", str(tmp_path / "a")])
    lines, encoder = lines_of(tmp_path / "a"), open_trained(models[name]).encoder
    assert lines == [{"image": str(path), "attention": f"attention/{path.stem}.png"} for path in photos[:5]]
    assert sorted(os.listdir(tmp_path / "a" / "attention")) == [f"{path.stem}.png" for path in photos[:5]]
    seen = []
    encoder.blocks[-1].attn.qkv.register_forward_hook(lambda *call: seen.append(call[2]))
    for path, line in zip(photos, lines, strict=False):
        with torch.no_grad():
            encoder(as_timm_sees(name, path))
        q, k, _ = seen[-1].reshape(17, 3, 2, 16).permute(1, 2, 0, 3)
        expected = (q @ k.mT / 4).softmax(dim=-1)[:, 0, 1:].reshape(2, 4, 4)
        np.testing.assert_allclose(drawn[line["attention"]], expected, rtol=0, atol=1e-5)
        assert Image.open(tmp_path / "a" / line["attention"]).height >= 128


def test_attention_of_a_probe_is_that_of_its_predictions(photos, drawn, tmp_path, capsys):
    model = Classifier(VisionTransformer(**SIZE), len(CLASSES), pooling="attentive", num_queries=4, probe=True)
    export_classifier(randomized(model), tmp_path / "model", classes=CLASSES, crop_ratio=1.0, **COLOUR)
    words = [str(tmp_path / "model"), *map(str, photos), "--output"]
    predict.main([*words, str(tmp_path / "classes")])
    maps = dict(drawn)
    drawn.clear()
    predict.main([*words, str(tmp_path / "attention"), "--attention"])
    assert "attention of the queries of the probe to 16 patches" in capsys.readouterr().out
    assert maps.keys() == drawn.keys() and maps["attention/0.png"].shape == (4, 4, 4)
    for name, values in maps.items():
        assert np.array_equal(values, drawn[name])
        pictures = [tmp_path / folder / name for folder in ("classes", "attention")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert all([*line] == ["image", "attention"] for line in lines_of(tmp_path / "attention"))


def test_all_images_share_the_basis_of_colours(models, photos, damaged, drawn, tmp_path, capsys):
    words = [str(models["encoder"]), str(photos[0]), str(damaged[1]), *map(str, photos[1:])]
    with pytest.raises(RunError, match="1 of 9 images could not be read"):
        predict.main([*words, "--patch_features", str(tmp_path / "x.npy")])
    with pytest.raises(RunError, match="1 of 9 images could not be read"):
        predict.main([*words, "--pca", "--output", str(tmp_path / "all"), "--batch_size", "2"])
    rows = np.load(tmp_path / "x.npy").reshape(-1, 32).astype(np.float64)
    _, _, components = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    components = components[:3] * np.sign([[row[np.abs(row).argmax()]] for row in components[:3]])
    values = (rows - rows.mean(axis=0)) @ components.T
    low, high = (np.sort(values, axis=0)[round(share * (len(rows) - 1))] for share in (0.02, 0.98))
    expected = np.clip((values - low) / (high - low), 0, 1).reshape(-1, 4, 4, 3)
    lines = lines_of(tmp_path / "all")
    assert [Path(line["image"]) for line in lines] == [photos[0], damaged[1], *photos[1:]]
    assert "error" in lines[1] and "colours" not in lines[1]
    for line, colours in zip([lines[0], *lines[2:]], expected, strict=True):
        np.testing.assert_allclose(drawn[line["colours"]], colours, rtol=0, atol=1e-3)
        picture = np.asarray(Image.open(tmp_path / "all" / line["colours"]))
        tile = picture[8 : 8 + 128, 16 + 128 : 16 + 256].reshape(4, 32, 4, 32, 3)
        assert (abs(tile.astype(int) - np.rint(255 * colours)[:, None, :, None]) <= 1).all()
    assert "which all images share, from 46.1 kB of features and pixels" in capsys.readouterr().out
    first = drawn["colours/0.png"]
    predict.main([*words[:2], "--pca", "--output", str(tmp_path / "one")])
    assert abs(drawn["colours/0.png"] - first).max() > 0.05


def test_colours_that_do_not_fit_into_memory(models, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2000))
    with pytest.raises(RunError, match=r"--pca of 1 image needs 5\.12 kB of memory"):
        predict.main([str(models["encoder"]), str(photos[0]), "--pca", "--output", str(tmp_path / "x")])


# Masks


@pytest.mark.parametrize(("flags", "num_kept"), [((), 4), (("--mask_ratio", 0.3, "--seed", 5), 11)])
def test_the_whole_image_is_filled_from_several_masks(flags, num_kept, models, photos, predictions):
    lines, folder, done = predictions("autoencoder", "--fill", *flags)
    masks = [[*range(num_kept)], [*range(16 - num_kept, 16)]] if num_kept == 4 else None  # ranks of kept patches
    masks = masks or [[(rank + shift) % 16 for rank in range(11)] for shift in (0, 5, 10, 15)]
    assert f"{num_kept} of 16 patches seen, the others predicted, under {len(masks)} masks that" in done.stdout
    model = open_trained(models["autoencoder"]).model
    model.mask_ratio = 1 - num_kept / 16
    for i, (path, line) in enumerate(zip(photos, lines, strict=True)):
        images = normalized(covering(path, (32, 32), 1.0), COLOUR)
        rng = sample_generator(5 if flags else 0, 2**32 - 1, i)
        ranks = mask_noise("random", rng, (4, 4), num_kept).argsort().argsort()
        outputs = []
        for kept in masks:
            noise = torch.from_numpy(1.0 - np.isin(ranks, kept))[None]
            with torch.no_grad():
                prediction = model.reconstruct(images, model(images, noise).prediction)
            outputs.append(torch.where(model.pixel_mask(noise).bool(), prediction, torch.nan))
        mean, std = (torch.tensor(COLOUR[name]).view(3, 1, 1) for name in ("mean", "std"))
        filled = torch.cat(outputs).nanmean(dim=0) * std + mean
        error = (filled.clamp(0, 1) - (images[0] * std + mean)).square().mean()
        assert line["filled_psnr"] == pytest.approx(-10 * torch.log10(error).item(), abs=2e-3)
        assert [*line] == ["image", "reconstruction", "filled_psnr", "filled_ssim", "uses_true_patch_statistics"]
        assert f"{path}: whole image {line['filled_psnr']:.2f} dB" in done.stdout
        pixels = np.asarray(Image.open(folder / line["reconstruction"])).astype(int)[48 : 48 + 128, 16 + 128 :][:, :128]
        expected = (255 * filled.clamp(0, 1)).round().permute(1, 2, 0).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert np.abs(pixels - expected.numpy()).max() <= 1


def write_mask(path: Path, size: tuple[int, int], *boxes, mode="L") -> Path:
    """Write a black picture of `size` (W, H) with white boxes (left, top, right, bottom)."""
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    if mode.endswith("A"):  # a white layer that is transparent elsewhere, as graphics programs save it
        Image.merge(mode, [Image.new("L", size, 255)] * (len(mode) - 1) + [mask]).save(path)
    else:
        mask.convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "P", "LA", "RGBA"])
def test_patches_are_removed_by_a_picture(mode, models, photos, predictions, tmp_path):
    """The mask covers three patches, half of a fourth, which is removed too, and less than half of a fifth."""
    mask = write_mask(tmp_path / "mask.png", (32, 32), (0, 0, 20, 8), (16, 8, 19, 16), (24, 24, 32, 32), mode=mode)
    lines, folder, done = predictions("autoencoder", "--mask", mask)
    removed = np.zeros(16, bool)
    removed[[0, 1, 2, 15]] = True
    assert "12 of 16 patches seen" in done.stdout
    theirs = ViTMAEForPreTraining.from_pretrained(models["autoencoder"] / "pretraining", mask_ratio=4 / 16).eval()
    for path, line in zip(photos, lines, strict=True):
        noise = removed.astype(np.float32)
        assert line["masked_psnr"] == pytest.approx(masked_psnr(theirs, path, noise, removed), abs=2e-3)
        grey = np.asarray(Image.open(folder / line["reconstruction"]))[48:176, 16 + 128 : 16 + 256] == 128
        assert np.array_equal(grey.reshape(4, 32, 4, 32, 3).all(axis=(1, 3, 4)).ravel(), removed)


def test_a_picture_of_the_images_size_is_cropped_as_it_is(photos, predictions, tmp_path):
    """Images of other sizes are errors. The crop of the image of 40 x 77 pixels is its centre, 40 x 40."""
    width, height = upright(photos[2]).size
    assert (width, height) == (40, 77)
    top, side = 77 / 2 - 20, 10  # top of the crop, side of a patch
    box = tuple(round(value) for value in (10, top + 20, 30, top + 30))
    mask = write_mask(tmp_path / "mask.png", (width, height), box, (0, 0, 40, 10))  # the second is outside the crop
    lines, folder, done = predictions("autoencoder", "--mask", mask, images=tuple(photos[:3]), code=1)
    grey = np.asarray(Image.open(folder / lines[2]["reconstruction"]))[48:176, 16 + 128 : 16 + 256] == 128
    removed = grey.reshape(4, 32, 4, 32, 3).all(axis=(1, 3, 4)).ravel()
    assert np.flatnonzero(removed).tolist() == [9, 10] and side == 10 and "14 of 16 patches seen" in done.stdout
    expected = (
        "is 40 x 40 pixels (height x width), but the mask 77 x 40; expected a mask of that size, or of the crop's"
    )
    assert lines[0]["error"] == f"{expected} 32 x 32" and "error" in lines[1]
    assert f"warning: {photos[0]}: {expected} 32 x 32\n" in done.stderr


# Batches, orientations, damaged images, names


def test_batches_and_workers_change_nothing(models, photos, predictions, tmp_path):
    flags = ("--batch_size", 3, "--num_workers", 2)
    for name in ("mean", "autoencoder", "segmenter"):
        (one, first, _), (other, second, _) = predictions(name), predictions(name, *flags)
        for line, again in zip(one, other, strict=True):
            if name == "mean":
                line, again = probabilities_of(line), probabilities_of(again)
            assert line == (again if name == "segmenter" else pytest.approx(again, abs=1e-4))
        for path in (path for kind in ("labels", "overlays") for path in (first / kind).glob("*.png")):
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    one, _ = features_by_run(models["mean"], photos, tmp_path / "one")
    other, _ = features_by_run(models["mean"], photos, tmp_path / "other", *flags)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.fixture
def damaged(tmp_path) -> list[Path]:
    """Return a text file, a truncated picture and an empty file."""
    picture = write_images(tmp_path / "whole", 1) / "class_0" / "0000.jpg"
    paths = [tmp_path / name for name in ("text.jpg", "cut.jpg", "empty.png")]
    for path, data in zip(paths, [b"no image at all", picture.read_bytes()[:300], b""], strict=True):
        path.write_bytes(data)
    return paths


@pytest.mark.parametrize("name", ["mean", "segmenter"])
def test_damaged_images_are_named_and_skipped(name, photos, damaged, predictions):
    text, cut, empty = damaged
    images = (text, *photos[:3], cut, *photos[3:], empty)
    lines, folder, done = predictions(name, "--batch_size", 2, "--num_workers", 1, images=images, code=1)
    assert [line["image"] for line in lines] == [str(path) for path in images]
    unread = {Path(line["image"]): line["error"] for line in lines if "error" in line}
    assert [*unread] == damaged and "empty" in unread[empty] and "not an image" in unread[text]
    for line, expected in zip([line for line in lines if "error" not in line], predictions(name)[0], strict=True):
        if name == "mean":
            line, expected = probabilities_of(line), pytest.approx(probabilities_of(expected), abs=1e-5)
        assert line == expected
    assert all(f"warning: {path}: {reason}\n" in done.stderr for path, reason in unread.items())
    assert done.stderr.endswith(f"\nerror: 3 of {len(images)} images could not be read; see the warnings above\n")
    assert name == "mean" or len(os.listdir(folder / "labels")) == len(photos)


def test_features_have_a_row_per_readable_image(models, photos, damaged, tmp_path):
    images = [photos[2], damaged[0], photos[0]]
    features, names = features_by_run(models["encoder"], images, tmp_path / "a", code=1)
    assert names == [str(photos[2]), str(photos[0])] and features.shape == (2, 32)
    whole, _ = features_by_run(models["encoder"], [photos[2], photos[0]], tmp_path / "b")
    np.testing.assert_allclose(features, whole, atol=1e-6)
    done = run("predict.py", models["mean"], *damaged, cwd=tmp_path, code=1)
    assert "3 of 3 images could not be read" in done.stderr
    assert all("error" in line for line in lines_of(tmp_path / "predictions"))
    features, names = features_by_run(models["encoder"], damaged, tmp_path / "c", code=1)
    assert features.shape == (0, 32) and names == []


def test_files_folders_and_patterns(models, photos, tmp_path):
    """Files may share a name, and names may be invalid Unicode."""
    for name in ("a/x.jpg", "b/x.jpg", "b/deep/X.png", "b/deep/notes.txt", "c/[1].jpg", "c/scan"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[3], tmp_path / name)
    strange = os.fsdecode(b"caf\xe9 \xff.jpg")
    shutil.copy(photos[3], tmp_path / strange)
    words = ["c/[1].jpg", "a", "--evaluate", "whole", "b/**/*.[jp][pn]g", "c/scan", strange, "a/x.jpg"]
    run("predict.py", models["segmenter"], *words, cwd=tmp_path)
    lines = lines_of(tmp_path / "predictions")
    names = ["c/[1].jpg", "a/x.jpg", "b/deep/X.png", "b/x.jpg", "c/scan", strange, "a/x.jpg"]
    assert [line["image"] for line in lines] == names
    pictures = [f"{stem}.png" for stem in ("[1]", "x", "X_2", "x_3", "scan", strange.removesuffix(".jpg"), "x_6")]
    assert [line["labels"] for line in lines] == [f"labels/{name}" for name in pictures]
    assert sorted(os.listdir(tmp_path / "predictions" / "labels")) == sorted(pictures)


def test_picture_names_are_unique():
    paths = ["a/x.jpg", "x_2.jpg", "b/x.png", "X.jpg", "c/x", "y.jpg", "n" * 250 + ".jpg", "n" * 251 + ".jpg"]
    names = picture_names(paths)
    assert names[:6] == ["x.png", "x_2.png", "x_2_2.png", "X_3.png", "x_4.png", "y.png"]
    assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) < 255
    assert len({*picture_names([f"{i}/image.jpg" for i in range(20_000)])}) == 20_000


@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_files_of_features_are_those_of_numpy(shape, tmp_path):
    """The file equals NumPy's, and a failed write leaves no file."""
    rows = np.random.default_rng(0).normal(size=(12, *shape)).astype(np.float32)
    results = [(f"{i}.jpg", row, None) for i, row in enumerate(rows)]
    results.insert(5, ("broken.jpg", None, "empty file"))
    path = tmp_path / "x.npy"
    assert write_features(path, iter(results), shape) == 12
    np.save(tmp_path / "theirs.npy", rows)
    assert path.read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert json.loads((tmp_path / "x.json").read_text()) == [f"{i}.jpg" for i in range(12)]
    rows[7, 0] = np.nan
    with pytest.raises(RunError, match=r"7\.jpg: the outputs are not finite"):
        write_features(tmp_path / "y.npy", results, shape)
    assert sorted(os.listdir(tmp_path)) == ["theirs.npy", "x.json", "x.npy"]


# Errors


def errors_of(*words, cwd, **variables) -> list[str]:
    process = run("predict.py", *words, cwd=cwd, code=2, **variables)
    lines = process.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines) and "Traceback" not in process.stdout + process.stderr
    return lines


def test_all_errors_at_once(models, photos, tmp_path):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "predictions.jsonl").write_text("{}\n")
    images = [photos[0], "nowhere.jpg", "no/*.jpg", "hollow"]
    errors = errors_of(models["mean"], *images, "--output", "old", "--mask_ratio", 0.5, "--bogus", cwd=tmp_path)
    for words in (
        "--bogus is not a flag",
        "'nowhere.jpg'",
        "no/*.jpg matches no image",
        "hollow holds no image",
        "--mask_ratio has no effect on the predictions of a classifier; leave it out",
        "--output old would overwrite old/predictions.jsonl; give another name",
    ):
        assert any(words in error for error in errors), (words, errors)
    assert len(errors) == 6 and sorted(os.listdir(tmp_path)) == ["hollow", "old"]


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        (
            "segmenter",
            ["--top_k", 3],
            ["--top_k has no effect on the predictions of a segmentation model"],
        ),
        ("segmenter", ["--features", "x.npy"], ["--features: {} is a segmentation model, whose encoder has no norm"]),
        (
            "autoencoder",
            ["--evaluate", "slide"],
            ["--evaluation_mode has no effect on the predictions of a masked"],
        ),
        ("autoencoder", ["--mask_ratio", 0.99], ["--mask_ratio 0.99 keeps 0 of 16 patches; expected a ratio"]),
        ("encoder", [], ["{} is an encoder without a head, which only computes features; give --features FILE.npy"]),
        ("encoder", ["--features", "x.txt"], ["x.txt does not end in"]),
        ("encoder", ["--features", "x.npy", "--output", "out"], ["--output out has no effect with --features, which"]),
        ("encoder", ["--features", "x.npy", "--seed", 1], ["--seed has no effect on features; leave it out"]),
        ("encoder", ["--pca", "--fill", "--no-attention"], ["--fill has no effect on colours of features; leave it"]),
        (
            "encoder",
            ["--pca", "--patch_features", "x.npz"],
            ["--patch_features and --pca exclude", "x.npz does not end"],
        ),
        ("encoder", ["--attention", "--pooling", "cls"], ["--pooling has no effect on attention; leave it out"]),
        ("mean", ["--features", "x.npy", "--pooling", "cls"], ["--pooling cls: {} is a classifier of the mean patch"]),
        (
            "mean",
            ["--pooling", "cls", "--fill"],
            ["--pooling cls: ", "--fill has no effect", "--pooling has no effect"],
        ),
        ("segmenter", ["--pca"], ["--pca: {} is a segmentation model, whose encoder has no norm"]),
        ("autoencoder", ["--fill", "--mask_ratio", 0], ["--mask_ratio 0 keeps 16 of 16 patches; expected a ratio"]),
        (
            "autoencoder",
            ["--mask", "nothing.png", "--seed", 0, "--fill"],
            [
                "--mask nothing.png: No such file or directory; expected a picture whose white is removed",
                "--seed has no effect with --mask, which says what is removed; leave one out",
                "--fill has no effect with --mask",
            ],
        ),
        (
            "mean",
            ["--mask", ROOT / "README.md"],
            ["README.md: not an image", "--mask has no effect on the predictions"],
        ),
        (
            "autoencoder",
            ["--mask", ROOT / "docs/demo.png", "--max_pixels", 9],
            ["pixels, more than the 9 allowed; raise --max_pixels; expected a picture whose white is removed"],
        ),
        ("nothing", [], ["no such file or folder"]),
    ],
)
def test_flags_that_do_not_fit_the_model(name, flags, expected, models, photos, tmp_path):
    model = models.get(name, name)
    errors = errors_of(model, photos[0], *flags, cwd=tmp_path)
    assert len(errors) == len(expected)
    assert all(words.format(model) in error for words, error in zip(expected, errors, strict=True))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("box", "count"), [((0, 0, 0, 0), 0), ((0, 0, 64, 64), 16), ((0, 0, 7, 7), 0)])
def test_masks_that_remove_nothing_or_everything(box, count, models, photos, tmp_path):
    mask = write_mask(tmp_path / "mask.png", (64, 64), box)
    (error,) = errors_of(models["autoencoder"], photos[0], "--mask", mask, cwd=tmp_path)
    expected = f"--mask {mask} removes {count} of 16 patches; expected white on half of a patch or more, and not of all"
    assert error == f"error: {expected}" and os.listdir(tmp_path) == ["mask.png"]


def test_nothing_is_overwritten(models, photos, tmp_path):
    words = [models["mean"], photos[0]]
    for name in ("x.npy", "y.json", "file", ".z.npy"):
        (tmp_path / name).touch()
    for name in ("link.npy", "linked/predictions.jsonl"):  # as to a disk that is not mounted
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("nowhere")
    for flags, expected in (
        (["--features", "x.npy"], "would overwrite x.npy; give another name"),
        (["--features", "y.npy"], "would overwrite y.json; give another name"),
        (["--features", "z.npy"], "would overwrite .z.npy; give another name"),
        (["--features", "link.npy"], "would overwrite link.npy; give another name"),
        (["--patch_features", "y.npy"], "--patch_features y.npy would overwrite y.json; give another name"),
        (["--output", "linked"], "would overwrite linked/predictions.jsonl; give another name"),
        (["--output", "file"], "the folder file cannot be written (File exists)"),
        (["--output", "file/deeper"], "the folder file/deeper cannot be written (Not a directory)"),
    ):
        (error,) = errors_of(*words, *flags, cwd=tmp_path)
        assert expected in error
    for name in ("labels", "reconstructions"):  # they may hold the user's annotations
        (tmp_path / "predictions" / name).mkdir(parents=True)
    (error,) = errors_of(*words, cwd=tmp_path)
    assert "--output predictions would overwrite predictions/labels, predictions/reconstructions; give" in error
    assert sorted(os.listdir(tmp_path)) == [".z.npy", "file", "link.npy", "linked", "predictions", "x.npy", "y.json"]


def test_several_processes_are_an_error(models, photos, tmp_path):
    words = [models["mean"], photos[0]]
    (error,) = errors_of(*words, cwd=tmp_path, WORLD_SIZE="2", RANK="0")
    assert error == "error: WORLD_SIZE is 2; expected one process; start it with python predict.py"
    assert not errors_of(*words, cwd=tmp_path, WORLD_SIZE="2", RANK="1") and not os.listdir(tmp_path)


def test_flags_may_stand_between_images():
    args, errors = predict.parse_args(["model", "--top_k", "3", "a.jpg", "b.jpg", "--batch_size", "2", "c.jpg"])
    assert not errors and (args.model, args.images) == ("model", ["a.jpg", "b.jpg", "c.jpg"])
    assert (args.top_k, args.batch_size) == (3, 2)
    for words in ([], ["model"]):
        with pytest.raises(SystemExit):
            predict.parse_args(words)


def test_outputs_that_are_not_finite(photos, tmp_path):
    model = Classifier(VisionTransformer(**SIZE), len(CLASSES))
    model.head.weight.data.fill_(3e38)
    model.fc_norm.bias.data.fill_(3e38)
    export_classifier(model, tmp_path / "model", classes=CLASSES, crop_ratio=1.0, **COLOUR)
    model.encoder.blocks[-1].norm1.bias.data.fill_(1e30)
    export_classifier(model, tmp_path / "model", classes=CLASSES, crop_ratio=1.0, **COLOUR)
    outputs = (["--output", "a"], ["--attention", "--output", "b"], ["--pca", "--output", "c"])
    for flags in (*outputs, ["--patch_features", "x.npy"]):
        done = run("predict.py", "model", photos[0], *flags, cwd=tmp_path, code=1)
        assert done.stderr.endswith("not finite: training diverged or the weights are damaged; give other weights\n")
    model.encoder.cls_token.data[0, 0, 0] = torch.nan
    export_classifier(model, tmp_path / "model", classes=CLASSES, crop_ratio=1.0, **COLOUR)
    (error,) = errors_of(tmp_path / "model", photos[0], "--output", "other", cwd=tmp_path)
    assert error.endswith("weights that are not finite; give an earlier checkpoint, before they diverged")
