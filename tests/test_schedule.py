import pytest

from training.schedule import is_due, learning_rate_at, stepped_learning_rate

DIAGONAL = 0.5**0.5  # cos(pi / 4), after a quarter of the cosine schedule


def test_warmup_then_cosine_against_numbers_by_hand():
    expected = {0: 0, 1: 0.25, 3: 0.75, 4: 1, 7: 0.55 + 0.45 * DIAGONAL, 10: 0.55, 13: 0.55 - 0.45 * DIAGONAL, 16: 0.1}
    for step, learning_rate in expected.items():
        value = learning_rate_at(step, peak=1.0, total_steps=17, warmup_steps=4, minimum=0.1)
        assert value == pytest.approx(learning_rate, abs=1e-15), step


def test_warmup_then_linear_against_numbers_by_hand():
    """The schedule is that of segmentation: peak 1e-4, 160,000 steps, of which 1,500 are warmup."""
    expected = {0: 0, 750: 0.5e-4, 1_500: 1e-4, 80_750: 1e-4 * 79_249 / 158_499, 159_999: 0}
    for step, learning_rate in expected.items():
        value = learning_rate_at(step, peak=1e-4, total_steps=160_000, warmup_steps=1_500, linear=True)
        assert value == pytest.approx(learning_rate, abs=1e-15), step
    assert learning_rate_at(9, peak=1.0, total_steps=10, warmup_steps=0, minimum=0.1, linear=True) == pytest.approx(0.1)


def test_steps_of_vitdet_against_numbers_by_hand():
    """The schedule is ViT-B's on COCO: 184,375 steps, 250 of them warmup, and drops at 163,889 and 177,546."""
    expected = {0: 0, 125: 0.5e-4, 250: 1e-4, 163_888: 1e-4, 163_889: 1e-5, 177_545: 1e-5, 177_546: 1e-6, 184_374: 1e-6}
    for step, learning_rate in expected.items():
        value = stepped_learning_rate(step, peak=1e-4, total_steps=184_375, warmup_steps=250)
        assert value == pytest.approx(learning_rate, abs=1e-15), step
    assert stepped_learning_rate(26, peak=1.0, total_steps=27, warmup_steps=0, minimum=0.05) == 0.05


def test_without_warmup_the_first_step_has_the_peak_and_the_last_the_minimum():
    rates = [learning_rate_at(step, peak=2e-3, total_steps=5, warmup_steps=0) for step in range(5)]
    assert rates[0] == 2e-3 and rates[2] == pytest.approx(1e-3) and rates[-1] == 0
    assert learning_rate_at(0, peak=1.0, total_steps=1, warmup_steps=0) == 1.0  # a run of one step trains


def test_steps_at_which_something_is_due():
    assert [step for step in range(8) if is_due(step, 3)] == [3, 6] and not any(is_due(step, 0) for step in range(8))
    assert [step for step in range(8) if is_due(step, 3, 0, 5)] == [3, 5, 6]
