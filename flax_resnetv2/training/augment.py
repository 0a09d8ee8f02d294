"""From stored pixels to the net's input: normalization and augmentation, on the device.

Every random choice has a key of its own per image (see ``random_streams``).
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.training.random_streams import RandomStream, stream_keys
from flax_resnetv2.validation import Range, Share

_Part = Annotated[float, Range(0, 1, above=True)]
_Beta = Annotated[float, Range(0.001, 100)]


@dataclass(frozen=True)
class AugmentConfig:
    """How images are normalized, and how training images are augmented."""

    crop_padding: int = 4
    """Pad images by this many pixels on each side, then crop them at random to their
    old size; 0 turns cropping off."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    color_jitter: Share = 0.0
    """Multiply brightness, then contrast, then saturation by random factors between
    1 - color_jitter and 1 + color_jitter."""
    randaugment: Annotated[int, Range(0, 14)] = 0
    """Number of RandAugment operations per image, each drawn from fourteen (Cubuk et
    al. 2020)."""
    randaugment_magnitude: Annotated[int, Range(0, 30)] = 9
    """Strength of the RandAugment operations; 30 is AutoAugment's strongest (10 in the
    paper)."""
    cutout: int = 0
    """Side, in pixels, of a square at a random place that is set to the mean color; it
    may extend over the border (DeVries & Taylor 2017). 0 turns cutout off."""
    mixup: _Beta | None = None
    """Blend each image and its target with another's; the share is drawn from
    Beta(mixup, mixup) (Zhang et al. 2018). None turns mixup off."""
    cutmix: _Beta | None = None
    """Replace a box of each image by another's, and the same share of its target; the
    share kept is drawn from Beta(cutmix, cutmix) (Yun et al. 2019). None turns cutmix
    off. With mixup set too, each image gets one of the two at random."""
    resize: Annotated[int, Range(1, 1024)] | None = None
    """Scale images to squares of this side, in pixels, before anything else; None keeps
    the stored size."""
    crop_scale: tuple[_Part, _Part] | None = None
    """For streamed images: train on a random part that covers a share of the area
    between these two, with aspect ratio 3:4 to 4:3, scaled to data.image_size (0.08 1
    for ImageNet); None uses the whole central square."""
    test_crop: _Part = 1.0
    """For streamed images: evaluate on the central square whose side is this share of
    the shorter side (0.875, 224 of 256, for ImageNet)."""
    test_flip: bool = False
    """Evaluate and predict with the mean logits of an image and its mirror image, at
    twice the cost."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1]; None takes those of the weights that training
    starts from, else those of the training split."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in [0, 1]; None as for mean."""

    def input_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the net's input shape (height, width, channels) for stored images."""
        if self.resize is None:
            return image_shape
        return (self.resize, self.resize, image_shape[2])


