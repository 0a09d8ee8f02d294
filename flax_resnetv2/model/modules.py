"""The article's hierarchy as linen modules: stem, stacks, units, layers, head.

Every module has two fields: ``plan``, what to build (see ``planning``), and
``execution``, how to run it. ``train`` is said at every call. Parameter paths are
the article's figure: ``stack2/unit1/layer3/conv/kernel``.

>>> model = create_model(Architecture(units=(1, 1), widths=(8, 16), strides=(1, 2)))
>>> images = jnp.zeros([4, 32, 32, 3])
>>> variables = model.init(jax.random.key(0), images, train=False)
>>> model.apply(variables, images, train=False).shape
(4, 10)
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import ops
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.planning import (
    ConvPlan,
    HeadPlan,
    LayerPlan,
    NetPlan,
    NormPlan,
    StackPlan,
    StemPlan,
    UnitPlan,
    plan,
)
from flax_resnetv2.model.presets import get_preset
from flax_resnetv2.validation import check_dataclass

_DRAWN = {
    "he_normal": (2.0, "fan_in", "truncated_normal"),
    "he_normal_fan_out": (2.0, "fan_out", "normal"),
    "uniform_fan_in": (1 / 3, "fan_in", "uniform"),
    "glorot_uniform": (1.0, "fan_avg", "uniform"),
}
"""Initial kernels that are drawn: variance times fan, which fan, distribution."""
_INITIALISERS = {
    name: nn.initializers.variance_scaling(*drawn) for name, drawn in _DRAWN.items()
} | {
    "normal_0.01": nn.initializers.normal(0.01),
    "zeros": nn.initializers.zeros_init(),
}


class Latent(NamedTuple):
    """What a latent head with ``latent_variance`` gives: two times [N, latent]."""

    mean: jax.Array
    log_variance: jax.Array


class Convolution(nn.Module):
    """[N, H, W, C] -> [N, H/stride, W/stride, width]; kernel [k, k, C, width]."""

    plan: ConvPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array | ops.PreActivation) -> jax.Array:
        """Convolve, and add the bias where the plan has one."""
        p, e = self.plan, self.execution
        maps = x.x if isinstance(x, ops.PreActivation) else x
        shape = (p.kernel, p.kernel, maps.shape[-1], p.width)
        kernel = self.param("kernel", _INITIALISERS[p.init], shape, e.param_dtype)
        if p.standardise is not None:
            kernel = _standardised(kernel, p.standardise)
        kernel = kernel.astype(maps.dtype)
        if e.derivatives == "automatic":
            x = x.value if isinstance(x, ops.PreActivation) else x
            y = ops.plain_convolution(x, kernel, p.stride, p.padding)
        else:
            recompute = e.remat != "nothing"
            y = ops.convolution(x, kernel, p.stride, p.padding, recompute)
        if p.bias:
            zeros = nn.initializers.zeros_init()
            y += self.param("bias", zeros, (p.width,), e.param_dtype).astype(y.dtype)
        return y


class NormReLU(nn.Module):
    """Normalisation, then ReLU, [N, H, W, C] -> the same.

    Parameters ``scale`` and ``bias`` [C]; in batch normalisation the running ``mean``
    and ``var`` [C] in the collection ``batch_stats``, of the biased variance, as in
    ``nn.BatchNorm``.
    """

    plan: NormPlan
    execution: Execution = Execution()

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Use the batch's statistics and keep them (train), or the running ones."""
        y = self.promise(x, train=train)
        if not isinstance(y, ops.PreActivation):
            return y
        return y.value if self.plan.relu else y.normalised

    @nn.compact
    def promise(self, x: jax.Array, *, train: bool) -> jax.Array | ops.PreActivation:
        """Do the same, but leave the computation to the convolution that reads it.

        Group normalisation is computed at once: each image has statistics of its own.
        """
        shape, e = x.shape[-1:], self.execution
        scale = self.param("scale", nn.initializers.ones_init(), shape, e.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, e.param_dtype)
        if self.plan.groups is not None:
            y = _group_normalised(x, self.plan) * scale + bias
            return (nn.relu(y) if self.plan.relu else y).astype(x.dtype)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, e.param_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, e.param_dtype)
        epsilon, keep = self.plan.epsilon, self.plan.momentum
        if not train:
            return ops.pre_activation(x, scale, bias, mean.value, var.value, epsilon)
        axis_name = None if self.is_initializing() else e.batch_norm_axis
        by_hand = e.derivatives == "by_hand"
        moments = ops.batch_moments if by_hand else ops.plain_moments
        batch = moments(x, axis_name)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            for running, now in zip((mean, var), batch, strict=True):
                now = jax.lax.stop_gradient(now)
                running.value = keep * running.value + (1 - keep) * now
        return ops.pre_activation(x, scale, bias, *batch, epsilon)


