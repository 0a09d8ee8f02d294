"""How a net is trained: ``TrainConfig``, and its schedule and optimizer by optax."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.validation import Count, Range, Share, check_dataclass, shown

Schedule = Literal["steps", "cosine", "one_cycle", "linear", "constant", "exponential"]


@dataclass(frozen=True)
class TrainConfig:
    """How a net is trained."""

    epochs: Count = 200
    """Passes over the training images."""
    batch_size: Count = 128
    """Images per training step, over all devices."""
    optimizer: Literal["sgd", "adamw", "adam_l2", "lars", "muon"] = "sgd"
    """sgd: with momentum. adamw: decoupled weight decay. adam_l2: Adam with the L2 term
    weight_decay / 2 * |w|^2 in the loss (Keras's l2(x) is weight_decay = 2x). lars: SGD
    with a step size per kernel, for large batches and far higher rates (You et al.
    2017). muon: orthogonalized steps for convolution kernels after the stem, AdamW for
    everything else, at the same rate (Jordan et al. 2024)."""
    learning_rate: Annotated[float, Range(0, 1e6, above=True)] = 0.1
    """Peak learning rate of the schedule."""
    schedule: Schedule = "steps"
    """steps: a tenth of the rate during warm-up, then divided by 10 at each of lr_drops
    (He). cosine, linear, constant: linear warm-up, then the curve, to 0 for cosine and
    linear. one_cycle: up and down along cosines; warm-up is the rising part.
    exponential: from a millionth of the rate up to it during warm-up (find-rate)."""
    warmup_epochs: Annotated[float, Range(0, 1e6)] = 0.0
    """Length of the warm-up, in epochs."""
    lr_drops: tuple[float, ...] = (0.5, 0.75)
    """For schedule "steps": fractions of the training after which the learning rate is
    divided by 10."""
    weight_decay: Annotated[float, Range(0, 1e6)] = 1e-4
    """Weight decay as the optimizer defines it: an L2 term for sgd, lars and adam_l2,
    decoupled for adamw and muon."""
    decay: Literal["kernels", "all"] = "kernels"
    """Parameters that weight decay applies to: kernels, or scales and biases too."""
    momentum: Share = 0.9
    """Momentum of sgd, lars and muon (muon's authors use 0.95)."""
    nesterov: bool = True
    """Use Nesterov momentum with sgd, lars and muon."""
    label_smoothing: Share = 0.0
    """Fraction of the target spread evenly over all classes; with several labels per
    image, over yes and no of each label."""
    ema_decay: Share = 0.0
    """Decay per step of moving averages of parameters and statistics, which are then
    evaluated in their place; 0 keeps none."""
    clip_norm: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """Clip the global norm of the trainable gradients to this value, before weight
    decay is added; None does not clip."""
    stochastic_depth: Share = 0.0
    """Probability p of dropping the last unit's residual branch for an image; unit u of
    L is dropped with p * u / L, survivors are rescaled (Huang et al. 2016)."""
    trainable: Literal["all", "classifier"] = "all"
    """What to train: the whole net, or only the classifier, with parameters and
    statistics of the backbone fixed."""
    accumulation_steps: Count = 1
    """Compute each step's gradient in this many parts, one after the other, which
    divides the memory for activations; batch statistics are per part."""
    eval_batch_size: Count = 1000
    """Images per evaluation step, over all devices."""
    sync_batch_norm: bool = True
    """Take batch statistics over all devices, so results do not depend on their number.
    """


def check_train(config: TrainConfig) -> None:
    """Check every field, and the rules between them; raise ``UsageError``."""
    c = config
    check_dataclass(c, TrainConfig, "train.")
    if c.warmup_epochs >= c.epochs:
        raise UsageError(
            f"train.warmup_epochs={c.warmup_epochs} must be from 0 to below "
            f"epochs={c.epochs}"
        )
    if c.lr_drops != tuple(sorted({d for d in c.lr_drops if 0 < d < 1})):
        raise UsageError(
            f"train.lr_drops={shown(c.lr_drops)} must be rising fractions of the "
            "training between 0 and 1, as (0.5, 0.75)"
        )
    if c.stochastic_depth and c.trainable != "all":
        raise UsageError(
            f"train.stochastic_depth={c.stochastic_depth} drops units in training, but "
            f"train.trainable={c.trainable!r} trains none; leave out one of them"
        )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of steps done.

    Raises:
        UsageError: the warm-up, rounded to steps, takes the whole training.
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
        drops = {round(fraction * total): 0.1 for fraction in c.lr_drops}
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
    """Return the gradient transformation that ``config`` describes.

    Raises:
        UsageError: as ``make_schedule``.
    """
    c, rate = config, make_schedule(config, steps_per_epoch)
    if c.trainable == "classifier":
        rest = make_optimizer(replace(c, trainable="all"), steps_per_epoch)
        return optax.masked(rest, trainable_mask)
    if c.clip_norm is not None:
        rest = make_optimizer(replace(c, clip_norm=None), steps_per_epoch)
        return optax.chain(optax.clip_by_global_norm(c.clip_norm), rest)

    def kernels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    decays = kernels if c.decay == "kernels" else None
    if c.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=c.weight_decay, mask=decays)
    if c.optimizer == "lars":
        # As usual, scales and biases keep the plain rate: their norms mean nothing.
        momentum = {"momentum": c.momentum, "nesterov": c.nesterov}
        return optax.lars(
            rate, c.weight_decay, decays, trust_ratio_mask=kernels, **momentum
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
    """Return the update direction of "muon", before weight decay and learning rate.

    Muon is meant for the matrices between the first and the last layer, and a
    convolution is the matrix [k * k * in, out]. ``optax.contrib.muon`` would take the
    classifier's matrix instead, and has no mask for Adam's weight decay.
    """
    matrix = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)

    def kind(path: tuple, leaf: jax.Array) -> str:
        return "muon" if leaf.ndim == 4 and path[0].key != "stem" else "adam"

    def lengthen(kernel: jax.Array) -> jax.Array:
        # Scaled to the length of Adam's steps, so one rate fits both (Liu et al. 2025).
        sides = math.prod(kernel.shape[:3]), kernel.shape[3]
        return 0.2 * max(sides) ** 0.5 * kernel

    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=partial(jax.tree.map, lambda _: matrix),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(lengthen, updates)),
    )
    kinds = partial(jax.tree.map_with_path, kind)
    return optax.partition({"muon": muon, "adam": optax.scale_by_adam()}, kinds)


def trainable_mask(params: Any) -> Any:
    """Return a tree of bool, True at the parameters of the classifier."""
    return jax.tree.map_with_path(
        lambda path, _: [key.key for key in path[:2]] == ["head", "classifier"], params
    )
