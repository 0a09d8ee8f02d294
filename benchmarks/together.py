"""Whether several seeds of one recipe train faster as one program than one by one.

    python -m benchmarks.together [--recipe cifar10-he2016-resnet20] [--seeds 3]

Compares a training step under ``vmap`` over stacked states (each seed has its own
parameters, images and keys) with the same step, compiled alone and run once per seed,
in turns, with the batches already on the device.
``tests/repository/test_benchmarks.py`` tests that the results are equal. A row goes to
``benchmarks/results/together.jsonl``; its "ratio" is together / one by one.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import RESULTS, append, interleaved, provenance, summary
from flax_resnetv2 import RECIPES
from flax_resnetv2.data.batch import Batch
from flax_resnetv2.model.modules import create_model
from flax_resnetv2.run.config import Config
from flax_resnetv2.system import runtime
from flax_resnetv2.training.step import TrainState, create_train_state, make_train_step

Step = Callable[[jax.Array, TrainState, Batch], tuple[TrainState, Any]]


def prepare(
    config: Config, image_shape: tuple[int, int, int], seeds: Sequence[int]
) -> tuple[Step, list[TrainState], list[Batch]]:
    """Return a step of (seed, state, batch), and a state and a batch for each seed."""
    train, execution = config.train, config.execution
    augment = replace(config.augment, mean=(0.5,) * 3, std=(0.25,) * 3)
    model = create_model(config.architecture, execution, image_shape)
    steps = 100  # of an epoch; only the learning rate depends on it
    states, batches = [], []
    for seed in seeds:
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        states.append(create_train_state(model, train, key, image_shape, steps))
        size, classes = train.batch_size, config.architecture.num_classes
        images = rng.integers(0, 256, (size, *image_shape)).astype(np.uint8)
        labels = rng.integers(0, classes, size).astype(np.int32)
        batches.append(jax.device_put(Batch(images, labels, np.ones(size, bool))))

    def step(seed: jax.Array, state: TrainState, batch: Batch) -> Any:
        made = make_train_step(model, train, augment, seed=seed, steps_per_epoch=steps)
        return made(state, batch)

    return step, states, batches


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees into one whose leaves have a leading axis of seeds."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def measure(recipe: str, count: int, rounds: int) -> dict[str, Any]:
    """Time both ways; return the row."""
    seeds = range(count)
    step, states, batches = prepare(RECIPES[recipe].config, (32, 32, 3), seeds)
    alone, joined = jax.jit(step), jax.jit(jax.vmap(step))
    numbers, all_states, all_batches = jnp.arange(count), stack(states), stack(batches)
    one_by_one = list(zip(numbers, states, batches, strict=True))
    seconds = interleaved(
        {
            "one by one": lambda: [
                jax.block_until_ready(alone(*seed)) for seed in one_by_one
            ],
            "together": lambda: jax.block_until_ready(
                joined(numbers, all_states, all_batches)
            ),
        },
        rounds,
    )
    found = {way: summary(times) for way, times in seconds.items()}
    ratio = found["together"]["seconds"] / found["one by one"]["seconds"]
    row = {"benchmark": "together", "recipe": recipe, "seeds": count}
    return row | found | {"ratio": round(ratio, 3)} | provenance()


def main() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.together", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--recipe", default="quickstart", choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    runtime.tune()
    row = measure(given.recipe, given.seeds, given.rounds)
    append(RESULTS / "together.jsonl", row)


if __name__ == "__main__":
    main()
