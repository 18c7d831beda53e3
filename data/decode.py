"""Bytes to pixels: every format and mode that Pillow reads, as uint8, and what counts as damaged.

The bytes decide what a file is, never its name. Baseline and progressive JPEG take torchvision's decoder, which gives
Pillow's pixels in less time; all else, and whatever that decoder refuses, takes Pillow.
"""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that its decoders will go: Pillow then reads JPEG too, only slower
    decode_jpeg = None


class DamagedImage(ValueError):
    """Bytes from which no whole image can be read. `str(error)` is the reason, a few words without the file's name."""


def decode(data: bytes, channels: int) -> torch.Tensor:
    """The image in `data`, turned upright by its EXIF orientation: uint8 (channels, H, W), 3 for RGB or 1 for grey.

    Palettes are resolved, transparency is dropped, 16-bit grey is scaled to 8 bits (65535 -> 255); of an animation the
    first frame is taken. Grey of a colour JPEG is the luma it stores. The memory order is (H, W, channels), from which
    crops resize fastest, unless EXIF turned a JPEG by a quarter.

    Raises DamagedImage for what is empty, truncated, no image, larger than Pillow's limit for decompression bombs
    (2 * Image.MAX_IMAGE_PIXELS), or has 32-bit pixels, whose range no file states; ValueError for other `channels`.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; expected 3 (RGB) or 1 (grey)")
    if not data:
        raise DamagedImage("empty file")
    if decode_jpeg is not None and _is_plain_jpeg(data):
        mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
        # A refusal is not yet a verdict: Pillow reads some files that torchvision does not (no end marker, ...).
        # The other is the announcement above, where warnings are made errors.
        with contextlib.suppress(RuntimeError, DeprecationWarning):
            # The bytearray is a copy, but frombuffer() warns about memory that cannot be written to.
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(encoded, mode, apply_exif_orientation=True)
    return torch.from_numpy(_decode_with_pillow(data, channels)).permute(2, 0, 1)


def decode_stored(data: bytes) -> np.ndarray:
    """The pixels of a mask as the file stores them, turned upright: (H, W), or (H, W, n) where they are in colour.

    Of a palette the numbers are taken, 1-bit files give 0 and 1, 16-bit grey keeps its range. Raises DamagedImage.
    """
    with _opened(data) as image:
        return np.array(image)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether the header announces 8-bit grey or three-channel pixels, of a number that is safe to allocate.

    torchvision allocates what the header claims before it reads a pixel, and has its own idea of CMYK.
    """
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in (0xC0, 0xC1, 0xC2):  # frame header: length, precision, height, width, components
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            limit = Image.MAX_IMAGE_PIXELS
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and (limit is None or height * width <= 2 * limit)
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@contextlib.contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image in `data`, read and turned upright; raises DamagedImage, also for what fails inside the block."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # a program in PostScript, which Pillow would have Ghostscript run
                raise DamagedImage("EPS is a drawing, not pixels")
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF beside whole pixels: they are kept as stored
                ImageOps.exif_transpose(image, in_place=True)
            yield image
    except DamagedImage:
        raise
    except UnidentifiedImageError:
        reason = f"not an image: begins with {bytes(data[:8])!r}" if data else "empty file"
        raise DamagedImage(reason) from None  # Pillow names an address
    except Exception as error:  # Pillow's readers raise nearly any type: OSError, SyntaxError, struct.error, ...
        raise DamagedImage(str(error) or type(error).__name__) from error


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    """(H, W, channels) uint8."""
    with _opened(data) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            values = np.asarray(image).astype(np.uint32)  # Pillow's own conversion clips at 255
            grey = ((values + 128) // 257).astype(np.uint8)
            return np.repeat(grey[:, :, None], channels, axis=2)
        if image.mode in ("I", "F"):
            raise DamagedImage(f"32-bit pixels (Pillow mode {image.mode}), whose range the file does not state")
        if image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # by this way transparent palette entries raise no warning
        pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)
