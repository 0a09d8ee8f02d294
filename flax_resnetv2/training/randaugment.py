"""Color jitter and RandAugment on stored pixels.

The operations are PIL's on uint8, with PIL's rounding. Each image draws its own
operation, and under ``vmap`` a switch would compute all fourteen for every image. But
they are of only three kinds: pixels are moved, looked up in a table, or blended with
another image. A ``Change`` describes one operation as one step of each kind, two of
which change nothing, so every image is computed three times instead of fourteen.
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
"""The fourteen of Cubuk et al. 2020, by PIL's names."""
STRONGEST = 30
"""Magnitude at which an operation is as strong as AutoAugment's strongest."""
_DEGREES, _SHEAR, _TRANSLATE, _BLEND, _BITS = 30.0, 0.3, 150 / 331, 0.9, 4
"""AutoAugment's strongest (Cubuk et al. 2019, table 6): the angle, the shear, the share
of the image's side, how far a blend goes from 1, and the bits that are cut off."""
_TABLES = ("autocontrast", "equalize", "solarize", "posterize")
_BLENDS = ("color", "contrast", "brightness", "sharpness")


class Change(NamedTuple):
    """One operation: what it does of each kind."""

    move: jax.Array
    """float32 [2, 3]: where the pixel at (x, y, 1) comes from, as PIL's AFFINE."""
    table: jax.Array
    """int32: 0 for none, or 1 + the place in ``_TABLES``."""
    blend: jax.Array
    """int32: the place in ``_BLENDS``."""
    factor: jax.Array
    """float32: share of the image in the blend; 1 changes nothing."""
    strength: jax.Array
    """float32 in [0, 1], of the tables."""


