"""Shows images to a trained model and writes what it makes of them.

    python predict.py work_dir/quickstart_pretrain photos/ one_more.jpg

writes predictions/predictions.jsonl, a line an image in the order given, and beside it what the model is for: of a
classifier the likeliest classes; of a segmenter labels/ (numbers as in annotations: 0 void, then the classes) and
overlays/; of a masked autoencoder reconstructions/ with their PSNR and SSIM. Images are files, folders, or patterns
such as 'photos/**/*.jpg'. What cannot be read is named and passed over; the exit code is then 1.

    python predict.py work_dir/quickstart_pretrain photos/ --features features.npy

writes features (images, width) instead, and features.json, the list of their files.
"""

import json
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from data.batches import ListedDataset, Normalization, centre_crop, make_loader, masked_crop
from data.decode import MAX_PIXELS, PixelFormat, preview_channels
from data.files import find_images
from data.masking import MASK_STRATEGIES
from data.segmentation import MAX_CLASSES, palette, view_and_preview, view_sizes
from modeling.classifier import Classifier
from modeling.files import WeightsError
from modeling.mae import MaskedAutoencoder
from modeling.sliding_window import predict
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from training import arguments, launch
from training.arguments import integer, number, one_of
from training.checkpoint import write_json
from training.launch import RunError, fail
from training.metrics import reconstruction_metrics
from training.pictures import displayable, label_picture, reconstruction_grid, segmentation_overlay
from training.wording import several

LINES = "predictions.jsonl"
PICTURES = ("labels", "overlays", "reconstructions")  # folders
PREVIEW = 1024  # pixels of an overlay's longer side, at most
NOT_FINITE = "the model's output is not finite; its training diverged or the weights are damaged: give others"
SHOWN = 10  # images whose classes are printed too
FLAGS = {  # that go with one kind of model alone
    Classifier: ("top_k",),
    Segmenter: ("evaluate",),
    MaskedAutoencoder: ("mask_ratio", "mask_strategy", "seed", "preview_channels"),
}
KINDS = {Classifier: "a classifier", Segmenter: "a segmenter", MaskedAutoencoder: "a masked autoencoder"}


def parse_args(argv=None):
    """The flags, and what is wrong with them. One that goes with some models alone is None where it was left out."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a run, one of its checkpoints or exported folders, a file or folder of the official MAE, timm or "
        "transformers, or hf:OWNER/NAME[@revision]",
    )
    flag("images", nargs="*", metavar="IMAGE", help="files, folders of images, or patterns (* ? [...] **) in quotes")
    flag("--output", metavar="FOLDER", help="where to write (default predictions)")
    flag("--features", metavar="FILE.npy", help="write the encoder's features there instead, float32 (images, width)")
    flag(
        "--batch_size",
        type=integer(1),
        default=16,
        help="images that the model sees at a time, of a segmenter always one (default 16)",
    )
    flag("--num_workers", type=integer(0), help="processes that read images (default min(32, cores))")
    nodata = "value of pixels without data, besides a GeoTIFF's own and NaN"
    flag("--nodata", type=number(-math.inf), help=nodata)
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"larger images are damaged (default {MAX_PIXELS})")
    flag = parser.add_argument_group("classifier").add_argument
    flag("--top_k", type=integer(1), help="how many classes of an image are told (default 5)")
    flag = parser.add_argument_group("segmenter").add_argument
    flag(
        "--evaluate",
        type=one_of("slide", "whole"),
        help="slide windows of the crop's size over the resized image; or squeeze the whole image into one crop, as "
        "the folders in transformers do (default slide)",
    )
    flag = parser.add_argument_group("masked autoencoder").add_argument
    flag("--mask_ratio", type=number(0, 1), help="share of patches that is removed (default that of its training)")
    flag("--mask_strategy", type=one_of(*MASK_STRATEGIES), help="random, block or grid (default random)")
    flag("--seed", type=integer(0, 2**32 - 1), help="of the masks: each follows from it and the image's place (0)")
    arguments.add_preview_flag(flag)
    args, errors = parser.read(argv)

    if args.model is None:
        errors.append("MODEL is missing; give a run, a folder or file of weights, or hf:OWNER/NAME")
    elif not args.images:
        errors.append("IMAGE is missing; give files, folders or patterns after the model")
    if args.features is not None:
        if Path(args.features).suffix != ".npy":
            errors.append(f"--features {args.features} has another ending than .npy; give FILE.npy")
        given = [name for name in ("output", *sum(FLAGS.values(), ())) if getattr(args, name) is not None]
        errors += [f"--{name} does not go with --features, which writes those alone; leave it out" for name in given]
    return args, errors


def check_model(args, trained):
    """What the model does not do, a line each."""
    model, encoder, errors = trained.model, trained.encoder, []
    kind = next((kind for kind in KINDS if isinstance(model, kind)), None)
    name = KINDS.get(kind, "an encoder without a head")
    if args.features is not None:
        if kind is Segmenter:
            errors.append(
                f"--features: {args.model} is a segmenter, whose encoder has no norm; give the one it was trained from"
            )
        return errors
    if kind is None:
        errors.append(f"{args.model} is {name}, which gives features alone; give --features FILE.npy")
    if kind is Segmenter and model.num_classes > MAX_CLASSES:
        errors.append(f"{args.model} has {model.num_classes} classes; files of labels hold {MAX_CLASSES} at most")
    for other, flags in FLAGS.items():
        given = [flag for flag in flags if getattr(args, flag) is not None]
        if other is not kind:
            errors += [f"--{flag} is for {KINDS[other]}, and {args.model} is {name}; leave it out" for flag in given]
    errors += arguments.check_preview(args.preview_channels, encoder.in_channels)
    if kind is MaskedAutoencoder and args.mask_ratio is not None:
        patches = math.prod(encoder.grid)
        kept = int(patches * (1 - args.mask_ratio))
        if not 0 < kept < patches:
            errors.append(
                f"--mask_ratio {args.mask_ratio:g} keeps {kept} of {patches} patches; "
                "take a ratio that keeps and removes at least one"
            )
    return errors


def check_places(args):
    """What keeps results from being written where the flags say, a line each."""
    if args.features is not None:
        if Path(args.features).suffix != ".npy":  # which is an error already
            return []
        paths = [Path(args.features), Path(args.features).with_suffix(".json")]
        return [f"--features {args.features}: {path} exists; give another name" for path in paths if path.exists()]
    folder = Path(args.output)
    taken = [name for name in (LINES, *PICTURES) if (folder / name).exists()]
    if taken:
        return [f"--output {folder} holds {', '.join(taken)} already; give another folder"]
    return [f"--output {folder} is a file; give a folder"] if folder.is_file() else []


def make_folder(flag, folder):
    """Makes a folder, or refuses the flag that named it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail([f"--{flag}: the folder {folder} cannot be made ({error.strerror}); give another place"])
    if not os.access(folder, os.W_OK):
        fail([f"--{flag}: the folder {folder} cannot be written to; give another place"])


