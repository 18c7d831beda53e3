"""Decode segmentation masks by their numbers or colours, and detect masks that are numbered in another way.

In files, label 0 is void (ignored) and 1 .. N are the classes, as in ADE20K, unless a MaskFormat says otherwise. In
memory, a mask is uint8 (H, W) with 0 .. N-1 for the classes and 255 (IGNORED) for void.
"""

import re
from typing import NamedTuple

import numpy as np

from data.decode import MAX_PIXELS, decode_stored
from data.index import DataError
from data.sources import Fetched

IGNORED = 255
BACKGROUND = re.compile(  # names that are usually the first class of masks numbered from 0
    "_*(bg|back_?ground|others?|void|unlabell?ed|unannotated|ignored?|unknown|no.?data)_*", re.IGNORECASE
)


class MaskFormat(NamedTuple):
    """The meaning of the numbers or colours of masks."""

    offset: int | None = None  # the label of the first class: 0, or 1 if 0 is void; None: 1, a default that is checked
    void_label: int | None = None  # another label that is void
    colours: np.ndarray | None = None  # colours of the classes in coloured masks, uint8 (N, 3)

    @property
    def first_label(self) -> int:
        return 1 if self.offset is None else self.offset

    @classmethod
    def from_flags(cls, flags: dict, known: dict) -> "MaskFormat":
        """Return the format from the flags; for flags that are None, from the `known` values of a run or model."""
        names = ("mask_offset", "void_label")
        return cls(*(known.get(name) if flags[name] is None else flags[name] for name in names))

    @property
    def numbering(self) -> dict[str, int | None]:
        """The values of --mask_offset and --void_label."""
        return dict(mask_offset=self.first_label, void_label=self.void_label)


LIKE_ADE20K = MaskFormat()


def decode_labels(
    data: Fetched, num_classes: int, mask_format: MaskFormat, *, name: str, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decode a mask, a result of `Source.fetch_masks`, to the labels in its file (H, W).

    Raises DamagedImage, and DataError for labels or colours of no class; its message has the mask's `name`.
    """
    first, void, colours = mask_format.first_label, mask_format.void_label, mask_format.colours
    labels = decode_stored(data, max_pixels, in_colour=colours is not None)
    if labels.dtype.kind not in "bui":
        raise DataError(f"{name} has {labels.dtype} numbers; expected whole ones, the labels")
    if colours is not None:
        is_grey = (colours == colours[:, :1]).all()
        if labels.shape[2:] in ((3,), (4,)) or (labels.ndim == 2 and is_grey):
            labels = _find_colours(labels, colours, name) + first
    if labels.ndim != 2:
        raise DataError(
            f"{name} has colour or transparency; expected one label a pixel, of a palette or grey; if colours are "
            "classes, give --path_to_classes a table of them (lines: RED GREEN BLUE NAME)"
        )
    valid = labels if void is None else labels[labels != void]
    low, high = (int(valid.min()), int(valid.max())) if valid.size else (first, first)
    if low < 0 or high >= num_classes + first:
        wrong = low if low < 0 else high
        expected = f"0 (void) to {num_classes}" if first else f"0 to {num_classes - 1}"
        remedy = f"--void_label {wrong} if it is void"
        if not first and wrong == num_classes:
            remedy += ", or --mask_offset 1 if the masks are numbered from 1"
        elif np.isin(labels, (0, 255)).all():
            remedy += (
                ", or if 0 and 255 are classes, --path_to_classes a table with the lines 0 0 0 NAME, 255 255 255 NAME"
            )
        raise DataError(
            f"{name} has the label {wrong}; expected {expected}, the number of classes: correct the mask, or "
            f"classes.txt; give {remedy}"
        )
    return labels


def _find_colours(pixels: np.ndarray, colours: np.ndarray, name: str) -> np.ndarray:
    """Return the row of `colours` for each of the pixels (H, W), (H, W, 3) or (H, W, 4): int64 (H, W)."""
    place = np.array([2**16, 2**8, 1])
    codes = pixels.astype(np.int64) * place.sum() if pixels.ndim == 2 else pixels[:, :, :3] @ place
    known = colours @ place
    order = known.argsort()
    nearest = order[np.searchsorted(known[order], codes).clip(max=len(known) - 1)]
    if (wrong := known[nearest] != codes).any():
        code = int(codes[wrong][0])
        colour = code >> 16, code >> 8 & 255, code & 255
        remedy = "add a line for it (void: with --void_label and its number), correct the mask, or if the masks hold "
        remedy += "labels, remove the colours from the file of classes"
        raise DataError(f"{name} has the colour {colour}, which the table of classes does not have; {remedy}")
    return nearest


def to_classes(labels: np.ndarray, mask_format: MaskFormat) -> np.ndarray:
    """Convert the labels in a file (H, W) to classes 0 .. N-1, and 255 for void: uint8 (H, W)."""
    classes = labels.astype(np.uint8) - np.uint8(mask_format.first_label)  # void wraps around: 0 - 1 is 255
    if mask_format.void_label is not None:
        classes[labels == mask_format.void_label] = IGNORED
    return classes


def check_size(name: str, size: tuple[int, ...], image_size: tuple[int, ...], orientation: int = 1) -> None:
    """Raise DataError if the (height, width) of a mask and its upright image differ; `orientation` is as in EXIF."""
    if size != image_size:
        remedy = "correct the mask"
        if orientation > 4 and size == image_size[::-1]:
            remedy = f"turn the mask too, as EXIF orientation {orientation} turns the image"
        raise DataError(
            f"{name} is {size[0]} x {size[1]} pixels (height x width), its image {image_size[0]} x {image_size[1]}; "
            f"expected equal sizes: {remedy}"
        )


def doubt_numbering(mask_format: MaskFormat, classes: list[str], counts: np.ndarray, zeros: int) -> str | None:
    """Return why masks seem to be numbered differently from `mask_format`, None if they do not.

    Args:
        counts: number of pixels of each class in all masks, (N,).
        zeros: number of pixels with label 0.
    """
    first, last = classes[0], classes[-1]
    if mask_format.offset is None and zeros and not counts[-1]:
        return (
            f"the masks may be numbered from 0: the first class is {first!r}, and no mask has the label {len(classes)} "
            f"of the last class, {last!r}; give --mask_offset 0 if label 0 is {first!r} (and --void_label 0 if that is "
            f"void), or --mask_offset 1 if 0 is void and 1 is {first!r}"
        )
    if mask_format.offset == 0 != mask_format.void_label and not counts[0]:
        return f"no mask has the label 0 of {first!r}; if 1 is {first!r}, give --mask_offset 1"
    return None
