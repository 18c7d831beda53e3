"""Tests of whole runs of the scripts, started as users start them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    TWO_PROCESSES,
    assert_equal_runs,
    dry_run,
    environment,
    finish_several,
    flags_of,
    launch,
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
    start_several,
    steps_in,
    wait_for,
    weights_of,
    write_images,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import PixioConfig, PixioModel

SCRIPT = "pretrain_mae.py"


@pytest.fixture(scope="session")
def flags(image_folder):
    """Return flags for 40 images in batches of 8, five steps per epoch, with an end inside the fifth epoch."""
    return [*TINY, "--path_to_data", image_folder, "--max_steps", 23, "--validate_every", 2, "--drop_path", 0.2]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, flags):
    """Return the folder of an uninterrupted run of 23 steps with drop path and gradient accumulation."""
    cwd = tmp_path_factory.mktemp("undisturbed")
    run(SCRIPT, *flags, "--gradient_accumulation_steps", 2, "--save_checkpoint_steps", 4, cwd=cwd)
    return cwd / "work_dir" / "pretrain_mae"


def test_what_a_run_leaves_behind(undisturbed):
    assert sorted(os.listdir(undisturbed / "checkpoints")) == ["step_00000016", "step_00000020", "step_00000023"]
    lines = log_of(undisturbed)
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 24))
    assert training[9]["epoch"] == 2 and training[0]["learning_rate"] == 0 and training[1]["learning_rate"] == 1e-3
    assert all(line["grad_norm"] > 0 and 0 <= line["data_wait"] <= 1 for line in training)
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 23]
    metrics = metrics_of(undisturbed)
    assert metrics["step"] == 23 and metrics["uses_true_patch_statistics"] is True
    assert metrics["val_loss"] == lines[-1]["val_loss"] and metrics["masked_psnr"] > 0
    saved = json.loads((undisturbed / "args.json").read_text())
    assert saved["flags"]["global_batch_size"] == 8 and saved["flags"]["img_size"] == [32, 32]
    assert saved["versions"]["torch"] == torch.__version__
    with Image.open(undisturbed / "reconstructions" / "step_00000023.png") as picture:
        assert picture.width > 4 * 100


def test_the_result_loads_in_timm_and_transformers(undisturbed):
    import timm
    from transformers import AutoModel, ViTMAEForPreTraining

    encoder = undisturbed / "encoder"
    images = torch.randn(2, 3, 32, 32)
    theirs = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval().forward_features(images)
    model, loading = AutoModel.from_pretrained(encoder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    torch.testing.assert_close(model.eval()(images).last_hidden_state, theirs, atol=1e-5, rtol=0)
    _, loading = ViTMAEForPreTraining.from_pretrained(encoder, subfolder="pretraining", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_sigterm_saves_and_exits_0_and_the_rest_is_the_same(undisturbed, flags, tmp_path):
    flags = [*flags, "--gradient_accumulation_steps", 2, "--save_checkpoint_interval", 0, "--num_workers", 1]
    folder = tmp_path / "work_dir" / "pretrain_mae"
    process = start(SCRIPT, *flags, cwd=tmp_path)
    wait_for(7, folder, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert 7 <= step < 23 and f"stopped by SIGTERM after step {step}" in out + err
    again = run(SCRIPT, *flags, cwd=tmp_path, code=2)  # without the flag, an existing run is an error
    assert "already holds a run" in again.stderr and "--resume_from_checkpoint latest" in again.stderr
    run(SCRIPT, *flags, "--resume_from_checkpoint", checkpoint.name, cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 23)


def test_resume_refuses_what_would_change_the_run(undisturbed, flags, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "work_dir" / "pretrain_mae")
    resume = ["--resume_from_checkpoint", "step_00000016"]
    other = write_images(tmp_path / "other" / "train", 40, classes=4)
    changed = ["--seed", 1, "--per_gpu_batch_size", 16, "--mask_ratio", 0.5, "--path_to_data", other.parent]
    refused = run(SCRIPT, *flags, *changed, *resume, cwd=tmp_path, code=2).stderr
    errors = [line for line in refused.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and "Traceback" not in refused
    for word in ("--seed 1", "16 images per step, the checkpoint has 8", "--mask_ratio", "not the data set"):
        assert any(word in error for error in errors), word
    (folder / "checkpoints" / "step_00000023" / "optimizer.pt").unlink()
    broken = run(SCRIPT, *flags, "--resume_from_checkpoint", "step_00000023", cwd=tmp_path, code=2)
    assert "error: the checkpoint" in broken.stderr and "is incomplete" in broken.stderr


def test_a_finished_run_resumes_to_the_same_end(undisturbed, flags, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "work_dir" / "pretrain_mae")
    (folder / "metrics.json").unlink()
    run(SCRIPT, *flags, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "latest", cwd=tmp_path)
    assert (folder / "metrics.json").exists()
    assert_equal_runs(undisturbed, folder, 23)


def test_resuming_from_an_earlier_checkpoint_goes_on_from_there(undisturbed, flags, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "work_dir" / "pretrain_mae")
    flags = [*flags, "--gradient_accumulation_steps", 2, "--save_checkpoint_interval", 0]
    run(SCRIPT, *flags, "--resume_from_checkpoint", "step_00000016", cwd=tmp_path)
    assert sorted(os.listdir(folder / "checkpoints")) == ["step_00000016", "step_00000023"]
    assert_equal_runs(undisturbed, folder, 23)
    foreign = ["--experiment_name", "other", "--resume_from_checkpoint", folder / "checkpoints" / "step_00000016"]
    assert "belongs to another run" in run(SCRIPT, *flags, *foreign, cwd=tmp_path, code=2).stderr


def test_a_run_that_version_0_1_started_goes_on(tmp_path):
    """The archive holds the whole log of a run of five steps, and its checkpoint of step 2."""
    write_images(tmp_path / "images" / "train", 12, size=24)
    shutil.unpack_archive(ROOT / "tests" / "run_of_0.1.tar.xz", tmp_path / "work_dir")
    folder = tmp_path / "work_dir" / "pretrain_mae"
    (folder / "metrics.json").unlink()
    expected = losses_of(folder)
    flags = ["--path_to_data", "images", "--img_size", 16, "--patch_size", 8, "--mask_ratio", 0.5, "--max_steps", 5]
    for part in ("encoder", "decoder"):
        flags += [f"--{part}_embed_dim", 4, f"--{part}_depth", 1, f"--{part}_num_heads", 1]
    flags += ["--global_batch_size", 4, "--learning_rate", 1e-3, "--mixed_precision", "no", "--log_every", 1]
    run(SCRIPT, *flags, "--num_workers", 0, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert losses_of(folder) == pytest.approx(expected, rel=1e-5) and len(expected) == 5
    assert json.loads((folder / "args.json").read_text())["resumed"][0]["step"] == 2
    changed = run(SCRIPT, *flags, "--seed", 1, "--resume_from_checkpoint", "auto", cwd=tmp_path, code=2).stderr
    assert "--seed 1 differs from the run to resume, which has 0" in changed


def test_the_launcher_of_two_processes_passes_sigterm_on(image_folder, tmp_path):
    flags = [*TINY, "--path_to_data", image_folder, "--validate_every", 0, "--max_steps", 3000]
    folder = tmp_path / "work_dir" / "pretrain_mae"
    command = [sys.executable, "-m", "accelerate.commands.launch", *TWO_PROCESSES, str(ROOT / SCRIPT), *map(str, flags)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(7, folder, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)  # the launcher has its own exit code
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert steps_in(folder) == int(checkpoint.name.removeprefix("step_"))


def test_a_failure_nobody_foresaw_ends_at_once_with_its_traceback(flags, tmp_path):
    """The run ends although loader workers are alive, for which Python's shutdown would wait."""
    code = (
        "import sys, pretrain_mae; from training import launch, progress\n"
        "def fail(*_): raise ValueError('unforeseen')\n"
        "progress.Progress.write = fail\n"
        "launch.run_script(lambda: pretrain_mae.main(sys.argv[1:]))"
    )
    failed = run_code(code, *flags, "--num_workers", 2, cwd=tmp_path, code=1).stderr
    assert "Traceback" in failed and "ValueError: unforeseen" in failed


