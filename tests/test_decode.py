"""Tests of data/decode.py: it returns Pillow's pixels or the stored numbers, and damaged files are errors."""

import contextlib
import io
import math
import struct

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imagecodecs import png_encode
from PIL import Image, ImageOps, features
from torch.nn.functional import interpolate

from data.decode import PixelFormat, _decode_jpeg, decode, decode_stored, own_values
from data.values import DamagedImage, WrongChannels, WrongPixels

HEIGHT, WIDTH = 45, 70
ORIENTATION = 0x0112


def picture() -> Image.Image:
    """Return a smooth colour picture with four different corners, so that a wrong rotation shows."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([60 + x * 2, 200 - y * 3, 90 + x + y], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def grey16() -> Image.Image:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    return Image.fromarray(values)


RGB = picture()
FILES = {
    "jpeg": encode(RGB, "JPEG", quality=90),
    "jpeg 4:4:4": encode(RGB, "JPEG", quality=90, subsampling=0),
    "jpeg progressive": encode(RGB, "JPEG", quality=90, progressive=True),
    "jpeg grey": encode(RGB.convert("L"), "JPEG", quality=90),
    "jpeg CMYK": encode(RGB.convert("CMYK"), "JPEG", quality=90),
    "png 1": encode(RGB.convert("1"), "PNG"),
    "png L": encode(RGB.convert("L"), "PNG"),
    "png LA": encode(RGB.convert("LA"), "PNG"),
    "png P": encode(RGB.quantize(16), "PNG"),
    "png P transparent": encode(RGB.quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14)),
    "png RGB": encode(RGB, "PNG"),
    "png RGBA": encode(RGB.convert("RGBA"), "PNG"),
    "gif": encode(RGB.quantize(16), "GIF"),
    "gif animated": encode(RGB, "GIF", save_all=True, append_images=[ImageOps.invert(RGB)]),
    "bmp": encode(RGB, "BMP"),
    "tiff": encode(RGB, "TIFF"),
}
if features.check("webp"):
    FILES["webp"] = encode(RGB, "WEBP", quality=90)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", FILES)
def test_formats_and_modes_give_pillows_pixels(name, channels):
    image = decode(FILES[name], PixelFormat(channels))
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (channels, HEIGHT, WIDTH)
    reference = Image.open(io.BytesIO(FILES[name])).convert("RGBA").convert("RGB" if channels == 3 else "L")
    difference = image.permute(1, 2, 0).numpy().astype(int) - np.array(reference).reshape(HEIGHT, WIDTH, channels)
    # Grey from a colour JPEG is its luma, which the reference recomputes from rounded colours.
    assert np.abs(difference).max() <= (2 if name.startswith("jpeg") and channels == 1 else 0)


def test_sixteen_bits_are_scaled_to_eight():
    image = decode(encode(grey16(), "PNG"), PixelFormat(1))
    expected = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH) / 257
    assert image.dtype == torch.uint8
    assert np.abs(image[0].numpy() - expected).max() <= 0.51
    assert (image.min(), image.max()) == (0, 255)
    assert torch.equal(decode(encode(grey16(), "PNG"), PixelFormat(3)), image.expand(3, -1, -1))


def test_colour_in_planes_is_read_where_pillow_does_not():
    array = numbers(np.uint16, HEIGHT, WIDTH, 3)
    content = tiff(np.moveaxis(array, 2, 0).copy(), photometric="rgb", planarconfig="separate", byteorder=">")
    assert np.abs(decode(content, PixelFormat(3)).permute(1, 2, 0).numpy() - array / 257.0).max() <= 0.51


def test_a_broken_grey_tiff_is_damaged_not_of_other_channels():
    content = tiff(numbers(np.uint8, HEIGHT, WIDTH), compression="zlib")
    content = content[:-500] + bytes(100) + content[-400:]
    with pytest.raises(DamagedImage) as caught:
        decode(content, PixelFormat(3))
    assert not isinstance(caught.value, WrongChannels)


def test_a_fourth_band_that_is_no_transparency_is_not_dropped():
    array = numbers(np.uint16, HEIGHT, WIDTH, 4)
    for kind, channels in (("unassalpha", 3), ("unspecified", 4)):
        content = tiff(array, photometric="rgb", extrasamples=[kind])
        assert np.array_equal(own_values(content, PixelFormat(channels)), array[:, :, :channels])
        assert np.array_equal(own_values(content, PixelFormat(4)), array)
    with pytest.raises(WrongChannels):
        own_values(content, PixelFormat(3))


def test_compressions_whose_size_only_their_own_header_knows_are_refused():
    with pytest.raises(DamagedImage, match="compression 34887 is not read"):
        decode(tiff(numbers(np.float32, HEIGHT, WIDTH), compression="lerc"), PixelFormat(1, (0, 1)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_turns_the_image_upright(format, orientation):
    content = encode(RGB, format, exif=exif(orientation))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode(content, PixelFormat(3)).permute(1, 2, 0).numpy(), upright)
    assert np.array_equal(own_values(content, PixelFormat(3)), upright)  # tifffile reads a TIFF here
    assert decode(content, PixelFormat(1)).shape[1:] == upright.shape[:2]


def test_common_jpegs_take_the_fast_decoder_in_channels_last_order():
    for name, content in FILES.items():
        assert decode(content, PixelFormat(3)).permute(1, 2, 0).is_contiguous(), name
        if name.startswith("jpeg"):
            pixels = _decode_jpeg(content, PixelFormat(3), exact=False, min_sides=None)
            assert (pixels is None) == (name == "jpeg CMYK"), name
    for orientation in range(1, 9):
        assert decode(encode(RGB, "JPEG", exif=exif(orientation)), PixelFormat(3)).permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_jpeg_is_decoded_at_a_fraction_where_both_sides_stay_long_enough(orientation):
    content = encode(RGB.resize((701, 450)), "JPEG", quality=95, exif=exif(orientation))
    whole = decode(content, PixelFormat(3))
    turned = orientation == 6
    eighth, quarter, half, full = (57, 88), (113, 176), (225, 351), (450, 701)
    sizes = {(1, 1): eighth, (57, 88): eighth, (58, 88): quarter, (57, 89): quarter, (113, 177): half}
    for least, expected in (sizes | {(226, 1): full, (9999, 1): full}).items():
        least, expected = (least[::-1], expected[::-1]) if turned else (least, expected)
        image = decode(content, PixelFormat(3), min_sides=least)
        assert tuple(image.shape[1:]) == expected, least
        resized = interpolate(whole[None].float(), expected, mode="bilinear", antialias=True)[0]
        assert (resized - image).abs().mean() < 2
    assert decode(FILES["png RGB"], PixelFormat(3), min_sides=(1, 1)).shape == (3, HEIGHT, WIDTH)


def test_orientation_in_xmp_counts_where_exif_has_none_as_with_pillow():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for tags, turned in ((None, True), (exif(1), False), (exif(3), False)):
        content = encode(RGB, "JPEG", xmp=xmp[29:], **(dict(exif=tags) if tags else {}))
        assert b"tiff:Orientation" in content
        upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
        assert upright.shape[0] == (WIDTH if turned else HEIGHT)
        assert np.array_equal(decode(content, PixelFormat(3)).permute(1, 2, 0).numpy(), upright)


def test_broken_exif_does_not_damage_whole_pixels():
    clean = encode(RGB, "JPEG", quality=90)
    broken = clean[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"II*\0\xff\xff\xff\xff" + clean[2:]
    assert torch.equal(decode(broken, PixelFormat(3)), decode(clean, PixelFormat(3)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("jpeg")])
def test_a_cut_jpeg_is_damaged_wherever_it_is_cut(name, channels):
    content = FILES[name]
    end = len(content)
    for length in {1, 2, 3, 10, 100, *range(0, end, 97), end - 10, end - 2, end - 1}:
        with pytest.raises(DamagedImage) as caught:
            decode(content[:length], PixelFormat(channels))
        assert str(caught.value)


def test_a_jpeg_without_end_marker_is_read_as_pillow_reads_it():
    content = FILES["jpeg"][:-2] + bytes(50)
    assert decode(content, PixelFormat(3)).shape == (3, HEIGHT, WIDTH)


BOMB = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 60000, 60000) + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
NOT_IMAGES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "html": b"<html><body>404 Not Found</body></html>" * 20,
    "start of a jpeg": b"\xff\xd8",
    "start of a png": b"\x89PNG\r\n\x1a\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    # Headers that claim billions of pixels, which no decoder may allocate
    "jpeg bomb": BOMB,
    "ppm bomb": b"P6\n100000 100000\n255\n" + bytes(100),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_damaged_with_a_short_reason(name):
    with pytest.raises(DamagedImage) as caught:
        decode(NOT_IMAGES[name], PixelFormat(3))
    reason = str(caught.value)
    assert 0 < len(reason) < 150 and "0x" not in reason  # no memory address: the reason is reproducible


def tiff(array, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, **options)
    return stream.getvalue()


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def gdal_nodata(text: str) -> dict:
    return dict(extratags=[(42113, "s", 0, text, True)])


def numbers(dtype, *shape) -> np.ndarray:
    """Return numbers over most of the range of a type, all different where possible."""
    dtype = np.dtype(dtype)
    low, high = (-30000.0, 30000.0) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.linspace(low, float(high), math.prod(shape)).clip(low, high * 0.999).astype(dtype).reshape(shape)


BANDS13 = numbers(np.float32, HEIGHT, WIDTH, 13)
LARGE = {
    "jpeg": FILES["jpeg"],
    "jpeg CMYK": FILES["jpeg CMYK"],
    "png": FILES["png RGB"],
    "png of 16 bits": png_encode(numbers(np.uint16, HEIGHT, WIDTH, 3)),
    "gif": FILES["gif"],
    "tiff": FILES["tiff"],
    "tiff of floats": tiff(BANDS13[:, :, :3].copy(), photometric="rgb"),
    "npy": npy(np.array(RGB)),
}


@pytest.mark.parametrize(
    ("name", "value_range"),
    [(name, each) for name in LARGE for each in (None, (0, 255)) if each or "floats" not in name],
)
def test_more_pixels_than_allowed_are_refused_with_the_flag_that_allows_them(name, value_range):
    pillows = Image.MAX_IMAGE_PIXELS
    channels = 4 if name == "jpeg CMYK" else 3
    with pytest.raises(DamagedImage, match=f"pixels, more than the {HEIGHT * WIDTH - 1} allowed; raise --max_pixels"):
        decode(LARGE[name], PixelFormat(channels, value_range, max_pixels=HEIGHT * WIDTH - 1))
    image = decode(LARGE[name], PixelFormat(channels, value_range, max_pixels=HEIGHT * WIDTH))
    assert image.shape == (channels, HEIGHT, WIDTH)
    assert pillows == Image.MAX_IMAGE_PIXELS


def test_headers_that_claim_too_much_are_refused_before_anything_is_allocated():
    array = np.zeros((2, 2), dtype=np.float32)
    content = bytearray(tiff(array))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        for tag in (256, 257):
            place = file.pages.first.tags[tag].valueoffset
            content[place : place + 4] = struct.pack("<I", 10**9)
    with pytest.raises(DamagedImage, match="1000000000 x 1000000000 pixels, more"):
        decode(bytes(content), PixelFormat(1, (0, 1)))
    header = npy(array).replace(b"(2, 2)", b"(9999999, 9999999)")
    with pytest.raises(DamagedImage):
        decode(header, PixelFormat(1, (0, 1)))


@pytest.mark.parametrize("content", [encode(RGB.convert("F"), "TIFF"), npy(BANDS13[:, :, 0]), tiff(BANDS13[:, :, 0])])
def test_pixels_without_a_known_range_are_refused(content):
    with pytest.raises(WrongPixels, match=r"has float32 numbers.*; give --value_range MIN MAX$"):
        decode(content, PixelFormat(1))


@pytest.mark.parametrize(
    ("content", "channels", "expected", "value_range"),
    [
        (FILES["jpeg"], 3, 13, None),
        (FILES["jpeg"], 3, 1, (0, 255)),
        (FILES["jpeg grey"], 1, 3, (0, 255)),
        (FILES["jpeg CMYK"], 4, 3, (0, 255)),
        (FILES["png RGBA"], 4, 2, None),
        (FILES["png RGB"], 3, 4, None),
        (png_encode(numbers(np.uint16, 5, 6, 3)), 3, 1, (0, 65535)),
        (npy(BANDS13), 13, 3, None),
        (npy(BANDS13), 13, 3, (0, 1)),
        (tiff(BANDS13, photometric="minisblack", planarconfig="contig"), 13, 3, (0, 1)),
        (tiff(BANDS13[:, :, 0]), 1, 3, (0, 1)),
    ],
)
def test_other_channels_than_requested_are_an_error_with_the_flag(content, channels, expected, value_range):
    with pytest.raises(WrongChannels) as caught:
        decode(content, PixelFormat(expected, value_range))
    assert str(caught.value) == f"has {channels} channels, expected {expected}; give --input_channels {channels}"


def test_four_channels_are_those_of_the_file():
    rgba = RGB.convert("RGBA")
    rgba.putalpha(RGB.convert("L"))
    assert np.array_equal(decode(encode(rgba, "PNG"), PixelFormat(4)).permute(1, 2, 0), np.array(rgba))
    assert torch.equal(decode(encode(rgba, "PNG"), PixelFormat(3)), decode(FILES["png RGB"], PixelFormat(3)))
    cmyk = decode(FILES["jpeg CMYK"], PixelFormat(4)).permute(1, 2, 0).numpy()
    assert np.array_equal(cmyk, np.array(Image.open(io.BytesIO(FILES["jpeg CMYK"]))))
    assert decode(FILES["png P transparent"], PixelFormat(4)).shape == (4, HEIGHT, WIDTH)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_of_any_number_of_channels_are_read_as_eight_bits(dtype, channels):
    array = numbers(dtype, HEIGHT, WIDTH, channels)
    planes = np.moveaxis(array, 2, 0).copy()
    expected = torch.from_numpy(planes.astype(float) / (257 if dtype == np.uint16 else 1)).round().to(torch.uint8)
    contents = [npy(array), npy(planes), npy(array[None]), npy(np.stack([array, array[::-1]]))]
    contents += [npy(array.astype(array.dtype.newbyteorder(">"))), npy(np.asfortranarray(array))]
    if channels != 3 or dtype == np.uint8:  # Pillow reads 16-bit RGB TIFFs, and drops the low byte
        for stored, planarconfig in ((array, "contig"), (planes, "separate")):
            stored = stored if channels > 1 else array[:, :, 0]
            contents.append(tiff(stored, photometric="minisblack", planarconfig=planarconfig))
    for content in contents:
        image = decode(content, PixelFormat(channels))
        assert image.dtype == torch.uint8 and torch.equal(image, expected)
        assert image.permute(1, 2, 0).is_contiguous()


def scaled(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale numbers (H, W, C) from `low` .. `high` to 0 .. 1: (C, H, W)."""
    return np.clip((np.moveaxis(array, 2, 0).astype(np.float64) - low) / (high - low), 0, 1)


