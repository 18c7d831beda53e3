"""Sources of image and mask pairs for semantic segmentation, and the checks of masks before a run starts.

Sizes are (height, width), in pixels.
"""

import contextlib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import shapes
from data.classes import ADE20K, read_classes
from data.decode import DamagedImage, PixelFormat, decode, orientation_of
from data.files import FolderSource, choose_splits, note_test
from data.index import DataError, first_few
from data.masks import (
    BACKGROUND,
    IGNORED,
    LIKE_ADE20K,
    MaskFormat,
    check_size,
    decode_labels,
    doubt_numbering,
    to_classes,
)
from data.pool import mapping
from data.sources import Fetched, ShapesSource, Source, check_pixels, kind_of_data, open_cache, open_sources

ADE20K_NAME = re.compile("(^|/)ADE_(train|val)_[^/]*$")
LAYOUT = "images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png"
ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp"}  # keys of `Image.info` that may hold an orientation
MAX_NAMED = 5  # bad masks that get a message; the others are counted
CHUNK = 50  # masks that a worker process checks at a time, at most


class MaskReport(NamedTuple):
    """The result of checking masks."""

    counts: np.ndarray  # number of pixels of each class, int64 (num_classes,)
    zeros: int  # number of pixels with label 0
    maybe_turned: list[str]  # masks of rotated or mirrored images, whose size does not show if they are turned too
    errors: list[str]


class SegmentationFolder(FolderSource):
    """Read the pairs of a split, "training" or "validation", of a folder in the layout of ADEChallengeData2016.

    Each image below images/SPLIT has a PNG mask of the same relative name below annotations/SPLIT. The SPLIT folders
    may have other common names, see `files.choose_splits`. Without `class_file` (see `open_pairs`) and classes.txt,
    images of ADE20K have its classes. Raises DataError.
    """

    has_masks = True

    def __init__(
        self,
        root: str | Path,
        split: str,
        class_file: str | Path | None = None,
        cache: Path | None = None,
        mask_format: MaskFormat = LIKE_ADE20K,
    ):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root} is not a folder; --path_to_data takes a folder with {LAYOUT}, or builtin:shapes")
        train, held_out = choose_splits(path.name for path in root.glob("images/*/"))
        folder = (train if split == "training" else held_out) or split
        images, annotations = root / "images" / folder, root / "annotations" / folder
        if missing := [f"{path.parent.name}/{folder}" for path in (images, annotations) if not path.is_dir()]:
            remedy = "; move some pairs there, for evaluation" if split == "validation" else ""
            expected = f"expected {LAYOUT}, as in ADEChallengeData2016{remedy}"
            raise DataError(f"{root} has no {' and no '.join(missing)}; {expected}")
        super().__init__(images, cache=cache)
        if split == "validation":
            self.notes += note_test(folder)
        self.labels = None
        self.masks = FolderSource(annotations, (".png",), cache=cache)
        stems, mask_stems = _stems(self), _stems(self.masks)
        numbers = {stem: number for number, stem in enumerate(mask_stems)}
        self._mask_of = np.array([numbers.get(stem, -1) for stem in stems])
        default = root / "classes.txt"
        is_ade20k = (root / "objectInfo150.txt").exists() or all(map(ADE20K_NAME.search, stems))
        self.class_file = Path(class_file or (ADE20K if is_ade20k and not default.exists() else default))
        self.classes, colours, errors = read_classes(self.class_file, mask_format.first_label)
        self.mask_format = mask_format._replace(colours=colours)
        repeated = [stem for stem, count in Counter(stems).items() if count > 1]
        for names, what, remedy in (
            (set(stems) - set(mask_stems), "images without a mask", f"add NAME.png to {annotations}"),
            (set(mask_stems) - set(stems), "masks without an image", f"remove them, or add to {images}"),
            (repeated, "images with the same name but for the suffix", "keep one of each"),
        ):
            if names:
                errors.append(f"{root} ({split}) has {what}: {first_few(sorted(names), len(names))}; {remedy}")
        if errors:
            raise DataError("\n".join(errors))

    def mask_name(self, index: int) -> str:
        return self.masks.name(self._mask_of[index])

    def fetch_masks(self, indices: list[int]) -> list[bytes | OSError]:
        return self.masks.fetch(self._mask_of[indices])

    def size_in_bytes(self) -> float:
        return super().size_in_bytes() + self.masks.size_in_bytes()

    def fingerprint(self) -> str:
        return hashlib.sha256((super().fingerprint() + self.masks.fingerprint()).encode()).hexdigest()[:16]


def _stems(source: FolderSource) -> list[str]:
    """Return the relative paths of a source's files without suffixes."""
    return [os.path.splitext(os.path.relpath(source.name(i), source.root))[0] for i in range(len(source))]


