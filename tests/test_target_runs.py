"""Tests of whole pre-training runs with each target: resuming, two processes, compilation, and bad flags."""

import json
import shutil

import pytest
import torch
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
from random_modules import build_autoencoder, new_encoder
from test_sharding import run_sharded
from test_teacher import write_tower

from data.batches import Normalization
from modeling.export import export_autoencoder, export_encoder
from modeling.hub import find_weights
from modeling.targets import TARGETS
from modeling.trained import open_trained
from modeling.vit import patchify, take

SCRIPT = "pretrain_mae.py"
WIDTHS = {"pixels": 192, "pca": 10, "hog": 27, "teacher": 32}


@pytest.fixture(scope="session")
def targets(tmp_path_factory):
    """Return the flags of each target; the teacher is a DINOv2 with another patch size and normalization."""
    folder = tmp_path_factory.mktemp("teacher")
    write_tower(folder, "Dinov2Model", patch_size=4)
    return {
        "pca": ["--target", "pca", "--num_components", 10],
        "hog": ["--target", "hog"],
        "teacher": ["--target", "teacher", "--teacher", folder],
    }


@pytest.fixture(scope="session")
def flags(image_folder):
    return [
        *TINY,
        "--path_to_data",
        image_folder,
        "--max_steps",
        6,
        "--validate_every",
        1,
        "--save_checkpoint_steps",
        4,
    ]


@pytest.fixture(scope="session", params=["pca", "hog", "teacher"])
def trained(request, flags, targets, tmp_path_factory):
    """Return the name of a target, its flags, and the folder of an uninterrupted run."""
    cwd = tmp_path_factory.mktemp(request.param)
    flags = [*flags, *targets[request.param]]
    run(SCRIPT, *flags, cwd=cwd)
    return request.param, flags, cwd / "work_dir" / "pretrain_mae"


def test_results(trained):
    name, _, folder = trained
    metrics, pictures = metrics_of(folder), (folder / "reconstructions").is_dir()
    assert (name == "pca") == pictures == ("masked_psnr" in metrics) == ("pasted_ssim" in metrics)
    assert metrics["val_loss"] > 0 and metrics["uses_true_patch_statistics"] is False
    weights = weights_of(folder, 6)
    assert len(weights["decoder.pred.weight"]) == WIDTHS[name]
    others = [key for key in weights if not key.startswith(("encoder.", "decoder.", "mask_token"))]
    assert others == (["target.components", "target.mean"] if name == "pca" else [])
    exported = open_trained(folder)
    assert exported.path == folder / "encoder" / "pretraining" and type(exported.model.target) is TARGETS[name]
    assert all(torch.equal(value, weights[key]) for key, value in exported.model.state_dict().items())
    config = json.loads((exported.path / "config.json").read_text())
    assert config["model_type"] == "masked_autoencoder"
    checkpoint = open_trained(folder / "checkpoints" / "step_00000006").model
    assert type(checkpoint.target) is TARGETS[name] and checkpoint.target.width == WIDTHS[name]


def test_resumed_runs_end_the_same(trained, tmp_path):
    name, flags, folder = trained
    copy = shutil.copytree(folder, tmp_path / "work_dir" / "pretrain_mae")
    code = (
        "import sys, pretrain_mae\nfrom modeling.targets import PrincipalComponents\nPrincipalComponents.fit = None\n"
    )
    code += "pretrain_mae.main(sys.argv[1:])"
    run_code(code, *flags, "--resume_from_checkpoint", "step_00000004", cwd=tmp_path)
    assert_equal_runs(folder, copy, 6)
    if name == "pca":  # stored in the checkpoint, so that no fit is needed
        assert weights_of(folder, 4)["target.components"].any()


def test_two_processes_train_as_one(trained, tmp_path):
    _, flags, folder = trained
    run_two(SCRIPT, *flags, "--per_gpu_batch_size", 4, cwd=tmp_path)
    other = tmp_path / "work_dir" / "pretrain_mae"
    assert losses_of(other) == pytest.approx(losses_of(folder), rel=1e-5)
    assert metrics_of(other)["val_loss"] == pytest.approx(metrics_of(folder)["val_loss"], rel=1e-5)


