import csv
import errno
import itertools
import json
import os
import pickle
import random
import re
import time

import numpy as np
import pytest

from data import files, lists
from data.files import FileSource, FolderSource, read_file
from data.index import DataError, Names
from data.lists import ListSource


def write(root, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.path.basename(name).encode())


def names_of(source, root) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def ago(path, seconds: float) -> None:
    """Set the modification time of a file or folder."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("seed", range(5))
def test_any_folder_is_in_the_order_of_the_bytes_of_whole_paths(tmp_path, seed):
    rng = random.Random(seed)
    parts = ["a", "a-b", "a.b", "a0", "aB", "a b", "A", "ä", "a-", "0", "a.jpg", "z"]
    written = set()
    for depth in rng.choices(range(4), k=60):
        folder = tmp_path.joinpath(*rng.choices(parts, k=depth))
        name = rng.choice(parts) + rng.choice([".jpg", ".PNG", ".txt", "", ".tar.npy"])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        except OSError:  # a file where a folder ought to be, or the other way round
            continue
        if name.lower().endswith((".jpg", ".png", ".npy")):
            written.add(os.path.relpath(folder / name, tmp_path))
    found = names_of(FolderSource(tmp_path), tmp_path)
    assert len(found) > 10 and found == sorted(written, key=os.fsencode)


def test_classes_are_in_the_order_of_their_own_bytes(tmp_path):
    write(tmp_path, "a/x.jpg", "a/deep/1/y.jpg", "a-b/x.jpg", "a.b/x.jpg", "a0/x.jpg", "void/notes.txt")
    write(tmp_path, ".hidden/x.jpg", "a/.x.jpg")
    source = FolderSource(tmp_path)
    assert names_of(source, tmp_path) == ["a-b/x.jpg", "a.b/x.jpg", "a/deep/1/y.jpg", "a/x.jpg", "a0/x.jpg"]
    assert source.classes == ["a", "a-b", "a.b", "a0"]
    assert source.labels.tolist() == [1, 2, 0, 0, 3] and source.labels.dtype == np.int32


def test_folders_named_as_files_that_are_left_out(tmp_path):
    write(tmp_path, "dog.bak/1.jpg", "cat.part/2.jpg", "cat.part/3.jpg.part")
    assert names_of(FolderSource(tmp_path), tmp_path) == ["cat.part/2.jpg", "dog.bak/1.jpg"]


def test_links_that_lead_to_each_other(tmp_path):
    write(tmp_path, "one/1.jpg", "two/2.jpg")
    os.symlink(tmp_path / "two", tmp_path / "one" / "to_two")
    os.symlink(tmp_path / "one", tmp_path / "two" / "to_one")
    os.symlink(tmp_path / "nowhere", tmp_path / "one" / "broken")
    os.symlink(tmp_path / "nowhere", tmp_path / "one" / "broken.jpg")  # reported when it is read
    os.symlink(tmp_path / "one" / "self", tmp_path / "one" / "self")
    assert FolderSource(tmp_path / "one").notes == [
        f"left out   2 below {tmp_path / 'one'}: 2 without suffix (no image)"
    ]
    assert names_of(FolderSource(tmp_path / "one"), tmp_path / "one") == ["1.jpg", "broken.jpg", "to_two/2.jpg"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == b"b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=f"{tmp_path}/b cannot be read \\(Permission denied\\); check its permissions"):
        FolderSource(tmp_path)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Return a path with a folder of old files, and a list that grows with each scan; three images suffice to cache."""
    write(tmp_path / "data", "a/1.jpg", "a/2.jpg", "b/3.jpg", "b/deep/4.jpg")
    for folder in ("", "a", "b", "b/deep"):
        ago(tmp_path / "data" / folder, 60)
    monkeypatch.setattr(files, "CACHED_FROM", 3)
    scans, find = [], files._index_folder
    monkeypatch.setattr(files, "_index_folder", lambda *args: (scans.append(1), find(*args))[1])
    return tmp_path, scans


