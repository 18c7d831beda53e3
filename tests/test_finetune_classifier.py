"""Tests of whole runs of finetune_classifier.py, and of the errors that it prints."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from conftest import (
    ROOT,
    TINY,
    assert_equal_runs,
    flags_of,
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
    write_images,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune_classifier
from data import features
from data.batches import ClassificationBatch, ClassificationDataset, own_batches
from data.decode import PixelFormat
from data.features import encode_dataset
from data.files import FolderSource
from data.transforms import CentreCrop, build_mixing
from modeling.files import read_state_dict
from training.objectives import Classes

SCRIPT = "finetune_classifier.py"
# With the defaults, all randomness of a run is on; each step has two micro-batches
SMALL = ["--per_gpu_batch_size", 8, "--gradient_accumulation_steps", 2, "--learning_rate", 1e-3, "--num_workers", 0]
SMALL += ["--mixed_precision", "no", "--log_every", 1, "--drop_path", 0.2, "--ema_decay", 0.9]
WEIGHTS = "--path_to_pretrained_mae_weights"


@pytest.fixture(scope="session")
def pretrained(image_folder, tmp_path_factory):
    """Return the folder of a pre-training run of one step."""
    cwd = tmp_path_factory.mktemp("pretrained")
    run("pretrain_mae.py", *TINY, "--path_to_data", image_folder, "--max_steps", 1, cwd=cwd)
    return cwd / "work_dir" / "pretrain_mae"


@pytest.fixture(scope="session")
def flags(image_folder, pretrained):
    """Return flags for twelve steps, five per epoch, so that the run ends inside its third epoch."""
    return ["--path_to_data", image_folder, WEIGHTS, pretrained, *SMALL, "--max_steps", 12]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, flags):
    """Return the folder of a run that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run_cold(ROOT / SCRIPT, *flags, "--save_checkpoint_steps", 3, cwd=cwd)
    return cwd / "work_dir" / "finetune_classifier"


def test_what_a_run_leaves_behind(undisturbed):
    lines = log_of(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13)) and all(line["grad_norm"] > 0 for line in training)
    assert training[0]["learning_rate"] == 1e-3 and training[-1]["learning_rate"] == pytest.approx(1e-6)
    validations = [line for line in lines if "top1" in line]
    assert [line["step"] for line in validations] == [5, 10, 12]
    metrics = metrics_of(undisturbed)
    assert metrics["step"] == 12 and metrics["epoch"] == 2.4 and metrics["top5"] == 100 and metrics["val_loss"] > 0
    assert all(metrics[name] == validations[-1][name] for name in ("top1", "top5", "val_loss", "per_class_accuracy"))
    assert metrics["best_top1"] == max(line["top1"] for line in validations)
    per_class = metrics["per_class_accuracy"]
    assert list(per_class) == ["class_0", "class_1"]  # 6 and 5 images
    assert metrics["top1"] == pytest.approx((6 * per_class["class_0"] + 5 * per_class["class_1"]) / 11)
    flags = flags_of(undisturbed)
    assert flags["num_classes"] == 2 and flags["img_size"] == [32, 32] and flags["encoder_embed_dim"] == 32
    assert flags["layer_decay"] == 0.65 and flags["pooling"] == "mean" and flags["encoder_num_heads"] == 2
    for step in (5, 10, 12):
        with Image.open(undisturbed / "predictions" / f"step_{step:08d}.png") as picture:
            assert picture.width > 200
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["step_00000006", "step_00000009", "step_00000012"]
    assert not [name for name in os.listdir(undisturbed) if name.endswith(".replacing")]


def test_strangers_find_the_same_accuracy(undisturbed, image_folder):
    paths = sorted((image_folder / "val").rglob("*.jpg"))
    found, loss = strangers(undisturbed / "model", paths)
    expected, labels = metrics_of(undisturbed), np.array([path.parent.name for path in paths])
    assert all(100 * (names == labels).mean() == pytest.approx(expected["top1"]) for names in found)
    assert loss == pytest.approx(expected["val_loss"], abs=5e-3)  # their resizing differs a little


def test_the_exported_weights_are_the_averages(undisturbed):
    ema, exported = weights_of(undisturbed, 12, "ema.safetensors"), read_state_dict(undisturbed / "model")
    assert torch.equal(ema["head.weight"], exported["head.weight"])
    assert not torch.equal(weights_of(undisturbed, 12)["head.weight"], exported["head.weight"])


def test_kill_and_resume_with_everything_random_on(undisturbed, flags, tmp_path):
    flags = [*flags, "--save_checkpoint_steps", 3]
    folder = tmp_path / "work_dir" / "finetune_classifier"
    process = start(SCRIPT, *flags, "--num_workers", 2, cwd=tmp_path)
    wait_for(8, folder, process)
    process.kill()
    process.communicate()
    assert not (folder / "metrics.json").exists()
    run(SCRIPT, *flags, "--num_workers", 1, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 12, "ema.safetensors")
    one, other = (read_state_dict(run / "best") for run in (undisturbed, folder))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_refuses_what_would_change_the_run(undisturbed, flags, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "work_dir" / "finetune_classifier")
    changed = ["--layer_decay", 0.5, "--mixup_alpha", 0.1, "--resume_from_checkpoint", "step_00000009"]
    errors = run(SCRIPT, *flags, *changed, cwd=tmp_path, code=2).stderr
    assert (
        "--layer_decay 0.5 differs" in errors and "--mixup_alpha 0.1 differs" in errors and errors.count("error") == 2
    )