def test_one_writer_at_a_time(flags, tmp_path):
    process = start(SCRIPT, *flags, "--max_steps", 5000, cwd=tmp_path)
    wait_for(1, tmp_path / "work_dir" / "pretrain_mae", process)
    refused = run(SCRIPT, *flags, cwd=tmp_path, code=2)
    process.kill()
    process.communicate()
    assert "is being written to by another run" in refused.stderr


def test_all_bad_flags_at_once(tmp_path):
    """Wrong flags are listed first; if there are none, errors of data, weights and plan are listed together."""
    flags = ["--path_to_data", tmp_path / "nowhere", "--img_size", 100, "--encoder_num_heads", 7, "--what", 1]
    plan = ["--path_to_data", tmp_path / "nowhere", "--init_from", "lost.pth", "--gradient_accumulation_steps", 3]
    ratio = ["--mask_ratio", 0.999, "@missing.args"]
    data = ["--path_to_data", tmp_path / "nowhere"]
    share = [*data, "--predict_ratio", 0.003, "--mask_block", 3, "--mask_strategy", "grid"]
    starts = [[*flags, "--mask_ratio", 0.999], plan, ratio, ["--epochs", "x", "--what"]]
    starts += [share, [*data, "--decoder_inputs", "weighted"]]
    words = (
        ("--img_size 100 100", "--encoder_num_heads 7", "--what"),  # the mask ratio needs the number of patches
        ("nowhere", "--init_from lost.pth", "does not divide"),
        ("--mask_ratio 0.999 keeps 0 of 196", "--path_to_data is missing", "the recipe missing.args"),
        ("--epochs: 'x' is not valid; expected a whole number of at least 1",),
        ("predicts none of 147", "does not divide the grid of 14 x 14", "does not go with --mask_strategy grid"),
        ("--decoder_inputs weighted needs --decoder cross",),
    )
    for errors, expected in zip(refusals(SCRIPT, *starts, cwd=tmp_path), words, strict=True):
        assert len(errors) == len(expected), errors
        assert all(any(word in error for error in errors) for word in expected), errors


