import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics.functional import regression
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
)

from training.metrics import segmentation_areas
from training.scores import score_classification, score_detection, score_labels, score_numbers, score_segmentation


def case(num_classes, count, *, seed=0):
    """Return logits whose best five are sometimes right, labels without the last class, and losses."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes - 1, (count,), generator=generator)
    logits = torch.randn(count, num_classes, generator=generator)
    logits += torch.nn.functional.one_hot(labels, num_classes)
    return logits, labels, torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def score(logits, labels, losses):
    best = logits.topk(min(5, logits.shape[1])).indices.tolist()
    present = labels.unique()
    of_present = present[logits[:, present].argmax(dim=1)].tolist()
    rows = list(zip(labels.tolist(), best, of_present, losses.tolist(), strict=True))
    return score_classification(rows, [f"class {i}" for i in range(logits.shape[1])])


@pytest.mark.parametrize(("num_classes", "count"), [(10, 203), (3, 40), (2, 5), (5, 50)])
def test_against_counting_and_torchmetrics(num_classes, count):
    logits, labels, losses = case(num_classes, count)
    got = score(logits, labels, losses)
    ranks = [sorted(range(num_classes), key=lambda c: -row[c]).index(y) for row, y in zip(logits, labels, strict=True)]
    assert got["top1"] == pytest.approx(100 * sum(rank == 0 for rank in ranks) / count, abs=1e-9)
    assert got["top5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / count, abs=1e-9)
    assert got["val_loss"] == pytest.approx(losses.double().mean().item(), rel=1e-12)
    frequent = max(labels.tolist().count(c) for c in range(num_classes))
    assert got["most_frequent_class"] == pytest.approx(100 * frequent / count, abs=1e-9)
    for c in range(num_classes):
        of_class = [rank == 0 for rank, label in zip(ranks, labels, strict=True) if label == c]
        expected = pytest.approx(100 * sum(of_class) / len(of_class), abs=1e-9) if of_class else None
        assert got["per_class_accuracy"][f"class {c}"] == expected
    assert got["per_class_accuracy"][f"class {num_classes - 1}"] is None
    for name, k in (("top1", 1), ("top5", min(5, num_classes))):
        theirs = multiclass_accuracy(logits, labels, num_classes, average="micro", top_k=k)
        assert got[name] == pytest.approx(100 * theirs.item(), abs=1e-4)
    logits_of_present = logits.numpy().copy()
    logits_of_present[:, num_classes - 1] = -np.inf  # the class without images
    expected = 100 * (logits_of_present.argmax(axis=1) == labels.numpy()).mean()
    assert got["subset_top1"] == pytest.approx(expected) and got["subset_top1"] >= got["top1"]
    theirs = multiclass_accuracy(logits, labels, num_classes, average="none")
    ours = list(got["per_class_accuracy"].values())
    assert ours[:-1] == pytest.approx((100 * theirs).tolist()[:-1], abs=1e-4)


def test_labels_without_a_name_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        score_classification([(2, [0, 1], 0, 1.0)], ["a", "b"])


def test_labels_against_torchmetrics():
    """A label that all or no images have is left out of the means."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (57, 4), generator=generator)
    labels[:, 2], labels[:, 3] = 0, 1
    probabilities = (torch.randn(57, 4, generator=generator) + labels).sigmoid()
    rows = list(zip(labels.numpy(), probabilities.numpy(), [0.5] * 57, strict=True))
    got = score_labels(rows, list("abcd"))
    for key, theirs in (
        ("ap", multilabel_average_precision),
        ("auroc", multilabel_auroc),
        ("f1", multilabel_f1_score),
    ):
        expected = (100 * theirs(probabilities[:, :2], labels[:, :2], 2, average="none")).tolist()
        *known, of_none, of_all = got[f"per_label_{key}"].values()
        assert known == pytest.approx(expected, abs=1e-4) and of_none is None and of_all is None
        assert got[f"mean_{key}"] == pytest.approx(sum(expected) / 2, abs=1e-4)
    assert got["val_loss"] == 0.5
    alone = score_labels([row for row in rows if row[0].tolist() == rows[0][0].tolist()], list("abcd"))
    assert alone["mean_ap"] is alone["mean_auroc"] is alone["mean_f1"] is None  # there is nothing to rank


