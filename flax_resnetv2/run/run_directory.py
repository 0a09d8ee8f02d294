"""The directory of a run: its records, its lock, and what a resumed run may change.

It holds ``config.json``, ``dataset.json``, ``environment.json`` (an entry per start),
``.lock``, ``metrics.jsonl`` (see ``metrics_log``), ``checkpoints/`` and, if asked for,
``profile/`` and ``tensorboard/``.
"""

import contextlib
import fcntl
import itertools
import json
import os
import platform
import re
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from flax_resnetv2.data.datasets import Dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.config import Config, differences, from_json, to_json
from flax_resnetv2.system.files import unreadable, write_whole

RECORDS = "config.json", "dataset.json", "environment.json"
"""Files that say what a run is. Every checkpoint has a copy of them."""
MAY_CHANGE = {
    *("data.dir", "data.archive", "data.url", "data.accept_checksum", "data.workers"),
    *("log_every", "evaluate_every", "target_accuracy", "train.eval_batch_size"),
    *("checkpoint_every", "checkpoint_steps", "keep_checkpoints"),
}
"""Fields of ``Config`` that do not affect what a run learns."""


@contextlib.contextmanager
def new_workdir(recipe: str) -> Iterator[Path]:
    """Create the first runs/RECIPE-N that does not exist; remove it if it stays empty.

    It is created at once, so two runs that start together get two directories. Errors
    as of ``make_directory``.
    """
    paths = (Path("runs") / f"{recipe}-{n}" for n in itertools.count(1))
    path = next(path for path in paths if make_directory(path, new=True))
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # not empty: the run has begun
            path.rmdir()
            path.parent.rmdir()


def check_path(workdir: Path) -> None:
    """Refuse, by ``UsageError``, an address, and what orbax would find nothing under.

    It looks for parts of a checkpoint by patterns that begin with the path.
    """
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(workdir)):  # Path has joined the slashes
        raise UsageError(
            f"workdir={workdir} must be a directory of this machine; mount the other "
            "place, or copy the run there afterwards"
        )
    path = str(workdir.absolute())
    if any(unicodedata.category(c) == "Cs" for c in path):
        raise UsageError(
            f"workdir={workdir} must be UTF-8 in its whole path ({path}); choose "
            "another --workdir, or set PYTHONUTF8=1 if the name is right"
        )
    if found := sorted(set(path) & set("[]*?\\")):
        raise UsageError(
            f"workdir={workdir} must have none of [ ] * ? \\ in its whole path, and "
            f"{path} has {' '.join(found)}; choose another --workdir, or start the "
            "command in another directory"
        )


def make_directory(path: Path, new: bool = False) -> bool:
    """Create a run's directory; return False if it should be ``new`` and exists.

    Raises:
        UsageError: it cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=not new)
        reason = None if os.access(path, os.W_OK) else "permission denied"
    except FileExistsError:
        if new:
            return False
        reason = "it is a file"
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise UsageError(
            f"workdir={path} cannot be written ({reason}); choose another --workdir"
        )
    return True


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[int]:
    """Lock the directory of a run or sweep; yield the lock's file descriptor.

    Raises:
        UsageError: another process has locked it.
    """
    # The kernel releases the lock of a process that is killed.
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UsageError(
                f"workdir={workdir} is in use by {owner}; wait for it, or choose "
                "another --workdir"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        with contextlib.suppress(OSError):  # on a full disk the lock still holds
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield file.fileno()


def has_begun(workdir: Path) -> bool:
    """Whether a run there may have checkpoints to resume from."""
    return os.path.exists(workdir / "checkpoints")


def is_run(workdir: Path) -> bool:
    """Whether a run has written its configuration there; False for invalid names."""
    return os.path.exists(workdir / "config.json")


def load_config(workdir: str | Path) -> Config:
    """Read ``config.json`` of a run directory.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = Path(workdir) / "config.json"
    if reason := unreadable(path):
        raise UsageError(
            f"{workdir} is not a run directory (config.json: {reason}); give one that "
            "train.py made, as runs/quickstart-1"
        )
    try:
        return from_json(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be used ({error}); restore it from a copy, or give another "
            "directory"
        ) from error


def load_environment(workdir: str | Path) -> list[dict[str, Any]]:
    """Read commit, versions and devices of each start; errors as of ``load_config``."""
    return _load(Path(workdir) / "environment.json", list)


def load_dataset_summary(workdir: str | Path) -> dict[str, Any]:
    """Read name, class_names, image_shape, ...; errors as of ``load_config``."""
    path = Path(workdir) / "dataset.json"
    if not path.is_file():
        raise UsageError(f"{workdir} has no dataset.json; resume the run to write it")
    summary = _load(path, dict)
    names, shape = summary.get("class_names"), summary.get("image_shape")
    if not isinstance(names, list) or not isinstance(shape, list) or len(shape) != 3:
        raise _damaged(path, f"class_names={names!r}, image_shape={shape!r}")
    return summary


