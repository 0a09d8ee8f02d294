"""The costliest operations of a training step on the CPU.

    python -m benchmarks.operations he2016-resnet164
    python -m benchmarks.operations he2016-resnet164 --contestant linen

Several steps run under ``jax.profiler``. The times of the compiled program's operations
are summed by kind: opcode, fused operations, shape of the result, and part of the net
(without stack and unit, so that equal units share a line). Operations run in parallel,
so their times can add up to more than a step's. The profiler does not see Eigen's
convolutions; they have a line only where XLA waits for them.
"""

import gzip
import json
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks import peers
from benchmarks.measure import RESULTS, append, provenance
from flax_resnetv2.system import runtime

WARMUP = 4
"""Steps until the process's memory is stable."""
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(?[a-z]+[\d\[\],]*).*$")
_OPCODE = re.compile(r"[\])}] ([a-z][a-z\-]*)\(")
_FUSED = ("dot", "convolution", "reduce", "pad", "select", "transpose")


def main(
    net: tyro.conf.Positional[str],
    contestant: str = "ours",
    steps: int = 3,
    batch: int = 128,
    top: int = 10,
) -> None:
    """Print the costliest operations of a step, and append them as a row.

    Args:
        net: A preset.
        contestant: ours, or linen.
        steps: Steps to profile; 1 for linen, whose convolutions make gigabytes of
            events.
        batch: Images per step.
        top: Lines to print.
    """
    runtime.tune()
    jax.config.update("jax_enable_compilation_cache", False)
    task = peers.Task.of_preset(net, batch=batch)
    rival = peers.CONTESTANTS[contestant](task)
    rival.train(WARMUP)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            began = time.perf_counter()
            rival.train(steps)
            seconds = (time.perf_counter() - began) / steps
        (path,) = Path(directory).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    rows = costs(rival.step_text, events, steps)
    row = {"benchmark": "operations", "net": net, "batch": batch}
    row |= {"contestant": contestant, "steps": steps, "step_seconds": seconds}
    append(RESULTS / "operations.jsonl", row | {"top": rows[:top]} | provenance())
    print(table(seconds, rows[:top]))


def costs(
    text: str, events: list[dict[str, Any]], steps: int
) -> list[dict[str, float | str]]:
    """Sum the events of a trace by kind of operation, the costliest first.

    Args:
        text: the compiled program.
        events: the trace's events, in microseconds.
        steps: number of executions of the program.
    """
    kinds = describe(text)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("ph") == "X" and event["name"] in kinds:
            kind = kinds[event["name"]]
            seconds[kind] += event["dur"] / 1e6 / steps
            calls[kind] += 1
    return [
        {"operation": kind, "seconds": s, "calls": calls[kind] / steps}
        for kind, s in seconds.most_common()
    ]


def describe(text: str) -> dict[str, str]:
    """Return the kind of each instruction of a compiled program."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    instructions: dict[str, tuple[str, str]] = {}
    for line in text.splitlines():
        if found := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations.setdefault(found[1], [])
        elif found := _INSTRUCTION.match(line):
            lines.append(line)
            instructions[found[1]] = (found[2], line)
    kinds = {}
    for name, (shape, line) in instructions.items():
        opcode = _OPCODE.search(line)
        what = opcode[1] if opcode else "?"
        if called := re.search(r"calls=%?([\w.\-]+)", line):
            found = [_OPCODE.search(inner) for inner in computations[called[1]]]
            inside = {match[1] for match in found if match}
            fused = [op for op in _FUSED if op in inside] or ["elementwise"]
            what = "+".join(fused)
        path = re.search(r'op_name="([^"]*)"', line)
        kinds[name] = f"{what} {shape.strip('(')}, {_place(path[1] if path else '')}"
    return kinds


def _place(path: str) -> str:
    """Return the pass and the part of the net that an operation belongs to."""
    way = "backward" if "transpose(" in path else "forward"
    part = re.search(r"layer\d|shortcut|stem|head", path.replace("_", "/"))
    return f"{part[0]} {way}" if part else "elsewhere"


def table(step: float, rows: list[dict[str, Any]]) -> str:
    """Return the costliest operations as Markdown."""
    lines = ["| operation | calls a step | ms a step |", "|---|---:|---:|"]
    lines += [
        f"| {r['operation']} | {r['calls']:g} | {1000 * r['seconds']:.0f} |"
        for r in rows
    ]
    return "\n".join([*lines, f"| whole step | 1 | {1000 * step:.0f} |"])


if __name__ == "__main__":
    tyro.cli(main, description=__doc__.split("\n\n")[0])
