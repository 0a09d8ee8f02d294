"""Normalisation, crops and mirror images, and the keys behind them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnetv2.augment import AugmentConfig, augment, image_keys, normalise

MEAN, STD = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)


def keys_of(count, seed=0, step=0, first=0):
    return image_keys(jax.random.key(seed), jnp.int32(step), first + jnp.arange(count))


def floats(count, seed=1):
    values = np.random.default_rng(seed).normal(size=(count, 6, 6, 2))
    return jnp.asarray(values, jnp.float32)


def test_normalisation_is_the_formula():
    image = np.arange(256 * 3, dtype=np.int64).reshape(1, 16, 16, 3) % 256
    config = AugmentConfig(mean=MEAN, std=STD)
    got = normalise(jnp.asarray(image, jnp.uint8), config, "float32")
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_normalisation_in_float64_is_exact(float64):
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3))
    config = AugmentConfig(mean=MEAN, std=STD)
    got = normalise(jnp.asarray(image, jnp.uint8), config, "float64")
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rounded_only_at_the_end():
    image = jnp.asarray(np.arange(192).reshape(1, 8, 8, 3), jnp.uint8)
    config = AugmentConfig(mean=MEAN, std=STD)
    exact = normalise(image, config, "float32").astype(jnp.bfloat16)
    got = normalise(image, config, "bfloat16")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact)


def test_each_image_is_one_of_all_crops_and_mirror_images():
    p, images = 4, floats(64)
    got = np.asarray(augment(images, keys_of(64), AugmentConfig(crop_padding=p)))
    padded = np.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
    found = []
    for index, image in enumerate(got):
        matches = [
            (row, column, flip)
            for row, column, flip in product(range(9), range(9), (1, -1))
            if np.array_equal(
                padded[index, row : row + 6, column : column + 6][:, ::flip], image
            )
        ]
        assert matches, f"image {index} is no crop of its padded self"
        found.append(matches[0])
    rows, columns, flips = (set(values) for values in zip(*found, strict=True))
    # 64 draws miss a given one of nine offsets with probability (8/9)^64 = 5e-4.
    assert rows == columns == set(range(9))
    assert flips == {1, -1}
    assert len(set(found)) > 30


def test_every_second_image_is_mirrored_by_chance():
    images = floats(1000)
    got = augment(images, keys_of(1000), AugmentConfig(crop_padding=0))
    mirrored = (np.asarray(got) != np.asarray(images)).any((1, 2, 3)).mean()
    assert 0.43 < mirrored < 0.57


def test_nothing_random_means_nothing_done():
    images = floats(8)
    off = AugmentConfig(crop_padding=0, flip=False)
    np.testing.assert_array_equal(augment(images, keys_of(8), off), images)


def test_two_halves_of_a_batch_are_the_batch():
    images, config = floats(8), AugmentConfig()
    whole = augment(images, keys_of(8, step=3), config)
    halves = [
        augment(images[k : k + 4], keys_of(4, step=3, first=k), config) for k in (0, 4)
    ]
    np.testing.assert_array_equal(whole, jnp.concatenate(halves))


def test_keys_depend_on_seed_step_and_position():
    grid = product((0, 1), (0, 1, 2), range(8))
    at = [
        tuple(np.asarray(jax.random.key_data(keys_of(1, seed, step, place)[0])))
        for seed, step, place in grid
    ]
    assert len(set(at)) == len(at) == 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_augmentation_keeps_shape_and_dtype(dtype):
    got = augment(floats(4).astype(dtype), keys_of(4), AugmentConfig())
    assert (got.shape, got.dtype) == ((4, 6, 6, 2), jnp.dtype(dtype))
