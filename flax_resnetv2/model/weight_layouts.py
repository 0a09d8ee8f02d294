"""Names and layouts that other libraries have for the arrays of our nets.

A name follows from an array's path, so a ``WeightLayout`` holds for every net that its
library can build.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.modules import ResNetV2

Leaf = tuple[str, ...]
"""Path of one of our arrays, for example ("params", "stem", "conv", "kernel")."""
HEAD = "head/classifier"


@dataclass(frozen=True)
class WeightLayout:
    """How a library names our arrays and orders their axes."""

    library: str
    separator: str
    """Stands between the name of a module and that of its array."""
    unit: Callable[[int, int], str]
    """Prefix of the modules in a unit, from the 1-based numbers of stack and unit."""
    inside: dict[str, str]
    """Modules of a unit, for example "layer1/norm" -> the rest of their name."""
    outside: dict[str, str]
    """Modules outside the units -> their name."""
    norm: dict[str, str]
    """Arrays of a norm: scale, bias, mean and var -> their name."""
    kernel: str
    """Name of the kernel of a convolution or classifier."""
    axes: tuple[int, int, int, int]
    """The order of our axes [k, k, C, F] in a convolution's kernel."""
    dense: bool
    """The classifier's kernel is [C, F]; False: that of a 1x1 convolution."""

    def tensor(self, leaf: Leaf) -> str:
        """Return the library's name of an array; refuse one that it does not have."""
        *path, name = leaf[1:]
        if path[-1].startswith("norm"):
            name = self.norm.get(name)
        elif name == "kernel":
            name = self.kernel
        module = self._module("/".join(path))
        if module is None or name is None:
            raise UsageError(
                f"{'/'.join(leaf[1:])} has no counterpart in {self.library}; use the "
                "model of a preset that the function reads, or classifier='leave' for "
                "another head"
            )
        return module + self.separator + name

    def _module(self, path: str) -> str | None:
        """Return the library's name of a module, or None if it has no such module."""
        if found := re.fullmatch(r"stack(\d+)/unit(\d+)/(.+)", path):
            name = self.inside.get(found[3])
            return name and self.unit(int(found[1]), int(found[2])) + name
        return self.outside.get(path)

    def theirs(self, leaf: Leaf, array: np.ndarray) -> np.ndarray:
        """Convert one of our arrays to the library's layout."""
        if self._is_convolution(leaf):
            array = array[None, None]
        return array.transpose(self.axes) if array.ndim == 4 else array

    def ours(self, leaf: Leaf, array: np.ndarray) -> np.ndarray:
        """Convert an array of the library to our layout; the inverse of ``theirs``."""
        if array.ndim == 4:
            array = array.transpose(np.argsort(self.axes))
        return array[0, 0] if self._is_convolution(leaf) else array

    def _is_convolution(self, leaf: Leaf) -> bool:
        """Return whether it is the kernel of a classifier that is a convolution."""
        return "/".join(leaf[1:]) == f"{HEAD}/kernel" and not self.dense


KERAS = WeightLayout(
    library="Keras",
    separator="/",
    unit=lambda stack, unit: f"conv{stack + 1}_block{unit}_",
    inside={
        "layer1/norm": "preact_bn",
        "layer1/conv": "1_conv",
        "layer2/norm": "1_bn",
        "layer2/conv": "2_conv",
        "layer3/norm": "2_bn",
        "layer3/conv": "3_conv",
        "shortcut": "0_conv",
    },
    outside={"stem/conv": "conv1_conv", "head/norm": "post_bn", HEAD: "predictions"},
    norm=dict(scale="gamma", bias="beta", mean="moving_mean", var="moving_variance"),
    kernel="kernel",
    axes=(0, 1, 2, 3),
    dense=True,
)
TIMM = WeightLayout(
    library="timm",
    separator=".",
    unit=lambda stack, unit: f"stages.{stack - 1}.blocks.{unit - 1}.",
    inside={"shortcut": "downsample.conv"}
    | {f"layer{k}/{x}": f"{x}{k}" for k in (1, 2, 3) for x in ("norm", "conv")},
    outside={"stem/conv": "stem.conv", "head/norm": "norm", HEAD: "head.fc"},
    norm=dict(scale="weight", bias="bias", mean="running_mean", var="running_var"),
    kernel="weight",
    axes=(3, 2, 0, 1),
    dense=False,
)
TIMM_DEEP = replace(
    TIMM,
    outside=TIMM.outside
    | {"stem/conv": "stem.conv1", "stem/norm": "stem.norm1"}
    | {f"stem/{x}{k}": f"stem.{x}{k}" for k in (2, 3) for x in ("norm", "conv")},
)
BIT = WeightLayout(
    library="Big Transfer",
    separator="/",
    unit=lambda stack, unit: f"resnet/block{stack}/unit{unit:02}/",
    inside={"shortcut": "a/proj/standardized_conv2d"}
    | {f"layer{k}/norm": f"{x}/group_norm" for k, x in enumerate("abc", start=1)}
    | {f"layer{k}/conv": f"{x}/standardized_conv2d" for k, x in enumerate("abc", 1)},
    outside={
        "stem/conv": "resnet/root_block/standardized_conv2d",
        "head/norm": "resnet/group_norm",
        HEAD: "resnet/head/conv2d",
    },
    norm=dict(scale="gamma", bias="beta"),
    kernel="kernel",
    axes=(0, 1, 2, 3),
    dense=False,
)


def timm(model: ResNetV2) -> WeightLayout:
    """Return timm's layout, in which the convolutions of a deep stem have numbers."""
    deep = model.plan.stem is not None and len(model.plan.stem.convs) == 3
    return TIMM_DEEP if deep else TIMM