def picture_names(source):
    """A name for the pictures of each image: its own, and where that is taken, with a number."""
    names, taken, last = [], set(), {}
    for index in range(len(source)):
        stem = Path(source.name(index)).stem
        stem = os.fsdecode(os.fsencode(stem)[:200])  # which leaves room for a number and an ending
        name, number = stem, last.get(stem, 1)
        while name.casefold() in taken:  # some file systems do not tell cases apart
            number += 1
            name = f"{stem}_{number}"
        last[stem] = number
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


@torch.no_grad()
def classify(indices, inputs, *, model, normalize, device, classes, top_k):
    """The likeliest classes of each image, and their probabilities."""
    (images,) = inputs
    probabilities = model(normalize(images.to(device))).softmax(dim=1)
    values, numbers = (each[:, :top_k].tolist() for each in probabilities.sort(dim=1, descending=True, stable=True))
    return [
        {"classes": [{"class": classes[i], "probability": value} for i, value in zip(*row, strict=True)]}
        for row in zip(numbers, values, strict=True)
    ]


@torch.no_grad()
def segment(indices, inputs, *, segmentation, normalize, device, classes, colours, folder, names):
    """The classes of one image's pixels, and pictures of them. `segmentation(views, size)` -> classes (1, *size)."""
    (index,), (images, (preview,), (size,)) = indices, inputs
    (labels,) = segmentation([normalize(images.to(device))], tuple(size.tolist()))
    pixels = torch.bincount(labels.flatten(), minlength=len(classes)).tolist()
    labels = labels.cpu().numpy()
    paths = {"labels": f"labels/{names[index]}", "overlay": f"overlays/{names[index]}"}
    label_picture(folder / paths["labels"], labels + np.uint8(1), colours)
    segmentation_overlay(folder / paths["overlay"], displayable(preview).numpy(), labels, classes, colours)
    order = sorted((i for i, count in enumerate(pixels) if count), key=lambda i: -pixels[i])
    return [{**paths, "classes": [{"class": classes[i], "label": i + 1, "pixels": pixels[i]} for i in order]}]


