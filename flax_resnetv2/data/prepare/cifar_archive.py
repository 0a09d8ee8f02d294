"""Reading either official archive of CIFAR-10 or CIFAR-100 without unpacking it.

An archive may come from anywhere (``--data.accept_checksum``). So nothing of it is
written to disk, nothing of it is run, and it cannot have more read into memory than
its data set needs.
"""

import contextlib
import gzip
import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from flax_resnetv2.data.catalog import DATASETS, DatasetSpec
from flax_resnetv2.data.prepare import unpickling
from flax_resnetv2.errors import UsageError

LARGEST_CONTENT = 512 << 20
"""Bytes of the whole archive when decompressed; the official ones have 185 million."""
LARGEST_HEADER = 16 << 10
"""Bytes of an extended header, as of a long name."""
MOST_MEMBERS = 100
"""Official archives have eight files."""

_IMAGE_BYTES = 3 * 32 * 32

Labels = dict[str, np.ndarray]
"""int64 [N] by the feature that they are."""
Examples = tuple[np.ndarray, Labels]
"""Images uint8 [N, H, W, C] and their labels."""


@dataclass(frozen=True)
class Archive:
    """What is in the official archives of a data set."""

    known: DatasetSpec
    sha256: Mapping[str, str]
    """Of each by its file name; TFDS and Keras publish them too."""
    batches: Mapping[str, tuple[str, ...]]
    """Members by split, without their suffix."""
    keys: Mapping[str, bytes]
    """What a pickled batch calls each label, in the order of the label bytes that a
    binary batch has before an image."""
    largest_member: int
    """Bytes."""
    instructions: int
    """Of a pickled batch."""

    @property
    def names(self) -> str:
        """Its file names, as they are told."""
        return " or ".join(self.sha256)


CIFAR10 = Archive(
    DATASETS["cifar10"],
    sha256={
        "cifar-10-binary.tar.gz": (
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
        ),
        "cifar-10-python.tar.gz": (
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
        ),
    },
    batches={
        "train": tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test": ("test_batch",),
    },
    keys={"label": b"labels"},
    # A batch has 31 million; pickled by Python 3 for Python 2, 46 million.
    largest_member=64 << 20,
    instructions=unpickling.INSTRUCTIONS,
)
CIFAR100 = Archive(
    DATASETS["cifar100"],
    sha256={
        "cifar-100-binary.tar.gz": (
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
        ),
        "cifar-100-python.tar.gz": (
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
        ),
    },
    batches={"train": ("train",), "test": ("test",)},
    keys={"coarse_label": b"coarse_labels", "label": b"fine_labels"},
    # All 50,000 images are one batch.
    largest_member=320 << 20,
    instructions=1_000_000,
)
ARCHIVES = {form.known.stored: form for form in (CIFAR10, CIFAR100)}


def find_archive(said: str, form: Archive = CIFAR10) -> Path:
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
            f"{form.names}"
        )
    return path


def check_sum(path: Path, source: str, sha256: Mapping[str, str]) -> None:
    """Refuse a file that is no official one.

    Args:
        path: where it lies.
        source: where it came from, as it is told.
        sha256: of each official file, by its name.

    Raises:
        UsageError: its SHA-256 is another, or it cannot be read.
    """
    with opened(path) as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received not in sha256.values():
        expected = " or ".join(f"{value} ({name})" for name, value in sha256.items())
        raise UsageError(
            f"{source} has the SHA-256 {received}; expected {expected}; if you trust "
            "the file, add --data.accept_checksum"
        )


def read_archive(path: Path, form: Archive = CIFAR10) -> dict[str, Examples]:
    """Read either archive, told apart by what is in it.

    Returns:
        The examples of the splits "train" and "test".

    Raises:
        UsageError: it cannot be read, is damaged, is neither, or holds what no archive
            of the data set needs.
    """
    wanted = {name for names in form.batches.values() for name in names}
    title = form.known.title
    found: dict[str, Examples] = {}
    try:
        for stem, suffix, content in _members(path, wanted, form):
            if stem in found:
                raise ValueError(f"it holds {stem} twice")
            read = _read_binary if suffix else _read_pickled
            found[stem] = read(stem, content, form)
    except UsageError:
        raise
    except Exception as error:  # tarfile raises anything where headers are damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{path} is damaged or no {title} archive ({reason}); give {form.names}, "
            "fetched again"
        ) from error
    if missing := sorted(wanted - set(found)):
        raise UsageError(
            f"{path} is no {title} archive: it lacks {', '.join(missing)}; give "
            f"{form.names}"
        )
    return {
        split: _joined([found[name] for name in names])
        for split, names in form.batches.items()
    }


def _joined(parts: list[Examples]) -> Examples:
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), {
        feature: np.concatenate([each[feature] for each in labels])
        for feature in labels[0]
    }


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
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


