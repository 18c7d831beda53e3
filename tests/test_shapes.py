"""Test that the drawn scenes are reproducible, labelled by their largest object, and learnable."""

import hashlib
import random
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
def test_chunks_and_processes_keep_values_and_order(scenes, processes, monkeypatch):
    monkeypatch.setattr(shapes, "CHUNK", 7)  # 60 is no multiple of 7
    drawn = shapes.draw_range(range(20, 80), processes=processes)
    for array, expected in zip(drawn, scenes, strict=True):
        np.testing.assert_array_equal(array, expected[20:80])


def test_splits_follow_each_other(monkeypatch, capsys):
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 5)
    monkeypatch.setattr(shapes, "VALIDATION_IMAGES", 3)
    train, validation = shapes.draw_split("train"), shapes.draw_split("validation")
    assert capsys.readouterr().err == ""
    together = shapes.draw_range(range(8))
    for first, second, both in zip(train, validation, together, strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), both)
    shapes.draw_split("train", progress=True)
    assert "drawing builtin:shapes (train)" in capsys.readouterr().err


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


def test_global_random_state_is_untouched():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    shapes.draw(3)
    assert (random.random(), np.random.random()) == expected
