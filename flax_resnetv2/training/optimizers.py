"""How a net is trained: ``TrainConfig``, and its schedule and optimiser from optax."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.validation import Count, Range, Share, check_dataclass, shown


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
    muon: kernels of convolutions, but the stem's, take orthogonal steps (Jordan et al.
    2024), all else, the stem and the head too, those of adamw, at the same rate."""
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
        return optax.masked(rest, learns)
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


def learns(params: Any) -> Any:
    """Where ``learn="classifier"`` is true: a tree of bool."""
    return jax.tree.map_with_path(
        lambda path, _: [key.key for key in path[:2]] == ["head", "classifier"], params
    )
