"""Time and memory by depth, and whether a scan over equal units would pay.

    python -m benchmarks.depth --minutes 60
    python -m benchmarks.depth --quick      # tiny nets, under a minute
    python -m benchmarks.depth --table

All units of a stack except the first have equal plans, so one compiled body could run
them all. ``Scanned`` does that: it stacks their variables, runs ``lax.scan`` over one
unit and unstacks the statistics; its inputs and outputs are the model's own variables.
The contestants run he2016 nets on 32x32 images, each with the three values of
``Execution.remat``: "loop-..." is the model itself, "scan-..." the scan ("scan-units"
has its body under ``jax.checkpoint``). "...-automatic" uses the textbook operations,
and so XLA's own convolutions, instead of those of ``ops``.

One training step (donated state, float32, one batch that stays on the device) is traced
and lowered, compiled, and run. Each contestant runs in its own process; rows go to
``benchmarks/results/depth.jsonl``. The same command resumes where it stopped. Pin it
with ``taskset``. Fields of a row besides the median and the spread of its steps:

lower_seconds, compile_seconds: without a compilation cache.
temp_bytes, argument_bytes, output_bytes, alias_bytes: of the compiled program;
    temporary bytes are those besides arguments and results.
peak_rss_bytes: peak memory of the process, compiler included.
first_seconds: the first call; if it is slower than four times --limit, the only one.
fastest: the fastest step. Other work on the machine only makes steps slower.
loss, gradient_norm: after the first step; equal for all contestants of a net.
loops, elsewhere: operations of the compiled program inside ``while`` bodies, and
    outside of them: their number, and how many convolutions are in a layout that
    XLA's CPU backend computes by its slow element-wise loop ("slow_convolution").
"""

import argparse
import json
import os
import re
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.jobs import MARK, ROOT, Job, run_job
from benchmarks.measure import (
    RESULTS,
    append,
    interleaved,
    provenance,
    read_rows,
    summary,
)
from flax_resnetv2.data.batch import Batch
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.modules import (
    Convolution,
    Head,
    ResidualUnit,
    ResNetV2,
    Stem,
    create_model,
)
from flax_resnetv2.model.planning import StackPlan
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.model.semantics import HE2016
from flax_resnetv2.training.step import make_train_step

REMATS = ("nothing", "norms", "units")
WAYS = tuple(f"{how}-{what}" for how in ("loop", "scan") for what in REMATS)
AUTOMATIC = ("loop-automatic", "scan-automatic")
FEWEST, MOST = 3, 10
"""Fewest and most timed steps."""
_TINY = Architecture(
    units=(3,), widths=(8,), strides=(1,), reduction=4, stem_width=8, semantics=HE2016
)
"""The net of --quick."""


@dataclass(frozen=True)
class Case:
    """A net, and the ways of running it that are compared."""

    architecture: Architecture
    batch: int
    ways: tuple[str, ...] = WAYS


CASES = {
    "he2016-resnet1001": Case(PRESETS["he2016-resnet1001"].architecture, 8),
    "he2016-resnet164": Case(PRESETS["he2016-resnet164"].architecture, 128),
    "he2016-resnet56": Case(
        PRESETS["he2016-resnet56"].architecture, 128, WAYS + AUTOMATIC
    ),
    "he2016-resnet20": Case(
        PRESETS["he2016-resnet20"].architecture, 128, WAYS + AUTOMATIC
    ),
}
QUICK = {
    "tiny": Case(_TINY, 4, ("loop-norms", "scan-norms", "scan-units", "scan-automatic"))
}


