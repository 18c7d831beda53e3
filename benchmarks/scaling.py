"""Compare the speed of pre-training with several processes and with one, and time a checkpoint.

    python benchmarks/scaling.py --model base --batch_size 16

`accelerate launch pretrain_mae.py` runs in turns with 1, 2, 4, ... and all GPUs, or with 1 and 2 processes on a CPU.
Each process has its own batch. "Ours" are several processes, "theirs" is one. N GPUs reach at most N times the
images/s. The processes on a CPU share the cores that a single one has to itself, so about 1 is expected there;
OMP_NUM_THREADS is ignored.

Images/s and the data wait come from the run's log, for --steps steps after as many warmup steps. The start is the time
from the command to the first line of the log. The time of a checkpoint ends when it is complete in the temporary folder
(TMPDIR).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

from benchmarks.compare import figure, new_parser, read_step_flags, report
from training.arguments import integer
from training.launch import RunError, fail, run_script
from training.wording import several

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "pretrain_mae.py"


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=3)
    flag = parser.add_argument
    help_text = "numbers of processes to compare with one (default 2 on a CPU; 2, 4, ... and all GPUs)"
    flag("--processes", type=integer(1), nargs="+", metavar="N", help=help_text)
    flag("--steps", type=integer(1), help="timed steps, after as many to warm up (default 5 on a CPU, 100 on a GPU)")
    args, errors = read_step_flags(parser, argv)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    args.steps = args.steps or (100 if gpus else 5)
    powers = [2**i for i in range(gpus.bit_length())]
    args.processes = sorted({1, *(args.processes or [*powers, gpus or 2])})
    return args, errors


def launch(folder: Path, flags: list, *, processes: int) -> subprocess.Popen:
    """Start `accelerate launch pretrain_mae.py` in `folder` and write its error messages to the file `errors` there."""
    on_cpu = not torch.cuda.is_available()
    names = ("cpu", "cpu_2_processes") if on_cpu else ("single_gpu", "multi_gpu")
    config = ROOT / "accelerate_configs" / f"{names[processes > 1]}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command += ["--num_processes", processes, SCRIPT, *flags]
    # If nobody chose the threads, the processes divide all cores among themselves
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    variables |= {"ACCELERATE_USE_CPU": "true"} if on_cpu else {}
    with (folder / "errors").open("w") as stream:
        options = dict(cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=stream)
        return subprocess.Popen(list(map(str, command)), **options)


def pretrain(flags: list, *, processes: int, batch_size: int, num_images: int, steps: int) -> dict[str, float]:
    """Launch pretrain_mae.py for twice `steps` steps.

    Returns:
        Images/s, the seconds of the start and of saving, the data wait (%) and the size of the checkpoint (MB).

    Raises:
        RunError: the run failed; the error has its messages.
    """
    flags = [*flags, "--path_to_data", "images.csv", "--per_gpu_batch_size", batch_size, "--validate_every", 0]
    flags += ["--max_steps", 2 * steps, "--log_every", steps, "--save_checkpoint_interval", 0]
    with tempfile.TemporaryDirectory() as place:
        folder, run = Path(place), Path(place, "work_dir", "pretrain_mae")
        log, checkpoint = run / "log.jsonl", run / "checkpoints" / f"step_{2 * steps:08d}"
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(folder / "image.jpg")
        (folder / "images.csv").write_text("path\n" + "image.jpg\n" * num_images)
        start = first_line = save_start = save_end = time.perf_counter()
        process = launch(folder, flags, processes=processes)
        while process.poll() is None:
            now = time.perf_counter()
            first_line = first_line if log.exists() and log.stat().st_size else now
            save_start = save_start if any(checkpoint.parent.glob("*")) else now
            save_end = save_end if checkpoint.exists() else now
            time.sleep(0.005)
        if process.returncode:
            raise RunError(f"pretrain_mae.py has failed: {(folder / 'errors').read_text().strip()}")
        line = [json.loads(text) for text in log.read_text().splitlines() if "images_per_second" in text][-1]
        return dict(
            speed=line["images_per_second"],
            start=first_line - start,
            data_wait=100 * line["data_wait"],
            save=save_end - save_start,
            checkpoint=sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e6,
        )


def measure(
    model: str, img_size: int, batch_size: int, precision: str, *, processes: list[int], steps: int, rounds: int
) -> Iterator[dict]:
    """Yield the figures of each number of processes against one process, and of a checkpoint.

    `processes` must contain 1.
    """
    flags = ["--model", model, "--img_size", img_size, "--mixed_precision", precision]
    setting = f"scale: {model}, {img_size} pixels, batch {batch_size}"
    sizes = dict(batch_size=batch_size, num_images=max(processes) * batch_size, steps=steps)
    runs = {count: [] for count in processes}
    for count in processes * rounds:
        runs[count].append(pretrain(flags, processes=count, **sizes))

    values = {count: {key: [run[key] for run in runs[count]] for key in runs[count][0]} for count in processes}
    one = values[1]
    for count, ours in values.items():
        title, theirs = f"{setting}, {several(count, 'process')}", one if count > 1 else dict.fromkeys(one)
        yield figure(title, ours["speed"], "images/s", theirs["speed"])
        yield figure(f"{title}: start", ours["start"], "s", theirs["start"], lower_is_better=True)
        yield figure(f"{title}: data wait", ours["data_wait"], "%")
    title = f"scale: checkpoint, {model}"
    yield figure(title, one["save"], "s")
    yield figure(f"{title}: size", one["checkpoint"], "MB")


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    print(f"{args.mixed_precision.replace('no', 'float32')}, {args.steps} steps after as many")
    settings = args.model, args.img_size, args.batch_size, args.mixed_precision
    report(measure(*settings, processes=args.processes, steps=args.steps, rounds=args.rounds), args.json)


if __name__ == "__main__":
    run_script(main)
