"""Sources of samples: their interface, `Source`, how --path_to_data is opened, and checks of images and classes.

Each kind of source has its file: files.py, arrow.py, tar.py, prepared.py. Paths, positions and labels are kept in flat
arrays, which worker processes share without copies.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data import shapes
from data.decode import DamagedImage, PixelFormat, WrongPixels, decode, own_values
from data.files import FolderSource, ListSource
from data.index import DataError, check_cache, default_cache, first_few
from data.prepared import is_prepared, open_prepared

NUM_CHECKED = 8  # images of a source that are decoded before a run starts
DARK = 8  # of 255: 16-bit values of at most 11 bits are below it at 8 bits
LISTS = (".csv", ".jsonl", ".ndjson")
LABELS = "a column `label` (.cls in shards)"

Fetched = bytes | memoryview | np.ndarray | OSError  # an encoded file, pixels (H, W, C), or why it could not be read


class Source(Protocol):
    """Give samples by index.

    A source with masks also has `has_masks`, `fetch_masks` and `mask_name`, as `fetch` and `name` for its images.
    """

    classes: list[str]  # names; [] without labels
    labels: np.ndarray | None  # (N,), indices of `classes`

    def __len__(self) -> int: ...

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Get ready to `fetch`; called once."""

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """Return the images, in the order of `indices`."""

    def name(self, index: int) -> str:
        """Return a path or name for messages."""

    def size_in_bytes(self) -> float:
        """Return about how many bytes all images take."""

    def fingerprint(self) -> str:
        """Return a string that is equal for equal data sets, wherever they are stored."""


class ShapesSource:
    """Hold a split of the built-in scenes, drawn in `prepare`: 64 x 64 pixels, with `labels` and `masks`."""

    def __init__(self, split: str, channels: int):
        self.classes = list(shapes.CLASSES)
        self.split, self.channels = split, channels
        self.size = shapes.TRAIN_IMAGES if split == "train" else shapes.VALIDATION_IMAGES

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        self.images, self.labels, self.masks = shapes.draw_split(self.split, processes=processes, progress=progress)
        if self.channels == 1:  # luminance of ITU-R BT.601, as in Pillow
            self.images = (self.images @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)[..., None]

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"builtin:shapes/{self.split}/{index}"

    def fetch(self, indices: list[int]) -> list[np.ndarray]:
        return [self.images[index] for index in indices]

    def mask_name(self, index: int) -> str:
        return f"{self.name(index)} (mask)"

    def fetch_masks(self, indices: list[int]) -> list[np.ndarray]:
        """Return the masks, uint8 (64, 64), numbered as in files: 1 is the background, and nothing is void."""
        return [self.masks[index] + 1 for index in indices]

    def size_in_bytes(self) -> float:
        return len(self) * shapes.SIZE * shapes.SIZE * self.channels

    def fingerprint(self) -> str:
        return f"builtin:shapes/{self.split}/{len(self)}"


def describe_data(train: Source, validation: Source | None) -> dict[str, int]:
    """Return the amount of data for args.json: training images, about their bytes on disk, and held-out images."""
    held_out = len(validation) if validation else 0
    return {"images": len(train), "bytes": round(train.size_in_bytes()), "held_out": held_out}


def kind_of_data(path_to_data: str) -> str:
    """Return what --path_to_data is: "builtin", "hub", "tar", "list", "parquet", "prepared", "datasets" or "folder"."""
    root = Path(path_to_data)
    for kind, prefix in (("builtin", "builtin:"), ("hub", "hf:")):
        if path_to_data.startswith(prefix):
            return kind
    for kind, suffixes in (("tar", (".tar", ".tar.gz", ".tgz")), ("list", LISTS), ("parquet", ".parquet")):
        if path_to_data.endswith(suffixes):
            return kind
    if is_prepared(root):
        return "prepared"
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():  # of save_to_disk
        return "datasets"
    return "parquet" if any(any(root.glob(f"{place}*.parquet")) for place in ("", "data/", "train/")) else "folder"


def open_sources(
    path_to_data: str, pixels: PixelFormat, *, validation: str | None = None, cache: str | None = None
) -> tuple[Source, Source | None]:
    """Open the training source and the validation source, None if there is none. Raises DataError.

    Args:
        path_to_data: `builtin:shapes`; a folder with `train/` and perhaps `val/` or `validation/`, one laid out like
            ADE20K's (its images are taken), or any folder of images; a list; tar shards; a folder that
            `prepare_data.py` wrote; or a data set of the library `datasets`, on the Hub or in files.
        pixels: the format that the images must have.
        validation: a path of any of these kinds, instead of the validation images in `path_to_data`.
        cache: folder for the indices of large data sets, by default in the user's cache.
    """
    folder = open_cache(cache)
    parts = _open_parts(path_to_data, pixels, folder)
    if validation is not None:
        own = _open_parts(validation, pixels, folder)
        parts["validation"] = own.get("validation", own["train"])
    for source in parts.values():
        check_pixels(source, pixels)
    return parts["train"], parts.get("validation")


def open_cache(cache: str | None) -> Path:
    """Return the folder for indices, by default in the user's cache. Raises DataError if `cache` is not writable."""
    if cache:
        check_cache(cache)
    return Path(cache) if cache else default_cache()


