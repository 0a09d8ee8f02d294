"""The cost of sharing a batch: measured on CPU devices, predicted for pods.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --quick    # two devices, a tiny net, under a minute
    python -m benchmarks.scaling --table
    python -m benchmarks.scaling --paper    # predictions for accelerators

A training step is mapped by ``Placement.map`` (``pmap`` over whole copies of state and
data) over 1, 2, 4 and 8 CPU devices, each number in its own process. The devices share
the same cores, so nothing gets faster: a fall of images/s is the cost of sharing
(collectives, dispatch, smaller products). "strong" keeps the global batch, "weak" the
batch of each device; "-local" is without synchronized batch statistics. Rows go to
``benchmarks/results/scaling.jsonl``. Fields of a row besides the median and the spread
of its steps:

dispatch_pmap, dispatch_jit: seconds of a call that increments the state's step and
    returns all its leaves, by ``Placement.map`` and by ``jit`` on the same replicated
    arrays.
reduce_seconds: summing a tree of the parameters' shapes over the devices.
small_reduce_seconds: one of a chain of all-reduces of [64].
all_reduces, all_reduce_bytes: operations in the compiled step, and the bytes that one
    device contributes. The plan predicts expected_bytes, and latencies: the all-reduces
    of batch statistics that wait for each other.

The prediction: a ring all-reduce of B bytes over n devices takes
2 (n - 1) / n * B / bandwidth, and an all-reduce of a few numbers takes the latency.
``LINKS`` has the sources of the numbers.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import peers
from benchmarks.gpu import LIKE_RESNET50
from benchmarks.jobs import MARK, ROOT, Job, run_job
from benchmarks.measure import (
    RESULTS,
    append,
    interleaved,
    provenance,
    read_rows,
    summary,
)
from flax_resnetv2.data.batch import Split, epoch_order
from flax_resnetv2.data.datasets import Dataset
from flax_resnetv2.model.architecture import Architecture
from flax_resnetv2.model.layer_table import layer_table
from flax_resnetv2.model.planning import plan
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.placement import AXIS, Placement
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import fill_in
from flax_resnetv2.training.step import create_train_state

DEVICES = (1, 2, 4, 8)
FEWEST, MOST = 5, 40
"""Fewest and most timed steps."""
SCALARS = 3
"""Loss, correct and count are summed with the gradients."""
BATCH, SHARE = 64, 16
"""Global batch of "strong", and batch per device of "weak"."""


def _config(recipe: str) -> Config:
    config = RECIPES[recipe].config
    return replace(config, data=RECIPES["quickstart"].config.data)


CONFIGS = {
    "quickstart": _config("quickstart"),
    "he2016-resnet20": _config("cifar10-he2016-resnet20"),
    "he2016-resnet164": _config("cifar10-he2016-resnet164"),
}
TINY = replace(
    CONFIGS["quickstart"],
    architecture=Architecture(units=(1,), widths=(8,), strides=(1,), stem_width=8),
)
MODES = ("strong", "weak", "strong-local", "weak-local")


def measure(name: str, mode: str, count: int, seconds: float) -> dict[str, Any]:
    """Time the step of one net on ``count`` devices of this process; return its row.

    Args:
        name: a name of CONFIGS, or "tiny".
        mode: one of MODES.
        count: the number of devices of the process.
        seconds: time for the timed steps.
    """
    config = TINY if name == "tiny" else CONFIGS[name]
    batch = BATCH if mode.startswith("strong") else SHARE * count
    config = replace(
        config,
        train=replace(
            config.train, batch_size=batch, sync_batch_norm="local" not in mode
        ),
    )
    dataset = _random_images(2048)
    config = fill_in(config, dataset)
    model = create_net(config, dataset.image_shape)
    run = Trainer(config, dataset, model, Placement(jax.local_devices()))
    state = _state(run, name)
    order = run.placement.replicate(epoch_order(run.num_images, batch, 0, 0))
    rest = (run.split("train"), order, jnp.int32(1))
    row: dict[str, Any] = {"net": name, "mode": mode, "devices": count, "batch": batch}
    row |= expected(config.architecture, config.train.sync_batch_norm)
    if count > 1:
        program = jax.jit(run.train_step).lower(state, *rest).compile()
        row |= all_reduces(program.as_text())
        del program

    def step() -> None:
        nonlocal state
        state, metrics = run.train_step(state, *rest)
        jax.block_until_ready((state, metrics))

    step()
    once = statistics.median(interleaved({"": step}, 2, warmup=1)[""])
    rounds = min(max(int(seconds / once), FEWEST), MOST)
    taken = interleaved({"": step}, rounds, warmup=0)[""]
    row |= summary(taken) | {"fastest": min(taken)}
    row["images_per_second"] = round(batch / row["seconds"], 1)
    row |= _alone(run, state)
    return row | provenance()


def _random_images(count: int) -> Dataset:
    """Return random images and labels; their values do not change the time."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    split = Split(image, rng.integers(0, 10, count).astype(np.int32))
    names = tuple(str(k) for k in range(10))
    return Dataset("random", names, {"train": split, "test": split})