def test_a_folder_that_did_not_change_is_scanned_once(kept, monkeypatch):
    tmp_path, scans = kept
    monkeypatch.chdir(tmp_path)
    FolderSource("data", cache=tmp_path / "cache")
    monkeypatch.chdir(tmp_path / "data")
    first, second = (FolderSource(tmp_path / "data", cache=tmp_path / "cache") for _ in range(2))
    assert len(scans) == 1 and names_of(second, tmp_path / "data") == ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/deep/4.jpg"]
    assert second.classes == ["a", "b"] and second.labels.tolist() == [0, 0, 1, 1]
    assert second.fetch([3, 0]) == [b"4.jpg", b"1.jpg"] and second.fingerprint() == first.fingerprint()
    assert pickle.loads(pickle.dumps(second)).fetch([2]) == [b"3.jpg"]
    FolderSource(tmp_path / "data", (".jpg",), cache=tmp_path / "cache")
    assert len(scans) == 2  # another suffix needs another scan


def test_a_folder_that_changed_is_scanned_again(kept):
    tmp_path, scans = kept
    data, cache = tmp_path / "data", tmp_path / "cache"
    FolderSource(data, cache=cache)
    write(data, "b/deep/5.jpg")
    ago(data / "b" / "deep", 30)
    assert names_of(FolderSource(data, cache=cache), data)[-1] == "b/deep/5.jpg"
    os.rename(data / "a", data / "c")
    ago(data, 30)
    assert FolderSource(data, cache=cache).classes == ["b", "c"]
    assert len(scans) == 3 and len(FolderSource(data, cache=cache)) == 5 and len(scans) == 3


@pytest.mark.parametrize("reason", ["just changed", "small"])
def test_a_folder_that_is_small_or_has_just_changed_is_not_cached(kept, monkeypatch, reason):
    tmp_path, scans = kept
    if reason == "small":
        monkeypatch.setattr(files, "CACHED_FROM", 5)
    else:
        ago(tmp_path / "data" / "b", 0.5)
    for _ in range(2):
        FolderSource(tmp_path / "data", cache=tmp_path / "cache")
    assert len(scans) == 2 and [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("code", "failures", "tries"), [(errno.EIO, 2, 3), (errno.ESTALE, 3, 3), (errno.ENOENT, 1, 1), (errno.EACCES, 1, 1)]
)
def test_a_file_system_that_fails_is_tried_again(monkeypatch, code, failures, tries):
    results, slept = [OSError(code, os.strerror(code))] * failures + [b"1.jpg"], []
    calls = iter(results)

    def read():
        if isinstance(result := next(calls), OSError):
            raise result
        return result

    monkeypatch.setattr(files.time, "sleep", slept.append)
    assert files.retry(read) == results[tries - 1] and slept == [0.1, 1.0][: tries - 1]


