"""The modules: the article's sentences about residual units, layers, stem and head."""

from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnetv2 import (
    ARTICLE,
    HE2016,
    PRESETS,
    Architecture,
    Execution,
    ResidualLayer,
    ResidualStack,
    ResidualUnit,
    ResNetV2,
    UsageError,
    create_model,
    plan,
    plan_stack,
    plan_unit,
)
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.model.intermediates import activations, residual_ratios
from flax_resnetv2.model.modules import Convolution, Head, Latent, NormReLU, Stem
from tests.support.tiny import NET, SHAPE, images_of, textbook, variables_of

ALL_BIASES = ("stem", "layer1", "layer2", "layer3", "shortcut")
DOUBLE = Execution(dtype="float64")
# Less to compile: the bare unit, one that projects, and a plain one.
SMALL = replace(NET, units=(1, 2))


def zero_last(params):
    """The kernel and the bias of each unit's last layer set to zero."""

    def visit(path, leaf):
        names = [key.key for key in path]
        return leaf * (0 if "layer3" in names and "conv" in names else 1)

    return jax.tree.map_with_path(visit, params)


def paths(tree):
    return {"/".join(k.key for k in p): x for p, x in jax.tree.leaves_with_path(tree)}


def shapes_of(module, shape):
    """Shape of the output and of each parameter, without computing any."""
    out, variables = jax.eval_shape(
        lambda x: module.init_with_output(jax.random.key(0), x, train=False),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    params = paths(variables.get("params", {}))
    return jax.tree.map(lambda x: x.shape, out), {
        path: leaf.shape for path, leaf in params.items()
    }


# Each level alone (R1), in a few lines.


def test_a_unit_by_hand_takes_three_lines(key):  # R1
    unit = ResidualUnit(plan_unit(in_width=8, width=16, reduction=2, stride=2))
    y, _ = unit.init_with_output(key, jnp.ones([2, 8, 8, 8]), train=False)
    assert y.shape == (2, 4, 4, 16)


def test_every_level_works_alone():  # R1
    net, maps = plan(Architecture()), (2, 8, 8, 64)
    stack = ResidualStack(plan_stack(in_width=64, width=32, units=2, stride=2))
    assert shapes_of(stack, maps)[0] == (2, 4, 4, 32)
    layer = ResidualLayer(net.stacks[0].units[1].layers[0])
    assert shapes_of(layer, maps)[0] == (2, 8, 8, 32)
    assert shapes_of(Stem(net.stem), (2, 8, 8, 3))[0] == maps
    assert shapes_of(Head(net.head), (2, 4, 4, 256))[0] == (2, 10)
    assert shapes_of(ResNetV2(net), (2, 8, 8, 3))[0] == (2, 10)


@pytest.mark.parametrize("size", [(9, 9), (7, 5), (8, 8)])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("stride", [2, 3])
def test_both_branches_agree_on_every_size(size, padding, stride):  # R2, R15
    for layer, kernel in ((1, 1), (2, 3), (1, 5)):
        semantics = replace(
            ARTICLE, stride_layer=layer, shortcut_kernel=kernel, padding=padding
        )
        planned = plan_stack(
            in_width=4,
            width=8,
            units=2,
            stride=stride,
            bridge=True,
            semantics=semantics,
        )
        out, _ = shapes_of(ResidualStack(planned), (2, *size, 4))
        assert out == (2, -(-size[0] // stride), -(-size[1] // stride), 8)


def test_reduction_leaves_kernels_and_widths_of_the_units_alone():  # R11
    def facts(reduction):
        net = create_model(replace(NET, reduction=reduction))
        out, params = shapes_of(net, (2, 8, 8, 3))
        kernels = {p: s[:2] for p, s in params.items() if p.endswith("conv/kernel")}
        last = [s[-1] for p, s in params.items() if p.endswith("layer3/conv/kernel")]
        return out, kernels, last

    assert facts(1) == facts(2) == facts(8)
    _, wide = shapes_of(create_model(replace(NET, reduction=1)), (2, 8, 8, 3))
    assert wide["stack2/unit1/layer2/conv/kernel"] == (3, 3, 16, 16)


@textbook()
def test_a_layer_is_norm_then_relu_then_convolution(key):  # R4
    planned = plan_unit(in_width=4, width=8).layers[0]
    layer = ResidualLayer(planned)
    x = images_of(shape=(4, 4, 4))
    variables = variables_of(layer, x.shape)
    active = layer.apply(variables, x, train=False, method="preactivate")
    stats, params = variables["batch_stats"]["norm"], variables["params"]
    normed = (x - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    active = active.value
    np.testing.assert_allclose(active, np.maximum(normed, 0), rtol=1e-4, atol=1e-5)
    assert (normed < 0).any()
    y = layer.apply(variables, x, train=False)
    expected = active @ params["conv"]["kernel"][0, 0]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("semantics", [ARTICLE, HE2016])
def test_a_zeroed_residual_leaves_the_input_bit_for_bit(semantics, train):  # R5
    semantics = replace(semantics, biases=ALL_BIASES)
    unit = ResidualUnit(plan_unit(in_width=8, width=8, semantics=semantics))
    x = images_of(shape=(4, 4, 8))
    variables = variables_of(unit, x.shape)
    variables["params"] = zero_last(variables["params"])
    y, _ = unit.apply(variables, x, train=train, mutable=["batch_stats"])
    assert np.array_equal(y, x)
    assert (np.asarray(x) < 0).any()  # nothing after the sum cuts them off


@pytest.mark.parametrize("train", [False, True])
@textbook()
def test_a_zeroed_stack_gives_out_its_shortcut(train):  # R5
    semantics = replace(ARTICLE, biases=ALL_BIASES)
    planned = plan_stack(in_width=4, width=8, units=3, stride=2, semantics=semantics)
    stack, x = ResidualStack(planned), images_of(shape=(4, 4, 4))
    variables = variables_of(stack, x.shape)
    params = zero_last(variables["params"])
    variables = {**variables, "params": params}
    y, _ = stack.apply(variables, x, train=train, mutable=["batch_stats"])
    carried = {"params": params["unit1"]["shortcut"]}
    assert np.array_equal(y, Convolution(planned.units[0].shortcut).apply(carried, x))
    expected = x[:, ::2, ::2] @ params["unit1"]["shortcut"]["kernel"][0, 0]
    expected += params["unit1"]["shortcut"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


UNITS = [
    # What the semantics and the plan say; then (kernel, stride) of layers, shortcut.
    ({}, {"kernel": 5}, [(1, 2), (5, 1), (1, 1)], 1),
    ({"stride_layer": 2}, {}, [(1, 1), (3, 2), (1, 1)], 1),
    ({"stride_layer": 2, "padding": "symmetric"}, {}, [(1, 1), (3, 2), (1, 1)], 1),
    ({"shortcut_kernel": 3}, {"central_reduction": 4}, [(1, 2), (3, 1), (1, 1)], 3),
    ({"shortcut_input": "preactivated"}, {}, [(1, 2), (3, 1), (1, 1)], 1),
    ({"biases": ALL_BIASES}, {}, [(1, 2), (3, 1), (1, 1)], 1),
    ({}, {"behind_norm": True}, [(1, 2), (3, 1), (1, 1)], 1),
    ({"norm_epsilon": 0.5}, {}, [(1, 2), (3, 1), (1, 1)], 1),
    ({}, {"unit": "basic", "reduction": 1}, [(3, 2), (3, 1)], 1),
]


@pytest.mark.parametrize(("changes", "arguments", "layers", "size"), UNITS)
@textbook()
def test_each_kind_of_unit_is_the_textbook_sum(
    float64, changes, arguments, layers, size
):
    semantics = replace(ARTICLE, **changes)
    planned = plan_unit(in_width=4, width=8, stride=2, semantics=semantics, **arguments)
    unit, x = ResidualUnit(planned, DOUBLE), images_of(shape=(6, 6, 4), dtype="float64")
    variables = variables_of(unit, x.shape)
    params, stats = variables["params"], variables["batch_stats"]

    def conv(x, p, size, stride):
        assert p["kernel"].shape[0] == size
        around = [((size - 1) // 2,) * 2] * 2
        if semantics.padding == "same":
            around = "SAME"
        axes = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, p["kernel"], (stride, stride), around, dimension_numbers=axes
        )
        assert ("bias" in p) == bool(semantics.biases)
        return y + p.get("bias", 0.0)

    active = y = x
    for number, (kernel, stride) in enumerate(layers, start=1):
        p = params[f"layer{number}"]
        assert ("norm" in p) == (number > 1 or "behind_norm" not in arguments)
        if "norm" in p:
            s = stats[f"layer{number}"]["norm"]
            spread = jnp.sqrt(s["var"] + semantics.norm_epsilon)
            y = (y - s["mean"]) / spread * p["norm"]["scale"] + p["norm"]["bias"]
            y = jnp.maximum(y, 0)
        if number == 1:
            active = y
        y = conv(y, p["conv"], kernel, stride)
    shared = semantics.shortcut_input == "preactivated"
    y += conv(active if shared else x, params["shortcut"], size, 2)
    out = unit.apply(variables, x, train=False)
    np.testing.assert_allclose(out, y, rtol=1e-11, atol=1e-11)


def test_residual_ratios_are_what_each_unit_adds(key):  # R10
    model = create_model(NET)
    variables, images = variables_of(model), images_of(3)
    ratios = residual_ratios(model, variables, images)
    assert [len(stack) for stack in ratios.values()] == list(NET.units)
    maps = activations(model, variables, images)
    entering, leaving = maps["stack1/unit1"], maps["stack1/unit2"]
    norms = [np.linalg.norm(np.asarray(m).reshape(3, -1), axis=1) for m in
             (leaving - entering, entering)]  # fmt: skip
    assert ratios["stack1"][1] == pytest.approx((norms[0] / norms[1]).mean(), rel=1e-4)


@pytest.mark.parametrize("width", [8, 16])
def test_zero_init_last_starts_a_unit_as_its_shortcut(key, width):  # R10
    semantics = replace(ARTICLE, zero_init_last=True)
    planned = plan_unit(
        in_width=8, width=width, reduction=width // 8, semantics=semantics
    )
    unit, x = ResidualUnit(planned), images_of(shape=(4, 4, 8))
    variables = unit.init(key, x, train=False)
    y, state = unit.apply(variables, x, train=False, mutable=["intermediates"])
    if width == 16:
        x = Convolution(planned.shortcut).apply(
            {"params": variables["params"]["shortcut"]}, x
        )
    assert np.array_equal(y, x)
    assert not state["intermediates"]["residual_ratio"][0].any()


@pytest.mark.parametrize(
    ("changes", "shape", "tree"),
    [
        ({}, (16, 16, 8), {"conv", "norm"}),
        (
            {"stem_kernel": 7, "stem_stride": 2, "stem_pool": True},
            (4, 4, 8),
            {"conv", "norm"},
        ),
        ({"stem_second_stride": 2}, (8, 8, 8), {"conv", "norm", "conv2", "norm2"}),
        ({"semantics": HE2016}, (16, 16, 8), {"conv"}),
        (
            {"semantics": HE2016, "stem_second_stride": 2},
            (8, 8, 8),
            {"conv", "norm", "conv2"},
        ),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_stems(changes, shape, tree, channels):  # R16
    stem = Stem(plan(replace(NET, **changes)).stem)
    out, params = shapes_of(stem, (2, 16, 16, channels))
    assert out == (2, *shape)
    assert {path.split("/")[0] for path in params} == tree
    size = changes.get("stem_kernel", 3)
    assert params["conv/kernel"] == (size, size, channels, 8)


def test_without_a_stem_the_image_enters_stack_1():
    model = create_model(replace(NET, stem=False), image_shape=(8, 8, 3))
    _, params = shapes_of(model, (2, 8, 8, 3))
    assert not any(path.startswith("stem") for path in params)
    assert params["stack1/unit1/shortcut/kernel"] == (1, 1, 3, 8)


def test_pool_padding_of_zero_shows_where_all_is_negative():
    x = -1 - jnp.abs(images_of(shape=(4, 4, 3)))
    corner = {}
    for padding in ("lowest", "zero"):
        semantics = replace(HE2016, pool_padding=padding)
        net = replace(NET, stem_kernel=1, stem_pool=True, semantics=semantics)
        stem = Stem(plan(net).stem)
        ones = {"params": {"conv": {"kernel": jnp.ones([1, 1, 3, 8])}}}
        maps = stem.apply(ones, x, train=False)
        corner[padding] = maps[0, 0, 0, 0]
        if padding == "lowest":
            wide = jnp.broadcast_to(x.sum(-1, keepdims=True), (2, 4, 4, 8))
            pooled = nn.max_pool(wide, (3, 3), (2, 2), ((1, 1), (1, 1)))
            np.testing.assert_allclose(maps, pooled, rtol=1e-6)
    assert corner["zero"] == 0
    assert corner["lowest"] < -1


HEADS = [
    ({}, (2, 4), {"norm", "classifier"}),
    ({"hidden": (6, 5)}, (2, 4), {"norm", "hidden1", "hidden2", "classifier"}),
    ({"head": "latent", "latent": 7}, (2, 7), {"norm", "latent"}),
    ({"head": "none"}, (2, 4, 4, 16), {"norm"}),
]


@pytest.mark.parametrize(("changes", "shape", "tree"), HEADS)
def test_heads(changes, shape, tree):  # R18
    out, params = shapes_of(create_model(replace(NET, **changes)), (2, 8, 8, 3))
    assert out == shape
    heads = {path.split("/")[1] for path in params if path.startswith("head/")}
    assert heads == tree


@pytest.mark.parametrize("head_input", ["pooled", "flattened"])
@textbook()
def test_a_head_is_norm_relu_average_and_dense_layers(float64, head_input):  # R18
    head = Head(plan(replace(NET, hidden=(6,), head_input=head_input)).head, DOUBLE)
    x = images_of(shape=(3, 3, 16), dtype="float64")
    variables = variables_of(head, x.shape)
    p, s = variables["params"], variables["batch_stats"]["norm"]
    y = (x - s["mean"]) / jnp.sqrt(s["var"] + 1e-5) * p["norm"]["scale"]
    y = jnp.maximum(y + p["norm"]["bias"], 0)
    y = y.mean((1, 2)) if head_input == "pooled" else y.reshape(2, 3 * 3 * 16)
    hidden = y @ p["hidden1"]["kernel"] + p["hidden1"]["bias"]
    assert (hidden < 0).any()
    y = jnp.maximum(hidden, 0) @ p["classifier"]["kernel"] + p["classifier"]["bias"]
    out = head.apply(variables, x, train=False)
    np.testing.assert_allclose(out, y, rtol=1e-11, atol=1e-11)


@textbook()
def test_the_head_averages_in_float32_behind_bfloat16_maps():
    semantics = replace(ARTICLE, final_norm=False)
    head = Head(plan(replace(NET, semantics=semantics)).head, Execution("bfloat16"))
    x = images_of(shape=(3, 3, 16), dtype="bfloat16")
    variables = variables_of(head, x.shape)
    p = variables["params"]["classifier"]
    expected = x.astype("float32").mean((1, 2)) @ p["kernel"] + p["bias"]
    out = head.apply(variables, x, train=False)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_latents_pooled_or_flattened_with_a_log_variance():  # R18
    net = replace(NET, head="latent", latent=7, latent_variance=True)
    for head_input, fan_in in (("pooled", 16), ("flattened", 4 * 4 * 16)):
        model = create_model(replace(net, head_input=head_input))
        out, params = shapes_of(model, (2, 8, 8, 3))
        assert isinstance(out, Latent)
        assert out == ((2, 7), (2, 7))
        for name in ("latent", "log_variance"):
            assert params[f"head/{name}/kernel"] == (fan_in, 7)


def test_the_last_norm_can_be_left_out():  # R19
    semantics = replace(ARTICLE, final_norm=False)
    model = create_model(replace(SMALL, head="none", semantics=semantics))
    variables = variables_of(model)
    maps = activations(model, variables, images_of())
    assert "head" not in variables["params"]
    assert np.array_equal(maps["head"], maps["stack2"])
    assert (np.asarray(maps["head"]) < 0).any()


def test_the_bridge_adds_the_stacks_input_and_costs_nothing_when_off(key):  # R20
    def shapes(bridge):
        init = create_model(replace(NET, bridge=bridge)).init
        variables = jax.eval_shape(
            lambda x: init(key, x, train=False), jnp.ones([2, 8, 8, 3])
        )
        return {k: v.shape for k, v in paths(variables["params"]).items()}

    off, on = shapes(False), shapes(True)
    assert on == off | {"stack2/bridge/kernel": (1, 1, 8, 16)}
    for stack, stride in ((1, 1), (2, 2)):
        model = create_model(replace(NET, bridge=True))
        planned = model.plan.stacks[stack - 1]
        x = images_of(shape=(8, 8, 8))
        variables = variables_of(ResidualStack(planned), x.shape)
        bridged = ResidualStack(planned).apply(variables, x, train=False)
        params = dict(variables["params"])
        bridge = params.pop("bridge", None)
        plain = ResidualStack(replace(planned, bridge=None)).apply(
            {**variables, "params": params}, x, train=False
        )
        around = x if bridge is None else x[:, ::stride, ::stride] @ bridge["kernel"][0]
        around = around.reshape(plain.shape)
        np.testing.assert_allclose(bridged, plain + around, rtol=1e-5, atol=1e-5)


# The whole net against one written with linen's own layers.


class PlainNet(nn.Module):
    """SMALL and its HE2016 twin as a textbook would write them."""

    shared: bool

    @nn.compact
    def __call__(self, x, *, train):
        def norm(x, name):
            x = nn.BatchNorm(
                not train,
                momentum=0.9,
                epsilon=1e-5,
                use_fast_variance=False,
                dtype=jnp.float64,
                param_dtype=jnp.float64,
                name=name,
            )(x)
            return nn.relu(x)

        def conv(x, features, size, stride, name):
            return nn.Conv(
                features,
                (size, size),
                (stride, stride),
                use_bias=False,
                param_dtype=jnp.float64,
                name=name,
            )(x)

        x = conv(x, 8, 3, 1, "stem/conv")
        if not self.shared:
            x = norm(x, "stem/norm")
        for stack, number, width in ((1, 1, 8), (2, 1, 16), (2, 2, 16)):
            at = f"stack{stack}/unit{number}"
            stride = 2 if (stack, number) == (2, 1) else 1
            y = x
            if self.shared or at != "stack1/unit1":
                y = norm(y, f"{at}/layer1/norm")
            if stride == 2:
                x = conv(y if self.shared else x, width, 1, 2, f"{at}/shortcut")
            y = conv(y, width // 2, 1, stride, f"{at}/layer1/conv")
            y = norm(y, f"{at}/layer2/norm")
            y = conv(y, width // 2, 3, 1, f"{at}/layer2/conv")
            y = norm(y, f"{at}/layer3/norm")
            x = x + conv(y, width, 1, 1, f"{at}/layer3/conv")
        x = norm(x, "head/norm").mean((1, 2))
        return nn.Dense(4, param_dtype=jnp.float64, name="head/classifier")(x)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("semantics", [ARTICLE, HE2016])
def test_the_net_equals_a_textbook_net_in_values_and_gradients(
    float64, semantics, train
):
    model = create_model(replace(SMALL, semantics=semantics), DOUBLE)
    images = images_of(4, dtype="float64")
    variables = variables_of(model)
    flat = {
        collection: {
            key: {path.rsplit("/", 1)[1]: leaf for path, leaf in group}
            for key, group in _grouped(paths(tree))
        }
        for collection, tree in variables.items()
    }
    plain = PlainNet(shared=semantics == HE2016)
    weight = images_of(4, shape=(4,), dtype="float64", seed=9)

    def run(model, variables):
        def loss(params):
            logits, state = model.apply(
                {**variables, "params": params},
                images,
                train=train,
                mutable=["batch_stats"],
            )
            return (logits * weight).sum(), (logits, state["batch_stats"])

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    gradient, (logits, stats) = run(model, variables)
    # linen's own batch normalization mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        plain_gradient, (plain_logits, plain_stats) = run(plain, flat)
    np.testing.assert_allclose(logits, plain_logits, rtol=1e-9, atol=1e-9)
    for ours, theirs in ((gradient, plain_gradient), (stats, plain_stats)):
        ours = paths(ours)
        theirs = paths(theirs)
        assert ours.keys() == theirs.keys()
        for path, leaf in ours.items():
            np.testing.assert_allclose(
                leaf, theirs[path], rtol=1e-9, atol=1e-9, err_msg=path
            )


def _grouped(flat):
    groups = {}
    for path, leaf in flat.items():
        groups.setdefault(path.rsplit("/", 1)[0], []).append((path, leaf))
    return groups.items()


def test_article_and_he2016_are_different_nets():
    images = images_of()
    shared, raw = (
        create_model(
            replace(NET, semantics=replace(HE2016, shortcut_input=shortcut_input))
        )
        for shortcut_input in ("preactivated", "raw")
    )
    variables = variables_of(shared)
    a, b = (m.apply(variables, images, train=False) for m in (shared, raw))
    assert not np.allclose(a, b, atol=1e-3)


# Stochastic depth


def test_a_unit_that_an_image_drops_is_its_shortcut(float64):
    net = replace(SMALL, units=(1, 3), bridge=True)
    model = create_model(net, replace(DOUBLE, remat="units"))
    images = images_of(4, dtype="float64")
    variables = variables_of(model, images.shape)

    @partial(jax.jit, static_argnums=2)
    def run(variables, keep, mutable=("batch_stats",)):
        return model.apply(
            variables,
            images,
            train=True,
            residual_scale=keep,
            mutable=list(mutable),
        )[0]

    def with_last_kernel(unit, factor):
        tree = jax.tree.map(lambda x: x, variables)
        tree["params"]["stack2"][unit]["layer3"]["conv"]["kernel"] *= factor
        return tree

    ones = jnp.ones((4, 4))
    same = partial(np.testing.assert_allclose, rtol=1e-12)
    same(run(variables, ones), run(variables, None))
    # As if the unit's last convolution were 0, or twice what it is; a bridge stays.
    silent, louder = with_last_kernel("unit2", 0), with_last_kernel("unit3", 2)
    same(run(variables, ones.at[:, 2].set(0)), run(silent, ones))
    same(run(variables, ones.at[:, 3].set(2)), run(louder, ones))
    # Of one image alone; and where modules run one by one.
    alone = ones.at[1, 3].set(0)
    one_by_one = run(variables, alone, ("batch_stats", "intermediates"))
    same(one_by_one, run(variables, alone))
    assert not np.allclose(one_by_one[1], run(variables, ones)[1])


def test_units_of_equal_plans_are_still_traced_once():
    model = create_model(replace(NET, units=(1, 6)))
    variables = variables_of(model)

    def convolutions(keep):
        def run(images):
            return model.apply(
                variables,
                images,
                train=True,
                residual_scale=keep,
                mutable=["batch_stats"],
            )

        # A function that several share is printed once.
        return str(jax.make_jaxpr(run)(images_of())).count("conv_general_dilated")

    assert convolutions(jnp.ones((2, 7))) == convolutions(None)


# How it is run changes nothing.


def test_remat_and_derivatives_change_nothing(float64):
    images, trees = images_of(4, dtype="float64"), []

    def run(remat, backward="custom", seen=False):
        how = replace(DOUBLE, remat=remat, backward=backward)
        model = create_model(SMALL, how)
        trees.append(shapes_of(model, images.shape))
        variables = variables_of(model)

        def loss(params):
            out, state = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                # With intermediates, modules run one by one; without, as in training.
                mutable=["batch_stats", *(["intermediates"] if seen else [])],
            )
            return jnp.square(out).sum(), state["batch_stats"]

        text = str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables["params"]))
        value = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
        return value, "checkpoint" in text or "remat" in text

    (plain, without), (again, within) = run("nothing"), run("units")
    (default, _), (automatic, _) = run("norms"), run("nothing", "automatic")
    one_by_one, _ = run("norms", seen=True)
    assert (without, within) == (False, True)
    assert trees[0] == trees[1] == trees[2]
    for other in (again, default, automatic, one_by_one):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            plain,
            other,
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_logits_are_float32(dtype):
    model = create_model(SMALL, Execution(dtype=dtype))
    variables = variables_of(model)
    maps = activations(model, variables, images_of())
    logits = maps.pop("head")
    kinds = {leaf.dtype for leaf in jax.tree.leaves((variables, logits))}
    assert kinds == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in maps.values()} == {jnp.dtype(dtype)}


def test_float64_is_float64_everywhere(float64):
    model = create_model(SMALL, DOUBLE)
    variables, images = variables_of(model), images_of(dtype="float64")
    maps = activations(model, variables, images)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((variables, maps))}
    assert kinds == {jnp.dtype("float64")}


def test_bfloat16_is_close_to_float32():
    variables = variables_of(create_model(NET))
    wide, narrow = (
        create_model(NET, Execution(dtype=d)).apply(variables, images_of(), train=False)
        for d in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(wide, narrow, atol=0.05 * float(jnp.abs(wide).max()))


def test_the_net_is_a_pure_function():  # R27
    model = create_model(SMALL)
    variables, images = variables_of(model), images_of(3)
    kept = jax.tree.map(np.array, variables)

    def net(x):
        return model.apply(variables, x, train=False)

    once, twice = net(images), net(images)
    assert np.array_equal(once, twice)
    np.testing.assert_allclose(jax.jit(net)(images), once, rtol=1e-4, atol=1e-5)
    each = jax.vmap(lambda x: net(x[None])[0])(images)
    np.testing.assert_allclose(each, once, rtol=1e-4, atol=1e-5)
    assert jax.eval_shape(net, images).shape == once.shape
    assert jax.grad(lambda x: net(x).sum())(images).shape == images.shape
    model.apply(variables, images, train=True, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, kept, variables)


def test_the_mode_must_be_said():
    model = create_model(NET)
    with pytest.raises(TypeError, match="train"):
        model.apply(variables_of(model), images_of())


def test_running_statistics_keep_their_share():
    layer = ResidualLayer(plan_unit(in_width=8, width=8).layers[0])
    x = images_of(4, shape=(4, 4, 8)) * 2 + 1
    variables = variables_of(layer, x.shape)
    _, state = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    for name, batch in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        old = variables["batch_stats"]["norm"][name]
        new = state["batch_stats"]["norm"][name]
        np.testing.assert_allclose(new, 0.9 * old + 0.1 * batch, rtol=1e-4, atol=1e-5)


def test_an_initialization_leaves_the_statistics_at_their_start():
    # Also where the mapped axis of training is not there.
    planned = plan_unit(in_width=8, width=8)
    unit = ResidualUnit(planned, Execution(batch_norm_axis="devices"))
    x = images_of(shape=(4, 4, 8)) * 3 + 1
    variables = unit.init(jax.random.key(0), x, train=True)
    for path, leaf in paths(variables["batch_stats"]).items():
        assert (leaf == (0 if path.endswith("mean") else 1)).all(), path


def test_statistics_over_devices_are_those_of_the_whole_batch(float64):
    plain = plan_unit(in_width=8, width=8).layers[0].norm
    x = images_of(8, shape=(3, 3, 8), dtype="float64")
    x *= jnp.arange(1.0, 9.0)[:, None, None, None]
    variables = variables_of(NormReLU(plain, DOUBLE), x.shape)

    def run(x, axis):
        norm = NormReLU(plain, replace(DOUBLE, batch_norm_axis=axis))
        return norm.apply(variables, x, train=True, mutable=["batch_stats"])

    y, state = run(x, None)
    ys, states = jax.pmap(
        lambda x: run(x, "d"), axis_name="d", devices=jax.devices()[:2]
    )(x.reshape(2, 4, 3, 3, 8))
    np.testing.assert_allclose(ys.reshape(y.shape), y, rtol=1e-9, atol=1e-9)
    for path, leaf in paths(state).items():
        for own in paths(states)[path]:
            np.testing.assert_allclose(own, leaf, rtol=1e-9, err_msg=path)


@pytest.mark.parametrize(
    ("init", "variance", "bound"),
    [
        ("he_normal", lambda fan_in, fan_out: 2 / fan_in, 2.3),
        ("he_normal_fan_out", lambda fan_in, fan_out: 2 / fan_out, None),
        ("uniform_fan_in", lambda fan_in, fan_out: 1 / (3 * fan_in), 3**0.5),
    ],
)
def test_kernels_start_with_the_spread_of_their_initializer(key, init, variance, bound):
    semantics = replace(ARTICLE, kernel_init=init)
    conv = plan_unit(in_width=32, width=256, semantics=semantics).layers[1].conv
    x = jnp.zeros([1, 1, 1, 128])
    kernel = np.asarray(
        Convolution(replace(conv, width=64)).init(key, x)["params"]["kernel"]
    )
    expected = variance(9 * 128, 9 * 64) ** 0.5
    assert kernel.std() == pytest.approx(expected, rel=0.02)
    assert abs(kernel.mean()) < 0.02 * expected
    # A truncated normal and a uniform distribution end; a normal one goes on.
    reach = abs(kernel).max() / expected
    assert reach > 3.5 if bound is None else reach < bound


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("version", [ARTICLE, HE2016])
def test_one_draw_is_an_initialization_like_any_other(version, traced):
    semantics = replace(version, zero_init_last=True)
    architecture = Architecture(
        units=(2, 1), widths=(64, 96), strides=(1, 2), hidden=(50,), semantics=semantics
    )
    model = create_model(architecture)
    initialize = partial(init_in_one_draw, model, image_shape=(32, 32, 3))
    drawn = paths((jax.jit(initialize) if traced else initialize)(jax.random.key(3)))
    usual = jax.jit(partial(model.init, train=False))(
        jax.random.key(7), jnp.zeros([1, 32, 32, 3])
    )
    usual = paths(usual)
    assert drawn.keys() == usual.keys()
    firsts = set()
    for path, leaf in usual.items():
        new = drawn[path]
        assert (new.shape, new.dtype) == (leaf.shape, leaf.dtype), path
        assert isinstance(new, jax.Array), path
        if not path.endswith("kernel") or not leaf.any():
            np.testing.assert_array_equal(new, leaf, err_msg=path)
            continue
        firsts.add(float(new.ravel()[0] / new.std()))
        error = 4 / leaf.size**0.5
        assert new.std() == pytest.approx(float(leaf.std()), rel=error), path
        assert abs(new.mean()) < error * leaf.std(), path
        reach, usual_reach = (float(abs(x).max() / x.std()) for x in (new, leaf))
        assert reach == pytest.approx(usual_reach, rel=0.3), path
    kernels = [path for path in usual if path.endswith("kernel") and usual[path].any()]
    assert len(firsts) == len(kernels)


def test_one_draw_depends_on_its_key_alone():
    model = create_model(SMALL)
    one, again, other = (
        paths(init_in_one_draw(model, jax.random.key(k), SHAPE)) for k in (0, 0, 1)
    )
    for path in one:
        np.testing.assert_array_equal(one[path], again[path], err_msg=path)
    assert any((one[path] != other[path]).any() for path in one)


@cache
def largest_gradients(architecture):
    """Each parameter's largest gradient, at two units a stack at most."""
    model = create_model(architecture)
    images = images_of(2, shape=(32, 32, 3))
    variables = variables_of(model, images.shape)

    @jax.jit
    def gradients(params):
        def loss(params):
            # Running statistics: with the batch's, some gradients are zero by rule.
            out = model.apply({**variables, "params": params}, images, train=False)
            return -jax.nn.log_softmax(out)[:, 0].sum()

        return jax.tree.map(lambda g: jnp.abs(g).max(), jax.grad(loss)(params))

    return paths(gradients(variables["params"]))


SMALLEST = {
    name.split("-")[0]: name
    for name in sorted(PRESETS, key=lambda n: -PRESETS[n].architecture.depth)
}
"""The preset of each family that has the fewest layers."""


@pytest.mark.parametrize("name", SMALLEST.values())
def test_every_parameter_of_each_family_gets_a_gradient(name):
    cut = PRESETS[name].architecture
    cut = replace(cut, units=tuple(min(n, 2) for n in cut.units))
    if cut.num_classes == 1000:
        cut = replace(
            cut,
            widths=(32, 64, 128, 256),
            stem_width=8,
            num_classes=10,
            semantics=replace(cut.semantics, norm_groups=4),
        )
    for path, largest in largest_gradients(cut).items():
        assert largest > 1e-6, path


@pytest.mark.parametrize("side", [3, 4])
def test_averages_stay_in_the_precision_of_the_maps(side):
    semantics = replace(ARTICLE, shortcut_pool="average")
    planned = plan_unit(in_width=4, width=8, stride=2, semantics=semantics)
    unit = ResidualUnit(planned, Execution(dtype="bfloat16"))
    maps = jax.ShapeDtypeStruct((2, side, side, 4), "bfloat16")
    init = partial(unit.init_with_output, train=False)
    out, _ = jax.eval_shape(init, jax.random.key(0), maps)
    assert (out.shape, out.dtype) == ((2, 2, 2, 8), jnp.bfloat16)


def test_double_precision_is_refused_where_jax_has_none():
    with pytest.raises(UsageError, match="JAX_ENABLE_X64=1, or choose float32"):
        create_model(NET, Execution(dtype="float64"))


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UsageError, match=r"execution.dtype='int8' .*'bfloat16'"):
        create_model(NET, Execution(dtype="int8"))


def test_automatic_derivatives_go_forward_and_twice(float64):
    model = create_model(SMALL, replace(DOUBLE, backward="automatic"))
    variables, images = variables_of(model), images_of(4, dtype="float64")

    def loss(params):
        out, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return jnp.square(out).sum()

    params = variables["params"]
    along = jax.tree.map(jnp.ones_like, params)
    _, forward = jax.jvp(loss, (params,), (along,))
    backward = sum(g.sum() for g in jax.tree.leaves(jax.grad(loss)(params)))
    np.testing.assert_allclose(forward, backward, rtol=1e-9)
    _, curvature = jax.jvp(jax.grad(loss), (params,), (along,))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(curvature))
