import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from data import shapes
from data.decode import PixelFormat, decode
from data.files import FolderSource, find_images
from data.index import DataError
from data.sources import (
    ShapesSource,
    check_classes,
    check_labels,
    labels_in,
    match_classes,
    open_sources,
)


def test_a_tree_without_classes(tmp_path):
    write_images(tmp_path / "deep", 3)
    (tmp_path / "top.jpg").write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert len(source) == 4 and source.labels is None and source.classes == []


@pytest.mark.parametrize("name", ["val", "validation"])
def test_training_and_validation_folders(tmp_path, name):
    write_images(tmp_path / "train", 5)
    assert open_sources(str(tmp_path), PixelFormat(3))[1] is None
    write_images(tmp_path / name, 3)
    train, validation = open_sources(str(tmp_path), PixelFormat(3))
    assert (len(train), len(validation)) == (5, 3)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b/2.jpg", "a"], ["b/2.jpg", "a/1.jpg", "a/deep/3.png", "a/deep/[4].jpg"]),
        (["a/notes.txt", "a/notes.txt"], ["a/notes.txt"] * 2),  # a file that is named is taken
        (["a/*"], ["a/1.jpg", "a/deep/3.png", "a/deep/[4].jpg", "a/notes.txt"]),  # as if the shell had listed them
        (["**/*.png", "a/deep/[4].jpg"], ["a/deep/3.png", "b/2.png", "a/deep/[4].jpg"]),
        (["a/**"], ["a/1.jpg", "a/deep/3.png", "a/deep/[4].jpg", "a/notes.txt"]),
        (["b/.hidden.jpg"], ["b/.hidden.jpg"]),
    ],
)
def test_images_by_words(words, expected, tmp_path, monkeypatch):
    for name in ("a/1.jpg", "a/deep/3.png", "a/deep/[4].jpg", "a/notes.txt", "b/2.jpg", "b/2.png", "b/.hidden.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    source, errors = find_images(words)
    assert not errors and [source.name(index) for index in range(len(source))] == expected
    assert source.fetch(list(range(len(source)))) == [name.encode() for name in expected]
    assert (source.classes, source.labels) == ([], None)


def test_words_without_an_image_are_all_reported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hollow" / "deeper").mkdir(parents=True)
    source, errors = find_images(["hollow", "nowhere/x.jpg", "", "*.jpg", "hollow/*"])
    assert len(source) == 0 and [error.partition(";")[0] for error in errors] == [
        "hollow holds no image",
        "'nowhere/x.jpg': no such file or folder",
        "'': no such file or folder",
        "*.jpg matches no image",
        "hollow/deeper holds no image",
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_builtin_shapes(channels):
    train, validation = open_sources("builtin:shapes", PixelFormat(channels))
    assert (len(train), len(validation)) == (10_000, 1_000)
    assert isinstance(validation, ShapesSource) and train.fingerprint() != validation.fingerprint()
    validation.prepare()
    image, label, mask = shapes.draw(10_007)
    (fetched,) = validation.fetch([7])
    assert fetched.shape == (64, 64, channels) and fetched.dtype == np.uint8
    if channels == 3:
        np.testing.assert_array_equal(fetched, image)
    assert validation.labels[7] == label and np.array_equal(validation.masks[7], mask)


def test_the_size_of_the_data_is_estimated_from_some_of_it(tmp_path):
    source = FolderSource(write_images(tmp_path, 6))
    assert source.size_in_bytes() == sum(path.stat().st_size for path in tmp_path.rglob("*.jpg"))
    for i in range(1000):
        (tmp_path / f"{i}.png").write_bytes(b"0" * 500)
    assert FolderSource(tmp_path).size_in_bytes() == pytest.approx(1006 * 500, rel=0.05)
    assert ShapesSource("train", 3).size_in_bytes() == 10_000 * 64 * 64 * 3


SOURCES = ("csv", "jsonl", "tar", "saved", "parquet", "prepared")


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_the_same_samples_in_the_same_order(every_source, name):
    def opened(name):
        flags = dict(zip(every_source[name][::2], map(str, every_source[name][1::2]), strict=True))
        validation = flags.get("--path_to_validation_data")
        return open_sources(flags["--path_to_data"], PixelFormat(3), validation=validation)

    for one, other in zip(opened("folder"), opened(name), strict=True):
        everything = range(len(one))
        assert len(other) == len(one) and other.classes == one.classes and list(other.labels) == list(one.labels)
        assert [bytes(data) for data in other.fetch(everything)] == one.fetch(everything)
        assert [bytes(data) for data in other.fetch([7, 2, 7])] == one.fetch([7, 2, 7])
        assert all(os.path.basename(one.name(i))[:-4] in other.name(i) for i in everything) or name == "saved"
        assert other.size_in_bytes() > 0
    assert [part.fingerprint() for part in opened(name)] == [part.fingerprint() for part in opened(name)]


def test_images_of_other_channels_or_values_are_refused_at_the_start(tmp_path):
    array = np.random.default_rng(0).random((9, 8, 5), np.float32)
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=r"a.npy has 5 channels, expected 3; give --input_channels 5"):
        open_sources(str(tmp_path), PixelFormat(3, (0, 1)))
    with pytest.raises(DataError, match=r"a.npy has float32 numbers, whose range no file states; give --value_range"):
        open_sources(str(tmp_path), PixelFormat(5))
    source, _ = open_sources(str(tmp_path), PixelFormat(5, (0, 1)))
    assert decode(*source.fetch([0]), PixelFormat(5, (0, 1))).shape == (5, 9, 8)
    with pytest.raises(DataError, match="builtin:shapes has 8-bit images in colour or grey"):
        open_sources("builtin:shapes", PixelFormat(5))


def test_a_cache_that_cannot_be_written_is_refused(tmp_path):
    write_images(tmp_path / "data", 2)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="give another --cache_dir"):
        open_sources(str(tmp_path / "data"), PixelFormat(3), cache=str(tmp_path / "file"))


