"""Tests of prepare_data.py through its command line."""

import io
import json
import math
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile
import torch
from conftest import SCENES, finish, run, start, write_images, write_scenes
from PIL import Image

import prepare_data
from data import writing
from data.decode import PixelFormat, decode
from data.index import DataError
from data.masks import MaskFormat
from data.pairs import open_pairs
from data.prepared import open_prepared
from data.segmentation import read_pair
from data.sources import open_sources
from training.files import alone_at
from training.launch import RunError

PIXELS = PixelFormat()


def prepare(*words, workers=0):
    prepare_data.main([str(word) for word in (*words, "--num_workers", workers)])


def refused(capsys, *words):
    """Return the errors for bad flags or data."""
    with pytest.raises(SystemExit) as end:
        prepare(*words)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return "\n".join(line for line in lines if line.startswith("error: "))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_arrays(folder, *arrays):
    folder.mkdir(exist_ok=True)
    for number, array in enumerate(arrays):
        np.save(folder / f"{number}.npy", array)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Return a folder with three classes: small and large JPEG files, a PNG with alpha, and three damaged files."""
    folder = tmp_path_factory.mktemp("mixed")
    write_images(folder, 6, classes=3, size=30)
    large = write_images(folder / "large", 2, classes=1, size=120, seed=1)
    for number, path in enumerate(sorted(large.rglob("*.jpg"))):
        image = Image.open(path).resize((120, 90))
        exif = Image.Exif()
        exif[0x0112] = 6 if number else 1  # 6 is a quarter turn
        image.save(folder / "class_0" / f"large_{number}.jpg", quality=95, exif=exif)
        path.unlink()
    Image.open(folder / "class_0" / "large_0.jpg").convert("RGBA").save(folder / "class_1" / "alpha.png")
    (folder / "class_0" / "0000_text.jpg").write_text("no image")
    (folder / "class_1" / "9_cut.jpg").write_bytes((folder / "class_0" / "large_0.jpg").read_bytes()[:900])
    (folder / "class_2" / "0_empty.jpg").touch()
    return folder


DAMAGED = ["class_0/0000_text.jpg", "class_1/9_cut.jpg", "class_2/0_empty.jpg"]


def listed(out, folder):
    lines = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
    return {str(Path(line["path"]).relative_to(folder)): line["reason"] for line in lines}


def test_files_that_are_kept_are_kept_damaged_and_listed(mixed, tmp_path, capsys):
    prepare(mixed, tmp_path / "out")
    assert [*listed(tmp_path / "out", mixed)] == DAMAGED
    ours, theirs = open_prepared(tmp_path / "out", PIXELS)["train"], open_sources(str(mixed), PIXELS)[0]
    assert [bytes(data) for data in ours.fetch(range(len(ours)))] == theirs.fetch(range(len(theirs)))
    assert "damaged images: 3" in capsys.readouterr().out


def test_images_are_shrunk_upright_and_the_damaged_left_out(mixed, tmp_path):
    prepare(mixed, tmp_path / "out", "--short_side", 45)
    found = open_prepared(tmp_path / "out", PIXELS)["train"]
    assert [*listed(tmp_path / "out", mixed)] == DAMAGED and len(found) == 9
    assert found.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2] and found.classes == ["class_0", "class_1", "class_2"]
    names = [found.name(index).partition("(")[2].rstrip(")") for index in range(9)]
    assert names[3] == "class_0/large_1.jpg" and not {*names} & {*DAMAGED}
    for name, data in zip(names, found.fetch(range(9)), strict=True):
        image, file = decode(data, PIXELS), mixed / name
        assert bytes(data[:2]) == b"\xff\xd8"
        if file.stat().st_size == len(data):  # a small image, which is copied
            assert file.read_bytes() == bytes(data) and image.shape[1:] == (30, 30)
            continue
        assert image.shape[1:] == ((60, 45) if name == "class_0/large_1.jpg" else (45, 60))
        whole = Image.fromarray(decode(file.read_bytes(), PIXELS).permute(1, 2, 0).numpy())
        wanted = np.array(whole.resize(image.shape[:0:-1], Image.Resampling.BICUBIC), dtype=float)
        assert -10 * math.log10(((image.permute(1, 2, 0).numpy() - wanted) ** 2).mean() / 255**2) > 35


def test_quality_encodes_every_image(mixed, tmp_path):
    sizes = []
    for quality in (30, 90):
        prepare(mixed, tmp_path / str(quality), "--quality", quality, "--input_channels", 1)
        pixels = PixelFormat(channels=1)
        found = open_prepared(tmp_path / str(quality), pixels)["train"]
        assert len(found) == 9
        images = [Image.open(io.BytesIO(data)) for data in found.fetch(range(9))]
        assert {image.mode for image in images} == {"L"} and images[3].size == (90, 120)
        sizes.append(found.size_in_bytes())
    assert sizes[0] < sizes[1]


def test_the_library_datasets_loads_it(image_folder, tmp_path, capsys):
    import datasets

    prepare(image_folder, tmp_path / "out", "--shard_size", 0.02)
    assert "images     40 train, 11 validation\nto write   about " in capsys.readouterr().out
    found = datasets.load_from_disk(tmp_path / "out")
    source = open_sources(str(image_folder), PIXELS)[0]
    assert {split: len(found[split]) for split in found} == {"train": 40, "validation": 11}
    assert len(found["train"].cache_files) > 1
    assert found["train"].features["label"].names == ["class_0", "class_1"]
    assert found["train"]["label"] == source.labels.tolist()
    for index in (0, 39):
        pixels = decode(*source.fetch([index]), PIXELS).permute(1, 2, 0).numpy()
        assert np.array_equal(np.array(found["train"][index]["image"]), pixels)
    raw = found["train"].cast_column("image", datasets.Image(decode=False))[3]["image"]
    assert raw["path"] == "class_0/0006.jpg" and raw["bytes"] == source.fetch([3])[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return a list of five images with masks and labels."""
    folder = tmp_path_factory.mktemp("pairs")
    write_scenes(folder, 5, "all", seed=0)
    rows = [f"images/all/scene_{i:02d}.jpg,{name},annotations/all/scene_{i:02d}.png" for i, name in enumerate("abcab")]
    (folder / "list.csv").write_text("path,label,mask\n" + "\n".join(rows))
    return folder / "list.csv"


