"""The cost of saving checkpoints while a net trains.

    python -m benchmarks.saving
    python -m benchmarks.saving --table

One process trains a net as ``fit`` does, in intervals of fifty steps. Every second
interval begins with saving a checkpoint. A row has the time for which a save blocks the
loop (the checksums, and handing over the arrays) as a share of the interval, and the
throughput of both kinds of interval. Rows go to ``benchmarks/results/saving.jsonl``.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from benchmarks.measure import RESULTS, append, provenance, read_rows
from flax_resnetv2.data.datasets import DataConfig, open_dataset
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.checkpoint import Checkpointer
from flax_resnetv2.run.placement import Placement
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import fill_in
from flax_resnetv2.system import runtime


@dataclass(frozen=True)
class Options:
    """What to measure."""

    recipes: tuple[str, ...] = ("quickstart", "cifar10-he2016-resnet20")
    """Recipes of the nets; all train on the drawn shapes."""
    steps: int = 50
    """Steps per interval."""
    saves: int = 25
    """Number of intervals that begin with a save; as many do not."""
    out: Path = RESULTS / "saving.jsonl"
    """File for the rows."""
    table: bool = False
    """Only print the table of the existing rows."""


def measure(recipe: str, options: Options) -> dict:
    """Train, save in every second interval, and return the row."""
    config = replace(RECIPES[recipe].config, data=DataConfig("embedded_shapes"))
    dataset = open_dataset(config.data)
    config = fill_in(config, dataset)
    model = create_net(config, dataset.image_shape)
    run = Trainer(config, dataset, model, Placement(jax.local_devices()))
    state, split, order = run.initial_state(), run.split("train"), run.order(0)
    one = run.placement.replicate(jnp.int32(1))
    blocked, seconds = [], {True: [], False: []}
    with (
        tempfile.TemporaryDirectory() as directory,
        Checkpointer(directory, keep=2) as checkpoints,
    ):
        # The first two intervals compile, and save for the first time.
        for interval in range(-2, 2 * options.saves):
            saving = interval % 2 == 1
            began = time.perf_counter()
            if saving:
                checkpoints.save(interval + 2, run.placement.as_global(state))
                if interval > 0:
                    blocked.append(time.perf_counter() - began)
            for _ in range(options.steps if run.one_by_one else 1):
                steps = (
                    one
                    if run.one_by_one
                    else run.placement.replicate(jnp.int32(options.steps))
                )
                state, metrics = run.train_step(state, split, order, steps)
                jax.block_until_ready(metrics)
            jax.block_until_ready(state)
            if interval >= 0:
                seconds[saving].append(time.perf_counter() - began)
    without = statistics.median(seconds[False])
    p95 = statistics.quantiles(blocked, n=20)[-1]
    return {
        "recipe": recipe,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "batch": config.train.batch_size,
        "steps": options.steps,
        "saves": len(blocked),
        "interval_s": without,
        "blocked_median_s": statistics.median(blocked),
        "blocked_p95_s": p95,
        "blocked_p95_share": p95 / without,
        "images_per_second": {
            "saving": options.steps
            * config.train.batch_size
            / statistics.median(seconds[True]),
            "not_saving": options.steps * config.train.batch_size / without,
        },
    }


def format_row(row: dict) -> str:
    """Return a line of the table."""
    rate = row["images_per_second"]
    cells = [
        row["recipe"],
        f"{row['bytes'] / 1e6:.1f} MB",
        f"{row['interval_s']:.1f} s",
        f"{1e3 * row['blocked_median_s']:.0f} ms",
        f"{1e3 * row['blocked_p95_s']:.0f} ms",
        f"{row['blocked_p95_share']:.2%}",
        f"{rate['saving']:.0f}",
        f"{rate['not_saving']:.0f}",
        f"{rate['saving'] / rate['not_saving']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure, or print the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.saving")
    if not options.table:
        runtime.tune()
        runtime.cache_compilations()
        for recipe in options.recipes:
            row = measure(recipe, options) | provenance()
            append(options.out, row)
    print(
        "| net | state | interval | a save blocks | p95 | of the interval | images/s "
        "saving | not saving | ratio |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    for row in read_rows(options.out):
        print(format_row(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