def test_a_folder_with_annotations_has_the_images_below_images(scenes):
    train, validation = open_sources(str(scenes), PixelFormat(3))
    assert len(train) == 10 and len(validation) == 5
    assert all("/images/training/" in train.name(i) for i in range(10)) and "/images/validation/" in validation.name(0)


def test_deep_images_that_are_black_at_8_bits_are_refused(tmp_path):
    for i in range(3):
        Image.fromarray(np.full((8, 8), 200 + i, np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match=r"0.png has 16-bit numbers up to 200, which are black at 8 bits; give --value"):
        open_sources(str(tmp_path), PixelFormat(1))
    open_sources(str(tmp_path), PixelFormat(1, (0, 300)))
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "0.png")  # as bright as others may be
    open_sources(str(tmp_path), PixelFormat(1))


def test_a_path_that_is_no_folder_is_refused_with_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("a.jpg\n")
    Path("shards").mkdir()
    Path("shards/a.tar").touch()
    for name in ("a.tar.gz", "a.tgz"):
        Path(name).write_bytes(b"\x1f\x8b" + bytes(1000))
    for path, words in (
        ("nowhere", "is no folder"),
        ("builtin:nothing", "the built-in data set is builtin:shapes"),
        ("list.txt", r"list.txt is a file; expected a folder of images, a list \(.csv, .jsonl\)"),
        ("a.tar.gz", r"a.tar.gz is compressed, .*; decompress it"),
        ("{b,a}*.tgz", r"b\*.tgz matches no shard; expected tar shards"),
        ("a*.tgz", "a.tgz is compressed, .*; decompress it"),
        ("owner/name", "did you mean hf:owner/name"),
        ("shards", r"for tar shards or Parquet files give a pattern, such as 'FOLDER/\*.tar'"),
    ):
        with pytest.raises(DataError, match=words):
            open_sources(path, PixelFormat(3))


def of_classes(classes):
    """A source with an image of each class."""
    return None if classes is None else SimpleNamespace(classes=list(classes), labels=np.arange(len(classes)))


@pytest.mark.parametrize(
    ("train", "validation", "of_training", "of_neighbours"),
    [
        ("ab", "ab", [], []),
        ("ab", None, ["D has no validation images"], ["D has none; leave the flag out"]),
        ("", "ab", ["D has images without a class; expected train/CLASS"], ["D has images without a class"]),
        ("ab", "", ["D has images without a class; expected val/CLASS"], ["D has images without a class"]),
        ("a", "a", ["D has one class, a;"], []),
        ("abcdef", "a", ["classes in train that val lacks (b, c, d and 2 more)"], []),
        ("ab", "bc", ["in train that val lacks (a)", "in val that train lacks (c)"], ["lacks 1 of them there (c)"]),
    ],
)
def test_classes_that_do_not_fit_are_reported_in_a_line_each(train, validation, of_training, of_neighbours):
    for check, expected in ((check_classes, of_training), (check_labels, of_neighbours)):
        errors = []
        try:
            check("D", of_classes(train), of_classes(validation))
        except DataError as error:
            errors = str(error).splitlines()
        assert len(errors) == len(expected), errors
        assert all(words in error for words, error in zip(expected, errors, strict=True)), errors


def test_the_classes_of_a_classifier_number_the_labels():
    source = of_classes(["cat", "dog"])
    assert match_classes("D", source, None, 2) == ["cat", "dog"]
    classes = match_classes("D", source, ["dog", "ant", "cat"], 3)
    assert classes == ["dog", "ant", "cat"] and labels_in(source, classes).tolist() == [2, 0]
    for other, names, words in (
        (source, None, "has 2 classes, and the classifier 3 without names"),
        (source, ["ant", "bee", "cat"], r"does not know \(dog\); it knows ant, bee, cat; give the class folders these"),
        (of_classes(""), None, "has images without a class; expected val/CLASS/IMAGE"),
    ):
        with pytest.raises(DataError, match=words):
            match_classes("D", other, names, 3)
