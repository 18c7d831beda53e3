import random

import numpy as np
import pytest
import torch
from conftest import write_images

from data.batches import FIXED_EPOCH, Normalization, PretrainingDataset, make_loader
from data.sampling import StepSampler
from data.sources import FolderSource


def dataset(source, **options):
    defaults = dict(img_size=(16, 24), channels=3, grid=(2, 3), num_kept=1, mask_strategy="random", seed=0, train=True)
    return PretrainingDataset(source, **{**defaults, **options})


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


def test_the_global_generators_are_left_alone(source):
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loader = make_loader(dataset(source), [[(0, 0)], [(0, 1)]], num_workers=0)
    assert len(list(loader)) == 2
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_workers_do_not_change_the_batches(source):
    def all_batches(num_workers):
        sampler = StepSampler(len(source), global_batch_size=4, micro_batch_size=2, total_steps=5)
        return list(make_loader(dataset(source), sampler, num_workers=num_workers))

    for one, other in zip(all_batches(0), all_batches(2), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.noise, other.noise)


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
    square = dict(img_size=(20, 20), grid=(2, 2))
    image = dataset(source, train=False, **square).__getitems__([(0, 3)]).images[0]  # 40 x 40, so all of it
    whole = dataset(source, crop_scale=(1.0, 1.0), **square).__getitems__([(0, 3)]).images[0]
    assert torch.equal(whole, image) or torch.equal(whole, image.flip(2))
    part = dataset(source, crop_scale=(0.2, 0.3), **square).__getitems__([(0, 3)]).images[0]
    assert not torch.equal(part, image) and not torch.equal(part, image.flip(2))


def test_validation_is_the_centre_with_fixed_noise(source):
    first = dataset(source, train=False).__getitems__([(FIXED_EPOCH, 2), (FIXED_EPOCH, 3)])
    again = dataset(source, train=False).__getitems__([(FIXED_EPOCH, 3)])
    assert torch.equal(first.images[1], again.images[0]) and torch.equal(first.noise[1], again.noise[0])


def test_a_damaged_image_is_replaced_by_the_next_readable_one(source):
    healthy = dataset(source, train=False).__getitems__([(0, 1)])
    for index, content in [(11, b""), (0, b"no image")]:
        with open(source.name(index), "wb") as file:
            file.write(content)
    batch = dataset(source, train=False).__getitems__([(0, 11)])
    assert torch.equal(batch.images, healthy.images)
    assert [index for index, _ in batch.damaged] == [11, 0] and all(reason for _, reason in batch.damaged)


def test_where_none_can_be_read_all_are_named(source):
    for index in range(len(source)):
        open(source.name(index), "wb").close()
    batch = dataset(source).__getitems__([(0, 4)])
    assert sorted(index for index, _ in batch.damaged) == list(range(12))


def test_normalisation_and_its_inverse():
    normalize = Normalization([0.5, 0.25], [0.5, 0.125], torch.device("cpu"))
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 2, 1, 2)
    normalised = normalize(images)
    assert normalised.dtype == torch.float32
    assert normalised.flatten().tolist() == pytest.approx([-1, 1, (0.2 - 0.25) / 0.125, (0.4 - 0.25) / 0.125])
    torch.testing.assert_close(normalize.undo(normalised), images / 255)
