"""Pairs of image and mask for semantic segmentation: their sources, and the checks before a run starts.

In files a label 0 is void (ignored) and 1 .. N are the classes, as in ADE20K; in memory a mask is uint8 (H, W) with
0 .. N-1 for the classes and 255 (IGNORED) for void. Sizes are (height, width), in pixels.
"""

import contextlib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import shapes
from data.decode import MAX_PIXELS, DamagedImage, PixelFormat, decode, decode_stored
from data.files import FolderSource
from data.index import DataError, first_few
from data.pool import mapping
from data.sources import Fetched, ShapesSource, Source, check_pixels, kind_of_data, open_cache, open_sources

IGNORED = 255
ADE20K = Path("ade20k")  # instead of a file with the names of classes
ADE20K_NAME = re.compile("(^|/)ADE_(train|val)_[^/]*$")
MAX_CLASSES = 254  # the values of a byte beside void, in files and in memory
LAYOUT = "images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png"
FULL_ADE20K = (
    "{} is the full ADE20K, whose masks have thousands of classes in colour; expected the scene parsing set of 150 "
    "classes: get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu"
)
FULL_ADE20K_FILES = "index_ade20k.*", "images/ADE", "images/**/*_seg.png"
WRONG_SIZE = "{} is {} x {} pixels (height x width), its image {} x {}; expected equal sizes: correct the mask"
MAX_NAMED = 5  # bad masks in messages; the others are counted
CHUNK = 50  # masks that a worker process checks at a time


def ade20k_classes() -> tuple[list[str], np.ndarray]:
    """Return names and colours, uint8 (150, 3), of ADE20K's 150 classes in the order of their labels."""
    lines = Path(__file__).with_name("ade20k.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=3) for line in lines if not line.startswith("#")]
    return [row[3] for row in rows], np.array([row[:3] for row in rows]).astype(np.uint8)


class SegmentationFolder(FolderSource):
    """Find the pairs of a split, "training" or "validation", of a folder laid out like ADEChallengeData2016 of ADE20K.

    Each image below images/SPLIT has a mask of the same relative name below annotations/SPLIT, as a PNG. Without a
    `classes_file` (see `open_pairs`) and classes.txt, images of ADE20K have its classes. Raises DataError.
    """

    has_masks = True

    def __init__(self, root: str | Path, split: str, classes_file: str | Path | None = None, cache: Path | None = None):
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root} is no folder; --path_to_data takes a folder with {LAYOUT}, or builtin:shapes")
        images, annotations = root / "images" / split, root / "annotations" / split
        if missing := [f"{path.parent.name}/{split}" for path in (images, annotations) if not path.is_dir()]:
            if any(any(root.glob(name)) for name in FULL_ADE20K_FILES):
                raise DataError(FULL_ADE20K.format(root))
            remedy = "; move some pairs there, for evaluation" if split == "validation" else ""
            raise DataError(f"{root} has no {' and no '.join(missing)}; expected {LAYOUT}{remedy}")
        super().__init__(images, cache=cache)
        self.labels = None
        self.masks = FolderSource(annotations, (".png",), cache=cache)
        stems, mask_stems = _stems(self), _stems(self.masks)
        numbers = {stem: number for number, stem in enumerate(mask_stems)}
        self._mask_of = np.array([numbers.get(stem, -1) for stem in stems])
        classes_file = Path(classes_file or root / "classes.txt")
        is_ade20k = (root / "objectInfo150.txt").exists() or all(map(ADE20K_NAME.search, stems))
        self.classes, errors = _read_classes(ADE20K if is_ade20k and not classes_file.exists() else classes_file)
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


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    """Read the names of the classes from a file, ADE20K's if it is ADE20K; return them and error messages."""
    if path == ADE20K:
        return ade20k_classes()[0], []
    if not path.exists():
        return [], [f"{path} is missing; write a line for each class, the first for label 1 (label 0 is void)"]
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeError) as error:
        return [], [f"{path} cannot be read ({error}); expected text in UTF-8 with a class on each line"]
    names, errors = [" ".join(line.split()) for line in lines], []
    if names and re.match(r"\d+ ", names[0]):  # then all lines are numbered
        wrong = [name for number, name in enumerate(names, 1) if not name.startswith(f"{number} ")]
        if wrong:
            errors.append(f"{path} has the line {wrong[0]!r}; expected the numbers 1, 2, ... in order, or none at all")
        names = [name.partition(" ")[2] for name in names]
    elif "" in names or not names:
        errors.append(f"{path} has {'an empty line' if names else 'no line'}; expected a name on each, from label 1 on")
    if len(names) > MAX_CLASSES:
        errors.append(f"{path} names {len(names)} classes; expected at most {MAX_CLASSES}, as masks have 8 bits")
    if len(names) == 1:
        errors.append(f"{path} names one class; expected at least 2: add one for everything else, such as background")
    if repeated := [name for name in _repeated(names) if name]:
        errors.append(f"{path} names classes twice: {first_few(repeated, len(repeated))}; give each its own name")
    return names, errors


