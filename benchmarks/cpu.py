"""Training and inference on the CPU, compared with plain linen, Keras and PyTorch.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --nets he2016-resnet20 --only ours torch
    python -m benchmarks.cpu --alternatives   # our default and its alternatives
    python -m benchmarks.cpu --table

The contestants of ``benchmarks.peers`` run in one process with the settings of
``train.py`` (``tune``) and take turns (see ``measure.interleaved``): one training step
or one inference of a batch per turn, float32. Rows go to
``benchmarks/results/cpu.jsonl``; ``--table`` prints them as Markdown. The default run
takes under 15 minutes on two cores; pin it with ``taskset``.

Fields of a row besides the median and the spread of its turns (the middle half; with
three turns the whole range):

lower_seconds, compile_seconds: for JAX's program, without a compilation cache;
    first_seconds is the very first call, which for Keras includes both.
temp_bytes: the largest memory of the compiled program besides inputs and outputs.
flops_fraction: FLOPs (two per multiply-add of ``layer_table``, three times that for
    training) per second, as a fraction of the peak measured in the same run: the
    fastest of several float32 products of 2048x2048 matrices.
bytes_fraction: bytes that the compiled program's operations read and write as XLA
    counts them (fused operations once, caches ignored) per second, as a fraction of the
    bandwidth measured in the same run: the fastest of several copies of a large array
    by one thread per core, reads and writes counted. The roofline bounds the larger of
    both fractions; caches can lift the second one above 1.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.measure import (
    RESULTS,
    append,
    interleaved,
    provenance,
    read_rows,
    summary,
    usable_cores,
)
from flax_resnetv2.system import runtime

NETS = ("he2016-resnet20", "article", "he2016-resnet56", "he2016-resnet164")
FEWEST, MOST = 3, 20
"""Fewest and most rounds."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    nets: tuple[str, ...] = NETS
    """Presets."""
    only: tuple[str, ...] = ()
    """Contestants; an empty tuple means all."""
    alternatives: bool = False
    """Compare our own kinds of ``Execution`` instead of other libraries."""
    batch: int = 128
    """Images per step."""
    rounds: int | None = None
    """Turns of each contestant; None takes as many as fit into ``seconds``, 3 to 20."""
    seconds: float = 45.0
    """Time for the rounds of one net, in training and in inference each."""
    out: Path | None = None
    """File for the rows; None means cpu.jsonl or alternatives.jsonl in results/."""
    table: bool = False
    """Only print the table of the existing rows."""


def main(options: Options) -> None:
    """Measure, append rows, print the table."""
    name = "alternatives" if options.alternatives else "cpu"
    out = options.out or RESULTS / f"{name}.jsonl"
    if not options.table:
        runtime.tune()
        # Seconds of compiling are those of a first start.
        jax.config.update("jax_enable_compilation_cache", False)
        about = {"benchmark": name, "run": time.strftime("%Y-%m-%dT%H:%M:%S")}
        about |= provenance()
        for net in options.nets:
            for row in measure_net(net, options):
                append(out, row | about)
            peers.forget()
    print(table(read_rows(out)))


def measure_net(net: str, options: Options) -> list[dict[str, Any]]:
    """Time the contestants in turns on one net; return a row for each and each mode."""
    task = peers.Task.of_preset(net, batch=options.batch)
    machine = {"peak_flops": product_peak(), "bandwidth": copy_bandwidth()}
    offered = peers.ALTERNATIVES if options.alternatives else peers.CONTESTANTS
    contestants = {name: offered[name](task) for name in options.only or offered}
    rows = []
    for mode in ("train", "inference"):
        runs: dict[str, Callable[[], Any]] = {
            name: partial(c.train, 1) if mode == "train" else c.infer
            for name, c in contestants.items()
        }
        first = {name: _seconds(run) for name, run in runs.items()}
        rounds = options.rounds
        if rounds is None:
            # The second call has nothing to compile and says what a round takes.
            a_round = sum(_seconds(run) for run in runs.values())
            rounds = min(max(int(options.seconds / a_round), FEWEST), MOST)
        flops = task.flops * task.batch * (3 if mode == "train" else 1)
        for name, seconds in interleaved(runs, rounds, warmup=0).items():
            facts = contestants[name].facts.get(mode, {})
            row = {"net": net, "mode": mode, "contestant": name, "batch": task.batch}
            row |= summary(seconds)
            median = row["seconds"]
            row["images_per_second"] = round(task.batch / median, 1)
            row["first_seconds"] = round(first[name], 3)
            row |= facts | machine
            row["flops_fraction"] = round(flops / median / machine["peak_flops"], 4)
            if "bytes_accessed" in facts:
                share = facts["bytes_accessed"] / median / machine["bandwidth"]
                row["bytes_fraction"] = round(share, 4)
            rows.append(row)
    return rows


def product_peak(size: int = 2048, tries: int = 12) -> float:
    """Return FLOP/s of the fastest of several float32 products of square matrices."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(size, size)), "float32") for _ in range(2))
    product = jax.jit(jnp.matmul)
    fastest = min(
        _seconds(lambda: jax.block_until_ready(product(a, b))) for _ in range(tries)
    )
    return 2 * size**3 / fastest


def copy_bandwidth(megabytes: int = 256, tries: int = 8) -> float:
    """Return bytes/s, read and written, of the fastest of several parallel copies."""
    cores = usable_cores()
    source = np.ones((cores, megabytes * 2**20 // 4 // cores), np.float32)
    target = np.zeros_like(source)
    with ThreadPoolExecutor(cores) as pool:

        def copy() -> None:
            list(pool.map(np.copyto, target, source))

        return 2 * source.nbytes / min(_seconds(copy) for _ in range(tries))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the last run of every net as a Markdown table."""
    last = {(row["net"], row["batch"]): row["run"] for row in rows}
    rivals = {"torch": "PyTorch", "linen": "plain linen"}
    if any(row.get("benchmark") == "alternatives" for row in rows):
        rivals = {"ours": "the default"}
    compared = " | ".join(f"of {name}" for name in rivals.values())
    lines = [
        f"| net | mode | | images/s | rounds | spread | {compared} "
        "| trace + compile, s | temporary MB | of peak FLOP/s | of bandwidth |",
        f"|---|---|---|{'---:|' * (len(rivals) + 7)}",
    ]
    for (net, batch), run in last.items():
        for mode in ("train", "inference"):
            chosen = {
                row["contestant"]: row
                for row in rows
                if (row["net"], row["batch"], row["run"], row["mode"])
                == (net, batch, run, mode)
            }
            for name, row in chosen.items():
                cells = [f"{net}, {batch}", mode, name, f"{row['images_per_second']:g}"]
                cells += [str(row["rounds"]), f"{row['spread']:.1%}"]
                for rival in rivals:
                    other = chosen.get(rival, {}).get("seconds", math.nan)
                    cells.append(_shown(other / row["seconds"], ".2f"))
                cells.append(_compile_cell(row))
                cells.append(_shown(row.get("temp_bytes", math.nan) / 2**20, ".0f"))
                cells.append(_shown(row["flops_fraction"], ".1%"))
                cells.append(_shown(row.get("bytes_fraction", math.nan), ".1%"))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compile_cell(row: dict[str, Any]) -> str:
    if "compile_seconds" in row:
        return f"{row['lower_seconds']:.1f} + {row['compile_seconds']:.1f}"
    # Keras compiles within its first call; PyTorch eager has nothing to compile.
    if row["contestant"] == "keras":
        return f"{max(row['first_seconds'] - row['seconds'], 0):.1f} together"
    return "-"


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
