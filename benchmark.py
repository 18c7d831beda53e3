"""Measures what this machine reaches, against what a user would use instead, both in one run and in alternation.

    python benchmark.py data --path_to_data IMAGES

`data`: this loader against torchvision's usual PIL pipeline (open, RandomResizedCrop bicubic, flip, to float,
normalise) on a folder of real images, on one core, with the time of each stage. Quote ratios: they hold when a
machine's speed drifts. --json writes what was measured.
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from data.batches import PretrainingDataset
from data.decode import decode
from data.sources import DataError, FolderSource
from data.transforms import pretraining
from training.arguments import Parser, fail, integer, one_of


def parse_args(argv=None):
    """The flags, and what is wrong with them."""
    parser = Parser(__doc__)
    parser.add_argument("what", type=one_of("data"), help="data")
    parser.add_argument("--path_to_data", help="folder of images (required)")
    parser.add_argument("--img_size", type=integer(1), default=224, help="pixels (default 224)")
    parser.add_argument("--num_images", type=integer(1), default=400, help="images at most (default 400)")
    parser.add_argument("--rounds", type=integer(1), default=5, help="rounds, both sides in each (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write a list of what was measured")
    args, errors = parser.read(argv)
    if args.path_to_data is None:
        errors.append("--path_to_data is missing; give a folder of images")
    return args, errors


def seconds_of(work) -> float:
    """The time that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(ours, theirs, *, rounds: int) -> tuple[float, float, float]:
    """Median seconds of both after one round to warm up, and the median over rounds of theirs / ours."""
    ours(), theirs()
    pairs = [(seconds_of(ours), seconds_of(theirs)) for _ in range(rounds)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return *medians, statistics.median(b / a for a, b in pairs)


def pin_to_one_core() -> None:
    """Keeps this process on one core, where the system can."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def benchmark_data(source: FolderSource, *, img_size: int, num_images: int, rounds: int) -> list[dict]:
    """Images/s from files to a batch: ours as uint8 with its masks, torchvision's as normalised floats."""
    from PIL import Image
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    pin_to_one_core()
    count = min(num_images, len(source))
    side = img_size // 16
    dataset = PretrainingDataset(
        source,
        img_size=(img_size, img_size),
        channels=3,
        grid=(side, side),
        num_kept=side * side // 4,
        mask_strategy="random",
        seed=0,
        train=True,
    )
    indices = range(count)
    usual = transforms.Compose(
        [
            transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    def batches():
        return [indices[start : start + 32] for start in range(0, count, 32)]

    def ours():
        for batch in batches():
            dataset.__getitems__([(0, index) for index in batch])

    def theirs():
        for batch in batches():
            torch.stack([usual(Image.open(source.name(index)).convert("RGB")) for index in batch])

    our_seconds, their_seconds, ratio = alternate(ours, theirs, rounds=rounds)
    rows = [row("data: file to batch", count / our_seconds, count / their_seconds, "images/s", ratio)]

    # Stages, each over all images; what is left of the whole are masks, flips' copies and the batch buffer
    encoded = source.fetch(list(indices))
    decoded = [decode(data, 3) for data in encoded]
    rng = np.random.default_rng(0)
    stages = {
        "read": lambda: source.fetch(list(indices)),
        "decode": lambda: [decode(data, 3) for data in encoded],
        "crop and resize": lambda: [pretraining(image, rng, (img_size, img_size)) for image in decoded],
    }
    spent = 0.0
    for name, work in stages.items():
        taken = statistics.median(seconds_of(work) for _ in range(rounds))
        spent += taken
        rows.append(row(f"data: {name}", 1000 * taken / count, None, "ms/image", None))
    rows.append(row("data: collate", max(0.0, 1000 * (our_seconds - spent) / count), None, "ms/image", None))
    return rows


def row(name, ours, theirs, unit, ratio) -> dict:
    """An entry of the JSON list; a ratio above 1 is better for us."""
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio, "machine": machine()}


def machine() -> str:
    """What this was measured on, in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{', '.join(gpus) or 'no GPU'}; {os.cpu_count()} cores of {cpu}; torch {torch.__version__}"


def main(argv=None):
    """Runs the script; see the module's docstring."""
    args, errors = parse_args(argv)
    source = None
    try:
        if args.path_to_data:
            source = FolderSource(args.path_to_data)
    except DataError as error:
        errors.append(str(error))
    if errors:
        fail(errors)
    rows = benchmark_data(source, img_size=args.img_size, num_images=args.num_images, rounds=args.rounds)
    print(machine())
    for entry in rows:
        text = f"{entry['name']:24} {entry['ours']:9.2f}"
        if entry["ratio"] is not None:
            text += f" against {entry['theirs']:.2f}, ratio {entry['ratio']:.2f}"
        print(f"{text} {entry['unit']}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