def test_data_that_cannot_be_trained_on(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    few = write_images(tmp_path / "few", 3)
    (tmp_path / "file").write_text("")
    starts = [[tmp_path / "empty"], [few], [few, "--working_directory", tmp_path / "file"]]
    said = refusals(SCRIPT, *([*TINY, "--path_to_data", *words] for words in starts), cwd=tmp_path)
    words = ("holds no image", "fewer than one global batch of 8", "is not writable")
    assert all(word in error for word, (error,) in zip(words, said, strict=True)), said


def test_damaged_images_are_named_and_replaced_until_they_are_too_many(tmp_path):
    images = write_images(tmp_path / "images", 40)
    paths = sorted(images.rglob("*.jpg"))
    for path in paths[:3]:
        path.write_bytes(path.read_bytes()[:200])
    flags = [*TINY, "--path_to_data", images, "--validate_every", 0]
    run(SCRIPT, *flags, "--epochs", 2, cwd=tmp_path)
    named = [json.loads(line) for line in (tmp_path / "work_dir/pretrain_mae/damaged.jsonl").read_text().splitlines()]
    assert sorted(entry["path"] for entry in named) == [str(path) for path in paths[:3]]
    for path in paths[:20]:
        path.write_text("no image")
    flags += ["--experiment_name", "many", "--num_workers", 1]
    stopped = run(SCRIPT, *flags, "--epochs", 20, cwd=tmp_path, code=1).stderr
    assert "of 40 images are damaged, more than the 10 allowed" in stopped and "Traceback" not in stopped


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(image_folder, tmp_path):
    flags = [*TINY, "--path_to_data", image_folder, "--learning_rate", 1e30, "--max_grad_norm", 0, "--log_every", 7]
    flags += ["--max_steps", 200, "--save_checkpoint_steps", 5, "--warmup_steps", 3]
    stopped = run(SCRIPT, *flags, cwd=tmp_path, code=1).stderr
    error = next(line for line in stopped.splitlines() if line.startswith("error: "))
    assert "is not finite" in error and "Traceback" not in stopped
    step = int(error.partition(" of step ")[2].split()[0])
    assert 1 < step <= 14
    for path in (tmp_path / "work_dir/pretrain_mae/checkpoints").glob("*"):
        assert int(path.name.removeprefix("step_")) < step
        model = load_file(path / "model.safetensors")
        assert all(value.isfinite().all() for value in model.values())


def small_disk(path, kilobytes):
    """Mount a file system of a few kilobytes at `path`, or skip the test if that is not allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")


def test_a_full_disk_keeps_the_earlier_checkpoint(image_folder, tmp_path):
    """Two processes stop together with one error, although one of them has nothing to write and waits for the save."""
    disk = tmp_path / "disk"
    flags = [*TINY, "--path_to_data", image_folder, "--validate_every", 0, "--working_directory", disk]
    flags += ["--save_checkpoint_steps", 3, "--max_steps", 30]
    small_disk(disk, 1000)  # room for one checkpoint of about 640 kB
    try:
        ends = finish_several(start_several(2, SCRIPT, *flags, cwd=tmp_path), 1)
        stopped = "".join(end.stderr for end in ends)
        assert "error: the checkpoint of step 6 could not be written" in stopped and "Traceback" not in stopped
        assert "step_00000003 is whole" in stopped and "the disk is full" in stopped and stopped.count("error: ") == 1
        assert os.listdir(disk / "pretrain_mae" / "checkpoints") == ["step_00000003"]
        shutil.copytree(disk, tmp_path / "work_dir")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    small_disk(tmp_path / "smaller", 28)  # room for the flags and a part of the log
    try:
        flags[flags.index(disk)] = tmp_path / "smaller"
        longer = ["--max_steps", 2000, "--save_checkpoint_steps", 2000, "--num_workers", 2]
        stopped = run(SCRIPT, *flags, *longer, cwd=tmp_path, code=1)
        assert "could not be written (the disk is full)" in stopped.stderr
        assert steps_in(tmp_path / "smaller" / "pretrain_mae") > 9
        assert "Traceback" not in stopped.stderr
    finally:
        subprocess.run(["umount", str(tmp_path / "smaller")], check=True)
    flags[flags.index(tmp_path / "smaller")] = tmp_path / "work_dir"
    resumed = run_two(SCRIPT, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert "step_00000003, after step 3" in resumed.stdout


@pytest.mark.parametrize("strategy", ["block", "grid"])
def test_other_masks_sizes_and_channels(strategy, tmp_path):
    images = write_images(tmp_path / "images", 16)
    flags = [*TINY, "--path_to_data", images, "--mask_strategy", strategy, "--img_size", 16, 32, "--max_steps", 2]
    run(SCRIPT, *flags, "--input_channels", 1, "--no-norm_pix_loss", "--no-custom_weight_init", cwd=tmp_path)
    metrics = metrics_of(tmp_path / "work_dir/pretrain_mae")
    assert metrics["uses_true_patch_statistics"] is False


def test_the_blogs_command_runs_unchanged(image_folder, tmp_path):
    """The command has every flag of the script that users already have."""
    command = f"""--experiment_name mae --wandb_run_name first --path_to_data {image_folder} --working_directory runs
        --epochs 1 --warmup_epochs 0 --save_checkpoint_interval 10 --per_gpu_batch_size 8
        --gradient_accumulation_steps 2 --base_learning_rate 1.5e-4 --weight_decay 0.05 --bias_weight_decay
        --norm_weight_decay --max_grad_norm 1.0 --img_size 32 --input_channels 3 --num_workers 1 --pin_memory
        --patch_size 16 --encoder_embed_dim 32 --encoder_depth 1 --encoder_num_heads 2 --encoder_mlp_ratio 4
        --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2 --decoder_mlp_ratio 4 --custom_weight_init
        --log_wandb --resume_from_checkpoint auto"""
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    run(SCRIPT, *command.split(), cwd=tmp_path, **environment)
    folder = tmp_path / "runs" / "mae"
    assert list((folder / "wandb").glob("offline-run-*")) and (folder / "metrics.json").exists()
    assert (folder / "wandb_run_id").read_text().strip() in str(list((folder / "wandb").iterdir()))


def test_the_launcher_and_the_quickstart_recipe(tmp_path):
    """The README's first command runs, shortened to three steps and 700 images of the built-in data set."""
    few = f"import runpy, sys; sys.path[0] = {str(ROOT)!r}; from data import shapes; shapes.TRAIN_IMAGES = 640; "
    few += f"shapes.VALIDATION_IMAGES = 60; runpy.run_path({str(ROOT / SCRIPT)!r}, run_name='__main__')"
    (tmp_path / "few.py").write_text(few)
    recipe = f"@{ROOT}/recipes/quickstart/pretrain.args"
    done = launch(tmp_path / "few.py", recipe, "--max_steps", 3, "--num_preview_images", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "work_dir" / "quickstart_pretrain"
    assert metrics_of(folder)["masked_psnr_visible_mean"] > 10
    assert "builtin:shapes: 640 images (generated), 60 for validation" in done.stdout


def test_real_photographs(real_images, tmp_path):
    flags = ["--path_to_data", real_images / "imagenet_sample", "--model", "tiny", "--per_gpu_batch_size", 16]
    flags += ["--max_steps", 2, "--num_workers", 2, "--decoder_depth", 1, "--log_every", 1, "--img_size", 96]
    run(SCRIPT, *flags, cwd=tmp_path)
    assert not (tmp_path / "work_dir/pretrain_mae/damaged.jsonl").exists()


def test_a_signal_during_validation_saves_the_step_and_validates_it_again(undisturbed, flags, tmp_path):
    code = """
import os, signal, sys, pretrain_mae
from training import launch
reconstruct = pretrain_mae.reconstruct
def interrupted(*given):
    os.kill(os.getpid(), signal.SIGTERM)
    return reconstruct(*given)
pretrain_mae.reconstruct = interrupted
launch.run_script(lambda: pretrain_mae.main(sys.argv[1:]))"""
    flags = [*flags, "--gradient_accumulation_steps", 2, "--save_checkpoint_interval", 0]
    run_code(code, *flags, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    assert os.listdir(folder / "checkpoints") == ["step_00000010"]
    run(SCRIPT, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 23)


def test_a_dry_run_says_what_will_happen_and_writes_nothing(image_folder, undisturbed, flags, tmp_path):
    """The dry run of a resumed run counts the remaining steps and writes nothing either."""
    resumed, fresh = tmp_path / "resumed", tmp_path / "fresh"
    shutil.copytree(undisturbed, resumed / "work_dir" / "pretrain_mae")
    before = sorted((path, path.stat().st_mtime_ns) for path in resumed.rglob("*"))
    rest = [*flags, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "step_00000016"]
    assert "7 steps take" in dry_run(SCRIPT, *rest, cwd=resumed)
    assert sorted((path, path.stat().st_mtime_ns) for path in resumed.rglob("*")) == before
    fresh.mkdir()
    flags = [*TINY, "--path_to_data", image_folder, "--gradient_accumulation_steps", 2, "--num_workers", 1]
    flags += ["--epochs", 300, "--repeated_augmentation", 2, "--report_to", "tensorboard"]
    said = dry_run(SCRIPT, *flags, cwd=fresh)
    for word in (
        *("40 images (about ", "2 views of each, 11 for validation", "M parameters", "GFLOP per image and step"),
        *("8 = 1 process x 2 micro-batches x 4", "steps      3000, 10 per epoch, 150 warmup"),
        *("peak 0.001, cosine to 0", "float32 on cpu", "steps timed after", "images/s, data wait", "peak memory"),
        *("3000 steps take", "nothing was written"),
    ):
        assert word in said, word
    assert os.listdir(fresh) == []
    refused = run(SCRIPT, *flags, "--dry_run", "--mask_ratio", 1, cwd=fresh, code=2).stderr
    assert "--mask_ratio 1 keeps 0" in refused and os.listdir(fresh) == []


def test_muon_resumes_exactly_and_is_the_same_on_one_process_and_two(image_folder, tmp_path):
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 12, "--optimizer", "muon", "--validate_every", 2]
    folder = tmp_path / "work_dir"
    run(SCRIPT, *flags, "--experiment_name", "one", cwd=tmp_path)
    killed = [*flags, "--experiment_name", "killed", "--save_checkpoint_steps", 2]
    process = start(SCRIPT, *killed, cwd=tmp_path)
    wait_for(5, folder / "killed", process)
    process.kill()
    process.communicate()
    assert not (folder / "killed" / "metrics.json").exists()
    resume = [*killed, "--resume_from_checkpoint", "auto"]
    refused = run(SCRIPT, *resume, "--optimizer", "adamw", cwd=tmp_path, code=2).stderr
    assert "--optimizer adamw differs from the run to resume, which has muon" in refused
    assert "resuming from" in run(SCRIPT, *resume, cwd=tmp_path).stdout
    assert_equal_runs(folder / "one", folder / "killed", 12)
    flags[flags.index("--per_gpu_batch_size") + 1] = "4"
    run_two(SCRIPT, *flags, "--experiment_name", "two", cwd=tmp_path)
    assert losses_of(folder / "one") == pytest.approx(losses_of(folder / "two"), rel=1e-4)


def test_neighbours_are_asked_without_disturbing_the_run(undisturbed, flags, tmp_path):
    flags = [*flags, "--gradient_accumulation_steps", 2, "--save_checkpoint_steps", 4]
    run(SCRIPT, *flags, "--knn_every", 1, "--report_to", "tensorboard", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    assert_equal_runs(undisturbed, folder, 23)
    lines = [line for line in log_of(folder) if "knn_top1" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 23]
    metrics = metrics_of(folder)
    assert metrics["knn_top1"] == lines[-1]["knn_top1"] and metrics["linear_top1"] == lines[-1]["linear_top1"]
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if '"step": 23' not in line or '"loss"' in line))
    flags += ["--knn_every", 1, "--resume_from_checkpoint", "latest"]
    flags += ["--per_gpu_batch_size", 4, "--gradient_accumulation_steps", 1]
    run_two(SCRIPT, *flags, cwd=tmp_path)  # measures the last step again; the two processes share its bank and queries
    again = metrics_of(folder)
    for name in ("knn_top1", "linear_top1"):  # other batches round differently, which may change one of 11 images
        assert again[name] == pytest.approx(metrics[name], abs=100 / 11 + 1e-6)
    assert again["val_loss"] == pytest.approx(metrics["val_loss"], rel=1e-6)


def test_features_of_few_images_are_measured_between_epochs(flags, tmp_path):
    """An epoch has five steps, so 0.4 epochs are two steps."""
    run(SCRIPT, *flags, "--max_steps", 5, "--knn_every", 0.4, "--knn_images", 10, cwd=tmp_path)
    lines = [line for line in log_of(tmp_path / "work_dir" / "pretrain_mae") if "knn_top1" in line]
    assert [line["step"] for line in lines] == [2, 4, 5]
    correct = [line["linear_top1"] * 6 / 100 for line in lines]  # six of 11 validation images are used
    assert correct == pytest.approx([round(number) for number in correct])


def test_the_rank_of_features_needs_no_labels(tmp_path):
    alone = write_images(tmp_path / "alone", 8)  # classes, but no validation images
    said = run(SCRIPT, *TINY, "--path_to_data", alone, "--knn_every", 1, "--max_steps", 1, cwd=tmp_path).stdout
    metrics = metrics_of(tmp_path / "work_dir" / "pretrain_mae")
    assert 1 < metrics["rankme"] < 8 and "knn_top1" not in metrics
    assert f"RankMe {metrics['rankme']:.1f} of 32; no labels for k-NN" in said


def test_compile_and_checkpointing_leave_the_losses_alone(image_folder, tmp_path):
    """20 steps with two micro-batches and drop path have the same losses; the step compiles once, to one graph."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 20, "--validate_every", 2, "--drop_path", 0.2]
    flags += ["--gradient_accumulation_steps", 2]
    code = """
import sys, pretrain_mae, torch._dynamo
from torch._dynamo.utils import counters
torch._dynamo.config.error_on_recompile = True
pretrain_mae.main(sys.argv[1:])
print(f"breaks {sum(counters['graph_break'].values())} graphs {counters['stats']['unique_graphs']}")"""

    run(SCRIPT, *flags, "--experiment_name", "plain", cwd=tmp_path)
    code_of_checkpoint = """
import sys, pretrain_mae, modeling.vit
calls, checkpoint = [], modeling.vit.checkpoint
modeling.vit.checkpoint = lambda *given, **options: calls.append(1) or checkpoint(*given, **options)
pretrain_mae.main(sys.argv[1:])
print(f"checkpoints {len(calls)}")"""
    words = [*flags, "--gradient_checkpointing", "--experiment_name", "checkpointed"]
    counted = run_code(code_of_checkpoint, *words, cwd=tmp_path).stdout
    assert "checkpoints 120" in counted  # 20 steps of two micro-batches through three blocks
    words = [*flags, "--compile", "--gradient_checkpointing", "--experiment_name", "compiled"]
    done = run_cold("-c", code, *words, cwd=tmp_path).stdout  # cold, as later imports may cause recompilation
    assert "breaks 0 graphs 2" in done  # that of the step, and that of the compiler check
    assert "float32, compile, gradient checkpointing on cpu" in done
    losses = {name: losses_of(tmp_path / "work_dir" / name) for name in ("plain", "checkpointed", "compiled")}
    assert len(losses["plain"]) == 20
    for name in ("checkpointed", "compiled"):
        assert losses[name] == pytest.approx(losses["plain"], abs=1e-5), name


def test_compile_without_a_compiler_is_refused(image_folder, tmp_path):
    flags = [*TINY, "--path_to_data", image_folder, "--compile"]
    variables = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused = run_cold(ROOT / SCRIPT, *flags, cwd=tmp_path, code=2, **variables).stderr
    error = next(line for line in refused.splitlines() if line.startswith("error: "))
    assert "--compile found no working compiler" in error and "Traceback" not in refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU is waited for")
def test_the_loop_does_not_wait_for_the_gpu(image_folder, tmp_path):
    code = """
import sys, pretrain_mae, torch
from training.progress import Progress
def watched(*given, **options):  # from the rate of each step to the next line of the log
    torch.cuda.set_sync_debug_mode("error")
    return set_learning_rate(*given, **options)
def unwatched(self):
    torch.cuda.set_sync_debug_mode("default")
    return check_finite(self)
set_learning_rate, check_finite = pretrain_mae.set_learning_rate, Progress.check_finite
pretrain_mae.set_learning_rate, Progress.check_finite = watched, unwatched
pretrain_mae.main(sys.argv[1:])"""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 8, "--mixed_precision", "bf16", "--pin_memory"]
    run_cold("-c", code, *flags, "--log_every", 100, cwd=tmp_path, ACCELERATE_USE_CPU="false")


def test_repeated_augmentation_is_the_same_on_one_process_and_two(image_folder, tmp_path):
    flags = [*TINY, "--path_to_data", image_folder, "--repeated_augmentation", 2, "--max_steps", 12]
    flags += ["--validate_every", 0]
    run(SCRIPT, *flags, "--experiment_name", "one", cwd=tmp_path)
    flags[flags.index("--per_gpu_batch_size") + 1] = "4"
    run_two(SCRIPT, *flags, "--experiment_name", "two", cwd=tmp_path)
    one, other = (tmp_path / "work_dir" / name for name in ("one", "two"))
    assert losses_of(one) == pytest.approx(losses_of(other), rel=1e-5)
    assert log_of(one)[9]["epoch"] == 1  # 40 images, twice each, in batches of 8
    flags += ["--micro_batch_size", 1]
    assert "--repeated_augmentation 2 does not divide" in run(SCRIPT, *flags, cwd=tmp_path, code=2).stderr


def test_a_cross_decoder_on_a_share_of_blocks(image_folder, tmp_path):
    """The run resumes bit for bit, trains on two processes, and its results open in the other scripts."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 7, "--save_checkpoint_steps", 3, "--mask_block", 2]
    flags += ["--decoder", "cross", "--decoder_inputs", "weighted", "--predict_ratio", 0.34]
    said = run(SCRIPT, *flags, "--experiment_name", "one", cwd=tmp_path).stdout
    assert "32 x 1 cross-attention decoder" in said
    assert "4 kept, 4 of 12 others predicted (random, blocks of 2 x 2)" in said
    one, resumed, two = (tmp_path / "work_dir" / name for name in ("one", "resumed", "two"))
    shutil.copytree(one, resumed)
    resume = ["--experiment_name", "resumed", "--resume_from_checkpoint", "step_00000003"]
    run(SCRIPT, *flags, *resume, cwd=tmp_path)
    assert_equal_runs(one, resumed, 7)
    flags[flags.index("--per_gpu_batch_size") + 1] = "4"
    run_two(SCRIPT, *flags, "--micro_batch_size", 2, "--experiment_name", "two", cwd=tmp_path)
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    card = ["--output", tmp_path / "published"]
    assert "cross-attention decoder 32 wide, 1 deep" in run("push_to_hub.py", one, *card, cwd=tmp_path).stdout
    card = (tmp_path / "published" / "README.md").read_text()
    assert "ViTMAE has no cross-attention decoder" in card and "ViTMAEForPreTraining" not in card
    photos = next(image_folder.rglob("*.png"), None) or next(image_folder.rglob("*.jpg"))
    run("predict.py", tmp_path / "published", photos, cwd=tmp_path)


@pytest.fixture(scope="module")
def pixio(tmp_path_factory):
    """Return the folder of a small Pixio with three class tokens, written by transformers."""
    config = PixioConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, n_cls_tokens=3
    )
    folder = tmp_path_factory.mktemp("pixio")
    PixioModel(config).save_pretrained(folder)
    return folder


