"""Test data/decode.py with generated files of every format, mode, size and damage: each gives an image or DamagedImage.

A file is generated from a short description, `Written`, so that failing examples are easy to read.
"""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from data.decode import PixelFormat, decode, decode_stored, own_values
from data.values import DamagedImage, WrongPixels

MAX_PIXELS = 5_000_000  # what damage makes of a size is refused early: the test does not wait for it
ORIENTATION = 0x0112
DTYPES = ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]
PILLOW = {  # Pillow's format and options, and the modes that are written
    "jpeg": ("JPEG", ["L", "RGB", "CMYK"], dict(quality=90)),
    "progressive jpeg": ("JPEG", ["L", "RGB"], dict(progressive=True, subsampling=0)),
    "png": ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"], {}),
    "webp": ("WEBP", ["RGB", "RGBA"], dict(quality=70)),
    "gif": ("GIF", ["1", "L", "P", "RGB"], dict(save_all=True)),
    "bmp": ("BMP", ["1", "L", "P", "RGB", "RGBA"], {}),
    "ppm": ("PPM", ["1", "L", "RGB", "I;16"], {}),
    "tiff by Pillow": ("TIFF", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"], dict(compression="raw")),
    "packed tiff": ("TIFF", ["1", "L", "P", "RGB", "I;16", "F"], dict(compression="tiff_lzw")),
}
if not features.check("webp"):
    del PILLOW["webp"]
COMPRESSIONS = [None, "lzw", "zlib", "packbits", "zstd"]
AXES = ["HW", "HWC", "CHW", "THWC"]


class Written(NamedTuple):
    """Describe an image file."""

    format: str  # a key of PILLOW, or "deep png", "tiff", "npy"
    size: tuple[int, int]  # height and width
    seed: int  # of the pixels
    kind: int  # chooses among modes, number types, compressions, ...
    channels: int  # where the format can have any
    orientation: int


def stored(file: Written) -> np.ndarray:
    """Return the numbers (H, W, bands) of a file of numbers."""
    rng = np.random.default_rng(file.seed)
    if file.format == "deep png":
        return rng.integers(0, 65536, (*file.size, bands(file)), dtype=np.uint16)
    dtype = np.dtype(DTYPES[file.kind % len(DTYPES)])
    high = np.iinfo(dtype).max if dtype.kind in "ui" else 9999
    array = rng.integers(0, high, (*file.size, bands(file))).astype(dtype)
    if file.kind & 64:
        array[rng.random(array.shape) < 0.2] = np.nan if dtype.kind == "f" else 0
    return array


def make(file: Written) -> bytes:
    """Return the bytes of a file."""
    if file.format in PILLOW:
        return with_pillow(file)
    array = stored(file)
    if file.format == "deep png":
        return deep_png(array)
    stream = io.BytesIO()
    if file.format == "npy":
        axes = AXES[file.kind // 16 % 4]
        array = {"HW": array[:, :, 0], "HWC": array, "CHW": np.moveaxis(array, 2, 0), "THWC": array[None]}[axes]
        np.save(stream, array if file.kind & 128 else np.asfortranarray(array))
        return stream.getvalue()
    options = dict(photometric="minisblack", compression=COMPRESSIONS[file.kind // 16 % len(COMPRESSIONS)])
    options |= dict(byteorder="<>"[file.kind // 8 % 2], bigtiff=bool(file.kind & 4))
    options |= dict(tile=(16, 16)) if file.kind & 32 else dict(rowsperstrip=5)
    if file.kind & 2 and options["compression"] in ("lzw", "zlib", "zstd"):
        options |= dict(predictor=True)
    tags = [(ORIENTATION, "H", 1, file.orientation, True)]
    tags += [(42113, "s", 0, "0", True)] if file.kind & 256 else []
    if file.channels == 1:
        array = array[:, :, 0]
    elif file.kind & 128:
        array = np.moveaxis(array, 2, 0).copy()
        options |= dict(planarconfig="separate", photometric="rgb" if file.channels == 3 else "minisblack")
    else:
        options |= dict(planarconfig="contig", photometric="rgb" if file.channels == 3 else "minisblack")
    tifffile.imwrite(stream, array, extratags=tags, **options)
    return stream.getvalue()


def with_pillow(file: Written) -> bytes:
    """Return a file that Pillow writes."""
    stream, rng = io.BytesIO(), np.random.default_rng(file.seed)
    format, modes, options = PILLOW[file.format]
    mode = modes[file.kind % len(modes)]
    images = [picture(rng, file.size, mode) for _ in range(2 if format == "GIF" else 1)]
    options = options | (dict(append_images=images[1:]) if format == "GIF" else {})
    if format in ("JPEG", "PNG", "WEBP", "TIFF") and file.orientation > 1:
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = file.orientation
    images[0].save(stream, format, **options)
    return stream.getvalue()


def picture(rng: np.random.Generator, size: tuple[int, int], mode: str) -> Image.Image:
    """Return a picture of coarse colours, which is small in all formats."""
    rough = Image.fromarray(rng.integers(0, 256, (4, 5, 4), dtype=np.uint8))
    rough = rough.resize(size[::-1], Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(np.array(rough.convert("L")).astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        return rough.convert(mode)
    return rough.convert("RGB").convert(mode)


def deep_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 1 to 4) uint16 as PNG; Pillow cannot, and imagecodecs not in all small sizes."""
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [b"IHDR" + head, b"IDAT" + zlib.compress(rows, 1), b"IEND"]
    framed = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def damage(content: bytes, kind: str, place: int, value: int) -> bytes:
    """Damage a file at `place`, 0 to 10,000."""
    at = place * (len(content) - 1) // 10_000
    if kind == "head":  # most of what bytes can break is there
        at = min(len(content) - 1, place % 400)
    if kind == "cut":
        return content[:at]
    if kind in ("byte", "head"):
        return content[:at] + bytes([value]) + content[at + 1 :]
    if kind == "bytes":
        return content[:at] + struct.pack("<I", value * 0x01020408 % 2**32) + content[at + 4 :]
    if kind == "zeros":
        return content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :]
    if kind == "swap":
        return content[at:] + content[:at]
    if kind == "more":
        return content + content[:at]
    return {"empty": b"", "text": b"<html>404 Not Found</html>", "none": content}[kind]


side = st.integers(1, 70)
sizes = st.one_of(
    *[st.tuples(side, side)] * 3,
    st.tuples(st.integers(1, 3000), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3000)),
    st.tuples(st.sampled_from([255, 256, 257, 600]), st.integers(1, 600)),
)
files = st.builds(
    Written,
    format=st.sampled_from([*PILLOW, "deep png", "tiff", "tiff", "npy"]),
    size=sizes,
    seed=st.integers(0, 3),
    kind=st.integers(0, 511),
    channels=st.sampled_from([1, 2, 3, 4, 13]),
    orientation=st.integers(1, 8),
)
DAMAGES = ["none"] * 8 + ["cut"] * 3 + ["byte", "head", "bytes", "zeros"] * 2 + ["swap", "more", "empty", "text"]
damages = st.tuples(st.sampled_from(DAMAGES), st.integers(0, 10_000), st.integers(0, 255))
asked = dict(
    file=files,
    damaged=damages,
    channels=st.sampled_from([0, 0, 0, 0, 1, 3, 4, 13]),  # 0: as many as the file has
    value_range=st.sampled_from([None, (0, 255), (-10, 65535), (20.5, 60.25)]),
    nodata=st.sampled_from([None, None, 0, 255, -9999, 7.5]),
    min_sides=st.sampled_from([None, None, (1, 1), (16, 30), (500, 500)]),
)


def bands(file: Written) -> int:
    """Return the number of channels of a file."""
    if file.format in PILLOW:
        modes = PILLOW[file.format][1]
        mode = modes[file.kind % len(modes)]
        return {"LA": 2, "P": 3, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    if file.format == "deep png":
        return file.kind % 4 + 1
    return 1 if file.format == "npy" and file.kind // 16 % 4 == 0 else file.channels


def check(file: Written, damaged: tuple, channels: int, value_range, nodata, min_sides) -> None:
    """Check that decoding gives the documented image or DamagedImage, and the image for an intact file."""
    content = damage(make(file), *damaged)
    channels = channels or bands(file)
    options = dict(nodata=nodata, max_pixels=MAX_PIXELS)
    try:
        image = decode(content, PixelFormat(channels, value_range, **options), min_sides=min_sides)
    except DamagedImage as error:
        image, reason = None, str(error)
        assert 0 < len(reason) < 200 and "\n" not in reason
        whole = damaged[0] == "none" and reason != "no pixel with data" and not isinstance(error, WrongPixels)
        assert not whole, reason
    else:
        assert image.dtype == (torch.uint8 if value_range is None else torch.float32)
        assert image.ndim == 3 and len(image) == channels and 0 < image[0].numel() <= MAX_PIXELS
        assert image.permute(1, 2, 0).is_contiguous()
        assert value_range is None or (image.min() >= 0 and image.max() <= 1)  # which NaN is not
        # Of an array with several axes of the asked length, the last is taken for the channel's
        certain = damaged[0] == "none" and not (file.format == "npy" and channels in file.size)
        if certain and (min_sides is None or "jpeg" not in file.format):
            turned = file.orientation >= 5 and file.format not in ("deep png", "npy", "gif", "bmp", "ppm")
            assert tuple(image.shape[1:]) == (file.size[::-1] if turned else file.size)
        if certain and channels == bands(file) and file.format in ("tiff", "deep png", "npy"):
            check_pixels(image, file, value_range, nodata)
    try:
        values = own_values(content, PixelFormat(channels, **options))
    except DamagedImage:
        assert value_range is None or image is None
    else:
        assert values.ndim == 3 and values.shape[2] == channels and values.size > 0
        assert values.dtype in (np.uint8, np.uint16, np.float32)
        if image is not None and value_range is not None and (min_sides is None or "jpeg" not in file.format):
            assert torch.equal(decode(values, PixelFormat(channels, value_range, nodata)), image)
    try:
        mask = decode_stored(content, max_pixels=MAX_PIXELS)
    except DamagedImage as error:
        assert str(error)
    else:
        assert mask.ndim in (2, 3) and mask.size > 0


def check_pixels(image: torch.Tensor, file: Written, value_range, nodata) -> None:
    """Check the pixels with data of an intact file of numbers."""
    numbers = stored(file).astype(np.float64)
    missing = ~np.isfinite(numbers) | (numbers == nodata)
    if file.format == "tiff":
        missing |= (numbers == 0) & bool(file.kind & 256)
        upright = {
            2: lambda array: array[:, ::-1],
            3: lambda array: np.rot90(array, 2),
            4: lambda array: array[::-1],
            5: lambda array: array.swapaxes(0, 1),
            6: lambda array: np.rot90(array, -1),
            7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
            8: lambda array: np.rot90(array, 1),
        }.get(file.orientation, lambda array: array)
        numbers, missing = upright(numbers), upright(missing)
    pixels, tolerance = image.permute(1, 2, 0).numpy(), 1e-5
    if value_range is None:
        value_range = (0, 65535 if stored(file).dtype == np.uint16 else 255)
        pixels, tolerance = pixels / 255, 1.01 / 255
        missing = missing | (numbers // 256 == nodata)  # of 16-bit colour in TIFF and PNG Pillow cuts off the low byte
    low, high = value_range
    error = np.abs(np.clip((numbers - low) / (high - low), 0, 1) - pixels)
    assert error[~missing].max(initial=0) < tolerance


EXACT = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@settings(EXACT, max_examples=800)
@given(**asked)
def test_any_file_gives_an_image_or_is_damaged(**drawn):
    check(**drawn)


@pytest.mark.slow
@settings(EXACT, max_examples=50_000)
@given(**asked)
def test_very_many_files_give_images_or_are_damaged(**drawn):
    check(**drawn)
