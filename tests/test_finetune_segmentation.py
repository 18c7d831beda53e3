"""Tests of complete runs of finetune_segmentation.py, and of flags and data that it refuses."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SCENES,
    assert_equal_runs,
    dry_run,
    log_of,
    losses_of,
    metrics_of,
    refusals,
    run,
    run_code,
    run_cold,
    run_each,
    run_two,
    start,
    wait_for,
    weights_of,
)
from PIL import Image

import finetune_segmentation
from data.pairs import class_weights
from modeling.export import export_encoder
from modeling.files import read_state_dict
from modeling.upernet import HEADS, default_layers
from modeling.vit import VisionTransformer
from training.resolve import resolve_head

SCRIPT = "finetune_segmentation.py"
WEIGHTS = "--path_to_backbone_checkpoint"
ENCODER = ["--patch_size", 8, "--encoder_embed_dim", 32, "--encoder_depth", 4, "--encoder_num_heads", 2]
HEAD = ["--head_width", 16, "--layers", 0, 1, 2, 3]
# All sources of randomness of a run, with two micro-batches per step
SMALL = ["--crop_size", 32, "--global_batch_size", 4, "--micro_batch_size", 2, "--learning_rate", 1e-3]
SMALL += ["--drop_path", 0.2, "--num_workers", 0, "--mixed_precision", "no", "--log_every", 1]
SMALL += ["--num_preview_images", 2]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Return the folder of an encoder, as pre-training writes it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2).initialize()
    export_encoder(encoder, folder, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return folder


@pytest.fixture(scope="session")
def flags(scenes, encoder):
    """Return the flags of a run of seven steps, two per epoch, so that it ends inside its fourth epoch."""
    flags = ["--path_to_data", scenes, WEIGHTS, encoder, *SMALL, *HEAD, "--max_steps", 7, "--evaluate", "whole"]
    return [*flags, "--evaluate_every", 4, "--save_checkpoint_steps", 3, "--class_weights", "balanced"]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, flags):
    """Return the folder of an uninterrupted run."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = run_cold(ROOT / SCRIPT, *flags, cwd=cwd)
    assert "UperNet of width 16 after blocks 0, 1, 2, 3" in done.stdout and "relative position bias" in done.stdout
    return cwd / "work_dir" / "finetune_segmentation"


def annotation(path):
    """Return the mask of the image at `path`, with class numbers from 0 and 255 for void."""
    labels = np.array(Image.open(str(path.with_suffix(".png")).replace("/images/", "/annotations/"))).astype(int)
    return np.where(labels == 0, 255, labels - 1)


def mean_iou(predictions, annotations, num_classes):
    """Return the mean IoU (%) over the whole set by its definition, without classes that occur in neither."""
    confusion = np.zeros((num_classes, num_classes))
    for prediction, mask in zip(predictions, annotations, strict=True):
        np.add.at(confusion, (mask[mask != 255], prediction[mask != 255]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (confusion.diagonal()[union > 0] / union[union > 0]).mean()


def test_what_a_run_leaves_behind(undisturbed):
    lines = log_of(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 8)) and all(line["grad_norm"] > 0 for line in training)
    rates = [line["learning_rate"] for line in training]
    assert rates[0] == 1e-3 and rates[-1] == 0 and rates[3] == pytest.approx(1e-3 * 3 / 6)  # linear, without a warmup
    evaluations = [line for line in lines if "mean_iou" in line]
    assert [line["step"] for line in evaluations] == [4, 7]
    metrics = metrics_of(undisturbed)
    names = ("mean_iou", "mean_accuracy", "overall_accuracy", "per_class_iou", "per_class_accuracy")
    assert metrics["step"] == 7 and all(metrics[name] == evaluations[-1][name] for name in names)
    assert metrics["best_mean_iou"] == max(line["mean_iou"] for line in evaluations)
    assert list(metrics["per_class_iou"]) == SCENES and metrics["per_class_accuracy"]["sea"] is None
    saved = json.loads((undisturbed / "args.json").read_text())
    assert saved["classes"] == SCENES and saved["flags"]["resize"] == [128, 32]
    assert saved["flags"]["encoder_embed_dim"] == 32 and saved["flags"]["encoder_num_heads"] == 2
    for step in (4, 7):
        with Image.open(undisturbed / "predictions" / f"step_{step:08d}.png") as picture:
            assert picture.width > 300
    assert not [name for name in os.listdir(undisturbed) if name.endswith(".replacing")]


def test_a_stranger_finds_the_same_mean_iou(undisturbed, scenes):
    """Stock transformers with the folder's processor gets this mean IoU, and its pipeline finds the same classes."""
    import transformers

    folder = undisturbed / "model"
    model = transformers.UperNetForSemanticSegmentation.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    paths = sorted((scenes / "images" / "validation").glob("*.jpg"))
    predictions = []
    for path in paths:
        image = Image.open(path)
        with torch.no_grad():
            outputs = model(**processor(images=image, return_tensors="pt"))
        sizes = [image.size[::-1]]
        predictions += [m.numpy() for m in processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)]
    found = mean_iou(predictions, map(annotation, paths), len(SCENES))
    assert found == pytest.approx(metrics_of(undisturbed)["mean_iou"], abs=0.5)
    segments = transformers.pipeline("image-segmentation", model=str(folder))(str(paths[0]))
    assert {segment["label"] for segment in segments} == {SCENES[i] for i in np.unique(predictions[0])}


