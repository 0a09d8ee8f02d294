"""The fast operations against their textbook forms, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resnetv2 import ops


def normal(seed, shape, dtype="float64"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain_convolution(x, kernel, stride, padding):
    size = kernel.shape[0]
    around = "SAME" if padding == "same" else [((size - 1) // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 2e-4)])
def test_batch_norm_relu_equals_automatic_differentiation(float64, dtype, tolerance):
    x = normal(0, (4, 5, 3, 6), dtype) * 3 + 1
    scale, bias = normal(1, (6,), dtype), normal(2, (6,), dtype)
    weight = normal(3, x.shape, dtype)

    def both(operation):
        def loss(x, scale, bias):
            y, mean, variance = operation(x, scale, bias)
            return (y * weight).sum(), (y, mean, variance)

        (_, outputs), gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            x, scale, bias
        )
        return outputs, gradient

    ours = both(lambda x, s, b: ops.batch_norm_relu(x, s, b, 1e-3, None))
    plain = both(lambda x, s, b: plain_batch_norm_relu(x, s, b, 1e-3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        ours,
        plain,
    )


@pytest.mark.parametrize("devices", [2, 4])
def test_batch_norm_relu_over_devices_equals_one_batch(float64, devices):
    x, weight = normal(0, (8, 3, 3, 5)) + 2, normal(1, (8, 3, 3, 5))
    # Unequal shares of the spread: the devices' own statistics are all different.
    x = x * jnp.arange(1.0, 9.0)[:, None, None, None]
    scale, bias = normal(2, (5,)), normal(3, (5,))

    def gradients(x, weight, axis_name):
        def loss(x, scale, bias):
            y, *statistics = ops.batch_norm_relu(x, scale, bias, 1e-5, axis_name)
            return (y * weight).sum(), (y, statistics)

        gradient, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return outputs, gradient

    (y, statistics), (dx, dscale, dbias) = gradients(x, weight, None)
    split = (devices, 8 // devices, 3, 3, 5)
    (ys, every), (dxs, dscales, dbiases) = jax.pmap(
        lambda x, w: gradients(x, w, "d"),
        axis_name="d",
        devices=jax.devices()[:devices],
    )(x.reshape(split), weight.reshape(split))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(ys.reshape(y.shape), y)
    close(dxs.reshape(x.shape), dx)
    close(dscales.sum(0), dscale)
    close(dbiases.sum(0), dbias)
    for own, whole in zip(every, statistics, strict=True):
        for device in range(devices):
            close(own[device], whole)


def test_a_small_spread_around_a_large_mean_stays_exact():
    noise = np.random.default_rng(0).normal(size=(16, 8, 8, 2)) * 0.01
    x = (100 + noise).astype(np.float32)
    y, mean, variance = ops.batch_norm_relu(
        jnp.asarray(x), jnp.ones(2), jnp.zeros(2), 1e-5, None
    )
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var((0, 1, 2)), rtol=1e-3)
    expected, *_ = plain_batch_norm_relu(exact, 1.0, 0.0, 1e-5)
    # The last place of 100 is a thousandth of the spread; y ends up to 3.
    np.testing.assert_allclose(y, expected, atol=0.02)


def test_bfloat16_in_bfloat16_out_with_float32_statistics():
    x = normal(0, (4, 4, 4, 2), "bfloat16")
    y, mean, variance = ops.batch_norm_relu(x, jnp.ones(2), jnp.zeros(2), 1e-5, None)
    assert (y.dtype, mean.dtype, variance.dtype) == ("bfloat16", "float32", "float32")
    wide = x.astype("float32")
    expected = plain_batch_norm_relu(wide, jnp.ones(2), jnp.zeros(2), 1e-5)
    np.testing.assert_allclose(mean, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(variance, expected[2], rtol=1e-5)
    # Eight bits of mantissa: one rounding, at the end.
    np.testing.assert_allclose(np.asarray(y, "float32"), expected[0], rtol=2**-8)
    given = (jnp.ones(2), jnp.zeros(2), jnp.zeros(2), jnp.ones(2), 1e-5)
    assert ops.norm_relu(x, *given).dtype == "bfloat16"


def test_bfloat16_gradients_are_rounded_once():
    x, weight = normal(0, (4, 4, 4, 2), "bfloat16"), normal(1, (4, 4, 4, 2), "bfloat16")

    def loss(operation, x, scale, bias):
        y = operation(x, scale, bias)[0]
        return (y.astype("float32") * weight.astype("float32")).sum()

    ours = jax.grad(
        lambda *a: loss(lambda *b: ops.batch_norm_relu(*b, 1e-5, None), *a), (0, 1, 2)
    )(x, jnp.ones(2), jnp.zeros(2))
    plain = jax.grad(
        lambda *a: loss(lambda *b: plain_batch_norm_relu(*b, 1e-5), *a), (0, 1, 2)
    )(x.astype("float32"), jnp.ones(2), jnp.zeros(2))
    assert [g.dtype for g in ours] == ["bfloat16", "float32", "float32"]
    for mine, theirs in zip(ours, plain, strict=True):
        mine = np.asarray(mine, "float32")
        np.testing.assert_allclose(mine, theirs, rtol=2**-8, atol=1e-5)


def test_no_gradient_flows_through_the_statistics():
    def loss(x):
        _, mean, variance = ops.batch_norm_relu(
            x, jnp.ones(2), jnp.zeros(2), 1e-5, None
        )
        return (mean + variance).sum()

    assert not jax.grad(loss)(normal(0, (2, 3, 3, 2), "float32")).any()


def test_norm_relu_uses_the_statistics_it_is_given(float64):
    x = normal(0, (2, 3, 3, 2))
    scale, bias, mean = (normal(k, (2,)) for k in (1, 2, 3))
    variance = jnp.asarray([0.5, 2.0])
    expected = (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias
    y = ops.norm_relu(x, scale, bias, mean, variance, 1e-5)
    np.testing.assert_allclose(y, np.maximum(expected, 0), rtol=1e-12, atol=1e-13)
