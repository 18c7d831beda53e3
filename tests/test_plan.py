from types import SimpleNamespace

import numpy as np
import pytest

from training.launch import InputError
from training.plan import BatchPlan, LengthPlan, Plan, compare_batch, describe_images, plan_batch, plan_length
from training.schedule import learning_rate_at

BATCH_FLAGS = ("global_batch_size", "per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps")


def batch(processes=1, **flags):
    return plan_batch(**{**dict.fromkeys(BATCH_FLAGS), **flags}, num_processes=processes)


@pytest.mark.parametrize(
    ("processes", "flags", "expected", "accumulation"),
    [
        (1, {}, (256, 256, 256), 1),
        (2, dict(per_gpu_batch_size=2048, gradient_accumulation_steps=4), (4096, 2048, 512), 4),  # as in the paper
        (8, dict(global_batch_size=4096, micro_batch_size="auto"), (4096, 512, 512), 1),
        (2, dict(global_batch_size=32, per_gpu_batch_size=16, micro_batch_size=4), (32, 16, 4), 4),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=4), (8, 8, 2), 4),
        (2, dict(checkpoint_size=16), (16, 8, 8), 1),  # resumed on another number of processes
        (8, dict(default=16), (16, 2, 2), 1),
        (8, dict(default=16, per_gpu_batch_size=4), (32, 4, 4), 1),
    ],
)
def test_batch_flags(processes, flags, expected, accumulation):
    plan = batch(processes, **flags)
    assert tuple(plan) == expected and plan.accumulation == accumulation


@pytest.mark.parametrize(
    ("processes", "flags", "expected"),
    [
        (3, dict(global_batch_size=32), "--global_batch_size 32 is not divisible by 3 processes; take a multiple of 3"),
        (2, dict(global_batch_size=32, per_gpu_batch_size=32), "x 2 processes = 64 do not agree; give one of them"),
        (1, dict(per_gpu_batch_size=8, gradient_accumulation_steps=3), "3 does not divide the batch of 8"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=3), "3 does not divide the batch of 8 .*; give 2"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=2), "is not the batch of 8"),
        (3, dict(checkpoint_size=16), "16 images is not divisible by 3 processes; start 2 of them"),
        (2, dict(global_batch_size=7, micro_batch_size=2), "is not divisible by 2 .*\n--micro_batch_size 2 does not"),
    ],
)
def test_bad_batch_flags(processes, flags, expected):
    with pytest.raises(InputError, match=expected) as error:
        batch(processes, **flags)
    assert str(error.value).count("\n") == expected.count("\n")


def test_batch_flags_of_a_resumed_run_mean_its_batch():
    assert not any(compare_batch(*sizes, 16, 2) for sizes in ((None, None), (16, None), (None, 8)))
    assert "give --per_gpu_batch_size 8" in compare_batch(None, 4, 16, 2)[0]
    assert "mean 8 images per step, the checkpoint has 16; give --global" in compare_batch(8, None, 16, 2)[0]


def length(num_samples=100, **flags):
    options = dict(epochs=10, max_steps=None, warmup_epochs=None, warmup_steps=None, recipe_epochs=(4, 80))
    return plan_length(**{**options, **flags}, num_samples=num_samples, global_batch_size=8)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(), (12, 120, 6)),  # in a shorter run, the default warmup keeps its share
        (dict(epochs=80), (12, 960, 48)),
        (dict(epochs=200), (12, 2400, 48)),  # in a longer run, it keeps its length
        (dict(max_steps=19), (12, 19, 0)),
        (dict(epochs=90, recipe_epochs=(10, 90)), (12, 1080, 120)),  # linear probe
        (dict(epochs=9, recipe_epochs=(10, 90)), (12, 108, 12)),
        (dict(epochs=300, recipe_epochs=(20, 300)), (12, 3600, 240)),  # training from scratch
        (dict(epochs=30, recipe_epochs=(20, 300)), (12, 360, 24)),
        (dict(warmup_epochs=4.0), (12, 120, 48)),
        (dict(max_steps=50, warmup_steps=7), (12, 50, 7)),
        (dict(max_steps=50, warmup_epochs=0.0), (12, 50, 0)),
        (dict(max_steps=160_000, recipe_steps=(1_500, 160_000)), (12, 160_000, 1_500)),
        (dict(max_steps=1_000, recipe_steps=(1_500, 160_000)), (12, 1_000, 9)),
    ],
)
def test_length_flags(flags, expected):
    assert tuple(length(**flags)) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (dict(num_samples=7), "an epoch has 7 images, fewer than one global batch of 8"),
        (dict(warmup_epochs=10.0), "--warmup_epochs 10 is 120 steps, not shorter than the run of 120"),
        (dict(max_steps=50, warmup_steps=50), "--warmup_steps 50 is 50 steps, not shorter than the run of 50"),
    ],
)
def test_bad_length_flags(flags, expected):
    with pytest.raises(InputError, match=expected):
        length(**flags)


def test_a_plan_gives_the_schedule_and_the_resolved_flags():
    plan = Plan(BatchPlan(32, 16, 4), LengthPlan(10, 100, 5), 1e-3, 1e-6)
    assert [learning_rate_at(step, **plan.schedule) for step in (0, 5, 99)] == [0, 1e-3, 1e-6]
    sizes = dict(zip(BATCH_FLAGS, (32, 16, 4, 4), strict=True))
    assert plan.flags == dict(sizes, max_steps=100, warmup_steps=5, learning_rate=1e-3)


class Images(SimpleNamespace):
    """Imitate a source of the package `data` with labels."""

    classes, notes = list("0123"), []

    def __len__(self):
        return len(self.labels)

    def size_in_bytes(self):
        return 1000.0


def test_built_in_images_are_generated_and_others_have_a_size():
    images = Images(labels=np.array([0, 1]))
    (line,) = describe_images("builtin:shapes", images, images)
    assert line == "data       builtin:shapes: 2 images (generated), 2 for validation"
    (line,) = describe_images("D", images, None)
    assert line == "data       D: 2 images (about 1 kB), none for validation: training images are used"


def test_classes_without_images_are_named():
    train, validation = Images(labels=np.array([1, 2, 3, 1])), Images(labels=np.array([1, 2]))
    assert describe_images("D", train, validation, targets="4 classes")[1:] == [
        "untrained  1 of 4 classes, without training images: 0",
        "unmeasured 2 of 4 classes, without validation images: 0, 3",
    ]
    assert len(describe_images("D", train, validation)) == len(describe_images("D", train, None)) == 1
    train = Images(labels=np.array([7, 200_002]), classes=list(map(str, range(200_003))))
    (line,) = describe_images("D", train, None, targets="200003 classes")[1:]
    assert line == "untrained  200001 of 200003 classes, without training images: 0, 1, 2, ..."
