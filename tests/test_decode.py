"""data/decode.py: every format and mode gives Pillow's pixels; what is damaged is said to be, and nothing else is."""

import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

import data.decode
from data.decode import DamagedImage, _is_plain_jpeg, decode

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")  # torchvision's
HEIGHT, WIDTH = 45, 70
ORIENTATION = 0x0112


def picture() -> Image.Image:
    """A smooth colour picture, no two corners alike, so that a wrong turn shows."""
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


def palette_with_transparency() -> bytes:
    return encode(picture().quantize(16), "PNG", transparency=bytes([0, 128] + [255] * 14))


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
    "png P transparent": palette_with_transparency(),
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
    image = decode(FILES[name], channels)
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (channels, HEIGHT, WIDTH)
    reference = Image.open(io.BytesIO(FILES[name])).convert("RGBA").convert("RGB" if channels == 3 else "L")
    difference = image.permute(1, 2, 0).numpy().astype(int) - np.array(reference).reshape(HEIGHT, WIDTH, channels)
    # Grey from a colour JPEG is its luma, which Pillow here computes again from rounded colours.
    assert np.abs(difference).max() <= (2 if name.startswith("jpeg") and channels == 1 else 0)


def test_sixteen_bits_are_scaled_to_eight():
    image = decode(encode(grey16(), "PNG"), 1)
    expected = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH) / 257
    assert image.dtype == torch.uint8
    assert np.abs(image[0].numpy() - expected).max() <= 0.51
    assert (image.min(), image.max()) == (0, 255)
    assert torch.equal(decode(encode(grey16(), "PNG"), 3), image.expand(3, -1, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_exif_turns_the_image_upright(format, orientation):
    content = encode(RGB, format, exif=exif(orientation))
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert np.array_equal(decode(content, 3).permute(1, 2, 0).numpy(), upright)
    assert decode(content, 1).shape[1:] == upright.shape[:2]


def test_common_jpegs_take_the_fast_decoder_in_channels_last_order():
    for name in ("jpeg", "jpeg 4:4:4", "jpeg progressive", "jpeg grey"):
        assert _is_plain_jpeg(FILES[name]), name
        assert decode(FILES[name], 3).permute(1, 2, 0).is_contiguous(), name
    assert not _is_plain_jpeg(FILES["jpeg CMYK"])
    assert not _is_plain_jpeg(FILES["png RGB"])


def test_without_torchvisions_decoder_pillow_gives_the_same_pixels(monkeypatch):
    names = [name for name in FILES if name.startswith("jpeg")]
    fast = [decode(FILES[name], 3) for name in names]
    monkeypatch.setattr(data.decode, "decode_jpeg", None)
    for name, image in zip(names, fast, strict=True):
        assert torch.equal(decode(FILES[name], 3), image), name


@pytest.mark.filterwarnings("error")
def test_warnings_made_errors_do_not_stop_a_jpeg():
    assert decode(FILES["jpeg"], 3).shape == (3, HEIGHT, WIDTH)


def test_broken_exif_does_not_damage_whole_pixels():
    clean = encode(RGB, "JPEG", quality=90)
    broken = clean[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"II*\0\xff\xff\xff\xff" + clean[2:]
    assert torch.equal(decode(broken, 3), decode(clean, 3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("jpeg")])
def test_a_cut_jpeg_is_damaged_wherever_it_is_cut(name, channels):
    content = FILES[name]
    for length in {
        1,
        2,
        3,
        10,
        100,
        *range(0, len(content), 97),
        len(content) - 10,
        len(content) - 2,
        len(content) - 1,
    }:
        with pytest.raises(DamagedImage) as caught:
            decode(content[:length], channels)
        assert str(caught.value)


@pytest.mark.parametrize("name", ["png RGB", "png P", "gif", "bmp", "tiff", *(["webp"] if "webp" in FILES else [])])
def test_other_formats_cut_in_half_are_damaged(name):
    with pytest.raises(DamagedImage):
        decode(FILES[name][: len(FILES[name]) // 2], 3)


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png RGB", "gif", "bmp"])
def test_corrupt_bytes_give_an_image_or_a_reason(name):
    chance = random.Random(0)
    for _ in range(100):
        content = bytearray(FILES[name])
        at = chance.randrange(len(content))
        content[at : at + 8] = chance.randbytes(len(content[at : at + 8]))
        try:
            image = decode(bytes(content), 3)
        except DamagedImage as error:
            assert str(error)
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3 and image.numel() > 0


def test_a_jpeg_without_end_marker_is_read_as_pillow_reads_it():
    content = FILES["jpeg"][:-2] + bytes(50)
    assert decode(content, 3).shape == (3, HEIGHT, WIDTH)


BOMB = b"\xff\xd8\xff\xc0\x00\x11\x08" + struct.pack(">HH", 60000, 60000) + b"\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01"
NOT_IMAGES = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\n",
    "html": b"<html><body>404 Not Found</body></html>" * 20,
    "start of a jpeg": b"\xff\xd8",
    "start of a png": b"\x89PNG\r\n\x1a\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
    # 60000 x 60000 pixels announced: neither decoder may allocate them
    "jpeg bomb": BOMB,
    "ppm bomb": b"P6\n100000 100000\n255\n" + bytes(100),
}


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_damaged_with_a_short_reason(name):
    with pytest.raises(DamagedImage) as caught:
        decode(NOT_IMAGES[name], 3)
    reason = str(caught.value)
    assert 0 < len(reason) < 150 and "0x" not in reason  # no address: the same file gives the same reason


def test_a_bomb_that_pillow_would_only_warn_of_is_refused_by_its_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    for name in ("jpeg", "png RGB"):
        with pytest.raises(DamagedImage, match="bomb"):
            decode(FILES[name], 3)


def test_pixels_without_a_known_range_are_refused():
    with pytest.raises(DamagedImage, match="32-bit"):
        decode(encode(RGB.convert("F"), "TIFF"), 1)


def test_other_channel_counts_are_an_error_of_the_caller():
    with pytest.raises(ValueError, match="expected 3") as caught:
        decode(FILES["jpeg"], 4)
    assert not isinstance(caught.value, DamagedImage)


@pytest.mark.skipif("MAE_TEST_DATA" not in os.environ, reason="MAE_TEST_DATA names no folder of real images")
def test_photographs_decode_to_pillows_pixels():
    paths = sorted(Path(os.environ["MAE_TEST_DATA"], "imagenet_sample", "train").glob("*/*"))[:20]
    assert paths
    for path in paths:
        content = path.read_bytes()
        reference = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))
        assert np.array_equal(decode(content, 3).permute(1, 2, 0).numpy(), reference), path