@torch.no_grad()
def reconstruct(indices, inputs, *, model, normalize, device, mask, channels, folder, names):
    """How well each image's removed patches are predicted, and a picture of it. `mask` says how they were chosen."""
    images, noise = (part.to(device) for part in inputs)
    images = normalize(images)
    _, prediction, removed = model(images, noise)
    prediction = normalize.undo(model.reconstruct(images, prediction))
    images, removed = normalize.undo(images), model.pixel_mask(removed)
    metrics = {name: values.tolist() for name, values in reconstruction_metrics(images, prediction, removed).items()}
    results = []
    for row, index in enumerate(indices):
        values = {name: numbers[row] for name, numbers in metrics.items()}
        title = f"removed patches: {values['masked_psnr']:.2f} dB, SSIM {values['masked_ssim']:.3f} ({mask})"
        path, own = f"reconstructions/{names[index]}", slice(row, row + 1)
        options = dict(title=title, uses_true_patch_statistics=model.norm_pix_loss, channels=channels)
        reconstruction_grid(folder / path, images[own], prediction[own], removed[own], **options)
        results.append({"reconstruction": path, **values, "uses_true_patch_statistics": model.norm_pix_loss})
    return results


@torch.no_grad()
def features_of(indices, inputs, *, trained, normalize, device):
    """The features (B, D) of images: what a classifier's head sees, otherwise the mean of the patch tokens."""
    images = normalize(inputs[0].to(device))
    if isinstance(trained.model, Classifier):
        return trained.model.features(images).cpu().numpy()
    return trained.encoder(images)[:, 1:].mean(dim=1).cpu().numpy()


def look(loader, see, source, unreadable):
    """Yields (index, what `see(indices, inputs)` finds, None) of all images in their order, or (index, None, reason) of
    one that cannot be read, which is named and whose index is appended to `unreadable`."""
    with tqdm(total=len(source), unit="image") as bar:
        for batch in loader:
            found = iter(see(batch.indices, batch.inputs) if batch.indices else ())
            reasons = dict(batch.damaged)
            for index in sorted([*batch.indices, *reasons]):
                if index in reasons:
                    unreadable.append(index)
                    tqdm.write(f"warning: {source.name(index)}: {reasons[index]}", file=sys.stderr)
                    yield index, None, reasons[index]
                else:
                    yield index, next(found), None
                bar.update()


def write_lines(path, results, source):
    """Writes a line of JSON for each image, and prints the first classes of some."""
    with open(path, "x") as file:
        for number, (index, result, reason) in enumerate(results):
            result = {"error": reason} if result is None else result
            try:
                file.write(json.dumps({"image": source.name(index), **result}, allow_nan=False) + "\n")
            except ValueError:
                raise RunError(f"{source.name(index)}: {NOT_FINITE}") from None
            file.flush()
            if number < SHOWN and "error" not in result:
                tqdm.write(describe(source.name(index), result))


def describe(name, result):
    """What was found of an image, in a line for the console: its first classes, or how good the reconstruction is."""
    if "classes" not in result:
        psnr, baseline = result["masked_psnr"], result["masked_psnr_visible_mean"]
        return _printable(f"{name}: removed patches {psnr:.2f} dB (visible mean: {baseline:.2f} dB)")
    classes = result["classes"]
    pixels = sum(found.get("pixels", 0) for found in classes)
    shares = [found["pixels"] / pixels if pixels else found["probability"] for found in classes[:5]]
    shown = ", ".join(f"{found['class']} {100 * share:.1f} %" for found, share in zip(classes, shares, strict=False))
    return _printable(f"{name}: {shown}")


def _printable(text):
    return text.encode(errors="replace").decode()