def test_masks_and_labels_go_with_their_images(pairs, tmp_path):
    import datasets

    prepare(pairs, tmp_path / "out", "--quality", 95)
    ours, theirs = open_prepared(tmp_path / "out", PIXELS)["train"], open_sources(str(pairs), PIXELS)[0]
    assert ours.has_masks and ours.labels.tolist() == [0, 1, 2, 0, 1] and ours.classes == ["a", "b", "c"]
    assert [bytes(mask) for mask in ours.fetch_masks(range(5))] == theirs.fetch_masks(range(5))
    row = datasets.load_from_disk(tmp_path / "out")["train"][4]
    assert row["mask"].size == row["image"].size


def test_pairs_of_a_prepared_folder_equal_those_of_the_folder(scenes, tmp_path):
    folder, out = shutil.copytree(scenes, tmp_path / "scenes"), tmp_path / "out"
    prepare(folder, out, "--statistics")
    prepare(folder, "--statistics")  # without OUT: measure the source itself
    assert statistics_of(out) == statistics_of(folder) and statistics_of(folder)["images"] == 10
    for ours, theirs in zip(open_pairs(str(out), PIXELS), open_pairs(str(folder), PIXELS), strict=True):
        indices = range(len(theirs))
        assert len(ours) == len(theirs) and ours.classes == theirs.classes == SCENES
        assert [bytes(data) for data in ours.fetch(indices)] == theirs.fetch(indices)
        assert [bytes(data) for data in ours.fetch_masks(indices)] == theirs.fetch_masks(indices)
        assert ours.fingerprint() == theirs.fingerprint()


