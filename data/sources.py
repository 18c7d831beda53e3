"""Sources of samples: their interface `Source`, functions that open --path_to_data, and checks of images and classes.

Other kinds of sources are in files.py, lists.py, arrow.py, tar.py and prepared.py. Paths, positions and labels are kept
in flat arrays, which worker processes share without copies.
"""

import contextlib
import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data import shapes
from data.decode import DamagedImage, PixelFormat, WrongPixels, decode, own_values
from data.files import FolderSource, find_splits
from data.imagenet import find_ids, imagenet_ids
from data.index import DataError, StoredSource, check_cache, default_cache, first_few
from data.lists import LISTS, ListSource
from data.prepared import is_prepared, open_prepared
from data.values import describe_start, is_pointer

NUM_CHECKED = 8  # images of a source that are decoded as a check before a run starts
DARK = 8  # of 255: 16-bit images are too dark at 8 bits if all values are below this (up to 1927 of 65535)
LABEL_PLACES = "a column `label` (.cls in shards)"
KINDS = {".tar": "tar", ".tar.gz": "tar", ".tgz": "tar", **dict.fromkeys(LISTS, "list"), ".parquet": "parquet"}

Fetched = bytes | memoryview | np.ndarray | OSError  # an encoded file, pixels (H, W, C), or why it could not be read


class Source(Protocol):
    """The interface of a source, which returns samples by index.

    A source with masks also has `has_masks`, and `fetch_masks` and `mask_name`, which are `fetch` and `name` for masks.
    """

    classes: list[str]  # names; [] without labels
    labels: np.ndarray | None  # (N,), indices of `classes`, -1 without a label
    label_errors: Sequence[str]  # reasons why labels cannot be used
    notes: Sequence[str]  # lines for the plan, such as images that are left out

    def __len__(self) -> int: ...

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Prepare for `fetch`; called once."""

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """Return the images, in the order of `indices`."""

    def name(self, index: int) -> str:
        """Return a path or name for messages."""

    def size_in_bytes(self) -> float:
        """Return the approximate size of all images in bytes."""

    def fingerprint(self) -> str:
        """Return a string that is equal for equal data sets, wherever they are stored."""


class ShapesSource(StoredSource):
    """A split of the built-in scenes: 64 x 64 pixels, with `labels` and `masks`, which `prepare` draws."""

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


class LabelledSource(StoredSource):
    """The samples of a source that have a label."""

    def __init__(self, source: Source):
        self._source, self._indices = source, np.flatnonzero(source.labels >= 0)
        self.prepare = source.prepare
        self.classes, self.labels = source.classes, source.labels[self._indices]
        count = len(source) - len(self)
        self.notes = [*source.notes, f"left out   {count:,} {'image' if count == 1 else 'images'} without a label"]

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        return self._source.fetch(self._indices[indices])

    def fetch_masks(self, indices: Sequence[int]) -> list[Fetched]:
        return self._source.fetch_masks(self._indices[indices])

    def size_in_bytes(self) -> float:
        return self._source.size_in_bytes() * len(self) / len(self._source)

    def fingerprint(self) -> str:
        labels = self._source.labels.tobytes() + "\n".join(self.classes).encode()  # some fingerprints ignore labels
        return hashlib.sha256(f"labelled {self._source.fingerprint()} ".encode() + labels).hexdigest()[:16]


def read_image(
    source: Source, index: int, pixels: PixelFormat, min_sides: tuple[int, int] | None = None
) -> torch.Tensor:
    """Return a decoded image of a source, see `decode`. Raises DamagedImage."""
    if pixels.validity == "mask":  # the image must keep its full size, as the mask has it
        return decode(*source.fetch([index]), pixels, None, *source.fetch_masks([index]))
    return decode(*source.fetch([index]), pixels, min_sides)


def keep_labelled(source: Source) -> Source:
    """Return the samples of a source that have a label, or the source itself if all or none have one."""
    return source if source.labels is None or source.labels.min() >= 0 else LabelledSource(source)


def describe_data(train: Source, validation: Source | None) -> dict[str, int]:
    """Return the amount of data for args.json: training images, their approximate bytes, and validation images."""
    held_out = len(validation) if validation else 0
    return {"images": len(train), "bytes": round(train.size_in_bytes()), "held_out": held_out}


def kind_of_data(path_to_data: str, data_format: str | None = None) -> str:
    """Return the kind of --path_to_data: "builtin", "hub", "tar", "list", "parquet", "prepared", "datasets", "folder".

    `data_format` is --data_format, which states the kind.
    """
    root = Path(path_to_data)
    for kind, prefix in (("builtin", "builtin:"), ("hub", "hf:")):
        if path_to_data.startswith(prefix):
            return kind
    if data_format:
        return data_format
    for suffix, kind in KINDS.items():
        if path_to_data.lower().endswith(suffix) and not root.is_dir():
            return kind
    if is_prepared(root):
        return "prepared"
    if (root / "dataset_dict.json").exists() or all(  # save_to_disk writes these
        (root / name).exists() for name in ("state.json", "dataset_info.json")
    ):
        return "datasets"
    return "parquet" if _has_parquet(root) else "folder"


def _has_parquet(root: Path) -> bool:
    """Return True if a folder has Parquet files with images, rather than metadata beside images."""
    files = [next(iter(sorted(root.glob(f"{place}*.parquet"))), None) for place in ("", "data/", "train/")]
    if not any(files):
        return False
    from data.arrow import holds_images  # here, because it takes long to import

    return any(map(holds_images, filter(None, files)))


def open_sources(
    path_to_data: str,
    pixels: PixelFormat,
    *,
    validation: str | None = None,
    cache: str | None = None,
    data_format: str | None = None,
    drop_unlabelled: bool = False,
) -> tuple[Source, Source | None]:
    """Open the training source and the validation source, None if there is none. Raises DataError.

    Args:
        path_to_data: `builtin:shapes`; a folder with folders for training and perhaps validation (see
            `files.choose_splits`), a folder in ADE20K's layout (only the images are used), or any folder of images; a
            list; tar shards; a folder that `prepare_data.py` wrote; or a data set of the library `datasets`, on the Hub
            or in files.
        pixels: the format that the images must have.
        validation: a path of any of these kinds, in place of the validation images in `path_to_data`.
        cache: folder for the indices of large data sets, by default in the user's cache.
        data_format: the kind of both paths, see `kind_of_data`.
        drop_unlabelled: leave out images without a label, unless none has one.
    """
    folder = open_cache(cache)
    parts = _open_parts(path_to_data, pixels, folder, data_format)
    if validation is not None:
        own = _open_parts(validation, pixels, folder, data_format)
        parts["validation"] = own.get("validation", own["train"])
    if drop_unlabelled:
        parts = {part: keep_labelled(source) for part, source in parts.items()}
    for source in parts.values():
        check_pixels(source, pixels)
    return parts["train"], parts.get("validation")


def open_cache(cache: str | None) -> Path:
    """Return the folder for indices, by default in the user's cache. Raises DataError if `cache` is not writable."""
    if cache:
        check_cache(cache)
    return Path(cache) if cache else default_cache()


