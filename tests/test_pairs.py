import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import write_images, write_pair
from PIL import Image

from data import shapes
from data.classes import ade20k_classes
from data.decode import PixelFormat
from data.index import DataError
from data.pairs import SegmentationFolder, check_annotations, check_masks, open_pairs
from data.segmentation import SegmentationDataset, read_pair

RGB = PixelFormat(3)


def errors_of(path) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_pairs(str(path), RGB)
    return str(caught.value).splitlines()


def check(source, pixels=RGB, **options):
    """Return the pixels of each class, and the errors of all masks of a source."""
    report = check_masks(source, range(len(source)), pixels, **options)
    return report.counts, report.errors


# Folders


def test_ade20k_has_150_names_and_colours():
    names, colours = ade20k_classes()
    assert len(names) == len(set(names)) == 150 and colours.shape == (150, 3) and colours.dtype == np.uint8
    assert (names[0], names[12], names[149]) == ("wall", "person", "flag")
    assert colours[[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]


def test_pairs_go_by_their_relative_names(tmp_path):
    names = ["b/x.jpg", "a.k.jpg", "a.jpg", "a-b.jpeg", "b/ü.webp", "B.PNG"]  # masks alone would sort as a.k, a
    for number, name in enumerate(names):
        write_pair(tmp_path, "training", name, np.full((4, 4), number, np.uint8))
    (tmp_path / "classes.txt").write_text("one\ntwo")
    source = SegmentationFolder(tmp_path, "training")
    in_order = [os.path.relpath(source.name(i), tmp_path / "images" / "training") for i in range(len(source))]
    assert in_order == sorted(names, key=os.fsencode)
    for i, name in enumerate(in_order):
        assert source.mask_name(i).endswith(os.path.splitext(name)[0] + ".png")
        assert source.fetch_masks([i]) == [Path(source.mask_name(i)).read_bytes()]
        assert source.fetch([i]) == [Path(source.name(i)).read_bytes()]
    assert source.classes == ["one", "two"] and source.labels is None
    files = [path for path in tmp_path.rglob("*.*") if "txt" not in path.name]
    assert source.size_in_bytes() == sum(path.stat().st_size for path in files)
    assert pickle.loads(pickle.dumps(source)).fetch_masks([4, 1]) == source.fetch_masks([4, 1])


def test_the_fingerprint_follows_images_and_masks(pair_folder, tmp_path_factory):
    first = SegmentationFolder(pair_folder, "training").fingerprint()
    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(pair_folder, other)
    assert SegmentationFolder(other, "training").fingerprint() == first
    assert SegmentationFolder(other, "validation").fingerprint() != first
    os.rename(other / "annotations/training/0.png", other / "annotations/training/0.PNG")
    assert SegmentationFolder(other, "training").fingerprint() != first


@pytest.mark.parametrize(
    "text, classes",
    [
        ("sky\nroad\ncar", ["sky", "road", "car"]),
        ("\ufeff1 sky\r\n2\tlight pole \r\n3  car\r\n\n", ["sky", "light pole", "car"]),
        ("sky\n2 wheels\n1 wheel", ["sky", "2 wheels", "1 wheel"]),
        ("Straße\ncar", ["Straße", "car"]),
    ],
)
def test_lists_of_classes(pair_folder, text, classes):
    (pair_folder / "classes.txt").write_text(text, encoding="utf-8")
    assert SegmentationFolder(pair_folder, "training").classes == classes


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no line"),
        ("sky", "names one class; expected at least 2"),
        ("sky\n\ncar", "has an empty line"),
        ("1 sky\n3 car", "has the line '3 car'"),
        ("0 void\n1 sky", "has the line '0 void'"),
        ("1 sky\ncar", "has the line 'car'"),
        ("1 sky\n2", "has the line '2'"),
        ("sky\ncar\nsky", "names classes twice: sky"),
        ("\n".join(map(str, range(-1, 254))), "names 255 classes"),
        (b"sk\xff", "cannot be read"),
    ],
)
def test_bad_lists_of_classes_are_reported_once(pair_folder, text, words):
    (pair_folder / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (error,) = errors_of(pair_folder)
    assert words in error and "classes.txt" in error


def test_classes_of_ade20k_need_no_list(pair_folder):
    os.remove(pair_folder / "classes.txt")
    (error,) = errors_of(pair_folder)
    assert "classes.txt is missing; write a line for each class" in error
    (pair_folder / "objectInfo150.txt").touch()
    assert open_pairs(str(pair_folder), RGB)[0].classes == ade20k_classes()[0]
    with pytest.raises(DataError, match="mistyped is missing"):
        open_pairs(str(pair_folder), RGB, class_file="mistyped")
    os.remove(pair_folder / "objectInfo150.txt")
    for folder in ("images", "annotations"):
        for split, short in (("training", "train"), ("validation", "val")):
            for path in list((pair_folder / folder / split).iterdir()):
                path.rename(path.with_name(f"ADE_{short}_0000000{path.name}"))
    assert open_pairs(str(pair_folder), RGB)[1].classes == ade20k_classes()[0]
    (pair_folder / "classes.txt").write_text("a list that is there\ncounts\nmore")
    assert open_pairs(str(pair_folder), RGB)[1].classes[1] == "counts"


@pytest.mark.parametrize(
    "train, held_out", [("train", "val"), ("Train", "Val"), ("TRAINING", "valid_set"), ("train2017", "test")]
)
def test_splits_have_any_usual_name(pair_folder, train, held_out):
    expected = open_pairs(str(pair_folder), RGB)
    for folder in ("images", "annotations"):
        for split, name in (("training", train), ("validation", held_out)):
            (pair_folder / folder / split).rename(pair_folder / folder / name)
    found = open_pairs(str(pair_folder), RGB)
    assert [source.fingerprint() for source in found] == [source.fingerprint() for source in expected]
    assert any("validation test" in note for note in found[1].notes) == (held_out == "test")
    shutil.rmtree(pair_folder / "annotations" / held_out)
    assert f"has no annotations/{held_out}" in errors_of(pair_folder)[0]


def remove(*paths):
    def change(root):
        for path in paths:
            shutil.rmtree(root / path) if (root / path).is_dir() else os.remove(root / path)

    return change


def copy(source, target):
    return lambda root: shutil.copy(root / source, root / target)


@pytest.mark.parametrize(
    "change, expected",
    [
        (remove("annotations/training/1.png"), ["training) has images without a mask: 1;"]),
        (remove(*(f"annotations/training/{i}.png" for i in range(5))), ["without a mask: 0, 1, 2 and 2 more;"]),
        (remove("images/validation/2.png", "images/validation/0.png"), ["masks without an image: 0, 2;"]),
        (copy("images/training/3.png", "images/training/3.jpg"), ["images with the same name but for the suffix: 3;"]),
        (remove("images/training"), ["has no images/training; expected images/{training,validation}/NAME.jpg"]),
        (remove("images/validation", "annotations/validation"), ["has no images/validation and no annotations/val"]),
        (remove("images", "annotations"), ["has no images/training", "has no images/validation"]),
        (remove("classes.txt", "images/training/4.png"), ["classes.txt is missing", "has masks without an image: 4"]),
        (remove(*(f"annotations/validation/{i}.png" for i in range(3))), ["holds no image; expected files named .png"]),
    ],
)  # fmt: skip
def test_bad_folders_are_reported_in_a_line_each(pair_folder, change, expected):
    change(pair_folder)
    errors = errors_of(pair_folder)
    assert len(errors) == len(expected)
    assert all(words in error for words, error in zip(expected, errors, strict=True)), errors


def test_what_is_no_folder(tmp_path):
    assert errors_of(tmp_path / "nowhere") == [
        f"{tmp_path}/nowhere is not a folder; --path_to_data takes a folder with "
        "images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png, or builtin:shapes"
    ]
    assert "builtin:shapes" in errors_of("builtin:scenes")[0]


def test_other_files_beside_the_masks_are_skipped(pair_folder):
    Image.new("RGB", (80, 60)).save(pair_folder / "annotations/training/3.jpg")
    (pair_folder / "annotations/training/notes.txt").touch()
    train, _ = open_pairs(str(pair_folder), RGB)
    assert [os.path.basename(train.mask_name(i)) for i in range(6)] == [f"{i}.png" for i in range(6)]


# Checking masks


@pytest.mark.parametrize("processes", [1, 2])
def test_masks_are_counted(pair_folder, processes):
    (pair_folder / "classes.txt").write_text("sky\nroad\ncar\nnever")
    source = SegmentationFolder(pair_folder, "training")
    labels = np.concatenate([np.array(Image.open(source.mask_name(i))).ravel() for i in range(5)])
    (pair_folder / "annotations/training/5.png").write_bytes(b"damaged")
    counts, errors = check(source, processes=processes)
    assert counts.tolist() == [(labels == label).sum() for label in (1, 2, 3, 4)] and counts.dtype == np.int64
    assert errors == []


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_a_run_share_the_masks(pair_folder, capfd, rank):
    """Each of two processes reads its share of the masks, and the first one shows a progress bar."""
    sources = dict(zip(("training", "validation"), open_pairs(str(pair_folder), RGB), strict=True))

    def checked(sources):
        there = [check_masks(each, range(len(each))[1 - rank :: 2], RGB) for each in sources.values()]
        share = dict(share=slice(rank, None, 2), gather=lambda here: [*here, there.pop(0)])
        return check_annotations(sources, RGB, **share, processes=1, progress=rank == 0)

    counts = checked(sources)
    assert all(counts[name].tolist() == check(source)[0].tolist() for name, source in sources.items())
    assert ("reading validation masks: 100%" in capfd.readouterr().err) == (rank == 0)
    for path in ("training/2", "training/3", "validation/0"):
        Image.new("RGB", (80, 60)).save(pair_folder / f"annotations/{path}.png")
    with pytest.raises(DataError) as caught:
        checked(sources)
    errors = sorted(str(caught.value).splitlines())
    assert len(errors) == 3 and "/training/2.png has colour" in errors[0] and "/validation/0.png" in errors[2]
    for i in range(3):
        Image.new("L", (80, 60)).save(pair_folder / f"annotations/validation/{i}.png")
    with pytest.raises(DataError, match="no pixel of the validation masks has a class"):
        checked({"validation": sources["validation"]})


def test_masks_of_other_modes(pair_folder):
    labels = np.array(Image.open(pair_folder / "annotations/training/0.png"))
    paletted = Image.fromarray(labels).convert("P")
    paletted.putdata(labels.ravel().tolist())
    paletted.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for i, mask in enumerate((paletted, Image.fromarray(labels.astype(np.uint16)), Image.fromarray(labels > 1))):
        mask.save(pair_folder / f"annotations/training/{i}.png")
        assert Image.open(pair_folder / f"annotations/training/{i}.png").mode in ("P", "I;16", "I", "1")
    source = SegmentationFolder(pair_folder, "training")
    assert check(source)[1] == []
    for i, expected in enumerate((labels, labels, (labels > 1).astype(np.uint8))):
        np.testing.assert_array_equal(
            read_pair(source, i, RGB)[1], np.where(expected == 0, 255, expected.astype(int) - 1)
        )


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.full((60, 80), 4, np.uint8), "has the label 4; expected 0 (void) to 3"),
        (np.full((60, 80), 260, np.uint16), "has the label 260; expected 0 (void) to 3"),
        (np.zeros((60, 80, 3), np.uint8), "has colour or transparency"),
        (np.zeros((60, 80, 2), np.uint8), "has colour or transparency"),
        (np.ones((80, 60), np.uint8), "is 80 x 60 pixels (height x width), its image 60 x 80"),
    ],
)
def test_bad_masks_are_named_at_the_start_and_refused_when_read(pair_folder, mask, words):
    Image.fromarray(mask).save(pair_folder / "annotations/training/2.png")
    source = SegmentationFolder(pair_folder, "training")
    _, (error,) = check(source)
    assert error.startswith(f"{pair_folder}/annotations/training/2.png ") and words in error
    with pytest.raises(DataError) as caught:
        read_pair(source, 2, RGB)
    assert str(caught.value) == error