def test_masks_in_colour_keep_their_table(pair_folder, tmp_path_factory):
    output, names = tmp_path_factory.mktemp("out") / "shards", ["void", "sky", "road", "car"]
    colours = np.random.default_rng(0).permutation(12).reshape(4, 3).astype(np.uint8)
    for path in (pair_folder / "annotations").rglob("*.png"):
        Image.fromarray(colours[np.array(Image.open(path))]).save(path)
    lines = [f"{name},{r},{g},{b}\n" for name, (r, g, b) in zip(names, colours, strict=True)]
    (pair_folder / "classes.txt").write_text("name,r,g,b\n" + "".join(lines))
    prepare(pair_folder, output)
    for one, other in zip(open_pairs(str(pair_folder), PIXELS), open_pairs(str(output), PIXELS), strict=True):
        assert one.classes == other.classes == names and len(one) == len(other)
        for i in range(len(one)):
            assert torch.equal(read_pair(one, i, PIXELS)[1], read_pair(other, i, PIXELS)[1])


def test_classes_may_be_numbered_from_0(pair_folder, tmp_path_factory, capsys):
    output = tmp_path_factory.mktemp("out") / "shards"
    (pair_folder / "classes.txt").write_text("0 void\n1 sky\n2 road\n3 car\n")
    assert "give --mask_offset 0" in refused(capsys, pair_folder, output)
    prepare(pair_folder, output, "--mask_offset", 0)
    one, other = (open_pairs(str(path), PIXELS, MaskFormat(0))[0] for path in (pair_folder, output))
    assert one.classes == other.classes == ["void", "sky", "road", "car"]
    assert torch.equal(read_pair(one, 0, PIXELS)[1], read_pair(other, 0, PIXELS)[1])
    prepare(pair_folder, output, "--mask_offset", 0)
    assert "already finished" in capsys.readouterr().out
    (pair_folder / "classes.txt").write_text("sky\nroad\ncar\n")
    assert "was started with --mask_offset 0" in refused(capsys, pair_folder, output)


def test_a_damaged_mask_is_listed(pairs, tmp_path):
    text = pairs.read_text().replace("annotations/all/scene_03.png", "list.csv")
    (pairs.parent / "wrong.csv").write_text(text)
    prepare(pairs.parent / "wrong.csv", tmp_path / "kept")
    assert len(open_prepared(tmp_path / "kept", PIXELS)["train"]) == 5
    prepare(pairs.parent / "wrong.csv", tmp_path / "encoded", "--quality", 80)
    assert len(open_prepared(tmp_path / "encoded", PIXELS)["train"]) == 4
    for out in ("kept", "encoded"):
        ((name, reason),) = listed(tmp_path / out, pairs.parent).items()
        assert name == "images/all/scene_03.jpg" and reason.startswith("its mask: ")


def test_masks_keep_their_size_and_are_in_no_arrays(pairs, tmp_path, capsys):
    for flags in (["--short_side", 20], ["--format", "array"]):
        assert "masks, which need their own size and --format jpeg" in refused(capsys, pairs, tmp_path / "out", *flags)