def _open_parts(
    path_to_data: str, pixels: PixelFormat, cache: Path | None, data_format: str | None
) -> dict[str, Source]:
    """Open the sources "train" and, if there is one, "validation"."""
    kind, root = kind_of_data(path_to_data, data_format), Path(path_to_data)
    if kind == "builtin":
        if path_to_data != "builtin:shapes":
            raise DataError(f"--path_to_data {path_to_data} is unknown; the built-in data set is builtin:shapes")
        if pixels.channels not in (1, 3) or pixels.value_range is not None or pixels.validity == "channel":
            raise DataError("builtin:shapes has 8-bit images in colour or grey; give only --input_channels 3 or 1")
        return {split: ShapesSource(split, pixels.channels) for split in ("train", "validation")}
    if root.is_file():
        with open(root, "rb") as file:
            if is_pointer(start := file.read(64)):
                raise DataError(f"{root} is {describe_start(start)}")
    if kind in ("hub", "datasets", "parquet"):
        from data.arrow import PREFIX, open_datasets

        prefix = PREFIX if kind == "hub" and not path_to_data.startswith(PREFIX) else ""
        return open_datasets(prefix + path_to_data, cache=cache)
    if kind == "tar":
        from data.tar import TarSource

        pattern = f"{glob.escape(path_to_data)}/*.tar" if root.is_dir() else path_to_data
        return {"train": TarSource(pattern, cache=cache)}
    if kind == "list":
        return {"train": ListSource(path_to_data)}
    if kind == "prepared":
        return open_prepared(root, pixels)
    folders, notes = find_splits(root)
    parts = {part: FolderSource(folder, cache=cache) for part, folder in folders.items()}
    parts["train"].notes = [*notes, *parts["train"].notes]
    return parts


