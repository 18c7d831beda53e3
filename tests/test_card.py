"""Tests of the model card: its code runs unchanged, and its numbers are those of the run."""

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import metadata_errors
from huggingface_hub import ModelCard
from PIL import Image
from random_modules import build_autoencoder

from modeling.classifier import Classifier
from modeling.export import (
    export_autoencoder,
    export_classifier,
    export_encoder,
    export_segmenter,
    libraries_of,
    vit_mae_misfit,
)
from modeling.mae import MaskedAutoencoder
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from training.card import ModelSummary, is_card, read_record, write_card
from training.launch import RunError

NAMES = ["cat", "dog", "owl", "gnu"]
SHAPES = {"": {}, ", grey": dict(in_channels=1), ", 32 x 64": dict(img_size=(32, 64))}
SHAPES[", 3 class tokens"] = dict(num_cls_tokens=3)
KINDS = [
    *(f"{kind}{shape}" for kind in ("encoder", "autoencoder", "classifier") for shape in SHAPES),
    *("segmenter", "segmenter, grey"),
]
SCRIPTS = {
    "autoencoder": "pretrain_mae.py",
    "classifier": "finetune_classifier.py",
    "segmenter": "finetune_segmentation.py",
}
TASKS = {"classifier": "image-classification", "segmenter": "image-segmentation"}


