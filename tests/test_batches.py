import gc
import os
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from data import batches
from data.augment import RandAugment
from data.batches import (
    FIXED_EPOCH,
    ClassificationDataset,
    ListedDataset,
    Normalization,
    PretrainingDataset,
    centre_crop,
    make_loader,
    masked_crop,
    own_batches,
    own_mask_crop,
    training_batches,
)
from data.decode import PixelFormat, decode
from data.files import FolderSource
from data.masking import MASK_STRATEGIES
from data.sampling import StepSampler, model_seed
from data.sources import ShapesSource
from data.transforms import CentreCrop, RandomCrop

SIZE = (16, 24)
CENTRE = CentreCrop(SIZE)


def dataset(source, **options):
    defaults = dict(pixels=PixelFormat(3), crop=RandomCrop(SIZE), grid=(2, 3), num_kept=1, mask_strategy="random")
    return PretrainingDataset(source, **{**defaults, "seed": 0, **options})


def labelled(source, **options):
    """Return a data set for classification, with RandAugment by default if crops are random."""
    options = dict(crop=RandomCrop(SIZE, (0.08, 1.0)), pixels=PixelFormat(3), seed=0) | options
    if isinstance(options["crop"], RandomCrop):
        options.setdefault("augment", RandAugment(9, (0.5,) * options["pixels"].channels))
    return ClassificationDataset(source, options.pop("labels", source.labels).astype(np.int64), **options)


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(len(file.read()) // 2)


@pytest.fixture
def source(tmp_path):
    return FolderSource(write_images(tmp_path, 12))


def test_a_batch(source):
    batch = dataset(source).__getitems__([(0, 3), (0, 5), (1, 3)])
    assert batch.images.shape == (3, 3, 16, 24) and batch.images.dtype == torch.uint8
    assert batch.noise.shape == (3, 6) and batch.noise.dtype == torch.float32 and batch.damaged == []
    assert not torch.equal(batch.images[0], batch.images[2])  # another epoch, another crop
    assert not torch.equal(batch.noise[0], batch.noise[2])


def test_a_sample_depends_on_nothing_but_seed_epoch_and_index(source):
    alone = dataset(source).__getitems__([(2, 7)])
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    among = dataset(source).__getitems__([(0, 1), (2, 7), (1, 4)])
    assert torch.equal(alone.images[0], among.images[1]) and torch.equal(alone.noise[0], among.noise[1])
    other = dataset(source, seed=1).__getitems__([(2, 7)])
    assert not torch.equal(alone.images, other.images) and not torch.equal(alone.noise, other.noise)


@pytest.mark.parametrize("make", [dataset, labelled])
def test_the_global_generators_are_left_alone(source, make):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    assert len(list(make_loader(make(source), [[(0, i)] for i in range(12)], num_workers=0))) == 12
    assert (random.getstate(), str(np.random.get_state())) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [dataset, labelled])
