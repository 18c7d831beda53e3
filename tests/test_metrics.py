import numpy as np
import pytest
import torch

from training.metrics import psnr, reconstruction_metrics, segmentation_areas, sum_reconstruction_metrics


def gaussian_ssim_map(a, b):
    """Return the SSIM of two 2-D arrays at every pixel, from Wang et al. 2004: 11 x 11 Gaussian, sigma 1.5."""
    x = np.arange(11) - 5
    window = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2

    def blur(image):
        padded = np.pad(image, 5, mode="reflect")
        return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(padded, (11, 11)), window)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 32, 48, generator=generator)
    prediction = (images + 0.3 * torch.randn(images.shape, generator=generator)) * 1.2  # some of it out of range
    patches = (torch.rand(3, 1, 4, 6, generator=generator) < 0.75).float()
    return images, prediction, patches.repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_metrics_equal_their_definition_in_numpy(case):
    images, prediction, mask = case
    metrics = reconstruction_metrics(*case)
    for i in range(len(images)):
        image, guess = images[i].double().numpy(), prediction[i].clamp(0, 1).double().numpy()
        removed = mask[i, 0].bool().numpy()
        fill = np.broadcast_to(image[:, ~removed].mean(axis=1)[:, None, None], image.shape)
        pasted = np.where(removed, guess, image)
        maps = np.mean([gaussian_ssim_map(g, o) for g, o in zip(guess, image, strict=True)], axis=0)
        expected = {
            "masked_psnr": -10 * np.log10(((guess - image) ** 2)[:, removed].mean()),
            "masked_psnr_visible_mean": -10 * np.log10(((fill - image) ** 2)[:, removed].mean()),
            "prediction_psnr": -10 * np.log10(((guess - image) ** 2).mean()),
            "pasted_psnr": -10 * np.log10(((pasted - image) ** 2).mean()),
            "masked_ssim": maps[removed].mean(),
        }
        for name, value in expected.items():
            assert metrics[name][i].item() == pytest.approx(value, abs=2e-4), name


def test_psnr_by_hand():
    """Pasting halves the squared error (3.01 dB) if half of the pixels are removed."""
    error = torch.tensor([0.01, 0.0001]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    assert psnr(error).tolist() == pytest.approx([20, 40])
    images = torch.full((1, 3, 16, 16), 0.5)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    metrics = reconstruction_metrics(images, images + 0.1, mask)
    values = [metrics[name].item() for name in ("prediction_psnr", "pasted_psnr", "masked_psnr")]
    assert values == pytest.approx([20, 20 + 3.0103, 20], abs=1e-3)
    perfect = reconstruction_metrics(images, images, mask)
    assert perfect["prediction_psnr"] == 100 and perfect["prediction_ssim"] == perfect["pasted_ssim"] == 1


def count_areas(prediction, annotation, num_classes):
    """Return areas (3, num_classes) by a loop over pixels."""
    areas = np.zeros((3, num_classes), np.int64)
    for guess, label in zip(prediction.flatten().tolist(), annotation.flatten().tolist(), strict=True):
        if label != 255:
            areas[0, label] += guess == label
            areas[1, guess] += 1
            areas[2, label] += 1
    return areas


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
@pytest.mark.parametrize("num_classes", [2, 7, 150])
def test_areas_equal_a_count_of_pixels(num_classes, kind):
    """The masks have void pixels with any prediction, and classes that annotation or prediction lack."""
    generator = torch.Generator().manual_seed(num_classes)
    prediction = torch.randint(num_classes // 2, num_classes, (37, 41), generator=generator)
    annotation = torch.randint(max(1, num_classes - 2), (37, 41), generator=generator)
    annotation[torch.rand(37, 41, generator=generator) < 0.3] = 255
    prediction[annotation == 255] = torch.randint(256, (int((annotation == 255).sum()),), generator=generator)
    areas = segmentation_areas(prediction.to(kind), annotation.to(kind), num_classes)
    assert areas.dtype == torch.int64 and np.array_equal(areas, count_areas(prediction, annotation, num_classes))


def test_numbers_of_void_and_beyond_the_classes():
    assert not segmentation_areas(torch.ones(3, 3).byte(), torch.full((3, 3), 255), 4).any()
    few = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"class number 3 in an annotation; expected 0 to 2"):
        segmentation_areas(few, torch.tensor([0, 3, 255]), 3)
    for number in (3, 255, 300):
        with pytest.raises(ValueError, match=rf"class number {number} in a prediction; expected 0 to 2"):
            segmentation_areas(torch.tensor([0, number, 2]), few, 3)


def test_ssim_is_computed_without_tf32(case, monkeypatch):
    import torchmetrics.functional.image as peer

    name, seen = "structural_similarity_index_measure", []
    ssim = getattr(peer, name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def watch(*args, **options):
        seen.append(torch.backends.cudnn.allow_tf32)
        return ssim(*args, **options)

    monkeypatch.setattr(peer, name, watch)
    reconstruction_metrics(*case)
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32


def test_metrics_of_valid_pixels_equal_their_definition_in_numpy(case):
    images, prediction, mask = case
    valid = torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(1)) < 0.6
    metrics = reconstruction_metrics(*case, valid)
    for i in range(len(images)):
        image, guess = images[i].double().numpy(), prediction[i].clamp(0, 1).double().numpy()
        counted = valid[i, 0].numpy()
        removed, visible = mask[i, 0].bool().numpy() & counted, ~mask[i, 0].bool().numpy() & counted
        fill = np.broadcast_to(image[:, visible].mean(axis=1)[:, None, None], image.shape)
        guess = np.where(counted, guess, image)
        maps = np.mean([gaussian_ssim_map(g, o) for g, o in zip(guess, image, strict=True)], axis=0)
        pasted = np.where(removed, guess, image)
        expected = {
            "masked_psnr": -10 * np.log10(((guess - image) ** 2)[:, removed].mean()),
            "masked_psnr_visible_mean": -10 * np.log10(((fill - image) ** 2)[:, removed].mean()),
            "prediction_psnr": -10 * np.log10(((guess - image) ** 2)[:, counted].mean()),
            "pasted_psnr": -10 * np.log10(((pasted - image) ** 2)[:, counted].mean()),
            "masked_ssim": maps[removed].mean(),
            "prediction_ssim": maps[counted].mean(),
        }
        for name, value in expected.items():
            assert metrics[name][i].item() == pytest.approx(value, abs=2e-4), name


def test_invalid_pixels_enter_no_metric(case):
    images, prediction, mask = case
    valid = torch.rand(3, 1, 32, 48, generator=torch.Generator().manual_seed(1)) < 0.6
    other = torch.where(valid, prediction, torch.rand(prediction.shape))
    one, two = (reconstruction_metrics(images, each, mask, valid) for each in (prediction, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_images_without_a_valid_removed_pixel_are_not_counted(case):
    valid = torch.ones(3, 1, 32, 48, dtype=torch.bool)
    valid[1] = case[2][1] == 0
    sums, single = sum_reconstruction_metrics(*case, valid), reconstruction_metrics(*case)
    assert sums["count"] == 2
    assert sums["masked_psnr"] == pytest.approx((single["masked_psnr"][0] + single["masked_psnr"][2]).item())


def test_no_image_with_a_valid_removed_pixel(case):
    assert sum_reconstruction_metrics(*case, torch.zeros(3, 1, 32, 48, dtype=torch.bool)) == {"count": 0}
