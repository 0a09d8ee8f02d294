"""Every layer of a network, decided before any array exists.

``Architecture`` -> ``plan()`` -> ``NetPlan`` of ``StemPlan``, ``StackPlan``,
``UnitPlan``, ``LayerPlan``, ``ConvPlan``, ``HeadPlan``. All validation of an
architecture ends here; the modules of ``model`` only execute a plan.

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
_A_STACK = {
    "units": "units",
    "width": "widths",
    "stride": "strides",
    "reduction": "reduction",
    "central_reduction": "central_reduction",
    "kernel": "kernel",
    "bridge": "bridge",
}
"""Arguments of ``plan_stack``: the fields that give each stack its own."""


@dataclass(frozen=True)
class NormPlan:
    """Normalization followed by ReLU."""

    epsilon: float
    momentum: float
    groups: int | None = None
    """Of group normalization; None: batch normalization."""
    relu: bool = True
    """False: the ReLU comes later, after a sum (version 1)."""


@dataclass(frozen=True)
class ConvPlan:
    """A convolution [N, H, W, in_width] -> [N, H/stride, W/stride, width]."""

    in_width: int | None
    """None: the channels of an image whose shape was not said."""
    width: int
    kernel: int
    stride: int
    padding: Literal["same", "symmetric"]
    bias: bool
    init: Initializer
    standardize: float | None = None
    """Added to the variance of a kernel that is standardized; None: it is not."""


@dataclass(frozen=True)
class LayerPlan:
    """A residual layer: BN -> ReLU -> convolution; norm None is the exception."""

    norm: NormPlan | None
    conv: ConvPlan
    norm_last: bool = False
    """Convolution -> BN -> ReLU (version 1)."""


@dataclass(frozen=True)
class UnitPlan:
    """A residual unit. Equal plans mean units that can share one compiled body."""

    layers: tuple[LayerPlan, ...]
    shortcut: ConvPlan | None
    shared_preactivation: bool
    """The shortcut's convolution reads the output of layer 1's BN-ReLU."""
    shortcut_norm: NormPlan | None = None
    """Behind the shortcut's convolution (version 1)."""
    average: int = 1
    """Side and stride of the average before that convolution; 1: none."""
    select: int = 1
    """A shortcut without convolution carries one pixel of so many, each way."""
    relu: bool = False
    """A ReLU follows the sum (version 1)."""


@dataclass(frozen=True)
class StackPlan:
    """Residual units of one width and resolution, and the bridge around them."""

    units: tuple[UnitPlan, ...]
    bridge: ConvPlan | Literal["identity"] | None


@dataclass(frozen=True)
class StemPlan:
    """Convolutions, each with a BN-ReLU behind it or none, then the max-pool."""

    convs: tuple[ConvPlan, ...]
    norms: tuple[NormPlan | None, ...]
    pool: Literal["lowest", "zero"] | None


@dataclass(frozen=True)
class HeadPlan:
    """What follows the last stack."""

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

    def strides(self) -> Iterator[tuple[str, int]]:
        """Yield (where, stride) along the main path; a unit's stride counts once."""
        if self.stem:
            for index, conv in enumerate(self.stem.convs, start=1):
                yield f"stem convolution {index}", conv.stride
            yield "stem pool", 2 if self.stem.pool else 1
        for s, stack in enumerate(self.stacks, start=1):
            for u, unit in enumerate(stack.units, start=1):
                for number, layer in enumerate(unit.layers, start=1):
                    yield f"stack {s}, unit {u}, layer {number}", layer.conv.stride

    def convolutions(self) -> Iterator[tuple[str, ConvPlan]]:
        """Yield ("stack2/unit1/layer3/conv", its plan) for every convolution."""
        for index, conv in enumerate(self.stem.convs if self.stem else (), start=1):
            yield f"stem/conv{index if index > 1 else ''}", conv
        for s, stack in enumerate(self.stacks, start=1):
            for u, unit in enumerate(stack.units, start=1):
                for number, layer in enumerate(unit.layers, start=1):
                    yield f"stack{s}/unit{u}/layer{number}/conv", layer.conv
                if unit.shortcut:
                    yield f"stack{s}/unit{u}/shortcut", unit.shortcut
            if isinstance(stack.bridge, ConvPlan):
                yield f"stack{s}/bridge", stack.bridge


