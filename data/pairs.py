"""Pairs of image and mask for semantic segmentation: their sources, and the checks before a run starts.

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
from PIL import ExifTags, Image
from tqdm import tqdm

from data import shapes
from data.classes import ADE20K, read_classes
from data.decode import DamagedImage, PixelFormat, decode
from data.files import FolderSource, choose_splits, note_test
from data.index import DataError, first_few
from data.masks import IGNORED, LIKE_ADE20K, MaskFormat, decode_labels, to_classes
from data.pool import mapping
from data.sources import Fetched, ShapesSource, Source, check_pixels, kind_of_data, open_cache, open_sources

ADE20K_NAME = re.compile("(^|/)ADE_(train|val)_[^/]*$")
LAYOUT = "images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png"
FULL_ADE20K = (
    "{} is the full ADE20K, whose masks have thousands of classes in colour; expected the scene parsing set of 150 "
    "classes: get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu"
)
FULL_ADE20K_FILES = "index_ade20k.*", "images/ADE", "images/**/*_seg.png"
BACKGROUND = re.compile("_*(bg|back_?ground|others?)_*", re.IGNORECASE)
VOID = re.compile("_*(void|unlabell?ed|unannotated|ignored?|unknown|no.?data)_*", re.IGNORECASE)
WRONG_SIZE = "{} is {} x {} pixels (height x width), its image {} x {}; expected equal sizes: correct the mask"
NOT_TURNED = (
    "{} is {} x {} pixels (height x width), as its image is stored, but the EXIF orientation {} of the image turns it "
    "to {} x {}; turn the mask too, or remove the orientation from the image"
)
ORIENTED = {"exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow finds an orientation
MAX_NAMED = 5  # bad masks in messages; the others are counted
CHUNK = 50  # masks that a worker process checks at a time


class MaskReport(NamedTuple):
    """Hold what was found in some masks."""

    counts: np.ndarray  # pixels of each class, int64 (num_classes,)
    zeros: int  # pixels whose label is 0
    maybe_turned: list[str]  # masks whose sizes do not show if they are turned as their images are
    errors: list[str]


class SegmentationFolder(FolderSource):
    """Find the pairs of a split, "training" or "validation", of a folder laid out like ADEChallengeData2016 of ADE20K.

    Each image below images/SPLIT has a mask of the same relative name below annotations/SPLIT, as a PNG. These folders
    may have other usual names, see `files.choose_splits`. Without a `class_file` (see `open_pairs`) and classes.txt,
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
            raise DataError(f"{root} is no folder; --path_to_data takes a folder with {LAYOUT}, or builtin:shapes")
        train, held_out = choose_splits(path.name for path in root.glob("images/*/"))
        folder = (train if split == "training" else held_out) or split
        images, annotations = root / "images" / folder, root / "annotations" / folder
        if missing := [f"{path.parent.name}/{folder}" for path in (images, annotations) if not path.is_dir()]:
            if any(any(root.glob(name)) for name in FULL_ADE20K_FILES):
                raise DataError(FULL_ADE20K.format(root))
            remedy = "; move some pairs there, for evaluation" if split == "validation" else ""
            raise DataError(f"{root} has no {' and no '.join(missing)}; expected {LAYOUT}{remedy}")
        super().__init__(images, cache=cache)
        if split == "validation":
            self.notes += note_test(folder)
        self.labels = None
        self.masks = FolderSource(annotations, (".png",), cache=cache)
        stems, mask_stems = _stems(self), _stems(self.masks)
        numbers = {stem: number for number, stem in enumerate(mask_stems)}
        self._mask_of = np.array([numbers.get(stem, -1) for stem in stems])
        class_file = Path(class_file or root / "classes.txt")
        is_ade20k = (root / "objectInfo150.txt").exists() or all(map(ADE20K_NAME.search, stems))
        self.class_file = ADE20K if is_ade20k and not class_file.exists() else class_file
        self.classes, colours, errors = read_classes(self.class_file, mask_format.first_label)
        self.mask_format = mask_format._replace(colours=colours)
        for names, what, remedy in (
            (set(stems) - set(mask_stems), "images without a mask", f"add NAME.png to {annotations}"),
            (set(mask_stems) - set(stems), "masks without an image", f"remove them, or add to {images}"),
            (_repeated(stems), "images with the same name but for the suffix", "keep one of each"),
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
    """Return the relative paths without suffixes."""
    return [os.path.splitext(os.path.relpath(source.name(i), source.root))[0] for i in range(len(source))]


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


class Pairs:
    """Wrap a source that has masks, such as a list, with the names of its classes. Raises DataError."""

    def __init__(self, source: Source, path: str, class_file: str | Path | None, mask_format: MaskFormat):
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
    """Open the training and the validation pairs of a folder laid out like ADE20K's, or of a source with masks.

    `class_file` names the classes, or is "ade20k"; by default it is classes.txt beside the data. `data_format` is the
    kind of both paths, see `kind_of_data`. Raises DataError with a line for each problem.
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
    pairs, errors = [], []
    for split, path in (("training", path_to_data), ("validation", validation or path_to_data)):
        try:
            options = dict(cache=cache, data_format=data_format, alone=validation is not None)
            pairs.append(_open_split(path, split, pixels, class_file, mask_format, **options))
        except DataError as error:
            errors += str(error).splitlines()
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))  # an error of both splits is named once
    return tuple(pairs)


def _open_split(
    path: str,
    split: str,
    pixels: PixelFormat,
    class_file: str | None,
    mask_format: MaskFormat,
    *,
    cache: str | None,
    data_format: str | None,
    alone: bool,
) -> PairSource:
    """Open the pairs of a split, "training" or "validation"; `alone` says that the other one has another path."""
    if kind_of_data(path, data_format) == "folder":
        source = SegmentationFolder(path, split, class_file, open_cache(cache), mask_format)
        check_pixels(source, pixels)
        return source
    train_source, validation_source = open_sources(path, pixels, cache=cache, data_format=data_format)
    if split == "training":
        return Pairs(train_source, path, class_file, mask_format)
    if validation_source is None and not alone:
        raise DataError(f"{path} has no validation pairs; give --path_to_validation_data")
    return Pairs(validation_source or train_source, path, class_file, mask_format)


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
        processes: worker processes of this process.
        say: prints what may be wrong with the masks.
        strict: refuse masks that may be numbered from 0, where otherwise only names of classes that tell it do.

    Returns:
        The pixels of each class, int64 (num_classes,), by the names of `sources`.

    Raises:
        DataError: a line for each bad mask, or that all pixels are void, or that the masks are numbered otherwise.
    """
    reports, errors = {}, []
    for name, source in sources.items():
        bar = f"reading {name} masks" if progress else None
        part = check_masks(source, range(len(source))[share], pixels, processes=processes, progress=bar)
        reports[name] = report = _join(gather([part]))
        errors += report.errors
        if not errors and not report.counts.any():
            remedy = "give other masks"
            if source.mask_format.first_label:
                remedy += ", or --mask_offset 0 if 0 is a class"
            errors.append(f"no pixel of the {name} masks has a class (all are void); {remedy}")
    total = _join(list(reports.values()))
    if not errors:
        errors += describe_mismatch(source, total, strict=strict)
    if len(errors) > MAX_NAMED:
        errors[MAX_NAMED:] = [f"and {len(errors) - MAX_NAMED} more masks like these"]
    if errors:
        raise DataError("\n".join(errors))
    for line in describe_doubts(source, total, reports):
        say(line)
    return {name: report.counts for name, report in reports.items()}


def _join(reports: Sequence[MaskReport]) -> MaskReport:
    counts, zeros, maybe_turned, errors = zip(*reports, strict=True)
    return MaskReport(sum(counts), sum(zeros), list(chain(*maybe_turned)), list(chain(*errors)))


def check_masks(
    source: PairSource, indices: Sequence[int], pixels: PixelFormat, *, processes: int = 1, progress: str | None = None
) -> MaskReport:
    """Count the pixels of each class in the masks of `indices`, and find errors.

    Errors are another size than the image's, colours without a table, and labels beyond the classes. Files that cannot
    be read are skipped: they are reported when a run reads them. `progress` is the text of a bar.
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
    """Return what is found in one mask, None if it or its image cannot be read."""
    (data,), name, num_classes = source.fetch_masks([index]), source.mask_name(index), len(source.classes)
    (image,), nothing = source.fetch([index]), np.zeros(num_classes, np.int64)
    try:
        labels = decode_labels(data, num_classes, source.mask_format, name=name, max_pixels=pixels.max_pixels)
        size, orientation = _size_and_orientation(image, pixels)
    except DamagedImage:
        return None
    except DataError as error:
        return MaskReport(nothing, 0, [], [str(error)])
    mask = to_classes(labels, source.mask_format)
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:num_classes]
    stored_size, errors = size[::-1] if orientation > 4 else size, []
    if mask.shape == stored_size != size:
        errors.append(NOT_TURNED.format(name, *mask.shape, orientation, *size))
    elif mask.shape != size:
        errors.append(WRONG_SIZE.format(name, *mask.shape, *size))
    unclear = orientation > 1 and mask.shape == stored_size == size and _orientation_of(data) == 1
    return MaskReport(counts, labels.size - np.count_nonzero(labels), [name] if unclear else [], errors)


def _size_and_orientation(data: Fetched, pixels: PixelFormat) -> tuple[tuple[int, ...], int]:
    """Return height and width of an upright image and its orientation, 1 to 8 as in EXIF.

    They are read from the header if nothing turns the image, which is far faster than decoding.
    """
    if isinstance(data, bytes | memoryview):
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "PNG") and not ORIENTED & image.info.keys():
                return image.size[::-1], 1
    return tuple(decode(data, pixels).shape[1:]), _orientation_of(data)


def _orientation_of(data: Fetched) -> int:
    """Return the orientation that a file states, 1 if it states none."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:  # decode() judges what is broken
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in range(2, 9) else 1
    return 1


def check_class_weights(weights: list | None, num_classes: int) -> None:
    """Raise DataError for --class_weights that are not one for each class."""
    if weights and "balanced" not in weights and len(weights) != num_classes:
        remedy = "give one each, in the order of classes.txt"
        raise DataError(f"--class_weights has {len(weights)} numbers for {num_classes} classes; {remedy}")


def check_trained_classes(path_to_data: str, classes: list[str], names: list[str] | None, count: int) -> None:
    """Raise DataError for data whose classes are not those of a trained segmenter, which has `count` of these names."""
    what = f"--path_to_data {path_to_data}"
    if count != len(classes):
        raise DataError(f"{what} has {len(classes)} classes, the segmenter {count}; give data with those classes")
    for number, (here, there) in enumerate(zip(classes, names or classes, strict=True), 1):
        if here != there:
            raise DataError(
                f"{what} calls class {number} {here!r}, the segmenter {there!r}; give data with the segmenter's "
                "classes, in its order"
            )


def describe_mismatch(source: PairSource, total: MaskReport, *, strict: bool) -> list[str]:
    """Return an error message if the masks seem to be numbered from 0, and nothing says how they are numbered.

    Unless `strict`, this takes a first class whose name is that of a background or of void.
    """
    name, last = source.classes[0], len(source.classes)
    if source.mask_format.offset is not None or not total.zeros or total.counts[-1]:
        return []
    if VOID.fullmatch(name):
        remedy = f"remove {name!r} from the file of classes, as label 0 is void without a name"
    elif strict or BACKGROUND.fullmatch(name):
        remedy = f"give --mask_offset 0 if label 0 is {name!r}"
    else:
        return []
    return [
        f"the masks seem to be numbered from 0: the first class is {name!r}, and no mask has the label {last} of the "
        f"last class, {source.classes[-1]!r}; {remedy}, or give --mask_offset 1 if 0 is void and 1 is {name!r}"
    ]


def describe_doubts(source: PairSource, total: MaskReport, reports: dict[str, MaskReport]) -> list[str]:
    """Return lines on what may be wrong with the masks, from the reports on all of them and on those of each split."""
    names, (offset, void_label, _), lines = source.classes, source.mask_format, []
    first = source.mask_format.first_label
    areas = reports["training"].counts if "training" in reports else np.ones(len(names))
    if absent := [name for name, area in zip(names, areas, strict=True) if not area]:
        what = f"no training mask has a pixel of {len(absent)} of the {len(names)} classes"
        lines.append(f"{what}: {first_few(absent, len(absent))}")
    if offset is None and total.zeros and not total.counts[-1]:
        lines.append(f"note: label 0 is void and 1 is {names[0]}; if 0 is {names[0]}, give --mask_offset 0")
    if first == 0 and void_label != 0 and not total.counts[0]:
        lines.append(f"note: no mask has the label 0 of {names[0]}; if 1 is {names[0]}, give --mask_offset 1")
    for label, name in enumerate(names, first):
        if VOID.fullmatch(name) and label != void_label:
            lines.append(f"note: {name} is a class like others; give --void_label {label} to ignore its pixels")
    if turned := total.maybe_turned:
        lines.append(
            f"note: the EXIF orientation of {len(turned)} images turns or mirrors them, and their masks may not be "
            f"turned ({first_few(turned, len(turned))}); compare them in predictions/"
        )
    return lines


def class_weights(weights: list | None, areas: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor | None:
    """Return the weights of the classes in the loss, (num_classes,), None if they are equal.

    `weights` are --class_weights. Balanced ones are the median of the classes' numbers of pixels in the training masks,
    `areas`, divided by the class's own (Eigen & Fergus 2015, section 4.3.2), at most 10, and 1 for a class without
    pixels.
    """
    if not weights:
        return None
    if "balanced" not in weights:
        return torch.tensor(weights, device=device)
    pixels = torch.as_tensor(areas, dtype=torch.float64)
    balanced = (pixels[pixels > 0].median() / pixels).clamp(max=10)
    return torch.where(pixels > 0, balanced, 1.0).float().to(device)
