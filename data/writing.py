"""Encode and measure images for prepare_data.py, and build the indices that data/prepared.py reads.

The data sets here run in loader workers. Each takes a list of sample indices and decodes one image at a time.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from data.arrow import END
from data.decode import PixelFormat, decode, decode_stored, own_values, stores_bytes
from data.index import Names
from data.prepared import keeps_files
from data.sources import Fetched, Source
from data.statistics import moments_of
from data.values import DamagedImage

QUALITY = 90  # JPEG quality if only --short_side is given
LONGEST = 65500  # pixels: the longest side that libjpeg can write


class Chunk(NamedTuple):
    """A part of a shard: consecutive encoded images."""

    data: bytes
    samples: int  # number of images in `data`
    shapes: np.ndarray | None  # (height, width) of each image, (samples, 2), in arrays; None for files
    damaged: list[tuple[int, str]]  # index and reason of the images that cannot be read


class Encoder(Dataset):
    """Base class of data sets that encode samples to Chunks; a shard is `header`, its chunks and `footer`.

    `encode(index, damaged)` returns an image, and its mask if there is one, as buffers; or it appends to `damaged` and
    may return None. `pack(images, damaged)` joins encoded images, by index, to a Chunk.
    """

    header = footer = b""

    def __init__(self, source: Source, settings: dict, pixels: PixelFormat):
        self.source, self.settings, self.pixels = source, settings, pixels

    def __getitems__(self, indices: Sequence[int]) -> Chunk:
        damaged = []
        images = {index: image for index in indices if (image := self.encode(index, damaged))}
        return self.pack(images, damaged)


class ArrayEncoder(Encoder):
    """Store pixels (H, W, C): uint8 or, with a value range, the file's numbers as float32, NaN for missing ones."""

    def encode(self, index: int, damaged: list[tuple[int, str]]) -> tuple[np.ndarray] | None:
        (data,) = self.source.fetch([index])
        try:
            if self.pixels.value_range is None:
                values = decode(data, self.pixels).permute(1, 2, 0).numpy()
            else:
                values = own_values(data, self.pixels).astype(np.float32, copy=False)
            return (shrink(values, self.settings["short_side"]),)
        except DamagedImage as error:
            damaged.append((index, str(error)))

    def pack(self, images: dict[int, tuple[np.ndarray]], damaged: list[tuple[int, str]]) -> Chunk:
        shapes = np.array([image.shape[:2] for (image,) in images.values()], dtype=np.int32).reshape(-1, 2)
        return Chunk(b"".join(image.tobytes() for (image,) in images.values()), len(images), shapes, damaged)


class FileEncoder(Encoder):
    """Store image files with labels and masks as record batches of an Arrow stream."""

    def __init__(self, source: Source, settings: dict, pixels: PixelFormat):
        super().__init__(source, settings, pixels)
        self.schema = make_features(source).arrow_schema
        self.header, self.footer = self.schema.serialize().to_pybytes(), END

    def encode(self, index: int, damaged: list[tuple[int, str]]) -> tuple[bytes, ...] | None:
        (data,) = self.source.fetch([index])
        masks = self.source.fetch_masks([index]) if getattr(self.source, "has_masks", False) else []
        try:
            image = self.recode(data)
            for mask in masks:
                check_mask(mask)
        except DamagedImage as error:
            damaged.append((index, str(error)))
            if not keeps_files(self.settings):
                return None
            image = data  # kept files include damaged ones, which a run replaces as it does in the source
        return tuple(b"" if isinstance(file, OSError) else bytes(file) for file in (image, *masks))

    def recode(self, data: Fetched) -> bytes:
        """Return the image as a JPEG file, or the same file if the settings do not change it. Raises DamagedImage."""
        short_side, quality, keeps = self.settings["short_side"], self.settings["quality"], keeps_files(self.settings)
        if keeps and isinstance(data, np.ndarray):
            raise DamagedImage("decoded pixels cannot be kept as a file; give --quality or --format array")
        # Decoding at twice the size leaves enough detail for an antialiased resize
        min_sides = None if short_side is None else (2 * short_side, 2 * short_side)
        pixels = decode(data, self.pixels, min_sides).permute(1, 2, 0).numpy()
        small = shrink(pixels, short_side)
        if keeps or (small is pixels and quality is None and bytes(data[:2]) == b"\xff\xd8"):
            return bytes(data)
        if max(small.shape) > LONGEST:
            raise DamagedImage("{} x {} pixels, more than JPEG holds; give --format array".format(*small.shape[:2]))
        file, grey = io.BytesIO(), small.shape[2] == 1
        image = Image.fromarray(small[..., 0] if grey else small)
        image.save(file, "JPEG", quality=quality or QUALITY, **({} if grey else {"subsampling": "4:2:0"}))
        return file.getvalue()

    def pack(self, images: dict[int, tuple[bytes, ...]], damaged: list[tuple[int, str]]) -> Chunk:
        import pyarrow as pa

        if not images:
            return Chunk(b"", 0, None, damaged)
        rows = []
        for index, (image, *masks) in images.items():
            row = {"image": {"bytes": image, "path": relative_name(self.source, index)}}
            if self.source.labels is not None:
                row["label"] = int(self.source.labels[index])
            if masks:
                row["mask"] = {"bytes": masks[0]}
            rows.append(row)
        data = pa.RecordBatch.from_pylist(rows, self.schema).serialize().to_pybytes()
        return Chunk(data, len(images), None, damaged)


