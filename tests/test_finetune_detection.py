"""Tests of whole runs of finetune_detection.py, started as users start them, and of its error messages."""

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    assert_equal_runs,
    dry_run,
    flags_of,
    log_of,
    losses_of,
    metrics_of,
    refusals,
    run,
    run_each,
    run_two,
    start,
    wait_for,
    weights_of,
)
from PIL import Image
from random_modules import new_encoder

from data import shapes
from modeling.export import export_encoder, export_segmenter
from modeling.files import read_state_dict
from modeling.upernet import Segmenter
from training.plan import plan_length

SCRIPT = "finetune_detection.py"
WEIGHTS = "--path_to_backbone_checkpoint"
STATISTICS = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2)
# Scale jitter, two micro-batches a step, and windows of 3 x 3 patches in a grid of 8 x 8
SMALL = ["--img_size", 64, "--window_size", 3, "--head_width", 8, "--num_regions", 16, "--scale_jitter", 0.5, 1.5]
SMALL += ["--global_batch_size", 4, "--micro_batch_size", 2, "--learning_rate", 3e-4, "--num_workers", 0]
SMALL += ["--mixed_precision", "no", "--log_every", 1, "--num_preview_images", 2]
ENCODER = ["--patch_size", 8, "--encoder_embed_dim", 32, "--encoder_depth", 5, "--encoder_num_heads", 2]


def runs_of(mask):
    """Return the COCO RLE of a mask: the lengths of its runs in column order, beginning with zeros."""
    values = np.concatenate([[0], mask.T.ravel(), [2]])
    ends = np.flatnonzero(np.diff(values[1:])) + 1
    lengths = np.diff(np.concatenate([[0], ends])).tolist()
    return dict(counts=lengths if mask.T.flat[0] == 0 else [0, *lengths], size=list(mask.shape))


def write_split(root, split, numbers):
    """Write scenes in COCO's layout: category ids 10, 20, ..., some crowds, and images without objects."""
    content = dict(images=[], annotations=[])
    content["categories"] = [dict(id=10 * (i + 1), name=name) for i, name in enumerate(shapes.CLASSES)]
    (root / split).mkdir(parents=True)
    for number in numbers:
        image, _, labels = shapes.draw(number)
        height = 64 - 8 * (number % 3)
        image, labels = image[:height], labels[:height]
        Image.fromarray(image).save(root / split / f"{number:03d}.png")
        content["images"].append(dict(id=900 - number, file_name=f"{number:03d}.png", height=height, width=64))
        for label in np.unique(labels[labels > 0]).tolist() if number % 5 != 4 else []:
            mask = (labels == label).astype(np.uint8)
            (rows, columns), segmentation = np.nonzero(mask), runs_of(mask)
            x, y = int(columns.min()), int(rows.min())
            box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
            record = dict(image_id=900 - number, category_id=10 * label, bbox=box, segmentation=segmentation)
            record |= dict(area=int(mask.sum()), iscrowd=int(number % 5 == 3), id=len(content["annotations"]) + 1)
            content["annotations"].append(record)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """Return the folder of 10 training and 7 validation images with masks."""
    root = tmp_path_factory.mktemp("scene_folder")
    write_split(root, "train", range(10))
    write_split(root, "val", range(20, 27))
    return root


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """Return the folder of an encoder, as pre-training exports it."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    export_encoder(new_encoder(**SIZES), folder, **STATISTICS)
    return folder


@pytest.fixture(scope="session")
def flags(scene_folder, backbone):
    """Return flags for seven steps, two an epoch, so that the run ends inside its fourth epoch."""
    flags = ["--path_to_data", scene_folder, WEIGHTS, backbone, *SMALL, "--max_steps", 7, "--drop_path", 0.2]
    return [*flags, "--evaluate_every", 4, "--save_checkpoint_steps", 3]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, flags):
    """Return the folder of a run that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = run(SCRIPT, *flags, cwd=cwd)
    assert "32 x 5 encoder, windows of 3 x 3 in 1 blocks, mask_rcnn of width 8" in done.stdout
    assert "encoder.pos_embed 4x4 -> 8x8" in done.stdout and "times 0.1 at 8/9 and again at 26/27" in done.stdout
    return cwd / "work_dir" / "finetune_detection"