DTYPES = ["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]
TIFFS = {
    "plain": {},
    "big endian": dict(byteorder=">"),
    "bigtiff": dict(bigtiff=True),
    "lzw": dict(compression="lzw", predictor=True),
    "deflate": dict(compression="zlib", predictor=True),
    "packbits": dict(compression="packbits"),
    "tiles": dict(tile=(16, 32), compression="zlib"),
    "strips": dict(rowsperstrip=7),
}


@pytest.mark.parametrize("name", TIFFS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiffs_of_every_number_type_keep_their_depth(name, dtype):
    for channels, planarconfig in ((1, None), (2, "contig"), (3, "separate"), (5, "contig"), (5, "separate")):
        array = numbers(dtype, HEIGHT, WIDTH, channels)
        stored = {"contig": array, "separate": np.moveaxis(array, 2, 0).copy(), None: array[:, :, 0]}[planarconfig]
        content = tiff(stored, photometric="minisblack", planarconfig=planarconfig, **TIFFS[name])
        low, high = float(array.min()) * 0.5, float(array.max()) * 0.75
        image = decode(content, PixelFormat(channels, (low, high)))
        assert image.dtype == torch.float32 and image.permute(1, 2, 0).is_contiguous()
        assert (image.min(), image.max()) == (0, 1)
        assert np.abs(image.numpy() - scaled(array, low, high)).max() < 1e-6
        assert np.array_equal(
            own_values(content, PixelFormat(channels)), array.astype(dtype if dtype in ("u1", "u2") else "f4")
        )


def test_where_both_ends_fit_the_last_axis_is_the_channel():
    array = numbers(np.uint8, 3, 7, 3)
    assert np.array_equal(decode(npy(array), PixelFormat(3)).permute(1, 2, 0), array)


def test_bands_that_were_written_as_pages_are_channels():
    array = numbers(np.uint16, HEIGHT, WIDTH, 13)
    for stored in (array, np.moveaxis(array, 2, 0).copy()):  # tifffile cannot tell the axes of either
        assert np.array_equal(own_values(tiff(stored, photometric="minisblack"), PixelFormat(13)), array)


def test_sixteen_bit_png_keeps_its_depth_in_grey_and_in_colour():
    for channels in (1, 2, 3, 4):
        array = numbers(np.uint16, HEIGHT, WIDTH, channels)
        content = png_encode(array.squeeze())
        assert np.array_equal(own_values(content, PixelFormat(channels)), array), channels
        image = decode(content, PixelFormat(channels, (1000, 3000)))
        assert np.abs(image.numpy() - scaled(array, 1000, 3000)).max() < 1e-6
    rgba = numbers(np.uint16, HEIGHT, WIDTH, 4)
    assert np.array_equal(own_values(png_encode(rgba), PixelFormat(3)), rgba[:, :, :3])


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # raised by Pillow for the expected pixels
@pytest.mark.parametrize("name", FILES)
def test_eight_bit_files_give_their_numbers(name):
    image = Image.open(io.BytesIO(FILES[name]))
    image = image.convert("RGB" if image.mode == "P" else "L" if image.mode == "1" else image.mode)
    bands = len(image.getbands())
    stored = own_values(FILES[name], PixelFormat(bands))
    assert stored.dtype == np.uint8
    if "transparent" not in name:
        assert np.array_equal(stored, np.array(image).reshape(HEIGHT, WIDTH, bands))
    expected = torch.from_numpy(stored).permute(2, 0, 1) / 255
    assert torch.allclose(decode(FILES[name], PixelFormat(bands, (0, 255))), expected, atol=1e-6)
    if bands in (2, 4) and "CMYK" not in name:
        assert np.array_equal(own_values(FILES[name], PixelFormat(bands - 1)), stored[:, :, :-1])


def test_what_is_no_data_becomes_the_mean_of_its_channels_other_numbers():
    array = numbers(np.float32, HEIGHT, WIDTH, 3)
    expected = array.astype(np.float64)
    array[:5, :, 0], array[7, 8, 1], array[9, 9, 1], array[0, 0, 2] = -9999, np.nan, np.inf, -9999
    missing = ~np.isfinite(array) | (array == -9999)
    for channel in range(3):
        expected[missing[:, :, channel], channel] = expected[~missing[:, :, channel], channel].mean()
    tagged = tiff(array, photometric="rgb", **gdal_nodata("-9999"))
    plain = tiff(array, photometric="rgb")
    for content, nodata in ((npy(array), -9999), (tagged, None), (tagged, -9999), (plain, -9999)):
        image = decode(content, PixelFormat(3, (-20000, 20000), nodata))
        assert np.abs(image.numpy() - scaled(expected, -20000, 20000)).max() < 1e-6
        stored = own_values(content, PixelFormat(3, nodata=nodata))
        assert np.array_equal(np.isnan(stored), missing) and np.array_equal(stored[~missing], array[~missing])
        assert torch.equal(decode(stored, PixelFormat(3, (-20000, 20000))), image)


@pytest.mark.parametrize("text", ["-3.4028234663852886e+38", "-3.40282346638529e+38", "-3.4028235e+38"])
def test_the_lowest_float_is_known_however_it_is_written(text):
    array = numbers(np.float32, 5, 6)
    array[0, 0] = np.finfo(np.float32).min
    assert np.isnan(own_values(tiff(array, **gdal_nodata(text)), PixelFormat(1))).sum() == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_data_is_known_in_every_number_type(dtype):
    array = numbers(dtype, 5, 6)
    nodata = -9999 if np.dtype(dtype).kind == "f" else int(array[2, 3])  # float16 rounds -9999
    array[2, 3] = nodata
    values = own_values(npy(array), PixelFormat(1, nodata=nodata))
    assert np.argwhere(np.isnan(values)).tolist() == [[2, 3, 0]]
    again = decode(values, PixelFormat(1, (0, 1), nodata))
    assert torch.equal(again, decode(npy(array), PixelFormat(1, (0, 1), nodata)))


@pytest.mark.parametrize("text", ["none", "", "nan", "-9999", "0.5", "1e400"])
def test_a_tag_that_no_pixel_of_the_type_can_equal_changes_nothing(text):
    array = numbers(np.uint8, HEIGHT, WIDTH)
    content = tiff(array, **gdal_nodata(text))
    assert own_values(content, PixelFormat(1)).dtype == np.uint8
    assert np.array_equal(decode(content, PixelFormat(1))[0], array)


def test_no_data_among_eight_bits_is_filled_too():
    array = numbers(np.uint8, HEIGHT, WIDTH, 2)
    array[:, :10, 1] = 7
    array[0, 0] = [7, 7]
    for content, nodata in ((npy(array), 7), (tiff(array, photometric="minisblack", planarconfig="contig"), 7)):
        image = decode(content, PixelFormat(2, nodata=nodata)).permute(1, 2, 0).numpy()
        assert image.dtype == np.uint8
        for channel in range(2):
            band, missing = array[:, :, channel], array[:, :, channel] == 7
            assert np.array_equal(image[:, :, channel][~missing], band[~missing])
            assert set(image[:, :, channel][missing]) == {round(band[~missing].mean())}
    grey = np.where(np.arange(WIDTH) < 9, 0, numbers(np.uint8, HEIGHT, WIDTH)).astype(np.uint8)
    content = tiff(grey, **gdal_nodata("0"))
    mean = round(grey[grey > 0].mean())
    assert set(decode(content, PixelFormat(3))[:, grey == 0].flatten().tolist()) == {mean}
    assert set(decode(encode(Image.fromarray(grey), "PNG"), PixelFormat(1, nodata=0))[0][grey == 0].tolist()) == {mean}


def test_an_image_without_any_data_in_a_channel_is_damaged():
    array = numbers(np.float32, 5, 6, 2)
    array[:, :, 1] = np.nan
    with pytest.raises(DamagedImage, match="no pixel with data"):
        decode(npy(array), PixelFormat(2, (0, 1)))
    with pytest.raises(DamagedImage, match="no pixel with data"):
        decode(npy(np.zeros((5, 6), np.uint8)), PixelFormat(1, nodata=0))


def test_arrays_and_files_give_equal_images():
    eight_bit = numbers(np.uint8, 5, 6, 3)
    image = decode(eight_bit, PixelFormat(3))
    assert image.shape == (3, 5, 6) and image.data_ptr() == eight_bit.ctypes.data  # a view, not a copy
    for array, options in (
        (numbers(np.uint8, 5, 6, 3), {}),
        (numbers(np.uint8, 5, 6, 3), dict(nodata=0)),
        (numbers(np.uint16, 5, 6, 3), {}),
        (numbers(np.uint16, 5, 6, 3), dict(nodata=0, value_range=(100, 50000))),
        (numbers(np.float32, 5, 6, 3), dict(nodata=-30000, value_range=(-20000, 20000))),
    ):
        before = array.copy()
        assert torch.equal(decode(array, PixelFormat(3, **options)), decode(npy(array), PixelFormat(3, **options)))
        assert np.array_equal(array, before)
    with pytest.raises(WrongChannels):
        decode(array, PixelFormat(4, (0, 1)))
    with pytest.raises(WrongPixels, match="--value_range"):
        decode(array, PixelFormat(3))


@pytest.mark.parametrize(
    ("content", "channels", "value_range"),
    [
        (FILES["jpeg"], 3, None),
        (encode(RGB, "JPEG", exif=exif(6)), 3, None),
        (FILES["png RGB"], 3, None),
        (png_encode(numbers(np.uint16, HEIGHT, WIDTH, 3)), 3, (0, 65535)),
        (tiff(BANDS13, photometric="minisblack", planarconfig="contig"), 13, (-30000, 30000)),
        (npy(BANDS13), 13, (-30000, 30000)),
    ],
)
def test_any_buffer_is_read(content, channels, value_range):
    expected = decode(content, PixelFormat(channels, value_range))
    signed = np.frombuffer(content, np.int8)
    for buffer in (memoryview(content), bytearray(content), pa.py_buffer(content), memoryview(signed)):
        assert torch.equal(decode(buffer, PixelFormat(channels, value_range)), expected)


def test_labels_are_read_as_they_are_stored():
    labels = numbers(np.uint16, HEIGHT, WIDTH)
    small = numbers(np.uint8, HEIGHT, WIDTH)
    for expected, content in (
        (labels, npy(labels)),
        (labels, npy(labels[None])),
        (labels, npy(labels[..., None])),
        (labels, tiff(labels)),
        (labels, tiff(labels, compression="lzw", tile=(16, 16))),
        (small, tiff(small)),
        (small, npy(small)),
        (small, tiff(small, compression="zstd")),
        (labels.astype(np.int64), npy(labels.astype(np.int64))),
        (labels, encode(Image.fromarray(labels), "PNG")),
        (small, encode(Image.fromarray(small), "PNG")),
    ):
        stored = decode_stored(content)
        assert stored.dtype == expected.dtype and np.array_equal(stored, expected)
    assert decode_stored(FILES["png P"]).max() < 16
    assert set(decode_stored(FILES["png 1"]).astype(int).ravel()) == {0, 1}
    turned = encode(Image.fromarray(small), "PNG", exif=exif(6))
    assert np.array_equal(decode_stored(turned), np.rot90(small, -1))
    for content in (b"", b"text", npy(labels)[:-1], tiff(labels)[:-1], npy(np.array(["a", "b"]))):
        with pytest.raises(DamagedImage):
            decode_stored(content)


NUMBER_FILES = {
    "tiff": tiff(numbers(np.float32, 20, 30)),
    "tiff deflate": tiff(numbers(np.float32, 20, 30), compression="zlib", predictor=True, rowsperstrip=6),
    "tiff lzw": tiff(numbers(np.int16, 20, 30), compression="lzw", tile=(16, 16)),
    "tiff bands": tiff(numbers(np.uint16, 4, 20, 30), photometric="minisblack", planarconfig="separate"),
    "png": png_encode(numbers(np.uint16, 20, 30, 3)),
    "npy": npy(numbers(np.float32, 20, 30)),
}


@pytest.mark.parametrize("name", NUMBER_FILES)
def test_files_of_numbers_are_damaged_wherever_they_are_cut(name):
    content, channels = NUMBER_FILES[name], {"png": 3, "tiff bands": 4}.get(name, 1)
    assert decode(content, PixelFormat(channels, (0, 1))).shape == (channels, 20, 30)
    end = content.rindex(b"IEND") - 4 if name == "png" else len(content)  # the last chunk may be missing
    for length in {*range(0, end, 41), end - 1}:
        with pytest.raises(DamagedImage) as caught:
            decode(content[:length], PixelFormat(channels, (0, 1)))
        assert 0 < len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        npy(np.array(["a", "b"])),
        npy(np.zeros((3, 4), dtype="c8")),
        npy(np.zeros((0, 4))),
        npy(np.zeros(7)),
        npy(np.array(1.0)),
        npy(np.zeros((3, 4), dtype=[("a", "f4")])),
        npy(np.zeros((2, 2))).replace(b"(2, 2)", b"(-2,-2)"),
        npy(np.zeros((2, 2))).replace(b"'<f8'", b"'|O' "),
        tiff(np.zeros((3, 4), dtype=np.complex64)),
    ],
)
def test_files_that_hold_no_image_of_numbers_are_damaged(content):
    with pytest.raises(DamagedImage) as caught:
        decode(content, PixelFormat(1, (0, 1)))
    assert str(caught.value)


