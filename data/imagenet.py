"""Identify the classes of ImageNet-1k by the names that data sets and classifiers give them."""

from collections.abc import Sequence
from functools import cache


@cache
def imagenet_ids() -> list[str]:
    """Return the WordNet ids of ImageNet-1k, in the order of its classes."""
    from timm.data import ImageNetInfo  # here, because it takes long to import

    return ImageNetInfo("imagenet-1k").label_names()


def find_ids(names: Sequence[str]) -> list[str | None]:
    """Return the WordNet id of each name; None if the name belongs to no class of ImageNet-1k or to several.

    Names are WordNet ids, descriptions ("great white shark, white shark, ..."), or single terms of these that belong to
    one class; with spaces or underscores, in any case. All 1000 classes in order may have ambiguous names ("crane").
    """
    ids, known = imagenet_ids(), _known_names()
    keys = [name.replace("_", " ") for name in names]
    found = [known.get(key) or known.get(key.casefold()) for key in keys]
    in_order = len(names) == len(ids) and all(one in (None, other) for one, other in zip(found, ids, strict=True))
    return ids if in_order else found


@cache
def _known_names() -> dict[str, str]:
    from timm.data import ImageNetInfo

    info, ids = ImageNetInfo("imagenet-1k"), imagenet_ids()
    descriptions = [info.index_to_description(number) for number in range(len(ids))]
    known = dict(zip(ids, ids, strict=True))
    for names in ([[text] for text in descriptions], [text.split(", ") for text in descriptions]):
        known = _unique(zip(ids, names, strict=True)) | known  # earlier meanings take precedence
    return _unique((identity, [name.casefold()]) for name, identity in known.items()) | known


def _unique(classes) -> dict[str, str]:
    """Return a dict name -> id of the names that belong to one id only, from pairs (id, names)."""
    found = {}
    for identity, names in classes:
        for name in names:
            found.setdefault(name, set()).add(identity)
    return {name: identities.pop() for name, identities in found.items() if len(identities) == 1}
