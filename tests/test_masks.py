"""Tests of the labels and colours of masks, and of the messages about masks that do not fit the flags."""

import numpy as np
import pytest
from conftest import write_pair
from PIL import Image

from data.decode import PixelFormat
from data.index import DataError
from data.masks import LIKE_ADE20K, MaskFormat
from data.pairs import check_annotations, open_pairs
from data.segmentation import read_pair

RGB = PixelFormat(3)
COLOURS = np.array([[0, 0, 0], [64, 128, 64], [192, 0, 128]], np.uint8)
LABELS = np.kron(np.array([[0, 1, 2], [2, 1, 0]], np.uint8), np.ones((6, 5), np.uint8))  # (12, 15)


def write(root, masks, classes, name="classes.txt"):
    """Write pairs with these masks (arrays or pictures) in two splits, and the file of classes; return `root`."""
    for split in ("training", "validation"):
        for number, mask in enumerate(masks):
            picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
            write_pair(root, split, f"{number}.jpg", np.zeros(picture.size[::-1], np.uint8))
            picture.save(root / "annotations" / split / f"{number}.png")
    (root / name).write_text("\n".join(classes))
    return root


def check(root, mask_format=LIKE_ADE20K, *, strict=False, **options):
    """Return the number of training pixels of each class, and the messages. Raises DataError."""
    sources, said = open_pairs(str(root), RGB, mask_format, **options), []
    names, here = ("training", "validation"), dict(share=slice(None), gather=list, processes=1, progress=False)
    counts = check_annotations(dict(zip(names, sources, strict=True)), RGB, say=said.append, strict=strict, **here)
    return counts["training"].tolist(), said


def refusal(root, *given, **options):
    with pytest.raises(DataError) as caught:
        check(root, *given, **options)
    return str(caught.value)


@pytest.mark.parametrize("background", ["background", "Background", "_background_", "BG", "other"])
def test_masks_from_0_whose_list_names_the_background_are_refused(tmp_path, background):
    root = write(tmp_path, [LABELS], [background, "cat", "dog"])
    error = refusal(root)
    assert "--mask_offset 0" in error and "--mask_offset 1" in error and repr(background) in error
    assert check(root, MaskFormat(0)) == ([60, 60, 60], [])
    counts, said = check(root, MaskFormat(1))
    assert counts == [60, 60, 0] and said == ["no training mask has a pixel of 1 of the 3 classes: dog"]


def test_the_classes_of_masks_from_0_are_the_labels(tmp_path):
    root = write(tmp_path, [LABELS], ["sky", "road", "car"])
    mask = read_pair(open_pairs(str(root), RGB, MaskFormat(0))[0], 0, RGB)[1]
    np.testing.assert_array_equal(mask, LABELS)
    mask = read_pair(open_pairs(str(root), RGB, MaskFormat(0, void_label=1))[0], 0, RGB)[1]
    np.testing.assert_array_equal(mask, np.where(LABELS == 1, 255, LABELS))
    mask = read_pair(open_pairs(str(root), RGB, MaskFormat(1, void_label=2))[0], 0, RGB)[1]
    np.testing.assert_array_equal(mask, np.where(LABELS == 1, 0, 255))


def test_doubts_are_told_where_they_are_no_proof(tmp_path):
    plain = write(tmp_path / "plain", [LABELS], ["sky", "road", "car"])
    counts, said = check(plain)
    assert counts == [60, 60, 0] and any("give --mask_offset 0 if label 0 is 'sky'" in line for line in said)
    assert "give --mask_offset 0 if label 0 is 'sky'" in refusal(plain, strict=True)
    from_one = write(tmp_path / "one", [LABELS + 1], ["sky", "road", "car"])
    assert check(from_one) == check(from_one, strict=True) == ([60, 60, 60], [])
    error = refusal(from_one, MaskFormat(0))
    assert "has the label 3; expected 0 to 2" in error and "--mask_offset 1" in error
    empty = write(tmp_path / "empty", [LABELS + 1], ["sky", "road", "car", "bus"])
    assert any(
        "no mask has the label 0 of 'sky'; if 1 is 'sky', give --mask_offset 1" in x
        for x in check(empty, MaskFormat(0))[1]
    )
    void = write(tmp_path / "void", [LABELS], ["void", "sky", "road"])
    assert "--void_label 0" in refusal(void) and check(void, MaskFormat(0, 0))[0] == [0, 60, 60]
    last = write(tmp_path / "last", [LABELS + 1], ["sky", "road", "Unlabeled"])
    assert check(last, MaskFormat(void_label=3))[0] == [60, 60, 0]


@pytest.mark.parametrize("void", [255, 200, 65535, -1])
def test_a_further_label_can_be_void(tmp_path, void):
    stored = np.where(LABELS == 2, void, LABELS.astype(np.int32) + 1)
    stored = stored if void in (-1, 65535) else stored.astype(np.uint8)
    root = write(tmp_path, [LABELS + 1], ["sky", "road", "car"])
    for split in ("training", "validation"):  # PNG has no negative numbers; the content decides the format
        path = root / "annotations" / split / "0.png"
        Image.fromarray(stored).save(path, format="TIFF")
    error = refusal(root)
    assert f"has the label {void}" in error and f"--void_label {void}" in error
    assert check(root, MaskFormat(void_label=void))[0] == [60, 60, 0]
    mask = read_pair(open_pairs(str(root), RGB, MaskFormat(void_label=void))[0], 0, RGB)[1]
    np.testing.assert_array_equal(mask, np.where(LABELS == 2, 255, LABELS))


