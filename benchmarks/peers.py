"""The same net in plain linen, in PyTorch and in Keras, for comparison.

    python -m benchmarks.peers

Every peer interprets the same ``NetPlan``, has the same weights and compares its number
of parameters with the preset's, so a table compares only how a net is computed. The
command tests this on small nets: equal logits, and equal losses over a few training
steps. It prints the largest differences, and exits with 1 if one is too large.

A training step is cross-entropy and SGD with Nesterov's momentum on one batch that
stays on the device. Weight decay acts on all parameters; it is added to the gradient,
as in PyTorch, except in Keras, whose optimizers subtract it separately.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_resnetv2.data.batch import Batch
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.layer_table import layer_table
from flax_resnetv2.model.modules import ResNetV2, create_model
from flax_resnetv2.model.planning import ConvPlan, NetPlan, NormPlan, plan
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.model.semantics import ARTICLE, HE2016
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.optimizers import TrainConfig
from flax_resnetv2.training.step import create_train_state, make_train_step

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
MEAN, STD = 0.5, 0.25
"""Mean and standard deviation of the pixels in [0, 1], for every channel."""
PIXELS = AugmentConfig(crop_padding=0, flip=False, mean=(MEAN,) * 3, std=(STD,) * 3)
TRAIN = TrainConfig(
    learning_rate=LEARNING_RATE,
    momentum=MOMENTUM,
    nesterov=True,
    weight_decay=WEIGHT_DECAY,
    decay="all",
    schedule="constant",
)


@dataclass(frozen=True)
class Task:
    """One net and one batch, the same for every contestant."""

    name: str
    """Name of the preset, or any other name."""
    architecture: Architecture
    image_shape: tuple[int, int, int] = (32, 32, 3)
    batch: int = 128
    dtype: str = "float32"
    """Type of the computation; parameters are float32."""

    @classmethod
    def of_preset(cls, name: str, **fields: Any) -> "Task":
        """Return the task of the preset ``name``."""
        return cls(name, PRESETS[name].architecture, **fields)

    @property
    def plan(self) -> NetPlan:
        """The plan that every contestant builds.

        Raises:
            ValueError: the peers do not build such a net.
        """
        net = plan(self.architecture, self.image_shape)
        head = net.head
        if head.kind != "classifier" or not head.pooled or head.hidden:
            raise ValueError(f"{self.name}: rivals have a pooled classifier only")
        if net.stem is None or any(stack.bridge for stack in net.stacks):
            raise ValueError(f"{self.name}: rivals have a stem and no bridges")
        return net

    @property
    def parameters(self) -> int:
        """Number of parameters: of the preset, or else of the layer table."""
        if self.name in PRESETS:
            return PRESETS[self.name].parameters
        return sum(
            r.parameters
            for r in layer_table(
                plan(self.architecture, self.image_shape), self.image_shape
            )
        )

    @property
    def flops(self) -> int:
        """FLOPs of a forward pass for one image: two per multiply-add."""
        rows = layer_table(plan(self.architecture, self.image_shape), self.image_shape)
        return 2 * sum(row.multiply_adds for row in rows)

    def pixels(self) -> np.ndarray:
        """Return random images, uint8 [batch, height, width, channels]."""
        rng = np.random.default_rng(0)
        return rng.integers(0, 256, (self.batch, *self.image_shape), np.uint8)

    def images(self) -> np.ndarray:
        """Return the images of ``pixels``, normalized, as float32."""
        return ((self.pixels() / 255 - MEAN) / STD).astype(np.float32)

    def labels(self) -> np.ndarray:
        """Return random classes, int32 [batch]."""
        classes = self.architecture.num_classes
        return np.random.default_rng(1).integers(0, classes, self.batch, np.int32)


@dataclass(frozen=True)
class Contestant:
    """One implementation of a task. Its calls wait for their results."""

    train: Callable[[int], float]
    """Do this many training steps; return the loss of the last."""
    infer: Callable[[], Any]
    """Return logits [batch, classes] with the running statistics, on the device."""
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    """"train" and "inference" -> what is known of the compiled program."""
    step_text: str = ""
    """The compiled training step's HLO; nothing for rivals that do not show it."""


