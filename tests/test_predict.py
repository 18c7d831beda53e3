"""Test predict.py against transformers, timm, and the evaluation of the training scripts."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import SCENES, TINY, run, write_images
from PIL import Image, ImageOps
from random_modules import build_autoencoder
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import UperNetForSemanticSegmentation, ViTMAEForPreTraining, pipeline

import predict
from data.files import FileSource
from data.masking import mask_noise
from data.masks import LIKE_ADE20K, decode_labels
from data.sampling import sample_generator
from data.segmentation import palette
from modeling.classifier import Classifier
from modeling.export import export_autoencoder, export_classifier, export_encoder, export_segmenter
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer

SIZE = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
DECODER = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
COLOUR = dict(mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.25])
GREY = dict(mean=[0.45], std=[0.25])
CLASSES = ["a cat", "Käse", "dog", "owl", "eel", "fly", "gnu"]
# Width and height. transformers crops the fourth and the fifth one pixel further left or up.
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
    """Return a function that runs predict.py once for the same arguments: its lines, its output folder, its process."""
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
    image.draft(mode, image.size)  # of a JPEG in grey, the luma that it stores
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
    """Return the input (1, C, H, W) of a model of `models`, by torchvision's transforms."""
    size, mode, statistics = ((16, 32), "L", GREY) if name.startswith("flat") else ((32, 32), "RGB", COLOUR)
    return normalized(covering(path, size, 1.0 if name == "cls" else 0.875, mode), statistics)


def probabilities_of(line: dict) -> dict[str, float]:
    return {entry["class"]: entry["probability"] for entry in line["classes"]}


# Classifiers


def same_crop(path: Path, side: int, cover: int) -> bool:
    """Check that transformers crops as torchvision and timm do: it rounds half a pixel down, they to even."""
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
    flags += ["--mask_offset", 1]  # which this model does not state
    flags += ["--evaluate", mode, "--resize", LONG, SHORT, "--num_workers", 0, "--mixed_precision", "no"]
    run("finetune_segmentation.py", *flags, cwd=tmp_path)
    metrics = json.loads((tmp_path / "work_dir" / "finetune_segmentation" / "metrics.json").read_text())
    lines, folder, _ = predictions("segmenter", "--evaluate", mode, images=(scenes / "images" / "validation",))
    scores = scores_by_hand(lines, folder, scenes / "annotations" / "validation", len(SCENES))
    # Evaluation uses larger batches, which may round a pixel between two classes differently
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
    """The mean of the patch tokens, or the input of a classifier's head."""
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
    """Return a text, a truncated picture and an empty file."""
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
    """Also two files of the same name, and names that are not valid Unicode."""
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
    paths = [b"a/x.jpg", b"x_2.jpg", b"b/x.png", b"X.jpg", b"c/x", b"y.jpg", b"n" * 250 + b".jpg", b"n" * 251 + b".jpg"]
    names = predict.picture_names(FileSource(paths))
    assert names[:6] == ["x.png", "x_2.png", "x_2_2.png", "X_3.png", "x_4.png", "y.png"]
    assert len({name.lower() for name in names}) == len(names) and max(map(len, names)) < 255
    many = predict.picture_names(FileSource([f"{i}/image.jpg".encode() for i in range(20_000)]))
    assert len({*many}) == 20_000


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
            ["--evaluate has no effect on the predictions of a masked"],
        ),
        ("autoencoder", ["--mask_ratio", 0.99], ["--mask_ratio 0.99 keeps 0 of 16 patches; expected a ratio"]),
        ("encoder", [], ["{} is an encoder without a head, which computes features alone; give --features FILE.npy"]),
        ("encoder", ["--features", "x.txt"], ["x.txt does not end in"]),
        ("encoder", ["--features", "x.npy", "--output", "out"], ["--output: not allowed with argument --features"]),
        ("encoder", ["--features", "x.npy", "--seed", 1], ["--seed has no effect on features; leave it out"]),
        ("nothing", [], ["no such file or folder"]),
    ],
)
def test_flags_that_do_not_fit_the_model(name, flags, expected, models, photos, tmp_path):
    model = models.get(name, name)
    errors = errors_of(model, photos[0], *flags, cwd=tmp_path)
    assert len(errors) == len(expected)
    assert all(words.format(model) in error for words, error in zip(expected, errors, strict=True))
    assert not os.listdir(tmp_path)


def test_nothing_is_overwritten(models, photos, tmp_path):
    words = [models["mean"], photos[0]]
    for name in ("x.npy", "y.json", "file", ".z.npy"):
        (tmp_path / name).touch()
    for name in ("link.npy", "linked/predictions.jsonl"):  # to a disk that is not mounted
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to("nowhere")
    for flags, expected in (
        (["--features", "x.npy"], "would overwrite x.npy; give another name"),
        (["--features", "y.npy"], "would overwrite y.json; give another name"),
        (["--features", "z.npy"], "would overwrite .z.npy; give another name"),
        (["--features", "link.npy"], "would overwrite link.npy; give another name"),
        (["--output", "linked"], "would overwrite linked/predictions.jsonl; give another name"),
        (["--output", "file"], "the folder file cannot be written (File exists)"),
        (["--output", "file/deeper"], "the folder file/deeper cannot be written (Not a directory)"),
    ):
        (error,) = errors_of(*words, *flags, cwd=tmp_path)
        assert expected in error
    for name in ("labels", "reconstructions"):  # they may hold annotations of the user's
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
    done = run("predict.py", "model", photos[0], cwd=tmp_path, code=1)
    assert done.stderr.endswith("not finite: training diverged or the weights are damaged; give other weights\n")
    model.encoder.cls_token.data[0, 0, 0] = torch.nan
    export_classifier(model, tmp_path / "model", classes=CLASSES, crop_ratio=1.0, **COLOUR)
    (error,) = errors_of(tmp_path / "model", photos[0], "--output", "other", cwd=tmp_path)
    assert error.endswith("weights that are not finite; give an earlier checkpoint, before they diverged")