@pytest.mark.parametrize("trained", ["pca"], indirect=True)  # the only target with buffers
def test_two_processes_with_a_share_of_the_weights_each_train_as_one(trained, tmp_path):
    _, flags, folder = trained
    run_sharded(SCRIPT, *flags, "--per_gpu_batch_size", 4, cwd=tmp_path)
    other = tmp_path / "work_dir" / "pretrain_mae"
    assert losses_of(other) == pytest.approx(losses_of(folder), rel=1e-5)
    assert weights_of(other, 6).keys() == weights_of(folder, 6).keys()
    assert metrics_of(other)["val_loss"] == pytest.approx(metrics_of(folder)["val_loss"], rel=1e-5)


def test_compilation_and_checkpointing_leave_the_losses_alone(trained, tmp_path):
    _, flags, folder = trained
    code = """
import sys, pretrain_mae
from torch import nn
compile = nn.Module.compile
nn.Module.compile = lambda model, **options: compile(model, backend="aot_eager", **options)
pretrain_mae.main(sys.argv[1:])"""
    run_code(code, *flags, "--compile", "--gradient_checkpointing", cwd=tmp_path)
    assert losses_of(tmp_path / "work_dir" / "pretrain_mae") == pytest.approx(losses_of(folder), rel=1e-5)


def test_reconstructions_of_trained_models(trained, image_folder, tmp_path):
    name, _, folder = trained
    code = 0 if name == "pca" else 2
    said = run("predict.py", folder, image_folder / "val", "--num_workers", 0, cwd=tmp_path, code=code).stderr
    if code:
        (error,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (
            "have no picture; give --features FILE.npy" in error
            and TARGETS[name](new_encoder(**SMALL), 32).title in error
        )
        run("predict.py", folder, image_folder / "val", "--features", "f.npy", "--num_workers", 0, cwd=tmp_path)


def test_a_converted_run(trained, tmp_path):
    name, _, folder = trained
    said = run("push_to_hub.py", folder, "--output", "hub", cwd=tmp_path).stdout
    assert "ViTMAE" not in said and "this project, pretraining/" in said
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "for this project alone" in card and "ViTMAEForPreTraining" not in card
    assert ("photo.jpg\n" in card) == (name == "pca")
    model = open_trained(find_weights(tmp_path / "hub", whole=True)).model
    assert type(model.target) is TARGETS[name] and model.target.title in card


SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


@pytest.mark.parametrize("name", WIDTHS)
def test_loss_and_gradients_equal_those_of_a_few_lines(name):
    """The reference normalizes whole images and predicts all patches; a mask selects the removed ones."""
    torch.manual_seed(0)
    encoder = new_encoder(**SMALL)
    sizes = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model = build_autoencoder(encoder, target=name, width=WIDTHS[name], **sizes)
    target = model.target
    images, noise = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), torch.rand(3, 16)
    normalize = Normalization([0.4, 0.5, 0.6], [0.2, 0.3, 0.25], torch.device("cpu"))
    patches = patchify(normalize(images), 8)
    if name == "pca":
        target.fit([patches])
    features = torch.randn(3, 16, 32) if name == "teacher" else None
    loss = model(images, noise, normalize=normalize.patches, features=features, loss_only=True)
    loss.backward()
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()

    values = {
        "pixels": lambda: patches,
        "pca": lambda: (patches - target.mean) @ target.components.T,
        "hog": lambda: target(patches),
        "teacher": lambda: features,
    }[name]()
    prediction, removed = model(normalize(images), noise, features=features)[1:]
    error = (prediction - values).abs()
    error = torch.where(error < 1, error.square() / 2, error - 0.5) if name == "teacher" else error.square()
    expected = (error.mean(-1) * removed).sum() / removed.sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected.backward()
    for key, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(gradients[key], value.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WIDTHS)
def test_a_cross_decoder_predicts_a_share_of_the_removed_patches(name):
    torch.manual_seed(0)
    encoder = new_encoder(**SMALL)
    options = dict(target=name, width=WIDTHS[name], predict_ratio=1 / 3, decoder_embed_dim=16, decoder_num_heads=2)
    model = build_autoencoder(encoder, decoder="cross", decoder_depth=1, **options)
    images, noise, features = torch.randn(3, 3, 32, 32), torch.rand(3, 16), None
    patches = patchify(images, 8)
    if name == "pca":
        model.target.fit([patches])
    if name == "teacher":
        features = torch.randn(3, 16, 32)
    values = model.target(patches) if features is None else features
    chosen = noise.argsort(dim=1)[:, 4::3]  # every third of the twelve removed patches
    prediction = model(images, noise, features=features).prediction
    expected = model.target.loss(take(prediction, chosen), take(values, chosen))
    torch.testing.assert_close(model(images, noise, features=features, loss_only=True), expected, rtol=1e-5, atol=0)


