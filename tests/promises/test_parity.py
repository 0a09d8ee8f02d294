"""Our nets against the peers' own results, in float64 (see ``tests.support.peers``)."""

from dataclasses import replace
from functools import cache, lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2 import PRESETS, Execution, activations, create_model
from flax_resnetv2.model import weight_layouts, weights
from tests.support import peers

SHALLOWEST, DEEPEST = "keras-resnet50v2", "keras-resnet152v2"
CASES = [
    (SHALLOWEST, 64),
    (SHALLOWEST, 75),
    (DEEPEST, 64),
    ("timm-resnetv2-18", 64),
    ("timm-resnetv2-18", 75),
    ("timm-resnetv2-50d", 75),
    ("timm-resnetv2-152", 64),
    ("bit-r50x1", 64),
    ("bit-r50x1", 75),
    ("bit-r101x1", 64),
]
"""Presets and sides of images: the shallowest and a deep one of each family."""
TOLERANCE = 1e-9
"""Of the largest difference over the standard deviation."""


THEIRS = {"bit": {"standardize_epsilon": 1e-8}}
"""What timm has otherwise than the row of ``Semantics``."""


@cache
def net(preset, **semantics):
    semantics = THEIRS.get(preset.split("-")[0], {}) | semantics
    architecture = PRESETS[preset].architecture
    changed = replace(architecture.semantics, **semantics)
    return create_model(
        replace(architecture, semantics=changed), Execution(dtype="float64")
    )


@lru_cache(maxsize=1)
def variables_of(preset):
    """The peer's tensors under our names."""
    tensors = {name: peers.fill(name, s) for name, s in peers.shapes(preset).items()}
    keras, model = preset.startswith("keras"), net(preset)
    layout = weight_layouts.KERAS if keras else weight_layouts.timm(model)
    return weights._import(tensors, preset, model, layout, "read")


@cache
def program(model):
    return jax.jit(lambda v, x: activations(model, v, x))


def differences(preset, side, model=None, variables=None):
    """Of each stack's maps and of the logits: largest difference over deviation."""
    expected = peers.results(preset)
    model, variables = model or net(preset), variables or variables_of(preset)
    found = program(model)(variables, peers.images(side))
    parts = {
        f"stack{number}": np.abs(
            peers.sample(found[f"stack{number}"]) - expected[f"{side}/stack{number}"]
        ).max()
        / expected[f"{side}/stack{number}/std"]
        for number in range(1, 5)
    }
    logits = expected[f"{side}/logits"]
    parts["logits"] = np.abs(found["head"] - logits).max() / logits.std()
    return {name: float(value) for name, value in parts.items()}


@pytest.mark.parametrize(("preset", "side"), CASES)
def test_features_and_logits_are_the_peers(preset, side, float64):
    apart = differences(preset, side)
    print(preset, side, apart)
    assert max(apart.values()) < TOLERANCE


@pytest.mark.parametrize(
    "mistake", ["swapped kernels", "swapped norms", "shifted statistic", "epsilon"]
)
def test_the_test_sees_the_smallest_mistake(mistake, float64):
    model, flat = None, flatten_dict(variables_of(SHALLOWEST), sep="/")
    where = "stack3/unit4/layer2"
    if mistake == "swapped kernels":
        others = f"params/{where}/conv/kernel", "params/stack3/unit5/layer2/conv/kernel"
    elif mistake == "swapped norms":
        others = f"params/{where}/norm/scale", f"params/{where}/norm/bias"
    elif mistake == "shifted statistic":
        flat[f"batch_stats/{where}/norm/mean"] += 1e-4
    else:
        model = net(SHALLOWEST, norm_epsilon=1e-5)
    if mistake.startswith("swapped"):
        one, other = others
        flat[one], flat[other] = flat[other], flat[one]
    apart = differences(SHALLOWEST, 64, model, unflatten_dict(flat, sep="/"))
    assert apart["logits"] > 100 * TOLERANCE


def training_differences():
    """Of one step from Keras's: {"gradient/conv1_conv/kernel": ...}, relative.

    The statistics after it, and the gradient of mean(logits^2).
    """
    model, variables = net(SHALLOWEST), variables_of(SHALLOWEST)
    expected = peers.results(SHALLOWEST)

    @jax.jit
    def step(params):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                peers.images(64),
                train=True,
                mutable=["batch_stats"],
            )
            return jnp.square(logits).mean(), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    gradient, statistics = step(variables["params"])
    found = {
        f"gradient/{name}": tensor
        for name, tensor in weights.to_keras({"params": gradient}, model).items()
    } | {
        f"statistics/{name}": tensor
        for name, tensor in weights.to_keras({"batch_stats": statistics}, model).items()
    }
    kept = {n: d for n, d in expected.items() if n.startswith(("grad", "stat"))}
    assert found.keys() == kept.keys()
    whole = max(digest[0] for name, digest in kept.items() if name.startswith("grad"))
    differences = {}
    for name, (norm, first, last) in kept.items():
        flat = found[name].ravel()
        apart = np.abs([np.linalg.norm(flat) - norm, flat[0] - first, flat[-1] - last])
        # A bias in front of a norm has the gradient 0, and rounding beside it.
        scale = max(norm, 1e-6 * whole) if name.startswith("grad") else norm
        differences[name] = float(apart.max() / scale)
    return differences


def test_a_training_step_is_that_of_keras(float64):
    for name, apart in training_differences().items():
        assert apart < TOLERANCE, name