def test_two_processes_evaluate_a_probe_by_the_same_statistics(image_folder, pretrained, tmp_path):
    """Both use the BatchNorm statistics of the main process, which the checkpoint holds."""
    flags = ["--path_to_data", image_folder, WEIGHTS]
    probe = [*flags, pretrained, "--attentive_probe", "--max_steps", 4, "--global_batch_size", 8, "--num_workers", 0]
    run_two(SCRIPT, *probe, "--experiment_name", "probe", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "probe"
    run(SCRIPT, *flags, folder / "checkpoints" / "step_00000004", "--eval_only", cwd=tmp_path)
    found, expected = metrics_of(tmp_path / "work_dir" / "finetune_classifier"), metrics_of(folder)
    assert found["top1"] == expected["top1"] and found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-6)


def test_what_trains(image_folder, pretrained, tmp_path):
    """A linear probe leaves the encoder alone; 0.5 blocks train the MLP of the last block, and 1 trains all of it."""
    flags = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--max_steps", 2, "--per_gpu_batch_size", 8]
    flags += ["--num_workers", 0, "--learning_rate", 0.1, "--warmup_steps", 0]
    before = {f"encoder.{name}": value for name, value in read_state_dict(pretrained / "encoder").items()}
    cases = {"probe": ["--linear_probe"], "half": ["--trainable_blocks", 0.5], "one": ["--trainable_blocks", 1]}
    changed = {}
    run_each(SCRIPT, [[*flags, *words, "--experiment_name", name] for name, words in cases.items()], cwd=tmp_path)
    for name in cases:
        after = weights_of(tmp_path / "work_dir" / name, 2)
        changed[name] = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    mlp = {f"encoder.blocks.1.mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")}
    assert changed["probe"] == set() and changed["half"] == mlp
    assert changed["one"] == {key for key in before if key.startswith("encoder.blocks.1.")}
    head = weights_of(tmp_path / "work_dir" / "probe", 2)
    assert head["head_norm.running_mean"].abs().sum() > 0 and metrics_of(tmp_path / "work_dir" / "probe")["top5"] == 100


def test_the_blogs_command_runs_unchanged(image_folder, pretrained, tmp_path):
    """The command has all flags of the blog, with sizes that do not take hours."""
    words = f"""--experiment_name ft --wandb_run_name first --path_to_data {image_folder} --working_directory runs
        {WEIGHTS} {pretrained} --num_classes 2 --epochs 1 --warmup_epochs 0 --save_checkpoint_interval 1
        --per_gpu_batch_size 16 --gradient_accumulation_steps 2 --learning_rate 0.001 --weight_decay 0.05
        --random_aug_magnitude 9 --mixup_alpha 0.8 --cutmix_alpha 1.0 --label_smoothing 0.1 --custom_weight_init
        --bias_weight_decay --norm_weight_decay --max_grad_norm 1.0 --img_size 64 --num_workers 2 --log_wandb"""
    run(SCRIPT, *words.split(), cwd=tmp_path, WANDB_MODE="disabled")
    assert metrics_of(tmp_path / "runs" / "ft")["step"] == 2
    assert flags_of(tmp_path / "runs" / "ft")["img_size"] == [64, 64]


def test_from_scratch_in_grey_and_not_square(image_folder, tmp_path):
    flags = ["--path_to_data", image_folder, "--img_size", 32, 48, "--input_channels", 1, "--max_steps", 2]
    flags += [*TINY[2:14], "--num_workers", 0, "--pooling", "cls"]
    run(SCRIPT, *flags, cwd=tmp_path)
    flags = flags_of(tmp_path / "work_dir" / "finetune_classifier")
    assert flags["weight_decay"] == 0.3 and flags["betas"] == [0.9, 0.95] and flags["layer_decay"] == 1


