"""Every published version against itself, written down once more without the package.

``reference`` is a forward pass from the papers' and the peers' sentences: plain
``lax`` in float64, on the same variables.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resnetv2 import Architecture, Execution, UsageError, create_model, plan
from flax_resnetv2.model.semantics import ARTICLE, ATIENZA, BIT, HE2016, KERAS, TIMM
from tests.support.tiny import textbook, variables_of

UNITS, WIDTHS = (2, 2), (16, 32)


def conv(x, p, stride=1, padding="SAME", standardize=None):
    kernel = p["kernel"]
    if standardize is not None:
        flat = kernel.reshape(-1, kernel.shape[-1])
        flat = (flat - flat.mean(0)) / jnp.sqrt(flat.var(0) + standardize)
        kernel = flat.reshape(kernel.shape)
    y = lax.conv_general_dilated(
        x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p.get("bias", 0)


def batch_norm(x, p, stats, epsilon):
    normed = (x - stats["mean"]) / jnp.sqrt(stats["var"] + epsilon)
    return normed * p["scale"] + p["bias"]


def group_norm(x, p, groups, epsilon):
    parts = []
    for part in jnp.split(x, groups, axis=-1):
        mean = part.mean((1, 2, 3), keepdims=True)
        var = jnp.square(part - mean).mean((1, 2, 3), keepdims=True)
        parts.append((part - mean) / jnp.sqrt(var + epsilon))
    return jnp.concatenate(parts, -1) * p["scale"] + p["bias"]


def pad(x, by=1):
    return jnp.pad(x, ((0, 0), (by, by), (by, by), (0, 0)))


class Net:
    """Names of the variables, and the norm that a version has."""

    def __init__(self, variables, norm):
        self.params, self.norm = variables["params"], norm
        self.stats = variables.get("batch_stats", {})

    def at(self, path, tree=None):
        tree = self.params if tree is None else tree
        for key in path.split("/"):
            tree = tree[key]
        return tree

    def act(self, x, path, relu=True):
        y = self.norm(self, x, path)
        return jnp.maximum(y, 0) if relu else y

    def pooled(self, x):
        return x.mean((1, 2)) @ self.at("head/classifier/kernel") + self.at(
            "head/classifier/bias"
        )


def by_batch(epsilon):
    def norm(net, x, path):
        return batch_norm(x, net.at(path), net.at(path, net.stats), epsilon)

    return norm


def by_group(groups, epsilon):
    return lambda net, x, path: group_norm(x, net.at(path), groups, epsilon)


def max_pool(x, fill):
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=fill)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


def averaged(x):
    """Of each 2x2 square; a square at an odd edge has fewer pixels."""
    n, h, w, c = x.shape
    fill = ((0, 0), (0, h % 2), (0, w % 2), (0, 0))

    def sums(x):
        squares = jnp.pad(x, fill).reshape(n, (h + 1) // 2, 2, (w + 1) // 2, 2, c)
        return squares.sum((2, 4))

    return sums(x) / sums(jnp.ones_like(x))


def atienza(variables, x):
    """resnet_v2 of the book: stem conv-BN-ReLU, the first layer bare, biases."""
    net = Net(variables, by_batch(1e-3))
    x = net.act(conv(x, net.at("stem/conv")), "stem/norm")
    for s in (1, 2):
        for u in (1, 2):
            at = f"stack{s}/unit{u}"
            stride = 2 if (s, u) == (2, 1) else 1
            y = x if (s, u) == (1, 1) else net.act(x, f"{at}/layer1/norm")
            y = conv(y, net.at(f"{at}/layer1/conv"), stride)
            y = conv(net.act(y, f"{at}/layer2/norm"), net.at(f"{at}/layer2/conv"))
            y = conv(net.act(y, f"{at}/layer3/norm"), net.at(f"{at}/layer3/conv"))
            if u == 1:
                x = conv(x, net.at(f"{at}/shortcut"), stride)
            x = x + y
    return net.pooled(net.act(x, "head/norm"))


def keras(variables, x):
    """block2 and stack2 of keras.applications: the stride in a stack's last block."""
    net = Net(variables, by_batch(1.001e-5))
    x = conv(pad(x, 3), net.at("stem/conv"), 2, "VALID")
    x = max_pool(x, 0.0)
    for s in (1, 2):
        for u in (1, 2):
            at = f"stack{s}/unit{u}"
            stride = 2 if (s, u) == (2, 2) else 1
            pre = net.act(x, f"{at}/layer1/norm")
            if u == 1:
                carried = conv(pre, net.at(f"{at}/shortcut"))
            else:
                carried = x[:, ::stride, ::stride]
            y = conv(pre, net.at(f"{at}/layer1/conv"))
            y = pad(net.act(y, f"{at}/layer2/norm"))
            y = conv(y, net.at(f"{at}/layer2/conv"), stride, "VALID")
            y = conv(net.act(y, f"{at}/layer3/norm"), net.at(f"{at}/layer3/conv"))
            x = carried + y
    return net.pooled(net.act(x, "head/norm"))


