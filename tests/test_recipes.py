"""Tests of the default flags of a classifier against the tables of the paper."""

import pytest

from modeling.vit import SIZES
from training.recipes import LARGER, RECIPES, choose_kind, choose_recipe

KINDS = ("fine-tuning", "linear probe", "from scratch")
NONE = dict(linear_probe=False, attentive_probe=False)


def test_what_trains_chooses_the_kind():
    probes = [choose_kind("w", **{**NONE, name: True}) for name in NONE]
    assert probes == ["linear probe", "attentive probe"]
    assert (choose_kind("w", **NONE), choose_kind(None, **NONE)) == ("fine-tuning", "from scratch")


@pytest.mark.parametrize(
    ("model", "name", "epochs", "learning_rate", "layer_decay", "drop_path"),
    [
        ("tiny", "ViT-B", (100, 90, 300), 5e-4, 0.65, (0.1, 0.0, 0.1)),
        ("base", "ViT-B", (100, 90, 300), 5e-4, 0.65, (0.1, 0.0, 0.1)),
        ("large", "ViT-L", (50, 50, 200), 1e-3, 0.75, (0.2, 0.0, 0.2)),
        ("huge", "ViT-H", (50, 50, 200), 1e-3, 0.75, (0.3, 0.0, 0.2)),
    ],
)
def test_the_size_chooses_the_recipe(model, name, epochs, learning_rate, layer_decay, drop_path):
    for number, kind in enumerate(KINDS):
        found, recipe = choose_recipe(kind, SIZES[model], learning_rate=None, target="classes")
        assert found == f"{name} {kind}"
        assert (recipe["epochs"], recipe["drop_path"]) == (epochs[number], drop_path[number])
        assert recipe["warmup_epochs"] == (5, 10, 20)[number]
        assert recipe["base_learning_rate"] == (learning_rate, 0.1, 1e-4)[number]
        assert recipe["layer_decay"] == (layer_decay, 1.0, 1.0)[number]
        assert recipe["max_grad_norm"] == (1.0, 0.0, 1.0)[number]


def test_a_table_of_the_larger_encoders_has_no_flag_of_its_own():
    assert all(changes.keys() <= RECIPES["fine-tuning"].keys() for changes in LARGER.values())
    assert all(recipe.keys() == RECIPES["fine-tuning"].keys() for recipe in RECIPES.values())


def test_a_default_minimum_is_no_higher_than_the_peak():
    options = dict(kind="fine-tuning", encoder=SIZES["base"], target="classes")
    recipes = [choose_recipe(**options, learning_rate=peak)[1] for peak in (None, 1.0, 1e-8)]
    assert [recipe["min_learning_rate"] for recipe in recipes] == [1e-6, 1e-6, 1e-8]
