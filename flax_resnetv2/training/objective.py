"""What a net is trained for: the target, the loss, and what is counted.

The training step asks an ``Objective``; ``Classification`` is the usual one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_resnetv2.training.augment import AugmentConfig, Batch, mix

Sums = dict[str, jax.Array]
"""Sums over the unmasked images; ``loss`` is one of them."""
TOP5_CLASSES = 100
"""From so many classes on, evaluation also counts images whose class is among the five
likeliest."""


class Question(NamedTuple):
    """What a training step asks of the net; each array has a row an image."""

    images: jax.Array
    """[B, H, W, C], what the net sees."""
    target: jax.Array
    """What it should give."""
    inputs: dict[str, jax.Array]
    """More keyword arguments of the net."""


class Objective(Protocol):
    """What a net is trained for; pure, and the same on any number of devices."""

    def pose(
        self,
        images: jax.Array,
        batch: Batch,
        keys: jax.Array,
        axis_name: str | None,
    ) -> Question:
        """Ask for what a training step wants.

        Args:
            images: [B, H, W, C], normalised and augmented.
            batch: their labels and mask.
            keys: [B], of ``augment.image_keys``.
            axis_name: the mapped axis that shares the batch; None: there is none.
        """

    def score(self, outputs: Any, target: jax.Array, batch: Batch) -> Sums:
        """Measure what the net gave in training; of ``batch`` the images are None."""

    def examine(self, outputs: Any, images: jax.Array, batch: Batch) -> Sums:
        """Measure what the net gave for normalised images in evaluation."""


@dataclass(frozen=True)
class Classification:
    """One class an image, or which of several labels it has: ``loss``, ``correct``."""

    classes: int
    dtype: str
    """Of targets."""
    augmentation: AugmentConfig
    """Its mixup and cutmix."""
    smoothing: float = 0.0

    def pose(
        self,
        images: jax.Array,
        batch: Batch,
        keys: jax.Array,
        axis_name: str | None,
    ) -> Question:
        """Smoothed targets, mixed with those of other images."""
        target = targets(batch.label, self.classes, self.smoothing, self.dtype)
        images, target = mix(
            images, target, batch.mask, keys, self.augmentation, axis_name
        )
        return Question(images, target, {})

    def score(self, outputs: jax.Array, target: jax.Array, batch: Batch) -> Sums:
        """See ``score``."""
        loss, correct = score(outputs, target, batch)
        return {"loss": loss, "correct": correct}

    def examine(self, outputs: jax.Array, images: jax.Array, batch: Batch) -> Sums:
        """By plain targets; of many classes also ``correct_top5``."""
        target = targets(batch.label, self.classes, 0.0, outputs.dtype)
        sums = self.score(outputs, target, batch)
        if batch.label.ndim == 1 and self.classes >= TOP5_CLASSES:
            _, best = lax.top_k(outputs, 5)
            found = (best == batch.label[:, None]).any(1)
            sums["correct_top5"] = (found & batch.mask).sum()
        return sums


def targets(
    label: jax.Array, classes: int, smoothing: float, dtype: str | jnp.dtype
) -> jax.Array:
    """What the net should say, ``dtype`` [B, classes], from labels as of ``Batch``.

    One class an image: a distribution over the classes, smoothed towards all of them.
    Several labels: the probability of each, smoothed towards 1/2.
    """
    if label.ndim == 1:
        target = jax.nn.one_hot(label, classes, dtype=dtype)
        return optax.smooth_labels(target, smoothing)
    return (1 - smoothing) * label.astype(dtype) + smoothing / 2


def score(
    logits: jax.Array, target: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sums over the unmasked rows: the loss, and how much is right.

    One class an image (``batch.label`` [B]): softmax cross-entropy, and how many images
    are right. Several labels ([B, K]): sigmoid cross-entropy, its mean over the labels,
    and the share of labels that are right, summed over the images; by their count that
    is the mean accuracy of the labels.

    Args:
        logits: float [B, classes].
        target: [B, classes], of ``targets``, perhaps mixed (``augment.mix``). Right is
            what has the largest share in it.
        batch: its labels' kind, and its mask.
    """
    if batch.label.ndim == 1:
        loss = optax.softmax_cross_entropy(logits, target)
        right = lax.argmax(logits, 1, jnp.int32) == lax.argmax(target, 1, jnp.int32)
        return jnp.where(batch.mask, loss, 0).sum(), (right & batch.mask).sum()
    loss = optax.sigmoid_binary_cross_entropy(logits, target).mean(1)
    right = ((logits > 0) == (target > 0.5)).mean(1, dtype=logits.dtype)
    return jnp.where(batch.mask, loss, 0).sum(), jnp.where(batch.mask, right, 0).sum()
