"""The article's hierarchy as linen modules: stem, stacks, units, layers, head.

Every module has a ``plan`` (see ``planning``) and an ``execution``. ``train`` is a
required argument of every call. Parameter paths follow the article's figure:
``stack2/unit1/layer3/conv/kernel``. ``initial`` initializes a net faster than ``init``.

>>> model = create_model(Architecture(units=(1, 1), widths=(8, 16), strides=(1, 2)))
>>> images = jnp.zeros([4, 32, 32, 3])
>>> variables = model.init(jax.random.key(0), images, train=False)
>>> model.apply(variables, images, train=False).shape
(4, 10)
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import ops, planning
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.presets import get_preset
from flax_resnetv2.model.semantics import VARIANCE_SCALING
from flax_resnetv2.validation import check_dataclass

Maps = jax.Array | ops.PreActivation
"""Maps [N, H, W, C], or BN -> ReLU of maps that the next convolution computes."""
_INITIALIZERS = {
    name: nn.initializers.variance_scaling(*scaling)
    for name, scaling in VARIANCE_SCALING.items()
} | {
    "normal_0.01": nn.initializers.normal(0.01),
    "zeros": nn.initializers.zeros_init(),
}


class Latent(NamedTuple):
    """Output of a latent head with ``latent_variance``: two arrays [N, latent]."""

    mean: jax.Array
    log_variance: jax.Array


class Convolution(nn.Module):
    """[N, H, W, C] -> [N, H/stride, W/stride, width]; kernel [k, k, C, width]."""

    plan: planning.ConvPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Maps) -> jax.Array:
        """Convolve, and add the bias if the plan has one."""
        p, e = self.plan, self.execution
        maps = x.x if isinstance(x, ops.PreActivation) else x
        shape = (p.kernel, p.kernel, maps.shape[-1], p.width)
        kernel = self.param("kernel", _INITIALIZERS[p.init], shape, e.param_dtype)
        if p.standardize is not None:
            kernel = _standardized(kernel, p.standardize)
        kernel = kernel.astype(maps.dtype)
        if e.backward == "automatic":
            y = ops.plain_convolution(ops.value_of(x), kernel, p.stride, p.padding)
        else:
            recompute = e.remat != "nothing"
            y = ops.convolution(x, kernel, p.stride, p.padding, recompute)
        if p.bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", zeros, (p.width,), e.param_dtype)
            y += ops.over_pixels(bias.astype(y.dtype))
        return y


class NormReLU(nn.Module):
    """Normalization followed by ReLU, [N, H, W, C] -> [N, H, W, C].

    Parameters are ``scale`` and ``bias`` [C]; the collection ``batch_stats`` has the
    running ``mean`` and (biased) ``var`` [C] of batch normalization.
    """

    plan: planning.NormPlan
    execution: Execution = Execution()

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalize by the batch's statistics (train) or by the running ones."""
        y = self.deferred(x, train=train)
        if not isinstance(y, ops.PreActivation):
            return y
        return y.value if self.plan.relu else y.normalized

    @nn.compact
    def deferred(self, x: jax.Array, *, train: bool) -> Maps:
        """Defer batch normalization to the next convolution; compute group norm."""
        shape, e = x.shape[-1:], self.execution
        scale = self.param("scale", nn.initializers.ones_init(), shape, e.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, e.param_dtype)
        if self.plan.groups is not None:
            y = _group_normalized(x, self.plan) * ops.over_pixels(scale)
            y = y + ops.over_pixels(bias)
            return (nn.relu(y) if self.plan.relu else y).astype(x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, e.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, e.param_dtype)
        epsilon, momentum = self.plan.epsilon, self.plan.momentum
        if not train:
            return ops.pre_activation(x, scale, bias, mean.value, var.value, epsilon)
        axis_name = None if self.is_initializing() else e.batch_norm_axis
        custom = e.backward == "custom"
        moments = ops.batch_moments if custom else ops.plain_moments
        batch = moments(x, axis_name)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            for running, now in zip((mean, var), batch, strict=True):
                now = jax.lax.stop_gradient(now)
                running.value = momentum * running.value + (1 - momentum) * now
        return ops.pre_activation(x, scale, bias, *batch, epsilon)