class Pairs:
    """Wrap a source that has masks, such as a list, with the names of its classes. Raises DataError."""

    def __init__(self, source: Source, path: str, classes_file: str | Path | None):
        if not getattr(source, "has_masks", False):
            raise DataError(f"{path} has no masks; expected {LAYOUT}, or a column `mask` beside the images")
        if classes_file is None:
            raise DataError(f"{path} does not name its classes; give --path_to_classes FILE, with a name on each line")
        self.source = source
        self.name, self.mask_name = source.name, source.mask_name
        self.fetch, self.fetch_masks = source.fetch, source.fetch_masks
        self.prepare, self.size_in_bytes, self.fingerprint = source.prepare, source.size_in_bytes, source.fingerprint
        self.classes, errors = _read_classes(Path(classes_file))
        if errors:
            raise DataError("\n".join(errors))

    def __len__(self) -> int:
        return len(self.source)


PairSource = SegmentationFolder | ShapesSource | Pairs


def open_pairs(
    path_to_data: str,
    pixels: PixelFormat,
    *,
    validation: str | None = None,
    classes_file: str | None = None,
    cache: str | None = None,
) -> tuple[PairSource, PairSource]:
    """Open the training and the validation pairs of a folder laid out like ADE20K's, or of a source with masks.

    `classes_file` names the classes, or is "ade20k"; by default it is classes.txt beside the data. Raises DataError
    with a line for each problem.
    """
    if kind_of_data(path_to_data) == "builtin":
        scenes = open_sources(path_to_data, pixels)
        for flag, value in (("--path_to_validation_data", validation), ("--path_to_classes", classes_file)):
            if value is not None:
                raise DataError(f"{flag} {value} does not go with {path_to_data}, which has its own; leave it out")
        for source in scenes:
            source.classes = list(shapes.SEGMENTATION_CLASSES)
        return scenes
    root = Path(path_to_data)
    default_file = (root if root.is_dir() else root.parent) / "classes.txt"
    if classes_file is None and default_file.exists():
        classes_file = str(default_file)
    pairs, errors = [], []
    for split, path in (("training", path_to_data), ("validation", validation or path_to_data)):
        try:
            pairs.append(_open_split(path, split, pixels, classes_file, cache, alone=validation is not None))
        except DataError as error:
            errors += str(error).splitlines()
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))  # an error of both splits is named once
    return tuple(pairs)


def _open_split(
    path: str, split: str, pixels: PixelFormat, classes_file: str | None, cache: str | None, *, alone: bool
) -> PairSource:
    """Open the pairs of a split, "training" or "validation"; `alone` says that the other one has another path."""
    if kind_of_data(path) == "folder":
        source = SegmentationFolder(path, split, classes_file, open_cache(cache))
        check_pixels(source, pixels)
        return source
    train_source, validation_source = open_sources(path, pixels, cache=cache)
    if split == "training":
        return Pairs(train_source, path, classes_file)
    if validation_source is None and not alone:
        raise DataError(f"{path} has no validation pairs; give --path_to_validation_data")
    return Pairs(validation_source or train_source, path, classes_file)


