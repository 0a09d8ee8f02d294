"""The mirror image of a net, planned: what decodes a latent vector into an image.

For each stack a stack of the same kind of units, from the last to the first, at the
resolution and with the width of what entered that stack.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Architecture
from flax_resnetv2.model.layer_table import (
    LayerRow,
    conv_row,
    norm_row,
    stack_rows,
    unit_table,
)
from flax_resnetv2.model.planning import (
    LayerPlan,
    StackPlan,
    plan_conv,
    plan_norm,
    plan_stack,
)
from flax_resnetv2.validation import Count, Range, check_dataclass


@dataclass(frozen=True)
class AutoencoderConfig:
    """How a latent head learns: a decoder makes the image again."""

    units: Count = 1
    """Residual units in each stack of the decoder."""
    kl_weight: Annotated[float, Range(0, 1e6)] = 1.0
    """With architecture.latent_variance: weight of the Kullback-Leibler divergence of
    an image's latent distribution from N(0, 1) (the beta of beta-VAEs); 1 is the
    evidence lower bound, of pixels that are known up to N(0, 1) once normalised."""


@dataclass(frozen=True)
class DecoderPlan:
    """The net's mirror image, from the latent vector to the image."""

    start: tuple[int, int, int]
    """(height, width, maps) of what the latent vector fills: the net's last maps."""
    stacks: tuple[StackPlan, ...]
    """The last stack's mirror image first."""
    sizes: tuple[tuple[int, int], ...]
    """Resolution of each of them: of what entered the stack that it mirrors."""
    image: tuple[int, int]
    """Resolution of the image."""
    last: LayerPlan
    """From the last maps to the channels, at that resolution."""


def plan_decoder(
    architecture: Architecture,
    image_shape: tuple[int, int, int],
    config: AutoencoderConfig = AutoencoderConfig(),
) -> DecoderPlan:
    """Plan the mirror image of a net.

    Args:
        architecture: of the net; its reductions and kernels are the mirror's too.
        image_shape: (height, width, channels) of what the net sees.
        config: the mirror's own numbers.

    Raises:
        UsageError: the architecture or ``config`` breaks a rule, there is no latent
            head, or a reduction does not divide the width of what entered a stack.
    """
    check_dataclass(config, AutoencoderConfig, "autoencoder.")
    a, semantics = architecture, architecture.semantics
    if a.head != "latent":
        raise UsageError(
            f"architecture.head={a.head!r} gives no vector to decode; choose 'latent'"
        )
    # What leaves the stem and each stack: the last row of a part.
    shapes = {} if a.stem else {"image": image_shape}
    for row in unit_table(a, image_shape):
        shapes[row.name.partition("/")[0]] = row.shape
    del shapes["head"]
    entering, stacks = list(shapes.values()), []
    start = entering.pop()
    for k, (_, _, width) in reversed(list(enumerate(entering))):
        try:
            stack = plan_stack(
                in_width=a.widths[k],
                width=width,
                units=config.units,
                reduction=a.per_stack("reduction")[k],
                central_reduction=a.per_stack("central_reduction")[k],
                kernel=a.per_stack("kernel")[k],
                unit=a.unit,
                semantics=semantics,
            )
        except UsageError as error:
            raise UsageError(f"the decoder of stack {k + 1}: {error}") from None
        stacks.append(stack)
    norm = None
    if semantics.order == "pre":
        norm = plan_norm(semantics, entering[0][2], "the decoder's end")
    conv = plan_conv(entering[0][2], image_shape[2], 3, 1, "image", semantics)
    return DecoderPlan(
        start,
        tuple(stacks),
        tuple(shape[:2] for shape in reversed(entering)),
        image_shape[:2],
        LayerPlan(norm, replace(conv, bias=True, standardise=None)),
    )


def decoder_table(
    architecture: Architecture,
    image_shape: tuple[int, int, int],
    config: AutoencoderConfig = AutoencoderConfig(),
) -> list[LayerRow]:
    """List the decoder's layers as ``layer_table`` does the net's."""
    plan = plan_decoder(architecture, image_shape, config)
    values = math.prod(plan.start)
    weights = architecture.latent * values
    rows = [LayerRow("decoder/start", plan.start, 1, 1, weights + values, weights)]
    for number, (stack, size) in enumerate(zip(plan.stacks, plan.sizes, strict=True)):
        name = f"decoder/stack{len(plan.stacks) - number}"
        rows += stack_rows(name, stack, size)[0]
    if plan.last.norm:
        width = plan.last.conv.in_width
        rows.append(norm_row("decoder/image/norm", width, plan.image))
    return [*rows, conv_row("decoder/image/conv", plan.last.conv, plan.image)]