def timm(variables, x, norm=None, fill=-jnp.inf, standardize=None, average=False):
    """PreActBottleneck of timm, and Big Transfer's with its norm and its kernels."""
    net = Net(variables, norm or by_batch(1e-5))

    def convolve(x, path, stride=1):
        size = net.at(path)["kernel"].shape[0]
        x = pad(x, size // 2)
        return conv(x, net.at(path), stride, "VALID", standardize)

    if average:  # the "d" nets: a deep stem
        x = net.act(convolve(x, "stem/conv", 2), "stem/norm")
        x = net.act(convolve(x, "stem/conv2"), "stem/norm2")
        x = convolve(x, "stem/conv3")
    else:
        x = convolve(x, "stem/conv", 2)
    x = max_pool(x, fill)
    for s in (1, 2):
        for u in (1, 2):
            at = f"stack{s}/unit{u}"
            stride = 2 if (s, u) == (2, 1) else 1
            pre = net.act(x, f"{at}/layer1/norm")
            if u == 1 and average and stride == 2:
                carried = convolve(averaged(pre), f"{at}/shortcut")
            elif u == 1:
                carried = convolve(pre, f"{at}/shortcut", stride)
            else:
                carried = x
            y = net.act(convolve(pre, f"{at}/layer1/conv"), f"{at}/layer2/norm")
            y = net.act(convolve(y, f"{at}/layer2/conv", stride), f"{at}/layer3/norm")
            x = carried + convolve(y, f"{at}/layer3/conv")
    return net.pooled(net.act(x, "head/norm"))


def bit(variables, x):
    return timm(variables, x, by_group(4, 1e-5), fill=0.0, standardize=1e-10)


def timm_d(variables, x):
    return timm(variables, x, average=True)


def post(variables, x):
    """Version 1, He et al. 2015: convolution, norm, ReLU; a ReLU after the sum."""
    net = Net(variables, by_batch(1e-5))
    x = net.act(conv(x, net.at("stem/conv")), "stem/norm")
    for s in (1, 2):
        for u in (1, 2):
            at = f"stack{s}/unit{u}"
            stride = 2 if (s, u) == (2, 1) else 1
            y = conv(x, net.at(f"{at}/layer1/conv"), stride)
            y = net.act(y, f"{at}/layer1/norm")
            y = net.act(conv(y, net.at(f"{at}/layer2/conv")), f"{at}/layer2/norm")
            y = conv(y, net.at(f"{at}/layer3/conv"))
            y = net.act(y, f"{at}/layer3/norm", relu=False)
            if (s, u) == (2, 1):
                x = conv(x, net.at(f"{at}/shortcut"), stride)
                x = net.act(x, f"{at}/shortcut_norm", relu=False)
            x = jnp.maximum(x + y, 0)
    return net.pooled(x)


def basic(variables, x):
    """He's pre-activation basic units: 3x3 padded by 1 as in Torch, shared BN-ReLU."""
    net = Net(variables, by_batch(1e-5))

    def convolve(x, path, stride=1):
        x = pad(x, net.at(path)["kernel"].shape[0] // 2)
        return conv(x, net.at(path), stride, "VALID")

    x = convolve(x, "stem/conv")
    for s in (1, 2):
        for u in (1, 2):
            at = f"stack{s}/unit{u}"
            special = (s, u) == (2, 1)
            pre = net.act(x, f"{at}/layer1/norm")
            carried = convolve(pre, f"{at}/shortcut", 2) if special else x
            y = convolve(pre, f"{at}/layer1/conv", 2 if special else 1)
            x = carried + convolve(net.act(y, f"{at}/layer2/norm"), f"{at}/layer2/conv")
    return net.pooled(net.act(x, "head/norm"))


SMALL = {"units": UNITS, "widths": WIDTHS, "strides": (1, 2), "reduction": 2}
LARGE = {**SMALL, "stem_kernel": 7, "stem_stride": 2, "stem_pool": True}
DEEP = {**LARGE, "stem_kernel": 3, "stem_deep": True}
POST = replace(ARTICLE, order="post", final_norm=False)
CASES = {
    "atienza": (atienza, Architecture(**SMALL, stem_width=8, semantics=ATIENZA)),
    "keras": (keras, Architecture(**LARGE, stem_width=8, semantics=KERAS)),
    "timm": (timm, Architecture(**LARGE, stem_width=8, semantics=TIMM)),
    "timm-d": (
        timm_d,
        Architecture(
            **DEEP, stem_width=8, semantics=replace(TIMM, shortcut_pool="average")
        ),
    ),
    "bit": (
        bit,
        Architecture(**LARGE, stem_width=8, semantics=replace(BIT, norm_groups=4)),
    ),
    "basic": (
        basic,
        Architecture(
            units=UNITS,
            widths=WIDTHS,
            strides=(1, 2),
            reduction=1,
            unit="basic",
            stem_width=16,
            semantics=HE2016,
        ),
    ),
    "post": (post, Architecture(**SMALL, stem_width=16, semantics=POST)),
}


@pytest.mark.parametrize("side", [32, 27])
@pytest.mark.parametrize("name", CASES)
@textbook()
def test_a_version_is_what_its_source_says(name, side, float64):
    reference, architecture = CASES[name]
    model = create_model(architecture, Execution(dtype="float64"))
    variables = variables_of(model, (2, side, side, 3))
    images = np.random.default_rng(1).normal(size=(2, side, side, 3))
    expected = reference(variables, images)
    found = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, images)
    error = np.abs(found - expected).max() / expected.std()
    assert error < 1e-9


def stretched(variables, path, by=1.001):
    """The variables with one array changed a little."""
    return jax.tree.map_with_path(
        lambda at, x: x * by if "/".join(k.key for k in at) == path else x, variables
    )


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("keras", "batch_stats/stack2/unit2/layer3/norm/var"),
        ("atienza", "params/stack1/unit1/shortcut/bias"),
        ("bit", "params/stack2/unit1/layer2/norm/scale"),
        ("post", "batch_stats/stack2/unit1/shortcut_norm/mean"),
    ],
)
@textbook()
def test_the_test_sees_a_thousandth_in_one_array(name, path, float64):
    reference, architecture = CASES[name]
    model = create_model(architecture, Execution(dtype="float64"))
    variables = variables_of(model, (2, 32, 32, 3))
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
    expected = reference(stretched(variables, path), images)
    found = model.apply(variables, images, train=False)
    assert np.abs(found - expected).max() / expected.std() > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_a_version_trains_as_jax_differentiates_it(name, float64):
    """The fast path's gradients against automatic ones, and running statistics."""
    _, architecture = CASES[name]
    images = np.random.default_rng(1).normal(size=(4, 27, 27, 3))

    def gradients(backward):
        how = Execution(dtype="float64", backward=backward)
        model = create_model(architecture, how)
        variables = variables_of(model, images.shape)
        stats = variables.get("batch_stats", {})

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            given = {"params": params, "batch_stats": stats}
            out, _ = model.apply(given, images, train=True, mutable=["batch_stats"])
            return jnp.square(out - 1).sum()

        return loss(variables["params"])

    (one, fast), (other, plain) = gradients("custom"), gradients("automatic")
    np.testing.assert_allclose(one, other, rtol=1e-10)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11 * largest),
        fast,
        plain,
    )


