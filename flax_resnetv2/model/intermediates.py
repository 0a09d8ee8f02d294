"""The maps inside a net, and what its residual units add.

>>> maps = activations(model, variables, images)
"""

from typing import Any

import flax.linen as nn
import jax

from flax_resnetv2.model.modules import ResidualStack, ResidualUnit, ResNetV2, Stem


def activations(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, jax.Array]:
    """Return the outputs of stem, units, stacks and head in evaluation mode.

    Images are [N, H, W, channels] and normalized. The results are maps [N, h, w, C] of
    "stem", "stack1/unit1", ..., "stack1", ..., and the output of "head".
    """

    def wanted(module: nn.Module, method: str) -> bool:
        kinds = (Stem, ResidualUnit, ResidualStack)
        return method == "__call__" and isinstance(module, kinds)

    captures = {"capture_intermediates": wanted, "mutable": ["intermediates"]}
    head, state = model.apply(variables, images, train=False, **captures)
    captured, found = state["intermediates"], {}
    if "stem" in captured:
        found["stem"] = captured["stem"]["__call__"][0]
    for s, stack in enumerate(model.plan.stacks, start=1):
        maps = captured[f"stack{s}"]
        for u in range(1, len(stack.units) + 1):
            found[f"stack{s}/unit{u}"] = maps[f"unit{u}"]["__call__"][0]
        found[f"stack{s}"] = maps["__call__"][0]
    return found | {"head": head}


def residual_ratios(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, list[float]]:
    """Return how much each residual unit adds to its shortcut, averaged over images.

    Arguments as of ``activations``. "stack1" has one number per unit: the norm of the
    residual branch over that of the shortcut branch. The article expects that "filters
    stay small at first".
    """
    return {
        stack: [float(ratio.mean()) for ratio in ratios]
        for stack, ratios in unit_ratios(model, variables, images).items()
    }


def unit_ratios(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, list[jax.Array]]:
    """Return ``residual_ratios`` per image: [N] for each unit, also under ``jit``."""
    _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    return {
        f"stack{s}": [
            state["intermediates"][f"stack{s}"][f"unit{u}"]["residual_ratio"][0]
            for u in range(1, len(stack.units) + 1)
        ]
        for s, stack in enumerate(model.plan.stacks, start=1)
    }
