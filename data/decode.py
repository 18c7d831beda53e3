"""Decode bytes to pixels: JPEG, PNG, TIFF and GeoTIFF, `.npy`, and every other format that Pillow reads.

The content decides the format, never the name. simplejpeg (libjpeg-turbo) decodes baseline and progressive JPEG to the
same pixels as Pillow, in less time. tifffile and imagecodecs decode numbers that Pillow would truncate: many bands,
signed, float, and 16-bit colour in PNG. Pillow decodes all others, and JPEGs that simplejpeg refuses.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from simplejpeg import decode_jpeg, decode_jpeg_header

from data.tiff import GDAL_NODATA, parse_nodata, read_tiff
from data.values import (
    DamagedImage,
    WrongChannels,
    WrongPixels,
    add_invalid,
    channels_last,
    check_channels,
    check_size,
    damage_errors,
    describe_start,
    drop_alpha,
    fill_missing,
    find_missing,
    turn_upright,
)

MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # 178,956,970: Pillow calls larger images decompression bombs
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
IMAGE_STARTS = re.compile(  # first bytes of formats for photographs: TGA has no signature, and icons are left out
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|BM.{4}\x00{4}|RIFF.{4}WEBP|.{4}ftypavi[fs]|II[*+]\x00|MM\x00[*+]"
    rb"|\x00{3}\x0cjP  |\xff\x4f\xff\x51|P[1-6]\s+[\d#]|P[fF]\s+\d|\x93NUMPY|8BPS|qoif|DDS |SIMPLE  ="
    rb"|\x01\xda[\x00\x01][\x01\x02]|\x59\xa6\x6a\x95|\n[\x00\x02\x03\x05]\x01[\x01\x02\x04\x08]",
    re.DOTALL,
)
# Marks of invalid pixels: missing values only, or also zeros in the last channel of an image or in a separate mask
VALIDITY = ("nodata", "channel", "mask")
# Values of valid pixels in the channel that `decode` adds to uint8 and float images; invalid pixels are 0. They lie in
# the middle of the range because a cubic filter has negative weights: invalid pixels may lower or raise a value.
VALID_BYTE, VALID_FLOAT = 128, 0.5
BITS, PLANAR = 258, 284  # TIFF tags: bits per sample; 2 where each band is stored separately

for library in ("tifffile", "PIL.TiffImagePlugin"):  # errors that matter are raised
    logging.getLogger(library).disabled = True


class _UnknownFormat(DamagedImage):
    """Report bytes that Pillow does not read at all."""


class PixelFormat(NamedTuple):
    """The pixel format in which a run reads its images."""

    channels: int = 3  # 1 (grey), 3 (RGB) or the number of an image's bands
    value_range: tuple[float, float] | None = None  # numbers that become 0 and 1, others are clipped; None: 8 bits
    nodata: float | None = None  # the number that marks missing values
    max_pixels: int = MAX_PIXELS  # larger images count as damaged
    validity: str | None = None  # the mark of invalid pixels, one of VALIDITY; `decode` adds a channel for it

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.value_range is None else torch.float32

    @property
    def stored_channels(self) -> int:
        return self.channels + (self.validity == "channel")

    @property
    def decoded_channels(self) -> int:
        return self.channels + (self.validity is not None)


def is_image(start: bytes, suffix: str) -> bool:
    """Return True if the first 32 bytes of a file with an unknown suffix, "" for none, are those of an image.

    TIFFs with other suffixes are excluded: they are raw camera files, which begin with a thumbnail, or huge slides.
    """
    return bool(IMAGE_STARTS.match(start)) and not (start[:4] in TIFF_STARTS and suffix and "tif" not in suffix)


def preview_channels(pixels: PixelFormat) -> list[int] | None:
    """Return the channels that pictures show by default; None for 8-bit grey and colour, which they show unchanged."""
    if pixels.value_range is None and pixels.channels in (1, 3):
        return None
    return [0, 1, 2] if pixels.channels >= 3 else [0]


def decode(data, pixels: PixelFormat, min_sides: tuple[int, int] | None = None, mask=None) -> torch.Tensor:
    """Decode an image and turn it upright by its orientation tag.

    Without a value range the pixels have 8 bits, scaled from 16 if needed. For 1 or 3 channels, colour and grey are
    converted to each other, palettes are resolved and transparency is dropped. Any other number of channels, and that
    of arrays and of TIFFs that Pillow does not read, must match the file. With a value range, the channels must match
    the file, except that transparency is dropped if the others then match. Missing values are those equal to
    `pixels.nodata` or to the nodata number in the file, and those not finite; the mean of their channel replaces them.

    With `pixels.validity`, one more channel is 0 where a pixel is invalid: where a value is missing, or where the last
    channel of the image, or a mask, is 0. All values of invalid pixels count as missing. See VALIDITY.

    Args:
        data: a result of `Source.fetch`: an encoded file in any buffer, of which the first frame, page or array of
            (T, H, W, C) is decoded; stored numbers (H, W, C); or the OSError from reading the file.
        min_sides: (height, width): decode a JPEG at 1/2, 1/4 or 1/8 of its size if no side gets shorter than these.
        mask: a result of `Source.fetch_masks`, for the validity "mask".

    Returns:
        (`pixels.decoded_channels`, H, W) of `pixels.dtype`, in channels-last memory, which is fastest to resize.

    Raises:
        DamagedImage: the data is empty, truncated or unknown, has too many pixels, or a channel without valid pixels.
        WrongPixels: the channels are not those requested, the numbers need a value range, or the mask does not fit.
    """
    values, missing = _read_valid(data, pixels, mask, exact=pixels.value_range is not None, min_sides=min_sides)
    if pixels.value_range is not None:
        values = values.astype(np.float32, order="C")
    if missing is not None:
        values = fill_missing(values, missing)
    if pixels.value_range is not None:
        low, high = pixels.value_range
        with np.errstate(all="ignore"):
            values -= low
            values /= high - low
        np.clip(values, 0, 1, out=values)
    elif values.dtype == np.uint16:
        values = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if pixels.validity:
        valid = np.full((*values.shape[:2], 1), VALID_BYTE if values.dtype == np.uint8 else VALID_FLOAT, values.dtype)
        if missing is not None:
            valid[missing[:, :, :1]] = 0
        values = np.concatenate([values, valid], axis=2)
    return torch.from_numpy(values).permute(2, 0, 1)


def own_values(data, pixels: PixelFormat, mask=None) -> np.ndarray:
    """Return the numbers that a file stores, upright: (H, W, channels), uint8 or uint16, otherwise float32.

    If values are missing (see `decode`), the result is float32 with NaN for them. Raises the errors of `decode`.
    """
    values, missing = _read_valid(data, pixels, mask, exact=True)
    if missing is not None:
        values = values.astype(np.float32)
        values[missing] = np.nan
    return values


def stores_bytes(data, pixels: PixelFormat) -> bool:
    """Return True if a file stores unsigned 8-bit numbers. Raises the errors of `decode`."""
    return _read(data, pixels._replace(channels=pixels.stored_channels), exact=True)[0].dtype == np.uint8


def decode_stored(data, max_pixels: int = MAX_PIXELS, *, in_colour: bool = False) -> np.ndarray:
    """Return the pixels of a mask as the file stores them, upright: (H, W), or (H, W, n) for files in colour.

    Files with a palette give indices and 1-bit files 0 and 1, or colours if `in_colour`. 16-bit grey keeps its full
    range; `.npy` files, and TIFFs that Pillow does not read, keep their number type. Raises DamagedImage.
    """
    if isinstance(data, np.ndarray):
        return data
    data = _as_bytes(data)
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        if data[:6] == b"\x93NUMPY":
            return channels_last(_read_npy(data), 1, max_pixels)[:, :, 0]
        try:
            with open_image(data, max_pixels) as image:
                orientation = _orientation_of(image)
                image = image.convert("RGB") if in_colour and image.mode in ("1", "P") else image
                return turn_upright(np.array(image), orientation)
        except DamagedImage:
            if data[:4] not in TIFF_STARTS:
                raise
            return _read_tiff(data, PixelFormat(1, max_pixels=max_pixels))[0][:, :, 0]


def _read_valid(
    data, pixels: PixelFormat, mask=None, *, exact: bool, min_sides: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return upright numbers (H, W, channels) of the types of `find_missing`, and a mask of missing values or None."""
    with_mask = pixels.validity == "channel"
    stored = pixels._replace(channels=pixels.stored_channels)
    try:
        values, own_nodata = _read(data, stored, exact=exact or with_mask, min_sides=min_sides)
    except WrongChannels as error:
        if not with_mask:
            raise
        expected = f"expected {pixels.channels} (--input_channels) and a mask (--validity channel); correct one of them"
        raise WrongPixels(f"has {error.channels} channels, {expected}") from None
    if with_mask:
        values, mask = np.ascontiguousarray(values[:, :, :-1]), values[:, :, -1]
    elif mask is not None:
        try:
            mask = decode_stored(mask, pixels.max_pixels)
        except DamagedImage as error:
            raise DamagedImage(f"its mask: {error}") from None
    if not exact and values.dtype not in (np.uint8, np.uint16):
        raise WrongPixels(f"has {values.dtype} numbers, whose range no file states; give --value_range MIN MAX")
    values, missing = find_missing(values, pixels.nodata, own_nodata)
    if mask is not None:
        missing = add_invalid(missing, mask, values.shape)
    if pixels.validity and missing is not None:  # a pixel is invalid if one of its values is
        missing = np.broadcast_to(missing.any(axis=2, keepdims=True), values.shape)
    return values, missing


