"""What a ResNet V2 computes, made fast in one place: BN -> ReLU -> convolution.

``batch_moments`` gives the statistics, ``pre_activation`` promises BN -> ReLU without
computing it, and ``convolution`` computes the promise while it reads its input. The
derivatives are written by hand: the backward pass computes BN -> ReLU again, so that
what a layer keeps is its input and nothing else. That halves the memory of a bottleneck
net, and memory is what it waits for.

Each function equals its textbook form, gradients included (the tests hold it to that).
What is faster on one platform only is chosen inside the traced function by
``lax.platform_dependent``. Gains are of he2016-resnet164's training step on two CPU
cores, batch 128, see docs/performance.md. Arrays are [N, H, W, C].
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SPACE = (0, 1, 2)
"""The axes of [N, H, W, C] that batch normalization averages over."""
Padding = Literal["same", "symmetric"]
WIDEST_SHIFTED = 16
"""Maps up to which a shifted product beats XLA's CPU convolution (measured, with the
convolution that ``process.choose_convolutions`` chooses)."""
BLOCK = 1024
"""Rows of a matrix product that are summed at a time (measured: 512 to 2048)."""


class PreActivation(NamedTuple):
    """BN -> ReLU of ``x``, not computed yet: ``relu((x - mean) * factor + bias)``."""

    x: jax.Array
    """[N, H, W, C]"""
    mean: jax.Array
    """[C], like the others in float32 or wider"""
    factor: jax.Array
    """[C], scale / sqrt(variance + epsilon)"""
    bias: jax.Array
    """[C]"""

    @property
    def value(self) -> jax.Array:
        """Compute it, [N, H, W, C] like ``x``."""
        return self._compute(lambda y: jnp.maximum(y, 0))

    @property
    def normalized(self) -> jax.Array:
        """Compute BN alone."""
        return self._compute(lambda y: y)

    def _compute(self, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
        wide = self.x.astype(self.factor.dtype)
        y = activation((wide - self.mean) * self.factor + self.bias)
        return y.astype(self.x.dtype)


def pre_activation(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float,
) -> PreActivation:
    """Promise BN -> ReLU with the given statistics, all [C]."""
    return PreActivation(x, mean, scale * lax.rsqrt(variance + epsilon), bias)


def plain_moments(
    x: jax.Array, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Give mean and biased variance as ``batch_moments`` does, in two passes."""
    wide = _wide(x)
    mean = wide.mean(SPACE)
    variance = jnp.square(wide - mean).mean(SPACE)
    return _over_devices(mean, variance, axis_name)


