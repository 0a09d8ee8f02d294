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
    """Pad each side by this many pixels, then crop at random to the old size."""
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
    """Side, in pixels, of a square at a random position that is set to the mean color;
    it may extend over the border (DeVries & Taylor 2017)."""
    mixup: _Beta | None = None
    """Blend each image and its target with another image and its target, with a weight
    from Beta(mixup, mixup) (Zhang et al. 2018)."""
    cutmix: _Beta | None = None
    """Replace a box of each image by that of another, and the same share of its target;
    the share kept is drawn from Beta(cutmix, cutmix) (Yun et al. 2019). With mixup set
    too, each image gets one of the two at random."""
    resize: Annotated[int, Range(1, 1024)] | None = None
    """Scale images to squares of this side, in pixels; None keeps the stored size."""
    crop_scale: tuple[_Part, _Part] | None = None
    """For streamed images: train on a random crop that covers a share of the area
    between these two, with aspect ratio 3:4 to 4:3, scaled to data.image_size (0.08 1
    for ImageNet); None uses the whole central square."""
    test_crop: _Part = 1.0
    """For streamed images: evaluate on the central square with this share of the
    shorter side (0.875, 224 of 256, for ImageNet)."""
    test_flip: bool = False
    """Average the logits of an image and its mirror image when evaluating and
    predicting, at twice the cost."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1]; None takes that of the weights that training
    starts from, or else of the training split."""
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
        dtype: dtype of the result; computed in float32, or float64 for "float64".

    Returns:
        ``dtype`` [B, *config.input_shape((H, W, C))].
    """
    wide = "float64" if dtype == "float64" else "float32"
    mean, std = (
        jnp.asarray(values, wide).reshape(1, 1, 1, -1)
        for values in (config.mean, config.std)
    )
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

    Padding and cut-out pixels are 0, the mean color.
    """
    if config.crop_padding:
        p, shape = config.crop_padding, images.shape[1:]

        def crop(padded: jax.Array, key: jax.Array) -> jax.Array:
            row, column = jax.random.randint(key, (2,), 0, 2 * p + 1)
            return lax.dynamic_slice(padded, (row, column, 0), shape)

        padded = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
        images = jax.vmap(crop)(padded, stream_keys(keys, RandomStream.CROP))
    if config.flip:
        mirror = jax.vmap(jax.random.bernoulli)(stream_keys(keys, RandomStream.FLIP))
        images = jnp.where(mirror[:, None, None, None], images[:, :, ::-1], images)
    if config.cutout:
        sides = [jnp.int32(config.cutout)] * 2
        box = partial(_random_box, shape=images.shape[1:3], sides=sides)
        inside = jax.vmap(box)(stream_keys(keys, RandomStream.CUTOUT))
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

    The image at position p of the global batch is mixed with the unmixed one at B-1-p;
    batches are in random order. The partner thus does not depend on the number of
    devices, and each device exchanges images with one other device only.

    Args:
        images, target: [B, H, W, C], normalized, and float [B, classes].
        mask: bool [B]; pairs with a masked image are not mixed.
        keys: [B], from ``random_streams.image_keys``.
        config: its ``mixup`` and ``cutmix``.
        axis_name: the mapped axis that the batch is sharded over, or None.
    """
    if config.mixup is None and config.cutmix is None:
        return images, target
    height, width = images.shape[1:3]

    def kept_shares(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the share kept of each pixel, [H, W], and of the target, []."""
        which, mixup, cutmix, box = jax.random.split(key, 4)
        if config.cutmix is not None:
            kept = jax.random.beta(cutmix, config.cutmix, config.cutmix, dtype=float)
            side = jnp.sqrt(1 - kept)
            sides = [(side * size).astype(jnp.int32) for size in (height, width)]
            pixels = 1 - _random_box(box, (height, width), sides).astype(float)
            cut = pixels, pixels.mean()  # the part beyond the border cuts nothing
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
    key: jax.Array, shape: tuple[int, int], sides: list[jax.Array]
) -> jax.Array:
    """Return a box of these sides with a random center, as a mask bool [H, W]."""

    def inside(key: jax.Array, size: int, side: jax.Array) -> jax.Array:
        first = jax.random.randint(key, (), 0, size, jnp.int32) - side // 2
        index = jnp.arange(size, dtype=jnp.int32)
        return (index >= first) & (index < first + side)

    rows, columns = map(inside, jax.random.split(key), shape, sides)
    return rows[:, None] & columns[None, :]


def _reverse_batch(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Return for this device's rows [B, ...] those at global positions B-1-p."""
    x = x[::-1]
    if axis_name is None:
        return x
    last = lax.axis_size(axis_name) - 1
    return lax.ppermute(x, axis_name, [(d, last - d) for d in range(last + 1)])