@pytest.mark.parametrize("flags", [["--short_side", "35"], ["--format", "array"], []])
def test_the_bytes_do_not_depend_on_the_workers(mixed, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(prepare_data, "CHUNK_SAMPLES", 2)
    for workers in (0, 2):
        prepare(mixed, tmp_path / str(workers), "--shard_size", 0.005, *flags, workers=workers)
    found = files_of(tmp_path / "0")
    assert found == files_of(tmp_path / "2")
    assert len([path for path in found if path.name.startswith("data-")]) > 1


def test_a_killed_preparation_goes_on(tmp_path):
    photos = write_images(tmp_path / "photos", 50)
    flags = ["photos", "out", "--format", "array", "--shard_size", "0.005", "--num_workers", "0"]
    process = start("prepare_data.py", *flags, cwd=tmp_path)
    finished = tmp_path / "out" / "preparing"
    while len(list(finished.glob("train-*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert not (tmp_path / "out" / "prepared.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").glob("data-*")}
    again = run("prepare_data.py", *flags, cwd=tmp_path)
    assert re.search(r"resumes +\d+ of 48 shards are finished", again.stdout)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "train").glob("data-*")}
    assert len(after) == 48 and sum(after[name] == before[name] for name in before) >= 5
    prepare(photos, tmp_path / "whole", *flags[2:-2])
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_workers_do_not_outlive_a_killed_preparation(tmp_path):
    write_images(tmp_path / "photos", 60, size=300)
    flags = ["photos", "out", "--format", "array", "--shard_size", "0.3", "--num_workers", "2"]
    process = start("prepare_data.py", *flags, cwd=tmp_path)
    while not list((tmp_path / "out" / "preparing").glob("train-*")):
        assert process.poll() is None
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_what_was_begun_is_not_mixed_with_other_settings_or_images(tmp_path, capsys, monkeypatch):
    photos, out = write_images(tmp_path / "photos", 4), tmp_path / "out"
    prepare(photos, out, "--short_side", 20)
    before = files_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(writing.FileEncoder, "encode", None)  # no image is encoded again
        prepare(photos, out, "--short_side", 20)
    assert "already finished" in capsys.readouterr().out
    errors = refused(capsys, photos, out, "--quality", 80, "--input_channels", 1)
    for change in ("--short_side 20, not None", "--quality None, not 80", "--input_channels 3, not 1"):
        assert f"started with {change}" in errors
    image = photos / "class_0" / "0000.jpg"
    data = image.read_bytes()
    image.write_bytes(data + b"\0")
    assert "started with other images" in refused(capsys, photos, out, "--short_side", 20)  # the names are the same
    image.write_bytes(data)
    write_images(photos / "more", 1)
    assert "started with other images" in refused(capsys, photos, out, "--short_side", 20)
    assert files_of(out) == before


def test_checksums_are_compared(tmp_path, capsys):
    photos, out = write_images(tmp_path / "photos", 4), tmp_path / "out"
    prepare(photos, out, "--verify")
    assert f"verified   {out}: all 1 checksums match" in capsys.readouterr().out
    (shard,) = out.rglob("*.arrow")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(RunError, match=r"out: shards have changed \(train/data-00000-of-00001.arrow\); remove"):
        prepare(out, "--verify")
    assert "was not written by this script" in refused(capsys, photos, "--verify")


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    photos = write_images(tmp_path / "photos", 4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    assert "holds something else" in refused(capsys, photos, tmp_path / "out")
    assert [*files_of(tmp_path / "out")] == [Path("thesis.txt")]
    write_images(tmp_path / "other" / "preparing", 1)  # a class folder with this name
    assert "holds something else" in refused(capsys, photos, tmp_path / "other")
    assert "is inside SOURCE" in refused(capsys, photos, photos / "out")
    for name, content in (("preparing/plan.json", "["), ("preparing/plan.json", '{"a": 1}'), ("prepared.json", "{}")):
        path = tmp_path / f"names_{len(content)}" / name
        path.parent.mkdir(parents=True)
        path.write_text(content)
        remedy = "give another folder, or" if name == "prepared.json" else "holds something else"
        assert remedy in refused(capsys, photos, tmp_path / f"names_{len(content)}")
        assert path.read_text() == content
    (tmp_path / "killed" / "preparing").mkdir(parents=True)
    (tmp_path / "killed" / "preparing" / ".plan.json.tmp").touch()  # killed while it wrote the plan
    prepare(photos, tmp_path / "killed")
    (tmp_path / "killed" / "preparing").mkdir()
    (tmp_path / "killed" / "preparing" / "thesis.txt").touch()  # beside the finished data
    prepare(photos, tmp_path / "killed")
    assert (tmp_path / "killed" / "preparing" / "thesis.txt").exists()


def test_too_little_room_is_told_before_anything_is_written(mixed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5000}))
    errors = refused(capsys, mixed, tmp_path / "out", "--format", "array")
    assert re.search(r"needs about .* kB, and 5 kB are free", errors)
    assert not (tmp_path / "out").exists()


def test_one_process_writes_at_a_time(tmp_path):
    write_images(tmp_path / "photos", 4)
    with alone_at(tmp_path / "out"):
        end = run("prepare_data.py", "photos", "out", cwd=tmp_path, code=1)
    assert "is being written by another process" in end.stderr and "Traceback" not in end.stderr


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["photos"], ["OUT is missing"]),
        (["photos", "--short_side", "3", "--statistics"], ["--short_side needs a folder to write; give OUT"]),
        (
            ["photos", "--format", "array", "--quality", "90", "--shard_size", "1", "--verify"],
            [*(f"--{name} needs a folder" for name in ("format", "quality", "shard_size")), "--quality needs --format"],
        ),
        (["list.csv", "list.csv/out"], []),  # SOURCE is a file, so OUT is not inside it
        (["photos", "out", "--quality", "9", "--format", "array"], ["--quality needs --format jpeg"]),
        (["photos", "out", "--value_range", "2", "1"], ["--value_range 2 1 is not increasing"]),
        (["photos", "out", "--short_side", "9", "--input_channels", "4"], ["give --format array"]),
        (["photos", "out", "--quality", "9", "--value_range", "0", "1"], ["give --format array"]),
    ],
)
def test_bad_flags_are_refused_together(flags, expected):
    _, errors = prepare_data.parse_args(flags)
    assert len(errors) == len(expected)
    assert all(text in error for text, error in zip(expected, errors, strict=True))


