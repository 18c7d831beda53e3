import numpy as np
import pytest
import torch
from PIL import Image

from training.pictures import reconstruction_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_a_row_an_image_with_removed_patches_grey_and_visible_ones_pasted(tmp_path, channels):
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


def test_true_statistics_are_told(tmp_path):
    images, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    for told in (False, True):
        reconstruction_grid(tmp_path / f"{told}.png", images, images, mask, title="", uses_true_patch_statistics=told)
    without, with_word = (np.asarray(Image.open(tmp_path / f"{told}.png"))[:24] for told in (False, True))
    assert without.min() == 255 and with_word.min() < 100
