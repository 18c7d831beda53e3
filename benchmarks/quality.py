"""Compare pre-training recipes by the quality of their features at equal training time.

    python benchmarks/quality.py --path_to_data IMAGES --recipe baseline= --recipe muon="--optimizer muon"

A recipe is a name and flags of pretrain_mae.py, which follow those of --common; the first one is the baseline. Dry runs
of all recipes, in turns, measure the time of a step. Then, for each recipe and seed, a run has as many steps as fit
into --seconds, and its schedule ends there. Validation and saving do not count. At --points equally spaced times, the
frozen features of labelled images are evaluated, and at the end an attentive probe is trained on them.

The folder --out holds the curves (quality.png), the table (quality.md, quality.json), and all runs. The same command
continues an interrupted comparison; finished runs are not repeated, and recipes and seeds may be added. Values are
means over the seeds, with the standard deviation. Times are steps times the measured seconds of a step; "trained" is
the time that the runs took. If the two differ, the machine was busy.
"""

import argparse
import json
import os
import re
import shlex
import signal
import sys
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from subprocess import DEVNULL, Popen
from time import sleep

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

from benchmarks.compare import describe_machine
from training.arguments import Parser, integer, number
from training.files import write_json
from training.launch import RunError, cores_per_process, fail, run_script
from training.progress import BAR
from training.wording import several

ROOT = Path(__file__).parent.parent
METRICS = {"linear_top1": "linear top-1 (%)", "knn_top1": "k-NN top-1 (%)", "rankme": "RankMe"}
PROBE = "--attentive_probe --optimizer adamw --learning_rate 3e-3 --global_batch_size 128 --crop_scale 0.6 1"


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = Parser(__doc__)
    flag = parser.add_argument
    flag("--path_to_data", required=True, help="labelled training and validation images, as pretrain_mae.py takes them")
    help_text = 'name and flags of a recipe (repeat; the first is the baseline; default baseline="")'
    flag("--recipe", type=read_recipe, action="append", metavar="NAME=FLAGS", dest="recipes", help=help_text)
    flag("--common", type=read_words, default=[], metavar="FLAGS", help="flags of all recipes, given as --common=FLAGS")
    flag("--seconds", type=number(1), default=600, help="training time of a run (default 600)")
    flag("--points", type=integer(1), default=5, help="measures of a run (default 5)")
    flag("--seeds", type=integer(0), nargs="+", default=[0, 1, 2], help="seeds of each recipe (default 0 1 2)")
    flag("--rounds", type=integer(1), default=3, help="how often a step of each recipe is timed (default 3)")
    help_text = "runs at the same time, each on its share of the cores (default 1)"
    flag("--parallel", type=integer(1), default=1, help=help_text)
    flag("--probe_steps", type=integer(0), default=200, help="steps of the attentive probe (0: none, default 200)")
    flag("--probe", type=read_words, default=[], metavar="FLAGS", help=f"flags of the probe, which follow {PROBE}")
    flag("--out", default="work_dir/quality", help="folder of the results (default work_dir/quality)")
    args, errors = parser.read(argv)
    args.recipes = args.recipes or [("baseline", [])]
    names = [name for name, _ in args.recipes]
    if len({*names}) < len(names):
        errors.append(f"--recipe has a name twice ({' '.join(names)}); give each recipe a name of its own")
    return args, errors


