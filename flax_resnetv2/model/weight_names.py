"""How others name the arrays of our nets, and lay them out.

A name map is a function of a parameter's path, so that it holds for every net that the
plan can make.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.modules import ResNetV2

Leaf = tuple[str, ...]
"""Path of one of our arrays, as ("params", "stem", "conv", "kernel")."""
HEAD = "head/classifier"


@dataclass(frozen=True)
class WeightLayout:
    """How somebody else calls our arrays, and lays them out."""

    name: str
    module: Callable[[str], str]
    """Our module's path, as "stack2/unit1/layer3/norm" -> theirs."""
    separator: str
    norm: dict[str, str]
    """scale, bias, mean, var of a norm."""
    kernel: str
    """Of convolutions and of the classifier."""
    convolution: tuple[int, ...]
    """Order of our axes [k, k, C, F] in theirs."""
    classifier: Literal["dense", "last", "first"]
    """[C, F]; or a 1x1 convolution: [1, 1, C, F], [F, C, 1, 1]."""

    def tensor(self, leaf: Leaf) -> str:
        """Their name of one of our arrays."""
        *path, last = leaf[1:]
        kind = path[-1]
        if kind.startswith("norm"):
            if last not in self.norm:
                raise _no_counterpart("/".join(leaf[1:]))
            last = self.norm[last]
        elif last == "kernel":
            last = self.kernel
        return self.module("/".join(path)) + self.separator + last

    def theirs(self, leaf: Leaf, array: np.ndarray) -> np.ndarray:
        """Our array as they lay it out."""
        if array.ndim == 4:
            return array.transpose(self.convolution)
        if leaf[1:] == ("head", "classifier", "kernel"):
            if self.classifier == "last":
                return array[None, None]
            if self.classifier == "first":
                return array.T[:, :, None, None]
        return array

    def ours(self, leaf: Leaf, array: np.ndarray) -> np.ndarray:
        """Their array as we lay it out; of a shape that ``theirs`` gives."""
        if leaf[1:] == ("head", "classifier", "kernel"):
            if self.classifier == "last":
                return array[0, 0]
            if self.classifier == "first":
                return array[:, :, 0, 0].T
        if array.ndim == 4:
            return array.transpose(np.argsort(self.convolution))
        return array


def _module(
    path: str,
    unit: Callable[[int, int], str],
    inside: dict[str, str],
    outside: dict[str, str],
) -> str:
    """Their module for ours: ``inside`` of a unit, or ``outside`` of all."""
    if found := re.fullmatch(r"stack(\d+)/unit(\d+)/(.+)", path):
        if (name := inside.get(found[3])) is not None:
            return unit(int(found[1]), int(found[2])) + name
    elif path in outside:
        return outside[path]
    raise _no_counterpart(path)


def _no_counterpart(path: str) -> UsageError:
    return UsageError(
        f"{path} has no counterpart there; give a model of the presets that the "
        "function reads, or classifier='leave' for a model with another head"
    )


def _keras(path: str) -> str:
    return _module(
        path,
        lambda stack, unit: f"conv{stack + 1}_block{unit}_",
        {
            "layer1/norm": "preact_bn",
            "layer1/conv": "1_conv",
            "layer2/norm": "1_bn",
            "layer2/conv": "2_conv",
            "layer3/norm": "2_bn",
            "layer3/conv": "3_conv",
            "shortcut": "0_conv",
        },
        {"stem/conv": "conv1_conv", "head/norm": "post_bn", HEAD: "predictions"},
    )


def _timm(path: str, deep: bool) -> str:
    layers = {
        f"layer{k}/{ours}": f"{theirs}{k}"
        for k in (1, 2, 3)
        for ours, theirs in (("norm", "norm"), ("conv", "conv"))
    }
    stem = {"stem/conv": "stem.conv"}
    if deep:
        stem = {
            f"stem/{kind}{k if k > 1 else ''}": f"stem.{kind}{k}"
            for k in (1, 2, 3)
            for kind in ("conv", "norm")
        }
    return _module(
        path,
        lambda stack, unit: f"stages.{stack - 1}.blocks.{unit - 1}.",
        layers | {"shortcut": "downsample.conv"},
        stem | {"head/norm": "norm", HEAD: "head.fc"},
    )


def _bit(path: str) -> str:
    inside = {"shortcut": "a/proj/standardized_conv2d"}
    for k, letter in enumerate("abc", start=1):
        inside[f"layer{k}/norm"] = f"{letter}/group_norm"
        inside[f"layer{k}/conv"] = f"{letter}/standardized_conv2d"
    return _module(
        path,
        lambda stack, unit: f"resnet/block{stack}/unit{unit:02}/",
        inside,
        {
            "stem/conv": "resnet/root_block/standardized_conv2d",
            "head/norm": "resnet/group_norm",
            HEAD: "resnet/head/conv2d",
        },
    )


def keras(_: ResNetV2) -> WeightLayout:
    """Keras's names."""
    norm = ("gamma", "beta", "moving_mean", "moving_variance")
    return WeightLayout(
        name="Keras",
        module=_keras,
        separator="/",
        norm=dict(zip(("scale", "bias", "mean", "var"), norm, strict=True)),
        kernel="kernel",
        convolution=(0, 1, 2, 3),
        classifier="dense",
    )


def timm(model: ResNetV2) -> WeightLayout:
    """timm's names."""
    deep = model.plan.stem is not None and len(model.plan.stem.convs) == 3
    norm = ("weight", "bias", "running_mean", "running_var")
    return WeightLayout(
        name="timm",
        module=lambda path: _timm(path, deep),
        separator=".",
        norm=dict(zip(("scale", "bias", "mean", "var"), norm, strict=True)),
        kernel="weight",
        convolution=(3, 2, 0, 1),
        classifier="first",
    )


def bit(_: ResNetV2) -> WeightLayout:
    """Big Transfer's names."""
    return WeightLayout(
        name="Big Transfer",
        module=_bit,
        separator="/",
        norm={"scale": "gamma", "bias": "beta"},
        kernel="kernel",
        convolution=(0, 1, 2, 3),
        classifier="last",
    )