def plan(architecture: Architecture, image_shape: ImageShape | None = None) -> NetPlan:
    """Decide every layer of ``architecture``, or say what is wrong with it.

    Args:
        architecture: what to build.
        image_shape: (height, width, channels) of the images. Needed without a stem;
            where it is given, resolutions are checked too.

    Raises:
        UsageError: a field breaks a rule; the message names the field, its value, the
            legal choices.
    """
    a = architecture
    check_architecture(a)
    check("image_shape", image_shape, ImageShape | None)
    channels = image_shape[2] if image_shape else None
    stem = _plan_stem(a, channels) if a.stem else None
    in_width = a.stem_width if stem else channels
    if in_width is None:
        raise UsageError(
            "stem=False lets the image enter stack 1, so its channels must be known; "
            "got image_shape=None; give (height, width, channels)"
        )
    columns = {name: a.per_stack(field) for name, field in _A_STACK.items()}
    stacks: list[StackPlan] = []
    for k in range(len(a.units)):
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
        in_width = a.widths[k]
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
    """Plan a residual stack by hand.

    Args:
        in_width: maps in.
        width: maps out.
        units: how many residual units; the one that semantics names has the stride.
        stride: of the stack.
        reduction: as of ``plan_unit``.
        central_reduction: as of ``plan_unit``.
        kernel: as of ``plan_unit``.
        unit: as of ``plan_unit``.
        bridge: add a shortcut around the whole stack.
        behind_norm: as of ``plan_unit``.
        semantics: as of ``plan_unit``.

    Raises:
        UsageError: as ``plan_unit``.
    """
    check_semantics(semantics)
    check_arguments(plan_stack, locals())
    s = semantics
    inner = _inner_maps(unit, in_width, width, reduction, central_reduction)
    strided = 0 if s.strided_unit == "first" else units - 1

    @cache  # Of thousands of units three are different.
    def unit_of(maps: int, stride: int, first: bool) -> UnitPlan:
        project, bare = first and s.projection == "every_stack", first and behind_norm
        return _unit(maps, width, stride, inner, kernel, bare, s, project=project)

    planned = [
        unit_of(width if k else in_width, stride if k == strided else 1, k == 0)
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
    """Plan a residual unit by hand.

    Args:
        in_width: maps in.
        width: maps out.
        stride: of the layer that ``semantics`` names, and of the shortcut.
        reduction: layer 1 has ``width / reduction`` maps, or ``in_width``
            ("previous").
        central_reduction: the same for layer 2; None: as ``reduction``.
        kernel: the central kernel.
        unit: "bottleneck" (three layers) or "basic" (two).
        behind_norm: a BN-ReLU stands right before, so that the exception of
            ``semantics`` holds for layer 1.
        semantics: whose residual unit.

    Raises:
        UsageError: a value breaks a rule.
    """
    check_semantics(semantics)
    check_arguments(plan_unit, locals())
    inner = _inner_maps(unit, in_width, width, reduction, central_reduction)
    return _unit(in_width, width, stride, inner, kernel, behind_norm, semantics)


def _unit(
    in_width: int,
    width: int,
    stride: int,
    inner: tuple[int, ...],
    kernel: int,
    behind_norm: bool,
    semantics: Semantics,
    project: bool = False,
) -> UnitPlan:
    """``inner``: maps of the layers before the last, (p, q) or (width,).

    ``project``: the shortcut has a convolution even where shapes agree.
    """
    s, post = semantics, semantics.order == "post"
    bottleneck = len(inner) == 2
    kernels = (1, kernel, 1) if bottleneck else (kernel, kernel)
    stride_layer = s.stride_layer if bottleneck else 1
    layers, maps = [], in_width
    for number, (features, size) in enumerate(
        zip((*inner, width), kernels, strict=True), start=1
    ):
        step = stride if number == stride_layer else 1
        conv = plan_conv(maps, features, size, step, f"layer{number}", s)
        norm = plan_norm(s, features if post else maps, f"layer {number}")
        layers.append(LayerPlan(norm, conv, norm_last=post))
        maps = features
    if behind_norm and s.first_layer_exception and not post:
        layers[0] = replace(layers[0], norm=None)
    if post:
        layers[-1] = replace(layers[-1], norm=replace(layers[-1].norm, relu=False))
    if s.zero_init_last:
        layers[-1] = replace(layers[-1], conv=replace(layers[-1].conv, init="zeros"))
    if not project and in_width == width:
        if stride == 1:
            return UnitPlan(tuple(layers), None, False, relu=post)
        if s.strided_shortcut == "selection":
            return UnitPlan(tuple(layers), None, False, select=stride, relu=post)
    average = stride if s.shortcut_pool == "average" else 1
    size, step = s.shortcut_kernel, stride // average
    return UnitPlan(
        tuple(layers),
        plan_conv(in_width, width, size, step, "shortcut", s),
        shared_preactivation=s.shortcut_input == "preactivated",
        shortcut_norm=replace(plan_norm(s, width, "shortcut"), relu=False)
        if post
        else None,
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
    for number, (features, stride) in enumerate(zip(widths, strides, strict=True)):
        kernel = 3 if number else a.stem_kernel
        convs.append(plan_conv(maps, features, kernel, stride, "stem", s))
        maps = features
    # Between two convolutions there is always a BN-ReLU; stem_norm is about the end.
    norms = [plan_norm(s, features, "stem") for features in widths]
    if not s.stem_norm:
        norms[-1] = None
    return StemPlan(tuple(convs), tuple(norms), s.pool_padding if a.stem_pool else None)


def _plan_head(a: Architecture) -> HeadPlan:
    if a.head == "classifier" and a.num_classes is None:
        raise UsageError(
            "num_classes=None is for a run, which has a data set to count them in; "
            "give a number"
        )
    return HeadPlan(
        kind=a.head,
        norm=plan_norm(a.semantics, a.widths[-1], "head")
        if a.semantics.final_norm
        else None,
        pooled=a.head_input == "pooled",
        hidden=a.hidden,
        features=a.latent if a.head == "latent" else a.num_classes,
        variance=a.latent_variance,
        init=a.semantics.dense_init,
    )


def plan_norm(s: Semantics, maps: int, where: str) -> NormPlan:
    """Plan the norm of so many maps.

    Raises:
        UsageError: the groups do not divide them.
    """
    if s.norm == "batch":
        return NormPlan(s.norm_epsilon, s.norm_momentum)
    if maps % s.norm_groups:
        raise UsageError(
            f"semantics.norm_groups={s.norm_groups} does not divide the {maps} maps of "
            f"{where}; choose a divisor of all widths, as {math.gcd(maps, 32)}"
        )
    return NormPlan(s.norm_epsilon, s.norm_momentum, s.norm_groups)


def plan_conv(
    in_width: int | None, width: int, kernel: int, stride: int, at: str, s: Semantics
) -> ConvPlan:
    """Plan a convolution; ``at`` is its place, as ``Semantics.biases`` names it."""
    return ConvPlan(
        in_width,
        width,
        kernel,
        stride,
        s.padding,
        at in s.biases,
        s.kernel_init,
        s.standardize_epsilon,
    )


def _inner_maps(
    unit: UnitKind,
    in_width: int,
    width: int,
    reduction: Reduction,
    central_reduction: Reduction | None,
) -> tuple[int, ...]:
    """Give (p, q) of a bottleneck, (width,) of a basic unit."""
    central = reduction if central_reduction is None else central_reduction
    given = {"reduction": reduction, "central_reduction": central}
    if unit == "basic":
        for name, value in given.items():
            if value != 1:
                raise UsageError(
                    f"{name}={value!r}: a basic unit has no reduction; choose "
                    "reduction=1, or unit='bottleneck'"
                )
        return (width,)
    for name, value in given.items():
        if value != "previous" and width % value:
            divisors = [d for d in range(1, width + 1) if width % d == 0]
            raise UsageError(
                f"{name}={value!r} does not divide width={width}; choose one of "
                f"{', '.join(map(str, divisors))}, or 'previous'"
            )
    return tuple(in_width if v == "previous" else width // v for v in given.values())


def _check_resolutions(net: NetPlan, image_shape: ImageShape) -> None:
    """Refuse a stride above 1 on a map of 1x1: SAME padding hides it."""
    size = image_shape[:2]
    for where, stride in net.strides():
        if stride > 1 and size == (1, 1):
            raise UsageError(
                f"stride={stride} at {where}: the map is already 1x1 there (image "
                f"{image_shape[0]}x{image_shape[1]}); choose a stride of 1, fewer "
                "stacks, or larger images"
            )
        size = (-(-size[0] // stride), -(-size[1] // stride))