def read_words(text: str) -> list[str]:
    """Split flags as a shell does: an argparse type."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid ({error}); expected flags as in a shell") from None


def read_recipe(text: str) -> tuple[str, list[str]]:
    """Read NAME=FLAGS, the name of a folder and flags: an argparse type."""
    name, sign, flags = text.partition("=")
    if not sign or not re.fullmatch(r"\w[\w+-]*", name):
        raise argparse.ArgumentTypeError(f'{text!r} is not valid; expected a name and flags, NAME="FLAGS"')
    return name, read_words(flags)


def open_folder(out: Path, settings: dict, recipes: dict[str, list[str]]) -> dict[str, dict]:
    """Return the recipes that earlier commands have timed; exit if the folder is of another comparison."""
    path = out / "settings.json"
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail([f"--out {out} holds something else; give another name"])
        return {}
    before = json.loads(path.read_text())
    pairs = [(f"--{name}", settings[name], before["settings"].get(name)) for name in settings]
    known = before["recipes"]
    pairs += [(f"--recipe {name}", recipes[name], known[name]["flags"]) for name in recipes if name in known]
    remedy = "give the same, or another --out"
    errors = [f"{name} differs from {path}, which has {old!r}; {remedy}" for name, new, old in pairs if new != old]
    if errors:
        fail(errors)
    return known


def run_all(commands: list[tuple[list, Path]], *, parallel: int, title: str) -> None:
    """Run scripts with their flags, some at a time under one bar, each with its output in a file.

    Raises:
        RunError: if a script fails, with its message; bad flags exit with code 2.
    """
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores_per_process() // parallel)))
    waiting, running = list(commands), {}
    bar = tqdm(total=len(commands), desc=title, unit="run", disable=not commands, **BAR)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                (script, *flags), log = waiting.pop(0)
                log.parent.mkdir(parents=True, exist_ok=True)
                with log.open("w") as stream:
                    options = dict(stdin=DEVNULL, stdout=stream, stderr=stream, start_new_session=True)
                    words = [sys.executable, str(ROOT / script), *map(str, flags)]
                    running[Popen(words, env=os.environ | {"OMP_NUM_THREADS": threads}, **options)] = log
            sleep(0.1)
            for process in [process for process in running if process.poll() is not None]:
                log = running.pop(process)
                if process.returncode:
                    report_failure(log, process.returncode)
                bar.update(1)
    finally:
        bar.close()
        for process in running:
            process.terminate()  # the scripts then save a checkpoint
        for process in running:
            process.wait()


def report_failure(log: Path, code: int) -> None:
    """Raise RunError with the error messages in a log, or exit with code 2 if flags or data are bad."""
    errors = [line.removeprefix("error: ") for line in log.read_text().splitlines() if line.startswith("error: ")]
    if code == 2:
        fail([f"{log}: {line}" for line in errors])
    raise RunError(f"{log}: {errors[0] if errors else 'a script has failed; see there'}")


def time_steps(out: Path, recipes: dict[str, list], *, rounds: int, parallel: int) -> dict[str, dict]:
    """Return the seconds of a step and the steps of an epoch of each recipe, by dry runs in turns.

    `parallel` dry runs of a recipe run at the same time, so that the load is that of the later runs.
    """
    seconds, epochs = {name: [] for name in recipes}, {}
    for _ in range(rounds):
        for name, flags in recipes.items():
            logs = [out / name / f"dry_run_{i}.log" for i in range(parallel)]
            command = ["pretrain_mae.py", *flags, "--dry_run", "--working_directory", out / name]
            run_all([(command, log) for log in logs], parallel=parallel, title=f"timing {name}")
            texts = [log.read_text() for log in logs]
            seconds[name].append(mean(float(re.search(r"(\S+) s a step", text)[1]) for text in texts))
            epochs[name] = int(re.search(r", (\d+) per epoch", texts[0])[1])
    return {name: dict(step_seconds=median(seconds[name]), steps_per_epoch=epochs[name]) for name in recipes}


def count_steps(step_seconds: float, seconds: float, points: int) -> int:
    """Return the number of steps that fit into a time, as a multiple of `points` and at least `points`."""
    return points * max(1, int(seconds / step_seconds / points))


def pretrain(folder: Path, flags: list, recipe: dict, *, seed: int, points: int) -> list:
    """Return the command of a run that measures its features `points` times, at equal intervals."""
    every = recipe["steps"] // points
    options = ["--working_directory", folder, "--experiment_name", f"pretrain_{seed}", "--seed", seed]
    options += ["--max_steps", recipe["steps"], "--knn_every", f"{every / recipe['steps_per_epoch']:.9f}"]
    options += ["--validate_every", 0, "--num_preview_images", 0, "--save_checkpoint_steps", every]
    return ["pretrain_mae.py", *flags, *options, "--keep_checkpoints", 1, "--resume_from_checkpoint", "auto"]


def probe(folder: Path, flags: list, *, seed: int) -> list:
    """Return the command of an attentive probe of a run's encoder."""
    options = ["--working_directory", folder, "--experiment_name", f"probe_{seed}", "--seed", seed]
    options += ["--path_to_pretrained_mae_weights", folder / f"pretrain_{seed}" / "encoder", "--validate_every", 0]
    return ["finetune_classifier.py", *PROBE.split(), *flags, *options, "--resume_from_checkpoint", "auto"]


