"""Semantic segmentation: pairs of image and mask, where they come from and what becomes of them together.

In files a label 0 is void (ignored) and 1 .. N are the classes, as in ADE20K; in memory a mask is uint8 (H, W) with
0 .. N-1 for the classes and 255 (IGNORED) for void. Sizes are (height, width), in pixels.
"""

import contextlib
import hashlib
import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from data import shapes
from data.decode import MAX_PIXELS, DamagedImage, PixelFormat, decode_stored
from data.files import FolderSource
from data.index import DataError
from data.pool import mapping
from data.sampling import sample_generator
from data.sources import (
    Fetched,
    ShapesSource,
    Source,
    check_pixels,
    image_of,
    kind_of_data,
    open_cache,
    open_sources,
)
from data.transforms import empty_images

IGNORED = 255
MAX_CLASSES = 254  # what is left of a byte beside void, in files and in memory
LAYOUT = "images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png"
NAMED_ERRORS = 5  # more masks that are wrong are only counted
CHUNK = 50  # masks that a process checks at a time


def ade20k_classes() -> tuple[list[str], np.ndarray]:
    """ADE20K's 150 classes in the order of their labels: names, and colours uint8 (150, 3)."""
    lines = Path(__file__).with_name("ade20k.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=3) for line in lines if not line.startswith("#")]
    return [row[3] for row in rows], np.array([row[:3] for row in rows]).astype(np.uint8)


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 (N, 3): ADE20K's for 150; for fewer, those of them that differ most; for more,
    others beyond them. Where there is a choice, each is the farthest from all before it."""
    known = ade20k_classes()[1].astype(np.int64)
    steps = np.arange(16, 256, 32)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(-1, 3)
    colours, others = (list(known), grid) if num_classes >= len(known) else ([known[0]], known)
    distances = ((others[:, None] - np.array(colours)) ** 2).sum(2).min(1)  # of each to the nearest that is taken
    while len(colours) < num_classes:
        colours.append(others[distances.argmax()])
        distances = np.minimum(distances, ((others - colours[-1]) ** 2).sum(1))
    return np.array(colours, dtype=np.uint8)


class SegmentationFolder:
    """A split, "training" or "validation", of a folder laid out like ADE20K's ADEChallengeData2016.

    Every image below images/SPLIT has its mask at the same place below annotations/SPLIT, as a PNG. `classes` are the
    names in `classes_file` (default classes.txt there), or ADE20K's where there is none and the images are ADE20K's.
    Ordered and used as FolderSource. Raises DataError, with a line for each thing that is wrong.
    """

    has_masks, labels = True, None

    def __init__(self, root: str | Path, split: str, classes_file: str | Path | None = None, cache: Path | None = None):
        self.root = Path(root)
        self.classes_file = Path(classes_file) if classes_file else self.root / "classes.txt"
        if not self.root.is_dir():
            raise DataError(f"{root} is no folder; --path_to_data takes a folder with {LAYOUT}, or builtin:shapes")
        errors = self._open(split, cache)
        if errors:
            raise DataError(FULL_ADE20K.format(root) if _is_full_ade20k(self.root) else "\n".join(errors))

    def _open(self, split: str, cache: Path | None) -> list[str]:
        folders = [self.root / "images" / split, self.root / "annotations" / split]
        if missing := [f"{folder.parent.name}/{split}" for folder in folders if not folder.is_dir()]:
            why = "; hold some pairs back there, to measure by" if split == "validation" else ""
            return [f"{self.root} has no {' and no '.join(missing)}; expected {LAYOUT}{why}"]
        self.images = FolderSource(folders[0], cache=cache)
        self.masks = FolderSource(folders[1], (".png",), cache=cache)
        stems, mask_stems = _stems(self.images), _stems(self.masks)
        numbers = {stem: number for number, stem in enumerate(mask_stems)}
        self._mask_of = np.array([numbers.get(stem, -1) for stem in stems])
        if not self.classes_file.exists() and self._is_ade20k(stems):
            self.classes, errors = ade20k_classes()[0], []
        else:
            self.classes, errors = _read_classes(self.classes_file)
        for names, what, remedy in (
            ([stem for stem in stems if stem not in numbers], "images without a mask", f"add NAME.png to {folders[1]}"),
            (sorted(numbers.keys() - {*stems}), "masks without an image", f"remove them, or add to {folders[0]}"),
            (_repeated(stems), "images with the same name but for the suffix", "keep one of each"),
            (_repeated(mask_stems), "masks with the same name but for the suffix", "keep one of each"),
        ):
            if names:
                errors.append(f"{self.root} ({split}) has {what}: {_some(names)}; {remedy}")
        return errors

    def _is_ade20k(self, stems: list[str]) -> bool:
        own = all(os.path.basename(stem).startswith(("ADE_train_", "ADE_val_")) for stem in stems)
        return own or (self.root / "objectInfo150.txt").exists()

    def __len__(self) -> int:
        return len(self.images)

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Nothing: files are read when they are wanted."""

    def name(self, index: int) -> str:
        """The path of an image."""
        return self.images.name(index)

    def mask_name(self, index: int) -> str:
        """The path of an image's mask."""
        return self.masks.name(self._mask_of[index])

    def open_image(self, index: int) -> BinaryIO:
        """The encoded image, of which no more than a header may be wanted. Raises OSError."""
        return open(self.name(index), "rb")

    def fetch(self, indices: list[int]) -> list[bytes | OSError]:
        """The encoded images, or why one could not be read."""
        return self.images.fetch(indices)

    def fetch_masks(self, indices: list[int]) -> list[bytes | OSError]:
        """The encoded masks, or why one could not be read."""
        return self.masks.fetch(self._mask_of[indices])

    def size_in_bytes(self) -> float:
        """About what all images and masks take on disk."""
        return self.images.size_in_bytes() + self.masks.size_in_bytes()

    def fingerprint(self) -> str:
        """Equal for two data sets with the same relative paths, wherever they lie."""
        return hashlib.sha256((self.images.fingerprint() + self.masks.fingerprint()).encode()).hexdigest()[:16]


FULL_ADE20K = (
    "{} is the full ADE20K, whose masks have thousands of classes in colour; expected the scene parsing set of 150 "
    "classes: get ADEChallengeData2016.zip from http://sceneparsing.csail.mit.edu"
)


def _is_full_ade20k(root: Path) -> bool:
    marks = ("index_ade20k.pkl", "index_ade20k.mat", "images/ADE")
    if any((root / mark).exists() for mark in marks):
        return True
    parts = (root / "images").rglob("*_seg.png")  # beside each image lies its mask
    return any(part.with_name(part.name.replace("_seg.png", ".jpg")).exists() for part in parts)


def _stems(source: FolderSource) -> list[str]:
    """The relative paths without suffixes."""
    return [os.path.splitext(os.path.relpath(source.name(i), source.root))[0] for i in range(len(source))]


def _repeated(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _some(names: list[str]) -> str:
    """A list of names that may be long, in words."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_classes(path: Path) -> tuple[list[str], list[str]]:
    """The classes' names in a file, or ADE20K's where it is called "ade20k"; and what is wrong with them."""
    if str(path) == "ade20k":
        return ade20k_classes()[0], []
    if not path.exists():
        return [], [f"{path} is missing; write a line for each class, the first for label 1 (label 0 is void)"]
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeError) as error:
        return [], [f"{path} cannot be read ({error}); expected text in UTF-8 with a class a line"]
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
        errors.append(f"{path} names one class; expected at least 2: number what is no class of interest too")
    if repeated := [name for name in _repeated(names) if name]:
        errors.append(f"{path} names classes twice: {_some(repeated)}; give each its own name")
    return names, errors


class SegmentationShapes(ShapesSource):
    """A split of the built-in scenes with their masks: the background is a class, and nothing is void."""

    def __init__(self, split: str, channels: int):
        super().__init__(split, channels)
        self.classes = list(shapes.SEGMENTATION_CLASSES)

    def mask_name(self, index: int) -> str:
        """A name for messages."""
        return f"{self.name(index)} (mask)"

    def fetch_masks(self, indices: list[int]) -> list[np.ndarray]:
        """The masks, uint8 (64, 64), numbered as in files: 1 is the background."""
        return [self.masks[index] + 1 for index in indices]


class Pairs:
    """A source that has a mask for each image, such as a list or a data set of the library `datasets`, with the names
    of the classes in `classes_file`, or ADE20K's where that is "ade20k".

    Used as SegmentationFolder. Raises DataError, with a line for each thing that is wrong.
    """

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

    def open_image(self, index: int) -> BinaryIO:
        """The encoded image as a file. Raises OSError."""
        (data,) = self.fetch([index])
        if isinstance(data, OSError):
            raise data
        return io.BytesIO(data)


PairSource = SegmentationFolder | SegmentationShapes | Pairs


def open_pairs(
    path_to_data: str,
    pixels: PixelFormat,
    *,
    validation: str | None = None,
    classes_file: str | None = None,
    cache: str | None = None,
) -> tuple[PairSource, PairSource]:
    """The training and the validation pairs of a folder, of `builtin:shapes`, or of a source that has masks, see
    `open_sources`; `classes_file` names the classes of that one.

    Raises DataError, with a line for each thing that is wrong.
    """
    if kind_of_data(path_to_data) == "builtin":
        open_sources(path_to_data, pixels)  # which refuses what these are not
        for flag, value in (("--path_to_validation_data", validation), ("--path_to_classes", classes_file)):
            if value is not None:
                raise DataError(f"{flag} {value} does not go with {path_to_data}, which has its own; leave it out")
        return SegmentationShapes("train", pixels.channels), SegmentationShapes("validation", pixels.channels)
    root = Path(path_to_data)
    beside = (root if root.is_dir() else root.parent) / "classes.txt"
    beside = beside if beside.exists() else None
    sources, errors = [], []
    for split, path in (("training", path_to_data), ("validation", validation or path_to_data)):
        try:
            options = dict(classes_file=classes_file or beside, cache=cache, alone=validation is not None)
            sources.append(_open_split(path, split, pixels, **options))
        except DataError as error:
            errors += str(error).splitlines()
    if errors:
        raise DataError("\n".join(dict.fromkeys(errors)))  # what both have is said once
    train, held_out = sources
    return train, held_out


def _open_split(
    path: str, split: str, pixels: PixelFormat, *, classes_file: str | Path | None, cache: str | None, alone: bool
) -> PairSource:
    """The pairs of a split, "training" or "validation", of `path`; `alone` says that another path has the other."""
    if kind_of_data(path) == "folder":
        source = SegmentationFolder(path, split, classes_file, open_cache(cache))
        errors = check_pixels(source, pixels)
        if errors:
            raise DataError(errors[0])
        return source
    train, held_out = open_sources(path, pixels, cache=cache)
    source = train if split == "training" else held_out or (train if alone else None)
    if source is None:
        raise DataError(f"{path} holds nothing back to measure by; give --path_to_validation_data")
    return Pairs(source, path, classes_file)


def check_masks(
    source: PairSource,
    indices: Sequence[int] | None = None,
    *,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008 - a tuple
    processes: int = 1,
    progress: str | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Reads the masks of `indices`, by default of all samples, once: the pixels of each class, int64 (N,), and what is
    wrong, a line a mask.

    Wrong is another size than the image's, colour, and a label beyond the classes; after five such masks the others are
    counted. A file that cannot be read is passed over, as it is known when it is needed. With `processes` > 1, so
    many share the work. `progress` is the text of a bar. Call `prepare` before.
    """
    num_classes = len(source.classes)
    indices = range(len(source)) if indices is None else indices
    if isinstance(source, SegmentationShapes):
        return np.bincount(source.masks[list(indices)].ravel(), minlength=num_classes), []
    chunk = max(1, min(CHUNK, math.ceil(len(indices) / processes)))
    chunks = [indices[start : start + chunk] for start in range(0, len(indices), chunk)]
    check = partial(_check_chunk, source, pixels=pixels)
    pixels_of_classes, errors = np.zeros(num_classes, np.int64), []
    with (
        mapping(processes) as in_order,
        tqdm(total=len(indices), desc=progress, unit="mask", disable=progress is None) as bar,
    ):
        for part, counts, found in in_order(check, chunks):
            pixels_of_classes += counts
            errors += found
            bar.update(part)
    if len(errors) > NAMED_ERRORS:
        errors[NAMED_ERRORS:] = [f"and {len(errors) - NAMED_ERRORS} more masks like these"]
    return pixels_of_classes, errors


def _check_chunk(source: PairSource, indices: Sequence[int], *, pixels: PixelFormat) -> tuple[int, np.ndarray, list]:
    """For the masks of some samples: how many, the pixels of each class, and what is wrong."""
    num_classes = len(source.classes)
    pixels_of_classes, errors = np.zeros(num_classes, np.int64), []
    for index in indices:
        (data,), name = source.fetch_masks([index]), source.mask_name(index)
        try:
            mask = mask_of(data, num_classes, name=name, max_pixels=pixels.max_pixels)
            size = _upright_size(source, index, pixels)
        except (OSError, DamagedImage):
            continue
        except DataError as error:
            errors.append(str(error))
            continue
        if mask.shape != size:
            errors.append(WRONG_SIZE.format(name, *mask.shape, *size))
        pixels_of_classes += np.bincount(mask.ravel(), minlength=IGNORED + 1)[:num_classes]
    return len(indices), pixels_of_classes, errors


WRONG_SIZE = "{} is {} x {} pixels (height x width), its image {} x {}; expected equal sizes: make the mask anew"


def _upright_size(source: PairSource, index: int, pixels: PixelFormat) -> tuple[int, int]:
    """Height and width of an image, turned upright: from its header where that tells. Raises what Pillow raises, and
    DamagedImage."""
    unknown = UnidentifiedImageError, Image.DecompressionBombError  # of which decode() has the say
    with contextlib.suppress(*unknown), source.open_image(index) as stream, Image.open(stream) as image:
        width, height = image.size
        # In search of EXIF that is not in front, a PNG would be decoded. Broken EXIF turns nothing, as in decode().
        if image.format != "PNG" or "exif" in image.info:
            with contextlib.suppress(Exception):
                if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # by a quarter
                    height, width = width, height
        if image.format != "TIFF":  # whose size some releases of Pillow have turned already
            return height, width
    (data,) = source.fetch([index])
    return tuple(image_of(data, pixels).shape[1:])


def mask_of(data: Fetched, num_classes: int, *, name: str, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """What a source fetched, as a mask uint8 (H, W) with the classes 0 .. N-1 and 255 for void.

    Raises DamagedImage, and DataError for colour and for labels beyond the classes; `name` stands in its message.
    """
    if isinstance(data, OSError):
        raise DamagedImage(data.strerror or str(data))
    labels = data if isinstance(data, np.ndarray) else decode_stored(data, max_pixels=max_pixels)
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise DataError(f"{name} has colour or transparency; expected one label a pixel, of a palette or grey")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > num_classes:
        raise DataError(
            f"{name} has the label {low if low < 0 else high}; expected 0 (void) to {num_classes}, the number of "
            "classes: correct the mask, or classes.txt"
        )
    return torch.from_numpy(labels.astype(np.uint8) - np.uint8(1))  # 0 wraps around to 255


def keep_ratio(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The size (h, w) of the largest image of the same proportions with sides of at most `long` and `short` pixels."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def view_sizes(
    height: int,
    width: int,
    *,
    mode: str,
    scales: Sequence[float],
    resize: tuple[int, int],
    crop_size: int,
    patch_size: int,
) -> list[tuple[int, int]]:
    """The sizes at which an image of this size is shown to a model in evaluation, one for each of `scales`: at least
    two patches a side, which a feature pyramid needs, and whole ones where no window slides.

    With `mode` "slide", it fits `resize` (long side, short side) times the scale, proportions kept; with "whole", it is
    a square of `crop_size` times the scale.
    """
    if mode == "slide":
        long, short = resize
        sizes = [keep_ratio(height, width, round(long * scale), round(short * scale)) for scale in scales]
    else:
        sizes = [(crop_size * scale, crop_size * scale) for scale in scales]

    def whole(side: float) -> int:
        return max(2, round(side / patch_size)) * patch_size

    # Windows are whole patches; what is smaller or has none is made so, as the model cuts off what is left of a patch
    return [tuple(s if mode == "slide" and s > crop_size else whole(s) for s in size) for size in sizes]


def evaluation_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) -> (C, *size), of its type, by an antialiased bilinear filter."""
    return F.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)


def training_pair(
    image: torch.Tensor,
    mask: torch.Tensor,
    rng: np.random.Generator,
    *,
    crop_size: int,
    resize: tuple[int, int],
    fill: list[float],
    ratio: tuple[float, float] = (0.5, 2.0),
    max_share: float = 0.75,
    distortion: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair augmented for training, as mmsegmentation's recipes for ADE20K do: (C, H, W) and uint8 (H, W), to squares
    of `crop_size`.

    It is resized to fit `resize` (long side, short side) times a factor drawn from `ratio`; cropped at random, up to
    ten times until no class fills `max_share` of what is not void; mirrored half the time; its colours are distorted;
    what is too small is padded at the right and the bottom with `fill` (one a channel: 0..255, or in [0, 1]
    where the image is float32) and void.
    """
    factor = rng.uniform(*ratio)
    size = keep_ratio(*mask.shape, int(resize[0] * factor), int(resize[1] * factor))
    # Nearest-exact takes the pixels in the middle, as the image's filter does; plain nearest is off by up to half one.
    mask = tv_tensors.Mask(F.resize(mask[None], list(size), InterpolationMode.NEAREST_EXACT)[0])
    box = _crop_box(mask, rng, crop_size, max_share)
    pair = tv_tensors.Image(evaluation_image(image, size)), mask
    image, mask = (F.crop(each, *box) for each in pair)
    if rng.random() < 0.5:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    if distortion:
        image = photometric_distortion(image, rng)
    padding = [0, 0, crop_size - box[3], crop_size - box[2]]
    image, mask = F.pad(image, padding, fill=list(fill)), F.pad(mask, padding, fill=IGNORED)
    return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


def _crop_box(
    mask: torch.Tensor, rng: np.random.Generator, crop_size: int, max_share: float
) -> tuple[int, int, int, int]:
    """A box (top, left, h, w), of crop_size or as large as the mask, in which no class fills `max_share`, if found."""
    height, width = (min(side, crop_size) for side in mask.shape)
    for _ in range(10):
        top, left = (int(rng.integers(side - min(side, crop_size) + 1)) for side in mask.shape)
        part = mask.numpy()[top : top + height, left : left + width]
        pixels = np.bincount(part.ravel(), minlength=IGNORED + 1)[:IGNORED]
        if pixels.max() < max_share * pixels.sum() or mask.shape == (height, width):
            break
    return top, left, height, width


def photometric_distortion(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each changed half the time; without three channels the first two.

    (C, H, W), uint8 or float32 in [0, 1] -> the same. As in mmsegmentation, brightness adds up to 32 (of 255) to all
    values and contrast multiplies them by 0.5 to 1.5. Saturation is scaled by as much, the hue turned by up to 18
    degrees. Contrast comes before or after these two, by chance.
    """
    changed = rng.random(5) < 0.5
    shift, contrast, saturation, hue = rng.uniform([-32, 0.5, 0.5, -18 / 360], [32, 1.5, 1.5, 18 / 360])
    image = image.contiguous()  # which the hue is faster from
    if changed[0] and image.is_floating_point():
        image = (image + shift / 255).clamp(0, 1)
    elif changed[0]:
        image = (image.to(torch.int16) + round(shift)).clamp(0, 255).to(torch.uint8)
    if changed[1] and changed[4]:
        image = _multiplied(image, contrast)
    if changed[2] and len(image) == 3:
        image = F.adjust_saturation(image, saturation)
    if changed[3] and len(image) == 3:
        image = F.adjust_hue(image, hue)
    if changed[1] and not changed[4]:
        image = _multiplied(image, contrast)
    return image


def _multiplied(image: torch.Tensor, factor: float) -> torch.Tensor:
    """All values times a factor, within their range."""
    if image.is_floating_point():
        return (image * factor).clamp(0, 1)
    if len(image) not in (1, 3):  # which torchvision does not take
        return (image * factor).clamp(0, 255).to(image.dtype)
    return F.adjust_brightness(image, factor)


def view_and_preview(
    image: torch.Tensor,
    index: int,
    *,
    sizes: Callable[[int, int], list[tuple[int, int]]],
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a segmenter sees of an image, what people see of it, and its own height and width.

    Both are (C, h, w). `sizes` takes the height and width and gives the size of the one view; the picture for
    people has sides of at most `longest` pixels.
    """
    height, width = image.shape[1:]
    (view,) = sizes(height, width)
    small = max(height, width) <= longest
    preview = image if small else evaluation_image(image, keep_ratio(height, width, longest, longest))
    return evaluation_image(image, view), preview, torch.tensor([height, width])


class SegmentationBatch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor  # (B, C, S, S), uint8, or float32 in [0, 1]
    masks: torch.Tensor  # (B, S, S), uint8: 0 .. N-1, and 255 for void
    indices: list[int]  # the samples that were asked for: one that is in `damaged` shows another pair
    damaged: list[tuple[int, str]]  # index and reason of every image or mask that could not be read


class EvaluationPair(NamedTuple):
    """A sample of evaluation."""

    index: int
    image: torch.Tensor  # (C, H, W), uint8, or float32 in [0, 1]
    views: list[torch.Tensor]  # (C, h, w): the image at each size that was asked for; empty if damaged
    mask: torch.Tensor  # (H, W), uint8: 0 .. N-1, and 255 for void
    damaged: str | None  # why image or mask could not be read; they are then one black pixel and void


def _blank_pair(pixels: PixelFormat) -> tuple[torch.Tensor, torch.Tensor]:
    void = torch.full((1, 1), IGNORED, dtype=torch.uint8)
    return empty_images(1, pixels.channels, (1, 1), pixels.dtype)[0].zero_(), void


def fetch_pairs(source: PairSource, indices: list[int]) -> Iterator[tuple[Fetched, Fetched]]:
    """Image and mask of each sample, as the source has them."""
    return zip(source.fetch(indices), source.fetch_masks(indices), strict=True)


def read_pair(
    source: PairSource, index: int, data: tuple[Fetched, Fetched], pixels: PixelFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image (C, H, W) and the mask (H, W) of a sample from what was fetched.

    Raises DamagedImage, and DataError for what `check_masks` would have found.
    """
    name = source.mask_name(index)
    image = image_of(data[0], pixels)
    try:
        mask = mask_of(data[1], len(source.classes), name=name, max_pixels=pixels.max_pixels)
    except DamagedImage as error:
        raise DamagedImage(f"its mask {name}: {error}") from None
    if mask.shape != image.shape[1:]:
        raise DataError(WRONG_SIZE.format(name, *mask.shape, *image.shape[1:]))
    return image, mask


class SegmentationDataset(Dataset):
    """Takes a list of (epoch, sample index) and fills one batch buffer, for training.

    A sample's crop, flip and distortion are drawn from (seed, epoch, index) alone. A pair of which image or mask is
    damaged is replaced by the next that can be read; where none can, by void. `resize` and `fill` are those of
    `training_pair`.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        pixels: PixelFormat,
        crop_size: int,
        resize: tuple[int, int],
        fill: list[float],
        seed: int,
    ):
        self.source, self.pixels, self.crop_size, self.seed = source, pixels, crop_size, seed
        self.options = dict(crop_size=crop_size, resize=resize, fill=fill)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[tuple[int, int]]) -> SegmentationBatch:
        indices = [index for _, index in items]
        size = self.crop_size, self.crop_size
        images = empty_images(len(items), self.pixels.channels, size, self.pixels.dtype)
        masks = torch.empty(len(items), self.crop_size, self.crop_size, dtype=torch.uint8)
        damaged: list[tuple[int, str]] = []
        for row, ((epoch, index), data) in enumerate(zip(items, fetch_pairs(self.source, indices), strict=True)):
            image, mask = self.readable(index, data, damaged)
            rng = sample_generator(self.seed, epoch, index)
            images[row], masks[row] = training_pair(image, mask, rng, **self.options)
        return SegmentationBatch(images, masks, indices, damaged)

    def readable(
        self, index: int, data: tuple[Fetched, Fetched], damaged: list[tuple[int, str]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair that `data` encode, or the next one that can be read; appends to `damaged`."""
        for _ in range(len(self)):
            try:
                return read_pair(self.source, index, data, self.pixels)
            except DamagedImage as error:
                damaged.append((index, str(error)))
            index = (index + 1) % len(self)
            (data,) = fetch_pairs(self.source, [index])
        return _blank_pair(self.pixels)


class EvaluationPairs(Dataset):
    """Takes a list of (epoch, sample index) and gives an EvaluationPair for each; the epoch changes nothing.

    `sizes` takes an image's height and width, and gives the sizes (h, w) of its views. Damaged pairs are told, not
    replaced.
    """

    def __init__(self, source: PairSource, *, pixels: PixelFormat, sizes: Callable[[int, int], list[tuple[int, int]]]):
        self.source, self.pixels, self.sizes = source, pixels, sizes

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[tuple[int, int]]) -> list[EvaluationPair]:
        indices = [index for _, index in items]
        return [self.pair(*each) for each in zip(indices, fetch_pairs(self.source, indices), strict=True)]

    def pair(self, index: int, data: tuple[Fetched, Fetched]) -> EvaluationPair:
        """A sample from what was fetched."""
        try:
            image, mask = read_pair(self.source, index, data, self.pixels)
        except DamagedImage as error:
            image, mask = _blank_pair(self.pixels)
            return EvaluationPair(index, image, [], mask, str(error))
        views = [evaluation_image(image, size) for size in self.sizes(*mask.shape)]
        return EvaluationPair(index, image, views, mask, None)
