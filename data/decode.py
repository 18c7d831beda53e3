"""Bytes to pixels: JPEG, PNG, TIFF and GeoTIFF, `.npy` and whatever else Pillow reads, and what counts as damaged.

The bytes decide what a file is, never its name. Baseline and progressive JPEG take simplejpeg (libjpeg-turbo), which
gives Pillow's pixels in less time; numbers that Pillow would shorten take tifffile (many bands, signed, float) or
imagecodecs (16-bit colour in PNG); all else, and whatever simplejpeg refuses, takes Pillow.
"""

import contextlib
import io
import logging
import math
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

try:
    from simplejpeg import decode_jpeg
except ImportError:  # Pillow then reads JPEG too, only slower
    decode_jpeg = None

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 178,956,970: from there on Pillow speaks of a decompression bomb
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# None, LZW, deflate (two numbers), PackBits, ZSTD: those that cannot give more bytes than the page has pixels. (Of LZMA
# that is cut, imagecodecs gives what was in memory before.)
TIFF_COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)
LOGGERS = [logging.getLogger(name) for name in ("tifffile", "PIL.TiffImagePlugin")]
BITS, PLANAR = 258, 284  # TIFF tags: bits per sample; 2 where each band lies by itself
GDAL_NODATA = 42113  # the TIFF tag by which a file itself says what stands where there are no data
LZW, LZW_CLEAR = 5, 256  # TIFF's number for this compression, and the code that clears the table
# Of the codes after a clearing, by their number: the highest string that is known, the width in bits, and the first bit
LZW_KNOWN = np.minimum(np.concatenate([[255], 258 + np.arange(3837 + 2)]), 4095)
LZW_WIDTHS = np.digitize(np.maximum(LZW_KNOWN, 258), [511, 1023, 2047]) + 9
LZW_STARTS = np.cumsum(LZW_WIDTHS) - LZW_WIDTHS
LZW_WEIGHTS = 1 << np.arange(11, -1, -1)


class DamagedImage(ValueError):
    """Bytes from which no whole image can be read. `str(error)` is the reason, a few words without the file's name."""

    def __init__(self, reason: str):
        super().__init__(reason[:200])  # some libraries quote what they do not understand


class WrongPixels(DamagedImage):
    """A whole image, but its channels or numbers are not those that were asked for."""


class WrongChannels(WrongPixels):
    """A whole image, but its channels are not those that were asked for."""

    def __init__(self, found: int, expected: int):
        super().__init__(f"has {found} channels, expected {expected}; give --input_channels {found}")


class _UnknownFormat(DamagedImage):
    """What Pillow does not read at all."""


class PixelFormat(NamedTuple):
    """What the images of a run are read as: arguments of decode()."""

    channels: int = 3
    value_range: tuple[float, float] | None = None  # what becomes 0 and 1; None: 8-bit pixels
    nodata: float | None = None  # the number that stands where there are no data
    max_pixels: int = MAX_PIXELS

    @property
    def dtype(self) -> torch.dtype:
        """Of the images."""
        return torch.uint8 if self.value_range is None else torch.float32


def preview_channels(pixels: PixelFormat) -> list[int] | None:
    """The channels that a picture shows unless others are asked for; None where the image is one as it is."""
    if pixels.value_range is None and pixels.channels in (1, 3):
        return None
    return [0, 1, 2] if pixels.channels >= 3 else [0]