def _state(run: Trainer, name: str) -> Any:
    """Return a state with drawn weights on all devices; nothing is compiled for it."""
    config = run.config
    shapes = jax.eval_shape(
        partial(
            create_train_state,
            run.model,
            config.train,
            image_shape=run.dataset.image_shape,
            steps_per_epoch=run.steps_per_epoch,
        ),
        key=jax.random.key(0),
    )
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables = peers.draw_variables(peers.Task(name, config.architecture))
    return run.placement.replicate(
        state.replace(params=variables["params"], batch_stats=variables["batch_stats"])
    )


def _alone(run: Trainer, state: Any, chain: int = 100) -> dict[str, Any]:
    """Time each part of what sharing adds to a step."""

    def count_up(state: Any) -> Any:
        return state.replace(step=state.step + 1)

    def small(x: jax.Array) -> jax.Array:
        for _ in range(chain):
            x = jnp.sin(lax.psum(x, AXIS))
        return x

    sharding = jax.tree.map(lambda leaf: leaf.sharding, state)
    ways = {
        "dispatch_pmap": run.placement.map(count_up, donate=True),
        "dispatch_jit": jax.jit(count_up, donate_argnums=0, out_shardings=sharding),
    }
    params = jax.tree.map(jnp.copy, state.params)
    reduce = run.placement.map(lambda tree: lax.psum(tree, AXIS))
    small, numbers = run.placement.map(small), run.placement.replicate(jnp.ones(64))

    def advance(way: Callable) -> None:
        nonlocal state
        state = jax.block_until_ready(way(state))

    runs = {name: partial(advance, way) for name, way in ways.items()}
    runs["reduce_seconds"] = lambda: jax.block_until_ready(reduce(params))
    runs["small"] = lambda: jax.block_until_ready(small(numbers))
    medians = {
        name: statistics.median(seconds)
        for name, seconds in interleaved(runs, rounds=20, warmup=3).items()
    }
    medians["small_reduce_seconds"] = medians.pop("small") / chain
    return medians | {"leaves": len(jax.tree.leaves(state))}


def expected(architecture: Architecture, sync: bool) -> dict[str, int]:
    """Predict from the plan: numbers, bytes contributed by one device, latencies.

    Gradients and running statistics are summed once per step. With synchronized
    statistics each norm adds three all-reduces that wait for each other and for the
    previous layer: mean, variance, and in the backward pass the cotangents of both.
    """
    rows = layer_table(plan(architecture, (32, 32, 3)), (32, 32, 3))
    parameters = sum(row.parameters for row in rows)
    norms = [row.parameters for row in rows if "norm" in row.name.rsplit("/", 1)[1]]
    # A norm has as many running statistics as parameters.
    numbers = parameters + SCALARS + sum(norms) * (3 if sync else 1)
    return {
        "parameters": parameters,
        "norms": len(norms),
        "expected_bytes": 4 * numbers,
        "latencies": 3 * len(norms) if sync else 0,
    }


_RESULT = re.compile(r" = (.*?) all-reduce(?:-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+(\d+)\[([\d,]*)\]")


def all_reduces(text: str) -> dict[str, int]:
    """Count the all-reduces of a compiled program and their bytes."""
    found = [match[1] for line in text.splitlines() if (match := _RESULT.search(line))]
    total = sum(
        int(bits) // 8 * math.prod(int(side) for side in sides.split(",") if side)
        for result in found
        for bits, sides in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", result))
    )
    return {"all_reduces": len(found), "all_reduce_bytes": total}


@dataclass(frozen=True)
class Link:
    """Devices and the network between them."""

    name: str
    chip: str
    devices: int
    bandwidth: float
    """Bytes/s out of one device, in one direction."""
    latency: float
    """Seconds of an all-reduce of a few numbers."""
    flops: float
    """Peak FLOP/s of a device, bfloat16."""
    memory: float
    """Bytes/s of a device's memory."""


def _nccl_tree(a_node: int, nodes: int) -> float:
    """Return seconds of a small all-reduce in NCCL's own model (Tree, LL)."""
    return 1e-6 * (6.8 + 2 * ((a_node - 1) * 0.6 + math.log2(nodes) * 5.0))


