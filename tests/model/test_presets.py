"""Every preset against its reference count, a count by hand, and its golden tree."""

import json
import re
from dataclasses import replace

import jax
import pytest

from flax_resnetv2 import PRESETS, UsageError, create_model
from tests.support import golden


def count_by_hand(
    units,
    widths,
    stem_width,
    reduction,
    bare,
    *,
    classes=10,
    stem=None,
    biases="",
):
    """Trainable numbers from the article's sentences alone.

    ``reduction``: one number, one a stack, or None for basic units. ``bare``: the stem
    has the norm that unit 1 has not. ``biases``: of stem, layers 1, 2, 3, shortcut, as
    "s123c". ``stem``: its numbers, where it is not a 3x3 convolution.
    """

    def conv(kernel, maps_in, maps_out, at=""):
        return kernel * kernel * maps_in * maps_out + maps_out * (
            at != "" and at in biases
        )

    def norm(maps):
        return 2 * maps

    total = conv(3, 3, stem_width, "s") if stem is None else stem
    if bare:  # the stem's own norm; else unit 1's follows the convolution
        total += norm(stem_width)
    before = stem_width
    for stack, (number, width) in enumerate(zip(units, widths, strict=True)):
        for unit in range(number):
            if not (bare and stack == unit == 0):
                total += norm(before)
            if reduction is None:
                total += conv(3, before, width) + norm(width) + conv(3, width, width)
            else:
                by = reduction[stack] if isinstance(reduction, tuple) else reduction
                inner = width // by
                total += conv(1, before, inner, "1") + norm(inner)
                total += conv(3, inner, inner, "2") + norm(inner)
                total += conv(1, inner, width, "3")
            if unit == 0 and (stack > 0 or before != width):
                total += conv(1, before, width, "c")
            before = width
    return total + norm(before) + before * classes + classes


LARGE = (256, 512, 1024, 2048)
R50, R101, R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
IMAGENET = {"classes": 1000, "stem": 49 * 3 * 64}
KERAS_BIASES = {**IMAGENET, "stem": 49 * 3 * 64 + 64, "biases": "3c"}
# 3x3 of 3 to 32, 32 to 32, 32 to 64 maps, with norms behind the first two.
DEEP = {"classes": 1000, "stem": 9 * (3 * 32 + 32 * 32 + 32 * 64) + 2 * 64}

BY_HAND = {
    "article": (((3, 3, 3), (64, 128, 256), 64, 2, True), {}),
    "article-56": (((6, 6, 6), (64, 128, 256), 64, 2, True), {}),
    "article-figure": (((3, 6, 6, 3), (64, 128, 256, 512), 64, 2, True), {}),
    "article-4-stacks": (((3,) * 4, (32, 64, 128, 256), 32, 2, True), {}),
    "article-5-stacks": (((3,) * 5, (16, 32, 64, 128, 256), 16, 2, True), {}),
    "he2016-resnet200": (((3, 24, 36, 3), LARGE, 64, 4, True), IMAGENET),
    "basic-resnet34": ((R50, (64, 128, 256, 512), 64, None, False), IMAGENET),
    "timm-resnetv2-18": (((2,) * 4, (64, 128, 256, 512), 64, None, False), IMAGENET),
    "timm-resnetv2-34": ((R50, (64, 128, 256, 512), 64, None, False), IMAGENET),
    "timm-resnetv2-50d": ((R50, LARGE, 64, 4, False), DEEP),
}
for n in (2, 6, 12, 18, 111):
    row = ((n,) * 3, (64, 128, 256), 16, 4, False)
    BY_HAND[f"he2016-resnet{9 * n + 2}"] = (row, {})
for n in (2, 3, 6, 12, 18):
    row = ((n,) * 3, (64, 128, 256), 16, (4, 2, 2), True)
    BY_HAND[f"atienza-resnet{9 * n + 2}v2"] = (row, {"biases": "s123c"})
for n in (3, 9, 18):
    row = ((n,) * 3, (16, 32, 64), 16, None, False)
    BY_HAND[f"basic-resnet{6 * n + 2}"] = (row, {})
