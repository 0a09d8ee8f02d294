"""The training step and what it is made of: pure functions, no input or output.

``make_train_step`` runs in anybody's ``jit``; with an ``axis_name`` it also runs inside
``pmap`` or ``shard_map``, and computes the same for any number of devices. Metrics
leave a step as sums and counts, so that they can be added up.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_resnetv2.training.augment import (
    AugmentConfig,
    Batch,
    augment,
    draw_keys,
    image_keys,
    normalise,
    positions,
)
from flax_resnetv2.training.objective import Classification, Objective, Question, Sums
from flax_resnetv2.training.optimizers import TrainConfig, learns, make_optimizer
from flax_resnetv2.training.randaugment import change_pixels

if TYPE_CHECKING:
    from flax_resnetv2.model.autoencoder import Autoencoder
    from flax_resnetv2.model.modules import ResNetV2

Metrics = dict[str, Any]
DEPTH = 6
"""The use of an image's key for stochastic depth, beside those of its pixels."""


@flax.struct.dataclass
class TrainState:
    """All that a run is: with the seed, it decides everything that follows."""

    step: jax.Array
    """int32, steps done."""
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    """{"params", "batch_stats"} averaged, or None."""

    def variables(self) -> dict[str, Any]:
        """What to evaluate: the averages where they are kept."""
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
    """Initial parameters, statistics and optimiser state; pure, fastest outside jit.

    Args:
        model: the net.
        config: how it is trained.
        key: of what is drawn.
        image_shape: (height, width, channels) of what the net sees.
        steps_per_epoch: the schedule's epoch.
        variables: ``params`` and ``batch_stats`` to start from; None: drawn.
    """
    if variables is None:
        variables = model.init_in_one_draw(key, image_shape)
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        batch_stats=stats,
        opt_state=make_optimizer(config, steps_per_epoch).init(params),
        # A copy: the state is donated, and no buffer can be given away twice.
        ema=jax.tree.map(jnp.copy, {"params": params, "batch_stats": stats})
        if config.ema
        else None,
    )


