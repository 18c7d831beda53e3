import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torch.nn.functional import max_pool2d

from data import shapes
from data.batches import make_loader
from data.decode import PixelFormat
from data.index import DataError
from data.segmentation import (
    IGNORED,
    EvaluationPairs,
    SegmentationDataset,
    SegmentationFolder,
    ade20k_classes,
    check_masks,
    evaluation_image,
    keep_ratio,
    open_pairs,
    palette,
    photometric_distortion,
    training_pair,
    view_sizes,
)

FILL = [124, 116, 104]


def blocks(rng: np.random.Generator, size: tuple[int, int], labels: list[int], block: int = 24) -> np.ndarray:
    """A mask of random squares, uint8 of `size`."""
    rows, columns = (-(-side // block) for side in size)
    coarse = rng.choice(np.array(labels, np.uint8), (rows, columns))
    return np.kron(coarse, np.ones((block, block), np.uint8))[: size[0], : size[1]]


def write_pair(root: Path, split: str, name: str, mask: np.ndarray, **options) -> None:
    """An image of the mask's size, which shows 20 times its labels, and the mask."""
    stem, suffix = os.path.splitext(name)
    for folder, pixels, end in (("images", np.stack([mask * 20] * 3, -1), suffix), ("annotations", mask, ".png")):
        path = root / folder / split / (stem + end)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, **(options if folder == "images" else {}))


@pytest.fixture
def root(tmp_path) -> Path:
    """Six pairs for training, three for validation, of 60 x 80 pixels, with 3 classes and void."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 3)):
        for i in range(count):
            write_pair(tmp_path, split, f"{i}.png", blocks(rng, (60, 80), [0, 1, 2, 3], 20))
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    return tmp_path


def errors_of(root: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        open_pairs(str(root), PixelFormat(3))
    return str(caught.value).splitlines()


def augmented(image: np.ndarray, mask: np.ndarray, seed: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """`training_pair` of an image (H, W, C) without distortion, to 64 pixels."""
    options = dict(crop_size=64, resize=(256, 64), fill=FILL, distortion=False) | options
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return training_pair(pixels, torch.from_numpy(mask), np.random.default_rng(seed), **options)


# Classes and colours


def test_ade20k_has_150_names_and_colours():
    names, colours = ade20k_classes()
    assert len(names) == len(set(names)) == 150 and colours.shape == (150, 3) and colours.dtype == np.uint8
    assert (names[0], names[12], names[149]) == ("wall", "person", "flag")
    assert colours[[0, 2, 149]].tolist() == [[120, 120, 120], [6, 230, 230], [92, 0, 255]]


def test_the_palette_goes_on_behind_ade20k():
    colours = palette(254)
    assert colours.shape == (254, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[:150], ade20k_classes()[1])
    np.testing.assert_array_equal(palette(180), colours[:180])
    assert palette(2).shape == (2, 3)
    eleven = palette(11).astype(int)  # of fewer classes, ADE20K's that are easy to tell apart
    assert {tuple(colour) for colour in eleven} <= {tuple(colour) for colour in ade20k_classes()[1].astype(int)}
    assert min(np.linalg.norm(a - b) for i, a in enumerate(eleven) for b in eleven[:i]) > 100
    assert len({tuple(colour) for colour in colours}) == 253  # ADE20K itself has one colour twice


# Folders


def test_pairs_go_by_their_relative_names(tmp_path):
    names = ["b/x.jpg", "a.k.jpg", "a.jpg", "a-b.jpeg", "b/ü.webp", "B.PNG"]  # masks by their own bytes: a.k, a
    for number, name in enumerate(names):
        write_pair(tmp_path, "training", name, np.full((4, 4), number, np.uint8))
    (tmp_path / "classes.txt").write_text("one\ntwo")
    source = SegmentationFolder(tmp_path, "training")
    found = [os.path.relpath(source.name(i), tmp_path / "images" / "training") for i in range(len(source))]
    assert found == sorted(names, key=os.fsencode)
    for i, name in enumerate(found):
        assert source.mask_name(i).endswith(os.path.splitext(name)[0] + ".png")
        (mask,) = source.fetch_masks([i])
        assert mask == Path(source.mask_name(i)).read_bytes() and source.fetch([i]) == [
            Path(source.name(i)).read_bytes()
        ]
    assert source.classes == ["one", "two"]
    assert source.size_in_bytes() == sum(
        path.stat().st_size for path in tmp_path.rglob("*.*") if "txt" not in path.name
    )
    assert pickle.loads(pickle.dumps(source)).fetch_masks([4, 1]) == source.fetch_masks([4, 1])


def test_the_fingerprint_follows_images_and_masks(root, tmp_path_factory):
    first = SegmentationFolder(root, "training").fingerprint()
    other = tmp_path_factory.mktemp("other") / "copy"
    shutil.copytree(root, other)
    assert SegmentationFolder(other, "training").fingerprint() == first
    assert SegmentationFolder(other, "validation").fingerprint() != first
    os.rename(other / "annotations/training/0.png", other / "annotations/training/0.PNG")
    assert SegmentationFolder(other, "training").fingerprint() != first


@pytest.mark.parametrize(
    "text, classes",
    [
        ("sky\nroad\ncar", ["sky", "road", "car"]),
        ("\ufeff1 sky\r\n2\tlight pole \r\n3  car\r\n\n", ["sky", "light pole", "car"]),
        ("sky\n2 wheels\n1 wheel", ["sky", "2 wheels", "1 wheel"]),
        ("Straße\ncar", ["Straße", "car"]),
    ],
)
def test_lists_of_classes(root, text, classes):
    (root / "classes.txt").write_text(text, encoding="utf-8")
    assert SegmentationFolder(root, "training").classes == classes


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "has no line"),
        ("sky", "names one class; expected at least 2"),
        ("sky\n\ncar", "has an empty line"),
        ("1 sky\n3 car", "has the line '3 car'"),
        ("0 void\n1 sky", "has the line '0 void'"),
        ("1 sky\ncar", "has the line 'car'"),
        ("1 sky\n2", "has the line '2'"),
        ("sky\ncar\nsky", "names classes twice: sky"),
        ("\n".join(map(str, range(-1, 254))), "names 255 classes"),
        (b"sk\xff", "cannot be read"),
    ],
)
def test_bad_lists_of_classes_are_told_once(root, text, words):
    (root / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    (error,) = errors_of(root)
    assert words in error and "classes.txt" in error


def test_classes_of_ade20k_need_no_list(root):
    os.remove(root / "classes.txt")
    errors = errors_of(root)
    assert len(errors) == 1 and "classes.txt is missing; write a line for each class" in errors[0]
    (root / "objectInfo150.txt").touch()
    assert open_pairs(str(root), PixelFormat(3))[0].classes == ade20k_classes()[0]
    os.remove(root / "objectInfo150.txt")
    for folder in ("images", "annotations"):
        for split, short in (("training", "train"), ("validation", "val")):
            for path in list((root / folder / split).iterdir()):
                path.rename(path.with_name(f"ADE_{short}_0000000{path.name}"))
    assert open_pairs(str(root), PixelFormat(3))[1].classes == ade20k_classes()[0]
    (root / "classes.txt").write_text("a list that is there\ncounts\nmore")
    assert open_pairs(str(root), PixelFormat(3))[1].classes[1] == "counts"


def remove(*paths):
    def change(root):
        for path in paths:
            shutil.rmtree(root / path) if (root / path).is_dir() else os.remove(root / path)

    return change


def copy(source, target):
    return lambda root: shutil.copy(root / source, root / target)


@pytest.mark.parametrize(
    "change, expected",
    [
        (remove("annotations/training/1.png"), ["training) has images without a mask: 1;"]),
        (remove(*(f"annotations/training/{i}.png" for i in range(5))), ["without a mask: 0, 1, 2 and 2 more;"]),
        (remove("images/validation/2.png", "images/validation/0.png"), ["masks without an image: 0, 2;"]),
        (copy("images/training/3.png", "images/training/3.jpg"), ["images with the same name but for the suffix: 3;"]),
        (copy("annotations/training/3.png", "annotations/training/3.PNG"), ["masks with the same name but for"]),
        (remove("images/training"), ["has no images/training; expected images/{training,validation}/NAME.jpg"]),
        (remove("images/validation", "annotations/validation"), ["has no images/validation and no annotations/val"]),
        (remove("images", "annotations"), ["has no images/training", "has no images/validation"]),
        (remove("classes.txt", "images/training/4.png"), ["classes.txt is missing", "has masks without an image: 4"]),
        (remove(*(f"annotations/validation/{i}.png" for i in range(3))), ["holds no image; expected files named .png"]),
    ],
)  # fmt: skip
def test_bad_folders_are_told_a_line_each(root, change, expected):
    change(root)
    errors = errors_of(root)
    assert len(errors) == len(expected)
    assert all(words in error for words, error in zip(expected, errors, strict=True)), errors


def test_what_is_no_folder(tmp_path):
    assert errors_of(tmp_path / "nowhere") == [
        f"{tmp_path}/nowhere is no folder; --path_to_data takes a folder with images/{{training,validation}}/NAME.jpg "
        "and annotations/{training,validation}/NAME.png, or builtin:shapes"
    ]
    assert "builtin:shapes" in errors_of("builtin:scenes")[0]


def test_other_files_beside_the_masks_are_passed_over(root):
    Image.new("RGB", (80, 60)).save(root / "annotations/training/3.jpg")
    (root / "annotations/training/notes.txt").touch()
    train, _ = open_pairs(str(root), PixelFormat(3))
    assert [os.path.basename(train.mask_name(i)) for i in range(6)] == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize(
    "sign", ["index_ade20k.mat", "index_ade20k.pkl", "images/ADE/x", "images/training/a/b_seg.png"]
)
def test_the_full_ade20k_is_recognised(tmp_path, sign):
    for name in (sign, "images/training/a/b.jpg", "images/validation/a/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (error,) = errors_of(tmp_path)
    assert "is the full ADE20K" in error and "ADEChallengeData2016" in error


# Checking masks


@pytest.mark.parametrize("processes", [1, 2])
def test_masks_are_counted(root, processes):
    (root / "classes.txt").write_text("sky\nroad\ncar\nnever")
    source = SegmentationFolder(root, "training")
    labels = np.concatenate([np.array(Image.open(source.mask_name(i))).ravel() for i in range(6)])
    (root / "annotations/training/5.png").write_bytes(b"damaged")
    labels = labels[: 5 * 60 * 80]
    pixels, errors = check_masks(source, processes=processes)
    assert pixels.tolist() == [(labels == label).sum() for label in (1, 2, 3, 4)] and pixels.dtype == np.int64
    assert errors == []


def test_masks_of_other_modes(root):
    labels = np.array(Image.open(root / "annotations/training/0.png"))
    paletted = Image.fromarray(labels).convert("P")
    paletted.putdata(labels.ravel().tolist())
    paletted.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for i, mask in enumerate((paletted, Image.fromarray(labels.astype(np.uint16)), Image.fromarray(labels > 1))):
        mask.save(root / f"annotations/training/{i}.png")
        assert Image.open(root / f"annotations/training/{i}.png").mode in ("P", "I;16", "I", "1")
    source = SegmentationFolder(root, "training")
    assert check_masks(source)[1] == []
    dataset = EvaluationPairs(source, pixels=PixelFormat(3), sizes=lambda height, width: [])
    found = [pair.mask.numpy() for pair in dataset.__getitems__([(0, i) for i in range(3)])]
    for mask, wanted in zip(found, (labels, labels, (labels > 1).astype(np.uint8)), strict=True):
        np.testing.assert_array_equal(mask, np.where(wanted == 0, 255, wanted.astype(int) - 1))


@pytest.mark.parametrize(
    "mask, words",
    [
        (np.full((60, 80), 4, np.uint8), "has the label 4; expected 0 (void) to 3"),
        (np.full((60, 80), 260, np.uint16), "has the label 260; expected 0 (void) to 3"),
        (np.zeros((60, 80, 3), np.uint8), "has colour or transparency"),
        (np.zeros((60, 80, 2), np.uint8), "has colour or transparency"),
        (np.ones((80, 60), np.uint8), "is 80 x 60 pixels (height x width), its image 60 x 80"),
    ],
)
def test_bad_masks_are_named_at_the_start_and_refused_when_read(root, mask, words):
    Image.fromarray(mask).save(root / "annotations/training/2.png")
    source = SegmentationFolder(root, "training")
    _, (error,) = check_masks(source)
    assert error.startswith(f"{root}/annotations/training/2.png ") and words in error
    with pytest.raises(DataError) as caught:
        EvaluationPairs(source, pixels=PixelFormat(3), sizes=lambda height, width: []).__getitems__([(0, 2)])
    assert str(caught.value) == error


def test_at_most_five_masks_are_named(root):
    for i in range(6):
        Image.new("RGB", (80, 60)).save(root / f"annotations/training/{i}.png")
    source = SegmentationFolder(root, "training")
    for processes in (1, 2):
        errors = check_masks(source, processes=processes)[1]
        assert [f"/{i}.png" in error for i, error in enumerate(errors[:5])] == [True] * 5
        assert errors[5:] == ["and 1 more masks like these"]


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_mask_fits_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    (tmp_path / "classes.txt").write_text("one\ntwo")
    write_pair(tmp_path, "training", f"a{suffix}", np.ones((30, 50), np.uint8), exif=exif)
    Image.fromarray(np.ones((50, 30), np.uint8)).save(tmp_path / "annotations/training/a.png")
    source = SegmentationFolder(tmp_path, "training")
    assert check_masks(source)[1] == []
    (pair,) = EvaluationPairs(
        source, pixels=PixelFormat(3), sizes=lambda height, width: [(height, width)]
    ).__getitems__([(0, 0)])
    assert pair.mask.shape == pair.image.shape[1:] == pair.views[0].shape[1:] == (50, 30)


# Transforms


def test_sizes_by_hand():
    assert keep_ratio(512, 683, 2048, 512) == (512, 683)
    assert keep_ratio(360, 480, 2048, 512) == (512, 683)  # 480 * 512 / 360 = 682.67
    assert keep_ratio(480, 360, 1024, 256) == (341, 256)
    assert keep_ratio(100, 1000, 2048, 512) == (205, 2048)  # the long side binds: 204.8
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
    inside = max_pool2d(one_hot, 5, stride=1).sum(0) == 1  # as far from an edge as the filter reaches
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


@pytest.mark.parametrize("labels", [[1, 200], [0, 7, 149], [255], [3]])
def test_no_label_appears_that_was_not_there(labels):
    rng = np.random.default_rng(1)
    for seed in range(25):
        size = tuple(int(side) for side in np.exp(rng.uniform(0, 6, 2)))
        mask = rng.choice(np.array(labels, np.uint8), size)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image_then, mask_then = augmented(image, mask, seed, distortion=True)
        assert image_then.shape == (3, 64, 64) and mask_then.shape == (64, 64)
        factor = np.random.default_rng(seed).uniform(0.5, 2)
        height, width = (min(64, side) for side in keep_ratio(*size, int(256 * factor), int(64 * factor)))
        assert set(mask_then[:height, :width].unique().tolist()) <= {*labels}


def test_a_class_that_fills_the_crop_is_avoided():
    mask = np.zeros((100, 400), np.uint8)
    mask[:, 300:] = np.arange(100) // 34 + 1  # three other classes at one end
    image = np.zeros((100, 400, 3), np.uint8)
    options = dict(crop_size=100, resize=(400, 100), ratio=(1, 1))

    def shares(max_share):
        for seed in range(60):
            _, found = augmented(image, mask, seed, max_share=max_share, **options)
            yield np.bincount(found.ravel()).max() / found.numel()

    free, capped = (np.array(list(shares(cap))) for cap in (2, 0.75))
    assert (free >= 0.75).mean() > 0.6  # 225 of 301 places
    assert (capped >= 0.75).mean() < 0.2  # 0.75 ** 10 = 0.06


def test_void_does_not_count_for_the_cap():
    mask = np.full((100, 200), 255, np.uint8)
    mask[:10, :100], mask[10:20, :100] = 0, 1  # half and half of what is not void
    image = np.zeros((100, 200, 3), np.uint8)
    options = dict(crop_size=100, resize=(200, 100), ratio=(1, 1))
    for seed in range(50):
        _, found = augmented(image, mask, seed, **options)
        _, first = augmented(image, mask, seed, max_share=2, **options)
        assert torch.equal(found, first)  # of void there is 80 % and more, which is no reason to draw again
        assert (found < 255).any()  # a crop of void alone is: one place of 101


def test_a_small_pair_is_padded_at_the_right_and_the_bottom():
    image, mask = augmented(np.zeros((20, 40, 3), np.uint8), np.ones((20, 40), np.uint8), 0, ratio=(0.5, 0.5))
    assert (mask[:32] == 1).all() and (mask[32:] == 255).all() and (image[:, :32] == 0).all()  # 32 x 64
    assert (image[:, 32:] == torch.tensor(FILL)[:, None, None]).all()
    image, mask = augmented(np.zeros((40, 20, 1), np.uint8), np.ones((40, 20), np.uint8), 0, ratio=(0.5, 0.5), fill=[9])
    assert (mask[:, :32] == 1).all() and (mask[:, 32:] == 255).all() and (image[0, :, 32:] == 9).all()


def test_half_of_the_pairs_are_mirrored():
    mask = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    found = [augmented(mask[..., None], mask, seed, ratio=(1, 1), fill=[0]) for seed in range(40)]
    assert all(torch.equal(image[0], labels) for image, labels in found)
    assert 10 < sum(int(labels[0, 0]) == 63 for _, labels in found) < 30


class Draws:
    """In place of a generator: fixed numbers."""

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
        found = distorted(image, [1, 0, 0, 0, 0], shift, 1.5, 0.5, 0.05)
        np.testing.assert_array_equal(found, np.clip(values + round(shift), 0, 255))
    for first in (0, 1):
        found = distorted(image, [0, 1, 0, 0, first], 32, 1.3, 0.5, 0.05)
        np.testing.assert_allclose(found, np.clip(values * 1.3, 0, 255), atol=1)
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
    assert 5 <= kept <= 40  # 1 of 16
    for i in range(20):
        grey = photometric_distortion(image[:1], np.random.default_rng(i))
        assert grey.shape == (1, 4, 4) and grey.unique().numel() == 1


def test_evaluation_images_are_those_of_transformers_processor():
    from transformers import SegformerImageProcessor

    processor = SegformerImageProcessor(size={"height": 96, "width": 61}, do_normalize=False, do_rescale=False)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    ours = evaluation_image(torch.from_numpy(pixels).permute(2, 0, 1), (96, 61))
    np.testing.assert_array_equal(ours, theirs)


# Data sets


def dataset_of(source, **options):
    options = dict(pixels=PixelFormat(3), crop_size=32, resize=(128, 32), fill=FILL, seed=0) | options
    return SegmentationDataset(source, **options)


def test_a_sample_follows_seed_epoch_and_index_alone(root):
    source = SegmentationFolder(root, "training")
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


def test_a_damaged_image_or_mask_is_replaced_by_the_next_pair(root):
    (root / "images/training/1.png").write_bytes(b"")
    data = (root / "annotations/training/2.png").read_bytes()
    (root / "annotations/training/2.png").write_bytes(data[: len(data) // 2])
    Image.new("L", (80, 60), 3).save(root / "annotations/training/3.png")
    Image.new("RGB", (80, 60), (9, 9, 9)).save(root / "images/training/3.png")
    source = SegmentationFolder(root, "training")
    os.remove(root / "annotations/training/5.png")
    options = dict(resize=(500, 400))  # larger than the crop: nothing is padded
    batch = dataset_of(source, **options).__getitems__([(0, 1), (0, 2), (0, 3), (0, 5)])
    assert [index for index, _ in batch.damaged] == [1, 2, 2, 5] and batch.indices == [1, 2, 3, 5]
    assert batch.damaged[0][1] == "empty file"
    assert batch.damaged[1][1].startswith(f"its mask {root}/annotations/training/2.png: ")
    assert batch.damaged[3][1].endswith("5.png: No such file or directory")
    assert (batch.masks[:3] == 2).all()  # those of sample 3, each cropped and coloured in its own way
    assert (batch.images[:3].flatten(2).amin(2) == batch.images[:3].flatten(2).amax(2)).all()
    pairs = EvaluationPairs(source, pixels=PixelFormat(3), sizes=lambda height, width: [(8, 8)])
    found = pairs.__getitems__([(0, 1), (0, 2), (0, 3)])
    assert [pair.index for pair in found] == [1, 2, 3] and [len(pair.views) for pair in found] == [0, 0, 1]
    assert found[0].damaged == "empty file" and "annotations/training/2.png" in found[1].damaged
    assert found[2].damaged is None and found[1].mask.tolist() == [[255]]


def test_where_no_pair_can_be_read_all_is_void(root):
    source = SegmentationFolder(root, "validation")
    for i in range(3):
        (root / f"annotations/validation/{i}.png").write_bytes(b"no image")
    batch = dataset_of(source).__getitems__([(0, 1)])
    assert (batch.masks == 255).all() and [index for index, _ in batch.damaged] == [1, 2, 0]


def test_evaluation_gives_the_original_and_its_views(root):
    source = SegmentationFolder(root, "validation")
    pairs = EvaluationPairs(source, pixels=PixelFormat(1), sizes=lambda h, w: [keep_ratio(h, w, 128, 32), (h, w)])
    (pair,) = pairs.__getitems__([(7, 2)])
    labels = np.array(Image.open(root / "annotations/validation/2.png")).astype(int)
    np.testing.assert_array_equal(pair.mask, np.where(labels == 0, 255, labels - 1))
    np.testing.assert_array_equal(pair.image[0], labels * 20)
    assert [tuple(view.shape) for view in pair.views] == [(1, 32, 43), (1, 60, 80)]
    assert torch.equal(pair.views[1], pair.image) and pair.damaged is None and pair.mask.dtype == torch.uint8


def test_a_mask_of_void_alone(root):
    Image.new("L", (80, 60)).save(root / "annotations/training/0.png")
    source = SegmentationFolder(root, "training")
    assert check_masks(source)[1] == []
    batch = dataset_of(source).__getitems__([(0, 0)])
    assert (batch.masks == 255).all() and batch.damaged == []


def test_builtin_shapes():
    train, validation = open_pairs("builtin:shapes", PixelFormat(3))
    assert (len(train), len(validation)) == (10_000, 1_000) and train.classes == list(shapes.SEGMENTATION_CLASSES)
    validation.prepare()
    pixels, errors = check_masks(validation)
    assert pixels.sum() == 1_000 * 64 * 64 and pixels.shape == (9,) and errors == []
    _, label, mask = shapes.draw(10_007)
    assert pixels[0] > 0.6 * pixels.sum()
    pairs = EvaluationPairs(validation, pixels=PixelFormat(3), sizes=lambda h, w: [(32, 32)])
    (pair,) = pairs.__getitems__([(0, 7)])
    np.testing.assert_array_equal(pair.mask, mask)  # the background is a class, and nothing is void
    assert pair.views[0].shape == (3, 32, 32) and label + 1 in pair.mask
    batch = dataset_of(validation).__getitems__([(0, 7), (0, 8)])
    assert batch.images.shape == (2, 3, 32, 32) and batch.masks[batch.masks < 255].max() <= 8


# Real data


def test_files_under_wrong_names_are_read(real_images):
    train, _ = open_pairs(str(real_images / "pets"), PixelFormat(3))
    pixels, errors = check_masks(train)
    assert errors == [] and (pixels > 0).all()
    names = [os.path.basename(train.name(i)) for i in range(len(train))]
    items = [(0, names.index("Abyssinian_34.jpg")), (0, names.index("Abyssinian_5.jpg"))]
    assert dataset_of(train).__getitems__(items).damaged == []


@pytest.mark.parametrize("name, classes", [("camvid", 11), ("clothing", 58), ("membrane", 2), ("ade20k_sample", 150)])
def test_real_sets(real_images, name, classes):
    channels = 1 if name == "membrane" else 3
    for source in open_pairs(str(real_images / name), PixelFormat(channels)):
        assert len(source.classes) == classes
    pixels, errors = check_masks(source)
    assert errors == [] and pixels.sum() > 0
    batch = dataset_of(source, pixels=PixelFormat(channels), fill=FILL[:channels]).__getitems__([(0, 0), (0, 1)])
    assert batch.damaged == [] and batch.masks[batch.masks < 255].max() < classes


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_pairs_of_a_list_or_a_data_set_are_those_of_the_folder(scenes, tmp_path, form):
    """Same pixels in the same order, checked alike; the names of the classes come from beside it or from a flag."""
    paths = {}
    for split in ("training", "validation"):
        images = sorted((scenes / "images" / split).iterdir())
        rows = [(path, scenes / "annotations" / split / f"{path.stem}.png") for path in images]
        paths[split] = str(tmp_path / f"{split}.{form}")
        if form == "csv":
            Path(paths[split]).write_text("path,mask\n" + "".join(f"{image},{mask}\n" for image, mask in rows))
        else:
            columns = {name: [str(row[i]) for row in rows] for i, name in enumerate(("image", "mask"))}
            features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
            datasets.Dataset.from_dict(columns, features).to_parquet(paths[split])
    pixels = PixelFormat(3)
    options = dict(validation=paths["validation"], cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="does not name its classes; give --path_to_classes"):
        open_pairs(paths["training"], pixels, **options)
    shutil.copy(scenes / "classes.txt", tmp_path)
    opened = open_pairs(paths["training"], pixels, **options)
    named = open_pairs(paths["training"], pixels, classes_file="ade20k", **options)
    assert named[0].classes == ade20k_classes()[0]
    for one, other in zip(open_pairs(str(scenes), pixels), opened, strict=True):
        assert len(one) == len(other) and one.classes == other.classes
        checked = [check_masks(source, processes=processes) for source, processes in ((one, 1), (other, 2))]
        assert checked[0][1] == checked[1][1] == [] and checked[0][0].tolist() == checked[1][0].tolist()
        a, b = (dataset_of(source).__getitems__([(0, 3), (1, 0)]) for source in (one, other))
        assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
        assert os.path.basename(one.mask_name(2)) in other.mask_name(2)
    with pytest.raises(DataError, match="holds nothing back to measure by; give --path_to_validation_data"):
        open_pairs(paths["training"], pixels)
    write_images(tmp_path / "images", 2)
    (tmp_path / "plain.csv").write_text("path\nimages/class_0/0000.jpg\nimages/class_1/0001.jpg\n")
    with pytest.raises(DataError, match="has no masks"):
        open_pairs(str(tmp_path / "plain.csv"), pixels, validation=str(tmp_path / "plain.csv"))


def test_floats_and_many_channels_are_distorted_within_their_range():
    image, rng = torch.rand(5, 20, 30), np.random.default_rng(0)
    seen = [photometric_distortion(image, rng) for _ in range(20)]
    assert all(one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1 for one in seen)
    assert sum(not torch.equal(one, image) for one in seen) > 5
    bytes_ = (255 * image).to(torch.uint8)
    assert all(photometric_distortion(bytes_, rng).dtype == torch.uint8 for _ in range(8))
    mask = torch.randint(0, 3, (20, 30), dtype=torch.uint8)
    options = dict(crop_size=16, resize=(64, 16), fill=[0.1, 0.2, 0.3, 0.4, 0.5])
    crop, labels = training_pair(image[:, :9, :9], mask[:9, :9], np.random.default_rng(3), ratio=(0.5, 0.5), **options)
    assert crop.shape == (5, 16, 16) and crop.dtype == torch.float32 and labels[-1, -1] == IGNORED
    assert crop[:, -1, -1].tolist() == pytest.approx(options["fill"])


def test_splits_may_be_of_two_kinds_and_shapes_have_their_own(scenes, tmp_path):
    images = sorted((scenes / "images/training").iterdir())
    rows = [f"{image},{scenes / 'annotations/training' / image.stem}.png\n" for image in images]
    (tmp_path / "list.csv").write_text("path,mask\n" + "".join(rows))
    pixels, listed = PixelFormat(3), str(tmp_path / "list.csv")
    train, validation = open_pairs(listed, pixels, validation=str(scenes), classes_file=str(scenes / "classes.txt"))
    assert len(train) == 10 and len(validation) == 5 and train.classes == validation.classes
    train, validation = open_pairs(str(scenes), pixels, validation=listed, classes_file=str(scenes / "classes.txt"))
    assert len(train) == len(validation) == 10
    for options in (dict(validation="x"), dict(classes_file="y")):
        with pytest.raises(DataError, match="does not go with builtin:shapes, which has its own; leave it out"):
            open_pairs("builtin:shapes", pixels, **options)
    with pytest.raises(DataError, match="8-bit images in colour or grey"):
        open_pairs("builtin:shapes", PixelFormat(5))


def test_the_limit_of_pixels_holds_for_masks_too(root):
    source, _ = open_pairs(str(root), PixelFormat(3))
    pairs = EvaluationPairs(source, pixels=PixelFormat(3, max_pixels=60 * 80), sizes=lambda height, width: [])
    assert [pair.damaged for pair in pairs.__getitems__([(0, 0)])] == [None]
    Image.new("L", (81, 60)).save(root / "annotations/training/0.png")
    (pair,) = pairs.__getitems__([(0, 0)])
    assert pair.damaged.startswith("its mask") and pair.damaged.endswith("raise --max_pixels")
    assert check_masks(source, [0], pixels=PixelFormat(3, max_pixels=60 * 80))[1] == []  # known when it is needed
