"""Color jitter and RandAugment on stored pixels.

The operations are PIL's on uint8, with PIL's rounding. Each image draws its own
operation, and under ``vmap`` a switch would compute all fourteen for every image. But
there are only three kinds: move pixels, look them up in a table, or blend them with
another image. A ``Change`` describes one operation as one step of each kind, two of
which change nothing, so each image takes three steps instead of fourteen.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.random_streams import RandomStream, stream_keys

OPERATIONS = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color"),
    *("posterize", "contrast", "brightness", "sharpness", "shear_x", "shear_y"),
    *("translate_x", "translate_y"),
)
"""The fourteen operations of Cubuk et al. 2020, by PIL's names."""
STRONGEST = 30
"""Magnitude of AutoAugment's strongest operations."""
_DEGREES, _SHEAR, _TRANSLATE, _BLEND, _BITS = 30.0, 0.3, 150 / 331, 0.9, 4
"""AutoAugment's strongest operations (Cubuk et al. 2019, table 6): angle, shear, shift
as a fraction of the side, distance of a blend's factor from 1, bits removed."""
_TABLES = ("autocontrast", "equalize", "solarize", "posterize")
_BLENDS = ("color", "contrast", "brightness", "sharpness")


class Change(NamedTuple):
    """One operation, as a step of each kind."""

    move: jax.Array
    """float32 [2, 3]: maps (x, y, 1) of a pixel to its source, like PIL's AFFINE."""
    table: jax.Array
    """int32: 0 for none, or 1 + the index in ``_TABLES``."""
    blend: jax.Array
    """int32: the index in ``_BLENDS``."""
    factor: jax.Array
    """float32: weight of the image in the blend; 1 changes nothing."""
    strength: jax.Array
    """float32 in [0, 1]: strength of the tables."""


