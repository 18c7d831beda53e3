"""What several tests share: a folder of small images, real images, and running a script as its user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
# A model and a run that take a second: 4 x 4 patches of 8 pixels
TINY = [
    *("--img_size", "32", "--patch_size", "8", "--learning_rate", "1e-3", "--per_gpu_batch_size", "8"),
    *("--encoder_embed_dim", "32", "--encoder_depth", "2", "--encoder_num_heads", "2"),
    *("--decoder_embed_dim", "32", "--decoder_depth", "1", "--decoder_num_heads", "2"),
    *("--num_workers", "0", "--mixed_precision", "no", "--log_every", "1", "--num_preview_images", "2"),
]


def write_images(folder: Path, count: int, *, classes: int = 2, size: int = 40, seed: int = 0) -> Path:
    """Writes smooth random JPEG images into CLASS/NAME.jpg below `folder`."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"class_{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 training and 11 validation images, in two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 40)
    write_images(root / "val", 11, seed=1)
    return root


@pytest.fixture(scope="session")
def real_images() -> Path:
    """The folder of real data sets that MAE_TEST_DATA names."""
    if "MAE_TEST_DATA" not in os.environ:
        pytest.skip("MAE_TEST_DATA is not set")
    return Path(os.environ["MAE_TEST_DATA"])


def environment(**variables: str) -> dict[str, str]:
    """The environment of a run on one CPU, without what the caller's shell may have set for Accelerate."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return {**kept, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **variables}


def start(script: str, *flags, cwd: Path, **variables: str) -> subprocess.Popen:
    """Starts `python SCRIPT flags` in the folder `cwd`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: str, *flags, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Runs `python SCRIPT flags` in the folder `cwd` and expects its exit code."""
    process = start(script, *flags, cwd=cwd, **variables)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, code, out, err)


def run_each(script: str, starts: list[list], *, cwd: Path, code: int = 0) -> list[str]:
    """Runs `SCRIPT flags` for each list of flags in `starts`, one after the other in one process, as importing takes
    longer than such runs; expects the same exit code of all. Returns what each of them said."""
    program = f"""
import contextlib, io, json, sys
import {script.removesuffix(".py")} as script
from accelerate.state import AcceleratorState
for flags in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=True)
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            script.main(flags)
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, said.getvalue()]))
"""
    words = json.dumps([[str(flag) for flag in flags] for flags in starts])
    command = [sys.executable, "-c", program, words]
    options = dict(cwd=cwd, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=300)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [end for end, _ in ends] == [code] * len(starts), ends
    return [said for _, said in ends]


def launch(*words, cwd: Path) -> subprocess.CompletedProcess:
    """Runs `accelerate launch words` in the folder `cwd`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


TWO_PROCESSES = [
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


def log_of(folder: Path) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    """Every logged training loss by step."""
    return {line["step"]: line["loss"] for line in log_of(folder) if "loss" in line}
