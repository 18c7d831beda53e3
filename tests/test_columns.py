"""Tests of labels and numbers that are read from the columns of lists and tables."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import write_images
from PIL import Image

from data.arrow import ArrowSource, choose_columns, open_datasets
from data.columns import TargetSource, check_held_out, read_targets
from data.files import FolderSource
from data.index import DataError
from data.lists import ListSource


def new_list(folder, text, name="list.csv"):
    """Write the images 0.png to 3.png and a list with the content `text`; return the list's source."""
    for number in range(4):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / name).write_text(text)
    return ListSource(folder / name)


def read(target, source, columns=None, names=None):
    return TargetSource.read(target, "DATA", source, columns, names)


LISTS = [["cat", "dog"], [], ["dog"], ["bird", "cat"]]
FLAGS = [[0, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]]


def test_labels_of_json_lines(tmp_path):
    lines = [json.dumps({"path": f"{i}.png", "labels": names}) for i, names in enumerate(LISTS)]
    source = read("labels", new_list(tmp_path, "\n".join(lines), "list.jsonl"))
    assert source.classes == ["bird", "cat", "dog"] and source.labels.tolist() == FLAGS
    names = ["dog", "cat", "fish", "bird"]
    other = read("labels", ListSource(tmp_path / "list.jsonl"), names=names)
    assert other.classes == names and other.labels[:, [3, 1, 0]].tolist() == FLAGS and not other.labels[:, 2].any()
    assert source.fingerprint() != other.fingerprint()
    with pytest.raises(DataError, match=r"has labels that the training images or the model lack \(bird\)"):
        read("labels", ListSource(tmp_path / "list.jsonl"), names=["cat", "dog"])


def test_class_numbers_may_begin_anywhere_and_have_gaps(tmp_path):
    lines = [json.dumps({"path": f"{i}.png", "tags": tags}) for i, tags in enumerate([[17], [2_084_071], [17, 3], []])]
    source = read("labels", new_list(tmp_path, "\n".join(lines), "list.jsonl"), ["tags"])
    assert source.classes == ["3", "17", "2084071"]
    assert source.labels.tolist() == [[0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 0, 0]]


def test_other_columns_of_json_do_not_matter(tmp_path):
    """Other columns may mix types; a first line without labels has a missing value. Dates are names."""
    lines = [{"meta": 1}, {"meta": "x", "labels": ["2020-01-01"]}, {"labels": []}, {"labels": ["b"]}]
    lines = [json.dumps({"path": f"{i}.png"} | line) for i, line in enumerate(lines)]
    with pytest.raises(DataError, match="no value in the column labels of row 1"):
        read("labels", new_list(tmp_path, " ".join(lines), "list.jsonl"))
    lines[0] = json.dumps({"path": "0.png", "meta": None, "labels": ["b"]})
    source = read("labels", new_list(tmp_path, " ".join(lines), "list.jsonl"))
    assert source.classes == ["2020-01-01", "b"] and source.labels.tolist() == [[0, 1], [1, 0], [0, 0], [0, 1]]


@pytest.mark.parametrize("kind", [pa.large_list(pa.string()), pa.list_(pa.string(), 2), pa.list_(pa.int8())])
def test_lists_of_every_type_in_parquet(tmp_path, kind):
    data = {
        "image": [b"", b""],
        "labels": [["1", "2"], ["2", "3"]] if kind.value_type == pa.string() else [[1, 2], [2, 3]],
    }
    table = pa.table({"image": pa.array(data["image"]), "labels": pa.array(data["labels"], kind)})
    source = ArrowSource(table, "T", choose_columns(table.schema, "T"))
    assert read("labels", source).labels.tolist() == [[1, 1, 0], [0, 1, 1]]
    with pytest.raises(DataError, match=r"T has .*list.* in the column labels; expected a number; correct --label_col"):
        read("numbers", source)


def test_labels_of_parquet_with_named_numbers(tmp_path):
    features = datasets.Features(
        image=datasets.Image(), labels=datasets.List(datasets.ClassLabel(names=["bird", "cat", "dog"]))
    )
    numbers = [[i for i, flag in enumerate(row) if flag] for row in FLAGS]
    rows = {"image": [Image.new("RGB", (8, 8))] * 4, "labels": numbers}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(tmp_path / "data")
    source = read("labels", open_datasets(tmp_path / "data")["train"])
    assert source.classes == ["bird", "cat", "dog"] and source.labels.tolist() == FLAGS


