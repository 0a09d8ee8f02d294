"""A sweep: a queue of runs, one per override and seed, each in its own process.

``plan_sweep`` decides what runs; ``run_sweep`` runs it and resumes where it stopped.
The directory receives ``sweep.json`` (the plan), ``sweep.jsonl`` (a line per ended
run), a directory and a log per run, ``sweep.md`` and ``sweep.png`` (``sweep_table``).
"""

import contextlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flax_resnetv2.data.datasets import known_shape
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.model.layer_table import layer_table
from flax_resnetv2.model.planning import plan
from flax_resnetv2.reports import sweep_table
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.config import (
    SCHEMA,
    Config,
    check_config,
    differences,
    from_json,
)
from flax_resnetv2.system.files import write_whole
from flax_resnetv2.system.signals import Stop, run_child
from flax_resnetv2.validation import check, hints_of, shown

_logger = logging.getLogger(__name__)

_CHILD = (
    "from flax_resnetv2.system.signals import die_with_parent; die_with_parent(); "
    "from flax_resnetv2.cli.train import main; raise SystemExit(main())"
)
"""``train.py`` as a program for ``python -c``; its arguments follow."""


@dataclass(frozen=True)
class Override:
    """One of the configurations that a sweep compares."""

    words: str
    """Flags that change the recipe, for example "--train.epochs 3"; "" changes none."""
    config: Config
    directory: str
    """Name of the directory of its runs, within the sweep's directory."""

    @property
    def name(self) -> str:
        """Its name in tables and messages."""
        return self.words or "(unchanged)"


@dataclass(frozen=True)
class Sweep:
    """The plan of a sweep."""

    words: tuple[str, ...]
    """Arguments of ``train.py`` for all runs: recipe and flags."""
    config: Config
    """The configuration that ``words`` describe."""
    overrides: tuple[Override, ...]
    seeds: tuple[int, ...]

    def queue(self) -> list[tuple[Override, int]]:
        """Return all runs, seed by seed: a partial sweep still compares equal seeds."""
        return [(o, seed) for seed in self.seeds for o in self.overrides]


def plan_sweep(
    words: Sequence[str],
    config: Config,
    varied: Sequence[tuple[str, Config]],
    seeds: Sequence[int],
) -> Sweep:
    """Plan a sweep, without opening files or devices: each run checks those itself.

    Args:
        words, config: flags of all runs, and the configuration that they describe.
        varied: flags and resulting configuration of each override.
        seeds: seeds of each override.

    Raises:
        UsageError: a configuration is invalid, two overrides give the same one, or a
            seed is invalid or repeated.
    """
    for seed in seeds:
        check("seeds", seed, hints_of(Config)["seed"])
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(
            f"seeds={shown(tuple(seeds))} must be different numbers, at least one"
        )
    overrides: list[Override] = []
    for text, changed in varied:
        try:
            _check_override(changed)
        except UsageError as error:
            raise UsageError(f"--vary {text!r}: {error}" if text else error) from error
        if same := _find_same(changed, overrides):
            raise UsageError(
                f"--vary {text!r} and --vary {same.words!r} train the same; leave one "
                "of them out"
            )
        overrides.append(Override(text, changed, _directory(text, overrides)))
    return Sweep(tuple(words), config, tuple(overrides), tuple(seeds))


def _check_override(config: Config) -> None:
    """Refuse a configuration that no run could train, or that has no accuracy."""
    check_config(config)
    if config.architecture.head != "classifier":
        raise UsageError(
            "architecture.head='latent' has no accuracy, which a sweep compares; "
            "choose a recipe of a classifier"
        )
    shape, architecture = known_shape(config.data), config.architecture
    if architecture.num_classes is None:  # the data set decides
        architecture = replace(architecture, num_classes=2)
    plan(architecture, shape and config.augment.input_shape(shape))


def _directory(words: str, others: Sequence[Override]) -> str:
    """Return a new directory name that tells the flags: train.epochs_3."""
    name = re.sub(r"(^|\s)--", r"\1", words)
    name = re.sub(r"[^A-Za-z0-9.=,+-]+", "_", name)[:80].strip("._-") or "unchanged"
    if name in {o.directory for o in others}:
        name += f"-{zlib.crc32(words.encode()):08x}"
    return name