def test_workers_do_not_change_the_batches(source, make, channels):
    truncate(source.name(2))
    items = list(StepSampler(len(source), global_batch_size=4, micro_batch_size=2, steps=range(5)))
    data = make(source, pixels=PixelFormat(channels))
    for one, other in zip(*(make_loader(data, items, num_workers=count) for count in (0, 2)), strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_views_of_an_image_cost_one_reading_and_equal_those_of_their_epochs(source, monkeypatch):
    fetched = []
    fetch = source.fetch
    monkeypatch.setattr(source, "fetch", lambda indices: fetched.extend(indices) or fetch(indices))
    batch = dataset(source).__getitems__([(4, 7), (5, 7), (4, 2), (5, 2)])
    assert fetched == [7, 2]
    for row, item in enumerate([(4, 7), (5, 7), (4, 2), (5, 2)]):
        alone = dataset(source).__getitems__([item])
        assert torch.equal(batch.images[row], alone.images[0]) and torch.equal(batch.noise[row], alone.noise[0])
    open(source.name(7), "wb").close()
    assert [index for index, _ in dataset(source).__getitems__([(4, 7), (5, 7)]).damaged] == [7]


def test_a_crop_of_the_whole_image_shows_all_of_it(source):
    crops = CentreCrop((20, 20)), RandomCrop((20, 20), (1.0, 1.0)), RandomCrop((20, 20), (0.2, 0.3))
    image, whole, part = (dataset(source, crop=crop).__getitems__([(0, 3)]).images[0] for crop in crops)  # 40 x 40
    assert torch.equal(whole, image) or torch.equal(whole, image.flip(2))
    assert not torch.equal(part, image) and not torch.equal(part, image.flip(2))


def test_validation_is_the_centre_with_fixed_noise(source):
    first = dataset(source, crop=CENTRE).__getitems__([(FIXED_EPOCH, 2), (FIXED_EPOCH, 3)])
    again = dataset(source, crop=CENTRE).__getitems__([(FIXED_EPOCH, 3)])
    assert torch.equal(first.images[1], again.images[0]) and torch.equal(first.noise[1], again.noise[0])


def test_a_damaged_image_is_replaced_by_the_next_readable_one(source):
    healthy = dataset(source, crop=CENTRE).__getitems__([(0, 1)])
    for index, content in [(11, b""), (0, b"no image")]:
        with open(source.name(index), "wb") as file:
            file.write(content)
    batch = dataset(source, crop=CENTRE).__getitems__([(0, 11)])
    assert torch.equal(batch.images, healthy.images)
    assert [index for index, _ in batch.damaged] == [11, 0] and all(reason for _, reason in batch.damaged)


@pytest.mark.parametrize("make", [dataset, labelled])
def test_where_none_can_be_read_all_are_named(source, make):
    for index in range(len(source)):
        open(source.name(index), "wb").close()
    batch = make(source).__getitems__([(0, 4)])
    assert sorted(index for index, _ in batch.damaged) == list(range(12))
    assert make is dataset or batch.labels.tolist() == [0]


def test_a_batch_of_classification(source):
    batch = labelled(source).__getitems__([(0, 3), (0, 6), (1, 3)])
    assert batch.images.shape == (3, 3, 16, 24) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [0, 1, 0]  # sorted by path: class 1 from 6 on
    assert batch.indices == [3, 6, 3] and batch.damaged == []
    assert not torch.equal(batch.images[0], batch.images[2])  # another epoch, another crop


@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmented_sample_depends_on_nothing_but_seed_epoch_and_index(source, channels):
    items = [(epoch, index) for epoch in range(2) for index in range(12)]
    data = labelled(source, pixels=PixelFormat(channels))
    alone = [data.__getitems__([item]).images[0] for item in items]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    order = np.random.permutation(len(items))
    among = data.__getitems__([items[i] for i in order]).images
    assert all(torch.equal(alone[i], image) for i, image in zip(order, among, strict=True))
    plain = labelled(source, pixels=PixelFormat(channels), augment=None).__getitems__(items).images
    assert sum(not torch.equal(a, b) for a, b in zip(alone, plain, strict=True)) > 8
    other = labelled(source, pixels=PixelFormat(channels), seed=1).__getitems__(items).images
    assert not any(torch.equal(a, b) for a, b in zip(alone, other, strict=True))


def test_the_evaluation_of_classification_is_the_centre(source):
    data = labelled(source, crop=CentreCrop(SIZE, 0.75))
    batch = data.__getitems__([(FIXED_EPOCH, 2), (0, 2), (FIXED_EPOCH, 7)])
    assert torch.equal(batch.images[0], batch.images[1])
    for row, index in ((0, 2), (2, 7)):
        (encoded,) = source.fetch([index])
        assert torch.equal(batch.images[row], CentreCrop(SIZE, 0.75)(decode(encoded, PixelFormat(3))))
    assert not torch.equal(batch.images, labelled(source, crop=CENTRE).__getitems__([(0, 2), (0, 2), (0, 7)]).images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_replacement_of_a_damaged_image_brings_its_own_label(source, channels, num_workers):
    data = labelled(source, pixels=PixelFormat(channels), crop=CENTRE)
    healthy = data.__getitems__([(0, 6), (0, 0)])
    truncate(source.name(4))
    for index in (5, 11):
        with open(source.name(index), "w") as file:
            file.write("a text file")
    items = [(0, 4), (0, 4), (0, 11), (0, 6)]
    (batch,) = make_loader(data, [items], num_workers=num_workers)
    assert source.labels[4] == 0 and batch.labels.tolist() == [1, 1, 0, 1]
    assert batch.indices == [4, 4, 11, 6]
    for row, expected in enumerate((0, 0, 1, 0)):
        assert torch.equal(batch.images[row], healthy.images[expected])
    assert [index for index, _ in batch.damaged] == [4, 5, 11] and all(reason for _, reason in batch.damaged)


def test_arrays_are_classified_like_files():
    scenes = ShapesSource("validation", 1)
    scenes.size, scenes.labels = 4, np.array([3, 1, 0, 2], dtype=np.uint8)
    scenes.images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 1), dtype=np.uint8)
    before = scenes.images.copy()
    batch = labelled(scenes, pixels=PixelFormat(1), crop=RandomCrop((64, 64))).__getitems__([(0, 1), (0, 3)])
    assert batch.images.shape == (2, 1, 64, 64) and batch.labels.tolist() == [1, 2]
    whole = labelled(scenes, pixels=PixelFormat(1), crop=CentreCrop((64, 64))).__getitems__([(0, 1)])
    assert torch.equal(whole.images[0, 0], torch.from_numpy(before[1, :, :, 0]))
    assert np.array_equal(scenes.images, before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_listed_images_are_prepared_or_told(source, num_workers):
    """Batches follow the order of the indices; damaged images are left out and reported."""
    with open(source.name(2), "wb") as file:
        file.write(b"damaged")
    prepare = partial(masked_crop, size=SIZE, grid=(2, 3), num_kept=1, mask_strategy="random", mask_block=1, seed=5)
    data = ListedDataset(source, pixels=PixelFormat(3), prepare=prepare)
    batches = list(make_loader(data, [range(3), range(3, 5), [2]], num_workers=num_workers))
    assert [batch.indices for batch in batches] == [[0, 1], [3, 4], []]
    assert [[index for index, _ in batch.damaged] for batch in batches] == [[2], [], [2]]
    assert "not an image" in batches[2].damaged[0][1]
    # Inputs are tensors, which workers pass in shared memory: a worker that writes more into a pipe than fits waits
    # for ever if nobody reads it.
    validation = dataset(source, seed=5, crop=CENTRE).__getitems__([(FIXED_EPOCH, 3), (FIXED_EPOCH, 4)])
    images, noise = batches[1].inputs
    assert torch.equal(images, validation.images) and torch.equal(noise, validation.noise)
    assert not torch.equal(*noise) and batches[2].inputs == ()
    pixels = decode(source.fetch([4])[0], PixelFormat(3))
    (cropped,) = centre_crop(pixels, 4, size=SIZE, crop_ratio=0.5)
    assert torch.equal(cropped, CentreCrop(SIZE, 0.5)(pixels))


@pytest.mark.parametrize(("num_processes", "num_workers"), [(1, 0), (2, 0), (3, 2), (5, 0)])
def test_processes_share_the_samples_of_an_evaluation(source, num_processes, num_workers):
    data, asked = labelled(source, crop=CENTRE), [0] * num_processes
    shown = []
    for process in range(num_processes):

        def watch(batches, process=process):
            asked[process] += len(batches)
            return batches

        share = dict(process_index=process, num_processes=num_processes, watch=watch)
        batches = list(own_batches(data, np.arange(4), batch_size=2, num_workers=num_workers, **share))
        assert all(len(batch.indices) <= 2 for batch in batches)
        shown += [index for batch in batches for index in batch.indices]
    assert sorted(shown) == list(range(4)) and all(type(index) is int for index in shown)
    assert len(set(asked)) == 1  # every process has as many turns, even with no samples left


def test_an_evaluation_ends_where_the_run_is_to_stop(source):
    options = dict(batch_size=2, num_workers=0, process_index=0, num_processes=1, watch=lambda batches: batches[:2])
    assert len(list(own_batches(dataset(source, crop=CENTRE), range(12), **options))) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_come_with_the_seeds_of_the_model(source, num_workers):
    options = dict(global_batch_size=8, micro_batch_size=2, seed=3, process_index=1, num_processes=2)
    sampler = StepSampler(len(source), steps=range(4, 7), **options)
    pairs = list(training_batches(dataset(source), sampler, num_workers=num_workers))
    assert [seed for seed, _ in pairs] == [model_seed(3, step, position) for step in (4, 5, 6) for position in (4, 6)]
    for (_, batch), items in zip(pairs, sampler, strict=True):
        expected = dataset(source).__getitems__(items)
        assert torch.equal(batch.images, expected.images) and torch.equal(batch.noise, expected.noise)


def test_memory_of_workers_is_checked_for_the_largest_batches_to_come(source, monkeypatch):
    checked, large = [], dataset(source, crop=RandomCrop((160, 240)))
    monkeypatch.setattr(batches, "check_shared_memory", lambda *words: checked.append(words))
    for options in ({}, dict(largest=large)):
        sampler = StepSampler(len(source), steps=range(1), global_batch_size=4, micro_batch_size=4)
        ((_, batch),) = training_batches(dataset(source), sampler, num_workers=1, **options)
        assert batch.images.shape[2:] == SIZE
    (small, _), (other, _) = checked
    assert small == 4 * (3 * 16 * 24 + 6 * 4) and other == 4 * (3 * 160 * 240 + 6 * 4)


def test_normalization_and_its_inverse():
    normalize = Normalization([0.5, 0.25], [0.5, 0.125], torch.device("cpu"))
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 2, 1, 2)
    normalized = normalize(images)
    assert normalized.dtype == torch.float32
    assert normalized.flatten().tolist() == pytest.approx([-1, 1, (0.2 - 0.25) / 0.125, (0.4 - 0.25) / 0.125])
    torch.testing.assert_close(normalize.undo(normalized), images / 255)


