"""Check and convert pixel arrays (H, W, C): size, channels, orientation and missing values; recognize file starts."""

import codecs
import contextlib
from collections.abc import Iterator

import numpy as np
from PIL import UnidentifiedImageError


class DamagedImage(ValueError):
    """Raised for data without a complete image; `str(error)` is the reason, without the file's name."""


class WrongPixels(DamagedImage):
    """Raised for an intact image with other channels or another number type than requested."""


class WrongChannels(WrongPixels):
    """Raised for an intact image with another number of channels than requested."""

    def __init__(self, channels: int, expected: int):
        super().__init__(f"has {channels} channels, expected {expected}; give --input_channels {channels}")
        self.channels = channels


@contextlib.contextmanager
def damage_errors() -> Iterator[None]:
    """Turn the errors of image libraries, which have nearly any type, into DamagedImage."""
    try:
        yield
    except (DamagedImage, UnidentifiedImageError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, OSError | ValueError | SyntaxError | RuntimeError):
            # The messages of other types, such as KeyError, mean nothing without the type
            reason = f"broken ({type(error).__name__} {reason})"
        raise DamagedImage(reason[:120]) from error  # some messages quote long bytes


def is_pointer(start: bytes) -> bool:
    """Return True for the first bytes of a Git LFS pointer, which replaces a file that was not downloaded."""
    return start.startswith(b"version https://git-lfs")


def describe_start(data: bytes | memoryview) -> str:
    """Describe a file of an unexpected format by its first bytes."""
    start = bytes(data[:64]).lstrip().lower()
    if is_pointer(start):
        return "a Git LFS pointer in place of the file; run git lfs pull"
    if start.startswith((b"<!doctype html", b"<html")):
        return "a page in HTML, as a failed download leaves it"
    return f"begins with {bytes(data[:8])!r}"


def text_encoding(data: bytes) -> str:
    """Return the encoding of a text: UTF-16 if it begins with the byte order mark of that, otherwise UTF-8."""
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise DamagedImage if an image has more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise DamagedImage(f"{height} x {width} pixels, more than the {max_pixels} allowed; raise --max_pixels")


def check_channels(channels: int, expected: int) -> None:
    """Raise WrongChannels if the two numbers differ."""
    if channels != expected:
        raise WrongChannels(channels, expected)


def channels_last(array: np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    """Convert (H, W), (H, W, channels), (channels, H, W), or the first of several, to (H, W, channels)."""
    if array.ndim < 2 or not array.size:
        raise DamagedImage(f"an array of shape {array.shape}, expected (H, W), (H, W, C) or (C, H, W)")
    while array.ndim > 3:
        array = array[0]
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] != channels:
        raise WrongChannels(min(array.shape[0], array.shape[2]) if array.shape[2] > 1 else 1, channels)
    check_size(*array.shape[:2], max_pixels)
    return np.ascontiguousarray(array)


def drop_alpha(values: np.ndarray, channels: int, has_alpha: bool) -> np.ndarray:
    """Return (H, W, channels), without the last channel if it is transparency and one too many."""
    if has_alpha and values.shape[2] == channels + 1:
        values = np.ascontiguousarray(values[:, :, :channels])
    check_channels(values.shape[2], channels)
    return values


def turn_upright(values: np.ndarray, orientation: int | None) -> np.ndarray:
    """Return (H, W, ...) rotated and mirrored by an EXIF orientation from 2 to 8, in row-major order."""
    if orientation not in range(2, 9):
        return np.ascontiguousarray(values)
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return values.copy()  # ascontiguousarray() would leave a negative stride where a side is 1


def find_missing(values: np.ndarray, *nodata: float | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the values as uint8, uint16 or otherwise float32, and a mask of missing values, None if all have data."""
    numbers = {float(number) for number in nodata if number is not None}
    if not numbers and values.dtype in (np.uint8, np.uint16):  # nothing can be missing
        return values, None
    missing = False
    with np.errstate(all="ignore"):
        if values.dtype.kind == "f":
            numbers = {float(values.dtype.type(number)) for number in numbers}  # rounded like the file's numbers
        if values.dtype not in (np.uint8, np.uint16):
            values = values.astype(np.float32, copy=False)
            missing = ~np.isfinite(values)
        for number in numbers:
            # NumPy compares a Python integer exactly with arrays of any integer type, even if it is out of their range.
            missing |= values == (int(number) if values.dtype.kind == "u" and number.is_integer() else number)
    return values, missing if np.any(missing) else None


def add_invalid(missing: np.ndarray | None, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Add all values of the pixels that a validity mask (H, W) excludes to the mask of missing values (H, W, C).

    A validity mask is 0 for invalid pixels, and 1, 255 or the maximum of its integer type for valid ones. Raises
    WrongPixels for other values or another size.
    """
    if mask.shape != shape[:2]:
        sizes = [" x ".join(map(str, size)) for size in (mask.shape, shape[:2])]
        expected = "expected grey of the image's size, {}; correct the mask"
        raise WrongPixels(f"has a validity mask of {{}}; {expected}".format(*sizes))
    known = np.isin(mask, (0, 1, 255, np.iinfo(mask.dtype).max if mask.dtype.kind in "ui" else 1))
    if not known.all():
        values = "expected 0 for invalid pixels, 1 or 255 for valid ones; correct the mask"
        raise WrongPixels(f"has a validity mask with the value {mask[~known][0]:g}; {values}")
    invalid = np.broadcast_to((mask == 0)[:, :, None], shape)
    return invalid if missing is None else missing | invalid


def fill_missing(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """Return a copy of (H, W, C) with missing values replaced by the mean of their channel. Raises DamagedImage."""
    values = values.copy()
    for channel in np.flatnonzero(missing.any(axis=(0, 1))):
        band, hole = values[:, :, channel], missing[:, :, channel]
        if hole.all():
            raise DamagedImage("no pixel with data")
        mean = band[~hole].mean(dtype=np.float64)
        band[hole] = mean if values.dtype.kind == "f" else round(mean)
    return values
