"""A sweep: overrides x seeds as one queue of runs, each in a process of its own.

``plan_sweep`` decides what is to run, ``run_sweep`` runs it, and goes on where it was.
The directory receives ``sweep.json`` (the plan), ``sweep.jsonl`` (a line for each run
that ended), a directory and a log for each run, ``sweep.md`` and ``sweep.png``
(``comparison``).
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flax_resnetv2.data.datasets import known_shape
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.model.layer_table import layer_table
from flax_resnetv2.model.planning import plan
from flax_resnetv2.reports import sweep_table
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.config import (
    Config,
    check_config,
    differences,
    from_json,
    to_json,
)
from flax_resnetv2.system import files
from flax_resnetv2.system.signals import Stop, run_child
from flax_resnetv2.validation import check, hints_of, shown

_CHILD = (
    "from flax_resnetv2 import cli, process; process.follow_parent(); "
    "raise SystemExit(cli.train())"
)
"""``train.py``, where the package is installed without it; argv goes to it."""
_say = partial(print, flush=True)
"""Where a log keeps it, too, at once."""


@dataclass(frozen=True)
class Override:
    """One of the things compared: what it changes of the runs."""

    words: str
    """As given, as "--train.epochs 3"; empty: nothing is changed."""
    config: Config
    directory: str
    """Of its runs, within the sweep's."""

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        return self.words or "(as it is)"


@dataclass(frozen=True)
class Sweep:
    """What is to run."""

    words: tuple[str, ...]
    """What ``train.py`` gets for every run: recipe and flags."""
    config: Config
    """That they give."""
    overrides: tuple[Override, ...]
    seeds: tuple[int, ...]

    def queue(self) -> list[tuple[Override, int]]:
        """Every run: seed by seed, so that a sweep that ends early compares fairly."""
        return [(o, seed) for seed in self.seeds for o in self.overrides]


def plan_sweep(
    words: Sequence[str],
    config: Config,
    varied: Sequence[tuple[str, Config]],
    seeds: Sequence[int],
) -> Sweep:
    """Plan a sweep; nothing is read or written.

    What only files, data and devices can tell, each run finds by itself.

    Args:
        words, config: what all runs share.
        varied: what each override says, and the configuration that it gives.
        seeds: of each override's runs.

    Raises:
        UsageError: a configuration cannot be, two overrides give the same one, a seed
            is none or there twice.
    """
    for seed in seeds:
        check("seeds", seed, hints_of(Config)["seed"])
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"seeds={shown(tuple(seeds))} must be different numbers, at least one"
        )
    overrides: list[Override] = []
    for said, given in varied:
        try:
            check_config(given)
            if given.architecture.head != "classifier":
                raise UsageError(
                    "architecture.head='latent' has no accuracy, which a sweep "
                    "compares; choose a recipe of a classifier"
                )
            shape = known_shape(given.data)
            architecture = given.architecture
            if architecture.num_classes is None:  # the data set says how many
                architecture = replace(architecture, num_classes=2)
            plan(architecture, shape and given.augment.input_shape(shape))
        except UsageError as error:
            raise UsageError(f"--vary {said!r}: {error}" if said else error) from error
        if same := [o for o in overrides if not _learning(o.config, given)]:
            raise UsageError(
                f"--vary {said!r} and --vary {same[0].words!r} learn the same; leave "
                "one of them out"
            )
        overrides.append(Override(said, given, _directory(said, overrides)))
    return Sweep(tuple(words), config, tuple(overrides), tuple(seeds))


def _directory(words: str, others: Sequence[Override]) -> str:
    """A directory's name that says the words: train.epochs_3."""
    name = re.sub(r"(^|\s)--", r"\1", words)
    name = re.sub(r"[^A-Za-z0-9.=,+-]+", "_", name)[:80].strip("._-") or "as-it-is"
    if name in {o.directory for o in others}:
        name += f"-{zlib.crc32(words.encode()):08x}"
    return name


def _learning(old: Config, new: Config) -> list[str]:
    """The differences that decide what is learned."""
    found = differences(old, new)
    return [
        text for name, text in found.items() if name not in run_directory.MAY_CHANGE
    ]