def train_state_shapes(
    model: "ResNetV2 | Autoencoder",
    config: TrainConfig,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """``create_train_state`` without its numbers: a state of jax.ShapeDtypeStruct."""

    # They do not depend on the rate, and a warm-up may not fit in epochs of one step.
    config = replace(config, schedule="constant", warmup_epochs=0.0)

    def create() -> TrainState:
        key = jax.random.key(0)
        return create_train_state(model, config, key, image_shape, steps_per_epoch=1)

    return jax.eval_shape(create)


def make_train_step(
    model: "ResNetV2 | Autoencoder",
    train: TrainConfig,
    augmentation: AugmentConfig,
    *,
    seed: int,
    steps_per_epoch: int,
    axis_name: str | None = None,
    objective: Objective | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the pure function ``step(state, batch) -> (state, metrics)``.

    Args:
        model: gives logits [B, classes], or what the objective asks for.
        train: how the net learns.
        augmentation: what is done to images; its ``mean`` and ``std`` are set.
        seed: of the images' random keys, with the step number.
        steps_per_epoch: the schedule's epoch.
        axis_name: the mapped axis that shares the batch; None: there is none.
        objective: what the net is trained for; None: classification.

    The metrics are sums over the images (``loss`` and, of a classifier, ``correct``)
    with their ``count``, and over the steps (``gradient_norm`` by part of the net) with
    ``steps``, of which ``finite_steps`` had a finite loss and gradient.
    """
    optimizer = make_optimizer(train, steps_per_epoch)
    dtype = model.execution.param_dtype
    if objective is None:
        objective = classification(model, augmentation, train.label_smoothing)

    def total(tree: Any) -> Any:
        return tree if axis_name is None else lax.psum(tree, axis_name)

    def pose(state: TrainState, batch: Batch) -> Question:
        places = positions(batch.label.shape[0], axis_name)
        keys = image_keys(jax.random.key(seed), state.step, places)
        images = change_pixels(batch.image, keys, augmentation)
        images = normalise(images, augmentation, dtype)
        images = augment(images, keys, augmentation)
        question = objective.pose(images, batch, keys, axis_name)
        if train.stochastic_depth:
            units = sum(len(stack.units) for stack in model.plan.stacks)
            keep = keep_factors(keys, units, train.stochastic_depth)
            question.inputs["keep"] = keep.astype(dtype)
        return question

    def loss_of(
        params: Any, stats: Any, question: Question, batch: Batch, count: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Sums]]:
        """The share of some images in the batch's mean loss; new statistics, sums."""
        if train.learn == "classifier":
            params = jax.tree.map(
                lambda p, free: p if free else lax.stop_gradient(p),
                *(params, learns(params)),
            )
        outputs, updated = model.apply(
            {"params": params, "batch_stats": stats},
            question.images,
            train=train.learn == "all",
            mutable=["batch_stats"],
            **question.inputs,
        )
        sums = objective.score(outputs, question.target, batch)
        loss = sums["loss"]
        return loss / count.astype(loss.dtype), (updated.get("batch_stats", {}), sums)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        question, count = pose(state, batch), total(batch.mask.sum())

        def gradient_of(stats: Any, part: tuple[Question, Batch]) -> tuple[Any, tuple]:
            """Statistics after some images, and sums over these images."""
            gradient, (stats, sums) = jax.grad(loss_of, has_aux=True)(
                state.params, stats, *part, count
            )
            return stats, (gradient, sums)

        whole = question, batch._replace(image=None)
        stats, sums = in_parts(gradient_of, state.batch_stats, whole, train.accumulate)
        gradient, sums = total(sums)
        if axis_name is not None:
            stats = lax.pmean(stats, axis_name)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params
            )
        params = optax.apply_updates(state.params, updates)
        averaged = _average(state, {"params": params, "batch_stats": stats}, train.ema)
        norms = {k: optax.tree.norm(g) for k, g in gradient.items()}
        finite = jnp.isfinite(jnp.stack([sums["loss"], *norms.values()])).all()
        metrics = {
            **sums,
            "count": count,
            "steps": jnp.ones([], jnp.int32),
            "finite_steps": finite.astype(jnp.int32),
            "gradient_norm": norms,
        }
        new = TrainState(state.step + 1, params, stats, opt_state, averaged)
        return new, metrics

    return step


def keep_factors(keys: jax.Array, units: int, share: float) -> jax.Array:
    """What multiplies each unit's residual for each image, [B, units].

    Unit u of L is dropped (0) with the probability ``share * u / L``; else its residual
    is scaled up, so that on average it is what it is in evaluation.
    """
    dropped = share * jnp.arange(1, units + 1, dtype=float) / units
    draw = jax.vmap(lambda key: jax.random.uniform(key, (units,), float))
    return jnp.where(draw(draw_keys(keys, DEPTH)) < dropped, 0, 1 / (1 - dropped))


def in_parts(
    function: Callable[[Any, Any], tuple[Any, Any]], carry: Any, batch: Any, parts: int
) -> tuple[Any, Any]:
    """Call ``function(carry, part) -> (carry, sums)`` for part after part of a batch.

    Part k of a consists of the places p with p mod a = k, here and, as a divides each
    device's share, of the global batch: it does not depend on the devices either.

    Returns:
        The last carry, and the sums of all parts.
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
    shapes = jax.eval_shape(function, carry, first)[1]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return lax.scan(more, (carry, zeros), batch)[0]


def _average(state: TrainState, variables: dict[str, Any], share: float) -> Any:
    """Move the averages towards ``variables``; None where none are kept."""
    if state.ema is None:
        return None
    # While the run is young the average forgets its start faster.
    keep = jnp.minimum(share, (1 + state.step) / (10 + state.step))
    return jax.tree.map(
        lambda old, new: new + keep.astype(old.dtype) * (old - new),
        state.ema,
        variables,
    )


def make_eval_step(
    model: "ResNetV2 | Autoencoder",
    augmentation: AugmentConfig,
    *,
    axis_name: str | None = None,
    objective: Objective | None = None,
) -> Callable[[dict[str, Any], Batch], Metrics]:
    """Make the pure function ``step(variables, batch) -> metrics``.

    Masked sums: those of the objective (of a classifier ``loss`` and ``correct``, and
    of ``TOP5_CLASSES`` classes or more ``correct_top5``), ``count``, and
    ``residual_ratio`` of every unit, as {"stack1": {"unit1": ...}} (see
    ``ResidualUnit``).
    """
    objective = objective or classification(model, augmentation)
    stacks = [f"stack{k}" for k in range(1, len(model.plan.stacks) + 1)]

    def step(variables: dict[str, Any], batch: Batch) -> Metrics:
        images = normalise(batch.image, augmentation, model.execution.param_dtype)
        outputs, sown = evaluated(model, variables, images, augmentation.test_flip)
        ratios = {
            stack: {
                unit: jnp.where(batch.mask, values["residual_ratio"][0], 0).sum()
                for unit, values in sown["intermediates"][stack].items()
            }
            for stack in stacks
        }
        metrics = {
            **objective.examine(outputs, images, batch),
            "count": batch.mask.sum(),
            "residual_ratio": ratios,
        }
        return metrics if axis_name is None else lax.psum(metrics, axis_name)

    return step


def classification(
    model: "ResNetV2 | Autoencoder", augmentation: AugmentConfig, smoothing: float = 0.0
) -> Classification:
    """The objective of a net that gives logits."""
    dtype, classes = model.execution.param_dtype, model.plan.head.features
    return Classification(classes, dtype, augmentation, smoothing)


def evaluated(
    model: "ResNetV2 | Autoencoder",
    variables: dict[str, Any],
    images: jax.Array,
    flip: bool,
) -> tuple[Any, Any]:
    """What the net gives for normalised images, and what the modules sow of them.

    With ``flip`` the logits are the means of an image's and its mirror image's: the
    geometric mean of the two distributions, made a distribution again. Unlike a mean of
    probabilities it is a logit still, which softmax and sigmoid read alike.
    """
    outputs, sown = model.apply(
        variables, images, train=False, mutable=["intermediates"]
    )
    if flip:
        mirrored = model.apply(variables, images[:, :, ::-1], train=False)
        outputs = (outputs + mirrored) / 2
    return outputs, sown
