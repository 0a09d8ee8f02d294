"""The time from the start of the process to the end of the first training step.

    python -m benchmarks.startup
    python -m benchmarks.startup --recipes quickstart
    python -m benchmarks.startup --table

The real command ``python train.py RECIPE`` runs until ``metrics.jsonl`` has its first
line (``--log-every 1``), and is then terminated. "cold": with empty caches of compiled
programs and of decoded images; "warm": the same again. Each time a second process does
the same with the package's own functions and times every part:

imports: the interpreter's start, and jax, flax, optax, orbax, the package.
data: opening the data set.
state: initial parameters and optimizer, on the device.
lower, compile: tracing and lowering the step; XLA, or reading from its cache.
step: running it for the first time, which also touches its memory for the first time.

Rows go to ``benchmarks/results/startup.jsonl``. CIFAR-10 is found where the command
finds it; its files are linked into an empty directory, which has no decoded images.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.jobs import MARK, ROOT
from benchmarks.measure import RESULTS, append, provenance, read_rows

BEGAN = "STARTUP_BEGAN"
"""The environment variable with the time at which a process was started."""
BATCH = {"cifar10-he2016-resnet164": 128}
"""Batch sizes that differ from the recipe's."""
LIMIT = 300
"""Seconds after which a start counts as failed."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    recipes: tuple[str, ...] = ("quickstart", "cifar10-he2016-resnet164")
    """Recipes of train.py."""
    warm: int = 3
    """Number of warm starts; the table has their median."""
    out: Path = RESULTS / "startup.jsonl"
    """File for the rows."""
    table: bool = False
    """Only print the table of the existing rows."""
    parts: str | None = None
    """Start this recipe in this process and print how long each part takes."""


def main(options: Options) -> None:
    """Measure, append rows, print the table."""
    if options.parts:
        print(MARK + json.dumps(parts(options.parts)))
        return
    if not options.table:
        for recipe in options.recipes:
            for row in measure(recipe, options.warm):
                append(options.out, row | provenance())
    print(table(read_rows(options.out)))


def measure(recipe: str, warm: int) -> list[dict[str, Any]]:
    """Start a recipe cold once and warm several times; return a row for each."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        commands = (
            _start(recipe, root, os.environ | _linked_data(root / "data-0")),
            _parts(recipe, os.environ | _linked_data(root / "data-1")),
        )
        for number in range(warm + 1):
            # Each kind of process has a cache of its own, so that both start cold.
            total, detail = (
                run(root / f"cache-{kind}") for kind, run in enumerate(commands)
            )
            row = {"benchmark": "startup", "recipe": recipe}
            row["kind"] = "warm" if number else "cold"
            rows.append(row | {"seconds": round(total, 2)} | detail)
    return rows


def _linked_data(linked: Path) -> dict[str, str]:
    """Yield a directory with links to CIFAR-10's files and without decoded images."""
    given = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    linked.mkdir()
    for path in Path(given).glob("cifar10/*/*"):
        target = linked / path.relative_to(given)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    return {"TFDS_DATA_DIR": str(linked)}


def _start(recipe: str, root: Path, environment: dict[str, str]) -> Any:
    def run(cache: Path) -> float:
        workdir = Path(tempfile.mkdtemp(dir=root))
        command = [sys.executable, "train.py", recipe, "--workdir", str(workdir)]
        command += ["--log-every", "1"]
        if recipe in BATCH:
            command += ["--train.batch-size", str(BATCH[recipe])]
        began = time.perf_counter()
        with (workdir / "output").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment | {"XDG_CACHE_HOME": str(cache)},
                stdout=output,
                stderr=output,
            )
        try:
            metrics = workdir / "metrics.jsonl"
            while not metrics.exists() or not metrics.read_text():
                waited = time.perf_counter() - began
                if process.poll() is not None or waited > LIMIT:
                    raise RuntimeError((workdir / "output").read_text()[-500:])
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            process.kill()
            process.wait()

    return run


def _parts(recipe: str, environment: dict[str, str]) -> Any:
    def run(cache: Path) -> dict[str, float]:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.startup", "--parts", recipe],
            cwd=ROOT,
            env=environment | {"XDG_CACHE_HOME": str(cache), BEGAN: str(time.time())},
            capture_output=True,
            text=True,
            check=True,
        )
        line = [row for row in done.stdout.splitlines() if row.startswith(MARK)][-1]
        return json.loads(line.removeprefix(MARK))

    return run


def parts(recipe: str) -> dict[str, float]:
    """Do what ``fit`` does up to its first step; return the seconds of each part."""
    from flax_resnetv2.run import validate
    from flax_resnetv2.system import runtime

    runtime.tune()
    runtime.cache_compilations()
    import jax

    from flax_resnetv2.run import placement, trainer
    from flax_resnetv2.run.recipes import RECIPES

    seconds: dict[str, float] = {}
    last = float(os.environ[BEGAN])

    def lap(name: str) -> None:
        nonlocal last
        now = time.time()
        seconds[name], last = round(now - last, 3), now

    config = RECIPES[recipe].config
    if recipe in BATCH:
        config = replace(config, train=replace(config.train, batch_size=BATCH[recipe]))
    import orbax.checkpoint  # noqa: F401

    jax.devices()
    lap("imports")
    placed = placement.Placement(jax.local_devices())
    found = validate.validate(config, Path("nowhere"), placed.count, None)
    run = trainer.Trainer(*found, placed)
    lap("data")
    state = jax.block_until_ready(run.initial_state())
    lap("state")
    given = state, run.split("train"), run.order(0), jax.numpy.int32(1)
    lowered = jax.jit(run.train_step, donate_argnums=0).lower(*given)
    lap("lower")
    program = lowered.compile()
    lap("compile")
    jax.block_until_ready(program(*given))
    lap("step")
    return seconds


def table(rows: list[dict[str, Any]]) -> str:
    """Return the newest cold start and the median of the newest warm ones."""
    names = ("imports", "data", "state", "lower", "compile", "step")
    lines = [
        f"| recipe | start | to the end of step 1, s | {' | '.join(names)} |",
        f"|---|---|{'---:|' * (len(names) + 1)}",
    ]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        last = max(k for k, row in enumerate(mine) if row["kind"] == "cold")
        warm = sorted(mine[last + 1 :], key=lambda row: row["seconds"])
        for row in [mine[last], *warm[len(warm) // 2 : len(warm) // 2 + 1]]:
            cells = [recipe, row["kind"], f"{row['seconds']:.1f}"]
            cells += [f"{row[name]:.1f}" for name in names]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__.split("\n\n")[0]))