class Pairs:
    """Wrap a source that has masks, such as a list, and add the names of its classes. Raises DataError."""

    def __init__(self, source: Source | None, path: str, class_file: str | Path | None, mask_format: MaskFormat):
        if source is None:
            raise DataError(f"{path} has no validation pairs; give --path_to_validation_data")
        if not getattr(source, "has_masks", False):
            raise DataError(f"{path} has no masks; expected {LAYOUT}, or a column `mask` beside the images")
        if class_file is None:
            raise DataError(f"{path} does not name its classes; give --path_to_classes FILE, with a name on each line")
        self.source = source
        self.name, self.mask_name = source.name, source.mask_name
        self.fetch, self.fetch_masks = source.fetch, source.fetch_masks
        self.prepare, self.size_in_bytes, self.fingerprint = source.prepare, source.size_in_bytes, source.fingerprint
        self.classes, colours, errors = read_classes(Path(class_file), mask_format.first_label)
        self.mask_format = mask_format._replace(colours=colours)
        if errors:
            raise DataError("\n".join(errors))

    def __len__(self) -> int:
        return len(self.source)


PairSource = SegmentationFolder | ShapesSource | Pairs


def open_pairs(
    path_to_data: str,
    pixels: PixelFormat,
    mask_format: MaskFormat = LIKE_ADE20K,
    *,
    validation: str | None = None,
    class_file: str | None = None,
    cache: str | None = None,
    data_format: str | None = None,
) -> tuple[PairSource, PairSource]:
    """Open the training and validation pairs of a folder in ADE20K's layout, a source with masks, or builtin:shapes.

    `class_file` is a file with the names of the classes, or "ade20k"; by default, it is classes.txt beside the data.
    `data_format` is the kind of both paths, see `kind_of_data`. Raises DataError with one line per problem.
    """
    if kind_of_data(path_to_data, data_format) == "builtin":
        scenes = open_sources(path_to_data, pixels)
        given = {"--path_to_validation_data": validation, "--path_to_classes": class_file}
        given |= {"--mask_offset": None if mask_format.first_label else 0, "--void_label": mask_format.void_label}
        for flag, value in given.items():
            if value is not None:
                raise DataError(f"{flag} {value} does not go with {path_to_data}, which has its own; leave it out")
        for source in scenes:
            source.classes, source.mask_format = list(shapes.SEGMENTATION_CLASSES), MaskFormat(1)
        return scenes
    root = Path(path_to_data)
    default_file = (root if root.is_dir() else root.parent) / "classes.txt"
    if class_file is None and default_file.exists():
        class_file = str(default_file)
    pairs, errors, options = [], [], dict(cache=cache, data_format=data_format)
    for split, path in (("training", path_to_data), ("validation", validation or path_to_data)):
        try:
            if kind_of_data(path, data_format) == "folder":
                source = SegmentationFolder(path, split, class_file, open_cache(cache), mask_format)
                check_pixels(source, pixels)
            else:
                own_path = validation if split == "validation" else None
                train, held_out = open_sources(path, pixels, validation=own_path, **options)
                source = Pairs(train if split == "training" else held_out, path, class_file, mask_format)
            pairs.append(source)
        except DataError as error:
            errors += str(error).splitlines()
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))  # an error of both splits is reported once
    return tuple(pairs)


def check_annotations(
    sources: dict[str, PairSource],
    pixels: PixelFormat,
    *,
    share: slice,
    gather: Callable[[list], list],
    processes: int,
    progress: bool,
    say: Callable[[str], None] = print,
    strict: bool = False,
) -> dict[str, np.ndarray]:
    """Read all masks once, before a run starts, and count the pixels of each class.

    Args:
        sources: pairs by name, "training" or "validation", after `prepare`.
        share: the samples that this process of the run reads.
        gather: joins the lists of all processes of the run.
        processes: number of worker processes of this process; `progress` shows a bar.
        say: prints notes about masks that may be wrong.
        strict: refuse masks that may be numbered from 0; by default, only if the first class is a background.

    Returns:
        For each name in `sources`, the number of pixels of each class, int64 (num_classes,).

    Raises:
        DataError: masks are bad (one line each), all pixels are void, or the masks seem to be numbered differently.
    """
    reports, errors = {}, []
    for name, source in sources.items():
        bar = f"reading {name} masks" if progress else None
        part = check_masks(source, range(len(source))[share], pixels, processes=processes, progress=bar)
        reports[name] = report = _join(gather([part]))
        errors += report.errors
        if not errors and not report.counts.any():
            remedy = "give other masks, or --mask_offset 0 if 0 is a class"
            errors.append(f"no pixel of the {name} masks has a class (all are void); {remedy}")
    classes, mask_format, total = source.classes, source.mask_format, _join(list(reports.values()))
    doubt = doubt_numbering(mask_format, classes, total.counts, total.zeros)
    if doubt and not errors and mask_format.offset is None and (strict or BACKGROUND.fullmatch(classes[0])):
        errors.append(doubt)
    if len(errors) > MAX_NAMED:
        errors[MAX_NAMED:] = [f"and {len(errors) - MAX_NAMED} more masks like these"]
    if errors:
        raise DataError("\n".join(errors))
    if "training" in reports and (absent := [classes[i] for i in np.flatnonzero(reports["training"].counts == 0)]):
        what = f"no training mask has a pixel of {len(absent)} of the {len(classes)} classes"
        say(f"{what}: {first_few(absent, len(absent))}")
    if doubt:
        say(f"note: {doubt}")
    if turned := total.maybe_turned:
        say(
            f"note: the EXIF orientation of {len(turned)} images turns or mirrors them, and their masks may not be "
            f"turned ({first_few(turned, len(turned))}); compare them in predictions/"
        )
    return {name: report.counts for name, report in reports.items()}


