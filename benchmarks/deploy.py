"""Compare the speed of ONNX Runtime with PyTorch on one core, and of int8 weights with float32 weights.

    python benchmarks/deploy.py

measures the encoder of ViT-B with random weights. To measure your own model, and its top-1 accuracy on
IMAGES/val/CLASS/*:

    python benchmarks/deploy.py work_dir/finetune_classifier --path_to_data IMAGES

Rates are images per second of CPU time, so other programs on the machine hardly affect them. Both sides get the same
raw images and normalize them. int8 is onnxruntime's dynamic quantization of the weights of matrix products.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

from benchmarks.compare import figure, new_parser, rates, report, time_in_turns
from data.batches import ListedDataset, centre_crop
from data.decode import PixelFormat
from data.files import find_images
from modeling.deploy import Deployed, task_of, to_onnx
from modeling.files import WeightsError
from modeling.trained import IMAGENET_MEAN, IMAGENET_STD, Trained, open_trained
from modeling.vit import SIZES, VisionTransformer
from training.arguments import integer
from training.launch import fail, run_script


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=9)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="run or weights (default ViT-B of random weights)")
    parser.add_argument("--path_to_data", metavar="IMAGES", help="measure top-1 on IMAGES/val/CLASS/* (default none)")
    batches = dict(type=integer(1), nargs="+", default=[1, 8])
    parser.add_argument("--batch_sizes", **batches, help="images per call (default 1 8)")
    args, errors = parser.read(argv)
    if args.path_to_data and not args.model:
        errors.append("--path_to_data needs a classifier; give MODEL")
    return args, errors


def cpu_clock(work):
    """Return the seconds of CPU time of a call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def random_encoder():
    """Return ViT-B with random weights."""
    statistics = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, value_range=None)
    unused = dict(path=None, layout="", class_names=None, crop_ratio=0.875, resize=None, masks={})
    return Trained(VisionTransformer(**SIZES["base"]).initialize().eval(), **unused, **statistics)


def open_sessions(deployed, folder):
    """Return single-threaded sessions of the float32 and the int8 file, and the sizes of both files in MB."""
    paths = [folder / name for name in ("float32.onnx", "int8.onnx")]
    paths[0].write_bytes(to_onnx(deployed, {}))
    quantize_dynamic(*paths, weight_type=QuantType.QInt8)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]) for path in paths]
    return sessions, [path.stat().st_size / 1e6 for path in paths]


def top1(session, trained, paths):
    """Return the top-1 accuracy (%) on images whose folders are named like their classes."""
    source, _ = find_images(paths)
    crop = partial(centre_crop, size=trained.encoder.img_size, crop_ratio=trained.crop_ratio)
    dataset, right = ListedDataset(source, pixels=PixelFormat(trained.encoder.in_channels), prepare=crop), 0
    for start in range(0, len(source), 50):
        batch = dataset.__getitems__(range(len(source))[start : start + 50])
        (probabilities,) = session.run(["probabilities"], {"images": batch.inputs[0].contiguous().numpy()})
        names = [Path(source.name(index)).parent.name for index in batch.indices]
        right += sum(trained.classes[row.argmax()] == name for row, name in zip(probabilities, names, strict=True))
    return 100 * right / len(source)


@torch.inference_mode()
def measure(trained, *, batch_sizes, rounds, data):
    """Yield the figures."""
    deployed = Deployed(trained, task_of(trained, features=False), raw_pixels=True)
    with tempfile.TemporaryDirectory() as folder:
        (ours, int8), sizes = open_sessions(deployed, Path(folder))
    yield figure("file, int8 against float32", [sizes[1]], "MB", [sizes[0]], lower_is_better=True)
    for count in batch_sizes:
        example = deployed.example(count, trained.encoder.img_size)
        feed = {name: values.numpy() for name, values in zip(("images", "noise"), example, strict=False)}
        works = {"torch": partial(deployed, *example), "onnx": partial(ours.run, None, feed)}
        works["int8"] = partial(int8.run, None, feed)
        seconds = time_in_turns(works, rounds=rounds, timer=cpu_clock)
        speeds = {name: rates(count, values) for name, values in seconds.items()}
        yield figure(f"batch {count}: ONNX Runtime against PyTorch", speeds["onnx"], "images/s", speeds["torch"])
        yield figure(f"batch {count}: int8 against float32", speeds["int8"], "images/s", speeds["onnx"])
    if data:
        accuracies = [[top1(session, trained, [f"{data}/val"])] for session in (int8, ours)]
        yield figure("top-1, int8 against float32", accuracies[0], "%", accuracies[1])


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    try:
        trained = open_trained(args.model) if args.model else random_encoder()
    except WeightsError as error:
        fail([str(error)])
    if args.path_to_data and getattr(trained.model, "problem", None) != "classes":
        fail([f"--path_to_data needs a classifier, which {args.model} is not; leave it out"])
    torch.set_num_threads(1)
    options = dict(batch_sizes=args.batch_sizes, rounds=args.rounds, data=args.path_to_data)
    report(measure(trained, **options), args.json)


if __name__ == "__main__":
    run_script(main)