def test_at_most_five_masks_are_named(pair_folder):
    """The errors of both splits and of two processes are counted together; `gather` plays an equal second process."""
    for path in (pair_folder / "annotations").rglob("*.png"):
        Image.new("RGB", (80, 60)).save(path)
    sources = dict(zip(("training", "validation"), open_pairs(str(pair_folder), RGB), strict=True))
    share = dict(share=slice(None), gather=lambda here: [*here, *here], progress=False)
    for processes in (1, 2):
        with pytest.raises(DataError) as caught:
            check_annotations(sources, RGB, **share, processes=processes)
        errors = str(caught.value).splitlines()
        assert [f"/{i}.png" in error for i, error in enumerate(errors[:5])] == [True] * 5
        assert errors[5:] == ["and 13 more masks like these"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_mask_fits_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # the image is stored rotated by 90 degrees
    (tmp_path / "classes.txt").write_text("one\ntwo")
    write_pair(tmp_path, "training", f"a{suffix}", np.ones((30, 50), np.uint8), exif=exif)
    Image.fromarray(np.ones((50, 30), np.uint8)).save(tmp_path / "annotations/training/a.png")
    source = SegmentationFolder(tmp_path, "training")
    assert check(source)[1] == []
    image, mask = read_pair(source, 0, RGB)
    assert mask.shape == image.shape[1:] == (50, 30)


# Other sources


def test_builtin_shapes():
    train, validation = open_pairs("builtin:shapes", RGB)
    assert (len(train), len(validation)) == (10_000, 1_000) and train.classes == list(shapes.SEGMENTATION_CLASSES)
    validation.prepare()
    counts, errors = check(validation)
    assert counts.sum() == 1_000 * 64 * 64 and counts.shape == (9,) and errors == []
    assert counts[0] > 0.6 * counts.sum()
    _, label, mask = shapes.draw(10_007)
    np.testing.assert_array_equal(
        read_pair(validation, 7, RGB)[1], mask
    )  # the background is a class, and nothing is void
    assert label + 1 in mask


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_pairs_of_a_list_or_a_data_set_are_those_of_the_folder(scenes, tmp_path, form):
    """Pixels, their order and the checks are equal. Class names come from classes.txt beside it or from a flag."""
    paths = {}
    for split in ("training", "validation"):
        images = sorted((scenes / "images" / split).iterdir())
        rows = [(path, scenes / "annotations" / split / f"{path.stem}.png") for path in images]
        paths[split] = str(tmp_path / f"{split}.{form}")
        if form == "csv":
            Path(paths[split]).write_text("path,mask\n" + "".join(f"{image},{mask}\n" for image, mask in rows))
        else:
            columns = {name: [str(row[i]) for row in rows] for i, name in enumerate(("image", "mask"))}
            features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
            datasets.Dataset.from_dict(columns, features).to_parquet(paths[split])
    options = dict(validation=paths["validation"], cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="does not name its classes; give --path_to_classes"):
        open_pairs(paths["training"], RGB, **options)
    shutil.copy(scenes / "classes.txt", tmp_path)
    opened = open_pairs(paths["training"], RGB, **options)
    named = open_pairs(paths["training"], RGB, class_file="ade20k", **options)
    assert named[0].classes == ade20k_classes()[0]
    for one, other in zip(open_pairs(str(scenes), RGB), opened, strict=True):
        assert len(one) == len(other) and one.classes == other.classes
        checked = [check(source, processes=processes) for source, processes in ((one, 1), (other, 2))]
        assert checked[0][1] == checked[1][1] == [] and checked[0][0].tolist() == checked[1][0].tolist()
        for i in range(len(one)):
            assert all(torch.equal(a, b) for a, b in zip(read_pair(one, i, RGB), read_pair(other, i, RGB), strict=True))
        assert os.path.basename(one.mask_name(2)) in other.mask_name(2)
    with pytest.raises(DataError, match="has no validation pairs; give --path_to_validation_data"):
        open_pairs(paths["training"], RGB)
    write_images(tmp_path / "images", 2)
    (tmp_path / "plain.csv").write_text("path\nimages/class_0/0000.jpg\nimages/class_1/0001.jpg\n")
    with pytest.raises(DataError, match="has no masks"):
        open_pairs(str(tmp_path / "plain.csv"), RGB, validation=str(tmp_path / "plain.csv"))


def test_splits_may_be_of_two_kinds_and_shapes_have_their_own(scenes, tmp_path):
    images = sorted((scenes / "images/training").iterdir())
    rows = [f"{image},{scenes / 'annotations/training' / image.stem}.png\n" for image in images]
    (tmp_path / "list.csv").write_text("path,mask\n" + "".join(rows))
    listed, classes_file = str(tmp_path / "list.csv"), str(scenes / "classes.txt")
    train, validation = open_pairs(listed, RGB, validation=str(scenes), class_file=classes_file)
    assert len(train) == 10 and len(validation) == 5 and train.classes == validation.classes
    train, validation = open_pairs(str(scenes), RGB, validation=listed, class_file=classes_file)
    assert len(train) == len(validation) == 10
    shutil.copy(listed, tmp_path / "list.txt")
    options = dict(validation=str(tmp_path / "list.txt"), class_file=classes_file, data_format="list")
    named = open_pairs(str(tmp_path / "list.txt"), RGB, **options)
    assert [len(source) for source in named] == [10, 10] and named[0].fingerprint() == validation.fingerprint()
    for options in (dict(validation="x"), dict(class_file="y")):
        with pytest.raises(DataError, match="does not go with builtin:shapes, which has its own; leave it out"):
            open_pairs("builtin:shapes", RGB, **options)
    with pytest.raises(DataError, match="8-bit images in colour or grey"):
        open_pairs("builtin:shapes", PixelFormat(5))


REAL = dict(camvid=11, clothing=58, membrane=2, ade20k_sample=150, pets=4)


@pytest.mark.parametrize("name", REAL)
def test_real_sets(real_images, name):
    pixels, classes = PixelFormat(1 if name == "membrane" else 3), REAL[name]
    train, validation = open_pairs(str(real_images / name), pixels)
    source = train if name == "pets" else validation  # two of its training images have a wrong suffix
    assert len(source.classes) == classes
    counts, errors = check(source, pixels)
    assert errors == [] and counts.sum() > 0
    options = dict(pixels=pixels, crop_size=32, resize=(128, 32), fill=[124] * pixels.channels, seed=0)
    batch = SegmentationDataset(source, **options).__getitems__([(0, 0), (0, 1)])
    assert batch.damaged == [] and batch.masks[batch.masks < 255].max() < classes
