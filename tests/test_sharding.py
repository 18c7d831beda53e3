"""Tests of FSDP2 with two processes on a CPU: whole runs, their checkpoints, and settings that are refused.

The processes get the variables that `accelerate launch` sets for accelerate_configs/fsdp2.yaml; flags override its
precision.
"""

import functools
import os
import shutil
import signal
import socket

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Start,
    assert_equal_runs,
    finish,
    log_of,
    losses_of,
    metrics_of,
    run,
    wait_for,
    weights_of,
)
from safetensors.torch import load_file
from test_finetune_segmentation import ENCODER, HEAD

PRETRAIN, CLASSIFIER, SEGMENTATION = "pretrain_mae.py", "finetune_classifier.py", "finetune_segmentation.py"
# Accelerate does not shard on CPUs, so this pretends to have GPUs that communicate through gloo
LAUNCHER = """
import os, runpy, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# This loads a checkpoint into a new model and saves it again in the working directory
SAVE_AGAIN = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
import pretrain_mae
from training.checkpoint import load_training, save_training
from training.run_folder import RunFolder, read_state
from training.sharding import configure_sharding, wrap
from training.processes import Crew
checkpoint = Path(sys.argv[1])
args, errors = pretrain_mae.parse_args(sys.argv[2:])
accelerator, crew, folder = Accelerator(), Crew(), RunFolder(Path.cwd())
errors += configure_sharding(accelerator, compiled=False, auto_micro_batch=False)[1]
assert not errors
encoder = {name: getattr(args, f"encoder_{name}") for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
encoder |= dict(img_size=tuple(args.img_size), patch_size=args.patch_size)
decoder = {name: getattr(args, f"decoder_{name}") for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
model = pretrain_mae.build_model(encoder, decoder, drop_path=0.0, custom_weight_init=True)
optimizer = pretrain_mae.build_optimizer(model, args.optimizer, args.weight_decay)
model, optimizer, plain_model = wrap(accelerator, model, optimizer)
load_training(checkpoint, accelerator, model, optimizer)
folder.checkpoints.mkdir(exist_ok=True)
save_training(folder, accelerator, crew, model, optimizer, read_state(checkpoint), keep=1)
accelerator.end_training()
"""


