"""Fixtures for small and real data sets, and functions that run a script as a user does."""

import atexit
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub import Hub
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = CACHE.name  # for our indices and for caches of other libraries
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of the two pytest workers would compete
# Flags of a model and a run that take a second: 4 x 4 patches of 8 pixels
TINY = [
    *("--img_size", "32", "--patch_size", "8", "--learning_rate", "1e-3", "--per_gpu_batch_size", "8"),
    *("--encoder_embed_dim", "32", "--encoder_depth", "2", "--encoder_num_heads", "2"),
    *("--decoder_embed_dim", "32", "--decoder_depth", "1", "--decoder_num_heads", "2"),
    *("--num_workers", "0", "--mixed_precision", "no", "--log_every", "1", "--num_preview_images", "2"),
]
SCENES = ["sky", "tree", "road", "sea"]  # classes; the last one occurs nowhere


LONGEST = ("test_scripts", "test_gpu", "test_processes", "test_finetune", "test_sharding", "test_predict", "test_push")


def pytest_collection_modifyitems(items):
    """Run the slowest files first, so that no worker is left alone with one of them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))


def write_images(folder: Path, count: int, *, classes: int = 2, size: int = 40, seed: int = 0) -> Path:
    """Write smooth random JPEG images to CLASS/NAME.jpg in `folder`, and return the folder."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = folder / f"class_{i % classes}" / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def write_scenes(folder, count, split, *, seed):
    """Write image and mask pairs of different sizes: three classes in three noisy colours, and some void."""
    rng = np.random.default_rng(seed)
    colours = np.array([[0, 0, 0], [90, 160, 230], [40, 140, 50], [120, 110, 100]])
    for part in ("images", "annotations"):
        (folder / part / split).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        size = tuple(int(side) for side in rng.integers(36, 70, 2))
        mask = Image.fromarray(rng.integers(0, 4, (3, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
        noise = rng.integers(-20, 20, (size[1], size[0], 3))
        image = np.clip(colours[np.asarray(mask)] + noise, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / split / f"scene_{i:02d}.jpg", quality=95)
        mask.save(folder / "annotations" / split / f"scene_{i:02d}.png")


def write_pair(root: Path, split: str, name: str, mask: np.ndarray, **options) -> None:
    """Write a mask, and an image of the same size whose pixels are 20 times the labels."""
    stem, suffix = os.path.splitext(name)
    for folder, pixels, end in (("images", np.stack([mask * 20] * 3, -1), suffix), ("annotations", mask, ".png")):
        path = root / folder / split / (stem + end)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **(options if folder == "images" else {}))


@pytest.fixture
def pair_folder(tmp_path) -> Path:
    """Return a folder of 6 training and 3 validation pairs of 60 x 80 pixels, with 3 classes and void."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 3)):
        for i in range(count):
            coarse = rng.integers(0, 4, (3, 4), dtype=np.uint8)
            write_pair(tmp_path, split, f"{i}.png", np.kron(coarse, np.ones((20, 20), np.uint8)))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Return a folder of 40 training and 11 validation images in two classes."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", 40)
    write_images(root / "val", 11, seed=1)
    return root


@pytest.fixture(scope="session")
def every_source(image_folder, tmp_path_factory) -> dict[str, list]:
    """Write `image_folder` in every form that --path_to_data takes; return the flags for each form by name."""
    import datasets

    root = tmp_path_factory.mktemp("every_source")
    sources = {"folder": ["--path_to_data", image_folder]}
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class_0", "class_1"])}
    splits = {}
    for split in ("train", "val"):
        paths = sorted((image_folder / split).rglob("*.jpg"))
        with open(root / f"{split}.csv", "w") as table, open(root / f"{split}.jsonl", "w") as lines:
            table.write("path,label\n")
            for path in paths:
                table.write(f"{path},{path.parent.name}\n")
                lines.write(json.dumps({"path": str(path), "label": path.parent.name}) + "\n")
        for shard in range(2):
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
                for path in paths[shard * len(paths) // 2 : (shard + 1) * len(paths) // 2]:
                    key = f"{path.parent.name}_{path.stem}"
                    for suffix, content in (("jpg", path.read_bytes()), ("cls", path.parent.name.encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        rows = {"image": [str(path) for path in paths], "label": [path.parent.name for path in paths]}
        splits[split] = datasets.Dataset.from_dict(rows, datasets.Features(columns))
    datasets.DatasetDict(train=splits["train"], validation=splits["val"]).save_to_disk(root / "saved")
    for split, name in (("train", "train"), ("val", "validation")):
        splits[split].to_parquet(root / "parquet" / f"{name}-00000-of-00001.parquet")
    run("prepare_data.py", image_folder, root / "prepared", "--num_workers", 0, cwd=root)
    for name, train, validation in (
        ("csv", "train.csv", "val.csv"),
        ("jsonl", "train.jsonl", "val.jsonl"),
        ("tar", "train-{0000..0001}.tar", "val-*.tar"),
    ):
        sources[name] = ["--path_to_data", root / train, "--path_to_validation_data", root / validation]
    return sources | {name: ["--path_to_data", root / name] for name in ("saved", "parquet", "prepared")}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Return a folder of 10 training and 5 validation pairs; one of each split is entirely void."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 10, "training", seed=0)
    write_scenes(folder, 5, "validation", seed=1)
    for split in ("training", "validation"):
        path = folder / "annotations" / split / "scene_03.png"
        Image.new("L", Image.open(path).size).save(path)
    (folder / "classes.txt").write_text("\n".join(SCENES))
    return folder


@pytest.fixture(scope="session")
def real_images() -> Path:
    """Return the folder of real data sets that MAE_TEST_DATA names; skip the test if it is not set."""
    if "MAE_TEST_DATA" not in os.environ:
        pytest.skip("MAE_TEST_DATA is not set")
    return Path(os.environ["MAE_TEST_DATA"])


@pytest.fixture(scope="session")
def hub_server():
    """Start a Hugging Face Hub on this machine."""
    server = Hub()
    yield server
    server.close()


@pytest.fixture
def hub(hub_server) -> Hub:
    """Return the Hub on this machine, empty. `run(..., **hub.variables(tmp_path))` starts a process that uses it;
    `hub.enter(monkeypatch, tmp_path)` makes this process use it."""
    hub_server.clear()
    return hub_server


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a run on one CPU, without the shell's variables for Accelerate and wandb."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_"))}
    return {**kept, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **variables}


# A server that forks a process for each request, and answers with exit codes of processes that have ended
WARM = """
import atexit, gc, json, os, runpy, sys, tempfile

def leave():  # registered first, so it runs last: freeing the libraries takes longer than most of the runs
    sys.stdout.flush()
    os._exit(code)
atexit.register(leave)

sys.modules["wandb"] = None  # timm imports it, and the first process to end would remove the folder that wandb makes
import accelerate, evaluate, matplotlib.figure, multiprocessing.pool, numpy, psutil, simplejpeg, timm, torchmetrics
import torch.utils.tensorboard, transformers
del sys.modules["wandb"]
sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["XDG_CACHE_HOME"]  # compiles the repository once
gc.freeze()
code = 0
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        ended, status = os.waitpid(asked, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if ended else None
    elif (answer := os.fork()) == 0:
        break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
cwd, variables, sys.argv, streams = asked
os.chdir(cwd)
os.environ.clear()
os.environ.update(variables)
tempfile.tempdir = None  # TMPDIR is read again
for number, path in enumerate([os.devnull, *streams]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
sys.path[0] = os.path.dirname(sys.argv[0])
if "HF_ENDPOINT" in variables:  # the library has read it already
    import hub
    hub.heed(variables)
numpy.random.seed()  # a new Python has another seed each time
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except BaseException as end:
    code = end.code if isinstance(end, SystemExit) else 1
    code = code if isinstance(code, int) else int(code is not None)
    raise
"""


@functools.cache
def warm() -> subprocess.Popen:
    """Start a Python that has imported the libraries, once for all tests; importing takes longer than most runs."""
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    single = dict(JE_ARROW_MALLOC_CONF="background_thread:false")  # only a process of one thread forks safely
    options |= dict(env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", **single))
    python = subprocess.Popen([sys.executable, "-c", WARM], **options)
    atexit.register(python.communicate)  # closing its stdin ends it
    return python


def ask(question):
    warm().stdin.write(json.dumps(question) + "\n")
    return json.loads(warm().stdout.readline())


class Start:
    """A process that runs `FILE words` with the libraries already imported; methods as in subprocess.Popen."""

    def __init__(self, *words, cwd: Path, **variables: str):
        self.args, self.returncode = [str(word) for word in words], None
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        self.pid = ask([str(cwd), environment(**variables), self.args, [str(path) for path in self.streams]])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300) -> list[str]:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        with self.folder:
            return [path.read_text() for path in self.streams]


def start(script: str, *flags, cwd: Path, **variables: str) -> Start:
    """Start `SCRIPT flags` in the folder `cwd`."""
    return Start(ROOT / script, *flags, cwd=cwd, **variables)


def finish(process: Start | subprocess.Popen, code: int) -> subprocess.CompletedProcess:
    """Wait for a process and assert its exit code."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, code, out, err)


def run(script: str, *flags, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run `SCRIPT flags` in the folder `cwd` and assert its exit code."""
    return finish(start(script, *flags, cwd=cwd, **variables), code)


def start_several(count: int, script: str, *flags, cwd: Path, own: dict[int, list] | None = None) -> list[Start]:
    """Start `SCRIPT flags` as `count` processes, with the variables that `accelerate launch` sets. `own` maps ranks
    to further flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    return [
        start(script, *flags, *(own or {}).get(rank, []), cwd=cwd, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(count)
    ]


def finish_several(processes: list[Start], code: int = 0) -> list[subprocess.CompletedProcess]:
    """Wait for the processes of a run, and assert that all have this exit code."""
    ends = [(process, *process.communicate()) for process in processes]
    told = [f"exit {process.returncode}\n{out}\n{err}" for process, out, err in ends]
    assert all(process.returncode == code for process in processes), "\n".join(told)
    return [subprocess.CompletedProcess(process.args, code, out, err) for process, out, err in ends]


def run_several(count: int, script: str, *flags, cwd: Path, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Run `SCRIPT flags` as `count` processes, and return the result of the main process."""
    return finish_several(start_several(count, script, *flags, cwd=cwd, **options), code)[0]


run_two = functools.partial(run_several, 2)


def run_code(text: str, *words, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run the Python code `text`, which can import this project, in a new process, and assert its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code.py")
        path.write_text(text)
        return finish(Start(path, *words, cwd=cwd, **variables), code)


def dry_run(script: str, *flags, cwd: Path) -> str:
    """Run `SCRIPT flags --dry_run` and return its output. The clock is ten times as fast, because a dry run times
    steps for 13 seconds."""
    code = "import runpy, sys, time; clock = time.perf_counter; time.perf_counter = lambda: 10 * clock()\n"
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_code(code, ROOT / script, *flags, "--dry_run", cwd=cwd)
    return done.stdout + done.stderr


def run_cold(*words, cwd: Path, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """Run `python words` in the folder `cwd` in a new Python, without preloaded libraries; assert its exit code."""
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, *map(str, words)]
    variables = environment(PYTHONPATH=str(ROOT), **variables)
    return finish(subprocess.Popen(command, cwd=cwd, env=variables, **options), code)


def run_each(script: str, starts: list[list], *, cwd: Path, code: int = 0) -> list[str]:
    """Run `SCRIPT flags` for each list of flags in `starts`, one after the other, and assert the exit code of each.
    Return their outputs."""
    ends = [run(script, *flags, cwd=cwd, code=code) for flags in starts]
    return [end.stdout + end.stderr for end in ends]


def launch(*words, cwd: Path) -> subprocess.CompletedProcess:
    """Run `accelerate launch words` in the folder `cwd`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


TWO_PROCESSES = [
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]


def log_of(folder: Path) -> list[dict]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> dict[int, float]:
    """Return the logged training losses by step."""
    return {line["step"]: line["loss"] for line in log_of(folder) if "loss" in line}


def steps_in(folder: Path) -> int:
    """Return the number of steps in a run's log, which may be incomplete or missing."""
    path = folder / "log.jsonl"
    return path.read_text().count("grad_norm") if path.exists() else 0


def wait_for(steps: int, folder: Path, *processes: Start | subprocess.Popen) -> None:
    """Wait until the log of a run has `steps` steps; assert that its processes go on until then."""
    while steps_in(folder) < steps:
        assert all(process.poll() is None for process in processes), "ended before"
        time.sleep(0.005)


def metrics_of(folder: Path) -> dict:
    """Return the content of a run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


def flags_of(folder: Path) -> dict:
    """Return the flags in a run's args.json."""
    return json.loads((folder / "args.json").read_text())["flags"]


def weights_of(folder: Path, step: int, name: str = "model.safetensors") -> dict:
    """Return the weights in a checkpoint of a run."""
    return load_file(folder / "checkpoints" / f"step_{step:08d}" / name)


def validations_of(folder: Path) -> list[dict]:
    """Return the lines of a run's log that have the metrics of a validation."""
    return [line for line in log_of(folder) if {"val_loss", "mean_iou", "box_ap"} & line.keys()]


def assert_equal_runs(one: Path, other: Path, step: int, *names: str) -> None:
    """Assert that losses, validations and weights of two runs are equal, also the weights in the files `names`."""
    assert losses_of(one) == losses_of(other)
    assert validations_of(one) == validations_of(other) != []
    for name in ("model.safetensors", *names):
        ours, theirs = (weights_of(folder, step, name) for folder in (one, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def refusals(script: str, *starts: list, cwd: Path) -> list[list[str]]:
    """Return the error lines of each start; assert that it ends with exit code 2 before its first step."""
    ends = run_each(script, starts, cwd=cwd, code=2)
    assert not any("Traceback" in said for said in ends) and not list(cwd.glob("work_dir/*/checkpoints/step_*"))
    return [[line for line in said.splitlines() if line.startswith("error: ")] for said in ends]