def _changes(old: Config, new: Config) -> list[str]:
    """Return the differences that affect what a run learns."""
    found = differences(old, new).items()
    return [text for field, text in found if field not in run_directory.MAY_CHANGE]


def _find_same(config: Config, overrides: Sequence[Override]) -> Override | None:
    """Return the override that trains the same as ``config``."""
    return next((o for o in overrides if not _changes(o.config, config)), None)


def load_sweep(workdir: Path) -> Sweep:
    """Read ``sweep.json``.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = workdir / "sweep.json"
    if not os.path.isfile(path):
        raise UsageError(
            f"workdir={workdir} is not a sweep's directory (no sweep.json); give one "
            "that a sweep made"
        )
    try:
        values = json.loads(path.read_text())
        for part in (values, *values["overrides"]):
            part["config"] = from_json(json.dumps(part["config"]))
        overrides = tuple(Override(**part) for part in values["overrides"])
        words, seeds = tuple(values["words"]), tuple(values["seeds"])
        return Sweep(words, values["config"], overrides, seeds)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} cannot be used ({error}); bring back a copy of it, or give "
            "another --workdir"
        ) from error


def _to_json(sweep: Sweep) -> str:
    values = asdict(sweep)
    for part in (values, *values["overrides"]):
        part["config"] = {"schema": SCHEMA, **part["config"]}
    return json.dumps(values, indent=2) + "\n"


def join(old: Sweep, new: Sweep, workdir: Path) -> Sweep:
    """Return ``new`` as the continuation of ``old``, with its words and directories.

    Raises:
        UsageError: the flags of all runs differ, or a seed or override is missing.
    """
    overrides: list[Override] = []
    for override in new.overrides:
        if same := _find_same(override.config, old.overrides):
            override = replace(override, words=same.words, directory=same.directory)
        else:
            directory = _directory(override.words, [*old.overrides, *overrides])
            override = replace(override, directory=directory)
        overrides.append(override)
    changed = _changes(old.config, new.config)
    if missing := [str(seed) for seed in old.seeds if seed not in new.seeds]:
        changed.append(f"seeds: without {', '.join(missing)}")
    if not changed:  # otherwise every override would be missing
        kept = {o.words for o in overrides}
        missing = [o.words for o in old.overrides if o.words not in kept]
        changed = [f"without --vary {words!r}" for words in missing]
    if changed:
        raise UsageError(
            f"workdir={workdir} holds another sweep ({'; '.join(changed)}); seeds and "
            "overrides may be added, the rest must be the same, or give another "
            "--workdir"
        )
    return replace(new, overrides=tuple(overrides))


def run_sweep(sweep: Sweep, workdir: str | Path) -> None:
    """Run the unfinished runs of a sweep in ``workdir`` one by one, and report.

    A failed run does not end the sweep. This process starts no JAX backend, so an
    accelerator is free for the child processes.

    Raises:
        UsageError: the directory is in use, or holds a run or another sweep.
        RunError: runs failed (the same call repeats them), or a file is not writable.
        Stopped: SIGTERM or SIGINT came; the same call resumes the sweep.
    """
    workdir = Path(workdir)
    if run_directory.has_begun(workdir) or run_directory.is_run(workdir):
        raise UsageError(
            f"workdir={workdir} holds a run; give a sweep another --workdir"
        )
    run_directory.make_directory(workdir)
    try:
        # Signals before the first run end the process at once: nothing is lost.
        with run_directory.locked(workdir) as lock, Stop() as stop:
            if (workdir / "sweep.json").exists():
                sweep = join(load_sweep(workdir), sweep, workdir)
            write_whole(workdir / "sweep.json", _to_json(sweep))
            stop.listen()
            _run_queue(sweep, workdir, stop, lock)
    except OSError as error:  # of the sweep's own files; runs report theirs
        raise RunError(
            f"{error.filename or workdir} cannot be used ({error.strerror or error}); "
            "repair that, and give the same command to resume"
        ) from error


def _run_queue(sweep: Sweep, workdir: Path, stop: Stop, lock: int) -> None:
    finished = {_key(line) for line in read_lines(workdir) if line["status"] == "done"}
    queue, failed = sweep.queue(), []
    for number, (override, seed) in enumerate(queue, start=1):
        if (override.words, seed) in finished:
            continue
        title = f"run {number} of {len(queue)}: {override.name}, seed {seed}"
        log = workdir / override.directory / f"seed-{seed}.log"
        _logger.info("%s; log: %s", title, log)
        line = _run(sweep, override, seed, log, stop, lock)
        if line is None:
            report(sweep, workdir)
            raise Stopped(
                f"by {stop.requested or 'a signal to the run'} in {title}; everything "
                "is saved, and the same command resumes the sweep"
            )
        # Rewritten whole: whoever reads it meanwhile finds no partial line.
        lines = {_key(x): x for x in [*read_lines(workdir), line]}.values()
        text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in lines)
        write_whole(workdir / "sweep.jsonl", text)
        if line["status"] == "failed":
            failed.append(f"{override.name}, seed {seed}")
            _logger.info("  failed: %s", line["reason"])
        else:
            result = line["test"]["accuracy"], line["seconds"]
            _logger.info("  test accuracy %.4f; %.0f s", *result)
    _logger.info("%s", report(sweep, workdir))
    if failed:
        raise RunError(
            f"{len(failed)} of {len(queue)} runs ({'; '.join(failed)}); "
            f"{workdir / 'sweep.md'} has the reasons, and the same command repeats them"
        )


def _run(
    sweep: Sweep, override: Override, seed: int, log: Path, stop: Stop, lock: int
) -> dict[str, Any] | None:
    """Run one child process; return its line, or None if it was stopped."""
    if stop.requested:
        return None
    directory = log.with_suffix("")
    words = [*sweep.words, *shlex.split(override.words)]
    words += ["--no-report", "--seed", str(seed), "--workdir", str(directory)]
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{shlex.join(['train.py', *words])}\n")
        begin = file.tell()
    code = run_child([sys.executable, "-P", "-c", _CHILD, *words], log, stop, lock)
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    if code == 75 or (stop.requested and code in ended):
        return None
    line = {"override": override.words, "seed": seed, "status": "done", "reason": None}
    if code:
        return line | {"status": "failed", "reason": _reason(code, log, begin)}
    return line | outcome(directory)


def _reason(code: int, log: Path, begin: int) -> str:
    """Return why a run failed: the signal that ended it, or its last line of output."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    text = log.read_bytes()[begin:].decode(errors="replace").rstrip()
    last = text.splitlines()[-1].strip() if text else f"exit code {code}"
    return last.removeprefix("failed: ").removeprefix("error: ")


