"""The plan of a net: every layer, decided before any array exists.

``Architecture`` -> ``plan()`` -> ``NetPlan`` of ``StemPlan``, ``StackPlan``,
``UnitPlan``, ``LayerPlan``, ``ConvPlan``, ``HeadPlan``. Planning includes all checks
of an architecture; the modules only execute the plan.

>>> plan(Architecture()).stacks[1].units[0].shortcut.stride
2
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import (
    Architecture,
    Reduction,
    Stride,
    UnitKind,
    Units,
    check_architecture,
    check_semantics,
)
from flax_resnetv2.model.semantics import ARTICLE, Initializer, Kernel, Semantics, Size
from flax_resnetv2.validation import Range, check, check_arguments

Side = Annotated[int, Range(1, 2**16)]
ImageShape = Annotated[tuple[Side, Side, Side], "(height, width, channels)"]
_STACK_FIELDS = {"width": "widths", "stride": "strides"} | {
    name: name
    for name in ("units", "reduction", "central_reduction", "kernel", "bridge")
}
"""Arguments of ``plan_stack``, and the fields of ``Architecture`` they come from."""


@dataclass(frozen=True)
class NormPlan:
    """Normalization followed by ReLU."""

    epsilon: float
    momentum: float
    groups: int | None = None
    """Number of groups in group normalization; None: batch normalization."""
    relu: bool = True
    """False: the ReLU follows later, after a sum (version 1)."""


@dataclass(frozen=True)
class ConvPlan:
    """A convolution [N, H, W, in_width] -> [N, H/stride, W/stride, width]."""

    in_width: int | None
    """Input maps; None: the channels of an image of unknown shape."""
    width: int
    kernel: int
    stride: int
    padding: Literal["same", "symmetric"]
    bias: bool
    init: Initializer
    standardize: float | None = None
    """Value added to the variance of a standardized kernel; None: not standardized."""


@dataclass(frozen=True)
class LayerPlan:
    """A residual layer: BN -> ReLU -> convolution; without a norm, only the latter."""

    norm: NormPlan | None
    conv: ConvPlan
    norm_last: bool = False
    """Convolution -> BN -> ReLU (version 1)."""


@dataclass(frozen=True)
class UnitPlan:
    """A residual unit. Units of equal plans can share one compiled function."""

    layers: tuple[LayerPlan, ...]
    shortcut: ConvPlan | None
    shared_preactivation: bool
    """The shortcut's convolution reads the output of layer 1's BN-ReLU."""
    shortcut_norm: NormPlan | None = None
    """The norm after the shortcut's convolution (version 1)."""
    average: int = 1
    """Side and stride of the average pooling before that convolution; 1: no pooling."""
    select: int = 1
    """A shortcut without convolution carries every ``select``-th pixel."""
    relu: bool = False
    """A ReLU follows the sum (version 1)."""


@dataclass(frozen=True)
class StackPlan:
    """Residual units of one width and resolution, and the bridge around them."""

    units: tuple[UnitPlan, ...]
    bridge: ConvPlan | Literal["identity"] | None


@dataclass(frozen=True)
class StemPlan:
    """Convolutions, each followed by a BN-ReLU or None, and the max-pool."""

    convs: tuple[ConvPlan, ...]
    norms: tuple[NormPlan | None, ...]
    pool: Literal["lowest", "zero"] | None

    def layers(self) -> Iterator[tuple[str, ConvPlan, NormPlan | None]]:
        """Yield ("", convolution, norm), ("2", convolution, norm) and so on."""
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            yield str(k + 1) if k else "", conv, norm


@dataclass(frozen=True)
class HeadPlan:
    """The head: norm, pooling and the fully connected layers."""

    kind: Literal["classifier", "latent", "none"]
    norm: NormPlan | None
    pooled: bool
    hidden: tuple[int, ...]
    features: int
    variance: bool
    init: Initializer


@dataclass(frozen=True)
class NetPlan:
    """The whole net, in the order of the article's figure."""

    stem: StemPlan | None
    stacks: tuple[StackPlan, ...]
    head: HeadPlan

    def main_path(self) -> Iterator[tuple[str, int, int]]:
        """Yield name ("stack2/unit1/layer3"), kernel and stride of each layer."""
        if self.stem:
            for suffix, conv, _ in self.stem.layers():
                yield f"stem/conv{suffix}", conv.kernel, conv.stride
            if self.stem.pool:
                yield "stem/pool", 3, 2
        for s, stack in enumerate(self.stacks, start=1):
            for u, unit in enumerate(stack.units, start=1):
                for number, layer in enumerate(unit.layers, start=1):
                    name = f"stack{s}/unit{u}/layer{number}"
                    yield name, layer.conv.kernel, layer.conv.stride


