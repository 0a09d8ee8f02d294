"""From stored pixels to what the net sees, on the accelerator, one key an image.

``Batch`` is the one joint between data and everything else: uint8 in, floats out.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.validation import Range, Share

_Part = Annotated[float, Range(0, 1, above=True)]


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
    crop_scale: tuple[_Part, _Part] | None = None
    """Of streamed images: train on a random part that covers a share of the area
    between these two, in the proportion of 3:4 to 4:3, scaled to data.size (0.08 1 for
    ImageNet); None: on the whole central square."""
    test_crop: _Part = 1.0
    """Of streamed images: see of test images the central square of so much of the
    shorter side (0.875, 224 of 256, for ImageNet)."""
    test_flip: bool = False
    """Evaluate and predict by the mean logits of an image and its mirror image, at
    twice the cost."""
    colour_jitter: Share = 0.0
    """Brightness, then contrast, then colour of the stored pixels times a factor from
    1 - colour_jitter to 1 + colour_jitter, by chance."""
    randaugment: Annotated[int, Range(0, 14)] = 0
    """Change each image's stored pixels by so many operations, each one of fourteen by
    chance (RandAugment, Cubuk et al. 2020)."""
    randaugment_magnitude: Annotated[int, Range(0, 30)] = 9
    """How strong they are; 30 is AutoAugment's strongest (10 in the paper)."""
    cutout: int = 0
    """Side, in pixels, of a square of the mean colour at a random place, which may hang
    over the border (DeVries & Taylor 2017); 0: none."""
    mixup: Annotated[float, Range(0.001, 100)] | None = None
    """Blend each image and its target with another's, by a share from
    Beta(mixup, mixup) (Zhang et al. 2018); None: no."""
    cutmix: Annotated[float, Range(0.001, 100)] | None = None
    """Replace a box of each image by another's, and as large a share of its target; the
    share left is from Beta(cutmix, cutmix) (Yun et al. 2019); None: no. With mixup too,
    chance decides between them for each image."""
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


# Of an image's key: from 2 on, because ``split`` uses 0 and 1.
CUTOUT, MIX = 2, 3


def normalise(images: jax.Array, config: AugmentConfig, dtype: str) -> jax.Array:
    """uint8 [B, H, W, C] -> ``dtype`` [B, H, W, C] of mean 0 and variance 1 a channel.

    Scaled (bilinear) to ``config.input_shape``. The arithmetic is float32, or float64
    where that is ``dtype``.
    """
    wide = "float64" if dtype == "float64" else "float32"
    mean, std = jnp.asarray(config.mean, wide), jnp.asarray(config.std, wide)
    images = (images.astype(wide) / 255 - mean) / std
    if config.resize is not None:
        # The number of images may be a symbol, as in an export.
        shape = (images.shape[0], *config.input_shape(images.shape[1:]))
        images = jax.image.resize(images, shape, "bilinear")
    return images.astype(dtype)


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
    """Crop, mirror and cut out of each normalised image [B, H, W, C] by its key [B].

    The crop's border and what is cut out are 0, which after normalisation is the mean
    colour.
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
    if config.cutout:
        side = jnp.int32(config.cutout)
        inside = jax.vmap(lambda key: _box(key, images.shape[1:3], side, side))
        images = jnp.where(inside(draw_keys(keys, CUTOUT))[..., None], 0, images)
    return images


def mix(
    images: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    config: AugmentConfig,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Mix each image and its target with those of another, as mixup or cutmix say.

    The other of place p of the global batch, in random order, is at B-1-p: so it does
    not depend on how many devices share the batch, and each device hears from one other
    only. What is mixed in is not itself mixed.

    Args:
        images: [B, H, W, C], normalised.
        target: float [B, classes].
        mask: bool [B]; images with, or of, masked ones stay as they are.
        keys: [B].
        config: mixup and cutmix.
        axis_name: the mapped axis that shares the batch; None: there is none.
    """
    if config.mixup is None and config.cutmix is None:
        return images, target
    height, width = images.shape[1:3]

    def shares(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The share that stays, of each pixel [H, W] and of the target."""
        which, mixup, cutmix, box = jax.random.split(key, 4)
        if config.cutmix is not None:
            kept = jax.random.beta(cutmix, config.cutmix, config.cutmix, dtype=float)
            side = jnp.sqrt(1 - kept)
            sides = [(side * size).astype(jnp.int32) for size in (height, width)]
            pixels = 1 - _box(box, (height, width), *sides).astype(float)
            found = pixels, pixels.mean()  # what hangs over the border was not cut
        if config.mixup is not None:
            kept = jax.random.beta(mixup, config.mixup, config.mixup, dtype=float)
            even = jnp.full((height, width), kept), kept
            if config.cutmix is not None:
                even = jax.tree.map(
                    partial(jnp.where, jax.random.bernoulli(which)), even, found
                )
            found = even
        return found

    pixels, whole = jax.vmap(shares)(draw_keys(keys, MIX))
    others = jax.tree.map(
        lambda x: _from_the_other_end(x, axis_name), (images, target, mask)
    )
    both = mask & others[2]
    pixels = jnp.where(both[:, None, None], pixels, 1)[..., None].astype(images.dtype)
    whole = jnp.where(both, whole, 1)[:, None].astype(target.dtype)
    return (
        pixels * images + (1 - pixels) * others[0],
        whole * target + (1 - whole) * others[1],
    )


def draw_keys(keys: jax.Array, use: int) -> jax.Array:
    """Keys of one use of each image's key, [B]; others stay as they are by it."""
    return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def _box(
    key: jax.Array, shape: tuple[int, int], height: jax.Array, width: jax.Array
) -> jax.Array:
    """Where a box is whose centre is any pixel, by chance: bool [H, W]."""
    inside = []
    for size, side, at in zip(
        shape, (height, width), jax.random.split(key), strict=True
    ):
        first = jax.random.randint(at, (), 0, size, jnp.int32) - side // 2
        place = jnp.arange(size, dtype=jnp.int32)
        inside.append((place >= first) & (place < first + side))
    return inside[0][:, None] & inside[1][None, :]


def _from_the_other_end(x: jax.Array, axis_name: str | None) -> jax.Array:
    """[B, ...] of this device -> what stands at places B-1-p of the global batch."""
    x = x[::-1]
    if axis_name is None:
        return x
    last = lax.axis_size(axis_name) - 1
    return lax.ppermute(x, axis_name, [(d, last - d) for d in range(last + 1)])
