"""What others' own code computes, for the tests: made by the scripts, kept beside them.

A peer's tensors are filled from a generator that is seeded by each tensor's name, so
that only names, shapes and results have to be kept.
"""

import json
import zlib
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SIDES = (64, 75)
SAMPLES = 200
"""Numbers kept of each stack's maps."""


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Give a tensor of a net its values, float64.

    Kernels at 0.7 of He's spread keep activations of one size through any depth, so
    that an error anywhere moves the logits; scales and variances are unlike 1.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    torch = "." in name  # whose kernels are [F, C, k, k]
    last = name.replace(".", "/").split("/")[-1]
    if len(shape) > 1:
        fan_in = np.prod(shape[1:] if torch else shape[:-1])
        return rng.normal(size=shape) * 0.7 * np.sqrt(2 / fan_in)
    if last in ("gamma", "moving_variance", "weight", "running_var"):
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(size=shape) * 0.1


def images(side: int) -> np.ndarray:
    """Two images, float64."""
    return np.random.default_rng(side).normal(size=(2, side, side, 3))


def sample(maps: np.ndarray) -> np.ndarray:
    """Some of the numbers, evenly taken, the last one too."""
    flat = np.asarray(maps, np.float64).ravel()
    return flat[np.linspace(0, flat.size - 1, min(SAMPLES, flat.size)).astype(int)]


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a preset's tensors, as the peer has them."""
    text = (HERE / f"{preset}.json").read_text()
    return {name: tuple(shape) for name, shape in json.loads(text).items()}


def results(preset: str) -> dict[str, np.ndarray]:
    """What the peer computed: see the script that made it."""
    with np.load(HERE / f"{preset}.npz", allow_pickle=False) as stored:
        return dict(stored)