def load_sweep(workdir: Path) -> Sweep:
    """Read ``sweep.json``.

    Raises:
        UsageError: there is none, or it is none.
    """
    path = workdir / "sweep.json"
    if not os.path.isfile(path):
        raise UsageError(
            f"workdir={workdir} is not a sweep's directory (no sweep.json); give one "
            "that a sweep made"
        )
    try:
        facts = json.loads(path.read_text())
        return Sweep(
            tuple(facts["words"]),
            from_json(json.dumps(facts["config"])),
            tuple(
                Override(o["words"], from_json(json.dumps(o["config"])), o["directory"])
                for o in facts["overrides"]
            ),
            tuple(facts["seeds"]),
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} cannot be used ({error}); bring back a copy of it, or give "
            "another --workdir"
        ) from error


def _to_json(sweep: Sweep) -> str:
    def plain(config: Config) -> Any:
        return json.loads(to_json(config))

    facts = {
        "words": sweep.words,
        "seeds": sweep.seeds,
        "config": plain(sweep.config),
        "overrides": [
            {"words": o.words, "directory": o.directory, "config": plain(o.config)}
            for o in sweep.overrides
        ],
    }
    return json.dumps(facts, indent=2) + "\n"


def join(old: Sweep, new: Sweep) -> Sweep:
    """``new`` as the continuation of ``old``: runs of both are known by the old names.

    Raises:
        UsageError: what all runs share differs, or a seed or override is left out.
    """
    changed = _learning(old.config, new.config)
    if missing := [str(seed) for seed in old.seeds if seed not in new.seeds]:
        changed.append(f"seeds: without {', '.join(missing)}")
    overrides: list[Override] = []
    for override in new.overrides:
        same = [o for o in old.overrides if not _learning(o.config, override.config)]
        if same:
            known = same[0]
            override = replace(override, words=known.words, directory=known.directory)
        else:
            name = _directory(override.words, [*old.overrides, *overrides])
            override = replace(override, directory=name)
        overrides.append(override)
    kept = {o.words for o in overrides}
    if not changed:  # else every override would be missing
        changed = [
            f"without --vary {o.words!r}" for o in old.overrides if o.words not in kept
        ]
    if changed:
        raise UsageError(
            f"it holds another sweep ({'; '.join(changed)}); seeds and overrides may "
            "be added, the rest must be the same, or give another --workdir"
        )
    return replace(new, overrides=tuple(overrides))


def run_sweep(sweep: Sweep, workdir: str | Path) -> None:
    """Run what is not finished, one process after the other, and report.

    A run that fails does not end the sweep. This process starts no JAX backend: an
    accelerator is the children's alone.

    Args:
        sweep: what is to run.
        workdir: the sweep's directory, new or of this sweep.

    Raises:
        UsageError: the directory is in use, is not a sweep's, or holds another sweep.
        RunError: runs have failed, the same call tries them again; or a file cannot be
            written.
        Stopped: SIGTERM or SIGINT came; the same call goes on.
    """
    workdir = Path(workdir)
    if run_directory.has_begun(workdir) or run_directory.is_run(workdir):
        raise UsageError(
            f"workdir={workdir} holds a run; give a sweep another --workdir"
        )
    run_directory.make_directory(workdir)
    try:
        _go(sweep, workdir)
    except OSError as error:  # a run's own are told by its process
        raise RunError(
            f"{error.filename or workdir} cannot be used ({error.strerror or error}); "
            "see to it, and give the same command to go on"
        ) from error


def _go(sweep: Sweep, workdir: Path) -> None:
    """``run_sweep`` in a directory that is there."""
    # Before its first run a sweep can be ended without a loss.
    with run_directory.locked(workdir) as lock, Stop() as stop:
        sweep = _agree(sweep, workdir)
        stop.listen()
        finished = {_key(x) for x in read_lines(workdir) if x["status"] == "done"}
        queue, failed = sweep.queue(), []
        for number, (override, seed) in enumerate(queue, start=1):
            if (override.words, seed) in finished:
                continue
            which = f"run {number} of {len(queue)}: {override.name}, seed {seed}"
            log = workdir / override.directory / f"seed-{seed}.log"
            _say(f"{which}; it writes {log}")
            line = (
                None if stop.requested else _run(sweep, override, seed, log, stop, lock)
            )
            if line is None:
                report(sweep, workdir)
                raise Stopped(
                    f"by {stop.requested or 'a signal to the run'} in {which}; all is "
                    "saved, and the same command goes on"
                )
            _append(workdir / "sweep.jsonl", line)
            if line["status"] == "failed":
                failed.append(f"{override.name}, seed {seed}")
                _say(f"  failed: {line['reason']}")
            else:
                _say(
                    f"  test accuracy {line['test']['accuracy']:.4f}; "
                    f"{line['seconds']:.0f} s"
                )
        _say(report(sweep, workdir))
        if failed:
            raise RunError(
                f"{len(failed)} of {len(queue)} runs ({'; '.join(failed)}); "
                f"{workdir / 'sweep.md'} says why, and the same command tries again"
            )


