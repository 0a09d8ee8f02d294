"""The plan of a decoder: the net's mirror image, from a latent vector to an image.

For each stack of the net, last stack first, the decoder has a stack of the same kind of
units, with the resolution and width of that stack's input.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import layer_table, planning
from flax_resnetv2.model.architecture import Architecture
from flax_resnetv2.validation import Count, Range, check_dataclass


@dataclass(frozen=True)
class AutoencoderConfig:
    """The decoder that a latent head is trained with, and its loss."""

    units: Count = 1
    """Residual units per stack of the decoder."""
    kl_weight: Annotated[float, Range(0, 1e6)] = 1.0
    """Weight of the latent distribution's Kullback-Leibler divergence from N(0, 1), if
    architecture.latent_variance is set (the beta of beta-VAEs). 1 gives the evidence
    lower bound for normalized pixels with unit variance."""


@dataclass(frozen=True)
class DecoderPlan:
    """The mirror image of a net, from the latent vector to the image."""

    start: tuple[int, int, int]
    """(height, width, maps) of the net's last maps, which the latent vector fills."""
    stacks: tuple[planning.StackPlan, ...]
    """Stacks in the decoder's order: the net's last stack comes first."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of each stack."""
    image: tuple[int, int]
    """(height, width) of the image."""
    last: planning.LayerPlan
    """The layer from the last maps to the image's channels."""


def plan_decoder(
    architecture: Architecture,
    net: planning.NetPlan,
    image_shape: tuple[int, int, int],
    config: AutoencoderConfig = AutoencoderConfig(),
) -> DecoderPlan:
    """Plan the mirror image of a net.

    Args:
        architecture: what the net is; the decoder has its reductions and kernels.
        net: the plan of ``architecture``.
        image_shape: (height, width, channels) of the net's input.
        config: the decoder's configuration.

    Raises:
        UsageError: ``config`` breaks a rule, the net has no latent head, or a reduction
            does not divide the width of a stack's input.
    """
    check_dataclass(config, AutoencoderConfig, "autoencoder.")
    a, semantics = architecture, architecture.semantics
    if a.head != "latent":
        raise UsageError(
            f"architecture.head={a.head!r} returns no vector to decode; choose 'latent'"
        )
    # The output of the stem and of each stack is the last row of that part.
    shapes = {} if net.stem else {"image": image_shape}
    for row in layer_table.unit_table(net, image_shape):
        shapes[row.name.partition("/")[0]] = row.shape
    del shapes["head"]
    entering, stacks = list(shapes.values()), []
    start = entering.pop()
    for k, (_, _, width) in reversed(list(enumerate(entering))):
        try:
            stack = planning.plan_stack(
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
    norm, width = None, entering[0][2]
    if semantics.order == "pre":
        norm = planning.plan_norm(semantics, width, "the decoder's end")
    conv = planning.plan_conv(width, image_shape[2], 3, 1, "image", semantics)
    return DecoderPlan(
        start,
        tuple(stacks),
        tuple(shape[:2] for shape in reversed(entering)),
        image_shape[:2],
        planning.LayerPlan(norm, replace(conv, bias=True, standardize=None)),
    )


def decoder_table(plan: DecoderPlan, latent: int) -> list[layer_table.LayerRow]:
    """List the decoder's layers; its latent vectors have size ``latent``."""
    values = math.prod(plan.start)
    weights = latent * values
    rows = [
        layer_table.LayerRow(
            "decoder/start", plan.start, 1, 1, weights + values, weights
        )
    ]
    for number, (stack, size) in enumerate(zip(plan.stacks, plan.sizes, strict=True)):
        name = f"decoder/stack{len(plan.stacks) - number}"
        rows += layer_table.stack_rows(name, stack, size)[0]
    if plan.last.norm:
        width = plan.last.conv.in_width
        rows.append(layer_table.norm_row("decoder/image/norm", width, plan.image))
    return [
        *rows,
        layer_table.conv_row("decoder/image/conv", plan.last.conv, plan.image),
    ]
