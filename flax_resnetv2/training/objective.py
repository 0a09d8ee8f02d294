"""What a net is trained for: its targets, its loss and its metrics.

The training step calls an ``Objective``: ``Classification``, or ``Autoencoding`` for a
net with a latent head and its decoder.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_resnetv2.data.batch import Batch
from flax_resnetv2.training.augment import AugmentConfig, mix
from flax_resnetv2.training.random_streams import RandomStream, stream_keys

if TYPE_CHECKING:
    from flax_resnetv2.model.autoencoder import Autoencoder, Reconstruction
    from flax_resnetv2.model.modules import ResNetV2

Metrics = dict[str, Any]
"""What a step returns besides the state: sums and their ``count``, nested by layer."""
Sums = dict[str, jax.Array]
"""Metrics as sums over the unmasked images; ``loss`` is always among them."""
TOP5_CLASSES = 100
"""Evaluation of at least this many classes also counts top-5 accuracy."""


class StepInputs(NamedTuple):
    """What a training step feeds the net and compares its outputs with, row by row."""

    images: jax.Array
    """[B, H, W, C], the net's input."""
    target: jax.Array
    """What the net should return, as its objective defines it."""
    arguments: dict[str, jax.Array]
    """Further keyword arguments of the net."""


class Objective(Protocol):
    """What a net is trained for; pure, and independent of the number of devices."""

    def inputs(
        self, images: jax.Array, batch: Batch, keys: jax.Array, axis_name: str | None
    ) -> StepInputs:
        """Make the inputs and targets of a training step.

        Args:
            images: [B, H, W, C], normalized and augmented.
            batch: their labels and mask.
            keys: [B], from ``random_streams.image_keys``.
            axis_name: the mapped axis that the batch is sharded over, or None.
        """

    def train_metrics(self, outputs: Any, target: jax.Array, batch: Batch) -> Sums:
        """Compare the net's outputs with ``target``; ``batch.image`` is None here."""

    def eval_metrics(self, outputs: Any, images: jax.Array, batch: Batch) -> Sums:
        """Compare the net's outputs for normalized images with images or labels."""


@dataclass(frozen=True)
class Classification:
    """Classification of images with one class each, or with several labels each.

    One class per image (``batch.label`` [B]): softmax cross-entropy; an image is
    correct if its likeliest class has the largest share in the target.

    Several labels per image ([B, K]): sigmoid cross-entropy, averaged over the labels;
    an image counts as the share of its labels that are right, so that dividing by the
    number of images gives the mean accuracy of the labels.
    """

    classes: int
    dtype: str
    """The dtype of the targets."""
    augmentation: AugmentConfig
    """The source of mixup and cutmix."""
    smoothing: float = 0.0

    def inputs(
        self, images: jax.Array, batch: Batch, keys: jax.Array, axis_name: str | None
    ) -> StepInputs:
        """Make smoothed targets, and mix images and targets by mixup and cutmix."""
        target = targets(batch.label, self.classes, self.smoothing, self.dtype)
        images, target = mix(
            images, target, batch.mask, keys, self.augmentation, axis_name
        )
        return StepInputs(images, target, {})

    def train_metrics(
        self, outputs: jax.Array, target: jax.Array, batch: Batch
    ) -> Sums:
        """Sum ``loss`` and ``correct`` of logits and targets [B, classes]."""
        if batch.label.ndim == 1:
            loss = optax.softmax_cross_entropy(outputs, target)
            right = lax.argmax(outputs, 1, jnp.int32) == lax.argmax(
                target, 1, jnp.int32
            )
            correct = (right & batch.mask).sum()
        else:
            loss = optax.sigmoid_binary_cross_entropy(outputs, target).mean(1)
            right = ((outputs > 0) == (target > 0.5)).mean(1, dtype=outputs.dtype)
            correct = jnp.where(batch.mask, right, 0).sum()
        return {"loss": jnp.where(batch.mask, loss, 0).sum(), "correct": correct}

    def eval_metrics(self, outputs: jax.Array, images: jax.Array, batch: Batch) -> Sums:
        """Compare with unsmoothed targets; many classes also get ``correct_top5``."""
        target = targets(batch.label, self.classes, 0.0, outputs.dtype)
        sums = self.train_metrics(outputs, target, batch)
        if batch.label.ndim == 1 and self.classes >= TOP5_CLASSES:
            found = lax.top_k(outputs, 5)[1] == batch.label[:, None]
            sums["correct_top5"] = (found.any(1) & batch.mask).sum()
        return sums


def targets(
    label: jax.Array, classes: int, smoothing: float, dtype: str | jnp.dtype
) -> jax.Array:
    """Turn the labels of a ``Batch`` into targets, ``dtype`` [B, classes].

    Classes are smoothed towards the uniform distribution, several labels towards 1/2.
    """
    if label.ndim == 1:
        target = jax.nn.one_hot(label, classes, dtype=dtype)
        return optax.smooth_labels(target, smoothing)
    return (1 - smoothing) * label.astype(dtype) + smoothing / 2


@dataclass(frozen=True)
class Autoencoding:
    """Reconstruction of the input image, optionally with a variational latent vector.

    For a normalized image of n values x, reconstructed as y: ``squared_error`` is the
    mean of (x - y)^2, and ``loss`` is half of it. A variational autoencoder adds
    ``kl``, the divergence of the latent distribution from N(0, 1) in nats, to the loss
    with weight ``kl_weight / n``; n times the loss is then the negative evidence lower
    bound up to a constant.
    """

    latent: int
    """Size of the latent vector."""
    dtype: str
    """The dtype of the latent noise."""
    kl_weight: float | None
    """Weight of ``kl``; None: not variational."""

    def inputs(
        self, images: jax.Array, batch: Batch, keys: jax.Array, axis_name: str | None
    ) -> StepInputs:
        """Make each image its own target; draw the latent noise if variational."""
        arguments = {}
        if self.kl_weight is not None:
            arguments["noise"] = jax.vmap(
                lambda key: jax.random.normal(key, (self.latent,), self.dtype)
            )(stream_keys(keys, RandomStream.LATENT_NOISE))
        return StepInputs(images, images, arguments)

    def train_metrics(
        self, outputs: "Reconstruction", target: jax.Array, batch: Batch
    ) -> Sums:
        """Sum ``loss``, ``squared_error`` and, if variational, ``kl``."""
        error = jnp.square(outputs.image - target).mean((1, 2, 3))
        found = {"loss": error / 2, "squared_error": error}
        if self.kl_weight is not None:
            mean, log_variance = outputs.latent
            apart = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
            found["kl"] = apart.sum(1) / 2
            found["loss"] += self.kl_weight * found["kl"] / math.prod(target.shape[1:])
        return {
            name: jnp.where(batch.mask, values, 0).sum()
            for name, values in found.items()
        }

    def eval_metrics(
        self, outputs: "Reconstruction", images: jax.Array, batch: Batch
    ) -> Sums:
        """Compare the images with what the mean latent vectors decode to."""
        return self.train_metrics(outputs, images, batch)


def classification(
    model: "ResNetV2 | Autoencoder", augmentation: AugmentConfig, smoothing: float = 0.0
) -> Classification:
    """Return the objective of a net that returns logits."""
    dtype, classes = model.execution.param_dtype, model.plan.head.features
    return Classification(classes, dtype, augmentation, smoothing)
