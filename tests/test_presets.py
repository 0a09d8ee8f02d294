"""Every preset against its reference count, a count by hand, and its golden tree."""

import json
from dataclasses import replace

import jax
import pytest

from flax_resnetv2 import PRESETS, UsageError, create_model
from tests import golden


def count_by_hand(units, widths, stem_width, reduction, first_bare, classes=10):
    """Trainable numbers from the article's sentences alone."""

    def conv(kernel, maps_in, maps_out):
        return kernel * kernel * maps_in * maps_out

    def norm(maps):
        return 2 * maps

    total = conv(3, 3, stem_width)
    if first_bare:  # the stem's own norm; else unit 1's follows the convolution
        total += norm(stem_width)
    before = stem_width
    for stack, (number, width) in enumerate(zip(units, widths, strict=True)):
        inner = width // reduction
        for unit in range(number):
            if not (first_bare and stack == unit == 0):
                total += norm(before)
            total += conv(1, before, inner) + norm(inner) + conv(3, inner, inner)
            total += norm(inner) + conv(1, inner, width)
            if unit == 0 and (stack > 0 or before != width):
                total += conv(1, before, width)
            before = width
    return total + norm(before) + before * classes + classes


BY_HAND = {
    "article": ((3, 3, 3), (64, 128, 256), 64, 2, True),
    "article-56": ((6, 6, 6), (64, 128, 256), 64, 2, True),
    "article-figure": ((3, 6, 6, 3), (64, 128, 256, 512), 64, 2, True),
    "article-4-stacks": ((3,) * 4, (32, 64, 128, 256), 32, 2, True),
    "article-5-stacks": ((3,) * 5, (16, 32, 64, 128, 256), 16, 2, True),
} | {
    f"he2016-resnet{9 * n + 2}": ((n,) * 3, (64, 128, 256), 16, 4, False)
    for n in (2, 6, 12, 18, 111)
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_equal_the_reference_and_the_count_by_hand(name):
    preset = PRESETS[name]
    shapes = golden.variable_shapes(preset.architecture)["params"]
    built = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert built == preset.parameters == count_by_hand(*BY_HAND[name])
    assert preset.source


def test_the_net_of_the_figure_at_both_reductions():  # R14
    figure = PRESETS["article-figure"].architecture
    assert (figure.units, figure.depth) == ((3, 6, 6, 3), 56)
    for reduction, count in ((2, 4_302_410), (4, 1_518_986)):
        shapes = golden.variable_shapes(replace(figure, reduction=reduction))
        built = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        by_hand = count_by_hand(figure.units, figure.widths, 64, reduction, True)
        assert built == by_hand == count


def test_published_counts():
    counts = [p.parameters for name, p in PRESETS.items() if name.startswith("he2016")]
    assert counts == [219_482, 590_426, 1_146_842, 1_703_258, 10_327_706]
    depths = [p.architecture.depth for n, p in PRESETS.items() if n[:6] == "he2016"]
    assert depths == [20, 56, 110, 164, 1001]


@pytest.mark.parametrize("name", PRESETS)
def test_golden_tree(name):
    path = golden.DIRECTORY / f"{name}.json"
    assert json.loads(path.read_text()) == golden.tree(PRESETS[name].architecture), (
        f"the variables of {name} changed; if that is meant: python -m tests.golden"
    )


@pytest.mark.parametrize("name", ["resnet56", "ResNet-56", "56", "resnet56v2"])
def test_a_bare_depth_is_refused_because_it_means_several_nets(name):
    with pytest.raises(UsageError, match=r"different nets.*he2016-resnet56"):
        create_model(name)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"'vgg'.*article-figure"):
        create_model("vgg")
