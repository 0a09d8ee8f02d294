"""Tables of a net's layers, costs and receptive fields, counted from its plan.

>>> net = plan(Architecture(), (32, 32, 3))
>>> print(format_table(layer_table(net, (32, 32, 3))))
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from flax_resnetv2.model.planning import ConvPlan, HeadPlan, NetPlan, StackPlan

Size = tuple[int, int]
"""(height, width) of maps."""


@dataclass(frozen=True)
class LayerRow:
    """A layer with parameters: its output and its cost."""

    name: str
    """Path in the parameter tree, for example "stack2/unit1/layer3/conv"."""
    shape: tuple[int, ...]
    """Shape of the output for one image: (height, width, maps) or (features,)."""
    kernel: int
    stride: int
    parameters: int
    multiply_adds: int
    """Multiply-adds for one image; those of normalization are not counted."""


def layer_table(net: NetPlan, image_shape: tuple[int, int, int]) -> list[LayerRow]:
    """List every convolution, norm and fully connected layer, in the net's order.

    ``image_shape`` is (height, width, channels) of the net's input.
    """
    rows, size, width = [], image_shape[:2], image_shape[2]
    if net.stem:
        for suffix, conv, norm in net.stem.layers():
            # Planned without the image's shape, the first convolution lacks its input.
            conv = replace(conv, in_width=width)
            rows.append(conv_row(f"stem/conv{suffix}", conv, size))
            size, width = rows[-1].shape[:2], conv.width
            if norm:
                rows.append(norm_row(f"stem/norm{suffix}", width, size))
        if net.stem.pool:
            size = _strided(size, 2)
    for s, stack in enumerate(net.stacks, start=1):
        found, size = stack_rows(f"stack{s}", stack, size)
        rows += found
        width = stack.units[-1].layers[-1].conv.width
    return [*rows, *_head_rows(net.head, width, size)]


def conv_row(name: str, p: ConvPlan, size: Size) -> LayerRow:
    """Count a convolution of maps of this size."""
    height, width = _strided(size, p.stride)
    weights = p.kernel**2 * p.in_width * p.width
    count, macs = weights + p.width * p.bias, weights * height * width
    return LayerRow(name, (height, width, p.width), p.kernel, p.stride, count, macs)


def norm_row(name: str, width: int, size: Size) -> LayerRow:
    """Count a normalization: a scale and a bias per map."""
    return LayerRow(name, (*size, width), 1, 1, 2 * width, 0)


def dense_row(name: str, fan_in: int, features: int) -> LayerRow:
    """Count a fully connected layer with biases."""
    weights = fan_in * features
    return LayerRow(name, (features,), 1, 1, weights + features, weights)


def stack_rows(name: str, stack: StackPlan, size: Size) -> tuple[list[LayerRow], Size]:
    """Count a stack whose input has this size; also return the size of its output."""
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
            rows.append(conv_row(path, unit.shortcut, _strided(before, unit.average)))
            if unit.shortcut_norm:
                rows.append(norm_row(f"{path}_norm", unit.shortcut.width, size))
    if isinstance(stack.bridge, ConvPlan):
        rows.append(conv_row(f"{name}/bridge", stack.bridge, entering))
    return rows, size


def _head_rows(head: HeadPlan, width: int, size: Size) -> Iterator[LayerRow]:
    if head.norm:
        yield norm_row("head/norm", width, size)
    if head.kind == "none":
        return
    fan_in = width if head.pooled else width * size[0] * size[1]
    for number, features in enumerate(head.hidden, start=1):
        yield dense_row(f"head/hidden{number}", fan_in, features)
        fan_in = features
    yield dense_row(f"head/{head.kind}", fan_in, head.features)
    if head.kind == "latent" and head.variance:
        yield dense_row("head/log_variance", fan_in, head.features)


def _strided(size: Size, stride: int) -> Size:
    return -(-size[0] // stride), -(-size[1] // stride)


def unit_table(net: NetPlan, image_shape: tuple[int, int, int]) -> list[LayerRow]:
    """Sum ``layer_table`` up: one row for the stem, each unit, bridge and the head.

    Rows have names such as "stack2/unit1", the largest kernel, and the product of the
    strides on the main path.
    """
    parts: dict[str, list[LayerRow]] = {}
    for row in layer_table(net, image_shape):
        words = row.name.split("/")
        part = words[0] if words[0] in ("stem", "head") else "/".join(words[:2])
        parts.setdefault(part, []).append(row)
    table = []
    for part, rows in parts.items():
        main = [row for row in rows if "shortcut" not in row.name]
        kernel, stride = max(r.kernel for r in rows), math.prod(r.stride for r in main)
        sums = sum(r.parameters for r in rows), sum(r.multiply_adds for r in rows)
        table.append(LayerRow(part, main[-1].shape, kernel, stride, *sums))
    if net.stem is not None and net.stem.pool is not None:
        *size, maps = table[0].shape
        shape = (*_strided(tuple(size), 2), maps)
        table[0] = replace(table[0], shape=shape, stride=2 * table[0].stride)
    return table


def fold(rows: list[LayerRow]) -> list[LayerRow]:
    """Join and sum the rows of equal units in sequence, as "stack1/unit2..18"."""

    def kind(row: LayerRow) -> tuple[str, LayerRow]:
        return row.name.partition("/unit")[0], replace(row, name="")

    folded = []
    for _, equal in groupby(rows, kind):
        first, *rest = equal
        if rest:
            first = replace(
                first,
                name=f"{first.name}..{rest[-1].name.partition('/unit')[2]}",
                parameters=first.parameters * (1 + len(rest)),
                multiply_adds=first.multiply_adds * (1 + len(rest)),
            )
        folded.append(first)
    return folded


def format_table(rows: list[LayerRow]) -> str:
    """Format ``rows`` and their sums as text, one line each."""
    names = f"{'layer':<28}{'maps out':>16}{'kernel':>8}{'stride':>8}"
    lines = [f"{names}{'parameters':>13}{'multiply-adds':>16}"]
    for row in rows:
        shape = " x ".join(map(str, row.shape))
        names = f"{row.name:<28}{shape:>16}{row.kernel:>8}{row.stride:>8}"
        lines.append(f"{names}{row.parameters:>13,}{row.multiply_adds:>16,}")
    sums = sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows)
    lines.append(f"{'total':<60}{sums[0]:>13,}{sums[1]:>16,}")
    return "\n".join(lines)


class Field(NamedTuple):
    """The part of the image that one value of a map depends on."""

    side: int
    """Side of the receptive field in pixels."""
    stride: int
    """Distance between the fields of neighboring values in pixels."""


def receptive_field(net: NetPlan) -> dict[str, Field]:
    """Return the receptive field on the main path after the stem and each stack.

    The fields of shortcuts are smaller.
    """
    side, stride, fields = 1, 1, {}
    for name, kernel, step in net.main_path():
        side += (kernel - 1) * stride
        stride *= step
        fields[name.partition("/")[0]] = Field(side, stride)
    return fields
