"""Whole runs of finetune_classifier.py, as its users start them, and what it refuses."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TWO_PROCESSES, launch, log_of, losses_of, run, start, write_images
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune_classifier
from modeling.weights import read_state_dict

SCRIPT = "finetune_classifier.py"
# Everything random that a run can have, in steps of two micro-batches
SMALL = ["--per_gpu_batch_size", 8, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--num_workers", 0]
SMALL += ["--mixed_precision", "no", "--log_every", 1, "--drop_path", 0.2, "--ema_decay", 0.9]
WEIGHTS = "--path_to_pretrained_mae_weights"


@pytest.fixture(scope="session")
def pretrained(image_folder, tmp_path_factory):
    """The folder of a pre-training run of one step."""
    cwd = tmp_path_factory.mktemp("pretrained")
    run("pretrain_mae.py", *TINY, "--path_to_data", image_folder, "--max_steps", 1, cwd=cwd)
    return cwd / "work_dir" / "pretrain_mae"


@pytest.fixture(scope="session")
def flags(image_folder, pretrained):
    """Five steps an epoch, twelve in all, so that the run ends inside its third epoch."""
    return ["--path_to_data", image_folder, WEIGHTS, pretrained, *SMALL, "--max_steps", 12]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, flags):
    """A run that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run(SCRIPT, *flags, "--save_checkpoint_steps", 3, cwd=cwd)
    return cwd / "work_dir" / "finetune_classifier"


def checkpoint(run_folder, step, name="model.safetensors"):
    return load_file(run_folder / "checkpoints" / f"step_{step:08d}" / name)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def refusal(*flags, cwd):
    """What a start with bad flags says, before the first step."""
    done = run(SCRIPT, *flags, cwd=cwd, code=2)
    assert "Traceback" not in done.stderr and not list(cwd.glob("work_dir/*/checkpoints/step_*"))
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_what_a_run_leaves_behind(undisturbed):
    lines = log_of(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13)) and all(line["grad_norm"] > 0 for line in training)
    validations = [line for line in lines if "top1" in line]
    assert [line["step"] for line in validations] == [5, 10, 12]
    metrics = metrics_of(undisturbed)
    assert metrics["step"] == 12 and metrics["epoch"] == 2.4 and metrics["top5"] == 100 and metrics["val_loss"] > 0
    assert all(metrics[name] == validations[-1][name] for name in ("top1", "top5", "val_loss", "per_class_accuracy"))
    assert metrics["best_top1"] == max(line["top1"] for line in validations)
    per_class = metrics["per_class_accuracy"]
    assert list(per_class) == ["class_0", "class_1"]  # 6 and 5 images
    assert metrics["top1"] == pytest.approx((6 * per_class["class_0"] + 5 * per_class["class_1"]) / 11)
    flags = json.loads((undisturbed / "args.json").read_text())["flags"]
    assert flags["num_classes"] == 2 and flags["img_size"] == [32, 32] and flags["encoder_embed_dim"] == 32
    assert flags["layer_decay"] == 0.65 and flags["pooling"] == "mean" and flags["encoder_num_heads"] == 2
    for step in (5, 10, 12):
        with Image.open(undisturbed / "predictions" / f"step_{step:08d}.png") as picture:
            assert picture.width > 200
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["step_00000006", "step_00000009", "step_00000012"]
    assert not [name for name in os.listdir(undisturbed) if name.startswith((".new", ".old"))]


def test_advice_where_the_first_accuracy_is_chance():
    confusion = np.array([[50, 0], [48, 2]])
    advice = finetune_classifier.advise(52.0, confusion, [0.5], [0.25])
    assert "(50.00 %)" in advice and WEIGHTS in advice and "--mean 0.5 --std 0.25" in advice
    assert finetune_classifier.advise(97.0, confusion, [0.5], [0.25]) is None


def test_a_stranger_finds_the_same_accuracy(undisturbed, image_folder):
    """Stock timm and stock transformers, with the preprocessing that the folder names."""
    import timm
    import transformers

    expected = metrics_of(undisturbed)
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    labels = [path.parent.name for path in paths]
    pipeline = transformers.pipeline("image-classification", model=str(undisturbed / "model"))
    found = [answers[0]["label"] for answers in pipeline([str(path) for path in paths])]
    assert 100 * np.mean(np.array(found) == labels) == pytest.approx(expected["top1"])

    model = timm.create_model(f"local-dir:{undisturbed / 'model'}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
    found = [names[number] for number in logits.argmax(dim=1).tolist()]
    assert 100 * np.mean(np.array(found) == labels) == pytest.approx(expected["top1"])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([names.index(label) for label in labels]))
    assert loss.item() == pytest.approx(expected["val_loss"], abs=2e-2)  # their resizing differs a little