@pytest.mark.filterwarnings("error")
def test_neither_warnings_nor_log_messages_escape(caplog, capfd):
    array = numbers(np.float64, 5, 6)
    array[0, 0] = 1e300
    for content, value_range in (
        (FILES["jpeg"], None),
        (tiff(numbers(np.uint8, 5, 6), **gdal_nodata("-9999")), (0, 1)),  # tifffile logs this one
        (tiff(numbers(np.float32, 5, 6))[:-30], (0, 1)),
        (npy(array), (0, 1)),
        (FILES["png P transparent"], None),
        (encode(RGB.resize((99, 99)), "PNG")[:-20], None),
    ):
        with contextlib.suppress(DamagedImage):
            decode(content, PixelFormat(1, value_range))
    assert not caplog.records and not capfd.readouterr().err


def test_photographs_decode_to_pillows_pixels(real_images):
    paths = sorted((real_images / "imagenet_sample" / "train").glob("*/*"))[:20]
    assert paths
    for path in paths:
        content = path.read_bytes()
        reference = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
        assert np.array_equal(decode(content, PixelFormat(3)).permute(1, 2, 0).numpy(), reference), path


def test_lzw_with_a_code_that_means_nothing_yet_is_damaged():
    """imagecodecs crashes on such files."""
    array = np.random.default_rng(0).integers(0, 200, (60, 70, 5)).astype(np.uint16)
    content = bytearray(tiff(array, compression="lzw", tile=(32, 32)))
    assert np.array_equal(own_values(bytes(content), PixelFormat(5)), array)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        places = file.pages.first.dataoffsets
    for place in (places[0], places[-1]):
        broken = content.copy()
        broken[place + 1] |= 0x68  # the first code after the clear code
        with pytest.raises(DamagedImage, match="LZW"):
            own_values(bytes(broken), PixelFormat(5))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1), (16, 17)])