def test_kill_and_resume_in_the_middle_of_an_epoch(undisturbed, flags, tmp_path):
    """Drop path, dropout, BatchNorm and random augmentation go on as in the uninterrupted run."""
    folder = tmp_path / "work_dir" / "finetune_segmentation"
    process = start(SCRIPT, *flags, "--num_workers", 1, cwd=tmp_path)
    wait_for(5, folder, process)
    process.kill()
    process.communicate()
    assert not (folder / "metrics.json").exists() and (folder / "checkpoints" / "step_00000003").exists()
    run(SCRIPT, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 7)
    one, other = (read_state_dict(run / "best") for run in (undisturbed, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_numbers_of_masks_do_not_change_a_run(undisturbed, scenes, flags, tmp_path):
    """Masks with classes from 0 and 255 for void give the same run, with the flags that say so."""
    data = shutil.copytree(scenes, tmp_path / "data")
    for path in (data / "annotations").rglob("*.png"):
        Image.fromarray(annotation(path).astype(np.uint8)).save(path)
    numbers = ["--path_to_data", data, "--mask_offset", 0, "--void_label", 255]
    run(SCRIPT, *flags, *numbers, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_segmentation"
    assert_equal_runs(undisturbed, folder, 7)
    assert metrics_of(folder)["per_class_iou"] == metrics_of(undisturbed)["per_class_iou"]
    again = ["--path_to_data", data, "--eval_only", "--num_workers", 0, "--evaluate", "whole"]  # flags from the weights
    weights = {"model": folder / "model", "checkpoint": folder / "checkpoints" / "step_00000007"}
    run_each(SCRIPT, [[*again, WEIGHTS, weights[name], "--experiment_name", name] for name in weights], cwd=tmp_path)
    for name in weights:
        measured = metrics_of(tmp_path / "work_dir" / name)
        assert measured["per_class_iou"] == metrics_of(undisturbed)["per_class_iou"], name


def test_runs_that_do_not_say_how_masks_are_numbered_are_resumed(undisturbed, scenes, flags, tmp_path):
    """Runs without a saved --mask_offset took masks as numbered from 1, also masks that a new run refuses."""
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "classes.txt").write_text("\n".join(["background", *SCENES[1:]]))  # the last one has no pixel
    starts = []
    for name, given in (("unknown", []), ("unsaid", ["--mask_offset", 1])):
        folder = shutil.copytree(undisturbed, tmp_path / "work_dir" / name)
        saved = json.loads((folder / "args.json").read_text())
        if name == "unknown":
            del saved["flags"]["mask_offset"], saved["flags"]["void_label"]
        else:
            saved["flags"]["mask_offset"] = None
        (folder / "args.json").write_text(json.dumps(saved))
        resumed = ["--path_to_data", data, "--resume_from_checkpoint", "step_00000006"]
        starts.append([*flags, *resumed, *given, "--experiment_name", name])
    run_each(SCRIPT, starts, cwd=tmp_path)
    for name in ("unknown", "unsaid"):
        assert losses_of(tmp_path / "work_dir" / name) == losses_of(undisturbed)


def test_what_only_evaluates_agrees_with_the_run(undisturbed, scenes, tmp_path):
    """--eval_only repeats the metrics from the run, from a checkpoint, and from transformers' file alone."""
    stock = shutil.copytree(undisturbed / "model", tmp_path / "stock")
    (stock / "transformers_model.safetensors").replace(stock / "model.safetensors")
    words = ["--path_to_data", scenes, "--eval_only", "--num_workers", 0, "--evaluate", "whole"]
    sources = {"run": undisturbed, "checkpoint": undisturbed / "checkpoints" / "step_00000007", "stock": stock}
    starts = [[*words, WEIGHTS, path, "--experiment_name", name] for name, path in sources.items()]
    run_each(SCRIPT, starts, cwd=tmp_path)
    expected = metrics_of(undisturbed)
    for name in sources:
        found = metrics_of(tmp_path / "work_dir" / name)
        assert found["per_class_iou"] == expected["per_class_iou"] and found["mean_iou"] == expected["mean_iou"], name
        assert found["overall_accuracy"] == expected["overall_accuracy"]
        assert (tmp_path / "work_dir" / name / "predictions" / "step_00000000.png").exists()


def test_other_ways_to_train_and_to_evaluate(scenes, tmp_path):
    """Train from scratch in grey with a linear head, and evaluate sliding windows of several scales and mirror images.

    One training pair and one validation pair are damaged.
    """
    data = shutil.copytree(scenes, tmp_path / "data")
    (data / "images" / "training" / "scene_05.jpg").write_text("no image")
    (data / "annotations" / "validation" / "scene_01.png").write_bytes(b"\x89PNG cut")
    shared = ["--path_to_data", data, "--data_format", "folder", *SMALL, *ENCODER, "--input_channels", 1]
    shared += ["--head", "linear"]
    shared += ["--no-relative_position_bias", "--layer_scale", 0, "--epochs", 1, "--resize", 96, 40]
    scales = ["--evaluate_scales", 0.5, 1, 1.5, "--evaluate_flip"]
    again = ["--path_to_data", data, WEIGHTS, "work_dir/scratch/model", "--input_channels", 1, "--resize", 96, 40]
    scratch = [*shared, *scales, "--gradient_checkpointing", "--experiment_name", "scratch"]
    again += [*scales, "--eval_only", "--num_workers", 0, "--experiment_name", "again"]
    said, _ = run_each(SCRIPT, [scratch, again], cwd=tmp_path)
    dry = dry_run(SCRIPT, *shared, "--experiment_name", "dry", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "scratch"
    assert "linear head after block 3:" in said and "steps      2, " in said
    assert metrics_of(tmp_path / "work_dir" / "again")["per_class_iou"] == metrics_of(folder)["per_class_iou"]
    assert not any("bias_table" in name or "gamma" in name for name in weights_of(folder, 2))
    damaged = [json.loads(line)["path"] for line in (folder / "damaged.jsonl").read_text().splitlines()]
    assert sorted(os.path.basename(path) for path in damaged) == ["scene_01.jpg", "scene_05.jpg"]
    assert "damaged    1 of 10 images so far, such as " in dry  # counted once, not in every epoch
    assert "dry run" in dry and not (tmp_path / "work_dir" / "dry").exists()


def without(flags, name):
    """Return `flags` without the flag `name` and its value."""
    return [*flags[: flags.index(name)], *flags[flags.index(name) + 2 :]]


@pytest.fixture(scope="module")
def frozen(scenes, encoder, tmp_path_factory):
    """Return the flags and the folder of a run that trains a DPT head on a frozen encoder."""
    cwd = tmp_path_factory.mktemp("frozen")
    flags = ["--path_to_data", scenes, WEIGHTS, encoder, *without(SMALL, "--drop_path"), "--freeze_encoder"]
    flags += [
        "--head",
        "dpt",
        "--head_width",
        16,
        "--max_steps",
        7,
        "--evaluate",
        "whole",
        "--save_checkpoint_steps",
        3,
    ]
    done = run(SCRIPT, *flags, cwd=cwd)
    assert "32 x 4 frozen encoder, DPT of width 16 after blocks 0, 1, 2, 3" in done.stdout
    return flags, cwd / "work_dir" / "finetune_segmentation"


def assert_frozen(folder, encoder, step):
    """Assert that the encoder's weights are unchanged and the optimizer has only parameters of the head."""
    before, after = read_state_dict(encoder), weights_of(folder, step)
    ours = {name.removeprefix("encoder."): value for name, value in after.items() if name.startswith("encoder.")}
    assert ours.keys() == before.keys() - {"norm.weight", "norm.bias"}
    assert all(torch.equal(value, before[name]) for name, value in ours.items())
    state = torch.load(folder / "checkpoints" / f"step_{step:08d}" / "optimizer.pt", weights_only=True)["optimizer"]
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    of_head = [name for name in after if not name.startswith("encoder.") and not name.endswith(statistics)]
    assert len(state["state"]) == len(of_head)


def test_a_frozen_encoder_keeps_its_weights_and_transformers_agrees(frozen, scenes, encoder, tmp_path):
    """The model/ folder of a DPT head on crops of 4 x 4 patches gives the run's mean IoU in transformers."""
    import transformers

    folder = frozen[1]
    assert_frozen(folder, encoder, 7)
    words = ["--path_to_data", scenes, "--eval_only", "--num_workers", 0, "--evaluate", "whole"]
    run(SCRIPT, *words, WEIGHTS, folder / "model", cwd=tmp_path)
    measured = metrics_of(tmp_path / "work_dir" / "finetune_segmentation")
    assert measured["per_class_iou"] == metrics_of(folder)["per_class_iou"]
    segment = transformers.pipeline("image-segmentation", model=str(folder / "model"))
    paths = sorted((scenes / "images" / "validation").glob("*.jpg"))
    masks = []
    for path in paths:
        classes = np.zeros(Image.open(path).size[::-1], int)
        for part in segment(str(path)):
            classes[np.array(part["mask"]) > 0] = SCENES.index(part["label"])
        masks.append(classes)
    found = mean_iou(masks, map(annotation, paths), len(SCENES))
    assert found == pytest.approx(measured["mean_iou"], abs=0.5)


def test_kill_and_resume_with_a_frozen_encoder(frozen, tmp_path):
    flags, undisturbed = frozen
    folder = tmp_path / "work_dir" / "finetune_segmentation"
    process = start(SCRIPT, *flags, "--num_workers", 1, cwd=tmp_path)
    wait_for(5, folder, process)
    process.kill()
    process.communicate()
    run(SCRIPT, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 7)


def test_two_processes_with_a_frozen_encoder(frozen, encoder, tmp_path):
    """Micro-batches have two images, as in the run of one process, so BatchNorm gets the same statistics."""
    flags, undisturbed = frozen
    run_two(SCRIPT, *flags, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_segmentation"
    assert_frozen(folder, encoder, 7)
    assert losses_of(folder)[1] == pytest.approx(losses_of(undisturbed)[1], rel=1e-5)


def test_two_flags_are_the_published_recipe():
    args, errors = finetune_segmentation.parse_args(["--path_to_data", "ADE", WEIGHTS, "pretrained"])
    assert not errors and args.max_steps == 160_000 and args.learning_rate == 1e-4 and args.layer_decay == 0.65
    head = resolve_head(vars(args), 12, HEADS["upernet"], default_layers)
    assert head == dict(head="upernet", layers=[3, 5, 7, 11], head_width=512, auxiliary_weight=0.4)
    assert finetune_segmentation.CROP_SIZE == 512 and finetune_segmentation.BATCH_SIZE == 16
    assert args.betas == [0.9, 0.999] and args.weight_decay == 0.05 and args.drop_path == 0.1
    assert args.relative_position_bias and args.layer_scale == 1 and args.evaluate == "slide"


def test_every_flag_of_training_reaches_what_it_is_for(scenes, encoder, tmp_path):
    """The first step is inspected instead of taken. No value is a default or equal to another value."""
    code = """
import json, sys, finetune_segmentation as script
found = {}
training_batches, partial = script.training_batches, script.partial
def recorded(function, *given, **options):
    if function in (script.predict, script.view_sizes):
        found[function.__name__] = options
    return partial(function, *given, **options)
def loader(dataset, *given, **options):
    found.update(dataset.options, channels=dataset.pixels.channels)
    found.update(seed=dataset.seed, pin=options["pin_memory"])
    return training_batches(dataset, *given, **options)
def step(accelerator, model, optimizer, batches, normalize, *, weights, auxiliary_weight, max_grad_norm):
    encoder = model.encoder
    found.update({
        "drop_path": encoder.blocks[-1].drop_path.p,
        "checkpointing": encoder.gradient_checkpointing,
        "bias": encoder.relative_position_bias,
        "scale": encoder.blocks[1].gamma_2[0].item(),
        "head": [model.head, model.head_width, model.layers, model.num_classes, model.auxiliary],
        "weights": weights.tolist(),
        "auxiliary": auxiliary_weight,
        "betas": optimizer.param_groups[0]["betas"],
        "decays": sorted({group["weight_decay"] for group in optimizer.param_groups}),
        "scales": sorted({group["lr_scale"] for group in optimizer.param_groups}),
        "rates": sorted({group["lr"] for group in optimizer.param_groups}),
        "clipping": max_grad_norm,
        "micro": len(next(batches)[1].images), "accumulation": accelerator.gradient_accumulation_steps,
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
    })
    print(json.dumps(found))
    raise SystemExit(0)
script.training_batches, script.optimizer_step, script.partial = loader, step, recorded
script.main(sys.argv[1:])
"""
    words = ["--path_to_data", scenes, WEIGHTS, encoder, "--num_workers", 0, "--mixed_precision", "no", "--seed", 7]
    words += ["--global_batch_size", 6, "--micro_batch_size", 3, "--max_steps", 12, "--warmup_steps", 0]
    words += ["--learning_rate", 0.5, "--layer_decay", 0.5, "--weight_decay", 0.03, "--betas", 0.6, 0.7]
    words += ["--drop_path", 0.3, "--max_grad_norm", 2.5, "--gradient_checkpointing", "--mean", 0.1, 0.2, 0.3]
    words += ["--std", 0.7, 0.8, 0.9, "--crop_size", 24, "--resize", 90, 33, "--layer_scale", 0.25, "--head_width", 12]
    words += ["--layers", 0, 1, 2, 3, "--auxiliary_weight", 0.35, "--class_weights", 1.5, 2.5, 3.5, 4.5]
    words += ["--evaluate_scales", 0.75, 1.25, "--evaluate_flip"]
    done = run_code(code, *words, cwd=tmp_path)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        **dict(resize=[90, 33], crop_size=24, fill=[26, 51, 76], channels=3, seed=7, pin=False, drop_path=0.3),
        **dict(checkpointing=True, bias=True, scale=0.25, head=["upernet", 12, [0, 1, 2, 3], 4, True]),
        **dict(weights=[1.5, 2.5, 3.5, 4.5], auxiliary=0.35, betas=[0.6, 0.7], decays=[0.0, 0.03], clipping=2.5),
        "predict": dict(flip=True, window=24),
        "view_sizes": dict(mode="slide", scales=[0.75, 1.25], resize=[90, 33], crop_size=24, patch_size=8),
        "scales": [0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0],
        "rates": [0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5],
        **dict(micro=3, accumulation=2, mean=pytest.approx([0.1, 0.2, 0.3]), std=pytest.approx([0.7, 0.8, 0.9])),
    }


def test_balanced_weights_favour_rare_classes():
    weights = class_weights(["balanced"], [100, 50, 400, 0, 2])
    assert weights.tolist() == pytest.approx([0.5, 1, 0.125, 1, 10])  # the lower median is 50
    assert class_weights(None, [1, 2]) is None
    assert class_weights([1.0, 0.5], [1, 2]).tolist() == [1, 0.5]


def parse(*words):
    return finetune_segmentation.parse_args(["--path_to_data", "ADE", *words])[1][0]


def test_flags_that_do_not_fit_are_refused_together(scenes, encoder, flags, undisturbed, tmp_path):
    given = ["--path_to_data", scenes, "--global_batch_size", 4, "--num_workers", 0]
    wrong = [*given, WEIGHTS, encoder, "--crop_size", 36, "--layers", 1, 2, 3, 4, "--class_weights", 1, 2]
    wrong += ["--micro_batch_size", 1]
    resize = [*given, "--resize", 20, 40]
    order = [*given, WEIGHTS, encoder, "--crop_size", 32, "--layers", 3, 2, 1]
    linear = [*given, WEIGHTS, encoder, "--crop_size", 32, "--head", "linear", "--layers", 0, 1]
    of_upernet = [*given, WEIGHTS, encoder, "--head", "linear", "--head_width", 7, "--auxiliary_weight", 3]
    of_upernet += ["--crop_size", 32]
    one_patch = [*given, WEIGHTS, encoder, "--crop_size", 8]
    shallow = [*given, *ENCODER, "--encoder_depth", 3, "--crop_size", 32]
    no_head = [*given, WEIGHTS, encoder, "--eval_only"]
    inside = [*given, WEIGHTS, tmp_path / "work_dir" / "finetune_segmentation" / "best"]
    unsaved = shutil.copytree(undisturbed, tmp_path / "work_dir" / "finetune_segmentation")
    shutil.rmtree(unsaved / "checkpoints")
    (unsaved / "metrics.json").unlink()
    found = refusals(
        SCRIPT, wrong, order, linear, shallow, no_head, inside, one_patch, of_upernet, resize, cwd=tmp_path
    )
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(undisturbed, elsewhere / "work_dir" / "finetune_segmentation")
    changed = ["--layer_decay", 0.5, "--evaluate", "slide", "--resume_from_checkpoint", "step_00000003"]
    (said,) = run_each(SCRIPT, [[*flags, *changed]], cwd=elsewhere, code=2)
    assert "--layer_decay 0.5 differs" in said and "--evaluate slide differs" in said and said.count("error") == 2
    for words in (
        ("--crop_size 36", "--patch_size 8", "take multiples of 8"),
        ("--layers 1 2 3 4 is beyond the encoder's 4 blocks", "0 to 3"),
        ("--class_weights has 2 numbers for 4 classes",),
        ("micro-batches of at least 2",),
    ):
        assert any(all(word in error for word in words) for error in found[0]), (words, found[0])
    assert len(found[0]) == 4 and "--resize 20 40" in found[8][0] and "LONG SHORT" in found[8][0]
    assert "--layers 3 2 1 does not fit --head upernet; expected 4 different numbers in rising order" in found[1][0]
    assert "--layers 0 1 does not fit --head linear; expected 1" in found[2][0]
    assert "at least 4 blocks, not 3; give --head linear" in found[3][0]
    assert "holds no segmenter" in found[4][0] and len(found[4]) == 1
    assert "which this run would write to" in found[5][0]
    assert "--crop_size 8 is too small for the head; give at least 16" in found[6][0] and len(found[6]) == 1
    assert "--head_width 7 --auxiliary_weight 3 does not go with --head linear" in found[7][0] and len(found[7]) == 1
    assert "mixes balanced and numbers" in parse("--class_weights", "balanced", "2")
    assert "are all 0" in parse("--class_weights", "0", "0")
    assert "--eval_only needs trained weights" in parse("--eval_only")
    assert "--freeze_encoder needs trained weights" in parse("--freeze_encoder")
    encoder = [WEIGHTS, "encoder", "--freeze_encoder"]
    extras = ["--relative_position_bias", "--layer_scale", "0.1", "--drop_path", "0.2", "--layer_decay", "0.9"]
    said = "--drop_path 0.2 --layer_decay 0.9 --relative_position_bias --layer_scale 0.1 does not go with "
    assert parse(*encoder, *extras).startswith(said + "--freeze_encoder; leave it out")
    none = ["--no-relative_position_bias", "--layer_scale", "0", "--drop_path", "0", "--layer_decay", "1"]
    for words in (encoder, [*encoder, *none], [*encoder, "--head", "dpt"], ["--head", "dpt", *none]):
        assert not finetune_segmentation.parse_args(["--path_to_data", "ADE", *words])[1], words
    said = "--auxiliary_weight 0.4 --layer_scale 1 does not go with --head dpt; leave it out"
    assert parse("--head", "dpt", "--layer_scale", "1", "--auxiliary_weight", "0.4") == said


def test_data_that_do_not_fit_are_refused_with_their_names(scenes, undisturbed, tmp_path):
    """Masks with a wrong size, colours or unknown labels, missing files, and wrong classes are errors."""
    masks = shutil.copytree(scenes, tmp_path / "masks") / "annotations" / "training"
    Image.new("L", (9, 9), 1).save(masks / "scene_00.png")
    Image.open(masks / "scene_01.png").convert("RGB").save(masks / "scene_01.png")
    validation = masks.parent / "validation" / "scene_02.png"
    Image.fromarray(np.full_like(np.array(Image.open(validation)), 9)).save(validation)
    missing = shutil.copytree(scenes, tmp_path / "missing")
    (missing / "annotations" / "training" / "scene_04.png").unlink()
    (missing / "images" / "validation" / "scene_01.jpg").unlink()
    renamed, fewer = (shutil.copytree(scenes, tmp_path / name) for name in ("renamed", "fewer"))
    (renamed / "classes.txt").write_text("sky\nwood\nroad\nsea\n")
    (fewer / "classes.txt").write_text("sky\ntree\nroad\n")
    void, one_class = (shutil.copytree(scenes, tmp_path / name) for name in ("void", "one_class"))
    for path in (void / "annotations" / "validation").iterdir():
        Image.new("L", Image.open(path).size).save(path)
    (one_class / "classes.txt").write_text("sky")
    full = tmp_path / "ADE20K_2016_07_26" / "images" / "training" / "a" / "abbey"
    full.mkdir(parents=True)
    for name in ("ADE_train_00000001.jpg", "ADE_train_00000001_seg.png"):
        Image.new("RGB", (40, 40)).save(full / name)
    model = [WEIGHTS, undisturbed / "model", "--eval_only"]
    starts = [[masks.parents[1]], [missing], [renamed, *model], [fewer, *model], [full.parents[3]], [tmp_path]]
    starts += [[void], [one_class]]
    shared = [*ENCODER, *SMALL]
    starts = [["--path_to_data", *words, *([] if "--eval_only" in words else shared)] for words in starts]
    found = refusals(SCRIPT, *starts, cwd=tmp_path)
    text = "\n".join(found[0])
    assert len(found[0]) == 3 and all(f"scene_0{i}.png" in text for i in (0, 1, 2)) and "9" in text
    assert any("scene_04" in error for error in found[1]) and any("scene_01" in error for error in found[1])
    assert "calls class 2 'wood', the segmenter 'tree'" in found[2][0]
    assert "has 3 classes, the segmenter 4" in found[3][0]
    assert "no pixel of the validation masks has a class" in found[6][0] and "names one class" in found[7][0]
    assert "ADEChallengeData2016" in found[4][0] and "annotations" in found[5][0]


def test_real_street_scenes(real_images, tmp_path):
    """A few steps on CamVid give better scores than the most common class everywhere."""
    words = ["--path_to_data", real_images / "camvid", "--crop_size", 96, "--resize", 480, 96, *ENCODER]
    words += ["--global_batch_size", 4, "--head_width", 16, "--max_steps", 40, "--learning_rate", 2e-3]
    words += ["--mixed_precision", "no", "--num_workers", 1, "--drop_path", 0]
    run(SCRIPT, *words, cwd=tmp_path)
    paths = sorted((real_images / "camvid" / "images" / "validation").glob("*.png"))
    masks = [annotation(path) for path in paths]
    counts = np.bincount(np.concatenate([mask[mask != 255] for mask in masks]), minlength=11)
    metrics = metrics_of(tmp_path / "work_dir" / "finetune_segmentation")
    assert metrics["mean_iou"] > 1.5 * mean_iou([np.full_like(m, counts.argmax()) for m in masks], masks, 11)
    assert metrics["overall_accuracy"] > 100 * counts.max() / counts.sum()
