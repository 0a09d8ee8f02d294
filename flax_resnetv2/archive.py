"""Reading either official archive of CIFAR-10 without unpacking it.

An archive may come from anywhere (``--data.accept_checksum``). So nothing of it is
written to disk, nothing of it is run, and it cannot have more read into memory than
CIFAR-10 needs.
"""

import contextlib
import gzip
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from flax_resnetv2 import unpickling
from flax_resnetv2.errors import UsageError

CIFAR10_SHA256 = {
    "cifar-10-binary.tar.gz": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    "cifar-10-python.tar.gz": (
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ),
}
"""Of the two official archives; TFDS and Keras publish them too."""
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
LARGEST_MEMBER = 64 << 20
"""Bytes. A batch has 31 million; pickled by Python 3 for Python 2, 46 million."""
LARGEST_CONTENT = 512 << 20
"""Bytes of the whole archive when decompressed; the official ones have 185 million."""
LARGEST_HEADER = 16 << 10
"""Bytes of an extended header, as of a long name."""
MOST_MEMBERS = 100
"""Official archives have eight files."""

_IMAGE_BYTES = 3 * 32 * 32
_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
_BOTH = " or ".join(CIFAR10_SHA256)

Examples = tuple[np.ndarray, np.ndarray]
"""Images uint8 [N, 32, 32, 3] and labels [N]."""


def find_archive(said: str) -> Path:
    """Give the path of a local archive, or say why it is none.

    Raises:
        UsageError: it is not there, not a file, or behind a directory that is closed.
    """
    path = Path(os.path.expanduser(said))
    try:
        reason = "" if stat.S_ISREG(path.stat().st_mode) else "it is not a plain file"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UsageError(
            f"data.archive={said} cannot be read ({reason}); give a local copy of "
            f"{_BOTH}"
        )
    return path


def check_sum(path: Path, source: str) -> None:
    """Refuse an archive that is neither official one.

    Raises:
        UsageError: its SHA-256 is another, or it cannot be read.
    """
    with _opened(path) as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received not in CIFAR10_SHA256.values():
        expected = " or ".join(f"{v} ({k})" for k, v in CIFAR10_SHA256.items())
        raise UsageError(
            f"{source} has the SHA-256 {received}; expected {expected}; if you trust "
            "the file, add --data.accept_checksum"
        )


def read_archive(path: Path) -> dict[str, Examples]:
    """Read either archive, told apart by what is in it.

    Returns:
        The examples of the splits "train" and "test".

    Raises:
        UsageError: it cannot be read, is damaged, is neither, or holds what no archive
            of CIFAR-10 needs.
    """
    wanted = {name for names in _BATCHES.values() for name in names}
    found: dict[str, Examples] = {}
    try:
        for stem, suffix, content in _members(path, wanted):
            if stem in found:
                raise ValueError(f"it holds {stem} twice")
            read = _read_binary if suffix else _read_pickled
            found[stem] = read(stem, content)
    except UsageError:
        raise
    except Exception as error:  # tarfile raises anything where headers are damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{path} is damaged or no CIFAR-10 archive ({reason}); give {_BOTH}, "
            "fetched again"
        ) from error
    if missing := sorted(wanted - set(found)):
        raise UsageError(
            f"{path} is no CIFAR-10 archive: it lacks {', '.join(missing)}; give "
            f"{_BOTH}"
        )
    return {
        split: tuple(
            np.concatenate(parts)
            for parts in zip(*(found[name] for name in names), strict=True)
        )
        for split, names in _BATCHES.items()
    }


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file; what the system refuses is not called damage."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        if error.errno is None:  # not the system's: how gzip names damage
            raise
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); give a copy that you may read"
        ) from error


