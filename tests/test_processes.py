import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from conftest import (
    ROOT,
    SCENES,
    TINY,
    Start,
    assert_equal_runs,
    finish_several,
    flags_of,
    log_of,
    losses_of,
    metrics_of,
    run,
    run_several,
    start_several,
    steps_in,
    validations_of,
    wait_for,
    weights_of,
    write_scenes,
)

from training.launch import RunError, resolve_precision
from training.processes import ECHO_SECONDS, Crew, check_processes, check_settings, report_waiting
from training.run_folder import RunFolder

CPU = torch.device("cpu")
AUTOENCODER = [*TINY[: TINY.index("--per_gpu_batch_size")], *TINY[TINY.index("--encoder_embed_dim") :]]
SEGMENTER = ["--crop_size", 32, "--patch_size", 8, "--encoder_embed_dim", 32, "--encoder_depth", 4]
SEGMENTER += ["--encoder_num_heads", 2, "--head", "linear", "--num_preview_images", 1, "--evaluate_every", 2]
CLASSIFIER = ["--img_size", 32, "--patch_size", 8, "--encoder_embed_dim", 32, "--encoder_depth", 2]
CLASSIFIER += ["--encoder_num_heads", 2, "--mixup_alpha", 0, "--cutmix_alpha", 0, "--random_erase", 0]
ALIKE = ["--global_batch_size", 12, "--max_steps", 4, "--learning_rate", 1e-3, "--drop_path", 0, "--log_every", 1]
ALIKE += ["--num_workers", 0, "--mixed_precision", "no"]


@pytest.fixture(autouse=True)
def own_handlers():
    """Restore the signal handlers after each test, because a Crew changes them."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would ignore it
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_signals_are_noted(name):
    crew = Crew()
    assert not crew.stop_requested()
    os.kill(os.getpid(), getattr(signal, name))
    assert crew.stop_requested() and crew.signal_name == name
    assert f"stopped by {name} after step 5" in crew.describe_stop(5, start_step=0)
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    crew = Crew()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not crew.stop_requested()


SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]
MOMENTS = ["model prepared", "forward", "measuring", "any moment of a save", "encoder written"]


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        pytest.param(
            name, moment, marks=[] if (row - column) % 4 == 0 else pytest.mark.slow
        )  # the fast tests cover each signal and each moment
        for column, name in enumerate(SIGNALS)
        for row, moment in enumerate(MOMENTS)
    ],
)
def test_a_signal_at_any_moment_saves_and_ends_the_run(image_folder, tmp_path, name, moment):
    """A signal after the last save does not stop the run: it finishes."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 7, "--save_checkpoint_steps", 2]
    done = run("tests/armed.py", *flags, "--validate_every", 1, "--send", name, moment, 1, cwd=tmp_path)
    folder = tmp_path / "work_dir" / "pretrain_mae"
    newest = RunFolder(folder).find("auto")
    assert newest and newest.name == max(path.name for path in (folder / "checkpoints").iterdir())
    told = f"stopped by {name} after step {int(newest.name[-8:])}, which is saved" in done.stdout + done.stderr
    assert told == (moment != "encoder written") == (not (folder / "metrics.json").exists())
    assert "Traceback" not in done.stderr


HANGING = """
import time
import torch
from training.processes import Crew
from training.launch import run_script

def main():
    Crew()
    open("ready", "w").close()
    {}

run_script(main)
"""


