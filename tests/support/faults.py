"""Kill a run at random moments; it must end like an undisturbed one.

    python -m tests.support.faults --kills 50                # kill -9, one process
    python -m tests.support.faults --kills 20 --with-signal TERM
    python -m tests.support.faults --kills 10 --processes 2

Each kill comes a random time after the process started: while it starts, compiles,
trains, evaluates or writes a checkpoint (every five steps). Then all fields of
``metrics.jsonl`` except the times, and every byte of the last checkpoint's arrays, are
compared with those of an undisturbed run. The result is printed as a line of JSON; the
exit code is 1 if anything differs.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

TIMES = {"seconds", "images_per_second"}
RUN = [
    *("quickstart", "--architecture.units", "1", "1", "1"),
    *("--architecture.widths", "8", "16", "32", "--architecture.stem-width", "8"),
    *("--train.ema-decay", "0.9", "--data.validation", "500"),
    *("--checkpoint-steps", "5", "--log-every", "7"),
]
"""148 steps an epoch, about a hundred a second."""
LIMIT = 360
"""Seconds after which a process that should exit counts as hanging: more than the five
minutes that processes wait for each other to connect."""


@dataclass
class Faults:
    """The results of killing a run repeatedly."""

    kills: int = 0
    early: int = 0
    """Processes that were killed before they wrote a checkpoint."""
    whole: int = 0
    """Processes that exited with code 75: stopped and saved."""
    leaving: list[float] = field(default_factory=list)
    """Seconds from a kill until the last process had exited."""
    codes: list[int] = field(default_factory=list)
    """Exit codes of processes that were not killed."""
    differences: list[str] = field(default_factory=list)


def start(workdir: Path, epochs: int, processes: int) -> list[subprocess.Popen]:
    """Start or resume the run."""
    command = [
        sys.executable,
        "train.py",
        *RUN,
        "--train.epochs",
        str(epochs),
        "--no-report",
    ]
    command += ["--workdir", str(workdir)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    lives = []
    for process in range(processes):
        which = ["--coordinator", coordinator, "--processes", str(processes)]
        which += ["--process", str(process)]
        lives.append(
            subprocess.Popen(
                command + (which if processes > 1 else []),
                stdout=log,
                stderr=log,
                cwd=Path(__file__).parents[2],
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )
        )
    log.close()
    return lives


def wait(lives: list[subprocess.Popen], seconds: float) -> list[int | None]:
    """Wait at most this long; return exit codes, or None for those still running."""
    until = time.monotonic() + seconds
    while any(life.poll() is None for life in lives) and time.monotonic() < until:
        time.sleep(0.01)
    return [life.poll() for life in lives]


def disturb(
    workdir: Path,
    epochs: int,
    kills: int,
    processes: int,
    number: signal.Signals,
    longest: float,
    seed: int,
    after_progress: bool = False,
) -> Faults:
    """Start the run and kill one of its processes, repeatedly.

    Args:
        workdir, epochs, processes: the run.
        kills: number of kills.
        number: the signal.
        longest: largest number of seconds before a kill.
        seed: seed of the random times.
        after_progress: measure the time from the first new checkpoint, not from the
            start of the process.
    """
    rng, found = random.Random(seed), Faults()
    while found.kills < kills:
        before = steps_of(workdir)
        lives = start(workdir, epochs, processes)
        if after_progress:
            while steps_of(workdir) == before and None in wait(lives, 0):
                time.sleep(0.01)
        codes = wait(lives, rng.uniform(0, longest))
        if None not in codes:
            if any(codes):
                raise SystemExit(f"the run failed with {codes}; see {workdir}.log")
            raise SystemExit(f"it ended after {found.kills} kills; give more --epochs")
        victim = rng.choice([life for life in lives if life.poll() is None])
        victim.send_signal(number)
        began = time.monotonic()
        codes = wait(lives, LIMIT)
        found.leaving.append(time.monotonic() - began)
        if None in codes:
            found.differences.append(f"hung after kill {found.kills + 1}")
            for life in lives:
                life.kill()
                life.wait()
        # Before the first step a signal ends the process at once; later it saves.
        code = victim.returncode
        if number != signal.SIGKILL and code not in (75, 130, -number):
            found.differences.append(f"the signaled process exited with {code}")
        found.kills += 1
        found.early += steps_of(workdir) == before
        found.whole += 75 in codes
        others = [c for c, life in zip(codes, lives, strict=True) if life is not victim]
        found.codes += others
        if 0 in others:
            found.differences.append("a surviving process exited with code 0")
        print(f"kill {found.kills}: {codes}, step {steps_of(workdir)}", flush=True)
    return found


def steps_of(workdir: Path) -> int:
    """Return the newest step that is saved."""
    steps = (workdir / "checkpoints").glob("[0-9]*")
    return max((int(p.name) for p in steps if p.name.isdigit()), default=0)


def finish(workdir: Path, epochs: int, processes: int) -> None:
    """Run to the end."""
    lives = start(workdir, epochs, processes)
    for life in lives:
        life.wait(timeout=3600)
    if any(life.returncode for life in lives):
        raise SystemExit(f"an undisturbed run failed; see {workdir}.log")


def lines_of(workdir: Path) -> list[dict]:
    """Return all lines of metrics without the times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def arrays_of(workdir: Path) -> dict[str, bytes]:
    """Return the bytes of every array of the newest checkpoint, using orbax alone."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    newest = workdir / "checkpoints" / str(steps_of(workdir)) / "state"
    with warnings.catch_warnings(action="ignore"), ocp.PyTreeCheckpointer() as reader:
        # As NumPy arrays, because the run had other devices than this process.
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(newest.absolute()).item_metadata.tree,
        )
        tree = reader.restore(newest.absolute(), restore_args=plain)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def compare(one: Path, other: Path) -> list[str]:
    """Return the differences between two runs."""
    found = []
    a, b = lines_of(one), lines_of(other)
    if a != b:
        at = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
        found.append(f"metrics.jsonl: {len(a)} and {len(b)} lines, differing at {at}")
    x, y = arrays_of(one), arrays_of(other)
    found += [
        f"array {name}" for name in x.keys() | y.keys() if x.get(name) != y.get(name)
    ]
    return found


def main(
    kills: int = 50,
    with_signal: Literal["KILL", "TERM", "INT"] = "KILL",
    processes: int = 1,
    epochs: int = 12,
    longest: float = 9.0,
    seed: int = 0,
    directory: str | None = None,
) -> int:
    """Kill a run repeatedly and compare it with an undisturbed one.

    Args:
        kills: Number of kills.
        with_signal: KILL, TERM or INT.
        processes: Number of processes of the run; each kill hits a random one.
        epochs: Length of the run, which must suffice for all kills.
        longest: Largest number of seconds before a kill.
        seed: Seed of the random times.
        directory: Directory of the runs; None: a temporary one, deleted at the end.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(directory or temporary)
        root.mkdir(parents=True, exist_ok=True)
        alone, killed = root / f"alone-{processes}", root / f"killed-{with_signal}"
        began = time.monotonic()
        finish(alone, epochs, processes)
        undisturbed = time.monotonic() - began
        found = disturb(
            killed,
            epochs,
            kills,
            processes,
            signal.Signals[f"SIG{with_signal}"],
            longest,
            seed,
        )
        finish(killed, epochs, processes)
        found.differences += compare(alone, killed)
        last = [line for line in lines_of(killed) if line["split"] == "test"][-1]
    print(
        json.dumps(
            {
                "kills": found.kills,
                "signal": with_signal,
                "processes": processes,
                "lives_without_a_new_checkpoint": found.early,
                "stopped_and_saved": found.whole,
                "steps": last["step"],
                "test_accuracy": last["accuracy"],
                "undisturbed_seconds": round(undisturbed, 1),
                "seconds_until_all_had_left": {
                    "median": round(sorted(found.leaving)[len(found.leaving) // 2], 2),
                    "longest": round(max(found.leaving), 2),
                },
                "codes_of_survivors": sorted(set(found.codes)),
                "differences": found.differences,
            }
        )
    )
    return int(bool(found.differences))


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tests.support.faults"))
