"""Initial variables of a net, with one random draw per distribution.

linen's ``init`` draws each kernel separately and XLA compiles each draw, which takes
most of a minute for 1001 layers. ``init_in_one_draw`` draws all kernels of one
distribution at once and splits them, ten times as fast. The distributions are the same,
the numbers are not.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2.model.autoencoder import Autoencoder, Decoder
from flax_resnetv2.model.modules import Convolution, ResNetV2
from flax_resnetv2.model.semantics import VARIANCE_SCALING

Path = tuple[str, ...]
Shape = tuple[int, ...]


def init_in_one_draw(
    model: ResNetV2 | Autoencoder, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    """Return initial ``params`` and ``batch_stats``, as ``init`` does but faster.

    It is fastest outside ``jit``. An autoencoder's decoder, which is small, is
    initialized by linen's ``init``. ``image_shape`` is (height, width, channels).
    """
    if not isinstance(model, Autoencoder):
        return _init_net(model, key, image_shape)
    net_key, decoder_key = jax.random.split(key)
    net = ResNetV2(model.plan, model.execution)
    variables = _init_net(net, net_key, image_shape)
    decoder = Decoder(model.decoder_plan, model.execution)
    vector = jnp.zeros((1, model.plan.head.features), model.execution.param_dtype)
    init = jax.jit(lambda key: decoder.init(key, vector, train=False))
    for collection, tree in init(decoder_key).items():
        variables[collection] = {**variables.get(collection, {}), "decoder": tree}
    return variables


def _init_net(
    model: ResNetV2, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, Any]:
    plan, dtype = model.plan, model.execution.param_dtype
    # Equal units have equal variables, so one unit of each kind is traced.
    kinds = [list(dict.fromkeys(stack.units)) for stack in plan.stacks]
    stacks = [
        replace(stack, units=tuple(units))
        for stack, units in zip(plan.stacks, kinds, strict=True)
    ]
    small = ResNetV2(replace(plan, stacks=tuple(stacks)), model.execution)
    initializers: dict[Path, str] = {}

    def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """Record the initializer of each kernel."""
        layer = context.module
        if isinstance(layer, Convolution | nn.Dense):
            p = plan.head if isinstance(layer, nn.Dense) else layer.plan
            initializers["params", *layer.path, "kernel"] = p.init
        return call(*args, **kwargs)

    def spread(leaves: dict[Path, Any]) -> dict[Path, Any]:
        """Copy the entries of each traced unit to all units of its kind."""
        whole = {}
        for (collection, part, *rest), leaf in leaves.items():
            if not rest or not rest[0].startswith("unit"):
                whole[collection, part, *rest] = leaf
                continue
            stack = int(part.removeprefix("stack")) - 1
            unit = kinds[stack][int(rest[0].removeprefix("unit")) - 1]
            for number, other in enumerate(plan.stacks[stack].units, start=1):
                if other == unit:
                    whole[collection, part, f"unit{number}", *rest[1:]] = leaf
        return whole

    shapes: dict[str, dict[Path, Shape]] = {}

    @jax.jit
    def constants(key: jax.Array) -> dict[Path, jax.Array]:
        """Return all but the drawn kernels, and record their ``shapes``."""
        with nn.intercept_methods(record):
            images = jnp.zeros((1, *image_shape), dtype)
            leaves = spread(flatten_dict(small.init(key, images, train=False)))
        for path, name in spread(initializers).items():
            if name in VARIANCE_SCALING:
                shapes.setdefault(name, {})[path] = leaves.pop(path).shape
        return leaves

    leaves = constants(key)
    # linen folds hashes of paths into its keys, which are never so small.
    for number, (name, kernels) in enumerate(shapes.items()):
        leaves |= _draw(jax.random.fold_in(key, number), name, kernels, dtype)
    return unflatten_dict(leaves)


def _draw(
    key: jax.Array, name: str, shapes: dict[Path, Shape], dtype: str
) -> dict[Path, jax.Array]:
    """Draw kernels of these shapes at once, by the initializer ``name``."""
    variance, fan, distribution = VARIANCE_SCALING[name]
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    unit = nn.initializers.variance_scaling(1.0, "fan_in", distribution)
    numbers = jax.jit(unit, static_argnums=(1, 2))(key, (1, int(ends[-1])), dtype)[0]
    # Split on the host, because XLA would compile each slice; not possible in a trace.
    xp = jnp if isinstance(numbers, jax.core.Tracer) else np
    kernels = {}
    pieces = xp.split(xp.asarray(numbers), ends[:-1])
    for (path, shape), piece in zip(shapes.items(), pieces, strict=True):
        ins, outs = shape[-2:]
        maps = {"fan_in": ins, "fan_out": outs, "fan_avg": (ins + outs) / 2}[fan]
        scale = math.sqrt(variance / (math.prod(shape[:-2]) * maps))
        kernels[path] = piece.reshape(shape) * xp.asarray(scale, dtype)
    return jax.device_put(kernels)