class ResidualLayer(nn.Module):
    """BN -> ReLU -> convolution, the article's full pre-activation.

    [N, H, W, C] -> [N, H/stride, W/stride, width].
    """

    plan: LayerPlan
    execution: Execution = Execution()

    def setup(self) -> None:
        """Name the two halves ``norm`` and ``conv``."""
        if self.plan.norm is not None:
            self.norm = NormReLU(self.plan.norm, self.execution)
        self.conv = Convolution(self.plan.conv, self.execution)

    def preactivate(
        self, x: jax.Array, *, train: bool
    ) -> jax.Array | ops.PreActivation:
        """BN -> ReLU, as a promise; nothing in the one layer that is excepted."""
        return x if self.plan.norm is None else self.norm.promise(x, train=train)

    def convolve(self, x: jax.Array | ops.PreActivation) -> jax.Array:
        """Convolve alone."""
        return self.conv(x)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Pre-activate, then convolve; in version 1 the other way round."""
        if self.plan.norm_last:
            return self.norm(self.conv(x), train=train)
        return self.convolve(self.preactivate(x, train=train))


class ResidualUnit(nn.Module):
    """Residual layers beside a shortcut; their sum, and nothing after the sum.

    [N, H, W, C] -> [N, H/stride, W/stride, width]. The shortcut is the identity, or a
    convolution where resolution or width changes. With the collection
    ``intermediates`` mutable it sows ``residual_ratio`` [N]: the norm of the residual
    over the norm of what the shortcut carries ("small at first"). (In version 1, with
    ``order="post"``, a ReLU follows the sum.)

    >>> unit = ResidualUnit(plan_unit(in_width=64, width=128, reduction=2, stride=2))
    """

    plan: UnitPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, keep: jax.Array | None = None
    ) -> jax.Array:
        """Add the filtered input to the unfiltered one.

        ``keep`` [N] multiplies each image's filtered part: 0 drops it.
        """
        first, *rest = [
            ResidualLayer(layer, self.execution, name=f"layer{number}")
            for number, layer in enumerate(self.plan.layers, start=1)
        ]
        p = self.plan
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
            carried = Convolution(p.shortcut, self.execution, name="shortcut")(carried)
        if p.shortcut_norm is not None:
            norm = NormReLU(p.shortcut_norm, self.execution, name="shortcut_norm")
            carried = norm(carried, train=train)
        for layer in rest:
            residual = layer(residual, train=train)
        if self.is_mutable_collection("intermediates"):
            dtype = self.execution.param_dtype
            ratio = _norms(residual, dtype) / jnp.maximum(_norms(carried, dtype), 1e-12)
            self.sow("intermediates", "residual_ratio", ratio)
        if keep is not None:
            scaled = residual.astype(keep.dtype) * keep[:, None, None, None]
            residual = scaled.astype(residual.dtype)
        y = carried + residual
        return nn.relu(y) if p.relu else y


class ResidualStack(nn.Module):
    """Residual units of one width and one resolution, and perhaps a bridge.

    [N, H, W, C] -> [N, H/stride, W/stride, width]; one unit has the stride. The bridge
    answers the article's open question: a shortcut around the whole stack.
    """

    plan: StackPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, keep: jax.Array | None = None
    ) -> jax.Array:
        """Run the units in order; add the bridge. ``keep`` [N, units] is theirs."""
        # What is made, or looked into, is run by modules one by one.
        seen = self.is_initializing() or self.is_mutable_collection("intermediates")
        y = x
        for number, unit in enumerate(self.plan.units, start=1):
            name, of_unit = f"unit{number}", None
            if keep is not None:
                of_unit = keep[:, number - 1]
            if train and not seen:
                y = self._train_unit(unit, name, y, of_unit)
            else:
                run = ResidualUnit(unit, self.execution, name=name)
                y = run(y, train=train, keep=of_unit)
        if self.plan.bridge == "identity":
            return y + x
        if self.plan.bridge is not None:
            return y + Convolution(self.plan.bridge, self.execution, name="bridge")(x)
        return y

    def _train_unit(
        self, plan: UnitPlan, name: str, x: jax.Array, keep: jax.Array | None
    ) -> jax.Array:
        """Run one of our units by the function that all equal units share."""
        variables = {
            kind: self.get_variable(kind, name)
            for kind in ("params", "batch_stats")
            if self.has_variable(kind, name)
        }
        y, stats = _train_unit(plan, self.execution, variables, x, keep)
        if stats and self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", name, stats)
        return y


class Stem(nn.Module):
    """The first layers: images [N, H, W, channels] -> maps for stack 1.

    Convolution -> BN -> ReLU, "in this order"; as planned, a second convolution that
    reduces resolution, and a max-pool.
    """

    plan: StemPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Run the planned convolutions, norms and the pool."""
        p = self.plan
        for number, (conv, norm) in enumerate(
            zip(p.convs, p.norms, strict=True), start=1
        ):
            suffix = str(number) if number > 1 else ""
            x = Convolution(conv, self.execution, name=f"conv{suffix}")(x)
            if norm is not None:
                x = NormReLU(norm, self.execution, name=f"norm{suffix}")(x, train=train)
        if p.pool is not None:
            x = _max_pool(x, p.pool)
        return x


