"""Optimisers and schedules of learning rates, from optax, as ``TrainConfig`` says."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from flax_resnetv2.errors import UsageError

if TYPE_CHECKING:
    from flax_resnetv2.training import TrainConfig


def make_schedule(config: "TrainConfig", steps_per_epoch: int) -> optax.Schedule:
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
    config: "TrainConfig", steps_per_epoch: int
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


def _orthogonal_or_adam(config: "TrainConfig") -> optax.GradientTransformation:
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