def _join(reports: Sequence[MaskReport]) -> MaskReport:
    counts, zeros, maybe_turned, errors = zip(*reports, strict=True)
    return MaskReport(sum(counts), sum(zeros), list(chain(*maybe_turned)), list(chain(*errors)))


def check_masks(
    source: PairSource, indices: Sequence[int], pixels: PixelFormat, *, processes: int = 1, progress: str | None = None
) -> MaskReport:
    """Count the pixels of each class in the masks of `indices`, and find errors.

    Errors are a size other than the image's, colours without a table, and labels or colours of no class. Files that
    cannot be read are skipped; a run reports them when it reads them. `progress` is the title of a bar, None for none.
    """
    num_classes = len(source.classes)
    if isinstance(source, ShapesSource):
        return MaskReport(np.bincount(source.masks[list(indices)].ravel(), minlength=num_classes), 0, [], [])
    report = MaskReport(np.zeros(num_classes, np.int64), 0, [], [])
    with mapping(processes, max(1, min(CHUNK, len(indices) // processes))) as in_order:
        results = in_order(partial(_check_mask, source, pixels), indices)
        for part in tqdm(results, progress, len(indices), unit="mask", disable=progress is None):
            report = _join([report, part]) if part else report
    return report


def _check_mask(source: PairSource, pixels: PixelFormat, index: int) -> MaskReport | None:
    """Return the result of checking one mask, None if it or its image cannot be read."""
    (data,), (image,), name = source.fetch_masks([index]), source.fetch([index]), source.mask_name(index)
    num_classes, max_pixels = len(source.classes), pixels.max_pixels
    try:
        labels = decode_labels(data, num_classes, source.mask_format, name=name, max_pixels=max_pixels)
        size, orientation = _size_and_orientation(image, pixels)
        check_size(name, labels.shape, size, orientation)
    except DamagedImage:
        return None
    except DataError as error:
        return MaskReport(np.zeros(num_classes, np.int64), 0, [], [str(error)])
    counts = np.bincount(to_classes(labels, source.mask_format).ravel(), minlength=IGNORED + 1)[:num_classes]
    keeps_size = orientation < 5 or size[0] == size[1]
    unclear = orientation > 1 and keeps_size and orientation_of(data, max_pixels) == 1
    return MaskReport(counts, labels.size - np.count_nonzero(labels), [name] if unclear else [], [])


def _size_and_orientation(data: Fetched, pixels: PixelFormat) -> tuple[tuple[int, ...], int]:
    """Return the (height, width) of an upright image, and the orientation in its file, 1 to 8 as in EXIF.

    Both come from the header if it has no orientation, which is far faster than decoding.
    """
    if isinstance(data, bytes | memoryview):
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "PNG") and not ORIENTED & image.info.keys():
                return image.size[::-1], 1
    return tuple(decode(data, pixels).shape[1:]), orientation_of(data, pixels.max_pixels)


def check_class_weights(weights: list | None, num_classes: int) -> None:
    """Raise DataError if --class_weights has another number of weights than there are classes."""
    if weights and "balanced" not in weights and len(weights) != num_classes:
        remedy = "give one each, in the order of classes.txt"
        raise DataError(f"--class_weights has {len(weights)} numbers for {num_classes} classes; {remedy}")


def check_trained_classes(
    path_to_data: str, classes: list[str], names: list[str] | None, count: int, *, model: str = "segmenter"
) -> None:
    """Raise DataError if `classes` are not a trained model's `count` classes, whose `names` are None if unknown."""
    what = f"--path_to_data {path_to_data}"
    if count != len(classes):
        raise DataError(f"{what} has {len(classes)} classes, the {model} {count}; give data with those classes")
    for number, (here, there) in enumerate(zip(classes, names or classes, strict=True), 1):
        if here != there:
            raise DataError(
                f"{what} calls class {number} {here!r}, the {model} {there!r}; give data with the {model}'s "
                "classes, in its order"
            )


def class_weights(weights: list | None, areas: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Return the weights of the classes in the loss, (num_classes,), or None for equal weights.

    `weights` are --class_weights. "balanced" divides the median of `areas`, the classes' numbers of pixels in the
    training masks, by the class's own (Eigen & Fergus 2015, section 4.3.2). These weights are at most 10, and 1 for a
    class without pixels.
    """
    if not weights:
        return None
    if "balanced" not in weights:
        return torch.tensor(weights, device=device)
    pixels = torch.as_tensor(areas, dtype=torch.float64)
    balanced = (pixels[pixels > 0].median() / pixels).clamp(max=10)
    return torch.where(pixels > 0, balanced, 1.0).float().to(device)