def test_images_that_cannot_be_used_are_told_before_the_first_shard(tmp_path, capsys):
    heights = write_arrays(tmp_path / "heights", *(np.ones((9, 9), np.float32) for _ in range(3)))
    assert "give --value_range" in refused(capsys, heights, tmp_path / "out", "--input_channels", 1)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("no image")
    errors = refused(capsys, tmp_path / "texts", tmp_path / "out")
    assert re.match(r"error: no image can be used; 1 images cannot be read: .*a\.jpg: not an image", errors)
    assert not (tmp_path / "out" / "preparing").exists()


def test_errors_have_no_traceback(tmp_path):
    end = run("prepare_data.py", "nowhere", "out", "--statistics", cwd=tmp_path, code=2)
    assert end.stderr.startswith("error: nowhere") and "Traceback" not in end.stderr


def write_geotiff(path, array):
    """Write a tile that declares zeros to be nodata."""
    tifffile.imwrite(path, array, extratags=[(42113, "s", 2, "0", True)])


def test_arrays_with_a_range_hold_numbers_of_all_types_and_none_for_nodata(tmp_path, monkeypatch):
    small, wide, deep = np.ones((4, 5), np.uint8), np.full((4, 5), 65535, np.uint16), np.full((4, 5), 0.5, np.float32)
    folder, tile = write_arrays(tmp_path / "arrays", small, wide, deep), wide.copy()
    tile[0] = 0
    write_geotiff(folder / "tile.tif", tile)
    monkeypatch.setattr(prepare_data, "PROBED", 2)
    flags = ["--format", "array", "--input_channels", 1, "--value_range", 0, 65535]
    prepare(folder, tmp_path / "out", *flags)
    pixels = PixelFormat(channels=1, value_range=(0.0, 65535.0))
    found = open_prepared(tmp_path / "out", pixels)["train"]
    wanted = tile.astype(np.float32)
    wanted[0] = np.nan
    for image, values in zip(found.fetch(range(4)), (small, wide, deep, wanted), strict=True):
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image[..., 0], values)
    source = open_sources(str(folder), pixels)[0]
    for ours, theirs in zip(found.fetch(range(4)), source.fetch(range(4)), strict=True):
        assert torch.equal(decode(ours, pixels), decode(theirs, pixels))


