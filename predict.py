"""Run a trained model on images and write its predictions.

    python predict.py work_dir/quickstart_pretrain photos/ one_more.jpg

writes predictions/predictions.jsonl, one line per image in order. A classifier predicts classes, labels or numbers; one
with attentive pooling also writes attention/, maps of its queries. A segmentation model writes labels/ (pixel values
1 to N: the classes in the model's order) and overlays/; a detector writes overlays/ and coco.json; a masked autoencoder
writes reconstructions/, with their PSNR and SSIM. Unreadable images are named and skipped; the exit code is then 1.

    python predict.py work_dir/quickstart_pretrain photos/ --features features.npy

writes features (images, width) instead, and features.json, the list of their files. --patch_features writes features of
each patch. --attention and --pca write pictures of what the encoder computes.
"""

import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from data.batches import ListedDataset, Normalization, centre_crop, make_loader, masked_crop, own_mask_crop
from data.decode import MAX_PIXELS, DamagedImage, PixelFormat, preview_channels
from data.detection import SHOWN, as_results, drawings, fill_of, fit_and_size
from data.files import find_images
from data.masking import MASK_STRATEGIES, read_removed, removed_patches
from data.segmentation import palette, view_and_preview, view_sizes
from modeling import inspection
from modeling.classifier import Classifier
from modeling.detector import Detector, in_original_pixels
from modeling.files import WeightsError
from modeling.mae import MaskedAutoencoder
from modeling.sliding_window import predict
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from training import arguments, launch, predictions
from training.arguments import Pair, integer, number
from training.launch import RunError, fail
from training.memory import check_memory
from training.pictures import displayable
from training.predictions import LINES
from training.pretraining import check_mask_block
from training.processes import check_settings
from training.resolve import check_preview
from training.wording import count_targets, in_bytes, several

PREVIEW_SIZE = 1024  # maximum of the longer side of an overlay, in pixels
MASK_DEFAULTS = dict(mask_strategy="random", mask_block=1, seed=0)
KINDS = {  # class of the model -> its name, flags that only its predictions take
    Classifier: ("a classifier", ["top_k"]),
    Segmenter: ("a segmentation model", ["evaluation_mode"]),
    Detector: ("a detector", []),
    MaskedAutoencoder: (
        "a masked autoencoder",
        ["mask_ratio", "mask_strategy", "mask_block", "seed", "mask", "fill", "preview_channels"],
    ),
    VisionTransformer: ("an encoder without a head", []),
}
LOOKS = {  # flag that replaces predictions -> name of the output, flags that only this output takes
    "features": ("features", ["pooling"]),
    "patch_features": ("features of patches", []),
    "attention": ("attention", []),
    "pca": ("colours of features", []),
}