def _agree(sweep: Sweep, workdir: Path) -> Sweep:
    """Go on with the sweep of a directory, or begin one, and write down what it is."""
    path = workdir / "sweep.json"
    if path.exists():
        try:
            sweep = join(load_sweep(workdir), sweep)
        except UsageError as error:
            raise UsageError(f"workdir={workdir}: {error}") from error
    files.write_whole(path, _to_json(sweep))
    return sweep


def _run(
    sweep: Sweep, override: Override, seed: int, log: Path, stop: Stop, lock: int
) -> dict[str, Any] | None:
    """One run to its end: its line; None: it was stopped."""
    directory = log.with_suffix("")
    words = [*sweep.words, *shlex.split(override.words)]
    words += ["--no-report", "--seed", str(seed), "--workdir", str(directory)]
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(f"{shlex.join(['train.py', *words])}\n")
        begin = file.tell()
    code = run_child([sys.executable, "-c", _CHILD, *words], log, stop, lock)
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    if code == 75 or (stop.requested and code in ended):
        return None
    line = {"override": override.words, "seed": seed, "status": "done", "reason": None}
    if code:
        return line | {"status": "failed", "reason": _reason(code, log, begin)}
    return line | outcome(directory)


def _reason(code: int, log: Path, begin: int) -> str:
    """Why a run failed: its last words, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    text = log.read_bytes()[begin:].decode(errors="replace")
    said = [line for line in text.splitlines() if line.strip()]
    if not said:
        return f"exit code {code}"
    return said[-1].strip().removeprefix("failed: ").removeprefix("error: ")


def outcome(directory: Path) -> dict[str, Any]:
    """What is told of a finished run, from its own records."""
    config = run_directory.load_config(directory)
    last = {line["split"]: line for line in run_directory.read_metrics(directory)}
    start = run_directory.load_environment(directory)[-1]
    image_shape = tuple(run_directory.load_dataset_summary(directory)["image_shape"])
    shape = config.augment.input_shape(image_shape)
    layers = layer_table(plan(config.architecture, shape), shape)

    def scores(split: str) -> dict[str, Any] | None:
        names = ("loss", "accuracy", "count")
        return {n: last[split][n] for n in names} if split in last else None

    return {
        "test": scores("test"),
        "validation": scores("validation"),
        "steps": last["test"]["step"],
        "epochs": config.train.epochs,
        "seconds": last["test"]["seconds"],
        "parameters": sum(row.parameters for row in layers),
        "multiply_adds": sum(row.multiply_adds for row in layers),
        **{k: start[k] for k in ("commit", "python", "versions", "platform")},
        "devices": start["devices"],
    }


def _append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, whole and on disk, behind what is there."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            # One that was cut off must not swallow this one.
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """Read ``sweep.jsonl``: the newest line of each run; a damaged one is left out."""
    path, lines = workdir / "sweep.jsonl", {}
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            if line["status"] == "failed" or float(line["test"]["accuracy"]) >= 0:
                lines[_key(line)] = line
    return list(lines.values())


def _key(line: dict[str, Any]) -> tuple[str, int]:
    return line["override"], line["seed"]


def report(sweep: Sweep, workdir: Path) -> str:
    """Write ``sweep.md`` and ``sweep.png`` from the lines; the same bytes again.

    Returns:
        The text of ``sweep.md``.
    """
    names = {o.words: o.name for o in sweep.overrides}
    lines = [
        line | {"override": names[line["override"]]}
        for line in read_lines(workdir)
        if line["override"] in names
    ]
    shared = shlex.join(sweep.words)
    table = sweep_table.compare(list(names.values()), lines)
    text = sweep_table.to_markdown(shared, table, sweep.seeds, lines)
    files.write_whole(workdir / "sweep.md", text)
    files.write_whole(workdir / "sweep.png", sweep_table.draw_sweep(shared, table))
    return text