class ResidualLayer(nn.Module):
    """BN -> ReLU -> convolution, [N, H, W, C] -> [N, H/stride, W/stride, width]."""

    plan: planning.LayerPlan
    execution: Execution = Execution()

    def setup(self) -> None:
        """Create the submodules ``norm`` and ``conv``."""
        if self.plan.norm is not None:
            self.norm = NormReLU(self.plan.norm, self.execution)
        self.conv = Convolution(self.plan.conv, self.execution)

    def preactivate(self, x: jax.Array, *, train: bool) -> Maps:
        """Apply BN -> ReLU, deferred; the one layer without a norm returns ``x``."""
        return x if self.plan.norm is None else self.norm.deferred(x, train=train)

    def convolve(self, x: Maps) -> jax.Array:
        """Apply only the convolution."""
        return self.conv(x)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Pre-activate, then convolve; version 1 convolves first."""
        if self.plan.norm_last:
            return self.norm(self.conv(x), train=train)
        return self.convolve(self.preactivate(x, train=train))


class ResidualUnit(nn.Module):
    """Residual layers in parallel with a shortcut, and their sum.

    [N, H, W, C] -> [N, H/stride, W/stride, width]. The shortcut is the identity, or a
    convolution where resolution or width changes. Nothing follows the sum, except for
    version 1's ReLU. If the collection ``intermediates`` is mutable, the unit sows
    ``residual_ratio`` [N]: the norm of the residual branch over that of the shortcut.

    >>> unit = ResidualUnit(plan_unit(in_width=64, width=128, reduction=2, stride=2))
    """

    plan: planning.UnitPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, residual_scale: jax.Array | None = None
    ) -> jax.Array:
        """Add the residual branch to the shortcut branch.

        Args:
            x: [N, H, W, C].
            train: use the batch's statistics, and update the running ones.
            residual_scale: [N], multiplies each image's residual branch (stochastic
                depth: 0 drops it).
        """
        p, e = self.plan, self.execution
        first, *rest = [
            ResidualLayer(layer, e, name=f"layer{number}")
            for number, layer in enumerate(p.layers, start=1)
        ]
        if first.plan.norm_last:
            active, residual = x, first(x, train=train)
        else:
            active = first.preactivate(x, train=train)
            residual = first.convolve(active)
        carried = x[:, :: p.select, :: p.select]
        if p.shortcut is not None:
            carried = active if p.shared_preactivation else x
            if p.average > 1:
                carried = _averaged(carried, p.average)
            carried = Convolution(p.shortcut, e, name="shortcut")(carried)
        if p.shortcut_norm is not None:
            norm = NormReLU(p.shortcut_norm, e, name="shortcut_norm")
            carried = norm(carried, train=train)
        for layer in rest:
            residual = layer(residual, train=train)
        if self.is_mutable_collection("intermediates"):
            ratio = _norms(residual, e) / jnp.maximum(_norms(carried, e), 1e-12)
            self.sow("intermediates", "residual_ratio", ratio)
        if residual_scale is not None:
            scale = residual_scale[:, None, None, None]
            residual = (residual.astype(scale.dtype) * scale).astype(residual.dtype)
        y = carried + residual
        return nn.relu(y) if p.relu else y


class ResidualStack(nn.Module):
    """Residual units of one width and resolution, [N, H, W, C] -> [N, h, w, width].

    The optional bridge, a shortcut around the whole stack, is the article's open
    question.
    """

    plan: planning.StackPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, residual_scale: jax.Array | None = None
    ) -> jax.Array:
        """Apply the units in order and add the bridge.

        ``residual_scale`` is [N, units]; see ``ResidualUnit``.
        """
        # Initialization and sowing need the modules themselves.
        modules = self.is_initializing() or self.is_mutable_collection("intermediates")
        y = x
        for number, unit in enumerate(self.plan.units, start=1):
            name, scale = f"unit{number}", None
            if residual_scale is not None:
                scale = residual_scale[:, number - 1]
            if train and not modules:
                y = self._train_unit(unit, name, y, scale)
            else:
                module = ResidualUnit(unit, self.execution, name=name)
                y = module(y, train=train, residual_scale=scale)
        if self.plan.bridge == "identity":
            return y + x
        if self.plan.bridge is not None:
            return y + Convolution(self.plan.bridge, self.execution, name="bridge")(x)
        return y

    def _train_unit(
        self, plan: planning.UnitPlan, name: str, x: jax.Array, scale: jax.Array | None
    ) -> jax.Array:
        """Apply one unit through the function that all units of its plan share."""
        collections = "params", "batch_stats"
        variables = {kind: self.get_variable(kind, name, {}) for kind in collections}
        y, stats = _train_unit(plan, self.execution, variables, x, scale)
        if stats and self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", name, stats)
        return y


class Stem(nn.Module):
    """Convolutions with BN-ReLU and a max-pool: images [N, H, W, channels] -> maps."""

    plan: planning.StemPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Apply the planned convolutions, norms and the pool."""
        p = self.plan
        for suffix, conv, norm in p.layers():
            x = Convolution(conv, self.execution, name=f"conv{suffix}")(x)
            if norm is not None:
                x = NormReLU(norm, self.execution, name=f"norm{suffix}")(x, train=train)
        if p.pool is not None:
            x = _max_pool(x, p.pool)
        return x