def parse_args(argv=None):
    """Return the flags and a list of errors in them. Flags for one kind of model have None as their default."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("model", metavar="MODEL", help="run, checkpoint or weights: file, folder, hf:OWNER/NAME[@revision]")
    flag("images", nargs="+", metavar="IMAGE", help="files, folders, or patterns (* ? [...] **) in quotes")
    flag("--output", metavar="FOLDER", help="folder to write (default predictions)")
    flag("--batch_size", type=integer(1), default=16, help="images per batch, 1 for segmentation (default 16)")
    flag("--num_workers", type=integer(0), help="loader workers (default min(32, cores))")
    flag("--nodata", type=number(-math.inf), help="pixel value without data, besides a GeoTIFF's own and NaN")
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"skip larger images (default {MAX_PIXELS})")
    flag = parser.add_argument_group("instead of predictions, one of these").add_argument
    flag("--features", metavar="FILE.npy", help="write the encoder's features there, float32 (images, width)")
    flag("--patch_features", metavar="FILE.npy", help="write the patch tokens there, float32 (images, patches, width)")
    flag("--attention", action=Pair, help="write attention maps of the class token or of a probe's queries (off)")
    flag("--pca", action=Pair, help="write principal components of patch tokens as colours that images share (off)")
    flag("--pooling", choices=("mean", "cls"), help="tokens that --features averages (default as the head, else mean)")
    flag = parser.add_argument_group("classification").add_argument
    flag("--top_k", type=integer(1), help="classes or labels per image (default 5 classes, all labels)")
    flag = parser.add_argument_group("segmentation").add_argument
    mode = "sliding windows, or the image as one crop (default slide)"
    flag("--evaluation_mode", "--evaluate", choices=("slide", "whole"), help=mode)
    flag = parser.add_argument_group("masked autoencoder").add_argument
    flag("--mask_ratio", type=number(0, 1), help="share of masked patches (default as in training)")
    flag("--mask_strategy", choices=MASK_STRATEGIES, help="pattern of masked patches (default random)")
    flag("--mask_block", type=integer(1), metavar="N", help="side of masked blocks, in patches (default 1)")
    flag("--seed", type=integer(0, 2**32 - 1), help="seed of the masks (default 0)")
    flag("--mask", metavar="FILE.png", help="picture whose white removes patches, as large as the image or the crop")
    flag("--fill", action=Pair, help="predict every patch, by masks that together remove all of them (off)")
    arguments.add_preview_flag(flag)
    args, errors = parser.read(argv)
    looks = [name for name in LOOKS if getattr(args, name) not in (None, False)]
    if len(looks) > 1:
        errors.append(f"{' and '.join(f'--{name}' for name in looks)} exclude each other; give one of them")
    for name in looks:
        path = getattr(args, name)
        if path is not True and Path(path).suffix != ".npy":
            errors.append(f"--{name} {path} does not end in .npy; give FILE.npy")
        if path is not True and args.output is not None:
            errors.append(f"--output {args.output} has no effect with --{name}, which names a file; leave it out")
    args.look, args.fill = looks[0] if looks else None, args.fill or None
    return args, errors


def check_model(trained, given, removed, *, look):
    """Return error messages for flags that do not fit the model.

    `given` maps flags in KINDS and LOOKS to their values; `removed` (L,) is 1 for patches that --mask removes, or None.
    """
    model, encoder, errors = trained.model, trained.encoder, []
    name, flags = KINDS[type(model)]
    if (look not in (None, "attention") and isinstance(model, Segmenter)) or (look and isinstance(model, Detector)):
        errors.append(f"--{look}: {trained.path} is {name}, whose encoder has no norm; give what it started from")
    if look is None and isinstance(model, VisionTransformer):
        words = "only computes features; give --features FILE.npy, --attention or --pca"
        errors.append(f"{trained.path} is {name}, which {words}")
    if given.get("pooling") == "cls" and getattr(model, "pooling", None) == "mean":
        words = f"{trained.path} is {name} of the mean patch token, whose class token has no norm"
        errors.append(f"--pooling cls: {words}; leave it out, or give what it started from")
    if getattr(model, "problem", None) == "numbers":
        name, flags = "a model of numbers", []
    if look is None and isinstance(model, MaskedAutoencoder) and not model.target.invertible:
        words = f"predicts {model.target.title}, which have no picture; give --features FILE.npy"
        errors.append(f"{trained.path} {words}")
    use, flags = LOOKS[look] if look else (f"the predictions of {name}", flags)
    errors += [f"--{flag} has no effect on {use}; leave it out" for flag in given if flag not in flags]
    errors += check_preview(given.get("preview_channels"), encoder.in_channels)
    return errors + (check_masks(encoder, given, removed) if isinstance(model, MaskedAutoencoder) else [])


def check_masks(encoder, given, removed):
    """Return error messages for mask flags that do not fit the patches of a masked autoencoder."""
    patches, errors = math.prod(encoder.grid), []
    if "mask_ratio" in given:
        num_kept = int(patches * (1 - given["mask_ratio"]))
        words = f"keeps {num_kept} of {patches} patches; expected a ratio that keeps and removes at least one"
        errors += [] if 0 < num_kept < patches else [f"--mask_ratio {given['mask_ratio']:g} {words}"]
    if removed is not None:
        count = int(removed.sum())
        words = f"removes {count} of {patches} patches; expected white on half of a patch or more, and not of all"
        errors += [] if 0 < count < patches else [f"--mask {given['mask']} {words}"]
    others = [flag for flag in given if flag in ("mask_ratio", "mask_strategy", "mask_block", "seed", "fill")]
    if "mask" in given:
        errors += [f"--{flag} has no effect with --mask, which says what is removed; leave one out" for flag in others]
    return errors + check_mask_block(given.get("mask_block", 1), given.get("mask_strategy", "random"), encoder.grid)


@torch.no_grad()
def predict_classes(batch, *, model, normalize, device, classes, top_k, folder, names):
    """Return the most probable classes or labels of each image with their probabilities, or its numbers.

    The attention maps of attentive pooling are written.
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
        written = predictions.write_attention(batch, model.attention_maps(tokens), folder=folder, names=names)
        results = [result | attention for result, attention in zip(results, written, strict=True)]
    return results


