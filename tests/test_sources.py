import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_images
from PIL import Image

from data import shapes
from data.decode import PixelFormat, decode
from data.files import FolderSource, choose_splits, find_images
from data.index import DataError, StoredSource
from data.sources import (
    ShapesSource,
    check_classes,
    check_labels,
    keep_labelled,
    kind_of_data,
    labels_in,
    match_classes,
    open_sources,
)


def test_a_tree_without_classes(tmp_path):
    write_images(tmp_path / "deep", 3)
    (tmp_path / "top.jpg").write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert len(source) == 4 and source.labels.tolist() == [0, 0, 0, -1] and source.classes == ["deep"]
    flat = FolderSource(tmp_path / "deep" / "class_0")
    assert len(flat) == 2 and flat.labels is None and flat.classes == []


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        *(
            ("train", name)
            for name in ("val", "validation", "Val", "VALID", "valid", "dev", "eval", "Evaluation", "test")
        ),
        *((name, "val") for name in ("Train", "TRAIN", "training", "Training", "train_set", "train2017", "TrainVal")),
        ("train-images", "val-images"),
    ],
)
def test_names_of_splits(train, held_out):
    assert choose_splits(["extra", held_out, train, "testing", "trainer"]) == (train, held_out)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "val"),
        ("images/Train", "images/test"),
        ("Images/train2017", "Images/val2017"),
        ("Training", "Testing"),
    ],
)
def test_training_and_validation_folders(tmp_path, train, held_out):
    write_images(tmp_path / train, 5)
    assert open_sources(str(tmp_path), PixelFormat(3))[1] is None
    write_images(tmp_path / held_out, 3)
    (tmp_path / "@eaDir").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    sources = open_sources(str(tmp_path), PixelFormat(3))
    assert tuple(map(len, sources)) == (5, 3)
    name = os.path.basename(held_out)
    is_test = name.lower().startswith("test")
    assert sources[0].notes == ([f"validation {name}, as there is no other split for it"] if is_test else [])


def test_folders_beside_the_splits_are_told(tmp_path):
    for name, count in (("train", 5), ("val", 3), ("test", 2), ("unlabeled", 4), ("Train", 1)):
        write_images(tmp_path / name, count)
    train, validation = open_sources(str(tmp_path), PixelFormat(3))
    assert (len(train), len(validation)) == (5, 3)
    assert train.notes == [f"not read   Train, test, unlabeled in {tmp_path}, beside train"]
    train, validation = open_sources(str(tmp_path / "val"), PixelFormat(3))  # no folder in it is called train
    assert len(train) == 3 and validation is None