class Head(nn.Module):
    """BN -> ReLU on the last maps [N, h, w, C], pooling, and fully connected layers.

    Returns logits [N, num_classes], latent vectors [N, latent] or a ``Latent`` in
    ``execution.param_dtype``, or the maps (kind "none"). If the collection
    ``intermediates`` is mutable, a classifier sows its input ``features`` [N, K].
    """

    plan: planning.HeadPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array | Latent:
        """Normalize, pool or flatten, and apply the fully connected layers."""
        p, dtype = self.plan, self.execution.param_dtype
        if p.norm is not None:
            x = NormReLU(p.norm, self.execution, name="norm")(x, train=train)
        if p.kind == "none":
            return x
        init = _INITIALIZERS[p.init]
        dense = partial(nn.Dense, kernel_init=init, param_dtype=dtype, dtype=dtype)
        x = x.astype(dtype)
        x = x.mean((1, 2)) if p.pooled else x.reshape(x.shape[0], -1)
        for number, features in enumerate(p.hidden, start=1):
            x = nn.relu(dense(features, name=f"hidden{number}")(x))
        if p.kind == "classifier":
            if self.is_mutable_collection("intermediates"):
                self.sow("intermediates", "features", x)
            return dense(p.features, name="classifier")(x)
        latent = dense(p.features, name="latent")(x)
        if not p.variance:
            return latent
        return Latent(latent, dense(p.features, name="log_variance")(x))


class ResNetV2(nn.Module):
    """Stem, stacks and head: images [N, H, W, channels] -> the head's output."""

    plan: planning.NetPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, residual_scale: jax.Array | None = None
    ) -> jax.Array | Latent:
        """Apply the net to normalized images.

        Args:
            images: [N, H, W, channels] float.
            train: normalize by the batch's statistics and update the running ones,
                which needs a mutable ``batch_stats``; False: use the running ones.
            residual_scale: [N, units of all stacks], see ``ResidualUnit``.
        """
        p, e, first = self.plan, self.execution, 0
        x = images.astype(e.dtype)
        if p.stem is not None:
            x = Stem(p.stem, e, name="stem")(x, train=train)
        for number, stack in enumerate(p.stacks, start=1):
            scale, last = residual_scale, first + len(stack.units)
            if scale is not None:
                scale = scale[:, first:last]
            module = ResidualStack(stack, e, name=f"stack{number}")
            x = module(x, train=train, residual_scale=scale)
            first = last
        return Head(p.head, e, name="head")(x, train=train)


def create_model(
    architecture: Architecture | str = Architecture(),
    execution: Execution = Execution(),
    image_shape: tuple[int, int, int] | None = None,
) -> ResNetV2:
    """Plan ``architecture`` and return the module that executes the plan.

    Args:
        architecture: what the net is, or the name of a preset.
        execution: how the net is run.
        image_shape: (height, width, channels). If given, strides are checked against
            the resolution; required for an architecture without a stem.

    Raises:
        UsageError: the architecture breaks a rule, or no preset has this name.
    """
    if isinstance(architecture, str):
        architecture = get_preset(architecture).architecture
    check_dataclass(execution, Execution, "execution.")
    if execution.dtype == "float64" and not jax.config.jax_enable_x64:
        raise UsageError(
            "execution.dtype=float64 needs JAX's double precision, which is off; set "
            "JAX_ENABLE_X64=1, or choose float32"
        )
    return ResNetV2(planning.plan(architecture, image_shape), execution)


@partial(jax.jit, static_argnums=(0, 1))
def _train_unit(
    plan: planning.UnitPlan,
    execution: Execution,
    variables: dict[str, Any],
    x: jax.Array,
    scale: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Apply a residual unit in training; return its maps and new statistics.

    Under ``jit``, so that units of equal plans are traced, differentiated and lowered
    once: ResNet-164 has 54 units but only 6 different plans.
    """
    unit = ResidualUnit(plan, execution, parent=None)
    apply = partial(unit.apply, train=True, mutable=["batch_stats"])
    if execution.remat == "units":
        apply = jax.checkpoint(apply)
    y, updated = apply(variables, x, residual_scale=scale)
    return y, updated.get("batch_stats", {})


def _norms(x: jax.Array, execution: Execution) -> jax.Array:
    """Return the Euclidean norm of each image's maps, [N, H, W, C] -> [N]."""
    return jnp.sqrt(jnp.square(x.astype(execution.param_dtype)).sum((1, 2, 3)))


def _standardized(kernel: jax.Array, epsilon: float) -> jax.Array:
    """Standardize a kernel [k, k, C, F] to mean 0 and variance 1 per output map."""
    mean, variance = (
        moment(ops.SPACE, keepdims=True) for moment in (kernel.mean, kernel.var)
    )
    return (kernel - mean) * lax.rsqrt(variance + epsilon)


def _group_normalized(x: jax.Array, plan: planning.NormPlan) -> jax.Array:
    """Normalize [N, H, W, C] to mean 0 and variance 1 per image and group of maps."""
    grouped = ops.widened(x).reshape(*x.shape[:3], plan.groups, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) * lax.rsqrt(variance + plan.epsilon)).reshape(x.shape)


def _averaged(x: Maps, side: int) -> jax.Array:
    """Average over ``side`` x ``side`` pixels, over fewer at the maps' edges."""
    x, sides = ops.value_of(x), (side, side)
    # linen divides in float32, and would not return bfloat16.
    y = nn.avg_pool(ops.widened(x), sides, sides, "SAME", count_include_pad=False)
    return y.astype(x.dtype)


def _max_pool(x: jax.Array, padding: str) -> jax.Array:
    """Max-pool 3x3 with stride 2, padded by one pixel on every side."""
    lowest = -jnp.inf if padding == "lowest" else 0.0
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x, around, constant_values=lowest)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
