"""Tests of data/transforms.py against torchvision and Pillow; crops depend only on the generator."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import Resize

from data.decode import VALID_BYTE, VALID_FLOAT
from data.transforms import (
    CentreCrop,
    RandomCrop,
    evaluation_crop_ratio,
    random_crop_box,
    resized_crop,
    split_validity,
)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (100, 260), (1, 400)])
def test_official_crops_are_one_draw_cut_to_the_image(height, width):
    """Area and aspect ratio are drawn once, each side is cut to the image, and the position is uniform."""
    rng, draws, scale = np.random.default_rng(0), np.random.default_rng(1), (0.08, 1.0)
    boxes = np.array([random_crop_box(rng, height, width, scale=scale, style="official") for _ in range(4000)])
    area = height * width * draws.uniform(*scale, 4000)
    aspect = np.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3), 4000))
    sides = [np.sqrt(area / aspect).round().clip(1, height), np.sqrt(area * aspect).round().clip(1, width)]
    for side, place, whole, column in ((sides[0], 0, height, 2), (sides[1], 1, width, 3)):
        assert boxes[:, column].mean() == pytest.approx(side.mean(), rel=0.02)
        assert (boxes[:, place] >= 0).all() and (boxes[:, place] + boxes[:, column] <= whole).all()
        assert boxes[:, place].mean() == pytest.approx((whole - side).mean() / 2, abs=0.02 * whole)
    if (height, width) == (375, 500):  # the official crops are larger than torchvision's
        usual = np.array([random_crop_box(rng, height, width, scale=scale) for _ in range(4000)])
        shares = [(found[:, 2] * found[:, 3]).mean() / (height * width) for found in (boxes, usual)]
        assert shares == pytest.approx([0.519, 0.432], abs=0.015)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Return smooth colours, sharp edges and a little noise, in channels-last memory like the images of decode()."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + c) * np.cos(y / (9 + c)) for c in range(channels)]
    pixels = 128 + 90 * np.stack(waves, axis=-1) + 40 * ((x // 13 + y // 17) % 2)[:, :, None]
    pixels += np.random.default_rng(seed).normal(0, 4, pixels.shape)
    return torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def pillow(image: torch.Tensor) -> Image.Image:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def pillow_resized_crop(image: torch.Tensor, box, size) -> np.ndarray:
    """Return a crop resized by Pillow's antialiased bicubic filter, the width first and then the height.

    Pillow 13 resizes the height first if that is less work. The image is rounded to 8 bits between the two passes, so
    the result then differs from torch's and older Pillow's alike: the PSNR is 50 to 55 dB.
    """
    top, left, h, w = box
    crop = pillow(image).crop((left, top, left + w, top + h))
    narrow = crop.resize((size[1], h), Image.Resampling.BICUBIC)
    resized = np.asarray(narrow.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return resized.reshape(*size, -1).transpose(2, 0, 1)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (100, 260)])
def test_crop_boxes_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = torch.empty(1, height, width)
    ours = np.array([random_crop_box(rng, height, width) for _ in range(6000)], float)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)], float)

    def quantities(boxes):
        top, left, h, w = boxes.T
        return np.stack([h * w / (height * width), np.log(w / h), top / height, left / width])

    a, b = quantities(ours), quantities(theirs)
    standard_error = np.sqrt((a.var(1) + b.var(1)) / 6000) + 1e-9
    assert (np.abs(a.mean(1) - b.mean(1)) < 4 * standard_error).all()
    assert np.abs(a.std(1) - b.std(1)).max() < 0.02


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 2), (2, 1), (1, 500), (500, 1), (3, 400), (7, 7), (224, 224), (30, 1000)]
)
def test_crop_boxes_lie_inside_the_image(height, width):
    rng = np.random.default_rng(1)
    for scale in ((0.2, 1.0), (0.01, 0.02), (1.0, 1.0)):
        for _ in range(200):
            box = random_crop_box(rng, height, width, scale=scale)
            top, left, h, w = box
            assert all(type(value) is int for value in box)
            assert h >= 1 and w >= 1 and top >= 0 and left >= 0
            assert top + h <= height and left + w <= width


@pytest.mark.parametrize(("height", "width"), [(1, 500), (500, 1), (20, 900), (900, 20)])
def test_the_fallback_box_is_torchvisions(height, width):
    box = random_crop_box(np.random.default_rng(0), height, width, scale=(1.0, 1.0))
    assert box == tuple(RandomResizedCrop.get_params(torch.empty(1, height, width), [1.0, 1.0], [3 / 4, 4 / 3]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (160, 96)])
@pytest.mark.parametrize(
    "box",
    [(0, 0, 300, 400), (20, 30, 247, 214), (3, 5, 100, 90), (0, 100, 290, 150), (9, 0, 80, 400), (2, 7, 160, 160)],
)
def test_resized_crop_is_within_60_db_of_pillow(box, size, channels):
    image = picture(300, 400, channels)
    result = resized_crop(image, box, size)
    assert result.dtype == torch.uint8 and tuple(result.shape) == (channels, *size)
    assert psnr(result.numpy(), pillow_resized_crop(image, box, size)) >= 60


@pytest.mark.parametrize("channels", [1, 3])
def test_layout_of_the_memory_does_not_change_the_result(channels):
    image = picture(120, 150, channels)
    for box, size in (((4, 5, 100, 90), (64, 48)), ((0, 0, 120, 150), (200, 300))):
        assert torch.equal(resized_crop(image, box, size), resized_crop(image.contiguous(), box, size))


def test_resizing_to_the_same_size_is_the_identity():
    image = picture(61, 83)
    assert torch.equal(resized_crop(image, (0, 0, 61, 83), (61, 83)), image)
    assert torch.equal(resized_crop(image, (5, 6, 40, 50), (40, 50)), image[:, 5:45, 6:56])
    assert torch.equal(CentreCrop((61, 83))(image), image)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (40, 30), (375, 500)])
@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_random_crop_takes_any_image_to_any_size(height, width, size, channels):
    image = picture(height, width, channels)
    before = image.clone()
    for seed in range(10):
        result = RandomCrop(size)(image, np.random.default_rng(seed))
        assert result.dtype == torch.uint8 and tuple(result.shape) == (channels, *size)
    assert torch.equal(image, before)


def test_a_random_crop_is_mirrored_half_the_time():
    image = picture(90, 120)
    mirrored = 0
    for seed in range(400):
        result = RandomCrop((16, 24), (0.3, 0.9))(image, np.random.default_rng(seed))
        box = random_crop_box(np.random.default_rng(seed), 90, 120, scale=(0.3, 0.9))
        crop = resized_crop(image, box, (16, 24))
        assert torch.equal(result, crop) or torch.equal(result, crop.flip(2))
        mirrored += not torch.equal(result, crop)
    assert 150 < mirrored < 250


@pytest.mark.parametrize(("height", "width"), [(300, 400), (333, 250), (100, 130), (256, 256), (225, 226)])
@pytest.mark.parametrize(("side", "crop_ratio", "short_side"), [(224, 0.875, 256), (96, 1.0, 96), (63, 0.9, 70)])
def test_a_centre_crop_is_torchvisions_resize_and_centre_crop(height, width, side, crop_ratio, short_side):
    image = picture(height, width)
    resize = Resize(short_side, interpolation=InterpolationMode.BICUBIC, antialias=True)
    result = CentreCrop((side, side), crop_ratio)(image)
    # Not bit-equal: without AVX2, torchvision resizes in float32. A shift by one pixel would give less than 30 dB.
    assert psnr(result.numpy(), CenterCrop(side)(resize(image)).numpy()) >= 50


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (1, 50000), (50000, 1), (37, 53)])
@pytest.mark.parametrize("size", [(32, 32), (24, 56), (56, 24)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_a_centre_crop_takes_any_image_to_any_size(height, width, size, crop_ratio):
    result = CentreCrop(size, crop_ratio)(picture(height, width))
    assert result.dtype == torch.uint8 and tuple(result.shape) == (3, *size)


def test_a_centre_crop_keeps_the_centre_of_a_strip():
    """A long strip is cut before it is resized, and the result is that of resizing it whole."""
    image = picture(20, 1000)
    whole = resized_crop(image, (0, 0, 20, 1000), (40, 2000))[:, :, 980:1020]
    assert psnr(CentreCrop((40, 40))(image).numpy(), whole.numpy()) >= 60


def test_large_images_are_evaluated_as_a_whole():
    assert [evaluation_crop_ratio(size) for size in ((32, 32), (224, 96), (96, 225))] == [0.875, 0.875, 1.0]


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_is_written_into_room_of_any_layout_and_nowhere_else(channels, dtype):
    image = picture(50, 60, 3)[:1].expand(channels, -1, -1).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    image = image if dtype == torch.uint8 else image / 255
    for box, size in (((3, 5, 40, 41), (32, 24)), ((0, 0, 32, 24), (32, 24)), ((7, 0, 1, 60), (8, 8))):
        expected = resized_crop(image, box, size)
        shape = (3, channels, *size)  # only the middle image is written to
        for order in ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 2, 1)):
            room = torch.zeros([shape[axis] for axis in order], dtype=dtype)
            images = room.permute([order.index(axis) for axis in range(4)])
            resized_crop(image, box, size, images[1])
            assert torch.equal(images[1], expected) and not images[0].any() and not images[2].any()


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("size", [(32, 32), (20, 24), (90, 70)])
def test_valid_pixels_of_a_crop_have_nothing_of_invalid_ones(kind, size):
    """Changing the invalid pixels changes the valid pixels of a crop by at most 0.4 % of that change."""
    rng = np.random.default_rng(0)
    valid = rng.random((45, 60)) < 0.99
    valid[10:20, 30:50] = False
    top = 255 if kind == np.uint8 else 1
    marks = np.where(valid, VALID_BYTE if kind == np.uint8 else VALID_FLOAT, 0)
    crops = []
    for fill in (0, top):
        image = np.where(valid, top / 2, fill)
        image = torch.from_numpy(np.stack([image, marks], axis=2).astype(kind)).permute(2, 0, 1)
        crop = RandomCrop(size, (0.3, 1.0))(image, np.random.default_rng(3))
        crops.append(split_validity(crop[None]))
    (low, marked), (high, again) = crops
    assert marked.dtype == torch.bool and marked.shape == (1, 1, *size) and torch.equal(marked, again)
    assert 0.3 < marked.float().mean() < 0.99
    change = (high.double() - low.double()).abs() / top
    assert change[marked].max() <= 0.004 + 0.5 / 255 and change[~marked].max() > 0.9


def test_validity_of_a_crop_of_the_same_size_is_that_of_the_image():
    marks = torch.tensor([[[0, VALID_BYTE, VALID_BYTE], [VALID_BYTE, 0, 0]]], dtype=torch.uint8)
    crop = CentreCrop((2, 3))(torch.cat([marks, marks]))
    assert torch.equal(split_validity(crop[None])[1][0], marks > 0)