@pytest.mark.parametrize(
    "wait", ["time.sleep(300)", "torch.distributed.TCPStore('127.0.0.1', 0, is_master=True).get('x')"]
)
def test_a_second_sigterm_ends_a_process_that_waits(tmp_path, wait):
    """It works even during a call that lets no Python handler run. Within ECHO_SECONDS, it is taken for an echo."""
    (tmp_path / "code.py").write_text(HANGING.format(wait))
    process = Start(tmp_path / "code.py", cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(ECHO_SECONDS)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "error: ended by a second SIGTERM" in err


STALLED = """
import time
from training import processes
from training.launch import run_script

def batches():
    yield 1
    open("ready", "w").close()
    time.sleep(300)

def main():
    processes.STALL_SECONDS = 1
    for batch in processes.Crew().watch(batches()):
        time.sleep(3)  # a step that takes longer does not count

run_script(main)
"""


def test_a_sigterm_ends_a_process_whose_data_do_not_come(tmp_path):
    (tmp_path / "code.py").write_text(STALLED)
    process = Start(tmp_path / "code.py", cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "error: ended by SIGTERM, as the step waits for data" in err


def test_one_process_agrees_with_itself():
    crew = Crew()
    assert crew.any(True) and not crew.any(False) and crew.gather([1, 2]) == [1, 2]
    assert crew.differences({"seed": 0}, ["abc", None]) == []


class Clock:
    """A clock that tests set, for a process that started at time 0."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("training.processes.time.time", lambda: self.now)
        monkeypatch.setattr("training.processes.psutil.Process.create_time", lambda process: 0.0)


@pytest.mark.parametrize(
    "limit, step, save, expected",  # in seconds; the last step must end and be saved within the limit
    [
        ("1:00", 10, 0, 3600 - 180 - 10),  # 5 % are reserved for the first save, whose time is unknown
        ("0:01", 10, 0, 60 - 15 - 10),
        ("100:00", 10, 0, 360000 - 300 - 10),
        ("1:00", 10, 400, 3600 - 180 - 10 - 400),
    ],
)
def test_a_time_limit_leaves_time_for_a_step_and_a_save(monkeypatch, limit, step, save, expected):
    clock = Clock(monkeypatch)
    crew = Crew(limit)
    if save:
        with crew.saving():
            clock.now += save
    while not crew.stop_requested(after_step=True):
        clock.now += step
    assert expected < clock.now <= expected + step
    clock.now = 0  # the decision to stop is final
    assert crew.stop_requested()
    assert f"stopped by --time_limit {limit} after step 9" in crew.describe_stop(9, start_step=0)


def test_slow_steps_of_long_ago_are_forgotten(monkeypatch):
    clock = Clock(monkeypatch)
    crew = Crew("1:00")
    clock.now = 1200.0  # the first step compiled the model
    assert not crew.stop_requested(after_step=True)
    while not crew.stop_requested(after_step=True):
        clock.now += 1
    assert clock.now > 3400


def test_the_batches_of_a_validation_are_no_steps(monkeypatch):
    clock = Clock(monkeypatch)
    crew = Crew("1:00")
    clock.now = 400.0
    assert not crew.stop_requested(after_step=True)
    while not crew.stop_requested():
        clock.now += 1
    assert 3600 - 180 - 400 < clock.now <= 3600 - 180 - 400 + 1


def test_a_time_limit_that_is_too_short_is_told(monkeypatch):
    clock = Clock(monkeypatch)
    crew = Crew("0:01")
    clock.now = 100
    assert crew.stop_requested()
    with pytest.raises(RunError, match="0:01 is too short: the start and one step take 100 seconds; step 8"):
        crew.describe_stop(8, start_step=7)
    with pytest.raises(RunError, match="too short: the start and a validation"):
        crew.describe_stop(7, start_step=7)
    assert "continue with" in crew.describe_stop(9, start_step=7)


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    "variables, started, expected",
    [
        ({}, 1, None),
        (LAUNCHED, 1, None),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1", **LAUNCHED}, 2, None),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "1"}, 1, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "16", "RANK": "3"}, 16, None),  # two nodes, one launcher each
        ({"MASTER_PORT": "29500"}, 1, None),
        ({"WORLD_SIZE": "2", "RANK": "1", **LAUNCHED}, 1, "asks for 2 processes (WORLD_SIZE), but only 1 started"),
        ({"MASTER_PORT": "29500", **LAUNCHED}, 1, "asked for several processes (MASTER_PORT is set), and started one"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, 1, "asks for 8 processes (SLURM_STEP_NUM_TASKS), but only 1 started"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "asks for 4 processes (OMPI_COMM_WORLD_SIZE)"),
    ],
)
def test_fewer_processes_than_were_asked_for(monkeypatch, variables, started, expected):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    errors = check_processes(started, CPU)
    assert (len(errors) == 1 and expected in errors[0]) if expected else errors == []


def test_processes_that_cannot_be_started_are_refused(tmp_path):
    flags = [*TINY, "--path_to_data", "builtin:shapes"]
    refused = run("pretrain_mae.py", *flags, cwd=tmp_path, code=2, WORLD_SIZE="2").stderr
    assert refused.startswith("error: Accelerate does not start with these settings (") and refused.count("\n") == 1


@pytest.mark.parametrize(
    "lines, expected",
    [
        ("megatron_lm_config: {megatron_lm_tp_degree: 1}", r"configured for MEGATRON_LM, .*fsdp2.yaml"),
        ("parallelism_config: {parallelism_config_tp_size: 1}", "configured for PARALLELISM_CONFIG, .*leave it out"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "dynamo_backend inductor, .* set it to no, and give --compile"),
        ("dynamo_config: {dynamo_backend: EAGER, dynamo_mode: default}", "dynamo_backend eager, .*give --compile"),
    ],
)
def test_settings_of_accelerates_file_that_are_no_flags(tmp_path, monkeypatch, lines, expected):
    """The variables are those that `accelerate launch` sets for the file."""
    from accelerate.commands import launch

    kind = {"mega": "MEGATRON_LM", "para": "MULTI_GPU"}.get(lines[:4], "NO")
    head = f"compute_environment: LOCAL_MACHINE\ndistributed_type: '{kind}'\nnum_processes: 2\nuse_cpu: false\n"
    (tmp_path / "file.yaml").write_text(f"{head}{lines}\n")
    words = ["--config_file", str(tmp_path / "file.yaml"), "pretrain_mae.py"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    simple = kind == "NO"
    variables = launch.prepare_simple_launcher_cmd_env(args)[1] if simple else launch.prepare_multi_gpu_env(args)
    for name, value in variables.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (error,) = check_settings(resolve_precision(None))
    assert re.search(expected, error), error


def test_a_setting_of_accelerate_ends_a_script_in_one_line(tmp_path):
    flags = [*TINY, "--path_to_data", "builtin:shapes"]
    flags = [flag for flag in flags if flag not in ("--mixed_precision", "no")]
    names = ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")  # FSDP 1 by default
    for variables in ({name: "inductor" if "DYNAMO" in name else "true"} for name in names):
        said = run("pretrain_mae.py", *flags, cwd=tmp_path, code=2, **variables).stderr
        assert said.startswith("error: Accelerate is configured for ") and said.count("\n") == 1
        assert not os.listdir(tmp_path)
    sagemaker = dict(ACCELERATE_USE_SAGEMAKER="true", ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE="DATA_PARALLEL")
    said = run("pretrain_mae.py", *flags, cwd=tmp_path, code=2, **sagemaker).stderr
    assert "does not start with these settings (No module named 'smdistributed')" in said and said.count("\n") == 1
    (error,) = check_settings("fp8")
    assert "the precision fp8, which does not work here; give --mixed_precision bf16, fp16 or no" in error


@pytest.fixture(scope="module")
def many_scenes(tmp_path_factory):
    """Return the folder of 14 training and 5 validation pairs."""
    folder = tmp_path_factory.mktemp("many_scenes")
    write_scenes(folder, 14, "training", seed=0)
    write_scenes(folder, 5, "validation", seed=1)
    (folder / "classes.txt").write_text("\n".join(SCENES))
    return folder


FINE_TUNING = ["finetune_classifier", "finetune_segmentation"]


@pytest.fixture(params=["pretrain_mae", *FINE_TUNING])
def kind(request):
    return request.param


@pytest.fixture
def flags(kind, image_folder, many_scenes):
    """Return flags of a run that does not depend on how its global batches of 12 images are split."""
    own = {"pretrain_mae": AUTOENCODER, "finetune_classifier": CLASSIFIER, "finetune_segmentation": SEGMENTER}
    data = many_scenes if kind == "finetune_segmentation" else image_folder
    return ["--path_to_data", data, *own[kind], *ALIKE]


def expect_alike(folder, other):
    """Assert that losses, validations and weights of two runs are equal but for rounding.

    BatchNorm's running statistics come from the main process's images. They, and validations that use them, are
    left out.
    """
    losses = losses_of(folder)
    assert losses_of(other) == pytest.approx(losses, rel=1e-5)
    assert log_of(other)[0]["grad_norm"] == pytest.approx(log_of(folder)[0]["grad_norm"], rel=1e-5)
    ours, theirs = (weights_of(path, max(losses)) for path in (folder, other))
    if not any("running" in key for key in ours):
        for one, two in zip(validations_of(folder), validations_of(other), strict=True):
            for name in one.keys() & {"step", "val_loss", "top1", "mean_iou", "overall_accuracy"}:
                assert two[name] == pytest.approx(one[name], rel=1e-4), name
    for key, value in ours.items():
        if "running" in key or "num_batches" in key:
            continue
        difference = theirs[key] - value
        if key.endswith("qkv.bias"):  # softmax cancels the key's bias: its gradient is rounding, which Adam amplifies
            difference[len(difference) // 3 : -len(difference) // 3] = 0
        assert difference.abs().max() <= 1e-4, key


def test_one_two_and_three_processes_are_one_run(kind, flags, tmp_path):
    """The split into processes and micro-batches changes neither losses nor weights. Validation images, whose number
    neither two nor three divides, are counted once each, and each step is logged once."""
    normed = kind == "finetune_segmentation"  # its BatchNorm depends on the micro-batch, which stays 2
    steps = 20 if kind == "pretrain_mae" else 4
    shares = [(1, 2), (2, 2), (3, 2)] if normed else [(1, 12), (1, 3), (2, 3), (3, 4)]
    first, *others = (tmp_path / "work_dir" / f"{count}_{micro}" for count, micro in shares)
    for (count, micro), folder in zip(shares, (first, *others), strict=True):
        own = ["--micro_batch_size", micro, "--experiment_name", folder.name, "--max_steps", steps]
        done = run_several(count, f"{kind}.py", *flags, *own, cwd=tmp_path)
        assert f"batch      12 = {count} process" in done.stdout
        assert [line["step"] for line in log_of(folder) if "loss" in line] == list(range(1, steps + 1))
    for folder in others:
        expect_alike(first, folder)
    if normed:  # three processes evaluate the weights of one
        own = ["--path_to_backbone_checkpoint", first / "model", "--eval_only"]
        run_several(3, f"{kind}.py", *flags[:2], *own, "--num_workers", 0, "--experiment_name", "again", cwd=tmp_path)
        one, again = metrics_of(first), metrics_of(tmp_path / "work_dir" / "again")
        assert one["per_class_iou"] == again["per_class_iou"] and one["mean_iou"] == again["mean_iou"]


def test_a_checkpoint_goes_on_with_other_processes(kind, flags, tmp_path):
    """A signal to one of three processes stops all of them after a step, which is saved. Two processes resume, then
    one, and the result is that of a run that nothing interrupts."""
    longer = [*flags, "--max_steps", 12, "--micro_batch_size", 2]
    run(f"{kind}.py", *longer, "--experiment_name", "whole", cwd=tmp_path)
    folder = tmp_path / "work_dir" / "parts"
    parts = [*longer, "--experiment_name", "parts", "--resume_from_checkpoint", "auto", "--time_limit", "2:00"]
    reached = 0
    for count, steps, number in ((3, 1, signal.SIGUSR1), (2, 1, signal.SIGTERM), (1, None, None)):
        processes = start_several(count, f"{kind}.py", *parts, cwd=tmp_path)
        if steps:
            wait_for(reached + steps, folder, *processes)
            processes[-1].send_signal(number)
        done = finish_several(processes)
        if not steps:
            break
        newest = max(path.name for path in (folder / "checkpoints").iterdir())
        assert int(newest.removeprefix("step_")) > reached
        reached = int(newest.removeprefix("step_"))
        assert f"stopped by {number.name} after step {reached}, which is saved" in done[0].stderr + done[0].stdout
    if kind == "pretrain_mae":
        (error,) = errors_of(finish_several(start_several(5, f"{kind}.py", *parts, cwd=tmp_path), 2))
        assert "global batch of 12 images is not divisible by 5 processes; start 4 of them" in error
    expect_alike(tmp_path / "work_dir" / "whole", folder)
    resumed = json.loads((folder / "args.json").read_text())["resumed"]
    assert [start["processes"] for start in resumed] == [2, 1]


@pytest.mark.parametrize(
    "kind", ["pretrain_mae", *(pytest.param(name, marks=pytest.mark.slow) for name in FINE_TUNING)]
)
def test_a_killed_process_ends_the_others_and_the_same_command_goes_on(kind, flags, tmp_path):
    """SIGKILL of one of three processes ends all; the resumed run has the losses and weights of an undisturbed one."""
    flags = [*flags, "--max_steps", 12, "--save_checkpoint_steps", 3, "--resume_from_checkpoint", "auto"]
    for name in ("whole", "killed"):
        own = [*flags, "--experiment_name", name]
        processes = start_several(3, f"{kind}.py", *own, cwd=tmp_path)
        if name == "killed":
            wait_for(5, tmp_path / "work_dir" / name, *processes)
            processes[1].kill()
            ends = [(process, process.communicate(timeout=60)) for process in processes]
            assert [process.returncode for process in processes] == [1, -signal.SIGKILL, 1]
            for rank in (0, 2):
                told = ends[rank][1][1]
                assert f"error: process {rank} stops because another process of the run is gone" in told
                assert told.count("error: ") == 1 and "Traceback" not in told
            processes = start_several(3, f"{kind}.py", *own, cwd=tmp_path)
        finish_several(processes)
    whole, killed = tmp_path / "work_dir" / "whole", tmp_path / "work_dir" / "killed"
    assert json.loads((killed / "args.json").read_text())["resumed"][0]["step"] in (3, 6, 9)
    assert_equal_runs(whole, killed, 12)


def patched(tmp_path, kind, code):
    """Write a file that runs `code`, which changes what its processes do, and then a script; return its path."""
    path = tmp_path / f"patched_{kind}.py"
    script = ROOT / f"{kind}.py"
    path.write_text(
        f"import os, runpy, sys\nsys.path[0] = {str(ROOT)!r}\n{code}\nrunpy.run_path({str(script)!r}, "
        "run_name='__main__')\n"
    )
    return path


def errors_of(ends):
    """Return the error lines of all processes of a run, which have printed no traceback."""
    told = "".join(end.stderr for end in ends)
    assert "Traceback" not in told
    return [line for line in told.splitlines() if line.startswith("error: ")]


def test_a_loss_that_one_process_finds_not_finite_stops_all(kind, flags, tmp_path):
    poison = """
from accelerate import Accelerator
backward, calls = Accelerator.backward, 0
def poisoned(self, loss, **options):
    global calls
    backward(self, loss, **options)
    calls += 1
    if calls == 4 and os.environ["RANK"] == "1":
        loss.data.fill_(float("nan"))
Accelerator.backward = poisoned
"""
    flags = [*flags, "--max_steps", 20, "--save_checkpoint_steps", 3, "--log_every", 5]
    ends = finish_several(start_several(2, patched(tmp_path, kind, poison), *flags, cwd=tmp_path), 1)
    (error,) = errors_of(ends)
    assert "the loss or gradient norm of step 4 is not finite" in error
    assert [path.name for path in (tmp_path / "work_dir" / kind / "checkpoints").iterdir()] == ["step_00000003"]


def test_a_damaged_image_that_one_process_finds_stops_all(kind, flags, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(flags[1], data)
    sorted((data / ("images/training" if kind == "finetune_segmentation" else "train")).rglob("*.jpg"))[1].write_text(
        "no"
    )
    flags = ["--path_to_data", data, *flags[2:], "--max_steps", 8, "--on_damaged", "error"]
    ends = finish_several(start_several(3, f"{kind}.py", *flags, cwd=tmp_path), 1)
    (error,) = errors_of(ends)
    assert "is damaged" in error and "--on_damaged error allows none" in error


def test_processes_with_other_flags_or_data_are_refused(kind, flags, many_scenes, image_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(flags[1], other)
    next(other.rglob("*.jpg")).rename(next(other.rglob("*.jpg")).with_name("renamed.jpg"))
    if kind == "finetune_segmentation":
        shutil.rmtree(other)
        write_scenes(other, 13, "training", seed=0)
        write_scenes(other, 5, "validation", seed=1)
        (other / "classes.txt").write_text("\n".join(SCENES))
    own = {2: ["--learning_rate", 0.5, "--seed", 3, "--path_to_data", other, "--num_workers", 1]}
    errors = errors_of(finish_several(start_several(3, f"{kind}.py", *flags, cwd=tmp_path, own=own), 2))
    assert len(errors) == 3
    assert any("--learning_rate is 0.001 on process 0" in error and "0.5 on process 2" in error for error in errors)
    assert any("--seed is 0 on" in error for error in errors)
    assert any("the fingerprint of training images and labels is" in error for error in errors)
    assert not list(tmp_path.glob("work_dir/*/checkpoints/step_*"))


def test_a_full_disk_of_one_process_is_told_by_that_one(image_folder, tmp_path):
    """Each machine has its own disk, so the other process does not see that one is full."""
    code = """
from training.progress import Progress
step = Progress.step
def full(self, number, *values):
    if number == 2 and os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device", "/scratch/index")
    return step(self, number, *values)
Progress.step = full
"""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 5]
    ends = finish_several(start_several(2, patched(tmp_path, "pretrain_mae", code), *flags, cwd=tmp_path), 1)
    gone, full = errors_of(ends)
    assert "error: process 0 stops" in gone and "error: /scratch/index could not be written (the disk is full)" in full


def test_who_is_waited_for_is_told(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "1")
    report_waiting()
    assert capsys.readouterr().err == ""
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    report_waiting()
    assert capsys.readouterr().err == "process 2 of 4 waits for the others at 10.0.0.1:29500\n"


def test_a_time_limit_stops_a_run(image_folder, tmp_path):
    """The process pretends to be older than it is."""
    flags = [*TINY, "--path_to_data", image_folder, "--max_steps", 1000, "--validate_every", 0]
    aged = "import psutil, time\npsutil.Process.create_time = lambda process, born=time.time() - {}: born"
    path = patched(tmp_path, "pretrain_mae", aged.format(3600 - 180 - 3))
    done = run(path, *flags, "--time_limit", "1:00", cwd=tmp_path)
    step = steps_in(tmp_path / "work_dir" / "pretrain_mae")
    assert f"stopped by --time_limit 1:00 after step {step}, which is saved" in done.stderr + done.stdout
    again = [*flags, "--resume_from_checkpoint", "auto", "--time_limit", "1:06"]
    path = patched(tmp_path, "pretrain_mae", aged.format(4000))
    refused = run(path, *again, cwd=tmp_path, code=1).stderr
    assert "error: --time_limit 1:06 is too short: the start and one step" in refused and "Traceback" not in refused
    assert (tmp_path / f"work_dir/pretrain_mae/checkpoints/step_{step + 1:08d}").exists()


def test_the_scripts_find_a_micro_batch_and_keep_it(kind, flags, tmp_path):
    """Three of twelve images fit on a GPU, played by a CPU. The trials do not change the run."""
    code = """
import training.memory
training.memory.check_device = lambda device: []
training.memory.fits_on_gpu = lambda try_step, size, device: try_step(size) or size <= 3
"""
    path = patched(tmp_path, kind, code)
    auto = [*flags, "--micro_batch_size", "auto", "--experiment_name", "auto"]
    done = run(path, *auto, cwd=tmp_path)
    assert "batch      12 = 1 process x 4 micro-batches x 3" in done.stdout
    run(f"{kind}.py", *flags, "--micro_batch_size", 3, "--experiment_name", "three", cwd=tmp_path)
    found, expected = (tmp_path / "work_dir" / name for name in ("auto", "three"))
    assert flags_of(found)["micro_batch_size"] == 3
    assert_equal_runs(found, expected, 4)
    more = code.replace("size <= 3", "True")
    resumed = run(patched(tmp_path, kind, more), *auto, "--resume_from_checkpoint", "auto", cwd=tmp_path)
    assert "batch      12 = 1 process x 4 micro-batches x 3" in resumed.stdout
    both = [*auto, "--gradient_accumulation_steps", 2, "--experiment_name", "both"]
    refused = run(f"{kind}.py", *both, cwd=tmp_path, code=2).stderr
    assert "--micro_batch_size auto chooses --gradient_accumulation_steps, which is given as 2" in refused
    assert "auto tries what fits on a GPU" in run(f"{kind}.py", *auto, cwd=tmp_path, code=2).stderr
