"""Read TIFFs with tifffile that Pillow truncates or refuses: many or separate bands, signed and float numbers."""

import io
import math

import numpy as np
from PIL import ExifTags

from data.values import DamagedImage, WrongChannels, channels_last, check_size, damage_errors, drop_alpha, turn_upright

# None, LZW, deflate (two numbers), PackBits, ZSTD: these cannot give more bytes than the page has pixels. (For
# truncated LZMA, imagecodecs returns uninitialized memory.)
TIFF_COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)
GDAL_NODATA = 42113  # the TIFF tag of the number that marks pixels without data
LZW, LZW_CLEAR = 5, 256  # TIFF's number for this compression, and the code that clears the table
# For the n-th code after the table is cleared: the largest code defined so far, and the code's width and first bit
LZW_KNOWN = np.minimum(np.concatenate([[255], 258 + np.arange(3837 + 2)]), 4095)
LZW_WIDTHS = np.digitize(np.maximum(LZW_KNOWN, 258), [511, 1023, 2047]) + 9
LZW_STARTS = np.cumsum(LZW_WIDTHS) - LZW_WIDTHS
LZW_WEIGHTS = 1 << np.arange(11, -1, -1)


def read_tiff(data: bytes | memoryview, channels: int, max_pixels: int) -> tuple[np.ndarray, float | None] | None:
    """Return upright numbers (H, W, channels) of any type, and the nodata number that the file declares, or None.

    Return only None for palettes, YCbCr, CIELAB and fewer than 8 bits, which Pillow reads. Raises DamagedImage.
    """
    from tifffile import PHOTOMETRIC, TiffFile

    with damage_errors(), TiffFile(io.BytesIO(data)) as tiff:
        page = tiff.pages.first
        check_size(page.imagelength, page.imagewidth, max_pixels)
        if page.photometric in (PHOTOMETRIC.PALETTE, PHOTOMETRIC.YCBCR, PHOTOMETRIC.CIELAB) or page.bitspersample < 8:
            return None
        if page.dtype is None or page.dtype.kind not in "uif":
            raise DamagedImage(f"a TIFF of {page.dtype} numbers, expected integers or floats")
        nodata = parse_nodata(page.tags.valueof(GDAL_NODATA))

        bands, has_alpha = page.samplesperpixel, bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
        if bands == channels or (has_alpha and bands == channels + 1):
            _check_tiff_page(page, data, max_pixels)
            buffer = np.zeros(page.shaped, page.dtype)  # zeros, as tifffile does not write all of truncated files
            values = page.asarray(squeeze=False, maxworkers=1, out=buffer)[:, 0]  # (separate bands, H, W, bands)
            values = np.moveaxis(values, 0, 2).reshape(*values.shape[1:3], bands)
            values = turn_upright(values, page.tags.valueof(ExifTags.Base.Orientation))
            return drop_alpha(values, channels, has_alpha), nodata

        # Libraries that do not know the channel axis of an array write each band as a page
        stack = tiff.series[0]
        if bands != 1 or len(stack.shape) != 3 or channels not in (stack.shape[0], stack.shape[2]):
            raise WrongChannels(bands, channels)
        for page in stack.pages:
            _check_tiff_page(page, data, max_pixels)
        buffer = np.zeros(stack.shape, stack.dtype)
        return channels_last(stack.asarray(maxworkers=1, out=buffer), channels, max_pixels), nodata


def _check_tiff_page(page, data: bytes | memoryview, max_pixels: int) -> None:
    """Raise DamagedImage for pages that tifffile does not refuse, or only after allocating their memory."""
    frame = page.keyframe
    if frame.compression not in TIFF_COMPRESSIONS:
        raise DamagedImage(f"TIFF compression {frame.compression} is not read for such numbers")
    if frame.is_tiled:
        check_size(frame.tilelength, frame.tilewidth, max(max_pixels, 2**20))  # small images have large tiles
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    is_short = len(page.dataoffsets) < math.prod(page.chunked) and not frame.is_contiguous
    if is_short or any(offset + length > len(data) for offset, length in places):
        raise DamagedImage("truncated: parts of the image are not in the file")
    for offset, length in places:
        if frame.compression == LZW and not _is_whole_lzw(data[offset : offset + length]):
            raise DamagedImage("broken (LZW)")


def _is_whole_lzw(data: bytes | memoryview) -> bool:
    """Return False if a code in a TIFF's LZW data (Welch 1984; TIFF 6.0, section 13) is used before its definition.

    imagecodecs does not check this and crashes. The position of a code follows from the number of codes since the table
    was last cleared, so all codes up to the next clearing are checked at once.
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
            return used < len(LZW_STARTS)  # a full table must be cleared
        if codes[used] != LZW_CLEAR:
            return True
        at = int(starts[used] + LZW_WIDTHS[used])
    return True


def parse_nodata(text) -> float | None:
    """Return the number in the tag GDAL_NODATA, None if it has none."""
    try:
        return float(text.strip(" \0") if isinstance(text, str) else text)
    except (TypeError, ValueError):
        return None