def _read(
    data, pixels: PixelFormat, *, exact: bool, min_sides: tuple[int, int] | None = None
) -> tuple[np.ndarray, float | None]:
    """Return upright numbers (H, W, channels) of any type, and the nodata number that the file declares, or None.

    If `exact`, they are the file's own at full depth; otherwise they may be converted to 1 or 3 channels.
    """
    if isinstance(data, np.ndarray):
        check_channels(data.shape[2], pixels.channels)
        return data, None
    data = _as_bytes(data)
    if data[:2] == b"\xff\xd8":
        values = _decode_jpeg(data, pixels, exact=exact, min_sides=min_sides)
        if values is not None:
            return values, None
    with warnings.catch_warnings(action="ignore"), np.errstate(all="ignore"):
        if data[:6] == b"\x93NUMPY":
            return channels_last(_read_npy(data), pixels.channels, pixels.max_pixels), None
        is_tiff = data[:4] in TIFF_STARTS
        if is_tiff and (exact or pixels.channels not in (1, 3)):
            return _read_tiff(data, pixels)
        # PNGs with several 16-bit channels, which Pillow truncates to 8 bits (IHDR is always the first chunk)
        if exact and data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) > 25 and data[24] == 16 and data[25] in (2, 4, 6):
            return _read_deep_png(data, pixels), None
        try:
            return _read_with_pillow(data, pixels, exact=exact)
        except DamagedImage as pillow_error:
            if not is_tiff:
                raise
            try:  # tifffile reads more: separate bands, five bands of 8 bits, ...
                return _read_tiff(data, pixels)
            except DamagedImage as tiff_error:
                raise tiff_error if isinstance(pillow_error, _UnknownFormat) else pillow_error from None


