"""Check this repository on a GPU: numbers, determinism, waits, whole runs, speed, learning.

    python tests/gpu.py --images PHOTOGRAPHS --cifar10 PARQUET --out gpu

runs the checks of gpu_checks.py in order of worth, each in processes of its own under a time limit, prints a table of
figures with what was expected, and writes it to gpu/gpu.json. The exit code is the number of failures. Without CUDA all
checks are skipped; --device cpu --tiny runs each of them small on a CPU, which tests the checks themselves.

    python tests/gpu.py --table gpu/gpu.json ...

prints the table of docs/running.md from such files.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # another way to look for GPUs forbids CUDA in forked processes
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a process of one thread forks safely

import accelerate
import gpu_models
import gpu_runs
import timm
import torch
import torchvision
import transformers
from gpu_lab import Child, Lab

IMAGENET_EPOCHS = 800 * 1_281_167  # images


CHECKS = {  # name -> check, time limit in seconds; in order of worth
    "environment": (gpu_models.check_environment, 30),
    "numerics": (gpu_models.check_numerics, 60),
    "determinism": (gpu_models.check_determinism, 120),
    "throughput": (gpu_models.check_throughput, 240),
    "scripts": (gpu_runs.check_scripts, 150),
    "resume": (gpu_runs.check_resume, 150),
    "waits": (gpu_runs.check_waits, 60),
    "loader": (gpu_runs.check_loader, 120),
    "learning": (gpu_runs.check_learning, 200),
    "memory": (gpu_models.check_memory, 60),
    "distributed": (gpu_runs.check_distributed, 150),
    "predict": (gpu_runs.check_predict, 60),
}
# Checks that run beside each other; those that measure speed or memory run alone
GROUPS = [
    ["environment"],
    ["numerics", "determinism"],
    ["throughput"],
    ["scripts", "resume", "distributed", "predict"],
    ["waits"],
    ["loader"],
    ["learning"],
    ["memory"],
]


def parse_args():
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--images", type=Path, help="folder of photographs")
    flag("--cifar10", type=Path, help="CIFAR-10 as train.parquet and validation.parquet")
    flag("--out", type=Path, default=Path("gpu"), help="folder to write (default gpu)")
    flag("--seconds", type=float, default=470, help="checks that would start later are left out (default 470)")
    flag("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help=f"of {', '.join(CHECKS)}")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    flag("--tiny", action="store_true", help="small models and few steps: to test the checks")
    flag("--table", type=Path, nargs="+", metavar="FILE", help="print the table of docs/running.md from gpu.json files")
    return parser.parse_args()


def run_group(labs: list[Lab], limit: int) -> dict[str, list[dict]]:
    """Run checks, at most `limit` at a time, print and return their figures."""
    waiting, running, results = list(labs), {}, {}
    while waiting or running:
        while waiting and len(running) < limit:
            lab = waiting.pop(0)
            lab.folder.mkdir(parents=True)
            child = Child(CHECKS[lab.name][0], lab, log=lab.folder / "log.txt")
            running[lab.name] = lab, child, time.monotonic()
        for name, (lab, child, start) in list(running.items()):
            seconds = time.monotonic() - start
            if child.poll() is None and seconds < lab.seconds:
                continue
            late = child.code is None
            code = child.wait(0)
            rows = results[name] = lab.figures()
            if code != 0:
                tail = " ".join(child.log.read_text(errors="replace").strip().splitlines()[-1:])[:200]
                reason = f"ran past {seconds:.0f} s" if late else f"exit code {code}; {tail}"
                rows.append(lab.figure("ended early", reason, ok=False, expected="exit code 0"))
            print("\n".join([*map(describe, rows), f"      {name} took {seconds:.0f} s"]), flush=True)
            del running[name]
        time.sleep(0.05)
    return results


def run_checks(args) -> dict[str, list[dict]]:
    """Run the groups of checks, and return the figures of each check."""
    start, results = time.monotonic(), {}
    for group in [list(CHECKS)] if args.tiny else GROUPS:
        left, labs = args.seconds - (time.monotonic() - start), []
        for name in [name for name in group if name in args.only]:
            seconds = left if args.tiny else min(CHECKS[name][1], left)
            places = dict(images=args.images, cifar10=args.cifar10, folder=args.out / name)
            lab = Lab(name, args.device, args.tiny, seconds=seconds, **places)
            missing = lab.missing_input() or ("no time left" if left < 10 else "")
            if missing:
                results[name] = [lab.figure("", None, ok=None, expected="", skipped=missing)]
            else:
                labs.append(lab)
        results |= run_group(labs, limit=2 if args.tiny else len(labs))
    return results


def describe(row: dict) -> str:
    """Return a line of the table."""
    if row.get("skipped"):
        return f"SKIP  {row['check']}: {row['skipped']}"
    status = {True: "PASS", False: "FAIL", None: "    "}[row["ok"]]
    value = (
        f"{row['value']:.4g}"
        if isinstance(row["value"], float)
        else str(row["value"] if row["value"] is not None else "")
    )
    expected = f"   (expected {row['expected']})" if row["expected"] else ""
    return f"{status}  {row['check']}: {row['name']}: {value} {row['unit']}".rstrip() + expected


def speed_table(paths: list[Path]) -> str:
    """Return the Markdown table of speeds of the cards in gpu.json files."""
    lines = [
        "| card | model | images/s | TFLOP/s | memory | 800 epochs of ImageNet |",
        "|---|---|---|---|---|---|",
    ]
    for path in paths:
        report = json.loads(path.read_text())
        for row in report["figures"]:
            if "tflops" in row:
                hours = IMAGENET_EPOCHS / row["value"] / 3600
                lines.append(
                    f"| {report['machine']['card']} | {row['name']} | {row['value']:,.0f} | {row['tflops']:.0f} | "
                    f"{row['gigabytes']:.1f} GB | {hours:,.0f} h |"
                )
    return "\n".join(lines)


def has_cuda() -> None:
    """Exit with code 0 if a tensor can be made on a GPU."""
    sys.exit(0 if torch.cuda.is_available() and torch.ones(1, device="cuda").item() == 1 else 1)


def describe_machine(environment: list[dict]) -> dict:
    """Return the card, as the check of the environment named it, and versions."""
    card = next((row["value"] for row in environment if row["name"] == "card"), "unknown card")
    packages = dict(torch=torch, torchvision=torchvision, transformers=transformers, timm=timm, accelerate=accelerate)
    versions = {name: package.__version__ for name, package in packages.items()}
    return dict(card=card, python=platform.python_version(), cores=os.cpu_count(), versions=versions)


def main() -> int:
    """Run the checks, and return the number of failures."""
    args = parse_args()
    if args.table:
        print(speed_table(args.table))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    if args.device == "cuda" and Child(has_cuda, log=args.out / "cuda.txt").wait() != 0:
        print("no CUDA device was found: all checks are skipped; --device cpu --tiny tests the checks themselves")
        for name in args.only:
            print(f"SKIP  {name}")
        return 0
    started = time.monotonic()
    results = run_checks(args)
    machine = describe_machine(results.get("environment", []))
    figures = [row for rows in results.values() for row in rows]
    (args.out / "gpu.json").write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    print("\n" + "\n".join(describe(row) for row in figures))
    failures = sum(row["ok"] is False for row in figures)
    print(f"{machine['card']}: {failures} failures, {time.monotonic() - started:.0f} s; see {args.out / 'gpu.json'}")
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
