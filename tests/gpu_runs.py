"""Checks of gpu.py that run the scripts.

They compute nothing themselves, because a process that has used CUDA cannot fork one that uses it.
"""

import importlib
import itertools
import json
import os
import re
import signal
import socket
import time
from functools import partial
from pathlib import Path

import torch
from gpu_lab import ALL_SCRIPTS, DECODER, ROOT, SCRIPTS, TINY_ENCODER, Child, Lab, flags_of, losses_of, write_pictures
from safetensors.torch import load_file

from benchmarks import data as data_benchmark
from data.decode import PixelFormat
from data.files import FolderSource
from data.sources import open_sources


def largest_difference(one: list[float], other: list[float]) -> float:
    """Return the largest relative difference of two curves; infinity if one of them is shorter or empty."""
    if not one or len(one) != len(other):
        return float("inf")
    return max(abs(a / b - 1) for a, b in zip(one, other, strict=True))


def check_scripts(lab: Lab) -> None:
    """Run the scripts to their exports in every precision, eager and compiled; detection only in float32 and bf16."""
    write_pictures(lab.folder)
    modes = {
        "float32": ["--mixed_precision", "no", "--no-tf32"],
        "float32 TF32": ["--mixed_precision", "no"],
        "bf16": ["--mixed_precision", "bf16"],
        "fp16": ["--mixed_precision", "fp16"],
        "compiled": ["--mixed_precision", "bf16", "--compile"],
        "compiled, checkpointing": ["--mixed_precision", "bf16", "--compile", "--gradient_checkpointing"],
    }
    others = {  # these change the losses, which are therefore not compared
        "mae": "--decoder cross --predict_ratio 0.5 --mask_block 2 --target hog --optimizer muon --compile",
        "classifier": "--attentive_probe --cache_features --optimizer adamw --compile",
        "segmenter": "--freeze_encoder --head dpt --compile",
    }
    if lab.tiny:  # Accelerate has no fp16 on a CPU, and compiling takes long there
        modes = {name: modes[name] for name in ("float32", "bf16")}
        others = {task: words.replace(" --compile", "") for task, words in others.items()}
    folder = lab.folder / "work_dir"
    for tasks, weights in ((["mae"], None), (["classifier", "segmenter", "detector"], folder / "mae float32")):
        starts = {}
        for task in tasks:
            own = flags_of(lab, task, steps=4 if lab.tiny else 20, weights=weights)
            runs = {mode: modes[mode] for mode in ("float32", "bf16")}
            if task in others:
                runs = {**modes, "with other options": ["--mixed_precision", "bf16", *others[task].split()]}
            for mode, flags in runs.items():
                name = f"{task} {mode}"
                words = [*own, *flags, "--experiment_name", name]
                starts[name] = partial(lab.start, ALL_SCRIPTS[task], *words, log=name)
        for name, code in lab.at_once(starts).items():
            export = folder / name / ("encoder" if name.startswith("mae") else "model")
            done = code == 0 and (folder / name / "metrics.json").exists() and export.is_dir()
            lab.report(name, f"exit code {code}", "exit code 0, metrics.json and an export", done)
    for task in SCRIPTS:
        exact, eager = (losses_of(folder / f"{task} {mode}") for mode in ("float32", "bf16"))
        for mode in modes:
            other, curve = ("bf16", eager) if mode.startswith("compiled") else ("float32", exact)
            error = largest_difference(losses_of(folder / f"{task} {mode}"), curve)
            ok = None if mode == "fp16" else error <= 1e-2  # steps that the loss scaler skips shift the curve
            lab.report(f"{task} {mode}: losses against {other}", error, "" if ok is None else "0.01", ok)
    curves = [losses_of(folder / f"detector {mode}") for mode in ("bf16", "float32")]
    error = largest_difference(*curves)  # rounding changes which regions train the heads
    lab.report("detector bf16: losses against float32", error, "0.1", error <= 0.1)


RESUMED = {
    "pre-training": ("mae", "--mixed_precision bf16 --drop_path 0.1"),
    "segmenter": ("segmenter", "--mixed_precision bf16 --drop_path 0.1"),
    "classifier": ("classifier", "--mixed_precision bf16 --drop_path 0.2 --mixup_alpha 0.8 --ema_decay 0.9"),
    "pre-training fp16": ("mae", "--mixed_precision fp16"),
    "pre-training compiled": ("mae", "--mixed_precision bf16 --compile"),
}


