"""Tests of data/augment.py: RandAugment gives the same pixels as timm's and depends only on its seed."""

import pickle
import random

import numpy as np
import pytest
from PIL import Image
from test_transforms import picture, pillow
from timm.data import create_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment

from data.augment import OPERATIONS, SIGNED, RandAugment
from data.sampling import seed_everything

MEANS = {3: (0.485, 0.456, 0.406), 1: (0.48,)}


def timm_rand_augment(magnitude: int, size: tuple[int, int], channels: int) -> TimmRandAugment:
    """Return the RandAugment step of timm's own training transform."""
    whole = create_transform(
        (channels, *size),
        is_training=True,
        auto_augment=f"rand-m{magnitude}-mstd0.5-inc1",
        interpolation="bicubic",
        mean=MEANS[channels],
        std=(0.25,) * channels,
    )
    (step,) = (step for step in whole.transforms if isinstance(step, TimmRandAugment))
    return step


def drawing(height: int, width: int, channels: int) -> np.ndarray:
    return np.ascontiguousarray(picture(height, width, channels).permute(1, 2, 0).numpy())


def assert_near(ours: np.ndarray, theirs: Image.Image, *, most: int = 255) -> None:
    """Check that few values differ, by at most `most` levels: Pillow's double precision rounds them differently."""
    difference = np.abs(ours.astype(int) - np.asarray(theirs).reshape(ours.shape))
    assert difference.max() <= most and np.count_nonzero(difference) <= 4 + 0.001 * difference.size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
@pytest.mark.parametrize("magnitude", [0, 5, 9])
def test_rand_augment_is_timms(magnitude, size, channels):
    ours, theirs = RandAugment(magnitude, MEANS[channels]), timm_rand_augment(magnitude, size, channels)
    image = drawing(*size, channels)
    changed = 0
    for seed in range(2**63, 2**63 + 60):
        seed_everything(seed)
        expected = theirs(pillow(picture(*size, channels)))
        result = ours(image, seed)
        assert result.dtype == np.uint8 and result.shape == image.shape
        assert_near(result, expected)
        changed += not np.array_equal(result, image)
    assert changed > 15


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(37, 53), (1, 9), (9, 1), (2, 2)])
def test_every_operation_is_timms(monkeypatch, size, channels):
    theirs, image = timm_rand_augment(9, size, channels).ops, drawing(*size, channels)
    fill = RandAugment(9, MEANS[channels]).fill
    for operation, other in zip(OPERATIONS, theirs, strict=True):
        for level in (0.0, 0.31, 0.62, 0.93, -0.31, -0.87)[: 6 if operation in SIGNED else 4]:
            monkeypatch.setattr(random, "random", lambda level=level: float(level < 0))  # timm takes the sign from it
            arguments = other.level_fn(10 * abs(level), other.hparams) if other.level_fn else ()
            expected = other.aug_fn(pillow(picture(*size, channels)), *arguments, **other.kwargs)
            assert_near(operation(image, level, fill), expected, most=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_flat_areas_keep_their_value_under_shears_and_shifts(channels):
    moves = [operation for operation in OPERATIONS if operation.__name__.startswith(("_shear", "_translate"))]
    assert len(moves) == 4
    for value in range(0, 256, 5):
        image = np.full((24, 24, channels), value, np.uint8)
        for operation in moves:
            for level in (-0.9, -0.123, 0.0, 0.77):
                assert (operation(image, level, (value,) * channels) == value).all(), operation


@pytest.mark.parametrize("channels", [1, 3])
def test_the_highest_magnitude_keeps_no_bits(channels):
    """At magnitude 10 timm asks Pillow to posterize to 0 bits, which Pillow 13 refuses."""
    (posterize,) = (operation for operation in OPERATIONS if operation.__name__ == "_posterize")
    assert not posterize(drawing(8, 8, channels), 1.0, (0,) * channels).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_follows_its_seed_alone(channels):
    image, augment = drawing(32, 40, channels), RandAugment(9, MEANS[channels])
    before = image.copy()
    random.seed(1), np.random.seed(1)
    states = random.getstate(), str(np.random.get_state())
    first = [augment(image, seed) for seed in range(30)]
    assert (random.getstate(), str(np.random.get_state())) == states
    again = pickle.loads(pickle.dumps(augment))
    assert all(np.array_equal(result, again(image, seed)) for seed, result in reversed([*enumerate(first)]))
    assert sum(not np.array_equal(result, image) for result in first) > 10
    assert np.array_equal(image, before)
