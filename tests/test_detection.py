"""Tests of annotated objects in every layout, and of the augmentation of their boxes and masks."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as coco_masks

from data import coco, detection, files
from data.annotations import open_objects
from data.batches import FIXED_EPOCH
from data.decode import DamagedImage, PixelFormat
from data.detection import DetectionDataset, EvaluationImages, as_truths, decode_rle, fit, paste_masks, training_sample
from data.index import DataError
from data.objects import Objects, SceneObjects
from data.sampling import sample_generator

PIXELS = PixelFormat()
CLASSES = ["cell", "dot"]
BOXES = {"b/one.png": [(4, 6, 30, 26, 0), (20, 2, 40, 12, 1)], "two.png": [], "z.png": [(0, 0, 8, 30, 1)]}
SIZES = {"b/one.png": (32, 48), "two.png": (40, 40), "z.png": (30, 20)}


def write_images(folder, names=BOXES):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        height, width = SIZES[name]
        Image.new("RGB", (width, height), (10, 20, 30)).save(folder / name)


def coco_content(**masks):
    """Return the objects as COCO annotations, with class numbers that have gaps and are not sorted."""
    content = dict(images=[], annotations=[], categories=[dict(id=7, name="dot"), dict(id=3, name="cell")])
    for number, (name, boxes) in enumerate(BOXES.items()):
        height, width = SIZES[name]
        content["images"].append(dict(id=10 + number, file_name=name, height=height, width=width))
        for x1, y1, x2, y2, label in boxes:
            box = dict(image_id=10 + number, category_id=(3, 7)[label], bbox=[x1, y1, x2 - x1, y2 - y1], iscrowd=0)
            content["annotations"].append(box | {key: make(x1, y1, x2, y2) for key, make in masks.items()})
    return content


def polygon(x1, y1, x2, y2):
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def write_coco(root, content=None, *, years=True):
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017") if years else ("train", "val"):
        write_images(root / split)
        text = json.dumps(content if content is not None else coco_content(segmentation=polygon))
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root


def write_voc(root):
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "Annotations" / "b").mkdir(parents=True)
    write_images(root / "JPEGImages")
    for name, boxes in BOXES.items():
        height, width = SIZES[name]
        objects = "".join(
            f"<object><name>{CLASSES[label]}</name><difficult>0</difficult><bndbox><xmin>{x1 + 1}</xmin>"
            f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for x1, y1, x2, y2, label in boxes
        )
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
        (root / "Annotations" / name).with_suffix(".xml").write_text(text)
    for split in ("train", "val"):
        lines = [name.removesuffix(".png") for name in reversed(BOXES)]
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(lines))
    return root


def write_yolo(root, *, split_first=False, masks=False):
    for split in ("train", "val"):
        images, labels = (root / split / k if split_first else root / k / split for k in ("images", "labels"))
        write_images(images)
        for name, boxes in BOXES.items():
            path, (height, width) = (labels / name).with_suffix(".txt"), SIZES[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            scale, lines = np.array([width, height]), []
            for *box, label in boxes:
                corners = np.reshape(box, (2, 2)) / scale
                values = [*corners.mean(axis=0), *(corners[1] - corners[0])]
                if masks:
                    values = (np.reshape(polygon(*box)[0], (4, 2)) / scale).ravel()
                lines.append(" ".join(map(str, [label, *values])))
            if lines:
                path.write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: {0: cell, 1: dot}")
    return root


LAYOUTS = {
    "coco": (write_coco, [3, 7], True),
    "coco without years": (lambda root: write_coco(root, coco_content(), years=False), [3, 7], False),
    "voc": (write_voc, [1, 2], False),
    "yolo": (write_yolo, [0, 1], False),
    "roboflow": (lambda root: write_yolo(root, split_first=True, masks=True), [0, 1], True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_objects(tmp_path, layout):
    write, class_ids, has_masks = LAYOUTS[layout]
    for source in open_objects(str(write(tmp_path / "data")), PIXELS):
        assert source.classes == CLASSES and source.class_ids == class_ids and (not source.lacks_masks) == has_masks
        names = [source.name(i).split("train2017/")[-1].split("val2017/")[-1] for i in range(len(source))]
        assert all(name.endswith(own) for name, own in zip(names, BOXES, strict=True))  # by the bytes of their names
        for index, (name, boxes) in enumerate(BOXES.items()):
            objects = source.objects(index, SIZES[name])
            np.testing.assert_allclose(objects.boxes, [box[:4] for box in boxes] if boxes else np.zeros((0, 4)))
            assert objects.labels.tolist() == [box[4] for box in boxes] and not objects.crowd.any()
            np.testing.assert_allclose(objects.areas, [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2, _ in boxes])
            if has_masks:
                polygons = [np.asarray(mask[0]) for mask in objects.masks]
                np.testing.assert_allclose(polygons, [polygon(*box[:4])[0] for box in boxes] if boxes else polygons)
            assert (objects.masks is None) == (not has_masks)


def test_large_annotations_are_parsed_once(tmp_path, monkeypatch):
    """The index is cached until the annotation file or the names of the images change."""
    root, cache, parsed, parse = write_coco(tmp_path / "data"), str(tmp_path / "cache"), [], coco._read_coco
    monkeypatch.setattr(coco, "_read_coco", lambda file: parsed.append(file.name) or parse(file))
    monkeypatch.setattr(files, "CACHED_FROM", 1)

    def reopen(seconds):
        parsed.clear()
        os.utime(root / "annotations" / "instances_train2017.json", (seconds, seconds))
        return open_objects(str(root), PIXELS, cache=cache)

    os.utime(root / "annotations" / "instances_val2017.json", (1e9, 1e9))
    first, count = reopen(1e9), len(parsed)
    again, later = reopen(1e9), len(parsed)
    assert (count, later) == (2, 0)
    for one, other in zip(first, again, strict=True):
        assert one.fingerprint() == other.fingerprint() and one.notes == other.notes
        assert (one.image_ids, one.class_ids, one.lacks_masks) == (other.image_ids, other.class_ids, other.lacks_masks)
        for ours, theirs in zip(one.objects(0, (32, 48)), other.objects(0, (32, 48)), strict=True):
            assert np.array_equal(ours, theirs)
    reopen(1e9 + 1)
    assert parsed == ["instances_train2017.json"]
    Image.new("RGB", (9, 9)).save(root / "train2017" / "extra.png")
    assert reopen(1e9 + 1)[0].notes[0].startswith("not read   1 images") and len(parsed) == 1
    assert len([*Path(cache).glob("index-*/objects.npy")]) == 2  # the old one is replaced


def test_masks_take_little_memory_while_they_are_parsed(tmp_path):
    corners = np.random.default_rng(0).uniform(0, 30, 60).round(2).tolist()
    content = coco_content(segmentation=lambda *box: [corners])
    content["annotations"] *= 150
    file = write_coco(tmp_path / "data", content) / "annotations" / "instances_train2017.json"
    tracemalloc.start()
    coco.open_coco(tmp_path / "data", "train2017", file, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * file.stat().st_size


def test_crowds_and_boxes_without_area(tmp_path):
    content = coco_content(segmentation=polygon)
    rle = dict(counts=[0, 32 * 48], size=[32, 48])
    shared = dict(image_id=10, category_id=3)
    content["annotations"] += [
        dict(shared, bbox=[0, 0, 48, 32], iscrowd=1, segmentation=rle, area=100),
        dict(shared, bbox=[50, 3, 10, 10], segmentation=polygon(50, 3, 60, 13)),
        dict(shared, bbox=[5, 5, 0, 4], segmentation=polygon(5, 5, 5, 9)),
        dict(shared, bbox=[5, 5, 3, -4], segmentation=polygon(5, 5, 8, 1)),
    ]
    train, _ = open_objects(str(write_coco(tmp_path / "data", content)), PIXELS)
    (note,) = train.notes
    assert note.startswith("left out   3 boxes outside their image or of no area in ") and note.endswith(": b/one.png")
    objects = train.objects(0, SIZES["b/one.png"])
    assert objects.crowd.tolist() == [False, False, True] and objects.areas[2] == 100 and not train.lacks_masks
    image = torch.zeros(3, *SIZES["b/one.png"], dtype=torch.uint8)
    options = dict(side=64, scales=(1, 1), fill=[0, 0, 0], masks=True)
    *_, labels, masks = training_sample(image, objects, np.random.default_rng(0), **options)
    assert len(labels) == len(masks) == 2


def test_images_that_no_annotation_lists_are_not_read(tmp_path):
    root = write_coco(tmp_path / "data")
    Image.new("RGB", (9, 9)).save(root / "train2017" / "extra.png")
    train, held_out = open_objects(str(root), PIXELS)
    assert len(train) == 3 and held_out.notes == []
    assert train.notes[0].startswith("not read   1 images in ") and "instances_train2017.json" in train.notes[0]


def test_crowds_and_objects_without_masks(tmp_path):
    """A crowd without a mask gets its box as mask. Any other object without a mask disables masks, with a note."""
    content = coco_content(segmentation=polygon)
    content["annotations"].append(dict(image_id=10, category_id=3, bbox=[2, 3, 10, 20], iscrowd=1))
    train, _ = open_objects(str(write_coco(tmp_path / "crowd", content)), PIXELS)
    assert not train.lacks_masks and train.notes == []
    objects = train.objects(0, SIZES["b/one.png"])
    assert objects.masks[2] == polygon(2, 3, 12, 23) and as_truths(objects)[2]["segmentation"] == objects.masks[2]
    del content["annotations"][0]["segmentation"]
    train, _ = open_objects(str(write_coco(tmp_path / "single", content)), PIXELS)
    assert train.lacks_masks.startswith("1 of 3 objects in ") and train.lacks_masks.endswith(" have no mask: b/one.png")
    assert train.notes == [f"boxes only {train.lacks_masks}"] and train.objects(0, SIZES["b/one.png"]).masks is None


def test_splits_of_crowds_alone_are_refused(tmp_path):
    """There is nothing to learn from them, and their average precision is undefined."""
    root, yolo = write_coco(tmp_path / "data"), write_yolo(tmp_path / "yolo")
    for name in ("train2017", "val2017"):
        content = coco_content(segmentation=polygon)
        content["annotations"] = [record | dict(iscrowd=1) for record in content["annotations"]]
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    shutil.rmtree(yolo / "labels" / "val" / "b")
    (yolo / "labels" / "val" / "z.txt").unlink()
    for folder, places in ((root, ["instances_train2017.json", "instances_val2017.json"]), (yolo, ["labels/val"])):
        with pytest.raises(DataError) as error:
            open_objects(str(folder), PIXELS)
        expected = [f"{place} has no objects that can be scored (only crowds); give images" for place in places]
        assert all(text in line for text, line in zip(expected, str(error.value).splitlines(), strict=True))


def test_numbers_of_yolo_classes_may_have_gaps(tmp_path):
    root = write_yolo(tmp_path / "data")
    for path in root.rglob("*.txt"):
        path.write_text("".join("10" + line[1:] if line[0] == "1" else line for line in path.open()))
    (root / "data.yaml").write_text("names: {'10': dot, '2': none, '0': cell}")  # sorted as numbers, not as text
    train, _ = open_objects(str(root), PIXELS)
    assert train.classes == ["cell", "none", "dot"] and train.class_ids == [0, 2, 10]
    assert train.objects(0, SIZES["b/one.png"]).labels.tolist() == [0, 2]
    (root / "data.yaml").write_text("names: {0: cell, 10: cell}")
    with pytest.raises(DataError, match="has classes of the same name: cell; rename one of each"):
        open_objects(str(root), PIXELS)


def test_lists_of_voc_may_say_whether_a_class_is_there(tmp_path):
    root = write_voc(tmp_path / "data")
    for folder in ("JPEGImages", "Annotations"):
        for path in (root / folder).glob("two.*"):
            path.rename(path.with_stem("two 7"))
    (root / "Annotations/two 7.xml").write_text((root / "Annotations/two 7.xml").read_text().replace("two", "two 7"))
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_text("b/one  1\ntwo 7 -1\nz  0\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("z\nz\n")
    with pytest.raises(DataError, match=r"val\.txt lists images twice: z\.png; keep one"):
        open_objects(str(root), PIXELS)
    (root / "ImageSets" / "Main" / "val.txt").write_text("z\n")
    train, _ = open_objects(str(root), PIXELS)
    assert [train.name(i).split("JPEGImages/")[1] for i in range(3)] == ["b/one.png", "two 7.png", "z.png"]


def test_difficult_objects_of_voc_are_crowd(tmp_path):
    root = write_voc(tmp_path / "data")
    path = root / "Annotations" / "z.xml"
    path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    train, _ = open_objects(str(root), PIXELS)
    assert train.objects(2, SIZES["z.png"]).crowd.tolist() == [True]


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


def broken(*change):
    """Return COCO annotations with the value at a path of keys replaced; None removes it."""
    content = coco_content()
    *path, last, value = change
    part = content
    for key in path:
        part = part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return content


BAD = {
    "no categories": (broken("categories", None), "has no list 'categories'"),
    "no bbox": (broken("annotations", 0, "bbox", None), "annotations without 'bbox'"),
    "a list": ([], "has no list 'images'"),
    "no size": (broken("images", 1, "width", None), "images without 'width'"),
    "three numbers": (broken("annotations", 0, "bbox", [1, 2, 3]), "with the bbox [1, 2, 3]; expected four numbers"),
    "an unknown class": (broken("annotations", 0, "category_id", 4), "unknown category_id: 4"),
    "an unknown image": (broken("annotations", 0, "image_id", 4), "unknown image_id: 4"),
    "an absent image": (broken("images", 2, "file_name", "lost.png"), "lacks: lost.png"),
    "a number for an image": (broken("images", 1, 5), "images with 5; expected an object with id, file_name"),
    "a height in words": (
        broken("images", 1, "height", "tall"),
        "images with the height tall; expected a whole",
    ),
    "an area in words": (broken("annotations", 1, "area", "x"), "with the area x; expected a number of pixels"),
    "a class in words": (
        broken("annotations", 1, "category_id", "x"),
        "with the category_id x; expected a whole",
    ),
    "seven numbers": (broken("annotations", 0, "segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "expected polygons of x, y"),
    "words": (broken("annotations", 0, "segmentation", [["a"] * 6]), "expected polygons of x, y"),
    "no counts": (broken("annotations", 0, "segmentation", dict(size=[32, 48])), "or RLE with counts and size"),
    "a short RLE": (broken("annotations", 0, "segmentation", dict(size=[32, 48], counts=[3])), "or RLE with counts"),
    "a compressed RLE of no sense": (
        broken("annotations", 0, "segmentation", dict(size=[32, 48], counts="zz")),
        "or RLE with counts",
    ),
    "a huge polygon": (broken("annotations", 0, "segmentation", [[1e308] * 6]), "expected polygons of x, y"),
    "a small RLE": (
        broken("annotations", 0, "segmentation", dict(size=[2, 3], counts="15")),
        "annotations with RLE of 2 x 3 pixels in an image of 32 x 48",
    ),
    "no objects": (broken("annotations", []), "has an empty list 'annotations'; give annotated images"),
    "two images of a number": (broken("images", 1, "id", 10), "images with the same id: 10; keep one of each"),
    "an image twice": (broken("images", 1, "file_name", "z.png"), "images with the same file_name: z.png"),
    "a class twice": (broken("categories", 1, "name", "dot"), "categories with the same name: dot"),
    "another size": (broken("images", 0, "width", 47), "has 32 x 48 pixels, and its annotations are for 32 x 47"),
}


@pytest.mark.parametrize("case", BAD)
def test_annotations_that_cannot_be_used(tmp_path, case):
    content, words = BAD[case]
    with pytest.raises(DataError) as error:
        open_objects(str(write_coco(tmp_path / "data", content)), PIXELS)
    lines = str(error.value).splitlines()  # one per split
    assert len(lines) == (1 if case == "another size" else 2) and all(words in line for line in lines)


def test_folders_that_cannot_be_used(tmp_path):
    def refusal(root, **options):
        with pytest.raises(DataError) as error:
            open_objects(str(root), PIXELS, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a folder; expected COCO's" in refusal(tmp_path / "nowhere")
    write_images(tmp_path / "images")
    assert "has no annotations of objects" in refusal(tmp_path)
    assert "which has its own" in refusal("builtin:shapes", class_file="x")
    coco = write_coco(tmp_path / "coco")
    assert "names its classes in its annotations" in refusal(coco, class_file="x")
    (coco / "annotations" / "instances_val2017.json").write_text("{")
    assert "cannot be read" in refusal(coco)
    (coco / "annotations" / "instances_val2017.json").unlink()
    assert "has no validation split; give --path_to_validation_data" in refusal(coco)
    yolo = write_yolo(tmp_path / "yolo")
    assert "the classes of training and validation images differ (a)" in refusal(
        coco, validation=renamed(yolo, tmp_path)
    )
    (yolo / "labels" / "val" / "z.txt").write_text("2 0.5 0.5 0.1 0.1")
    assert "expected a class (0, 1), and" in refusal(yolo)
    (yolo / "data.yaml").unlink()
    assert "does not name its classes" in refusal(yolo)
    voc = write_voc(tmp_path / "voc")
    (voc / "Annotations" / "two.xml").write_text("<annotation>")
    assert "two.xml cannot be read" in refusal(voc)


def renamed(yolo, tmp_path):
    copy = shutil.copytree(yolo, tmp_path / "renamed")
    (copy / "data.yaml").write_text("names: [a, b]")
    return str(copy)


def test_validation_from_a_folder_of_its_own(tmp_path):
    coco, voc = write_coco(tmp_path / "coco"), write_voc(tmp_path / "voc")
    (coco / "annotations" / "instances_val2017.json").unlink()
    train, held_out = open_objects(str(coco), PIXELS, validation=str(voc))
    assert train.class_ids == [3, 7] and held_out.class_ids == [1, 2]
    assert train.fingerprint() != held_out.fingerprint()
    same, _ = open_objects(str(write_coco(tmp_path / "elsewhere")), PIXELS)
    assert same.fingerprint() == train.fingerprint()


# Augmentation


@pytest.fixture(scope="module")
def scenes() -> SceneObjects:
    source = SceneObjects("validation", 3)
    from data import shapes

    images, labels, masks = shapes.draw_range(range(40))
    source.images, source.labels, source.masks, source.size = images, labels, masks, 40
    return source


def iou(one, other):
    return (one & other).sum() / max(1, (one | other).sum())


def test_scenes_give_boxes_and_masks_of_their_shapes(scenes):
    for index in range(len(scenes)):
        objects, labels = scenes.objects(index, (64, 64)), scenes.masks[index]
        assert objects.labels.tolist() == [label - 1 for label in np.unique(labels) if label]
        for box, label, area, mask in zip(*objects[:2], objects.areas, objects.masks, strict=True):
            rows, columns = np.nonzero(labels == label + 1)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == len(rows) and (coco_masks.decode(mask).astype(bool) == (labels == label + 1)).all()


def painted(scenes, index):
    """Return an image in which each of up to three objects is white in its own channel, and the objects."""
    objects = scenes.objects(index, (64, 64))
    objects = Objects(*(part[:3] for part in objects))
    image = np.zeros((3, 64, 64), np.uint8)
    for channel, mask in zip(image, objects.masks, strict=False):
        channel[:] = 255 * coco_masks.decode(mask)
    return torch.from_numpy(image), objects


def whole(parts, boxes, side):
    """Return masks (n, side, side) from their parts in boxes."""
    pixels = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *(part.ravel() for part in parts)]))
    return paste_masks(pixels, torch.from_numpy(boxes), side).numpy()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 2.0), (0.5, 1.0)])
def test_masks_of_transformed_scenes_are_transformed_masks(scenes, scales):
    """An image painted with its masks is resized, cropped, padded and flipped as the masks are."""
    worst = []
    for index in range(len(scenes)):
        image, objects = painted(scenes, index)
        options = dict(side=128, scales=scales, fill=[0, 0, 0], masks=True)
        view, (h, w), boxes, labels, masks = training_sample(image, objects, np.random.default_rng(index), **options)
        assert view.shape == (3, 128, 128) and (view[:, h:] == 0).all() and (view[:, :, w:] == 0).all()
        channels = {label + 1: channel for channel, label in enumerate(objects.labels)}
        for box, label, mask in zip(boxes, labels, whole(masks, boxes, 128), strict=True):
            channel = view[channels[label]].numpy() >= 128
            if channel.sum() > 200:
                worst.append(iou(mask.astype(bool), channel))
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert len(worst) > 30 and min(worst) > 0.95, sorted(worst)[:5]


def test_polygons_are_transformed_as_pixels_are():
    corners = np.array([[10, 12], [80, 20], [60, 70], [15, 50]], float)
    canvas = Image.new("L", (96, 80))
    ImageDraw.Draw(canvas).polygon([tuple(each) for each in corners - 0.5], fill=255)
    pixels = np.asarray(canvas)
    rle = coco_masks.encode(np.asfortranarray(pixels // 255))
    box = [[*corners.min(axis=0), *corners.max(axis=0)]]
    rest = (np.zeros(1, np.int64), np.zeros(1, bool), np.ones(1))
    image = torch.from_numpy(np.repeat(pixels[None], 3, axis=0).copy())
    for seed in range(12):
        results = []
        for mask in ([corners.ravel().tolist()], rle):
            objects = Objects(np.array(box), *rest, [mask])
            options = dict(side=96, scales=(0.4, 2.0), fill=[0, 0, 0], masks=True)
            results.append(training_sample(image, objects, np.random.default_rng(seed), **options))
        for view, _, boxes, _, masks in results:
            for mask in whole(masks, boxes, 96):
                assert iou(mask.astype(bool), view[0].numpy() >= 128) > 0.95
        boxes_alone = training_sample(
            image, objects, np.random.default_rng(seed), side=96, scales=(0.4, 2.0), fill=[0, 0, 0], masks=False
        )
        assert boxes_alone[4] is None
        for box_alone, of_mask in zip(boxes_alone[2], results[0][2], strict=True):  # contains the rest of the object
            assert (box_alone[:2] <= of_mask[:2] + 1).all() and (box_alone[2:] >= of_mask[2:] - 1).all()


def test_runs_of_uncompressed_rle_are_read():
    mask = decode_rle(dict(counts=[2, 3, 1], size=[3, 2]), (3, 2))
    assert mask.tolist() == [[0, 1], [0, 1], [1, 0]]


def test_the_longest_side_fits_and_the_rest_is_filled():
    view, size = fit(torch.full((3, 20, 40), 200, dtype=torch.uint8), 32, [1, 2, 3])
    assert size == (16, 32) and (view[:, :16] == 200).all() and view[:, 16:].amax(dim=(1, 2)).tolist() == [1, 2, 3]
    assert fit(torch.zeros(3, 1, 100, dtype=torch.uint8), 32, [0] * 3)[1] == (1, 32)


# Data sets


def same(one, other):
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


OPTIONS = dict(side=64, scales=(0.1, 2.0), fill=[0, 0, 0], masks=True)


def test_a_sample_depends_on_seed_epoch_and_index_alone(scenes):
    dataset = DetectionDataset(scenes, pixels=PIXELS, seed=0, **OPTIONS)
    batch = dataset.__getitems__([(0, 3), (0, 5), (1, 3)])
    again = DetectionDataset(scenes, pixels=PIXELS, seed=0, **OPTIONS).__getitems__([(1, 3), (0, 3)])
    targets, others = batch.targets(torch.device("cpu")), again.targets(torch.device("cpu"))
    for ours, theirs in ((2, 0), (0, 1)):
        assert torch.equal(batch.images[ours], again.images[theirs]) and batch.sizes[ours] == again.sizes[theirs]
        assert same(targets[ours].values(), others[theirs].values())
    assert not torch.equal(batch.images[0], batch.images[2]) and len({*batch.seeds}) == 3
    assert batch.images.dtype == batch.masks.dtype == torch.uint8 and sum(batch.counts) == len(batch.boxes)
    assert not same(
        batch, DetectionDataset(scenes, pixels=PIXELS, seed=1, **OPTIONS).__getitems__([(0, 3), (0, 5), (1, 3)])
    )


def test_masks_of_a_batch_are_those_of_the_crops(scenes, monkeypatch):
    """The pasted masks equal the crops bit by bit, and the batch holds less than a third of their pixels."""
    crops, cut = [], detection._cut_mask
    monkeypatch.setattr(detection, "_cut_mask", lambda *args: crops.append(cut(*args)) or crops[-1])
    dataset = DetectionDataset(scenes, pixels=PIXELS, seed=0, **OPTIONS)
    items = [(epoch, index) for epoch in (0, 1) for index in range(10)]
    batch, rows = dataset.__getitems__(items), iter(crops)
    targets, num_pixels = batch.targets(torch.device("cpu")), 0
    for (epoch, index), (h, w), target in zip(items, batch.sizes, targets, strict=True):
        count, mirrored = len(scenes.objects(index, (64, 64)).boxes), sample_generator(0, epoch, index).random() < 0.5
        expected = np.zeros((count, 64, 64), np.uint8)
        for mask, crop in zip(expected, rows, strict=False):
            mask[:h, :w] = np.fliplr(crop) if mirrored else crop
        expected = torch.from_numpy(expected[expected.any(axis=(1, 2))])
        assert torch.equal(target["masks"], expected) and target["masks"].dtype == torch.uint8
        num_pixels += expected.numel()
    assert next(rows, None) is None and batch.masks.numel() < num_pixels / 3 and max(batch.counts) > 1


def test_damaged_images_are_replaced_in_training_and_reported_in_evaluation(tmp_path):
    root = write_coco(tmp_path / "data")
    (root / "train2017" / "two.png").write_text("no image")
    train, _ = open_objects(str(root), PIXELS)
    dataset = DetectionDataset(train, pixels=PIXELS, seed=0, **OPTIONS | dict(scales=(1, 1)))
    batch = dataset.__getitems__([(0, 1), (0, 2)])
    assert [index for index, _ in batch.damaged] == [1] and batch.counts == [1, 1]
    samples = EvaluationImages(train, pixels=PIXELS, side=64, fill=[0, 0, 0]).__getitems__(
        [(FIXED_EPOCH, i) for i in range(3)]
    )
    assert [bool(sample.damaged) for sample in samples] == [False, True, False] and samples[1].objects is None
    assert samples[0].original == (32, 48) and samples[0].size == (43, 64) and len(samples[0].objects.boxes) == 2
    for path in (root / "train2017").rglob("*.png"):
        path.write_text("no image")
    batch = dataset.__getitems__([(0, 0)])
    assert (
        batch.counts == [0]
        and len(batch.damaged) == 3
        and batch.targets(torch.device("cpu"))[0]["masks"].shape == (0, 64, 64)
    )


def test_images_of_another_size_than_annotated_are_damaged(tmp_path):
    train, _ = open_objects(str(write_coco(tmp_path / "data")), PIXELS)
    with pytest.raises(DamagedImage, match="has 10 x 10 pixels, and its annotations are for 32 x 48"):
        train.objects(0, (10, 10))


def test_real_annotations(real_images):
    train, held_out = open_objects(str(real_images / "bccd"), PIXELS)
    assert (len(train), len(held_out)) == (140, 40) and train.classes == ["RBC", "WBC", "Platelets"]
    assert "have only boxes" in train.lacks_masks and all(len(train.objects(i, (480, 640)).boxes) for i in range(5))