@pytest.mark.parametrize("size", [(24, 24), (16, 48)])
def test_fast_decoding_reads_large_photographs_at_a_smaller_scale(tmp_path, size):
    """With fast decoding, crops of large photographs hardly differ, and those of small images are equal."""
    source = FolderSource(write_images(tmp_path, 4, size=400))
    items = [(epoch, index) for epoch in range(4) for index in range(4)]

    def images(make, *options, source=source, **others):
        """Return the images without and with fast decoding."""
        crops = [RandomCrop(size, *options, fast=fast) for fast in (False, True)]
        return [make(source, crop=crop, **others).__getitems__(items[: len(source)]).images for crop in crops]

    for exact, fast in (images(dataset), images(labelled, (0.3, 1.0), augment=None)):
        assert not torch.equal(exact, fast) and (exact.float() - fast.float()).abs().mean() < 6
    assert torch.equal(*images(dataset, source=FolderSource(write_images(tmp_path / "small", 2, size=40))))


def test_deep_pixels_travel_as_floats_and_are_normalized_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", rng.uniform(-5, 5, (30, 40, 4)).astype(np.float32))
    (tmp_path / "2.npy").write_bytes(b"cut")
    data = dataset(FolderSource(tmp_path), pixels=PixelFormat(4, (-5, 5)))
    batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])
    assert batch.images.shape == (3, 4, 16, 24) and batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and [index for index, _ in batch.damaged] == [2]
    normalize = Normalization([0.5] * 4, [0.25] * 4, torch.device("cpu"))
    assert torch.allclose(normalize.undo(normalize(batch.images)), batch.images, atol=1e-6)
    assert torch.equal(normalize(batch.images), (batch.images - 0.5) / 0.25)