for depth, stacks in ((50, R50), (101, R101), (152, R152)):
    row = (stacks, LARGE, 64, 4, False)
    BY_HAND[f"keras-resnet{depth}v2"] = (row, KERAS_BIASES)
    BY_HAND[f"timm-resnetv2-{depth}"] = (row, IMAGENET)
    for m in (1, 2, 3, 4):
        row = (stacks, tuple(m * w for w in LARGE), 64 * m, 4, False)
        BY_HAND[f"bit-r{depth}x{m}"] = (row, {**IMAGENET, "stem": 49 * 3 * 64 * m})

PUBLISHED_MILLIONS = {
    "timm-resnetv2-18": 11.69,
    "timm-resnetv2-34": 21.80,
    "timm-resnetv2-50": 25.55,
    "timm-resnetv2-50d": 25.57,
    "timm-resnetv2-101": 44.54,
    "timm-resnetv2-152": 60.19,
    "bit-r50x1": 25.55,
    "bit-r50x3": 217.32,
    "bit-r101x1": 44.54,
    "bit-r101x3": 387.93,
    "bit-r152x2": 236.34,
    "bit-r152x4": 936.53,
}
"""Of timm's tables of results."""


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_reference_and_the_count_by_hand(name):
    preset = PRESETS[name]
    shapes = golden.variable_shapes(preset.architecture)["params"]
    built = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    row, more = BY_HAND[name]
    assert built == preset.parameters == count_by_hand(*row, **more)
    assert preset.source


@pytest.mark.parametrize(("name", "millions"), PUBLISHED_MILLIONS.items())
def test_parameters_equal_the_published_millions(name, millions):
    assert round(PRESETS[name].parameters / 1e6, 2) == millions


def test_the_net_of_the_figure_at_both_reductions():  # R14
    figure = PRESETS["article-figure"].architecture
    assert (figure.units, figure.depth) == ((3, 6, 6, 3), 56)
    for reduction, count in ((2, 4_302_410), (4, 1_518_986)):
        shapes = golden.variable_shapes(replace(figure, reduction=reduction))
        built = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        custom = count_by_hand(figure.units, figure.widths, 64, reduction, True)
        assert built == custom == count


def test_published_counts():
    counts = {
        "he2016-resnet20": 219_482,
        "he2016-resnet56": 590_426,
        "he2016-resnet110": 1_146_842,
        "he2016-resnet164": 1_703_258,
        "he2016-resnet1001": 10_327_706,
        "atienza-resnet20v2": 570_602,
        "atienza-resnet56v2": 1_663_338,
        "atienza-resnet110v2": 3_302_442,
        "atienza-resnet164v2": 4_941_546,
        "basic-resnet20": 272_282,
        "basic-resnet56": 855_578,
        "basic-resnet110": 1_730_522,
        "keras-resnet50v2": 25_568_360,
        "keras-resnet101v2": 44_577_896,
        "keras-resnet152v2": 60_236_904,
    }
    for name, count in counts.items():
        assert PRESETS[name].parameters == count, name


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"timm-resnetv2-50d"}))
def test_a_name_says_the_depth(name):
    said = re.search(r"resnet(?:v2-)?(\d+)|bit-r(\d+)x|article-(56)$", name)
    if said:
        depth = int(next(number for number in said.groups() if number))
        assert PRESETS[name].architecture.depth == depth


@pytest.mark.parametrize("name", PRESETS)
def test_golden_tree(name):
    path = golden.DIRECTORY / f"{name}.json"
    assert json.loads(path.read_text()) == golden.tree(PRESETS[name].architecture), (
        f"the variables of {name} changed; if meant: python -m tests.support.golden"
    )


@pytest.mark.parametrize("name", ["resnet56", "ResNet-56", "56", "resnet56v2"])
def test_a_bare_depth_is_refused_because_it_means_several_nets(name):
    with pytest.raises(UsageError, match=r"different nets.*he2016-resnet56"):
        create_model(name)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'vgg'.*article-figure"):
        create_model("vgg")
