"""Measures what this machine reaches, against what a user would use instead, both in one run and in alternation.

    python benchmark.py data --path_to_data IMAGES
    python benchmark.py train --task mae --model base
    python benchmark.py cost --model base
    python benchmark.py scale --model base --batch_size 16
    python benchmark.py evaluate

`data`: this loader against torchvision's usual PIL pipeline (open, RandomResizedCrop bicubic, flip, to float,
normalise) on a folder of real images, on one core: from the files as they are, exactly and with --fast_decoding, and
from what prepare_data.py makes of them at a short side of 256, as JPEG and as arrays; how near the crops are to
Pillow's (PSNR, of all together and of the least); the time of each stage; and on all cores one and two workers against
none.

`train`: a training step (forward, backward, clipping, fused AdamW) on random images, of the masked autoencoder against
transformers' ViTMAEForPreTraining with its fast attention (sdpa), or against timm's ViT of the encoder on whole images
or of a classifier of 1000 classes.
Both have the same weights, inputs, precision and optimizer; unless both compute the same loss and the same gradient
norm, nothing is timed. On a GPU also TFLOP/s, as a share of what a large bf16 matrix product reaches in the same run,
and peak memory. --compile adds both sides compiled, and ours compiled against the better of theirs.

`cost`: what a pre-training step takes as images and batches grow, in images/s and peak memory, each setting in a
process of its own (`ours` is null where memory does not suffice); and the seconds from `accelerate launch
pretrain_mae.py` to the first line of its log.

`scale`: `accelerate launch pretrain_mae.py` itself as one process against several, each with a batch of its own, in
turns: 1, 2, 4, ... and all GPUs, or 1 and 2 processes on a CPU. Images/s, the time of a step and the data wait are what
its log tells of --steps steps, after as many to warm up; the start is the seconds from the command to the log's first
line. Ours is so many processes, theirs one. N GPUs reach N times the images/s at most. The processes of a CPU divide
its cores, all of which the one process has: about 1 is to be expected there. And what a checkpoint costs, until it is
on the disk of the temporary folder (TMPDIR): seconds, bytes, and how many steps of one process take that long.

`evaluate`: mean IoU of predicted masks, from one row of areas an image, against the published `mean_iou` metric, which
keeps all masks: written from its definition, as it has to be fetched. Both give the same figure, or nothing is
reported. Time is that of scoring alone; memory is the peak of a process, with the interpreter and all imports (which
both sides have alike).

Quote ratios: they hold when a machine's speed drifts. --json writes what was measured.
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from torch import nn

from data.batches import PretrainingDataset, least_sides, make_loader
from data.decode import PixelFormat, decode
from data.files import FileSource, FolderSource
from data.index import DataError
from data.sources import Source, open_sources
from data.transforms import pretraining, random_crop_box, resized_crop
from modeling.classifier import Classifier
from modeling.export import export_autoencoder
from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer, block_multiply_adds, embedding_multiply_adds
from training.arguments import Parser, integer, one_of
from training.launch import RunError, fail, run_script
from training.metrics import segmentation_areas
from training.optimizer import adamw, set_learning_rate

ROOT = Path(__file__).parent
PEERS = {"mae": "transformers", "encoder": "timm", "classifier": "timm"}
NUM_CLASSES = 1000
STEP = dict(model="base", img_size=224, batch_size=16, mixed_precision=None, rounds=5)
DEFAULTS = {  # the flags that each takes, beside --json
    "data": dict(path_to_data=None, img_size=224, num_images=400, rounds=5),
    "train": STEP | dict(task="mae", compile=False, gradient_checkpointing=False),
    "cost": STEP | dict(img_sizes=[64, 128, 224, 448], batch_sizes=[1, 4, 16, 64]),
    "scale": STEP | dict(rounds=3, steps=None, processes=None),
    "evaluate": dict(size=512, classes=150, num_images=400, rounds=3),
}


def parse_args(argv=None):
    """The flags, those of another measurement left at None, and what is wrong with them."""
    parser = Parser(__doc__)
    parser.add_argument("what", type=one_of(*DEFAULTS), help=", ".join(DEFAULTS))
    flag = parser.add_argument_group("all").add_argument
    flag("--rounds", type=integer(1), help="rounds, both sides in each (default 5; scale and evaluate: 3)")
    flag("--json", metavar="FILE", help="write a list of what was measured")
    flag = parser.add_argument_group("data, train, cost and scale").add_argument
    flag("--img_size", type=integer(1), help="pixels (default 224); cost: of the batches")
    flag = parser.add_argument_group("data").add_argument
    flag("--path_to_data", help="folder of images (required)")
    flag = parser.add_argument_group("data and evaluate").add_argument
    flag("--num_images", type=integer(1), help="images (default 400); data: at most")
    flag = parser.add_argument_group("train, cost and scale").add_argument
    flag("--model", type=one_of(*SIZES), help=f"{', '.join(SIZES)} (default base)")
    sizes = "cost: of the image sizes; scale: of each process"
    flag("--batch_size", type=integer(1), help=f"images per step (default 16); {sizes}")
    flag("--mixed_precision", type=one_of("no", "bf16"), help="no or bf16 (default bf16 on a GPU, no on a CPU)")
    flag = parser.add_argument_group("train").add_argument
    flag("--task", type=one_of(*PEERS), help="mae (default), encoder or classifier")
    flag("--compile", action="store_true", default=None, help="also both sides compiled")
    flag("--gradient_checkpointing", action="store_true", default=None, help="both sides")
    flag = parser.add_argument_group("cost").add_argument
    flag("--img_sizes", type=integer(1), nargs="+", metavar="N", help="pixels (default 64 128 224 448)")
    flag("--batch_sizes", type=integer(1), nargs="+", metavar="N", help="images per step (default 1 4 16 64)")
    flag = parser.add_argument_group("scale").add_argument
    counts = "beside one (default: 2 on a CPU; 2, 4, ... and all GPUs)"
    flag("--processes", type=integer(1), nargs="+", metavar="N", help=f"how many, each in turn, {counts}")
    flag("--steps", type=integer(1), help="timed steps, after as many to warm up (default 5 on a CPU, 100 on a GPU)")
    flag = parser.add_argument_group("evaluate").add_argument
    flag("--size", type=integer(2), help="pixels, height and width of a mask (default 512)")
    flag("--classes", type=integer(2, 254), help="classes (default 150)")
    args, errors = parser.read(argv)
    if args.what is not None:
        errors += fill_defaults(args)
    return args, errors


def fill_defaults(args) -> list[str]:
    """Gives the flags of `args.what` their defaults; what is wrong with the flags, a line each."""
    errors, defaults = [], DEFAULTS[args.what]
    for name in dict.fromkeys(name for flags in DEFAULTS.values() for name in flags):
        if name in defaults:
            if getattr(args, name) is None:
                setattr(args, name, defaults[name])
        elif getattr(args, name) is not None:
            others = " and ".join(what for what, flags in DEFAULTS.items() if name in flags)
            errors.append(f"--{name} is no flag of {args.what}, but of {others}; leave it out")
    if args.what == "data" and args.path_to_data is None:
        errors.append("--path_to_data is missing; give a folder of images")
    if args.what in ("data", "evaluate"):
        return errors
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    args.mixed_precision = args.mixed_precision or ("bf16" if gpus else "no")
    if args.what == "scale":
        args.steps = args.steps or (100 if gpus else 5)
        powers = [2**i for i in range(gpus.bit_length())]
        args.processes = sorted({1, *(args.processes or [*powers, gpus or 2])})
        if gpus and max(args.processes) > gpus:
            errors.append(f"--processes {max(args.processes)} is more than this machine has GPUs; take at most {gpus}")
    patch_size = SIZES[args.model]["patch_size"]
    if args.what == "cost" and args.img_sizes is defaults["img_sizes"]:
        args.img_sizes = [size // 16 * patch_size for size in args.img_sizes]  # as many patches in every model
    for name in ("img_size", "img_sizes"):
        value = getattr(args, name)
        for size in value if isinstance(value, list) else [value] if value else []:
            if size % patch_size or size < 2 * patch_size:
                errors.append(
                    f"--{name} {size} does not suit the patches of {patch_size} pixels of {args.model}; "
                    f"take a multiple of {patch_size}, at least {2 * patch_size}"
                )
    return errors


def seconds_of(work) -> float:
    """The time that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def alternate(works: dict[str, Callable], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each work in each round, all works in every round, after rounds to warm up."""
    times = {name: [] for name in works}
    for _ in range(warmup + rounds):
        for name, work in works.items():
            times[name].append(seconds_of(work))
    return {name: values[warmup:] for name, values in times.items()}


def rate_row(name: str, count: int, ours: list[float], theirs: list[float]) -> dict:
    """Images/s of two sides from the seconds that `count` images took in each round: medians, and the median ratio."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return row(name, count / statistics.median(ours), count / statistics.median(theirs), "images/s", ratio)


def row(name, ours, theirs, unit, ratio) -> dict:
    """An entry of the JSON list; a ratio above 1 is better for us."""
    return {"name": name, "ours": ours, "theirs": theirs, "unit": unit, "ratio": ratio, "machine": machine()}


def pin_to_one_core() -> None:
    """Keeps this process on one core, where the system can."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


SHORT_SIDE = 256  # of prepared images
BATCH = 32


def pretraining_data(source: Source, img_size: int, *, fast: bool = False) -> PretrainingDataset:
    """What pretrain_mae.py reads for a ViT with patches of 16 pixels."""
    side = img_size // 16
    return PretrainingDataset(
        source,
        img_size=(img_size, img_size),
        pixels=PixelFormat(3),
        grid=(side, side),
        num_kept=side * side // 4,
        mask_strategy="random",
        seed=0,
        train=True,
        fast=fast,
    )


def batches_of(count: int, epoch: int = 0) -> list[list[tuple[int, int]]]:
    """All samples once, as lists of (epoch, index)."""
    return [[(epoch, i) for i in range(start, min(start + BATCH, count))] for start in range(0, count, BATCH)]


def usual_pipeline(source: FileSource, img_size: int) -> Callable[[int], torch.Tensor]:
    """torchvision's: an image's number -> normalised floats (3, H, W)."""
    from PIL import Image
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [
        transforms.RandomResizedCrop(img_size, scale=(0.2, 1.0), interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    usual = transforms.Compose(steps)
    return lambda index: usual(Image.open(source.name(index)).convert("RGB"))


def prepare(source: FileSource, count: int, folder: Path, form: str) -> Source:
    """The first `count` images as prepare_data.py writes them."""
    listed, out = folder / "images.csv", folder / form
    names = [os.path.abspath(source.name(index)) for index in range(count)]
    with listed.open("w", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in names)])
    command = [sys.executable, ROOT / "prepare_data.py", listed, out, "--format", form, "--short_side", SHORT_SIDE]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"prepare_data.py failed: {done.stderr.strip()}")
    return open_sources(str(out), PixelFormat(3))[0]


def similarity(source: FileSource, count: int, img_size: int, *, fast: bool) -> list[float]:
    """PSNR in dB of the crop of each JPEG against Pillow's: decoded, cropped, and resized by its bicubic filter."""
    from PIL import Image

    values, min_sides = [], least_sides((img_size, img_size), 0.2) if fast else None
    for index in range(count):
        (data,) = source.fetch([index])
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "JPEG" or image.mode not in ("RGB", "L") or 0x0112 in image.getexif():
                continue
            whole = image.convert("RGB")
        ours = decode(data, 3, min_sides=min_sides)
        box = random_crop_box(np.random.default_rng(index), *ours.shape[1:])
        ours = resized_crop(ours, box, (img_size, img_size)).permute(1, 2, 0).numpy().astype(float)
        factor = 2 ** round(math.log2(whole.height / decode(data, 3, min_sides=min_sides).shape[1]))
        top, left, height, width = (side * factor for side in box)
        theirs = whole.crop((left, top, left + width, top + height)).resize((img_size, img_size), Image.BICUBIC)
        error = np.mean((ours - np.asarray(theirs)) ** 2)
        values.append(10 * math.log10(255**2 / max(error, 1e-3)))
    return values


def loader_seconds(data: PretrainingDataset, count: int, workers: int) -> float:
    """Seconds for `count` images, from the arrival of the first batch, in 8 epochs or at least 1,600 images."""
    epochs = max(8, math.ceil(1600 / count))
    batches = [batch for epoch in range(epochs) for batch in batches_of(count, epoch)]
    batches = iter(make_loader(data, batches, num_workers=workers))
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return (time.perf_counter() - start) / (epochs * count - BATCH) * count


def benchmark_data(source: FileSource, *, img_size: int, num_images: int, rounds: int) -> Iterator[dict]:
    """Images/s from files to a batch: ours as uint8 with its masks, torchvision's as normalised floats."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    count = min(num_images, len(source))
    usual = usual_pipeline(source, img_size)
    with tempfile.TemporaryDirectory() as folder:
        prepared = {form: prepare(source, count, Path(folder), form) for form in ("jpeg", "array")}
        pin_to_one_core()
        data = {
            "file to batch": pretraining_data(source, img_size),
            "file to batch, --fast_decoding": pretraining_data(source, img_size, fast=True),
            f"prepared, short side {SHORT_SIDE}, JPEG": pretraining_data(prepared["jpeg"], img_size),
            f"prepared, short side {SHORT_SIDE}, arrays": pretraining_data(prepared["array"], img_size),
        }

        def ours(dataset):
            for batch in batches_of(len(dataset)):
                dataset.__getitems__(batch)

        def theirs():
            for batch in batches_of(count):
                torch.stack([usual(index) for _, index in batch])

        works = {name: partial(ours, dataset) for name, dataset in data.items()}
        times = alternate(works | {"theirs": theirs}, rounds=rounds)
        for name in data:
            yield rate_row(f"data: {name}", count, times[name], times["theirs"])
        for name, fast in (("exact", False), ("--fast_decoding", True)):
            values = similarity(source, count, img_size, fast=fast)
            pooled = -10 * math.log10(statistics.mean(10 ** (-value / 10) for value in values))
            yield row(f"data: PSNR to Pillow, {name}, all crops", pooled, None, "dB", None)
            yield row(f"data: PSNR to Pillow, {name}, least", min(values), None, "dB", None)

        # Stages, each over all images; what is left of the whole are masks, flips and the batch buffer
        encoded = source.fetch(range(count))
        decoded = [decode(each, 3) for each in encoded]
        rng = np.random.default_rng(0)
        stages = {
            "read": lambda: source.fetch(range(count)),
            "decode": lambda: [decode(each, 3) for each in encoded],
            "crop and resize": lambda: [pretraining(image, rng, (img_size, img_size)) for image in decoded],
        }
        spent = 0.0
        for name, work in stages.items():
            taken = statistics.median(seconds_of(work) for _ in range(rounds))
            spent += taken
            yield row(f"data: {name}", 1000 * taken / count, None, "ms/image", None)
            if name == "decode":
                limit = row("data: the limit, decoding alone", count / taken, None, "images/s", None)
        collate = 1000 * (statistics.median(times["file to batch"]) - spent) / count
        yield row("data: collate", max(0.0, collate), None, "ms/image", None)
        yield limit

        if cores:
            os.sched_setaffinity(0, cores)
        seconds = {workers: [] for workers in (0, 1, 2)}
        for _ in range(rounds):
            for workers, found in seconds.items():
                found.append(loader_seconds(data["file to batch"], count, workers))
        yield row("data: no worker", count / statistics.median(seconds[0]), None, "images/s", None)
        yield rate_row("data: 1 worker (theirs: none)", count, seconds[1], seconds[0])
        yield rate_row("data: 2 workers (theirs: 1)", count, seconds[2], seconds[1])


class Setting(NamedTuple):
    """What a training step is measured with."""

    model: str  # a name in SIZES
    img_size: int
    batch_size: int
    precision: str
    rounds: int


class Side(NamedTuple):
    """One of the two that are compared, eager or compiled."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of images (B, C, H, W) and noise (B, L)


def new_model(
    task: str, setting: Setting, *, gradient_checkpointing: bool
) -> MaskedAutoencoder | Classifier | VisionTransformer:
    """The masked autoencoder of a size, with the default decoder, a classifier, or the encoder alone."""
    torch.manual_seed(0)
    size = SIZES[setting.model] | dict(img_size=setting.img_size)
    encoder = VisionTransformer(**size, gradient_checkpointing=gradient_checkpointing)
    if task == "mae":
        return MaskedAutoencoder(encoder)
    if task == "encoder":
        return encoder
    model = Classifier(encoder, NUM_CLASSES)
    nn.init.normal_(model.head.weight, std=0.02)  # as at its start, a small one, gradients below it would be rounding
    return model


def transformers_peer(model: MaskedAutoencoder, *, gradient_checkpointing: bool) -> nn.Module:
    """transformers' model with the sizes and weights of `model`, and its positions fixed as in its own pre-training."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export_autoencoder(model, folder, mean=[0.5] * 3, std=[0.5] * 3)
        options = dict(attn_implementation="sdpa", output_loading_info=True)
        peer, info = transformers.ViTMAEForPreTraining.from_pretrained(folder, **options)
    if any(info.values()):
        raise RunError(f"transformers does not load every weight: {info}; expected a release that requirements.txt has")
    peer.vit.embeddings.position_embeddings.requires_grad_(False)  # which from_pretrained of 5.23 undoes
    peer.decoder.decoder_pos_embed.requires_grad_(False)
    if gradient_checkpointing:
        peer.gradient_checkpointing_enable({"use_reentrant": False})
    return peer.train()


def timm_peer(model: VisionTransformer | Classifier, *, gradient_checkpointing: bool) -> nn.Module:
    """timm's model with the sizes and weights of `model`, and its positions fixed or trained as they are here."""
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    encoder = getattr(model, "encoder", model)
    sizes = {key: getattr(encoder, key) for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    if encoder is model:
        peer = TimmVisionTransformer(**sizes, num_classes=0)
    else:
        peer = TimmVisionTransformer(**sizes, num_classes=NUM_CLASSES, global_pool="avg")
    state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
    peer.load_state_dict(state, strict=True)
    peer.pos_embed.requires_grad_(encoder.pos_embed.requires_grad)
    peer.set_grad_checkpointing(gradient_checkpointing)
    return peer.train()


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The scripts' AdamW over all parameters that train, in one group."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw([{"params": trained, "weight_decay": 0.05}], betas=(0.9, 0.95))
    set_learning_rate(optimizer, 1e-4)
    return optimizer


def loss_function(task: str, model: nn.Module, *, compiled: bool, fullgraph: bool) -> Callable:
    """The loss of (images, noise): the autoencoder's own, the mean square of the encoder's features, or the
    classifier's cross-entropy, the classes being those of the largest noise."""
    forward = model.forward_features if task == "encoder" else model.forward
    if compiled:
        forward = torch.compile(forward, fullgraph=fullgraph, dynamic=False)
    if task == "mae":  # what pretrain_mae.py asks for, which only our model knows
        options = dict(removed_only=True) if isinstance(model, MaskedAutoencoder) else {}
        return lambda images, noise: forward(images, noise=noise, **options).loss
    if task == "classifier":
        cross_entropy = nn.functional.cross_entropy
        return lambda images, noise: cross_entropy(forward(images).float(), noise.argmax(dim=1) % NUM_CLASSES)
    return lambda images, noise: forward(images).float().square().mean()


def random_inputs(setting: Setting, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and the noise (B, L) of their masks."""
    num_patches = (setting.img_size // SIZES[setting.model]["patch_size"]) ** 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(setting.batch_size, 3, setting.img_size, setting.img_size, generator=generator)
    noise = torch.rand(setting.batch_size, num_patches, generator=generator)
    return images.to(device), noise.to(device)


def forward_and_backward(side: Side, inputs: tuple, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the norm of its gradients, which are clipped as pretrain_mae.py does by default."""
    with torch.autocast(inputs[0].device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = side.loss(*inputs)
    loss.backward()
    return loss.detach(), nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)


def step(side: Side, inputs: tuple, precision: str) -> None:
    """A training step, until the device has done it."""
    forward_and_backward(side, inputs, precision)
    side.optimizer.step()
    side.optimizer.zero_grad()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()


def require_equal_work(sides: dict[tuple[str, str], Side], inputs: tuple, precision: str) -> None:
    """Raises RunError unless all sides compute the same loss and gradient norm: other work is not worth timing."""
    tolerance = 1e-2 if precision == "bf16" else 1e-4
    results = {}
    for name, side in sides.items():
        results[name] = torch.stack(forward_and_backward(side, inputs, precision)).tolist()
        side.optimizer.zero_grad()
    expected = next(iter(results.values()))
    for result in results.values():
        if any(abs(a - b) > tolerance * abs(b) for a, b in zip(result, expected, strict=True)):
            listed = "; ".join(f"{' '.join(n)}: {loss:.6f}, {norm:.6f}" for n, (loss, norm) in results.items())
            raise RunError(
                f"the two sides do not compute the same loss and gradient norm ({listed}); expected a relative "
                f"difference of at most {tolerance:g}; compare releases of the libraries with requirements.txt"
            )


def benchmark_train(task: str, setting: Setting, *, compiled: bool, gradient_checkpointing: bool) -> Iterator[dict]:
    """Images/s of a training step, eager and where asked compiled; on a GPU also what it makes of the device."""
    device, precision = find_device(), setting.precision
    ours = new_model(task, setting, gradient_checkpointing=gradient_checkpointing)
    new_peer = transformers_peer if task == "mae" else timm_peer
    modules = {"ours": ours, "theirs": new_peer(ours, gradient_checkpointing=gradient_checkpointing)}
    optimizers = {name: new_optimizer(module.to(device)) for name, module in modules.items()}
    inputs = random_inputs(setting, device)
    modes = ["eager", "compiled"] if compiled else ["eager"]
    sides = {}
    for mode in modes:
        for name, module in modules.items():
            loss = loss_function(task, module, compiled=mode == "compiled", fullgraph=name == "ours")
            sides[name, mode] = Side(module, optimizers[name], loss)
    require_equal_work(sides, inputs, precision)

    works = {key: partial(step, side, inputs, precision) for key, side in sides.items()}
    times = alternate(works, rounds=setting.rounds, warmup=2)
    name = f"train: {task} {setting.model}"
    for mode in modes:
        rates = rate_row(f"{name} {mode}", setting.batch_size, times["ours", mode], times["theirs", mode])
        yield rates
        if device.type == "cuda":
            flops = encoder_flops(ours) if task == "encoder" else ours.training_flops()
            reached, reachable = flops * rates["ours"] / 1e12, matmul_rate()
            yield row(f"{name} {mode}: rate", reached, None, "TFLOP/s", None)
            yield row(f"{name} {mode}: share of a bf16 product", 100 * reached / reachable, None, "%", None)
            mine, other = sides["ours", mode], sides["theirs", mode]
            memory = peak_memory(mine, other, inputs, precision), peak_memory(other, mine, inputs, precision)
            yield row(f"{name} {mode}: peak memory", *memory, "GB", memory[1] / memory[0])
    if compiled:
        best = min(modes, key=lambda mode: statistics.median(times["theirs", mode]))
        title = f"{name} compiled, theirs {best} (their best)"
        yield rate_row(title, setting.batch_size, times["ours", "compiled"], times["theirs", best])


def find_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def encoder_flops(encoder: VisionTransformer) -> float:
    """As `MaskedAutoencoder.training_flops`, of the encoder on all patches."""
    patches = encoder.grid[0] * encoder.grid[1]
    blocks = sum(sum(block_multiply_adds(block, 1 + patches)) for block in encoder.blocks)
    return 6.0 * (embedding_multiply_adds(encoder, patches) + blocks)


def matmul_rate() -> float:
    """TFLOP/s of a large bf16 matrix product on the GPU, the median of several."""
    size, repeats = 8192, 10
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)

    def products():
        for _ in range(repeats):
            a @ b
        torch.cuda.synchronize()

    seconds = statistics.median(alternate({"product": products}, rounds=5)["product"])
    return 2 * size**3 * repeats / seconds / 1e12


def peak_memory(side: Side, other: Side, inputs: tuple, precision: str) -> float:
    """GB on the GPU during a step of `side`, without what `other` keeps there meanwhile."""
    kept = [*other.model.parameters(), *other.model.buffers()]
    kept += [value for state in other.optimizer.state.values() for value in state.values()]
    torch.cuda.reset_peak_memory_stats()
    step(side, inputs, precision)
    return (torch.cuda.max_memory_allocated() - sum(value.nbytes for value in kept if value.is_cuda)) / 1e9


def step_cost(setting: Setting) -> tuple[float, float] | tuple[None, None]:
    """Images/s of a training step, and this process's peak memory in GB; None where memory does not suffice."""
    device = find_device()
    try:
        model = new_model("mae", setting, gradient_checkpointing=False).to(device)
        side = Side(model, new_optimizer(model), loss_function("mae", model, compiled=False, fullgraph=False))
        work = partial(step, side, random_inputs(setting, device), setting.precision)
        seconds = statistics.median(alternate({"step": work}, rounds=setting.rounds)["step"])
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            return None, None
        raise
    gpu = device.type == "cuda"
    return setting.batch_size / seconds, torch.cuda.max_memory_allocated() / 1e9 if gpu else process_memory()


def process_memory() -> float:
    """GB that this process took at its peak."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def in_new_process(work: Callable, *values):
    """`work(*values)` in a new process, so that the peak memory it finds is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *values).result()


class Run(NamedTuple):
    """What a run of pretrain_mae.py told of itself."""

    start_seconds: float  # from its launch to the first line of its log
    step_seconds: float
    data_wait: float  # as a share of the time
    threads: int  # of a process


def launch(
    folder: Path, setting: Setting, *, processes: int, num_images: int, max_steps: int, log_every: int
) -> subprocess.Popen:
    """Starts `accelerate launch pretrain_mae.py` in a folder, on images that it generates there: without validation and
    checkpoints before its end, what it says in the file `errors`."""
    from PIL import Image

    images, on_cpu = folder / "images", find_device().type == "cpu"
    images.mkdir()
    small = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((256, 256), Image.Resampling.BICUBIC).save(images / "0.jpg")
    for i in range(1, num_images):
        shutil.copyfile(images / "0.jpg", images / f"{i}.jpg")
    config = dict(compute_environment="LOCAL_MACHINE", mixed_precision="no", num_machines=1, num_processes=processes)
    if processes == 1:
        config |= dict(distributed_type="NO", use_cpu=on_cpu)
    else:  # on a CPU, too: what Accelerate has for it starts one process, or several that do not know of each other
        config |= dict(distributed_type="MULTI_GPU", use_cpu=False, main_process_port=0)
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--path_to_data", images, "--model", setting.model, "--img_size", setting.img_size]
    flags += ["--per_gpu_batch_size", setting.batch_size, "--mixed_precision", setting.precision]
    flags += ["--max_steps", max_steps, "--log_every", log_every]
    flags += ["--validate_every", 0, "--save_checkpoint_interval", 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "config.json"]
    # One thread is what the launcher gives where nobody says how many: the processes then divide all cores
    variables = dict(os.environ, OMP_NUM_THREADS="1") | (dict(ACCELERATE_USE_CPU="true") if on_cpu else {})
    with (folder / "errors").open("w") as stream:
        options = dict(cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=stream, start_new_session=True)
        return subprocess.Popen([*map(str, command), str(ROOT / "pretrain_mae.py"), *map(str, flags)], **options)


def pretrain(setting: Setting, *, processes: int = 1, num_images: int, steps: int = 0) -> Run:
    """Launches pretrain_mae.py, and ends it when `steps` steps after as many others are done, or where that is 0 the
    first one. Raises RunError where it ends before."""
    last = 2 * steps or 1
    with tempfile.TemporaryDirectory() as place:
        run, start_seconds = Path(place, "work_dir", "pretrain_mae"), None
        options = dict(processes=processes, num_images=num_images, max_steps=max(2, last), log_every=max(1, steps))
        process = launch(Path(place), setting, **options)
        start = time.perf_counter()
        try:
            while True:
                ended = process.poll() is not None
                lines = log_lines(run / "log.jsonl")
                if lines and start_seconds is None:
                    start_seconds = time.perf_counter() - start
                if lines and lines[-1]["step"] >= last:
                    break
                if ended:
                    awaited = "its timed steps were done" if lines else "its first step"
                    report = Path(place, "errors").read_text().strip()
                    raise RunError(f"pretrain_mae.py ended before {awaited}: {report}")
                time.sleep(0.01)
        finally:
            end_family(process)
        threads = json.loads((run / "args.json").read_text())["threads"]
        step_seconds = processes * setting.batch_size / lines[-1]["images_per_second"]
        return Run(start_seconds, step_seconds, lines[-1]["data_wait"], threads)


def log_lines(path: Path) -> list[dict]:
    """The lines that a log has so far, whole ones."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def end_family(process: subprocess.Popen) -> None:
    """Ends a process with all that it has started, and waits until none of them runs: a launcher does not pass a signal
    on, and several processes that it has started are each of a group of their own."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            while each.is_running() and each.status() != psutil.STATUS_ZOMBIE:  # which nobody may ever ask for
                time.sleep(0.01)


def benchmark_cost(setting: Setting, *, img_sizes: list[int], batch_sizes: list[int]) -> Iterator[dict]:
    """Images/s and peak memory of `setting` at each image size and at each batch size, and the time to a first step."""
    settings = [setting._replace(img_size=size) for size in img_sizes]
    settings += [setting._replace(batch_size=size) for size in batch_sizes]
    for each in dict.fromkeys(settings):
        try:
            rate, memory = in_new_process(step_cost, each)
        except BrokenProcessPool:  # it was killed, which is how Linux answers a want of memory
            rate, memory = None, None
        name = f"cost: {each.model}, {each.img_size} pixels, batch {each.batch_size}"
        yield row(name, rate, None, "images/s", None)
        yield row(f"{name}: peak memory", memory, None, "GB", None)
    for model in dict.fromkeys(["tiny", setting.model]):
        run = pretrain(setting._replace(model=model, batch_size=8), num_images=8)
        yield row(f"cost: start of pretrain_mae.py, {model}", run.start_seconds, None, "s", None)


def checkpoint_cost(setting: Setting) -> tuple[float, int]:
    """Seconds that saving a checkpoint takes, with AdamW's moments and until it is on the disk; and its bytes."""
    from training.checkpoint import RunFolder

    model = new_model("mae", setting, gradient_checkpointing=False).to(find_device())
    optimizer = new_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    steps = itertools.count()
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.checkpoints.mkdir()

        def save():
            states = {"optimizer": optimizer.state_dict()}
            folder.save(model.state_dict(), states, {"step": next(steps)}, keep=1)

        seconds = statistics.median(alternate({"save": save}, rounds=setting.rounds)["save"])
        (checkpoint,) = folder.whole_checkpoints()
        return seconds, sum(path.stat().st_size for path in checkpoint.iterdir())


def benchmark_scale(setting: Setting, *, processes: list[int], steps: int) -> Iterator[dict]:
    """Images/s, time and data wait of a step, and the time to the first one, of so many `processes` (1 must be there)
    against one; and what a checkpoint costs."""
    runs = {count: [] for count in processes}
    for _ in range(setting.rounds):
        for count, found in runs.items():
            found.append(pretrain(setting, processes=count, num_images=max(runs) * setting.batch_size, steps=steps))

    for count, found in runs.items():
        name = f"scale: {setting.model}, {setting.img_size} pixels, batch {setting.batch_size}, "
        name += "1 process" if count == 1 else f"{count} processes"
        per_image = ([run.step_seconds / (n * setting.batch_size) for run in runs[n]] for n in (count, 1))
        rows = [rate_row(name, 1, *per_image)]
        for what, value in (("step", "step_seconds"), ("start", "start_seconds")):
            ours, theirs = ([getattr(run, value) for run in runs[n]] for n in (count, 1))
            ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
            rows.append(row(f"{name}: {what}", statistics.median(ours), statistics.median(theirs), "s", ratio))
        yield from rows if count > 1 else [entry | dict(theirs=None, ratio=None) for entry in rows]
        wait = statistics.median(run.data_wait for run in found)
        yield row(f"{name}: data wait", 100 * wait, None, "%", None)
        if find_device().type == "cpu":
            yield row(f"{name}: threads", count * found[0].threads, None, "threads", None)

    seconds, size = in_new_process(checkpoint_cost, setting)
    name = f"scale: checkpoint, {setting.model}"
    yield row(name, seconds, None, "s", None)
    yield row(f"{name}: size", size / 1e6, None, "MB", None)
    yield row(f"{name}: speed", size / 1e6 / seconds, None, "MB/s", None)
    of_one = statistics.median(run.step_seconds for run in runs[1])
    yield row(f"{name}: in steps of 1 process", seconds / of_one, None, "steps", None)


def random_masks(num_images: int, size: int, classes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Predictions and annotations (size, size), uint8, made one after the other: patches of a class, some of them void
    (255) in the annotation, of which the prediction has most."""
    rng = np.random.default_rng(0)
    patch = max(1, size // 16)
    for _ in range(num_images):
        coarse = rng.integers(0, classes, (2, -(-size // patch), -(-size // patch)), dtype=np.uint8)
        annotation = np.where(rng.random(coarse.shape[1:]) < 0.1, np.uint8(255), coarse[0])
        prediction = np.where(rng.random(coarse.shape[1:]) < 0.7, coarse[0], coarse[1])
        yield tuple(np.kron(mask, np.ones((patch, patch), np.uint8))[:size, :size] for mask in (prediction, annotation))


def our_mean_iou(pairs: Iterator, classes: int) -> tuple[float, float]:
    """The mean IoU, as a fraction, and the seconds that it took: as the scripts do it, on a CPU."""
    from training.scores import SegmentationScores

    scores, seconds = SegmentationScores(), 0.0

    def add(prediction, annotation):
        areas = segmentation_areas(torch.from_numpy(prediction), torch.from_numpy(annotation), classes)[:, None]
        scores.add_batch(intersections=areas[0], prediction_areas=areas[1], label_areas=areas[2])

    for pair in pairs:
        seconds += seconds_of(partial(add, *pair))
    start = time.perf_counter()
    mean_iou = scores.compute(classes=[str(number) for number in range(classes)])["mean_iou"] / 100
    return mean_iou, seconds + time.perf_counter() - start


def published_mean_iou(pairs: Iterator, classes: int) -> tuple[float, float]:
    """The same by the metric `mean_iou` of the library `evaluate`, from its definition: rows are whole masks as uint16,
    areas are histograms of the pixels that are not void, summed over the images once all of them are there."""
    import evaluate
    from datasets import Features, Sequence, Value

    class MeanIou(evaluate.Metric):
        def _info(self):
            mask = Sequence(Sequence(Value("uint16")))
            features = Features({"predictions": mask, "references": mask})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, *, predictions, references):
            sums = np.zeros((3, classes))
            for prediction, reference in zip(predictions, references, strict=True):
                prediction, reference = np.array(prediction), np.array(reference)
                valid = reference != 255
                prediction, reference = prediction[valid], reference[valid]
                for total, part in zip(sums, (prediction[prediction == reference], prediction, reference), strict=True):
                    total += np.histogram(part, bins=classes, range=(0, classes - 1))[0]
            union = sums[1] + sums[2] - sums[0]
            return {"mean_iou": float((sums[0][union > 0] / union[union > 0]).mean())}

    with tempfile.TemporaryDirectory() as folder:
        metric, seconds = MeanIou(keep_in_memory=True, cache_dir=folder), 0.0
        for prediction, annotation in pairs:
            add = partial(metric.add_batch, predictions=prediction[None], references=annotation[None])
            seconds += seconds_of(add)
        start = time.perf_counter()
        return metric.compute()["mean_iou"], seconds + time.perf_counter() - start


def evaluation_cost(mean_iou: Callable, num_images: int, size: int, classes: int) -> tuple[float, float, float]:
    """The mean IoU, the seconds for it on one core, and this process's peak memory in GB."""
    pin_to_one_core()
    return *mean_iou(random_masks(num_images, size, classes), classes), process_memory()


def benchmark_evaluate(*, num_images: int, size: int, classes: int, rounds: int) -> list[dict]:
    """Images/s of the mean IoU, and peak memory: our scores and the published metric, each in processes of its own."""
    sides = {"ours": our_mean_iou, "theirs": published_mean_iou}
    costs = {name: [] for name in sides}
    for _ in range(rounds):
        for name, mean_iou in sides.items():
            costs[name].append(in_new_process(evaluation_cost, mean_iou, num_images, size, classes))
    (ours, our_seconds, our_memory), (theirs, their_seconds, their_memory) = (
        zip(*costs[name], strict=True) for name in sides
    )
    if abs(ours[0] - theirs[0]) > 1e-12:
        raise RunError(
            f"the two sides do not have the same mean IoU (ours {ours[0]!r}, theirs {theirs[0]!r}); expected a "
            "difference of at most 1e-12; compare releases of the libraries with requirements.txt"
        )
    name = f"evaluate: {classes} classes, {size} pixels, {num_images} masks"
    memory = max(our_memory), max(their_memory)
    return [
        rate_row(name, num_images, our_seconds, their_seconds),
        row(f"{name}: peak memory", *memory, "GB", memory[1] / memory[0]),
    ]


def machine() -> str:
    """What this was measured on, in words."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{', '.join(gpus) or 'no GPU'}; {os.cpu_count()} cores of {cpu}; torch {torch.__version__}"


def describe(entry: dict) -> str:
    """An entry of the JSON list as a line."""
    if entry["ours"] is None:
        return f"{entry['name']:60} out of memory"
    text = f"{entry['name']:60} {entry['ours']:9.2f}"
    if entry["ratio"] is not None:
        text += f" against {entry['theirs']:.2f}, ratio {entry['ratio']:.2f}"
    return f"{text} {entry['unit']}"


def main(argv=None):
    """Runs the script; see the module's docstring."""
    args, errors = parse_args(argv)
    source = None
    try:
        if args.path_to_data:
            source = FolderSource(args.path_to_data)
    except DataError as error:
        errors.append(str(error))
    if args.task and importlib.util.find_spec(PEERS[args.task]) is None:
        errors.append(f"--task {args.task} compares with {PEERS[args.task]}, which is missing; install it with pip")
    if errors:
        fail(errors)

    print(machine())
    if args.what == "data":
        rows = benchmark_data(source, img_size=args.img_size, num_images=args.num_images, rounds=args.rounds)
    elif args.what == "evaluate":
        sizes = dict(num_images=args.num_images, size=args.size, classes=args.classes)
        rows = benchmark_evaluate(**sizes, rounds=args.rounds)
    else:
        setting = Setting(args.model, args.img_size, args.batch_size, args.mixed_precision, args.rounds)
        amount = f"{args.steps} steps after as many" if args.what == "scale" else f"{torch.get_num_threads()} threads"
        print(f"{args.mixed_precision.replace('no', 'float32')}, {amount}")
    if args.what == "train":
        peer = PEERS[args.task]
        print(f"batch {args.batch_size}, {args.img_size} pixels; theirs: {peer} {version(peer)}, attention sdpa")
        options = dict(compiled=args.compile, gradient_checkpointing=args.gradient_checkpointing)
        rows = benchmark_train(args.task, setting, **options)
    elif args.what == "cost":
        rows = benchmark_cost(setting, img_sizes=args.img_sizes, batch_sizes=args.batch_sizes)
    elif args.what == "scale":
        rows = benchmark_scale(setting, processes=args.processes, steps=args.steps)
    measured = []
    for entry in rows:
        print(describe(entry), flush=True)
        measured.append(entry)
    if args.json:
        Path(args.json).write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
