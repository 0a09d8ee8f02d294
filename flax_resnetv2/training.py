"""The training step and what it is made of: pure functions, no input or output.

``make_train_step`` runs in anybody's ``jit``; with an ``axis_name`` it also runs inside
``pmap`` or ``shard_map``, and computes the same for any number of devices. Metrics
leave a step as sums and counts, so that they can be added up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
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
    mix,
    normalise,
    positions,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.fields import Count, Range, Share, check_dataclass, shown
from flax_resnetv2.randaugment import change_pixels

if TYPE_CHECKING:
    from flax_resnetv2.model import ResNetV2

Metrics = dict[str, Any]
DEPTH = 6
"""The use of an image's key for stochastic depth, beside those of its pixels."""
TOP5_CLASSES = 100
"""From so many classes on, evaluation also counts images whose class is among the five
likeliest."""


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


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate as a function of the step.

    Raises:
        UsageError: the warm-up, rounded to steps, leaves none.
    """
    c, peak = config, config.learning_rate
    total = c.epochs * steps_per_epoch
    warmup = round(c.warmup_epochs * steps_per_epoch)
    if warmup >= total:
        raise UsageError(
            f"train.warmup_epochs={c.warmup_epochs} takes all {total} steps of "
            f"epochs={c.epochs}; choose a shorter warm-up, or more epochs"
        )
    if c.schedule == "one_cycle":
        rising = warmup / total if warmup else 0.3
        schedule = optax.cosine_onecycle_schedule(total, peak, pct_start=rising)
    elif c.schedule == "steps":
        drops = {round(share * total): 0.1 for share in c.drops}
        steps = optax.piecewise_constant_schedule(peak, drops)

        def schedule(step: jax.Array) -> jax.Array:
            return jnp.where(step < warmup, peak / 10, steps(step))

    elif c.schedule == "exponential":

        def schedule(step: jax.Array) -> jax.Array:
            return peak * 1e-6 ** jnp.maximum(0.0, 1 - (step + 1) / max(warmup, 1))

    else:
        schedule = {
            "cosine": optax.cosine_decay_schedule(peak, total - warmup),
            "linear": optax.linear_schedule(peak, 0.0, total - warmup),
            "constant": optax.constant_schedule(peak),
        }[c.schedule]
        if warmup:
            ramp = optax.linear_schedule(0.0, peak, warmup)
            schedule = optax.join_schedules([ramp, schedule], [warmup])

    def rate(step: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            return jnp.asarray(schedule(step), float)

    return rate


def make_optimizer(
    config: TrainConfig, steps_per_epoch: int
) -> optax.GradientTransformation:
    """The gradient transformation that ``config`` describes."""
    c, rate = config, make_schedule(config, steps_per_epoch)
    if c.learn == "classifier":
        rest = make_optimizer(replace(c, learn="all"), steps_per_epoch)
        return optax.masked(rest, _learns)
    if c.clip is not None:
        rest = make_optimizer(replace(c, clip=None), steps_per_epoch)
        return optax.chain(optax.clip_by_global_norm(c.clip), rest)

    def kernels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def decays(params: Any) -> Any:
        everything = jax.tree.map(lambda _: True, params)
        return everything if c.decay == "all" else kernels(params)

    if c.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=c.weight_decay, mask=decays)
    if c.optimizer == "lars":
        # Scales and biases keep their rate, as is usual: their norms say nothing.
        return optax.lars(
            *(rate, c.weight_decay, decays),
            trust_ratio_mask=kernels,
            momentum=c.momentum,
            nesterov=c.nesterov,
        )
    if c.optimizer == "muon":
        return optax.chain(
            _orthogonal_or_adam(c),
            optax.add_decayed_weights(c.weight_decay, decays),
            optax.scale_by_learning_rate(rate),
        )
    # Added to the gradient before the moments: the gradient of the L2 term.
    l2 = optax.add_decayed_weights(c.weight_decay, decays)
    if c.optimizer == "adam_l2":
        return optax.chain(l2, optax.adam(rate))
    return optax.chain(l2, optax.sgd(rate, c.momentum, c.nesterov))


def _orthogonal_or_adam(config: TrainConfig) -> optax.GradientTransformation:
    """The direction of "muon".

    Muon is for the matrices between the first and the last layer, says its author, and
    a convolution is the matrix [k * k * in, out]. ``optax.contrib.muon`` would take the
    classifier's matrix, not the convolutions', and has no mask for Adam's decay.
    """
    matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda _: matrix, params)

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, leaf: (
                "muon" if leaf.ndim == 4 and path[0].key != "stem" else "adam"
            ),
            params,
        )

    def lengthen(kernel: jax.Array) -> jax.Array:
        # As long as Adam's steps, so that one rate fits both (Liu et al. 2025).
        sides = math.prod(kernel.shape[:3]), kernel.shape[3]
        return 0.2 * max(sides) ** 0.5 * kernel

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=matrices,
        ),
        optax.stateless(lambda updates, _: jax.tree.map(lengthen, updates)),
    )
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam()}, kinds)


def _learns(params: Any) -> Any:
    """Where ``learn="classifier"`` is true: a tree of bool."""
    return jax.tree.map_with_path(
        lambda path, _: [key.key for key in path[:2]] == ["head", "classifier"], params
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
    model: "ResNetV2",
    train: TrainConfig,
    augmentation: AugmentConfig,
    *,
    seed: int,
    steps_per_epoch: int,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Make the pure function ``step(state, batch) -> (state, metrics)``.

    Args:
        model: gives logits [B, classes].
        train, augmentation: what to do; ``augmentation.mean`` and ``std`` are set.
        seed: of the images' random keys, with the step number.
        steps_per_epoch: the schedule's epoch.
        axis_name: the mapped axis that shares the batch; None: there is none.

    The metrics are sums over the images (``loss``, ``correct``) with their ``count``,
    and over the steps (``gradient_norm`` by part of the net) with ``steps``, of which
    ``finite_steps`` had a finite loss and gradient.
    """
    optimizer = make_optimizer(train, steps_per_epoch)

    def total(tree: Any) -> Any:
        return tree if axis_name is None else lax.psum(tree, axis_name)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        places = positions(batch.label.shape[0], axis_name)
        keys = image_keys(jax.random.key(seed), state.step, places)
        images = change_pixels(batch.image, keys, augmentation)
        images = normalise(images, augmentation, model.execution.param_dtype)
        images = augment(images, keys, augmentation)
        target = targets(
            batch.label,
            model.plan.head.features,
            train.label_smoothing,
            model.execution.param_dtype,
        )
        images, target = mix(images, target, batch.mask, keys, augmentation, axis_name)
        count = total(batch.mask.sum())

        def gradient_of(stats: Any, part: tuple) -> tuple[Any, tuple]:
            """Statistics after some images, and sums over these images."""
            found = jax.grad(partial(loss_of, *part, stats), has_aux=True)(state.params)
            gradient, (loss, correct, stats) = found
            return stats, (gradient, loss, correct)

        def loss_of(
            images: jax.Array,
            target: jax.Array,
            keep: jax.Array | None,
            batch: Batch,
            stats: Any,
            params: Any,
        ) -> tuple[jax.Array, Any]:
            if train.learn == "classifier":
                params = jax.tree.map(
                    lambda p, learns: p if learns else lax.stop_gradient(p),
                    *(params, _learns(params)),
                )
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=train.learn == "all",
                keep=keep,
                mutable=["batch_stats"],
            )
            loss, correct = score(logits, target, batch)
            return loss / count.astype(loss.dtype), (
                loss,
                correct,
                updated.get("batch_stats", {}),
            )

        keep = None
        if train.stochastic_depth:
            units = sum(len(stack.units) for stack in model.plan.stacks)
            keep = keep_factors(keys, units, train.stochastic_depth)
            keep = keep.astype(model.execution.param_dtype)
        whole = images, target, keep, batch._replace(image=None)
        stats, sums = in_parts(gradient_of, state.batch_stats, whole, train.accumulate)
        gradient, loss, correct = total(sums)
        if axis_name is not None:
            stats = lax.pmean(stats, axis_name)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(
                gradient, state.opt_state, state.params
            )
        params = optax.apply_updates(state.params, updates)
        averaged = _average(state, {"params": params, "batch_stats": stats}, train.ema)
        norms = {k: optax.tree.norm(g) for k, g in gradient.items()}
        finite = jnp.isfinite(jnp.stack([loss, *norms.values()])).all()
        metrics = {
            "loss": loss,
            "correct": correct,
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
    model: "ResNetV2", augmentation: AugmentConfig, *, axis_name: str | None = None
) -> Callable[[dict[str, Any], Batch], Metrics]:
    """Make the pure function ``step(variables, batch) -> metrics``.

    Masked sums: ``loss``, ``correct``, ``count``, and ``residual_ratio`` of every unit,
    as {"stack1": {"unit1": ...}} (see ``ResidualUnit``); of ``TOP5_CLASSES`` classes or
    more also ``correct_top5``.
    """

    def step(variables: dict[str, Any], batch: Batch) -> Metrics:
        images = normalise(batch.image, augmentation, model.execution.param_dtype)
        logits, sown = evaluated(model, variables, images, augmentation.test_flip)
        classes, dtype = logits.shape[-1], logits.dtype
        target = targets(batch.label, classes, 0.0, dtype)
        loss, correct = score(logits, target, batch)
        ratios = {
            stack: {
                unit: jnp.where(batch.mask, values["residual_ratio"][0], 0).sum()
                for unit, values in units.items()
            }
            for stack, units in sown["intermediates"].items()
        }
        metrics = {
            "loss": loss,
            "correct": correct,
            "count": batch.mask.sum(),
            "residual_ratio": ratios,
        }
        if batch.label.ndim == 1 and classes >= TOP5_CLASSES:
            _, best = lax.top_k(logits, 5)
            found = (best == batch.label[:, None]).any(1)
            metrics["correct_top5"] = (found & batch.mask).sum()
        return metrics if axis_name is None else lax.psum(metrics, axis_name)

    return step


