"""The cost of each training option: how much longer a training step takes with it.

    python -m benchmarks.options
    python -m benchmarks.options --table

One process trains the same net with each option and without any, a few steps at a time,
in turns. A row has the relative increase over the turn without options of the same
round: its median over the rounds, and its standard error. Rows go to
``benchmarks/results/options.jsonl``.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from benchmarks.measure import (
    RESULTS,
    append,
    interleaved,
    provenance,
    read_rows,
    summary,
)
from flax_resnetv2.data.datasets import DataConfig, Dataset, open_dataset
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.placement import Placement
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import fill_in
from flax_resnetv2.system import runtime

PLAIN = "none"
OPTIONS: dict[str, dict[str, dict[str, object]]] = {
    PLAIN: {},
    "augment.cutout 16": {"augment": {"cutout": 16}},
    "augment.mixup 0.2": {"augment": {"mixup": 0.2}},
    "augment.cutmix 1": {"augment": {"cutmix": 1.0}},
    "augment.color-jitter 0.4": {"augment": {"color_jitter": 0.4}},
    "augment.randaugment 2": {"augment": {"randaugment": 2}},
    "train.optimizer lars": {"train": {"optimizer": "lars"}},
    "train.optimizer muon": {"train": {"optimizer": "muon"}},
    "train.clip-norm 1": {"train": {"clip_norm": 1.0}},
    "train.accumulation-steps 4": {"train": {"accumulation_steps": 4}},
    "train.stochastic-depth 0.2": {"train": {"stochastic_depth": 0.2}},
}
"""Flags, and the fields that they change."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    recipe: str = "quickstart"
    """The net and its batch; trained on the embedded shapes."""
    steps: int = 3
    """Steps per turn."""
    rounds: int = 100
    """Turns per option."""
    out: Path = RESULTS / "options.jsonl"
    """File for the rows."""
    table: bool = False
    """Only print the table of the existing rows."""


def changed(config: Config, changes: dict[str, dict[str, object]]) -> Config:
    """Return ``config`` with one option on."""
    parts = {k: replace(getattr(config, k), **v) for k, v in changes.items()}
    return replace(config, **parts)


def turn(config: Config, dataset: Dataset, steps: int) -> Callable[[], None]:
    """Return a function that continues a training by ``steps`` steps per call."""
    model = create_net(config, dataset.image_shape)
    run = Trainer(config, dataset, model, Placement(jax.local_devices()))
    split, order, state = run.split("train"), run.order(0), run.initial_state()
    calls, each = (steps, 1) if run.one_by_one else (1, steps)
    count = run.placement.replicate(jnp.int32(each))

    def go() -> None:
        nonlocal state
        for _ in range(calls):
            state, metrics = run.train_step(state, split, order, count)
        jax.block_until_ready((state, metrics))

    return go


def measure(options: Options) -> list[dict]:
    """Time the turns of each option; return a row for each."""
    config = replace(RECIPES[options.recipe].config, data=DataConfig("embedded_shapes"))
    dataset = open_dataset(config.data)
    config = fill_in(config, dataset)
    turns = {
        name: turn(changed(config, changes), dataset, options.steps)
        for name, changes in OPTIONS.items()
    }
    seconds = interleaved(turns, options.rounds)
    about = {"recipe": options.recipe, "batch": config.train.batch_size}
    rows = []
    for name, mine in seconds.items():
        # Of each round by itself: what else the machine does comes and goes.
        ratios = [a / b for a, b in zip(mine, seconds[PLAIN], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        step = summary([s / options.steps for s in mine])
        # Of a median of normal numbers, whose middle half is 1.35 deviations wide.
        error = 1.25 * (high - low) / 1.35 / len(ratios) ** 0.5
        rows.append(
            {"option": name, **about, **step, "more": median - 1, "error": error}
        )
    return rows


def format_row(row: dict) -> str:
    """Return a line of the table."""
    cells = [
        f"`--{row['option']}`" if row["option"] != PLAIN else PLAIN,
        f"{1e3 * row['seconds']:.1f} ms",
        f"{row['more']:+.0%} ± {row['error']:.0%}" if row["option"] != PLAIN else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure, or print the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.options")
    if not options.table:
        runtime.tune()
        runtime.cache_compilations()
        facts = provenance()
        for row in measure(options):
            append(options.out, row | facts)
    print("| option | a step | more |\n|---|---:|---:|")
    for row in read_rows(options.out):
        print(format_row(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