def is_finished(run: Path) -> bool:
    """Return True if a run has reached its end."""
    return (run / "metrics.json").exists()


def read_run(folder: Path, seed: int, recipe: dict, *, points: int) -> dict:
    """Return the measurements of a run and of its probe.

    Raises:
        RunError: if the run was stopped, or its data have no labels.
    """
    run = folder / f"pretrain_{seed}"
    if not is_finished(run):
        raise RunError(f"{run} was stopped; continue with the same command")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curve = [
        dict(step=line["step"], seconds=line["step"] * recipe["step_seconds"], **{name: line[name] for name in METRICS})
        for line in lines
        if "linear_top1" in line
    ]
    if len(curve) < points:
        raise RunError(f"{run} has no linear_top1; expected data with labelled validation images")
    size = json.loads((run / "args.json").read_text())["flags"]["global_batch_size"]
    logged = [{"step": 0}, *(line for line in lines if "loss" in line)]
    trained = sum((b["step"] - a["step"]) * size / b["images_per_second"] for a, b in pairwise(logged))
    attentive = folder / f"probe_{seed}" / "metrics.json"
    top1 = json.loads(attentive.read_text())["top1"] if attentive.exists() else None
    return dict(seed=seed, seconds=trained, curve=curve, attentive_top1=top1)


def mean_and_deviation(values: list[float]) -> list[float]:
    """Return the mean and the standard deviation, which is 0 for a single value."""
    return [mean(values), stdev(values) if len(values) > 1 else 0.0]


def summarize(recipe: dict, runs: list[dict]) -> dict:
    """Return the means over the runs of a recipe: of the curves, the trained time and the attentive probe."""
    curve = [
        dict(step=points[0]["step"], seconds=points[0]["seconds"])
        | {name: mean_and_deviation([point[name] for point in points]) for name in METRICS}
        for points in zip(*(run["curve"] for run in runs), strict=True)
    ]
    top1 = [run["attentive_top1"] for run in runs]
    attentive = None if None in top1 else mean_and_deviation(top1)
    trained = mean_and_deviation([run["seconds"] for run in runs])
    return recipe | dict(runs=runs, curve=curve, trained=trained, attentive_top1=attentive)


def seconds_to_reach(curve: list[dict], target: float) -> float | None:
    """Return the interpolated time at which the mean linear top-1 reaches a target; None if it does not.

    The first point's time is an upper bound if the target is reached there.
    """
    before = None
    for point in curve:
        value = point["linear_top1"][0]
        if value >= target:
            if before is None:
                return point["seconds"]
            low = before["linear_top1"][0]
            return before["seconds"] + (target - low) / (value - low) * (point["seconds"] - before["seconds"])
        before = point
    return None