def test_the_exported_weights_are_the_averages(undisturbed):
    ema, exported = checkpoint(undisturbed, 12, "ema.safetensors"), read_state_dict(undisturbed / "model")
    assert torch.equal(ema["head.weight"], exported["head.weight"])
    assert not torch.equal(checkpoint(undisturbed, 12)["head.weight"], exported["head.weight"])


def test_kill_and_resume_with_everything_random_on(undisturbed, flags, tmp_path):
    flags = [*flags, "--save_checkpoint_steps", 3]
    folder = tmp_path / "work_dir" / "finetune_classifier"
    process = start(SCRIPT, *flags, "--num_workers", 2, cwd=tmp_path)
    log = folder / "log.jsonl"
    while process.poll() is None and (not log.exists() or log.read_text().count('"loss"') < 8):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    assert not (folder / "metrics.json").exists()
    run(SCRIPT, *flags, "--num_workers", 1, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert losses_of(undisturbed) == losses_of(folder)
    scores = [{k: v for k, v in metrics_of(run).items() if "second" not in k} for run in (undisturbed, folder)]
    assert scores[0] == scores[1]
    for name in ("model.safetensors", "ema.safetensors"):
        one, other = checkpoint(undisturbed, 12, name), checkpoint(folder, 12, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for name in ("model", "best"):
        one, other = read_state_dict(undisturbed / name), read_state_dict(folder / name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_refuses_what_would_change_the_run(undisturbed, flags, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "work_dir" / "finetune_classifier")
    changed = ["--layer_decay", 0.5, "--mixup_alpha", 0.1, "--resume_from_checkpoint", "step_00000009"]
    errors = run(SCRIPT, *flags, *changed, cwd=tmp_path, code=2).stderr
    assert (
        "--layer_decay 0.5 differs" in errors and "--mixup_alpha 0.1 differs" in errors and errors.count("error") == 2
    )


def test_two_processes_and_one_report_the_same_evaluation(undisturbed, image_folder, tmp_path):
    """11 images, which two does not divide; and what only evaluates agrees with the run itself."""
    words = [ROOT / SCRIPT, "--path_to_data", image_folder, WEIGHTS, undisturbed, "--eval_only", "--num_workers", 0]
    words += ["--per_gpu_batch_size", 4]
    done = launch(*TWO_PROCESSES, *words, "--experiment_name", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run(SCRIPT, *words[1:], "--experiment_name", "one", cwd=tmp_path)
    expected = metrics_of(undisturbed)
    for name in ("one", "two"):
        found = metrics_of(tmp_path / "work_dir" / name)
        assert all(found[key] == expected[key] for key in ("top1", "top5", "per_class_accuracy"))
        assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)
        assert (tmp_path / "work_dir" / name / "predictions" / "step_00000000.png").exists()


def test_two_processes_train_as_one_and_a_linear_probe_evaluates_alike(image_folder, pretrained, tmp_path):
    """Without mixing and drop path; a probe's statistics are those of the main process on every process."""
    shared = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--num_workers", 0, "--mixed_precision", "no"]
    shared += ["--max_steps", 4, "--global_batch_size", 8, "--log_every", 1]
    plain = [*shared, "--learning_rate", 1e-3, "--mixup_alpha", 0, "--cutmix_alpha", 0, "--drop_path", 0]
    plain += ["--random_erase", 0]
    assert launch(*TWO_PROCESSES, ROOT / SCRIPT, *plain, "--experiment_name", "two", cwd=tmp_path).returncode == 0
    run(SCRIPT, *plain, "--micro_batch_size", 2, "--experiment_name", "one", cwd=tmp_path)
    one, two = tmp_path / "work_dir" / "one", tmp_path / "work_dir" / "two"
    for step, loss in losses_of(one).items():
        assert losses_of(two)[step] == pytest.approx(loss, abs=1e-5)
    a, b = checkpoint(one, 4), checkpoint(two, 4)
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)

    probe = [*shared, "--linear_probe", "--experiment_name", "probe"]
    assert launch(*TWO_PROCESSES, ROOT / SCRIPT, *probe, cwd=tmp_path).returncode == 0
    folder = tmp_path / "work_dir" / "probe"
    run(SCRIPT, *shared[:2], WEIGHTS, folder / "checkpoints" / "step_00000004", "--eval_only", cwd=tmp_path)
    found, expected = metrics_of(tmp_path / "work_dir" / "finetune_classifier"), metrics_of(folder)
    assert found["top1"] == expected["top1"] and found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)


def test_what_trains(image_folder, pretrained, tmp_path):
    """The weights that a step changes, in a linear probe and a partial fine-tuning."""
    flags = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--max_steps", 2, "--per_gpu_batch_size", 8]
    flags += ["--num_workers", 0, "--learning_rate", 0.1, "--warmup_steps", 0]
    before = {f"encoder.{name}": value for name, value in read_state_dict(pretrained / "encoder").items()}
    cases = {"probe": ["--linear_probe"], "half": ["--trainable_blocks", 0.5], "one": ["--trainable_blocks", 1]}
    changed = {}
    for name, words in cases.items():
        run(SCRIPT, *flags, *words, "--experiment_name", name, cwd=tmp_path)
        after = checkpoint(tmp_path / "work_dir" / name, 2)
        changed[name] = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    mlp = {f"encoder.blocks.1.mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}
    assert changed["probe"] == set() and changed["half"] == mlp
    assert changed["one"] == {key for key in before if key.startswith("encoder.blocks.1.")}
    head = checkpoint(tmp_path / "work_dir" / "probe", 2)
    assert head["head_norm.running_mean"].abs().sum() > 0 and metrics_of(tmp_path / "work_dir" / "probe")["top5"] == 100


def test_the_blogs_command_runs_unchanged(image_folder, pretrained, tmp_path):
    """All flags of the scripts that users have, but for sizes that take hours."""
    words = f"""--experiment_name ft --wandb_run_name first --path_to_data {image_folder} --working_directory runs
        {WEIGHTS} {pretrained} --num_classes 2 --epochs 1 --warmup_epochs 0 --save_checkpoint_interval 1
        --per_gpu_batch_size 16 --gradient_accumulation_steps 2 --learning_rate 0.001 --weight_decay 0.05
        --random_aug_magnitude 9 --mixup_alpha 0.8 --cutmix_alpha 1.0 --label_smoothing 0.1 --custom_weight_init
        --bias_weight_decay --norm_weight_decay --max_grad_norm 1.0 --img_size 64 --num_workers 2 --log_wandb"""
    run(SCRIPT, *words.split(), cwd=tmp_path, WANDB_MODE="offline")
    assert metrics_of(tmp_path / "runs" / "ft")["step"] == 2
    assert json.loads((tmp_path / "runs" / "ft" / "args.json").read_text())["flags"]["img_size"] == [64, 64]


def test_from_scratch_in_grey_and_not_square(image_folder, tmp_path):
    flags = ["--path_to_data", image_folder, "--img_size", 32, 48, "--input_channels", 1, "--max_steps", 2]
    flags += [
        *TINY[4:6],
        *TINY[8:14],
        "--patch_size",
        8,
        "--num_workers",
        0,
        "--pooling",
        "cls",
        "--per_gpu_batch_size",
        8,
    ]
    run(SCRIPT, *flags, cwd=tmp_path)
    flags = json.loads((tmp_path / "work_dir" / "finetune_classifier" / "args.json").read_text())["flags"]
    assert flags["weight_decay"] == 0.3 and flags["betas"] == [0.9, 0.95] and flags["layer_decay"] == 1


def test_real_photographs(real_images, pretrained, tmp_path):
    flags = ["--path_to_data", real_images / "cifar10", WEIGHTS, pretrained / "encoder", *SMALL, "--max_steps", 2]
    run(SCRIPT, *flags, cwd=tmp_path)
    assert len(metrics_of(tmp_path / "work_dir" / "finetune_classifier")["per_class_accuracy"]) == 10


def test_flags_that_contradict_each_other_are_refused_together(image_folder, pretrained, tmp_path):
    given = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--per_gpu_batch_size", 6, "--micro_batch_size", 3]
    errors = refusal(
        *given, "--linear_probe", "--mixup_alpha", 0.8, "--drop_path", 0.1, "--layer_decay", 0.75, cwd=tmp_path
    )
    (error,) = [error for error in errors if "--linear_probe" in error]
    assert all(word in error for word in ("--mixup_alpha 0.8", "--drop_path 0.1", "--layer_decay 0.75"))
    errors = refusal(*given, "--trainable_blocks", 3, "--num_classes", 7, "--input_channels", 1, cwd=tmp_path)
    for words in (
        ("--trainable_blocks 3 ", "at most 2"),
        ("--num_classes 7 ", "which has 2"),
        ("micro-batch of 3 is odd", "--mixup_alpha"),
        ("3 input channels, the model 1", "--adapt_channels"),
    ):
        assert any(all(word in error for word in words) for error in errors), (words, errors)
    assert len(errors) == 4


def test_flags_without_what_they_need():
    def errors(*words):
        return finetune_classifier.parse_args(["--path_to_data", "x", *words])[1]

    assert not errors() and not errors(WEIGHTS, "y", "--linear_probe")
    for name in ("--linear_probe", "--adapt_channels", "--eval_only"):
        assert any(f"{name} needs trained weights; give {WEIGHTS}" in error for error in errors(name))
    assert "is not 0.5 nor whole" in errors(WEIGHTS, "y", "--trainable_blocks", "1.5")[0]
    assert (
        "leave --resume_from_checkpoint out"
        in errors(WEIGHTS, "y", "--eval_only", "--resume_from_checkpoint", "auto")[0]
    )
    assert "--optimizer lars has no usual learning rate" in errors(WEIGHTS, "y", "--optimizer", "lars")[0]
    assert not errors(WEIGHTS, "y", "--optimizer", "lars", "--learning_rate", "1")


def test_class_folders_that_do_not_fit(image_folder, undisturbed, tmp_path):
    write_images(tmp_path / "differ" / "train", 8, classes=3)
    write_images(tmp_path / "differ" / "val", 8, classes=2)
    (tmp_path / "differ" / "val" / "class_1").rename(tmp_path / "differ" / "val" / "other")
    errors = refusal("--path_to_data", tmp_path / "differ", "--per_gpu_batch_size", 4, cwd=tmp_path)
    assert any("2 classes in train/ that val/ lacks (class_1, class_2)" in error for error in errors)
    assert any("1 classes in val/ that train/ lacks (other)" in error for error in errors)
    write_images(tmp_path / "one" / "train", 8, classes=1)
    write_images(tmp_path / "one" / "val", 2, classes=1)
    assert "has one class, class_0" in refusal("--path_to_data", tmp_path / "one", "--max_steps", 1, cwd=tmp_path)[0]
    write_images(tmp_path / "none", 8)
    assert "no val/ beside train/" in refusal("--path_to_data", tmp_path / "none", "--max_steps", 1, cwd=tmp_path)[0]
    given = ["--path_to_data", tmp_path / "differ", WEIGHTS, undisturbed / "model", "--eval_only"]
    (error,) = refusal(*given, cwd=tmp_path)
    assert "1 classes that the classifier does not know (other)" in error and "class_0, class_1" in error


def test_weights_that_are_none(image_folder, pretrained, tmp_path):
    save_file({"decoder.weight": torch.zeros(2, 2)}, tmp_path / "decoder.safetensors")
    for path, words in (
        (tmp_path / "missing", ("no such file or folder",)),
        (tmp_path / "decoder.safetensors", ("without an encoder", "decoder.weight")),
    ):
        (error,) = refusal("--path_to_data", image_folder, WEIGHTS, path, *SMALL, cwd=tmp_path)
        assert error.count(str(path)) == 1 and error.startswith(f"error: {WEIGHTS} ") and all(w in error for w in words)
    (error,) = refusal("--path_to_data", image_folder, WEIGHTS, pretrained, "--eval_only", cwd=tmp_path)
    assert "holds no classifier's head" in error


def test_evaluation_leaves_damaged_images_out(undisturbed, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "val" / "class_0" / "0000.jpg").write_text("no image")
    run(SCRIPT, "--path_to_data", data, WEIGHTS, undisturbed / "best", "--eval_only", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_classifier"
    per_class = metrics_of(folder)["per_class_accuracy"]
    assert round(per_class["class_0"] * 5 / 100, 6) % 1 == 0  # of 5 images now
    assert json.loads((folder / "damaged.jsonl").read_text())["path"].endswith("0000.jpg")
