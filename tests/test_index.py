import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pyarrow as pa
import pytest

from data import index
from data.index import DataError, Names, cached, check_cache, default_cache, first_few, number_labels, with_labels

WORDS = [b"a", b"", "ü/1.jpg".encode(), b"\xff", b"a" * 300]


def as_list(names: Names) -> list[bytes]:
    return [names[i] for i in range(len(names))]


def test_names_are_what_they_were():
    names = Names.from_list(WORDS)
    assert as_list(names) == WORDS and names[np.int64(0)] == b"a"
    assert as_list(pickle.loads(pickle.dumps(names))) == WORDS
    assert as_list(Names.from_list([])) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_names_from_arrow(kind):
    texts = ["nobody", "a", "", "ü/1.jpg", None, "b" * 300]
    whole = pa.array(texts, kind)
    expected = [(text or "").encode() for text in texts]
    assert as_list(Names.from_arrow(whole)) == expected
    assert as_list(Names.from_arrow(whole.slice(1, 3))) == expected[1:4]
    chunks = pa.chunked_array([whole.slice(2), whole.slice(0, 0), whole.slice(1, 2)])
    assert as_list(Names.from_arrow(chunks)) == expected[2:] + expected[1:3]
    assert as_list(Names.from_arrow(pa.chunked_array([], kind))) == []
    assert as_list(Names.from_arrow(pa.array([None, None], kind))) == [b"", b""]


def test_the_digest_of_names_stays_what_it_is_and_tells_where_they_end():
    ends = np.cumsum([len(word) for word in WORDS])
    assert Names.from_list(WORDS).digest() == hashlib.sha256(b"".join(WORDS) + ends.tobytes()).hexdigest()[:16]
    assert Names.from_list([b"ab", b"c"]).digest() == "93aaab13f6a2dcd4"
    assert Names.from_list([b"ab", b"c"]).digest() != Names.from_list([b"a", b"bc"]).digest()


def test_a_fingerprint_follows_labels_classes_and_masks():
    cats, dogs = np.array([0, 0], np.int32), np.array([1, 1], np.int32)
    differing = [
        *(with_labels("images", labels, ["cat", "dog"], None) for labels in (None, cats, dogs)),
        with_labels("images", cats, ["dog", "cat"], None),
        *(with_labels("images", labels, ["cat", "dog"], masks) for labels in (None, cats) for masks in ("one", "two")),
    ]
    assert len(set(differing)) == len(differing) and differing[0] == "images"
    assert with_labels("images", np.array([0, -1], np.int32), ["cat"], None) == "images"


def test_the_first_few():
    assert [first_few("abcde"[:count], count) for count in (1, 3, 4)] == ["a", "a, b, c", "a, b, c and 1 more"]
    assert first_few(iter("abcde"), 5003) == "a, b, c and 5,000 more"


@pytest.mark.parametrize(
    ("texts", "labels", "classes"),
    [
        (["2", "0", "007", " 2 "], [2, 0, 7, 2], list("01234567")),
        (["dog", "cat", "Ünit", "dog", "Zebra"], [2, 1, 3, 2, 0], ["Zebra", "cat", "dog", "Ünit"]),
        (["7up", "-", "1/2"], [2, 0, 1], ["-", "1/2", "7up"]),
        ([3, 1, 1], [3, 1, 1], list("0123")),
        (pa.chunked_array([["b"], [], ["a", "b"]], pa.string()), [1, 0, 1], ["a", "b"]),
        (["b", "", None, "NaN", "-1", "nan", "a"], [1, -1, -1, -1, -1, -1, 0], ["a", "b"]),
        (["2.0", "", "-1.0", "0.0"], [2, -1, -1, 0], list("012")),  # as pandas writes columns with gaps
        (pa.array([1.0, None, 0.0, float("nan")]), [1, -1, 0, -1], list("01")),
    ],
)
def test_labels_become_numbers(texts, labels, classes):
    numbers, names, errors = number_labels(pa.array(texts) if isinstance(texts, list) else texts, str, "data")
    assert numbers.dtype == np.int32 and numbers.tolist() == labels and names == classes and errors == []


