"""Run a trained model on images and write its predictions.

    python predict.py work_dir/quickstart_pretrain photos/ one_more.jpg

writes predictions/predictions.jsonl, one line per image in the order given. A classifier predicts classes, labels or
numbers, as it was trained; one with attentive pooling also writes attention/, where each query looks. A segmentation
model writes labels/ (pixel values 1 to N: the classes in the model's order) and overlays/; a masked autoencoder writes
reconstructions/, with their PSNR and SSIM. Images are files, folders, or patterns such as 'photos/**/*.jpg'. Unreadable
images are named and skipped; the exit code is then 1.

    python predict.py work_dir/quickstart_pretrain photos/ --features features.npy

writes features (images, width) instead, and features.json, the list of their files.
"""

import json
import math
import os
import sys
import tempfile
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
from data.segmentation import palette, view_and_preview, view_sizes
from modeling.classifier import Classifier
from modeling.files import WeightsError
from modeling.mae import MaskedAutoencoder
from modeling.sliding_window import predict
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from training import arguments, launch
from training.arguments import integer, number
from training.files import write_json
from training.launch import RunError, fail
from training.metrics import reconstruction_metrics
from training.pictures import attention_grid, displayable, label_picture, reconstruction_grid, segmentation_overlay
from training.pretraining import check_mask_block
from training.processes import check_settings
from training.resolve import check_preview
from training.wording import count_targets, several

LINES, PICTURES = "predictions.jsonl", ("attention", "labels", "overlays", "reconstructions")  # in the output folder
PREVIEW_SIZE = 1024  # longer side of an overlay, in pixels, at most
NUM_PRINTED = 10  # images whose result is printed
NOT_FINITE = "the outputs are not finite: training diverged or the weights are damaged; give other weights"
KINDS = {  # model -> name, flags for this model alone
    Classifier: ("a classifier", ["top_k"]),
    Segmenter: ("a segmentation model", ["evaluate"]),
    MaskedAutoencoder: (
        "a masked autoencoder",
        ["mask_ratio", "mask_strategy", "mask_block", "seed", "preview_channels"],
    ),
    VisionTransformer: ("an encoder without a head", []),
}