def outcome(directory: Path) -> dict[str, Any]:
    """Return the result of a finished run, from its own records."""
    config = run_directory.load_config(directory)
    last = {line["split"]: line for line in run_directory.read_metrics(directory)}
    start = run_directory.load_environment(directory)[-1]
    image_shape = tuple(run_directory.load_dataset_summary(directory)["image_shape"])
    shape = config.augment.input_shape(image_shape)
    layers = layer_table(plan(config.architecture, shape), shape)
    machine = ("commit", "python", "versions", "platform", "devices")
    names = ("loss", "accuracy", "count")
    scores = {
        split: {name: last[split][name] for name in names} if split in last else None
        for split in ("test", "validation")
    }
    return {
        **scores,
        "steps": last["test"]["step"],
        "epochs": config.train.epochs,
        "seconds": last["test"]["seconds"],
        "parameters": sum(row.parameters for row in layers),
        "multiply_adds": sum(row.multiply_adds for row in layers),
        **{name: start[name] for name in machine},
    }


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    """Read ``sweep.jsonl``: the newest line of each run; damaged lines are skipped."""
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
    """Write ``sweep.md``, which is returned, and ``sweep.png`` from ``sweep.jsonl``.

    Equal lines give equal bytes.
    """
    names = {o.words: o.name for o in sweep.overrides}
    lines = [line for line in read_lines(workdir) if line["override"] in names]
    lines = [line | {"override": names[line["override"]]} for line in lines]
    shared = shlex.join(sweep.words)
    table = sweep_table.compare(list(names.values()), lines)
    text = sweep_table.to_markdown(shared, table, sweep.seeds, lines)
    write_whole(workdir / "sweep.md", text)
    write_whole(workdir / "sweep.png", sweep_table.draw_sweep(shared, table))
    return text
