"""Check this repository on a GPU: numbers, determinism, waits, whole runs, speed, learning.

    python tests/gpu.py --images PHOTOGRAPHS --cifar10 PARQUET --out gpu

runs the checks of gpu_models.py and gpu_runs.py, each in its own processes and with a time limit. It prints a table of
figures with their expected values, and writes it to gpu/gpu.json; --only NAME ... repeats or adds single checks. The
exit code is the number of failures, at most 100. Without CUDA, all checks are skipped; --device cpu --tiny runs small
versions on a CPU, which tests the checks themselves.

    python tests/gpu.py --table gpu/gpu.json ...

prints a Markdown table of the speeds in such files.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # the default check prevents CUDA in forked processes
os.environ["OMP_NUM_THREADS"] = "1" if "--tiny" in sys.argv else "4"  # checks run in parallel
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # only a process of one thread forks safely

import accelerate
import gpu_models
import gpu_runs
import timm
import torch
import torchvision
import transformers
from gpu_lab import Child, Lab

IMAGENET_IMAGES = 800 * 1_281_167  # images in 800 epochs


# Groups of checks that run in parallel: name -> check, time limit in seconds. Checks that measure run alone, after
# "compilation" has filled the compiler's cache for them
GROUPS = [
    {"environment": (gpu_models.check_environment, 20)},
    {
        "compilation": (gpu_models.check_compilation, 200),
        "numerics": (gpu_models.check_numerics, 200),
        "determinism": (gpu_models.check_determinism, 200),
        "scripts": (gpu_runs.check_scripts, 200),
        "resume": (gpu_runs.check_resume, 200),
        "waits": (gpu_runs.check_waits, 200),
        "distributed": (gpu_runs.check_distributed, 200),
        "predict": (gpu_runs.check_predict, 200),
    },
    {"throughput": (gpu_models.check_throughput, 200)},
    {"learning": (gpu_runs.check_learning, 200)},
    {"loader": (gpu_runs.check_loader, 90)},
    {"memory": (gpu_models.check_memory, 60)},
]
CHECKS = {name: check for group in GROUPS for name, check in group.items()}


def absolute(path: str) -> Path:
    """Return an absolute path: the checks change the working directory."""
    return Path(path).resolve()


def parse_args():
    """Return the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--images", type=absolute, help="folder of photographs")
    flag("--cifar10", type=absolute, help="CIFAR-10 as train.parquet and validation.parquet")
    flag("--out", type=absolute, default="gpu", help="folder to write (default gpu)")
    flag("--seconds", type=float, default=470, help="checks that would start later are left out (default 470)")
    flag("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="NAME", help=f"names: {', '.join(CHECKS)}")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda")
    flag("--tiny", action="store_true", help="small models and few steps: to test the checks")
    flag("--table", type=Path, nargs="+", metavar="FILE", help="print the speeds in gpu.json files")
    return parser.parse_args()


def run_group(labs: list[Lab], limit: int) -> dict[str, list[dict]]:
    """Run checks, at most `limit` at a time; print their figures, and return them by the name of the check."""
    waiting, running, results = list(labs), {}, {}
    while waiting or running:
        while waiting and len(running) < limit:
            lab = waiting.pop(0)
            shutil.rmtree(lab.folder, ignore_errors=True)
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


def run_checks(args, report: dict) -> None:
    """Run the groups of checks; after each, add its figures to `report` and write gpu.json."""
    start = time.monotonic()
    for group in [CHECKS] if args.tiny else GROUPS:
        left, labs = args.seconds - (time.monotonic() - start), []
        for name in [name for name in group if name in args.only]:
            seconds = left if args.tiny else min(group[name][1], left)
            places = dict(images=args.images, cifar10=args.cifar10, folder=args.out / name)
            lab = Lab(name, args.device, args.tiny, seconds=seconds, **places)
            missing = lab.missing_input() or ("no time left" if left < 10 else "")
            if missing:
                print(f"SKIP  {name}: {missing}")
            else:
                labs.append(lab)
        for name, rows in run_group(labs, limit=2 if args.tiny else len(labs)).items():
            report["figures"] = [row for row in report["figures"] if row["check"] != name] + rows
        (args.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")


def describe(row: dict) -> str:
    """Return the line of the table for a figure."""
    status = {True: "PASS", False: "FAIL", None: "    "}[row["ok"]]
    value = (
        f"{row['value']:.4g}"
        if isinstance(row["value"], float)
        else str(row["value"] if row["value"] is not None else "")
    )
    expected = f"   (expected {row['expected']})" if row["expected"] else ""
    return f"{status}  {row['check']}: {row['name']}: {value} {row['unit']}".rstrip() + expected


def speed_table(paths: list[Path]) -> str:
    """Return a Markdown table of the pre-training speeds in gpu.json files."""
    lines = [
        "| card | model | images/s | TFLOP/s | of the matrix rate | memory | 800 epochs of ImageNet |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        report = json.loads(path.read_text())
        for row in report["figures"]:
            if "tflops" in row:
                hours = IMAGENET_IMAGES / row["value"] / 3600
                lines.append(
                    f"| {report['machine']['card']} | {row['name']} | {row['value']:,.0f} | {row['tflops']:.0f} | "
                    f"{row['share']:.0%} | "
                    f"{row['gigabytes']:.1f} GB | {hours:,.0f} h |"
                )
    return "\n".join(lines)


def name_card(path: Path) -> None:
    """Write the name of the GPU; exit with code 1 if no tensor can be made on it."""
    if not torch.cuda.is_available() or torch.ones(1, device="cuda").item() != 1:
        sys.exit(1)
    path.write_text(torch.cuda.get_device_name())


def main() -> int:
    """Run the checks, and return the number of failures, at most 100."""
    args, started = parse_args(), time.monotonic()
    if args.table:
        print(speed_table(args.table))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    card, path = args.out / "card.txt", args.out / "gpu.json"
    card.write_text("CPU")
    if args.device == "cuda" and Child(name_card, card, log=args.out / "cuda.txt").wait() != 0:
        print("no CUDA device was found: all checks are skipped; --device cpu --tiny tests the checks themselves")
        print("\n".join(f"SKIP  {name}" for name in args.only))
        return 0
    packages = dict(torch=torch, torchvision=torchvision, transformers=transformers, timm=timm, accelerate=accelerate)
    versions = {name: package.__version__ for name, package in packages.items()}
    machine = dict(card=card.read_text(), python=platform.python_version(), cores=os.cpu_count(), versions=versions)
    report = json.loads(path.read_text()) if path.exists() else {"figures": []}
    report["machine"] = machine
    run_checks(args, report)
    print("\n" + "\n".join(map(describe, report["figures"])))
    failures = sum(row["ok"] is False for row in report["figures"])
    print(f"{machine['card']}: {failures} failures, {time.monotonic() - started:.0f} s; see {path}")
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