def test_several_class_tokens_from_pre_training_to_features(image_folder, pixio, tmp_path):
    """Start from transformers' weights, resume bit for bit, run on two processes, convert for the Hub, predict."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 7, "--save_checkpoint_steps", 3, "--mask_block", 2]
    flags += ["--num_cls_tokens", 3, "--init_from", pixio, "--knn_every", 1]
    said = run(SCRIPT, *flags, "--experiment_name", "one", cwd=tmp_path).stdout
    assert "weights of transformers' Pixio: 30 loaded" in said and "32 x 2 encoder of 3 class tokens" in said
    assert "AutoModel.from_pretrained('work_dir/one/encoder')" in said and "timm" not in said
    one, resumed, two = (tmp_path / "work_dir" / name for name in ("one", "resumed", "two"))
    shutil.copytree(one, resumed)
    resume = ["--experiment_name", "resumed", "--resume_from_checkpoint", "step_00000003"]
    run(SCRIPT, *flags, *resume, cwd=tmp_path)
    assert_equal_runs(one, resumed, 7)
    before, after = load_file(pixio / "model.safetensors"), weights_of(one, 7)
    assert torch.equal(before["embeddings.position_embeddings"], after["encoder.pos_embed"])
    assert (before["embeddings.cls_token"] != after["encoder.cls_token"]).any(dim=2).all()
    flags[flags.index("--per_gpu_batch_size") + 1] = "4"
    run_two(SCRIPT, *flags, "--micro_batch_size", 2, "--experiment_name", "two", cwd=tmp_path)
    assert losses_of(two) == pytest.approx(losses_of(one), rel=1e-5)
    said = run("push_to_hub.py", one, cwd=tmp_path).stdout
    assert "3 class tokens, decoder 32 wide" in said and "transformers AutoModel" in said and "timm" not in said
    card = (one / "hub" / "README.md").read_text()
    assert "- timm has no encoders with several class tokens." in card and "import timm" not in card
    assert "transformers' ViTMAE has one class token" in card
    run("predict.py", one / "hub", image_folder / "val", "--num_workers", 0, cwd=tmp_path)
    run("predict.py", pixio, image_folder / "val", "--features", "own.npy", "--num_workers", 0, cwd=tmp_path)
    assert np.load(tmp_path / "own.npy").shape == (11, 32)


def test_several_class_tokens_in_fine_tuning(image_folder, scenes, pixio, tmp_path):
    """The number of class tokens follows from the weights, and a resumed run ends with the same bits."""
    shared = ["--num_workers", 0, "--per_gpu_batch_size", 4, "--max_steps", 4, "--mixed_precision", "no"]
    shared += ["--save_checkpoint_steps", 2, "--log_every", 1]
    classifier = ["finetune_classifier.py", image_folder, "--path_to_pretrained_mae_weights"]
    segmenter = ["finetune_segmentation.py", scenes, "--path_to_backbone_checkpoint"]
    starts = {
        "cls": (*classifier, ["--pooling", "cls"]),
        "mean": (*classifier, ["--pooling", "mean"]),
        "attentive": (*classifier, ["--attentive_probe", "--cache_features"]),
        "frozen": (*segmenter, ["--head", "linear", "--freeze_encoder", "--crop_size", 48]),
        "biases": (*segmenter, ["--head", "linear", "--relative_position_bias", "--crop_size", 32]),
    }
    for name, (script, data, weights, own) in starts.items():
        flags = ["--path_to_data", data, weights, pixio, *shared, *own]
        run(script, *flags, "--experiment_name", name, cwd=tmp_path)
        folder, again = tmp_path / "work_dir" / name, tmp_path / "work_dir" / f"{name}_again"
        assert flags_of(folder)["num_cls_tokens"] == 3
        shutil.copytree(folder, again)
        resume = ["--resume_from_checkpoint", "step_00000002", "--experiment_name", again.name]
        run(script, *flags, *resume, cwd=tmp_path)
        assert_equal_runs(folder, again, 4)
        evaluation = ["--path_to_data", data, weights, folder / "model", "--eval_only", "--experiment_name", "eval"]
        run(script, *evaluation, "--num_workers", 0, cwd=tmp_path)
        metric = "top1" if script == classifier[0] else "mean_iou"
        assert metrics_of(tmp_path / "work_dir" / "eval")[metric] == metrics_of(folder)[metric]
        shutil.rmtree(tmp_path / "work_dir" / "eval")
        said = run("push_to_hub.py", folder, cwd=tmp_path).stdout
        assert "differences from this model: " in said and "3 class tokens" in said
        card = (folder / "hub" / "README.md").read_text()
        assert ('subfolder="encoder"' in card) == (name in ("cls", "attentive"))
        assert "No other library has a head on an encoder of several class tokens" in card


def test_numbers_of_class_tokens_that_do_not_fit(image_folder, pixio, tmp_path):
    flags, weights = ["--path_to_data", image_folder, "--num_workers", 0], "--path_to_pretrained_mae_weights"
    (error,), (other,) = refusals(
        SCRIPT,
        [*TINY, *flags, "--init_from", pixio],
        [*TINY, *flags, "--init_from", pixio, "--num_cls_tokens", 2, "--encoder_num_heads", 4],
        cwd=tmp_path,
    )
    assert "num_cls_tokens is 3 instead of 1; give --num_cls_tokens 3" in error
    assert "num_cls_tokens is 3 instead of 2, encoder_num_heads is 2 instead of 4" in other
    ((error,),) = refusals(
        "finetune_classifier.py", [*flags, weights, pixio, *TINY[6:8], "--num_cls_tokens", 1], cwd=tmp_path
    )
    assert "num_cls_tokens is 3 instead of 1; give --num_cls_tokens 3" in error
    assert "expected a whole number of at least 1" in run(SCRIPT, "--num_cls_tokens", 0, cwd=tmp_path, code=2).stderr


def test_init_from_every_layout(undisturbed, flags, tmp_path):
    """Start from a run, a checkpoint or an encoder, also with other sizes and channels; the rest is an error."""
    flags = [*flags, "--max_steps", 1, "--validate_every", 0, "--init_from"]
    encoder = undisturbed / "encoder" / "model.safetensors"
    larger = [undisturbed, "--img_size", 48, "--input_channels", 1]
    starts = {
        "run": [undisturbed],
        "checkpoint": [undisturbed / "checkpoints" / "step_00000023"],
        "whole": [undisturbed / "encoder" / "pretraining"],
        "encoder": [encoder],
        "grey": [*larger, "--adapt_channels"],
    }
    done = run_each(
        SCRIPT, [[*flags, *words, "--experiment_name", name] for name, words in starts.items()], cwd=tmp_path
    )
    said = dict(zip(starts, done, strict=True))
    for name in ("run", "checkpoint", "whole"):
        assert f"--init_from {starts[name][0]}" in said[name] and " 0 missing" in said[name]
        assert "trained with" not in said[name]
    at_once = {losses_of(tmp_path / "work_dir" / name)[1] for name in ("run", "checkpoint", "whole")}
    assert len(at_once) == 1 and at_once.pop() < 0.98 * losses_of(undisturbed)[1]
    assert "newly initialized" in said["encoder"]
    assert "4x4 -> 6x6" in said["grey"] and "3 -> 1 channels" in said["grey"]
    assert "trained with mean [0.485, 0.456, 0.406]" in said["grey"] and "this run has mean [0.5]" in said["grey"]

    grey, wider, missing, alone = run_each(
        SCRIPT,
        [
            [*flags, *larger, "--experiment_name", "refused"],
            [*flags, undisturbed, "--encoder_embed_dim", 64, "--experiment_name", "refused"],
            [*flags, tmp_path / "nowhere"],
            [*flags[:-1], "--adapt_channels"],
        ],
        cwd=tmp_path,
        code=2,
    )
    assert "--adapt_channels" in grey and not (tmp_path / "work_dir" / "refused" / "args.json").exists()
    assert "--encoder_embed_dim 32" in wider
    assert "nowhere" in missing
    assert "--adapt_channels converts the weights of --init_from, which is missing; give both or none" in alone
    assert not any("Traceback" in text for text in (grey, wider, missing, alone))


def test_trackers_continue_their_curves_and_their_absence_costs_a_warning(image_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 10, "--save_checkpoint_steps", 5]
    flags += ["--validate_every", 1, "--report_to", "tensorboard", "wandb", "--keep_checkpoints", 9]
    nobody = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    done = run(SCRIPT, *flags, cwd=tmp_path, **nobody)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1 and "not logging to wandb" in warnings[0]
    before = log_of(tmp_path / "work_dir" / "pretrain_mae")
    run(SCRIPT, *flags, "--resume_from_checkpoint", "step_00000005", cwd=tmp_path, WANDB_MODE="offline")
    folder = tmp_path / "work_dir" / "pretrain_mae"
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 11))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([*losses_of(folder).values()])
    assert [event.step for event in events.Scalars("val_loss")] == [5, 10]  # the validation of step 5 is not repeated
    assert [line["step"] for line in before] == [line["step"] for line in log_of(folder)]
    assert [event.step for event in events.Images("reconstructions")] == [5, 10]
    assert list((folder / "wandb").glob("offline-run-*"))
    both = run(SCRIPT, *TINY, "--report_to", "none", "wandb", cwd=tmp_path, code=2).stderr
    assert "--report_to none wandb contradicts itself" in both


@pytest.mark.parametrize("name", ["csv", "tar", "prepared"])  # test_sources.py compares the samples of all sources
def test_every_source_gives_the_same_losses_and_resumes(name, flags, undisturbed, every_source, tmp_path):
    """A run that is stopped inside an epoch and resumed equals the undisturbed run on the folder bit for bit."""
    flags = [*flags, *every_source[name], "--gradient_accumulation_steps", 2]
    folder = tmp_path / "work_dir" / "pretrain_mae"
    process = start(SCRIPT, *flags, cwd=tmp_path)
    wait_for(7, folder, process)
    process.terminate()
    process.communicate()
    assert process.returncode == 0 and not (folder / "metrics.json").exists()
    run(SCRIPT, *flags, "--resume_from_checkpoint", "auto", "--num_workers", 1, cwd=tmp_path)
    assert_equal_runs(undisturbed, folder, 23)


def test_the_first_damaged_image_ends_a_run_that_allows_none(tmp_path):
    write_images(tmp_path / "data", 24)
    broken = sorted((tmp_path / "data").rglob("*.jpg"))[5]
    broken.write_bytes(b"")
    flags = [*TINY, "--path_to_data", tmp_path / "data", "--max_steps", 6, "--log_every", 50]
    said = run(SCRIPT, *flags, "--on_damaged", "error", cwd=tmp_path, code=1).stderr
    assert f"error: {broken} is damaged (empty file), and --on_damaged error allows none" in said
    assert "Traceback" not in said and not (tmp_path / "work_dir/pretrain_mae/metrics.json").exists()
    run(SCRIPT, *flags, cwd=tmp_path)


def test_images_of_many_channels_take_their_statistics_from_the_data(tmp_path):
    """Statistics, training, pictures and predict.py work with float images of five channels and some missing data."""
    rng = np.random.default_rng(0)
    for i in range(20):
        values = rng.normal(100 * np.arange(5), 10, (40, 40, 5)).astype(np.float32)
        values[:4, :4] = -9999
        path = tmp_path / "data" / ("train" if i < 16 else "val") / f"{i:02d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values)
    images = ["--input_channels", 5, "--nodata", -9999]
    run("prepare_data.py", tmp_path / "data", "--statistics", *images, cwd=tmp_path)
    statistics = json.loads((tmp_path / "data/statistics.json").read_text())
    low, high = statistics["value_range"]
    assert [low + mean * (high - low) for mean in statistics["mean"]] == pytest.approx(range(0, 500, 100), abs=1)
    assert [std * (high - low) for std in statistics["std"]] == pytest.approx([10] * 5, rel=0.05)
    shown = ["--preview_channels", 4, 2, 0, "--validity", "none"]  # predict.py counts filled pixels too
    run(SCRIPT, *TINY, "--path_to_data", tmp_path / "data", "--max_steps", 4, *shown, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    resolved = flags_of(folder)
    assert resolved["input_channels"] == 5 and resolved["nodata"] == -9999 and resolved["mean"] == statistics["mean"]
    assert resolved["value_range"] == [low, high] and list((folder / "reconstructions").iterdir())
    run("predict.py", folder, tmp_path / "data/val", "--nodata", -9999, cwd=tmp_path)
    lines = (tmp_path / "predictions/predictions.jsonl").read_text().splitlines()
    values = [json.loads(line)["masked_psnr"] for line in lines]
    expected = metrics_of(folder)["masked_psnr"]
    assert len(values) == 4 and np.mean(values) == pytest.approx(expected, abs=1e-3)  # seed 0 draws the same masks


def test_bad_flags_of_images_are_listed_together(tmp_path):
    np.save(write_images(tmp_path, 4) / "class_0" / "0000.npy", np.zeros((8, 8, 4), np.uint8))
    flags = [*TINY, "--path_to_data", tmp_path]
    starts = [["--value_range", 5, 5, "--preview_channels", 0, 1], ["--cache_dir", __file__], ["--preview_channels", 3]]
    both, cache, beyond, channels = run_each(
        SCRIPT, [[*flags, *words] for words in [*starts, []]], cwd=tmp_path, code=2
    )
    for part in ("--value_range 5 5 is empty", "--preview_channels 0 1 cannot be shown"):
        assert sum(part in line for line in both.splitlines()) == 1, both
    assert "give another --cache_dir" in cache and "--preview_channels 3 cannot be shown" in beyond
    assert "0000.npy has 4 channels, expected 3; give --input_channels 4" in channels


def test_fast_decoding_and_the_limit_of_pixels_reach_the_images(tmp_path):
    write_images(tmp_path / "data", 16, size=320)
    Image.new("RGB", (330, 320)).save(tmp_path / "data/class_0/large.jpg")
    flags = [*TINY, "--path_to_data", tmp_path / "data", "--max_steps", 4, "--validate_every", 0]
    for name, options in (("exact", []), ("fast", ["--fast_decoding"]), ("limited", ["--max_pixels", 320 * 320])):
        run(SCRIPT, *flags, *options, "--experiment_name", name, cwd=tmp_path)
    exact, fast = (losses_of(tmp_path / "work_dir" / name) for name in ("exact", "fast"))
    assert exact != fast and list(exact.values()) == pytest.approx(list(fast.values()), rel=0.05)
    (line,) = (tmp_path / "work_dir/limited/damaged.jsonl").read_text().splitlines()
    assert "large.jpg" in line and "raise --max_pixels" in line
    assert not (tmp_path / "work_dir/exact/damaged.jsonl").exists()


def test_a_data_set_on_the_hub_is_trained_on_as_its_folder_is(flags, undisturbed, every_source, hub, tmp_path):
    """The run also works offline, from the cache; an unknown name is an error of one line."""
    hub.add("datasets/owner/pairs", every_source["parquet"][1])
    flags = [*flags, "--path_to_data", "hf:owner/pairs", "--gradient_accumulation_steps", 2]
    run(SCRIPT, *flags, cwd=tmp_path, **hub.variables(tmp_path))
    assert_equal_runs(undisturbed, tmp_path / "work_dir/pretrain_mae", 23)
    offline = hub.variables(tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    run(SCRIPT, *flags, "--max_steps", 3, "--experiment_name", "offline", cwd=tmp_path, **offline)
    flags[-3] = "hf:owner/nothing"
    said = run(SCRIPT, *flags, "--experiment_name", "none", cwd=tmp_path, code=2, **hub.variables(tmp_path)).stderr
    (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "hf:owner/nothing" in error and "Traceback" not in said