@dataclass(frozen=True)
class Scanned:
    """The same net, its equal units run by ``lax.scan``; used as a model's ``apply``.

    Pure functions around the project's modules, not a module: the variables stay the
    tree that ``model`` has, and nothing else sees that they are stacked inside.
    """

    model: ResNetV2

    @property
    def execution(self) -> Execution:
        """How it is run."""
        return self.model.execution

    def apply(
        self, variables: Any, images: jax.Array, *, train: bool, mutable: Any = False
    ) -> Any:
        """Return what ``model.apply`` returns, with the statistics if they are mutable.

        Args:
            variables: params and batch_stats.
            images: [N, H, W, channels] float.
            train: as in the model.
            mutable: ["batch_stats"], or False.
        """
        plan, execution = self.model.plan, self.execution
        updated: dict[str, Any] = {}

        def part(module: Any, name: str, x: jax.Array) -> jax.Array:
            x, updated[name] = _apply(module, _at(variables, name), x, train)
            return x

        x = images.astype(execution.dtype)
        if plan.stem is not None:
            x = part(Stem(plan.stem, execution), "stem", x)
        for number, stack in enumerate(plan.stacks, start=1):
            name = f"stack{number}"
            x, updated[name] = self._stack(stack, _at(variables, name), x, train)
        logits = part(Head(plan.head, execution), "head", x)
        stats = {name: values for name, values in updated.items() if values}
        return (logits, {"batch_stats": stats}) if mutable else logits

    def _stack(
        self, plan: StackPlan, variables: Any, x: jax.Array, train: bool
    ) -> tuple[jax.Array, Any]:
        """Run unit 1, the others by a scan, and the bridge."""
        first, *rest = plan.units
        if any(unit != rest[0] for unit in rest):
            raise ValueError("a stack whose units differ cannot be scanned")

        def run(unit: Any, x: jax.Array, variables: Any) -> tuple[jax.Array, Any]:
            return _apply(ResidualUnit(unit, self.execution), variables, x, train)

        again = train and self.execution.remat == "units"
        begin = jax.checkpoint(partial(run, first)) if again else partial(run, first)
        y, stats = begin(x, _at(variables, "unit1"))
        updated = {"unit1": stats}
        if rest:
            body = partial(run, rest[0])
            if again:
                # Forward and backward pass are loops apart: nothing could be merged.
                body = jax.checkpoint(body, prevent_cse=False)
            names = [f"unit{k}" for k in range(2, len(plan.units) + 1)]
            units = [_at(variables, name) for name in names]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *units)
            y, stats = jax.lax.scan(body, y, stacked)
            for place, name in enumerate(names):
                updated[name] = jax.tree.map(lambda s, place=place: s[place], stats)
        if plan.bridge == "identity":
            y += x
        elif plan.bridge is not None:
            bridge = Convolution(plan.bridge, self.execution)
            y += _apply(bridge, _at(variables, "bridge"), x, train)[0]
        return y, updated


def _at(variables: Any, name: str) -> Any:
    """Return the variables of one part, by collection."""
    return {kind: tree[name] for kind, tree in variables.items() if name in tree}


def _apply(
    module: Any, variables: Any, x: jax.Array, train: bool
) -> tuple[jax.Array, Any]:
    """Apply a module; return its result and batch_stats."""
    if isinstance(module, Convolution):
        return module.apply(variables, x), {}
    if not train:
        y = module.apply(variables, x, train=False)
        return y, variables.get("batch_stats", {})
    y, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return y, updated.get("batch_stats", {})


def build(architecture: Architecture, way: str, image_shape: tuple) -> Any:
    """Return the model that runs this way; all have equal variables and results."""
    how, what = way.split("-")
    if what == "automatic":
        execution = Execution(remat="nothing", backward="automatic")
    else:
        execution = Execution(remat=what)
    model = create_model(architecture, execution, image_shape)
    return Scanned(model) if how == "scan" else model