class Head(nn.Module):
    """BN -> ReLU on the last maps [N, h, w, C], then what the plan asks for.

    classifier: logits [N, num_classes]. latent: [N, latent], or a ``Latent`` of two
    such. none: the maps themselves. All in ``execution.param_dtype``, but the maps.
    With the collection ``intermediates`` mutable a classifier sows what it reads,
    ``features`` [N, K].
    """

    plan: HeadPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array | Latent:
        """Normalise, pool or flatten, and run the fully connected layers."""
        p, dtype = self.plan, self.execution.param_dtype
        if p.norm is not None:
            x = NormReLU(p.norm, self.execution, name="norm")(x, train=train)
        if p.kind == "none":
            return x

        def dense(features: int, name: str) -> nn.Dense:
            init = _INITIALISERS[p.init]
            return nn.Dense(
                features, kernel_init=init, param_dtype=dtype, dtype=dtype, name=name
            )

        x = x.astype(dtype)
        x = x.mean((1, 2)) if p.pooled else x.reshape(x.shape[0], -1)
        for number, features in enumerate(p.hidden, start=1):
            x = nn.relu(dense(features, f"hidden{number}")(x))
        if p.kind == "classifier":
            if self.is_mutable_collection("intermediates"):
                self.sow("intermediates", "features", x)
            return dense(p.features, "classifier")(x)
        latent = dense(p.features, "latent")(x)
        if not p.variance:
            return latent
        return Latent(latent, dense(p.features, "log_variance")(x))


