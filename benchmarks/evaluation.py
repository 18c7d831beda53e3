"""Time the mean IoU of predicted masks against the `mean_iou` metric of the library `evaluate`.

    python benchmarks/evaluation.py

Our scores keep one row of areas per image; the published metric keeps all masks. The latter is reimplemented here,
because loading it needs the network. Both must give the same value, otherwise nothing is reported. Only scoring is
timed, on one thread. Memory is the peak of a process, with the same imports on both sides.
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository

from benchmarks.compare import figure, new_parser, rates, report
from data.masks import IGNORED
from training.arguments import integer
from training.launch import RunError, fail, run_script
from training.metrics import segmentation_areas
from training.scores import score_segmentation


def parse_args(argv=None):
    """Return the flags and a list of error messages."""
    parser = new_parser(__doc__, rounds=3)
    parser.add_argument("--num_images", type=integer(1), default=400, help="masks (default 400)")
    parser.add_argument("--size", type=integer(2), default=512, help="height and width in pixels (default 512)")
    parser.add_argument("--classes", type=integer(2, 254), default=150, help="classes (default 150)")
    return parser.read(argv)


def random_masks(num_images: int, size: int, num_classes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield predictions and annotations (size, size), uint8, of square patches: about 70 % correct and 10 % void."""
    rng = np.random.default_rng(0)
    patch = max(1, size // 16)
    for _ in range(num_images):
        coarse = rng.integers(0, num_classes, (2, -(-size // patch), -(-size // patch)), dtype=np.uint8)
        annotation = np.where(rng.random(coarse.shape[1:]) < 0.1, np.uint8(IGNORED), coarse[0])
        prediction = np.where(rng.random(coarse.shape[1:]) < 0.7, coarse[0], coarse[1])
        yield tuple(np.kron(mask, np.ones((patch, patch), np.uint8))[:size, :size] for mask in (prediction, annotation))


class PublishedMeanIou(evaluate.Metric):
    """The metric `mean_iou`: it stores whole masks as uint16 and counts areas as histograms of non-void pixels."""

    def __init__(self):
        with tempfile.TemporaryDirectory() as unused:  # `evaluate` requires a folder even if it writes nothing
            super().__init__(keep_in_memory=True, cache_dir=unused)

    def _info(self) -> evaluate.MetricInfo:
        mask = Sequence(Sequence(Value("uint16")))
        features = Features({"predictions": mask, "references": mask})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, *, predictions, references, classes) -> dict:
        sums = np.zeros((3, len(classes)))
        for prediction, reference in zip(predictions, references, strict=True):
            prediction, reference = np.array(prediction), np.array(reference)
            valid = reference != IGNORED
            prediction, reference = prediction[valid], reference[valid]
            for total, part in zip(sums, (prediction[prediction == reference], prediction, reference), strict=True):
                total += np.histogram(part, bins=len(classes), range=(0, len(classes) - 1))[0]
        union = sums[1] + sums[2] - sums[0]
        return {"mean_iou": 100 * float((sums[0][union > 0] / union[union > 0]).mean())}


def score(side: str, num_images: int, size: int, num_classes: int) -> tuple[float, float, float]:
    """Return the mean IoU (%) of one side, the seconds of scoring, and this process's peak memory (GB)."""
    rows, published, seconds = [], PublishedMeanIou(), 0.0
    torch.set_num_threads(1)
    for prediction, annotation in random_masks(num_images, size, num_classes):
        start = time.perf_counter()
        if side == "ours":
            masks = torch.from_numpy(prediction), torch.from_numpy(annotation)
            rows.append((len(rows), segmentation_areas(*masks, num_classes).tolist()))
        else:
            published.add_batch(predictions=prediction[None], references=annotation[None])
        seconds += time.perf_counter() - start
    start, classes = time.perf_counter(), [str(number) for number in range(num_classes)]
    scores = score_segmentation(rows, classes) if side == "ours" else published.compute(classes=classes)
    seconds += time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return scores["mean_iou"], seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def measure(num_images: int, size: int, num_classes: int, *, rounds: int) -> Iterator[dict]:
    """Yield images/s and peak memory of both sides. Raises RunError if their values differ."""
    results = {"ours": [], "theirs": []}
    options = dict(mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with ProcessPoolExecutor(1, **options) as pool:  # one process per run, so that peak memory is that of the run
        for side in [*results] * rounds:
            results[side].append(pool.submit(score, side, num_images, size, num_classes).result())
    columns = [list(zip(*runs, strict=True)) for runs in results.values()]
    (ours, our_seconds, our_memory), (theirs, their_seconds, their_memory) = columns
    if abs(ours[0] - theirs[0]) > 1e-10:
        raise RunError(
            f"the two sides do not give the same mean IoU (ours {ours[0]!r} %, theirs {theirs[0]!r} %); expected a "
            "difference of at most 1e-10; compare the installed libraries with requirements.txt"
        )
    name = f"evaluate: {num_classes} classes, {size} pixels, {num_images} masks"
    yield figure(name, rates(num_images, our_seconds), "images/s", rates(num_images, their_seconds))
    yield figure(f"{name}: peak memory", [max(our_memory)], "GB", [max(their_memory)], lower_is_better=True)


def main(argv=None):
    """Run the benchmark; see the module's docstring."""
    args, errors = parse_args(argv)
    if errors:
        fail(errors)
    report(measure(args.num_images, args.size, args.classes, rounds=args.rounds), args.json)


if __name__ == "__main__":
    run_script(main)
