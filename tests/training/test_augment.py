"""Normalization, crops and mirror images, and the keys behind them."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnetv2.training.augment import (
    AugmentConfig,
    augment,
    mix,
    normalize,
    positions,
)
from flax_resnetv2.training.random_streams import image_keys

MEAN, STD = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)


def keys_of(count, seed=0, step=0, first=0):
    return image_keys(jax.random.key(seed), jnp.int32(step), first + jnp.arange(count))


def floats(count, seed=1):
    values = np.random.default_rng(seed).normal(size=(count, 6, 6, 2))
    return jnp.asarray(values, jnp.float32)


def test_normalization_is_the_formula():
    image = np.arange(256 * 3, dtype=np.int64).reshape(1, 16, 16, 3) % 256
    config = AugmentConfig(mean=MEAN, std=STD)
    got = normalize(jnp.asarray(image, jnp.uint8), config, "float32")
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


def test_normalization_in_float64_is_exact(float64):
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3))
    config = AugmentConfig(mean=MEAN, std=STD)
    got = normalize(jnp.asarray(image, jnp.uint8), config, "float64")
    expected = (image / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rounded_only_at_the_end():
    image = jnp.asarray(np.arange(192).reshape(1, 8, 8, 3), jnp.uint8)
    config = AugmentConfig(mean=MEAN, std=STD)
    exact = normalize(image, config, "float32").astype(jnp.bfloat16)
    got = normalize(image, config, "bfloat16")
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


# Cutout, mixup, cutmix

NOTHING = AugmentConfig(crop_padding=0, flip=False)


def edges(flags):
    """First and end of the places where a flag is set; they must be neighbors."""
    (places,) = np.nonzero(flags)
    assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
    return places[0], places[-1] + 1


@pytest.mark.parametrize("side", [1, 4, 5, 16])
def test_cutout_is_a_square_that_may_hang_over_the_border(side):
    ones = jnp.ones((600, 6, 9, 2))
    config = AugmentConfig(crop_padding=0, flip=False, cutout=side)
    cut = np.asarray(jax.jit(augment, static_argnums=2)(ones, keys_of(600), config))
    assert set(np.unique(cut)) == {0.0, 1.0} or side == 16
    found = set()
    for image in cut == 0:
        assert (image[..., :1] == image).all()
        (top, bottom), (left, right) = (
            edges(image[..., 0].any(axis)) for axis in (1, 0)
        )
        assert image[top:bottom, left:right].all()
        assert image[..., 0].sum() == (bottom - top) * (right - left)
        found.add((top, bottom, left, right))
    # Its center is any pixel.
    expected = {
        (
            *(max(row - side // 2, 0), min(row - side // 2 + side, 6)),
            *(max(column - side // 2, 0), min(column - side // 2 + side, 9)),
        )
        for row, column in product(range(6), range(9))
    }
    assert found == expected


def mixed(count, config, mask=None, first=0, seed=0):
    """Image k is k+1 everywhere and its target is one-hot; after mixing them."""
    images = jnp.broadcast_to(
        1 + jnp.arange(count, dtype=float)[:, None, None, None], (count, 8, 10, 1)
    )
    mask = jnp.ones(count, bool) if mask is None else mask
    keys = keys_of(count, seed, first=first)
    run = jax.jit(mix, static_argnums=(4, 5))
    got = run(images, jnp.eye(count), mask, keys, config, None)
    return [np.asarray(x) for x in got]


def test_mixup_blends_with_the_other_end_of_the_batch():
    images, target = mixed(1000, AugmentConfig(mixup=0.4))
    own = target[range(1000), range(1000)]
    other = target[range(1000), range(999, -1, -1)]
    np.testing.assert_allclose(own + other, 1, rtol=1e-6)
    assert np.count_nonzero(target) <= 2000
    places = np.arange(1000)
    expected = own * (places + 1) + other * (1000 - places)
    np.testing.assert_allclose(
        images, np.broadcast_to(expected[:, None, None, None], images.shape), rtol=1e-5
    )
    # Beta(a, a) has the mean 1/2 and the variance 1 / 4(2a + 1).
    assert own.mean() == pytest.approx(0.5, abs=0.04)
    assert own.var() == pytest.approx(1 / 7.2, rel=0.1)


def test_cutmix_replaces_a_box_and_as_much_of_the_target():
    images, target = mixed(1000, AugmentConfig(cutmix=1.0))
    sides, clipped = [], 0
    for place, (image, row) in enumerate(zip(images[..., 0], target, strict=True)):
        foreign = image != place + 1
        assert (image[foreign] == 1000 - place).all()
        assert row[place] == pytest.approx(1 - foreign.mean(), abs=1e-6)
        assert row[999 - place] == pytest.approx(foreign.mean(), abs=1e-6)
        if foreign.any():
            (top, bottom), (left, right) = (edges(foreign.any(axis)) for axis in (1, 0))
            assert foreign[top:bottom, left:right].all()
            inside = top > 0 and left > 0 and bottom < 8 and right < 10
            clipped += not inside
            if inside:
                sides.append((bottom - top, right - left))
    assert 100 < clipped < 1000
    # A box has the image's shape: rows are to 8 as columns to 10, rounded down.
    for rows, columns in sides:
        assert abs(rows / 8 - columns / 10) < 1 / 8
    assert len(set(sides)) > 4


def test_with_both_chance_decides_for_each_image():
    images, _ = mixed(1000, AugmentConfig(mixup=1.0, cutmix=1.0))
    blended = [len(np.unique(x)) == 1 and x[0, 0, 0] % 1 > 0 for x in images]
    assert 0.43 < np.mean(blended) < 0.57
    several = [len(np.unique(x)) == 2 for x in images]
    assert 0.3 < np.mean(several) < 0.5


def test_a_masked_image_is_mixed_with_nothing():
    mask = jnp.asarray([True, False, True, True])
    images, target = mixed(4, AugmentConfig(mixup=1.0), mask)
    for place in (1, 2):
        assert (images[place] == place + 1).all()
        assert np.array_equal(target[place], np.eye(4)[place])
    for place in (0, 3):
        assert 0 < target[place, place] < 1


def test_mixing_does_not_depend_on_the_devices():
    config = AugmentConfig(mixup=1.0, cutmix=1.0)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(16, 6, 6, 2)).astype(np.float32)
    target = rng.uniform(size=(16, 3)).astype(np.float32)
    mask = np.arange(16) < 13

    def run(images, target, mask, axis):
        keys = image_keys(jax.random.key(0), jnp.int32(0), positions(len(images), axis))
        return mix(images, target, mask, keys, config, axis)

    alone = jax.jit(run, static_argnums=3)(images, target, mask, None)
    for devices in (2, 8):
        shared = jax.pmap(
            lambda *x: run(*x, "d"), axis_name="d", devices=jax.devices()[:devices]
        )(*(x.reshape(devices, -1, *x.shape[1:]) for x in (images, target, mask)))
        for a, b in zip(alone, shared, strict=True):
            # A fused multiply-add rounds once, and only some programs have it.
            np.testing.assert_allclose(b.reshape(a.shape), a, rtol=1e-4, atol=1e-6)


def test_what_is_not_asked_for_draws_nothing():
    """Options that are off change no bit of what the others draw."""
    images, keys = floats(8), keys_of(8)
    plain = augment(images, keys, AugmentConfig())
    cut = augment(images, keys, AugmentConfig(cutout=3))
    assert ((cut == plain) | (cut == 0)).all()