def ours(
    task: Task, variables: Any = None, execution: Execution = Execution()
) -> Contestant:
    """Make the contestant of this package; images enter its step as uint8."""
    execution = replace(execution, dtype=task.dtype)
    model = create_model(task.architecture, execution, task.image_shape)
    state = training_state(model, task, variables)
    _check_parameters(task, sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    step = make_train_step(model, TRAIN, PIXELS, seed=0, steps_per_epoch=1000)
    batch = jax.device_put(
        Batch(task.pixels(), task.labels(), np.ones(task.batch, bool))
    )

    def advance(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        state, metrics = step(state, batch)
        return state, metrics["loss"] / metrics["count"].astype(metrics["loss"].dtype)

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)

    # Copied, because the state's own buffers are given away by the first step.
    held = jax.tree.map(jnp.copy, state.variables())
    return _of_jax(advance, state, batch, apply, held, task)


def plain_linen(task: Task, variables: Any = None) -> Contestant:
    """Make the contestant in plain linen: nn.Conv, nn.BatchNorm, nn.relu, optax."""
    model = PlainLinen(task.plan, task.dtype)
    if variables is None:
        variables = draw_variables(task)
    variables = jax.tree.map(jnp.asarray, _renamed(variables))
    params, stats = variables["params"], variables["batch_stats"]
    _check_parameters(task, sum(leaf.size for leaf in jax.tree.leaves(params)))
    optimizer = optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True),
    )
    images, labels = jnp.asarray(task.images()), jnp.asarray(task.labels())

    def advance(state: Any, batch: Any) -> tuple[Any, jax.Array]:
        params, stats, opt_state = state
        images, labels = batch

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (loss, updated), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        change, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, change), updated, opt_state), loss

    def apply(variables: Any, images: jax.Array) -> jax.Array:
        return model.apply(variables, images, train=False)

    state = (params, stats, optimizer.init(params))
    held = jax.tree.map(jnp.copy, variables)
    return _of_jax(advance, state, (images, labels), apply, held, task)


