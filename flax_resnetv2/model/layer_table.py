"""Counted from the plan: a net's table of layers, and its receptive field.

>>> print(format_table(layer_table(Architecture(), (32, 32, 3))))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from flax_resnetv2.model.architecture import Architecture
from flax_resnetv2.model.planning import ConvPlan, NetPlan, StackPlan, plan


@dataclass(frozen=True)
class LayerRow:
    """One layer with parameters: what it makes of its input, and what that costs."""

    name: str
    """Its path in the parameter tree, as "stack2/unit1/layer3/conv"."""
    shape: tuple[int, ...]
    """Of one image's output."""
    kernel: int
    stride: int
    parameters: int
    multiply_adds: int
    """For one image; normalisation counts none."""


def layer_table(
    architecture: Architecture, image_shape: tuple[int, int, int]
) -> list[LayerRow]:
    """List every convolution, norm and fully connected layer, in order.

    Args:
        architecture: the net.
        image_shape: (height, width, channels) of the images.

    Raises:
        UsageError: the architecture breaks a rule, or is too deep for the images.
    """
    net = plan(architecture, image_shape)
    rows, size, width = [], image_shape[:2], image_shape[2]
    if net.stem:
        for number, (p, after) in enumerate(
            zip(net.stem.convs, net.stem.norms, strict=True), start=1
        ):
            suffix = str(number) if number > 1 else ""
            rows.append(conv_row(f"stem/conv{suffix}", p, size))
            size, width = rows[-1].shape[:2], p.width
            if after:
                rows.append(norm_row(f"stem/norm{suffix}", width, size))
        if net.stem.pool:
            size = tuple(-(-side // 2) for side in size)
    for s, stack in enumerate(net.stacks, start=1):
        found, size = stack_rows(f"stack{s}", stack, size)
        rows += found
        width = stack.units[-1].layers[-1].conv.width
    rows += _head_rows(net, width, size)
    return rows


def conv_row(name: str, p: ConvPlan, size: tuple[int, int]) -> LayerRow:
    """Count a convolution of maps of this size."""
    out = tuple(-(-side // p.stride) for side in size)
    weights = p.kernel**2 * p.in_width * p.width
    count, macs = weights + p.width * p.bias, weights * out[0] * out[1]
    return LayerRow(name, (*out, p.width), p.kernel, p.stride, count, macs)


def norm_row(name: str, width: int, size: tuple[int, int]) -> LayerRow:
    """Count a normalisation: a scale and a bias a map."""
    return LayerRow(name, (*size, width), 1, 1, 2 * width, 0)


def stack_rows(
    name: str, stack: StackPlan, size: tuple[int, int]
) -> tuple[list[LayerRow], tuple[int, int]]:
    """Count a stack that maps of this size enter; also what size leaves it."""
    rows, entering = [], size
    for u, unit in enumerate(stack.units, start=1):
        before = size
        for number, layer in enumerate(unit.layers, start=1):
            path = f"{name}/unit{u}/layer{number}"
            if layer.norm and not layer.norm_last:
                rows.append(norm_row(f"{path}/norm", layer.conv.in_width, size))
            rows.append(conv_row(f"{path}/conv", layer.conv, size))
            size = rows[-1].shape[:2]
            if layer.norm_last:
                rows.append(norm_row(f"{path}/norm", layer.conv.width, size))
        if unit.shortcut:
            path = f"{name}/unit{u}/shortcut"
            pooled = tuple(-(-side // unit.average) for side in before)
            rows.append(conv_row(path, unit.shortcut, pooled))
            if unit.shortcut_norm:
                rows.append(norm_row(f"{path}_norm", unit.shortcut.width, size))
    if isinstance(stack.bridge, ConvPlan):
        rows.append(conv_row(f"{name}/bridge", stack.bridge, entering))
    return rows, size


def _head_rows(net: NetPlan, width: int, size: tuple[int, int]) -> Iterator[LayerRow]:
    head = net.head
    if head.norm:
        yield LayerRow("head/norm", (*size, width), 1, 1, 2 * width, 0)
    if head.kind == "none":
        return
    fan_in = width if head.pooled else width * size[0] * size[1]
    layers = [(f"hidden{k}", w) for k, w in enumerate(head.hidden, start=1)]
    layers.append((head.kind, head.features))
    for name, features in layers:
        weights = fan_in * features
        yield LayerRow(f"head/{name}", (features,), 1, 1, weights + features, weights)
        if name == "latent" and head.variance:
            yield LayerRow(
                "head/log_variance", (features,), 1, 1, weights + features, weights
            )
        fan_in = features


def format_table(rows: list[LayerRow]) -> str:
    """Lay out ``rows`` and their sums as text, a line each."""
    lines = [f"{'layer':<28}{'maps out':>16}{'kernel':>8}{'stride':>8}"]
    lines[0] += f"{'parameters':>13}{'multiply-adds':>16}"
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        lines.append(
            f"{row.name:<28}{shape:>16}{row.kernel:>8}{row.stride:>8}"
            f"{row.parameters:>13,}{row.multiply_adds:>16,}"
        )
    parameters = sum(row.parameters for row in rows)
    macs = sum(row.multiply_adds for row in rows)
    lines.append(f"{'total':<60}{parameters:>13,}{macs:>16,}")
    return "\n".join(lines)


class Field(NamedTuple):
    """What one value of a map sees of the image."""

    side: int
    """Of its receptive field, in pixels."""
    stride: int
    """Pixels from one value's field to the next one's."""


def receptive_field(architecture: Architecture) -> dict[str, Field]:
    """Receptive field and effective stride behind the stem and each stack.

    Along the main path; a shortcut sees less.
    """
    # The largest image, with channels that its norms divide: any net that is legal
    # for some image is legal for it.
    channels = min(architecture.semantics.norm_groups, 2**16)
    net = plan(architecture, None if architecture.stem else (2**16, 2**16, channels))
    side, jump, seen = 1, 1, {}

    def look(kernel: int, stride: int) -> None:
        nonlocal side, jump
        side += (kernel - 1) * jump
        jump *= stride

    if net.stem:
        for p in net.stem.convs:
            look(p.kernel, p.stride)
        if net.stem.pool:
            look(3, 2)
        seen["stem"] = Field(side, jump)
    for s, stack in enumerate(net.stacks, start=1):
        for unit in stack.units:
            for layer in unit.layers:
                look(layer.conv.kernel, layer.conv.stride)
        seen[f"stack{s}"] = Field(side, jump)
    return seen


def unit_table(
    architecture: Architecture, image_shape: tuple[int, int, int]
) -> list[LayerRow]:
    """Sum ``layer_table`` up: a row for stem, each unit, bridge and head.

    A row's name is a path in the parameter tree, as "stack2/unit1"; its shape what
    leaves that part, its kernel the largest, its stride the product along the layers.
    """
    stem, parts = plan(architecture, image_shape).stem, {}
    for row in layer_table(architecture, image_shape):
        words = row.name.split("/")
        part = words[0] if words[0] in ("stem", "head") else "/".join(words[:2])
        parts.setdefault(part, []).append(row)
    table = [_sum(part, rows) for part, rows in parts.items()]
    if stem is not None and stem.pool is not None:
        height, width, maps = table[0].shape
        shape = (-(-height // 2), -(-width // 2), maps)
        table[0] = replace(table[0], shape=shape, stride=2 * table[0].stride)
    return table


def _sum(part: str, rows: list[LayerRow]) -> LayerRow:
    main = [row for row in rows if "shortcut" not in row.name]
    return LayerRow(
        part,
        main[-1].shape,
        max(row.kernel for row in rows),
        math.prod(row.stride for row in main),
        sum(row.parameters for row in rows),
        sum(row.multiply_adds for row in rows),
    )


def fold(rows: list[LayerRow]) -> list[LayerRow]:
    """Join units that follow one another and are alike: "stack1/unit2..18".

    Their parameters and multiply-adds are added up.
    """
    folded: list[LayerRow] = []
    kind = None
    for row in rows:
        place, _, number = row.name.partition("/unit")
        if number and kind == (place, replace(row, name="")):
            first, last = folded[-1], int(number)
            begun = first.name.partition("/unit")[2].split("..")[0]
            folded[-1] = replace(
                first,
                name=f"{place}/unit{begun}..{last}",
                parameters=first.parameters + row.parameters,
                multiply_adds=first.multiply_adds + row.multiply_adds,
            )
            continue
        folded.append(row)
        kind = (place, replace(row, name=""))
    return folded
