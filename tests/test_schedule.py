import pytest
import torch

from modeling.classifier import Classifier
from modeling.vit import SIZES, VisionTransformer
from training.optimizer import adamw, parameter_groups, set_learning_rate
from training.schedule import is_due, learning_rate_at


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


def test_warmup_then_linear_against_numbers_by_hand():
    """Segmentation's: peak 1e-4, 1,500 steps of warmup, 160,000 in all."""
    expected = {0: 0, 750: 0.5e-4, 1_500: 1e-4, 80_750: 1e-4 * 79_249 / 158_499, 159_999: 0}
    for step, rate in expected.items():
        found = learning_rate_at(step, peak=1e-4, total_steps=160_000, warmup_steps=1_500, linear=True)
        assert found == pytest.approx(rate, abs=1e-15), step
    assert learning_rate_at(9, peak=1.0, total_steps=10, warmup_steps=0, minimum=0.1, linear=True) == pytest.approx(0.1)


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


@pytest.mark.parametrize(
    ("step", "embeddings", "block_0", "block_5", "block_11", "head"),
    [
        (0, 0, 0, 0, 0, 0),
        (1251, 1.4788823564e-6, 2.2752036252e-6, 1.960891156e-5, 2.6e-4, 4e-4),  # a fifth of the warmup
        (6255, 7.394411782e-6, 1.1376018126e-5, 9.80445578e-5, 1.3e-3, 2e-3),  # its end
        (65677, 3.699054494e-6, 5.690853068e-6, 4.904679005e-5, 6.50325e-4, 1.0005e-3),  # half of the cosine
        (125099, 3.697205891e-9, 5.688009063e-9, 4.902227891e-8, 6.5e-7, 1e-6),
    ],
)
def test_the_rate_of_each_layer_in_the_fine_tuning_recipe(step, embeddings, block_0, block_5, block_11, head):
    """ViT-B: 100 epochs of 1251 steps, 5 of warmup, base rate 5e-4 and batch 1024, layer decay 0.65, minimum 1e-6. As
    in the official code, the scale multiplies the whole rate, its minimum too."""
    with torch.device("meta"):
        model = Classifier(VisionTransformer(**SIZES["base"]), 1000)
    optimizer = adamw(parameter_groups(model, 0.05, layer_decay=0.65), betas=(0.9, 0.999))
    peak, per_epoch = 5e-4 * 1024 / 256, 1251
    rate = learning_rate_at(step, peak=peak, total_steps=100 * per_epoch, warmup_steps=5 * per_epoch, minimum=1e-6)
    set_learning_rate(optimizer, rate)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "encoder.pos_embed": embeddings,
        "encoder.patch_embed.proj.bias": embeddings,
        "encoder.blocks.0.norm1.weight": block_0,
        "encoder.blocks.5.mlp.fc1.weight": block_5,
        "encoder.blocks.11.attn.proj.bias": block_11,
        "fc_norm.weight": head,
        "head.weight": head,
    }
    got = {name: rates[id(model.get_parameter(name))] for name in expected}
    assert got == pytest.approx(expected, rel=1e-8)


def test_what_is_due_every_so_many_steps():
    assert [step for step in range(8) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(8))
    assert [step for step in range(8) if is_due(step, 3, 0, 5)] == [3, 5, 6]
