import pytest
import torch
from torch.nn import functional as F

from modeling import sliding_window as module
from modeling.sliding_window import labels_at, predict, sliding_window, windows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_windows_by_hand():
    assert windows((512, 1024), 512) == [(0, 0), (0, 341), (0, 512)]
    assert windows((853, 300), 512) == [(0, 0), (341, 0)]  # the last one ends at the edge unshifted
    assert windows((10, 7), 8) == [(0, 0), (2, 0)]
    assert windows((6, 6), 3) == [(i, j) for i in (0, 2, 3) for j in (0, 2, 3)]


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (31, 8), (64, 65)])
@pytest.mark.parametrize("window", [1, 8, 9, 100])
def test_windows_cover_the_image_and_no_more(size, window):
    """There are no more windows than a stride of two thirds of their side needs."""
    stride, positions = max(1, 2 * window // 3), windows(size, window)
    height, width = (min(window, side) for side in size)
    covered = torch.zeros(size)
    for top, left in positions:
        assert 0 <= top <= size[0] - height and 0 <= left <= size[1] - width
        covered[top : top + height, left : left + width] += 1
    assert covered.min() >= 1
    steps = [max(0, side - window) / stride for side in size]
    assert len(positions) == (-int(-steps[0] // 1) + 1) * (-int(-steps[1] // 1) + 1)


def context(images):
    """Return logits (B, 2, H, W) that depend on the whole window: each pixel, and the window's mean."""
    return torch.cat([images[:, :1] * 3, images.mean(dim=(1, 2, 3), keepdim=True).expand_as(images[:, :1])], dim=1)


@pytest.mark.parametrize("window", [20, 21, 1000])
def test_a_window_that_covers_the_image_equals_the_plain_forward(window):
    images = random(2, 3, 20, 13)
    assert torch.equal(sliding_window(context, images, window=window), context(images))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_overlaps_are_averaged(batch_size, monkeypatch):
    """Each pixel has the mean of the logits of all windows that contain it."""
    monkeypatch.setattr(module, "BATCH_SIZE", batch_size)
    images, seen = random(2, 3, 11, 6), []

    def model(crops):
        seen.append(len(crops))
        return context(crops)

    got = sliding_window(model, images, window=5)
    crops = [(top, left, context(images[..., top : top + 5, left : left + 5])) for top in (0, 3, 6) for left in (0, 1)]
    for y in range(11):
        for x in range(6):
            held = [o[..., y - t, x - s] for t, s, o in crops if 0 <= y - t < 5 and 0 <= x - s < 5]
            torch.testing.assert_close(got[..., y, x], torch.stack(held).mean(dim=0))
    assert max(seen) == min(6, max(1, batch_size // 2)) * 2 and sum(seen) == 12


def test_half_precision_is_summed_in_full_and_gradients_are_not_kept():
    weight = torch.tensor(1.0, requires_grad=True)
    got = sliding_window(lambda crops: (crops * weight).bfloat16(), random(1, 1, 9, 9), window=3)
    assert got.dtype == torch.float32 and not got.requires_grad
    logits = random(9, 20, 20).bfloat16()
    assert torch.equal(labels_at(logits, (70, 80)), labels_at(logits.float(), (70, 80)))


@pytest.mark.parametrize("size", [(90, 67), (17, 150), (70, 65)])
@pytest.mark.parametrize("portion", [1, 3, 4, 23, 100])
def test_labels_equal_those_of_all_maps_at_once(size, portion, monkeypatch):
    monkeypatch.setattr(module, "MAP_VALUES", portion * size[0] * size[1])
    logits = random(23, 70, 65).round(decimals=1)
    logits[11] = logits[5]  # a tie: the first class wins, also across portions
    logits[0, :40] = logits[22, :40] = 9.0
    expected = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
    got = labels_at(logits, size)
    assert got.dtype == torch.uint8 and torch.equal(got.long(), expected)
    assert (got[: size[0] // 2] == 0).all() and not (got == 11).any() and (got == 5).any()


def test_never_more_than_some_maps_of_the_full_size(monkeypatch):
    made, interpolate = [], F.interpolate

    def watched(*args, **options):
        made.append(interpolate(*args, **options))
        return made[-1]

    monkeypatch.setattr(F, "interpolate", watched)
    monkeypatch.setattr(module, "MAP_VALUES", 3 * 40 * 40 + 100)
    labels_at(random(10, 4, 4), (40, 40))
    assert [maps.numel() for maps in made] == [3 * 1600, 3 * 1600, 3 * 1600, 1600]


def test_one_view_is_its_argmax():
    images = random(2, 3, 12, 10)
    plain = predict(context, [images], (30, 25), window=None, flip=False)
    expected = F.interpolate(context(images), size=(30, 25), mode="bilinear").argmax(dim=1)
    assert torch.equal(plain.long(), expected) and plain.shape == (2, 30, 25)
    slid = predict(context, [images], (12, 10), window=5, flip=False)
    expected = sliding_window(context, images, window=5).argmax(dim=1)
    assert torch.equal(slid.long(), expected) and not torch.equal(slid, predict_plain(images))


def predict_plain(images):
    return predict(context, [images], images.shape[-2:], window=None, flip=False)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("size", [(13, 11), (16, 9), (40, 33)])
def test_several_views_have_the_mean_of_their_probabilities(size, window):
    """The result equals mmsegmentation's definition. For sizes beyond the largest view, the mean is resized."""
    views = [random(2, 3, 12, 9, seed=1), random(2, 3, 18, 14, seed=2)]
    kernel = random(7, 3, 3, 3, seed=3)

    def model(images):
        return F.conv2d(images, kernel, padding=1)

    probabilities = []
    common = size if size != (40, 33) else (18, 14)
    for view in views:
        for mirrored in (False, True):
            images = view.flip(3) if mirrored else view
            logits = model(images) if window is None else sliding_window(model, images, window=6)
            logits = F.interpolate(logits.flip(3) if mirrored else logits, size=common, mode="bilinear")
            probabilities.append(logits.softmax(dim=1))
    mean = F.interpolate(torch.stack(probabilities).mean(dim=0), size=size, mode="bilinear")
    got = predict(model, views, size, window=window, flip=True)
    assert torch.equal(got.long(), mean.argmax(dim=1))
    without = predict(model, views, size, window=window, flip=False)
    mean = F.interpolate((probabilities[0] + probabilities[2]) / 2, size=size, mode="bilinear")
    assert torch.equal(without.long(), mean.argmax(dim=1)) and not torch.equal(without, got)


def test_a_mirrored_view_alone_is_mirrored_back():
    """The model looks to the right only, but its mean over both directions is symmetric."""
    images = random(1, 1, 6, 8)

    def model(crops):
        right = F.pad(crops, (0, 1))[..., 1:]
        return torch.cat([crops, right], dim=1)

    got = predict(model, [images], (6, 8), window=None, flip=True)
    mirrored = predict(model, [images.flip(-1)], (6, 8), window=None, flip=True)
    assert torch.equal(got.flip(-1), mirrored) and len(got.unique()) == 2