def change_pixels(
    images: jax.Array, keys: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Apply what ``config`` asks for to each image, uint8 [B, H, W, C], by its key.

    ``config.mean`` is the color of what is moved in. Gray is PIL's of three channels,
    and the mean of any other number of them.
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
    """Say what an operation does.

    Args:
        operation: int32, a place in ``OPERATIONS``.
        strength: float32 from 0, nothing, to 1, the strongest.
        sign: float32, 1 or -1: the direction of a move, and whether a blend goes
            beyond the image or back from it.
        shape: (height, width, channels).
    """
    height, width, _ = shape
    amount = strength * sign

    def of(name: str, value: jax.Array | float) -> jax.Array:
        """``value`` if this is the operation, and 0 if not."""
        return jnp.where(operation == OPERATIONS.index(name), value, 0.0)

    angle = of("rotate", math.radians(_DEGREES) * amount)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    # Turned around the center; sheared from the corner.
    x, y = width / 2, height / 2
    move = jnp.array(
        [
            [
                cosine,
                of("shear_x", _SHEAR * amount) - sine,
                of("translate_x", _TRANSLATE * width * amount)
                + (x - cosine * x + sine * y),
            ],
            [
                of("shear_y", _SHEAR * amount) + sine,
                cosine,
                of("translate_y", _TRANSLATE * height * amount)
                + (y - sine * x - cosine * y),
            ],
        ]
    )
    table = sum(of(name, place + 1.0) for place, name in enumerate(_TABLES))
    blend = sum(of(name, float(place)) for place, name in enumerate(_BLENDS))
    factor = 1 + sum(of(name, _BLEND * amount) for name in _BLENDS)
    return Change(
        move, table.astype(jnp.int32), blend.astype(jnp.int32), factor, strength
    )


def apply_change(image: jax.Array, change: Change, color: jax.Array) -> jax.Array:
    """Change an image, uint8 [H, W, C]; ``color`` [C] is that of what is moved in."""
    image = _moved(image, change.move, color)
    image = _looked_up(image, change.table, change.strength)
    others = _gray_of(image), _mean_of(image), jnp.zeros_like(image), _smooth_of(image)
    return _blend(lax.select_n(change.blend, *others), image, change.factor)


def _jitter(image: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and color, each by a factor around 1."""
    draw = jax.random.uniform(key, (3,), jnp.float32, 1 - strength, 1 + strength)
    image = _blend(jnp.zeros_like(image), image, draw[0])
    image = _blend(_mean_of(image), image, draw[1])
    return _blend(_gray_of(image), image, draw[2])


def _moved(image: jax.Array, move: jax.Array, color: jax.Array) -> jax.Array:
    """Each pixel from where ``move`` says, the nearest; ``color`` from outside."""
    height, width, _ = image.shape
    # The centers of pixels are halves.
    y, x = (jnp.arange(n, dtype=jnp.float32) + 0.5 for n in (height, width))
    y, x = jnp.meshgrid(y, x, indexing="ij")
    places = jnp.stack([x, y, jnp.ones_like(x)])
    places = jnp.einsum("ij,jhw->ihw", move, places, precision="highest")
    x, y = jnp.floor(places).astype(jnp.int32)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    found = image[jnp.clip(y, 0, height - 1), jnp.clip(x, 0, width - 1)]
    return jnp.where(inside[..., None], found, color)


def _looked_up(image: jax.Array, table: jax.Array, strength: jax.Array) -> jax.Array:
    """Each value by the table of its channel."""
    channels = image.shape[-1]
    place = image.astype(jnp.int32) + 256 * jnp.arange(channels, dtype=jnp.int32)
    counts = jnp.zeros(256 * channels, jnp.int32).at[place].add(1).reshape(channels, -1)
    values = jnp.broadcast_to(jnp.arange(256, dtype=jnp.int32), counts.shape)
    there = counts > 0
    low = lax.argmax(there, 1, jnp.int32)[:, None]
    high = 255 - lax.argmax(there[:, ::-1], 1, jnp.int32)[:, None]
    # All is stretched to 0 .. 255; a single value stays.
    stretched = (values - low) * 255 // jnp.maximum(high - low, 1)
    stretched = jnp.where(high > low, stretched, values)
    # As many pixels below each value as its share of 255.
    most = jnp.take_along_axis(counts, high, 1)
    step = (image.size // channels - most) // 255
    below = jnp.cumsum(counts, 1, dtype=jnp.int32) - counts + step // 2
    equal = jnp.where(step > 0, below // jnp.maximum(step, 1), values)
    threshold = jnp.ceil(256 * (1 - strength)).astype(jnp.int32)
    inverted = jnp.where(values < threshold, values, 255 - values)
    bits = jnp.round(_BITS * strength).astype(jnp.int32)
    cut = values >> bits << bits
    tables = lax.select_n(table, values, stretched, equal, inverted, cut)
    return jnp.clip(tables, 0, 255).astype(jnp.uint8).reshape(-1)[place]


def _blend(other: jax.Array, image: jax.Array, factor: jax.Array) -> jax.Array:
    """``factor`` of the image, the rest of the other; beyond the image above 1."""
    a, b = other.astype(jnp.float32), image.astype(jnp.float32)
    return jnp.clip(a + factor * (b - a), 0, 255).astype(jnp.uint8)


def _gray_of(image: jax.Array) -> jax.Array:
    """Without color, uint8 [H, W, C]."""
    wide = image.astype(jnp.int32)
    if image.shape[-1] == 3:  # ITU-R 601-2, in 16 bits behind the point
        weighed = wide * jnp.array([19595, 38470, 7471], jnp.int32)
        gray = (weighed.sum(-1, dtype=jnp.int32, keepdims=True) + 2**15) >> 16
    else:
        gray = wide.sum(-1, dtype=jnp.int32, keepdims=True) // image.shape[-1]
    return jnp.broadcast_to(gray.astype(jnp.uint8), image.shape)


def _mean_of(image: jax.Array) -> jax.Array:
    """The mean gray everywhere."""
    mean = _gray_of(image)[..., 0].astype(jnp.float32).mean()
    return jnp.full_like(image, jnp.floor(mean + 0.5).astype(jnp.uint8))


def _smooth_of(image: jax.Array) -> jax.Array:
    """Means over 3 x 3 pixels, the middle one counted five times; the border stays."""
    height, width, _ = image.shape
    wide = image.astype(jnp.int32)
    total = 4 * wide[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total += wide[row : height - 2 + row, column : width - 2 + column]
    smooth = (2 * total + 13) // 26  # rounded
    return image.at[1:-1, 1:-1].set(smooth.astype(jnp.uint8))
