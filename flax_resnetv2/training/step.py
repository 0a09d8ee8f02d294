"""The training step: a pure function of state and batch.

It runs under any ``jit``. With an ``axis_name`` it also runs inside ``pmap`` or
``shard_map`` and computes the same on any number of devices. Metrics leave a step as
sums and counts, so they can be added up.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_resnetv2.data.batch import Batch
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.training.augment import AugmentConfig, augment, normalize, positions
from flax_resnetv2.training.objective import (
    Metrics,
    Objective,
    StepInputs,
    Sums,
    classification,
)
from flax_resnetv2.training.optimizers import (
    TrainConfig,
    make_optimizer,
    trainable_mask,
)
from flax_resnetv2.training.randaugment import change_pixels
from flax_resnetv2.training.random_streams import (
    RandomStream,
    image_keys,
    run_key,
    stream_keys,
)

if TYPE_CHECKING:
    from flax_resnetv2.model.autoencoder import Autoencoder
    from flax_resnetv2.model.modules import ResNetV2


@flax.struct.dataclass
class TrainState:
    """Everything that training changes; with the seed it determines all later steps."""

    step: jax.Array
    """int32, the number of steps done."""
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    """Moving averages {"params", "batch_stats"}, or None."""

    def variables(self) -> dict[str, Any]:
        """Return the variables to evaluate: the moving averages if there are any."""
        if self.ema is not None:
            return self.ema
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
    model: "ResNetV2 | Autoencoder",
    config: TrainConfig,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """Create the initial state. Pure; fastest outside ``jit``.

    Args:
        model, config: the net, and how it is trained.
        key: random key of the initial parameters.
        image_shape: (height, width, channels) of the net's input.
        steps_per_epoch: the length of an epoch in the schedule.
        variables: ``params`` and ``batch_stats`` to start from; None draws new ones.
    """
    if variables is None:
        variables = init_in_one_draw(model, key, image_shape)
    params, stats = variables["params"], variables.get("batch_stats", {})
    opt_state, ema = make_optimizer(config, steps_per_epoch).init(params), None
    if config.ema_decay:
        # A copy: the state is donated, and no buffer can be donated twice.
        ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats})
    return TrainState(jnp.zeros([], jnp.int32), params, stats, opt_state, ema)


def train_state_shapes(
    model: "ResNetV2 | Autoencoder",
    config: TrainConfig,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """Return the state of ``create_train_state`` as jax.ShapeDtypeStructs."""
    # Shapes do not depend on the rate, and a warm-up may not fit into one-step epochs.
    config = replace(config, schedule="constant", warmup_epochs=0.0)
    return jax.eval_shape(
        lambda: create_train_state(model, config, jax.random.key(0), image_shape, 1)
    )


@dataclass(frozen=True)
class TrainStep:
    """The pure training step ``step(state, batch) -> (state, metrics)``.

    It calls ``inputs``, ``loss`` and ``update``. ``make_train_step`` creates it.

    Metrics are sums over the images (``loss`` and, for a classifier, ``correct``) with
    their ``count``, and sums over the steps (``gradient_norm`` by part of the net) with
    ``steps``; ``finite_steps`` counts those whose loss and gradient were finite.
    """

    model: "ResNetV2 | Autoencoder"
    train: TrainConfig
    augmentation: AugmentConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    seed: int
    axis_name: str | None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Do one training step; the mean gradient is over all devices' images."""
        inputs, count = self.inputs(state.step, batch), self._total(batch.mask.sum())
        labels = batch._replace(image=None)

        def gradient_of(
            stats: Any, part: tuple[StepInputs, Batch]
        ) -> tuple[Any, tuple[Any, Sums]]:
            gradient, (stats, sums) = jax.grad(self.loss, has_aux=True)(
                state.params, stats, *part, count
            )
            return stats, (gradient, sums)

        parts = self.train.accumulation_steps
        stats, (gradient, sums) = accumulate_gradients(
            gradient_of, state.batch_stats, (inputs, labels), parts
        )
        gradient, sums = self._total((gradient, sums))
        if self.axis_name is not None:
            stats = lax.pmean(stats, self.axis_name)
        norms = {part: optax.tree.norm(g) for part, g in gradient.items()}
        finite = jnp.isfinite(jnp.stack([sums["loss"], *norms.values()])).all()
        steps = {"steps": jnp.int32(1), "finite_steps": finite.astype(jnp.int32)}
        metrics = {**sums, "count": count, **steps, "gradient_norm": norms}
        return self.update(state, gradient, stats), metrics

    def inputs(self, step: jax.Array, batch: Batch) -> StepInputs:
        """Augment this device's images and make their targets.

        Args:
            step: int32, the number of steps done; with the seed and each image's
                position in the global batch it determines all random choices.
            batch: this device's images.
        """
        dtype = self.model.execution.param_dtype
        at = positions(batch.label.shape[0], self.axis_name)
        keys = image_keys(run_key(self.seed), step, at)
        images = change_pixels(batch.image, keys, self.augmentation)
        images = normalize(images, self.augmentation, dtype)
        images = augment(images, keys, self.augmentation)
        inputs = self.objective.inputs(images, batch, keys, self.axis_name)
        if self.train.stochastic_depth:
            units = sum(len(stack.units) for stack in self.model.plan.stacks)
            scales = stochastic_depth_scales(keys, units, self.train.stochastic_depth)
            inputs.arguments["residual_scale"] = scales.astype(dtype)
        return inputs

    def loss(
        self,
        params: Any,
        batch_stats: Any,
        inputs: StepInputs,
        batch: Batch,
        count: jax.Array,
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        """Apply the net in training mode and sum the loss.

        Args:
            params, batch_stats: the net's variables.
            inputs: what ``inputs`` returned, or a part of its rows.
            batch: the labels and mask of the same rows; its image may be None.
            count: the number of unmasked images in the whole global batch.

        Returns:
            What these rows contribute to the global batch's mean loss, and
            (new statistics, metrics as sums over these rows).
        """
        if self.train.trainable == "classifier":
            params = jax.tree.map(
                lambda p, free: p if free else lax.stop_gradient(p),
                *(params, trainable_mask(params)),
            )
        outputs, updated = self.model.apply(
            {"params": params, "batch_stats": batch_stats},
            inputs.images,
            train=self.train.trainable == "all",
            mutable=["batch_stats"],
            **inputs.arguments,
        )
        sums = self.objective.train_metrics(outputs, inputs.target, batch)
        loss = sums["loss"]
        return loss / count.astype(loss.dtype), (updated.get("batch_stats", {}), sums)

    def update(self, state: TrainState, gradient: Any, batch_stats: Any) -> TrainState:
        """Apply the optimizer to the global mean gradient; update moving averages."""
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = self.optimizer.update(
                gradient, state.opt_state, state.params
            )
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if ema is not None:
            # In a run's first steps the average forgets its initial values faster.
            limit = (1 + state.step) / (10 + state.step)
            decay = jnp.minimum(self.train.ema_decay, limit)
            ema = jax.tree.map(
                lambda old, new: new + decay.astype(old.dtype) * (old - new),
                *(ema, {"params": params, "batch_stats": batch_stats}),
            )
        return TrainState(state.step + 1, params, batch_stats, opt_state, ema)

    def _total(self, tree: Any) -> Any:
        """Sum over the devices that share the batch."""
        return tree if self.axis_name is None else lax.psum(tree, self.axis_name)


def make_train_step(
    model: "ResNetV2 | Autoencoder",
    train: TrainConfig,
    augmentation: AugmentConfig,
    *,
    seed: int,
    steps_per_epoch: int,
    axis_name: str | None = None,
    objective: Objective | None = None,
) -> TrainStep:
    """Make the pure function ``step(state, batch) -> (state, metrics)``.

    Args:
        model: returns logits [B, classes], or what the objective compares.
        train, augmentation: how to train; ``augmentation.mean`` and ``std`` are set.
        seed: with the step number, determines the images' random keys.
        steps_per_epoch: the length of an epoch in the schedule.
        axis_name: the mapped axis that the batch is sharded over; None: not sharded.
        objective: what the net is trained for; None: classification.
    """
    if objective is None:
        objective = classification(model, augmentation, train.label_smoothing)
    optimizer = make_optimizer(train, steps_per_epoch)
    return TrainStep(model, train, augmentation, objective, optimizer, seed, axis_name)


def stochastic_depth_scales(keys: jax.Array, units: int, share: float) -> jax.Array:
    """Return the factor of each unit's residual branch for each image, [B, units].

    Unit u of L is dropped (factor 0) with probability ``share * u / L``. Survivors are
    scaled up, so that the expected factor is 1 and evaluation needs none.
    """
    dropped = share * jnp.arange(1, units + 1, dtype=float)[None] / units
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (units,), float))
    draws = uniform(stream_keys(keys, RandomStream.STOCHASTIC_DEPTH))
    return jnp.where(draws < dropped, 0, 1 / (1 - dropped))


def accumulate_gradients(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, parts: int
) -> tuple[Any, Any]:
    """Call ``function(carry, part) -> (carry, sums)`` for each part of a batch.

    Part k of n takes the positions p with p mod n = k. If n divides each device's
    share, these are also the positions of the global batch with p mod n = k, so the
    parts do not depend on the number of devices.

    Returns:
        The last carry, and the sums over all parts.
    """
    if parts == 1:
        return function(carry, batch)
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def more(so_far: tuple[Any, Any], part: Any) -> tuple[tuple[Any, Any], None]:
        carry, sums = so_far
        carry, found = function(carry, part)
        return (carry, jax.tree.map(jnp.add, sums, found)), None

    first = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, carry, first)[1])
    return lax.scan(more, (carry, zeros), batch)[0]
