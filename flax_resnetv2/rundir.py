"""The directory of a run: what lies in it, written whole, and read again.

``config.json``, ``dataset.json``, ``environment.json``, ``metrics.jsonl`` (``report``),
``checkpoints/`` (``checkpoint``) and, if asked for, ``profile/`` (``tracing``).
"""

import contextlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from flax_resnetv2.config import Config, differences, from_json, to_json
from flax_resnetv2.data import Dataset
from flax_resnetv2.errors import UsageError


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
    if not path.is_file():
        raise UsageError(
            f"{workdir} is not a run directory (no config.json); give one that "
            "train.py made, as runs/quickstart-1"
        )
    return from_json(path.read_text())


def load_dataset_facts(workdir: str | Path) -> dict[str, Any]:
    """Read ``dataset.json`` of a run: name, class_names, image_shape, images.

    Raises:
        UsageError: the run has none.
    """
    path = Path(workdir) / "dataset.json"
    if not path.is_file():
        raise UsageError(f"{workdir} has no dataset.json; train there once more")
    return json.loads(path.read_text())


def check_same(workdir: Path, config: Config) -> None:
    """Refuse to go on with a run as another; None means "as the data set says".

    Raises:
        UsageError: with every field that differs.
    """
    if not (workdir / "config.json").exists():
        return
    old = load_config(workdir)
    if config.augment.mean is None:
        mean, std = old.augment.mean, old.augment.std
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
    if changed := differences(old, config):
        raise UsageError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give the same flags to go on with it, or another --workdir"
        )


def write_records(
    workdir: Path, config: Config, dataset: Dataset, devices: list[jax.Device]
) -> None:
    """Write what a run is, where that is not written yet."""
    facts = {
        "name": dataset.name,
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "images": {name: len(s.label) for name, s in dataset.splits.items()},
    }
    records = {
        "dataset.json": json.dumps(facts, indent=2) + "\n",
        "environment.json": json.dumps(_environment(devices), indent=2) + "\n",
        # The last one: where it is, the others are.
        "config.json": to_json(config),
    }
    for name, text in records.items():
        if not (workdir / name).exists():
            write_whole(workdir / name, text)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(f"{path.name}.part")
    new.write_text(text)
    os.replace(new, path)


def _environment(devices: list[jax.Device]) -> dict[str, Any]:
    """Commit, versions and devices at the start of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "machine": platform.machine(),
    }


def _commit() -> str | None:
    """The commit of this package, where it runs from its repository."""
    package = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    with contextlib.suppress(OSError):  # no git
        # Installed, the package may lie in somebody else's repository.
        if git("rev-parse", "--show-toplevel") == str(package.parent):
            return git("describe", "--always", "--dirty", "--abbrev=40") or None
    return None
