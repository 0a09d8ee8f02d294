"""What a net is trained for: its targets, its loss and the metrics that are counted.

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
    from flax_resnetv2.model.autoencoder import Reconstruction

Sums = dict[str, jax.Array]
"""Metrics as sums over the unmasked images; ``loss`` is always among them."""
TOP5_CLASSES = 100
"""Evaluation of at least this many classes also counts top-5 accuracy."""


class StepInputs(NamedTuple):
    """What one training step feeds the net and compares it with; one row per image."""

    images: jax.Array
    """[B, H, W, C], the net's input."""
    target: jax.Array
    """What the net should return, as its objective defines it."""
    arguments: dict[str, jax.Array]
    """Further keyword arguments of the net."""


class Objective(Protocol):
    """What a net is trained for. Pure, and independent of the number of devices."""

    def inputs(
        self,
        images: jax.Array,
        batch: Batch,
        keys: jax.Array,
        axis_name: str | None,
    ) -> StepInputs:
        """Make the inputs and targets of a training step.

        Args:
            images: [B, H, W, C], normalized and augmented.
            batch: their labels and mask.
            keys: [B], of ``random_streams.image_keys``.
            axis_name: the mapped axis that the batch is sharded over, or None.
        """

    def train_metrics(self, outputs: Any, target: jax.Array, batch: Batch) -> Sums:
        """Compare the net's outputs with ``target``; ``batch.image`` is None here."""

    def eval_metrics(self, outputs: Any, images: jax.Array, batch: Batch) -> Sums:
        """Compare the net's outputs for normalized images with what is stored."""


@dataclass(frozen=True)
class Classification:
    """One class per image, or several independent labels: ``loss`` and ``correct``."""

    classes: int
    dtype: str
    """Of the targets."""
    augmentation: AugmentConfig
    """Its mixup and cutmix."""
    smoothing: float = 0.0

    def inputs(
        self,
        images: jax.Array,
        batch: Batch,
        keys: jax.Array,
        axis_name: str | None,
    ) -> StepInputs:
        """Smooth the targets, and mix images and targets if asked for."""
        target = targets(batch.label, self.classes, self.smoothing, self.dtype)
        images, target = mix(
            images, target, batch.mask, keys, self.augmentation, axis_name
        )
        return StepInputs(images, target, {})

    def train_metrics(
        self, outputs: jax.Array, target: jax.Array, batch: Batch
    ) -> Sums:
        """Sum ``loss`` and ``correct`` (see ``classification_sums``)."""
        loss, correct = classification_sums(outputs, target, batch)
        return {"loss": loss, "correct": correct}

    def eval_metrics(self, outputs: jax.Array, images: jax.Array, batch: Batch) -> Sums:
        """Use unsmoothed targets; add ``correct_top5`` from ``TOP5_CLASSES`` on."""
        target = targets(batch.label, self.classes, 0.0, outputs.dtype)
        sums = self.train_metrics(outputs, target, batch)
        if batch.label.ndim == 1 and self.classes >= TOP5_CLASSES:
            _, best = lax.top_k(outputs, 5)
            found = (best == batch.label[:, None]).any(1)
            sums["correct_top5"] = (found & batch.mask).sum()
        return sums


def targets(
    label: jax.Array, classes: int, smoothing: float, dtype: str | jnp.dtype
) -> jax.Array:
    """Turn the labels of a ``Batch`` into targets, ``dtype`` [B, classes].

    One class per image gives a distribution over the classes, smoothed towards the
    uniform one. Several labels per image give the probability of each, smoothed
    towards 1/2.
    """
    if label.ndim == 1:
        target = jax.nn.one_hot(label, classes, dtype=dtype)
        return optax.smooth_labels(target, smoothing)
    return (1 - smoothing) * label.astype(dtype) + smoothing / 2


def classification_sums(
    logits: jax.Array, target: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sum loss and correct answers over the unmasked images.

    One class per image (``batch.label`` [B]): softmax cross-entropy, and the number of
    images whose likeliest class has the largest share in the target.

    Several labels ([B, K]): sigmoid cross-entropy, averaged over the labels, and the
    share of labels that are right, so that dividing by the number of images gives the
    mean accuracy of the labels.

    Args:
        logits: float [B, classes].
        target: [B, classes], of ``targets``, possibly mixed (``augment.mix``).
        batch: its mask, and its labels for their kind.

    Returns:
        The two sums, scalars.
    """
    if batch.label.ndim == 1:
        loss = optax.softmax_cross_entropy(logits, target)
        right = lax.argmax(logits, 1, jnp.int32) == lax.argmax(target, 1, jnp.int32)
        return jnp.where(batch.mask, loss, 0).sum(), (right & batch.mask).sum()
    loss = optax.sigmoid_binary_cross_entropy(logits, target).mean(1)
    right = ((logits > 0) == (target > 0.5)).mean(1, dtype=logits.dtype)
    return jnp.where(batch.mask, loss, 0).sum(), jnp.where(batch.mask, right, 0).sum()


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
    """Of the latent noise."""
    kl_weight: float | None
    """None: not variational."""

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