def test_bad_flags(image_folder, targets, tmp_path):
    export_encoder(new_encoder(**SMALL, in_channels=1), tmp_path / "grey", mean=[0.5], std=[0.5])
    teacher = targets["teacher"][-1]
    starts = [
        ["--teacher", teacher],
        ["--target", "teacher"],
        ["--target", "hog", "--num_components", 5],
        ["--target", "pca", "--norm_pix_loss"],
        ["--target", "normalized", "--no-norm_pix_loss"],
        ["--target", "pca", "--num_components", 193],
        ["--target", "teacher", "--teacher", tmp_path / "grey"],
        ["--target", "teacher", "--teacher", tmp_path / "nowhere"],
    ]
    errors = (
        f"--teacher {teacher} has no effect without --target teacher; add it, or leave --teacher out",
        "--target teacher needs --teacher PATH",
        "--num_components 5 has no effect without --target pca; add it, or leave --num_components out",
        "--norm_pix_loss means --target normalized, which contradicts --target pca; leave one of them out",
        "--no-norm_pix_loss means --target pixels, which contradicts --target normalized; leave one of them out",
        "--num_components 193 is more than the 192 values of a patch; give at most that",
        f"--teacher {tmp_path / 'grey'}: input_channels of the teacher is 1 instead of 3; give another teacher",
        f"--teacher {tmp_path / 'nowhere'}: no such file or folder",
    )
    starts = [[*TINY, "--path_to_data", image_folder, *words] for words in starts]
    for (error,), expected in zip(refusals(SCRIPT, *starts, cwd=tmp_path), errors, strict=True):
        assert expected in error


def test_starting_from_weights_of_another_target(image_folder, tmp_path):
    sizes = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    statistics = dict(mean=[0.5] * 3, std=[0.5] * 3)
    model = build_autoencoder(new_encoder(**SMALL), **sizes)
    export_encoder(model.encoder, tmp_path / "encoder", **statistics)
    export_autoencoder(model, tmp_path / "encoder" / "pretraining", **statistics)
    flags = [*TINY, "--path_to_data", image_folder, "--target", "hog", "--max_steps", 1, "--init_from"]
    refused = run(SCRIPT, *flags, "encoder", cwd=tmp_path, code=2).stderr
    expected = "decoder.pred.bias is (192,) instead of (27,); target is normalized instead of hog; the decoder predicts"
    assert f"{expected} other values: give the file of its encoder alone" in refused
    said = run(SCRIPT, *flags, "encoder/model.safetensors", cwd=tmp_path).stdout
    assert "0 ignored, newly initialized: decoder" in said


def test_resuming_with_another_teacher_is_refused(flags, tmp_path):
    write_tower(tmp_path / "teacher", "Dinov2Model")
    flags = [*flags, "--target", "teacher", "--teacher", "teacher"]
    run(SCRIPT, *flags, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    before = flags_of(folder)["teacher"]
    assert before.startswith("sha256 ")
    write_tower(tmp_path / "teacher", "Dinov2Model", num_hidden_layers=1)
    refused = run(SCRIPT, *flags, "--resume_from_checkpoint", "latest", cwd=tmp_path, code=2).stderr
    assert f"differs from the run to resume, which has {before}" in refused and "Traceback" not in refused


def test_older_runs_state_the_target_as_norm_pix_loss(flags, tmp_path):
    flags = [*flags, "--max_steps", 5, "--no-norm_pix_loss"]
    run(SCRIPT, *flags, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    content = json.loads((folder / "args.json").read_text())
    assert content["flags"].pop("target") == "pixels" and "norm_pix_loss" not in content["flags"]
    for name in ("teacher", "num_components"):
        del content["flags"][name]
    content["flags"]["norm_pix_loss"] = False
    (folder / "args.json").write_text(json.dumps(content))
    assert open_trained(folder / "checkpoints" / "step_00000004").model.target.title == "plain pixels"
    resume = ["--resume_from_checkpoint", "step_00000004"]
    refused = run(SCRIPT, *flags[:-1], *resume, cwd=tmp_path, code=2).stderr
    assert "--target normalized differs from the run to resume, which has pixels" in refused
    run(SCRIPT, *flags, *resume, cwd=tmp_path)
