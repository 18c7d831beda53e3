"""Tests of reading the folders that prepare_data.py writes."""

import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import write_images

import prepare_data
from data.decode import PixelFormat, decode
from data.index import DataError
from data.prepared import is_prepared, open_prepared
from data.sources import open_sources
from data.transforms import CentreCrop

PIXELS = PixelFormat()
FIVE = PixelFormat(channels=5, value_range=(0.0, 60000.0))


def prepare(source, out, *flags):
    prepare_data.main([str(source), str(out), "--num_workers", "0", *flags])
    return out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of 13 training and 5 validation images, 60 x 60 pixels, in two classes."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "train", 13, size=60)
    write_images(root / "val", 5, size=60, seed=1)
    return root


@pytest.fixture(scope="module")
def kept(photos, tmp_path_factory):
    return prepare(photos, tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def arrays(photos, tmp_path_factory):
    return prepare(photos, tmp_path_factory.mktemp("arrays"), "--format", "array", "--short_side", "40")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Return a folder of three scenes with 5 bands and different sizes, and the 16-bit arrays in it."""
    folder, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    scenes = [rng.integers(0, 60000, (20 + i, 30, 5)).astype(np.uint16) for i in range(3)]
    for i, scene in enumerate(scenes):
        np.save(folder / f"{i}.npy", scene)
    flags = ("--format", "array", "--input_channels", "5", "--value_range", "0", "60000")
    return prepare(folder, tmp_path_factory.mktemp("deep"), *flags), scenes


def pixels_of(source):
    return [decode(data, PIXELS) for data in source.fetch(range(len(source)))]


def test_kept_files_are_the_source(photos, kept):
    for ours, theirs in zip(open_sources(str(kept), PIXELS), open_sources(str(photos), PIXELS), strict=True):
        assert [bytes(data) for data in ours.fetch(range(len(ours)))] == theirs.fetch(range(len(theirs)))
        assert ours.fingerprint() == theirs.fingerprint()
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
        assert len(ours.name(1)) and "class_0/0002.jpg" in ours.name(1)


def test_arrays_are_views_in_the_sources_order_which_torch_takes_without_a_warning(photos, arrays):
    ours, theirs = open_prepared(arrays, PIXELS)["train"], open_sources(str(photos), PIXELS)[0]
    assert ours.labels.tolist() == theirs.labels.tolist() and ours.classes == theirs.classes
    assert ours.name(1) == str(arrays / "train" / "class_0" / "0002.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image, whole in zip(pixels_of(ours), pixels_of(theirs), strict=True):
            assert torch.equal(image, CentreCrop((40, 40))(whole))
    first = ours.fetch([0])[0]
    assert first.shape == (40, 40, 3) and not first.flags.owndata
    before = (arrays / "train" / "data-00000-of-00001.bin").read_bytes()
    first[:] = 0  # changes only this process's copy
    assert (arrays / "train" / "data-00000-of-00001.bin").read_bytes() == before


def test_deep_arrays_come_out_as_stored_in_shards_of_their_own(deep):
    folder, scenes = deep
    source = open_prepared(folder, FIVE)["train"]
    assert source.labels is None and source.classes == []
    for index in (2, 0, 1):
        (image,) = source.fetch([index])
        assert np.array_equal(image, scenes[index]) and image.dtype == np.float32  # float32 can hold 16-bit integers
    assert source.size_in_bytes() == sum(4 * scene.size for scene in scenes)


def test_another_process_maps_the_files_itself(kept, arrays):
    for folder in (kept, arrays):
        source = open_prepared(folder, PIXELS)["train"]
        packed = pickle.dumps(source)
        assert len(packed) < 4000 < source.size_in_bytes()
        again = pickle.loads(packed)
        assert all(map(torch.equal, pixels_of(again), pixels_of(source)))
        assert again.fingerprint() == source.fingerprint()


def test_a_fingerprint_follows_from_the_source_and_the_settings(photos, kept, arrays, tmp_path):
    smaller = prepare(photos, tmp_path / "smaller", "--format", "array", "--short_side", "30")
    encoded = prepare(photos, tmp_path / "encoded", "--quality", "80")
    again = prepare(photos, tmp_path / "again", "--format", "array", "--short_side", "40", "--shard_size", "0.01")
    found = [open_prepared(folder, PIXELS)["train"].fingerprint() for folder in (kept, arrays, smaller, encoded, again)]
    assert len(set(found[:4])) == 4 and found[4] == found[1]


@pytest.mark.parametrize(
    ("folder", "pixels", "expected"),
    [
        ("deep", PixelFormat(channels=3, value_range=(0.0, 1.0)), "give --input_channels 5"),
        ("deep", PixelFormat(channels=5), r"holds float32 pixels; give --value_range 0\.0 60000\.0,"),
        ("arrays", PixelFormat(value_range=(0.0, 255.0)), "holds uint8 pixels; leave out --value_range"),
        ("arrays", PixelFormat(channels=1), "give --input_channels 3"),
    ],
)
def test_other_pixels_than_requested_name_the_flag(folder, pixels, expected, deep, arrays):
    with pytest.raises(DataError, match=expected):
        open_prepared({"deep": deep[0], "arrays": arrays}[folder], pixels)


def test_kept_files_are_read_as_they_are_asked_for(kept):
    (image,) = open_prepared(kept, PixelFormat(channels=1))["train"].fetch([0])
    assert decode(image, PixelFormat(channels=1)).shape == (1, 60, 60)


def edit(folder, **changes):
    path = folder / "prepared.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: edit(folder, version=2), "another version: 2, expected 1; give another folder, or"),
        (lambda folder: (folder / "prepared.json").write_text("{"), "prepared.json cannot be read"),
        (lambda folder: edit(folder, shards=[3]), "prepared.json cannot be read"),
        (lambda folder: edit(folder, fingerprint=None), "is damaged"),
        (
            lambda folder: cut(folder / "train" / "data-00000-of-00001.bin"),
            r"1 of 2 shards have a wrong size \(train/data-00",
        ),
        (
            lambda folder: (folder / "validation" / "data-00000-of-00001.bin").unlink(),
            "prepared.json cannot be read .FileNotFound",
        ),
        (lambda folder: cut(folder / "train" / "heights.npy"), "is damaged"),
        (lambda folder: (folder / "train" / "offsets.npy").unlink(), "is damaged"),
    ],
)
def test_a_folder_that_cannot_be_read_says_why(arrays, tmp_path, damage, expected):
    folder = shutil.copytree(arrays, tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError, match=expected) as caught:
        open_prepared(folder, PIXELS)
    assert "\n" not in str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def test_an_unfinished_folder_is_known(tmp_path):
    assert not is_prepared(tmp_path)
    (tmp_path / "preparing").mkdir()
    assert not is_prepared(tmp_path)  # this may be a class of that name
    (tmp_path / "preparing" / "plan.json").write_text("{}")
    assert is_prepared(tmp_path)
    with pytest.raises(DataError, match="not completely prepared; repeat the command"):
        open_prepared(tmp_path, PIXELS)