def build_model(kind: str) -> torch.nn.Module:
    """Return a small model whose outputs depend on the image."""
    torch.manual_seed(0)
    kind, comma, shape = kind.partition(", ")
    sizes = dict(img_size=(32, 32), patch_size=8, embed_dim=32, depth=2, num_heads=2) | SHAPES[comma + shape]
    model = VisionTransformer(**sizes)
    if kind == "autoencoder":
        decoder = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        model = build_autoencoder(model, **decoder)
    elif kind == "classifier":
        model = Classifier(model, len(NAMES), pooling="mean")
    elif kind == "segmenter":
        model = Segmenter(model, len(NAMES), head="linear", layers=[1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def export(model: torch.nn.Module, folder: Path) -> ModelSummary:
    """Write a model as push_to_hub.py does, and return its summary."""
    encoder = getattr(model, "encoder", model)
    statistics = dict(mean=[0.4, 0.5, 0.6][: encoder.in_channels], std=[0.2, 0.3, 0.2][: encoder.in_channels])
    if isinstance(model, Segmenter):
        export_segmenter(model, folder, classes=NAMES, resize=(128, 32), **statistics)
    elif isinstance(model, Classifier):
        export_classifier(model, folder, classes=NAMES, crop_ratio=0.875, **statistics)
    else:
        export_encoder(encoder, folder, **statistics)
        if isinstance(model, MaskedAutoencoder):
            export_autoencoder(model, folder / "pretraining", **statistics)
    return ModelSummary(
        task=TASKS.get(type(model).__name__.lower(), "image-feature-extraction"),
        description="ViT of 32 x 2",
        target=model.problem if isinstance(model, Classifier) else None,
        has_decoder=isinstance(model, MaskedAutoencoder),
        is_vit_mae=isinstance(model, MaskedAutoencoder) and not vit_mae_misfit(model),
        reconstructs=isinstance(model, MaskedAutoencoder) and model.target.invertible,
        libraries=libraries_of(model),
        has_encoder=(folder / "encoder").is_dir(),
        num_cls_tokens=encoder.num_cls_tokens,
        img_size=encoder.img_size,
        channels=encoder.in_channels,
        **statistics,
        value_range=None,
        notes=["A note."],
        origin="weights.pth (the official MAE)",
        step=None,
    )


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """Return a folder with photo.jpg."""
    folder = tmp_path_factory.mktemp("photo")
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(small).resize((90, 70), Image.Resampling.BICUBIC).save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_code_runs_unchanged(kind, photo, tmp_path, monkeypatch, capsys, hub):
    """The code runs on a local folder and on the Hub, and the libraries compute the same as our module."""
    model, folder = build_model(kind), tmp_path / "a folder"
    summary = export(model, folder)
    hub.enter(monkeypatch, tmp_path)
    monkeypatch.chdir(photo)
    hub.add("owner/name", folder)
    for repo_id, name in ((None, str(folder)), ("owner/name", "owner/name")):
        write_card(folder, summary, None, location=folder, repo_id=repo_id)
        card = (folder / "README.md").read_text()
        codes = code_blocks(card, "python")
        square_autoencoder = kind.startswith("autoencoder") and "32 x 64" not in kind
        expected = 3 if square_autoencoder else 1 if kind.startswith("segmenter") else 2
        if "class tokens" in kind:  # only transformers supports them, without a head
            expected = 0 if kind.startswith("classifier") else 1
            assert kind.startswith("classifier") or "(1, 3 + patches, width), the class tokens first" in codes[0]
        assert len(codes) == expected
        for code in codes:
            assert name in code and ("photo.jpg" in code) == (summary.channels == 3)
            variables = {}
            exec(compile(code, "card", "exec"), variables)
            check_outputs(code, variables, model, capsys.readouterr().out)
        (commands,) = code_blocks(card, "bash")
        for words in map(shlex.split, commands.splitlines()):
            assert words[0] == "python" and (f"hf:{name}" if repo_id else name) in words
        assert bool(hub.requests) == bool(repo_id and codes)  # a local folder needs no network


@torch.inference_mode()
def check_outputs(code: str, variables: dict, model: torch.nn.Module, stdout: str) -> None:
    """Compare the results of a code block of the card with our own module on the same images."""
    encoder = getattr(model, "encoder", model)
    if "pipeline" in code:
        answers = ast.literal_eval(re.sub(r"<PIL[^>]*>", "None", stdout))
        assert answers and {answer["label"] for answer in answers} <= {*NAMES}
        return
    images = variables["images"]
    assert images.shape == (1, encoder.in_channels, *encoder.img_size)
    if "tokens" in variables:
        torch.testing.assert_close(variables["tokens"], encoder(images), rtol=0, atol=1e-5)
    elif "best" in variables:
        assert stdout.strip() == NAMES[model(images).argmax(dim=1).item()]
    elif "labels" in variables:
        assert (variables["labels"] == model(images).argmax(dim=1)).float().mean() > 0.999
    else:
        assert variables["output"].mask.mean() == 0.75 and variables["output"].logits.isfinite().all()


def write_run(folder: Path, script: str = "pretrain_mae.py", *, finished: bool = True, **more_flags) -> Path:
    """Write the files of a run of 40 steps (30 if unfinished), validated every 20, with a truncated last log line."""
    folder.mkdir(parents=True)
    flags = dict(experiment_name="x", path_to_data="/data/beans", epochs=4, max_steps=40, global_batch_size=16)
    flags |= {
        "pretrain_mae.py": dict(mask_ratio=0.75, mask_strategy="random", target="normalized", init_from=None),
        "finetune_classifier.py": dict(path_to_pretrained_mae_weights=None, linear_probe=False, trainable_blocks=None),
        "finetune_segmentation.py": dict(path_to_backbone_checkpoint=None, crop_size=32, evaluate="slide"),
    }[script]
    args = {
        "flags": flags | more_flags,
        "data": {"images": 160, "bytes": 2_000_000, "held_out": 30},
        "command": f"{script} --path_to_data /data/beans",
        "processes": 2,
        "versions": {"python": "3.12.1", "torch": "2.9.0"},
        "git_revision": "abc1234",
        "machine": {"system": "Linux", "cores": 8, "gpus": ["NVIDIA H200", "NVIDIA H200"]},
        "resumed": [{"step": 30, "command": "again", "processes": 1, "machine": {"cores": 8, "gpus": []}}],
    }
    (folder / "args.json").write_text(json.dumps(args))
    metrics_at = {
        "pretrain_mae.py": lambda step: {
            **{"val_loss": 1 / step, "masked_psnr": 10 + step, "masked_ssim": float("nan")},
            "masked_psnr_visible_mean": 9.5,
        },
        "finetune_classifier.py": lambda step: {"top1": step, "per_class_accuracy": {"cat": step, "dog": None}},
        "finetune_segmentation.py": lambda step: {"mean_iou": step, "per_class_iou": {"cat": 1.0}},
    }[script]
    lines = []
    for step in range(1, 41 if finished else 31):
        lines.append({"step": step, "epoch": step / 10, "loss": 2 / step, "learning_rate": 0.1})
        if step % 20 == 0:
            lines.append({"step": step, "epoch": step / 10, **metrics_at(step), "advice": "check"})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    if finished:
        end = {"step": 40, "epoch": 4.0, "seconds": 7200.0, "images_per_second": 12.5, "best_step": 20}
        (folder / "metrics.json").write_text(json.dumps(end | metrics_at(40)))
    pictures = folder / ("reconstructions" if script == "pretrain_mae.py" else "predictions")
    pictures.mkdir()
    for step in (20, 40):
        Image.new("RGB", (step, step)).save(pictures / f"step_{step:08d}.png")
    return folder


def card_of(run_folder: Path, kind: str = "autoencoder", *, step: int | None = 40, **options):
    """Export a model of the run; return the folder and the card."""
    folder = run_folder / "hub"
    summary = export(build_model(kind), folder)._replace(step=step)
    write_card(folder, summary, read_record(run_folder), location=folder, **options)
    return folder, ModelCard.load(folder / "README.md")


@pytest.mark.parametrize(("kind", "script"), SCRIPTS.items())
def test_scores_and_settings_of_the_run(kind, script, tmp_path):
    folder, card = card_of(write_run(tmp_path / "run", script), kind, license="mit", datasets=["some/beans"])
    assert not metadata_errors((folder / "README.md").read_text()) and is_card(folder / "README.md")
    data = card.data
    assert (data.library_name, data.license, data.datasets) == ("transformers", "mit", ["some/beans"])
    assert data.pipeline_tag == TASKS.get(kind, "image-feature-extraction")
    scores = {result.metric_type: result.metric_value for result in data.eval_results}
    expected = {"classifier": {"accuracy": 40}, "segmenter": {"mean_iou": 40}}
    assert scores == expected.get(kind, {"loss": 0.025, "psnr": 50})
    assert {result.dataset_name for result in data.eval_results} == {"some/beans"}
    command = f"accelerate launch --num_processes 2 {script} --path_to_data /data/beans"
    assert command in code_blocks(card.text, "bash")
    for text in (
        "step 40 of 40",
        "Measured after step 40 on 30 validation images",
        "| data | `/data/beans`: 160 images, about 2.0 MB, 30 for validation |",
        "| optimizer steps | 40 (4 epochs) |",
        "| hardware | 2 x NVIDIA H200, processes: 2 |",
        "| resumed after step 30 | `again`, no GPU, 8 CPU cores, processes: 1 |",
        "| time | 2 hours, 12.5 images/s including validation and saving |",
        "| versions | python 3.12.1, torch 2.9.0, revision abc1234 |",
        "| global_batch_size | 16 |",
        "- A note.",
    ):
        assert text in card.text
    assert "not finished" not in card.text and "trainable_blocks" not in card.text
    picture = {"autoencoder": "reconstructions.png", "classifier": "confusion.png"}.get(kind, "predictions.png")
    assert re.findall(r"!\[.*?\]\((.*?)\)", card.text) == [picture, "loss.png"]
    assert Image.open(folder / picture).size == (40, 40) and Image.open(folder / "loss.png").size == (800, 400)
    assert ("true mean and standard deviation" in card.text) == (kind == "autoencoder")
    assert ("| PSNR of the masked patches with each patch's true mean and" in card.text) == (kind == "autoencoder")
    assert "mean visible colour" not in card.text  # this baseline does not use true patch statistics
    assert ("sliding windows" in card.text) == (kind == "segmenter")


def test_psnr_of_plain_pixels_stands_beside_its_baseline(tmp_path):
    _, card = card_of(write_run(tmp_path / "run", target="pixels"))
    assert [result.metric_value for result in card.data.eval_results] == [0.025, 50, 9.5]
    for line in ("masked patches (dB) | 50 |", "masked patches filled with the mean visible colour (dB) | 9.5 |"):
        assert line in card.text


def test_scores_and_pictures_are_those_of_the_step(tmp_path):
    run = write_run(tmp_path / "run", "finetune_classifier.py")
    folder, card = card_of(run, "classifier", step=20)
    assert [result.metric_value for result in card.data.eval_results] == [20]
    assert "step 20 of 40" in card.text and Image.open(folder / "confusion.png").size == (20, 20)
    folder, card = card_of(run, "classifier", step=25)  # validated after other steps only
    assert card.data.eval_results is None and "## Results" not in card.text
    assert Image.open(folder / "confusion.png").size == (20, 20)
    (folder / "confusion.png").unlink()
    folder, card = card_of(run, "classifier", step=19)  # before the first picture
    assert "confusion" not in card.text and not (folder / "confusion.png").exists()


def test_unfinished_run(tmp_path):
    run = write_run(tmp_path / "run", finished=False)
    _, card = card_of(run, step=30)
    assert "**The run is not finished:** the weights are those after step 30 of 40." in card.text
    assert "| time |" not in card.text and "resumed" not in card.text and card.data.eval_results is None


def test_card_of_weights_that_belong_to_no_run(tmp_path):
    folder = tmp_path / "encoder"
    summary = export(build_model("encoder"), folder)._replace(notes=[], origin="hf:some/model@main (x)")
    write_card(folder, summary, None, location=folder)
    text = (folder / "README.md").read_text()
    assert "A Vision Transformer, converted from hf:some/model@main (x)." in text and "# encoder\n" in text
    for word in ("## Training", "## Results", "## Limits", "masked autoencoder", " None"):
        assert word not in text
    assert not metadata_errors(text) and ModelCard(text).data.base_model == "some/model"


def test_names_that_are_no_text(tmp_path):
    run = write_run(tmp_path / "caf\udce9", path_to_data="/data/caf\udce9")
    assert "`/data/caf\\udce9`" in card_of(run)[1].text and read_record(run).flags["path_to_data"] == "/data/caf\udce9"


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("classifier", {}, ", trained from scratch."),
        ("classifier", dict(path_to_pretrained_mae_weights="mae.pth"), "fine-tuned.\nTraining started from"),
        ("classifier", dict(path_to_pretrained_mae_weights="x", linear_probe=True), ": a linear head on a frozen"),
        ("segmenter", dict(path_to_backbone_checkpoint="x", freeze_encoder=True), ": a head on a frozen encoder"),
        ("classifier", dict(path_to_pretrained_mae_weights="x", trainable_blocks=4.0), "and the last 4 blocks"),
        ("segmenter", dict(path_to_backbone_checkpoint="hf:a/b@v1"), "Training started from the weights `hf:a/b@v1`."),
        ("autoencoder", dict(mask_ratio=0.6), "60% of the patches of each image were masked"),
    ],
)
def test_introduction(kind, flags, words, tmp_path):
    _, card = card_of(write_run(tmp_path / "run", SCRIPTS[kind], **flags), kind)
    assert words in card.text
    assert card.data.base_model == ("a/b" if "hf:a/b@v1" in flags.values() else None)
    scratch = kind != "autoencoder" and not any(name.startswith("path_to_") for name in flags)
    assert ("masked-autoencoder" in card.data.tags) is not scratch


def test_read_record(tmp_path):
    run = write_run(tmp_path / "run", "finetune_segmentation.py")
    record = read_record(run)
    assert len(record.log) == 42
    assert record.metrics_at(20)["mean_iou"] == 20 and record.metrics_at(21) == {}
    for path in (tmp_path, tmp_path / "none", run / "args.json"):
        assert read_record(path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", b"{"),
        ("args.json", b'{"flag": {}}'),
        ("args.json", b'{"flags": {}}'),
        ("metrics.json", b"3."),
        ("metrics.json", b"{}"),
    ],
)
def test_damaged_files_are_errors(name, content, tmp_path):
    (write_run(tmp_path / "run") / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} is damaged; expected"):
        read_record(tmp_path / "run")


def test_is_card(tmp_path):
    path = tmp_path / "README.md"
    assert not is_card(path)
    for text in ("---\ntags:\n- vit\n---\n", "no metadata\n- mae-accelerate\n", "---\na: 1\n---\n- mae-accelerate\n"):
        path.write_text(text)
        assert not is_card(path), text