NORMALIZATION = AugmentConfig(
    crop_padding=0, flip=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
"""The normalization that all published weights expect: pixels scaled to -1 ... 1. For
``normalize`` and ``Predictor``."""


def normalize(images: jax.Array, config: AugmentConfig, dtype: str) -> jax.Array:
    """Scale stored images to mean 0 and variance 1 per channel, and resize them.

    Args:
        images: uint8 [B, H, W, C].
        config: its ``mean``, ``std`` and ``resize``.
        dtype: of the result; the arithmetic is float32, or float64 for "float64".

    Returns:
        ``dtype`` [B, *config.input_shape((H, W, C))].
    """
    wide = "float64" if dtype == "float64" else "float32"
    mean, std = jnp.asarray(config.mean, wide), jnp.asarray(config.std, wide)
    images = (images.astype(wide) / 255 - mean) / std
    if config.resize is not None:
        # The number of images may be symbolic, as in an export.
        shape = (images.shape[0], *config.input_shape(images.shape[1:]))
        images = jax.image.resize(images, shape, "bilinear")
    return images.astype(dtype)


def positions(size: int, axis_name: str | None) -> jax.Array:
    """Return the global batch positions of this device's ``size`` images, int32."""
    local = jnp.arange(size, dtype=jnp.int32)
    return local if axis_name is None else local + lax.axis_index(axis_name) * size


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Crop, mirror and cut out normalized images [B, H, W, C] by their keys [B].

    Padding and cut-out pixels are 0, which after normalization is the mean color.
    """
    if config.crop_padding:
        p, shape = config.crop_padding, images.shape[1:]
        padded = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
        corners = jax.vmap(lambda k: jax.random.randint(k, (2,), 0, 2 * p + 1))(
            stream_keys(keys, RandomStream.CROP)
        )
        images = jax.vmap(
            lambda image, at: lax.dynamic_slice(image, (at[0], at[1], 0), shape)
        )(padded, corners)
    if config.flip:
        mirror = jax.vmap(jax.random.bernoulli)(stream_keys(keys, RandomStream.FLIP))
        images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
    if config.cutout:
        side = jnp.int32(config.cutout)
        inside = jax.vmap(lambda key: _random_box(key, images.shape[1:3], side, side))(
            stream_keys(keys, RandomStream.CUTOUT)
        )
        images = jnp.where(inside[..., None], 0, images)
    return images


def mix(
    images: jax.Array,
    target: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    config: AugmentConfig,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Mix each image and its target with another's, by mixup or cutmix.

    The image at position p of the global batch is mixed with the one at B-1-p; batches
    are in random order. The partner thus does not depend on the number of devices, and
    each device exchanges images with one other device only. Partners are unmixed.

    Args:
        images: [B, H, W, C], normalized.
        target: float [B, classes].
        mask: bool [B]; pairs with a masked image stay as they are.
        keys: [B].
        config: its ``mixup`` and ``cutmix``.
        axis_name: the mapped axis that the batch is sharded over, or None.
    """
    if config.mixup is None and config.cutmix is None:
        return images, target
    height, width = images.shape[1:3]

    def kept_shares(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The share kept of each pixel, [H, W], and of the target, []."""
        which, mixup, cutmix, box = jax.random.split(key, 4)
        if config.cutmix is not None:
            kept = jax.random.beta(cutmix, config.cutmix, config.cutmix, dtype=float)
            side = jnp.sqrt(1 - kept)
            sides = [(side * size).astype(jnp.int32) for size in (height, width)]
            pixels = 1 - _random_box(box, (height, width), *sides).astype(float)
            cut = pixels, pixels.mean()  # the part over the border was not cut
            if config.mixup is None:
                return cut
        kept = jax.random.beta(mixup, config.mixup, config.mixup, dtype=float)
        even = jnp.full((height, width), kept), kept
        if config.cutmix is None:
            return even
        choose = partial(jnp.where, jax.random.bernoulli(which))
        return jax.tree.map(choose, even, cut)

    pixels, whole = jax.vmap(kept_shares)(stream_keys(keys, RandomStream.MIX))
    partners = jax.tree.map(
        lambda x: _reverse_batch(x, axis_name), (images, target, mask)
    )
    both = mask & partners[2]
    pixels = jnp.where(both[:, None, None], pixels, 1)[..., None].astype(images.dtype)
    whole = jnp.where(both, whole, 1)[:, None].astype(target.dtype)
    return (
        pixels * images + (1 - pixels) * partners[0],
        whole * target + (1 - whole) * partners[1],
    )


def _random_box(
    key: jax.Array, shape: tuple[int, int], height: jax.Array, width: jax.Array
) -> jax.Array:
    """A box with a random center, as a mask bool [H, W]."""
    inside = []
    for size, side, at in zip(
        shape, (height, width), jax.random.split(key), strict=True
    ):
        first = jax.random.randint(at, (), 0, size, jnp.int32) - side // 2
        index = jnp.arange(size, dtype=jnp.int32)
        inside.append((index >= first) & (index < first + side))
    return inside[0][:, None] & inside[1][None, :]


def _reverse_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """This device's rows [B, ...] -> the rows at positions B-1-p of the global batch."""
    x = x[::-1]
    if axis_name is None:
        return x
    last = lax.axis_size(axis_name) - 1
    return lax.ppermute(x, axis_name, [(d, last - d) for d in range(last + 1)])