@torch.no_grad()
def predict_labels(batch, *, segment, normalize, device, classes, folder, names):
    """Write labels and overlay of one image; return its result. `segment(views, size)` gives classes (1, *size)."""
    images, (preview,), (size,) = batch.inputs
    (labels,) = segment([normalize(images.to(device))], tuple(size.tolist()))
    options = dict(classes=classes, colours=palette(len(classes)), folder=folder, name=names[batch.indices[0]])
    return predictions.write_labels(labels, displayable(preview).numpy(), **options)


@torch.no_grad()
def predict_objects(batch, *, model, normalize, device, classes, folder, names):
    """Write the overlay of one image; return its objects as COCO's records with the names of their classes."""
    images, (size,), (original,) = batch.inputs
    size, original = tuple(size.tolist()), tuple(original.tolist())
    (detections,) = model(normalize(images.to(device)), [size])
    records, view = as_results(in_original_pixels(detections, size, original)), displayable(images[0]).numpy()
    options = dict(classes=classes, colours=palette(len(classes)), folder=folder, name=names[batch.indices[0]])
    shown = drawings([record for record in records if record["score"] >= SHOWN], original, size)
    return predictions.write_objects(records, original, view[:, : size[0], : size[1]], shown, **options)


@torch.no_grad()
def predict_patches(batch, *, model, whole, normalize, device, **pictures):
    """Write each image's reconstruction and return its metrics; `whole`: predict all patches, using several masks."""
    images, noise = (part.to(device) for part in batch.inputs)
    images, removed = normalize(images), None
    if whole:
        prediction = inspection.fill(model, images, noise)
    else:
        _, prediction, mask = model(images, noise)
        prediction, removed = model.reconstruct(images, prediction), model.pixel_mask(mask)
    prediction, images = normalize.undo(prediction), normalize.undo(images)
    options = dict(uses_true_patch_statistics=model.target.uses_true_patch_statistics, **pictures)
    return predictions.write_reconstructions(batch.indices, images, prediction, removed, **options)


@torch.no_grad()
def encode_images(batch, *, trained, pooling, normalize, device):
    """Return features (B, D): tokens averaged by `pooling`; None: as a classifier's head pools, or patch tokens."""
    tokens, model = trained.encoder(normalize(batch.inputs[0].to(device))), trained.model
    if isinstance(model, Classifier) and pooling in (None, model.pooling):
        return model.pool(tokens).cpu().numpy()
    cls_tokens, patches = trained.encoder.split(tokens)
    return (cls_tokens if pooling == "cls" else patches).mean(dim=1).cpu().numpy()


def encode_patches(batch, *, trained, normalize, device):
    """Return the features (B, L, D) of all patches."""
    return inspection.patch_features(trained.encoder, normalize(batch.inputs[0].to(device))).cpu().numpy()


@torch.no_grad()
def find_attention(batch, *, trained, normalize, device, **pictures):
    """Write attention maps of each image: of an attentive probe's queries, otherwise of the class token's heads."""
    images, model, encoder = normalize(batch.inputs[0].to(device)), trained.model, trained.encoder
    if getattr(model, "pooling", None) == "attentive":
        maps = model.attention_maps(encoder(images))
    else:
        maps = inspection.attention_maps(encoder, images).unflatten(-1, encoder.grid)
    if not maps.isfinite().all():
        raise RunError(predictions.NOT_FINITE)
    return predictions.write_attention(batch, maps, **pictures)


def encode_for_colours(batch, **options):
    """Return the features (L, D) and the displayable image (C, H, W) of each image."""
    return [*zip(encode_patches(batch, **options), map(displayable, batch.inputs[0]), strict=True)]