def _members(
    path: Path, wanted: set[str], form: Archive
) -> Iterator[tuple[str, str, bytes]]:
    """Yield stem, suffix and content of the members with the wanted base names."""
    with opened(path) as file, gzip.open(file) as unzipped:
        stream = Limited(unzipped, LARGEST_CONTENT)
        header = type("Header", (_Header,), {"largest": form.largest_member})
        # As a stream it is read forwards only: no header can have it read again.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=header) as tar:
            for count, member in enumerate(tar):
                if count == MOST_MEMBERS:
                    raise ValueError(f"it holds more than {MOST_MEMBERS} members")
                _check_member(member, form.largest_member)
                stem, suffix = os.path.splitext(os.path.basename(member.name))
                if member.isfile() and stem in wanted and suffix in ("", ".bin"):
                    yield stem, suffix, tar.extractfile(member).read()
        while stream.read(1 << 20):  # gzip compares its checksum at the very end
            pass


class Limited:
    """A stream that ends with an error where it is longer than it can be."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit, self._left = file, limit, limit

    def read(self, size: int) -> bytes:
        """Give up to ``size`` bytes."""
        content = self._file.read(size)
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(
                f"decompressed it has more than {self._limit:,} bytes, the limit"
            )
        return content


class _Header(tarfile.TarInfo):
    """Checked before tarfile acts on it: it reads extended headers whole."""

    largest: int
    """Bytes of a member."""

    @classmethod
    def frombuf(cls, *args: Any, **kwargs: Any) -> "_Header":
        header = super().frombuf(*args, **kwargs)
        plain = header.type in tarfile.SUPPORTED_TYPES
        extended = not plain or header.type in tarfile.GNU_TYPES
        _check_size(header, LARGEST_HEADER if extended else cls.largest)
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


def _check_member(member: tarfile.TarInfo, largest: int) -> None:
    """Refuse what no archive of a data set holds, whether it would be read or not."""
    place = PurePosixPath(member.name)
    if place.is_absolute() or ".." in place.parts:
        raise ValueError(f"it holds {member.name[:80]!r}, which leads out of it")
    _check_kind(member)
    _check_size(member, largest)  # an extended header may have changed it


def _read_binary(name: str, content: bytes, form: Archive) -> Examples:
    """Records of one or two label bytes and 3,072 bytes of red, green, blue."""
    values, first = np.frombuffer(content, np.uint8), len(form.keys)
    if values.size == 0 or values.size % (_IMAGE_BYTES + first):
        raise UsageError(
            f"{name} of the archive has {values.size} bytes, which are no whole number "
            f"of records of {_IMAGE_BYTES + first} bytes; fetch the archive again"
        )
    records = values.reshape(-1, _IMAGE_BYTES + first)
    labels = {feature: records[:, k] for k, feature in enumerate(form.keys)}
    return _examples(name, records[:, first:], labels, form)


def _read_pickled(name: str, content: bytes, form: Archive) -> Examples:
    """A pickled dictionary with ``data`` [N, 3072] and a list for each label."""
    try:
        batch = unpickling.load(content, form.instructions)
        data = batch[b"data"]
        labels = {feature: batch[key] for feature, key in form.keys.items()}
        # NumPy would multiply lists of lists that are the same list.
        for values in labels.values():
            if type(values) is list and not {*map(type, values)} <= {int, float}:
                raise TypeError("its labels are no numbers")
        if not isinstance(data, np.ndarray):
            raise TypeError("its data is no array")
        labels = {feature: np.asarray(values) for feature, values in labels.items()}
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"{name} of the archive is not a batch of {form.known.title} ({reason}); "
            "fetch the archive again"
        ) from error
    return _examples(name, data, labels, form)


def _examples(name: str, pixels: np.ndarray, labels: Labels, form: Archive) -> Examples:
    """Planes of color -> images; refuse what cannot be of the data set."""
    for values in labels.values():
        if pixels.shape != (values.size, _IMAGE_BYTES) or pixels.dtype != np.uint8:
            raise UsageError(
                f"{name} of the archive has data {pixels.dtype} {list(pixels.shape)} "
                f"for {values.size} labels; expected uint8 "
                f"[{values.size}, {_IMAGE_BYTES}]"
            )
    for feature, values in labels.items():
        check_labels(f"{name} of the archive", feature, values, form.known)
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), {
        feature: values.astype(np.int64) for feature, values in labels.items()
    }


def check_labels(
    where: str, feature: str, labels: np.ndarray, known: DatasetSpec
) -> None:
    """Refuse labels that are not one number for each image, or have no class."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise UsageError(
            f"{where} has labels {labels.dtype} {list(labels.shape)}; expected whole "
            "numbers, one for each image; fetch it again"
        )
    most = len(known.classes[feature]) - 1
    for label in (labels.min(), labels.max()):
        if not 0 <= label <= most:
            raise UsageError(
                f"{where} has the {feature} {label}; {known.title} has 0 to {most}; "
                "fetch it again"
            )