def _torus(*sides: int) -> float:
    """Return seconds of a small all-reduce: to the far end of each ring and back."""
    return 2 * sum(side // 2 for side in sides) * 1e-6


LINKS = (
    Link("8 H100, NVLink", "H100", 8, 450e9, _nccl_tree(8, 1), 989e12, 3.35e12),
    Link("64 H100, NDR", "H100", 64, 50e9, _nccl_tree(8, 8), 989e12, 3.35e12),
    Link("8 TPU v5e", "TPU v5e", 8, 200e9, _torus(2, 4), 197e12, 0.819e12),
    Link("256 TPU v5e", "TPU v5e", 256, 200e9, _torus(16, 16), 197e12, 0.819e12),
    Link("64 TPU v5p", "TPU v5p", 64, 600e9, _torus(4, 4, 4), 459e12, 2.765e12),
)
"""NVLink 900 GB/s both ways, H100 SXM: NVIDIA's data sheet. NDR InfiniBand: one port of
400 Gb/s per GPU. Latencies of GPUs: NVIDIA/nccl, src/graph/tuning.cc (base 6.8 us,
NVLink 0.6 us, network 5.0 us per hop). TPU: docs.cloud.google.com/tpu/docs, v5e and v5p
(400 and 1200 GB/s both ways); 1 us per hop: jax-ml/scaling-book, sharding.md."""
PAPER = {
    name: (PRESETS[name].architecture, (32, 32, 3))
    for name in ("he2016-resnet20", "he2016-resnet164", "he2016-resnet1001")
} | {"resnet50-sized": (LIKE_RESNET50, (224, 224, 3))}
PASSES, REACHED = 9, 0.3
"""Assumed: a step reads or writes each convolution's bfloat16 output so often (forward:
statistics, convolution in and out; backward: two products' inputs twice, one output,
one sum), and reaches this share of the roofline."""
COMBINED_BYTES, COMBINED_ARRAYS = 30 * 2**20, 256
"""What XLA's GPU compiler puts into one all-reduce at most (collective_utils.h,
gpu_compiler.cc)."""
VISIBLE = 0.1
"""Communication counts as visible from this share of the computation on."""


def image_seconds(net: str, link: Link, measured: dict[str, float]) -> float:
    """Return seconds per training image on one device: measured, or by the roofline."""
    if link.chip == "H100" and net in measured:
        return 1 / measured[net]
    rows = layer_table(plan(*PAPER[net]), PAPER[net][1])
    flops = 6 * sum(row.multiply_adds for row in rows)
    outputs = sum(math.prod(row.shape) for row in rows if row.multiply_adds)
    bound = max(flops / link.flops, 2 * PASSES * outputs / link.memory)
    return bound / REACHED


def communication(net: str, link: Link, sync: bool) -> dict[str, float]:
    """Return seconds per step for the ring's bytes and for waiting for statistics."""
    facts, n = expected(PAPER[net][0], sync), link.devices
    ring = 2 * (n - 1) / n * facts["expected_bytes"] / link.bandwidth
    return {"ring": ring, "waiting": facts["latencies"] * link.latency}


def gradient_pieces(net: str) -> int:
    """Count the all-reduces of the gradients in XLA's GPU program.

    The last one overlaps least. The nets of PAPER have no biases in convolutions.
    """
    rows = layer_table(plan(*PAPER[net]), PAPER[net][1])
    arrays = sum(2 if row.name.endswith("norm") else 1 for row in rows) + 1
    size = 4 * sum(row.parameters for row in rows)
    return max(math.ceil(size / COMBINED_BYTES), math.ceil(arrays / COMBINED_ARRAYS))


def paper(measured: dict[str, float]) -> str:
    """Return predicted bytes, times and smallest batches as Markdown.

    Args:
        measured: images/s on one H100 by net, where known.
    """
    lines = [
        "| net | parameters | norms | gradients and running statistics MB "
        "| with synchronized statistics MB | all-reduces that wait "
        "| of gradients, GPU |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for net, (architecture, _) in PAPER.items():
        local, sync = (expected(architecture, s) for s in (False, True))
        lines.append(
            f"| {net} | {sync['parameters']:,} | {sync['norms']} "
            f"| {local['expected_bytes'] / 1e6:.2f} "
            f"| {sync['expected_bytes'] / 1e6:.2f} | {sync['latencies']:,} "
            f"| {gradient_pieces(net)} |"
        )
    lines += [
        "",
        "| devices | net | ring, ms | one wait, us | waits, ms | images/s a device "
        f"| batch a device for {VISIBLE:.0%}, synchronized | not synchronized |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for link in LINKS:
        for net in PAPER:
            a, b = (communication(net, link, sync) for sync in (True, False))
            image = image_seconds(net, link, measured)
            least = [math.ceil(sum(c.values()) / VISIBLE / image) for c in (a, b)]
            known = "" if link.chip == "H100" and net in measured else "~"
            lines.append(
                f"| {link.name} | {net} | {1e3 * a['ring']:.3f} "
                f"| {1e6 * link.latency:.0f} | {1e3 * a['waiting']:.2f} "
                f"| {known}{1 / image:,.0f} | {least[0]:,} | {least[1]:,} |"
            )
    return "\n".join(lines)


def measured_speeds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return images/s of our best training rows of ``benchmarks.gpu``, by net."""
    best: dict[str, float] = {}
    for row in rows:
        if row.get("status") == "ok" and row.get("contestant") == "ours":
            speed = row["images_per_second"]
            best[row["net"]] = max(best.get(row["net"], 0.0), speed)
    return best


def table(rows: list[dict[str, Any]]) -> str:
    """Return the newest successful rows as Markdown, and then the failures."""
    good = {(r["net"], r["mode"], r["devices"]): r for r in rows if r["status"] == "ok"}
    lines = [
        "| net | mode | devices | batch | images/s | spread | efficiency | all-reduces "
        "| KB each device gives (plan) | dispatch ms, pmap | jit | sum alone, ms "
        "| one small all-reduce, us |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (net, mode, count), row in sorted(
        good.items(),
        key=lambda item: (item[0][0], MODES.index(item[0][1]), item[0][2]),
    ):
        one = good.get((net, mode, 1))
        speed = row["images_per_second"]
        given = row.get("all_reduce_bytes")
        cells = [
            net,
            mode,
            str(count),
            str(row["batch"]),
            f"{speed:.0f}",
            f"{row['spread']:.1%}",
            f"{speed / one['images_per_second']:.2f}" if one else "-",
            str(row.get("all_reduces", "-")),
            f"{given / 1e3:,.1f} ({row['expected_bytes'] / 1e3:,.1f})"
            if given
            else "-",
            f"{1e3 * row['dispatch_pmap']:.2f}",
            f"{1e3 * row['dispatch_jit']:.2f}",
            f"{1e3 * row['reduce_seconds']:.2f}",
            f"{1e6 * row['small_reduce_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    known = {row["id"] for row in good.values()}
    failed = {r["id"]: r for r in rows if r["status"] != "ok" and r["id"] not in known}
    lines += [f"- {name}: {row['error']}" for name, row in failed.items()]
    return "\n".join(lines)


def _jobs(quick: bool) -> list[str]:
    if quick:
        return [f"tiny/strong/{count}" for count in (1, 2)]
    nets = ("quickstart", "he2016-resnet20")
    jobs = [f"{net}/{mode}/{n}" for net in nets for mode in MODES for n in DEVICES]
    # Where the leaves are many and the norms too: what they add, at the two ends.
    return jobs + [f"he2016-resnet164/strong/{n}" for n in (1, 8)]


def main() -> None:
    """Measure what has no row yet, or one job, or print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=40, help="for all of them")
    parser.add_argument("--seconds", type=float, default=8, help="of a row's steps")
    parser.add_argument("--only", default="", help="rows whose id has this in it")
    parser.add_argument("--out", type=Path, help="receives the rows")
    parser.add_argument("--quick", action="store_true", help="a tiny net, two rows")
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--paper", action="store_true", help="print accelerators only")
    parser.add_argument("--job", help="measure this row here and print it")
    given = parser.parse_args()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if given.job:
        name, mode, count = given.job.split("/")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", int(count))
        print(MARK + json.dumps(measure(name, mode, int(count), given.seconds)))
        return
    if given.paper:
        print(paper(measured_speeds(read_rows(RESULTS / "gpu.jsonl"))))
        return
    quick = ROOT / "build" / "scaling-quick.jsonl"
    out = given.out or (quick if given.quick else RESULTS / "scaling.jsonl")
    if not given.table:
        _run_all(given, out)
    print(table(read_rows(out)))


def _run_all(given: argparse.Namespace, out: Path) -> None:
    end = time.monotonic() + 60 * given.minutes
    done = {row["id"] for row in read_rows(out) if row["status"] == "ok"}
    for name in _jobs(given.quick):
        left = end - time.monotonic()
        if given.only not in name or (name in done and not given.quick) or left < 0:
            continue
        command = [sys.executable, "-m", "benchmarks.scaling", "--job", name]
        command += ["--seconds", str(1 if given.quick else given.seconds)]
        row = run_job(Job(name, tuple(command), estimate=0, timeout=600), left)
        append(out, {"benchmark": "scaling"} | row)


if __name__ == "__main__":
    main()