def plan_look(look, trained, *, pooling, num_images, **pictures):
    """Return, for one of LOOKS, the task in words, the transform of an image and the function that predicts a batch."""
    encoder = trained.encoder
    patches, width = math.prod(encoder.grid), encoder.embed_dim
    transform = partial(centre_crop, size=encoder.img_size, crop_ratio=trained.crop_ratio)
    if look == "features":
        return f"features of width {width}", transform, partial(encode_images, trained=trained, pooling=pooling)
    if look == "patch_features":
        return f"features of {patches} patches, of width {width}", transform, partial(encode_patches, trained=trained)
    if look == "pca":
        size = num_images * (4 * patches * width + 3 * math.prod(encoder.img_size))
        check_memory(f"--pca of {several(num_images, 'image')}", size)
        words = f"colours of {patches} patches, which all images share, from {in_bytes(size)} of features and pixels"
        return words, transform, partial(encode_for_colours, trained=trained)
    attentive = getattr(trained.model, "pooling", None) == "attentive"
    words = "the queries of the probe" if attentive else f"{several(encoder.num_heads, 'head')} of the class token"
    return f"attention of {words} to {patches} patches", transform, partial(find_attention, trained=trained, **pictures)


def plan_predictions(trained, given, removed, *, mask_size, pixels, **pictures):
    """Return the same as `plan_look`, for predictions. See `check_model` for `given` and `removed`."""
    model, encoder, classes = trained.model, trained.encoder, trained.classes
    if isinstance(model, Classifier):
        task = f"{'one of ' * (model.problem == 'classes')}{count_targets(len(classes), model.problem)} per image"
        top_k = given.get("top_k", 5 if model.problem == "classes" else len(classes))
        transform = partial(centre_crop, size=encoder.img_size, crop_ratio=trained.crop_ratio)
        return task, transform, partial(predict_classes, model=model, classes=classes, top_k=top_k, **pictures)
    if isinstance(model, Segmenter):
        mode, crop_size = given.get("evaluation_mode", "slide"), encoder.img_size[0]
        view = "windows over images that fit {} x {}".format(*trained.resize) if mode == "slide" else "one crop"
        task = f"one of {len(classes)} classes per pixel, in {view}"
        sides = dict(resize=trained.resize, crop_size=crop_size, patch_size=encoder.patch_size)
        sizes = partial(view_sizes, mode=mode, scales=[1.0], **sides)
        transform = partial(view_and_preview, sizes=sizes, longest=PREVIEW_SIZE)
        segment = partial(predict, model, flip=False, window=crop_size if mode == "slide" else None)
        return task, transform, partial(predict_labels, segment=segment, classes=classes, **pictures)
    if isinstance(model, Detector):
        task = f"objects of {count_targets(len(classes), 'classes')}, in images that fit {encoder.img_size[0]} pixels"
        fill = fill_of(trained.mean, trained.value_range)
        transform = partial(fit_and_size, side=encoder.img_size[0], fill=fill)
        return task, transform, partial(predict_objects, model=model, classes=trained.categories, **pictures)
    patches, whole, size = math.prod(encoder.grid), given.get("fill", False), encoder.img_size
    if removed is None:
        model.mask_ratio = given.get("mask_ratio", model.mask_ratio)
        mask = {name: given.get(name, value) for name, value in MASK_DEFAULTS.items()}
        transform = partial(masked_crop, size=size, grid=encoder.grid, num_kept=model.num_kept, **mask)
    else:
        model = inspection.keep_patches(model, patches - int(removed.sum()))
        transform = partial(own_mask_crop, size=size, noise=removed, mask_size=mask_size)
    task = f"{model.num_kept} of {patches} patches seen, the others predicted"
    if whole:
        masks = len(inspection.complementary_noise(torch.zeros(1, patches), model.num_kept))
        task += f", under {masks} masks that together remove all"
    channels = given.get("preview_channels", preview_channels(pixels))
    return task, transform, partial(predict_patches, model=model, whole=whole, channels=channels, **pictures)


