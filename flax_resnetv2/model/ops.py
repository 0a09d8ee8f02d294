"""The operations of a ResNet V2, made fast: batch normalization, ReLU, convolution.

``pre_activation`` defers BN -> ReLU, and ``convolution`` computes it while reading its
input. Custom derivatives recompute it in the backward pass, so that a layer stores only
its input. That halves the memory of a bottleneck net, and memory limits its speed.

Each function equals its textbook form, gradients included (the tests check it). Gains
are for he2016-resnet164's training step on two CPU cores with batches of 128; see
docs/performance.md. Arrays are [N, H, W, C].
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SPACE = (0, 1, 2)
"""The axes of [N, H, W, C] that batch normalization averages over."""
Padding = Literal["same", "symmetric"]
Moments = tuple[jax.Array, jax.Array]
"""Mean and biased variance, both [C] in float32 or wider."""
WIDEST_SHIFTED = 16
"""Widest maps whose shifted product beats XLA's CPU convolution (measured with the one
that ``runtime.choose_convolutions`` chooses)."""
BLOCK = 1024
"""Rows of a matrix product that are summed at once (measured: 512 to 2048)."""


class PreActivation(NamedTuple):
    """Deferred BN -> ReLU of ``x``: ``relu((x - mean) * factor + bias)``."""

    x: jax.Array
    """[N, H, W, C]"""
    mean: jax.Array
    """Mean of each map, [C], in float32 or wider like ``factor`` and ``bias``"""
    factor: jax.Array
    """[C], scale / sqrt(variance + epsilon)"""
    bias: jax.Array
    """The norm's bias, [C]"""

    @property
    def value(self) -> jax.Array:
        """BN -> ReLU, computed: [N, H, W, C] in the dtype of ``x``."""
        return self._computed(relu=True)

    @property
    def normalized(self) -> jax.Array:
        """BN without the ReLU, computed likewise."""
        return self._computed(relu=False)

    def _computed(self, relu: bool) -> jax.Array:
        wide = self.x.astype(self.factor.dtype)
        mean, factor, bias = map(over_pixels, self[1:])
        y = (wide - mean) * factor + bias
        return (jnp.maximum(y, 0) if relu else y).astype(self.x.dtype)


def pre_activation(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float,
) -> PreActivation:
    """Defer BN -> ReLU with these parameters and statistics, each [C]."""
    return PreActivation(x, mean, scale * lax.rsqrt(variance + epsilon), bias)


def plain_moments(x: jax.Array, axis_name: str | None = None) -> Moments:
    """Compute ``batch_moments`` in two passes, with automatic derivatives."""
    wide = widened(x)
    mean = wide.mean(SPACE)
    variance = jnp.square(wide - over_pixels(mean)).mean(SPACE)
    return _over_devices(mean, variance, axis_name)


