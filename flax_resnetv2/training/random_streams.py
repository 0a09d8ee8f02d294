"""Every random stream of a run by its number, so that no two draws share a key.

A run has one key, from its seed. ``fold_in`` with the step, then with an image's
position in the batch, then with a stream gives the key of one draw for one image:

    key(seed) -> fold_in(step) -> fold_in(position) -> fold_in(RandomStream)

so a draw depends on neither the number of devices nor earlier steps. The initial
parameters have a key of their own beside those of the steps.
"""

from enum import IntEnum

import jax


class RandomStream(IntEnum):
    """What an image's key is used for. Numbers are never reused or changed."""

    CROP = 0
    FLIP = 1
    CUTOUT = 2
    MIX = 3
    """mixup and cutmix"""
    COLOR_JITTER = 4
    RANDAUGMENT = 5
    STOCHASTIC_DEPTH = 6
    LATENT_NOISE = 7
    """where in its distribution an image's latent vector is taken"""


INITIAL = 2**32 - 1
"""Stands in for a step to derive the initial parameters' key; int32 steps never get
there."""


def initial_key(seed: int) -> jax.Array:
    """Return the key from which a run draws its initial parameters."""
    return jax.random.fold_in(jax.random.key(seed), INITIAL)


def image_keys(key: jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the keys [B] of a step's images.

    Args:
        key: of the run, ``jax.random.key(seed)``.
        step: int32 scalar.
        positions: int32 [B], each image's position in the global batch.
    """
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(at_step, position))(positions)


def stream_keys(keys: jax.Array, stream: RandomStream) -> jax.Array:
    """Return the keys [B] of one stream, from the images' keys [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)
