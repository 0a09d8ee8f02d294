"""The evaluation step: a pure function of variables and batch, with no random draw.

It runs under any ``jit``, and with an ``axis_name`` inside ``pmap`` or ``shard_map``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.data.batch import Batch
from flax_resnetv2.training.augment import AugmentConfig, normalize
from flax_resnetv2.training.objective import Metrics, Objective, classification

if TYPE_CHECKING:
    from flax_resnetv2.model.autoencoder import Autoencoder
    from flax_resnetv2.model.modules import ResNetV2


def make_eval_step(
    model: "ResNetV2 | Autoencoder",
    augmentation: AugmentConfig,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
) -> Callable[[dict[str, Any], Batch], Metrics]:
    """Make the pure function ``step(variables, batch) -> metrics``.

    The metrics are sums over the unmasked images: ``Objective.eval_metrics``, their
    ``count``, and each unit's ``residual_ratio`` as {"stack1": {"unit1": ...}} (see
    ``ResidualUnit``).
    """
    objective = objective or classification(model, augmentation)
    stacks = [f"stack{k}" for k in range(1, len(model.plan.stacks) + 1)]

    def step(variables: dict[str, Any], batch: Batch) -> Metrics:
        images = normalize(batch.image, augmentation, model.execution.param_dtype)
        outputs, sown = eval_forward(model, variables, images, augmentation.test_flip)
        metrics = objective.eval_metrics(outputs, images, batch)
        metrics["count"] = batch.mask.sum()
        metrics["residual_ratio"] = {
            stack: {
                unit: jnp.where(batch.mask, values["residual_ratio"][0], 0).sum()
                for unit, values in sown["intermediates"][stack].items()
            }
            for stack in stacks
        }
        return metrics if axis_name is None else lax.psum(metrics, axis_name)

    return step


def eval_forward(
    model: "ResNetV2 | Autoencoder",
    variables: dict[str, Any],
    images: jax.Array,
    flip: bool,
) -> tuple[Any, Any]:
    """Apply the net in evaluation mode to normalized images [B, H, W, C].

    With ``flip`` the logits are means over an image and its mirror image, that is the
    renormalized geometric mean of the distributions: valid for softmax and sigmoid.

    Returns:
        The net's outputs, and the collections that its modules sow.
    """
    outputs, sown = model.apply(
        variables, images, train=False, mutable=["intermediates"]
    )
    if flip:
        mirrored = model.apply(variables, images[:, :, ::-1], train=False)
        outputs = (outputs + mirrored) / 2
    return outputs, sown
