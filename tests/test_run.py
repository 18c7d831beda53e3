"""Tests of the mechanics of a run, with a model that must not be called, and of which functions use the flags."""

import ast
import json
import os
import re
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, log_of, losses_of, run_code
from conftest import run as run_script
from test_arguments import read

from training.arguments import check_run
from training.launch import InputError, Stopped
from training.plan import BatchPlan
from training.resolve import ImageFormat
from training.run import Run


class Source:
    """The part of a source of images that a Run uses."""

    def __init__(self):
        self.fingerprint, self.size_in_bytes, self.name = (lambda: "abc"), (lambda: 1000), "{}.jpg".format
        self.prepare_options = None

    def __len__(self):
        return 24

    def prepare(self, **options):
        self.prepare_options = options


class Untouchable(torch.nn.Linear):
    """A model that fails when it is called."""

    def forward(self, *inputs):
        raise AssertionError("the model was called")


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """Run each test on the CPU, and reset Accelerate's state and the signal handlers afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(folder, *words):
    """Return a run of 6 steps in 2 epochs whose flags, folder and batch are checked."""
    words = ("--per_gpu_batch_size", "8", "--epochs", "2", "--learning_rate", "0.5", "--warmup_steps", "0", *words)
    words = ("--path_to_data", "x", "--num_workers", "0", "--log_every", "1", "--save_checkpoint_steps", "4", *words)
    args, errors = read("--working_directory", str(folder), "--experiment_name", "run", *words)
    return Run(args, errors + check_run(args))


def begin(folder, *words):
    """Return a run that is about to make its first step."""
    torch.manual_seed(0)
    run, source, model = start(folder, *words), Source(), Untouchable(3, 2)
    run.plan_steps(len(source), lambda size: [])
    run.compare({"mean": [0.5]}, source, None, defaults={})
    run.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.5))
    run.prepare_sources()
    run.resume({"data": "made up"})
    return run


def test_a_refused_start_leaves_no_run_folder(tmp_path, capsys):
    run = start(tmp_path)
    assert (tmp_path / "run" / ".lock").exists()
    with run.refusing(InputError):
        run.plan_steps(7, lambda size: [])  # a batch has 8 images
    with pytest.raises(SystemExit):
        run.gate()
    assert "fewer than one global batch of 8" in capsys.readouterr().err and not any(tmp_path.iterdir())


def go(run, terminate_at=None):
    """Take the steps of a run with made-up gradients and losses, validate every three, report one damaged image."""
    for step in run.steps:
        if run.is_due(step, 3, "top1"):
            for _ in run.watch(range(2)):
                terminate(terminate_at == f"validation {step}")
            run.record({"top1": 50.0 - step, "val_loss": 1.0}, f"validated {step}")
        if step == run.plan.length.total_steps:
            return run.end("look here", best="top1", extra=3)
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, step + 1.0)
        run.optimizer.step()
        terminate(terminate_at == step)
        run.completed(step + 1, torch.tensor(1.0 / (step + 1)), torch.tensor(2.0), [(3, "cut")] * (step == 4))


def terminate(now):
    if now:
        os.kill(os.getpid(), signal.SIGTERM)


def content_of(run, name):
    return json.loads((run.folder / name).read_text())


def lines_of(run):
    """Return the lines of the log without speeds."""
    speeds = ("images_per_second", "data_wait")
    return [{name: line[name] for name in line if name not in speeds} for line in log_of(run.folder)]


def test_a_run_from_its_start_to_its_end(tmp_path, capsys):
    run = begin(tmp_path)
    run.print_plan(["model      none"], ImageFormat(3, None, None, [0.5], [0.25]), targets="2 classes")
    (run.folder / "best").mkdir()
    go(run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    plan = ["data", "model", "input", "batch", "steps", "lr", "precision"]
    assert [line.split()[0] for line in lines[:7]] == plan and "validated 3" in lines
    assert lines[-2] == "finished: look here. Use the model:"
    assert lines[-1] == f"  python predict.py {run.folder / 'best'} PHOTOS"
    assert run.sources[0].prepare_options == dict(processes=1, progress=True)
    assert sorted(os.listdir(run.folder / "checkpoints")) == ["step_00000004", "step_00000006"]
    args = content_of(run, "args.json")
    resolved = dict(max_steps=6, global_batch_size=8, learning_rate=0.5, mean=[0.5], mixed_precision="no", seed=0)
    assert args["data"] == "made up" and args["flags"] == args["flags"] | resolved
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert lines_of(run)[1] == dict(step=2, epoch=2 / 3, loss=0.5, learning_rate=0.5, grad_norm=2.0)
    assert lines_of(run)[3] == dict(step=3, epoch=1.0, top1=47.0, val_loss=1.0)
    assert content_of(run, "damaged.jsonl") == dict(path="3.jpg", reason="cut")
    metrics = content_of(run, "metrics.json")
    assert metrics.pop("seconds") >= 0 and metrics.pop("images_per_second") > 0
    assert metrics == dict(step=6, epoch=2.0, top1=44.0, val_loss=1.0, extra=3, best_top1=47.0, best_step=3)


@pytest.mark.parametrize("moment, step", [(2, 3), ("validation 3", 3), (5, 6), ("validation 6", 6)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path, capsys, moment, step):
    whole = begin(tmp_path / "whole")
    go(whole)
    with pytest.raises(Stopped):
        go(begin(tmp_path), terminate_at=moment)
    assert f"stopped by SIGTERM after step {step}, which is saved" in capsys.readouterr().out
    resumed = begin(tmp_path, "--resume_from_checkpoint", "auto")
    assert resumed.start_step == step and resumed.metrics == {} and "metrics.json" not in os.listdir(resumed.folder)
    go(resumed)
    assert lines_of(resumed) == lines_of(whole) and content_of(resumed, "metrics.json")["best_step"] == 3
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))


def test_damage_since_the_last_line_of_the_log_is_noted_by_a_stopped_run(tmp_path):
    run = begin(tmp_path, "--log_every", "100")
    with pytest.raises(Stopped):
        go(run, terminate_at=4)
    assert content_of(run, "damaged.jsonl") == dict(path="3.jpg", reason="cut")


def test_metrics_in_the_log_are_not_due_again(tmp_path):
    go(begin(tmp_path))
    run = begin(tmp_path, "--resume_from_checkpoint", "latest")
    assert next(run.steps) == 6 and run.metrics == {"top1": 44.0, "val_loss": 1.0}
    assert not run.is_due(6, 3, "top1") and run.is_due(6, 0, "knn_top1")
    run = begin(tmp_path, "--resume_from_checkpoint", "step_00000004")
    due = {every: [step for step in range(7) if run.is_due(step, every, "top1")] for every in (0, 2, 4)}
    assert due == {0: [6], 2: [2, 4, 6], 4: [4, 6]}


def test_errors_are_told_together_at_a_gate(tmp_path, capsys):
    class WeightsError(Exception):
        message, settings = "the weights are of another size", {"model": "large", "tf32": False}

    run = start(tmp_path)
    with run.refusing(InputError, OSError):
        raise InputError("two errors\nof the data")
    with run.refusing(WeightsError, flag="--init_from"):
        raise WeightsError
    with pytest.raises(OSError), run.refusing(InputError):
        raise OSError("a bug")
    with run.refusing(InputError):
        run.plan_steps(7, lambda size: [])
    with run.refusing(InputError):
        run.plan_steps(8, lambda size: [f"a micro-batch of {size} is refused"])
    with run.refusing(InputError):  # skipped, because it may need what failed before
        raise UnboundLocalError("train_source")
    with pytest.raises(SystemExit, match="2"):
        run.gate()
    assert capsys.readouterr().err.splitlines() == [
        "error: two errors",
        "error: of the data",
        "error: --init_from the weights are of another size; give --model large --no-tf32",
        "error: an epoch has 7 images, fewer than one global batch of 8; give a smaller batch or more images",
        "error: a micro-batch of 8 is refused",
    ]


def test_flags_folder_and_batch_are_checked_together(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        start(tmp_path, "--zz", "--value_range", "5", "5", "--micro_batch_size", "auto", "--global_batch_size", "9")
    lines = capsys.readouterr().err.splitlines()
    starts = ("--zz", "--value_range 5", "--micro_batch_size auto tries", str(tmp_path))
    assert len(lines) == len(starts) and all(map(str.startswith, lines, [f"error: {text}" for text in starts]))
    assert os.listdir(tmp_path / "run") == ["log.jsonl"]
    run = start(tmp_path / "other", "--min_learning_rate", "0.6")
    with run.refusing(InputError):
        run.plan_steps(8, lambda size: [])
    with pytest.raises(SystemExit, match="2"):
        run.gate()
    assert "--min_learning_rate 0.6 is above the peak of 0.5" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    run = begin(tmp_path, "--dry_run")
    run.rehearsal.phases = [(0.0, 1), (0.0, 8)]  # more steps than the run has
    assert run.sampling["steps"][9] == 9
    with pytest.raises(Stopped):
        go(run)
    assert "8 steps timed after 1" in capsys.readouterr().out and not os.listdir(tmp_path)


def test_a_dry_run_that_is_stopped_saves_nothing(tmp_path, capsys):
    run = begin(tmp_path, "--dry_run")
    with pytest.raises(Stopped):
        for batch in run.watch(range(5), "features"):
            terminate(batch == 1)
    assert "nothing was measured" in capsys.readouterr().out and not os.listdir(tmp_path)


@pytest.mark.parametrize("limit, before, expected", [(4, None, 4), (8, 2, 2), (1, 2, 1), (8, 3, 8)])
def test_the_micro_batch_that_fits_is_kept_by_a_resumed_run(tmp_path, limit, before, expected):
    def step(model, optimizer, size):
        assert optimizer.param_groups[0]["params"][0] is model.weight is not run.model.weight  # a copy of the model
        if size > limit:
            raise torch.OutOfMemoryError

    run = begin(tmp_path)
    run.state = {"micro_batch_size": before}
    run.fit_micro_batch(step, run.model, torch.optim.AdamW(run.model.parameters()))
    assert run.batch == run.plan.batch == BatchPlan(8, 8, expected)
    assert run.flags["micro_batch_size"] == expected and run.flags["gradient_accumulation_steps"] == 8 // expected


def test_an_evaluation_trains_nothing(tmp_path, capsys):
    whole, stopped = start(tmp_path / "whole"), start(tmp_path / "stopped")
    for run in (whole, stopped):
        run.start_evaluation({}, Source(), {"classes": ["a"]})
    whole.record({"top1": 40.0}, "measured")
    whole.end("look here")
    assert content_of(whole, "metrics.json").items() >= dict(top1=40.0, step=0).items()
    with pytest.raises(Stopped):
        for batch in stopped.watch(range(5)):
            terminate(batch == 1)
    assert "nothing was measured" in capsys.readouterr().out and not os.listdir(stopped.folder / "checkpoints")


READERS = {"parse_args", "check_flags", "read", "check_run", "check_crops", "check_sizes", "check_finetuning"}
READERS |= {"check_classifier", "_check_target", "check_segmenter", "check_masks", "check_decoder", "check_target"}
READERS |= {"check_detector"}
SCRIPTS = [ROOT / "pretrain_mae.py", *sorted(ROOT.glob("finetune_*.py"))]


def parts_of(path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind)]


def changes_flags(function):
    """Return True if a function sets attributes of a namespace of flags."""
    attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    targets = {ast.unparse(node.value) for node in attributes if not isinstance(node.ctx, ast.Load)}
    by_name = re.search(r"\b(set|del)attr\(|\bvars\([\w.]+\)(\.(update|pop)\(|\[.*\] =)", ast.unparse(function))
    return bool(by_name or targets & {"args", "flags", "run.given", "self.given"})


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted(ROOT.glob("training/*.py"))], ids=lambda path: path.name)
def test_functions_take_values_and_leave_the_flags_alone(path):
    """Only the functions that read and check the flags may take or change them."""
    functions = parts_of(path, ast.FunctionDef)
    changing = {function.name for function in functions if changes_flags(function)}
    taking = {f.name for f in functions for node in ast.walk(f.args) if getattr(node, "arg", None) == "args"}
    assert changing | taking <= READERS
    assert "parse_args" in changing or path.name != "pretrain_mae.py"


def test_run_has_no_base_class_no_subclass_and_calls_no_model():
    (run,) = parts_of(ROOT / "training/run.py", ast.ClassDef)
    calls = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(run) if isinstance(node, ast.Call)}
    assert run.name == "Run" and not run.bases and not calls & {"model", "plain_model", "forward", "backward"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        bases = {ast.unparse(base) for node in parts_of(path, ast.ClassDef) for base in node.bases}
        assert not bases & {"Run", "run.Run"}, path


def test_several_runs_of_one_process(image_folder, tmp_path):
    """Runs in one process, as in a notebook, equal runs in their own, also after other precisions and errors."""
    code = """