def test_what_is_no_file_is_told_at_once(tmp_path):
    write(tmp_path, "whole.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    start = time.monotonic()
    assert read_file(str(tmp_path / "pipe.jpg")) == b""  # read as an empty file
    codes = dict(EISDIR="", ENOTDIR="whole.jpg/1.jpg", ENOENT="no")
    for code, name in codes.items():
        assert read_file(str(tmp_path / name)).errno == getattr(errno, code)
    assert time.monotonic() - start < files.PAUSES[0]  # none of these was tried again


def test_files_from_names_or_a_list(tmp_path):
    write(tmp_path, "b.jpg", "a.jpg")
    listed = FileSource([b"b.jpg", b"a.jpg"], tmp_path)
    named = FileSource(Names.from_list([b"b.jpg", b"a.jpg"]), str(tmp_path))
    assert listed.fetch(np.array([1, 0])) == named.fetch(range(1, -1, -1)) == [b"a.jpg", b"b.jpg"]
    assert (
        listed.fingerprint() == named.fingerprint() == "39bf40fb2f52b744" and named.size_in_bytes() == 10
    )  # in any folder


def write_list(path, rows: list[dict]) -> str:
    """Write the rows as CSV or as JSONL, and return the path."""
    with open(path, "w", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson"])
def test_a_list_in_its_own_order(tmp_path, kind, monkeypatch):
    images = ["z.jpg", 'deep/ü, or "u".png', str(tmp_path / "elsewhere" / "a.jpg"), "z.jpg", "../data/no_suffix"]
    write(tmp_path / "data", *images)
    write(tmp_path / "data", *(f"masks/{i}.png" for i in range(5)))
    rows = [
        {"path": path, "label": label, "mask": f"masks/{i}.png", "width": "nobody asks", "noted": "2024"}
        for i, (path, label) in enumerate(zip(images, ["dog", "cat", "dog", "ant", "cat"], strict=True))
    ]
    path = write_list(tmp_path / "data" / f"list.{kind}", rows)
    monkeypatch.chdir(tmp_path / "data")
    for source in (ListSource(path), ListSource(f"list.{kind}"), pickle.loads(pickle.dumps(ListSource(path)))):
        assert source.fetch(range(5)) == [os.path.basename(path).encode() for path in images]
        assert source.classes == ["ant", "cat", "dog"] and source.labels.tolist() == [2, 1, 2, 0, 1]
        assert source.has_masks and source.fetch_masks([4, 0]) == [b"4.png", b"0.png"]
    assert source.name(2) == images[2] and source.mask_name(1).endswith("masks/1.png")
    assert source.size_in_bytes() == sum(len(os.path.basename(path).encode()) for path in images)
    source = ListSource(write_list(tmp_path / "data" / f"paths.{kind}", [{"path": path} for path in images]))
    assert (source.classes, source.labels, source.has_masks) == ([], None, False)


TEXTS = {
    "numbers.csv": "label,path\n3,a.jpg\n 1,a.jpg\n",
    "numbers.jsonl": '{"label": 3, "path": "a.jpg"}\n{"label": 1, "path": "a.jpg"}',
    "texts.jsonl": '{"label": "3", "path": "a.jpg"}\n{"label": "1", "path": "a.jpg"}',
    "others.jsonl": '{"o": 1, "label": 3, "path": "a.jpg"}\n\n{"o": {"x": []}, "path": "\\u0061.jpg", "label": 1}\n',
    "bom.csv": '\ufeffpath,label\r\n"a.jpg","3"\r\n\r\na.jpg,1',
    "bom.jsonl": '\ufeff{"path": "a.jpg", "label": 3}\r\n{"path": "a.jpg", "label": 1}\r\n',
    "long.jsonl": '{"path": "a.jpg", "label": 3, "notes": "' + "x" * 2**24 + '"}\n{"path": "a.jpg", "label": 1}\n',
    "spaces.csv": "\n o, path ,\tlabel\nx,a.jpg, 3\ny,a.jpg,1\n",
    "lines.csv": 'path,notes,label\na.jpg,"one\ntwo\n",3\na.jpg,three,1\n',
    "tabs.tsv": "path\tlabel\r\na.jpg\t3\r\n\ta.jpg\t1\r\n".replace("\n\ta", "\na"),
    "tabs.csv": 'path\tnotes\tlabel\na.jpg\t"1, 2; 3"\t3\na.jpg\t\t1\n\t\t\n',
    "semicolons.csv": "\ufeffpath;label\r\na.jpg;3\r\na.jpg;1\r\n;\r\n",  # from spreadsheets with decimal commas
    "UPPER.CSV": "Path,LABEL\na.jpg,3\na.jpg,1\n",
    "floats.csv": "path,label\na.jpg,3.0\na.jpg,1.0\n",
    "floats.jsonl": '{"path": "a.jpg", "label": 3.0}\n{"path": "a.jpg", "label": 1.0}\n',
    "index.csv": ",path,label\n0,a.jpg,3\n1,a.jpg,1\n",  # as pandas writes it
    "commas.csv": "path,label\na.jpg,3\na.jpg,1\n,\n,\n",  # empty rows that a spreadsheet counts as used
    "blanks.csv": "\npath,label\n\na.jpg,3\n   \na.jpg,1\n\n \t\n\n",
    "quotes.csv": '"path" , "label"\n"a.jpg","3"\n"a.jpg" ,1\n'.replace(" ", ""),
    "around.csv": "path , label\n a.jpg , 3 \n\ta.jpg\t, 1\n",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_lists_that_say_the_same_in_other_words(tmp_path, name, encoding):
    write(tmp_path, "a.jpg")
    text = TEXTS[name] if encoding == "utf-8" else TEXTS[name].lstrip("\ufeff")
    (tmp_path / name).write_bytes(text.encode(encoding))
    source = ListSource(tmp_path / name)
    assert source.fetch([0, 1]) == [b"a.jpg"] * 2
    assert source.labels.tolist() == [3, 1] and source.labels.dtype == np.int32 and source.classes == list("0123")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "cannot be read .Empty CSV file.; expected CSV with a header"),
        ("x.csv", b"path,label\n", "lists no image in its columns path, label; expected `path` in every row"),
        ("x.csv", b"file,label\n1.jpg,0\n", "lists no image in its columns file, label; expected `path`"),
        ("x.jsonl", b'{"file": "1.jpg", "x": [1, "a"]}\n', "lists no image in its columns file, x; expected `path`"),
        ("x.csv", b"path,label\na,0\nb\n", "Expected 2 columns, got 1: b"),
        ("x.csv", b'path,label\na,0\n"b\nc"\n', "Expected 2 columns, got 1: .b c"),
        ("x.csv", b'"path,label\n' + b"a,0\n" * 50_000, "field larger than field limit"),
        ("x.csv", b"path\na\n\n\xff\n", "invalid UTF8 data"),
        ("x.jsonl", b'{"path": "a"}\n\n{"path": "b"\n', "Missing a comma or '}' after an object member. in row 1"),
        ("x.jsonl", b'{"path": "a", "label": 1}\n{"path": "b"\n', "Missing a comma or '}' after an object"),
        ("x.jsonl", b'{"path": "a", "label": "x"}\n{"path": "b"\n', "Missing a comma or '}' after an object"),
        ("x.jsonl", b'[{"path": "a"},\n{"path": "b"}]', "changed from object to array in row 0"),
        ("x.jsonl", b'{"path": "a"}\n{"path": 5}\n', r"Column\(/path\) changed from string to number in row 1"),
        ("x.csv", b"path,label\na,0\n,1\nb,1\n,1\n", "has no path in row 2, row 4; expected one in every row"),
        ("x.jsonl", b'{"path": "a"}\n{"path": null}\n{}\n', "has no path in row 2, row 3;"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        ListSource(tmp_path / name)
    assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"path": "a", "label": 1}\n{"path": "a", "label": true}\n', "from number to boolean in row 1"),
        ("x.jsonl", b'{"path": "a", "label": 1}\n{"path": "a", "label": "x"}\n', "from number to string in row 1"),
        ("x.jsonl", b'{"path": "a", "label": 0.5}\n{"path": "a", "label": 1}\n', r"class numbers \(row 1: '0.5'\)"),
        ("x.jsonl", b'{"path": "a", "label": [1, 2]}\n{"path": "a", "label": [0]}\n', r"labels that cannot be read \("),
        ("x.csv", b"path,label\n\na,-1\na,1.5\n", r"not class numbers \(row 2: '1.5'\)"),
    ],
)
def test_lists_whose_labels_are_broken_are_read_without_them(tmp_path, name, content, message):
    write(tmp_path, "a")
    (tmp_path / name).write_bytes(content)
    source = ListSource(tmp_path / name)
    assert source.fetch([0, 1]) == [b"a", b"a"] and source.labels is None and source.classes == []
    (error,) = source.label_errors
    assert error.startswith(str(tmp_path / name)) and re.search(message, error) and "\n" not in error


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lists_with_some_labels_and_masks(tmp_path, kind):
    write(tmp_path, "a", "b", "c")
    rows = [{"path": "a", "label": 1, "mask": "b"}, {"path": "b", "label": -1}, {"path": "c", "label": 0}]
    source = ListSource(write_list(tmp_path / f"x.{kind}", rows))
    assert source.labels.tolist() == [1, -1, 0] and source.classes == ["0", "1"] and source.fetch([2]) == [b"c"]
    with pytest.raises(DataError, match="has no mask in row 2, row 3; expected one in every row"):
        _ = source.has_masks