def coloured(mode):
    """Return LABELS in colour, as a picture of the given mode."""
    picture = Image.fromarray(COLOURS[LABELS])
    return picture.quantize(8) if mode == "P" else picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("header", [["name,r,g,b"], []])
def test_masks_in_colour_are_converted_by_a_table(tmp_path, mode, header):
    lines = [*header, "sky,0,0,0", "road,64,128,64", "car,192,0,128"]
    root = write(tmp_path, [coloured(mode)], lines, name="class_dict.csv")
    for mask_format in (MaskFormat(), MaskFormat(0)):
        options = dict(class_file=str(root / "class_dict.csv"))
        assert check(root, mask_format, **options) == ([60, 60, 60], [])
        mask = read_pair(open_pairs(str(root), RGB, mask_format, **options)[0], 0, RGB)[1]
        np.testing.assert_array_equal(mask, LABELS)


def test_black_and_white_masks_are_colours_too(tmp_path):
    white = np.where(LABELS == 1, 255, 0).astype(np.uint8)
    for number, mask in enumerate((white, white > 0, np.stack([white] * 3, -1))):
        root = write(tmp_path / str(number), [mask], ["background,0,0,0", "road,255,255,255"])
        assert check(root) == ([120, 60], [])


def test_labels_beside_a_table_of_colours_stay_labels(tmp_path):
    root = write(tmp_path, [LABELS + 1], ["sky,0,0,0", "road,64,128,64", "car,192,0,128"])
    assert check(root) == ([60, 60, 60], [])


def test_labels_with_other_colours_than_the_table_are_told_to_go_without_it(tmp_path):
    palette = Image.fromarray(LABELS + 1)
    palette.putpalette([9, 9, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    root = write(tmp_path, [palette], ["sky,0,0,0", "road,64,128,64", "car,192,0,128"])
    error = refusal(root)
    assert "has the colour (1, 2, 3)" in error and "remove the colours from the file of classes" in error
    (root / "classes.txt").write_text("sky\nroad\ncar")
    assert check(root) == ([60, 60, 60], [])


def test_other_colours_are_named(tmp_path):
    root = write(tmp_path, [coloured("RGB")], ["sky,0,0,0", "road,64,128,64"])
    error = refusal(root)
    assert "0.png has the colour (192, 0, 128), which the table of classes does not have" in error
    (root / "classes.txt").write_text("sky\nroad\ncar")
    assert "give --path_to_classes a table of them" in refusal(root)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("square", [False, True])
def test_masks_that_are_not_turned_as_their_photographs_are_told(tmp_path, orientation, square):
    stored = LABELS[:, :12] + 1 if square else LABELS + 1  # (12, 12) or (12, 15)
    exif = Image.Exif()
    exif[0x0112] = orientation
    root = write(tmp_path, [stored], ["sky", "road", "car"])
    for split in ("training", "validation"):
        Image.fromarray(np.stack([stored] * 3, -1)).save(root / "images" / split / "0.jpg", exif=exif)
    if orientation > 4 and not square:
        error = refusal(root)
        assert f"EXIF orientation {orientation}" in error and "turn the mask too" in error
        turned = Image.fromarray(stored.T.copy())
        for split in ("training", "validation"):
            turned.save(root / "annotations" / split / "0.png")
        assert check(root)[1] == []
    else:
        said = check(root)[1]
        assert len(said) == (orientation > 1) and all("EXIF" in line and "turned" in line for line in said)
    for split in ("training", "validation"):
        Image.fromarray(stored).save(root / "annotations" / split / "0.png", exif=exif)
    assert check(root)[1] == []  # the same tag turns both
    image, mask = read_pair(open_pairs(str(root), RGB)[0], 0, RGB)
    assert mask.shape == image.shape[1:]


@pytest.mark.parametrize(
    "mask, words",
    [
        (Image.fromarray(LABELS).convert("LA"), "has colour or transparency"),
        (Image.fromarray(LABELS.astype(np.float32)), "has float32 numbers; expected whole ones"),
        (np.where(LABELS == 1, 255, 0).astype(np.uint8), "the lines 0 0 0 NAME, 255 255 255 NAME"),
    ],
)
def test_what_is_no_label_is_refused_in_words(tmp_path, mask, words):
    root = write(tmp_path, [LABELS], ["sky", "road", "car"])
    for split in ("training", "validation"):
        picture = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        picture.save(root / "annotations" / split / "0.png", format="TIFF" if picture.mode == "F" else "PNG")
    assert words in refusal(root)
    (root / "classes.txt").write_text("sky,0,0,0\nroad,64,128,64\ncar,192,0,128")
    assert words in refusal(root)


def test_masks_without_a_class_are_refused(tmp_path):
    root = write(tmp_path, [LABELS * 0], ["background", "object"])
    assert "(all are void); give other masks, or --mask_offset 0 if 0 is a class" in refusal(root)
    assert check(root, MaskFormat(0))[0] == [180, 0]


def test_shapes_have_their_own_numbers():
    for given in (MaskFormat(0), MaskFormat(void_label=255)):
        with pytest.raises(DataError, match="does not go with builtin:shapes"):
            open_pairs("builtin:shapes", RGB, given)
