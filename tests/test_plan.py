import pytest

from training.plan import plan_batch, plan_length


def batch(processes=1, held=None, **given):
    names = ("global_batch_size", "per_gpu_batch_size", "micro_batch_size", "gradient_accumulation_steps")
    return plan_batch(**{name: given.get(name) for name in names}, num_processes=processes, held=held)


@pytest.mark.parametrize(
    ("processes", "given", "expected", "accumulation"),
    [
        (1, {}, (256, 256, 256), 1),
        (2, dict(per_gpu_batch_size=2048, gradient_accumulation_steps=4), (4096, 2048, 512), 4),  # the paper on two
        (8, dict(global_batch_size=4096), (4096, 512, 512), 1),
        (8, dict(global_batch_size=4096, micro_batch_size=64), (4096, 512, 64), 8),
        (2, dict(global_batch_size=32, per_gpu_batch_size=16, micro_batch_size=4), (32, 16, 4), 4),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=4), (8, 8, 2), 4),
    ],
)
def test_batch_flags(processes, given, expected, accumulation):
    plan, errors = batch(processes, **given)
    assert not errors and tuple(plan) == expected and plan.accumulation == accumulation


@pytest.mark.parametrize(
    ("processes", "given", "word"),
    [
        (3, dict(global_batch_size=32), "not divided by 3 processes"),
        (2, dict(global_batch_size=32, per_gpu_batch_size=32), "do not agree"),
        (1, dict(per_gpu_batch_size=8, gradient_accumulation_steps=3), "does not divide"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=3), "does not divide"),
        (1, dict(per_gpu_batch_size=8, micro_batch_size=2, gradient_accumulation_steps=2), "is not the batch of 8"),
        (1, dict(per_gpu_batch_size=8, held=16), "--per_gpu_batch_size 16"),
        (3, dict(held=16), "not divided by 3 processes"),
    ],
)
def test_bad_batch_flags(processes, given, word):
    _, errors = batch(processes, **given)
    assert len(errors) == 1 and word in errors[0]


def test_a_default_batch_over_all_processes():
    options = dict(micro_batch_size=None, gradient_accumulation_steps=None, held=None, default=16)
    plan, errors = plan_batch(global_batch_size=None, per_gpu_batch_size=None, num_processes=8, **options)
    assert not errors and tuple(plan) == (16, 2, 2)
    plan, errors = plan_batch(global_batch_size=None, per_gpu_batch_size=4, num_processes=8, **options)
    assert not errors and tuple(plan) == (32, 4, 4)
    _, errors = plan_batch(global_batch_size=None, per_gpu_batch_size=None, num_processes=3, **options)
    assert "--global_batch_size 16 is not divided by 3 processes" in errors[0]


def test_a_default_warmup_in_steps():
    sizes = dict(epochs=None, warmup_epochs=None, warmup_steps=None, num_samples=20_210, global_batch_size=16)
    plan, errors = plan_length(max_steps=160_000, default_warmup_steps=1_500, **sizes)
    assert not errors and tuple(plan) == (1_263, 160_000, 1_500)
    assert plan_length(max_steps=1_000, default_warmup_steps=1_500, **sizes)[0].warmup_steps == 50  # 5 %


def test_a_checkpoint_keeps_its_global_batch_on_other_processes():
    plan, errors = batch(2, held=16)
    assert not errors and tuple(plan) == (16, 8, 8)


def length(num_samples=100, global_batch_size=8, **given):
    defaults = dict(epochs=10, max_steps=None, warmup_epochs=None, warmup_steps=None)
    sizes = dict(num_samples=num_samples, global_batch_size=global_batch_size, default_warmup_epochs=4)
    return plan_length(**{**defaults, **given}, **sizes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(epochs=100), (12, 1200, 48)),
        (dict(), (12, 120, 6)),  # a default warmup is capped at 5 %
        (dict(warmup_epochs=4.0), (12, 120, 48)),
        (dict(max_steps=50, warmup_steps=7), (12, 50, 7)),
        (dict(max_steps=50, warmup_epochs=0.0), (12, 50, 0)),
    ],
)
def test_length_flags(given, expected):
    plan, errors = length(**given)
    assert not errors and tuple(plan) == expected


def test_bad_length_flags():
    assert "fewer than one global batch" in length(num_samples=7)[1][0]
    assert "--warmup_epochs 10 is 120 steps, not shorter than the run of 120" in length(warmup_epochs=10.0)[1][0]
    assert "--warmup_steps 50" in length(max_steps=50, warmup_steps=50)[1][0]