class PlainLinen(nn.Module):
    """The textbook module; the reference for the speed of plain Flax."""

    plan: NetPlan
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits of normalized images [N, H, W, channels]."""

        def conv(name: str, p: ConvPlan, x: jax.Array) -> jax.Array:
            around = ((p.kernel - 1) // 2,) * 2
            return nn.Conv(
                p.width,
                (p.kernel, p.kernel),
                p.stride,
                padding="SAME" if p.padding == "same" else (around, around),
                use_bias=p.bias,
                dtype=self.dtype,
                name=name,
            )(x)

        def norm_relu(name: str, p: NormPlan, x: jax.Array) -> jax.Array:
            norm = nn.BatchNorm(
                not train, momentum=p.momentum, epsilon=p.epsilon, dtype=self.dtype,
                name=name,
            )  # fmt: skip
            return nn.relu(norm(x))

        def pool(padding: str, x: jax.Array) -> jax.Array:
            if padding == "zero":
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                return nn.max_pool(x, (3, 3), (2, 2))
            return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

        x = _features(self.plan, x.astype(self.dtype), conv, norm_relu, pool)
        x = x.astype(jnp.float32).mean((1, 2))
        return nn.Dense(self.plan.head.features, name="head_classifier")(x)


def keras_on_jax(task: Task, variables: Any = None) -> Contestant:
    """Make the contestant in Keras 3 on JAX, with its train_on_batch."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise RuntimeError("KERAS_BACKEND must be jax")
    if task.dtype != "float32":
        raise ValueError("the rival in Keras is float32 only")
    layers, net = keras.layers, task.plan

    def conv(name: str, p: ConvPlan, x: Any) -> Any:
        padding = "same"
        if p.padding == "symmetric":
            padding = "valid"
            if p.kernel > 1:
                x = layers.ZeroPadding2D((p.kernel - 1) // 2)(x)
        make = partial(layers.Conv2D, p.width, p.kernel, p.stride, padding)
        return make(use_bias=p.bias, name=name)(x)

    def norm_relu(name: str, p: NormPlan, x: Any) -> Any:
        norm = layers.BatchNormalization(
            momentum=p.momentum, epsilon=p.epsilon, name=name
        )
        return layers.ReLU()(norm(x))

    def pool(padding: str, x: Any) -> Any:
        lowest = -float("inf") if padding == "lowest" else 0.0
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = keras.ops.pad(x, around, constant_values=lowest)
        return layers.MaxPooling2D(3, 2)(x)

    entry = keras.Input(task.image_shape)
    x = layers.GlobalAveragePooling2D()(_features(net, entry, conv, norm_relu, pool))
    logits = layers.Dense(net.head.features, name="head_classifier")(x)
    model = keras.Model(entry, logits)
    _check_parameters(
        task, sum(int(np.prod(w.shape)) for w in model.trainable_variables)
    )
    tree = _renamed(draw_variables(task) if variables is None else variables)
    orders = ("kernel", "scale", "bias", "mean", "var")
    for name, values in tree["params"].items():
        values = values | tree["batch_stats"].get(name, {})
        model.get_layer(name).set_weights([values[k] for k in orders if k in values])
    model.compile(
        optimizer=keras.optimizers.SGD(
            LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    images, labels = jnp.asarray(task.images()), jnp.asarray(task.labels())

    def train(steps: int) -> float:
        for _ in range(steps):
            loss = model.train_on_batch(images, labels)
        return float(loss)

    return Contestant(train, lambda: model.predict_on_batch(images))


def pytorch(
    task: Task,
    variables: Any = None,
    device: str = "cpu",
    compile_mode: str | None = None,
) -> Contestant:
    """PyTorch, channels_last; eager, or ``torch.compile`` in ``compile_mode``.

    Not float32 means autocast to ``task.dtype``. The optimizer is the fused SGD.
    """
    import torch

    from benchmarks.measure import usable_cores

    if device == "cpu":
        torch.set_num_threads(usable_cores())
    else:
        torch.backends.cudnn.benchmark = True
    net = torch_net(task.plan)
    _check_parameters(task, sum(p.numel() for p in net.parameters()))
    _load_torch(net, draw_variables(task) if variables is None else variables)
    net = net.to(device, memory_format=torch.channels_last)
    run = net if compile_mode is None else torch.compile(net, mode=compile_mode)
    optimizer = torch.optim.SGD(
        net.parameters(),
        LEARNING_RATE,
        MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        nesterov=True,
        fused=True,
    )
    # A transposed NHWC array is what PyTorch calls channels_last.
    images = torch.from_numpy(task.images()).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(task.labels()).long().to(device)
    half = torch.autocast(
        torch.device(device).type,
        dtype=getattr(torch, task.dtype),
        enabled=task.dtype != "float32",
    )

    def train(steps: int) -> float:
        net.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with half:
                loss = torch.nn.functional.cross_entropy(run(images), labels)
            loss.backward()
            optimizer.step()
        if device != "cpu":
            torch.cuda.synchronize()
        return loss.item()

    def infer() -> Any:
        net.eval()
        with torch.inference_mode(), half:
            logits = run(images)
        if device != "cpu":
            torch.cuda.synchronize()
        return logits

    return Contestant(train, infer)


def torch_net(net: NetPlan) -> Any:
    """Build ``net`` as a ``torch.nn.Module``: NCHW images in, logits out.

    Its attribute ``places`` maps our paths to its modules.
    """
    import torch
    from torch import nn as tnn

    places: dict[str, Any] = {}

    class SamePad(tnn.Module):
        """SAME padding of a strided convolution: the odd pixel at the end."""

        def __init__(self, kernel: int, stride: int) -> None:
            super().__init__()
            self.kernel, self.stride = kernel, stride

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pads = []
            for size in (x.shape[3], x.shape[2]):
                reach = (-(-size // self.stride) - 1) * self.stride + self.kernel
                total = max(reach - size, 0)
                pads += [total // 2, total - total // 2]
            return tnn.functional.pad(x, pads)

    class Unit(tnn.Module):
        """Pre-activated residual unit."""

        def __init__(self, first: Any, rest: Any, shortcut: Any, shared: bool) -> None:
            super().__init__()
            self.first, self.rest, self.shortcut = first, rest, shortcut
            self.shared = shared

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            active = self.first(x)
            if self.shortcut is not None:
                x = self.shortcut(active if self.shared else x)
            return x + self.rest(active)

    def conv(path: str, p: ConvPlan) -> list[Any]:
        exact = p.stride > 1 and p.kernel > 1 and p.padding == "same"
        around = 0 if exact else (p.kernel - 1) // 2
        places[path] = tnn.Conv2d(
            p.in_width, p.width, p.kernel, p.stride, around, bias=p.bias
        )
        pad = [SamePad(p.kernel, p.stride)] if exact else []
        return [*pad, places[path]]

    def norm_relu(path: str, p: NormPlan | None) -> list[Any]:
        if p is None:
            return []
        width = widths[path]
        places[path] = tnn.BatchNorm2d(width, eps=p.epsilon, momentum=1 - p.momentum)
        return [places[path], tnn.ReLU(inplace=True)]

    widths = dict(_norm_widths(net))
    parts: list[Any] = []
    for number, (p, norm) in enumerate(
        zip(net.stem.convs, net.stem.norms, strict=True), start=1
    ):
        suffix = str(number) if number > 1 else ""
        parts += conv(f"stem/conv{suffix}", p)
        parts += norm_relu(f"stem/norm{suffix}", norm)
    if net.stem.pool == "lowest":
        parts.append(tnn.MaxPool2d(3, 2, padding=1))
    elif net.stem.pool == "zero":
        parts += [tnn.ZeroPad2d(1), tnn.MaxPool2d(3, 2)]
    for s, stack in enumerate(net.stacks, start=1):
        for u, unit in enumerate(stack.units, start=1):
            path = f"stack{s}/unit{u}"
            first = norm_relu(f"{path}/layer1/norm", unit.layers[0].norm)
            rest = conv(f"{path}/layer1/conv", unit.layers[0].conv)
            for number, layer in enumerate(unit.layers[1:], start=2):
                rest += norm_relu(f"{path}/layer{number}/norm", layer.norm)
                rest += conv(f"{path}/layer{number}/conv", layer.conv)
            shortcut = None
            if unit.shortcut is not None:
                shortcut = tnn.Sequential(*conv(f"{path}/shortcut", unit.shortcut))
            parts.append(
                Unit(
                    tnn.Sequential(*first),
                    tnn.Sequential(*rest),
                    shortcut,
                    unit.shared_preactivation,
                )
            )
    parts += norm_relu("head/norm", net.head.norm)
    width = net.stacks[-1].units[-1].layers[-1].conv.width
    places["head/classifier"] = tnn.Linear(width, net.head.features)
    parts += [tnn.AdaptiveAvgPool2d(1), tnn.Flatten(), places["head/classifier"]]
    module = tnn.Sequential(*parts)
    module.places = places
    return module


CONTESTANTS: dict[str, Callable[[Task], Contestant]] = {
    "ours": ours,
    "linen": plain_linen,
    "keras": keras_on_jax,
    "torch": pytorch,
}
"""The contestants on a CPU, in float32."""
ALTERNATIVES: dict[str, Callable[[Task], Contestant]] = {
    "ours": ours,
    "ours-remat-nothing": partial(ours, execution=Execution(remat="nothing")),
    "ours-remat-units": partial(ours, execution=Execution(remat="units")),
    "ours-automatic": partial(
        ours, execution=Execution(remat="nothing", backward="automatic")
    ),
}
"""All kinds of ``Execution`` with equal results, the default first."""


def draw_variables(task: Task, seed: int = 0, stir: bool = False) -> dict[str, Any]:
    """Draw weights from a seed, as our tree of numpy arrays.

    Kernels are small enough for finite values in the deepest net with initial
    statistics; no initialization is compiled.

    Args:
        task: the net.
        seed: seed of the draws.
        stir: also draw scales, biases and statistics, for comparing nets.
    """
    model = create_model(task.architecture, Execution(), task.image_shape)
    images = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.float32)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "kernel":
            value = (
                rng.normal(size=leaf.shape) * (0.5 / np.prod(leaf.shape[:-1])) ** 0.5
            )
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape) if stir else np.ones(leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * 0.3 * stir
        return value.astype(np.float32)

    return jax.tree.map_with_path(draw, dict(shapes))


def training_state(model: ResNetV2, task: Task, variables: Any = None) -> Any:
    """Return our state at step 0 with drawn weights; nothing is compiled for it."""
    shapes = jax.eval_shape(
        partial(
            create_train_state,
            model,
            TRAIN,
            image_shape=task.image_shape,
            steps_per_epoch=1000,
        ),
        key=jax.random.key(0),
    )
    if variables is None:
        variables = draw_variables(task)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.device_put(
        state.replace(params=variables["params"], batch_stats=variables["batch_stats"])
    )


def compiled(function: Callable, *args: Any, donate: tuple[int, ...] = ()) -> tuple:
    """Compile ``function`` for ``args``; return the program and facts about it.

    Returns:
        The program, and seconds of lowering and compiling, ``temp_bytes`` of its
        buffers, and ``bytes_accessed`` (what its operations read and write, as XLA
        counts it), where the backend says them.
    """
    began = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donate).lower(*args)
    between = time.perf_counter()
    program = lowered.compile()
    facts = {
        "lower_seconds": round(between - began, 3),
        "compile_seconds": round(time.perf_counter() - between, 3),
    }
    if (memory := program.memory_analysis()) is not None:
        facts["temp_bytes"] = memory.temp_size_in_bytes
    cost = program.cost_analysis() or {}
    if isinstance(cost, list):
        cost = cost[0]
    if "bytes accessed" in cost:
        facts["bytes_accessed"] = cost["bytes accessed"]
    return program, facts


def forget() -> None:
    """Free what finished contestants still hold."""
    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()
    jax.clear_caches()
    gc.collect()


def _of_jax(
    advance: Callable, state: Any, batch: Any, apply: Callable, held: Any, task: Task
) -> Contestant:
    """Compile ``advance(state, batch) -> (state, loss)``, ``apply(held, images)``."""
    images = jnp.asarray(task.images())
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        step, train_facts = compiled(advance, state, batch, donate=(0,))
    forward, facts = compiled(apply, held, images)

    def train(steps: int) -> float:
        nonlocal state
        for _ in range(steps):
            state, loss = step(state, batch)
        jax.block_until_ready(state)
        return float(loss)

    def infer() -> jax.Array:
        return jax.block_until_ready(forward(held, images))

    facts = {"train": train_facts, "inference": facts}
    return Contestant(train, infer, facts, step.as_text())


def _features(
    net: NetPlan, x: Any, conv: Callable, norm_relu: Callable, pool: Callable
) -> Any:
    """Apply ``net`` up to the pooling, with the layers of any framework.

    Each callable takes a layer's name (our path with "_" for "/"), its plan and its
    input.
    """
    for number, (p, norm) in enumerate(
        zip(net.stem.convs, net.stem.norms, strict=True), start=1
    ):
        suffix = str(number) if number > 1 else ""
        x = conv(f"stem_conv{suffix}", p, x)
        if norm is not None:
            x = norm_relu(f"stem_norm{suffix}", norm, x)
    if net.stem.pool is not None:
        x = pool(net.stem.pool, x)
    for s, stack in enumerate(net.stacks, start=1):
        for u, unit in enumerate(stack.units, start=1):
            carried = residual = x
            for number, layer in enumerate(unit.layers, start=1):
                name = f"stack{s}_unit{u}_layer{number}"
                if layer.norm is not None:
                    residual = norm_relu(f"{name}_norm", layer.norm, residual)
                if number == 1 and unit.shortcut is not None:
                    source = residual if unit.shared_preactivation else x
                    name_of_shortcut = f"stack{s}_unit{u}_shortcut"
                    carried = conv(name_of_shortcut, unit.shortcut, source)
                residual = conv(f"{name}_conv", layer.conv, residual)
            x = carried + residual
    if net.head.norm is not None:
        x = norm_relu("head_norm", net.head.norm, x)
    return x


def _norm_widths(net: NetPlan) -> Iterator[tuple[str, int]]:
    """Yield ("stack2/unit1/layer3/norm", its maps) for every norm."""
    for number, p in enumerate(net.stem.convs, start=1):
        yield f"stem/norm{number if number > 1 else ''}", p.width
    width = net.stem.convs[-1].width
    for s, stack in enumerate(net.stacks, start=1):
        for u, unit in enumerate(stack.units, start=1):
            for number, layer in enumerate(unit.layers, start=1):
                yield f"stack{s}/unit{u}/layer{number}/norm", width
                width = layer.conv.width
    yield "head/norm", width


def _leaves(variables: Any) -> Iterator[tuple[str, str, str, np.ndarray]]:
    """Yield (collection, "stack1/unit1/layer1/conv", "kernel", array)."""
    for path, leaf in jax.tree.leaves_with_path(variables):
        collection, *names, last = [key.key for key in path]
        yield collection, "/".join(names), last, np.asarray(leaf)


def _renamed(variables: Any) -> dict[str, Any]:
    """Return our tree with one flat name per layer, as the peers name their layers."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for collection, path, last, leaf in _leaves(variables):
        tree[collection].setdefault(path.replace("/", "_"), {})[last] = leaf
    return tree


def _load_torch(net: Any, variables: Any) -> None:
    """Copy our tree into the modules of ``torch_net``; it fills all of them."""
    import torch

    names = {"scale": "weight", "mean": "running_mean", "var": "running_var"}
    missing = {
        (path, name)
        for path, module in net.places.items()
        for name in module.state_dict()
        if name != "num_batches_tracked"
    }
    for _, path, last, leaf in _leaves(variables):
        name = names.get(last, last)
        if last == "kernel":
            name = "weight"
            leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        target = getattr(net.places[path], name)
        if target.shape != leaf.shape:
            raise RuntimeError(f"{path}/{last}: {leaf.shape}, not {target.shape}")
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.array(leaf)))
        missing.remove((path, name))
    if missing:
        raise RuntimeError(f"not set: {sorted(missing)}")


def _check_parameters(task: Task, count: int) -> None:
    if count != task.parameters:
        raise RuntimeError(f"{task.name}: {count} parameters, not {task.parameters}")


PARITY = {
    "like-article": Architecture(
        units=(2, 1), widths=(16, 32), strides=(1, 2), stem_width=16, semantics=ARTICLE
    ),
    "like-he2016": Architecture(
        units=(1, 2), widths=(16, 32), strides=(1, 2), reduction=4, stem_width=8,
        semantics=HE2016,
    ),
    "strided-3x3": Architecture(
        units=(1, 1), widths=(8, 16), strides=(1, 2), stem_width=8,
        stem_kernel=7, stem_stride=2, stem_pool=True,
        semantics=replace(HE2016, stride_layer=2, shortcut_kernel=3),
    ),
    "symmetric": Architecture(
        units=(1, 1), widths=(8, 16), strides=(1, 2), stem_width=8,
        stem_second_stride=2, unit="basic", reduction=1,
        semantics=replace(
            ARTICLE, padding="symmetric", projection="every_stack",
            biases=("stem", "layer1", "layer2", "shortcut"), norm_epsilon=1e-3,
            norm_momentum=0.8,
        ),
    ),
}  # fmt: skip
"""Small nets that together cover everything in which plans can differ."""


def difference(
    task: Task, rival: Callable[..., Contestant], steps: int = 3
) -> tuple[float, float]:
    """Return the largest relative differences of ``rival`` from us, with equal weights.

    Returns:
        Of the logits (over the largest logit), and of the losses of ``steps`` training
        steps (each over our loss).
    """
    variables = draw_variables(task, stir=True)
    us, them = ours(task, variables), rival(task, variables)
    expected, got = (np.asarray(c.infer(), np.float32) for c in (us, them))
    logits = np.abs(got - expected).max() / np.abs(expected).max()
    losses = [
        abs(b - a) / a for a, b in ((us.train(1), them.train(1)) for _ in range(steps))
    ]
    return float(logits), float(max(losses))


TOLERANCE = {"linen": (1e-5, 1e-4), "torch": (1e-5, 1e-4), "keras": (1e-5, 1e-3)}
"""Tolerances of logits and losses in float32; Keras applies weight decay elsewhere."""


def main() -> int:
    """Print the differences of all peers on all small nets; 1 if one is too large."""
    wrong = 0
    for name, architecture in PARITY.items():
        for size in (16, 15):
            task = Task(name, architecture, (size, size, 3), batch=8)
            for rival, limits in TOLERANCE.items():
                found = difference(task, CONTESTANTS[rival])
                fits = all(a <= b for a, b in zip(found, limits, strict=True))
                wrong += not fits
                print(
                    f"{name:<13} {size}x{size} {rival:<6} logits {found[0]:.1e} "
                    f"losses {found[1]:.1e} {'equal' if fits else 'DIFFERENT'}",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