def plan(architecture: Architecture, image_shape: ImageShape | None = None) -> NetPlan:
    """Plan every layer of a net.

    Args:
        architecture: what the net is.
        image_shape: (height, width, channels) of the images. If given, strides are
            checked against the resolution; required without a stem.

    Raises:
        UsageError: a field breaks a rule.
    """
    a = architecture
    check_architecture(a)
    check("image_shape", image_shape, ImageShape | None)
    channels = image_shape[2] if image_shape else None
    stem = _plan_stem(a, channels) if a.stem else None
    in_width = a.stem_width if stem else channels
    if in_width is None:
        raise UsageError(
            "stem=False lets the image enter stack 1, so its channels must be known, "
            "but got image_shape=None; pass (height, width, channels)"
        )
    columns = {name: a.per_stack(field) for name, field in _STACK_FIELDS.items()}
    stacks: list[StackPlan] = []
    for k, width in enumerate(a.widths):
        try:
            stack = plan_stack(
                in_width=in_width,
                unit=a.unit,
                behind_norm=k == 0 and stem is not None and stem.norms[-1] is not None,
                semantics=a.semantics,
                **{name: values[k] for name, values in columns.items()},
            )
        except UsageError as error:
            raise UsageError(f"stack {k + 1}: {error}") from None
        stacks.append(stack)
        in_width = width
    net = NetPlan(stem, tuple(stacks), _plan_head(a))
    if image_shape is not None:
        _check_resolutions(net, image_shape)
    return net


def plan_stack(
    *,
    in_width: Size,
    width: Size,
    units: Units,
    stride: Stride = 1,
    reduction: Reduction = 2,
    central_reduction: Reduction | None = None,
    kernel: Kernel = 3,
    unit: UnitKind = "bottleneck",
    bridge: bool = False,
    behind_norm: bool = False,
    semantics: Semantics = ARTICLE,
) -> StackPlan:
    """Plan a residual stack by itself.

    Args:
        in_width: input maps.
        width: output maps.
        units: number of residual units.
        stride: of the stack; ``semantics`` chooses the unit and the layer that have it.
        reduction: layer 1 of a bottleneck has ``width / reduction`` maps, or
            ``in_width`` maps if "previous". Basic units need 1.
        central_reduction: the same for layer 2; None: equal to ``reduction``.
        kernel: size of the central kernel (odd).
        unit: "bottleneck" (three layers) or "basic" (two layers).
        bridge: add a shortcut around the whole stack.
        behind_norm: the input comes from a BN-ReLU, so that ``semantics`` may leave
            out that of the first layer.
        semantics: the version of ResNet V2.

    Raises:
        UsageError: an argument breaks a rule.
    """
    check_semantics(semantics)
    check_arguments(plan_stack, locals())
    s = semantics
    central = reduction if central_reduction is None else central_reduction
    inner = _inner_widths(unit, in_width, width, reduction, central)
    strided = 0 if s.strided_unit == "first" else units - 1

    @cache  # Thousands of units have at most three different plans.
    def unit_plan(in_width: int, stride: int, first: bool) -> UnitPlan:
        layers = _plan_layers(in_width, (*inner, width), stride, kernel, s)
        if first and behind_norm and s.first_layer_exception and s.order == "pre":
            layers[0] = replace(layers[0], norm=None)
        project = first and s.projection == "every_stack"
        return _plan_unit(tuple(layers), stride, project, s)

    planned = [
        unit_plan(width if k else in_width, stride if k == strided else 1, k == 0)
        for k in range(units)
    ]
    around: ConvPlan | Literal["identity"] | None = None
    if bridge:
        around = "identity"
        if stride > 1 or in_width != width:
            around = plan_conv(in_width, width, 1, stride, "bridge", s)
    return StackPlan(tuple(planned), around)


def plan_unit(
    *,
    in_width: Size,
    width: Size,
    stride: Stride = 1,
    reduction: Reduction = 2,
    central_reduction: Reduction | None = None,
    kernel: Kernel = 3,
    unit: UnitKind = "bottleneck",
    behind_norm: bool = False,
    semantics: Semantics = ARTICLE,
) -> UnitPlan:
    """Plan a residual unit by itself; arguments and errors as of ``plan_stack``.

    It has a convolution on its shortcut only where shapes differ.
    """
    arguments = locals()
    check_semantics(semantics)
    arguments["semantics"] = replace(semantics, projection="when_needed")
    return plan_stack(units=1, **arguments).units[0]


def _plan_layers(
    in_width: int, widths: tuple[int, ...], stride: int, kernel: int, s: Semantics
) -> list[LayerPlan]:
    """Plan a unit's layers of these output widths."""
    post, last = s.order == "post", len(widths)
    kernels = (1, kernel, 1) if last == 3 else (kernel, kernel)
    strided = s.stride_layer if last == 3 else 1
    layers = []
    for number, (width, size) in enumerate(zip(widths, kernels, strict=True), start=1):
        step = stride if number == strided else 1
        conv = plan_conv(in_width, width, size, step, f"layer{number}", s)
        if number == last and s.zero_init_last:
            conv = replace(conv, init="zeros")
        maps, relu = width if post else in_width, not (post and number == last)
        norm = plan_norm(s, maps, f"layer {number}", relu)
        layers.append(LayerPlan(norm, conv, norm_last=post))
        in_width = width
    return layers


