"""From stored pixels to what the net sees, on the accelerator, one key an image.

``Batch`` is the one joint between data and everything else: uint8 in, floats out.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.fields import Range


class Batch(NamedTuple):
    """Images as stored. ``mask`` is False where a row only fills the batch up."""

    image: jax.Array
    """uint8 [B, H, W, C]"""
    label: jax.Array
    """int32 [B], the class of each; or uint8 or bool [B, K], which of K labels each
    has."""
    mask: jax.Array
    """bool [B]"""


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to images: normalisation always, the random parts in training."""

    resize: Annotated[int, Range(1, 1024)] | None = None
    """Scale images to squares of this side first, as for nets that others trained on
    larger images; None: as stored."""
    crop_padding: int = 4
    """Pad by so many pixels on each side, then crop to the old size; 0: no crop."""
    flip: bool = True
    """Mirror every second image, by chance."""
    mean: tuple[float, ...] | None = None
    """Channel means in [0, 1]; None: those that belong to the weights, or else those of
    the training split (saved with the run)."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations in [0, 1]; None: as mean."""

    def input_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(height, width, channels) of what the net sees of stored images."""
        if self.resize is None:
            return image_shape
        return (self.resize, self.resize, image_shape[2])


def normalise(images: jax.Array, config: AugmentConfig, dtype: str) -> jax.Array:
    """uint8 [B, H, W, C] -> ``dtype`` [B, H, W, C] of mean 0 and variance 1 a channel.

    Scaled (bilinear) to ``config.input_shape``. The arithmetic is float32, or float64
    where that is ``dtype``.
    """
    wide = "float64" if dtype == "float64" else "float32"
    mean, std = jnp.asarray(config.mean, wide), jnp.asarray(config.std, wide)
    images = (images.astype(wide) / 255 - mean) / std
    shape = (len(images), *config.input_shape(images.shape[1:]))
    return jax.image.resize(images, shape, "bilinear").astype(dtype)


def positions(size: int, axis_name: str | None) -> jax.Array:
    """Places in the global batch of this device's ``size`` images, int32 [size]."""
    places = jnp.arange(size, dtype=jnp.int32)
    return places if axis_name is None else places + lax.axis_index(axis_name) * size


def image_keys(key: jax.Array, step: jax.Array, position: jax.Array) -> jax.Array:
    """Keys [B]: one for each image, from the step and its place in the global batch.

    They do not depend on how many devices share the batch.
    """
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda place: jax.random.fold_in(at_step, place))(position)


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Crop and mirror each normalised image [B, H, W, C] by its own key [B].

    The crop's border is 0, which after normalisation is the mean colour.
    """
    crop_key, flip_key = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
    if config.crop_padding:
        p, shape = config.crop_padding, images.shape[1:]
        padded = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
        corners = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * p + 1))(
            crop_key
        )
        images = jax.vmap(
            lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), shape)
        )(padded, corners)
    if config.flip:
        mirror = jax.vmap(jax.random.bernoulli)(flip_key)
        images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
    return images