@pytest.mark.parametrize("form", ["{}", "{}.0", "{:d}"])
def test_labels_and_numbers_of_a_table(tmp_path, form):
    """Blank rows are skipped, and columns may be named in any order."""
    rows = [f"{i}.png,{form.format(i % 2)},{bool(i // 2)},{i - 1}e-1" for i in range(4)]
    source = new_list(tmp_path, "\n".join(["path,odd, Large ,size", *rows[:2], ",,,", *rows[2:], ""]))
    labels = read("labels", source, ["Large", "odd"])
    assert labels.classes == ["Large", "odd"] and labels.labels.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert len(labels) == 4 and labels.name(3).endswith("3.png")
    numbers = read("numbers", source, ["size"])
    assert numbers.labels.dtype == np.float64 and numbers.labels[:, 0].tolist() == [-0.1, 0, 0.1, 0.2]
    assert read("labels", source, names=["odd", "Large"]).classes == ["odd", "Large"]  # without --label_columns


@pytest.mark.parametrize(
    ("target", "columns", "match"),
    [
        ("numbers", ["size"], r"'big' in the column size of row 2 \(.*1\.png\); expected a number"),
        ("numbers", ["gap"], r"no value in the column gap of row 3 \(.*2\.png\); expected a number"),
        ("numbers", ["huge"], r"'1e999' in the column huge of row 1"),
        ("labels", ["odd", "gap"], r"no value in the column gap of row 3 .* expected 0 or 1, or lists of labels"),
        ("labels", ["odd", "size"], r"'5' in the column size of row 1 .* expected 0 or 1"),
        ("labels", ["name"], r"'cat' in the column name of row 1 .* \(for one class per image give --target classes\)"),
        (
            "labels",
            ["even"],
            "has no column even; it has path, odd, gap, size, huge, name; name the labels by --label_col",
        ),
        ("numbers", None, r"has no column label or labels; it has path"),
    ],
)
def test_columns_that_cannot_be_read(tmp_path, target, columns, match):
    rows = ["0.png,0,1,5,1e999,cat", "1.png,1,0,big,1,dog", "2.png,0,,7,1,cat", "3.png,1,1,8,1,dog"]
    source = new_list(tmp_path, "\n".join(["path,odd,gap,size,huge,name", *rows]))
    with pytest.raises(DataError, match=match):
        read(target, source, columns)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ([["cat"], None, [], []], r"no value in the column labels of row 2 .* \[\] for none"),
        ([[], [], [], []], "only empty lists"),
        ([[0.5], [], [], []], r"0\.5 in the column labels of row 1"),
        ([["cat"], [1], [], []], "cannot be read"),
        ([["cat"], "dog", [], []], r"'\[\"cat\"\]' in the column labels of row 1"),
        ([{"cat": 1}, {}, {}, {}], r"'\{\"cat\": 1\}' in the column labels of row 1"),
        ([None, None, None, None], "no value in the column labels of row 1"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, values, match):
    lines = [json.dumps({"path": f"{i}.png", "labels": value}) for i, value in enumerate(values)]
    with pytest.raises(DataError, match=match):
        read("labels", new_list(tmp_path, "\n".join(lines), "list.jsonl"))


def test_data_from_which_nothing_can_be_learned(tmp_path):
    rows = ["0.png,0,0,3", "1.png,0,1,3", "2.png,0,0,3", "3.png,0,1,3"]
    source = new_list(tmp_path, "\n".join(["path,never,odd,three", *rows]))
    with pytest.raises(DataError, match="the same value in all training images for never: 0; expected values that"):
        read_targets("labels", "DATA", ["never", "odd"], source, source)
    with pytest.raises(DataError, match="for three: 3"):
        read_targets("numbers", "DATA", ["three"], source, source)
    same = new_list(tmp_path, "path,odd\n1.png,1\n3.png,1", "same.csv")
    with pytest.raises(DataError, match="the same targets in all of 2 validation images"):
        check_held_out("DATA", read("numbers", same, ["odd"]))
    with pytest.raises(DataError, match="the same targets in all of 2 validation images"):
        read_targets("numbers", "DATA", ["odd"], source, same)
    with pytest.raises(DataError, match="has no validation images"):
        read_targets("numbers", "DATA", ["odd"], source, None)


def test_targets_need_a_table_and_classes_need_no_lists(tmp_path):
    folder = FolderSource(write_images(tmp_path / "images", 4))
    with pytest.raises(DataError, match="has no columns, from which --target numbers is read; expected a list"):
        read("numbers", folder)
    lines = [json.dumps({"path": f"{i}.png", "labels": names}) for i, names in enumerate(LISTS)]
    source = new_list(tmp_path, "\n".join(lines), "list.jsonl")
    with pytest.raises(DataError, match=r"has lists in the column labels; .* give --target labels"):
        read_targets("classes", "DATA", None, source, source)
