"""Tests of the arithmetic of channel statistics and of reading statistics.json."""

import json

import numpy as np
import pytest

from data.decode import PixelFormat
from data.index import DataError
from data.statistics import merge, moments_of, read_statistics, statistics_of

STATISTICS = dict(version=1, images=4, channels=2, value_range=None, nodata=None, mean=[0.5, 0.4], std=[0.2, 0.1])


def test_moments_of_parts_are_those_of_all_pixels_far_from_zero():
    rng = np.random.default_rng(0)
    images = [rng.normal([1e6, -5], [3, 1e-3], (4 + i, 7, 2)) for i in range(5)]
    images[1][0, 0], images[2][:] = (np.nan, np.inf), np.nan  # a pixel and an image without data
    parts = [moments_of(image, None) for image in images]
    found = merge([merge(parts[:2]), merge(parts[2:])])
    pixels = np.concatenate([image.reshape(-1, 2) for image in images])
    for channel, own in enumerate(pixels.T):
        own = own[np.isfinite(own)]
        assert (found.count[channel], found.low[channel], found.high[channel]) == (len(own), own.min(), own.max())
        np.testing.assert_allclose(found.mean[channel], own.mean(), rtol=1e-14)
        np.testing.assert_allclose(found.squares[channel], own.var() * len(own), rtol=1e-9)
    assert found.images == 5


@pytest.mark.parametrize(
    ("values", "value_range", "eight_bit", "mean", "std", "found_range"),
    [
        ([0, 255], None, True, 0.5, 0.5, None),
        ([51, 51], None, True, 0.2, 1.0, None),  # a constant channel is not scaled
        ([-100.0, 300.0], None, False, 0.5, 0.5, [-100, 300]),
        ([-100.0, 300.0], (0.0, 200.0), False, 0.5, 0.5, [0, 200]),
        ([0.0, np.nan, 100.0], (0.0, 200.0), False, 0.25, 0.25, [0, 200]),
    ],
)
def test_statistics_are_in_units_of_the_range(values, value_range, eight_bit, mean, std, found_range):
    moments = moments_of(np.array(values).reshape(1, -1, 1), value_range)
    found = statistics_of(moments, PixelFormat(1, value_range), eight_bit=eight_bit)
    np.testing.assert_allclose([found["mean"], found["std"]], [[mean], [std]], rtol=1e-12)
    assert found["value_range"] == found_range and found["images"] == found["channels"] == 1


def test_pixels_without_a_range_are_refused():
    for value, what in ((1000000.25, r"all pixels are 1000000\.25"), (np.nan, "no pixel has data")):
        with pytest.raises(DataError, match=what):
            statistics_of(moments_of(np.full((2, 2, 1), value), None), PixelFormat(1), eight_bit=False)


def test_statistics_are_read_as_written_or_absent(tmp_path):
    assert read_statistics(tmp_path) is None
    moments = moments_of(np.ones((2, 3, 4)) * 7, (0.0, 10.0))
    written = statistics_of(moments, PixelFormat(4, (0.0, 10.0)), eight_bit=False)
    for statistics in (written, STATISTICS):
        (tmp_path / "statistics.json").write_text(json.dumps(statistics))
        assert read_statistics(tmp_path) == statistics


@pytest.mark.parametrize(
    "content",
    [
        *(STATISTICS | {"version": 2}, STATISTICS | {"mean": [0.5]}, STATISTICS | {"std": [0.1, 0]}),
        *(STATISTICS | {"mean": [0.5, float("nan")]}, STATISTICS | {"mean": "ab"}, STATISTICS | {"channels": 3}),
        *(STATISTICS | {"value_range": [1, 0]}, STATISTICS | {"value_range": 3}),
        *("", json.dumps(STATISTICS)[:-9], "\0"),  # empty, truncated and overwritten
    ],
)
def test_malformed_statistics_are_refused(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(DataError, match="remove it, and write it again"):
        read_statistics(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"mean": [0.5], "std": [0.1]}', '{"version": 1}'])
def test_the_statistics_of_another_program_are_not_read(tmp_path, monkeypatch, capsys, content):
    path = tmp_path / "statistics.json"
    path.write_text(content)
    assert read_statistics(tmp_path) is None
    assert capsys.readouterr().err == f"warning: {path} was not written by prepare_data.py, and is not read\n"
    monkeypatch.setenv("RANK", "1")  # only the main process prints the warning
    assert read_statistics(tmp_path) is None and not capsys.readouterr().err
