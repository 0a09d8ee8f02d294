"""Looking into a net at work: its maps, and what its residual units add.

>>> maps = activations(model, variables, images)
"""

from typing import Any

import flax.linen as nn
import jax

from flax_resnetv2.model.modules import ResidualStack, ResidualUnit, ResNetV2, Stem


def activations(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, jax.Array]:
    """Follow images through the net: what stem, units and stacks give out.

    Args:
        model: a net, evaluated with its running statistics.
        variables: its parameters and statistics.
        images: [N, H, W, channels], normalized.

    Returns:
        "stem", "stack1/unit1", ..., "stack1", ... -> maps [N, h, w, C], and "head" ->
        what the head gives, in the order of the net.
    """

    def wanted(module: nn.Module, method: str) -> bool:
        kinds = (Stem, ResidualUnit, ResidualStack)
        return method == "__call__" and isinstance(module, kinds)

    head, state = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=wanted,
        mutable=["intermediates"],
    )
    captured, found = state["intermediates"], {}
    if "stem" in captured:
        found["stem"] = captured["stem"]["__call__"][0]
    for s, stack in enumerate(model.plan.stacks, start=1):
        here = captured[f"stack{s}"]
        for u in range(1, len(stack.units) + 1):
            found[f"stack{s}/unit{u}"] = here[f"unit{u}"]["__call__"][0]
        found[f"stack{s}"] = here["__call__"][0]
    return found | {"head": head}


def residual_ratios(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, list[float]]:
    """How much each residual unit adds to what its shortcut carries.

    Args:
        model: a net, evaluated with its running statistics.
        variables: its parameters and statistics.
        images: [N, H, W, channels], normalized.

    Returns:
        "stack1" -> one number a unit: the norm of its residual over the norm of its
        identity, a mean over the images. The article's "filters stay small at first".
    """
    return {
        stack: [float(ratio.mean()) for ratio in ratios]
        for stack, ratios in unit_ratios(model, variables, images).items()
    }


def unit_ratios(
    model: ResNetV2, variables: dict[str, Any], images: jax.Array
) -> dict[str, list[jax.Array]]:
    """The same of each image, [N] a unit, for anybody's ``jit``."""
    _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    sown = state["intermediates"]
    return {
        f"stack{s}": [
            sown[f"stack{s}"][f"unit{u}"]["residual_ratio"][0]
            for u in range(1, len(stack.units) + 1)
        ]
        for s, stack in enumerate(model.plan.stacks, start=1)
    }
