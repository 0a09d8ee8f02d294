"""The embedded data set: ten shapes that the project draws itself, bit for bit.

For machines without data and without a network. Each image has one shape of any place,
size, turn and color on a shaded ground with strokes and specks, all of it drawn from a
counted random stream by arithmetic that IEEE 754 rounds alike on every machine
(+ - * / sqrt), so that the pixels are the same everywhere. Because dark and bright
change places from image to image, a linear model learns next to nothing; a person names
the shape at a glance.

>>> images, labels = draw_shapes("test")
>>> images.shape, SHAPE_CLASSES[labels[0]]
"""

from collections.abc import Callable

import numpy as np

from flax_resnetv2.errors import UsageError

NAME = "embedded_shapes"
SIZE = 32
PER_CLASS = {"train": 1000, "test": 200}
_SEEDS = {"train": 20160316, "test": 20160725}

Field = np.ndarray
"""float64 [N, SIZE, SIZE]: a value a pixel, lengths in pixels."""


def draw_shapes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw all images of a split, the classes mixed.

    Args:
        split: "train" (10,000 images) or "test" (2,000).

    Returns:
        Images uint8 [N, 32, 32, 3] and labels int64 [N], as many of each class.

    Raises:
        UsageError: another split.
    """
    if split not in PER_CLASS:
        raise UsageError(
            f"split={split!r} is unknown; choose one of "
            f"{', '.join(map(repr, PER_CLASS))}"
        )
    stream = _Stream(_SEEDS[split])
    count = PER_CLASS[split]
    images = np.concatenate([_draw_class(s, count, stream) for s in _SHAPES.values()])
    labels = np.repeat(np.arange(len(_SHAPES)), count)
    # The order of random numbers, not an unstable sort, decides: they are all distinct.
    order = np.argsort(stream.uniform(len(labels)), kind="stable")
    return images[order], labels[order]


class _Stream:
    """Uniform numbers from the raw 64-bit words of PCG64, which NumPy never changes."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.PCG64(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Numbers in [low, high), float64 ``shape``."""
        raw = self._generator.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return low + (high - low) * (raw.reshape(shape) * 2.0**-53)


def _draw_class(
    shape: Callable[[Field, Field, Field], Field], count: int, stream: _Stream
) -> np.ndarray:
    """Draw ``count`` images of one shape, uint8 [count, SIZE, SIZE, 3]."""
    axis = np.arange(SIZE) + 0.5
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])

    def some(low: float, high: float) -> Field:
        return stream.uniform(count, 1, 1, low=low, high=high)

    ground = stream.uniform(count, 1, 1, 3)
    # Each channel at least 0.35 away from the ground's, brighter or darker by chance.
    ink = (ground + stream.uniform(count, 1, 1, 3, low=0.35, high=0.65)) % 1.0
    slope = stream.uniform(2, count, 1, 1, 3, low=-0.012, high=0.012)
    shade = slope[0] * (x[..., None] - SIZE / 2) + slope[1] * (y[..., None] - SIZE / 2)
    image = ground + shade
    for _ in range(5):
        speck = _length(x - some(0, SIZE), y - some(0, SIZE)) - some(0.6, 1.6)
        image = _paint(image, speck, stream.uniform(count, 1, 1, 3))
    for _ in range(2):
        stroke = _stroke(x, y, stream, count)
        image = _paint(image, stroke, stream.uniform(count, 1, 1, 3))
    radius = some(7.5, 11.0)
    right, down = x - some(12.5, 19.5), y - some(12.5, 19.5)
    cosine, sine = _direction(stream, count)
    u, v = right * cosine + down * sine, down * cosine - right * sine
    image = _paint(image, shape(u, v, radius), ink - shade)
    image = image + stream.uniform(count, SIZE, SIZE, 3, low=-0.08, high=0.08)
    return np.floor(np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


def _paint(image: np.ndarray, distance: Field, color: np.ndarray) -> np.ndarray:
    """Cover the pixels with a negative distance; half a pixel of soft edge."""
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    return image + cover * (color - image)


def _stroke(x: Field, y: Field, stream: _Stream, count: int) -> Field:
    """Distance to a thin straight line right across the image."""
    cosine, sine = _direction(stream, count)
    across = stream.uniform(2, count, 1, 1, low=0.0, high=SIZE)
    return np.abs((x - across[0]) * cosine + (y - across[1]) * sine) - 0.5


def _direction(stream: _Stream, count: int) -> tuple[Field, Field]:
    """Cosine and sine of any turn, [count, 1, 1], without the inexact functions."""
    vector = stream.uniform(2, count, 1, 1, low=-1.0, high=1.0)
    length = _length(*vector) + 2.0**-60
    return vector[0] / length, vector[1] / length


def _length(u: Field, v: Field) -> Field:
    return np.sqrt(u * u + v * v)


def _box(u: Field, v: Field, half_width: Field, half_height: Field) -> Field:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disc(u: Field, v: Field, r: Field) -> Field:
    return _length(u, v) - r


def _ring(u: Field, v: Field, r: Field) -> Field:
    return np.abs(_length(u, v) - 0.78 * r) - 0.2 * r


def _square(u: Field, v: Field, r: Field) -> Field:
    return _box(u, v, 0.8 * r, 0.8 * r)


def _frame(u: Field, v: Field, r: Field) -> Field:
    return np.abs(_box(u, v, 0.68 * r, 0.68 * r)) - 0.18 * r


def _triangle(u: Field, v: Field, r: Field) -> Field:
    half, side = 0.5, 0.75**0.5
    slanted = np.maximum(side * u + half * v, half * v - side * u)
    return np.maximum(slanted, -v) - 0.55 * r


def _cross(u: Field, v: Field, r: Field) -> Field:
    return np.minimum(_box(u, v, r, 0.27 * r), _box(u, v, 0.27 * r, r))


def _bars(u: Field, v: Field, r: Field) -> Field:
    outer = np.abs(np.abs(u) - 0.72 * r)
    return np.maximum(np.minimum(np.abs(u), outer) - 0.19 * r, np.abs(v) - 0.85 * r)


def _crescent(u: Field, v: Field, r: Field) -> Field:
    return np.maximum(_disc(u, v, r), -_disc(u - 0.55 * r, v, 0.8 * r))


def _half_disc(u: Field, v: Field, r: Field) -> Field:
    return np.maximum(_disc(u - 0.4 * r, v, r), u - 0.4 * r)


def _dots(u: Field, v: Field, r: Field) -> Field:
    return _disc(np.abs(u) - 0.62 * r, np.abs(v) - 0.62 * r, 0.32 * r)


_SHAPES: dict[str, Callable[[Field, Field, Field], Field]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "cross": _cross,
    "bars": _bars,
    "crescent": _crescent,
    "half disc": _half_disc,
    "four dots": _dots,
}
"""Signed distance in pixels to each shape's edge, negative inside."""

SHAPE_CLASSES = tuple(_SHAPES)
"""Class names of the drawn shapes, in the order of their labels."""