import signal, sys, torch
from pretrain_mae import main
signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
mine = lambda *_: None
signal.signal(signal.SIGUSR1, mine)
before = [signal.getsignal(number) for number in signals]

def go(*words):
    try:
        main([*sys.argv[1:], *words])
    except SystemExit as end:
        print("exit", end.code)
    assert [signal.getsignal(number) for number in signals] == before
    assert not torch.are_deterministic_algorithms_enabled()

go("--experiment_name", "one", "--deterministic")
go("--experiment_name", "two", "--mixed_precision", "bf16")
go("--experiment_name", "bad", "--mask_ratio", "1")
go("--experiment_name", "one")
go("--experiment_name", "three", "--num_workers", "1")
import multiprocessing
assert not multiprocessing.active_children()
"""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 2]
    said = run_code(code, *flags, cwd=tmp_path)
    assert said.stdout.count("finished: ") == 3 and said.stdout.count("exit 2") == 2
    assert said.stderr.count("error: ") == 2 and "one already holds a run" in said.stderr
    alone = [*flags, "--experiment_name"]
    run_script("pretrain_mae.py", *alone, "alone", cwd=tmp_path)
    run_script("pretrain_mae.py", *alone, "bf16", "--mixed_precision", "bf16", cwd=tmp_path)
    losses = {name: losses_of(tmp_path / "work_dir" / name) for name in ("one", "two", "three", "alone", "bf16")}
    assert losses["one"] == losses["three"] == losses["alone"] and losses["two"] == losses["bf16"] != losses["one"]
