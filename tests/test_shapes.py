"""Tests of the drawn scenes: they are reproducible and labelled by their largest object."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import shapes


@pytest.fixture(scope="module")
def scenes():
    return shapes.draw_range(range(400))


def test_shapes_and_types(scenes):
    images, labels, masks = scenes
    assert images.shape == (400, 64, 64, 3) and images.dtype == np.uint8
    assert labels.shape == (400,) and labels.dtype == np.int64
    assert masks.shape == (400, 64, 64) and masks.dtype == np.uint8
    image, label, mask = shapes.draw(10_999)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert type(label) is int
    assert mask.shape == (64, 64) and mask.dtype == np.uint8 and mask.flags.writeable
    assert len(shapes.CLASSES) == 8 and ("background", *shapes.CLASSES) == shapes.SEGMENTATION_CLASSES


def test_another_process_draws_the_same_bytes(scenes):
    code = (
        "import hashlib, numpy as np; from data import shapes; arrays = shapes.draw_range(range(400));"
        "print(hashlib.sha256(b''.join(a.tobytes() for a in arrays)).hexdigest())"
    )
    root = Path(shapes.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == hashlib.sha256(b"".join(array.tobytes() for array in scenes)).hexdigest()


def test_a_scene_does_not_depend_on_the_others(scenes):
    for index in (399, 7, 0):
        image, label, mask = shapes.draw(index)
        np.testing.assert_array_equal(image, scenes[0][index])
        assert label == scenes[1][index]
        np.testing.assert_array_equal(mask, scenes[2][index])


@pytest.mark.parametrize("processes", [1, 2])
def test_splits_follow_each_other(scenes, processes, monkeypatch, capsys):
    for name, value in dict(TRAIN_IMAGES=60, VALIDATION_IMAGES=5, CHUNK=7).items():
        monkeypatch.setattr(shapes, name, value)
    for split, place, progress in (("train", slice(60), True), ("validation", slice(60, 65), False)):
        for array, expected in zip(
            shapes.draw_split(split, processes=processes, progress=progress), scenes, strict=True
        ):
            np.testing.assert_array_equal(array, expected[place])
        assert (f"drawing builtin:shapes ({split})" in capsys.readouterr().err) == progress


def test_label_is_the_clearly_largest_object(scenes):
    for label, mask in zip(scenes[1], scenes[2], strict=True):
        assert mask.max() <= 8
        areas = np.bincount(mask.ravel(), minlength=9)[1:]
        assert 1 <= (areas > 0).sum() <= shapes.MAX_OBJECTS
        assert areas.argmax() == label
        assert areas[label] >= 140
        assert areas[label] >= 1.25 * np.sort(areas)[-2]


def test_outlines_are_centred_and_of_area_one():
    for outline in shapes.OUTLINES:
        following = np.roll(outline, -1)
        wedges = (outline.conj() * following).imag / 2
        assert abs(wedges.sum()) == pytest.approx(1)
        assert abs((wedges * (outline + following)).sum()) == pytest.approx(0, abs=1e-9)
