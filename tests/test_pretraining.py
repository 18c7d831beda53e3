"""Flags of views, masks and decoders; whole runs with them are in test_scripts.py."""

import pytest

import pretrain_mae
from training.launch import InputError
from training.pretraining import resolve_validity

DATA = ["--path_to_data", "builtin:shapes"]


@pytest.mark.parametrize(
    "flags, depth",
    [([], 8), (["--decoder", "cross"], 12), (["--decoder", "cross", "--decoder_depth", "3"], 3)],
)
def test_each_decoder_has_its_depth(flags, depth):
    args, errors = pretrain_mae.parse_args([*DATA, *flags])
    assert not errors and args.decoder_depth == depth


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--mask_block", "4"], "--mask_block 4 does not divide the grid of 14 x 14 patches; take a divisor of both"),
        (
            ["--img_size", "224", "112", "--mask_block", "2"],
            "--mask_block 2 does not divide the grid of 14 x 7 patches",
        ),
        (["--mask_block", "2", "--mask_strategy", "block"], "--mask_block 2 does not go with --mask_strategy block"),
        (["--predict_ratio", "0"], "--predict_ratio 0 predicts none of 147 removed patches; expected a ratio that"),
        (["--decoder_inputs", "weighted"], "--decoder_inputs weighted needs --decoder cross"),
    ],
)
def test_impossible_masks_and_decoders(flags, expected):
    (error,) = pretrain_mae.parse_args([*DATA, *flags])[1]
    assert error.startswith(expected) and "\n" not in error


def test_the_smallest_share_predicts_one_patch():
    assert not pretrain_mae.parse_args([*DATA, "--predict_ratio", "0.004"])[1]


@pytest.mark.parametrize(
    ("given", "target", "nodata", "previous", "expected"),
    [
        (None, "normalized", None, {}, None),
        (None, "normalized", 0.0, {}, "nodata"),
        (None, "pixels", -9999.0, {}, "nodata"),
        (None, "hog", -9999.0, {}, None),
        ("none", "pixels", 0.0, {}, None),
        ("mask", "pixels", None, {}, "mask"),
        (None, "pixels", 0.0, {"nodata": 0.0}, None),  # a run of an earlier version is resumed
        (None, "pixels", 0.0, {"validity": "channel"}, "channel"),
    ],
)
def test_what_marks_invalid_pixels(given, target, nodata, previous, expected):
    assert resolve_validity(given, target, nodata, previous) == expected


@pytest.mark.parametrize("target", ["hog", "pca", "teacher"])
def test_validity_needs_a_target_of_pixels(target):
    with pytest.raises(InputError, match=f"--validity channel needs --target normalized or pixels, not {target}"):
        resolve_validity("channel", target, None, {})
