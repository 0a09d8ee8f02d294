"""The numbers of all random streams, so that no two draws of a run share a key.

A run has one key, made from its seed. The key of one draw for one image is

    run_key(seed) -> fold_in(step) -> fold_in(position) -> fold_in(RandomStream)

with the image's position in the global batch, so a draw depends on neither the number
of devices nor earlier steps. The key of the initial parameters is that of no step.
"""

from enum import IntEnum

import jax


class RandomStream(IntEnum):
    """What an image's key is used for. The numbers never change."""

    CROP = 0
    FLIP = 1
    CUTOUT = 2
    MIX = 3
    """mixup and cutmix."""
    COLOR_JITTER = 4
    RANDAUGMENT = 5
    STOCHASTIC_DEPTH = 6
    LATENT_NOISE = 7
    """Noise that samples the latent vector of a variational autoencoder."""


INITIAL = 2**32 - 1
"""Stands for a step in the key of the initial parameters; int32 steps stay below it."""


def run_key(seed: int) -> jax.Array:
    """Return the key of a run, from which all its keys are made.

    It is a threefry key whatever ``JAX_DEFAULT_PRNG_IMPL`` says: the draws of other
    generators depend on how an array is divided over devices.
    """
    return jax.random.key(seed, impl="threefry2x32")


def initial_key(seed: int) -> jax.Array:
    """Return the key from which a run draws its initial parameters."""
    return jax.random.fold_in(run_key(seed), INITIAL)


def image_keys(key: jax.Array, step: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the keys [B] of a step's images, by position [B] in the global batch.

    ``key`` is ``run_key(seed)``.
    """
    at_step = jax.random.fold_in(key, step)
    return jax.vmap(lambda position: jax.random.fold_in(at_step, position))(positions)


def stream_keys(keys: jax.Array, stream: RandomStream) -> jax.Array:
    """Return the keys [B] of one stream, from the images' keys [B]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, stream))(keys)