def test_numbers_against_torchmetrics():
    """A column of one value has no R2 and is left out of the mean."""
    rng = np.random.default_rng(0)
    true = np.stack([rng.normal(1e6, 10, 43), rng.normal(0, 1, 43), np.full(43, 7.0)], axis=1)
    predicted = true + rng.normal(0, [5, 2, 1], true.shape)
    got = score_numbers(list(zip(true, predicted, [0.25] * 43, strict=True)), list("abc"))
    for column, name in enumerate("abc"):
        both = [torch.from_numpy(np.ascontiguousarray(values[:, column])) for values in (predicted, true)]
        assert got["per_column_mae"][name] == pytest.approx(regression.mean_absolute_error(*both).item(), rel=1e-9)
        squares = regression.mean_squared_error(*both, squared=False)
        assert got["per_column_rmse"][name] == pytest.approx(squares.item(), rel=1e-9)
        centred = [values - true[:, column].mean() for values in both]  # torchmetrics sums uncentred squares
        expected = None if name == "c" else pytest.approx(regression.r2_score(*centred).item(), rel=1e-6)
        assert got["per_column_r2"][name] == expected
    assert got["mean_r2"] == (got["per_column_r2"]["a"] + got["per_column_r2"]["b"]) / 2


def masks(num_classes, count, *, seed=0):
    """Return predictions that are often right, and annotations with void.

    The last class is in neither, the one before it is never annotated, the third last never predicted.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        shape = rng.integers(5, 40, 2)
        annotation = rng.choice(num_classes - 2, shape)
        prediction = np.where(rng.random(shape) < 0.6, annotation, rng.integers(0, num_classes - 1, shape))
        prediction[prediction == num_classes - 3] = 0
        annotation[rng.random(shape) < 0.2] = 255
        pairs.append((prediction.astype(np.uint8), annotation.astype(np.uint8)))
    return pairs


def segmentation_score(pairs, num_classes):
    areas = [segmentation_areas(*map(torch.from_numpy, pair), num_classes).tolist() for pair in pairs]
    return score_segmentation(list(enumerate(areas)), [f"class {i}" for i in range(num_classes)])


@pytest.mark.parametrize("num_classes", [4, 19])
def test_segmentation_against_sets_of_pixels(num_classes):
    pairs = masks(num_classes, 5)
    prediction, annotation = (np.concatenate([pair[side].ravel() for pair in pairs]).tolist() for side in (0, 1))
    valid = [i for i, label in enumerate(annotation) if label != 255]
    ious, accuracies = [], []
    for c in range(num_classes):
        predicted = {i for i in valid if prediction[i] == c}
        labelled = {i for i in valid if annotation[i] == c}
        ious.append(100 * len(predicted & labelled) / len(predicted | labelled) if predicted | labelled else None)
        accuracies.append(100 * len(predicted & labelled) / len(labelled) if labelled else None)
    got = segmentation_score(pairs, num_classes)
    assert list(got["per_class_iou"].values()) == pytest.approx(ious, abs=1e-12)
    assert list(got["per_class_accuracy"].values()) == pytest.approx(accuracies, abs=1e-12)
    assert ious[-3:] == [0, 0, None] and accuracies[-3:] == [0, None, None]
    known = [iou for iou in ious if iou is not None]
    assert len(known) == num_classes - 1
    assert got["mean_iou"] == pytest.approx(sum(known) / len(known), abs=1e-12)
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    assert got["mean_accuracy"] == pytest.approx(sum(known) / len(known), abs=1e-12)
    right = sum(prediction[i] == annotation[i] for i in valid)
    assert got["overall_accuracy"] == pytest.approx(100 * right / len(valid), abs=1e-12)
    assert segmentation_score(pairs[::-1], num_classes) == got


def test_areas_beyond_32_bits_are_summed():
    rows = [(0, [[2**40, 0], [2**40, 2**40], [2**41, 0]]), (1, [[0, 2**40]] * 3)]
    assert score_segmentation(rows[:1], ["a", "b"])["per_class_iou"] == {"a": 50, "b": 0}
    got = score_segmentation(rows, ["a", "b"])
    assert got["per_class_iou"] == {"a": 50, "b": 50} and got["per_class_accuracy"] == {"a": 50, "b": 100}


def test_an_annotation_of_void_counts_nowhere():
    void = (np.zeros((4, 4), np.uint8), np.full((4, 4), 255, np.uint8))
    pairs = masks(4, 2)
    assert segmentation_score([void, *pairs], 4) == segmentation_score(pairs, 4)


def test_sample_of_ade20k(real_images):
    """The predictions of three images equal their annotations; label 0 in the files is void."""
    folder = real_images / "ade20k_sample"
    pairs = []
    for path in sorted((folder / "annotations" / "validation").glob("*.png")):
        files = (folder / "predictions" / "validation" / path.name, path)
        pairs.append([np.asarray(Image.open(file)) - np.uint8(1) for file in files])  # void becomes 255
    got = segmentation_score(pairs, 150)
    present = [iou for iou in got["per_class_iou"].values() if iou is not None]
    assert len(pairs) == 3 and len(present) == 15 and got["mean_iou"] == 100.0 == got["overall_accuracy"]
    assert round(sum(present) / 150 / 100, 4) == 0.1


def detections_of(truths, rng):
    """Return zero to two detections near each object, some of them of another class."""
    records = []
    for truth in truths:
        x, y, w, h = truth["bbox"]
        for _ in range(int(rng.integers(0, 3))):
            dx, dy, dw, dh = rng.normal(0, 0.06, 4) * [w, h, w, h]
            label = truth["category_id"] if rng.random() < 0.8 else int(rng.integers(1, 4))
            box = [x + dx, y + dy, max(1, w + dw), max(1, h + dh)]
            records.append(dict(bbox=box, category_id=label, score=float(rng.random())))
    return records


def masked(record, size):
    x, y, w, h = record["bbox"]
    mask = np.zeros(size, np.uint8)
    mask[max(0, round(y)) : round(y + h), max(0, round(x)) : round(x + w)] = 1
    rle = coco_masks.encode(np.asfortranarray(mask))
    return {**record, "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}


@pytest.mark.parametrize("name, kind", [("box", "bbox"), ("mask", "segm")])
def test_detections_are_scored_as_pycocotools_scores_files(tmp_path, name, kind):
    """The data have crowds, images without objects, a class without objects and one that is never detected."""
    rng, rows, size = np.random.default_rng(0), [], (120, 160)
    for index in range(30):
        truths = []
        for _ in range(0 if index % 7 == 3 else int(rng.integers(1, 6))):
            w, h = rng.uniform(8, 110, 2)
            box = [float(rng.uniform(0, 160 - w)), float(rng.uniform(0, 120 - h)), float(w), float(h)]
            truth = dict(bbox=box, category_id=int(rng.integers(1, 4)), iscrowd=int(rng.random() < 0.1))
            truths.append(masked(truth | dict(area=box[2] * box[3] * 0.9), size))
        found = [masked(record, size) for record in detections_of(truths, rng)]
        rows.append((index, size, truths, [record for record in found if record["category_id"] != 3]))
    classes = ["a", "b", "never found", "absent"]
    scores = score_detection(rows[::-1], classes, masks=True)
    content = dict(images=[dict(id=i, height=120, width=160) for i in range(30)], annotations=[])
    content["categories"] = [dict(id=i + 1, name=each) for i, each in enumerate(classes)]
    results = []
    for index, _, truths, found in rows:
        for truth in truths:
            content["annotations"].append(truth | dict(image_id=index, id=len(content["annotations"]) + 1))
        kept = ("category_id", "score", kind if kind == "bbox" else "segmentation")
        results += [{key: record[key] for key in kept} | dict(image_id=index) for record in found]
    (tmp_path / "truths.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    truths = COCO(str(tmp_path / "truths.json"))
    evaluation = COCOeval(truths, truths.loadRes(str(tmp_path / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ends = ("", "50", "75", "_small", "_medium", "_large")
    for value, end in zip(evaluation.stats[:6], ends, strict=True):
        assert value >= 0 and abs(scores[f"{name}_ap{end}"] - 100 * value) < 1e-9
    assert scores[f"{name}_ap"] > 10
    per_class = scores[f"per_class_{name}_ap"]
    assert per_class["never found"] == 0 and per_class["absent"] is None and per_class["a"] > 0
    assert np.mean([per_class[each] for each in classes[:3]]) == pytest.approx(scores[f"{name}_ap"], abs=1e-9)


def test_nothing_detected_scores_zero_and_nothing_to_detect_none():
    truth = dict(bbox=[1.0, 2.0, 10.0, 10.0], category_id=1, iscrowd=0, area=100.0)
    nothing = score_detection([(0, (20, 20), [truth], []), (1, (20, 20), [], [])], ["a"], masks=False)
    assert nothing["box_ap"] == 0 and nothing["box_ap_large"] is None and "mask_ap" not in nothing
    found = dict(bbox=[1.0, 2.0, 10.0, 10.0], category_id=1, score=0.5)
    assert score_detection([(0, (20, 20), [truth], [found])], ["a"], masks=False)["box_ap"] == pytest.approx(100)
    assert score_detection([(0, (20, 20), [], [found])], ["a"], masks=False)["box_ap"] is None
