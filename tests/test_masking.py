import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from data.decode import DamagedImage
from data.masking import MASK_STRATEGIES, mask_noise, read_removed, removed_patches
from data.transforms import CentreCrop

GRIDS = [(14, 14), (8, 8), (4, 8), (7, 5), (1, 9), (2, 2)]


def mask(strategy, grid, ratio, seed=0, **options):
    num_kept = int(grid[0] * grid[1] * (1 - ratio))
    noise = mask_noise(strategy, np.random.default_rng(seed), grid, num_kept, **options)
    assert noise.shape == (grid[0] * grid[1],) and noise.dtype == np.float32
    assert noise.min() >= 0 and noise.max() < 1.0001
    result = np.zeros(noise.size, dtype=bool)
    result[np.argsort(noise, kind="stable")[:num_kept]] = True
    return result.reshape(grid)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
def test_noise_keeps_exactly_that_many_patches_and_is_repeatable(strategy, grid, ratio):
    first = mask(strategy, grid, ratio, seed=1)
    assert first.sum() == int(grid[0] * grid[1] * (1 - ratio))
    np.testing.assert_array_equal(first, mask(strategy, grid, ratio, seed=1))


@pytest.mark.parametrize("block, grid", [(2, (8, 8)), (4, (16, 16)), (3, (6, 9)), (4, (4, 8))])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.6, 0.75, 0.9])
def test_blocks_are_aligned_and_exactly_that_many_patches_are_kept(block, grid, ratio):
    num_kept = int(grid[0] * grid[1] * (1 - ratio))
    counts = []
    for seed in range(20):
        kept = mask("random", grid, ratio, seed, block=block)
        assert kept.sum() == num_kept
        sums = kept.reshape(grid[0] // block, block, grid[1] // block, block).sum(axis=(1, 3))
        partial = (sums > 0) & (sums < block**2)
        assert partial.sum() == (num_kept % block**2 > 0)  # one block is partial if K needs it
        counts.append(sums)
    assert any((other != counts[0]).any() for other in counts)  # the blocks differ between images


def test_blocks_are_kept_equally_often():
    shares = np.mean([mask("random", (8, 8), 0.75, seed, block=2) for seed in range(2000)], axis=0)
    assert abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_random_keeps_every_patch_equally_often():
    shares = np.mean([mask("random", (8, 8), 0.75, seed) for seed in range(2000)], axis=0)
    assert abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_grid_keeps_as_many_patches_of_every_two_by_two():
    cells = mask("grid", (14, 14), 0.75).reshape(7, 2, 7, 2)
    assert cells[:, 0, :, 0].all() and cells.sum() == 49
    assert (mask("grid", (8, 8), 0.5).reshape(4, 2, 4, 2).sum(axis=(1, 3)) == 2).all()


def equal_neighbours(patches):
    return np.mean([np.mean(patches[1:] == patches[:-1]), np.mean(patches[:, 1:] == patches[:, :-1])])


def test_block_removes_connected_regions():
    block = np.mean([equal_neighbours(mask("block", (14, 14), 0.5, seed)) for seed in range(50)])
    random = np.mean([equal_neighbours(mask("random", (14, 14), 0.5, seed)) for seed in range(50)])
    assert abs(random - 0.5) < 0.02 and block > 0.8


def test_only_the_last_rectangle_of_block_keeps_patches():
    """The others are removed as a whole: each mask has a removed window of 3 x 3 patches."""
    for seed in range(20):
        removed = ~mask("block", (14, 14), 0.75, seed)
        window = np.lib.stride_tricks.sliding_window_view(removed, (3, 3)).all(axis=(2, 3))
        assert window.any()


def test_patches_are_removed_if_they_are_white_by_half():
    removed = torch.zeros(8, 12, dtype=torch.bool)
    removed[:4, :2] = True  # half of the first of 2 x 3 patches
    removed[4:, 8:11] = removed[7, 11] = True  # most of the last patch
    removed[:3, 8:10] = True  # less than half of the third patch
    assert removed_patches(removed, (8, 12), (2, 3)).tolist() == [1, 0, 0, 0, 0, 1]
    for factor in (2, 7, 150):  # larger masks are resized, and their margins are cropped
        larger = removed.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        wider = torch.nn.functional.pad(larger, (6 * factor, 6 * factor), value=True)
        for each in (larger, wider, wider.flip(0, 1)):
            expected = [1, 0, 0, 0, 0, 1]
            assert removed_patches(each, (8, 12), (2, 3)).tolist() == expected
    assert removed_patches(larger.mT, (12, 8), (3, 2)).tolist() == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(40, 40), (77, 40), (31, 240), (9, 14), (32, 32), (1, 300)])
def test_removed_patches_lie_where_the_crop_of_an_image_has_them(shape):
    """A patch is removed where the random picture, cropped as an image is, is bright."""
    removed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    blocks = removed[::5, ::5].repeat_interleave(5, 0).repeat_interleave(5, 1)[: shape[0], : shape[1]]
    bright = CentreCrop((32, 32))(blocks[None].float()).reshape(4, 8, 4, 8).mean(dim=(1, 3)).flatten()
    result, sure = removed_patches(blocks, (32, 32), (4, 4)), (bright - 0.5).abs() > 0.05
    assert torch.equal(result[sure], (bright[sure] > 0.5).float()) and sure.sum() > 8


def test_white_pixels_are_removed(tmp_path):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for mode in ("L", "RGB", "RGBA", "LA"):
        Image.fromarray(grey).convert(mode).save(tmp_path / "mask.png")
        assert read_removed(tmp_path / "mask.png", 4).tolist() == [[False, False, True, True]]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "mask.png")
    assert read_removed(tmp_path / "mask.png", 4).tolist() == [[False, False, True, True]]
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("text.png", "not an image"),
        ("empty.png", "empty"),
        ("x.png", "No such"),
        (".", "directory"),
    ):
        with pytest.raises(DamagedImage, match=reason):
            read_removed(tmp_path / name, 4)


def test_a_large_mask_is_refused_by_its_header(tmp_path, monkeypatch):
    Image.new("LA", (100, 90)).save(tmp_path / "mask.png")
    assert read_removed(tmp_path / "mask.png", 9000).shape == (90, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # --max_pixels replaces Pillow's own limit
    assert not read_removed(tmp_path / "mask.png", 9000).any()
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(DamagedImage, match=r"^90 x 100 pixels, more than the 8999 allowed; raise --max_pixels$"):
        read_removed(tmp_path / "mask.png", 8999)