def compare_resumed(lab: Lab, name: str) -> dict[str, str]:
    """Kill a run, stop another, resume both, and return how they compare with an undisturbed run."""
    torch.set_num_threads(1)  # otherwise comparisons start OpenMP's threads, which later forks cannot use
    task, flags = RESUMED[name]
    steps, every = (12, 4) if lab.tiny else (60, 20)
    flags = [*flags_of(lab, task, steps=steps), *flags.split(), "--deterministic", "--save_checkpoint_steps", every]
    folder, answers = lab.folder / "work_dir", {}

    def start(end: str, *more: str) -> Child:
        words = [*flags, "--experiment_name", f"{name} {end}", *more]
        return lab.start(SCRIPTS[task], *words, log=f"{name} {end} {len(more)}")

    if (code := start("whole").wait(lab.seconds)) != 0:
        return {"undisturbed": f"exit code {code}"}
    for end, number in {"killed": signal.SIGKILL, "stopped": signal.SIGTERM}.items():
        child, run = start(end), folder / f"{name} {end}"
        while child.poll() is None and len(losses_of(run)) <= every:
            time.sleep(0.002)
        if child.poll() is not None:
            answers[end] = "ended before the signal"
            continue
        os.kill(child.pid, number)
        child.wait(lab.seconds)
        child = start(end, "--resume_from_checkpoint", "auto")
        code = child.wait(lab.seconds)
        answers[end] = f"exit code {code}" if code else compare_runs(folder / f"{name} whole", run)
    return answers


def compare_runs(one: Path, other: Path) -> str:
    """Return "equal" if losses and last checkpoints of two runs are equal, otherwise what differs."""
    if losses_of(one) != losses_of(other):
        return "losses differ"
    last = max((one / "checkpoints").glob("step_*"))
    for path in last.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(other / "checkpoints" / last.name / path.name)
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return f"{path.name} differs"
    state = "optimizer.pt"
    if not same(*(torch.load(run / "checkpoints" / last.name / state, weights_only=True) for run in (one, other))):
        return f"{state} differs"
    return "equal"


def same(one, other) -> bool:
    """Return True if two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def check_resume(lab: Lab) -> None:
    """Compare --deterministic runs that were killed or stopped, and resumed, with undisturbed ones."""
    write_pictures(lab.folder)
    names = ["classifier"] if lab.tiny else list(RESUMED)
    for name, answers in lab.collect({name: (compare_resumed, lab, name) for name in names}).items():
        for end, answer in (answers or {"killed or stopped": "failed"}).items():
            lab.report(f"{name}, {end}", answer, "equal", answer == "equal")


def count_waits(lab: Lab, task: str) -> dict[str, int]:
    """Count profiler events in eight steps of a script (tiny: two), in which a wait for the device is an error."""
    first, last = (4, 6) if lab.tiny else (4, 12)
    script, calls = importlib.import_module(SCRIPTS[task]), itertools.count()
    optimizer_step, activities = script.optimizer_step, [torch.profiler.ProfilerActivity.CPU]
    if lab.on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile = torch.profiler.profile(activities=activities)

    def watched_step(*args, **options):
        number = next(calls)
        if number == first:
            profile.start()
        if number in (first, last) and lab.on_gpu:
            torch.cuda.set_sync_debug_mode("error" if number == first else "default")
        if number == last:
            profile.stop()
        return optimizer_step(*args, **options)

    script.optimizer_step = watched_step
    os.chdir(lab.folder)
    os.environ["ACCELERATE_USE_CPU"] = "false" if lab.on_gpu else "true"
    more = ["--mixed_precision", "bf16", "--log_every", "100", "--experiment_name", f"waits_{task}"]
    more += [] if task == "segmenter" else ["--validate_every", "0"]
    script.main([*flags_of(lab, task, steps=last + 2), *more])
    names = [event.name for event in profile.events()]
    words = {"synchronizations": "Synchronize", "pageable copies": "Pageable", "events": ""}
    return {title: sum(word in name for name in names) for title, word in words.items()}


def check_waits(lab: Lab) -> None:
    """Take steps in which a wait for the device is an error, and report the profiler's counts."""
    write_pictures(lab.folder)
    for task, counts in lab.collect({task: (count_waits, lab, task) for task in SCRIPTS}).items():
        name, expected = f"{task}: steps without a wait", "0 pageable copies, 2 synchronizations (by the profiler)"
        if counts is None:
            lab.report(name, "failed", expected, ok=False)
            continue
        ok = counts["synchronizations"] <= 2 and counts["pageable copies"] == 0 and counts["events"] > 0
        lab.report(name, ", ".join(f"{count} {title}" for title, count in counts.items()), expected, ok)