def decode(
    data,
    channels: int,
    *,
    value_range: tuple[float, float] | None = None,
    nodata: float | None = None,
    max_pixels: int = MAX_PIXELS,
    min_sides: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The image in `data`, turned upright by its orientation tag: (channels, H, W), in memory (H, W, channels), from
    which crops resize fastest.

    `data` is bytes or any other buffer. Of an animation, of pages and of a (T, H, W, C) array the first is taken.

    Without a `value_range` the result is uint8. Where `channels` is 3 or 1, colour and grey become each other (grey of
    a colour JPEG is the luma it stores), palettes are resolved and transparency is dropped; any other number, and the
    channels of arrays and of TIFFs that Pillow does not read, must be the file's own. 16 bits are scaled to 8
    (65535 -> 255).

    With `value_range` (lo, hi) the result is float32, (x - lo) / (hi - lo) of the numbers x that the file stores,
    clipped to [0, 1]. The channels must be the file's own, but transparency is dropped where they then fit.

    Numbers that are `nodata`, that the file itself declares to be so, or that are not finite become the mean of all
    other numbers of their channel. `min_sides` (height, width) allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its
    size, as long as both sides stay at least so long.

    Raises DamagedImage for what is empty, truncated, no image, of more than `max_pixels` pixels, has no pixel with
    data, or has numbers whose range no file states while there is no `value_range`; WrongChannels; ValueError for
    `channels` below 1.
    """
    exact = value_range is not None
    values, own_nodata = _read(data, channels, exact=exact, max_pixels=max_pixels, min_sides=min_sides)
    return _tensor(values, value_range, nodata, own_nodata)


def own_values(data, channels: int, *, nodata: float | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The numbers that the file stores, upright: (H, W, channels) uint8 or uint16, else float32.

    Where some are `nodata`, declared to be so by the file, or not finite, the result is float32 with NaN in their
    places. It may be a view of `data`, which cannot be written to. Raises what decode() raises with a value range.
    """
    values, own_nodata = _read(data, channels, exact=True, max_pixels=max_pixels)
    values, missing = _without_data(values, nodata, own_nodata)
    if missing is not None:
        values = values.astype(np.float32)
        values[missing] = np.nan
    return values


def from_own_values(
    values: np.ndarray, channels: int, *, value_range: tuple[float, float] | None = None, nodata: float | None = None
) -> torch.Tensor:
    """What decode() makes of numbers (H, W, C) as own_values() gives them: (channels, H, W).

    A writable uint8 array comes back as a view of it, where there is neither `value_range` nor `nodata`. Raises
    DamagedImage and WrongChannels.
    """
    if values.shape[2] != channels:
        raise WrongChannels(values.shape[2], channels)
    return _tensor(values, value_range, nodata)


def decode_stored(data, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The pixels of a mask as the file stores them, turned upright: (H, W), or (H, W, n) where they are in colour.

    Of a palette the numbers are taken, 1-bit files give 0 and 1, 16-bit grey keeps its range; of an `.npy` file or a
    TIFF that Pillow does not read, the numbers in their own type. Raises DamagedImage.
    """
    data = _bytes(data)
    with _quiet():
        if data[:6] == b"\x93NUMPY":
            array = _first_image(_npy(data))
            if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
                array = _hwc(array, 1, max_pixels)[:, :, 0]
            _check_size(*array.shape[:2], max_pixels)
            return array
        try:
            with _opened(data, max_pixels) as (image, orientation):
                return _upright(np.array(image), orientation)
        except DamagedImage:
            if data[:4] not in TIFF_STARTS:
                raise
            values, _ = _read_tiff(data, 1, max_pixels)  # what Pillow was not built for
            return values[:, :, 0]


# What the file stores: functions that give numbers (H, W, C), and the number that the file itself declares to be nodata


def _read(
    data, channels: int, *, exact: bool, max_pixels: int, min_sides: tuple[int, int] | None = None
) -> tuple[np.ndarray, float | None]:
    """The numbers (H, W, channels), upright, of any number type, and the file's own nodata.

    `exact`: they are the file's own, at their full depth; otherwise what Pillow makes of them for 1 or 3 channels.
    """
    if channels < 1:
        raise ValueError(f"channels is {channels}; expected 1 (grey), 3 (RGB) or the number of an image's bands")
    data = _bytes(data)
    if not data:
        raise DamagedImage("empty file")
    if data[:2] == b"\xff\xd8":
        header = _jpeg_header(data)
        if header is not None:
            _check_size(header.height, header.width, max_pixels)
            if exact or channels not in (1, 3):
                _check_channels(header.components, channels)
            pixels = _decode_jpeg(data, channels, header, min_sides)
            if pixels is not None:
                return pixels, None
    with _quiet():
        if data[:6] == b"\x93NUMPY":
            return _hwc(_npy(data), channels, max_pixels), None
        is_tiff = data[:4] in TIFF_STARTS
        if is_tiff and (exact or channels not in (1, 3)):
            return _read_tiff(data, channels, max_pixels)
        # IHDR comes first: 16 bits of colour or of transparency, which Pillow shortens to 8
        if exact and data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6):
            return _read_deep_png(data, channels, max_pixels), None
        try:
            return _read_with_pillow(data, channels, exact=exact, max_pixels=max_pixels)
        except DamagedImage as pillows:
            if not is_tiff:
                raise
            try:  # which reads more: bands in planes, 8 bits in five bands, ...
                return _read_tiff(data, channels, max_pixels)
            except DamagedImage as own:
                raise own if isinstance(pillows, _UnknownFormat) else pillows from None


class _JpegHeader(NamedTuple):
    height: int
    width: int
    components: int
    orientation: int  # of EXIF, 1 to 8


def _jpeg_header(data: bytes | memoryview) -> _JpegHeader | None:
    """The header of a JPEG with 8-bit grey or three-channel pixels; None where Pillow must have the say.

    libjpeg-turbo allocates what the header claims before it reads a pixel, and has its own idea of CMYK.
    """
    at, frame, exif, xmp = 2, None, None, False
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == 0xDA:  # the scan begins
            orientation = None if exif is None else _exif_orientation(exif)
            if frame is None or (orientation is None and xmp):
                return None
            return _JpegHeader(*frame, orientation or 1)
        if marker <= 0x01 or 0xD0 <= marker <= 0xD9:  # has no length: not a header as others write it
            return None
        length = data[at + 2] << 8 | data[at + 3]
        if marker in (0xC0, 0xC1, 0xC2):  # length, precision, height, width, components
            frame = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8], data[at + 9]
            if data[at + 4] != 8 or frame[2] not in (1, 3) or not frame[0]:
                return None
        elif marker == 0xE1:
            payload = bytes(data[at + 4 : at + 2 + length])
            if payload[:6] == b"Exif\0\0":
                if exif is not None:  # continued
                    return None
                exif = payload
            elif b"tiff:Orientation" in payload:  # of XMP, which counts where EXIF says nothing
                xmp = True
        at += 2 + length
    return None


def _exif_orientation(exif: bytes) -> int | None:
    """1 to 8, or None; broken EXIF beside whole pixels says nothing."""
    if b"\x12\x01" in exif or b"\x01\x12" in exif:  # the tag's number: most EXIF is done with here
        with _quiet(), contextlib.suppress(Exception):
            tags = Image.Exif()
            tags.load(exif)
            orientation = tags.get(ExifTags.Base.Orientation)
            return orientation if orientation in range(1, 9) else None
    return None


def _decode_jpeg(
    data: bytes | memoryview, channels: int, header: _JpegHeader, min_sides: tuple[int, int] | None
) -> np.ndarray | None:
    """Upright pixels (H, W, channels) uint8; None for a refusal, which is not yet a verdict: Pillow reads some files
    that libjpeg-turbo only warns of (no end marker, ...)."""
    if decode_jpeg is None:
        return None
    scale = {}
    if min_sides is not None:
        least = min_sides if header.orientation < 5 else min_sides[::-1]
        for factor in (8, 4, 2):
            sides = -(-header.height // factor), -(-header.width // factor)
            if sides[0] >= least[0] and sides[1] >= least[1]:
                scale = dict(min_height=sides[0], min_width=sides[1], min_factor=factor)
                break
    try:
        pixels = decode_jpeg(data, "RGB" if channels == 3 else "GRAY", **scale)
    except ValueError:
        return None
    return pixels if header.orientation == 1 else _upright(pixels, header.orientation)


def _read_with_pillow(data: bytes, channels: int, *, exact: bool, max_pixels: int) -> tuple[np.ndarray, float | None]:
    converts = not exact and channels in (1, 3)
    with _opened(data, max_pixels) as (image, orientation):
        nodata = _number(image.tag_v2.get(GDAL_NODATA)) if hasattr(image, "tag_v2") else None
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            values = np.asarray(image).astype(np.uint16)  # Pillow's own conversion to 8 bits clips at 255
            if converts:
                values = np.repeat(values[:, :, None], channels, axis=2)
        elif image.mode in ("I", "F"):
            values = np.array(image)
        else:
            if image.mode in ("P", "PA"):
                # By way of RGBA transparent palette entries raise no warning
                image = image.convert("RGBA" if converts or image.has_transparency_data else "RGB")
            if converts:
                image = image.convert("RGB" if channels == 3 else "L")
            elif image.mode == "1":
                image = image.convert("L")
            elif image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
                image = image.convert("RGB")
            values = np.array(image)
    values = _upright(values, orientation)
    values = values.reshape(*values.shape[:2], -1)
    has_alpha = image.mode in ("LA", "RGBA")
    if values.dtype in (np.uint8, np.uint16):  # of other numbers decode() has more to say than how many they are
        return _without_alpha(values, channels, has_alpha), nodata
    return values, nodata


def _read_deep_png(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """A PNG of 16 bits with several channels: (H, W, channels) uint16."""
    from imagecodecs import png_decode

    # Pillow reads it first, as imagecodecs never gives back the memory of an image that it fails to read.
    with _opened(data, max_pixels) as (image, orientation):
        values = png_decode(bytes(data)).reshape(image.height, image.width, -1)
    values = _upright(values, orientation)
    return _without_alpha(values, channels, values.shape[2] in (2, 4))


def _read_tiff(data: bytes, channels: int, max_pixels: int) -> tuple[np.ndarray, float | None]:
    from tifffile import PHOTOMETRIC, TiffFile

    with _damage(), TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        _check_size(page.imagelength, page.imagewidth, max_pixels)
        if page.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR, PHOTOMETRIC.CIELAB) or page.bitspersample < 8:
            return _read_with_pillow(data, channels, exact=True, max_pixels=max_pixels)
        if page.dtype is None or page.dtype.kind not in "uif":
            raise DamagedImage(f"a TIFF of {page.dtype} numbers, which are not read")
        nodata = page.tags.get(GDAL_NODATA)
        nodata = _number(nodata.value) if nodata is not None else None
        orientation = page.tags.get(ExifTags.Base.Orientation)
        orientation = orientation.value if orientation is not None else 1

        bands, has_alpha = page.samplesperpixel, bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
        if bands == channels or (has_alpha and bands == channels + 1):
            _check_tiff_page(page, data, max_pixels)
            room = np.zeros(page.shaped, page.dtype)  # of what is cut, tifffile leaves parts as it found them
            values = page.asarray(squeeze=False, maxworkers=1, out=room)[:, 0]  # (separate bands, H, W, bands)
            values = np.moveaxis(values, 0, 2).reshape(*values.shape[1:3], bands)
            return _without_alpha(_upright(values, orientation), channels, has_alpha), nodata

        # Bands that were written as pages, one each, which libraries make of arrays whose axes they do not know
        stack = tiff.series[0]
        if bands != 1 or len(stack.shape) != 3 or channels not in (stack.shape[0], stack.shape[2]):
            raise WrongChannels(bands, channels)
        for each in stack.pages:
            _check_tiff_page(each, data, max_pixels)
        room = np.zeros(stack.shape, stack.dtype)
        return _hwc(stack.asarray(maxworkers=1, out=room), channels, max_pixels), nodata


def _check_tiff_page(page, data: bytes | memoryview, max_pixels: int) -> None:
    """Raises DamagedImage for what tifffile would not refuse, or only after it has allocated it."""
    frame = page.keyframe
    if frame.compression not in TIFF_COMPRESSIONS:
        raise DamagedImage(f"TIFF compression {frame.compression} is not read for such numbers")
    if frame.is_tiled:
        _check_size(frame.tilelength, frame.tilewidth, max(max_pixels, 2**20))  # small images have large tiles
    if len(page.dataoffsets) < math.prod(page.chunked) and not frame.is_contiguous:
        raise DamagedImage("truncated: parts of the image are not in the file")
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=False):
        if offset + length > len(data):
            raise DamagedImage("truncated: parts of the image are not in the file")
        if frame.compression == LZW and not _lzw_is_whole(data[offset : offset + length]):
            raise DamagedImage("broken (LZW)")


def _lzw_is_whole(data: bytes | memoryview) -> bool:
    """Whether no code of LZW data in a TIFF (Welch 1984; TIFF 6.0, section 13) means a string that is not there yet.

    imagecodecs does not look, and crashes. A code's place follows from its number since the table was last cleared, so
    that all codes up to the next clearing are looked at at once.
    """
    bits, at = np.unpackbits(np.frombuffer(data, np.uint8)), 0
    padded = np.concatenate([bits, np.zeros(12, np.uint8)])
    while at + 9 <= len(bits):
        starts = at + LZW_STARTS
        count = int(np.searchsorted(starts + LZW_WIDTHS, len(bits), side="right"))
        window = padded[starts[:count, None] + np.arange(12)]
        codes = window @ LZW_WEIGHTS >> (12 - LZW_WIDTHS[:count])
        ends = np.flatnonzero((codes == LZW_CLEAR) | (codes == LZW_CLEAR + 1))
        used = int(ends[0]) if len(ends) else count
        if (codes[:used] > LZW_KNOWN[:used]).any():
            return False
        if used == count:
            return used < len(LZW_STARTS)  # a full table is cleared
        if codes[used] != LZW_CLEAR:
            return True
        at = int(starts[used] + LZW_WIDTHS[used])
    return True


def _npy(data: bytes | memoryview) -> np.ndarray:
    """The array in an `.npy` file, of numbers, as a view of `data` unless their bytes have another order."""
    with _damage():
        head = io.BytesIO(bytes(data[: 2**16]))
        version = np.lib.format.read_magic(head)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_fortran_order, dtype = read_header(head)
        if dtype.kind not in "buif":
            raise DamagedImage(f"an array of {dtype}, expected numbers")
        if min(shape, default=1) < 0:
            raise DamagedImage(f"an array of shape {shape}")
        count = math.prod(shape)
        if head.tell() + count * dtype.itemsize > len(data):
            raise DamagedImage(f"truncated: an array of shape {shape} has more than the file's {len(data)} bytes")
        array = np.frombuffer(data, dtype, count, head.tell()) if count else np.empty(0, dtype)
        array = array.reshape(shape, order="F" if in_fortran_order else "C")
        return array.view(np.uint8) if dtype.kind == "b" else array.astype(dtype.newbyteorder("="), copy=False)


def _first_image(array: np.ndarray) -> np.ndarray:
    """(H, W) or a three-dimensional array; of more dimensions the first image. Raises DamagedImage."""
    if array.ndim < 2 or not array.size:
        raise DamagedImage(f"an array of shape {array.shape}, expected (H, W), (H, W, C) or (C, H, W)")
    while array.ndim > 3:
        array = array[0]
    return array


def _hwc(array: np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    """(H, W), (H, W, channels), (channels, H, W) or several of these -> the first, as (H, W, channels)."""
    array = _first_image(array)
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.shape[2] != channels and array.shape[0] == channels:
        array = np.moveaxis(array, 0, 2)
    if array.shape[2] != channels:
        raise WrongChannels(min(array.shape[0], array.shape[2]) if array.shape[2] > 1 else 1, channels)
    _check_size(*array.shape[:2], max_pixels)
    return np.ascontiguousarray(array)


def _bytes(data) -> bytes | memoryview:
    return data if isinstance(data, bytes) else memoryview(data).cast("B")


def _number(text) -> float | None:
    """What GDAL's tag says."""
    try:
        return float(text.strip(" \0") if isinstance(text, str) else text)
    except (TypeError, ValueError):
        return None


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DamagedImage(f"{height} x {width} pixels, more than the {max_pixels} allowed; raise --max_pixels")


def _check_channels(found: int, expected: int) -> None:
    if found != expected:
        raise WrongChannels(found, expected)


def _without_alpha(values: np.ndarray, channels: int, has_alpha: bool) -> np.ndarray:
    """(H, W, channels): the last channel, if it is transparency, is dropped where the others are those asked for."""
    if has_alpha and values.shape[2] == channels + 1:
        values = np.ascontiguousarray(values[:, :, :channels])
    _check_channels(values.shape[2], channels)
    return values


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) turned and mirrored as EXIF's numbers 2 to 8 say, in row-major order."""
    if orientation not in range(2, 9):
        return np.ascontiguousarray(pixels)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels.copy()  # ascontiguousarray() would leave a negative stride where a side is 1


@contextlib.contextmanager
def _opened(data: bytes | memoryview, max_pixels: int) -> Iterator[tuple[Image.Image, int]]:
    """The image in `data`, as stored, and its orientation; raises DamagedImage, also for what fails in the block."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels / 2
    try:
        with _damage(), Image.open(io.BytesIO(data)) as image:
            if image.format == "EPS":  # a program in PostScript, which Pillow would have Ghostscript run
                raise DamagedImage("EPS is a drawing, not pixels")
            tags = getattr(image, "tag_v2", {})
            if tags.get(PLANAR) == 2 and max(tags.get(BITS, (1,))) > 8:  # whose bytes Pillow puts in wrong places
                raise _UnknownFormat("a TIFF of planes that Pillow does not read")
            image.load()
            orientation = 1
            with contextlib.suppress(Exception):  # broken EXIF beside whole pixels: they are kept as stored
                orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            yield image, orientation
    except Image.DecompressionBombError as error:
        (pixels,) = re.findall(r"\((\d+) pixels\)", str(error)) or ["too many"]
        raise DamagedImage(f"{pixels} pixels, more than the {max_pixels} allowed; raise --max_pixels") from None
    except UnidentifiedImageError:  # whose own message has an address
        reason = f"not an image: begins with {bytes(data[:8])!r}" if data else "empty file"
        raise _UnknownFormat(reason) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Makes DamagedImage of what the libraries raise: nearly any type, OSError, SyntaxError, struct.error, ..."""
    try:
        yield
    except (DamagedImage, Image.DecompressionBombError, UnidentifiedImageError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if not reason or not isinstance(error, OSError | ValueError | SyntaxError | RuntimeError):
            # Such as a KeyError, of a structure that leads nowhere
            reason = f"broken ({type(error).__name__} {reason})"
        raise DamagedImage(reason[:120]) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and messages: what matters of them is raised."""
    loggers = [logger for logger in LOGGERS if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


# From the file's numbers to those of a batch


def _without_data(values: np.ndarray, *nodata: float | None) -> tuple[np.ndarray, np.ndarray | None]:
    """The numbers as uint8, uint16 or else float32, and where there are no data: a mask of the same shape, or None."""
    missing = False
    with np.errstate(all="ignore"):
        numbers = {float(number) for number in nodata if number is not None}
        if values.dtype.kind == "f":
            numbers = {float(values.dtype.type(number)) for number in numbers}  # rounded as the file's own are
        if values.dtype not in (np.uint8, np.uint16):
            values = values.astype(np.float32, copy=False)
            missing = ~np.isfinite(values)
        for number in numbers:
            # A whole number is compared in the array's own type, which one beyond it does not equal.
            missing |= values == (int(number) if values.dtype.kind == "u" and number.is_integer() else number)
    return values, missing if np.any(missing) else None


def _tensor(values: np.ndarray, value_range: tuple[float, float] | None, *nodata: float | None) -> torch.Tensor:
    """(H, W, C) as stored -> (C, H, W), uint8 or float32: numbers that are no data are filled, then all are scaled."""
    as_it_is = value_range is None and values.dtype == np.uint8 and values.flags.writeable
    if as_it_is and all(number is None for number in nodata):  # the usual case
        return torch.from_numpy(values).permute(2, 0, 1)
    if value_range is None and values.dtype not in (np.uint8, np.uint16):
        raise WrongPixels(f"has {values.dtype} numbers, whose range no file states; give --value_range MIN MAX")
    values, missing = _without_data(values, *nodata)
    if value_range is not None:
        values = values.astype(np.float32, order="C")
    elif missing is not None or not values.flags.writeable:
        values = values.copy()
    if missing is not None:
        _fill(values, missing)
    if value_range is not None:
        low, high = value_range
        with np.errstate(all="ignore"):
            values -= low
            values /= high - low
        np.clip(values, 0, 1, out=values)
    elif values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)


def _fill(values: np.ndarray, missing: np.ndarray) -> None:
    """Puts the mean of a channel's other numbers where they are `missing` in (H, W, C). Raises DamagedImage."""
    for channel in np.flatnonzero(missing.any(axis=(0, 1))):
        band, hole = values[:, :, channel], missing[:, :, channel]
        if hole.all():
            raise DamagedImage("no pixel with data")
        mean = band[~hole].mean(dtype=np.float64)
        band[hole] = mean if values.dtype.kind == "f" else round(mean)
