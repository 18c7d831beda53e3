"""Score predictions on a whole data set, from one row per image. The order of the rows does not matter."""

import contextlib
import io
from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch


def score_classification(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return `val_loss`, `top1` and `top5` in percent, and `per_class_accuracy`: name -> percent, None without images.

    `most_frequent_class` is the baseline: the top-1 accuracy, in percent, of always predicting that class.
    If some classes have no image, also `subset_top1`: the accuracy of the best one among those that have.

    Args:
        rows: label of the image, class numbers with the best first (at least 5, or all classes), the best one among the
            classes that have images, loss.
        classes: names.
    """
    labels, rankings, best_present, losses = zip(*rows, strict=True)
    labels = np.asarray(labels)
    hits = np.asarray(rankings) == labels[:, None]  # (images, class numbers of a row)
    images = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[hits[:, 0]], minlength=len(classes))
    subset = {"subset_top1": 100 * int((labels == best_present).sum()) / len(hits)} if not images.all() else {}
    return {
        "val_loss": fmean(losses),
        **subset,
        "top1": 100 * int(hits[:, 0].sum()) / len(hits),
        "top5": 100 * int(hits[:, :5].sum()) / len(hits),
        "most_frequent_class": 100 * int(images.max()) / len(hits),
        "per_class_accuracy": {
            name: 100 * int(r) / int(n) if n else None for name, r, n in zip(classes, right, images, strict=True)
        },
    }


def score_labels(rows: list[tuple], names: Sequence[str]) -> dict:
    """Return `val_loss` and, in percent, average precision, AUROC, and F1 at a probability of 0.5.

    `mean_ap`, `mean_auroc` and `mean_f1` are averaged over the labels that some images have and some have not;
    `per_label_ap`, `per_label_auroc` and `per_label_f1` are None for the others. Without any, the means are None.

    Args:
        rows: labels of the image (T,), 0 and 1, their probabilities (T,), loss; NumPy arrays.
        names: names of the labels.
    """
    from torchmetrics.functional import classification

    labels, probabilities, losses = zip(*rows, strict=True)
    labels, probabilities = (torch.from_numpy(np.stack(part)) for part in (labels, probabilities))
    labels, probabilities = labels.long(), probabilities.double()
    mixed = (labels.amax(dim=0) > labels.amin(dim=0)).tolist()
    metrics = {
        "ap": classification.binary_average_precision,
        "auroc": classification.binary_auroc,
        "f1": classification.binary_f1_score,
    }
    scores = {"val_loss": fmean(losses)}
    for key, metric in metrics.items():
        values = {
            name: 100 * metric(probabilities[:, i], labels[:, i]).item() if mixed[i] else None
            for i, name in enumerate(names)
        }
        known = [value for value in values.values() if value is not None]
        scores |= {f"mean_{key}": fmean(known) if known else None, f"per_label_{key}": values}
    return scores


def score_numbers(rows: list[tuple], names: Sequence[str]) -> dict:
    """Return `val_loss`, and the errors of every column in its own units.

    `per_column_mae` and `per_column_rmse` are the mean absolute and the root of the mean squared error,
    `per_column_r2` the coefficient of determination, None for a column of one value; `mean_r2` is the mean of the
    others, None without any.

    Args:
        rows: true values of the image (T,), predicted values (T,), loss; NumPy arrays.
        names: names of the columns.
    """
    true, predicted, losses = zip(*rows, strict=True)
    true = np.stack(true)
    errors, spread = np.stack(predicted) - true, true - true.mean(axis=0)
    squares, total = (errors**2).sum(axis=0), (spread**2).sum(axis=0)
    r2 = [1 - square / own if own > 0 else None for square, own in zip(squares.tolist(), total.tolist(), strict=True)]
    known = [value for value in r2 if value is not None]
    return {
        "val_loss": fmean(losses),
        "mean_r2": fmean(known) if known else None,
        "per_column_mae": dict(zip(names, np.abs(errors).mean(axis=0).tolist(), strict=True)),
        "per_column_rmse": dict(zip(names, np.sqrt(squares / len(true)).tolist(), strict=True)),
        "per_column_r2": dict(zip(names, r2, strict=True)),
    }


def score_segmentation(rows: list[tuple], classes: Sequence[str]) -> dict:
    """Return mean IoU and accuracies in percent, from the areas of all images together.

    `mean_iou` is averaged over the classes in an annotation or a prediction, `mean_accuracy` over those in an
    annotation; `per_class_iou` and `per_class_accuracy` are None for an absent class.

    Args:
        rows: index of the image, areas (3, classes) as `metrics.segmentation_areas` returns them. At least one pixel of
            an annotation must have a class.
        classes: names.
    """
    hits, predicted, labelled = np.sum([areas for _, areas in rows], axis=0, dtype=np.int64).tolist()
    iou, accuracy = {}, {}
    for name, hit, of_prediction, of_label in zip(classes, hits, predicted, labelled, strict=True):
        union = of_prediction + of_label - hit
        iou[name] = 100 * hit / union if union else None
        accuracy[name] = 100 * hit / of_label if of_label else None
    return {
        "mean_iou": fmean(value for value in iou.values() if value is not None),
        "mean_accuracy": fmean(value for value in accuracy.values() if value is not None),
        "overall_accuracy": 100 * sum(hits) / sum(labelled),
        "per_class_iou": iou,
        "per_class_accuracy": accuracy,
    }


def score_detection(rows: list[tuple], classes: Sequence[str], *, masks: bool) -> dict:
    """Return COCO's average precisions of boxes and, with `masks`, of masks, in percent.

    `box_ap` is the mean over the classes and ten overlaps from 0.5 to 0.95; `box_ap50` and `box_ap75` are for one
    overlap; `box_ap_small`, `_medium` and `_large` are for objects by their area, None without such an object.
    `per_class_box_ap` is None for a class without an object. With `masks`, `mask_ap` and so on are the same of masks.

    Args:
        rows: index of the image, its size (H, W), and COCO's records of its objects and of what was detected:
            `category_id` (from 1), `bbox` (x, y, width, height), and `segmentation`, RLE or polygons; of objects
            `area` and `iscrowd`, of detections `score`.
        classes: names.
    """
    from pycocotools.cocoeval import COCOeval

    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truths = _coco(rows, 2, classes)
        for name, kind in [("box", "bbox"), *([("mask", "segm")] if masks else [])]:
            evaluation = COCOeval(truths, _coco(rows, 3, classes, kind), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = [100 * float(value) if value >= 0 else None for value in evaluation.stats[:6]]
            ends = ("", "50", "75", "_small", "_medium", "_large")
            scores |= {f"{name}_ap{end}": value for end, value in zip(ends, values, strict=True)}
            precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (overlaps, recalls, classes)
            own = [precision[:, :, number] for number in range(len(classes))]
            own = [100 * float(part[part >= 0].mean()) if (part >= 0).any() else None for part in own]
            scores[f"per_class_{name}_ap"] = dict(zip(classes, own, strict=True))
    return scores


def _coco(rows: list[tuple], column: int, classes: Sequence[str], kind: str | None = None):
    """Return the records in a column of `rows` as pycocotools' COCO; with a `kind`, as its `loadRes` reads results."""
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO

    records = []
    for row in rows:
        for record in row[column]:
            area = {}
            if kind:
                area["area"] = record["bbox"][2] * record["bbox"][3]
                area["iscrowd"] = 0
            if kind == "segm":
                area["area"] = float(coco_masks.area(record["segmentation"]))
            records.append({**record, **area, "image_id": row[0], "id": len(records) + 1})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index, "height": size[0], "width": size[1]} for index, size, *_ in rows],
        "annotations": records,
        "categories": [{"id": number, "name": name} for number, name in enumerate(classes, 1)],
    }
    coco.createIndex()
    return coco