def test_the_last_unit_has_the_stride_and_selects_pixels():
    net = plan(CASES["keras"][1])
    first, last = net.stacks[1].units
    assert [layer.conv.stride for layer in first.layers] == [1, 1, 1]
    assert [layer.conv.stride for layer in last.layers] == [1, 2, 1]
    assert (first.shortcut.stride, first.select) == (1, 1)
    assert (last.shortcut, last.select) == (None, 2)


@pytest.mark.parametrize(
    ("semantics", "message"),
    [
        (replace(ARTICLE, order="post"), r"final_norm=True needs order='pre'"),
        (
            replace(HE2016, order="post", final_norm=False),
            r"shortcut_input='preactivated' needs order='pre'.*choose .*'raw'",
        ),
        (replace(BIT, norm_groups=3), r"norm_groups=3 does not divide the .* maps of"),
        (
            replace(BIT, standardize_epsilon=0.0),
            r"standardize_epsilon=0.0 must .* from 1e-12",
        ),
        (replace(ARTICLE, strided_unit="middle"), "strided_unit='middle' is unknown"),
    ],
)
def test_what_a_version_cannot_be_is_refused(semantics, message):
    with pytest.raises(UsageError, match=message):
        plan(Architecture(semantics=semantics))


def test_a_deep_stem_has_rules():
    with pytest.raises(UsageError, match=r"stem_deep=True .*choose stem_kernel=3"):
        plan(Architecture(stem_deep=True, stem_kernel=7))
