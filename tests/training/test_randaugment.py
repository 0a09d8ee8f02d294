"""RandAugment's operations against PIL's, and which images get which."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.randaugment import (
    OPERATIONS,
    apply_change,
    change_pixels,
    plan_change,
)
from flax_resnetv2.training.random_streams import image_keys

COLOUR = (10, 120, 200)
SHAPE = (20, 24, 3)
RNG = np.random.default_rng(0)
IMAGES = {
    "noise": RNG.integers(0, 256, SHAPE, np.uint8),
    "dark": RNG.integers(40, 90, SHAPE, np.uint8),
    "ramp": np.broadcast_to(
        np.arange(24, dtype=np.uint8)[None, :, None] * 10, SHAPE
    ).copy(),
    "flat": np.full(SHAPE, 77, np.uint8),
    "two values": np.where(RNG.random(SHAPE) < 0.1, 3, 250).astype(np.uint8),
}


@jax.jit
@jax.vmap
def changed(image, operation, strength, sign):
    change = plan_change(operation, strength, sign, SHAPE)
    return apply_change(image, change, jnp.asarray(COLOUR, jnp.uint8))


def ours(image, name, strength, sign=1.0):
    numbers = jnp.int32(OPERATIONS.index(name)), *map(jnp.float32, (strength, sign))
    return np.asarray(changed(*(jnp.asarray(x)[None] for x in (image, *numbers)))[0])


def pil(image, name, strength, sign=1.0):
    """The same as PIL says it."""
    image, (height, width) = Image.fromarray(image), image.shape[:2]
    amount = strength * sign
    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    moves = {
        "shear_x": (1, 0.3 * amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * amount, 1, 0),
        "translate_x": (1, 0, 150 / 331 * width * amount, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 150 / 331 * height * amount),
    }
    if name in enhancers:
        result = enhancers[name](image).enhance(1 + 0.9 * amount)
    elif name in moves:
        result = image.transform(
            image.size, Image.Transform.AFFINE, moves[name], fillcolor=COLOUR
        )
    else:
        result = {
            "identity": lambda: image,
            "autocontrast": lambda: ImageOps.autocontrast(image),
            "equalize": lambda: ImageOps.equalize(image),
            "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * strength)),
            "solarize": lambda: ImageOps.solarize(
                image, math.ceil(256 * (1 - strength))
            ),
            # PIL turns to the left.
            "rotate": lambda: image.rotate(-30 * -amount, fillcolor=COLOUR),
        }[name]()
    return np.asarray(result)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pils(name, kind):
    image = IMAGES[kind]
    for strength, sign in ((0.0, 1.0), (0.3, 1.0), (0.3, -1.0), (1.0, 1.0), (1.0, -1)):
        got, expected = (f(image, name, strength, sign) for f in (ours, pil))
        difference = np.abs(got.astype(int) - expected.astype(int))
        if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
            # PIL counts places in 16 bits behind the point.
            assert (difference > 0).mean() < 0.01
        else:
            # PIL's tables and blends are cut in other precisions.
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.1


@pytest.mark.parametrize("name", OPERATIONS)
def test_strength_0_is_nothing_and_strength_1_something(name):
    image = IMAGES["dark"]
    nothing = ours(image, name, 0.0)
    if name in ("autocontrast", "equalize"):  # have no strength
        assert np.array_equal(nothing, ours(image, name, 1.0))
        assert not np.array_equal(nothing, image)
    else:
        assert np.array_equal(nothing, image)
        assert np.array_equal(ours(image, name, 1.0), image) == (name == "identity")


def keys_of(count, step=0):
    return image_keys(jax.random.key(0), jnp.int32(step), jnp.arange(count))


CONFIG = AugmentConfig(mean=tuple(c / 255 for c in COLOUR), std=(0.2,) * 3)


def test_each_image_gets_one_of_fourteen_of_both_signs():
    count, strength = 280, 9 / 30
    image = IMAGES["noise"]
    batch = jnp.broadcast_to(jnp.asarray(image), (count, *SHAPE))
    config = replace(CONFIG, randaugment=1)
    got = np.asarray(
        jax.jit(change_pixels, static_argnums=2)(batch, keys_of(count), config)
    )
    known = {
        ours(image, name, strength, sign).tobytes()
        for name in OPERATIONS
        for sign in (1.0, -1.0)
    }
    # Five operations know no sign.
    assert len(known) == 2 * 14 - 5
    assert {x.tobytes() for x in got} == known


def test_color_jitter_is_three_blends_in_order():
    config = replace(CONFIG, color_jitter=0.4)
    batch = jnp.broadcast_to(jnp.asarray(IMAGES["noise"]), (8, *SHAPE))
    got = np.asarray(change_pixels(batch, keys_of(8), config))
    assert len({x.tobytes() for x in got}) == 8
    factors = jax.vmap(
        lambda key: jax.random.uniform(
            jax.random.fold_in(key, 4), (3,), jnp.float32, 0.6, 1.4
        )
    )(keys_of(8))
    for image, (brightness, contrast, color) in zip(got, factors, strict=True):
        expected = Image.fromarray(IMAGES["noise"])
        expected = ImageEnhance.Brightness(expected).enhance(float(brightness))
        expected = ImageEnhance.Contrast(expected).enhance(float(contrast))
        expected = ImageEnhance.Color(expected).enhance(float(color))
        difference = np.abs(image.astype(int) - np.asarray(expected).astype(int))
        assert difference.max() <= 2


def test_one_channel_works():
    gray = jnp.asarray(IMAGES["noise"][..., :1])[None]
    config = AugmentConfig(mean=(0.5,), std=(0.2,), color_jitter=0.5, randaugment=2)
    got = change_pixels(jnp.repeat(gray, 9, 0), keys_of(9), config)
    assert got.shape == (9, 20, 24, 1)
    assert len({np.asarray(x).tobytes() for x in got}) > 5