def measure(name: str, case: Case, way: str, limit: float) -> dict[str, Any]:
    """Lower, compile and run one training step in this process; return its row.

    Args:
        name: the net.
        case: the net and its batch.
        way: one of WAYS or AUTOMATIC.
        limit: seconds for the timed steps.
    """
    task = peers.Task(name, case.architecture, batch=case.batch)
    model = build(case.architecture, way, task.image_shape)
    # All ways have equal variables, so the state is anyone's.
    state = peers.training_state(create_model(case.architecture), task)
    step = make_train_step(model, peers.TRAIN, peers.PIXELS, seed=0, steps_per_epoch=99)
    batch = jax.device_put(
        Batch(task.pixels(), task.labels(), np.ones(task.batch, bool))
    )
    row: dict[str, Any] = {"net": name, "batch": case.batch, "way": way}
    row["units"] = case.architecture.units
    program, facts = peers.compiled(step, state, batch, donate=(0,))
    memory = program.memory_analysis()
    row |= facts | {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }
    row |= operations(program.as_text())
    began = time.perf_counter()
    state, metrics = jax.block_until_ready(program(state, batch))
    row["first_seconds"] = round(time.perf_counter() - began, 3)
    row["loss"] = float(metrics["loss"] / metrics["count"])
    norms = np.asarray(list(metrics["gradient_norm"].values()), float)
    row["gradient_norm"] = float(np.sqrt((norms**2).sum()))

    def run() -> None:
        nonlocal state
        state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))

    # The first call also touches its memory for the first time.
    if row["first_seconds"] <= 4 * limit:
        once = interleaved({way: run}, 1, warmup=0)[way][0]
        rounds = min(max(int(limit / once), FEWEST), MOST)
        seconds = interleaved({way: run}, rounds, warmup=0)[way]
        row |= summary(seconds) | {"fastest": min(seconds)}
        row["images_per_second"] = round(case.batch / row["seconds"], 2)
    # In KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row | {"peak_rss_bytes": peak} | provenance()


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = .*?[\])}] ([a-z][a-z\-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
COUNTED = ("convolution", "dot", "fusion", "while", "copy", "transpose")


def operations(text: str) -> dict[str, dict[str, int]]:
    """Count operations of a compiled program in "loops" and "elsewhere".

    A convolution is fast on the CPU if its dimensions are in the order of the backend's
    library; XLA transposes others, but only in the entry computation.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations.setdefault(found[1], [])
        elif line.startswith(" "):
            lines.append(line)
    calls: dict[str, set[str]] = {}
    bodies: set[str] = set()
    for name, lines in computations.items():
        called = calls.setdefault(name, set())
        for line in lines:
            for one, several in _CALLED.findall(line):
                called |= {n.strip(" %") for n in (several or one).split(",")}
            bodies |= set(re.findall(r"body=%?([\w.\-]+)", line))
    inside, waiting = set(), list(bodies)
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += calls.get(name, ())
    counts = {"loops": Counter(), "elsewhere": Counter()}
    for name, lines in computations.items():
        count = counts["loops" if name in inside else "elsewhere"]
        for line in lines:
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            count["all"] += 1
            count[found[1]] += found[1] in COUNTED
            count["parallel"] += '"outer_dimension_partitions":["' in line
            labels = re.search(r"dim_labels=(\S+?_\S+?->[\w]+)", line)
            if found[1] == "convolution" and labels[1] != "b01f_01io->b01f":
                count["slow_convolution"] += 1
    return {
        place: {key: n for key, n in count.items() if n}
        for place, count in counts.items()
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the newest successful rows as Markdown, and then the failures."""
    good = {(r["net"], r["batch"], r["way"]): r for r in rows if r["status"] == "ok"}
    order = [*WAYS, *AUTOMATIC]
    chosen = sorted(
        good.values(),
        key=lambda r: (sum(r["units"]), r["batch"], order.index(r["way"])),
    )
    lines = [
        "| net, batch | way | trace + lower, s | compile, s | temporary MB "
        "| arguments MB | peak process MB | s a step | spread | images/s "
        "| operations (in loops) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in chosen:
        inside, outside = (row[k].get("all", 0) for k in ("loops", "elsewhere"))
        timed = "seconds" in row
        cells = [
            f"{row['net']}, {row['batch']}",
            row["way"],
            f"{row['lower_seconds']:.1f}",
            f"{row['compile_seconds']:.1f}",
            *(
                f"{row[f'{kind}_bytes'] / 2**20:,.0f}"
                for kind in ("temp", "argument", "peak_rss")
            ),
            f"{row['seconds']:.3f}" if timed else f"{row['first_seconds']:.1f} (first)",
            f"{row['spread']:.1%}" if timed else "-",
            f"{row['images_per_second']:.1f}" if timed else "-",
            f"{inside + outside:,} ({inside:,})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    failed = {
        r["id"]: r for r in rows if r["status"] != "ok" and r["id"] not in _ids(good)
    }
    lines += [f"- {name}: {row['error']}" for name, row in failed.items()]
    return "\n".join(lines)


def _ids(good: dict[tuple, dict[str, Any]]) -> set[str]:
    return {row["id"] for row in good.values()}


def main() -> None:
    """Run the ways that have no row yet, or one of them, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.depth", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=60, help="for all of them")
    parser.add_argument(
        "--limit", type=float, default=15, help="seconds of a way's steps"
    )
    parser.add_argument("--only", default="", help="runs whose id has this in it")
    parser.add_argument("--out", type=Path, help="receives the rows")
    parser.add_argument("--quick", action="store_true", help="a tiny net")
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--job", help="do this one here and print its row")
    given = parser.parse_args()
    # Seconds of compiling are those of a first start.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    cases = QUICK if given.quick else CASES
    if given.job:
        name, way = given.job.split("/")
        row = measure(name, cases[name], way, given.limit)
        print(MARK + json.dumps(row))
        return
    quick = ROOT / "build" / "depth-quick.jsonl"
    out = given.out or (quick if given.quick else RESULTS / "depth.jsonl")
    if not given.table:
        _run_all(cases, given, out)
    print(table(read_rows(out)))


def _run_all(cases: dict[str, Case], given: argparse.Namespace, out: Path) -> None:
    end = time.monotonic() + 60 * given.minutes
    done = {row["id"] for row in read_rows(out) if row["status"] == "ok"}
    ids = [f"{name}/{way}" for name, case in cases.items() for way in case.ways]
    for name in ids:
        left = end - time.monotonic()
        if given.only not in name or (name in done and not given.quick) or left < 0:
            continue
        command = [sys.executable, "-m", "benchmarks.depth", "--job", name]
        command += ["--limit", str(given.limit), *["--quick"] * given.quick]
        row = run_job(Job(name, tuple(command), estimate=0, timeout=1800), left)
        append(out, {"benchmark": "depth"} | row)


if __name__ == "__main__":
    main()
