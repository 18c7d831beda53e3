import json
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run

from benchmarks import compare, data, deploy, evaluation, hours, scaling, step
from modeling.classifier import Classifier
from modeling.export import export_classifier
from modeling.vit import SIZES, VisionTransformer
from training.launch import RunError

ROOT = Path(__file__).parent.parent
KEYS = {"name", "ours", "theirs", "unit", "ratio", "machine"}
SMALL = ["--model", "tiny", "--img_size", "32", "--batch_size", "2", "--rounds", "1", "--mixed_precision", "no"]
SHALLOW = SIZES["tiny"] | dict(img_size=32, depth=2)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def check_comparison(row: dict, name: str) -> None:
    """Check a figure of one round that compares images/s."""
    assert row["name"] == name and row["unit"] == "images/s"
    assert row["ours"] > 0 and row["theirs"] > 0
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])


def test_data_is_measured_against_torchvision(image_folder, tmp_path):
    photos = shutil.copytree(image_folder / "train", tmp_path / "photos")
    damaged = min(path for path in photos.rglob("*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:300])
    flags = ["--path_to_data", photos, "--num_images", 10, "--img_size", 32, "--rounds", 1]
    process = run("benchmarks/data.py", *flags, "--workers", 1, "--json", "out.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())
    forms = ["file to batch", "file to batch, --fast_decoding"]
    forms += ["prepared, short side 256, JPEG", "prepared, short side 256, arrays"]
    names = ["decoding alone", *forms, *(f"{form}, 1 worker (theirs: none)" for form in forms)]
    assert [row["name"].removeprefix("data: ") for row in rows] == names
    for row in rows:
        assert set(row) == KEYS
        check_comparison(row, row["name"])
    assert f"ratio {rows[0]['ratio']:.2f} images/s" in process.stdout and "cores" in rows[0]["machine"]
    assert f"left out   1 image that cannot be read: {damaged}" in process.stdout


def test_as_many_loader_workers_as_training_has(monkeypatch):
    monkeypatch.setattr(data, "default_workers", lambda: 7)
    assert data.parse_args(["--path_to_data", "x"])[0].workers == [7]
    assert data.parse_args(["--path_to_data", "x", "--workers", "8", "14"])[0].workers == [8, 14]


def test_both_sides_read_the_same_images_and_no_damaged_ones(image_folder, tmp_path, monkeypatch, capsys):
    photos = shutil.copytree(image_folder / "train", tmp_path / "photos")
    paths = sorted(path for path in photos.rglob("*") if path.is_file())
    paths[1].write_bytes(paths[1].read_bytes()[:300])
    paths[3].write_text("no image")
    expected = [str(paths[i]) for i in (0, 2, 4, 5)]
    source = data.readable_images(data.FolderSource(photos), 4)
    assert [source.name(i) for i in range(len(source))] == expected
    assert "left out   2 images" in capsys.readouterr().out

    ours, theirs = [], []
    open_image, fetch = data.Image.open, data.FileSource.fetch

    def time_once(works, rounds):
        for work in works.values():
            work()
        return {name: [1.0] for name in works}

    def fetch_noted(self, indices):
        ours.extend(map(self.name, indices))
        return fetch(self, indices)

    monkeypatch.setattr(data, "time_in_turns", time_once)
    monkeypatch.setattr(data, "loader_rate", lambda *given: 1.0)
    monkeypatch.setattr(data.Image, "open", lambda path: theirs.append(path) or open_image(path))
    monkeypatch.setattr(data.FileSource, "fetch", fetch_noted)
    figures = list(data.measure(source, img_size=32, num_images=4, rounds=1, workers=[1]))
    assert theirs == expected and ours == 3 * expected  # decoding, and batches without and with --fast_decoding
    assert all(figure["ours"] == figure["theirs"] == 4 for figure in figures[:5])  # 4 images in 1 second

    for path in paths:
        path.write_text("no image")
    with pytest.raises(data.DataError, match="no image that both sides can read"):
        data.readable_images(data.FolderSource(photos), 4)


def test_ours_reads_as_many_images_as_theirs():
    items = []
    data.read_ours(SimpleNamespace(__getitems__=items.extend), 35)
    assert items == [(0, index) for index in range(35)]


def test_a_training_step_is_measured_against_transformers(tmp_path):
    process = run("benchmarks/step.py", *SMALL, "--json", "out.json", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert set(row) == KEYS
    check_comparison(row, "train: mae tiny eager, theirs eager")
    assert "theirs: transformers" in process.stdout and f"ratio {row['ratio']:.2f} images/s" in process.stdout


def test_the_encoder_is_measured_against_timm(tmp_path, capsys, on_cpu):
    flags = [*SMALL, "--task", "encoder", "--mixed_precision", "bf16"]
    step.main([*flags, "--json", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    check_comparison(row, "train: encoder tiny eager, theirs eager")
    assert "bf16" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["mae", "encoder", "classifier"])
def test_compiled_is_compared_with_the_faster_of_theirs(task, monkeypatch, on_cpu):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options) or forward)
    sides = step.new_sides(task, SHALLOW, batch_size=2, precision="bf16", compiled=True)
    step.check_equal_work(sides)
    eager, best = step.measure("step", sides, rounds=1)
    check_comparison(eager, "step eager, theirs eager")
    check_comparison(best, best["name"])
    if best["name"] == "step compiled, theirs eager":
        assert best["theirs"] == eager["theirs"]
    else:
        assert best["name"] == "step compiled, theirs compiled" and best["theirs"] >= eager["theirs"]
    assert compiled == [dict(fullgraph=True, dynamic=False), dict(fullgraph=False, dynamic=False)]


@pytest.mark.slow  # takes more than half a minute
@pytest.mark.parametrize("task", ["mae", "encoder"])
def test_both_sides_compile(task, on_cpu):
    sides = step.new_sides(task, SHALLOW, batch_size=2, precision="no", compiled=True)
    step.check_equal_work(sides)
    _, best = step.measure("step", sides, rounds=1)
    check_comparison(best, best["name"])


@pytest.mark.parametrize("task", ["mae", "encoder", "classifier"])
def test_sides_that_compute_something_else_are_refused(task, on_cpu):
    sides = step.new_sides(task, SHALLOW, batch_size=2, precision="no")
    step.check_equal_work(sides)
    parameters = sides["theirs", "eager"].model.named_parameters()
    with torch.no_grad():
        next(parameter for name, parameter in parameters if name.endswith("fc1.weight")).mul_(1.05)
    with pytest.raises(RunError, match=r"do not compute the same loss .*ours eager: .*theirs eager: "):
        step.check_equal_work(sides)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_official_manner_computes_the_same_loss_and_gradients(precision, on_cpu):
    sides = step.new_sides("mae", SHALLOW, batch_size=3, precision=precision, official_manner=True)
    step.check_equal_work(sides)
    ours, _, official = sides.values()
    assert list(sides)[2] == ("official manner", "eager") and official.inputs[0].dtype == torch.float32
    assert ours.inputs[0].dtype == torch.uint8 and not official.optimizer.defaults["fused"]
    if precision == "no":
        for side in (ours, official):
            side.backward()
        theirs = dict(official.model.named_parameters())
        for name, parameter in ours.model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)
    names = [row["name"] for row in step.measure("step", sides, rounds=1)]
    assert names == ["step eager, theirs eager", "step eager, official manner eager"]


def test_a_gpu_is_timed_by_events_over_many_steps(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    seconds = compare.time_in_turns({"a": lambda: calls.append("a")}, rounds=2, warmup=0, timer=compare.events)
    assert seconds == {"a": [0.025, 0.025]} and calls == 2 * ["record", *20 * ["a"], "record", "wait"]


def test_defaults_on_a_gpu(monkeypatch):
    for gpu, expected in ((True, (256, "bf16")), (False, (16, "no"))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        args, _ = step.parse_args([])
        assert (args.batch_size, args.mixed_precision) == expected


def test_the_peak_memory_is_that_of_one_side(monkeypatch, on_cpu):
    side = step.new_sides("mae", SHALLOW, batch_size=2, precision="no")["ours", "eager"]
    side.step()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7000)
    parameters = list(side.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    states = sum(8 * parameter.numel() + 4 for parameter in trained)  # two moments and the number of steps
    assert side.peak_memory() == 2000 + 4 * sum(parameter.numel() for parameter in parameters) + states


@pytest.fixture
def in_threads(monkeypatch):
    """Replace the process pool of benchmarks/evaluation.py with threads."""
    monkeypatch.setattr(evaluation, "ProcessPoolExecutor", lambda number, **options: ThreadPoolExecutor(number))


def test_evaluation_is_measured_against_the_published_metric(tmp_path, capsys, in_threads):
    flags = ["--num_images", "3", "--size", "40", "--classes", "254", "--rounds", "2"]
    evaluation.main([*flags, "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())
    name = "evaluate: 254 classes, 40 pixels, 3 masks"
    assert [(row["name"], row["unit"]) for row in rows] == [(name, "images/s"), (f"{name}: peak memory", "GB")]
    for row in rows:
        assert set(row) == KEYS and row["ours"] > 0 and row["theirs"] > 0
        assert f"ratio {row['ratio']:.2f} {row['unit']}" in printed
    assert rows[1]["ratio"] == rows[1]["theirs"] / rows[1]["ours"]


@pytest.mark.parametrize(("size", "classes"), [(17, 2), (64, 9)])
def test_both_sides_have_the_mean_iou_of_sets_of_pixels(size, classes):
    prediction, annotation = np.stack(list(evaluation.random_masks(3, size, classes)), axis=1)
    assert prediction.shape == (3, size, size) and prediction.dtype == annotation.dtype == np.uint8
    assert 0.02 < (annotation == 255).mean() < 0.3 and prediction.max() == classes - 1
    valid = annotation != 255
    ious = []
    for number in range(classes):
        predicted, labelled = (prediction == number) & valid, annotation == number
        if (predicted | labelled).any():
            ious.append((predicted & labelled).sum() / (predicted | labelled).sum())
    for side in ("ours", "theirs"):
        mean_iou, seconds, memory = evaluation.score(side, 3, size, classes)
        assert mean_iou == pytest.approx(100 * np.mean(ious), abs=1e-10) and 30 < mean_iou < 90
        assert seconds > 0 and memory > 0


def test_different_mean_ious_are_not_reported(monkeypatch, in_threads):
    areas = evaluation.segmentation_areas
    monkeypatch.setattr(evaluation, "segmentation_areas", lambda *masks: areas(*masks) + 1)
    with pytest.raises(RunError, match=r"not give the same mean IoU \(ours \d+\.\d+ %, theirs \d+\.\d+ %\)"):
        list(evaluation.measure(2, 20, 5, rounds=1))


def test_int8_is_measured_against_float32(image_folder, tmp_path):
    """The classifier always predicts class_0, which is the class of 6 of the 11 validation images."""
    model = Classifier(VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=2), 2)
    model.head.bias.data[0] = 100
    statistics = dict(mean=[0.5] * 3, std=[0.25] * 3, crop_ratio=0.875)
    export_classifier(model, tmp_path / "model", classes=["class_0", "class_1"], **statistics)
    flags = [tmp_path / "model", "--path_to_data", image_folder, "--rounds", 1, "--batch_sizes", 2]
    deploy.main([str(word) for word in [*flags, "--json", tmp_path / "out.json"]])
    size, speed, quantized, top1 = json.loads((tmp_path / "out.json").read_text())
    assert 1.5 < size["ratio"] < 4 and (top1["ours"], top1["theirs"]) == pytest.approx((600 / 11, 600 / 11))
    check_comparison(speed, "batch 2: ONNX Runtime against PyTorch")
    check_comparison(quantized, "batch 2: int8 against float32")


@pytest.mark.slow
def test_two_processes_are_measured_against_one(tmp_path, monkeypatch, capsys, on_cpu):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    scaling.main([*SMALL, "--steps", "1", "--json", str(tmp_path / "out.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    one, two = (f"scale: tiny, 32 pixels, batch 2, {count}" for count in ("1 process", "2 processes"))
    checkpoint = "scale: checkpoint, tiny"
    units = {"": "images/s", ": start": "s", ": data wait": "%"}
    units = {name + suffix: unit for name in (one, two) for suffix, unit in units.items()}
    units |= {checkpoint: "s", f"{checkpoint}: size": "MB"}
    assert {name: row["unit"] for name, row in rows.items()} == units
    assert all(set(row) == KEYS for row in rows.values())

    check_comparison(rows[two], two)
    start = rows[f"{two}: start"]
    assert start["ratio"] == pytest.approx(start["theirs"] / start["ours"])
    assert start["theirs"] == rows[f"{one}: start"]["ours"] and 0 < start["ours"] < 120
    compared = {two, f"{two}: start"}
    assert all(row["theirs"] is row["ratio"] is None for name, row in rows.items() if name not in compared)
    assert all(0 <= rows[f"{name}: data wait"]["ours"] <= 100 for name in (one, two))
    assert f"ratio {rows[two]['ratio']:.2f} images/s" in capsys.readouterr().out

    model = step.new_model("mae", SIZES["tiny"] | dict(img_size=32))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = 12e-6 * parameters  # a weight and two moments, of 4 bytes
    assert rows[f"{checkpoint}: size"]["ours"] == pytest.approx(size, rel=0.01)
    assert 0 < rows[checkpoint]["ours"] < 60 and not list(scratch.iterdir())


def test_a_run_that_cannot_train_says_why(tmp_path, monkeypatch, on_cpu):
    (tmp_path / "pretrain_mae.py").write_text("raise SystemExit('error: the disk is full')")
    monkeypatch.setattr(scaling, "SCRIPT", tmp_path / "pretrain_mae.py")
    with pytest.raises(RunError, match=r"^pretrain_mae.py has failed: (.|\n)*error: the disk is full"):
        scaling.pretrain([], processes=1, batch_size=2, num_images=2, steps=1)


@pytest.mark.parametrize(("gpus", "processes"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_scaling_takes_all_gpus_by_default_and_no_more(gpus, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args, errors = scaling.parse_args([])
    assert not errors and args.processes == processes
    assert (args.steps, args.mixed_precision) == ((100, "bf16") if gpus else (5, "no"))
    args, errors = scaling.parse_args(["--processes", "9", "4", "9"])
    assert args.processes == [1, 4, 9] and not errors


@pytest.mark.parametrize(
    ("script", "flags", "expected"),
    [
        (data, "--num_images 3", "--path_to_data"),
        (data, "--path_to_data NOWHERE", "NOWHERE is not a folder"),
        (step, "--task both", "--task"),
        (step, "--model base --img_size 230", "--img_size 230 is not divided by the patches of base, 16 pixels"),
        (step, "--task encoder --official_manner", "--official_manner has no --task encoder"),
        (step, "--processes 2", "--processes is not a flag"),
        (evaluation, "--classes 255", "from 2 to 254"),
        (deploy, "--path_to_data NOWHERE", "--path_to_data needs a classifier; give MODEL"),
        (deploy, "NOWHERE", "no such file or folder"),
        (scaling, "--rounds 0", "--rounds"),
        (scaling, "--model huge --img_size 32", "--img_size 32 is not divided by the patches of huge, 14 pixels"),
    ],
)
def test_bad_flags_are_refused(script, flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(flags.split())
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_only_figures_are_overwritten(tmp_path, capsys):
    names = {"list.json": "[1]", "object.json": '{"name": 1}', "notes.txt": "mine", "bytes": "\x00", "folder": None}
    for name, text in names.items():
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    (tmp_path / "link").symlink_to("nowhere")
    for name in (*names, "link", "missing/out.json"):
        with pytest.raises(SystemExit) as ended:
            step.parse_args(["--json", str(tmp_path / name)])
        expected = "has no folder; create it" if "/" in name else "holds something else; give another name"
        assert ended.value.code == 2 and f"--json: {tmp_path / name} {expected}" in capsys.readouterr().err
    for _ in range(2):
        path = step.parse_args(["--json", str(tmp_path / "out.json")])[0].json
        compare.report([compare.figure("a", [1.0], "images/s")], path)
    assert len(json.loads((tmp_path / "out.json").read_text())) == 1


@pytest.mark.parametrize("model", SIZES)
def test_defaults_suit_every_model(model):
    args, errors = step.parse_args(["--model", model])
    assert not errors and args.img_size == 224 and args.rounds == 5


def test_the_hours_of_the_budget_recipes_are_those_that_they_state(capsys):
    recipes = sorted((ROOT / "recipes" / "budget").glob("*.args"))
    hours.main([*map(str, recipes), str(ROOT / "recipes/paper/pretrain_base.args")])
    *rows, paper = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert float(paper[4]) == pytest.approx(800 * 312 * 4096 / 1980 / 3600, rel=0.01)
    for path, row in zip(recipes, rows, strict=True):
        stated = re.search(r"or faster: at least ([\d.]+) hours", path.read_text())[1]
        assert float(row[4]) == pytest.approx(float(stated), rel=0.01) and str(path) in row[0]
        line = re.search(rf"\| `{path.stem}`.*", (ROOT / "docs" / "pretraining.md").read_text())[0].split(" | ")
        assert [float(line[1]), float(line[3])] == [float(row[1]), pytest.approx(float(row[4]), rel=0.01)]
        assert float(line[2].replace(",", "")) == pytest.approx(float(row[3].replace(",", "")), rel=0.02)