def test_strangers_agree_on_real_photographs(real_images, tmp_path):
    """On photographs of all sizes, some of them grey, stock timm and transformers are right as often, up to two."""
    sizes = ["--img_size", 64, "--patch_size", 8, "--encoder_embed_dim", 64, "--encoder_depth", 2]
    flags = ["--path_to_data", real_images / "caltech101", *sizes, "--encoder_num_heads", 2, "--max_steps", 60]
    flags += ["--per_gpu_batch_size", 16, "--learning_rate", 2e-3, "--mixup_alpha", 0, "--cutmix_alpha", 0]
    flags += ["--random_aug_magnitude", 0, "--crop_scale", 0.5, 1, "--num_workers", 1, "--mean", 0.5, 0.4, 0.3]
    run(SCRIPT, *flags, "--validate_every", 0, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_classifier"
    paths = sorted((real_images / "caltech101" / "val").rglob("*.jpg"))
    found, loss = strangers(folder / "model", paths)
    expected = metrics_of(folder)
    right = round(expected["top1"] * len(paths) / 100)
    assert right > 1.5 * len(paths) / 10  # chance is one in ten
    labels = np.array([path.parent.name for path in paths])
    assert all(abs((names == labels).sum() - right) <= 2 for names in found)
    assert loss == pytest.approx(expected["val_loss"], abs=5e-3)  # their resizing differs a little


def strangers(folder, paths):
    """Return the classes that stock transformers and stock timm predict for image files, and the mean loss of timm.

    Both use the preprocessing that the folder names.
    """
    import timm
    import transformers

    pipeline = transformers.pipeline("image-classification", model=str(folder))
    answers = [each[0]["label"] for each in pipeline([str(path) for path in paths], batch_size=16)]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    of_timm = [names[number] for number in logits.argmax(dim=1).tolist()]
    return (np.array(answers), np.array(of_timm)), torch.nn.functional.cross_entropy(logits, labels).item()


def test_flags_that_contradict_each_other_are_refused_together(image_folder, pretrained, tmp_path):
    given = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--per_gpu_batch_size", 6, "--micro_batch_size", 3]
    probe = [*given, "--linear_probe", "--mixup_alpha", 0.8, "--drop_path", 0.1, "--layer_decay", 0.75]
    several = [*given, "--trainable_blocks", 3, "--num_classes", 7, "--input_channels", 1]
    alone = [*given, "--linear_probe", "--micro_batch_size", 1]
    queries = [*given, "--num_queries", 5, "--trainable_blocks", 1]
    attentive = [*given, "--attentive_probe", "--num_queries", 5, "--pooling", "cls"]
    both = [*given, "--attentive_probe", "--linear_probe"]
    refused = refusals(SCRIPT, probe, several, alone, queries, attentive, both, cwd=tmp_path)
    of_probe, of_several, of_one, of_queries, of_attentive, of_both = refused
    assert any("--num_queries 5 has no effect without --attentive_probe" in error for error in of_queries)
    assert (
        "--attentive_probe trains a head on frozen features, to which --pooling cls does not apply" in of_attentive[0]
    )
    assert any("--linear_probe and --attentive_probe contradict each other; give one" in error for error in of_both)
    assert len(of_one) == 1 and "--micro_batch_size 1 is too small" in of_one[0]
    (error,) = [error for error in of_probe if "--linear_probe" in error]
    assert all(word in error for word in ("--mixup_alpha 0.8", "--drop_path 0.1", "--layer_decay 0.75"))
    for words in (
        ("--trainable_blocks 3 ", "at most 2"),
        ("--num_classes 7 ", "which has 2"),
        ("micro-batch of 3 is odd", "--mixup_alpha"),
        ("input_channels is 3 instead of 1", "--adapt_channels"),
    ):
        assert any(all(word in error for word in words) for error in of_several), (words, of_several)
    assert len(of_several) == 4


def test_every_flag_of_training_reaches_what_it_is_for(image_folder, pretrained, tmp_path):
    """The first step is inspected instead of taken. Every value differs from its default."""
    code = """
import json, sys, finetune_classifier as script
from training import objectives
found = {}
training_batches, cross_entropy = script.training_batches, objectives.F.cross_entropy
def loader(dataset, *given, **options):
    augment = dataset.augment
    found.update(crop_scale=dataset.crop.scale, fast=dataset.crop.min_sides is not None)
    found.update(augment=augment.magnitude, fill=augment.fill)
    found["pixels"] = list(dataset.pixels)
    return training_batches(dataset, *given, **options)
def loss(logits, labels, **options):
    found.setdefault("smoothing of the loss", options.get("label_smoothing"))
    return cross_entropy(logits, labels, **options)
def step(accelerator, model, optimizer, batches, normalize, **options):
    encoder, (erase, mix) = model.encoder, options["mixing"]
    found.update({
        "drop_path": encoder.blocks[-1].drop_path.p,
        "checkpointing": encoder.gradient_checkpointing,
        "erase": [erase.probability, erase.per_pixel],
        "mix": [mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob, mix.label_smoothing, mix.num_classes],
        "betas": optimizer.param_groups[0]["betas"],
        "decays": sorted({group["weight_decay"] for group in optimizer.param_groups}),
        "scales": sorted({group["lr_scale"] for group in optimizer.param_groups}),
        "rates": sorted({group["lr"] for group in optimizer.param_groups}),
        "clipping": options["max_grad_norm"],
        "mean": normalize.mean.flatten().tolist(),
        "std": normalize.std.flatten().tolist(),
    })
    optimizer_step(accelerator, model, optimizer, batches, normalize, **options)
    print(json.dumps(found))
    raise SystemExit(0)
script.training_batches, objectives.F.cross_entropy = loader, loss
optimizer_step, script.optimizer_step = script.optimizer_step, step
script.main(sys.argv[1:])
"""
    words = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--per_gpu_batch_size", 8, "--num_workers", 0]
    words += ["--max_steps", 12, "--warmup_steps", 0, "--learning_rate", 0.5, "--mixed_precision", "no"]
    words += ["--layer_decay", 0.5, "--weight_decay", 0.03, "--betas", 0.6, 0.7, "--drop_path", 0.3]
    words += ["--random_erase", 0.4, "--mixup_alpha", 0.9, "--cutmix_alpha", 1.1, "--mixup_probability", 0.95]
    words += ["--mixup_switch", 0.35, "--label_smoothing", 0.15, "--crop_scale", 0.2, 0.8, "--random_aug_magnitude", 7]
    words += ["--max_grad_norm", 2.5, "--gradient_checkpointing", "--mean", 0.1, 0.2, 0.3, "--std", 0.7, 0.8, 0.9]
    words += ["--fast_decoding", "--nodata", 7, "--max_pixels", 90_000]
    done = run_code(code, *words, cwd=tmp_path)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "fast": True,
        "pixels": [3, None, 7, 90_000, None],
        "crop_scale": [0.2, 0.8],
        "augment": 7,
        "fill": [26, 51, 76],  # 255 times the mean
        "smoothing of the loss": 0.0,  # mixing smooths the labels instead
        "drop_path": 0.3,
        "checkpointing": True,
        "erase": [0.4, True],
        "mix": [0.9, 1.1, 0.95, 0.35, 0.15, 2],
        "betas": [0.6, 0.7],
        "decays": [0.0, 0.03],
        "scales": [0.125, 0.25, 0.5, 1.0],
        "rates": [0.0625, 0.125, 0.25, 0.5],
        "clipping": 2.5,
        "mean": pytest.approx([0.1, 0.2, 0.3]),
        "std": pytest.approx([0.7, 0.8, 0.9]),
    }


