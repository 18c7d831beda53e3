import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from data.detection import Drawing
from training.pictures import (
    MOST_CLASSES,
    attention_grid,
    colour_picture,
    confusion_matrix,
    detection_grid,
    detection_overlay,
    label_picture,
    loss_curve,
    reconstruction_grid,
    segmentation_grid,
    segmentation_overlay,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstruction_grid(tmp_path, channels):
    images = torch.zeros(2, channels, 64, 64)
    images[1] = 1
    prediction = torch.full_like(images, 0.25)
    mask = torch.zeros(2, 1, 64, 64)
    mask[:, :, :32] = 1
    path = tmp_path / "deep" / "grid.png"
    reconstruction_grid(path, images, prediction, mask, title="step 1", uses_true_patch_statistics=False)
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape == (48 + 2 * (128 + 8), 8 + 4 * (128 + 8), 3)
    rows, columns = [48 + 136 * row for row in range(2)], [8 + 136 * column for column in range(4)]
    tops = [[pixels[r + 5, c + 5, 0] for c in columns] for r in rows]
    bottoms = [[pixels[r + 120, c + 5, 0] for c in columns] for r in rows]
    assert tops == [[0, 128, 64, 64], [255, 128, 64, 64]]
    assert bottoms == [[0, 0, 64, 0], [255, 255, 64, 255]]
    assert pixels[:48].min() < 100  # captions


def test_reconstructions_without_a_mask_are_original_and_prediction(tmp_path):
    images, prediction = torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 2.0)
    reconstruction_grid(tmp_path / "x.png", images, prediction, None, title="a", uses_true_patch_statistics=False)
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert pixels.shape == (48 + 2 * (128 + 8), 8 + 2 * (128 + 8), 3)
    assert (pixels[48:176, 8:136] == 0).all() and (pixels[48:176, 144:272] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_patches_stand_beside_the_image(tmp_path, channels):
    colours = np.linspace(0, 1, 2 * 4 * 3).reshape(2, 4, 3).astype(np.float32)
    colour_picture(tmp_path / "deep" / "x.png", np.full((channels, 30, 60), 200, np.uint8), colours)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "x.png")).astype(int)
    assert pixels.shape == (8 + 60 + 8, 8 + 2 * (120 + 8), 3) and (pixels[8:68, 8:128] == 200).all()
    patches = pixels[8:68, 136:256].reshape(2, 30, 4, 30, 3)
    assert (patches == np.rint(255 * colours)[:, None, :, None]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_attention_is_bright_where_a_query_looks(tmp_path, channels):
    maps = np.full((10, 4, 4), 1 / 16, np.float32)  # the other queries attend equally to all patches
    maps[8], maps[8, 0, 0] = 0, 1
    attention_grid(tmp_path / "x.png", np.full((channels, 64, 64), 200, np.uint8), maps)
    pixels = np.asarray(Image.open(tmp_path / "x.png")).astype(int)
    assert pixels.shape == (8 + 2 * 136, 8 + 9 * 136, 3)
    image, looking = pixels[8:136, 8:136], pixels[144:272, 8:136]  # the ninth query
    assert (image == 200).all()
    assert looking[10:20, 10:20].min() > 150 > 60 > looking[100:120, 20:30, 0].max()


def test_title_says_true_statistics(tmp_path):
    images, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    for flag in (False, True):
        reconstruction_grid(tmp_path / "x.png", images, images, mask, title="", uses_true_patch_statistics=flag)
        assert (np.asarray(Image.open(tmp_path / "x.png"))[:24].min() < 100) == flag


def boxes(path, shares):
    """Return (left, top, right, bottom) of the pixels that have the colour of each share of a row, in percent."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    found = []
    for share in shares:
        colour = np.rint(255 * np.array(colormaps["Blues"](share / 100)[:3]))
        rows, columns = np.nonzero((abs(pixels - colour) <= 1).all(axis=-1))
        found.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    return np.array(found)


def test_confusion_matrix(tmp_path):
    """Two classes have images, and a third one has none."""
    path = tmp_path / "deep" / "matrix.png"
    labels, predictions = [0] * 40 + [1] * 5, [0] * 30 + [1] * 10 + [1] * 5
    assert confusion_matrix(path, labels, predictions, ["cat", "dog", "owl"], title="step 1")
    first, second, third = boxes(path, (75, 25, 100))  # cells (cat, cat), (cat, dog) and (dog, dog)
    for box in (first, second, third):
        assert box[2:] - box[:2] == pytest.approx([first[2] - first[0]] * 2, abs=2)
        assert np.asarray(Image.open(path).convert("L").crop(box.tolist())).std() > 5  # the cell shows a number
    assert second - first == pytest.approx([first[2] - first[0], 0] * 2, abs=2)
    assert third - second == pytest.approx([0, first[2] - first[0]] * 2, abs=2)


@pytest.mark.parametrize("num_classes", [2, 13, MOST_CLASSES])
def test_names_stay_inside(tmp_path, num_classes):
    numbers = range(num_classes)
    for name in ("a", "a very long name $of a class\nwith a line $break " * 9, "\u732b"):
        names, title = (
            [name] * num_classes,
            "step 4210, epoch 12.3: top-1 93.24 % (most frequent class: 50.88 %), top-5 99.12 %",
        )
        assert confusion_matrix(tmp_path / "matrix.png", numbers, numbers, names, title=title)
        pixels = np.asarray(Image.open(tmp_path / "matrix.png"))[..., :3]
        for edge in (pixels[:1], pixels[-1:], pixels[:, :1], pixels[:, -1:]):
            assert (edge == 255).all()
        left, top, right, bottom = boxes(tmp_path / "matrix.png", [100])[0]
        assert right - left > 10 * num_classes < bottom - top
    assert not confusion_matrix(tmp_path / "x.png", numbers, numbers, ["a"] * (MOST_CLASSES + 1), title="")
    assert not (tmp_path / "x.png").exists()


def scene(width, height, *, channels=3):
    """Return a dark image, an annotation with a void lower half, and a prediction: class 0 left, 1 right."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, width // 2 :] = 1
    annotation = mask.copy()
    annotation[height // 2 :] = 255
    return np.full((channels, height, width), 40, np.uint8), annotation, mask


def test_segmentation_grid(tmp_path):
    """A small image is enlarged by a whole factor, and a large one is reduced."""
    rows = [scene(50, 30), scene(512, 384, channels=1)]
    colours, path = np.uint8([(200, 0, 0), (0, 0, 200), (0, 200, 0)]), tmp_path / "deep" / "masks.png"
    segmentation_grid(path, rows, ["cat", "dog", "owl"], colours, title="step 1")
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape == (48 + (150 + 8) + (192 + 8) + 20 + 8, 8 + 3 * 264, 3)
    grey, red, blue = [40] * 3, *colours[:2].tolist()
    for top, width, height in ((48, 250, 150), (206, 256, 192)):
        left_and_right = [pixels[top + 5, [8 + i * 264 + 5, 8 + i * 264 + 240]].tolist() for i in range(3)]
        assert left_and_right == [[grey, grey], [red, blue], [red, blue]]
        lower = pixels[top + height // 2 : top + height, 272 : 272 + width].reshape(-1, 3)  # the annotation
        assert np.unique(lower, axis=0).tolist() == [[110] * 3, [190] * 3]
        assert pixels[top + height - 5, [536 + 5, 536 + 240]].tolist() == [red, blue]  # the prediction has no void
        assert (pixels[top + height + 4] == 255).all() and (pixels[top : top + height, 272 + width] == 255).all()
    legend = pixels[406:426]
    assert [legend[7, 8 + i * 264 + 7].tolist() for i in range(2)] == [red, blue]
    assert set(legend[1:14, 537:550].ravel().tolist()) == {110, 190}
    assert all(legend[:, 30 + i * 264 : 264 + i * 264].min() < 100 for i in range(3))  # the names


def test_legend_has_the_largest_classes_first(tmp_path):
    """One image has 40 classes, each larger than the one before; their names are short or long."""
    mask = np.repeat(np.arange(40), np.arange(1, 41))
    mask = np.tile(mask.astype(np.uint8), (8, 1))
    image = np.zeros((3, *mask.shape), np.uint8)
    colours = np.uint8([(5 * i + 3, 250 - 5 * i, 7) for i in range(50)])
    heights = []
    for names in (["a"] * 50, ["a very long name " * 9] * 50):
        segmentation_grid(tmp_path / "many.png", [(image, mask, mask)], names, colours, title="")
        pixels = np.asarray(Image.open(tmp_path / "many.png"))
        below = np.arange(len(pixels))[:, None] > 60  # below the masks
        swatches = np.argwhere((pixels[..., 2] == 7) & (pixels[..., 0] != 7) & below)
        shown = {tuple(pixels[y, x].tolist()) for y, x in swatches}
        assert shown == set(map(tuple, colours[:40].tolist()))
        assert pixels[swatches[0, 0] + 5, 8 + 5].tolist() == colours[39].tolist()
        assert (pixels[:, -4:] == 255).all() and (pixels[-4:] == 255).all()
        heights.append(pixels.shape)
    assert heights[0] == heights[1]


def test_loss_curve(tmp_path):
    path, log = tmp_path / "deep" / "loss.png", [{"step": step, "loss": 1 / step} for step in range(1, 41)]
    for validation in ([], [{"step": 20, "val_loss": 0.5}, {"step": 40, "val_loss": 0.4}]):
        loss_curve(path, log + validation)
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert pixels.shape == (400, 800, 3) and (pixels[0] == 255).all() and (pixels[:, 0] == 255).all()
        blue, orange = ((abs(pixels - colour) < 10).all(axis=-1) for colour in ((8, 48, 107), (217, 72, 1)))
        rows, columns = np.nonzero(blue)
        assert rows[columns.argmin()] < 50 and rows[(columns > 600)].max() > 300
        assert orange.any() == bool(validation)
        assert blue[:60, 600:].any() and orange[:60, 600:].any() == bool(validation)  # the legend


def test_label_picture(tmp_path):
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 4
    label_picture(tmp_path / "deep" / "labels.png", labels, np.uint8([(200, 0, 0), (0, 0, 200), (0, 200, 0)]))
    with Image.open(tmp_path / "deep" / "labels.png") as picture:
        assert picture.mode == "P" and np.array_equal(np.asarray(picture), labels)
        colours = np.asarray(picture.convert("RGB"))
    assert colours[0].tolist() == [[0, 0, 0], [200, 0, 0], [0, 0, 200], [0, 200, 0]]


@pytest.mark.parametrize(("width", "height", "channels"), [(600, 400, 3), (40, 60, 1), (1, 700, 3), (5, 5, 3)])
def test_segmentation_overlay(tmp_path, width, height, channels):
    """The upper half has one class, the lower half another, seven pixels a third. The mask is larger than the image."""
    labels = np.zeros((3 * height, 3 * width), np.uint8)
    labels[len(labels) // 2 :] = 2
    labels.ravel()[:7] = 3
    image = np.full((channels, height, width), 128, np.uint8)
    colours = np.uint8([(200, 0, 0), (200, 200, 0), (0, 0, 200), (0, 200, 0)])
    segmentation_overlay(tmp_path / "deep" / "x.png", image, labels, ["cat", "dog", "owl", "a long name " * 9], colours)
    pixels = np.asarray(Image.open(tmp_path / "deep" / "x.png")).astype(int)
    scale = max(1, 512 // max(width, height))
    shown = pixels[8 : 8 + height * scale, 8 : 8 + width * scale]
    upper, lower = shown[len(shown) // 4, width * scale // 2], shown[len(shown) * 3 // 4, width * scale // 2]
    assert upper[0] - upper[2] == lower[2] - lower[0] == pytest.approx(105, abs=1)
    legend = pixels[8 + height * scale :].reshape(-1, 3)
    places = [np.flatnonzero((legend == colour).all(axis=1)).min() for colour in (lower, upper)]
    assert places[0] != places[1]  # both colours are in the legend
    assert ((legend[:, 1] > legend[:, 0] + 100) & (legend[:, 1] > legend[:, 2] + 100)).any()  # so is the third class
    assert not (legend[:, :2].min(axis=1) > legend[:, 2] + 100).any()  # the absent class is not
    edges = [pixels[:8], pixels[-4:], pixels[:, :8], pixels[:, -4:]]
    assert all((edge == 255).all() for edge in edges)
    if height > 5:
        line = shown[len(shown) // 2 - scale : len(shown) // 2 + scale, width * scale // 2]
        assert (line == 255).all(axis=1).any()  # a white line between the classes


@pytest.mark.parametrize("channels", [1, 3])
def test_detection_pictures(tmp_path, channels):
    """A box is outlined in its class's colour, its mask is filled by half, and the annotation has no score."""
    image, colours = np.full((channels, 40, 64), 100, np.uint8), np.array([[200, 0, 0], [0, 0, 200]], np.uint8)
    mask = np.zeros((40, 64), bool)
    mask[20:28, 20:40] = True
    truth = Drawing((16.0, 16.0, 48.0, 32.0), 1, None, mask)
    found = Drawing((0.0, 0.0, 60.0, 38.0), 0, 0.75, None)
    path = tmp_path / "new" / "grid.png"
    detection_grid(path, [(image, [truth], [found])], ["cell", "dot"], colours, title="step 1")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    top, left, scale = 48, 8, 5  # below title and captions
    assert pixels[top + 18 * scale, left + 16 * scale].tolist() == [0, 0, 200]  # the outline
    assert pixels[top + 24 * scale, left + 30 * scale].tolist() == [50, 50, 150]  # the mask
    assert pixels[top + 18 * scale, left + 30 * scale].tolist() == [100, 100, 100]
    right = left + 64 * scale + 8
    assert pixels[top + 30 * scale, right].tolist() == [200, 0, 0]
    detection_overlay(tmp_path / "overlay.png", image, [found], ["cell", "dot"], colours)
    with Image.open(tmp_path / "overlay.png") as picture:
        assert picture.width >= 64 * 8