def _members(path: Path, wanted: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Yield stem, suffix and content of the members with the wanted base names."""
    with _opened(path) as file, gzip.open(file) as unzipped:
        stream = _Limited(unzipped)
        # As a stream it is read forwards only: no header can have it read again.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as tar:
            for count, member in enumerate(tar):
                if count == MOST_MEMBERS:
                    raise ValueError(f"it holds more than {MOST_MEMBERS} members")
                _check_member(member)
                stem, suffix = os.path.splitext(os.path.basename(member.name))
                if member.isfile() and stem in wanted and suffix in ("", ".bin"):
                    yield stem, suffix, tar.extractfile(member).read()
        while stream.read(1 << 20):  # gzip compares its checksum at the very end
            pass


class _Limited:
    """A stream that ends with an error where it is longer than CIFAR-10 can be."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = LARGEST_CONTENT

    def read(self, size: int) -> bytes:
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(
                f"decompressed it has more than {LARGEST_CONTENT:,} bytes, the limit"
            )
        return content


class _Header(tarfile.TarInfo):
    """Checked before tarfile acts on it: it reads extended headers whole."""

    @classmethod
    def frombuf(cls, *args: Any, **kwargs: Any) -> "_Header":
        header = super().frombuf(*args, **kwargs)
        plain = header.type in tarfile.SUPPORTED_TYPES
        extended = not plain or header.type in tarfile.GNU_TYPES
        _check_size(header, LARGEST_HEADER if extended else LARGEST_MEMBER)
        if header.type == tarfile.GNUTYPE_SPARSE:  # its map can be of any length
            _check_kind(header)
        return header


def _check_size(member: tarfile.TarInfo, limit: int) -> None:
    if not 0 <= member.size <= limit:
        raise ValueError(
            f"it holds {member.name[:80]!r} of {member.size:,} bytes; the limit is "
            f"{limit:,}"
        )


def _check_kind(member: tarfile.TarInfo) -> None:
    sparse = member.issparse() or member.type == tarfile.GNUTYPE_SPARSE
    if sparse or not (member.isfile() or member.isdir()):
        raise ValueError(
            f"it holds {member.name[:80]!r}, which is neither a plain file nor a "
            "directory"
        )


def _check_member(member: tarfile.TarInfo) -> None:
    """Refuse what no archive of CIFAR-10 holds, whether it would be read or not."""
    place = PurePosixPath(member.name)
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"it holds {member.name[:80]!r}, which leads out of it")
    _check_kind(member)
    _check_size(member, LARGEST_MEMBER)  # an extended header may have changed it


def _read_binary(name: str, content: bytes) -> Examples:
    """Records of a label byte and 3,072 bytes of red, green, blue."""
    values = np.frombuffer(content, np.uint8)
    if values.size == 0 or values.size % (_IMAGE_BYTES + 1):
        raise UsageError(
            f"{name} of the archive has {values.size} bytes, which are no whole number "
            f"of records of {_IMAGE_BYTES + 1} bytes; fetch the archive again"
        )
    records = values.reshape(-1, _IMAGE_BYTES + 1)
    return _examples(name, records[:, 1:], records[:, 0])


def _read_pickled(name: str, content: bytes) -> Examples:
    """A pickled dictionary with ``data`` [N, 3072] and ``labels``."""
    try:
        batch = unpickling.load(content)
        data, labels = batch[b"data"], batch[b"labels"]
        # NumPy would multiply lists of lists that are the same list.
        if type(labels) is list and not {*map(type, labels)} <= {int, float}:
            raise TypeError("its labels are no numbers")
        if not isinstance(data, np.ndarray):
            raise TypeError("its data is no array")
        labels = np.asarray(labels)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"{name} of the archive is not a batch of CIFAR-10 ({reason}); fetch the "
            "archive again"
        ) from error
    return _examples(name, data, labels)


def _examples(name: str, pixels: np.ndarray, labels: np.ndarray) -> Examples:
    """Planes of colour -> images; refuse what cannot be CIFAR-10."""
    if pixels.shape != (labels.size, _IMAGE_BYTES) or pixels.dtype != np.uint8:
        raise UsageError(
            f"{name} of the archive has data {pixels.dtype} {list(pixels.shape)} for "
            f"{labels.size} labels; expected uint8 [{labels.size}, {_IMAGE_BYTES}]"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise UsageError(
            f"{name} of the archive has labels {labels.dtype} {list(labels.shape)}; "
            "expected whole numbers, one for each image"
        )
    for label in (labels.min(), labels.max()):
        if not 0 <= label < len(CIFAR10_CLASSES):
            raise UsageError(
                f"{name} of the archive has the label {label}; CIFAR-10 has 0 to 9"
            )
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)