@functools.cache
def configuration():
    """Return the variables that `accelerate launch` sets for the processes of fsdp2.yaml."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, PRETRAIN]))
    variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def start_sharded(script, *flags, cwd, processes=2, **variables):
    """Start `SCRIPT flags` as `processes` processes under FSDP2 and return them, the main process first."""
    launcher = cwd / "launcher.py"
    launcher.write_text(LAUNCHER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = configuration() | dict(ACCELERATE_USE_CPU="false", ACCELERATE_TORCH_DEVICE="cpu", CUDA_VISIBLE_DEVICES="")
    shared |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(processes)) | variables
    shared |= dict(LOCAL_WORLD_SIZE=str(processes))
    return [
        Start(launcher, ROOT / script, *flags, cwd=cwd, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(processes)
    ]


def run_sharded(script, *flags, cwd, code=0, **options):
    """Run `SCRIPT flags` under FSDP2, check the exit code of every process, and return the output of each."""
    ends = [finish(process, code) for process in start_sharded(script, *flags, cwd=cwd, **options)]
    return [end.stdout + end.stderr for end in ends]


def assert_close_runs(one, other, step):
    """Check that losses, gradient norms and trained weights are equal up to rounding."""
    assert len(losses_of(one)) == step and losses_of(one) == pytest.approx(losses_of(other), rel=1e-5)
    norms = [[line["grad_norm"] for line in log_of(folder) if "loss" in line] for folder in (one, other)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    a, b = weights_of(one, step), weights_of(other, step)
    assert a.keys() == b.keys()
    for name in a:
        if "running" in name or "num_batches" in name:  # these follow the main process's micro-batches
            continue
        difference = a[name] - b[name]
        if name.endswith("qkv.bias"):  # softmax cancels the key's bias: its gradient is rounding, which Adam enlarges
            difference[len(difference) // 3 : -len(difference) // 3] = 0
        assert difference.norm() <= 1e-3 * b[name].norm(), name


@pytest.fixture(scope="module")
def flags(image_folder):
    """Return the flags of twelve steps of eight images in micro-batches of two, with drop path."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 12, "--drop_path", 0.2, "--save_checkpoint_steps", 4]
    place = flags.index("--per_gpu_batch_size")
    flags[place : place + 2] = ["--global_batch_size", 8, "--micro_batch_size", 2]
    return [*flags, "--validate_every", 1, "--knn_every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """Return the folder of an uninterrupted run of one process."""
    cwd = tmp_path_factory.mktemp("whole")
    run(PRETRAIN, *flags, cwd=cwd)
    return cwd / "work_dir" / "pretrain_mae"


@pytest.fixture(scope="module")
def sharded(flags, tmp_path_factory):
    """Return the folder of the same run of two processes under FSDP2."""
    cwd = tmp_path_factory.mktemp("sharded")
    said, other = run_sharded(PRETRAIN, *flags, cwd=cwd)
    assert "float32, gradient checkpointing, FSDP2 on cpu" in said and "8 = 2 processes x 2 micro-batches x 2" in said
    assert "Warning" not in said + other
    return cwd / "work_dir" / "pretrain_mae"


def test_two_processes_with_a_share_each_train_as_one_does(whole, sharded):
    assert_close_runs(sharded, whole, 12)
    one, two = (
        [line for line in log_of(folder) if "val_loss" in line or "knn_top1" in line] for folder in (whole, sharded)
    )
    assert len(one) == 5 and [line.keys() for line in one] == [line.keys() for line in two]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert (sharded / "reconstructions" / "step_00000012.png").exists()


def test_whole_weights_are_exported(sharded):
    saved, exported = weights_of(sharded, 12), load_file(sharded / "encoder" / "model.safetensors")
    shared = [name for name in exported if f"encoder.{name}" in saved]
    assert len(shared) > 20 and all(torch.equal(exported[name], saved[f"encoder.{name}"]) for name in shared)


def test_killed_and_stopped_it_continues_to_the_last_bit(flags, sharded, tmp_path):
    """Killing one process ends both with an error; a signal to stop one process stops both cleanly."""
    folder = tmp_path / "work_dir" / "pretrain_mae"
    for number, steps in ((signal.SIGKILL, 6), (signal.SIGTERM, 9)):
        main, other = start_sharded(PRETRAIN, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
        wait_for(steps, folder, main, other)
        other.send_signal(number)
        said = "".join(main.communicate(timeout=60))
        other.communicate(timeout=60)
        stopped = number == signal.SIGTERM
        assert main.returncode == 1 - stopped and ("stopped by" in said) == stopped
        assert not (folder / "metrics.json").exists()
    run_sharded(PRETRAIN, *flags, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert_equal_runs(sharded, folder, 12)


def test_a_checkpoint_passes_through_every_layout_unchanged(flags, sharded, tmp_path):
    """A checkpoint of two processes goes to one under FSDP2, to one without it, and back to two, bit-equal."""
    (tmp_path / "save_again.py").write_text(SAVE_AGAIN)
    first = checkpoint = sharded / "checkpoints" / "step_00000012"
    for layout in ("one", "whole", "two"):
        cwd = tmp_path / layout
        cwd.mkdir()
        words = [tmp_path / "save_again.py", checkpoint, *flags]
        if layout == "whole":
            finish(Start(*words, cwd=cwd), 0)
        else:
            run_sharded(*words, cwd=cwd, processes=("one", "two").index(layout) + 1)
        checkpoint = cwd / "checkpoints" / first.name
    a, b = (load_file(folder / "model.safetensors") for folder in (first, checkpoint))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"] for folder in (first, checkpoint))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_one_process_without_fsdp_continues_the_run(flags, whole, sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "work_dir" / "pretrain_mae")
    run(PRETRAIN, *flags, "--resume_from_checkpoint", "step_00000008", cwd=tmp_path)
    assert_close_runs(folder, whole, 12)


def fine_tune_both(script, flags, cwd, step):
    """Train with one process and with two under FSDP2, and return both run folders.

    Check that the runs agree, and that the exported model of the second has the same scores when it is evaluated.
    """
    run(script, *flags, "--experiment_name", "one", cwd=cwd)
    run_sharded(script, *flags, "--experiment_name", "two", cwd=cwd)
    one, two = (cwd / "work_dir" / name for name in ("one", "two"))
    assert_close_runs(two, one, step)
    place = flags.index("--path_to_data")
    precision = flags.index("--mixed_precision")
    words = [*flags[place : place + 2], *flags[precision : precision + 2], "--eval_only", "--num_workers", 0]
    if script == SEGMENTATION:
        words += ["--evaluate", "whole", "--path_to_backbone_checkpoint"]
    else:
        words += ["--path_to_pretrained_mae_weights"]
    run(script, *words, two / "model", "--experiment_name", "again", cwd=cwd)
    expected, again = (metrics_of(folder) for folder in (two, two.parent / "again"))
    for score in again.keys() & {"val_loss", "top1", "mean_iou", "mean_accuracy"}:
        assert again[score] == pytest.approx(expected[score], rel=3e-4), score
    assert sorted(os.listdir(two / "best")) == sorted(os.listdir(two / "model"))
    return one, two


def test_a_linear_probe_and_its_average(image_folder, sharded, tmp_path):
    """The frozen encoder comes from a run under FSDP2; the probe uses bf16, LARS, BatchNorm and a moving average."""
    flags = ["--path_to_data", image_folder, "--path_to_pretrained_mae_weights", sharded, "--linear_probe"]
    flags += ["--global_batch_size", 8, "--micro_batch_size", 2, "--learning_rate", 0.1, "--ema_decay", 0.9]
    flags += ["--num_workers", 0, "--mixed_precision", "bf16", "--log_every", 1, "--max_steps", 6]
    one, two = fine_tune_both(CLASSIFIER, flags, tmp_path, 6)
    a, b = (load_file(folder / "checkpoints/step_00000006/ema.safetensors") for folder in (one, two))
    torch.testing.assert_close(a["head.weight"], b["head.weight"], rtol=1e-4, atol=1e-7)
    assert not torch.equal(b["head.weight"], weights_of(two, 6)["head.weight"])


@pytest.mark.parametrize("frozen", [False, True])
def test_segmentation(scenes, sharded, tmp_path, frozen):
    model = [*ENCODER, *HEAD]
    if frozen:
        model = ["--path_to_backbone_checkpoint", sharded, "--freeze_encoder", "--head", "linear"]
    flags = ["--path_to_data", scenes, *model, "--crop_size", 32, "--global_batch_size", 8]
    flags += ["--micro_batch_size", 2, "--learning_rate", 1e-3, "--num_workers", 0, "--mixed_precision", "no"]
    flags += ["--log_every", 1, "--max_steps", 2, "--evaluate_every", 1, "--evaluate", "whole"]
    fine_tune_both(SEGMENTATION, flags, tmp_path, 2)


def test_what_does_not_work_is_refused(flags, tmp_path):
    def refused(said):
        assert "Traceback" not in said and not list(tmp_path.glob("work_dir/*/checkpoints/step_*"))
        return [line for line in said.splitlines() if line.startswith("error: ")]

    variables = dict(FSDP_OFFLOAD_PARAMS="true", FSDP_ACTIVATION_CHECKPOINTING="false")
    bad = ["--compile", "--optimizer", "muon"]
    (said,) = run_sharded(PRETRAIN, *flags, *bad, cwd=tmp_path, code=2, processes=1, **variables)
    offload, compiled, optimizer = refused(said)
    assert optimizer == "error: --optimizer muon does not work with FSDP2; leave it out, or run without FSDP"
    assert "fsdp_offload_params does not work" in offload and "--compile does not work with FSDP2" in compiled
    first = dict(FSDP_VERSION="1", FSDP_SYNC_MODULE_STATES="false")
    (said,) = run_sharded(PRETRAIN, *flags, cwd=tmp_path, code=2, processes=1, **first)
    (error,) = refused(said)
    assert "FSDP 1; only 2 works" in error
    (error,) = refused(run(PRETRAIN, *flags, cwd=tmp_path, code=2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2").stderr)
    assert "configured for FSDP and runs without it on cpu" in error