def check_pixels(source: Source, pixels: PixelFormat) -> None:
    """Raise DataError if images do not have the channels or values of `pixels`, or required masks are missing.

    Up to NUM_CHECKED images, spread over the source, are decoded. Damaged ones are skipped, because a run reports them
    when it reads them, unless all NUM_CHECKED are damaged.
    """
    if pixels.validity == "mask" and not getattr(source, "has_masks", False):
        expected = "expected a column `mask`, or a mask beside each image of a shard"
        raise DataError(f"--validity mask needs masks, and {source.name(0)} has none; {expected}")
    if isinstance(source, ShapesSource):
        return
    maxima, damaged = {}, []
    for index in sorted({position * len(source) // NUM_CHECKED for position in range(NUM_CHECKED)}):
        try:
            maxima[index] = read_image(source, index, pixels)[: pixels.channels].max()
        except WrongPixels as error:
            raise DataError(f"{source.name(index)} {error}") from None
        except DamagedImage as error:
            damaged.append(f"{source.name(index)}: {error}")
    if len(damaged) == NUM_CHECKED:
        raise DataError(
            f"none of {NUM_CHECKED} images, spread over the data, can be read ({damaged[0]}); repair the data"
        )
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
    """Return the labels (N,) of a source as indices of `classes`, which must include all classes of its images."""
    return np.array(_number_names(source.classes, classes))[source.labels]


def _number_names(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the index in `classes` of each name, or -1; ImageNet's classes match by WordNet id or by name."""
    numbers = {name: number for number, name in enumerate(classes)}
    if all(name in numbers for name in names):
        return [numbers[name] for name in names]
    by_id = {identity: number for number, identity in enumerate(find_ids(classes)) if identity}
    return [numbers.get(name, by_id.get(identity, -1)) for name, identity in zip(names, find_ids(names), strict=True)]


def _present_classes(source: Source) -> list[str]:
    """Return the classes that images of a source have; it may name others without images."""
    if source.labels is None:  # before `prepare`
        return source.classes
    return [source.classes[label] for label in np.unique(source.labels).tolist() if label >= 0]


def _missing_classes(source: Source, classes: Sequence[str]) -> list[str]:
    """Return the sorted classes of a source's images that are not in `classes`."""
    present = _present_classes(source)
    return sorted(name for name, number in zip(present, _number_names(present, classes), strict=True) if number < 0)


def check_num_classes(path_to_data: str, source: Source, num_classes: int | None) -> None:
    """Raise DataError if --num_classes is given and the data has another number of classes."""
    count = len(source.classes)
    if num_classes not in (None, count):
        raise DataError(
            f"--num_classes {num_classes} does not fit --path_to_data {path_to_data}, which has {count}; leave it out"
        )


def check_classes(path_to_data: str, train_source: Source, validation_source: Source | None) -> None:
    """Raise DataError unless all images have labels, of at least two classes, and training has those of validation."""
    what = f"--path_to_data {path_to_data}"
    if validation_source is None:
        raise DataError(
            f"{what} has no validation images; put some into val/ beside train/, or give --path_to_validation_data"
        )
    parts = {"train": train_source, "val": validation_source}
    _check_all_labelled(path_to_data, parts)
    trained = _present_classes(train_source)
    if len(trained) < 2:
        raise DataError(f"{what} has one class, {trained[0]}; expected at least two")
    if missing := _missing_classes(validation_source, trained):
        names = first_few(missing, len(missing))
        raise DataError(f"{what} has classes in val that train lacks ({names}); add images of them to train")


def _check_all_labelled(path_to_data: str, parts: dict[str, Source]) -> None:
    """Raise DataError unless all images have a label; `parts` maps folder names, for messages, to sources."""
    errors, what = [], f"--path_to_data {path_to_data}"
    for part, source in parts.items():
        errors += source.label_errors
        if not source.classes and not source.label_errors:
            raise DataError(f"{what} has images without a class; expected {part}/CLASS/IMAGE, or {LABEL_PLACES}")
        if source.labels is not None and len(without := np.flatnonzero(source.labels < 0)):
            names = first_few(map(source.name, without), len(without))
            errors.append(
                f"{what} has {len(without):,} of {len(source):,} images in {part} without a class ({names}); expected "
                f"{part}/CLASS/IMAGE, or {LABEL_PLACES} for all; move or label them, or give --drop_unlabelled"
            )
    if errors:
        raise DataError("\n".join(errors))


def check_labels(path_to_data: str, train_source: Source, validation_source: Source | None) -> None:
    """Raise DataError unless training images can classify validation images by nearest neighbours (--knn_every)."""
    held_out = None if validation_source is None else keep_labelled(validation_source)
    try:
        check_classes(path_to_data, keep_labelled(train_source), held_out)
    except DataError as error:
        needs = "--knn_every needs validation images of the training images' classes"
        lines = [f"{needs}: {line}; or leave the flag out" for line in str(error).splitlines()]
        raise DataError("\n".join(lines)) from None


def match_classes(path_to_data: str, source: Source, classes: list[str] | None, num_classes: int) -> list[str]:
    """Return the names of the classes of a trained classifier, to evaluate it on `source`.

    `classes` are the names of the classifier's `num_classes` outputs. If None, they are the WordNet ids of ImageNet-1k
    if these fit, otherwise the classes of the source. Raises DataError for other classes; the source may lack some.
    """
    what = f"--path_to_data {path_to_data}"
    _check_all_labelled(path_to_data, {"val": source})
    if classes is None:
        if num_classes == len(imagenet_ids()) and {*source.classes} <= {*imagenet_ids()}:
            return imagenet_ids()
        if len(source.classes) != num_classes:
            raise DataError(
                f"{what} has {len(source.classes)} classes, and the classifier {num_classes} without names; give data "
                "with its classes"
            )
        return source.classes
    if unknown := _missing_classes(source, classes):
        raise DataError(
            f"{what} has classes that the classifier does not know ({first_few(unknown, len(unknown))}); it knows "
            f"{first_few(classes, len(classes))}; give the class folders these names"
        )
    return classes
