"""The plan: every layer of the article, and every message about a mistake."""

import re
from dataclasses import replace

import pytest

from flax_resnetv2 import (
    ARTICLE,
    BIT,
    HE2016,
    PRESETS,
    Architecture,
    Semantics,
    UsageError,
    plan,
    plan_stack,
    plan_unit,
)
from flax_resnetv2.model.layer_table import (
    fold,
    layer_table,
    receptive_field,
    unit_table,
)


def units_of(net):
    return [
        (s, u, unit)
        for s, stack in enumerate(net.stacks, start=1)
        for u, unit in enumerate(stack.units, start=1)
    ]


def convolutions(net):
    """{"stack2/unit1/layer3/conv": its plan} of every convolution."""
    found = {f"stem/conv{suffix}": conv for suffix, conv, _ in net.stem.layers()}
    for s, u, unit in units_of(net):
        for number, layer in enumerate(unit.layers, start=1):
            found[f"stack{s}/unit{u}/layer{number}/conv"] = layer.conv
        if unit.shortcut:
            found[f"stack{s}/unit{u}/shortcut"] = unit.shortcut
    for s, stack in enumerate(net.stacks, start=1):
        if stack.bridge not in (None, "identity"):
            found[f"stack{s}/bridge"] = stack.bridge
    return found


def test_every_unit_of_a_stack_gives_out_its_width_at_one_resolution():  # R2
    rows = {
        r.name: r.shape
        for r in layer_table(plan(Architecture(), (32, 32, 3)), (32, 32, 3))
    }
    for s, (side, width) in enumerate(((32, 64), (16, 128), (8, 256)), start=1):
        for u in (1, 2, 3):
            assert rows[f"stack{s}/unit{u}/layer3/conv"] == (side, side, width)


