"""Time two implementations in turns, print the figures and, on request, write them as JSON."""

import argparse
import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

import torch

from modeling.vit import SIZES
from training.arguments import Parser, integer

FIGURE = {"name", "ours", "theirs", "unit", "ratio"}  # the keys of a figure


def new_parser(description: str, *, rounds: int) -> Parser:
    """Return a parser with the flags of every benchmark; `rounds` is the default of --rounds."""
    parser = Parser(description)
    help_text = f"how often both sides are measured (default {rounds})"
    parser.add_argument("--rounds", type=integer(1), default=rounds, help=help_text)
    parser.add_argument("--json", type=own_file, metavar="FILE", help="write the figures to this file, as a list")
    return parser


def own_file(name: str) -> str:
    """Return the name of a file to write (an argparse type); an existing file must contain only figures."""
    path, error = Path(name), "has no folder; create it"
    if path.parent.is_dir():
        error = "holds something else; give another name"
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            if not os.path.lexists(path) or all(row.keys() >= FIGURE for row in json.loads(path.read_text())):
                return name
    raise argparse.ArgumentTypeError(f"{name} {error}")


def read_step_flags(parser: Parser, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Add the flags of a training step to the parser; return the parsed flags and a list of error messages."""
    flag = parser.add_argument
    flag("--model", choices=SIZES, default="base", help="size of the encoder (default base)")
    flag("--img_size", type=integer(1), default=224, help="pixels (default 224)")
    flag("--batch_size", type=integer(1), help="images per process and step (default 16 on a CPU, 256 on a GPU)")
    flag("--mixed_precision", choices=("no", "bf16"), help="default bf16 on a GPU, no on a CPU")
    args, errors = parser.read(argv)
    on_gpu = torch.cuda.is_available()
    args.batch_size = args.batch_size or (256 if on_gpu else 16)
    args.mixed_precision = args.mixed_precision or ("bf16" if on_gpu else "no")
    patch_size = SIZES[args.model]["patch_size"]
    if args.img_size % patch_size:
        errors.append(f"--img_size {args.img_size} is not divided by the patches of {args.model}, {patch_size} pixels")
    return args, errors


def clock(work: Callable) -> float:
    """Return the duration of a call in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def events(work: Callable, count: int = 20) -> float:
    """Return the mean GPU time, in seconds, of `count` calls that are launched without waiting in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / count


def time_in_turns(
    works: dict[str, Callable], *, rounds: int, warmup: int = 1, timer: Callable[[Callable], float] = clock
) -> dict[str, list[float]]:
    """Return the seconds of each function in each round; all run once a round, and `warmup` rounds are dropped."""
    seconds = {name: [] for name in works}
    for _ in range(warmup + rounds):
        for name, work in works.items():
            seconds[name].append(timer(work))
    return {name: values[warmup:] for name, values in seconds.items()}


def rates(count: int, seconds: Iterable[float]) -> list[float]:
    """Return `count` per second for each of the durations `seconds`."""
    return [count / value for value in seconds]


def figure(
    name: str, ours: Sequence[float], unit: str, theirs: Sequence[float] | None = None, *, lower_is_better: bool = False
) -> dict:
    """Return a figure: medians over the rounds, and the median of the rounds' ratios, above 1 if ours is better."""
    if theirs is None:
        return {"name": name, "ours": median(ours), "theirs": None, "unit": unit, "ratio": None}
    ratio = median(b / a if lower_is_better else a / b for a, b in zip(ours, theirs, strict=True))
    return {"name": name, "ours": median(ours), "theirs": median(theirs), "unit": unit, "ratio": ratio}


def report(figures: Iterable[dict], path: str | None) -> None:
    """Print each figure when it is measured, and write all of them, with the machine, to the JSON file `path`."""
    machine, rows = describe_machine(), []
    print(machine)
    for row in figures:
        comparison = "" if row["ratio"] is None else f" against {row['theirs']:.2f}, ratio {row['ratio']:.2f}"
        print(f"{row['name']:60} {row['ours']:9.2f}{comparison} {row['unit']}", flush=True)
        rows.append(row | {"machine": machine})
    if path:
        Path(path).write_text(json.dumps(rows, indent=2) + "\n")


def describe_machine() -> str:
    """Return the names of the GPUs and the CPU, the number of cores, and the version of torch."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    info = Path("/proc/cpuinfo")
    model = re.search("model name\\s*: (.*)", info.read_text()) if info.exists() else None
    cpu = model[1] if model else platform.machine()
    return f"{', '.join(gpus) or 'no GPU'}; {os.cpu_count()} cores of {cpu}; torch {torch.__version__}"