def plain_convolution(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = "same"
) -> jax.Array:
    """Convolve as ``convolution`` does, by XLA's own convolution."""
    size = kernel.shape[0]
    around = "SAME" if padding == "same" else [((size - 1) // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def batch_moments(
    x: jax.Array, axis_name: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [C] of a batch, in float32 or wider.

    Args:
        x: [N, H, W, C].
        axis_name: the mapped axis over which they are taken together, with equal
            batches on all its devices; None: this device's batch alone.
    """
    return _moments_forward(x, axis_name)[0]


def _moments_forward(x, axis_name):
    wide = _wide(x)
    mean, variance = lax.platform_dependent(
        wide, cpu=_one_pass_moments, default=plain_moments
    )
    mean, variance = _over_devices(mean, variance, axis_name)
    return (mean, variance), (x, mean)


def _moments_backward(axis_name, saved, cotangents):
    x, mean = saved
    dmean, dvariance = cotangents
    if axis_name is not None:
        dmean, dvariance = lax.pmean((dmean, dvariance), axis_name)
    count = x.size // x.shape[-1]
    centered = x.astype(mean.dtype) - mean
    return ((dmean / count + centered * (2 * dvariance / count)).astype(x.dtype),)


batch_moments.defvjp(_moments_forward, _moments_backward)


def _wide(x):
    """The dtype of statistics: float64 for float64, else float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _over_devices(mean, variance, axis_name):
    """Spread within the devices plus spread between them."""
    if axis_name is None:
        return mean, variance
    own, mean = mean, lax.pmean(mean, axis_name)
    return mean, lax.pmean(variance + jnp.square(own - mean), axis_name)


def _one_pass_moments(x):
    """E[x^2] - E[x]^2: both sums read x as it lies (-6 % of a step).

    The difference loses digits where a mean is far from 0; at 4 standard deviations
    (4 of 24 bits) the second pass is made after all.
    """
    mean = x.mean(SPACE)
    variance = jnp.square(x).mean(SPACE) - jnp.square(mean)
    return mean, lax.cond(
        jnp.all(jnp.square(mean) <= 16 * variance),
        lambda x, mean, variance: variance,
        lambda x, mean, variance: jnp.square(x - mean).mean(SPACE),
        x,
        mean,
        variance,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolution(
    x: jax.Array | PreActivation,
    kernel: jax.Array,
    stride: int = 1,
    padding: Padding = "same",
    recompute: bool = True,
) -> jax.Array:
    """Convolve ``x`` [N, H, W, C] with ``kernel`` [k, k, C, F].

    Args:
        x: maps, or the promise of them.
        kernel: of the dtype of the maps.
        stride: in both directions.
        padding: "same": as XLA and TensorFlow pad; "symmetric": (k - 1) / 2 around.
        recompute: the backward pass computes a promise again; False: it keeps it.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), F].

    On the CPU a 1x1 convolution is written as the matrix product over maps that it is:
    XLA's CPU convolution runs it at a tenth of the speed of its matrix product, and a
    bottleneck net's training step would take nearly twice as long. A stride then only
    selects pixels. On a GPU the product of float32 maps can end the process while XLA
    compiles it (openxla/xla#47381; seen with jaxlib 0.11.2).
    """
    return _convolve(_value(x), kernel, stride, padding)


def _convolution_forward(x, kernel, stride, padding, recompute):
    return _convolve(_value(x), kernel, stride, padding), (x, kernel)


def _convolution_backward(stride, padding, recompute, saved, g):
    source, kernel = saved
    if recompute and isinstance(source, PreActivation):
        source = source._replace(mean=_not_before(g, source.mean))
    x = _value(source)
    dkernel = _kernel_gradient(x, kernel, g, stride, padding)
    dx = _input_gradient(x, kernel, g, stride, padding)
    if isinstance(source, PreActivation):
        return _through_activation(source, x, dx), dkernel
    return dx, dkernel


convolution.defvjp(_convolution_forward, _convolution_backward)


def _value(x):
    return x.value if isinstance(x, PreActivation) else x


def _not_before(g, mean):
    """``mean``, but only once ``g`` is known: what is computed from it comes late.

    XLA would otherwise see that forward and backward pass compute the same, and keep
    it from one to the other: 5.3 GB instead of 1.6. On the CPU it removes optimization
    barriers before it looks, so there g enters a sum, times 0; a sum of two rows and
    not of two vectors, because XLA would compute the latter again for every pixel.
    """

    def tied(g, mean):
        nothing = 0 * g[0, 0, 0, 0].astype(mean.dtype)
        return jnp.stack([mean, jnp.broadcast_to(nothing, mean.shape)]).sum(0)

    return lax.platform_dependent(
        g,
        mean,
        cpu=tied,
        default=lambda g, mean: lax.optimization_barrier((g, mean))[1],
    )


def _through_activation(source, value, dvalue):
    """Cotangents of a ``PreActivation`` whose ``value`` has the cotangent dvalue."""
    x, mean, factor, _ = source
    g = jnp.where(value > 0, dvalue, 0).astype(factor.dtype)
    sum_g = g.sum(SPACE)
    # sum(g * (x - mean)), summed as x lies: x - mean would have to be written first.
    sum_gc = (g * x.astype(factor.dtype)).sum(SPACE) - mean * sum_g
    dx = (g * factor).astype(x.dtype)
    return PreActivation(dx, -factor * sum_g, sum_gc, sum_g)


def _convolve(x, kernel, stride, padding):
    size, _, maps, features = kernel.shape
    plain = partial(plain_convolution, stride=stride, padding=padding)

    def product(x, kernel):
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, maps) @ kernel[0, 0]).reshape(*x.shape[:3], features)

    if size == 1:
        return lax.platform_dependent(x, kernel, cpu=product, default=plain)
    if stride > 1 or max(maps, features) > WIDEST_SHIFTED:
        return plain(x, kernel)
    return lax.platform_dependent(
        x, kernel, cpu=partial(_shifted_product, direction=1), default=plain
    )


def _input_gradient(x, kernel, g, stride, padding):
    size, _, maps, features = kernel.shape

    def plain(g, kernel):
        return jax.linear_transpose(
            lambda x: plain_convolution(x, kernel, stride, padding), x
        )(g)[0]

    def product(g, kernel):
        # A transposed copy: the product with a kernel read across takes twice as long.
        across = lax.optimization_barrier(kernel[0, 0].T)
        dx = (g.reshape(-1, features) @ across).reshape(*g.shape[:3], maps)
        if stride == 1:
            return dx
        ends = [(0, (side - 1) % stride, stride - 1) for side in x.shape[1:3]]
        return lax.pad(dx, jnp.zeros([], dx.dtype), [(0, 0, 0), *ends, (0, 0, 0)])

    if size == 1:
        return lax.platform_dependent(g, kernel, cpu=product, default=plain)
    if stride > 1 or max(maps, features) > WIDEST_SHIFTED:
        return plain(g, kernel)
    return lax.platform_dependent(
        g,
        kernel,
        cpu=lambda g, kernel: _shifted_product(g, kernel.swapaxes(2, 3), direction=-1),
        default=plain,
    )


def _kernel_gradient(x, kernel, g, stride, padding):
    size, _, maps, features = kernel.shape

    def plain(x, g):
        return jax.linear_transpose(
            lambda k: plain_convolution(x, k, stride, padding), kernel
        )(g)[0]

    def product(x, g):
        x = x[:, ::stride, ::stride]
        return _sum_over_rows(x.reshape(-1, maps), g.reshape(-1, features))[None, None]

    def shifted(x, g):
        """Rows of x and columns of g are shifted: one product holds all taps.

        [3C, P] times [P, 3F] instead of XLA's [9C, P] times [P, F], whose columns it
        has to gather: 3x3 kernels take a third of the time (-17 % of a step).
        """
        product = _sum_over_rows(
            _side_by_side(x, size, 1, 1).reshape(-1, size * maps),
            _side_by_side(g, size, 2, -1).reshape(-1, size * features),
        )
        return product.reshape(size, maps, size, features).transpose(0, 2, 1, 3)

    if size == 1:
        return lax.platform_dependent(x, g, cpu=product, default=plain)
    if stride > 1:
        return plain(x, g)
    return lax.platform_dependent(x, g, cpu=shifted, default=plain)


def _shifted_product(x, kernel, *, direction):
    """A convolution of stride 1 as one matrix product between two shifts.

    Columns of x are laid side by side, [P, kC]; the product with the kernel gives
    [P, kF], one part for each row of the kernel, which are shifted and summed. A
    ``direction`` of -1 turns the kernel round, as the gradient of the input wants it,
    and shares the columns of g with the gradient of the kernel.
    """
    size, _, maps, features = kernel.shape
    columns = _side_by_side(x, size, 2, direction).reshape(-1, size * maps)
    matrix = kernel.transpose(1, 2, 0, 3).reshape(size * maps, size * features)
    parts = (columns @ matrix).reshape(*x.shape[:3], size, features)
    return sum(
        _shift(parts[..., k, :], 1, direction * (size // 2 - k)) for k in range(size)
    )


def _side_by_side(x, size, axis, direction):
    """Copies of x, each shifted by one more pixel, side by side: [N, H, W, size * C].

    A sum of padded copies, because XLA's CPU concatenation is slower.
    """
    maps = x.shape[-1]
    return sum(
        _shift(x, axis, direction * (size // 2 - k), k * maps, (size - 1 - k) * maps)
        for k in range(size)
    )


def _shift(x, axis, by, before=0, after=0):
    """Move x along ``axis``; zeros come in, and ``before`` and ``after`` its maps."""
    edges = [(0, 0, 0)] * 4
    edges[axis] = (by, -by, 0)
    edges[-1] = (before, after, 0)
    return lax.pad(x, jnp.zeros([], x.dtype), edges)


def _sum_over_rows(x, g):
    """The gradient of a matrix: the sum of outer products, [P, C], [P, F] -> [C, F].

    XLA's CPU product that sums over rows is fastest with the narrower side on the left,
    and faster still where that side is turned a block at a time (-10 % of a step).
    """
    if g.shape[1] < x.shape[1]:
        return lax.optimization_barrier(_in_blocks(g, x)).T
    return _in_blocks(x, g)


def _in_blocks(x, g):
    if x.shape[0] % BLOCK or x.shape[1] == g.shape[1]:
        return x.T @ g
    count = x.shape[0] // BLOCK
    blocks = x.reshape(count, BLOCK, -1).swapaxes(1, 2)
    # Without the barrier XLA undoes the turning.
    products = lax.optimization_barrier(blocks) @ g.reshape(count, BLOCK, -1)
    # Their sum is a product with ones: XLA would make one operation of a reduction and
    # all before it, ReLU included, that writes zeros to compare with (-5 % of a step).
    total = jnp.ones((1, count), x.dtype) @ products.reshape(count, -1)
    return total.reshape(products.shape[1:])