def table(results: dict[str, dict], target: float) -> str:
    """Return the results as a Markdown table."""
    names = [*METRICS.values(), "attentive top-1 (%)"]
    header = ["recipe", "flags", "s a step", "steps", "trained (s)", *names, f"time to {target:.2f} % linear (s)"]
    rows = [header, ["---"] * len(header)]
    for name, result in results.items():
        last, reached = result["curve"][-1], result["seconds_to_baseline"]
        form = "{:.2f} ± {:.2f}" if len(result["runs"]) > 1 else "{:.2f}"
        values = [*(last[metric] for metric in METRICS), result["attentive_top1"]]
        bound = "at most " if reached == result["curve"][0]["seconds"] else ""
        row = [
            name,
            f"`{shlex.join(result['flags'])}`" if result["flags"] else "none",
            f"{result['step_seconds']:.3g}",
            str(last["step"]),
        ]
        row += ["-" if value is None else form.format(*value) for value in (result["trained"], *values)]
        rows.append([*row, "not reached" if reached is None else f"{bound}{reached:.0f}"])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw(path: Path, results: dict[str, dict], title: str) -> None:
    """Write a PNG of the curves of each metric, with bands of one standard deviation."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(15, 5), dpi=100, layout="constrained")
    figure.suptitle(title)
    for axes, (metric, label) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        for i, (name, result) in enumerate(results.items()):
            seconds = [point["seconds"] for point in result["curve"]]
            values, deviations = zip(*(point[metric] for point in result["curve"]), strict=True)
            style = dict(color=f"C{i - 1}" if i else "black", linestyle="--" if i > 10 else "-")
            axes.plot(seconds, values, marker="o", markersize=4, label=name, **style)
            low, high = ([a + sign * b for a, b in zip(values, deviations, strict=True)] for sign in (-1, 1))
            axes.fill_between(seconds, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.set(xlabel="seconds of training", ylabel=label, xlim=(0, None))
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, format="png")


def report(out: Path, results: dict[str, dict], context: dict) -> None:
    """Print the table, and write quality.json, quality.md and quality.png; `context` are the JSON's other entries."""
    baseline = next(iter(results))
    target = results[baseline]["curve"][-1]["linear_top1"][0]
    for result in results.values():
        result["seconds_to_baseline"] = seconds_to_reach(result["curve"], target)
    settings, count = context["settings"], len(context["seeds"])
    title = f"{settings['path_to_data']}, {settings['seconds']:g} s of training, {several(count, 'seed')}"
    text = f"{title}; {context['machine']}\n\n{table(results, target)}"
    write_json(out / "quality.json", context | dict(baseline=baseline, recipes=results))
    (out / "quality.md").write_text(text)
    draw(out / "quality.png", results, title)
    print(f"\n{text}")


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.default_int_handler)  # raises KeyboardInterrupt, which ends the runs
    out, recipes = Path(args.out), dict(args.recipes)
    names = ("path_to_data", "common", "seconds", "points", "parallel", "probe_steps", "probe")
    settings = {name: getattr(args, name) for name in names}
    known = open_folder(out, settings, recipes)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", {"settings": settings, "recipes": known})
    machine, data = describe_machine(), ["--path_to_data", args.path_to_data]
    print(machine)

    # Steps
    flags = {name: [*data, *args.common, *recipes[name]] for name in recipes}
    new = {name: flags[name] for name in recipes if name not in known}
    for name, times in time_steps(out, new, rounds=args.rounds, parallel=args.parallel).items():
        steps = count_steps(times["step_seconds"], args.seconds, args.points)
        known[name] = dict(flags=recipes[name], **times, steps=steps)
    write_json(out / "settings.json", {"settings": settings, "recipes": known})
    for name in recipes:
        print(f"{name:20} {known[name]['step_seconds']:.3g} s a step, {known[name]['steps']} steps")

    # Runs, and results of the seeds so far
    probe_flags = [*data, "--max_steps", args.probe_steps, *args.probe]
    for count, seed in enumerate(args.seeds, 1):
        runs, probes = {}, {}
        for name in recipes:
            options = dict(seed=seed, points=args.points)
            runs[f"{name}/pretrain_{seed}"] = pretrain(out / name, flags[name], known[name], **options)
            probes[f"{name}/probe_{seed}"] = probe(out / name, probe_flags, seed=seed)
        for title, commands in (("pre-training", runs), ("probes", probes if args.probe_steps else {})):
            left = [(words, out / f"{run}.log") for run, words in commands.items() if not is_finished(out / run)]
            run_all(left, parallel=args.parallel, title=f"{title}, seed {seed}")
        seeds = args.seeds[:count]
        results = {
            name: summarize(
                known[name], [read_run(out / name, seed, known[name], points=args.points) for seed in seeds]
            )
            for name in recipes
        }
        report(out, results, dict(machine=machine, settings=settings, seeds=seeds))
    print(f"finished: {out / 'quality.md'}, {out / 'quality.json'}, {out / 'quality.png'}")


if __name__ == "__main__":
    run_script(main, remedy="continue with the same command")
