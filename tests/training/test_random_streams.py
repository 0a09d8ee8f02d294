"""No two draws of a run share a key: the streams, their use, and the keys of images."""

import ast
import inspect
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnetv2
from flax_resnetv2.run.placement import Placement
from flax_resnetv2.training.augment import positions
from flax_resnetv2.training.random_streams import (
    INITIAL,
    RandomStream,
    image_keys,
    initial_key,
    run_key,
    stream_keys,
)

PACKAGE = Path(flax_resnetv2.__file__).parent
STREAM_KEYS = "flax_resnetv2.training.random_streams.stream_keys"
DRAWS = {
    f"jax.random.{name}"
    for name, function in vars(jax.random).items()
    if callable(function)
    and next(iter(inspect.signature(function).parameters), None) == "key"
}
"""The functions of jax.random that take a key."""


def calls(tree):
    """Yield the full name, arguments and keywords of each call, and of ``partial``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def full(function):
        first, dot, rest = ast.unparse(function).partition(".")
        return names.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: k.value for k in node.keywords}
            name, arguments = full(node.func), node.args
            if name == "functools.partial":
                name, arguments = full(arguments[0]), arguments[1:]
            yield name, arguments, keywords


def is_number(node):
    """Whether an expression consists of numbers alone, as 3, -1 or 2**32 - 1."""
    parts = [n for n in ast.walk(node) if isinstance(n, ast.expr)]
    kinds = ast.Constant | ast.BinOp | ast.UnaryOp
    return all(isinstance(part, kinds) for part in parts)


def is_numbered_key(node):
    """Whether a key is a number, or one of several keys by its number."""
    return is_number(node.slice if isinstance(node, ast.Subscript) else node)


def argument(arguments, keywords, position, name):
    return arguments[position] if len(arguments) > position else keywords.get(name)


def streams_of(tree):
    """Return the streams that a module draws from; fail at a bare number."""
    streams = []
    for name, *given in calls(tree):
        if name == STREAM_KEYS:
            stream = ast.unparse(argument(*given, 1, "stream"))
            assert stream.startswith("RandomStream."), f"stream_keys(..., {stream})"
            streams.append(RandomStream[stream.removeprefix("RandomStream.")])
        if name in DRAWS:
            key = argument(*given, 0, "key")
            assert key is None or not is_numbered_key(key), f"{name} of {ast.dump(key)}"
        if name == "jax.random.fold_in":
            fold = argument(*given, 1, "data")
            assert fold is None or not is_number(fold), f"fold_in(..., {fold})"
    return streams


def test_streams_are_numbered_from_0_to_7():
    values = [int(member) for member in RandomStream.__members__.values()]
    assert values == list(range(8))
    assert len(RandomStream) == 8, "two names of one number"


def test_each_stream_is_drawn_from_in_one_place_of_the_package():
    """A stream used twice, or a bare number in its place, would correlate draws."""
    found = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(streams_of(ast.parse(path.read_text())))
    assert found == Counter(RandomStream)


HEAD = """
import functools
import jax
from jax import random
from jax.random import fold_in
from flax_resnetv2.training.random_streams import RandomStream, stream_keys
"""


@pytest.mark.parametrize(
    "line",
    [
        "jax.random.fold_in(key, 3)",
        "fold_in(key, data=2**32 - 1)",
        "random.fold_in(key, -1)",
        "functools.partial(jax.random.fold_in, key, 4)",
        "stream_keys(keys, 4)",
        "stream_keys(keys, stream=number)",
        "jax.random.uniform(jax.random.split(key, 4)[2], (3,))",
        "random.bernoulli(keys[0])",
        "jax.random.normal(key=7)",
        "jax.random.uniform(5)",
    ],
)
def test_a_bare_number_is_found(line):
    with pytest.raises(AssertionError):
        streams_of(ast.parse(HEAD + line))


@pytest.mark.parametrize(
    "line",
    [
        "jax.random.fold_in(key, step)",
        "jax.random.fold_in(jax.random.key(seed), INITIAL)",
        "stream_keys(keys, RandomStream.CROP)",
        "one, other = jax.random.split(key, 2)",
        "jax.random.randint(key, (2,), 0, 9)",
        "jax.random.normal(jax.random.key(0), (3,))",
        "jax.vmap(jax.random.bernoulli)(keys)",
        "numpy.random.uniform(5)",
    ],
)
def test_counts_shapes_and_names_are_let_through(line):
    streams_of(ast.parse(HEAD + line))


def data_of(keys):
    return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize("executor", ["pmap", "jit"])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_an_images_key_does_not_depend_on_the_devices(devices, executor):
    placement = Placement(jax.devices()[:devices], executor)

    def keys_of(step):
        at = positions(16 // devices, placement.axis)
        data = jax.random.key_data(image_keys(jax.random.key(3), step, at))
        if placement.axis is None:
            return data
        return jax.lax.all_gather(data, placement.axis, tiled=True)

    found = placement.map(keys_of)(placement.replicate(jnp.int32(5)))
    at_step = jax.random.fold_in(jax.random.key(3), 5)
    expected = [data_of(jax.random.fold_in(at_step, k)) for k in range(16)]
    np.testing.assert_array_equal(found, expected)


def test_keys_of_a_step_do_not_depend_on_earlier_steps():
    def keys_at(step):
        return data_of(image_keys(jax.random.key(3), jnp.int32(step), jnp.arange(4)))

    alone = keys_at(2)
    for step in range(2):
        assert not (keys_at(step) == alone).all(1).any()
    np.testing.assert_array_equal(keys_at(2), alone)


def test_all_keys_of_some_steps_images_and_streams_differ():
    found = [
        tuple(data)
        for step in range(3)
        for stream in RandomStream
        for data in data_of(
            stream_keys(
                image_keys(jax.random.key(0), jnp.int32(step), jnp.arange(5)), stream
            )
        )
    ]
    assert len(set(found)) == len(found) == 3 * 8 * 5


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_initial_parameters_have_the_key_of_no_step(seed):
    """``fold_in`` is a bijection, and the fold is one that no int32 step reaches."""
    last = np.iinfo(np.int32).max
    assert last < INITIAL < 2**32
    key, initial = jax.random.key(seed), data_of(initial_key(seed))
    steps = np.array([*range(1000), last - 1, last], np.int32)
    folded = data_of(jax.vmap(lambda step: jax.random.fold_in(key, step))(steps))
    assert not (folded == initial).all(1).any()
    assert not np.array_equal(initial, data_of(key))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_a_runs_keys_are_of_one_kind(kind):
    """Other generators draw other numbers on another number of devices."""
    expected = data_of(run_key(3)), data_of(initial_key(3))
    with jax.default_prng_impl(kind):
        assert jax.random.key_impl(jax.random.key(3)) != jax.random.key_impl(run_key(3))
        found = data_of(run_key(3)), data_of(initial_key(3))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
