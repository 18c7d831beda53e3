import json
import os
import pickle
import subprocess
import sys
import tempfile
import time

import numpy as np
import psutil
import pytest
import torch
from conftest import run

import benchmark
from training.launch import RunError

KEYS = {"name", "ours", "theirs", "unit", "ratio", "machine"}
SMALL = ["--model", "tiny", "--img_size", "32", "--batch_size", "2", "--rounds", "1", "--mixed_precision", "no"]
SETTING = benchmark.Setting("tiny", 32, 2, "no", 1)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def shallow(monkeypatch):
    """A tiny model of two blocks."""
    monkeypatch.setitem(benchmark.SIZES, "tiny", benchmark.SIZES["tiny"] | dict(depth=2))


def check_comparison(entry: dict, name: str) -> None:
    """A row of one round that compares images/s."""
    assert set(entry) == KEYS and entry["name"] == name and entry["unit"] == "images/s"
    assert entry["ours"] > 0 and entry["theirs"] > 0
    assert abs(entry["ratio"] / (entry["ours"] / entry["theirs"]) - 1) < 1e-6


def test_data_is_measured_against_torchvision_and_by_stage(image_folder, tmp_path):
    flags = ["--path_to_data", image_folder / "train", "--num_images", 10, "--img_size", 32, "--rounds", 1]
    done = run("benchmark.py", "data", *flags, "--json", "out.json", cwd=tmp_path)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"].removeprefix("data: ") for row in rows] == [
        *("file to batch", "file to batch, --fast_decoding"),
        *("prepared, short side 256, JPEG", "prepared, short side 256, arrays"),
        *("PSNR to Pillow, exact, all crops", "PSNR to Pillow, exact, least"),
        *("PSNR to Pillow, --fast_decoding, all crops", "PSNR to Pillow, --fast_decoding, least"),
        *("read", "decode", "crop and resize", "collate", "the limit, decoding alone"),
        *("no worker", "1 worker (theirs: none)", "2 workers (theirs: 1)"),
    ]
    assert all(set(row) == KEYS for row in rows)
    for row in rows[:4]:
        check_comparison(row, row["name"])
    assert min(row["ours"] for row in rows[4:8]) > 50  # dB
    assert f"ratio {rows[0]['ratio']:.2f}" in done.stdout and "cores" in rows[0]["machine"]


def test_a_training_step_is_measured_against_transformers(tmp_path):
    done = run("benchmark.py", "train", *SMALL, "--json", "out.json", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    (row,) = json.loads((tmp_path / "out.json").read_text())
    check_comparison(row, "train: mae tiny eager")
    assert "theirs: transformers" in done.stdout and "sdpa" in done.stdout
    assert f"ratio {row['ratio']:.2f} images/s" in done.stdout


def test_the_encoder_is_measured_against_timm(tmp_path, capsys, on_cpu):
    flags = [*SMALL, "--task", "encoder", "--mixed_precision", "bf16", "--gradient_checkpointing"]
    benchmark.main(["train", *flags, "--json", str(tmp_path / "out.json")])
    (row,) = json.loads((tmp_path / "out.json").read_text())
    check_comparison(row, "train: encoder tiny eager")
    assert "bf16" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["mae", "encoder", "classifier"])
def test_compiled_is_compared_with_the_better_of_theirs(task, monkeypatch, shallow, on_cpu):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options) or forward)
    setting = SETTING._replace(precision="bf16")
    eager, both, best = benchmark.benchmark_train(task, setting, compiled=True, gradient_checkpointing=True)
    check_comparison(eager, f"train: {task} tiny eager")
    check_comparison(both, f"train: {task} tiny compiled")
    theirs = "eager" if eager["theirs"] > both["theirs"] else "compiled"
    check_comparison(best, f"train: {task} tiny compiled, theirs {theirs} (their best)")
    assert best["ours"] == both["ours"] and best["theirs"] == max(eager["theirs"], both["theirs"])
    assert compiled == [dict(fullgraph=True, dynamic=False), dict(fullgraph=False, dynamic=False)]