FORMATS = [
    "JPEG",
    "PNG",
    "WEBP",
    "AVIF",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "QOI",
    "SGI",
    "DDS",
    "PCX",
    "MPO",
    "NPY",
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", ["", ".jpg_large"])
def test_images_of_any_suffix_are_read_by_their_content(tmp_path, name, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with open(tmp_path / f"a{suffix}", "wb") as file:
        np.save(file, pixels) if name == "NPY" else Image.fromarray(pixels).save(file, name)
    Image.fromarray(pixels).save(tmp_path / "b.jpg")
    (tmp_path / "notes").write_text("BMW and P1 are words")
    (tmp_path / "c.bin").write_bytes(bytes(1000))
    source = FolderSource(tmp_path)
    is_raw = name == "TIFF" and suffix  # cameras' raw files are TIFFs with other suffixes, and begin with a thumbnail
    assert len(source) == (1 if is_raw else 2)
    assert all(decode(*source.fetch([index]), PixelFormat(3)).shape == (3, 16, 16) for index in range(len(source)))


@pytest.mark.parametrize("suffix", [".tga", ".avif", ".AVIF", ".TGA"])
def test_suffixes_in_any_case(tmp_path, suffix):
    Image.new("RGB", (8, 8)).save(tmp_path / f"a{suffix}")
    assert decode(*FolderSource(tmp_path).fetch([0]), PixelFormat(3)).shape == (3, 8, 8)


LITTER = """
@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg  .thumbnails/a.jpg  __MACOSX/._a.jpg  lost+found/a.jpg  $RECYCLE.BIN/a.jpg
System Volume Information/a.jpg  .Trash-1000/a.jpg  #recycle/a.jpg  .AppleDouble/a.jpg  @Recycle/a.jpg
.ipynb_checkpoints/a.jpg  FOUND.000/a.jpg  .@__thumb/a.jpg  ._a.jpg  Thumbs.db  .DS_Store  b.jpg~  b.jpg.bak
b.jpg.part  b.jpg.crdownload  b.jpg_original  b.jpg.tmp  clip.THM  desktop.ini
"""


@pytest.mark.parametrize("place", ["", "class_0"])
def test_litter_is_left_out_and_told(tmp_path, place):
    write_images(tmp_path, 4)
    for name in re.split(r"\n|  ", LITTER.strip()):
        path = tmp_path / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((tmp_path / "class_0" / "0000.jpg").read_bytes())
    source = FolderSource(tmp_path)
    assert len(source) == 4 and source.classes == ["class_0", "class_1"]
    (note,) = source.notes
    assert note == f"left out   24 below {tmp_path}: 17 system or temporary, 7 hidden"


def test_what_is_left_out_is_counted(tmp_path):
    write_images(tmp_path, 4)
    for name in ("1.txt", "2.txt", "deep/3.TXT", "4.json", "README", ".hidden", "deep/.hidden", "deep/@eaDir/5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    counts = "3 .txt (no image), 2 hidden, 1 .json (no image) and 2 more"
    assert FolderSource(tmp_path).notes == [f"left out   8 below {tmp_path}: {counts}"]
    with pytest.raises(DataError, match=r"deep holds no image \(left out: .* 1 hidden, .*\); expected"):
        FolderSource(tmp_path / "deep")


def write_metadata(root: Path) -> None:
    """Write the metadata that img2dataset, the library datasets and others write beside images."""
    pq.write_table(pa.table({"key": ["0"], "url": ["http://x"], "width": [5]}), root / "00000.parquet")
    (root / "metadata.csv").write_text("file_name,label\nx.jpg,1\n")
    (root / "metadata.jsonl").write_text('{"file_name": "x.jpg"}\n')
    (root / "state.json").write_text("{}")  # by any other program


def test_tables_beside_images_are_no_data_set(tmp_path):
    write_images(tmp_path, 4)
    write_metadata(tmp_path)
    train, validation = open_sources(str(tmp_path), PixelFormat(3))
    assert len(train) == 4 and validation is None and train.notes[0].startswith("left out   4 below")


def test_kinds_of_data(tmp_path):
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "train.parquet")
    for path, data_format, kind in (
        ("builtin:shapes", "tar", "builtin"),
        ("hf:owner/name", None, "hub"),
        ("owner/name", "hub", "hub"),
        ("A.CSV", None, "list"),
        ("a.Tsv", None, "list"),
        ("A.JSONL", None, "list"),
        ("A.TAR", None, "tar"),
        ("a.tgz", None, "tar"),
        ("A.PARQUET", None, "parquet"),
        ("list.txt", "list", "list"),
        ("shard.0001", "tar", "tar"),
        (str(tmp_path), None, "parquet"),
        (str(tmp_path), "folder", "folder"),
        (str(tmp_path / "nothing"), None, "folder"),
    ):
        assert kind_of_data(path, data_format) == kind, (path, data_format)


def test_a_folder_of_shards(tmp_path):
    write_images(tmp_path, 4)
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(tmp_path.rglob("*.jpg"))[:3]:
            shard.add(path, path.name)
    train, _ = open_sources(str(tmp_path), PixelFormat(3), data_format="tar", cache=str(tmp_path / "cache"))
    assert len(train) == 3
    with pytest.raises(DataError, match=r"hf:nobody/nothing: "):
        open_sources("nobody/nothing", PixelFormat(3), data_format="hub")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet", "a.tar", "images/a.jpg"])
def test_pointers_of_git_lfs_are_told(tmp_path, name):
    for path in (tmp_path / name, *(tmp_path / "images" / f"{number}.jpg" for number in range(7))):
        path.parent.mkdir(exist_ok=True)
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 7\n")
    with pytest.raises(DataError, match=r".*a Git LFS pointer in place of the file; run git lfs pull"):
        open_sources(str(tmp_path / name if "images" not in name else tmp_path / "images"), PixelFormat(3))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["b/2.jpg", "a"], ["b/2.jpg", "a/1.jpg", "a/deep/3.png", "a/deep/[4].jpg"]),
        (["a/notes.txt", "a/notes.txt"], ["a/notes.txt"] * 2),  # a named file is always taken
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
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(tmp_path / "0.png")  # not black at 8 bits
    open_sources(str(tmp_path), PixelFormat(1))


def test_a_path_that_is_no_folder_is_refused_with_a_suggestion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("a.jpg\n")
    Path("shards").mkdir()
    Path("shards/a.tar").touch()
    for name in ("a.tar.gz", "a.tgz"):
        Path(name).write_bytes(b"\x1f\x8b" + bytes(1000))
    for path, words in (
        ("nowhere", "is not a folder"),
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


class OfClasses(StoredSource):
    """Hold one image of each class, and none of classes given as "-"."""

    def __init__(self, classes):
        self.classes = ["abcdef"[number] if name == "-" else name for number, name in enumerate(classes)]
        self.labels = np.array([number for number, name in enumerate(classes) if name != "-"]) if classes else None

    def __len__(self):
        return len(self.labels)

    def name(self, index):
        return f"{index}.jpg"

    def fetch(self, indices):
        return [b"%d" % index for index in indices]

    def size_in_bytes(self):
        return 10.0 * len(self)

    def fingerprint(self):
        return " ".join(map(str, self.labels))


def of_classes(classes):
    return None if classes is None else OfClasses(classes)


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        ("ab", "ab", None),
        ("ab", None, "D has no validation images"),
        ("", "ab", "D has images without a class; expected train/CLASS"),
        ("ab", "", "D has images without a class; expected val/CLASS"),
        ("a", "a", "D has one class, a;"),
        ("abcdef", "a", None),
        ("ab", "bc", "has classes in val that train lacks (c)"),
        ("a-c", "abc", "has classes in val that train lacks (b)"),
        ("a-c", "a-", None),
        ("-b", "b", "D has one class, b;"),
    ],
)
@pytest.mark.parametrize("check", [check_classes, check_labels])
def test_classes_that_do_not_fit_are_reported(train, validation, expected, check):
    if expected is None:
        check("D", of_classes(train), of_classes(validation))
        return
    with pytest.raises(DataError, match=re.escape(expected)) as caught:
        check("D", of_classes(train), of_classes(validation))
    assert ("leave the flag out" in str(caught.value)) == (check is check_labels)