def evaluated(
    model: "ResNetV2", variables: dict[str, Any], images: jax.Array, flip: bool
) -> tuple[jax.Array, Any]:
    """Logits [B, classes] of normalised images, and what the modules sow of them.

    With ``flip`` the logits are the means of an image's and its mirror image's: the
    geometric mean of the two distributions, made a distribution again. Unlike a mean of
    probabilities it is a logit still, which softmax and sigmoid read alike.
    """
    logits, sown = model.apply(
        variables, images, train=False, mutable=["intermediates"]
    )
    if flip:
        mirrored = model.apply(variables, images[:, :, ::-1], train=False)
        logits = (logits + mirrored) / 2
    return logits, sown


def targets(
    label: jax.Array, classes: int, smoothing: float, dtype: str | jnp.dtype
) -> jax.Array:
    """What the net should say, ``dtype`` [B, classes], from labels as of ``Batch``.

    One class an image: a distribution over the classes, smoothed towards all of them.
    Several labels: the probability of each, smoothed towards 1/2.
    """
    if label.ndim == 1:
        target = jax.nn.one_hot(label, classes, dtype=dtype)
        return optax.smooth_labels(target, smoothing)
    return (1 - smoothing) * label.astype(dtype) + smoothing / 2


def score(
    logits: jax.Array, target: jax.Array, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Sums over the unmasked rows: the loss, and how much is right.

    One class an image (``batch.label`` [B]): softmax cross-entropy, and how many images
    are right. Several labels ([B, K]): sigmoid cross-entropy, its mean over the labels,
    and the share of labels that are right, summed over the images; by their count that
    is the mean accuracy of the labels.

    Args:
        logits: float [B, classes].
        target: [B, classes], of ``targets``, perhaps mixed (``augment.mix``). Right is
            what has the largest share in it.
        batch: its labels' kind, and its mask.
    """
    if batch.label.ndim == 1:
        loss = optax.softmax_cross_entropy(logits, target)
        right = lax.argmax(logits, 1, jnp.int32) == lax.argmax(target, 1, jnp.int32)
        return jnp.where(batch.mask, loss, 0).sum(), (right & batch.mask).sum()
    loss = optax.sigmoid_binary_cross_entropy(logits, target).mean(1)
    right = ((logits > 0) == (target > 0.5)).mean(1, dtype=logits.dtype)
    return jnp.where(batch.mask, loss, 0).sum(), jnp.where(batch.mask, right, 0).sum()