@pytest.mark.slow  # half a minute and more
@pytest.mark.parametrize("task", ["mae", "encoder"])
def test_both_sides_compile(task, shallow, on_cpu):
    rows = list(benchmark.benchmark_train(task, SETTING, compiled=True, gradient_checkpointing=False))
    check_comparison(rows[1], f"train: {task} tiny compiled")


@pytest.mark.parametrize(
    "task, peer", [("mae", "transformers_peer"), ("encoder", "timm_peer"), ("classifier", "timm_peer")]
)
def test_sides_that_compute_something_else_are_not_timed(task, peer, monkeypatch, shallow, on_cpu):
    new_peer = getattr(benchmark, peer)

    def changed_peer(model, *, gradient_checkpointing):
        theirs = new_peer(model, gradient_checkpointing=gradient_checkpointing)
        with torch.no_grad():
            next(p for name, p in theirs.named_parameters() if name.endswith("fc1.weight")).mul_(1.05)
        return theirs

    monkeypatch.setattr(benchmark, peer, changed_peer)
    monkeypatch.setattr(benchmark, "alternate", None)
    with pytest.raises(RunError, match=r"do not compute the same loss .*ours eager: .*theirs eager: "):
        list(benchmark.benchmark_train(task, SETTING, compiled=False, gradient_checkpointing=False))


def test_operations_of_the_encoder():
    """Against the count of the autoencoder, whose encoder sees all patches but one."""
    encoder = benchmark.new_model("encoder", SETTING, gradient_checkpointing=False)
    widths = 12 * 192**2  # of a block: four projections, and two layers of four times the width
    forward = 4 * 768 * 192 + 12 * (5 * widths + 2 * 5**2 * 192)
    assert benchmark.encoder_flops(encoder) == 6 * forward


def test_the_cost_of_larger_work_and_of_starting(tmp_path, capsys, on_cpu):
    flags = ["--img_sizes", "32", "--batch_sizes", "2", "--json", str(tmp_path / "out.json")]
    benchmark.main(["cost", *SMALL, *flags])
    rows = json.loads((tmp_path / "out.json").read_text())
    name = "cost: tiny, 32 pixels, batch 2"  # once, though both lists have it
    units = {name: "images/s", f"{name}: peak memory": "GB", "cost: start of pretrain_mae.py, tiny": "s"}
    assert {row["name"]: row["unit"] for row in rows} == units
    printed = capsys.readouterr().out
    for row in rows:
        assert set(row) == KEYS and row["ours"] > 0 and row["theirs"] is None and row["ratio"] is None
        assert f"{row['ours']:.2f} {row['unit']}" in printed


def test_a_want_of_memory_is_a_result(monkeypatch, capsys, on_cpu):
    monkeypatch.setattr(benchmark, "in_new_process", lambda work, *values: work(*values))
    monkeypatch.setattr(benchmark, "pretrain", lambda setting, num_images: benchmark.Run(1.0, 1.0, 0.0, 1))
    benchmark.main(["cost", *SMALL, "--img_sizes", "32", "--batch_sizes", str(10**10)])
    lines = capsys.readouterr().out.splitlines()
    assert sum("out of memory" in line for line in lines) == 2
    assert all("batch 10000000000" in line for line in lines if "out of memory" in line)


@pytest.fixture
def in_this_process(monkeypatch):
    """Nothing is started, but everything goes through what a process would be sent."""

    def work_here(work, *values):
        work, *values = pickle.loads(pickle.dumps((work, *values)))
        return work(*values)

    monkeypatch.setattr(benchmark, "in_new_process", work_here)
    monkeypatch.setattr(benchmark, "pin_to_one_core", lambda: None)