def check_annotations(
    sources: dict[str, PairSource],
    pixels: PixelFormat,
    *,
    share: slice,
    gather: Callable[[list], list],
    processes: int,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Read all masks once, before a run starts, and count the pixels of each class.

    Args:
        sources: pairs by name, "training" or "validation", after `prepare`.
        share: the samples that this process of the run reads.
        gather: joins the lists of all processes of the run.
        processes: worker processes of this process.

    Returns:
        The pixels of each class, int64 (num_classes,), by the names of `sources`.

    Raises:
        DataError: a line for each bad mask, or that all pixels are void.
    """
    counts, errors = {}, []
    for name, source in sources.items():
        bar = f"reading {name} masks" if progress else None
        part = check_masks(source, range(len(source))[share], pixels, processes=processes, progress=bar)
        parts = gather([part])
        counts[name] = sum(pixels_of_classes for pixels_of_classes, _ in parts)
        errors += [line for _, lines in parts for line in lines]
        if not errors and not counts[name].any():
            errors.append(f"no pixel of the {name} masks has a class (all are 0, which is void); give other masks")
    if errors:
        raise DataError("\n".join(errors))
    return counts


def check_masks(
    source: PairSource, indices: Sequence[int], pixels: PixelFormat, *, processes: int = 1, progress: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Count the pixels of each class, int64 (num_classes,), in the masks of `indices`, and return error messages.

    Errors are another size than the image's, colour, and labels beyond the classes. Files that cannot be read are
    skipped: they are reported when a run reads them. `progress` is the text of a bar.
    """
    counts, errors = np.zeros(len(source.classes), np.int64), []
    if isinstance(source, ShapesSource):
        return np.bincount(source.masks[list(indices)].ravel(), minlength=len(counts)), []
    with mapping(processes, max(1, min(CHUNK, len(indices) // processes))) as in_order:
        results = in_order(partial(_check_mask, source, pixels), indices)
        for part, error in tqdm(results, progress, len(indices), unit="mask", disable=progress is None):
            counts += part
            errors += error
    if len(errors) > MAX_NAMED:
        errors[MAX_NAMED:] = [f"and {len(errors) - MAX_NAMED} more masks like these"]
    return counts, errors


def _check_mask(source: PairSource, pixels: PixelFormat, index: int) -> tuple[np.ndarray | int, list[str]]:
    """Return the pixels of each class, and an error message in a list."""
    (data,), name, num_classes = source.fetch_masks([index]), source.mask_name(index), len(source.classes)
    try:
        mask = mask_of(data, num_classes, name=name, max_pixels=pixels.max_pixels)
        size = _image_size(*source.fetch([index]), pixels)
    except DamagedImage:
        return 0, []
    except DataError as error:
        return 0, [str(error)]
    counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)[:num_classes]
    return counts, [] if mask.shape == size else [WRONG_SIZE.format(name, *mask.shape, *size)]


def _image_size(data: Fetched, pixels: PixelFormat) -> tuple[int, ...]:
    """Return height and width of an image: from its header if nothing turns it, which is far faster than decoding."""
    if isinstance(data, bytes | memoryview):
        with contextlib.suppress(OSError, Image.DecompressionBombError), Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "PNG") and "exif" not in image.info:
                return image.size[::-1]
    return tuple(decode(data, pixels).shape[1:])


def mask_of(data: Fetched, num_classes: int, *, name: str, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a mask that a source fetched: uint8 (H, W), with the classes 0 .. N-1 and 255 for void.

    Raises DamagedImage, and DataError, whose message has `name`, for colour and for labels beyond the classes.
    """
    labels = decode_stored(data, max_pixels)
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise DataError(f"{name} has colour or transparency; expected one label a pixel, of a palette or grey")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > num_classes:
        raise DataError(
            f"{name} has the label {low if low < 0 else high}; expected 0 (void) to {num_classes}, the number of "
            "classes: correct the mask, or classes.txt"
        )
    return torch.from_numpy(labels.astype(np.uint8) - np.uint8(1))  # 0 wraps around to 255


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


def describe_absent(classes: list[str], areas: np.ndarray) -> str | None:
    """Return a line that names the classes without a pixel in the training masks, None if there are none."""
    absent = [name for name, area in zip(classes, areas, strict=True) if not area]
    what = f"no training mask has a pixel of {len(absent)} of the {len(classes)} classes"
    return f"{what}: {first_few(absent, len(absent))}" if absent else None


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
