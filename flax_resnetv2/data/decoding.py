"""Read image files of any size, mode and orientation into arrays."""

import contextlib
import io
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_resnetv2.errors import UsageError

LONGEST_SIDE = 65_535
"""Largest side in pixels, as in JPEG. Pillow limits only the number of pixels, but
resizing a longer image would take gigabytes, however narrow it is."""
FORMATS = "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"
"""The formats that are tried. Pillow has others, of which EPS starts Ghostscript."""
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_0 = 258, 262, 0
"""Tags of TIFF, and a value of the second."""
_CHUNK = 1024
"""Images whose files are open or in memory at the same time."""

Resize = Callable[[Any], Any]
"""Crops and scales a Pillow image of mode L or RGB to the wanted size."""


def stretch(height: int, width: int) -> Resize:
    """Scale the whole image; its aspect ratio may change."""
    return lambda image: _scaled(image, (width, height))


def center_crop(side: int, scale: float = 1.0) -> Resize:
    """Crop the central square and scale it to ``side`` x ``side`` pixels.

    ``scale`` is the side of the crop relative to the shorter side of the image: 0.875
    corresponds to 224 of 256 pixels. Each pixel of the result is a bicubic average over
    all pixels that it covers; an image of the wanted size does not change.
    """

    def resize(image: Any) -> Any:
        crop = scale * min(image.size)
        left, top = (image.width - crop) / 2, (image.height - crop) / 2
        return _scaled(image, (side, side), (left, top, left + crop, top + crop))

    return resize


def random_resized_crop(
    side: int, scale: tuple[float, float], rng: np.random.Generator
) -> Resize:
    """Crop a random rectangle and scale it to a square, as of Szegedy et al. (2014).

    ``scale`` is the smallest and the largest area of the crop relative to the image;
    its aspect ratio is between 3:4 and 4:3.
    """

    def resize(image: Any) -> Any:
        width, height = image.size
        for _ in range(10):
            area = width * height * rng.uniform(*scale)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return _scaled(image, (side, side), (left, top, left + w, top + h))
        # A long and narrow image has no such rectangle.
        return center_crop(side)(image)

    return resize


def _scaled(image: Any, size: tuple[int, int], box: Any = None) -> Any:
    from PIL import Image

    return image.resize(size, Image.Resampling.BICUBIC, box)


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Make Pillow raise for too many pixels, and ignore its other warnings.

    Enter it around threads, not within them: the warning filters are global.
    """
    from PIL import Image

    with warnings.catch_warnings():
        # The other warnings are about metadata that changes no pixel.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_image(
    file: str | Path | IO[bytes], name: str | Path, channels: int, resize: Resize
) -> np.ndarray:
    """Read an image as uint8 [H, W, channels]; call it within ``strict_pillow``.

    Reads the first frame, in the orientation that EXIF gives, ignores transparency, and
    scales 16 bits per channel to 8.

    Args:
        file: the path, or the open file.
        name: for messages.
        channels: 3, or 1 for gray.
        resize: brings the image to its size.

    Raises:
        UsageError: not a file, not an image, truncated, or too large.
    """
    from PIL import Image, UnidentifiedImageError

    bombs = Image.DecompressionBombWarning, Image.DecompressionBombError
    try:
        with Image.open(file, formats=FORMATS) as image:
            if max(image.size) > LONGEST_SIDE:
                raise UsageError(
                    f"{name} is {image.width}x{image.height} pixels; the limit "
                    f"of a side is {LONGEST_SIDE}; scale it down"
                )
            # Worker threads and processes do not run within ``strict_pillow``.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise UsageError(
                    f"{name} is too large ({image.width}x{image.height} pixels; the "
                    f"limit is {Image.MAX_IMAGE_PIXELS:,}); scale it down"
                )
            # Pillow scales those of a PGM to 16 bits.
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                raise UsageError(
                    f"{name} has pixels of mode {image.mode}, whose range is not "
                    "known; give an image of 8 or 16 bits a channel"
                )
            pixels = _upright(image)
            if pixels.mode.startswith("I"):  # Pillow would clip at 255
                pixels = Image.fromarray(_to_8_bits(pixels, image))
            pixels = resize(pixels.convert("RGB" if channels == 3 else "L"))
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not an image; give a PNG or JPEG file") from error
    except bombs as error:
        raise UsageError(f"{name} is too large ({error}); scale it down") from error
    except Exception as error:  # decoders raise anything for a damaged file
        if "MAX_TEXT" in str(error):
            return read_image(_without_text(file), name, channels, resize)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(
            f"{name} cannot be read ({reason}); give a whole PNG or JPEG file"
        ) from error
    return np.asarray(pixels, np.uint8).reshape(pixels.height, pixels.width, channels)


def _to_8_bits(pixels: Any, image: Any) -> np.ndarray:
    """Scale gray pixels of more than 8 bits, as the tags of a TIFF ``image`` say."""
    tags = getattr(image, "tag_v2", {})
    bits = (tags.get(_BITS_PER_SAMPLE) or (16,))[0]
    bits = bits if bits in range(9, 17) else 16
    gray = (np.asarray(pixels) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return 255 - gray if tags.get(_PHOTOMETRIC) == _WHITE_IS_0 else gray


def _without_text(file: str | Path | IO[bytes]) -> io.BytesIO:
    """Return a PNG without texts and color profile, which change no pixel here.

    Pillow refuses a file with more than a megabyte of them.
    """
    if isinstance(file, str | Path):
        content = Path(file).read_bytes()
    else:
        file.seek(0)
        content = file.read()
    kept, at = [content[:8]], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4])
        if content[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(content[at:end])
        at = end
    return io.BytesIO(b"".join(kept))


def _upright(image: Any) -> Any:
    """Turn an image as its EXIF says, or leave it if that cannot be read.

    Pillow's ``exif_transpose`` also writes the other entries again, and fails if one of
    them is damaged.
    """
    from PIL import ExifTags, Image

    image.load()
    turns = Image.Transpose
    known = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        turn = known.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged metadata raise anything
        turn = None
    return image if turn is None else image.transpose(turn)


def read_squares(
    files: Iterable[tuple[str | Path | IO[bytes], str | Path]],
    count: int,
    channels: int,
    side: int,
) -> np.ndarray:
    """Read images as central squares in several threads: uint8 [count, side, side, C].

    ``files`` yields the first two arguments of ``read_image``, ``count`` times.
    """
    images, files = np.empty((count, side, side, channels), np.uint8), iter(files)
    resize = center_crop(side)

    def read(index: int, file: Any, name: str | Path) -> None:
        images[index] = read_image(file, name, channels, resize)

    # Pillow decodes without holding the interpreter lock.
    with strict_pillow(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, count, _CHUNK):
            chunk = list(itertools.islice(files, _CHUNK))
            indices = range(first, first + len(chunk))
            list(pool.map(read, indices, *zip(*chunk, strict=True)))
    return images


def to_png(pixels: np.ndarray) -> bytes:
    """Encode an image, uint8 [H, W, 1 or 3], as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    gray = pixels.shape[-1] == 1
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, "PNG")
    return file.getvalue()
