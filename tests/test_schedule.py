import pytest

from training.schedule import learning_rate_at


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (1, 0.25),
        (3, 0.75),
        (4, 1.0),
        (7, 0.55 + 0.45 * 0.7071067811865476),  # a quarter of the cosine: cos(pi / 4)
        (10, 0.55),
        (13, 0.55 - 0.45 * 0.7071067811865476),
        (16, 0.1),
    ],
)
def test_warmup_then_cosine_against_numbers_by_hand(step, expected):
    rate = learning_rate_at(step, peak=1.0, total_steps=17, warmup_steps=4, minimum=0.1)
    assert rate == pytest.approx(expected, abs=1e-15)


def test_without_warmup_the_first_step_has_the_peak_and_the_last_the_minimum():
    rates = [learning_rate_at(step, peak=2e-3, total_steps=5, warmup_steps=0) for step in range(5)]
    assert rates[0] == 2e-3 and rates[2] == pytest.approx(1e-3) and rates[-1] == 0


def test_the_paper_recipe():
    """800 epochs of 312 steps, 40 of warmup, base rate 1.5e-4 and batch 4096: the peak is 2.4e-3."""
    options = dict(peak=1.5e-4 * 4096 / 256, total_steps=800 * 312, warmup_steps=40 * 312)
    assert learning_rate_at(20 * 312, **options) == pytest.approx(1.2e-3)
    assert learning_rate_at(40 * 312, **options) == pytest.approx(2.4e-3)
    assert learning_rate_at(800 * 312 - 1, **options) == 0


def test_a_run_of_one_step_trains():
    assert learning_rate_at(0, peak=1.0, total_steps=1, warmup_steps=0) == 1.0