def test_images_without_a_class_are_refused_or_left_out(tmp_path):
    write_images(tmp_path / "train", 6)
    write_images(tmp_path / "val", 4)
    (tmp_path / "train" / "logo.jpg").write_bytes((tmp_path / "val" / "class_0" / "0000.jpg").read_bytes())
    train, validation = open_sources(str(tmp_path), PixelFormat(3))
    with pytest.raises(DataError, match=r"has 1 of 7 images in train without a class \(.*/train/logo.jpg\); expected"):
        check_classes("D", train, validation)
    train, validation = open_sources(str(tmp_path), PixelFormat(3), drop_unlabelled=True)
    check_classes("D", train, validation)
    assert (len(train), len(validation)) == (6, 4) and train.notes == ["left out   1 image without a label"]
    check_labels("D", *open_sources(str(tmp_path), PixelFormat(3)))  # nearest neighbours use only images with labels


def test_the_labelled_samples_of_a_source():
    source = OfClasses("abcde")
    source.labels = np.array([3, -1, 0, -1, 1])
    some = keep_labelled(source)
    assert len(some) == 3 and some.labels.tolist() == [3, 0, 1] and some.classes == source.classes
    assert some.fetch([2, 0]) == some.fetch(np.array([2, 0])) == [b"4", b"0"] and some.name(1) == "2.jpg"
    assert some.size_in_bytes() == 30 and some.fingerprint() != source.fingerprint()
    source.fingerprint = lambda: "without labels"
    first = keep_labelled(source).fingerprint()
    source.labels = np.array([3, -1, -1, 0, 1])
    assert keep_labelled(source).fingerprint() != first
    source.labels = np.array([3, -1, 0, -1, 1])
    assert keep_labelled(some) is some and labels_in(some, list("edcba")).tolist() == [1, 4, 3]
    source.labels = None
    assert keep_labelled(source) is source


@pytest.mark.parametrize("check", [check_classes, check_labels])
def test_labels_that_cannot_be_used_are_refused_where_they_are_needed(check):
    broken = OfClasses("")
    broken.label_errors = ["x.csv has labels that are not class numbers"]
    with pytest.raises(DataError, match=r"x\.csv has labels that are not class numbers"):
        check("D", broken, OfClasses("ab"))


def test_a_folder_of_which_nothing_can_be_read_is_refused_at_the_start(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(
        DataError, match=r"none of 8 images, spread over the data, can be read \(.*0.jpg: .*a page in HTML, as"
    ):
        open_sources(str(tmp_path), PixelFormat(3))


def test_many_words_without_an_image_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, errors = find_images([f"{number}.jpg" for number in range(1000)])
    assert len(errors) == 6 and errors[5] == "and 995 more words like these"


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
