"""Image files of every kind, brought to squares."""

import io
import math
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import UsageError
from flax_resnetv2.data.decoding import (
    center_crop,
    read_image,
    read_squares,
    stretch,
    strict_pillow,
)


def file_of(pixels, kind="PNG", mode=None, **how):
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(buffer, kind, **how)
    buffer.seek(0)
    return buffer


def read(file, side, channels=3):
    with strict_pillow():
        return read_image(file, "it", channels, center_crop(side))


def test_an_image_of_this_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    np.testing.assert_array_equal(read(file_of(pixels), 9), pixels)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_the_middle_is_what_is_kept(shape):
    """Three fields side by side, of which the middle one is the square."""
    height, width = shape
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - 8) // 2, (width - 8) // 2
    pixels[top : top + 8, left : left + 8] = (10, 200, 30)
    assert (read(file_of(pixels), 8) == (10, 200, 30)).all()
    for side in (4, 16):
        found = read(file_of(pixels), side)
        assert found.shape == (side, side, 3)
        # The pixels of the edge are averages that reach a little over it.
        inside = found[side // 4 : -side // 4, side // 4 : -side // 4].astype(int)
        assert abs(inside - (10, 200, 30)).max() <= 8


def test_what_is_made_smaller_is_averaged():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    found = read(file_of(checks.astype(np.uint8)), 8, channels=1)
    assert found.shape == (8, 8, 1)
    # Taking every eighth pixel, all would be black.
    assert abs(found.astype(int) - 127).max() <= 2


def test_a_whole_image_may_be_stretched_instead():
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 16:] = 255
    with strict_pillow():
        found = read_image(file_of(pixels), "it", 3, stretch(8, 8))
    assert found[:, 0].max() == 0
    assert found[:, -1].min() == 255


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_color_or_gray(mode, channels):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    white = np.full((6, 9, 3), 255, np.uint8)
    found = read(file_of(white, kind, mode), 4, channels)
    assert found.shape == (4, 4, channels)
    assert (found == 255).all()


def test_sixteen_bits_become_eight():
    deep = np.full((5, 5), 40_000, np.uint16)
    assert (read(file_of(deep), 5) == 40_000 >> 8).all()


def test_an_image_is_turned_as_the_camera_says():
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    found = read(file_of(pixels, exif=exif), 8, channels=1)[..., 0]
    assert (found[:, 4:] == 255).all()
    assert (found[:, :4] == 0).all()


def test_many_are_read_in_their_order():
    files = [
        (file_of(np.full((3 + k % 5, 4, 3), k % 256, np.uint8)), str(k))
        for k in range(1500)
    ]
    found = read_squares(files, len(files), 3, 2)
    assert (found.shape, found.dtype) == ((1500, 2, 2, 3), np.uint8)
    numbers = np.arange(1500) % 256
    assert (found == numbers[:, None, None, None]).all()


def test_one_of_many_that_cannot_be_read_is_named():
    good = np.zeros((3, 3, 3), np.uint8)
    files = [(file_of(good), "a"), (io.BytesIO(b"hello"), "b"), (file_of(good), "c")]
    with pytest.raises(UsageError, match=r"^b is not an image"):
        read_squares(files, 3, 3, 2)
    bomb = file_of(np.zeros((9_500, 9_500), bool))
    with pytest.raises(UsageError, match=r"^bomb is too large"):
        read_squares([(bomb, "bomb")], 1, 3, 2)