def test_a_bottleneck_has_three_layers_of_kernels_1_3_1():  # R3
    for stack, _, unit in units_of(plan(Architecture())):
        width = (64, 128, 256)[stack - 1]
        shape = [(layer.conv.kernel, layer.conv.width) for layer in unit.layers]
        assert shape == [(1, width // 2), (3, width // 2), (1, width)]


def test_a_basic_unit_has_two_layers_of_the_central_kernel():
    unit = plan_unit(in_width=8, width=8, unit="basic", reduction=1, kernel=5)
    assert [(x.conv.kernel, x.conv.width) for x in unit.layers] == [(5, 8), (5, 8)]


def test_only_the_first_layer_of_all_lacks_its_norm():  # R6
    net = plan(Architecture())
    bare = [
        (s, u, number)
        for s, u, unit in units_of(net)
        for number, layer in enumerate(unit.layers, start=1)
        if layer.norm is None
    ]
    assert bare == [(1, 1, 1)]


@pytest.mark.parametrize(
    "architecture",
    [
        Architecture(stem=False),
        Architecture(semantics=replace(ARTICLE, stem_norm=False)),
        Architecture(semantics=replace(ARTICLE, first_layer_exception=False)),
        Architecture(semantics=HE2016),
    ],
)
def test_the_exception_holds_only_behind_a_stem_that_ends_in_a_norm(architecture):
    net = plan(architecture, (32, 32, 3))
    assert all(x.norm for _, _, unit in units_of(net) for x in unit.layers)


def test_a_unit_by_hand_has_the_exception_only_in_the_article():
    for semantics, bare in ((ARTICLE, True), (HE2016, False)):
        unit = plan_unit(in_width=8, width=8, behind_norm=True, semantics=semantics)
        assert [x.norm is None for x in unit.layers] == [bare, False, False]


@pytest.mark.parametrize("layer", [1, 2])
def test_the_stride_sits_in_one_layer_of_unit_1(layer):  # R7
    net = plan(Architecture(semantics=replace(ARTICLE, stride_layer=layer)))
    for stack, number, planned in units_of(net):
        strides = [x.conv.stride for x in planned.layers]
        expected = [1, 1, 1]
        if stack > 1 and number == 1:
            expected[layer - 1] = 2
        assert strides == expected


def test_a_basic_unit_has_its_stride_on_layer_1_always():
    semantics = replace(ARTICLE, stride_layer=2)
    unit = plan_unit(
        in_width=8, width=16, stride=2, unit="basic", reduction=1, semantics=semantics
    )
    assert [x.conv.stride for x in unit.layers] == [2, 1]


def test_only_unit_1_of_a_lower_stack_has_a_shortcut_convolution():  # R8
    for stack, number, unit in units_of(plan(Architecture())):
        if stack > 1 and number == 1:
            assert (unit.shortcut.kernel, unit.shortcut.stride) == (1, 2)
        else:
            assert unit.shortcut is None


@pytest.mark.parametrize(("stem_width", "projects"), [(64, False), (16, True)])
def test_stack_1_projects_when_the_stem_has_another_width(stem_width, projects):  # R9
    shortcut = plan(Architecture(stem_width=stem_width)).stacks[0].units[0].shortcut
    assert (shortcut is not None) == projects
    assert shortcut is None or shortcut.stride == 1


def test_projection_in_every_stack():
    net = plan(Architecture(semantics=replace(ARTICLE, projection="every_stack")))
    assert [stack.units[0].shortcut is not None for stack in net.stacks] == [True] * 3
    assert net.stacks[0].units[1].shortcut is None


def test_reduction_changes_maps_and_nothing_else():  # R11
    def facts(reduction):
        rows = layer_table(
            plan(Architecture(reduction=reduction), (32, 32, 3)), (32, 32, 3)
        )
        return [(r.name, r.kernel, r.stride, r.shape[:2]) for r in rows]

    assert facts(2) == facts(4) == facts(1)


@pytest.mark.parametrize(
    ("reduction", "central", "inner"),
    [
        (2, None, [(32, 32), (64, 64), (128, 128)]),
        (4, None, [(16, 16), (32, 32), (64, 64)]),
        ((4, 2, 2), None, [(16, 16), (64, 64), (128, 128)]),
        (2, 4, [(32, 16), (64, 32), (128, 64)]),
        (2, (1, 2, 4), [(32, 64), (64, 64), (128, 64)]),
        ("previous", None, [(16, 16), (64, 64), (128, 128)]),
        (("previous", 2, 1), None, [(16, 16), (64, 64), (256, 256)]),
    ],
)
def test_reduction_is_a_number_one_a_stack_a_pair_or_previous(
    reduction, central, inner
):  # R12
    net = plan(
        Architecture(reduction=reduction, central_reduction=central, stem_width=16)
    )
    for k, stack in enumerate(net.stacks):
        for unit in stack.units:
            assert tuple(x.conv.width for x in unit.layers[:2]) == inner[k]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_one_to_five_stacks(count):  # R13
    architecture = Architecture(
        units=tuple(range(1, count + 1)),
        widths=(8, 16, 32, 64, 128)[:count],
        strides=(1, 2, 2, 2, 2)[:count],
        reduction=(1, 2, 4, 8, 2)[:count],
        kernel=(3, 5, 3, 7, 1)[:count],
        bridge=(True, False, True, False, True)[:count],
    )
    net = plan(architecture, (32, 32, 3))
    assert [len(stack.units) for stack in net.stacks] == list(range(1, count + 1))
    for k, stack in enumerate(net.stacks):
        assert stack.units[-1].layers[1].conv.kernel == architecture.kernel[k]
        assert (stack.bridge is not None) == architecture.bridge[k]


@pytest.mark.parametrize(
    "field",
    ["widths", "strides", "reduction", "central_reduction", "kernel", "bridge"],
)
@pytest.mark.parametrize("count", [2, 4])
def test_a_list_of_another_length_than_units_is_named(field, count):  # R13
    values = (field == "bridge" or 1,) * count
    message = rf"^{field}=\({values[0]}, .*\) has {count} values, .*3 stacks"
    with pytest.raises(UsageError, match=message):
        plan(Architecture(**{field: values}))


def test_a_bridge_is_the_identity_where_shapes_agree():  # R20
    first, second, third = plan(Architecture(bridge=(True, True, False))).stacks
    assert (first.bridge, third.bridge) == ("identity", None)
    conv = second.bridge
    assert (conv.in_width, conv.width, conv.kernel, conv.stride) == (64, 128, 1, 2)
    wider = plan_stack(in_width=8, width=16, units=1, bridge=True).bridge
    assert (wider.width, wider.stride) == (16, 1)
    strided = plan_stack(in_width=8, width=8, units=1, stride=2, bridge=True).bridge
    assert (strided.width, strided.stride) == (8, 2)


def test_stems():  # R16
    seven = Architecture(stem_kernel=7, stem_stride=2, stem_pool=True)
    stem = plan(seven).stem
    assert [(c.kernel, c.stride, c.width) for c in stem.convs] == [(7, 2, 64)]
    assert stem.pool == "lowest"
    stem = plan(Architecture(stem_second_stride=2, semantics=HE2016)).stem
    assert [(c.kernel, c.stride, c.width) for c in stem.convs] == [
        (3, 1, 64),
        (3, 2, 64),
    ]
    assert [norm is not None for norm in stem.norms] == [True, False]
    assert stem.pool is None


def test_the_head_starts_as_the_semantics_says():
    for semantics in (ARTICLE, HE2016):
        head = plan(Architecture(semantics=semantics)).head
        assert head.init == semantics.dense_init


@pytest.mark.parametrize("position", ["stem", "layer1", "layer2", "layer3", "shortcut"])
def test_a_bias_stands_only_where_the_semantics_puts_it(position):
    semantics = replace(ARTICLE, biases=(position,))
    net = plan(Architecture(bridge=True, stem_second_stride=1, semantics=semantics))
    for name, conv in convolutions(net).items():
        assert conv.bias == (position in name), name


def test_zero_init_last_is_about_the_last_layer_alone():  # R10
    net = plan(Architecture(semantics=replace(ARTICLE, zero_init_last=True)))
    for name, conv in convolutions(net).items():
        assert (conv.init == "zeros") == ("layer3" in name), name


def test_five_stacks_end_at_2x2_and_odd_sizes_work():  # R15
    five = Architecture(
        units=(1,) * 5, widths=(8,) * 5, strides=(1, 2, 2, 2, 2), stem_width=8
    )
    assert layer_table(plan(five, (32, 32, 3)), (32, 32, 3))[-2].shape == (2, 2, 8)
    fashion = Architecture(units=(1,) * 4, widths=(8,) * 4, strides=(1, 2, 2, 2))
    rows = {
        row.name: row.shape
        for row in layer_table(plan(fashion, (28, 28, 1)), (28, 28, 1))
    }
    for s, side in enumerate((28, 14, 7, 4), start=1):
        assert rows[f"stack{s}/unit1/layer3/conv"][:2] == (side, side)
        if f"stack{s}/unit1/shortcut" in rows:
            assert rows[f"stack{s}/unit1/shortcut"][:2] == (side, side)


@pytest.mark.parametrize(
    ("unit", "n", "depth"),
    [
        ("basic", 3, 20),
        ("basic", 9, 56),
        ("basic", 18, 110),
        ("bottleneck", 6, 56),
        ("bottleneck", 12, 110),
        ("bottleneck", 18, 164),
        ("bottleneck", 111, 1001),
    ],
)
def test_depth_counts_as_the_papers_do(unit, n, depth):  # E1
    reduction = 1 if unit == "basic" else 2
    net = Architecture(units=(n, n, n), unit=unit, reduction=reduction)
    assert net.depth == depth


def test_depth_counts_the_stem_convolutions_too():
    assert Architecture().depth == 29
    assert Architecture(stem=False).depth == 28
    assert Architecture(stem_second_stride=2).depth == 30


def test_units_after_the_first_have_equal_plans():
    for stack in plan(Architecture()).stacks:
        assert stack.units[1] == stack.units[2]
    assert hash(plan(Architecture())) == hash(plan(Architecture()))


def test_a_shared_preactivation_is_for_shortcut_convolutions_only():
    net = plan(Architecture(semantics=HE2016))
    for _, _, unit in units_of(net):
        assert unit.shared_preactivation == (unit.shortcut is not None)


def test_receptive_field_of_the_article():
    # By hand: 3x3 layers only; 1 + 2 (stem) + 3 units x 2 x jump 1, then 2, then 4.
    seen = receptive_field(plan(Architecture()))
    sides = {part: field.side for part, field in seen.items()}
    assert sides == {"stem": 3, "stack1": 9, "stack2": 21, "stack3": 45}
    assert [field.stride for field in seen.values()] == [1, 1, 2, 4]
    deep = Architecture(stem_kernel=7, stem_stride=2, stem_pool=True, units=(1, 1, 1))
    assert receptive_field(plan(deep))["stem"] == (7 + 2 * 2, 4)


def test_receptive_field_without_a_stem_is_of_any_image():
    net = Architecture(stem=False, strides=(8, 8, 16), semantics=BIT)
    planned = plan(net, (2048, 2048, 32))
    assert receptive_field(planned)["stack3"].stride == 1024


@pytest.mark.parametrize(
    "name", ["article-figure", "he2016-resnet164", "timm-resnetv2-18"]
)
def test_units_add_up_to_the_layers(name):
    architecture = PRESETS[name].architecture
    layers = layer_table(plan(architecture, (64, 64, 3)), (64, 64, 3))
    units = unit_table(plan(architecture, (64, 64, 3)), (64, 64, 3))
    folded = fold(units)
    assert len(units) == sum(architecture.units) + 2
    for rows in (units, folded):
        assert sum(row.parameters for row in rows) == PRESETS[name].parameters
        sums = [sum(row.multiply_adds for row in some) for some in (rows, layers)]
        assert sums[0] == sums[1]
    assert len({row.name for row in folded}) == len(folded) < len(units)


def test_units_are_folded_under_their_numbers():
    table = unit_table(
        plan(PRESETS["he2016-resnet164"].architecture, (32, 32, 3)), (32, 32, 3)
    )
    names = [row.name for row in fold(table)]
    assert names[1:3] == ["stack1/unit1", "stack1/unit2..18"]
    [first] = [row for row in table if row.name == "stack2/unit1"]
    assert (first.shape, first.kernel, first.stride) == ((16, 16, 128), 3, 2)


def test_the_row_of_a_stem_is_what_leaves_its_pool():
    table = unit_table(
        plan(PRESETS["keras-resnet50v2"].architecture, (224, 224, 3)), (224, 224, 3)
    )
    assert (table[0].shape, table[0].stride) == ((56, 56, 64), 4)


def test_multiply_adds_are_the_published_ones():
    table = layer_table(
        plan(PRESETS["he2016-resnet164"].architecture, (32, 32, 3)), (32, 32, 3)
    )
    assert round(sum(row.multiply_adds for row in table) / 1e6, 1) == 244.5
    table = layer_table(
        plan(PRESETS["timm-resnetv2-50"].architecture, (224, 224, 3)), (224, 224, 3)
    )
    assert round(sum(row.multiply_adds for row in table) / 1e9, 1) == 4.1


def test_without_a_stem_the_channels_must_be_known():
    with pytest.raises(UsageError, match="image_shape=None"):
        plan(Architecture(stem=False))
    first = plan(Architecture(stem=False), (8, 8, 3)).stacks[0].units[0]
    assert first.layers[0].conv.in_width == 3
    assert first.shortcut.width == 64


MISTAKES = [
    ({"hidden": 5}, r"hidden=5 must be a tuple"),
    ({"semantics": "HE2016"}, r"semantics='HE2016' must be .*ARTICLE, HE2016"),
    ({"semantics": Semantics(norm_epsilon="1e-5")}, r"norm_epsilon='1e-5' must be a"),
    ({"semantics": Semantics(biases="stem")}, r"biases='stem' must be a tuple"),
    (
        {"units": (1,) * 6},
        r"units=\(1, 1, 1, 1, 1, 1\) must be the numbers of units of 1 to 5 stacks",
    ),
    ({"units": ()}, r"units=\(\) must be the numbers of units of 1 to 5 stacks"),
    ({"units": 3}, r"units=3 must be a tuple, each .* from 1 to 10000"),
    ({"units": (3, 0, 3)}, r"units=\(3, 0, 3\) must be .* from 1 to 10000"),
    ({"widths": (64, 128)}, r"widths=\(64, 128\) has 2 values, .* 3 stacks"),
    ({"widths": 64}, r"widths=64 must be a tuple"),
    ({"widths": (64, -1, 8)}, r"widths=\(64, -1, 8\) must be .* from 1 to"),
    ({"strides": (1, 2)}, r"strides=\(1, 2\) has 2 values"),
    ({"strides": (1, 0, 2)}, r"strides=\(1, 0, 2\) must be .* from 1 to 64"),
    ({"strides": (1, 1.5, 2)}, r"strides=\(1, 1.5, 2\) must be .*\(int\)"),
    ({"reduction": 3}, r"stack 1: reduction=3 does not divide width=64; .*1, 2, 4"),
    ({"reduction": (2, 3, 2)}, r"stack 2: reduction=3 does not divide width=128"),
    ({"reduction": (2, 2)}, r"reduction=\(2, 2\) has 2 values"),
    ({"reduction": "half"}, r"reduction='half' .*'previous'"),
    ({"reduction": 0}, r"reduction=0 must be .* 'previous' or a tuple of these"),
    ({"central_reduction": 5}, r"central_reduction=5 does not divide width=64"),
    ({"kernel": 2}, r"kernel=2 must be .*odd.* or a tuple of these"),
    ({"kernel": (3, 3)}, r"kernel=\(3, 3\) has 2 values"),
    ({"unit": "basic"}, r"stack 1: reduction=2: a basic unit has no reduction"),
    ({"unit": "dense"}, r"unit='dense' is unknown; .*'bottleneck', 'basic'"),
    (
        {"unit": "basic", "reduction": 1, "central_reduction": 2},
        r"stack 1: central_reduction=2: a basic unit has no reduction",
    ),
    ({"bridge": "yes"}, r"bridge='yes' must be True or False or a tuple of these"),
    ({"stem": 1}, r"stem=1 is unknown; .*True, False"),
    ({"stem_kernel": 4}, r"stem_kernel=4 must be .* from 1 to 255 .odd"),
    ({"stem_width": 0}, r"stem_width=0 must be .* from 1 to"),
    ({"stem_second_stride": 0}, r"stem_second_stride=0 must .* 1 to 64 or None"),
    ({"stem_stride": 2.0}, r"stem_stride=2.0 must be a whole number \(int\)"),
    ({"stem_pool": "max"}, r"stem_pool='max' is unknown; .*True, False"),
    ({"head": "mlp"}, r"head='mlp' is unknown; .*'classifier', 'latent', 'none'"),
    ({"head_input": "max"}, r"head_input='max' .*'pooled', 'flattened'"),
    ({"num_classes": 0}, r"num_classes=0 must be a whole number"),
    ({"num_classes": True}, r"num_classes=True must be a whole number"),
    ({"num_classes": None}, r"num_classes=None is only for a run, .*; give a number"),
    ({"latent_variance": 1}, r"latent_variance=1 is unknown; .*True, False"),
    ({"hidden": (10, 0)}, r"hidden=\(10, 0\) must be a tuple, each .* from 1"),
    ({"latent": 0}, r"latent=0 must be .* from 1 to"),
    ({"semantics": Semantics(stride_layer=3)}, r"semantics.stride_layer=3 .*1, 2"),
    (
        {"semantics": Semantics(shortcut_input="pre")},
        r"shortcut_input='pre' .*'raw', 'preactivated'",
    ),
    (
        {"semantics": Semantics(projection="never")},
        r"projection='never' .*'when_needed', 'every_stack'",
    ),
    (
        {"semantics": Semantics(pool_padding="one")},
        r"pool_padding='one' .*'lowest', 'zero'",
    ),
    (
        {"semantics": Semantics(kernel_init="glorot")},
        r"kernel_init='glorot' .*'he_normal', 'he_normal_fan_out'",
    ),
    ({"semantics": Semantics(stem_norm=0)}, r"stem_norm=0 is unknown; .*True, False"),
    ({"semantics": Semantics(padding="valid")}, r"semantics.padding='valid' .*'same'"),
    ({"semantics": Semantics(biases=("layer4",))}, r"\('layer4',\) must .*'layer1'"),
    (
        {"semantics": Semantics(norm_epsilon=0.0)},
        r"norm_epsilon=0.0 must .* 1e-12",
    ),
    ({"semantics": Semantics(norm_momentum=1.0)}, r"norm_momentum=1.0 .* \[0, 1\)"),
    ({"semantics": Semantics(shortcut_kernel=2)}, r"shortcut_kernel=2 must be .*odd"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_is_named_with_its_value_and_the_choices(changes, message):
    with pytest.raises(UsageError) as caught:
        plan(Architecture(**changes))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_width": 0}, r"^in_width=0 must be .* from 1"),
        ({"width": 9}, r"^reduction=2 does not divide width=9; .*1, 3, 9"),
        ({"stride": 0}, r"^stride=0 must be .* from 1 to 64"),
        ({"kernel": 4}, r"^kernel=4 must be .*odd"),
        ({"unit": "wide"}, r"^unit='wide' is unknown"),
    ],
)
def test_a_unit_planned_by_hand_is_checked_too(changes, message):
    with pytest.raises(UsageError, match=message):
        plan_unit(**({"in_width": 8, "width": 8} | changes))


def test_an_image_without_pixels_is_refused():
    with pytest.raises(UsageError, match=r"image_shape=\(0, 32, 3\) must be .* from 1"):
        plan(Architecture(), (0, 32, 3))


@pytest.mark.parametrize(
    ("changes", "shape", "where"),
    [
        ({"strides": (4, 4, 4)}, (8, 8, 3), "stack3/unit1/layer1"),
        ({"stem_pool": True}, (1, 1, 3), "stem/pool"),
        ({"stem_stride": 2}, (1, 1, 3), "stem/conv"),
    ],
)
def test_a_stride_on_a_map_of_one_pixel_is_refused(changes, shape, where):  # R15
    with pytest.raises(UsageError, match=f"at {where}: the map is already 1x1"):
        plan(Architecture(**changes), shape)
    plan(Architecture(**changes))


def test_an_image_shape_has_three_numbers():
    with pytest.raises(UsageError, match=r"image_shape=\(32, 32\)"):
        plan(Architecture(), (32, 32))


def test_a_unit_by_hand_checks_its_semantics():
    with pytest.raises(UsageError, match=r"semantics.stride_layer=3"):
        plan_unit(in_width=8, width=8, semantics=Semantics(stride_layer=3))