def test_labels_that_are_true_or_false(tmp_path):
    write(tmp_path, "a")
    (tmp_path / "x.jsonl").write_text('{"path": "a", "label": true}\n{"path": "a", "label": false}\n{"path": "a"}\n')
    source = ListSource(tmp_path / "x.jsonl")
    assert source.labels.tolist() == [1, 0, -1] and source.classes == ["false", "true"]  # as in Parquet


def test_a_column_of_paths_alone_may_hold_commas(tmp_path):
    names = ["a, b.jpg", "c;d.jpg", 'e "f".jpg', "g.jpg"]
    write(tmp_path, *names)
    (tmp_path / "x.csv").write_text('path\r\na, b.jpg\r\nc;d.jpg\r\n"e ""f"".jpg"\r\n"g.jpg"\r\n\r\n')
    assert ListSource(tmp_path / "x.csv").fetch(range(4)) == [name.encode() for name in names]


def test_paths_written_on_windows_are_told(tmp_path):
    (tmp_path / "x.csv").write_text("path\na\\b.jpg\n")
    with pytest.raises(
        DataError, match=r"do not exist: .*a\\b.jpg; .*folder, with / between folders; correct the list"
    ):
        ListSource(tmp_path / "x.csv")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_home_folder_in_a_list(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    names = ["a.jpg", "b~/c.jpg"]
    for name in ("home/a.jpg", "home/b~/c.jpg", "home/m.png", "lists/~x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    rows = [{"path": f"~/{name}", "label": 1.5, "mask": "~/m.png"} for name in names]  # an invalid label
    rows += [{"path": "~x.jpg", "label": 1, "mask": "~/m.png"}]
    source = ListSource(write_list(tmp_path / "lists" / f"x.{kind}", rows))
    assert source.fetch(range(3)) == [b"home/a.jpg", b"home/b~/c.jpg", b"lists/~x.jpg"]
    assert source.has_masks and source.fetch_masks([0]) == [b"home/m.png"]


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"x.csv cannot be read .*No such file"):
        ListSource(tmp_path / "x.csv")


def test_paths_of_a_list_that_are_not_there(tmp_path, monkeypatch):
    write(tmp_path, "2.jpg", "5.jpg", "mask.png", "folder/x.jpg")
    rows = [{"path": f"{i}.jpg"} for i in range(7)]
    path = write_list(tmp_path / "list.csv", rows)
    missing = ", ".join(str(tmp_path / f"{i}.jpg") for i in (0, 1, 3))
    with pytest.raises(DataError, match=f"5 of 7 checked files in the column path do not exist: {missing} and 2 more"):
        ListSource(path)

    path = write_list(tmp_path / "masks.csv", [{"path": "2.jpg", "mask": mask} for mask in ("mask.png", "folder")])
    with pytest.raises(DataError, match=f"1 of 2 checked files in the column mask .*: {tmp_path / 'folder'};"):
        _ = ListSource(path).has_masks

    monkeypatch.setattr(lists, "CHECKED", 50)
    path = write_list(tmp_path / "long.csv", [{"path": "2.jpg" if i < 999 else f"{i}.jpg"} for i in range(1000)])
    with pytest.raises(DataError, match=r"1 of 50 checked files in the column path do not exist: .*/999"):
        ListSource(path)


def test_the_fingerprint_of_a_list(tmp_path):
    write(tmp_path, "a/1.jpg", "b/2.jpg")
    rows = [{"path": "a/1.jpg", "label": "a", "mask": "b/2.jpg"}, {"path": "b/2.jpg", "label": "b", "mask": "a/1.jpg"}]

    def fingerprint(kind: str, *columns: str, **changes: str) -> str:
        changed = [{key: row[key] for key in columns} for row in rows]
        changed[0] |= changes
        return ListSource(write_list(tmp_path / f"list.{kind}", changed)).fingerprint()

    assert fingerprint("csv", "path") == FolderSource(tmp_path).fingerprint()
    every = ("path", "label", "mask")
    differing = [fingerprint("csv", *every[:count]) for count in (1, 2, 3)] + [
        fingerprint("csv", *every, **{name: "b/2.jpg" if name == "path" else "a/1.jpg"}) for name in every
    ]
    assert len(set(differing)) == len(differing) and fingerprint("jsonl", *every) == differing[2]