def test_labels_are_smoothed_without_mixing_too():
    """Compare the loss of a step of two micro-batches with the definition (Szegedy et al. 2016, section 7)."""
    mixing = build_mixing(0.0, device=torch.device("cpu"), mixup_alpha=0.0, cutmix_alpha=0.0)
    assert mixing[1] is None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 3, 4, 1])
    batches = [ClassificationBatch(images[k : k + 2], labels[k : k + 2], [k, k + 1], []) for k in (0, 2)]
    targets = 0.9 * torch.eye(5)[labels] + 0.1 / 5
    expected = -(targets * model(images).log_softmax(dim=1)).sum(dim=1).mean()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    given = (accelerator, model, optimizer, iter(enumerate(batches)), lambda x: x)
    loss_of = Classes("abcde", label_smoothing=0.1).loss
    loss, _, damaged = finetune_classifier.optimizer_step(*given, mixing=mixing, loss_of=loss_of, max_grad_norm=0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and damaged == []


def test_the_help_tells_the_defaults_of_every_kind(capsys):
    with pytest.raises(SystemExit):
        finetune_classifier.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    larger = "ViT-L fine-tuning, ViT-H fine-tuning, ViT-L linear probe, ViT-H linear probe: 50; "
    larger += "ViT-L from scratch, ViT-H from scratch: 200"
    probes = "linear probe, attentive probe"
    assert f"(default fine-tuning: 100; {probes}: 90; from scratch: 300; {larger})" in text
    assert f"(default fine-tuning, from scratch: 1; {probes}: 0)" in text
    assert f"(default fine-tuning, {probes}: 0.9 0.999; from scratch: 0.9 0.95)" in text


def test_weights_of_every_layout_with_their_own_sizes(image_folder, pretrained, tmp_path):
    """Weights of this project, the official MAE, timm and transformers can be fine-tuned, also on grey images."""
    import timm
    from transformers import ViTConfig, ViTForImageClassification

    state = read_state_dict(pretrained / "encoder")
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": {**state, **decoder}}, tmp_path / "official.pth")
    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=sizes)
    names = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    ViTForImageClassification(ViTConfig(**names, intermediate_size=128)).save_pretrained(tmp_path / "transformers")
    shared = ["--path_to_data", image_folder, *SMALL, "--max_steps", 1]
    cases = {
        "encoder": [pretrained / "encoder"],
        "checkpoint": [pretrained / "checkpoints" / "step_00000001"],
        "official": [tmp_path / "official.pth", "--encoder_num_heads", 2],
        "timm": [tmp_path / "timm"],
        "transformers": [tmp_path / "transformers"],
        "grey": [pretrained, "--input_channels", 1, "--adapt_channels", "--mean", 0.45, "--std", 0.23],
    }
    starts = [[*shared, "--experiment_name", name, WEIGHTS, *words] for name, words in cases.items()]
    run_each(SCRIPT, starts, cwd=tmp_path)
    for name in cases:
        flags = flags_of(tmp_path / "work_dir" / name)
        assert flags["img_size"] == [32, 32] and flags["encoder_depth"] == 2 and flags["encoder_num_heads"] == 2
    assert flags_of(tmp_path / "work_dir" / "timm")["mean"] == [0.5, 0.5, 0.5]


def resume_probe(*flags, cwd):
    """Run a probe with averaged weights, resume it from step 3, compare the two, and return the run's folder."""
    flags = [*flags, "--num_workers", 0, "--per_gpu_batch_size", 8, "--micro_batch_size", 4, "--max_steps", 8]
    flags += ["--ema_decay", 0.8]
    flags += ["--save_checkpoint_steps", 3, "--log_every", 1, "--mixed_precision", "no", "--learning_rate", 0.5]
    run_each(SCRIPT, [flags], cwd=cwd)
    folder = cwd / "work_dir" / "finetune_classifier"
    before = shutil.copytree(folder, cwd / "before")
    run_each(SCRIPT, [[*flags, "--resume_from_checkpoint", "step_00000003"]], cwd=cwd)
    assert_equal_runs(before, folder, 8, "ema.safetensors")
    return folder


def test_a_linear_probe_resumes_exactly(image_folder, pretrained, tmp_path):
    """The probe has LARS, BatchNorm statistics, averaged weights and micro-batches."""
    flags = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--linear_probe"]
    folder = resume_probe(*flags, cwd=tmp_path)
    ema, last = weights_of(folder, 8, "ema.safetensors"), weights_of(folder, 8)
    assert torch.equal(ema["head_norm.running_var"], last["head_norm.running_var"])  # statistics are not averaged
    assert not torch.equal(ema["head.weight"], last["head.weight"])


