"""A prepared data set with its images decoded, kept on disk for the next run.

Decoding CIFAR-10 takes ten seconds, reading what was decoded a few tenths of one.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flax_resnetv2.data.tfds_records import label_of, read_split, reading
from flax_resnetv2.system.files import user_cache

SPLITS = ("train", "test")
FORMAT = 1
"""Raised when stored files no longer mean the same."""

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
Decoded = tuple[Arrays, tuple[str, ...]]
"""Images uint8 [N, H, W, C] and labels int32 [N] or uint8 [N, K] by split, and the
class names."""


def read_dataset(
    directory: Path, label: str | None = None, size: int | None = None
) -> Decoded:
    """Read the splits of a prepared data set, decoded now or earlier.

    What was decoded is kept in the file ``decoded-VERSION.npz`` beside ``directory``,
    or in the user's cache where that is marked read-only. It is used while it is whole
    (every array has a checksum) and while no file of ``directory`` has changed.

    Args:
        directory: of a data set that TFDS prepared.
        label, size: as of ``records.read_split``; what was decoded by them has them in
            its file's name.

    Raises:
        UsageError: a split does not exist, or its files are damaged or gone.
    """
    with reading(directory):
        source = _fingerprint(directory)
        places = _places(directory, label, size)

    def decode() -> Decoded:
        arrays = {split: read_split(directory, split, label, size) for split in SPLITS}
        return arrays, label_of(directory, label).names

    return keep(source, places, decode)


def find_decoded(
    directory: Path, label: str | None = None, size: int | None = None
) -> Path | None:
    """Find the file that ``read_dataset`` would use; None: it would decode."""
    return find_kept(_fingerprint(directory), _places(directory, label, size))


def find_kept(source: str, places: list[Path]) -> Path | None:
    """Find the file that ``keep`` would use; None: it would decode."""
    return next((path for path in places if _load(path, source) is not None), None)


def keep(source: str, places: list[Path], decode: Callable[[], Decoded]) -> Decoded:
    """Give what an earlier run decoded, or decode and keep it.

    Args:
        source: what it is decoded from, as one line that changes when that does.
        places: where it may lie, the best place first.
        decode: does it.
    """
    for path in places:
        if (found := _load(path, source)) is not None:
            return found
    arrays, names = decode()
    for path in places:
        # Another run may do the same; a full disk only costs the next run its time.
        with contextlib.suppress(OSError):
            _save(path, source, arrays, names)
            break
    return arrays, names


def _fingerprint(directory: Path) -> str:
    """Name, size and time of every file, in one line."""
    files = [
        (path.name, (s := path.stat()).st_size, s.st_mtime_ns)
        for path in sorted(directory.iterdir())
    ]
    return json.dumps([FORMAT, str(directory.resolve()), files])


def _places(directory: Path, label: str | None, size: int | None) -> list[Path]:
    """Where the file may lie, the best place first."""
    way = "".join(f"-{said}" for said in (label, size) if said is not None)
    whole = hashlib.sha256(os.fsencode(directory.resolve())).hexdigest()[:16]
    root, version = directory.parent, directory.name
    elsewhere = user_cache() / "decoded" / f"{root.name}-{version}{way}-{whole}.npz"
    beside = root / f"decoded-{version}{way}.npz"
    # For root every directory is writable; one that is marked read-only stays as it is.
    marked = root.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    return [beside, elsewhere] if marked and os.access(root, os.W_OK) else [elsewhere]


def _load(path: Path, source: str) -> Decoded | None:
    """What ``_save`` wrote, if it is whole and of this source."""
    damaged = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
    # zip files hold a CRC-32 of each array, which reading it to its end compares.
    with (
        contextlib.suppress(*damaged),
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        if str(stored["source"]) != source:
            return None
        arrays = {
            split: (stored[f"{split}_images"], stored[f"{split}_labels"])
            for split in SPLITS
        }
        return arrays, tuple(map(str, stored["class_names"]))
    return None


def _save(path: Path, source: str, arrays: Arrays, names: tuple[str, ...]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"source": np.asarray(source), "class_names": np.asarray(names)}
    for split, (images, labels) in arrays.items():
        fields |= {f"{split}_images": images, f"{split}_labels": labels}
    descriptor, new = tempfile.mkstemp(suffix=".npz.part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **fields)
        os.chmod(new, 0o644)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise
