"""The training step and what it is made of: pure functions, no input or output.

``make_train_step`` runs in anybody's ``jit``; with an ``axis_name`` it also runs inside
``pmap`` or ``shard_map``, and computes the same for any number of devices. Metrics
leave a step as sums and counts, so that they can be added up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from flax_resnetv2.augment import (
    AugmentConfig,
    Batch,
    augment,
    draw_keys,
    image_keys,
    normalise,
    positions,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.fields import Count, Range, Share, check_dataclass, shown
from flax_resnetv2.objective import Classification, Objective, Question, Sums
from flax_resnetv2.optimizers import learns, make_optimizer
from flax_resnetv2.randaugment import change_pixels

if TYPE_CHECKING:
    from flax_resnetv2.autoencoder import Autoencoder
    from flax_resnetv2.model import ResNetV2

Metrics = dict[str, Any]
DEPTH = 6
"""The use of an image's key for stochastic depth, beside those of its pixels."""


@dataclass(frozen=True)
class TrainConfig:
    """How a net is trained. Durations are in epochs, batches count all devices."""

    epochs: Count = 200
    """Passes over the training split."""
    batch_size: Count = 128
    """Images in one step, over all devices."""
    accumulate: Count = 1
    """Compute a step's gradient in so many parts, one after the other, each of so much
    less memory. Batch statistics are those of a part."""
    eval_batch_size: Count = 1000
    """Images in one evaluation step, over all devices."""
    optimizer: Literal["sgd", "adamw", "adam_l2", "lars", "muon"] = "sgd"
    """sgd: with momentum; adamw: decoupled weight decay; adam_l2: Adam whose loss has
    the term weight_decay / 2 * |w|^2, which is another method than adamw. (Keras's
    l2(x) is weight_decay = 2x.) lars: sgd whose steps are scaled kernel by kernel, for
    large batches (You et al. 2017); its rates are far above those of sgd.
    muon: kernels of the units' convolutions take orthogonal steps (Jordan et al. 2024),
    all else, the stem and the head too, those of adamw, at the same rate."""
    learning_rate: Annotated[float, Range(0, 1e6, above=True)] = 0.1
    """The highest of the schedule."""
    momentum: Share = 0.9
    """Of sgd, lars and muon (whose authors take 0.95)."""
    nesterov: bool = True
    """Nesterov's momentum in these."""
    weight_decay: Annotated[float, Range(0, 1e6)] = 1e-4
    """As the optimizer says; lars has the term as adam_l2, muon decays as adamw."""
    clip: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """Scale gradients down whose norm, over all that learns, is larger; before the
    optimizer, and before what weight_decay adds; None: never."""
    learn: Literal["all", "classifier"] = "all"
    """What learns: everything, or the classifier alone, behind a backbone whose
    parameters and statistics stay as they came."""
    decay: Literal["kernels", "all"] = "kernels"
    """What decays: kernels only, or scales and biases too."""
    schedule: Literal[
        "steps", "cosine", "one_cycle", "linear", "constant", "exponential"
    ] = "steps"
    """steps: a tenth during the warm-up, then / 10 at each of drops (He). cosine,
    linear, constant: up linearly during the warm-up, then to 0 along the curve.
    one_cycle: up and down along cosines, the warm-up being the rising part.
    exponential: up from a millionth during the warm-up, as find-rate does it."""
    warmup_epochs: Annotated[float, Range(0, 1e6)] = 0.0
    """Length of the warm-up."""
    drops: tuple[float, ...] = (0.5, 0.75)
    """Shares of the training after which "steps" divides by 10."""
    label_smoothing: Share = 0.0
    """Share of the target spread evenly over all classes; of several labels an image,
    over yes and no of each."""
    ema: Share = 0.0
    """Share kept by a moving average of parameters and statistics, which is then what
    is evaluated; 0: none."""
    stochastic_depth: Share = 0.0
    """Share of images for which the last unit's residual is dropped in training; it
    rises linearly from the first unit on (Huang et al. 2016); 0: none."""
    sync_batch_norm: bool = True
    """Batch statistics over all devices, so that results do not depend on them."""


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


def check_train(config: TrainConfig) -> None:
    """Refuse numbers that cannot train.

    Raises:
        UsageError: naming the field, its value and its range.
    """
    c = config
    check_dataclass(c, TrainConfig, "train.")
    if c.warmup_epochs >= c.epochs:
        raise UsageError(
            f"train.warmup_epochs={c.warmup_epochs} must be from 0 to below "
            f"epochs={c.epochs}"
        )
    if c.drops != tuple(sorted({d for d in c.drops if 0 < d < 1})):
        raise UsageError(
            f"train.drops={shown(c.drops)} must be rising shares of the training "
            "between 0 and 1, as (0.5, 0.75)"
        )
    if c.stochastic_depth and c.learn != "all":
        raise UsageError(
            f"train.stochastic_depth={c.stochastic_depth} drops units that learn, and "
            f"train.learn={c.learn!r} has none; leave it out, or choose learn='all'"
        )


def create_train_state(
    model: "ResNetV2",
    config: TrainConfig,
    key: jax.Array,
    image_shape: tuple[int, int, int],
    steps_per_epoch: int,
    variables: dict[str, Any] | None = None,
) -> TrainState:
    """Initial parameters, statistics and optimiser state; pure, fastest outside jit.

    Args:
        model, config: the net and how it is trained.
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
    model: "ResNetV2", config: TrainConfig, image_shape: tuple[int, int, int]
) -> TrainState:
    """``create_train_state`` without its numbers: a state of jax.ShapeDtypeStruct."""

    def create() -> TrainState:
        # Shapes do not depend on how many steps an epoch has.
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
        train, augmentation: what to do; ``augmentation.mean`` and ``std`` are set.
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
    model: "ResNetV2", augmentation: AugmentConfig, smoothing: float = 0.0
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
