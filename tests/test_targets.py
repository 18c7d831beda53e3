"""Tests of the targets against short independent implementations."""

import numpy as np
import pytest
import torch
from skimage.feature import hog
from torch import nn

from modeling.targets import HOG, TARGETS, PrincipalComponents, TeacherFeatures
from modeling.vit import VisionTransformer, patchify, unpatchify

SMALL = dict(embed_dim=16, depth=1, num_heads=1)


def new_encoder(patch_size=8, img_size=(32, 48), in_channels=3):
    return VisionTransformer(**SMALL, patch_size=patch_size, img_size=img_size, in_channels=in_channels)


def photographs(*shape, seed=0):
    """Return smooth random images, whose gradients have every direction."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return nn.functional.avg_pool2d(images, 3, stride=1, padding=1)


@pytest.mark.parametrize(
    ("patch_size", "cell", "img_size"), [(16, 8, (32, 48)), (8, 8, (32, 48)), (4, 4, (32, 32)), (14, 14, (28, 42))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_hog_equals_scikit_image(patch_size, cell, img_size, channels):
    """scikit-image normalizes a block of one cell by its L2 norm, as HOG does with each cell."""
    target = HOG(new_encoder(patch_size, img_size, channels))
    images = photographs(2, channels, *img_size)
    result = target(patchify(images, patch_size))
    side = patch_size // cell
    assert target.width == result.shape[-1] == side * side * channels * 9
    grid = (img_size[0] // patch_size, img_size[1] // patch_size)
    for image, own in zip(images, unpatchify(result, side, grid), strict=True):
        for channel, histograms in zip(image, own.unflatten(0, (channels, 9)), strict=True):
            options = dict(orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(1, 1), block_norm="L2")
            expected = hog(channel.double().numpy(), **options, feature_vector=False)[:, :, 0, 0]
            np.testing.assert_allclose(histograms.permute(1, 2, 0), expected, rtol=0, atol=1e-4)
            assert expected.std() > 0.05


def test_hog_does_not_change_with_brightness_and_contrast():
    """HOG does not depend on the mean and standard deviation that normalize a run's images."""
    target, images = HOG(new_encoder()), photographs(1, 3, 32, 48)
    scale = torch.tensor([4.0, 5.0, 0.5]).view(3, 1, 1)
    result = target(patchify(images * scale - 1, 8))
    torch.testing.assert_close(result, target(patchify(images, 8)), rtol=0, atol=1e-4)
    assert not target(torch.full((1, 24, 192), 0.3)).any()  # a flat image has no orientation and gives no NaN


def test_principal_components_equal_numpy():
    """The components are right for batches of unequal size and for patches whose mean is far from 0."""
    encoder = new_encoder(4, (16, 16))
    patches = patchify(photographs(60, 3, 16, 16) + torch.tensor([5.0, -3.0, 0.0]).view(3, 1, 1), 4)
    target = PrincipalComponents(encoder, 10)
    target.fit(patches.split([1, 32, 27]))
    rows = patches.flatten(0, 1).double().numpy()
    _, _, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(target.mean, rows.mean(0), rtol=1e-6)
    products = target.components.double().numpy() @ vectors[:10].T
    np.testing.assert_allclose(np.abs(products), np.eye(10), atol=1e-4)  # the same up to their signs
    expected = (rows - rows.mean(0)) @ vectors[:10].T * np.sign(np.diag(products))
    np.testing.assert_allclose(target(patches).flatten(0, 1), expected, atol=1e-4)


def test_the_inverse_of_principal_components_is_the_projection():
    encoder, patches = new_encoder(4, (16, 16)), patchify(photographs(60, 3, 16, 16), 4)
    errors = []
    for width in (4, 20, 48):
        target = PrincipalComponents(encoder, width)
        target.fit([patches])
        errors.append((target.invert(target(patches), patches) - patches).square().mean())
    assert errors[0] > 2 * errors[1] > 1e-4 and errors[2] < 1e-10
    rows = patches.flatten(0, 1) - patches.flatten(0, 1).mean(0)
    lost = torch.linalg.svdvals(rows)[4:].square().sum() / rows.numel()
    torch.testing.assert_close(errors[0], lost, rtol=1e-3, atol=0)


def test_number_of_components():
    assert PrincipalComponents(new_encoder(16)).width == 96  # as in the paper
    assert PrincipalComponents(new_encoder(4)).width == 48  # all components of 48 values
    with pytest.raises(ValueError, match="49 components of patches of 48 values; expected at most 48"):
        PrincipalComponents(new_encoder(4), 49)


def test_the_loss_of_features_is_smooth_l1():
    target = TeacherFeatures(new_encoder(), 5)
    prediction, features = 3 * torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    error = (prediction - features).abs()
    expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(target.loss(prediction.requires_grad_(), features), expected)


@pytest.mark.parametrize("name", TARGETS)
def test_targets_stay_in_float32_under_bfloat16(name):
    target, patches = TARGETS[name](new_encoder(), 24), patchify(photographs(2, 3, 32, 48), 8)
    if name == "pca":
        target.fit([patches])
    values = torch.randn(2, 24, 24) if name == "teacher" else target(patches)
    assert values.shape == (2, 24, target.width)
    with torch.autocast("cpu", torch.bfloat16):
        if name != "teacher":
            assert torch.equal(target(patches), values)
        assert target.loss(values.bfloat16(), values).dtype == torch.float32
