"""Shared by all measurements: interleaved timing, and rows with their provenance.

A row is one JSON object with the measurement, device, versions and commit. Contestants
are timed in turns within one run, because a machine's speed drifts by more than the
differences that matter.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""Directory of the committed rows, one file per table."""
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "keras", "timm")


def provenance() -> dict[str, Any]:
    """Return the device, versions and commit for a row."""
    import jax

    commit = None
    # No git and no repository are no reason to lose a measurement.
    with contextlib.suppress(OSError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": jax.devices()[0].device_kind,
        "cores": usable_cores(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time each of ``runs`` once per round, in turns; return seconds by name.

    A run must wait for its own result. The order is reversed every second round, so
    that no contestant always follows the same one.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for name in names:
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Return median and spread (width of the middle half over the median)."""
    median = statistics.median(seconds)
    if len(seconds) < 4:
        spread = (max(seconds) - min(seconds)) / median
    else:
        low, _, high = statistics.quantiles(seconds, n=4)
        spread = (high - low) / median
    return {"seconds": median, "spread": round(spread, 4), "rounds": len(seconds)}


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a file of JSON lines, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row)
    with path.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file; an empty list if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]
