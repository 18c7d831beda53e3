"""Write the results of a model for a list of images: a line of JSON per image and pictures, or features."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.files import write_json
from training.launch import RunError
from training.metrics import reconstruction_metrics
from training.pictures import (
    attention_grid,
    colour_picture,
    detection_overlay,
    displayable,
    label_picture,
    reconstruction_grid,
    segmentation_overlay,
)
from training.wording import TRUE_STATISTICS

LINES, COCO = "predictions.jsonl", "coco.json"  # in the output folder, beside these folders of pictures
PICTURES = ("attention", "colours", "labels", "overlays", "reconstructions")
NUM_PRINTED = 10  # images whose result is printed
NOT_FINITE = "the outputs are not finite: training diverged or the weights are damaged; give other weights"

Results = Iterable[tuple[str, object, str | None]]  # name, result and error of each image; one of the last two is None


def check_output(folder: Path) -> list[str]:
    """Return an error message for files and folders in the output folder that would be overwritten."""
    return _check_absent(f"--output {folder}", [folder / name for name in (LINES, COCO, *PICTURES)])


def check_features(flag: str, path: Path) -> list[str]:
    """Return an error message for files of features, which `flag` names, that would be overwritten."""
    return _check_absent(f"--{flag} {path}", [path, path.with_suffix(".json"), _part_of(path)])


def _check_absent(flag: str, paths: Sequence[Path]) -> list[str]:
    taken = [str(path) for path in paths if os.path.lexists(path)]  # also a link whose file is not there
    return [f"{flag} would overwrite {', '.join(taken)}; give another name"] if taken else []


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def picture_names(paths: Sequence[str]) -> list[str]:
    """Return a file name for the picture of each image: its own, with its index if another image has it."""
    names, taken = [], set()
    for index, path in enumerate(paths):
        name = os.fsdecode(os.fsencode(Path(path).stem)[:200])  # leaves room for the index
        while name.casefold() in taken:  # some file systems ignore case
            name += f"_{index}"
        taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def predict_all(loader: Iterable, predict_batch: Callable[..., Sequence], names: Sequence[str]) -> Iterator[tuple]:
    """Yield (name, result, error) of each image in order, with a bar in a terminal; result or error is None.

    Args:
        loader: batches with the `indices` of readable images; `damaged` has (index, reason) of the others.
        predict_batch: returns a result for each readable image of a batch.
        names: the names of all images.
    """
    with tqdm(total=len(names), unit="image", disable=None) as bar:  # shown in a terminal alone
        for batch in loader:
            results, errors = iter(predict_batch(batch) if batch.indices else ()), dict(batch.damaged)
            for index in sorted([*batch.indices, *errors]):
                if index in errors:
                    tqdm.write(f"warning: {names[index]}: {errors[index]}", file=sys.stderr)
                yield names[index], None if index in errors else next(results), errors.get(index)
                bar.update()


def write_lines(path: Path, results: Results) -> int:
    """Write one line of JSON per image, print the first results, and return the number of readable images."""
    count, printed = 0, 0
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
                printed += 1
    if count > printed:
        print(f"... and {count - printed} more in {path}")
    return count


def describe_result(result: dict) -> str:
    """Return one line on a result: the first classes, labels or numbers, a PSNR, or the name of the picture."""
    if "numbers" in result:
        return ", ".join(f"{name} {value:.6g}" for name, value in list(result["numbers"].items())[:5])
    if "masked_psnr" in result:
        statistics = f" {TRUE_STATISTICS}" if result["uses_true_patch_statistics"] else ""
        return f"masked patches {result['masked_psnr']:.2f} dB{statistics}"
    if "filled_psnr" in result:
        return f"whole image {result['filled_psnr']:.2f} dB"
    if "objects" in result:
        return ", ".join(f"{each['class']} {100 * each['score']:.1f} %" for each in result["objects"][:5]) or "none"
    if "classes" not in result and "labels" in result:
        return ", ".join(f"{entry['label']} {100 * entry['probability']:.1f} %" for entry in result["labels"][:5])
    if "classes" not in result:
        return next(iter(result.values()))
    key = "pixels" if "pixels" in result["classes"][0] else "probability"
    scale = 100 / sum(entry[key] for entry in result["classes"]) if key == "pixels" else 100
    return ", ".join(f"{entry['class']} {scale * entry[key]:.1f} %" for entry in result["classes"][:5])


def write_labels(
    labels: torch.Tensor, image: np.ndarray, *, classes: Sequence[str], colours: np.ndarray, folder: Path, name: str
) -> list[dict]:
    """Write the class numbers (H, W) of an image and an overlay, and return their names and the pixels per class.

    `image` is the picture (C, h, w), uint8, and `colours` (classes, 3).
    """
    pixels = torch.bincount(labels.flatten(), minlength=len(classes)).tolist()
    labels = labels.cpu().numpy()
    label_picture(folder / "labels" / name, labels + np.uint8(1), colours)
    segmentation_overlay(folder / "overlays" / name, image, labels, classes, colours)
    order = sorted(range(len(classes)), key=lambda i: -pixels[i])
    areas = [{"class": classes[i], "label": i + 1, "pixels": pixels[i]} for i in order if pixels[i]]
    return [{"labels": f"labels/{name}", "overlay": f"overlays/{name}", "classes": areas}]


def write_objects(
    records: Sequence[dict],
    size: tuple[int, int],
    image: np.ndarray,
    drawings: Sequence,
    *,
    classes: dict[int, str],
    colours: np.ndarray,
    folder: Path,
    name: str,
) -> list[dict]:
    """Write an overlay of the objects in an image, and return its name, the image's size and the objects.

    `records` are COCO's, with classes counted from 1, which become the keys of `classes`; `size` is (H, W). `drawings`
    are the objects that are drawn on the picture `image` (C, h, w), uint8.
    """
    numbers, names = [*classes], [*classes.values()]
    detection_overlay(folder / "overlays" / name, image, drawings, names, colours)
    labels = [record["category_id"] - 1 for record in records]
    objects = [
        {"class": names[label], **record, "category_id": numbers[label]}
        for label, record in zip(labels, records, strict=True)
    ]
    return [{"overlay": f"overlays/{name}", "height": size[0], "width": size[1], "objects": objects}]


def write_coco(lines: Path, classes: dict[int, str]) -> None:
    """Write the objects in a file of `write_lines` as an annotation file of COCO, into the same folder."""
    from pycocotools import mask as coco_masks

    images, annotations = [], []
    for number, line in enumerate(map(json.loads, lines.read_text().splitlines()), 1):
        if "objects" in line:
            images.append(dict(id=number, file_name=line["image"], height=line["height"], width=line["width"]))
        for record in line.get("objects", ()):
            mask, (_, _, width, height) = record.get("segmentation"), record["bbox"]
            area = width * height if mask is None else int(coco_masks.area(mask))
            annotations.append(dict(record, id=len(annotations) + 1, image_id=number, area=area, iscrowd=0))
    categories = [dict(id=number, name=name) for number, name in classes.items()]
    write_json(lines.with_name(COCO), dict(images=images, annotations=annotations, categories=categories))


def write_attention(batch, maps: torch.Tensor, *, folder: Path, names: Sequence[str]) -> list[dict]:
    """Write attention maps (B, Q, h, w) over the images of a batch, and return the names of the pictures as results."""
    results = [{"attention": f"attention/{names[index]}"} for index in batch.indices]
    for image, each, result in zip(batch.inputs[0], maps.cpu().numpy(), results, strict=True):
        attention_grid(folder / result["attention"], displayable(image).numpy(), each)
    return results


def write_reconstructions(
    indices: Sequence[int],
    images: torch.Tensor,
    prediction: torch.Tensor,
    removed: torch.Tensor | None,
    *,
    uses_true_patch_statistics: bool,
    channels: Sequence[int] | None,
    folder: Path,
    names: Sequence[str],
) -> list[dict]:
    """Write the reconstruction of each image, and return the names of the pictures and the metrics.

    `images` and `prediction` are (B, C, H, W) in [0, 1], `removed` (B, 1, H, W) is the mask; None if several
    masks together removed every patch.
    """
    if removed is None:
        part, prefix = "whole image", "filled"
        metrics = reconstruction_metrics(images, prediction, torch.ones_like(images[:, :1]))
        metrics = {f"filled_{name}": metrics[f"prediction_{name}"] for name in ("psnr", "ssim")}
    else:
        part, prefix, metrics = "masked patches", "masked", reconstruction_metrics(images, prediction, removed)
    metrics, results = {name: values.tolist() for name, values in metrics.items()}, []
    statistics = dict(uses_true_patch_statistics=uses_true_patch_statistics)
    for row, index in enumerate(indices):
        values = {name: column[row] for name, column in metrics.items()}
        title = f"{part}: {values[f'{prefix}_psnr']:.2f} dB, SSIM {values[f'{prefix}_ssim']:.3f}"
        path, own = f"reconstructions/{names[index]}", (images[row, None], prediction[row, None])
        mask = None if removed is None else removed[row, None]
        reconstruction_grid(folder / path, *own, mask, title=title, channels=channels, **statistics)
        results.append({"reconstruction": path, **values, **statistics})
    return results


def write_colours(
    results: Results,
    shape: Sequence[int],
    find_colours: Callable,
    *,
    grid: Sequence[int],
    folder: Path,
    names: Sequence,
) -> Iterator[tuple]:
    """Yield `results` with the name of a picture in place of features (L, D) and the image (C, H, W) to show.

    Args:
        shape: N, L and D of all features, which are in memory at the same time.
        find_colours: returns the colours (N, L, 3) of features (N, L, D), whose patches form the `grid`.
    """
    features, images, lines = torch.empty(*shape), [], []
    for name, result, error in results:
        if result is not None:
            if not np.isfinite(result[0]).all():
                raise RunError(f"{name}: {NOT_FINITE}")
            features[len(images)] = torch.from_numpy(result[0])
            images.append(result[1].numpy().copy())  # a view would hold the memory that workers share
        lines.append((name, error))
    colours = find_colours(features[: len(images)]).unflatten(1, grid).numpy() if images else ()
    pairs = zip(images, colours, strict=True)
    for (name, error), file in zip(lines, names, strict=True):
        if error is None:
            colour_picture(folder / "colours" / file, *next(pairs))
        yield name, None if error else {"colours": f"colours/{file}"}, error


def write_features(path: Path, results: Results, shape: Sequence[int]) -> int:
    """Write the features (N, *shape), float32, of the readable images, and the list of their names; return N.

    They are written as they come, so memory holds one batch. The file gets its name when it is complete.
    """
    names, part = [], _part_of(path)
    try:
        with open(part, "xb") as file:
            write_header(file, (0, *shape))
            for name, features, _ in results:
                if features is not None:
                    if not np.isfinite(features).all():
                        raise RunError(f"{name}: {NOT_FINITE}")
                    names.append(name)
                    file.write(np.ascontiguousarray(features, "<f4"))
            file.seek(0)
            write_header(file, (len(names), *shape))
        write_json(path.with_suffix(".json"), names)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return len(names)


def write_header(file, shape: Sequence[int]) -> None:
    """Write the header of an .npy file of float32, which NumPy pads so that any number of rows fits."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
