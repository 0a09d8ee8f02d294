"""Keep decoded images for the next run, which reads CIFAR-10 in less than a second."""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnetv2.data.tfds_records import label_of, read_split, reading
from flax_resnetv2.system.files import user_cache

SPLITS = ("train", "test")
FORMAT = 1
"""Increase it when the contents of the files change their meaning."""

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]
Decoded = tuple[Arrays, tuple[str, ...]]
"""Images uint8 [N, H, W, C] and labels int32 [N] or uint8 [N, K] by split, and the
class names."""


class DecodedCache(NamedTuple):
    """A cache of one data set: a file, valid while its source has not changed."""

    source: str
    """Identifies the source and its state in one line."""
    paths: list[Path]
    """Where the file may be; the first writable path receives it."""

    def find(self) -> Path | None:
        """Return the valid file, if there is one."""
        return next((path for path in self.paths if self._load(path)), None)

    def get(self, decode: Callable[[], Decoded]) -> Decoded:
        """Return the stored result of ``decode``, or decode now and store it."""
        if found := next(filter(None, map(self._load, self.paths)), None):
            return found
        decoded = decode()
        for path in self.paths:
            # Without the file, the next run only decodes again.
            with contextlib.suppress(OSError):
                self._save(path, *decoded)
                break
        return decoded

    def _load(self, path: Path) -> Decoded | None:
        """Read a file, unless it is missing, damaged or of another source."""
        damaged = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile
        # Reading an array to its end compares the CRC-32 that a zip file stores.
        with (
            contextlib.suppress(*damaged),
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as stored,
        ):
            if str(stored["source"]) == self.source:
                arrays = {
                    split: (stored[f"{split}_images"], stored[f"{split}_labels"])
                    for split in SPLITS
                }
                return arrays, tuple(map(str, stored["class_names"]))
        return None

    def _save(self, path: Path, arrays: Arrays, names: tuple[str, ...]) -> None:
        """Write a file atomically; several runs may do so at the same time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"source": np.asarray(self.source), "class_names": np.asarray(names)}
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


def fingerprint(files: Iterable[tuple[Path, Any]], *more: Any) -> str:
    """Return a line that changes with ``more``, and with the files and their names."""
    states = [(n, (s := path.stat()).st_size, s.st_mtime_ns) for path, n in files]
    return json.dumps([FORMAT, *more, states])


def cache_path(source: Path, name: str) -> Path:
    """Return the path in the user's cache for the decoded images of ``source``."""
    digest = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    return user_cache() / "decoded" / f"{name}-{digest}.npz"


def dataset_cache(
    directory: Path, label: str | None = None, size: int | None = None
) -> DecodedCache:
    """Return the cache of a prepared data set; arguments as of ``read_split``.

    The file is ``decoded-VERSION-LABEL-SIZE.npz`` next to ``directory``, or, if that
    place is not writable or marked read-only, in the user's cache.
    """
    with reading(directory):
        files = [(path, path.name) for path in sorted(directory.iterdir())]
        source = fingerprint(files, str(directory.resolve()))
        root, version = directory.parent, directory.name
        version += "".join(f"-{x}" for x in (label, size) if x is not None)
        paths = [cache_path(directory, f"{root.name}-{version}")]
        # The superuser may write anywhere, but a read-only mark is respected.
        marked = root.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
        if marked and os.access(root, os.W_OK):
            paths.insert(0, root / f"decoded-{version}.npz")
        return DecodedCache(source, paths)


def read_dataset(
    directory: Path, label: str | None = None, size: int | None = None
) -> Decoded:
    """Read both splits, decoded now or earlier; arguments as of ``read_split``."""

    def decode() -> Decoded:
        arrays = {split: read_split(directory, split, label, size) for split in SPLITS}
        return arrays, label_of(directory, label).class_names

    return dataset_cache(directory, label, size).get(decode)