def _load(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, kind):
        raise _damaged(path, f"a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(f"{path} is damaged ({reason}); remove it and resume the run")


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``, except damaged ones (of a killed run)."""
    path, lines = Path(workdir) / "metrics.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            # The fields that a resumed run reads.
            int(line["step"]), str(line["split"]), float(line["seconds"])
            lines.append(line)
    return lines


def lost_records(workdir: Path) -> list[str]:
    """Return the names of the ``RECORDS`` that a run which has begun does not have."""
    if not has_begun(workdir):
        return []
    return [name for name in RECORDS if not os.path.exists(workdir / name)]


def read_records(workdir: Path) -> dict[str, str]:
    """Return the texts of the ``RECORDS``."""
    return {name: (workdir / name).read_text() for name in RECORDS}


def check_data(workdir: Path, dataset: Dataset) -> None:
    """Refuse, by ``UsageError``, to resume with other images or another order."""
    if not (workdir / "dataset.json").exists():
        return
    before, now = load_dataset_summary(workdir).get("checksums"), _checksums(dataset)
    before = before if isinstance(before, dict) else {}
    if other := [split for split, value in now.items() if before.get(split) != value]:
        raise UsageError(
            f"the images of {dataset.name} are not those that {workdir} began with "
            f"(the splits {', '.join(other)}); give the previous --data.dir or another "
            "--workdir"
        )


def _checksums(dataset: Dataset) -> dict[str, str]:
    return {name: f"{s.checksum():08x}" for name, s in dataset.splits.items()}


def fill_in_from_run(workdir: Path, config: Config) -> Config:
    """Fill in what was decided when the run began, where None leaves it open."""
    if not is_run(workdir):
        return config
    old = load_config(workdir)
    if config.augment.mean is None:
        mean, std = old.augment.mean, old.augment.std
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
    if config.data.stream is None:
        config = replace(config, data=replace(config.data, stream=old.data.stream))
    return config


def check_same(workdir: Path, config: Config) -> list[str]:
    """Refuse to resume a run with another configuration.

    Returns:
        The differences that are allowed.

    Raises:
        UsageError: names every field that differs and must not.
    """
    if not is_run(workdir):
        return []
    found = differences(load_config(workdir), fill_in_from_run(workdir, config))
    # All other schedules depend on the number of epochs.
    constant = config.train.schedule == "constant"
    allowed = MAY_CHANGE | ({"train.epochs"} if constant else set())
    if changed := [text for field, text in found.items() if field not in allowed]:
        raise UsageError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give the same flags to resume it, or another --workdir"
        )
    return list(found.values())


def check_numerics(workdir: Path) -> list[str]:
    """Refuse to resume a run under settings of JAX that change its numbers.

    Returns:
        What has changed since the last start, and may change the last bits.

    Raises:
        UsageError: names every setting that differs and must not.
    """
    path = workdir / "environment.json"
    starts = _load(path, list) if os.path.exists(path) else []
    last, now = starts[-1] if starts else {}, _numerics()
    before = last.get("numerics", now)
    if changed := [
        f"JAX_{name.upper()} is {now[name]}, and was {before.get(name)}"
        for name in _DECISIVE
        if before.get(name) != now[name]
    ]:
        raise UsageError(
            f"{workdir} began under another setting of JAX ({'; '.join(changed)}), so "
            "its numbers would change; set it as before, or give another --workdir"
        )
    others = {
        name: (before.get(name, now[name]), now[name])
        for name in set(now) - set(_DECISIVE)
    }
    versions = last.get("versions", {})
    for name in ("jax", "jaxlib"):
        installed = metadata.version(name)
        others[name] = versions.get(name, installed), installed
    return [
        f"{name} {old!r} -> {new!r}: the last bits may differ from those of an "
        "undisturbed run"
        for name, (old, new) in sorted(others.items())
        if old != new
    ]


_DECISIVE = "enable_x64", "threefry_partitionable", "default_matmul_precision"
"""Settings of JAX that change more than the last bits."""


def _numerics() -> dict[str, Any]:
    """Return what else than configuration, data and versions decides a run's bits."""
    settings = {name: getattr(jax.config, f"jax_{name}") for name in _DECISIVE}
    names = "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    settings |= {name: os.environ.get(name, "").strip() for name in names}
    if jax.default_backend() == "cpu":  # how XLA divides its sums
        affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
        settings["cores"] = len(affinity(0)) if affinity else os.cpu_count()
    return settings


def write_records(
    workdir: Path,
    config: Config,
    dataset: Dataset,
    devices: list[jax.Device],
    done: int,
) -> None:
    """Write the records of a run that starts after step ``done``."""
    summary = {
        "name": dataset.name,
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "multi_label": dataset.multi_label,
        "num_images": {name: s.num_images for name, s in dataset.splits.items()},
        "checksums": _checksums(dataset),
    }
    path = workdir / "environment.json"
    starts = _load(path, list) if path.exists() else []
    starts.append({"step": done, **_environment(devices)})
    records = {
        "dataset.json": json.dumps(summary, indent=2) + "\n",
        "environment.json": json.dumps(starts, indent=2) + "\n",
        # The last: if it exists, the others do.
        "config.json": to_json(config),
    }
    for name, text in records.items():
        if not (path := workdir / name).exists() or path.read_text() != text:
            write_whole(path, text)


def _environment(devices: list[jax.Device]) -> dict[str, Any]:
    """Describe a start of the run: date, commit, versions and devices."""
    packages = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "machine": platform.machine(),
        "numerics": _numerics(),
    }


def _commit() -> str | None:
    """Return the commit of this package if it runs from its repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    with contextlib.suppress(OSError):  # no git
        # An installed package may lie in another repository.
        if git("rev-parse", "--show-toplevel") == str(package.parent):
            return git("describe", "--always", "--dirty", "--abbrev=40") or None
    return None
