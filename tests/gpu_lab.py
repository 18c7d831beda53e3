"""Helpers for the checks of gpu.py: processes, figures, short runs of the scripts and their logs."""

import contextlib
import json
import math
import os
import re
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from PIL import Image

ROOT = Path(__file__).parent.parent
GIGABYTE = 1e9
SCRIPTS = {"mae": "pretrain_mae", "classifier": "finetune_classifier", "segmenter": "finetune_segmentation"}
ALL_SCRIPTS = SCRIPTS | {"detector": "finetune_detection"}  # torchvision's heads wait for the device
ENCODER = ["--patch_size", "8", "--encoder_embed_dim", "128", "--encoder_depth", "4", "--encoder_num_heads", "4"]
TINY_ENCODER = ["--patch_size", "8", "--encoder_embed_dim", "32", "--encoder_depth", "4", "--encoder_num_heads", "2"]
DECODER = ["--decoder_embed_dim", "64", "--decoder_depth", "2", "--decoder_num_heads", "2"]


class Child:
    """A forked process that runs `work(*args)` with the libraries already imported; its output goes to `log`."""

    def __init__(self, work, *args, log: Path):
        self.log, self.code = log, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number, path in enumerate([os.devnull, log, log]):
                    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
                work(*args)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 600) -> int:
        """Wait for the end and return the exit code; kill the process and its descendants after `seconds`."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill_all()
            time.sleep(0.02)
        return self.code

    def kill_all(self) -> None:
        """Kill the process and its descendants."""
        process = psutil.Process(self.pid)
        for each in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a loader worker ends with its parent
                each.kill()


class Lab(NamedTuple):
    """The settings of a check, and methods to run processes and report figures."""

    name: str
    device: str
    tiny: bool
    images: Path | None
    cifar10: Path | None
    folder: Path
    seconds: float  # time limit

    def missing_input(self) -> str:
        """Return why the check cannot run, "" if it can."""
        needed = {"loader": "images", "learning": "cifar10"}.get(self.name)
        missing = needed and not self.tiny and getattr(self, needed) is None
        return f"--{needed} is not given" if missing else ""

    def figure(self, name: str, value, *, ok: bool | None, expected: str, unit: str = "", **more) -> dict:
        """Return a figure; `ok` is None for one that is only reported."""
        return dict(check=self.name, name=name, value=value, unit=unit, ok=ok, expected=expected, **more)

    def report(self, name: str, value, expected: str = "", ok: bool | None = None, unit: str = "", **more) -> None:
        """Write a figure at once, so that it survives the time limit."""
        value = None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no inf or NaN
        ok = ok if ok is None else bool(ok)
        with open(self.folder / "figures.jsonl", "a") as file:
            file.write(json.dumps(self.figure(name, value, ok=ok, expected=expected, unit=unit, **more)) + "\n")

    def figures(self) -> list[dict]:
        """Return the figures that the check has reported."""
        path = self.folder / "figures.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds_of(self, work: Callable[[], object], *, repeats: int, warmup: int = 3) -> float:
        """Return the mean seconds of a call; the device is synchronized before and after all `repeats` calls."""
        for _ in range(1 if self.tiny else warmup):
            work()
        repeats = 2 if self.tiny else repeats
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / repeats

    def at_once(self, starts: dict[str, Callable[[], "Child"]], limit: int = 8) -> dict[str, int]:
        """Start processes, at most `limit` at a time, and return their exit codes by name."""
        waiting, running, codes, limit = list(starts), {}, {}, 2 if self.tiny else limit
        while waiting or running:
            while waiting and len(running) < limit:
                name = waiting.pop(0)
                running[name] = starts[name]()
            codes |= {name: child.code for name, child in running.items() if child.poll() is not None}
            running = {name: child for name, child in running.items() if name not in codes}
            time.sleep(0.02)
        return codes

    def collect(self, works: dict[str, tuple], limit: int = 8) -> dict[str, object]:
        """Run each `name: (function, *args)` in its own process; return the results, None for a failed one."""
        paths = {name: self.folder / re.sub(r"\W+", "_", name) for name in works}
        codes = self.at_once(
            {
                name: partial(Child, write_result, paths[name].with_suffix(".json"), *work, log=paths[name])
                for name, work in works.items()
            },
            limit,
        )
        return {
            name: json.loads(paths[name].with_suffix(".json").read_text()) if code == 0 else None
            for name, code in codes.items()
        }

    def start(self, script: str, *flags, log: str, backend: str | None = None, **variables: str) -> Child:
        """Start a script in the folder of the check, with its output in the file `log` there."""
        variables = {"ACCELERATE_USE_CPU": "false" if self.on_gpu else "true", **variables}
        return Child(run_script, script, flags, self.folder, variables, backend, log=self.folder / log)

    def run(self, script: str, *flags, log: str, **variables: str) -> bool:
        """Run a script to its end; report a failure, and return whether it succeeded."""
        code = self.start(script, *flags, log=log, **variables).wait(self.seconds)
        if code:
            self.report(log, f"exit code {code}", "exit code 0", ok=False)
        return code == 0


def write_result(path: Path, function: Callable, *args) -> None:
    """Write the result of a function to a JSON file."""
    path.write_text(json.dumps(function(*args)))


def run_script(script: str, flags: tuple, cwd: Path, variables: dict[str, str], backend: str | None) -> None:
    """Run a script in this process as Python would, with a torch.distributed `backend`; None: Accelerate's choice."""
    os.chdir(cwd)
    os.environ.update(variables)
    if backend:
        PartialState._prepare_backend = lambda *_: (backend, DistributedType.MULTI_GPU)
    sys.argv = [f"{script}.py", *map(str, flags)]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def write_pictures(folder: Path) -> None:
    """Write 64 training and 16 validation pictures of rectangles, in classes/ and, with masks and boxes, in pairs/."""
    generator = np.random.default_rng(0)
    for split, name, count in (("train", "training", 64), ("val", "validation", 16)):
        objects = {"images": [], "annotations": [], "categories": [{"id": i, "name": str(i)} for i in range(4)]}
        for index in range(count):
            label = index % 4
            mask = np.ones((80, 96), np.uint8)
            top, left = generator.integers(0, 40, 2)
            mask[top : top + 40, left : left + 50] = label + 2
            picture = Image.fromarray(np.uint8(mask[..., None] * (40, 25, 10) + generator.integers(0, 30, (80, 96, 3))))
            places = {
                folder / "classes" / split / str(label): picture,
                folder / "pairs" / "images" / name: picture,
                folder / "pairs" / "annotations" / name: Image.fromarray(mask),
            }
            for place, image in places.items():
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{index:02d}.png")
            objects["images"].append({"id": index, "file_name": f"{index:02d}.png", "height": 80, "width": 96})
            x, y = int(left), int(top)
            annotation = {"image_id": index, "category_id": label, "bbox": [x, y, 50, 40]}
            annotation["segmentation"] = [[x, y, x + 50, y, x + 50, y + 40, x, y + 40]]
            objects["annotations"].append(annotation)
        (folder / "pairs" / "annotations" / f"instances_{name}.json").write_text(json.dumps(objects))
    (folder / "pairs" / "classes.txt").write_text("ground\none\ntwo\nthree\nfour\n")


