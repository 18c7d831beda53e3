"""Where samples come from: one interface, `Source`, and what --path_to_data can name.

Each kind of source has its file: files.py, arrow.py, tar.py, prepared.py. Paths, places and labels are kept in flat
arrays, so that worker processes share them without copies.
"""

import contextlib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data import shapes
from data.decode import DamagedImage, PixelFormat, WrongPixels, decode, from_own_values, own_values
from data.files import FolderSource, ListSource
from data.index import DataError, check_cache, default_cache
from data.prepared import is_prepared, open_prepared
from data.statistics import read_statistics

LOOKED_AT = 8  # images of a source, before a run starts
DARK = 8  # of 255: what 16-bit numbers with no more than 11 bits become
LISTS = (".csv", ".jsonl", ".ndjson")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # packed ones are refused, with a reason


Fetched = bytes | memoryview | np.ndarray | OSError  # an encoded file, pixels (H, W, C), or why it could not be read


class Source(Protocol):
    """Samples by their numbers. Where they have masks, there are also `has_masks`, true, and `fetch_masks` and
    `mask_name`, which are to masks what `fetch` and `name` are to images."""

    classes: list[str]  # [] where there are none
    labels: np.ndarray | None  # (N,), the numbers of the classes

    def __len__(self) -> int: ...

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Called once, before the first `fetch`."""

    def fetch(self, indices: Sequence[int]) -> list[Fetched]:
        """The images, in the order of `indices`."""

    def name(self, index: int) -> str:
        """A path or name for messages."""

    def size_in_bytes(self) -> float:
        """About what all images take."""

    def fingerprint(self) -> str:
        """Equal for equal data sets, wherever they lie."""


class ShapesSource:
    """A split of the built-in scenes, drawn at the start and kept: 64 x 64, with `labels` and `masks`."""

    def __init__(self, split: str, channels: int):
        self.classes = list(shapes.CLASSES)
        self.split, self.channels = split, channels
        self.size = shapes.TRAIN_IMAGES if split == "train" else shapes.VALIDATION_IMAGES

    def prepare(self, *, processes: int = 1, progress: bool = False) -> None:
        """Draws all scenes, with a progress bar where asked for."""
        self.images, self.labels, self.masks = shapes.draw_split(self.split, processes=processes, progress=progress)
        if self.channels == 1:  # luminance of ITU-R BT.601, as Pillow converts
            self.images = (self.images @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)[..., None]

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        """A name for messages."""
        return f"builtin:shapes/{self.split}/{index}"

    def fetch(self, indices: list[int]) -> list[np.ndarray]:
        """The images, uint8 (64, 64, C)."""
        return [self.images[index] for index in indices]

    def size_in_bytes(self) -> float:
        """What all images take in memory."""
        return len(self) * shapes.SIZE * shapes.SIZE * self.channels

    def fingerprint(self) -> str:
        """Equal for the same scenes."""
        return f"builtin:shapes/{self.split}/{len(self)}"


def image_of(data: Fetched, pixels: PixelFormat, min_sides: tuple[int, int] | None = None) -> torch.Tensor:
    """What a source fetched, as an image (C, H, W), uint8 or float32, see `decode`. Raises DamagedImage."""
    if isinstance(data, OSError):
        raise DamagedImage(data.strerror or str(data))
    if isinstance(data, np.ndarray):
        return from_own_values(data, pixels.channels, value_range=pixels.value_range, nodata=pixels.nodata)
    return decode(data, **pixels._asdict(), min_sides=min_sides)


def describe_data(train: Source, validation: Source | None) -> dict[str, int]:
    """How much data there is, for args.json: images to train on, their bytes on disk (about), images held out."""
    held_out = len(validation) if validation else 0
    return {"images": len(train), "bytes": round(train.size_in_bytes()), "held_out": held_out}


def kind_of_data(path_to_data: str) -> str:
    """What --path_to_data names: "builtin", "hub", "tar", "list", "parquet", "prepared", "datasets", or "folder"."""
    root = Path(path_to_data)
    if path_to_data.startswith("builtin:"):
        return "builtin"
    if path_to_data.startswith("hf:"):
        return "hub"
    if path_to_data.endswith(TARS):
        return "tar"
    if path_to_data.endswith(LISTS):
        return "list"
    if path_to_data.endswith(".parquet"):
        return "parquet"
    if is_prepared(root):
        return "prepared"
    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():  # what save_to_disk writes
        return "datasets"
    return "parquet" if any(_holds_parquet(root / place) for place in ("", "data", "train")) else "folder"


def _holds_parquet(folder: Path) -> bool:
    """Whether a Parquet file is among the first that lie in a folder, which may hold millions of images."""
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(".parquet") for entry in islice(entries, 1000))
    except OSError:
        return False


def open_sources(
    path_to_data: str, pixels: PixelFormat, *, validation: str | None = None, cache: str | None = None
) -> tuple[Source, Source | None]:
    """The training source, and the validation source where there is one: that of `validation`, which is given as
    `path_to_data` is, or what `path_to_data` itself holds back.

    `path_to_data` is `builtin:shapes`; a folder that holds `train/` and perhaps `val/` or `validation/`, one laid out
    like ADE20K's, whose images are taken, or any folder of images; a list; tar shards; what `prepare_data.py` wrote; or
    a data set of the library `datasets`, on the Hub or in files. Indices of large ones are kept in `cache`, by default
    in the user's. Raises DataError.
    """
    folder = open_cache(cache)
    parts = _open_parts(path_to_data, pixels, folder)
    if validation is not None:
        own = _open_parts(validation, pixels, folder)
        parts["validation"] = own.get("validation", own["train"])
    errors = [error for source in parts.values() for error in check_pixels(source, pixels)]
    if errors:
        raise DataError(errors[0])
    return parts["train"], parts.get("validation")


def open_cache(cache: str | None) -> Path:
    """The folder for indices: `cache`, or by default one of the user's. Raises DataError where that one is named and
    cannot be written to."""
    if cache:
        check_cache(cache)
    return Path(cache) if cache else default_cache()


def _open_parts(path_to_data: str, pixels: PixelFormat, cache: Path | None) -> dict[str, Source]:
    """Sources by the names "train" and, where there is one, "validation"."""
    kind, root = kind_of_data(path_to_data), Path(path_to_data)
    if kind == "builtin":
        return _open_builtin(path_to_data, pixels)
    if kind in ("hub", "datasets", "parquet"):
        from data.arrow import open_datasets

        return open_datasets(path_to_data, cache=cache)
    if kind == "tar":
        from data.tar import TarSource

        return {"train": TarSource(path_to_data, cache=cache)}
    if kind == "list":
        return {"train": ListSource(path_to_data, cache=cache)}
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


def _open_builtin(path_to_data: str, pixels: PixelFormat) -> dict[str, Source]:
    if path_to_data != "builtin:shapes":
        raise DataError(f"--path_to_data {path_to_data} is unknown; the built-in data set is builtin:shapes")
    if pixels.channels not in (1, 3) or pixels.value_range is not None:
        raise DataError("builtin:shapes has 8-bit images in colour or grey; give --input_channels 3 or 1 alone")
    return {split: ShapesSource(split, pixels.channels) for split in ("train", "validation")}


def find_statistics(path_to_data: str | None) -> tuple[dict | None, list[str]]:
    """What `prepare_data.py --statistics` wrote beside the data, None where it did not, and what is wrong with it."""
    try:
        return read_statistics(Path(path_to_data)) if path_to_data else None, []
    except DataError as error:
        return None, [str(error)]


def check_pixels(source: Source, pixels: PixelFormat) -> list[str]:
    """Why images are not as `pixels` says, in a list: of some spread over the source, the first whose channels or
    values are others. Damaged ones are passed over: they are known when they are needed."""
    if isinstance(source, ShapesSource):
        return []
    dark = []
    for index in sorted({position * len(source) // LOOKED_AT for position in range(LOOKED_AT)}):
        (data,) = source.fetch([index])
        try:
            image = image_of(data, pixels)
        except WrongPixels as error:
            return [f"{source.name(index)} {error}"]
        except DamagedImage:
            continue
        dark.append(index if image.dtype == torch.uint8 and image.max() < DARK else None)
    if dark and None not in dark:
        (data,) = source.fetch(dark[:1])
        with contextlib.suppress(DamagedImage):
            values = data if isinstance(data, np.ndarray) else own_values(data, pixels.channels)
            if values.dtype == np.uint16:
                return [
                    f"{source.name(dark[0])} has 16-bit numbers up to {values.max()}, which are black at 8 bits; give "
                    "--value_range LO HI (prepare_data.py --statistics finds it)"
                ]
    return []