@pytest.mark.parametrize("texts", [["", None], [-1, -1], ["-1", ""], [None, -1.0]])
def test_without_any_label_there_are_no_classes(texts):
    assert number_labels(pa.array(texts), str, "data") == (None, [], [])


@pytest.mark.parametrize(
    ("texts", "messages"),
    [
        (["1", "-1", "2.5", "1e3"], ["not class numbers (line 3: '2.5', line 4: '1e3')"]),
        (["1", "1000000"], ["not class numbers (line 2: '1000000')"]),
        ([3, -2], ["not class numbers (line 2: '-2')"]),
        (["a", b"\xff".decode(errors="replace")], ["has labels that are not text (line 2: '\ufffd'); expected UTF-8"]),
        (["a", "1", "2", "b"], ["numbers (line 2: '1', line 3: '2') and labels that are names (line 1: 'a', line 4:"]),
        (["a", "", ".5"], ["not class numbers (line 3: '.5')"]),
    ],
)
def test_labels_that_cannot_be_used(texts, messages):
    *nothing, lines = number_labels(pa.array(texts), lambda i: f"line {i + 1}", "data")
    assert nothing == [None, []]
    assert len(lines) == len(messages) and all(words in line for words, line in zip(messages, lines, strict=True))


def never_built():
    raise AssertionError("built again")


def built(number: int = 1):
    return lambda: ({"number": number}, {"squares": np.arange(5) ** 2 * number, "none": np.empty(0, np.int32)})


def test_what_was_built_is_mapped_into_memory(tmp_path):
    for build in (built(), never_built):
        meta, arrays = cached(tmp_path / "new" / "cache", "key", fresh=bool, build=build)
        assert meta == {"number": 1} and arrays["squares"].tolist() == [0, 1, 4, 9, 16] and len(arrays["none"]) == 0
    assert isinstance(arrays["squares"], np.memmap) and not arrays["squares"].flags.writeable
    assert cached(tmp_path / "new" / "cache", "other key", fresh=bool, build=built(2))[0] == {"number": 2}
    assert cached(None, "key", fresh=bool, build=built(3))[0] == {"number": 3}
    assert len(os.listdir(tmp_path / "new" / "cache")) == 4  # two entries with their locks; nothing is half-written


def test_what_others_keep_in_the_cache_stays(tmp_path, capsys):
    cached(tmp_path, "key", fresh=bool, build=built(1))
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    shutil.rmtree(entry)
    others = [entry / "mine.txt", tmp_path / "index-0123" / "meta.json", entry.with_suffix(".lock")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for _ in range(2):
        assert cached(tmp_path, "key", fresh=bool, build=built(2))[0] == {"number": 2}
    assert all(path.read_text() == "mine" for path in others) and os.listdir(entry) == ["mine.txt"]
    assert "nothing is cached" in capsys.readouterr().err


def test_what_no_longer_holds_is_built_anew(tmp_path):
    cached(tmp_path, "key", fresh=bool, build=built(1))
    _, old = cached(tmp_path, "key", fresh=bool, build=never_built)
    for build in (built(2), never_built):
        meta, arrays = cached(tmp_path, "key", fresh=lambda meta: meta["number"] == 2, build=build)
        assert meta == {"number": 2} and arrays["squares"][2] == 8
    assert old["squares"][2] == 4  # open arrays stay valid


def test_what_does_not_hold_when_it_is_built_is_not_kept(tmp_path):
    for number in (1, 2):
        assert cached(tmp_path, "key", fresh=lambda meta: False, build=built(number))[0] == {"number": number}
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / "squares.npy", 140),
        lambda entry: os.unlink(entry / "squares.npy"),
        lambda entry: os.truncate(entry / "none.npy", 0),
        lambda entry: (entry / "meta.json").write_text("{"),
        lambda entry: (entry / "meta.json").write_text("[1]"),
    ],
)
def test_a_damaged_entry_is_built_anew(tmp_path, damage):
    cached(tmp_path, "key", fresh=bool, build=built(1))
    damage(next(path for path in tmp_path.iterdir() if path.is_dir()))
    for build in (built(2), never_built):
        assert cached(tmp_path, "key", fresh=bool, build=build)[1]["squares"].tolist() == [0, 2, 8, 18, 32]