def repeated_list(lab: Lab, count: int) -> Path:
    """Write a list of `count` images, which repeats the photographs as often as needed."""
    source, path = FolderSource(str(lab.images or lab.folder / "classes")), lab.folder / "images.jsonl"
    names = [os.path.abspath(source.name(index)) for index in range(len(source))]
    lines = [json.dumps({"path": name}) + "\n" for name in itertools.islice(itertools.cycle(names), count)]
    path.write_text("".join(lines))
    return path


def loader_rate(folder: str, img_size: int, count: int, num_workers: int) -> float:
    """Return the images/s of the pre-training loader alone."""
    source = open_sources(folder, PixelFormat(3))[0]
    dataset = data_benchmark.pretraining_data(source, img_size)
    return data_benchmark.loader_rate(dataset, min(count, len(source)), num_workers)


def check_loader(lab: Lab) -> None:
    """Time the loader alone, and the data wait of training steps that read from it."""
    count, img_size, short_side = (64, 32, 48) if lab.tiny else (4096, 224, 256)
    write_pictures(lab.folder)
    images = repeated_list(lab, count)
    sources = {"photographs": images, "JPEG": lab.folder / "jpeg", "arrays": lab.folder / "array"}
    for form in ("jpeg", "array"):
        words = [images, lab.folder / form, "--format", form, "--short_side", short_side]
        if not lab.run("prepare_data", *words, log=f"prepare {form}"):
            return
    for title, source in sources.items():
        for num_workers in (1,) if lab.tiny else (8, 14, 16) if title == "photographs" else (14,):
            name = f"{title}, {num_workers} workers"
            rate = lab.collect({name: (loader_rate, str(source), img_size, count, num_workers)})[name]
            lab.report(name, rate, ok=None if rate else False, unit="images/s")

    speeds = {}
    model = ["--model", "base", "--compile", "--global_batch_size", "256", "--mixed_precision", "bf16"]
    if lab.tiny:
        model = [*TINY_ENCODER, *DECODER, *["--img_size", "32", "--num_workers", "1", "--global_batch_size", "32"]]
    runs = [("arrays", "pinned"), ("arrays", "pageable"), ("JPEG", "pinned")]
    for title, memory in runs[:1] if lab.tiny else runs:
        name, pin = f"training from {title}, {memory}", "--pin_memory" if memory == "pinned" else "--no-pin_memory"
        if not lab.run("pretrain_mae", "--path_to_data", sources[title], "--dry_run", pin, *model, log=name):
            continue
        speed, wait = re.search(r"([\d.e+]+) images/s, data wait (\d+)%", (lab.folder / name).read_text()).groups()
        speeds[memory] = float(speed)
        lab.report(name, float(speed), unit="images/s")
        lab.report(f"{name}: data wait", int(wait), "below 2", None if lab.tiny else int(wait) < 2, "%")
        if memory == "pageable":
            ratio = speeds["pinned"] / speeds["pageable"]
            lab.report("gain of pinned memory", ratio, "at least 0.99", ratio >= 0.99)