def write_features(path, results, source, width):
    """Writes the features (N, D) of all images that could be read, and beside it the list of their names; row by row,
    so that memory does not depend on their number."""
    part, kept = path.with_name(f".{path.name}.part"), []

    def write_header(file):  # NumPy leaves room in it for any number of rows
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(kept), width)}
        np.lib.format.write_array_header_1_0(file, header)

    with open(part, "wb") as file:
        write_header(file)
        for index, row, _ in results:
            if row is not None:
                if not np.isfinite(row).all():
                    raise RunError(f"{source.name(index)}: {NOT_FINITE}")
                file.write(row.astype("<f4").tobytes())
                kept.append(index)
        file.seek(0)
        write_header(file)
    write_json(path.with_suffix(".json"), [source.name(index) for index in kept])
    part.replace(path)


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # Flags, images and model
    args, errors = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected one process; start it with python predict.py"
        fail([message, *errors], show=launch.is_main_process())
    source, found = find_images(args.images)
    errors += found
    asked, args.output = args.output or args.features, args.output or "predictions"
    try:
        if args.model is not None:
            trained = open_trained(args.model, whole=args.features is None)
            errors += check_model(args, trained)
    except WeightsError as error:
        errors.append(str(error))
    if not errors or asked:  # of the default place, which is taken after the first call, only where all else is right
        errors += check_places(args)
    if errors:
        fail(errors)
    folder, results = Path(args.output), Path(args.features or Path(args.output, LINES))
    make_folder("output" if args.features is None else "features", results.parent)

    # Device
    device = Accelerator(mixed_precision="no").device
    launch.set_speed(device, tf32=False)
    model, encoder = trained.model.to(device), trained.encoder
    normalize = Normalization(trained.mean, trained.std, device)
    pixels = PixelFormat(encoder.in_channels, trained.value_range, args.nodata, args.max_pixels)
    for assumed in trained.assumed:
        print(f"assumed of {args.model}: {assumed}")

    # What is prepared of each image, and what the model makes of that
    shared = dict(normalize=normalize, device=device)
    pictures = dict(folder=folder, names=picture_names(source))
    if args.features is not None:
        task = f"features of width {encoder.embed_dim}"
        prepare = partial(centre_crop, size=encoder.img_size, crop_ratio=trained.crop_ratio)
        see = partial(features_of, trained=trained, **shared)
    elif isinstance(model, Classifier):
        task = f"one of {len(trained.classes)} classes an image"
        prepare = partial(centre_crop, size=encoder.img_size, crop_ratio=trained.crop_ratio)
        see = partial(classify, model=model, classes=trained.classes, top_k=args.top_k or 5, **shared)
    elif isinstance(model, Segmenter):
        mode, crop_size = args.evaluate or "slide", encoder.img_size[0]
        seen = "windows over images that fit {} x {}".format(*trained.resize) if mode == "slide" else "one crop"
        task = f"one of {len(trained.classes)} classes a pixel, in {seen}"
        options = dict(resize=trained.resize, crop_size=crop_size, patch_size=encoder.patch_size)
        sizes = partial(view_sizes, mode=mode, scales=[1.0], **options)
        prepare = partial(view_and_preview, sizes=sizes, longest=PREVIEW)
        window = dict(window=crop_size if mode == "slide" else None, stride=max(1, 2 * crop_size // 3))
        segmentation = partial(predict, model, flip=False, **window)
        pictures |= dict(classes=trained.classes, colours=palette(len(trained.classes)))
        see = partial(segment, segmentation=segmentation, **pictures, **shared)
        args.batch_size = 1  # images differ in size; and neither rounding nor memory depends on the others
    else:
        ratio, strategy = args.mask_ratio, args.mask_strategy or "random"
        if ratio is None:
            ratio = model.mask_ratio
        model.num_kept = int(math.prod(encoder.grid) * (1 - ratio))
        task = f"{model.num_kept} of {math.prod(encoder.grid)} patches seen, the others predicted"
        mask = f"{strategy} mask of {100 * ratio:g} %"
        options = dict(grid=encoder.grid, num_kept=model.num_kept, mask_strategy=strategy, seed=args.seed or 0)
        prepare = partial(masked_crop, size=encoder.img_size, **options)
        channels = args.preview_channels or preview_channels(pixels)
        see = partial(reconstruct, model=model, mask=mask, channels=channels, **pictures, **shared)
    print(
        f"model      {trained.path} ({trained.layout}): {encoder.embed_dim} x {encoder.depth} encoder, "
        f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels, {several(encoder.in_channels, 'channel')}\n"
        f"task       {task}\nimages     {len(source)}"
    )

    # Loop
    batches = [
        range(start, min(start + args.batch_size, len(source))) for start in range(0, len(source), args.batch_size)
    ]
    if args.num_workers is None:  # one batch is read sooner than a process starts
        args.num_workers = min(32, launch.cores_per_process(), len(batches)) if len(batches) > 1 else 0
    data = ListedDataset(source, pixels=pixels, prepare=prepare)
    loader = make_loader(data, batches, num_workers=args.num_workers)
    start_time, unreadable = time.monotonic(), []
    found = look(loader, see, source, unreadable)
    if args.features is None:
        write_lines(results, found, source)
    else:
        write_features(results, found, source, encoder.embed_dim)

    # Finish
    seconds = time.monotonic() - start_time
    print(f"finished: {len(source) - len(unreadable)} of {len(source)} images in {seconds:.3g} s; {results}")
    if unreadable:
        raise RunError(f"{len(unreadable)} of {len(source)} images could not be read; see the warnings above")


if __name__ == "__main__":
    launch.run_script(main, remedy="start again (with another --output)")