@pytest.mark.slow
def test_two_processes_are_measured_against_one(tmp_path, monkeypatch, capsys, on_cpu, in_this_process):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # which is no reason to give two processes 14
    benchmark.main(["scale", *SMALL, "--steps", "1", "--json", str(tmp_path / "out.json")])
    rows = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())}
    one, two = (f"scale: tiny, 32 pixels, batch 2, {count}" for count in ("1 process", "2 processes"))
    checkpoint = "scale: checkpoint, tiny"
    units = {"": "images/s", ": step": "s", ": start": "s", ": data wait": "%"}
    units = {name + what: unit for name in (one, two) for what, unit in (units | {": threads": "threads"}).items()}
    units |= {checkpoint: "s", f"{checkpoint}: size": "MB", f"{checkpoint}: speed": "MB/s"}
    assert {name: row["unit"] for name, row in rows.items()} == units | {
        f"{checkpoint}: in steps of 1 process": "steps"
    }
    assert all(set(row) == KEYS for row in rows.values())

    check_comparison(rows[two], two)
    for what in (": step", ": start"):
        row = rows[two + what]
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"]) and row["theirs"] == rows[one + what]["ours"]
        assert 0 < row["ours"] < 120
    compared = {two, f"{two}: step", f"{two}: start"}
    assert all(row["theirs"] is row["ratio"] is None for name, row in rows.items() if name not in compared)
    for name, images in ((one, 2), (two, 4)):
        assert rows[name]["ours"] * rows[f"{name}: step"]["ours"] == pytest.approx(images)
        assert 0 <= rows[f"{name}: data wait"]["ours"] <= 100
        processes = images // 2
        assert rows[f"{name}: threads"]["ours"] == max(1, len(os.sched_getaffinity(0)) // processes) * processes
    assert f"ratio {rows[two]['ratio']:.2f} images/s" in capsys.readouterr().out

    parameters = sum(p.numel() for p in benchmark.new_model("mae", SETTING, gradient_checkpointing=False).parameters())
    seconds, size = rows[checkpoint]["ours"], rows[f"{checkpoint}: size"]["ours"]
    assert size == pytest.approx(12e-6 * parameters, rel=0.01)  # a weight and two moments, of 4 bytes
    assert rows[f"{checkpoint}: speed"]["ours"] == pytest.approx(size / seconds)
    steps = seconds / rows[f"{one}: step"]["ours"]
    assert rows[f"{checkpoint}: in steps of 1 process"]["ours"] == pytest.approx(steps)

    assert not list(scratch.iterdir())


def test_what_a_launcher_has_started_ends_with_it():
    code = "import subprocess; subprocess.run(['sleep', '600'], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while not (family := psutil.Process(process.pid).children()):
        time.sleep(0.01)
    benchmark.end_family(process)
    assert process.returncode == -9
    assert not family[0].is_running() or family[0].status() == psutil.STATUS_ZOMBIE


def test_a_run_that_cannot_train_says_why(tmp_path, monkeypatch, on_cpu):
    (tmp_path / "pretrain_mae.py").write_text("raise SystemExit('error: the disk is full')")
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    with pytest.raises(RunError, match=r"^pretrain_mae.py ended before its first step: (.|\n)*error: the disk is full"):
        benchmark.pretrain(SETTING, num_images=2)


@pytest.mark.parametrize(("gpus", "processes"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_scale_takes_all_gpus_by_default_and_no_more(gpus, processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args, errors = benchmark.parse_args(["scale"])
    assert not errors and args.processes == processes
    assert (args.steps, args.mixed_precision) == ((100, "bf16") if gpus else (5, "no"))
    args, errors = benchmark.parse_args(["scale", "--processes", "9", "4", "9", "--img_size", "30"])
    assert args.processes == [1, 4, 9] and len(errors) == 1 + (gpus > 0) and "--img_size 30 does not" in errors[-1]
    assert all(f"--processes 9 is more than this machine has GPUs; take at most {gpus}" in e for e in errors[:-1])


def test_evaluation_is_measured_against_the_published_metric(tmp_path, capsys, in_this_process):
    flags = ["--num_images", "3", "--size", "40", "--classes", "254", "--rounds", "2"]
    benchmark.main(["evaluate", *flags, "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    time, memory = json.loads((tmp_path / "out.json").read_text())
    name = "evaluate: 254 classes, 40 pixels, 3 masks"
    for row, its_name, unit in ((time, name, "images/s"), (memory, f"{name}: peak memory", "GB")):
        assert set(row) == KEYS and row["name"] == its_name and row["unit"] == unit
        assert row["ours"] > 0 and row["theirs"] > 0 and row["ratio"] > 0
        assert f"ratio {row['ratio']:.2f} {unit}" in printed
    assert memory["ratio"] == memory["theirs"] / memory["ours"]


@pytest.mark.parametrize(("size", "classes"), [(17, 2), (64, 9)])
def test_both_sides_have_the_mean_iou_of_sets_of_pixels(size, classes):
    pairs = list(benchmark.random_masks(3, size, classes))
    prediction, annotation = np.stack(pairs, axis=1)
    assert prediction.shape == (3, size, size) and prediction.dtype == annotation.dtype == np.uint8
    assert 0.02 < (annotation == 255).mean() < 0.3 and prediction.max() == classes - 1
    valid = annotation != 255
    ious = []
    for number in range(classes):
        predicted, labelled = (prediction == number) & valid, annotation == number
        if (predicted | labelled).any():
            ious.append((predicted & labelled).sum() / (predicted | labelled).sum())
    for mean_iou in (benchmark.our_mean_iou, benchmark.published_mean_iou):
        found, seconds = mean_iou(iter(pairs), classes)
        assert found == pytest.approx(np.mean(ious), abs=1e-12) and 0.3 < found < 0.9 and seconds > 0


def test_different_mean_ious_are_not_reported(monkeypatch, in_this_process):
    areas = benchmark.segmentation_areas
    monkeypatch.setattr(benchmark, "segmentation_areas", lambda *pair: areas(*pair) + 1)
    with pytest.raises(RunError, match=r"not have the same mean IoU \(ours 0\.\d+, theirs 0\.\d+\)"):
        benchmark.benchmark_evaluate(num_images=2, size=20, classes=5, rounds=1)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("nothing --rounds 0", ["nothing is no valid value; expected one of data, train, cost, scale, ", "--rounds 0"]),
        ("data --compile --num_images x", ["--path_to_data is missing", "--compile is no flag of data", "images x"]),
        ("data --model base", ["--path_to_data is missing", "--model is no flag of data, but of train and cost"]),
        ("train --img_size 230 --task both", ["--img_size 230 does not suit the patches of 16 pixels", "--task both"]),
        ("train --batch_sizes 1 2 --img_size 16", ["--batch_sizes is no flag of train", "--img_size 16 does not"]),
        ("cost --model huge --img_sizes 14 30 56", ["--img_sizes 14 does not", "--img_sizes 30 does not"]),
        ("evaluate --model base --classes 255", ["--model is no flag of evaluate", "a whole number from 2 to 254"]),
        ("evaluate --img_size 64", ["--img_size is no flag of evaluate, but of data and train and cost"]),
        ("scale --processes 2 0 --steps 0 --size 9", ["--processes 0 ", "--steps 0 ", "--size is no flag of scale"]),
        ("scale --img_sizes 64 --img_size 30", ["--img_sizes is no flag of scale, but of cost", "--img_size 30 does"]),
        ("cost --processes 2 --steps 5", ["--processes is no flag of cost, but of scale", "--steps is no flag of"]),
        ("cost --size 64", ["--size is no flag of cost, but of evaluate"]),
        ("cost --mixed_precision fp16 --compile", ["--mixed_precision fp16", "--compile is no flag of cost"]),
    ],
)
def test_bad_flags_are_refused_together(flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(flags.split())
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("error: ") == len(expected)
    assert all(text in errors for text in expected)


def test_a_folder_without_images_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["data", "--path_to_data", str(tmp_path)])
    assert "holds no image" in capsys.readouterr().err


def test_defaults_suit_every_model():
    for model in benchmark.SIZES:
        for words in (["train", "--task", "encoder"], ["cost"]):
            args, errors = benchmark.parse_args([*words, "--model", model])
            assert not errors and args.rounds == 5 and args.path_to_data is None
    assert args.img_sizes == [56, 112, 196, 392]  # huge, whose patches have 14 pixels