class Measure(Dataset):
    """Compute the Moments of each readable sample, and list the indices and reasons of the others.

    If `eight_bit`, the moments are those of the pixels that a run reads, otherwise of the stored numbers.
    """

    def __init__(self, source: Source, pixels: PixelFormat, *, eight_bit: bool):
        self.source, self.pixels, self.eight_bit = source, pixels, eight_bit

    def __getitems__(self, indices: Sequence[int]) -> tuple[list, list[tuple[int, str]]]:
        moments, damaged = [], []
        for index in indices:
            (data,) = self.source.fetch([index])
            masks = self.source.fetch_masks([index]) if self.pixels.validity == "mask" else []
            try:
                if self.eight_bit and self.pixels.validity != "channel":  # a run compares --nodata after the conversion
                    data = decode(data, self.pixels._replace(nodata=None, validity=None)).permute(1, 2, 0).numpy()
                moments.append(moments_of(own_values(data, self.pixels, *masks), self.pixels.value_range))
            except DamagedImage as error:
                damaged.append((index, str(error)))
        return moments, damaged


def is_eight_bit(source: Source, indices: Sequence[int], pixels: PixelFormat) -> bool:
    """Return True if all readable images among `indices` store 8-bit numbers."""
    for index in indices:
        with contextlib.suppress(DamagedImage):
            if not stores_bytes(*source.fetch([index]), pixels):
                return False
    return True


def check_mask(mask: Fetched) -> None:
    """Raise DamagedImage for a mask that cannot be read."""
    try:
        decode_stored(mask)
    except DamagedImage as error:
        raise DamagedImage(f"its mask: {error}") from None


def relative_name(source: Source, index: int) -> str:
    """Return an image's path relative to the data folder, or its full name, as valid UTF-8."""
    name = source.name(index).removeprefix(os.path.join(getattr(source, "root", ""), ""))
    return os.fsencode(name).decode(errors="replace")


def shrink(values: np.ndarray, short_side: int | None) -> np.ndarray:
    """Resize (H, W, C), uint8 or float32, to a shorter side of `short_side` by an antialiased bicubic filter.

    Smaller images are returned unchanged. Missing values (NaN) spread over the width of the filter.
    """
    height, width, _ = values.shape
    if short_side is None or min(height, width) <= short_side:
        return values
    size = [side * short_side // min(height, width) for side in (height, width)]
    image = torch.from_numpy(values.copy()).permute(2, 0, 1)[None]  # torch warns about read-only memory
    return interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()


def make_features(source: Source):
    """Return the columns of the shards as Features of the library `datasets`."""
    import datasets

    features = {"image": datasets.Image()}
    if source.labels is not None:
        features["label"] = datasets.ClassLabel(names=source.classes)
    if getattr(source, "has_masks", False):
        features["mask"] = datasets.Image()
    return datasets.Features(features)


def index_files(source: Source, split: str, shards: list[dict]) -> dict[str, dict]:
    """Return the JSON files, name -> content, that `datasets` needs beside the Arrow shards of a split."""
    checksums = "".join(shard["sha256"] for shard in shards)
    state = {
        "_data_files": [{"filename": Path(shard["file"]).name} for shard in shards],
        "_fingerprint": hashlib.sha256(checksums.encode()).hexdigest()[:16],
        **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        "_split": split,
    }
    return {"dataset_info.json": {"features": make_features(source).to_dict()}, "state.json": state}


def index_arrays(source: Source, shapes: list[np.ndarray], damaged: list[int], pixel_bytes: int) -> dict:
    """Return the index arrays of a split, by name, from the (height, width) of the images in each shard, (n, 2) each.

    Samples in `damaged` are left out; a pixel with all its channels takes `pixel_bytes`.
    """
    sizes = [pixel_bytes * shape.prod(1, dtype=np.int64) for shape in shapes]
    readable = np.setdiff1d(np.arange(len(source)), damaged)
    names = Names.from_list([os.fsencode(relative_name(source, int(index))) for index in readable])
    columns = dict(zip(("heights", "widths"), np.concatenate(shapes).T, strict=True))
    columns["offsets"] = np.concatenate([size.cumsum() - size for size in sizes])
    columns["names"], columns["name_ends"] = names.buffer, names.ends
    if source.labels is not None:
        columns["labels"] = np.asarray(source.labels, dtype=np.int32)[readable]
    return columns