def test_a_cache_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache, refusal = tmp_path / "file" / "cache", "cannot hold a cache .*; give another --cache_dir"
    with pytest.raises(DataError, match=f"{re.escape(str(cache))} {refusal}"):
        check_cache(cache)
    assert cached(cache, "key", fresh=bool, build=built())[0] == {"number": 1}
    assert re.fullmatch(rf"note: {cache}: nothing is cached \({cache} {refusal}\)\n", capsys.readouterr().err)
    check_cache(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_that_fills_up(tmp_path, monkeypatch, capsys):
    def fill(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(index.os, "fsync", fill)
    assert cached(tmp_path, "key", fresh=bool, build=built())[1]["squares"][4] == 16
    assert capsys.readouterr().err == f"note: {tmp_path}: nothing is cached ([Errno 28] No space left on device)\n"
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_the_default_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "masked-autoencoders"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "masked-autoencoders"
    monkeypatch.setenv("XDG_CACHE_HOME", "~/scratch")  # as in a file of variables, where no shell expands it
    assert default_cache() == tmp_path / "scratch" / "masked-autoencoders"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without an entry, as in containers
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_cache() == tmp_path / f"masked-autoencoders-{os.getuid()}"


def test_entries_are_built_side_by_side(tmp_path):
    def build():
        return cached(tmp_path, "another key", fresh=bool, build=built(2))

    assert cached(tmp_path, "key", fresh=bool, build=build)[0] == {"number": 2}  # each has its own lock


def test_one_process_builds_and_the_others_wait(tmp_path):
    def build():
        os.close(os.open(tmp_path / f"built by {os.getpid()}", os.O_CREAT))
        time.sleep(0.2)
        return built()()

    def work():
        answers.put(int(cached(tmp_path / "cache", "key", fresh=bool, build=build)[1]["squares"].sum()))

    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [answers.get() for _ in processes] == [30] * 4
    assert len(list(tmp_path.glob("built by *"))) == 1


def test_a_process_that_is_killed_holds_up_nobody(tmp_path):
    options = dict(fresh=bool, build=lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = multiprocessing.get_context("fork").Process(target=cached, args=(tmp_path, "key"), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for build in (built(), never_built):
        assert cached(tmp_path, "key", fresh=bool, build=build)[0] == {"number": 1}


def own_memory() -> int:
    """Return the bytes of memory that this process has written and does not share."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux alone tells whose memory it is")
@pytest.mark.parametrize("cache", [True, False])
def test_reading_names_takes_no_memory_of_a_worker(tmp_path, cache):
    def build():
        names = Names.from_list([b"%050d" % i for i in range(200_000)])
        return {}, {"names": names.buffer, "ends": names.ends}

    cached(tmp_path, "key", fresh=bool, build=build)  # by another run
    _, arrays = cached(tmp_path if cache else None, "key", fresh=bool, build=build)
    names = Names(arrays["names"], arrays["ends"])
    receive, send = os.pipe()
    if os.fork() == 0:
        assert int(names[0]) == 0
        before = own_memory()
        right = all(int(names[i]) == i for i in range(0, 200_000, 7))
        os.write(send, json.dumps([right, own_memory() - before]).encode())
        os._exit(0)
    os.wait()
    right, growth = json.loads(os.read(receive, 100))
    assert right and growth < 2**20  # the names take 12 MB