def _open_parts(path_to_data: str, pixels: PixelFormat, cache: Path | None) -> dict[str, Source]:
    """Open the sources "train" and, if there is one, "validation"."""
    kind, root = kind_of_data(path_to_data), Path(path_to_data)
    if kind == "builtin":
        if path_to_data != "builtin:shapes":
            raise DataError(f"--path_to_data {path_to_data} is unknown; the built-in data set is builtin:shapes")
        if pixels.channels not in (1, 3) or pixels.value_range is not None:
            raise DataError("builtin:shapes has 8-bit images in colour or grey; give only --input_channels 3 or 1")
        return {split: ShapesSource(split, pixels.channels) for split in ("train", "validation")}
    if kind in ("hub", "datasets", "parquet"):
        from data.arrow import open_datasets

        return open_datasets(path_to_data, cache=cache)
    if kind == "tar":
        from data.tar import TarSource

        return {"train": TarSource(path_to_data, cache=cache)}
    if kind == "list":
        return {"train": ListSource(path_to_data)}
    if kind == "prepared":
        return open_prepared(root, pixels)
    if (root / "annotations").is_dir() and (root / "images" / "training").is_dir():  # ADE20K's layout
        names = {"train": "images/training", "validation": "images/validation"}
    elif (root / "train").is_dir():
        names = {"train": "train", "validation": "val" if (root / "val").is_dir() else "validation"}
    else:
        names = {"train": ""}
    return {
        part: FolderSource(root / name, cache=cache)
        for part, name in names.items()
        if part == "train" or (root / name).is_dir()
    }


def check_pixels(source: Source, pixels: PixelFormat) -> None:
    """Raise DataError if images have other channels or values than `pixels` says.

    Some images, spread over the source, are decoded. Damaged ones are skipped: they are reported when a run reads them.
    """
    if isinstance(source, ShapesSource):
        return
    maxima = {}
    for index in sorted({position * len(source) // NUM_CHECKED for position in range(NUM_CHECKED)}):
        try:
            maxima[index] = decode(*source.fetch([index]), pixels).max()
        except WrongPixels as error:
            raise DataError(f"{source.name(index)} {error}") from None
        except DamagedImage:
            continue
    if pixels.value_range is None and maxima and max(maxima.values()) < DARK:
        index = min(maxima)
        with contextlib.suppress(DamagedImage):
            values = own_values(*source.fetch([index]), PixelFormat(pixels.channels))
            if values.dtype == np.uint16:
                raise DataError(
                    f"{source.name(index)} has 16-bit numbers up to {values.max()}, which are black at 8 bits; give "
                    "--value_range LO HI (prepare_data.py --statistics finds it)"
                )


def labels_in(source: Source, classes: list[str]) -> np.ndarray:
    """Return the labels (N,) of a source as indices of `classes`, which has all of its classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in source.classes])[source.labels]


def check_num_classes(path_to_data: str, source: Source, num_classes: int | None) -> None:
    """Raise DataError if --num_classes was given and the data have another number of classes."""
    count = len(source.classes)
    if num_classes not in (None, count):
        raise DataError(
            f"--num_classes {num_classes} does not fit --path_to_data {path_to_data}, which has {count}; leave it out"
        )


def check_classes(path_to_data: str, train_source: Source, validation_source: Source | None) -> None:
    """Raise DataError unless the data can be classified: images of the same classes for training and validation."""
    what = f"--path_to_data {path_to_data}"
    if validation_source is None:
        raise DataError(
            f"{what} has no validation images; put some into val/ beside train/, or give --path_to_validation_data"
        )
    parts = {"train": train_source, "val": validation_source}
    for part, source in parts.items():
        if not source.classes:
            raise DataError(f"{what} has images without a class; expected {part}/CLASS/IMAGE, or {LABELS}")
    if len(train_source.classes) < 2:
        raise DataError(f"{what} has one class, {train_source.classes[0]}; expected at least two")
    errors = [
        f"{what} has classes in {part} that {other} lacks ({first_few(missing, len(missing))}); give both the same"
        for part, other in (("train", "val"), ("val", "train"))
        if (missing := sorted({*parts[part].classes} - {*parts[other].classes}))
    ]
    if errors:
        raise DataError("\n".join(errors))


def check_labels(path_to_data: str, train_source: Source, validation_source: Source | None) -> None:
    """Raise DataError unless validation images can be classified by their nearest neighbours among training images."""
    if validation_source is None:
        raise DataError(f"--knn_every needs validation images, and {path_to_data} has none; leave the flag out")
    if not train_source.classes or not validation_source.classes:
        raise DataError(
            f"--knn_every needs labels, and {path_to_data} has images without a class; expected train/CLASS/IMAGE and "
            f"val/CLASS/IMAGE, or {LABELS}; or leave the flag out"
        )
    if missing := sorted({*validation_source.classes} - {*train_source.classes}):
        raise DataError(
            f"--knn_every needs the classes of val in train, and {path_to_data} lacks {len(missing)} of them there "
            f"({first_few(missing, len(missing))}); add them, or leave the flag out"
        )


def match_classes(path_to_data: str, source: Source, classes: list[str] | None, num_classes: int) -> list[str]:
    """Return the names of the classes of a trained classifier, to evaluate it on `source`.

    `classes` are the classifier's names of its `num_classes` outputs, or None if they are unknown: then they are those
    of the source. Raises DataError if the source has other classes; it may lack some.
    """
    what = f"--path_to_data {path_to_data}"
    if not source.classes:
        raise DataError(f"{what} has images without a class; expected val/CLASS/IMAGE, or {LABELS}")
    if classes is None:
        if len(source.classes) != num_classes:
            raise DataError(
                f"{what} has {len(source.classes)} classes, and the classifier {num_classes} without names; give data "
                "with its classes"
            )
        return source.classes
    if unknown := sorted({*source.classes} - {*classes}):
        raise DataError(
            f"{what} has classes that the classifier does not know ({first_few(unknown, len(unknown))}); it knows "
            f"{first_few(classes, len(classes))}; give the class folders these names"
        )
    return classes