def test_deep_numbers_are_shrunk_and_nodata_stay(tmp_path):
    steps = np.kron([[0, 65535], [65535, 0]], np.ones((20, 20))).astype(np.float32)
    small = writing.shrink(steps[..., None], 10)
    assert small.shape == (10, 10, 1) and small.dtype == np.float32 and abs(small.mean() - 65535 / 2) < 200
    heights = np.ones((40, 40), np.float32)
    heights[:8] = -9999
    folder = write_arrays(tmp_path / "heights", heights)
    flags = ["--input_channels", 1, "--value_range", 0, 2, "--nodata", -9999, "--format", "array", "--short_side", 20]
    prepare(folder, tmp_path / "out", *flags)
    (found,) = open_prepared(tmp_path / "out", PixelFormat(1, (0.0, 2.0), -9999.0))["train"].fetch([0])
    assert found.shape == (20, 20, 1) and np.isnan(found[:4]).all() and np.allclose(found[8:], 1)


def test_a_side_that_jpeg_does_not_hold_is_listed(tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("L", (70000, 1)).save(tmp_path / "photos" / "long.png")
    Image.new("L", (70, 1)).save(tmp_path / "photos" / "short.png")
    prepare(tmp_path / "photos", tmp_path / "out", "--quality", 80)
    assert "1 x 70000 pixels, more than JPEG holds" in listed(tmp_path / "out", tmp_path / "photos")["long.png"]


def statistics_of(folder):
    return json.loads((folder / "statistics.json").read_text())


def test_statistics_are_those_of_all_pixels(mixed, tmp_path, capsys):
    prepare(mixed, tmp_path / "out", "--format", "array", "--statistics", workers=2)
    images = open_prepared(tmp_path / "out", PIXELS)["train"]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images.fetch(range(len(images)))]) / 255
    found = statistics_of(tmp_path / "out")
    assert found["images"] == 9 and found["channels"] == 3 and found["value_range"] is found["nodata"] is None
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-12)
    words = capsys.readouterr().out.partition("statistics ")[2].splitlines()[0].split()
    assert words[:3] == ["--input_channels", "3", "--mean"] and words[6] == "--std"
    assert [float(word) for word in words[3:6]] == found["mean"] and [float(word) for word in words[7:]] == found["std"]


def test_statistics_of_heights_find_their_range_and_leave_out_what_has_no_data(tmp_path, capsys):
    rng = np.random.default_rng(0)
    heights = [rng.normal(1e6, 3, (9, 8 + i)).astype(np.float32) for i in range(40)]
    for array in heights:
        array[:2], array[2, 0] = -9999, np.nan
    heights.append(np.full((4, 4), -9999, np.float32))
    folder = write_arrays(tmp_path / "heights", *heights)
    prepare(folder, "--statistics", "--input_channels", 1, "--nodata", -9999)
    values = np.concatenate([array.ravel() for array in heights]).astype(float)
    values = values[values > 0]
    found = statistics_of(folder)
    assert found["value_range"] == [values.min(), values.max()] and found["nodata"] == -9999 and found["images"] == 41
    scaled = (values - values.min()) / np.ptp(values)
    np.testing.assert_allclose([found["mean"][0], found["std"][0]], [scaled.mean(), scaled.std()], rtol=1e-9)
    flags = capsys.readouterr().out.partition("statistics ")[2].splitlines()[0].split()
    assert "--nodata -9999 --mean " in " ".join(flags)
    start = flags.index("--value_range") + 1
    assert [float(word) for word in flags[start : start + 2]] == found["value_range"]
    args, _ = prepare_data.parse_args([str(folder), "--statistics", *flags[: flags.index("--mean")]])
    assert args.value_range == found["value_range"] and args.nodata == found["nodata"]


