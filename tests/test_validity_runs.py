"""Tests of pre-training runs on images with invalid pixels: results, resume, processes, compilation and bad data."""

import json
import shutil

import numpy as np
import pytest
from conftest import (
    TINY,
    assert_equal_runs,
    flags_of,
    losses_of,
    metrics_of,
    refusals,
    run,
    run_code,
    run_two,
    weights_of,
)
from PIL import Image

SCRIPT = "pretrain_mae.py"


def write_holes(folder, count, *, seed=0, fill=0):
    """Write images, every third with a hole of value `fill` (None: noise); return the valid pixels of each."""
    rng, noise, marks = np.random.default_rng(seed), np.random.default_rng(99), {}
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, valid = rng.integers(1, 256, (40, 40, 3), dtype=np.uint8), np.ones((40, 40), bool)
        if i % 3 == 0:
            top, left = rng.integers(15, size=2)
            valid[top : top + 25, left : left + 25] = False
        hole = noise.integers(0, 256, image.shape) if fill is None else fill
        Image.fromarray(np.where(valid[..., None], image, hole).astype(np.uint8)).save(path)
        marks[path] = valid
    return marks


@pytest.fixture(scope="session")
def holes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holes")
    write_holes(folder / "train", 24)
    write_holes(folder / "val", 9, seed=1)
    return folder


@pytest.fixture(scope="session")
def flags(holes):
    flags = [*TINY, "--path_to_data", holes, "--nodata", 0, "--max_steps", 6]
    return [*flags, "--validate_every", 1, "--save_checkpoint_steps", 4]


