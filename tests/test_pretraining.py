"""Tests of the flags of sizes, masks, decoders and validity; test_scripts.py and test_schedule_runs.py test runs."""

from types import SimpleNamespace

import pytest

import pretrain_mae
from training.launch import InputError
from training.plan import Stage
from training.pretraining import describe_stages, plan_stages, resolve_validity, staged_batches

DATA = ["--path_to_data", "builtin:shapes"]


def schedule(*words):
    return ["--img_size_schedule", *words]


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
        (["--predict_ratio", "0"], "--predict_ratio 0 predicts none of 147 masked patches; expected a ratio that"),
        (["--decoder_inputs", "weighted"], "--decoder_inputs weighted needs --decoder cross"),
        (
            ["--mask_block", "7", *schedule("112:0.5", "160:0.8", "224:1")],
            "--img_size_schedule 160: --mask_block 7 does",
        ),
        (
            ["--mask_ratio", "0.8", *schedule("32:0.5", "224:1")],
            "--img_size_schedule 32: --mask_ratio 0.8 keeps 0 of 4",
        ),
        (
            ["--mask_ratio", "0.1", *schedule("16:0.5", "224:1")],
            "--img_size_schedule 16: --mask_ratio 0.1 keeps 0 of 1",
        ),
        (
            ["--predict_ratio", "0.1", *schedule("32:0.5", "224:1")],
            "--img_size_schedule 32: --predict_ratio 0.1 predic",
        ),
    ],
)
def test_impossible_masks_and_decoders(flags, expected):
    (error,) = pretrain_mae.parse_args([*DATA, *flags])[1]
    assert error.startswith(expected) and "\n" not in error


@pytest.mark.parametrize(
    "words, expected",
    [
        ("160:0.5 96:0.8 224:1", "does not rise; expected rising sizes and shares, such as 96:0.5 160:0.8 224:1"),
        ("96:0.5 96:0.8 224:1", "does not rise;"),
        ("96:0.8 160:0.5 224:1", "does not rise;"),
        ("96:0.5 160:0.5 224:1", "does not rise;"),
        ("96:0.5 224:0.8", "ends before the run; expected a share of 1 for the last size"),
        (
            "96:0.5 224:1 --img_size 160",
            "--img_size 160 160 is not the last size of --img_size_schedule 96:0.5 224:1; ",
        ),
        ("96:0.5 224:1 --img_size 224 448", "--img_size 224 448 is not the last size"),
        ("96:0.5 225:1", "--img_size_schedule 225 is not divisible by --patch_size 16; take multiples of 16"),
        ("100:0.5 224:1", "--img_size_schedule 100 is not divisible by --patch_size 16; take multiples of 16"),
        ("4:0.5 224:1 --patch_size 4 --mask_block 3", "--img_size_schedule 4 is too small; expected at least 6 pixels"),
    ],
)
def test_impossible_schedules(words, expected):
    (error,) = pretrain_mae.parse_args([*DATA, *schedule(*words.split())])[1]
    assert expected in error and "\n" not in error


@pytest.mark.parametrize("word", ["96", "96:", ":0.5", "96:1.5", "96:-0.1", "96x96:0.5", "96:0.5:1", "0:0.5", "96:nan"])
def test_a_stage_is_a_size_and_a_share(word, capsys):
    with pytest.raises(SystemExit):
        pretrain_mae.parse_args([*DATA, *schedule(word, "224:1")])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: --img_size_schedule: {word!r} is not valid; expected SIZE:SHARE, pixels and a share"
    )


def test_the_images_of_a_schedule_have_its_last_size():
    for words in (schedule("96:0.50", "160:1.0"), schedule("96:.5", "160:1", "--img_size", "160")):
        args, errors = pretrain_mae.parse_args([*DATA, *words])
        assert not errors and args.img_size == [160, 160] and args.img_size_schedule == ["96:0.5", "160:1"]


def test_steps_of_the_stages_by_hand():
    assert plan_stages(None, [224, 112], 7) == [Stage((224, 112), range(7))]
    stages = plan_stages(["96:0.5", "160:0.8", "224:1"], [224, 224], 15)
    assert stages == [Stage((96, 96), range(8)), Stage((160, 160), range(8, 12)), Stage((224, 224), range(12, 15))]
    with pytest.raises(InputError, match=r"^--img_size_schedule 160:0\.6 has no step in a run of 4; give it a larger"):
        plan_stages(["96:0.5", "160:0.6", "224:1"], [224, 224], 4)


@pytest.mark.parametrize(
    "start, expected", [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 3, 4]), (2, [2, 3, 4]), (4, [4]), (5, [])]
)
def test_batches_continue_in_the_stage_of_their_step(start, expected):
    stages, loaded = plan_stages(["8:0.4", "16:0.8", "24:1"], [24, 24], 5), []

    def load(stage):
        loaded.append(stage.size[0])
        return ((stage.size[0], step) for step in stage.steps)

    batches = staged_batches(stages, load, start)
    assert len(loaded) == 1  # each stage starts its workers when those of the stage before have ended
    assert list(batches) == [([8, 8, 16, 16, 24][step], step) for step in expected]


def test_costs_of_the_stages_by_hand():
    """A run of 10 steps has two stages; its small images need a quarter of the operations."""
    model = SimpleNamespace(training_flops=lambda size: size[0] ** 2 * 1e6, count=lambda patches: (patches // 4, 0))
    model.encoder = SimpleNamespace(patch_size=16)
    stages = plan_stages(["112:0.8", "224:1"], [224, 224], 10)
    assert describe_stages(model, stages) == [
        "sizes      112 x 112 for 8 steps, 12 of 49 patches kept, 12.5 GFLOP per image and step: 50% of the cost",
        "           224 x 224 for 2 steps, 49 of 196 patches kept, 50.2 GFLOP per image and step: 50% of the cost",
        "           40% of the cost of 224 x 224 throughout",
    ]
    assert describe_stages(model, plan_stages(None, [224, 224], 10)) == []


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


@pytest.mark.parametrize("target", ["hog", "pca"])
def test_validity_needs_a_target_of_pixels(target):
    _, errors = pretrain_mae.parse_args(["--path_to_data", "x", "--validity", "channel", "--target", target])
    assert errors == [f"--validity channel needs --target normalized or pixels, not {target}; drop one"]