def parse_args(argv=None):
    """Return the flags and a list of errors in them. Flags for one kind of model have None as their default."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="run, checkpoint or weights: file, folder, hf:OWNER/NAME[@revision]")
    flag("images", nargs="+", metavar="IMAGE", help="files, folders, or patterns (* ? [...] **) in quotes")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--output", metavar="FOLDER", help="folder to write (default predictions)")
    either("--features", metavar="FILE.npy", help="write the encoder's features there instead, float32 (images, width)")
    flag("--batch_size", type=integer(1), default=16, help="images per batch, 1 for segmentation (default 16)")
    flag("--num_workers", type=integer(0), help="loader workers (default min(32, cores))")
    flag("--nodata", type=number(-math.inf), help="pixel value without data, besides a GeoTIFF's own and NaN")
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"skip larger images (default {MAX_PIXELS})")
    flag = parser.add_argument_group("classification").add_argument
    flag("--top_k", type=integer(1), help="classes or labels per image (default 5 classes, all labels)")
    flag = parser.add_argument_group("segmentation").add_argument
    flag("--evaluate", choices=("slide", "whole"), help="sliding windows, or the image as one crop (default slide)")
    flag = parser.add_argument_group("masked autoencoder").add_argument
    flag("--mask_ratio", type=number(0, 1), help="share of removed patches (default as in training)")
    flag("--mask_strategy", choices=MASK_STRATEGIES, help="pattern of removed patches (default random)")
    flag("--mask_block", type=integer(1), metavar="N", help="side of removed blocks, in patches (default 1)")
    flag("--seed", type=integer(0, 2**32 - 1), help="seed of the masks (default 0)")
    arguments.add_preview_flag(flag)
    args, errors = parser.read(argv)
    if args.features is not None and Path(args.features).suffix != ".npy":
        errors.append(f"--features {args.features} does not end in .npy; give FILE.npy")
    return args, errors


def check_model(trained, given, *, features):
    """Return the errors in flags that do not fit the model; `given` maps flags in KINDS to their values."""
    model, encoder, errors = trained.model, trained.encoder, []
    name, flags = KINDS[type(model)]
    if features and isinstance(model, Segmenter):
        errors.append(f"--features: {trained.path} is {name}, whose encoder has no norm; give what it started from")
    if not features and isinstance(model, VisionTransformer):
        errors.append(f"{trained.path} is {name}, which computes features alone; give --features FILE.npy")
    if getattr(model, "problem", None) == "numbers":
        name, flags = "a model of numbers", []
    if not features and isinstance(model, MaskedAutoencoder) and not model.target.invertible:
        words = f"predicts {model.target.title}, which have no picture; give --features FILE.npy"
        errors.append(f"{trained.path} {words}")
    unused = [flag for flag in given if features or flag not in flags]
    use = "features" if features else f"the predictions of {name}"
    errors += [f"--{flag} has no effect on {use}; leave it out" for flag in unused]
    errors += check_preview(given.get("preview_channels"), encoder.in_channels)
    if isinstance(model, MaskedAutoencoder) and "mask_ratio" in given:
        patches = math.prod(encoder.grid)
        num_kept = int(patches * (1 - given["mask_ratio"]))
        words = f"keeps {num_kept} of {patches} patches; expected a ratio that keeps and removes at least one"
        errors += [] if 0 < num_kept < patches else [f"--mask_ratio {given['mask_ratio']:g} {words}"]
    if isinstance(model, MaskedAutoencoder):
        errors += check_mask_block(given.get("mask_block", 1), given.get("mask_strategy", "random"), encoder.grid)
    return errors


def check_output(features, folder):
    """Return an error for files and folders that would be overwritten."""
    if features is None:
        flag, paths = f"--output {folder}", [folder / name for name in (LINES, *PICTURES)]
    else:
        path = Path(features)
        flag, paths = f"--features {features}", [path, path.with_suffix(".json"), path.with_name(f".{path.name}")]
    taken = [str(path) for path in paths if os.path.lexists(path)]  # also a link whose file is not there
    return [f"{flag} would overwrite {', '.join(taken)}; give another name"] if taken else []


def picture_names(source):
    """Return a file name for the picture of each image: its own, with its index if another image has it."""
    names, taken = [], set()
    for index in range(len(source)):
        name = os.fsdecode(os.fsencode(Path(source.name(index)).stem)[:200])  # leaves room for the index
        while name.casefold() in taken:  # some file systems ignore case
            name += f"_{index}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


@torch.no_grad()
def predict_classes(batch, *, model, normalize, device, classes, top_k, folder, names):
    """Return the likeliest classes or labels of each image with probabilities, or its numbers.

    Maps of attentive pooling are written.
    """
    tokens = model.encoder(normalize(batch.inputs[0].to(device)))
    answers = model.answer(model.classify(tokens))
    if model.problem == "numbers":
        results = [{"numbers": dict(zip(classes, row, strict=True))} for row in answers.tolist()]
    else:
        values, numbers = (each[:, :top_k].tolist() for each in answers.sort(dim=1, descending=True, stable=True))
        key, word = ("labels", "label") if model.problem == "labels" else ("classes", "class")
        results = [
            {key: [{word: classes[i], "probability": value} for i, value in zip(*row, strict=True)]}
            for row in zip(numbers, values, strict=True)
        ]
    if model.pooling == "attentive":
        maps = model.attention_maps(tokens).cpu().numpy()
        for image, attention, index, result in zip(batch.inputs[0], maps, batch.indices, results, strict=True):
            result["attention"] = f"attention/{names[index]}"
            attention_grid(folder / result["attention"], displayable(image).numpy(), attention)
    return results


@torch.no_grad()
def predict_labels(batch, *, segment, normalize, device, classes, folder, names):
    """Write the labels and the overlay of one image. `segment(views, size)` returns class numbers (1, *size)."""
    images, (preview,), (size,) = batch.inputs
    (labels,) = segment([normalize(images.to(device))], tuple(size.tolist()))
    pixels = torch.bincount(labels.flatten(), minlength=len(classes)).tolist()
    labels, colours, name = labels.cpu().numpy(), palette(len(classes)), names[batch.indices[0]]
    label_picture(folder / "labels" / name, labels + np.uint8(1), colours)
    segmentation_overlay(folder / "overlays" / name, displayable(preview).numpy(), labels, classes, colours)
    order = sorted(range(len(classes)), key=lambda i: -pixels[i])
    areas = [{"class": classes[i], "label": i + 1, "pixels": pixels[i]} for i in order if pixels[i]]
    return [{"labels": f"labels/{name}", "overlay": f"overlays/{name}", "classes": areas}]


@torch.no_grad()
def predict_patches(batch, *, model, normalize, device, channels, folder, names):
    """Write the reconstruction of each image and return its metrics."""
    images, noise = (part.to(device) for part in batch.inputs)
    images = normalize(images)
    _, prediction, removed = model(images, noise)
    prediction = normalize.undo(model.reconstruct(images, prediction))
    images, removed = normalize.undo(images), model.pixel_mask(removed)
    metrics = {name: values.tolist() for name, values in reconstruction_metrics(images, prediction, removed).items()}
    results, statistics = [], dict(uses_true_patch_statistics=model.target.uses_true_patch_statistics)
    for row, index in enumerate(batch.indices):
        values = {name: column[row] for name, column in metrics.items()}
        title = f"removed patches: {values['masked_psnr']:.2f} dB, SSIM {values['masked_ssim']:.3f}"
        path, own = f"reconstructions/{names[index]}", (each[row : row + 1] for each in (images, prediction, removed))
        reconstruction_grid(folder / path, *own, title=title, channels=channels, **statistics)
        results.append({"reconstruction": path, **values, **statistics})
    return results


@torch.no_grad()
def encode_images(batch, *, trained, normalize, device):
    """Return features (B, D): the input of a classifier's head, or the mean of an encoder's patch tokens."""
    images = normalize(batch.inputs[0].to(device))
    if isinstance(trained.model, Classifier):
        return trained.model.pool(trained.encoder(images)).cpu().numpy()
    return trained.encoder.split(trained.encoder(images))[1].mean(dim=1).cpu().numpy()


def predict_all(loader, predict_batch, source):
    """Yield (name, result, error) of each image in order; either the result or the error is None."""
    with tqdm(total=len(source), unit="image") as bar:
        for batch in loader:
            results, errors = iter(predict_batch(batch) if batch.indices else ()), dict(batch.damaged)
            for index in sorted([*batch.indices, *errors]):
                if index in errors:
                    tqdm.write(f"warning: {source.name(index)}: {errors[index]}", file=sys.stderr)
                yield source.name(index), None if index in errors else next(results), errors.get(index)
                bar.update()


def write_lines(path, results):
    """Write one line of JSON per image, print the first results, and return the number of readable images."""
    count = 0
    with open(path, "x") as file:
        for number, (name, result, error) in enumerate(results):
            try:
                line = json.dumps({"image": name, **(result or {"error": error})}, allow_nan=False)
            except ValueError:
                raise RunError(f"{name}: {NOT_FINITE}") from None
            file.write(f"{line}\n")
            file.flush()
            count += result is not None
            if result and number < NUM_PRINTED:
                tqdm.write(f"{name}: {describe_result(result)}".encode(errors="replace").decode())
    return count


def describe_result(result):
    """Return one line on a result: the first classes, labels or numbers, or the PSNR of the reconstruction."""
    if "numbers" in result:
        return ", ".join(f"{name} {value:.6g}" for name, value in list(result["numbers"].items())[:5])
    if "classes" not in result and "labels" in result:
        return ", ".join(f"{entry['label']} {100 * entry['probability']:.1f} %" for entry in result["labels"][:5])
    if "classes" not in result:
        return f"removed patches {result['masked_psnr']:.2f} dB"
    key = "pixels" if "pixels" in result["classes"][0] else "probability"
    scale = 100 / sum(entry[key] for entry in result["classes"]) if key == "pixels" else 100
    return ", ".join(f"{entry['class']} {scale * entry[key]:.1f} %" for entry in result["classes"][:5])


def write_features(path, results, width):
    """Write the features (N, D) of the readable images, and the list of their names; return N."""
    names, rows = [], []
    for name, row, _ in results:
        if row is not None:
            if not np.isfinite(row).all():
                raise RunError(f"{name}: {NOT_FINITE}")
            names.append(name)
            rows.append(row)
    write_json(path.with_suffix(".json"), names)
    part = path.with_name(f".{path.name}")
    np.save(part, np.array(rows, np.float32).reshape(-1, width))
    part.replace(path)
    return len(names)


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags, images and model
    args, errors = parse_args(argv)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        message = f"WORLD_SIZE is {processes}; expected one process; start it with python predict.py"
        fail([message, *errors], show=launch.is_main_process())
    errors += check_settings("no")
    source, image_errors = find_images(args.images)
    errors += image_errors
    try:
        trained = open_trained(args.model, whole=args.features is None)
        names = [name for _, flags in KINDS.values() for name in flags]
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        errors += check_model(trained, given, features=args.features is not None)
    except WeightsError as error:
        errors.append(str(error))
    folder = Path(args.output or "predictions")
    if not errors or args.output or args.features:  # after a first call the default folder is always taken
        errors += check_output(args.features, folder)
    if errors:
        fail(errors)
    output = Path(args.features or folder / LINES)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        fail([f"the folder {output.parent} cannot be written ({error.strerror}); give another one"])

    # Transform of an image, and prediction of a batch
    device = Accelerator(mixed_precision="no").device
    launch.set_speed(device, tf32=False)
    model, encoder = trained.model.to(device), trained.encoder
    pixels = PixelFormat(encoder.in_channels, trained.value_range, args.nodata, args.max_pixels)
    shared = dict(normalize=Normalization(trained.mean, trained.std, device), device=device)
    pictures, classes = dict(folder=folder, names=picture_names(source)), trained.classes
    batch_size = args.batch_size
    transform = partial(centre_crop, size=encoder.img_size, crop_ratio=trained.crop_ratio)
    if args.features is not None:
        task = f"features of width {encoder.embed_dim}"
        predict_batch = partial(encode_images, trained=trained, **shared)
    elif isinstance(model, Classifier):
        task = f"{'one of ' * (model.problem == 'classes')}{count_targets(len(classes), model.problem)} per image"
        top_k = args.top_k or (5 if model.problem == "classes" else len(classes))
        predict_batch = partial(predict_classes, model=model, classes=classes, top_k=top_k, **pictures, **shared)
    elif isinstance(model, Segmenter):
        mode, crop_size = args.evaluate or "slide", encoder.img_size[0]
        view = "windows over images that fit {} x {}".format(*trained.resize) if mode == "slide" else "one crop"
        task = f"one of {len(classes)} classes per pixel, in {view}"
        sides = dict(resize=trained.resize, crop_size=crop_size, patch_size=encoder.patch_size)
        sizes = partial(view_sizes, mode=mode, scales=[1.0], **sides)
        transform = partial(view_and_preview, sizes=sizes, longest=PREVIEW_SIZE)
        segment = partial(predict, model, flip=False, window=crop_size if mode == "slide" else None)
        predict_batch = partial(predict_labels, segment=segment, classes=classes, **pictures, **shared)
        batch_size = 1  # sizes differ, and neither rounding nor memory depends on other images
    else:
        model.mask_ratio = model.mask_ratio if args.mask_ratio is None else args.mask_ratio
        patches = math.prod(encoder.grid)
        task = f"{model.num_kept} of {patches} patches seen, the others predicted"
        mask = dict(mask_strategy=args.mask_strategy or "random", mask_block=args.mask_block or 1, seed=args.seed or 0)
        transform = partial(masked_crop, size=encoder.img_size, grid=encoder.grid, num_kept=model.num_kept, **mask)
        channels = args.preview_channels or preview_channels(pixels)
        predict_batch = partial(predict_patches, model=model, channels=channels, **pictures, **shared)
    size = f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels, {several(encoder.in_channels, 'channel')}"
    print(f"model      {trained.path} ({trained.layout}): {encoder.embed_dim} x {encoder.depth} encoder, {size}")
    for assumption in trained.assumed:
        print(f"           assumed: {assumption}")
    print(f"task       {task}\nimages     {len(source)}")

    # Loop
    batches = [range(len(source))[start : start + batch_size] for start in range(0, len(source), batch_size)]
    num_workers = args.num_workers
    if num_workers is None:  # none for a single batch, which is read sooner than a process starts
        num_workers = min(launch.default_workers(), len(batches) - 1)
    dataset = ListedDataset(source, pixels=pixels, prepare=transform)
    start_time = time.monotonic()
    results = predict_all(make_loader(dataset, batches, num_workers=num_workers), predict_batch, source)
    if args.features is None:
        count = write_lines(output, results)
    else:
        count = write_features(output, results, encoder.embed_dim)

    # Finish
    seconds = time.monotonic() - start_time
    print(f"finished: {count} of {len(source)} images in {seconds:.3g} s; {output}")
    if count < len(source):
        raise RunError(f"{len(source) - count} of {len(source)} images could not be read; see the warnings above")


if __name__ == "__main__":
    launch.run_script(main, remedy="start again (with another --output)")