def free_port() -> str:
    """Return a free TCP port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def fsdp_variables() -> dict[str, str]:
    """Return the variables that `accelerate launch` sets for fsdp2.yaml; --mixed_precision overrides its precision."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "pretrain_mae.py"]))
    variables = prepare_multi_gpu_env(args)
    return {name: value for name, value in variables.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


def start_ranks(
    lab: Lab, script: str, flags: list, name: str, ranks: int, backend: str | None, fsdp: bool
) -> list[Child]:
    """Start a script as `ranks` processes of one run, all on the same device; `backend` None is Accelerate's, NCCL."""
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    shared |= dict(LOCAL_RANK="0", **(fsdp_variables() if fsdp else {}))
    if fsdp and not lab.on_gpu:  # Accelerate does not shard on a CPU: claim GPUs that use gloo
        backend, shared = "gloo", shared | dict(ACCELERATE_TORCH_DEVICE="cpu", CUDA_VISIBLE_DEVICES="")
        shared["ACCELERATE_USE_CPU"] = "false"
    elif not lab.on_gpu:
        backend = None
    words = [*flags, "--experiment_name", name]
    return [
        lab.start(script, *words, log=f"{name} {rank} {len(words)}", backend=backend, RANK=str(rank), **shared)
        for rank in range(ranks)
    ]


def script_of(task: str) -> str:
    """Return the script of a task; "linear" is a segmenter with a linear head."""
    return SCRIPTS["segmenter" if task == "linear" else task]


def check_distributed(lab: Lab) -> None:
    """Compare runs over NCCL, over gloo and under FSDP2 with runs of one process."""
    write_pictures(lab.folder)
    exact = ["--mixed_precision", "no", "--no-tf32", "--drop_path", "0", "--save_checkpoint_steps", "2"]
    flags = {task: [*flags_of(lab, task, steps=4 if lab.tiny else 20), *exact] for task in ("mae", "segmenter")}
    width = flags["segmenter"].index("--head_width")
    flags["linear"] = [*flags["segmenter"][:width], *flags["segmenter"][width + 2 :], "--head", "linear"]
    runs = {  # name -> task, more flags, processes, backend, FSDP, largest difference of the losses
        "DDP over NCCL": ("mae", [], 1, None, False, 1e-5),
        "DDP over NCCL, compiled": ("mae", ["--compile"], 1, None, False, 1e-5),
        "FSDP2": ("mae", [], 1, None, True, 1e-5),
        "DDP over gloo, two processes": ("mae", [], 2, "gloo", False, 1e-5),
        "BatchNorm of two processes": ("linear", [], 2, "gloo", False, 1e-4),
        "BatchNorm of two processes, compiled": ("linear", ["--compile"], 2, "gloo", False, 1e-4),
        # Dropout is seeded per micro-batch, so two processes draw other numbers than one
        "UperNet of two processes, compiled": ("segmenter", ["--compile"], 2, "gloo", False, 1e-1),
    }
    if lab.tiny:
        runs = {name: runs[name] for name in ("FSDP2", "DDP over gloo, two processes")}
    folder = lab.folder / "work_dir"
    for task in flags:
        name = f"{task} alone"
        lab.run(script_of(task), *flags[task], "--experiment_name", name, log=name)
    for name, (task, more, *processes, limit) in runs.items():
        children = start_ranks(lab, script_of(task), [*flags[task], *more], name, *processes)
        codes = [child.wait(lab.seconds) for child in children]
        error = largest_difference(losses_of(folder / name), losses_of(folder / f"{task} alone"))
        ok = not any(codes) and error <= limit
        lab.report(name, f"exit codes {codes}, losses {error:.1e}", f"losses {limit:g}", ok)

    name = "FSDP2, killed and resumed"
    (child,) = start_ranks(lab, "pretrain_mae", flags["mae"], name, 1, None, True)
    while child.poll() is None and len(losses_of(folder / name)) < 3:
        time.sleep(0.005)
    if child.poll() is None:
        child.kill_all()
    child.wait()
    (child,) = start_ranks(
        lab, "pretrain_mae", [*flags["mae"], "--resume_from_checkpoint", "auto"], name, 1, None, True
    )
    code, error = child.wait(lab.seconds), largest_difference(losses_of(folder / name), losses_of(folder / "FSDP2"))
    lab.report(name, f"exit code {code}, losses {error:.1e}", "losses 1e-5", code == 0 and error <= 1e-5)


def check_learning(lab: Lab) -> None:
    """Pre-train ViT-Ti on CIFAR-10 for at most 100 seconds, then train a linear probe and fine-tune."""
    start, folder = time.monotonic(), lab.folder / "work_dir"
    write_pictures(lab.folder)
    batch, workers, source = (16, 1, lab.folder / "classes") if lab.tiny else (1024, 14, lab.cifar10)
    data = f"--num_workers {workers} --global_batch_size {batch} --log_every 20 --mixed_precision bf16".split()
    data += ["--path_to_data", source, "--save_checkpoint_interval", "0"]
    model = f"--img_size 32 --patch_size 4 --encoder_embed_dim 192 --encoder_depth {2 if lab.tiny else 12}"
    model += " --encoder_num_heads 3"
    model += " --decoder_embed_dim 128 --decoder_depth 2 --decoder_num_heads 4 --base_learning_rate 3e-4"
    flags = [*data, *model.split(), "--validate_every", "0", "--num_preview_images", "0"]
    epochs = 1
    if not lab.tiny:
        if not lab.run("pretrain_mae", *flags, "--dry_run", log="dry run"):
            return
        speed = float(re.search(r"([\d.e+]+) images/s", (lab.folder / "dry run").read_text())[1])
        seconds = min(100.0, lab.seconds - (time.monotonic() - start) - 100)
        epochs = max(5, int(seconds * speed / 50_000))
    flags += ["--epochs", epochs]
    begun = time.monotonic()
    if not lab.run("pretrain_mae", *flags, log="pre-training"):
        return
    losses, seconds = losses_of(folder / "pretrain_mae"), time.monotonic() - begun
    curve = [round(loss, 4) for loss in losses[:: max(1, len(losses) // 20)]]
    ok = None if lab.tiny else losses[-1] < 0.8 * losses[0]
    lab.report(f"pre-training, {epochs} epochs", seconds, "a falling loss", ok, "s", curve=curve)
    flags = [*data, "--path_to_pretrained_mae_weights", folder / "pretrain_mae"]
    flags += ["--epochs", "1" if lab.tiny else "10", "--validate_every", "0"]
    probe = ["--linear_probe", "--optimizer", "adamw", "--learning_rate", "3e-3"]
    tuning = ["--learning_rate", "1e-3", "--random_aug_magnitude", "0", "--crop_scale", "0.6", "1"]
    tuning += ["--mixup_alpha", "0", "--cutmix_alpha", "0"]
    for name, more, goal in (("linear probe", probe, 55.0), ("fine-tuning", tuning, 80.0)):
        if lab.run("finetune_classifier", *flags, *more, "--experiment_name", name, log=name):
            top1 = json.loads((folder / name / "metrics.json").read_text())["top1"]
            lab.report(f"{name}, top-1", top1, f"above {goal:g}", None if lab.tiny else top1 > goal, unit="%")


def check_predict(lab: Lab) -> None:
    """Compare predictions of the device with those of a CPU, and export runs for the Hub without an upload."""
    write_pictures(lab.folder)
    folder, answers = lab.folder / "work_dir", {}
    for task in ("mae", "classifier"):
        if not lab.run(SCRIPTS[task], *flags_of(lab, task, steps=4), "--experiment_name", task, log=task):
            return
    for title, variables in {"device": {}, "CPU": dict(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")}.items():
        words = [folder / "classifier", lab.folder / "classes" / "val", "--output", lab.folder / title]
        if not lab.run("predict", *words, "--num_workers", "0", log=f"predict on {title}", **variables):
            return
        lines = (lab.folder / title / "predictions.jsonl").read_text().splitlines()
        rows = [json.loads(line)["classes"] for line in lines]
        answers[title] = [{row["class"]: row["probability"] for row in classes} for classes in rows]
    pairs = zip(answers["device"], answers["CPU"], strict=True)
    error = max(abs(one[name] - other[name]) for one, other in pairs for name in one.keys() | other.keys())
    lab.report("predict.py: probabilities against a CPU's", error, "1e-4", error <= 1e-4)
    for task in ("mae", "classifier"):
        name = f"push_to_hub.py {task}"
        if lab.run("push_to_hub", folder / task, log=name):
            lab.report(name, "exit code 0", "a model card", (folder / task / "hub" / "README.md").exists())