def test_statistics_of_eight_bits_are_of_what_a_run_sees(tmp_path):
    colour = np.random.default_rng(0).integers(1, 256, (20, 20, 3), dtype=np.uint8)
    colour[:5], grey = 7, np.full((20, 20), 50, np.uint8)
    grey[:, :10] = 7
    (tmp_path / "mixed").mkdir()
    Image.fromarray(colour).save(tmp_path / "mixed" / "colour.png")
    Image.fromarray(grey).save(tmp_path / "mixed" / "grey.png")
    prepare(tmp_path / "mixed", "--statistics", "--nodata", 7)
    found = statistics_of(tmp_path / "mixed")
    values = np.concatenate([colour.reshape(-1, 3), np.repeat(grey.reshape(-1, 1), 3, axis=1)]).astype(float)
    values[values == 7] = np.nan
    assert found["images"] == 2 and found["value_range"] is None and found["nodata"] == 7
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 0) / 255, rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.nanstd(values, 0) / 255, rtol=1e-12)
    for name, dtype in (("8", np.uint8), ("16", np.uint16)):
        (tmp_path / name).mkdir()
        tile = np.full((6, 6), 100, dtype)
        tile[0], tile[1] = 0, 90
        write_geotiff(tmp_path / name / "tile.tif", tile)
        prepare(tmp_path / name, "--statistics", "--input_channels", 1)
    assert statistics_of(tmp_path / "8")["value_range"] is None
    assert statistics_of(tmp_path / "16")["value_range"] == [90, 100]


def test_statistics_follow_a_range_that_is_given(tmp_path):
    values = np.random.default_rng(0).integers(0, 3000, (9, 9, 2)).astype(np.uint16)
    values[..., 1] = 700
    folder = write_arrays(tmp_path / "bands", values)
    flags = ["--statistics", "--input_channels", 2, "--value_range", 1000, 2000]
    prepare(folder, *flags)
    found, scaled = statistics_of(folder), ((values - 1000.0) / 1000).clip(0, 1)
    np.testing.assert_allclose(found["mean"], scaled.mean((0, 1)), atol=1e-12)
    np.testing.assert_allclose(found["std"], [scaled[..., 0].std(), 1], rtol=1e-12)  # the second band is constant
    prepare(folder, tmp_path / "out", "--format", "array", *flags)
    assert statistics_of(tmp_path / "out") == found


def test_statistics_that_have_no_folder_are_printed(capsys, pairs):
    prepare(pairs, "--statistics")
    assert re.search("--mean(.|\n)*give the scripts these flags", capsys.readouterr().out)


def test_the_statistics_of_another_program_stay(image_folder, tmp_path, capsys):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "statistics.json").write_text('{"mean": [0.5]}')
    prepare(folder, "--statistics")
    assert (folder / "statistics.json").read_text() == '{"mean": [0.5]}'
    said = capsys.readouterr().out
    assert "--mean" in said and "give the scripts these flags" in said and "was written by another program" in said
    (folder / "statistics.json").unlink()
    (folder / "statistics.json").symlink_to("nowhere")  # as git-annex leaves files that are not fetched
    prepare(folder, "--statistics")
    assert (folder / "statistics.json").is_symlink()
    (folder / "statistics.json").unlink()
    for _ in range(2):  # its own statistics are overwritten
        prepare(folder, "--statistics")
    assert statistics_of(folder)["images"] == 40


def test_statistics_of_nothing_leave_nothing(tmp_path, capsys):
    folder = write_arrays(tmp_path / "flat", np.full((4, 4), 7, np.int32))
    assert "all pixels are 7" in refused(capsys, folder, "--statistics", "--input_channels", 1)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("no image")
    assert "no image can be measured; 1 images cannot be read" in refused(capsys, tmp_path / "texts", "--statistics")
    assert not list(tmp_path.rglob("statistics.json"))