def plain_convolution(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = "same"
) -> jax.Array:
    """Compute ``convolution`` by XLA's convolution, with automatic derivatives."""
    size = kernel.shape[0]
    around = "SAME" if padding == "same" else [((size - 1) // 2,) * 2] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def batch_moments(x: jax.Array, axis_name: str | None = None) -> Moments:
    """Return mean and variance of a batch [N, H, W, C].

    With ``axis_name`` they are synchronized over that mapped axis; the batches of all
    its devices must have equal sizes.
    """
    return _moments_forward(x, axis_name)[0]


def _moments_forward(x, axis_name):
    wide = widened(x)
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
    centered = x.astype(mean.dtype) - over_pixels(mean)
    dmean, slope = map(over_pixels, (dmean / count, 2 * dvariance / count))
    return ((dmean + centered * slope).astype(x.dtype),)


batch_moments.defvjp(_moments_forward, _moments_backward)


def widened(x: jax.Array) -> jax.Array:
    """Convert to the dtype of statistics: float64 for float64, else float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def over_pixels(values: jax.Array) -> jax.Array:
    """View [C] as [1, 1, 1, C], for users who forbid implicit promotion of ranks."""
    return jnp.expand_dims(values, SPACE)


def _over_devices(mean, variance, axis_name):
    """Add the variance between the devices to that within them."""
    if axis_name is None:
        return mean, variance
    own, mean = mean, lax.pmean(mean, axis_name)
    return mean, lax.pmean(variance + jnp.square(own - mean), axis_name)


def _one_pass_moments(x):
    """Compute E[x^2] - E[x]^2, whose sums both read x in one pass (-6 % of a step).

    The difference loses digits if a mean is far from 0. At 4 standard deviations (4 of
    24 bits), a second pass is made after all.
    """
    mean = x.mean(SPACE)
    variance = jnp.square(x).mean(SPACE) - jnp.square(mean)
    return mean, lax.cond(
        jnp.all(jnp.square(mean) <= 16 * variance),
        lambda x, mean, variance: variance,
        lambda x, mean, variance: jnp.square(x - over_pixels(mean)).mean(SPACE),
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
        x: maps, or deferred BN -> ReLU.
        kernel: in the dtype of the maps.
        stride: in both directions.
        padding: "same" as in XLA and TensorFlow, or "symmetric": (k - 1) / 2 on each
            side.
        recompute: recompute a deferred input in the backward pass; False: store it.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), F].

    On the CPU a 1x1 convolution is a matrix product of selected pixels. XLA's CPU
    convolution has a tenth of its speed, and would nearly double the training step of a
    bottleneck net. On a GPU such a product in float32 can crash the process while XLA
    compiles it (openxla/xla#47381; seen with jaxlib 0.11.2).
    """
    return _convolve(value_of(x), kernel, stride, padding)


def _convolution_forward(x, kernel, stride, padding, recompute):
    return _convolve(value_of(x), kernel, stride, padding), (x, kernel)


def _convolution_backward(stride, padding, recompute, saved, g):
    source, kernel = saved
    if recompute and isinstance(source, PreActivation):
        source = source._replace(mean=_not_before(g, source.mean))
    x = value_of(source)
    dkernel = _kernel_gradient(x, kernel, g, stride, padding)
    dx = _input_gradient(x, kernel, g, stride, padding)
    if isinstance(source, PreActivation):
        return _through_activation(source, x, dx), dkernel
    return dx, dkernel


convolution.defvjp(_convolution_forward, _convolution_backward)


def value_of(x: jax.Array | PreActivation) -> jax.Array:
    """Compute BN -> ReLU if it is deferred."""
    return x.value if isinstance(x, PreActivation) else x


def _not_before(g, mean):
    """Return ``mean`` with a dependency on ``g``, to delay what is computed from it.

    Otherwise XLA would see that forward and backward pass compute the same and store it
    in between: 5.3 GB instead of 1.6. On the CPU it removes optimization barriers, so
    0 times g is added there: as a sum of two rows and not of two vectors, which XLA
    would recompute for every pixel.
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
    """Return the cotangents of a ``PreActivation`` from those of its ``value``."""
    x, mean, factor, _ = source
    g = jnp.where(value > 0, dvalue, 0).astype(factor.dtype)
    sum_g = g.sum(SPACE)
    # sum(g * (x - mean)) without x - mean, which would have to be written first.
    sum_gc = (g * x.astype(factor.dtype)).sum(SPACE) - mean * sum_g
    dx = (g * over_pixels(factor)).astype(x.dtype)
    return PreActivation(dx, -factor * sum_g, sum_gc, sum_g)


def _convolve(x, kernel, stride, padding):
    size, _, maps, features = kernel.shape
    plain = partial(plain_convolution, stride=stride, padding=padding)

    def product(x, kernel):
        x = x[:, ::stride, ::stride]
        return (x.reshape(-1, maps) @ kernel[0, 0]).reshape(*x.shape[:3], features)

    shifted = partial(_shifted_product, direction=1)
    if max(maps, features) > WIDEST_SHIFTED:
        shifted = None
    return _fastest(size, stride, plain, product, shifted, x, kernel)


def _fastest(size, stride, plain, product, shifted, *operands):
    """Call ``plain``, or on the CPU ``product`` (1x1) or ``shifted`` (stride 1)."""
    fast = product if size == 1 else shifted if stride == 1 else None
    if fast is None:
        return plain(*operands)
    return lax.platform_dependent(*operands, cpu=fast, default=plain)


def _input_gradient(x, kernel, g, stride, padding):
    size, _, maps, features = kernel.shape

    def plain(g, kernel):
        return jax.linear_transpose(
            lambda x: plain_convolution(x, kernel, stride, padding), x
        )(g)[0]

    def product(g, kernel):
        # Copied, because a product that reads across the kernel takes twice as long.
        across = lax.optimization_barrier(kernel[0, 0].T)
        dx = (g.reshape(-1, features) @ across).reshape(*g.shape[:3], maps)
        if stride == 1:
            return dx
        ends = [(0, (side - 1) % stride, stride - 1) for side in x.shape[1:3]]
        return lax.pad(dx, jnp.zeros([], dx.dtype), [(0, 0, 0), *ends, (0, 0, 0)])

    def shifted(g, kernel):
        return _shifted_product(g, kernel.swapaxes(2, 3), direction=-1)

    if max(maps, features) > WIDEST_SHIFTED:
        shifted = None
    return _fastest(size, stride, plain, product, shifted, g, kernel)


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
        """Shift rows of x and columns of g, so that one product has all taps.

        It is [3C, P] @ [P, 3F] instead of XLA's [9C, P] @ [P, F], whose columns XLA has
        to gather: 3x3 kernels take a third of the time (-17 % of a step).
        """
        product = _sum_over_rows(
            _side_by_side(x, size, 1, 1).reshape(-1, size * maps),
            _side_by_side(g, size, 2, -1).reshape(-1, size * features),
        )
        return product.reshape(size, maps, size, features).transpose(0, 2, 1, 3)

    return _fastest(size, stride, plain, product, shifted, x, g)


def _shifted_product(x, kernel, *, direction):
    """Convolve with stride 1 by one matrix product between two shifts.

    Shifted columns of x side by side, [P, kC], times the kernel is [P, kF]: one part
    for each row of the kernel, and these are shifted and summed. ``direction`` -1 flips
    the kernel, for the gradient of the input, and shares the columns of g with the
    gradient of the kernel.
    """
    size, _, maps, features = kernel.shape
    columns = _side_by_side(x, size, 2, direction).reshape(-1, size * maps)
    matrix = kernel.transpose(1, 2, 0, 3).reshape(size * maps, size * features)
    parts = (columns @ matrix).reshape(*x.shape[:3], size, features)
    return sum(
        _shift(parts[..., k, :], 1, direction * (size // 2 - k)) for k in range(size)
    )


def _side_by_side(x, size, axis, direction):
    """Return copies of x, shifted pixel by pixel, side by side: [N, H, W, size * C].

    It is a sum of padded copies, because XLA's CPU concatenation is slower.
    """
    maps = x.shape[-1]
    return sum(
        _shift(x, axis, direction * (size // 2 - k), k * maps, (size - 1 - k) * maps)
        for k in range(size)
    )


def _shift(x, axis, by, before=0, after=0):
    """Shift x along ``axis``, and pad its maps by ``before`` and ``after`` zeros."""
    edges = [(0, 0, 0)] * 4
    edges[axis] = (by, -by, 0)
    edges[-1] = (before, after, 0)
    return lax.pad(x, jnp.zeros([], x.dtype), edges)


def _sum_over_rows(x, g):
    """Sum outer products, [P, C], [P, F] -> [C, F]: the gradient of a matrix.

    XLA's CPU product over rows is fastest with the narrower side on the left, and even
    faster if that side is transposed block by block (-10 % of a step).
    """
    if g.shape[1] < x.shape[1]:
        return lax.optimization_barrier(_in_blocks(g, x)).T
    return _in_blocks(x, g)


def _in_blocks(x, g):
    if x.shape[0] % BLOCK or x.shape[1] == g.shape[1]:
        return x.T @ g
    count = x.shape[0] // BLOCK
    blocks = x.reshape(count, BLOCK, -1).swapaxes(1, 2)
    # Without the barrier XLA undoes the transposition.
    products = lax.optimization_barrier(blocks) @ g.reshape(count, BLOCK, -1)
    # Their sum is a product with ones, because XLA would fuse a reduction with all
    # operations before it, and write zeros for its ReLU to compare with (-5 % of a
    # step).
    total = jnp.ones((1, count), x.dtype) @ products.reshape(count, -1)
    return total.reshape(products.shape[1:])
