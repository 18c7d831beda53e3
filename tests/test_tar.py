import io
import itertools
import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data import tar
from data.index import DataError
from data.tar import TarSource, expand


def write_tar(path: Path, files: dict[str, bytes], **options) -> Path:
    """Write files into a tar; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def encoded(number: int) -> bytes:
    """Return bytes that stand for an encoded image; lengths depend on the number, and some are whole blocks."""
    return b"x" * (512 * (number % 3)) + b"%d" % number * (number % 4)


def samples(numbers, **endings) -> dict[str, bytes]:
    """Return the members of samples: encoded(number) as .jpg, and for each ending what its function returns."""
    endings = {"jpg": encoded, **endings}
    return {f"{n:04d}.{ending.replace('_', '.')}": make(n) for n in numbers for ending, make in endings.items()}


def fetched(source) -> list[bytes]:
    return source.fetch(range(len(source)))


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_of_each_kind_in_their_order(kind, tmp_path):
    names = ["b/2.jpg", "b/10.png", "a/x.WEBP", "a/ü.jpg", f"{'deep/' * 25}{'x' * 60}.jpeg"]
    if kind != tarfile.USTAR_FORMAT:
        names.append(f"{'y' * 300}.npy")
    write_tar(tmp_path / "0.tar", {name: encoded(n) for n, name in enumerate(names[:2])}, format=kind)
    write_tar(tmp_path / "1.tar", {name: encoded(n) for n, name in enumerate(names) if n >= 2}, format=kind)
    source = TarSource(str(tmp_path / "{0..1}.tar"))
    assert fetched(source) == [encoded(n) for n in range(len(names))]
    paths = [f"{tmp_path}/{int(number > 1)}.tar/{name}" for number, name in enumerate(names)]
    assert [source.name(number) for number in range(len(source))] == paths
    order = np.random.default_rng(0).integers(0, len(names), 50)
    assert source.fetch(order) == [encoded(n) for n in order]
    assert source.labels is None and source.classes == [] and not source.has_masks
    assert source.size_in_bytes() == sum(len(encoded(n)) for n in range(len(names)))


def test_what_lies_beside_the_images_in_a_tar(tmp_path):
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    (tmp_path / "folder" / "deeper" / "1.jpg").write_bytes(b"one")
    (tmp_path / "folder" / ".hidden.jpg").write_bytes(b"hidden")
    (tmp_path / "folder" / "text").write_bytes(b"nothing")
    os.symlink("deeper/1.jpg", tmp_path / "folder" / "link.jpg")
    with tarfile.open(tmp_path / "all.tar", "w") as shard:
        shard.add(tmp_path / "folder", ".")
    source = TarSource(str(tmp_path / "all.tar"))
    assert fetched(source) == [b"one"] and source.name(0).endswith("all.tar/deeper/1.jpg")


def test_the_members_of_a_sample(tmp_path):
    files = {"a/1.json": b"{}", "a/1.seg.png": b"mask", "a/1.depth.png": b"depth", "a/1.jpg": b"one", "a/1.png": b"two"}
    files |= {"b/1.jpg": b"other", "b/1.mask": b"its mask", "b/2.cls": b"0"}  # the last has no image
    source = TarSource(str(write_tar(tmp_path / "0.tar", files)))
    assert fetched(source) == [b"one", b"other"]  # the first image of each; folders separate samples
    assert source.has_masks and source.fetch_masks([1, 0]) == [b"its mask", b"mask"]
    assert source.mask_name(0) == f"{tmp_path}/0.tar/a/1.seg.png"


@pytest.mark.parametrize(
    ("endings", "image"),
    [
        (["v2.jpg"], "v2.jpg"),
        (["001.PNG", "json"], "001.PNG"),
        (["right.jpg", "left.jpg", "seg.png"], "right.jpg"),
        *((endings, "jpg") for endings in itertools.permutations(["jpg", "depth.png", "small.jpg"])),
    ],
)
def test_the_image_of_a_sample_has_one_dot_or_else_more(endings, image, tmp_path):
    files = {f"a/{number}.{ending}": ending.encode() for number in range(3) for ending in endings}
    assert fetched(TarSource(str(write_tar(tmp_path / "0.tar", files)))) == [image.encode()] * 3


@pytest.mark.parametrize(
    ("endings", "numbers", "classes"),
    [
        ({"cls": lambda n: b" %d\n" % (n % 3)}, [0, 1, 2, 0], ["0", "1", "2"]),
        ({"cls": lambda n: [b"sea", b"Alp"][n % 2]}, [1, 0, 1, 0], ["Alp", "sea"]),
        ({"json": lambda n: json.dumps({"label": n % 2, "cls": 5}).encode()}, [0, 1, 0, 1], ["0", "1"]),
        ({"json": lambda n: b'{"cls": "sea"}'}, [0, 0, 0, 0], ["sea"]),
        ({"json": lambda n: b'{"label": 7}', "cls": lambda n: b"1"}, [1, 1, 1, 1], ["0", "1"]),
        ({"cls": lambda n: b"1", "json": lambda n: b'{"label": 7}'}, [1, 1, 1, 1], ["0", "1"]),
        ({"json": lambda n: b'{"caption": "a sea"}'}, None, []),
        ({"json": lambda n: b"[no json"}, None, []),
        ({"json": lambda n: b'{"label": "\\ud800"}'}, None, []),
        ({"json": lambda n: b"[" * 100_000}, None, []),
        ({"cls": lambda n: [b"-1", b"1"][n % 2]}, [-1, 1, -1, 1], ["0", "1"]),
        ({"cls": lambda n: [b"", b"sea"][n % 2]}, [-1, 0, -1, 0], ["sea"]),
    ],
)
def test_labels(endings, numbers, classes, tmp_path):
    for first in (0, 2):
        write_tar(tmp_path / f"{first}.tar", samples([first, first + 1], **endings))
    source = TarSource(str(tmp_path / "{0,2}.tar"))
    assert source.classes == classes
    assert (source.labels is None) if numbers is None else np.array_equal(source.labels, numbers)


@pytest.mark.parametrize(
    ("patterns", "shards"),
    [
        (["t-{08..11}.tar"], ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]),
        (["{b,a}-{0..1}.tar", "x.tar"], ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar", "x.tar"]),
        (["?-*.tar"], ["B-0.tar", "a-0.tar", "a-1.tar", "a-10.tar", "b-0.tar", "b-1.tar"]),
        (["{b,a}-*.tar"], ["b-0.tar", "b-1.tar", "a-0.tar", "a-1.tar", "a-10.tar"]),
        (["{x}.tar", "[y].tar"], ["{x}.tar", "[y].tar"]),  # names of files
    ],
)
def test_patterns(patterns, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = ["B-0.tar", "a-0.tar", "a-1.tar", "a-10.tar", "b-0.tar", "b-1.tar"] if "*" in patterns[0] else []
    for name in (*shards, *others):
        Path(name).touch()
    assert expand(patterns) == shards


def test_the_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{n}.tar", samples(range(4 * n, 4 * n + 4), cls=lambda n: b"1")) for n in range(2)]
    for path in paths:
        os.utime(path, (1e9, 1e9))
    pattern, indexed = str(tmp_path / "{0..1}.tar"), []
    index = tar._index
    monkeypatch.setattr(tar, "_index", lambda shards: indexed.append(shards) or index(shards))
    first, second = (TarSource(pattern, cache=tmp_path / "cache") for _ in range(2))
    assert len(indexed) == 1 and fetched(first) == fetched(second) and first.fingerprint() == second.fingerprint()
    assert second.labels.tolist() == [1] * 8 and second.classes == ["0", "1"]
    write_tar(paths[1], samples(range(50, 54), cls=lambda n: b"1"))
    assert fetched(TarSource(pattern, cache=tmp_path / "cache"))[4:] == [encoded(n) for n in range(50, 54)]
    TarSource(pattern, cache=tmp_path / "cache")
    assert len(indexed) == 3  # the last time, too, as the shard had changed just before


def test_a_source_travels_to_workers_and_holds_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tar, "MAX_OPEN", 2)
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", samples([number]))
    source = TarSource(str(tmp_path / "*.tar"))
    expected = [encoded(number) for number in range(6)]
    before = len(os.listdir("/proc/self/fd"))
    assert fetched(source) == expected and fetched(source) == expected
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert fetched(pickle.loads(pickle.dumps(source))) == expected
    child = os.fork()
    if child == 0:  # it reads through the descriptors that it inherits
        os._exit(0 if fetched(source) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0 and fetched(source) == expected


def test_the_fingerprint_follows_members_not_places(tmp_path):
    one = TarSource(str(write_tar(tmp_path / "one" / "0.tar", samples(range(4)))))
    for number in range(2):
        write_tar(tmp_path / "two" / f"{number}.tar", samples(range(2 * number, 2 * number + 2)))
    assert TarSource(str(tmp_path / "two" / "*.tar")).fingerprint() == one.fingerprint()
    labels, masks = {f"000{n}.cls": b"1" for n in range(4)}, {f"000{n}.mask": b"mask" for n in range(4)}
    members = samples(range(4))
    for files in (samples([0, 1, 3, 4]), members | {"0003.jpg": b"larger"}, members | labels, members | masks):
        other = TarSource(str(write_tar(tmp_path / "other.tar", dict(sorted(files.items())))))
        assert other.fingerprint() != one.fingerprint()


def test_a_shard_that_fails_once_is_read_again(tmp_path, monkeypatch):
    source = TarSource(str(write_tar(tmp_path / "0.tar", samples(range(3)))))
    calls, pread = [], os.pread

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(5, "Input/output error")
        return pread(*args)

    monkeypatch.setattr(os, "pread", failing)
    assert source.fetch([2]) == [encoded(2)] and len(calls) == 2
    os.unlink(tmp_path / "0.tar")
    assert isinstance(pickle.loads(pickle.dumps(source)).fetch([0])[0], FileNotFoundError)


def refusal(pattern) -> str:
    with pytest.raises(DataError) as error:
        TarSource(str(pattern))
    return str(error.value)


def test_missing_shards(tmp_path):
    write_tar(tmp_path / "3.tar", samples([1]))
    text = refusal(tmp_path / "{0..9}.tar")
    assert text.startswith(
        f"9 of 10 shards are missing: {', '.join(f'{tmp_path}/{n}.tar' for n in range(3))} and 6 more"
    )
    assert refusal(f"{tmp_path}/3.tar::{tmp_path}/y*.tar").startswith(f"{tmp_path}/y*.tar matches no shard; expected")


def test_a_shard_that_is_cut_anywhere(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(range(5), cls=lambda n: b"1"))
    content = path.read_bytes()
    with tarfile.open(path) as shard:
        end = shard.getmembers()[-1].offset + 1024  # of the last member; the end-of-archive mark follows
    for length in [*range(0, end, 100), end, end + 511]:
        path.write_bytes(content[:length])
        assert refusal(path).startswith(f"{path} is compressed, truncated or damaged (")


def test_shards_that_cannot_be_used(tmp_path):
    broken = bytearray(write_tar(tmp_path / "good.tar", samples(range(3))).read_bytes())
    broken[520] ^= 1  # in the name in the second header
    (tmp_path / "broken.tar").write_bytes(broken)
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    (tmp_path / "pointer.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n" * 30)
    for name, word in [
        ("broken", "no tar header at byte 512"),
        ("empty", "holds no image; expected members named .jpg"),
        ("pointer", "is a Git LFS pointer in place of the file; run git lfs pull$"),
    ]:
        assert re.match(rf"{tmp_path}/{name}.tar.*{word}", refusal(tmp_path / f"{name}.tar"))
    path = write_tar(tmp_path / "packed.tar", samples([1]), mode="w:gz")
    assert refusal(path).startswith(f"{path} is compressed, ")
    for number in range(5):
        (tmp_path / f"many-{number}.tar").write_bytes(b"text" * 1000)
    lines = refusal(tmp_path / "many-*.tar").splitlines()
    assert len(lines) == 4 and lines[3] == "and 2 more shards like these"


def test_shards_whose_labels_or_masks_are_broken_are_read_without_them(tmp_path):
    for name, files, word in [
        ("labels", samples([1, 2], cls=lambda n: b"1.5"), "labels.tar has labels that are not class numbers"),
        ("bytes", samples([1, 2], cls=lambda n: b"\xff"), "bytes.tar has labels that are not text .*0001.jpg"),
    ]:
        source = TarSource(str(write_tar(tmp_path / f"{name}.tar", files)))
        assert fetched(source) == [encoded(1), encoded(2)] and source.labels is None and not source.has_masks
        assert re.search(word, *source.label_errors)
    source = TarSource(
        str(write_tar(tmp_path / "some.tar", samples([1, 2]) | {"0002.cls": b"1", "0002.seg.png": b"1"}))
    )
    assert fetched(source) == [encoded(1), encoded(2)] and source.labels.tolist() == [-1, 1]
    with pytest.raises(DataError, match=r"some.tar/0001.jpg; expected a mask for all images or none"):
        _ = source.has_masks


DOTTED = {
    "frames": [f"video/frame.{n:04d}.jpg" for n in range(9)],
    "two names": [f"{name}.{n}.jpg" for name in ("cat", "dog") for n in range(9)],  # as in Kaggle's Dogs vs. Cats
    "times": [f"Screenshot 10.{n // 10}.{n % 10}.png" for n in range(30)],
    "seconds": [f"{1305031102 + n // 3}.{n * 31415:06d}.png" for n in range(20)],
    "clips": [f"v{clip}/frame.{n:04d}.jpg" for clip in range(12) for n in range(5)],
    "versions": [f"v1.2/a_v1.{n}.final.JPG" for n in range(5)],
}


@pytest.mark.parametrize("name", DOTTED)
@pytest.mark.parametrize("shards", [1, 2])
def test_names_with_dots_are_no_one_sample(name, shards, tmp_path):
    names, paths = DOTTED[name], []
    for shard in range(shards):
        own = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        files = {}
        for path in own:
            stem = path.rpartition(".")[0]
            files |= {
                path: path.encode(),
                f"{stem}.cls": b"%d" % len(path),
                f"{stem}.seg.png": b"mask " + path.encode(),
            }
        paths.append(str(write_tar(tmp_path / f"{shard}.tar", files)))
    source = TarSource("::".join(paths))
    assert fetched(source) == [path.encode() for path in names]
    assert source.labels.tolist() == [len(path) for path in names]
    assert source.fetch_masks(range(len(names))) == [b"mask " + path.encode() for path in names]
    assert source.notes == ["samples    named up to the last dot, as up to the first they would share names"]


def test_views_of_a_sample_are_one_sample_and_told(tmp_path):
    files = {f"{n}.{view}.jpg": b"%d" % n for n in range(9) for view in ("left", "right", "top", "back")}
    source = TarSource(str(write_tar(tmp_path / "0.tar", files)))
    assert fetched(source) == [b"%d" % n for n in range(9)]
    assert source.notes == ["left out   27 further images of samples whose .left.jpg is read"]
    files = {f"{n}.{ending}": b"%d" % n for n in range(3) for ending in ("0.jpg", "1.jpg", "2.jpg", "3.jpg", "cls")}
    source = TarSource(str(write_tar(tmp_path / "2.tar", files)))
    assert fetched(source) == [b"0", b"1", b"2"] and source.labels.tolist() == [0, 1, 2]
    assert source.notes == ["left out   9 further images of samples whose .0.jpg is read"]
    files = {f"{n}.{ending}": b"%d" % n for n in range(3) for ending in ("depth.png", "rgb.jpg")}
    source = TarSource(str(write_tar(tmp_path / "1.tar", files)))
    assert source.notes == ["left out   3 further images of samples whose .depth.png is read"]


def test_members_of_any_name_are_images_by_their_content(tmp_path):
    jpeg = b"\xff\xd8\xff\xe0 and more"
    files = {
        "a/1": jpeg,
        "a/2.jpg_large": jpeg,
        "a/3.txt": jpeg,
        "a/4.dat": b"numbers",
        "5.thumb": jpeg,
        "5.jpg": b"five",
    }
    files |= {"__MACOSX/a/._6.jpg": b"x", "@eaDir/7.jpg/SYNOPHOTO_THUMB_M.jpg": jpeg, "a/.8.jpg": jpeg}
    source = TarSource(str(write_tar(tmp_path / "0.tar", files)))
    assert fetched(source) == [jpeg, jpeg, b"five"]


def test_damage_anywhere_is_told_or_harmless(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(range(4), cls=lambda n: b"1"), format=tarfile.PAX_FORMAT)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for at in rng.integers(0, 4096, 2):
            damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        result = tar.index_shard(str(path))
        assert isinstance(result, str) or len(result.samples) <= 4
