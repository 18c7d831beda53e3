"""Export a trained model as an ONNX file, which runs without PyTorch.

    python export_onnx.py work_dir/finetune_classifier classifier.onnx --raw_pixels

writes one file with the weights, for any batch size. A classifier returns probabilities of its classes or labels, or
its numbers; a segmentation model the class of each pixel; a masked autoencoder, from images and noise, its prediction.
An encoder, and with --features also a classifier or an autoencoder, returns features and tokens. The file states the
classes and how to prepare images. It is written only if ONNX Runtime computes the same outputs as the model.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from modeling.deploy import (
    OUTPUTS,
    TOLERANCES,
    Deployed,
    DeployError,
    dynamic_size_misfit,
    largest_difference,
    task_of,
    to_onnx,
)
from modeling.detector import Detector
from modeling.files import WeightsError
from modeling.mae import MaskedAutoencoder
from modeling.trained import open_trained
from modeling.upernet import Segmenter
from modeling.vit import VisionTransformer
from training import arguments, launch
from training.arguments import integer
from training.files import sync
from training.launch import RunError, fail
from training.wording import in_bytes, several

LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def parse_args(argv=None):
    """Return the flags and a list of errors in them."""
    parser = arguments.Parser(__doc__)
    flag, pair = parser.add_argument, dict(action=argparse.BooleanOptionalAction, default=False)
    flag("model", metavar="MODEL", help="run, checkpoint or weights: file, folder, hf:OWNER/NAME[@revision]")
    flag("output", metavar="OUT.onnx", help="file to write")
    flag("--features", **pair, help="export features and tokens of the encoder instead of the predictions (off)")
    flag("--raw_pixels", **pair, help="take uint8 images and normalize them in the file (off)")
    flag("--half", **pair, help="store the weights in float16; inputs and outputs stay float32 (off)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--img_size", type=integer(1), nargs="+", metavar="H [W]", help="pixels (default those of the model)")
    either("--dynamic_size", **pair, help="take images of any size that patches divide (off)")
    args, errors = parser.read(argv)
    if args.img_size:
        if len(args.img_size) > 2:
            errors.append(f"--img_size {' '.join(map(str, args.img_size))} has more than two values; expected H or H W")
        args.img_size = tuple((args.img_size * 2)[:2])
    return args, errors


def check_output(path):
    """Return an error message if the file cannot be written."""
    if path.suffix != ".onnx":
        return [f"{path} does not end in .onnx; give OUT.onnx"]
    if os.path.lexists(path):  # also true for a broken link
        return [f"{path} exists and would be overwritten; give another name"]
    if not path.parent.is_dir():
        return [f"the folder {path.parent} does not exist; create it, or give another one"]
    if not os.access(path.parent, os.W_OK):
        return [f"the folder {path.parent} cannot be written; give another one"]
    return []


def check_libraries():
    """Return an error message if libraries are not installed."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    words = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    return [f"{words}; pip install {' '.join(missing)}"] if missing else []


def check_model(trained, *, features, dynamic_size):
    """Return error messages for flags that do not fit the model."""
    model, errors = trained.model, []
    if isinstance(model, Detector):
        return [f"{trained.path} is a detector, which has no ONNX form here; give what it started from"]
    if features and isinstance(model, VisionTransformer):
        errors.append(f"--features has no effect on {trained.path}, an encoder without a head; leave it out")
    if features and isinstance(model, Segmenter):
        words = "is a segmentation model, whose encoder has no norm; give what it started from"
        errors.append(f"--features: {trained.path} {words}")
    if isinstance(model, MaskedAutoencoder) and not features and not model.target.invertible:
        errors.append(f"{trained.path} predicts {model.target.title}, which have no picture; add --features")
    misfit = dynamic_size_misfit(trained, task_of(trained, features=features))
    if dynamic_size and misfit:
        errors.append(f"--dynamic_size: {trained.path} is {misfit}; give --img_size H W")
    return errors


def describe_file(trained, task, *, raw_pixels, half, dynamic_size):
    """Return the metadata that the ONNX file stores."""
    facts = {
        "task": task,
        "img_size": trained.encoder.img_size,
        "dynamic_size": dynamic_size,
        "patch_size": trained.encoder.patch_size,
        "channels": trained.encoder.in_channels,
        "mean": trained.mean,
        "std": trained.std,
        "value_range": trained.value_range or (0, 255),
        "raw_pixels": raw_pixels,
        "weights": "float16" if half else "float32",
    }
    if trained.classes and task != "features":
        facts["classes"] = trained.classes
    if task == "reconstruction":
        facts["uses_true_patch_statistics"] = trained.model.target.uses_true_patch_statistics
    if trained.resize is None:
        facts["crop_ratio"] = trained.crop_ratio
    else:
        facts["resize"] = trained.resize
    return facts


def write_file(path, content):
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags and model
    args, errors = parse_args(argv)
    output = Path(args.output)
    errors += check_output(output) + check_libraries()
    try:
        trained = open_trained(args.model, img_size=args.img_size)
        errors += check_model(trained, features=args.features, dynamic_size=args.dynamic_size)
    except WeightsError as error:
        errors.append(str(error))
    if errors:
        fail(errors)
    encoder, task = trained.encoder, task_of(trained, features=args.features)
    size = f"{encoder.img_size[0]} x {encoder.img_size[1]} pixels, {several(encoder.in_channels, 'channel')}"
    print(f"model      {trained.path} ({trained.layout}): {encoder.embed_dim} x {encoder.depth} encoder, {size}")
    for assumption in trained.assumed:
        print(f"           assumed: {assumption}")

    # File
    kind = dict(raw_pixels=args.raw_pixels, half=args.half)
    deployed = Deployed(trained, task, **kind)
    metadata = describe_file(trained, task, **kind, dynamic_size=args.dynamic_size)
    try:
        content = to_onnx(deployed, metadata, dynamic_size=args.dynamic_size)
    except DeployError as error:
        fail([f"{trained.path} {error}"])
    difference = largest_difference(content, trained, deployed, dynamic_size=args.dynamic_size)
    limit = TOLERANCES[args.half]
    if not difference <= limit:
        words = (
            f"the outputs differ by {difference:.2g} in ONNX Runtime, expected at most {limit:g}; nothing was written"
        )
        raise RunError(f"{trained.path}: {words}" + ("; leave out --half" if args.half else ""))
    print(f"outputs    {', '.join(OUTPUTS[task])}; difference from the model {difference:.1g}")
    write_file(output, content)
    print(f"written: {output}, {in_bytes(len(content))}")


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command")
