"""The directory of a run: what lies in it, written whole, and read again.

``config.json``, ``dataset.json``, ``environment.json`` (each start of the run),
``.lock``, ``metrics.jsonl`` (``report``),
``checkpoints/`` (``checkpoint``) and, if asked for, ``profile/`` (``tracing``).
"""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
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
from flax_resnetv2.system.files import write_whole


@contextlib.contextmanager
def new_workdir(recipe: str) -> Iterator[Path]:
    """Make the first runs/RECIPE-N that does not exist; left empty, it goes again.

    Made at once, so that two runs that start together get two directories.

    Raises:
        UsageError: it cannot be made.
    """
    number, path = 1, Path("runs") / f"{recipe}-1"
    while not make_directory(path, new=True):
        number += 1
        path = path.with_name(f"{recipe}-{number}")
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # not empty: the run has begun
            path.rmdir()
            path.parent.rmdir()


def make_directory(path: Path, new: bool = False) -> bool:
    """Make a run's directory.

    Returns:
        False: ``new`` was asked for, and it exists.

    Raises:
        UsageError: it cannot be made, or not be written.
    """
    reason = None
    try:
        path.mkdir(parents=True, exist_ok=not new)
    except FileExistsError:
        if new:
            return False
        reason = "it is a file"
    except OSError as error:
        reason = error.strerror
    if reason is None and not os.access(path, os.W_OK):
        reason = "permission denied"
    if reason is not None:
        raise UsageError(
            f"workdir={path} cannot be written ({reason}); choose another --workdir"
        )
    return True


def load_config(workdir: str | Path) -> Config:
    """Read ``config.json`` of a run directory.

    Raises:
        UsageError: there is none, or it is none.
    """
    path = Path(workdir) / "config.json"
    if not os.path.isfile(path):  # also of a name that is too long
        raise UsageError(
            f"{workdir} is not a run directory (no config.json); give one that "
            "train.py made, as runs/quickstart-1"
        )
    try:
        return from_json(path.read_text())
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be used ({error}); bring back a copy of it, or "
            "give another directory"
        ) from error


def load_environment(workdir: str | Path) -> list[dict[str, Any]]:
    """Read ``environment.json`` of a run: commit, versions, devices of each start.

    Raises:
        UsageError: it is damaged.
    """
    return _load(Path(workdir) / "environment.json", list)


def load_dataset_summary(workdir: str | Path) -> dict[str, Any]:
    """Read ``dataset.json`` of a run: name, class_names, image_shape, images, ...

    Raises:
        UsageError: the run has none.
    """
    path = Path(workdir) / "dataset.json"
    if not path.is_file():
        raise UsageError(f"{workdir} has no dataset.json; train there once more")
    facts = _load(path, dict)
    names, shape = facts.get("class_names"), facts.get("image_shape")
    if not isinstance(names, list) or not isinstance(shape, list) or len(shape) != 3:
        raise _damaged(path, f"class_names={names!r}, image_shape={shape!r}")
    return facts


def _load(path: Path, kind: type) -> Any:
    """Read a record of a run, or say that it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, kind):
        raise _damaged(path, f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _damaged(path: Path, reason: str) -> UsageError:
    return UsageError(
        f"{path} is damaged ({reason}); remove it and train there once more"
    )


def has_begun(workdir: Path) -> bool:
    """Whether a run has something there to go on with, or began to have."""
    return os.path.exists(workdir / "checkpoints")


def is_run(workdir: Path) -> bool:
    """Whether a run wrote down there what it is; False of what cannot be a name."""
    return os.path.exists(workdir / "config.json")


def read_metrics(workdir: str | Path) -> list[dict[str, Any]]:
    """Read the lines of ``metrics.jsonl``; a damaged one is left out.

    The last is when its writing was cut off.
    """
    path, lines = Path(workdir) / "metrics.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            # What a run that goes on reads of it.
            int(line["step"]), str(line["split"]), float(line["seconds"])
            lines.append(line)
    return lines


def check_data(workdir: Path, dataset: Dataset) -> None:
    """Refuse to go on with other images, or the same in another order.

    Raises:
        UsageError: with the splits that differ.
    """
    if not (workdir / "dataset.json").exists():
        return
    before, now = load_dataset_summary(workdir).get("checksums"), _checksums(dataset)
    before = before if isinstance(before, dict) else {}
    if other := [split for split, value in now.items() if before.get(split) != value]:
        raise UsageError(
            f"the images of {dataset.name} are not those that {workdir} began with "
            f"(the splits {', '.join(other)}); give the --data.dir of then, or another "
            "--workdir"
        )


def _checksums(dataset: Dataset) -> dict[str, str]:
    """Of each split."""
    return {name: f"{s.checksum():08x}" for name, s in dataset.splits.items()}


MAY_CHANGE = {
    *("data.dir", "data.archive", "data.url", "data.accept_checksum", "data.workers"),
    *("log_every", "evaluate_every", "target_accuracy", "train.eval_batch_size"),
    *("checkpoint_every", "checkpoint_steps", "keep_checkpoints"),
}
"""Fields of ``Config`` that decide no number that a run learns."""


def as_begun(workdir: Path, config: Config) -> Config:
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
    """Refuse to go on with a run as another, but for what ``as_begun`` fills in.

    Returns:
        What differs and may.

    Raises:
        UsageError: with every field that differs and must not.
    """
    if not is_run(workdir):
        return []
    old, config = load_config(workdir), as_begun(workdir, config)
    free = MAY_CHANGE | (
        # The other schedules bend towards the end.
        {"train.epochs"} if config.train.schedule == "constant" else set()
    )
    found = differences(old, config)
    if changed := [text for field, text in found.items() if field not in free]:
        raise UsageError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give the same flags to go on with it, or another --workdir"
        )
    return list(found.values())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[int]:
    """Keep other processes out of a run's directory, or a sweep's.

    Yields:
        The descriptor of the file whose lock does it.

    Raises:
        UsageError: one is in it.
    """
    # The kernel opens the lock of a process that is killed.
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise UsageError(
                f"workdir={workdir} is in use by {who}; wait for it, or choose another "
                "--workdir"
            ) from error
        except OSError:  # some network file systems have no locks
            pass
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
        yield file.fileno()


def write_records(
    workdir: Path,
    config: Config,
    dataset: Dataset,
    devices: list[jax.Device],
    done: int,
) -> None:
    """Write what a run is, and that it starts after step ``done``."""
    facts = {
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
        "dataset.json": json.dumps(facts, indent=2) + "\n",
        "environment.json": json.dumps(starts, indent=2) + "\n",
        # The last one: where it is, the others are.
        "config.json": to_json(config),
    }
    for name, text in records.items():
        if not (path := workdir / name).exists() or path.read_text() != text:
            write_whole(path, text)


def _environment(devices: list[jax.Device]) -> dict[str, Any]:
    """Date, commit, versions and devices at the start of a run, or of its rest."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "machine": platform.machine(),
    }


def _commit() -> str | None:
    """The commit of this package, where it runs from its repository."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    with contextlib.suppress(OSError):  # no git
        # Installed, the package may lie in somebody else's repository.
        if git("rev-parse", "--show-toplevel") == str(package.parent):
            return git("describe", "--always", "--dirty", "--abbrev=40") or None
    return None