class InWorker(torch.utils.data.Dataset):
    """Return samples of the number of objects that the garbage collector ignores and the process's niceness."""

    def __getitems__(self, indices):
        return gc.get_freeze_count(), os.getpriority(os.PRIO_PROCESS, 0)


def test_workers_give_way_and_do_not_write_into_what_they_share():
    ((frozen, priority),) = make_loader(InWorker(), [[0]], num_workers=1)
    assert frozen > 10_000 and priority == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_patches_without_a_valid_pixel_come_last(tmp_path, strategy):
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for i in range(6):
        image = rng.integers(1, 256, (40, 60, 3), dtype=np.uint8)
        image[: 8 * i, 20:50] = 0  # 0 to 40 rows
        Image.fromarray(image).save(folder / f"{i}.png")
    source, items = FolderSource(folder), [(epoch, i) for epoch in range(4) for i in range(6)]
    options = dict(crop=RandomCrop((48, 64)), grid=(6, 8), num_kept=12, mask_strategy=strategy)
    plain = dataset(source, pixels=PixelFormat(3, nodata=0), **options).__getitems__(items)
    batch = dataset(source, pixels=PixelFormat(3, nodata=0, validity="nodata"), **options).__getitems__(items)
    assert plain.valid is None and torch.equal(batch.images, plain.images)
    assert batch.valid.shape == (24, 1, 48, 64) and batch.valid.dtype == torch.bool
    holds_data = batch.valid.unfold(2, 8, 8).unfold(3, 8, 8).any(-1).any(-1).flatten(1)  # (B, L)
    assert holds_data.all(dim=1).any() and not holds_data.all()
    for noise, before, holds in zip(batch.noise, plain.noise, holds_data, strict=True):
        assert torch.equal(noise[holds], before[holds])  # the noise of the other patches is unchanged
        assert (~holds).sum() == 0 or noise[~holds].min() > noise[holds].max()


def test_every_valid_pixel_is_valid_without_holes(source):
    batch = dataset(source, pixels=PixelFormat(3, validity="nodata")).__getitems__([(0, 3), (0, 5)])
    assert batch.valid.all() and torch.equal(batch.noise, dataset(source).__getitems__([(0, 3), (0, 5)]).noise)


def test_a_mask_has_the_size_of_the_image_or_of_the_crop(source):
    noise, image = torch.rand(6), torch.zeros(3, 40, 50, dtype=torch.uint8)
    for mask_size in ((40, 50), SIZE):
        crop, own = own_mask_crop(image, 0, size=SIZE, noise=noise, mask_size=mask_size)
        assert crop.shape == (3, *SIZE) and torch.equal(own, noise)
    prepare = partial(own_mask_crop, size=SIZE, noise=noise, mask_size=(50, 40))
    batch = ListedDataset(source, pixels=PixelFormat(3), prepare=prepare).__getitems__(range(2))
    assert batch.indices == [] and all("but the mask 50 x 40; expected" in reason for _, reason in batch.damaged)