def _plan_unit(
    layers: tuple[LayerPlan, ...], stride: int, project: bool, s: Semantics
) -> UnitPlan:
    """Add the shortcut; with ``project`` it has a convolution in any case."""
    in_width, width = layers[0].conv.in_width, layers[-1].conv.width
    post = s.order == "post"
    selects = stride == 1 or s.strided_shortcut == "selection"
    if in_width == width and selects and not project:
        return UnitPlan(layers, None, False, select=stride, relu=post)
    average = stride if s.shortcut_pool == "average" else 1
    size, step = s.shortcut_kernel, stride // average
    return UnitPlan(
        layers,
        plan_conv(in_width, width, size, step, "shortcut", s),
        shared_preactivation=s.shortcut_input == "preactivated",
        shortcut_norm=plan_norm(s, width, "shortcut", relu=False) if post else None,
        average=average,
        relu=post,
    )


def _plan_stem(a: Architecture, channels: int | None) -> StemPlan:
    s, width = a.semantics, a.stem_width
    widths = [width // 2, width // 2, width] if a.stem_deep else [width]
    strides = [a.stem_stride] + [1] * (len(widths) - 1)
    if a.stem_second_stride is not None:
        widths.append(width)
        strides.append(a.stem_second_stride)
    convs, maps = [], channels
    for width, stride in zip(widths, strides, strict=True):
        kernel = 3 if convs else a.stem_kernel
        convs.append(plan_conv(maps, width, kernel, stride, "stem", s))
        maps = width
    # Between two convolutions there is always a BN-ReLU; stem_norm is about the end.
    norms = [plan_norm(s, width, "stem") for width in widths]
    if not s.stem_norm:
        norms[-1] = None
    return StemPlan(tuple(convs), tuple(norms), s.pool_padding if a.stem_pool else None)


def _plan_head(a: Architecture) -> HeadPlan:
    if a.head == "classifier" and a.num_classes is None:
        raise UsageError(
            "num_classes=None is only for a run, which takes the number from its data "
            "set; give a number"
        )
    s = a.semantics
    return HeadPlan(
        kind=a.head,
        norm=plan_norm(s, a.widths[-1], "head") if s.final_norm else None,
        pooled=a.head_input == "pooled",
        hidden=a.hidden,
        features=a.latent if a.head == "latent" else a.num_classes,
        variance=a.latent_variance,
        init=s.dense_init,
    )


def plan_norm(s: Semantics, maps: int, name: str, relu: bool = True) -> NormPlan:
    """Plan the norm of ``maps`` maps; ``name`` is for messages.

    Raises:
        UsageError: the number of groups does not divide ``maps``.
    """
    groups = s.norm_groups if s.norm == "group" else None
    if groups and maps % groups:
        raise UsageError(
            f"semantics.norm_groups={groups} does not divide the {maps} maps of {name};"
            f" choose a divisor of all widths, for example {math.gcd(maps, 32)}"
        )
    return NormPlan(s.norm_epsilon, s.norm_momentum, groups, relu)


def plan_conv(
    in_width: int | None, width: int, kernel: int, stride: int, name: str, s: Semantics
) -> ConvPlan:
    """Plan a convolution; it has a bias if ``Semantics.biases`` contains ``name``."""
    bias, init, standardize = name in s.biases, s.kernel_init, s.standardize_epsilon
    return ConvPlan(in_width, width, kernel, stride, s.padding, bias, init, standardize)


def _inner_widths(
    unit: UnitKind, in_width: int, width: int, reduction: Reduction, central: Reduction
) -> tuple[int, ...]:
    """Return the maps inside a unit: (p, q) of a bottleneck, (width,) of a basic."""
    for name, value in (("reduction", reduction), ("central_reduction", central)):
        if unit == "basic" and value != 1:
            raise UsageError(
                f"{name}={value!r}: a basic unit has no reduction; choose "
                "reduction=1, or unit='bottleneck'"
            )
        if value != "previous" and width % value:
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            raise UsageError(
                f"{name}={value!r} does not divide width={width}; choose one of "
                f"{', '.join(map(str, divisors))}, or 'previous'"
            )
    if unit == "basic":
        return (width,)
    return tuple(
        in_width if value == "previous" else width // value
        for value in (reduction, central)
    )


def _check_resolutions(net: NetPlan, image_shape: ImageShape) -> None:
    """Refuse a stride above 1 on a 1x1 map, which padding would hide."""
    size = image_shape[:2]
    for name, _, stride in net.main_path():
        if stride > 1 and size == (1, 1):
            raise UsageError(
                f"stride={stride} at {name}: the map is already 1x1 there (image "
                f"{image_shape[0]}x{image_shape[1]}); choose a stride of 1, fewer "
                "stacks or larger images"
            )
        size = (-(-size[0] // stride), -(-size[1] // stride))