@pytest.mark.parametrize("labels", [["0", "-1", "1"], ["0", "1.5", "1"]])
def test_labels_with_gaps_are_kept_and_broken_ones_told(tmp_path, capsys, labels):
    write_images(tmp_path, 3, classes=1)
    lines = [f"class_0/{i:04d}.jpg,{label}\n" for i, label in enumerate(labels)]
    (tmp_path / "list.txt").write_text("path,label\n" + "".join(lines))
    prepare_data.main(
        [str(tmp_path / "list.txt"), str(tmp_path / "out"), "--data_format", "list", "--num_workers", "0"]
    )
    train, _ = open_sources(str(tmp_path / "out"), PixelFormat(3))
    is_broken = "1.5" in labels
    assert (train.labels is None) if is_broken else train.labels.tolist() == [0, -1, 1]
    told = "list.txt has labels that are not class numbers (row 2: '1.5'); expected 0 to 999999, or names"
    assert (told in capsys.readouterr().err) == is_broken


@pytest.mark.parametrize("validity", ["mask", "channel"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_statistics_leave_invalid_pixels_out(validity, dtype, tmp_path, capsys):
    rng, rows, known = np.random.default_rng(0), [], []
    for i in range(9):
        image, valid = rng.integers(0, 200, (30, 20, 2)).astype(dtype), rng.random((30, 20)) < 0.7
        known.append(image[valid])
        image = np.where(valid[..., None], image, 250).astype(dtype)
        np.save(tmp_path / f"{i}.npy", np.dstack([image, valid.astype(dtype)]) if validity == "channel" else image)
        Image.fromarray(valid.astype(np.uint8) * 255).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.npy", "mask": f"{i}.png"})
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(tmp_path / "list.jsonl", "--statistics", "--input_channels", 2, "--validity", validity)
    words = capsys.readouterr().out.partition("--mean ")[2].splitlines()[0].split()
    values = np.concatenate(known).astype(np.float64)
    low, high = (0, 255) if dtype == "uint8" else (values.min(), values.max())
    assert [float(word) for word in words[:2]] == pytest.approx((values.mean(axis=0) - low) / (high - low))
    assert [float(word) for word in words[3:]] == pytest.approx(values.std(axis=0) / (high - low))


def test_validity_needs_images_as_they_are(tmp_path):
    _, errors = prepare_data.parse_args(["a", "b", "--validity", "channel", "--format", "array"])
    assert errors == ["--validity needs images as they are; leave out --format array, --short_side and --quality"]


def test_statistics_of_masks_in_files_that_declare_zeros_to_be_nodata(tmp_path, capsys):
    rng = np.random.default_rng(0)
    image, valid = rng.integers(1, 200, (30, 20, 2)).astype(np.uint8), rng.random((30, 20)) < 0.5
    options = dict(photometric="minisblack", planarconfig="contig", extratags=[(42113, 2, 0, "0", True)])
    (tmp_path / "tiles").mkdir()
    tifffile.imwrite(tmp_path / "tiles" / "a.tif", np.dstack([image, valid * np.uint8(255)]), **options)
    prepare(tmp_path / "tiles", "--statistics", "--input_channels", 2, "--validity", "channel")
    values = image[valid].astype(np.float64) / 255
    assert statistics_of(tmp_path / "tiles")["mean"] == pytest.approx(values.mean(axis=0))


def test_prepared_images_whose_holes_are_filled_have_no_validity(tmp_path, capsys):
    write_images(tmp_path / "images", 4)
    prepare(tmp_path / "images", tmp_path / "out", "--format", "array", "--nodata", 0)
    with pytest.raises(DataError, match="has filled pixels without data; give --validity none, or prepare"):
        open_sources(str(tmp_path / "out"), PixelFormat(3, nodata=0, validity="nodata"))
    assert open_sources(str(tmp_path / "out"), PixelFormat(3, nodata=0))
