"""The fast operations against their textbook forms, gradients included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resnetv2.model import ops
from tests.support.tiny import textbook


def normal(seed, shape, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_convolution(x, kernel, stride, padding):
    size = kernel.shape[0]
    around = "SAME" if padding == "same" else [((size - 1) // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@textbook()
def plain_batch_norm_relu(x, scale, bias, epsilon):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / jnp.sqrt(variance + epsilon) * scale + bias
    return jax.nn.relu(y), mean, variance


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_convolution_equals_the_general_one(float64, size, stride, padding):
    x, kernel = normal(0, (2, 7, 6, 3)), normal(1, (size, size, 3, 4))
    weight = normal(2, plain_convolution(x, kernel, stride, padding).shape)

    def both(convolve):
        def loss(x, kernel):
            return (convolve(x, kernel, stride, padding) * weight).sum()

        return jax.value_and_grad(loss, (0, 1))(x, kernel)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12),
        both(ops.convolution),
        both(plain_convolution),
    )


def test_symmetric_padding_differs_from_same_on_even_sizes():
    x, kernel = normal(0, (1, 8, 8, 2), "float32"), normal(1, (3, 3, 2, 2), "float32")
    same, symmetric = (ops.convolution(x, kernel, 2, p) for p in ("same", "symmetric"))
    assert same.shape == symmetric.shape
    assert not np.allclose(same, symmetric)


def layer(x, scale, bias, kernel, stride=1, axis_name=None, recompute=True):
    """BN -> ReLU -> convolution of ``ops``: the maps, mean and variance."""
    mean, variance = ops.batch_moments(x, axis_name)
    deferred = ops.pre_activation(x, scale, bias, mean, variance, 1e-3)
    y = ops.convolution(deferred, kernel, stride, "same", recompute)
    return y, mean, variance


@textbook()
def plain_layer(x, scale, bias, kernel, stride=1):
    y, mean, variance = plain_batch_norm_relu(x, scale, bias, 1e-3)
    return plain_convolution(y, kernel, stride, "same"), mean, variance


def outputs_and_gradients(operation, arguments, weight):
    def loss(*arguments):
        y, *statistics = operation(*arguments)
        return (y * weight[: y.size].reshape(y.shape)).sum(), (y, *statistics)

    numbers = tuple(range(len(arguments)))
    gradient, outputs = jax.jit(jax.grad(loss, numbers, has_aux=True))(*arguments)
    return outputs, gradient


# Narrow to wide and back (each side of a product the narrow one), a whole block of
# rows, more maps than the shifted products take, an uneven map.
SHAPES = [
    ((4, 16, 16, 6), 1, 10, 1),
    ((4, 16, 16, 10), 1, 6, 1),
    ((2, 7, 6, 5), 1, 4, 2),
    ((2, 7, 6, 4), 3, 5, 1),
    ((4, 16, 16, 3), 3, 4, 1),
    ((2, 6, 5, 3), 5, 4, 1),
    ((2, 7, 6, 4), 3, 5, 2),
    ((1, 4, 4, ops.WIDEST_SHIFTED + 1), 3, 3, 1),
]


@pytest.mark.parametrize(("shape", "size", "features", "stride"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "recompute"),
    [("float64", 1e-9, True), ("float64", 1e-9, False), ("float32", 2e-5, True)],
)
def test_a_layer_equals_automatic_differentiation(
    float64, dtype, tolerance, recompute, shape, size, features, stride
):
    maps = shape[-1]
    x = normal(0, shape, dtype) * 3 + 1
    kernel = normal(4, (size, size, maps, features), dtype)
    arguments = (x, normal(1, (maps,), dtype), normal(2, (maps,), dtype), kernel)
    weight = normal(3, (x.size * features,), dtype)
    ours = outputs_and_gradients(
        partial(layer, stride=stride, recompute=recompute), arguments, weight
    )
    plain = outputs_and_gradients(
        partial(plain_layer, stride=stride), arguments, weight
    )
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("size", [1, 3])
def test_a_layer_over_devices_equals_one_batch(float64, devices, size):
    x = normal(0, (8, 4, 4, 5)) + 2
    # Unequal shares of the spread: the devices' own statistics are all different.
    x = x * jnp.arange(1.0, 9.0)[:, None, None, None]
    rest = (normal(2, (5,)), normal(3, (5,)), normal(4, (size, size, 5, 3)))
    weight = normal(1, (8, 4 * 4 * 3))

    def run(x, weight, axis_name):
        operation = partial(layer, axis_name=axis_name)
        return outputs_and_gradients(operation, (x, *rest), weight.reshape(-1))

    (y, *statistics), (dx, *sums) = run(x, weight, None)
    (ys, *every), (dxs, *parts) = jax.pmap(
        lambda x, w: run(x, w, "d"), axis_name="d", devices=jax.devices()[:devices]
    )(
        x.reshape(devices, 8 // devices, *x.shape[1:]),
        weight.reshape(devices, 8 // devices, -1),
    )
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(ys.reshape(y.shape), y)
    close(dxs.reshape(x.shape), dx)
    for part, whole in zip(parts, sums, strict=True):
        close(part.sum(0), whole)
    for own, whole in zip(every, statistics, strict=True):
        for device in range(devices):
            close(own[device], whole)


@textbook()
def test_a_small_spread_around_a_large_mean_stays_exact():
    noise = np.random.default_rng(0).normal(size=(16, 8, 8, 2)) * 0.01
    x = (100 + noise).astype(np.float32)
    mean, variance = ops.batch_moments(jnp.asarray(x))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-3)
    given = (jnp.ones(2), jnp.zeros(2), mean, variance, 1e-5)
    y = ops.pre_activation(jnp.asarray(x), *given).value
    expected, *_ = plain_batch_norm_relu(exact, 1.0, 0.0, 1e-5)
    # The last place of 100 is a thousandth of the spread; y ends up to 3.
    np.testing.assert_allclose(y, expected, atol=0.02)


@pytest.mark.parametrize("far", [0.0, 3.5, 4.5, 300.0])
def test_one_pass_is_as_good_as_two_where_it_is_taken(far):
    x = normal(0, (16, 8, 8, 2), "float32") + jnp.float32(far)
    exact = np.asarray(x, np.float64).var((0, 1, 2))
    np.testing.assert_allclose(ops.batch_moments(x)[1], exact, rtol=5e-5)


def test_bfloat16_in_bfloat16_out_with_float32_statistics():
    x = normal(0, (4, 4, 4, 2), "bfloat16")
    mean, variance = ops.batch_moments(x)
    assert (mean.dtype, variance.dtype) == ("float32", "float32")
    wide = x.astype("float32")
    expected = plain_batch_norm_relu(wide, jnp.ones(2), jnp.zeros(2), 1e-5)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, expected[2], rtol=1e-5)
    given = (jnp.ones(2), jnp.zeros(2), mean, variance, 1e-5)
    deferred = ops.pre_activation(x, *given)
    assert deferred.value.dtype == "bfloat16"
    # Eight bits of mantissa: one rounding, at the end.
    y = np.asarray(deferred.value, "float32")
    np.testing.assert_allclose(y, expected[0], rtol=2**-8)
    kernel = jnp.ones((3, 3, 2, 4), "bfloat16")
    assert ops.convolution(deferred, kernel).dtype == "bfloat16"


def test_bfloat16_gradients_keep_their_dtypes_and_eight_bits():
    x, kernel = normal(0, (4, 4, 4, 2), "bfloat16"), normal(1, (1, 1, 2, 3), "bfloat16")
    rest = (jnp.ones(2), jnp.zeros(2))
    weight = normal(2, (4 * 4 * 4 * 3,), "float32")
    run = lambda op, x, k: outputs_and_gradients(  # noqa: E731
        lambda *a: (op(*a)[0].astype("float32"),), (x, *rest, k), weight
    )[1]
    ours = run(layer, x, kernel)
    plain = run(plain_layer, x.astype("float32"), kernel.astype("float32"))
    assert [g.dtype for g in ours] == ["bfloat16", "float32", "float32", "bfloat16"]
    for mine, theirs in zip(ours, plain, strict=True):
        scale = float(jnp.abs(theirs).max())
        mine = np.asarray(mine, "float32")
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2**-6 * scale)


def test_the_backward_pass_keeps_the_input_and_not_the_activation():
    """Three layers: what lies between the passes is one array a layer, not two."""
    shape = (8, 32, 32, 16)
    size = 4 * np.prod(shape)

    def memory(recompute):
        def loss(kernels, x):
            for kernel in kernels:
                x, *_ = layer(
                    x, jnp.ones(16), jnp.zeros(16), kernel, 1, None, recompute
                )
            return x.sum()

        kernels = [jnp.ones((1, 1, 16, 16))] * 12
        compiled = jax.jit(jax.grad(loss)).lower(kernels, jnp.ones(shape)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / size

    assert memory(recompute=True) < 12 + 6
    assert memory(recompute=False) > 2 * 12


@textbook()
def test_a_deferred_norm_uses_the_statistics_it_is_given(float64):
    x = normal(0, (2, 3, 3, 2))
    scale, bias, mean = (normal(k, (2,)) for k in (1, 2, 3))
    variance = jnp.asarray([0.5, 2.0])
    expected = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    y = ops.pre_activation(x, scale, bias, mean, variance, 1e-5).value
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_the_cpu_multiplies_matrices(stride):
    """On a GPU they end the process in float32: openxla/xla#47381."""
    x, kernel = jnp.zeros((2, 8, 8, 4)), jnp.zeros((1, 1, 4, 6))

    def loss(x, kernel):
        return ops.convolution(x, kernel, stride).sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
    for platform, product in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.dot_general" in text) == product
        assert ("stablehlo.convolution" in text) != product