class ResNetV2(nn.Module):
    """Stem, stacks and head: images [N, H, W, channels] -> what the head gives."""

    plan: NetPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self, images: jax.Array, *, train: bool, keep: jax.Array | None = None
    ) -> jax.Array | Latent:
        """Apply the net to normalised images.

        Args:
            images: [N, H, W, channels] float.
            train: use and keep the batch's statistics (the collection ``batch_stats``
                must then be mutable), or use the running ones.
            keep: [N, units] float, in the order of the units of all stacks: multiplies
                what a unit adds to an image (stochastic depth); None: nothing does.
        """
        x = images.astype(self.execution.dtype)
        if self.plan.stem is not None:
            x = Stem(self.plan.stem, self.execution, name="stem")(x, train=train)
        first = 0
        for number, stack in enumerate(self.plan.stacks, start=1):
            run = ResidualStack(stack, self.execution, name=f"stack{number}")
            units = slice(first, first + len(stack.units))
            x = run(x, train=train, keep=None if keep is None else keep[:, units])
            first = units.stop
        return Head(self.plan.head, self.execution, name="head")(x, train=train)

    @nn.nowrap
    def init_in_one_draw(
        self, key: jax.Array, image_shape: tuple[int, int, int]
    ) -> dict[str, Any]:
        """Initialise as ``init`` does, but cut all kernels from one draw.

        ``init`` draws each kernel by itself, and XLA compiles each draw: that takes
        ten times as long, most of a minute for 1001 layers. The distributions are the
        same, the numbers are not. Fastest outside jit.

        Args:
            key: decides the numbers.
            image_shape: (height, width, channels).

        Returns:
            ``params`` and ``batch_stats``.
        """
        dtype = self.execution.param_dtype
        # Equal units have equal variables: one of each kind is traced.
        kinds = [list(dict.fromkeys(stack.units)) for stack in self.plan.stacks]
        stacks = [
            replace(stack, units=tuple(units))
            for stack, units in zip(self.plan.stacks, kinds, strict=True)
        ]
        small = ResNetV2(replace(self.plan, stacks=tuple(stacks)), self.execution)
        drawn: dict[tuple[str, ...], str] = {}

        def note(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            module = context.module
            if isinstance(module, Convolution):
                drawn["params", *module.path, "kernel"] = module.plan.init
            if isinstance(module, nn.Dense):
                drawn["params", *module.path, "kernel"] = self.plan.head.init
            return call(*args, **kwargs)

        def spread(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
            """The same for every unit of its kind."""
            whole = {}
            for (kind, part, *rest), leaf in leaves.items():
                if not rest or not rest[0].startswith("unit"):
                    whole[kind, part, *rest] = leaf
                    continue
                stack = int(part.removeprefix("stack")) - 1
                unit = kinds[stack][int(rest[0].removeprefix("unit")) - 1]
                for number, other in enumerate(self.plan.stacks[stack].units, start=1):
                    if other == unit:
                        whole[kind, part, f"unit{number}", *rest[1:]] = leaf
            return whole

        shapes: dict[str, dict[tuple[str, ...], tuple[int, ...]]] = {}

        @jax.jit
        def constants(key: jax.Array) -> dict[tuple[str, ...], jax.Array]:
            with nn.intercept_methods(note):
                images = jnp.zeros((1, *image_shape), dtype)
                leaves = spread(flatten_dict(small.init(key, images, train=False)))
            for path, init in spread(drawn).items():
                if init in _DRAWN:
                    shapes.setdefault(init, {})[path] = leaves.pop(path).shape
            return leaves

        leaves = constants(key)
        # linen's own keys are this one folded with hashes of paths, never so small.
        for number, (init, kernels) in enumerate(shapes.items()):
            leaves |= _cut(jax.random.fold_in(key, number), init, kernels, dtype)
        return unflatten_dict(leaves)


def create_model(
    architecture: Architecture | str = Architecture(),
    execution: Execution = Execution(),
    image_shape: tuple[int, int, int] | None = None,
) -> ResNetV2:
    """Plan ``architecture`` and give the module that runs the plan.

    Args:
        architecture: what to build, or the name of a preset.
        execution: how to run it.
        image_shape: (height, width, channels), to have resolutions checked; needed
            for an architecture without a stem.

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
    return ResNetV2(plan(architecture, image_shape), execution)


def _cut(
    key: jax.Array,
    init: str,
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    dtype: str,
) -> dict[tuple[str, ...], jax.Array]:
    """Draw kernels of these shapes in one piece."""
    variance, fan, distribution = _DRAWN[init]
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    unit = nn.initializers.variance_scaling(1.0, "fan_in", distribution)
    numbers = jax.jit(unit, static_argnums=(1, 2))(key, (1, int(ends[-1])), dtype)[0]
    # On the host, because XLA compiles every cut; when traced there is no choice.
    xp = jnp if isinstance(numbers, jax.core.Tracer) else np
    kernels = {}
    pieces = xp.split(xp.asarray(numbers), ends[:-1])
    for (path, shape), piece in zip(shapes.items(), pieces, strict=True):
        maps = {
            "fan_in": shape[-2],
            "fan_out": shape[-1],
            "fan_avg": (shape[-2] + shape[-1]) / 2,
        }[fan]
        spread = math.sqrt(variance / (math.prod(shape[:-2]) * maps))
        kernels[path] = piece.reshape(shape) * xp.asarray(spread, dtype)
    return jax.device_put(kernels)


@partial(jax.jit, static_argnums=(0, 1))
def _train_unit(
    plan: UnitPlan,
    execution: Execution,
    variables: dict[str, Any],
    x: jax.Array,
    keep: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Maps and new statistics of a residual unit in training.

    Under ``jit``, so that units of equal plans are traced, differentiated and lowered
    once: ResNet-164 has 54 units and 6 different ones.
    """

    def run(
        variables: dict[str, Any], x: jax.Array, keep: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        unit = ResidualUnit(plan, execution, parent=None)
        y, updated = unit.apply(
            variables, x, train=True, keep=keep, mutable=["batch_stats"]
        )
        return y, updated.get("batch_stats", {})

    if execution.remat == "units":
        run = jax.checkpoint(run)
    return run(variables, x, keep)


def _norms(x: jax.Array, dtype: str) -> jax.Array:
    """Euclidean norm of each image's maps, [N, H, W, C] -> [N], taken in ``dtype``."""
    return jnp.sqrt(jnp.square(x.astype(dtype)).sum((1, 2, 3)))


def _standardised(kernel: jax.Array, epsilon: float) -> jax.Array:
    """Kernel [k, k, C, F] with mean 0 and variance 1 for each of its F maps."""
    mean = kernel.mean((0, 1, 2))
    return (kernel - mean) * lax.rsqrt(kernel.var((0, 1, 2)) + epsilon)


def _group_normalised(x: jax.Array, plan: NormPlan) -> jax.Array:
    """[N, H, W, C] with mean 0 and variance 1 in each group of maps of each image."""
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    grouped = wide.reshape(*x.shape[:3], plan.groups, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) * lax.rsqrt(variance + plan.epsilon)).reshape(x.shape)


def _averaged(x: jax.Array | ops.PreActivation, side: int) -> jax.Array:
    """Averages of ``side`` x ``side`` pixels, of fewer where the maps end."""
    x = x.value if isinstance(x, ops.PreActivation) else x
    # linen counts the pixels in float32, and would leave bfloat16 there.
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    sides = (side,) * 2
    y = nn.avg_pool(wide, sides, sides, "SAME", count_include_pad=False)
    return y.astype(x.dtype)


def _max_pool(x: jax.Array, padding: str) -> jax.Array:
    """3x3, stride 2, one pixel of ``padding`` on every side."""
    lowest = -jnp.inf if padding == "lowest" else 0.0
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x, around, constant_values=lowest)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
