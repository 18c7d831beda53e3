"""Tests of the names of ImageNet's classes, against timm's tables."""

import pytest
from timm.data import ImageNetInfo

from data.imagenet import find_ids, imagenet_ids
from data.sources import match_classes


def test_all_classes_by_their_descriptions_in_both_directions():
    info = ImageNetInfo("imagenet-1k")
    descriptions = [info.index_to_description(number) for number in range(1000)]
    assert find_ids(descriptions) == find_ids(info.label_names()) == imagenet_ids() == info.label_names()
    shuffled = descriptions[::-1]
    ambiguous = [name for name, found in zip(shuffled, find_ids(shuffled), strict=True) if found is None]
    assert ambiguous == ["crane", "crane"]  # the bird and the machine


@pytest.mark.parametrize(
    ("name", "identity"),
    [
        *[("goldfish", "n01443537"), ("great_white_shark", "n01484850"), ("Great White Shark", "n01484850")],
        *[("partridge", "n01807496"), ("cardigan", "n02963159"), ("Cardigan", "n02113186")],
        *[("n01440764", "n01440764"), ("crane", None), ("cat", None), ("", None), ("7", None)],
    ],
)
def test_names_that_folders_have(name, identity):
    assert find_ids([name]) == [identity]


def test_a_classifier_without_names():
    """The official fine-tuned weights have 1000 outputs, and no names."""

    class Subset:
        classes, labels, label_errors = ["n01443537", "n01484850"], None, ()

    assert match_classes("IMAGENET_A", Subset(), None, 1000) == imagenet_ids()
