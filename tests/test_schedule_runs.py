"""Tests of pre-training runs with growing images: resume, processes, workers, compilation and refused schedules."""

import json
import shutil

import pytest
from conftest import (
    TINY,
    assert_equal_runs,
    dry_run,
    flags_of,
    losses_of,
    metrics_of,
    refusals,
    run,
    run_code,
    run_two,
    weights_of,
)
from test_teacher import write_tower

SCRIPT = "pretrain_mae.py"
SCHEDULE = ["--img_size_schedule", "16:0.5", "24:0.7", "32:1"]  # 4, 2 and 2 of 8 steps


@pytest.fixture(scope="session")
def plain(image_folder):
    """Return the flags of a run without a schedule."""
    often = ["--validate_every", 1, "--save_checkpoint_steps", 1, "--keep_checkpoints", 8]
    return [*TINY, "--path_to_data", image_folder, "--max_steps", 8, *often]


@pytest.fixture(scope="session")
def flags(plain):
    return [*plain, *SCHEDULE]


@pytest.fixture(scope="session")
def scheduled(flags, tmp_path_factory):
    """Return the folder and the output of an uninterrupted run."""
    cwd = tmp_path_factory.mktemp("scheduled")
    said = run(SCRIPT, *flags, cwd=cwd).stdout
    return cwd / "work_dir" / "pretrain_mae", said


def test_the_plan_says_the_cost_of_each_stage(scheduled):
    folder, said = scheduled
    lines = said.splitlines()
    start = next(
        i for i, line in enumerate(lines) if line.startswith("sizes      16 x 16 for 4 steps, 1 of 4 patches kept")
    )
    assert lines[start + 1].startswith("           24 x 24 for 2 steps, 2 of 9 patches kept, ")
    assert lines[start + 2].startswith("           32 x 32 for 2 steps, 4 of 16 patches kept, ")
    assert lines[start + 3].endswith("% of the cost of 32 x 32 throughout")
    assert "images     32 x 32, 3 channels, 16 patches of 8, 4 kept (random)" in said
    assert flags_of(folder)["img_size_schedule"] == SCHEDULE[1:] and flags_of(folder)["img_size"] == [32, 32]
    assert weights_of(folder, 8)["encoder.pos_embed"].shape == (1, 17, 32) and metrics_of(folder)["val_loss"] > 0


RECORDING = """
import json, sys, pretrain_mae
items, step = pretrain_mae.PretrainingDataset.__getitems__, pretrain_mae.optimizer_step
lines = open("lines.jsonl", "w", buffering=1)

def record(dataset, indices):
    batch = items(dataset, indices)
    if indices[0][0] < 2**31:
        lines.write(json.dumps([indices, list(batch.images.shape[2:]), list(batch.noise.shape)]) + "\\n")
    return batch

pretrain_mae.PretrainingDataset.__getitems__ = record
pretrain_mae.main(sys.argv[1:])
"""


def test_samples_and_learning_rates_do_not_depend_on_the_schedule(plain, flags, tmp_path):
    seen, rates = {}, {}
    for name, words in (("plain", plain), ("scheduled", flags)):
        (tmp_path / name).mkdir()
        run_code(RECORDING, *words, cwd=tmp_path / name)
        seen[name] = [json.loads(line) for line in (tmp_path / name / "lines.jsonl").read_text().splitlines()]
        log = (tmp_path / name / "work_dir" / "pretrain_mae" / "log.jsonl").read_text().splitlines()
        rates[name] = [line["learning_rate"] for line in map(json.loads, log) if "loss" in line]
    assert [items for items, *_ in seen["scheduled"]] == [items for items, *_ in seen["plain"]]
    assert [shape for _, *shape in seen["plain"]] == 8 * [[[32, 32], [8, 16]]]
    sizes = 4 * [[[16, 16], [8, 4]]] + 2 * [[[24, 24], [8, 9]]] + 2 * [[[32, 32], [8, 16]]]
    assert [shape for _, *shape in seen["scheduled"]] == sizes and rates["scheduled"] == rates["plain"]


def test_a_schedule_of_one_size_is_none(plain, tmp_path):
    for name, words in (("none", []), ("one", ["--img_size_schedule", "32:1"])):
        said = run(SCRIPT, *plain, *words, "--experiment_name", name, cwd=tmp_path).stdout
        assert "sizes" not in said
    assert_equal_runs(tmp_path / "work_dir" / "none", tmp_path / "work_dir" / "one", 8, "model.safetensors")


@pytest.mark.parametrize("step", [2, 4, 5, 7])  # in the first stage, at its end, in the others
def test_resumed_runs_end_the_same(scheduled, flags, step, tmp_path):
    folder, _ = scheduled
    copy = shutil.copytree(folder, tmp_path / "work_dir" / "pretrain_mae")
    run(SCRIPT, *flags, "--resume_from_checkpoint", f"step_{step:08d}", cwd=tmp_path)
    assert_equal_runs(folder, copy, 8)


