"""From an image file to pixels, whatever its size, its mode and its camera's turn."""

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
"""Pixels, as of JPEG. Scaling a longer one would take gigabytes, however narrow it is;
PIL itself limits the number of pixels."""

_AT_ONCE = 1024
"""Images whose files are open or in memory."""

Fit = Callable[[Any], Any]
"""A PIL image of the mode L or RGB -> one of the size that is wanted."""


def stretched(height: int, width: int) -> Fit:
    """Scale the whole image to this size, whatever its sides were to each other."""

    def fit(image: Any) -> Any:
        from PIL import Image

        return image.resize((width, height), Image.Resampling.BICUBIC)

    return fit


def square(side: int, share: float = 1.0) -> Fit:
    """Cut out the central square and scale it; an image of this size stays as it is.

    Pixels are averaged over all that they stand for.

    Args:
        side: in pixels of what comes out.
        share: of the shorter side that the square has. 1: the shorter side is scaled to
            ``side``, the middle kept; 0.875 is 224 of 256.
    """

    def fit(image: Any) -> Any:
        cut = share * min(image.size)
        left, top = (image.width - cut) / 2, (image.height - cut) / 2
        return _scaled(image, side, (left, top, left + cut, top + cut))

    return fit


def random_part(
    side: int, scale: tuple[float, float], draw: np.random.Generator
) -> Fit:
    """Cut out a random part and scale it to a square (Szegedy et al. 2014, Inception).

    Args:
        side: in pixels of what comes out.
        scale: the least and the largest share of the area that a part has; its sides
            are in the proportion of 3:4 to 4:3.
        draw: random numbers.
    """

    def fit(image: Any) -> Any:
        width, height = image.size
        for _ in range(10):
            area = width * height * draw.uniform(*scale)
            proportion = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = math.sqrt(area * proportion), math.sqrt(area / proportion)
            if w <= width and h <= height:
                left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
                return _scaled(image, side, (left, top, left + w, top + h))
        # A long and narrow image has no such part.
        return square(side)(image)

    return fit


def _scaled(image: Any, side: int, box: tuple[float, float, float, float]) -> Any:
    from PIL import Image

    return image.resize((side, side), Image.Resampling.BICUBIC, box)


@contextlib.contextmanager
def careful() -> Iterator[None]:
    """Have PIL raise where it warns of too many pixels, and else be silent.

    Around threads, not within them: Python has one list of such rules.
    """
    from PIL import Image

    with warnings.catch_warnings():
        # PIL speaks of oddities of a file that change no pixel.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_image(
    file: str | Path | IO[bytes], name: str | Path, channels: int, fit: Fit
) -> np.ndarray:
    """Read an image as uint8 [H, W, channels]; within ``careful``.

    Of an animation it is the first frame, turned as its camera says; what is
    transparent has the color that is stored there; 16 bits become 8.

    Args:
        file: its path, or the open file.
        name: for messages.
        channels: 3, or 1 for shades of gray.
        fit: brings it to a size.

    Raises:
        UsageError: not a file, not an image, cut short, or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    bombs = Image.DecompressionBombWarning, Image.DecompressionBombError
    try:
        with Image.open(file) as image:
            if max(image.size) > LONGEST_SIDE:
                raise UsageError(
                    f"{name} is {image.width}x{image.height} pixels; the limit "
                    f"of a side is {LONGEST_SIDE}; scale it down"
                )
            # ``careful`` is not known in every thread and process that reads.
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise UsageError(
                    f"{name} is too large ({image.width}x{image.height} pixels; the "
                    f"limit is {Image.MAX_IMAGE_PIXELS:,}); scale it down"
                )
            pixels = _eight_bits(ImageOps.exif_transpose(image), name)
            pixels = fit(pixels.convert("RGB" if channels == 3 else "L"))
    except UsageError:
        raise
    except UnidentifiedImageError as error:
        raise UsageError(f"{name} is not an image; give a PNG or JPEG file") from error
    except bombs as error:
        raise UsageError(f"{name} is too large ({error}); scale it down") from error
    except Exception as error:  # decoders raise anything where a file is damaged
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(
            f"{name} cannot be read ({reason}); give a whole PNG or JPEG file"
        ) from error
    return np.asarray(pixels, np.uint8).reshape(pixels.height, pixels.width, channels)


def read_squares(
    files: Iterable[tuple[str | Path | IO[bytes], str | Path]],
    count: int,
    channels: int,
    side: int,
) -> np.ndarray:
    """Read many images as squares, several at a time: uint8 [count, side, side, C].

    Args:
        files: the first two arguments of ``read_image``.
        count: how many there are.
        channels, side: of the results.

    Raises:
        UsageError: of the first that cannot be read.
    """
    images, fit, files = (
        np.empty((count, side, side, channels), np.uint8),
        square(side),
        iter(files),
    )

    def read(place: int, file: Any, name: str | Path) -> None:
        images[place] = read_image(file, name, channels, fit)

    # PIL decodes outside of Python's lock.
    with careful(), ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, count, _AT_ONCE):
            some = list(itertools.islice(files, _AT_ONCE))
            places = range(first, first + len(some))
            list(pool.map(read, places, *zip(*some, strict=True)))
    return images


def to_png(pixels: np.ndarray) -> bytes:
    """Encode an image, uint8 [H, W, 1 or 3], as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    gray = pixels.shape[-1] == 1
    Image.fromarray(pixels[..., 0] if gray else pixels).save(file, "PNG")
    return file.getvalue()


def _eight_bits(image: Any, name: str | Path) -> Any:
    """Scale 16 bits: PIL would cut all that is brighter than 255."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UsageError(
            f"{name} has pixels of mode {image.mode}, whose range is not known; give "
            "an image of 8 or 16 bits a channel"
        )
    return image