@pytest.fixture(scope="session")
def trained(flags, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("validity")
    return run(SCRIPT, *flags, cwd=cwd).stdout, cwd / "work_dir" / "pretrain_mae"


def test_results(trained):
    said, folder = trained
    assert "random, of patches with valid pixels" in said and "no data at 0" in said
    assert flags_of(folder)["validity"] == "nodata"
    metrics = metrics_of(folder)
    assert metrics["val_loss"] > 0 and metrics["masked_psnr"] > 0 and list((folder / "reconstructions").iterdir())


@pytest.mark.parametrize("target", ["normalized", "pixels"])
@pytest.mark.parametrize("kind", ["mask", "channel"])
def test_what_invalid_pixels_hold_changes_no_loss_and_no_weight(kind, target, tmp_path):
    for name, fill in (("zeros", 0), ("noise", None)):
        rows = []
        for image, valid in write_holes(tmp_path / name, 24, fill=fill).items():
            mask = valid.astype(np.uint8) * 255
            if kind == "channel":
                Image.fromarray(np.dstack([Image.open(image), mask])).save(image)
            Image.fromarray(mask).save(image.with_suffix(".mask.png"))
            rows.append({"path": str(image), "mask": str(image.with_suffix(".mask.png"))})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["--path_to_data", tmp_path / f"{name}.jsonl", "--validity", kind, "--target", target]
        run(SCRIPT, *TINY, *words, "--max_steps", 3, "--experiment_name", name, cwd=tmp_path)
    one, two = (tmp_path / "work_dir" / name for name in ("zeros", "noise"))
    assert losses_of(one) == losses_of(two)
    assert all(value.equal(weights_of(two, 3)[name]) for name, value in weights_of(one, 3).items())
    assert metrics_of(one)["masked_psnr"] == metrics_of(two)["masked_psnr"]


def test_resumed_runs_end_the_same(trained, flags, tmp_path):
    copy = shutil.copytree(trained[1], tmp_path / "work_dir" / "pretrain_mae")
    run(SCRIPT, *flags, "--resume_from_checkpoint", "step_00000004", cwd=tmp_path)
    assert_equal_runs(trained[1], copy, 6)
    said = run(SCRIPT, *flags, "--validity", "none", "--resume_from_checkpoint", "auto", cwd=tmp_path, code=2).stderr
    assert "--validity" in said


def test_two_processes_train_as_one(trained, flags, tmp_path):
    run_two(SCRIPT, *flags, "--per_gpu_batch_size", 4, cwd=tmp_path)
    other = tmp_path / "work_dir" / "pretrain_mae"
    assert losses_of(other) == pytest.approx(losses_of(trained[1]), rel=1e-5)
    ours, theirs = metrics_of(other), metrics_of(trained[1])
    for name in ("val_loss", "masked_psnr", "prediction_ssim"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_compilation_and_checkpointing_leave_the_losses_alone(trained, flags, tmp_path):
    code = """
import sys, pretrain_mae
from torch import nn
compile = nn.Module.compile
nn.Module.compile = lambda model, **options: compile(model, backend="aot_eager", **options)
pretrain_mae.main(sys.argv[1:])"""
    run_code(code, *flags, "--compile", "--gradient_checkpointing", cwd=tmp_path)
    assert losses_of(tmp_path / "work_dir" / "pretrain_mae") == pytest.approx(losses_of(trained[1]), rel=1e-5)


def test_without_validity_invalid_pixels_are_pixels(trained, flags, tmp_path):
    run(SCRIPT, *flags, "--validity", "none", cwd=tmp_path)
    other = tmp_path / "work_dir" / "pretrain_mae"
    assert flags_of(other)["validity"] is None and losses_of(other) != losses_of(trained[1])


def test_an_image_without_a_valid_pixel_is_damaged(holes, flags, tmp_path):
    shutil.copytree(holes, tmp_path / "data")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "data" / "train" / "a" / "dark.png")
    run(SCRIPT, *flags, "--path_to_data", tmp_path / "data", cwd=tmp_path)
    (line,) = (tmp_path / "work_dir" / "pretrain_mae" / "damaged.jsonl").read_text().splitlines()
    assert "dark.png" in line and "no pixel with data" in line


def test_bad_data(holes, tmp_path):
    rows = []
    for image, valid in write_holes(tmp_path / "images", 12).items():
        Image.fromarray(valid.astype(np.uint8)[:20]).save(image.with_suffix(".mask.png"))
        rows.append({"path": str(image), "mask": str(image.with_suffix(".mask.png"))})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [
        [*TINY, "--path_to_data", holes, "--validity", "mask"],
        [*TINY, "--path_to_data", tmp_path / "list.jsonl", "--validity", "mask"],
        [*TINY, "--path_to_data", holes, "--validity", "channel"],
        [*TINY, "--path_to_data", holes, "--validity", "nodata", "--target", "hog"],
    ]
    said = refusals(SCRIPT, *starts, cwd=tmp_path)
    for lines, expected in zip(
        said,
        [
            "--validity mask needs masks, and",
            "has a validity mask of 20 x 40; expected grey of the image's size, 40 x 40; correct the mask",
            "has 3 channels, expected 3 (--input_channels) and a mask (--validity channel); correct one of them",
            "--validity nodata needs --target normalized or pixels, not hog; drop one",
        ],
        strict=True,
    ):
        assert len([line for line in lines if expected in line]) == 1, lines


def test_floats_workers_views_and_features(tmp_path):
    """Metrics stay finite although most validation images have few or no valid pixels."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 6)):
        for i in range(count):
            image = rng.random((40, 40, 2), dtype=np.float32)
            # Of the last four validation images, one has two valid rows, the others none
            image[: 13 * (i % 3) + 38 * (part == "val" and i > 1)] = np.nan
            (tmp_path / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / part / "ab"[i % 2] / f"{i}.npy", image)
    words = ["--input_channels", 2, "--value_range", 0, 1, "--validity", "nodata", "--num_workers", 2, "--knn_every", 1]
    words += ["--repeated_augmentation", 2, "--predict_ratio", 0.5, "--max_steps", 4, "--validate_every", 1]
    run(SCRIPT, "--path_to_data", tmp_path, *TINY, *words, cwd=tmp_path)
    metrics = metrics_of(tmp_path / "work_dir" / "pretrain_mae")
    assert all(np.isfinite(metrics[name]) for name in ("val_loss", "masked_psnr", "rankme", "knn_top1"))