def flags_of(lab: Lab, task: str, *, steps: int, weights: Path | None = None) -> list[str]:
    """Return the flags of a short run on the pictures; fine-tuning starts from `weights`, or from scratch."""
    flags = f"--max_steps {steps} --warmup_steps 2 --learning_rate 1e-3 --log_every 1 --num_workers 2".split()
    side = 32 if lab.tiny else 64
    flags += ["--path_to_data", str(lab.folder / ("pairs" if task in ("segmenter", "detector") else "classes"))]
    flags += {
        "mae": f"--img_size {side} --global_batch_size 32 --num_preview_images 2 --save_checkpoint_interval 0",
        "classifier": f"--img_size {side} --global_batch_size 32 --save_checkpoint_interval 0",
        "segmenter": f"--crop_size {side} --global_batch_size 8 --num_preview_images 2 --head_width 32",
        "detector": f"--img_size {side} --global_batch_size 8 --num_preview_images 2 --head_width 32 --num_regions 32",
    }[task].split()
    if weights:
        name = "--path_to_pretrained_mae_weights" if task == "classifier" else "--path_to_backbone_checkpoint"
        return [*flags, name, str(weights)]
    return flags + (TINY_ENCODER if lab.tiny else ENCODER) + (DECODER if task == "mae" else [])


def losses_of(run: Path) -> list[float]:
    """Return the training losses in a run's log, in order; [] if there is no log yet."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    logged = [json.loads(line) for line in lines if line.endswith("}")]
    return [line["loss"] for line in logged if "loss" in line]
