"""Images in memory, and the batches gathered from them.

``Batch`` is what data hands to training: uint8 images, labels and a mask.
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PADDING = -1
"""Stands in an order for a row that only fills the batch up."""


class Batch(NamedTuple):
    """Stored images with their labels."""

    image: jax.Array
    """uint8 [B, H, W, C]"""
    label: jax.Array
    """int32 [B], the class; or uint8 or bool [B, K], whether each of K labels holds."""
    mask: jax.Array
    """bool [B], False for rows that only fill the batch up."""


class Split(NamedTuple):
    """All images of a split in memory, in the order of their records."""

    image: np.ndarray | jax.Array
    """uint8 [N, H, W, C]"""
    label: np.ndarray | jax.Array
    """int32 [N], the class; or uint8 [N, K], whether each of K labels holds."""

    @property
    def num_images(self) -> int:
        """Number of images, N."""
        return len(self.label)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (height, width, channels)."""
        return self.image.shape[1:]

    @property
    def multi_label(self) -> bool:
        """Whether an image has several labels instead of one class."""
        return self.label.ndim == 2

    def take(self, first: int, count: int) -> "Split":
        """Return ``count`` images from ``first`` on."""
        last = first + count
        return Split(self.image[first:last], self.label[first:last])

    def checksum(self) -> int:
        """CRC-32 of all images and labels in their order."""
        return zlib.crc32(self.label, zlib.crc32(self.image))


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of ``count`` images, cut to whole batches: int32 [M].

    It depends on (seed, epoch) only, so the step number alone says where to resume.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[: count - count % batch_size].astype(np.int32)


def evaluation_order(count: int, batch_size: int) -> np.ndarray:
    """Return every image once, filled up with ``PADDING`` to whole batches: int32."""
    order = np.full(-(-count // batch_size) * batch_size, PADDING, np.int32)
    order[:count] = np.arange(count)
    return order


def gather_batch(split: Split, order: jax.Array, positions: jax.Array) -> Batch:
    """Gather the images ``order[positions]``. Pure; runs inside a compiled step.

    Args:
        split: arrays on the device.
        order: int32 [M], of ``epoch_order`` or ``evaluation_order``.
        positions: int32 [B], indices into ``order``.
    """
    index = order[positions]
    mask = index != PADDING
    index = jnp.where(mask, index, 0)
    return Batch(split.image[index], split.label[index], mask)