def test_what_a_run_leaves_behind(undisturbed):
    lines = log_of(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 8)) and all(line["grad_norm"] > 0 for line in training)
    rates = [line["learning_rate"] for line in training]
    assert rates[:6] == [3e-4] * 6 and rates[6] == pytest.approx(3e-5)  # it drops at 8/9 of the 7 steps
    assert [line["step"] for line in lines if "box_ap" in line] == [4, 7]
    metrics = metrics_of(undisturbed)
    assert metrics["best_box_ap"] == max(line["box_ap"] for line in lines if "box_ap" in line)
    assert list(metrics["per_class_box_ap"]) == list(metrics["per_class_mask_ap"]) == list(shapes.CLASSES)
    saved = flags_of(undisturbed)
    assert saved["img_size"] == [64, 64] and saved["layer_decay"] == 0.7 and saved["head"] == "mask_rcnn"
    assert saved["window_size"] == 3 and saved["head_width"] == 8
    for step in (4, 7):
        with Image.open(undisturbed / "predictions" / f"step_{step:08d}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100  # it shows scenes
    assert {"best", "model", "detections.json"} <= {*os.listdir(undisturbed)}


def coco_scores(scene_folder, results, kind):
    """Compute six average precisions, and one for each class, with pycocotools from the files alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths = COCO(str(scene_folder / "annotations" / "instances_val.json"))
    if kind == "segm":
        results = [{name: value for name, value in record.items() if name != "bbox"} for record in results]
    loaded, scores = truths.loadRes(copy.deepcopy(results)), []  # loadRes changes its argument
    for category in [truths.getCatIds(), *([number] for number in truths.getCatIds())]:
        evaluation = COCOeval(truths, loaded, kind)
        evaluation.params.catIds = category
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores.append(evaluation.stats[:6])
    return scores[0], [own[0] for own in scores[1:]]


@pytest.mark.parametrize("name, kind", [("box", "bbox"), ("mask", "segm")])
def test_scores_are_those_of_pycocotools(undisturbed, scene_folder, tmp_path, name, kind):
    """The metrics equal those that pycocotools computes from detections.json and the annotations."""
    results, metrics = json.loads((undisturbed / "detections.json").read_text()), metrics_of(undisturbed)
    assert {record["image_id"] for record in results} == {900 - number for number in range(20, 27)}
    expected, per_class = coco_scores(scene_folder, results, kind)
    ends = ("", "50", "75", "_small", "_medium", "_large")
    for value, end in zip(expected, ends, strict=True):
        ours = metrics[f"{name}_ap{end}"]
        assert (ours is None and value == -1) or abs(ours - 100 * value) < 1e-9
    for value, ours in zip(per_class, metrics[f"per_class_{name}_ap"].values(), strict=True):
        assert (ours is None and value == -1) or abs(ours - 100 * value) < 1e-9
    sizes = {900 - number: 64 - 8 * (number % 3) for number in range(20, 27)}
    for record in results:  # boxes are in the pixels of the original images
        x, y, width, height = record["bbox"]
        assert 0 <= x <= x + width <= 64.01 and 0 <= y <= y + height <= sizes[record["image_id"]] + 0.01
        assert record["category_id"] in range(10, 81, 10) and 0.05 <= record["score"] <= 1
        assert record["segmentation"]["size"] == [sizes[record["image_id"]], 64]


def test_kill_and_resume_in_the_middle_of_an_epoch(undisturbed, flags, tmp_path):
    folder = tmp_path / "work_dir" / "finetune_detection"
    process = start(SCRIPT, *flags, "--num_workers", 1, cwd=tmp_path)
    wait_for(5, folder, process)
    process.kill()
    process.communicate()
    assert not (folder / "metrics.json").exists() and (folder / "checkpoints" / "step_00000003").exists()
    run(SCRIPT, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 7)
    assert (folder / "detections.json").read_bytes() == (undisturbed / "detections.json").read_bytes()
    one, other = (read_state_dict(run / "best") for run in (undisturbed, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_processes_are_one(undisturbed, flags, tmp_path):
    """Two processes with the micro-batches of one get its losses and weights; each image is scored once."""
    run_two(SCRIPT, *flags, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_detection"
    ours, theirs = losses_of(folder), losses_of(undisturbed)
    assert ours.keys() == theirs.keys() and all(ours[step] == pytest.approx(theirs[step], rel=1e-5) for step in ours)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-6)
    one, two = weights_of(undisturbed, 7), weights_of(folder, 7)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    again = ["--path_to_data", flags[1], "--eval_only", "--num_workers", 0, WEIGHTS, undisturbed]
    run_two(SCRIPT, *again, "--experiment_name", "again", cwd=tmp_path)
    scores = metrics_of(tmp_path / "work_dir" / "again")
    assert all(scores[name] == value for name, value in metrics_of(undisturbed).items() if "_ap" in name[:8])


def test_what_only_evaluates_agrees_with_the_run(undisturbed, scene_folder, tmp_path):
    words = ["--path_to_data", scene_folder, "--eval_only", "--num_workers", 0]
    sources = {"model": undisturbed / "model", "checkpoint": undisturbed / "checkpoints" / "step_00000007"}
    run_each(
        SCRIPT, [[*words, WEIGHTS, path, "--experiment_name", name] for name, path in sources.items()], cwd=tmp_path
    )
    expected = metrics_of(undisturbed)
    for name in sources:
        scores = metrics_of(tmp_path / "work_dir" / name)
        assert all(
            scores[key] == expected[key] for key in ("box_ap", "mask_ap", "per_class_box_ap", "per_class_mask_ap")
        )
        assert (tmp_path / "work_dir" / name / "predictions" / "step_00000000.png").exists()


def test_predictions_are_those_of_the_validation(undisturbed, scene_folder, tmp_path):
    """predict.py finds the objects of the run's validation; it writes COCO's format and a picture of each image."""
    output = tmp_path / "predictions"
    words = [undisturbed / "model", scene_folder / "val", "--output", output, "--num_workers", 0]
    text = run("predict.py", *words, cwd=tmp_path).stdout
    assert "objects of 8 classes, in images that fit 64 pixels" in text and "7 of 7 images" in text
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    expected = {}
    for record in json.loads((undisturbed / "detections.json").read_text()):
        expected.setdefault(record["image_id"], []).append(record)
    for line, number in zip(lines, range(20, 27), strict=True):
        theirs = expected[900 - number]
        assert len(line["objects"]) == len(theirs) > 0 and (output / line["overlay"]).is_file()
        for ours, other in zip(line["objects"], theirs, strict=True):
            assert ours["category_id"] == other["category_id"] in range(10, 81, 10)
            assert ours["class"] == shapes.CLASSES[ours["category_id"] // 10 - 1]
            assert ours["bbox"] == other["bbox"] and ours["score"] == other["score"]
    from pycocotools.coco import COCO

    coco = COCO(str(output / "coco.json"))
    assert [image["height"] for image in coco.loadImgs(coco.getImgIds())] == [64 - 8 * (n % 3) for n in range(20, 27)]
    assert len(coco.getAnnIds()) == sum(map(len, expected.values())) and coco.getCatIds() == [*range(10, 81, 10)]
    annotation = coco.loadAnns(coco.getAnnIds())[0]
    assert coco.annToMask(annotation).sum() == annotation["area"]
    errors = run("predict.py", *words, cwd=tmp_path, code=2).stderr
    assert "would overwrite" in errors and "coco.json" in errors
    features = run(
        "predict.py", *words[:2], "--features", tmp_path / "f.npy", "--top_k", 3, cwd=tmp_path, code=2
    ).stderr
    assert "is a detector, whose encoder has no norm" in features and "--top_k has no effect" in features


def test_the_best_detector_is_exported_for_the_hub(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    output = run("push_to_hub.py", tmp_path / "run", "--checkpoint", "best", cwd=tmp_path).stdout
    assert "mask_rcnn for 8 classes, windows of 3" in output
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and "An object detector, fine-tuned." in card
    assert "| COCO's average precision of boxes (%) |" in card and "by COCO's arithmetic" in card
    assert "transformers has no ViTDet with region-based heads" in card and "library_name" not in card
    assert (tmp_path / "run" / "hub" / "predictions.png").is_file()
    one, other = (read_state_dict(folder) for folder in (undisturbed / "best", tmp_path / "run" / "hub"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_other_ways_to_train(scene_folder, tmp_path):
    """Train a detector of boxes from a frozen segmenter's encoder, on grey and damaged images; then do a dry run."""
    data = shutil.copytree(scene_folder, tmp_path / "data")
    (data / "train" / "005.png").write_text("no image")
    (data / "val" / "022.png").write_text("no image")
    segmenter = Segmenter(new_encoder(**SIZES, relative_position_bias=True, layer_scale=0.5), 3, head="linear")
    export_segmenter(segmenter, tmp_path / "segmenter", classes=["a", "b", "c"], resize=(64, 32), **STATISTICS)
    shared = ["--path_to_data", data, *SMALL, "--head", "faster_rcnn", "--epochs", 1, WEIGHTS, tmp_path / "segmenter"]
    shared += ["--adapt_channels", "--input_channels", 1, "--freeze_encoder", "--lr_schedule", "cosine"]
    (output,) = run_each(SCRIPT, [[*shared, "--gradient_checkpointing", "--experiment_name", "boxes"]], cwd=tmp_path)
    folder = tmp_path / "work_dir" / "boxes"
    assert "ignored (decode_head" in output
    assert "4 relative position biases 4x4 -> 8x8" in output and "1 relative position biases 4x4 -> 3x3" in output
    assert "32 x 5 frozen encoder" in output and "cosine to 0" in output and "faster_rcnn" in output
    assert "mask_ap" not in metrics_of(folder) and metrics_of(folder)["box_ap"] is not None
    saved = flags_of(folder)
    assert saved["relative_position_bias"] is True and saved["layer_scale"] == 1 and saved["drop_path"] == 0
    damaged = [json.loads(line)["path"] for line in (folder / "damaged.jsonl").read_text().splitlines()]
    assert {os.path.basename(path) for path in damaged} >= {"022.png"}
    dry = dry_run(SCRIPT, *shared, "--experiment_name", "dry", cwd=tmp_path)
    assert "dry run" in dry and not (tmp_path / "work_dir" / "dry").exists()


def test_what_does_not_fit_is_told_before_the_first_step(scene_folder, backbone, undisturbed, tmp_path):
    (tmp_path / "boxes").mkdir()
    boxes = shutil.copytree(scene_folder, tmp_path / "boxes" / "data")
    path = boxes / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["segmentation"]
    path.write_text(json.dumps(content))
    shutil.copy(path, path.with_name("instances_val.json"))
    shutil.rmtree(boxes / "val")
    (boxes / "train").rename(boxes / "val")
    shutil.copytree(boxes / "val", boxes / "train")
    here = ["--path_to_data", scene_folder, *SMALL]
    contradictions = ["--head", "faster_rcnn", "--head_width", 16, "--window_size", 0, "--relative_position_bias"]
    starts = [
        [*here, "--scale_jitter", 2, 1, "--freeze_encoder", "--drop_path", 0.1],
        [*here, *ENCODER, "--img_size", 60],
        [*here, *ENCODER, "--img_size", 56],
        [*here, *ENCODER, "--img_size", 64, 32],
        [*here, "--patch_size", 14, "--img_size", 70, "--path_to_classes", "x"],
        [*here, *ENCODER, "--path_to_data", boxes, "--head", "mask_rcnn"],
        [*here, "--eval_only", WEIGHTS, backbone],
        ["--eval_only", WEIGHTS, undisturbed, "--path_to_data", "builtin:shapes", "--img_size", 70],
        ["--eval_only", WEIGHTS, undisturbed, "--path_to_data", "builtin:shapes", "--img_size", 56],
        [*here, "--eval_only", WEIGHTS, undisturbed, "--path_to_data", boxes, *contradictions],
        [*here, "--eval_only", WEIGHTS, undisturbed, "--encoder_depth", 3],
    ]
    words = (
        ("--scale_jitter 2 1 is empty", "--drop_path 0.1 does not go with", "--freeze_encoder needs trained weights"),
        ("--img_size 60 60 is not divisible by --patch_size 8; take multiples of 8",),
        ("--img_size 56 does not fit a detector; expected a multiple of 32, 4 patches of 8; give 32",),
        ("--img_size 64 32 is not square; give one side",),
        ("--patch_size 14 does not fit a detector", "names its classes in its annotations"),
        ("instances_train.json have no mask: 000.png; add masks, or give --head faster_rcnn",),
        ("holds no detector; give a model/, best/ or checkpoint",),
        ("an image of (70, 70) pixels does not split into patches of 8",),
        ("images of (56, 56) pixels in patches of 8; expected square images with a multiple of 4 patches",),
        (
            "--head faster_rcnn is not the trained model's, which has --head mask_rcnn; leave it out",
            "--head_width 16 is not the trained model's, which has --head_width 8",
            "--window_size 0 is not the trained model's, which has --window_size 3",
            "--relative_position_bias is not the trained model's, which has --no-relative_position_bias",
            "the trained model detects masks, and 1 of ",
        ),
        ("--encoder_depth 3 is not the trained model's 5",),
    )
    for errors, expected in zip(refusals(SCRIPT, *starts, cwd=tmp_path), words, strict=True):
        assert len(errors) == len(expected), errors
        assert all(any(word in error for error in errors) for word in expected), errors


def test_scores_and_warmup_in_words_and_numbers():
    from finetune_detection import DEFAULTS, WARMUP_STEPS, describe_scores, parse_args

    assert describe_scores({"box_ap": 12.346, "box_ap50": None}) == "box AP 12.35 %, box AP50 -"
    args, errors = parse_args(["--path_to_data", "x", "--img_size", "64", "64"])
    assert not errors and args.img_size == [64, 64] and all(getattr(args, name) is None for name in DEFAULTS)
    length = dict(epochs=None, warmup_epochs=None, warmup_steps=None, num_samples=8, global_batch_size=8)
    length["recipe_steps"] = (WARMUP_STEPS, 10 * WARMUP_STEPS)
    assert [plan_length(max_steps=steps, **length).warmup_steps for steps in (300, 9000)] == [30, 250]


def test_patches_of_another_side_are_resized(scene_folder, tmp_path):
    export_encoder(new_encoder(**SIZES | dict(patch_size=7, img_size=28)), tmp_path / "encoder", **STATISTICS)
    flags = ["--path_to_data", scene_folder, *SMALL, "--max_steps", 1, "--evaluate_every", 0, "--patch_size", 8]
    output = run(SCRIPT, *flags, WEIGHTS, tmp_path / "encoder", cwd=tmp_path).stdout
    assert "patches resized from 7 to 8" in output and "64 patches of 8" in output


@pytest.mark.slow
def test_micro_batches_of_other_sizes_change_rounding_alone(scene_folder, backbone, tmp_path):
    flags = ["--path_to_data", scene_folder, WEIGHTS, backbone, *SMALL, "--max_steps", 3, "--drop_path", 0]
    run_each(SCRIPT, [[*flags, "--micro_batch_size", n, "--experiment_name", f"of_{n}"] for n in (1, 4)], cwd=tmp_path)
    one, four = (losses_of(tmp_path / "work_dir" / f"of_{n}") for n in (1, 4))
    assert all(one[step] == pytest.approx(four[step], rel=1e-5) for step in one)


@pytest.mark.slow
def test_real_cells_are_learned(real_images, tmp_path):
    """300 steps from scratch, on images reduced to 160 pixels, give a box AP50 above 20 %."""
    flags = ["--path_to_data", real_images / "bccd", *ENCODER, "--img_size", 160, "--head_width", 32, "--num_regions"]
    flags += [128, "--global_batch_size", 8, "--max_steps", 300, "--learning_rate", 1e-3, "--scale_jitter", 0.5, 1.5]
    run(SCRIPT, *flags, "--drop_path", 0, "--mixed_precision", "no", "--evaluate_every", 0, cwd=tmp_path)
    assert metrics_of(tmp_path / "work_dir" / "finetune_detection")["box_ap50"] > 20
