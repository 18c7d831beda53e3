import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

from data import segmentation
from data.batches import make_loader
from data.classes import ade20k_classes
from data.decode import PixelFormat
from data.masks import IGNORED
from data.pairs import SegmentationFolder, check_masks, open_pairs
from data.segmentation import (
    EvaluationPairs,
    SegmentationDataset,
    keep_ratio,
    palette,
    photometric_distortion,
    training_pair,
    view_sizes,
)

FILL = [124, 116, 104]


def blocks(rng: np.random.Generator, size: tuple[int, int], labels: list[int], block: int = 24) -> np.ndarray:
    """Return a mask of random squares, uint8 of `size`."""
    rows, columns = (-(-side // block) for side in size)
    coarse = rng.choice(np.array(labels, np.uint8), (rows, columns))
    return np.kron(coarse, np.ones((block, block), np.uint8))[: size[0], : size[1]]


def augmented(image, mask, seed, *, fill=FILL, ratio=(0.5, 2), max_share=0.75, **options):
    """Return `training_pair` of an image (H, W, C), cropped to 64 pixels and not distorted."""
    options = dict(crop_size=64, resize=(256, 64), fill=fill) | options
    pair = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "photometric_distortion", lambda image, rng: image)
        patch.setattr(segmentation, "SCALES", ratio)
        patch.setattr(segmentation, "MAX_SHARE", max_share)
        return training_pair(*pair, np.random.default_rng(seed), **options)


def test_the_palette_goes_on_behind_ade20k():
    colours = palette(254)
    assert colours.shape == (254, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[:150], ade20k_classes()[1])
    np.testing.assert_array_equal(palette(180), colours[:180])
    assert palette(2).shape == (2, 3)
    eleven = palette(11).astype(int)  # fewer classes have ADE20K colours that are easy to tell apart
    assert {tuple(colour) for colour in eleven} <= {tuple(colour) for colour in ade20k_classes()[1].astype(int)}
    assert min(np.linalg.norm(a - b) for i, a in enumerate(eleven) for b in eleven[:i]) > 100
    assert len({tuple(colour) for colour in colours}) == 253  # ADE20K itself has one colour twice


# Transforms


def test_sizes_by_hand():
    assert keep_ratio(512, 683, 2048, 512) == (512, 683)
    assert keep_ratio(360, 480, 2048, 512) == (512, 683)  # 480 * 512 / 360 = 682.67
    assert keep_ratio(480, 360, 1024, 256) == (341, 256)
    assert keep_ratio(100, 1000, 2048, 512) == (205, 2048)  # the long side is the limit: 204.8
    assert keep_ratio(1, 100_000, 2048, 512) == (1, 2048)
    assert keep_ratio(64, 64, 512, 128) == (128, 128)


def test_views_of_every_shape_hold_two_patches_a_side():
    sizes = dict(resize=(256, 64), crop_size=64, patch_size=8)
    assert view_sizes(480, 640, mode="slide", scales=[1.0, 0.5], **sizes) == [(64, 85), (32, 40)]
    assert view_sizes(480, 640, mode="whole", scales=[1.0, 1.3], **sizes) == [(64, 64), (80, 80)]
    assert view_sizes(10, 4000, mode="slide", scales=[1.0], **sizes) == [(16, 256)]
    assert view_sizes(50, 60, mode="slide", scales=[0.3], **sizes) == [(16, 24)]  # 19 x 23 has no whole patches
    assert view_sizes(9, 9, mode="whole", scales=[0.1], **sizes) == [(16, 16)]


@pytest.mark.parametrize("seed", range(12))
def test_image_and_mask_stay_aligned(seed):
    rng = np.random.default_rng(seed)
    mask = blocks(rng, tuple(rng.integers(60, 200, 2)), [0, 1, 2, 3, 255])
    colours = rng.integers(0, 256, (256, 3), dtype=np.uint8)
    image, mask = augmented(colours[mask], mask, seed, ratio=(0.5, 3))
    assert image.shape == (3, 64, 64) and mask.shape == (64, 64) and image.dtype == mask.dtype == torch.uint8
    one_hot = torch.stack([mask == label for label in (0, 1, 2, 3, 255)]).float()
    inside = max_pool2d(one_hot, 5, stride=1).sum(0) == 1  # no edge within reach of the filter
    image, mask = image[:, 2:-2, 2:-2], mask[2:-2, 2:-2]
    shown = image.permute(1, 2, 0)[inside].numpy()
    padded = np.tile(np.array(FILL), (len(shown), 1))
    labels = mask[inside].numpy()
    fits = (shown == colours[labels]).all(1) | ((labels == 255) & (shown == padded).all(1))
    assert inside.float().mean() > 0.2 and fits.all()


@pytest.mark.parametrize("scale", [0.4, 0.6, 0.7, 1, 1.3, 1.6, 2, 3])
def test_edges_of_image_and_mask_do_not_drift_apart(scale):
    mask = np.kron(np.random.default_rng(0).integers(0, 2, (10, 10), dtype=np.uint8), np.ones((7, 7), np.uint8))
    options = dict(crop_size=210, resize=(70, 70), ratio=(scale, scale), max_share=2)
    image, mask = augmented(mask[..., None] * 255, mask, 0, fill=[0], **options)
    assert ((image[0] > 127) != (mask == 1)).sum() < 0.015 * (70 * scale) ** 2  # plain nearest: up to 0.12


def test_a_class_that_fills_the_crop_is_avoided():
    mask = np.zeros((100, 400), np.uint8)
    mask[:, 300:] = np.arange(100) // 34 + 1  # three other classes at one end
    image = np.zeros((100, 400, 3), np.uint8)
    options = dict(crop_size=100, resize=(400, 100), ratio=(1, 1))

    def shares(max_share):
        for seed in range(60):
            _, crop = augmented(image, mask, seed, max_share=max_share, **options)
            yield np.bincount(crop.ravel()).max() / crop.numel()

    free, capped = (np.array(list(shares(cap))) for cap in (2, 0.75))
    assert (free >= 0.75).mean() > 0.6  # 225 of 301 places
    assert (capped >= 0.75).mean() < 0.2  # 0.75 ** 10 = 0.06


def test_void_does_not_count_for_the_cap():
    mask = np.full((100, 200), 255, np.uint8)
    mask[:10, :100], mask[10:20, :100] = 0, 1  # two classes of equal size; the rest is void
    image = np.zeros((100, 200, 3), np.uint8)
    options = dict(crop_size=100, resize=(200, 100), ratio=(1, 1))
    for seed in range(50):
        _, crop = augmented(image, mask, seed, **options)
        _, first = augmented(image, mask, seed, max_share=2, **options)
        assert torch.equal(crop, first)  # 80 % of void or more is no reason to draw again
        assert (crop < 255).any()  # a crop of void alone (1 of 101 places) is drawn again


def test_a_small_pair_is_padded_at_the_right_and_the_bottom():
    image, mask = augmented(np.zeros((20, 40, 3), np.uint8), np.ones((20, 40), np.uint8), 0, ratio=(0.5, 0.5))
    assert (mask[:32] == 1).all() and (mask[32:] == 255).all() and (image[:, :32] == 0).all()  # 32 x 64
    assert (image[:, 32:] == torch.tensor(FILL)[:, None, None]).all()
    image, mask = augmented(np.zeros((40, 20, 1), np.uint8), np.ones((40, 20), np.uint8), 0, ratio=(0.5, 0.5), fill=[9])
    assert (mask[:, :32] == 1).all() and (mask[:, 32:] == 255).all() and (image[0, :, 32:] == 9).all()


def test_half_of_the_pairs_are_mirrored():
    mask = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    pairs = [augmented(mask[..., None], mask, seed, ratio=(1, 1), fill=[0]) for seed in range(40)]
    assert all(torch.equal(image[0], labels) for image, labels in pairs)
    assert 10 < sum(int(labels[0, 0]) == 63 for _, labels in pairs) < 30


class Draws:
    """Stand-in for a generator that returns fixed numbers."""

    def __init__(self, changed, amounts):
        self.changed, self.amounts = changed, amounts

    def random(self, count):
        return np.where(self.changed, 0.4, 0.6)

    def uniform(self, low, high):
        assert (np.array(low) <= self.amounts).all() and (np.array(high) >= self.amounts).all()
        return self.amounts


def distorted(image, changed, *amounts):
    return photometric_distortion(torch.from_numpy(image), Draws(changed, amounts)).numpy()


def test_brightness_adds_and_contrast_multiplies():
    image = np.random.default_rng(0).integers(0, 256, (3, 8, 9), dtype=np.uint8)
    values = image.astype(float)
    for shift in (-32, 20.4, 32):
        result = distorted(image, [1, 0, 0, 0, 0], shift, 1.5, 0.5, 0.05)
        np.testing.assert_array_equal(result, np.clip(values + round(shift), 0, 255))
    for first in (0, 1):
        result = distorted(image, [0, 1, 0, 0, first], 32, 1.3, 0.5, 0.05)
        np.testing.assert_allclose(result, np.clip(values * 1.3, 0, 255), atol=1)
    assert np.array_equal(distorted(image, [0, 0, 0, 0, 1], 32, 1.3, 0.5, 0.05), image)


def test_saturation_and_hue_as_pillow_changes_them():
    from PIL import ImageEnhance
    from torchvision.transforms.functional import adjust_hue

    image = np.asarray(Image.radial_gradient("L").resize((24, 24)))
    image = np.stack([image, image.T // 2 + 40, 255 - image])
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    grey = np.asarray(ImageEnhance.Color(picture).enhance(0.5)).transpose(2, 0, 1)
    np.testing.assert_allclose(distorted(image, [0, 0, 1, 0, 0], 0, 1, 0.5, 0).astype(int), grey, atol=2)
    turned = np.asarray(adjust_hue(picture, 0.05)).transpose(2, 0, 1)
    np.testing.assert_allclose(distorted(image, [0, 0, 0, 1, 0], 0, 1, 1, 0.05).astype(int), turned, atol=8)
    assert np.abs(turned.astype(int) - image).max() > 20
    late, early = (distorted(image, [0, 1, 1, 0, first], 0, 1.5, 0.5, 0) for first in (0, 1))
    assert not np.array_equal(late, early)  # the contrast clips before or after


def test_distortion_draws_each_half_the_time_and_spares_the_colours_of_grey():
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image[1] = 140
    kept = sum(torch.equal(photometric_distortion(image, np.random.default_rng(i)), image) for i in range(320))
    assert 5 <= kept <= 40  # 1 of 16 expected
    for i in range(20):
        grey = photometric_distortion(image[:1], np.random.default_rng(i))
        assert grey.shape == (1, 4, 4) and grey.unique().numel() == 1


# Data sets


def dataset_of(source, **options):
    options = dict(pixels=PixelFormat(3), crop_size=32, resize=(128, 32), fill=FILL, seed=0) | options
    return SegmentationDataset(source, **options)


def pairs_of(source, indices, pixels=PixelFormat(3), sizes=lambda height, width: []):  # noqa: B008 - a tuple
    return EvaluationPairs(source, pixels=pixels, sizes=sizes).__getitems__([(7, index) for index in indices])


def test_a_sample_follows_seed_epoch_and_index_alone(pair_folder):
    source = SegmentationFolder(pair_folder, "training")
    one = dataset_of(source).__getitems__([(0, 3), (1, 3), (0, 5)])
    state = torch.get_rng_state()
    other = dataset_of(source).__getitems__([(0, 1), (0, 5), (0, 3)])
    assert torch.equal(torch.get_rng_state(), state)
    for mine, its in ((0, 2), (2, 1)):
        assert torch.equal(one.images[mine], other.images[its]) and torch.equal(one.masks[mine], other.masks[its])
    assert not torch.equal(one.images[0], one.images[1])
    assert not torch.equal(one.images[0], dataset_of(source, seed=1).__getitems__([(0, 3)]).images[0])
    assert one.images.shape == (3, 3, 32, 32) and one.images.dtype == one.masks.dtype == torch.uint8
    assert one.indices == [3, 3, 5] and one.damaged == []
    (loaded,) = make_loader(dataset_of(source), [[(0, 3), (1, 3), (0, 5)]], num_workers=1)
    assert torch.equal(loaded.images, one.images) and torch.equal(loaded.masks, one.masks)


def test_a_damaged_image_or_mask_is_replaced_by_the_next_pair(pair_folder):
    (pair_folder / "images/training/1.png").write_bytes(b"")
    data = (pair_folder / "annotations/training/2.png").read_bytes()
    (pair_folder / "annotations/training/2.png").write_bytes(data[: len(data) // 2])
    Image.new("L", (80, 60), 3).save(pair_folder / "annotations/training/3.png")
    Image.new("RGB", (80, 60), (9, 9, 9)).save(pair_folder / "images/training/3.png")
    source = SegmentationFolder(pair_folder, "training")
    os.remove(pair_folder / "annotations/training/5.png")
    options = dict(resize=(500, 400))  # larger than the crop, so nothing is padded
    batch = dataset_of(source, **options).__getitems__([(0, 1), (0, 2), (0, 3), (0, 5)])
    assert [index for index, _ in batch.damaged] == [1, 2, 2, 5] and batch.indices == [1, 2, 3, 5]
    assert batch.damaged[0][1] == "empty file"
    assert batch.damaged[1][1].startswith(f"its mask {pair_folder}/annotations/training/2.png: ")
    assert batch.damaged[3][1].endswith("5.png: No such file or directory")
    assert (batch.masks[:3] == 2).all()  # all of sample 3, but cropped and distorted differently
    assert (batch.images[:3].flatten(2).amin(2) == batch.images[:3].flatten(2).amax(2)).all()
    pairs = pairs_of(source, [1, 2, 3], sizes=lambda height, width: [(8, 8)])
    assert [pair.index for pair in pairs] == [1, 2, 3] and [len(pair.views) for pair in pairs] == [0, 0, 1]
    assert pairs[0].damaged == "empty file" and "annotations/training/2.png" in pairs[1].damaged
    assert pairs[2].damaged is None and pairs[1].mask.tolist() == [[255]]


def test_where_no_pair_can_be_read_all_is_void(pair_folder):
    source = SegmentationFolder(pair_folder, "validation")
    for i in range(3):
        (pair_folder / f"annotations/validation/{i}.png").write_bytes(b"no image")
    batch = dataset_of(source).__getitems__([(0, 1)])
    assert (batch.masks == 255).all() and [index for index, _ in batch.damaged] == [1, 2, 0]


def test_evaluation_gives_the_original_and_its_views(pair_folder):
    source = SegmentationFolder(pair_folder, "validation")
    (pair,) = pairs_of(source, [2], PixelFormat(1), lambda h, w: [keep_ratio(h, w, 128, 32), (h, w)])
    labels = np.array(Image.open(pair_folder / "annotations/validation/2.png")).astype(int)
    np.testing.assert_array_equal(pair.mask, np.where(labels == 0, 255, labels - 1))
    np.testing.assert_array_equal(pair.image[0], labels * 20)
    assert [tuple(view.shape) for view in pair.views] == [(1, 32, 43), (1, 60, 80)]
    assert torch.equal(pair.views[1], pair.image) and pair.damaged is None and pair.mask.dtype == torch.uint8


def test_floats_and_many_channels_are_distorted_within_their_range():
    image, rng = torch.rand(5, 20, 30), np.random.default_rng(0)
    seen = [photometric_distortion(image, rng) for _ in range(20)]
    assert all(one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1 for one in seen)
    assert sum(not torch.equal(one, image) for one in seen) > 5
    bytes_ = (255 * image).to(torch.uint8)
    assert all(photometric_distortion(bytes_, rng).dtype == torch.uint8 for _ in range(8))
    mask = torch.randint(0, 3, (20, 30), dtype=torch.uint8)
    options = dict(crop_size=16, resize=(20, 5), fill=[0.1, 0.2, 0.3, 0.4, 0.5])  # at most 10 x 10 pixels, padded
    crop, labels = training_pair(image[:, :9, :9], mask[:9, :9], np.random.default_rng(3), **options)
    assert crop.shape == (5, 16, 16) and crop.dtype == torch.float32 and labels[-1, -1] == IGNORED
    assert crop[:, -1, -1].tolist() == pytest.approx(options["fill"])


def test_the_limit_of_pixels_holds_for_masks_too(pair_folder):
    source, _ = open_pairs(str(pair_folder), PixelFormat(3))
    pixels = PixelFormat(3, max_pixels=60 * 80)
    assert [pair.damaged for pair in pairs_of(source, [0], pixels)] == [None]
    Image.new("L", (81, 60)).save(pair_folder / "annotations/training/0.png")
    (pair,) = pairs_of(source, [0], pixels)
    assert pair.damaged.startswith("its mask") and pair.damaged.endswith("raise --max_pixels")
    assert check_masks(source, [0], pixels).errors == []  # reported when a run reads it