def test_an_attentive_probe_from_training_to_its_card(image_folder, pretrained, tmp_path):
    """It resumes exactly, leaves the encoder unchanged, scores the same again, and gets attention maps and a card."""
    flags = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--attentive_probe", "--num_queries", 4]
    folder = resume_probe(*flags, cwd=tmp_path)
    start, last = load_file(pretrained / "encoder" / "model.safetensors"), weights_of(folder, 8)
    assert all(torch.equal(last[f"encoder.{name}"], value) for name, value in start.items())
    assert last["attentive_pool.queries"].shape == (1, 4, 32) and flags_of(folder)["num_queries"] == 4

    measured = json.loads((folder / "metrics.json").read_text())
    again = ["--path_to_data", image_folder, WEIGHTS, folder / "model", "--eval_only", "--experiment_name", "again"]
    run_each(SCRIPT, [[*again, "--num_workers", 0]], cwd=tmp_path)
    assert json.loads((tmp_path / "work_dir/again/metrics.json").read_text())["top1"] == measured["top1"]
    run("predict.py", folder, image_folder / "val", "--num_workers", 0, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions/predictions.jsonl").read_text().splitlines()]
    assert all(Image.open(tmp_path / "predictions" / line["attention"]).size[0] > 32 for line in lines)
    run("push_to_hub.py", folder, cwd=tmp_path)
    card = (folder / "hub" / "README.md").read_text()
    assert "attentive pooling and a linear head on a frozen encoder" in card and "timm" not in card.partition("# ")[0]
    assert 'subfolder="encoder"' in card and "pipeline(" not in card


@pytest.mark.slow
def test_all_measures_of_an_encoder_in_one_table(image_folder, pretrained, tmp_path):
    words = ["bash", "recipes/evaluate.sh", pretrained, image_folder, tmp_path / "out", "--max_steps", 4]
    words += ["--per_gpu_batch_size", 8, "--learning_rate", 0.001, "--num_workers", 0, "--optimizer", "adamw"]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    for _ in range(2):  # the second call has nothing to do
        done = subprocess.run(
            [*map(str, words)], cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    ours = table["this encoder"]
    for name in ("linear", "attentive", "fine-tuning"):
        assert ours[name] == metrics_of(tmp_path / "out" / name)["top1"]
    assert 0 <= ours["k-NN"] <= 100 and 1 <= table["rankme"] <= 32
    assert "| MAE ViT-B on ImageNet, published |  | 67.8 | 75.5 | 83.6 |" in done.stdout


def test_evaluation_on_some_of_the_classes(tmp_path):
    """A classifier of ten ImageNet classes, named by WordNet ids, is evaluated on three in folders named by words."""
    ids = [f"n0{number}" for number in (1440764, 1443537, 1484850, 1491361, 1494475, 1496331, 1498041)]
    ids += ["n01514668", "n01514859", "n01518878"]
    data = write_images(tmp_path / "data" / "train", 10, classes=10).parent
    shutil.copytree(data / "train", data / "val")
    for part in ("train", "val"):
        for number, name in enumerate(ids):
            (data / part / f"class_{number}").rename(data / part / name)
    run(SCRIPT, *TINY[:14], "--path_to_data", data, "--max_steps", 4, "--num_workers", 0, cwd=tmp_path)
    some = write_images(tmp_path / "some", 30, classes=3, seed=1)
    for number, name in enumerate(("goldfish", "cock", "great_white_shark")):  # names of one word and of several
        (some / f"class_{number}").rename(some / name)
    trained = tmp_path / "work_dir" / "finetune_classifier" / "model"
    words = ["--path_to_data", some, WEIGHTS, trained, "--eval_only", "--experiment_name", "some", "--num_workers", 0]
    printed = run(SCRIPT, *words, cwd=tmp_path).stdout
    metrics = metrics_of(tmp_path / "work_dir" / "some")

    run("predict.py", trained, some, "--top_k", 10, "--num_workers", 0, cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "predictions/predictions.jsonl").read_text().splitlines()]
    probabilities = np.array(
        [[{c["class"]: c["probability"] for c in line["classes"]}[i] for i in ids] for line in lines]
    )
    folders = [line["image"].split("/")[-2] for line in lines]
    labels = np.array([{"goldfish": 1, "cock": 7, "great_white_shark": 2}[name] for name in folders])
    chosen = np.array([1, 2, 7])
    expected = 100 * (chosen[probabilities[:, chosen].argmax(axis=1)] == labels).mean()
    assert metrics["subset_top1"] == pytest.approx(expected)
    assert metrics["top1"] == pytest.approx(100 * (probabilities.argmax(axis=1) == labels).mean())
    assert f"among the data's classes: {expected:.2f} %)" in printed


def test_evaluating_never_touches_the_weights_it_measures(undisturbed, image_folder, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "work_dir" / "finetune_classifier")
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.json").unlink()
    given = ["--path_to_data", image_folder, WEIGHTS, folder / "best", "--per_gpu_batch_size", 8]
    for errors in refusals(SCRIPT, [*given, "--eval_only"], given, cwd=tmp_path):
        assert len(errors) == 1 and "which this run would write to; give another --experiment_name" in errors[0]
    assert (folder / "best" / "model.safetensors").exists()


def test_held_out_images_that_cannot_be_read(image_folder, pretrained, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    for path in (data / "val").rglob("*.jpg"):
        path.write_text("no image") if path.stem in ("0000", "0001") else path.unlink()
    flags = ["--path_to_data", data, WEIGHTS, pretrained, *SMALL, "--max_steps", 1]
    done = run(SCRIPT, *flags, cwd=tmp_path, code=1)
    assert "error: none of the 2 validation images can be read" in done.stderr and "Traceback" not in done.stderr
    assert len((tmp_path / "work_dir/finetune_classifier/damaged.jsonl").read_text().splitlines()) == 2


def test_flags_without_what_they_need():
    def errors(*words):
        return finetune_classifier.parse_args(["--path_to_data", "x", *words])[1]

    assert not errors() and not errors(WEIGHTS, "y", "--linear_probe")
    for name in ("--linear_probe", "--attentive_probe", "--adapt_channels", "--eval_only"):
        assert any(f"{name} needs trained weights; give {WEIGHTS}" in error for error in errors(name))
    assert "is not valid; expected 0.5 or a whole number" in errors(WEIGHTS, "y", "--trainable_blocks", "1.5")[0]
    assert f"{WEIGHTS} is empty" in errors(WEIGHTS, "")[0]
    refused = errors(WEIGHTS, "y", "--eval_only", "--resume_from_checkpoint", "auto")[0]
    assert "--resume_from_checkpoint does not go with --eval_only" in refused
    assert "--optimizer lars has no default learning rate" in errors(WEIGHTS, "y", "--optimizer", "lars")[0]
    assert not errors(WEIGHTS, "y", "--optimizer", "lars", "--learning_rate", "1")


def test_class_folders_that_do_not_fit(undisturbed, tmp_path):
    write_images(tmp_path / "train", 8, classes=3)
    write_images(tmp_path / "val", 8, classes=2)
    (tmp_path / "val" / "class_1").rename(tmp_path / "val" / "other")
    data = ["--path_to_data", tmp_path, "--per_gpu_batch_size", 4]
    known = [WEIGHTS, undisturbed / "checkpoints" / "step_00000012", "--eval_only"]
    (differ,), (unknown,) = refusals(SCRIPT, data, [*data[:2], *known], cwd=tmp_path)
    assert "has classes in val that train lacks (other)" in differ
    assert "classes that the classifier does not know (other)" in unknown and "class_0, class_1" in unknown


def test_weights_that_are_none(image_folder, pretrained, tmp_path):
    save_file({"decoder.weight": torch.zeros(2, 2)}, tmp_path / "decoder.safetensors")
    given = ["--path_to_data", image_folder, *SMALL, WEIGHTS]
    missing, decoder = tmp_path / "missing", tmp_path / "decoder.safetensors"
    found = refusals(SCRIPT, [*given, missing], [*given, decoder], [*given, pretrained, "--eval_only"], cwd=tmp_path)
    assert all(len(errors) == 1 and errors[0].startswith("error: ") for errors in found), found
    assert "no such file or folder" in found[0][0] and found[0][0].count(str(missing)) == 1
    assert "without an encoder" in found[1][0] and found[1][0].count(str(decoder)) == 1
    assert "holds no classifier;" in found[2][0]


def test_evaluation_leaves_damaged_images_out(undisturbed, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "val" / "class_0" / "0000.jpg").write_text("no image")
    run(SCRIPT, "--path_to_data", data, WEIGHTS, undisturbed / "best", "--eval_only", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_classifier"
    per_class = metrics_of(folder)["per_class_accuracy"]
    assert round(per_class["class_0"] * 5 / 100, 6) % 1 == 0  # 5 images are left
    assert json.loads((folder / "damaged.jsonl").read_text())["path"].endswith("0000.jpg")


@pytest.mark.parametrize("name", ["tar", "parquet"])  # test_sources.py compares the samples of all sources
def test_every_source_trains_and_measures_the_same_classifier(name, flags, undisturbed, every_source, tmp_path):
    run(SCRIPT, *flags, *every_source[name], "--save_checkpoint_steps", 3, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_classifier"
    assert losses_of(folder) == losses_of(undisturbed)
    times = ("seconds", "images_per_second")
    one, other = ({k: v for k, v in metrics_of(run).items() if k not in times} for run in (folder, undisturbed))
    assert one == other and "per_class_accuracy" in one


def test_the_size_of_the_weights_chooses_the_recipe(image_folder, pretrained, tmp_path):
    """The small encoder stands for ViT-L and ViT-H. Flags override the recipe, and a resumed run keeps its recipe."""
    code = """
import sys
from finetune_classifier import main
from training import recipes
from training.run import Run
recipes.NAMES = {{(32, 2): {!r}}}
if "--dry_run" in sys.argv:  # the plan is all that is looked at
    Run.prepare = lambda *_, **__: sys.exit(0)
main(sys.argv[1:])
"""
    words = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--per_gpu_batch_size", 8, "--num_workers", 0]
    words += ["--mixed_precision", "no", "--layer_decay", 0.7]
    start = [*words, "--dry_run"]
    large = run_code(code.format("ViT-L"), *start, cwd=tmp_path).stdout
    assert "recipe     ViT-L fine-tuning: adamw, weight decay 0.05, layer decay 0.7, drop path 0.2" in large
    assert "steps      250, 5 per epoch, 25 warmup" in large and f"peak {1e-3 * 8 / 256:.3g}," in large
    probe = run_code(code.format("ViT-H"), *words[:-2], "--linear_probe", "--dry_run", cwd=tmp_path).stdout
    assert "recipe     ViT-H linear probe: lars" in probe and "steps      250, 5 per epoch, 50 warmup" in probe
    short = [*words, "--max_steps", 20, "--save_checkpoint_steps", 5]
    run_code(code.format("ViT-L"), *short, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "finetune_classifier"
    assert flags_of(folder)["warmup_steps"] == 2 and flags_of(folder)["epochs"] == 50
    resumed = [*short, "--resume_from_checkpoint", "step_00000015"]
    assert "layer decay 0.7, drop path 0.2" in run(SCRIPT, *resumed, cwd=tmp_path).stdout  # a new run would use ViT-B's
    assert flags_of(folder)["epochs"] == 50


def test_images_without_a_label_and_classes_without_held_out_images(tmp_path):
    """Both occur in lists that are labelled in part. Pre-training reads all of their images."""
    write_images(tmp_path, 24, classes=3)
    for name, classes in (("train", "012"), ("val", "01")):
        lines = [f"class_{int(n)}/{i:04d}.jpg,{n}\n" for n in classes for i in range(int(n), 24, 3)]
        lines[::6] = [line.replace(line[-2:], ["-1\n", "\n"][i % 2]) for i, line in enumerate(lines[::6])]
        (tmp_path / f"{name}.csv").write_text("path,label\n" + "".join(lines))
    data = ["--path_to_data", "train.csv", "--path_to_validation_data", "val.csv", "--max_steps", 1]
    small = [*TINY[:6], *TINY[8:14], "--per_gpu_batch_size", 8, "--num_workers", 0]
    (errors,) = refusals(SCRIPT, [*small, *data], cwd=tmp_path)
    assert [error.partition(" without a class")[0] for error in errors] == [
        "error: --path_to_data train.csv has 4 of 24 images in train",
        "error: --path_to_data train.csv has 3 of 16 images in val",
    ]
    end = run(SCRIPT, *small, *data, "--drop_unlabelled", cwd=tmp_path)
    assert "left out   4 images without a label\nleft out   3 images without a label\n" in end.stdout
    assert "unmeasured 1 of 3 classes, without validation images: 2\n" in end.stdout
    weights = ["--path_to_pretrained_mae_weights", "work_dir/finetune_classifier", "--experiment_name", "scores"]
    end = run(SCRIPT, "--path_to_data", "val.csv", *weights, "--eval_only", "--drop_unlabelled", cwd=tmp_path)
    assert "left out   3 images without a label\n" in end.stdout
    scores = metrics_of(tmp_path / "work_dir" / "finetune_classifier")["per_class_accuracy"]
    assert list(scores) == ["0", "1", "2"] and scores["2"] is None and None not in (scores["0"], scores["1"])
    end = run("pretrain_mae.py", *TINY, *data, "--knn_every", 1, cwd=tmp_path)
    assert "24 images" in end.stdout and "16 for validation" in end.stdout and "nearest neighbours" in end.stdout


@pytest.fixture(scope="session")
def tables(image_folder, tmp_path_factory):
    """Write lists of the images with columns of labels and of numbers, and return the flags that name the lists."""
    folder, rng = tmp_path_factory.mktemp("tables"), np.random.default_rng(0)
    for split in ("train", "val"):
        rows = ["path,red,odd,size,depth"]
        for number, path in enumerate(sorted((image_folder / split).rglob("*.*"))):
            red = np.asarray(Image.open(path).convert("RGB"))[..., 0].mean()
            rows.append(f"{path},{int(red > 120)},{number % 2},{5e6 + red},{rng.normal():.3f}")
        (folder / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return ["--path_to_data", folder / "train.csv", "--path_to_validation_data", folder / "val.csv"]


LABELS = ["--target", "labels", "--label_columns", "red", "odd"]
NUMBERS = ["--target", "numbers", "--label_columns", "size", "depth"]


@pytest.mark.parametrize("target", [LABELS, NUMBERS], ids=["labels", "numbers"])
def test_other_targets_than_classes(tables, pretrained, tmp_path, target):
    """A killed run resumes exactly. Its model scores the same in one and two processes, and transformers agrees."""
    flags = [*tables, *target, WEIGHTS, pretrained, "--per_gpu_batch_size", 8, "--num_workers", 0, "--max_steps", 8]
    flags += ["--log_every", 1, "--learning_rate", 1e-3, "--positive_weights", "balanced"]
    flags = flags if target is LABELS else [*flags[:-2], "--regression_loss", "huber"]
    run(SCRIPT, *flags, "--experiment_name", "whole", cwd=tmp_path)
    whole, part = tmp_path / "work_dir" / "whole", tmp_path / "work_dir" / "part"
    process = start(SCRIPT, *flags, "--experiment_name", "part", "--save_checkpoint_steps", 3, cwd=tmp_path)
    wait_for(4, part, process)
    process.kill()
    process.communicate()
    run(SCRIPT, *flags, "--experiment_name", "part", "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(whole, part, 8)
    assert flags_of(whole)["label_smoothing"] == 0
    assert flags_of(whole)["mixup_alpha"] == (0.8 if target is LABELS else 0)

    again = [*tables, WEIGHTS, whole / "model", "--eval_only", "--num_workers", 0]
    again += [] if target is LABELS else ["--regression_loss", "huber"]
    run(SCRIPT, *again, "--experiment_name", "one", cwd=tmp_path)
    run_two(SCRIPT, *again, "--experiment_name", "two", cwd=tmp_path)
    expected = json.loads((whole / "metrics.json").read_text())
    keys = [key for key in expected if key.startswith(("mean_", "per_"))]
    assert len(keys) == (6 if target is LABELS else 4)
    for name in ("one", "two"):
        found = json.loads((tmp_path / "work_dir" / name / "metrics.json").read_text())
        for key in keys:
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-3)
        assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)

    image = tables[3].read_text().splitlines()[1].partition(",")[0]
    run("predict.py", whole, image, "--num_workers", 0, cwd=tmp_path)
    line = json.loads((tmp_path / "predictions" / "predictions.jsonl").read_text())
    answers = transformers.pipeline("image-classification", model=str(whole / "model"))(image)
    theirs = {answer["label"]: answer["score"] for answer in answers}
    ours = line.get("numbers") or {entry["label"]: entry["probability"] for entry in line["labels"]}
    assert theirs == {name: pytest.approx(value, rel=0.02) for name, value in ours.items()}  # their resizing differs
    run("push_to_hub.py", whole / "checkpoints" / "step_00000008", "--output", tmp_path / "pushed", cwd=tmp_path)
    run("push_to_hub.py", whole, "--checkpoint", "best", cwd=tmp_path)
    card = (whole / "hub" / "README.md").read_text()
    kind, metric = ("multi-label image classifier", "roc_auc") if target is LABELS else ("regression", "r_squared")
    assert kind in card and metric in card


@pytest.mark.parametrize("target", [LABELS, NUMBERS], ids=["labels", "numbers"])
def test_two_processes_learn_other_targets_as_one(tables, pretrained, tmp_path, target):
    flags = [*tables, *target, WEIGHTS, pretrained, "--global_batch_size", 16, "--num_workers", 0, "--max_steps", 6]
    flags += [
        "--log_every",
        1,
        "--learning_rate",
        1e-3,
        "--drop_path",
        0,
        "--random_erase",
        0,
        "--mixed_precision",
        "no",
    ]
    flags += ["--mixup_alpha", 0, "--cutmix_alpha", 0] if target is LABELS else []
    run(SCRIPT, *flags, "--experiment_name", "one", cwd=tmp_path)
    run_two(SCRIPT, *flags, "--experiment_name", "two", cwd=tmp_path)
    one, two = tmp_path / "work_dir" / "one", tmp_path / "work_dir" / "two"
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    best = "mean_ap" if target is LABELS else "mean_r2"
    assert metrics_of(two)[best] == pytest.approx(metrics_of(one)[best], rel=1e-3)


def test_targets_that_do_not_fit_are_refused(tables, image_folder, pretrained, tmp_path):
    given = [WEIGHTS, pretrained, "--num_workers", 0]
    mixed = [*tables, *NUMBERS, *given, "--cutmix_alpha", 1, "--positive_weights", "balanced"]
    alone = [*tables, *given, "--label_columns", "red"]
    folder = ["--path_to_data", image_folder, *NUMBERS, *given]
    of_mixed, of_alone, of_folder = refusals(SCRIPT, mixed, alone, folder, cwd=tmp_path)
    assert any("--cutmix_alpha has no meaning for --target numbers" in error for error in of_mixed)
    assert any("--positive_weights has no meaning for --target numbers" in error for error in of_mixed)
    assert any("--label_columns has no meaning for --target classes" in error for error in of_alone)
    assert any("has no columns, from which --target numbers is read" in error for error in of_folder)


@pytest.mark.parametrize("probe", [["--linear_probe"], ["--linear_probe", "--pooling", "mean"], ["--attentive_probe"]])
def test_features_are_computed_once(image_folder, pretrained, tmp_path, probe):
    """A killed run resumes exactly, and a model scores the same on images as on cached features."""
    flags = [WEIGHTS, pretrained, *probe, "--cache_features", "--optimizer", "adamw", "--learning_rate", 1e-2]
    flags += ["--path_to_data", image_folder, "--per_gpu_batch_size", 8, "--max_steps", 12, "--log_every", 1]
    flags += ["--save_checkpoint_steps", 3, "--num_workers", 0, "--mixed_precision", "no"]
    run(SCRIPT, *flags, "--experiment_name", "whole", cwd=tmp_path)
    whole, part = tmp_path / "work_dir" / "whole", tmp_path / "work_dir" / "part"
    process = start(SCRIPT, *flags, "--experiment_name", "part", cwd=tmp_path)
    wait_for(4, part, process)
    process.kill()
    process.communicate()
    run(SCRIPT, *flags, "--experiment_name", "part", "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(whole, part, 12)
    again = ["--path_to_data", image_folder, WEIGHTS, whole / "model", "--eval_only", "--num_workers", 0]
    run(SCRIPT, *again, cwd=tmp_path)
    measured, again = metrics_of(whole), metrics_of(tmp_path / "work_dir" / "finetune_classifier")
    assert again["top1"] == measured["top1"] and again["val_loss"] == pytest.approx(measured["val_loss"], abs=1e-5)
    run(SCRIPT, *flags, "--experiment_name", "dry", "--dry_run", cwd=tmp_path)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_encoded_data_sets(image_folder, tmp_path, num_processes, monkeypatch):
    """All processes get all features and labels. A damaged image is reported and gets those of the next image."""
    monkeypatch.setattr(features, "CHUNK", 4)
    source = FolderSource(shutil.copytree(image_folder / "train", tmp_path / "images"))
    path = Path(source.name(2))
    path.write_bytes(path.read_bytes()[:40])
    options = dict(crop=CentreCrop((16, 16)), pixels=PixelFormat(3), seed=0)
    dataset = ClassificationDataset(source, np.arange(len(source)), **options)
    barrier, lists = Barrier(num_processes), [None] * num_processes

    def encode_share(rank):
        def gather(own):
            lists[rank] = own
            barrier.wait()
            joined = [item for part in lists for item in part]
            barrier.wait()
            return joined

        place = dict(process_index=rank, num_processes=num_processes)
        read = partial(own_batches, batch_size=8, num_workers=0, watch=iter, **place)
        shared = dict(read=read, gather=gather, share=slice(rank, None, num_processes))
        return encode_dataset(dataset, lambda images: images.float().mean(dim=(2, 3))[:, None], (1, 3), **shared)

    with ThreadPoolExecutor(num_processes) as pool:
        encoded = list(pool.map(encode_share, range(num_processes)))
    expected = dataset.__getitems__([(0, index if index != 2 else 3) for index in range(len(source))])
    for each in encoded:
        batch = each.__getitems__([(5, index) for index in range(len(source))])
        assert torch.equal(batch.images, expected.images.float().mean(dim=(2, 3))[:, None])
        assert batch.labels.tolist() == [0, 1, 3, *range(3, len(source))]
        assert [index for index, _ in batch.damaged] == [2] and batch.indices == list(range(len(source)))


def test_cached_features_have_no_augmentation(image_folder, pretrained, tmp_path):
    flags = ["--path_to_data", image_folder, WEIGHTS, pretrained, "--cache_features", "--random_erase", 0.1]
    (errors,) = refusals(SCRIPT, flags, cwd=tmp_path)
    assert any(
        "--cache_features has no augmentation, so --random_erase 0.1 does not apply" in error for error in errors
    )
    assert any("--cache_features needs a frozen encoder; add --linear_probe" in error for error in errors)