def test_too_many_pixels_are_refused_without_help_from_the_thread(monkeypatch):
    """As in the workers of a stream, outside ``strict_pillow``."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    read_image(file_of(np.zeros((9, 11), np.uint8)), "a", 3, center_crop(2))
    message = r"^b is too large \(12x9 pixels; the limit is 99\); scale it down$"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match=message):
            read_image(file_of(np.zeros((9, 12), np.uint8)), "b", 3, center_crop(2))


# Metadata; the pixels are whole

VALUES = {
    "text": (2, 5, b"abcd\0"),
    "a fraction": (5, 1, struct.pack("<II", 1, 3)),
    "a division by 0": (5, 1, struct.pack("<II", 1, 0)),
    "a negative fraction": (10, 1, struct.pack("<ii", -1, 3)),
    "a negative number": (8, 1, struct.pack("<h", -5)),
    "NaN": (12, 1, struct.pack("<d", math.nan)),
    "a float": (11, 1, struct.pack("<f", 7.5)),
    "a type that is none": (77, 1, b"\1\2"),
    "more values than bytes": (3, 9999, b""),
}
TAGS = {
    "width": 0x0100,
    "bits": 0x0102,
    "strips": 0x0111,
    "orientation": 0x0112,
    "strip sizes": 0x0117,
    "resolution": 0x011A,
    "directory": 0x8769,
}


def exif_of(tag, kind, count, value):
    """An EXIF block with one entry, whose value lies behind it if it is long."""
    held = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 26)
    entry = struct.pack("<HHI", tag, kind, count) + held
    block = b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    return b"Exif\0\0" + block + (value if len(value) > 4 else b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_change_no_pixel(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    expected = read(file_of(pixels, kind), 7)
    blocks = {
        f"{tag}: {value}": exif_of(number, *entry)
        for tag, number in TAGS.items()
        for value, entry in VALUES.items()
    }
    blocks |= {"no block": b"Exif\0\0JUNKJUNK", "half a header": b"Exif\0\0II*"}
    for name, block in blocks.items():
        found = read(file_of(pixels, kind, exif=block), 7)
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize(("bits", "white_is_0"), [(12, 0), (16, 0), (16, 1)])
def test_a_tiff_has_its_brightness_whatever_its_bits(bits, white_is_0):
    side, value = 4, 0.8  # the brightness
    stored = round((1 - value if white_is_0 else value) * (2**bits - 1))
    row = struct.pack(f"<{side}H", *[stored] * side)
    if bits == 12:  # packed, the first bit first
        row = int(format(stored, "012b") * side, 2).to_bytes(side * 12 // 8)
    tags = [
        *[(256, 3, 1, side), (257, 3, 1, side), (258, 3, 1, bits), (259, 3, 1, 1)],
        *[(262, 3, 1, 1 - white_is_0), (273, 4, 1, 8), (277, 3, 1, 1)],
        *[(278, 3, 1, side), (279, 4, 1, len(row) * side)],
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    start = 8 + len(row) * side
    content = b"II*\0" + struct.pack("<I", start) + row * side
    content += struct.pack("<H", len(tags)) + entries + bytes(4)
    found = read(io.BytesIO(content), side)
    np.testing.assert_allclose(found, 255 * value, atol=1)


@pytest.mark.parametrize("largest", [1023, 65535])
def test_a_pgm_may_have_more_than_8_bits(largest):
    pixels = struct.pack(">4H", *[round(0.8 * largest)] * 4)
    file = io.BytesIO(b"P5 2 2 %d\n" % largest + pixels)
    np.testing.assert_allclose(read(file, 2), 255 * 0.8, atol=1)


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iCCP"])
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_png_may_hold_any_amount_of_text(kind, place, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    content = file_of(pixels).getvalue()
    text = bytes(70_000_000 if kind == "tEXt" else 2_000_000)
    packed = zlib.compress(text)
    body = {"tEXt": b"a\0" + text, "iTXt": b"a\0\1\0\0\0" + packed}
    body = body.get(kind, b"a\0\0" + packed)
    chunk = kind.encode() + body
    chunk = struct.pack(">I", len(body)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    # Behind the header of 13 bytes.
    file = io.BytesIO(content[:33] + chunk + content[33:])
    if place == "disk":
        (tmp_path / "a.png").write_bytes(file.getvalue())
        file = tmp_path / "a.png"
    found = read_image(file, "a", 3, center_crop(7))
    np.testing.assert_array_equal(found, read(file_of(pixels), 7))


def test_a_format_that_could_start_a_program_is_none():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(eps)) as image:
        assert image.format == "EPS"  # to Pillow
    with pytest.raises(UsageError, match="it is not an image; give a PNG or JPEG"):
        read(io.BytesIO(eps), 8)
