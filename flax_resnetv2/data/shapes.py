"""The embedded data set: ten shapes, drawn by this module bit for bit.

For machines without data and network. Each image has one shape of random position,
size, rotation and color on a shaded ground with strokes and specks. The random numbers
are raw words of a fixed generator, and only operations that IEEE 754 rounds exactly
(+ - * / sqrt) follow, so the pixels are the same on every machine. Foreground and
background colors vary independently, so a linear model learns almost nothing.

>>> images, labels = draw_shapes("test")
>>> images.shape, SHAPE_CLASSES[labels[0]]
"""

from collections.abc import Callable

import numpy as np

from flax_resnetv2.validation import check_choice

NAME = "embedded_shapes"
SIZE = 32
PER_CLASS = {"train": 1000, "test": 200}
_SEEDS = {"train": 20160316, "test": 20160725}

Field = np.ndarray
"""A value per pixel, float64 [N, SIZE, SIZE]; lengths are in pixels."""
Shape = Callable[[Field, Field, Field], Field]


def draw_shapes(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Draw all images of a split, with the classes shuffled.

    Args:
        split: "train" (10,000 images) or "test" (2,000).

    Returns:
        Images uint8 [N, 32, 32, 3] and labels int64 [N], the same number per class.

    Raises:
        UsageError: ``split`` is unknown.
    """
    check_choice("split", split, tuple(PER_CLASS))
    stream = _Stream(_SEEDS[split])
    count = PER_CLASS[split]
    images = np.concatenate([_draw_class(s, count, stream) for s in _SHAPES.values()])
    labels = np.repeat(np.arange(len(_SHAPES)), count)
    order = np.argsort(stream.uniform(len(labels)), kind="stable")
    return images[order], labels[order]


class _Stream:
    """Uniform numbers from the raw words of PCG64, which NumPy promises to keep."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.PCG64(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Return numbers in [low, high), float64 ``shape``."""
        raw = self._generator.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return low + (high - low) * (raw.reshape(shape) * 2.0**-53)


def _draw_class(shape: Shape, count: int, stream: _Stream) -> np.ndarray:
    """Draw ``count`` images of one shape, uint8 [count, SIZE, SIZE, 3]."""
    axis = np.arange(SIZE) + 0.5
    x, y = np.broadcast_arrays(axis[None, None, :], axis[None, :, None])

    def some(low: float, high: float) -> Field:
        return stream.uniform(count, 1, 1, low=low, high=high)

    ground = stream.uniform(count, 1, 1, 3)
    # Each channel differs from the ground by at least 0.35, up or down.
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
    """Paint the pixels of negative distance, with an edge half a pixel soft."""
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    return image + cover * (color - image)


def _stroke(x: Field, y: Field, stream: _Stream, count: int) -> Field:
    """Return the signed distance to a thin line across the image."""
    cosine, sine = _direction(stream, count)
    across = stream.uniform(2, count, 1, 1, low=0.0, high=SIZE)
    return np.abs((x - across[0]) * cosine + (y - across[1]) * sine) - 0.5


def _direction(stream: _Stream, count: int) -> tuple[Field, Field]:
    """Return cosine and sine of random angles, [count, 1, 1], in exact arithmetic."""
    vector = stream.uniform(2, count, 1, 1, low=-1.0, high=1.0)
    length = _length(*vector) + 2.0**-60
    return vector[0] / length, vector[1] / length


def _length(u: Field, v: Field) -> Field:
    return np.sqrt(u * u + v * v)


def _box(u: Field, v: Field, half_width: Field, half_height: Field) -> Field:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _triangle(u: Field, v: Field, r: Field) -> Field:
    half, side = 0.5, 0.75**0.5
    slanted = np.maximum(side * u + half * v, half * v - side * u)
    return np.maximum(slanted, -v) - 0.55 * r


def _bars(u: Field, v: Field, r: Field) -> Field:
    outer = np.abs(np.abs(u) - 0.72 * r)
    return np.maximum(np.minimum(np.abs(u), outer) - 0.19 * r, np.abs(v) - 0.85 * r)


_SHAPES: dict[str, Shape] = {
    "disc": lambda u, v, r: _length(u, v) - r,
    "ring": lambda u, v, r: np.abs(_length(u, v) - 0.78 * r) - 0.2 * r,
    "square": lambda u, v, r: _box(u, v, 0.8 * r, 0.8 * r),
    "frame": lambda u, v, r: np.abs(_box(u, v, 0.68 * r, 0.68 * r)) - 0.18 * r,
    "triangle": _triangle,
    "cross": lambda u, v, r: np.minimum(
        _box(u, v, r, 0.27 * r), _box(u, v, 0.27 * r, r)
    ),
    "bars": _bars,
    "crescent": lambda u, v, r: np.maximum(
        _length(u, v) - r, 0.8 * r - _length(u - 0.55 * r, v)
    ),
    "half disc": lambda u, v, r: np.maximum(_length(u - 0.4 * r, v) - r, u - 0.4 * r),
    "four dots": lambda u, v, r: (
        _length(np.abs(u) - 0.62 * r, np.abs(v) - 0.62 * r) - 0.32 * r
    ),
}
"""Signed distance to each shape's edge, negative inside, in coordinates (u, v) from the
center of a shape of radius r."""

SHAPE_CLASSES = tuple(_SHAPES)
"""Names of the ten drawn shapes, in the order of their labels."""
