"""Time reading a folder of images against torchvision's usual pipeline.

    python benchmarks/data.py --path_to_data IMAGES

torchvision's pipeline opens images with PIL and does RandomResizedCrop (bicubic), flip, conversion to float and
normalization. Our data set reads uint8 batches with their masks from the files, without and with --fast_decoding, and
from copies that prepare_data.py writes with a short side of 256, as JPEG and as arrays; decoding alone is the limit.
Both sides read the same images on one thread: the first --num_images that both can read. Each form is then read with
--workers loader workers and compared with no workers.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import BatchSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository, before this folder: `data` is its package

from benchmarks.compare import figure, new_parser, rates, report, time_in_turns
from data.batches import PretrainingDataset, make_loader
from data.decode import DamagedImage, PixelFormat, decode
from data.files import FileSource, FolderSource
from data.index import DataError, first_few
from data.sources import Source, open_sources
from data.transforms import RandomCrop
from data.values import damage_errors
from training.arguments import integer
from training.launch import default_workers, fail, run_script
from training.wording import several

SHORT_SIDE = 256  # of the prepared images, in pixels


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=5)
    flag = parser.add_argument
    flag("--path_to_data", required=True, help="folder of images")
    flag("--img_size", type=integer(1), default=224, help="pixels (default 224)")
    flag("--num_images", type=integer(1), default=400, help="images to read, at most (default 400)")
    help_text = "numbers of loader workers to time (default that of the training scripts)"
    flag("--workers", type=integer(1), nargs="+", default=[default_workers()], metavar="N", help=help_text)
    return parser.read(argv)


def pretraining_data(source: Source, img_size: int, *, fast: bool = False) -> PretrainingDataset:
    """Return the data set of pretrain_mae.py for a ViT with patches of 16 pixels."""
    side = img_size // 16
    return PretrainingDataset(
        source,
        pixels=PixelFormat(3),
        crop=RandomCrop((img_size, img_size), fast=fast),
        grid=(side, side),
        num_kept=side * side // 4,
        mask_strategy="random",
        seed=0,
    )


def readable_images(source: FileSource, num_images: int) -> FileSource:
    """Return the first `num_images` that both sides can read, and print the others. Raises DataError without any."""
    names, damaged = [], []
    for name in map(source.name, range(len(source))):
        if len(names) == num_images:
            break
        try:
            decode(Path(name).read_bytes(), PixelFormat(3))
            with damage_errors():
                Image.open(name).convert("RGB")
            names.append(os.fsencode(os.path.abspath(name)))
        except (DamagedImage, OSError) as error:
            damaged.append(f"{name} ({error})")
    if not names:
        raise DataError(f"{source.root} has no image that both sides can read: {first_few(damaged, len(damaged))}")
    if damaged:
        what = f"{several(len(damaged), 'image')} that cannot be read"
        print(f"left out   {what}: {first_few(damaged, len(damaged))}")
    return FileSource(names)


def batches_of(count: int, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """Return `count` samples in batches, as lists of (epoch, index)."""
    return list(BatchSampler([(epoch, index) for index in range(count)], batch_size=32, drop_last=False))


def read_ours(dataset: PretrainingDataset, count: int) -> None:
    """Read `count` images with our data set."""
    for batch in batches_of(count):
        dataset.__getitems__(batch)


def read_theirs(source: FileSource, count: int, img_size: int) -> None:
    """Read `count` images with torchvision."""
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=bicubic)
    normalize = transforms.Normalize([0.5] * 3, [0.5] * 3)
    pipeline = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize])
    for batch in batches_of(count):
        torch.stack([pipeline(Image.open(source.name(index)).convert("RGB")) for _, index in batch])


def prepare(source: FileSource, count: int, folder: Path, form: str) -> Source:
    """Return the first `count` images as prepare_data.py writes them."""
    paths, output = folder / "images.jsonl", folder / form
    lines = [json.dumps({"path": os.path.abspath(source.name(index))}) + "\n" for index in range(count)]
    paths.write_text("".join(lines))
    command = [sys.executable, Path(__file__).parent.parent / "prepare_data.py", paths, output, "--format", form]
    subprocess.run([*command, "--short_side", str(SHORT_SIDE)], check=True, stdout=subprocess.DEVNULL)
    return open_sources(str(output), PixelFormat(3))[0]


def loader_rate(dataset: PretrainingDataset, count: int, num_workers: int) -> float:
    """Return images/s after the first batch, over at least 1,600 images per worker: prefetched ones count little."""
    epochs = range(math.ceil(1600 * max(1, num_workers) / count))
    batches = [batch for epoch in epochs for batch in batches_of(count, epoch)]
    loader = iter(make_loader(dataset, batches, num_workers=num_workers))
    next(loader)
    start = time.perf_counter()
    num_images = sum(len(batch.images) for batch in loader)
    return num_images / (time.perf_counter() - start)


def measure(
    source: FileSource, *, img_size: int, num_images: int, rounds: int, workers: Sequence[int]
) -> Iterator[dict]:
    """Yield the figures of reading on one thread, then those of loader workers."""
    count = min(num_images, len(source))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        datasets = {"file to batch": pretraining_data(source, img_size)}
        datasets["file to batch, --fast_decoding"] = pretraining_data(source, img_size, fast=True)
        for form, name in (("jpeg", "JPEG"), ("array", "arrays")):
            prepared = prepare(source, count, Path(folder), form)
            datasets[f"prepared, short side {SHORT_SIDE}, {name}"] = pretraining_data(prepared, img_size)
        works = {"decoding alone": lambda: [decode(*source.fetch([i]), PixelFormat(3)) for i in range(count)]}
        works |= {name: partial(read_ours, dataset, count) for name, dataset in datasets.items()}
        theirs = {"theirs": partial(read_theirs, source, count, img_size)}
        seconds = time_in_turns(works | theirs, rounds=rounds)
        for name in works:
            yield figure(f"data: {name}", rates(count, seconds[name]), "images/s", rates(count, seconds["theirs"]))

        for name, dataset in datasets.items():
            speeds = {num_workers: [] for num_workers in (0, *workers)}
            for _, num_workers in product(range(rounds), speeds):
                speeds[num_workers].append(loader_rate(dataset, count, num_workers))
            for number in workers:
                label = f"data: {name}, {several(number, 'worker')} (theirs: none)"
                yield figure(label, speeds[number], "images/s", speeds[0])


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    try:
        source = readable_images(FolderSource(args.path_to_data), args.num_images)
    except DataError as error:
        fail([str(error)])
    options = dict(img_size=args.img_size, num_images=args.num_images, rounds=args.rounds, workers=args.workers)
    report(measure(source, **options), args.json)


if __name__ == "__main__":
    run_script(main)