def _decode_jpeg(
    data: bytes | memoryview, pixels: PixelFormat, *, exact: bool, min_sides: tuple[int, int] | None
) -> np.ndarray | None:
    """Return upright pixels (H, W, channels), uint8, of a JPEG; None if Pillow must decode it.

    libjpeg-turbo converts CMYK differently, and refuses some files that Pillow reads, such as those without end marker.
    """
    try:
        height, width, space, _ = decode_jpeg_header(data)
    except ValueError:
        return None
    if space not in ("Gray", "YCbCr", "RGB"):
        return None
    check_size(height, width, pixels.max_pixels)  # libjpeg-turbo allocates the size in the header
    if exact or pixels.channels not in (1, 3):
        check_channels(1 if space == "Gray" else 3, pixels.channels)
    orientation, scale = _jpeg_orientation(data, pixels.max_pixels), {}
    if min_sides is not None:
        least = min_sides if orientation < 5 else min_sides[::-1]
        for factor in (8, 4, 2):
            sides = -(-height // factor), -(-width // factor)
            if sides[0] >= least[0] and sides[1] >= least[1]:
                scale = dict(min_height=sides[0], min_width=sides[1], min_factor=factor)
                break
    try:
        return turn_upright(decode_jpeg(data, "RGB" if pixels.channels == 3 else "GRAY", **scale), orientation)
    except ValueError:
        return None


def _jpeg_orientation(data: bytes | memoryview, max_pixels: int) -> int:
    """Return the orientation in EXIF or XMP. Pillow is slow, so it reads only headers that seem to have either."""
    end = 2
    while end + 4 <= len(data) and data[end] == 0xFF and data[end + 1] != 0xDA:  # up to the scan
        end += 2 + (data[end + 2] << 8 | data[end + 3])
    header = bytes(data[:end])
    return orientation_of(data, max_pixels) if b"Exif\0\0" in header or b"tiff:Orientation" in header else 1


def orientation_of(data, max_pixels: int) -> int:
    """Return the orientation of an encoded image, 1 to 8 as in EXIF; 1 if it states none or is damaged."""
    if isinstance(data, np.ndarray):
        return 1
    try:
        with warnings.catch_warnings(action="ignore"), open_image(_as_bytes(data), max_pixels) as image:
            return _orientation_of(image)
    except DamagedImage:  # decoding reports the reason
        return 1


def _orientation_of(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # broken EXIF data leaves the pixels intact
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in range(2, 9) else 1
    return 1


def _read_with_pillow(data: bytes, pixels: PixelFormat, *, exact: bool) -> tuple[np.ndarray, float | None]:
    channels = pixels.channels
    converts = not exact and channels in (1, 3)
    with open_image(data, pixels.max_pixels) as image:
        image.load()
        orientation = _orientation_of(image)
        nodata = parse_nodata(image.tag_v2.get(GDAL_NODATA)) if hasattr(image, "tag_v2") else None
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            values = np.asarray(image).astype(np.uint16)  # Pillow's own conversion to 8 bits clips at 255
            if converts:
                values = np.repeat(values[:, :, None], channels, axis=2)
        elif image.mode in ("I", "F"):
            values = np.array(image)
        else:
            if image.mode in ("P", "PA"):
                # Converting to RGBA first avoids a warning about transparent palette entries
                image = image.convert("RGBA" if converts or image.has_transparency_data else "RGB")
            if converts:
                image = image.convert("RGB" if channels == 3 else "L")
            elif image.mode == "1":
                image = image.convert("L")
            elif image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK"):
                image = image.convert("RGB")
            values = np.array(image)
    values = turn_upright(values, orientation)
    values = values.reshape(*values.shape[:2], -1)
    if values.dtype in (np.uint8, np.uint16):  # for other types, a missing value range is reported instead
        values = drop_alpha(values, channels, image.mode in ("LA", "RGBA"))
    return values, nodata


def _read_deep_png(data: bytes, pixels: PixelFormat) -> np.ndarray:
    """Return the pixels (H, W, channels), uint16, of a PNG with several 16-bit channels."""
    from imagecodecs import png_decode

    with open_image(data, pixels.max_pixels) as image:
        image.load()  # first, because imagecodecs leaks the memory of an image that it fails to read
        values = png_decode(bytes(data)).reshape(image.height, image.width, -1)
        values = turn_upright(values, _orientation_of(image))
    return drop_alpha(values, pixels.channels, values.shape[2] in (2, 4))


def _read_npy(data: bytes | memoryview) -> np.ndarray:
    with damage_errors():
        array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.dtype.kind not in "buif":
        raise DamagedImage(f"an array of {array.dtype}, expected numbers")
    return array.view(np.uint8) if array.dtype.kind == "b" else array.astype(array.dtype.newbyteorder("="), copy=False)


def _read_tiff(data: bytes, pixels: PixelFormat) -> tuple[np.ndarray, float | None]:
    image = read_tiff(data, pixels.channels, pixels.max_pixels)
    return _read_with_pillow(data, pixels, exact=True) if image is None else image


def _as_bytes(data) -> bytes | memoryview:
    if isinstance(data, OSError):
        raise DamagedImage(data.strerror or str(data))
    if not len(data):
        raise DamagedImage("empty file")
    return data if isinstance(data, bytes) else memoryview(data).cast("B")


@contextlib.contextmanager
def open_image(data: bytes | memoryview, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image without loading its pixels. Raises DamagedImage, also for errors in the block."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with damage_errors(), Image.open(io.BytesIO(data)) as image:
            check_size(image.height, image.width, max_pixels)
            if image.format == "EPS":  # a program, which Pillow would run with Ghostscript
                raise DamagedImage("EPS is a drawing, not pixels")
            tags = getattr(image, "tag_v2", {})
            if tags.get(PLANAR) == 2 and max(tags.get(BITS, (1,))) > 8:  # Pillow would mix up the bytes
                raise _UnknownFormat("a TIFF of planes that Pillow does not read")
            yield image
    except UnidentifiedImageError:  # its own message contains a memory address
        raise _UnknownFormat(f"not an image: {describe_start(data)}") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