def test_images_of_any_size_are_read(height, width):
    small = RGB.resize((width, height))
    contents = [encode(small, format) for format in ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF")]
    contents += [tiff(numbers(np.uint16, height, width, 3), photometric="rgb", compression="lzw", tile=(16, 16))]
    contents += [npy(numbers(np.uint8, height, width, 3)), encode(small, "TIFF", compression="tiff_lzw")]
    for content in contents:
        assert decode(content, PixelFormat(3)).shape == (3, height, width)
        values = own_values(content, PixelFormat(3))
        assert torch.equal(decode(values, PixelFormat(3, (10, 200))), decode(content, PixelFormat(3, (10, 200))))


def damage(content: bytes, kind: str, place: int, value: int) -> bytes:
    """Damage a file at `place`, from 0 (its start) to 9,999 (its end)."""
    # Most fields that can break are in the first bytes, so "head" changes one of these.
    at = place % min(400, len(content)) if kind == "head" else place * len(content) // 10_000
    changed = {
        "cut": b"",
        "head": bytes([value]) + content[at + 1 :],
        "byte": bytes([value]) + content[at + 1 :],
        "bytes": struct.pack("<I", value * 0x01020408 % 2**32) + content[at + 4 :],
        "zeros": bytes(min(512, len(content) - at)) + content[at + 512 :],
        "more": content,
    }
    return content[:at] + changed[kind]


@settings(derandomize=True, database=None, deadline=None, max_examples=1000)
@given(
    content=st.sampled_from([*FILES.values(), *NUMBER_FILES.values()]),
    damaged=st.tuples(
        st.sampled_from(["cut", "head", "byte", "bytes", "zeros", "more"]), st.integers(0, 9_999), st.integers(0, 255)
    ),
    channels=st.sampled_from([1, 3, 4]),
    value_range=st.sampled_from([None, (0, 255), (20.5, 60.25)]),
    nodata=st.sampled_from([None, 0, 7.5]),
    min_sides=st.sampled_from([None, (1, 1), (16, 30)]),
)
def test_any_bytes_give_an_image_or_are_damaged(content, damaged, channels, value_range, nodata, min_sides):
    content, pixels = damage(content, *damaged), PixelFormat(channels, value_range, nodata, max_pixels=5_000_000)
    try:
        image = decode(content, pixels, min_sides)
    except DamagedImage as error:
        assert 0 < len(str(error)) < 200 and "\n" not in str(error)
    else:
        assert image.dtype == pixels.dtype and image.ndim == 3 and len(image) == channels and image.numel() > 0
        assert value_range is None or (image.min() >= 0 and image.max() <= 1)  # false for NaN
    with contextlib.suppress(DamagedImage):
        assert decode_stored(content, pixels.max_pixels).size > 0


def hole(array, *, top=3, left=5):
    """Return an array (H, W, C) with a hole of 10 x 12 pixels, and which pixels are valid."""
    valid = np.ones(array.shape[:2], bool)
    valid[top : top + 10, left : left + 12] = False
    return np.where(valid[:, :, None], array, 0).astype(array.dtype), valid


@pytest.mark.parametrize("kind", ["nodata", "channel", "alpha", "mask", "float channel"])
def test_valid_pixels_are_those_that_nothing_excludes(kind):
    array, valid = hole(numbers(np.uint8, 30, 40, 3) // 2 + 1)  # no zeros elsewhere
    pixels, masks = PixelFormat(3, validity=kind if kind in ("nodata", "mask") else "channel"), []
    if kind == "nodata":
        content, pixels = encode(Image.fromarray(array), "PNG"), pixels._replace(nodata=0)
    elif kind == "mask":
        content, masks = encode(Image.fromarray(array), "PNG"), [encode(Image.fromarray(valid * np.uint8(255)), "PNG")]
    elif kind == "alpha":
        content = encode(Image.fromarray(np.dstack([array, valid * np.uint8(255)])), "PNG")
    else:
        array = array.astype(np.float32) if kind == "float channel" else array
        pixels = pixels._replace(value_range=(0, 200) if kind == "float channel" else None)
        content = npy(np.dstack([array, valid]).astype(array.dtype))
    image = decode(content, pixels, None, *masks)
    assert image.shape == (4, 30, 40) and image.dtype == pixels.dtype
    assert np.array_equal(image[3] > 0, valid) and len(image[3].unique()) == 2
    for channel, stored in zip(image[:3].double().numpy(), np.moveaxis(array, 2, 0), strict=True):
        mean = stored[valid].mean() / (200 if pixels.value_range else 1)
        assert channel[~valid] == pytest.approx(mean, abs=0.5 if pixels.value_range is None else 1e-6)
    stored = own_values(content, pixels, *masks)
    assert stored.shape == (30, 40, 3) and np.array_equal(np.isnan(stored).any(axis=2), ~valid)
    assert np.array_equal(stored[valid], array[valid])


def test_a_pixel_is_invalid_if_one_of_its_channels_has_no_data():
    array = numbers(np.float32, 6, 7, 3)
    array[2, 3, 1] = np.nan
    image = decode(npy(array), PixelFormat(3, (-50000, 50000), validity="nodata"))
    assert (image[3] == 0).nonzero().tolist() == [[2, 3]]
    others = [array[..., channel][np.arange(42).reshape(6, 7) != 17].mean() / 1e5 + 0.5 for channel in range(3)]
    assert image[:3, 2, 3].tolist() == pytest.approx(others, abs=1e-6)


def test_what_invalid_pixels_hold_does_not_matter():
    array, valid = hole(numbers(np.uint16, 30, 40, 2))
    other = np.where(valid[:, :, None], array, numbers(np.uint16, 30, 40, 2) // 3).astype(np.uint16)
    pixels, mask = PixelFormat(2, (0, 65535), validity="mask"), encode(Image.fromarray(valid * np.uint8(1)), "PNG")
    assert torch.equal(decode(npy(array), pixels, None, mask), decode(npy(other), pixels, None, mask))


@pytest.mark.parametrize(
    ("content", "pixels", "mask", "message"),
    [
        (
            (20, 30, 3),
            dict(validity="mask"),
            np.ones((30, 20)),
            "has a validity mask of 30 x 20; expected grey of the",
        ),
        ((20, 30, 3), dict(validity="mask"), np.full((20, 30), 7), "has a validity mask with the value 7; expected 0"),
        ((20, 30, 3), dict(validity="mask"), np.zeros((20, 30)), "no pixel with data"),
        ((20, 30, 4), dict(validity="channel"), None, "has a validity mask with the value"),
        ((20, 30, 3), dict(validity="channel"), None, r"has 3 channels, expected 3 \(--input_channels\) and a mask"),
    ],
)
def test_unfit_validity_masks(content, pixels, mask, message):
    masks = [] if mask is None else [encode(Image.fromarray(mask.astype(np.uint8)), "PNG")]
    with pytest.raises(DamagedImage, match=message):
        decode(npy(numbers(np.uint8, *content)), PixelFormat(3, **pixels), None, *masks)


@pytest.mark.parametrize("value_range", [None, (0, 65535)])
def test_a_mask_of_16_bits(value_range):
    array, valid = hole(numbers(np.uint16, 30, 40, 3) // 2 + 1)
    content = png_encode(np.dstack([array, valid * np.uint16(65535)]))
    image = decode(content, PixelFormat(3, value_range, validity="channel"))
    assert np.array_equal(image[3] > 0, valid)


def test_a_mask_is_not_converted_with_its_image():
    """Two channels and a mask are as many channels as RGB has."""
    array, valid = hole(numbers(np.uint8, 30, 40, 2))
    content = encode(Image.fromarray(np.dstack([array, valid * np.uint8(255)])), "PNG")
    assert np.array_equal(decode(content, PixelFormat(2, validity="channel"))[2] > 0, valid)
    with pytest.raises(WrongPixels, match=r"has 1 channels, expected 2 \(--input_channels\) and a mask"):
        decode(FILES["png L"], PixelFormat(2, validity="channel"))


def test_a_mask_that_cannot_be_read_is_named():
    with pytest.raises(DamagedImage, match="its mask: empty file"):
        decode(FILES["png RGB"], PixelFormat(3, validity="mask"), None, b"")