def change_pixels(
    images: jax.Array, keys: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Apply color jitter and RandAugment to images, uint8 [B, H, W, C], by their keys.

    Pixels moved in from outside have the color ``config.mean``. Gray is PIL's for three
    channels, and the mean of the channels otherwise.
    """
    if config.color_jitter:
        jitter = jax.vmap(lambda image, key: _jitter(image, key, config.color_jitter))
        images = jitter(images, stream_keys(keys, RandomStream.COLOR_JITTER))
    if config.randaugment:
        color = jnp.asarray([round(255 * m) for m in config.mean], jnp.uint8)
        strength = jnp.float32(config.randaugment_magnitude / STRONGEST)

        def one(image: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            which, sign = jax.random.split(key)
            operation = jax.random.randint(which, (), 0, len(OPERATIONS), jnp.int32)
            sign = jax.random.rademacher(sign, dtype=jnp.float32)
            change = plan_change(operation, strength, sign, image.shape)
            return apply_change(image, change, color), None

        def several(image: jax.Array, key: jax.Array) -> jax.Array:
            return lax.scan(one, image, jax.random.split(key, config.randaugment))[0]

        images = jax.vmap(several)(images, stream_keys(keys, RandomStream.RANDAUGMENT))
    return images


def plan_change(
    operation: jax.Array,
    strength: jax.Array,
    sign: jax.Array,
    shape: tuple[int, int, int],
) -> Change:
    """Describe an operation as a ``Change``.

    Args:
        operation: int32, an index into ``OPERATIONS``.
        strength: float32 from 0 (no change) to 1 (the strongest).
        sign: float32, 1 or -1: direction of a move, or of a blend (more or less).
        shape: (height, width, channels).
    """
    height, width, _ = shape
    amount = strength * sign

    def of(name: str, value: jax.Array | float) -> jax.Array:
        """Return ``value`` if this is the operation, else 0."""
        return jnp.where(operation == OPERATIONS.index(name), value, 0.0)

    angle = of("rotate", math.radians(_DEGREES) * amount)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    shear_x, shear_y = of("shear_x", _SHEAR * amount), of("shear_y", _SHEAR * amount)
    shift_x = of("translate_x", _TRANSLATE * width * amount)
    shift_y = of("translate_y", _TRANSLATE * height * amount)
    # Rotation is about the center, shear about the corner.
    x, y = width / 2, height / 2
    move = (
        [cosine, shear_x - sine, shift_x + (x - cosine * x + sine * y)],
        [shear_y + sine, cosine, shift_y + (y - sine * x - cosine * y)],
    )
    table = sum(of(name, index + 1.0) for index, name in enumerate(_TABLES))
    blend = sum(of(name, float(index)) for index, name in enumerate(_BLENDS))
    factor = 1 + sum(of(name, _BLEND * amount) for name in _BLENDS)
    table, blend = table.astype(jnp.int32), blend.astype(jnp.int32)
    return Change(jnp.array(move), table, blend, factor, strength)


def apply_change(image: jax.Array, change: Change, color: jax.Array) -> jax.Array:
    """Change an image, uint8 [H, W, C]; pixels from outside get ``color`` [C]."""
    image = _move(image, change.move, color)
    image = _look_up(image, change.table, change.strength)
    others = _gray(image), _mean_gray(image), jnp.zeros_like(image), _smooth(image)
    return _blend(lax.select_n(change.blend, *others), image, change.factor)


def _jitter(image: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Scale brightness, contrast and saturation, each by a random factor around 1."""
    draw = jax.random.uniform(key, (3,), jnp.float32, 1 - strength, 1 + strength)
    image = _blend(jnp.zeros_like(image), image, draw[0])
    image = _blend(_mean_gray(image), image, draw[1])
    return _blend(_gray(image), image, draw[2])


def _move(image: jax.Array, move: jax.Array, color: jax.Array) -> jax.Array:
    """Take each pixel from its nearest source; pixels from outside get ``color``."""
    height, width, _ = image.shape
    # Pixel centers are at halves.
    y, x = (jnp.arange(n, dtype=jnp.float32) + 0.5 for n in (height, width))
    y, x = jnp.meshgrid(y, x, indexing="ij")
    target = jnp.stack([x, y, jnp.ones_like(x)])
    source = jnp.einsum("ij,jhw->ihw", move, target, precision="highest")
    x, y = jnp.floor(source).astype(jnp.int32)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    found = image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
    return jnp.where(inside[..., None], found, color[None, None])


def _look_up(image: jax.Array, table: jax.Array, strength: jax.Array) -> jax.Array:
    """Replace each value by its entry in the table of its channel."""
    channels = image.shape[-1]
    first = 256 * jnp.arange(channels, dtype=jnp.int32)
    index = image.astype(jnp.int32) + first[None, None]
    counts = jnp.zeros(256 * channels, jnp.int32).at[index].add(1).reshape(channels, -1)
    values = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), counts.shape)
    present = counts > 0
    low = lax.argmax(present, 1, jnp.int32)[:, None]
    high = 255 - lax.argmax(present[:, ::-1], 1, jnp.int32)[:, None]
    # autocontrast: stretch low ... high to 0 ... 255, unless they are equal.
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    stretched = jnp.where(high > low, stretched, values)
    # equalize: make the cumulative distribution linear.
    most = jnp.take_along_axis(counts, high, 1)
    step = (image.size // channels - most) // 255
    below = jnp.cumsum(counts, 1, dtype=jnp.int32) - counts + step // 2
    equal = jnp.where(step > 0, below // jnp.maximum(step, 1), values)
    threshold = jnp.ceil(256 * (1 - strength)).astype(jnp.int32)
    inverted = jnp.where(values < threshold, values, 255 - values)
    bits = jnp.round(_BITS * strength).astype(jnp.int32)
    cut = values >> bits << bits
    tables = lax.select_n(table, values, stretched, equal, inverted, cut)
    return jnp.clip(tables, 0, 255).astype(jnp.uint8).reshape(-1)[index]


def _blend(other: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """Interpolate from ``other`` (factor 0) to ``image`` (factor 1), and beyond."""
    a, b = other.astype(jnp.float32), image.astype(jnp.float32)
    return jnp.clip(a + factor * (b - a), 0, 255).astype(jnp.uint8)


def _gray(image: jax.Array) -> jax.Array:
    """Remove the color from an image, uint8 [H, W, C]."""
    wide = image.astype(jnp.int32)
    if image.shape[-1] == 3:  # ITU-R 601-2, in 16-bit fixed point
        weighted = wide * jnp.array([[[19595, 38470, 7471]]], jnp.int32)
        gray = (weighted.sum(-1, dtype=jnp.int32, keepdims=True) + 2**15) >> 16
    else:
        gray = wide.sum(-1, dtype=jnp.int32, keepdims=True) // image.shape[-1]
    return jnp.broadcast_to(gray.astype(jnp.uint8), image.shape)


def _mean_gray(image: jax.Array) -> jax.Array:
    """Fill an image with its mean gray."""
    mean = _gray(image)[..., 0].astype(jnp.float32).mean()
    return jnp.full_like(image, jnp.floor(mean + 0.5).astype(jnp.uint8))


def _smooth(image: jax.Array) -> jax.Array:
    """Average 3 x 3 pixels, the central one with weight 5; keep the border."""
    height, width, _ = image.shape
    wide = image.astype(jnp.int32)
    total = 4 * wide[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += wide[row : height - 2 + row, column : width - 2 + column]
    smooth = (2 * total + 13) // 26  # rounded
    return image.at[1:-1, 1:-1].set(smooth.astype(jnp.uint8))