def read_mask(path, max_pixels):
    """Return the pixels that the picture of --mask removes (H, W), or None, and a list of errors."""
    try:
        return None if path is None else read_removed(path, max_pixels), []
    except DamagedImage as error:
        return None, [f"--mask {path}: {error}; expected a picture whose white is removed"]


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags, images and model
    args, errors = parse_args(argv)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        message = f"WORLD_SIZE is {processes}; expected one process; start it with python predict.py"
        fail([message, *errors], show=launch.is_main_process())
    errors += check_settings("no")
    source, image_errors = find_images(args.images)
    white, mask_errors = read_mask(args.mask, args.max_pixels)
    errors += image_errors + mask_errors
    file = args.features or args.patch_features
    try:
        trained = open_trained(args.model, whole=args.look is None)
        names = [name for _, flags in (*KINDS.values(), *LOOKS.values()) for name in flags]
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        removed = None if white is None else removed_patches(white, trained.encoder.img_size, trained.encoder.grid)
        errors += check_model(trained, given, removed, look=args.look)
    except WeightsError as error:
        errors.append(str(error))
    folder = Path(args.output or "predictions")
    if file is not None:
        errors += predictions.check_features(args.look, Path(file))
    elif not errors or args.output:  # after a first call the default folder is always in use
        errors += predictions.check_output(folder)
    if errors:
        fail(errors)
    output = Path(file or folder / LINES)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output.parent).close()
    except OSError as error:
        fail([f"the folder {output.parent} cannot be written ({error.strerror}); give another one"])

    # Task: transform of an image, and prediction of a batch
    device = Accelerator(mixed_precision="no").device
    launch.set_speed(device, tf32=False)
    encoder = trained.encoder
    trained.model.to(device)
    pixels = PixelFormat(encoder.in_channels, trained.value_range, args.nodata, args.max_pixels)
    paths = [source.name(index) for index in range(len(source))]
    pictures = dict(folder=folder, names=predictions.picture_names(paths))
    if args.look:
        options = dict(pooling=args.pooling, num_images=len(paths))
        task, transform, predict_batch = plan_look(args.look, trained, **options, **pictures)
    else:
        options = dict(mask_size=None if white is None else tuple(white.shape), pixels=pixels)
        task, transform, predict_batch = plan_predictions(trained, given, removed, **options, **pictures)
    size = f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels, {several(encoder.in_channels, 'channel')}"
    print(f"model      {trained.path} ({trained.layout}): {encoder.embed_dim} x {encoder.depth} encoder, {size}")
    for assumption in trained.assumed:
        print(f"           assumed: {assumption}")
    print(f"task       {task}\nimages     {len(paths)}")

    # Loop
    # A segmenter's views differ in size. In batches of one image, results and memory do not depend on other images.
    batch_size = 1 if isinstance(trained.model, Segmenter | Detector) and not args.look else args.batch_size
    batches = [range(len(paths))[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    num_workers = args.num_workers
    if num_workers is None:  # none for a single batch, which loads faster than a process starts
        num_workers = min(launch.default_workers(), len(batches) - 1)
    loader = make_loader(ListedDataset(source, pixels=pixels, prepare=transform), batches, num_workers=num_workers)
    predict_batch = partial(predict_batch, normalize=Normalization(trained.mean, trained.std, device), device=device)
    start_time = time.monotonic()
    results = predictions.predict_all(loader, predict_batch, paths)
    patches, width = math.prod(encoder.grid), encoder.embed_dim
    if args.look == "pca":
        shape = (len(paths), patches, width)
        results = predictions.write_colours(results, shape, inspection.feature_colours, grid=encoder.grid, **pictures)
    if file is None:
        count = predictions.write_lines(output, results)
        if isinstance(trained.model, Detector):
            predictions.write_coco(output, trained.categories)
    else:
        count = predictions.write_features(output, results, [width] if args.look == "features" else [patches, width])

    # Finish
    seconds = time.monotonic() - start_time
    print(f"finished: {count} of {len(paths)} images in {seconds:.3g} s; {output}")
    if count < len(paths):
        raise RunError(f"{len(paths) - count} of {len(paths)} images could not be read; see the warnings above")


if __name__ == "__main__":
    launch.run_script(main, remedy="start again (with another --output)")
