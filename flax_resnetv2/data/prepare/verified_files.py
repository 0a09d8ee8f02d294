"""The official files of a data set: their names and checksums, and how to open them.

Such a file may come from anywhere (``--data.accept-checksum``). So nothing in it is
written to disk or run, and no more of it is read into memory than its data set needs.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from flax_resnetv2.data.catalog import DatasetSpec
from flax_resnetv2.errors import UsageError

Labels = dict[str, np.ndarray]
"""int64 [N] for each feature that is a label."""
Examples = tuple[np.ndarray, Labels]
"""Images uint8 [N, H, W, C] and their labels."""


@dataclass(frozen=True)
class OfficialFiles:
    """The official files of a data set."""

    spec: DatasetSpec
    files: tuple[Mapping[str, str], ...]
    """For each file that is needed: its SHA-256, which TFDS publishes too, by its name.
    Of several names, one is enough."""

    @property
    def names(self) -> str:
        """The file names, for a message."""
        return ", ".join(" or ".join(choices) for choices in self.files)

    def urls(self, url: str) -> list[str]:
        """Return the addresses of the files: ``url`` itself, or several below it."""
        if len(self.files) == 1:
            return [url]
        return [f"{url.rstrip('/')}/{next(iter(choices))}" for choices in self.files]

    def find(self, path: str) -> list[Path]:
        """Return the local files: ``path`` itself, or several in that directory."""
        found = Path(os.path.expanduser(path))
        paths, needed = [found], "a local copy of"
        if len(self.files) > 1:
            paths = [found / next(iter(choices)) for choices in self.files]
            needed = "a directory with"
        for file in paths:
            try:
                plain = stat.S_ISREG(file.stat().st_mode)
                reason = "" if plain else "it is not a plain file"
            except OSError as error:
                reason = error.strerror
            if reason:
                about = "" if file == found else f"{file.name}: "
                raise UsageError(
                    f"data.archive={path} cannot be read ({about}{reason}); give "
                    f"{needed} {self.names} of {self.spec.title}"
                )
        return paths

    def check(self, paths: Mapping[str, Path]) -> None:
        """Refuse files, given by their names in a message, that are not official."""
        for (source, path), choices in zip(paths.items(), self.files, strict=True):
            with reading(path, f"{source} is damaged", "fetch it again") as file:
                received = hashlib.file_digest(file, "sha256").hexdigest()
            if received not in choices.values():
                expected = " or ".join(
                    f"{sha} ({name})" for name, sha in choices.items()
                )
                raise UsageError(
                    f"{source} has the SHA-256 {received}; expected {expected}; if you "
                    "trust the file, add --data.accept-checksum"
                )


@contextlib.contextmanager
def reading(path: Path, complaint: str, repair: str) -> Iterator[IO[bytes]]:
    """Open a file, and turn any exception while it is read into a ``UsageError``.

    ``complaint`` and ``repair`` are about damage, not about errors of the system.
    """
    try:
        with path.open("rb") as file:
            yield file
    except Exception as error:  # damaged content makes decoders raise anything
        if isinstance(error, OSError) and error.errno is not None:
            raise UsageError(
                f"{path} cannot be read ({error.strerror}); give a copy that you may "
                "read"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"{complaint} ({reason}); {repair}") from error


def check_labels(feature: str, labels: np.ndarray, spec: DatasetSpec) -> None:
    """Raise ``ValueError`` unless ``labels`` has one class of the feature per image."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise ValueError(
            f"labels {labels.dtype} {list(labels.shape)}; expected integers, one per "
            "image"
        )
    last = len(spec.classes[feature]) - 1
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= last:
            raise ValueError(f"the {feature} {label}; {spec.title} has 0 to {last}")