def test_loader_workers_change_nothing(scheduled, flags, tmp_path):
    run(SCRIPT, *flags, "--num_workers", 2, cwd=tmp_path)
    assert_equal_runs(scheduled[0], tmp_path / "work_dir" / "pretrain_mae", 8)


def test_two_processes_and_micro_batches_train_as_one(scheduled, flags, tmp_path):
    folder, _ = scheduled
    split = ["--per_gpu_batch_size", 4, "--gradient_accumulation_steps", 2]
    run_two(SCRIPT, *flags, *split, cwd=tmp_path)
    other = tmp_path / "work_dir" / "pretrain_mae"
    assert losses_of(other) == pytest.approx(losses_of(folder), rel=1e-5)
    assert metrics_of(other)["val_loss"] == pytest.approx(metrics_of(folder)["val_loss"], rel=1e-5)


def test_every_target_and_decoder_trains_on_each_size(flags, tmp_path):
    write_tower(tmp_path / "teacher", "Dinov2Model", patch_size=4)
    for name, words in (
        ("hog", ["--target", "hog", "--decoder", "cross", "--decoder_inputs", "weighted", "--predict_ratio", 0.5]),
        ("pca", ["--target", "pca", "--num_components", 10, "--optimizer", "muon"]),
        ("teacher", ["--target", "teacher", "--teacher", tmp_path / "teacher"]),
    ):
        words = [*flags, *words, "--experiment_name", name, "--gradient_checkpointing"]
        run(SCRIPT, *words, cwd=tmp_path)
        folder = tmp_path / "work_dir" / name
        assert len(losses_of(folder)) == 8
        copy = shutil.copytree(folder, tmp_path / name / "work_dir" / name)
        run(SCRIPT, *words, "--resume_from_checkpoint", "step_00000003", cwd=tmp_path / name)
        assert_equal_runs(folder, copy, 8)


COMPILED = """
import sys, torch, pretrain_mae
from torch import nn
compile, graphs = nn.Module.compile, []

def count(graph, inputs):
    graphs.extend(each.shape[-1] for each in inputs if each.dtype == torch.uint8)
    return graph

nn.Module.compile = lambda model, **options: compile(model, backend=count, **options)
pretrain_mae.main(sys.argv[1:])
print("graphs of", graphs)
double = torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True, dynamic=False)
for size in range(20):  # more than the 8 that torch compiles by default
    double(torch.ones(size))
"""


def test_each_size_is_compiled_once(scheduled, flags, tmp_path):
    said = run_code(COMPILED, *flags, "--compile", cwd=tmp_path).stdout
    assert "graphs of [16, 24, 32]" in said
    assert losses_of(tmp_path / "work_dir" / "pretrain_mae") == pytest.approx(losses_of(scheduled[0]), rel=1e-5)


def test_a_dry_run_times_each_stage_that_is_left(scheduled, flags, tmp_path):
    said = dry_run(SCRIPT, *flags, "--num_workers", 1, cwd=tmp_path)
    assert "16 x 16: " in said and said.count(" s a step") == 4 and "8 steps take" in said
    shutil.copytree(scheduled[0], tmp_path / "work_dir" / "pretrain_mae")
    said = dry_run(SCRIPT, *flags, "--resume_from_checkpoint", "step_00000005", cwd=tmp_path)
    assert "24 x 24: " in said and "16 x 16: " not in said and "s a step, 1 step\n" in said and "3 steps take" in said


def test_schedules_that_are_refused(scheduled, plain, flags, image_folder, tmp_path):
    starts = [
        [*plain, "--img_size_schedule", "16:0.5", "24:0.55", "32:1"],
        [*plain, "--img_size_schedule", "16:0.5", "32:0.9"],
        [*flags, "--per_gpu_batch_size", 8, "--global_batch_size", 4],
    ]
    errors = [
        "error: --img_size_schedule 24:0.55 has no step in a run of 8; give it a larger share, or more steps",
        "error: --img_size_schedule 16:0.5 32:0.9 ends before the run; expected a share of 1 for the last size",
        "error: --global_batch_size 4 and --per_gpu_batch_size 8 x 1 processes = 8 do not agree; give one of them",
    ]
    assert refusals(SCRIPT, *starts, cwd=tmp_path) == [[error] for error in errors]
    shutil.copytree(scheduled[0], tmp_path / "resumed" / "work_dir" / "pretrain_mae")
    for words, given in ((["--img_size_schedule", "16:0.5", "32:1"], "16:0.5 32:1"), ([], "None")):
        resume = [*plain, *words, "--resume_from_checkpoint", "latest"]
        refused = run(SCRIPT, *resume, cwd=tmp_path / "resumed", code=2).stderr
        expected = f"--img_size_schedule {given} differs from the run to resume, which has 16:0.5 24:0.7 32:1"
        assert expected in refused and refused.count("error: ") == 1
