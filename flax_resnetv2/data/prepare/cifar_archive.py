"""Read an official archive of CIFAR-10 or CIFAR-100 without unpacking it."""

import gzip
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.prepare import unpickling
from flax_resnetv2.data.prepare.verified_files import (
    Examples,
    Labels,
    OfficialFiles,
    check_labels,
    reading,
)

LARGEST_CONTENT = 512 << 20
"""Bytes of a decompressed archive; the official ones have 185 million."""
LARGEST_EXTENSION = 16 << 10
"""Bytes of an extended header."""
MOST_MEMBERS = 100
"""Headers of an archive; official archives have eight files."""

_IMAGE_BYTES = 3 * 32 * 32
_PLAIN = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE}
_EXTENSIONS = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}


@dataclass(frozen=True)
class Archive(OfficialFiles):
    """The official archives of a data set, binary and pickled; one is needed."""

    batches: Mapping[str, tuple[str, ...]]
    """Names of the members of each split, without suffix."""
    keys: Mapping[str, bytes]
    """Key of each label in a pickled batch, in the order of the label bytes before an
    image of a binary batch."""
    largest_member: int
    """The largest size of a member, in bytes."""
    instructions: int
    """Most instructions of a pickled batch."""

    def read(self, paths: list[Path]) -> dict[str, Examples]:
        """Read the splits "train" and "test" from either archive, or refuse it."""
        (path,), found = paths, {}
        needed = {name for names in self.batches.values() for name in names}
        complaint = f"{path} is damaged or no {self.spec.title} archive"
        with reading(path, complaint, f"give {self.names}, fetched again") as file:
            for member, content in _members(file, self.largest_member):
                name, suffix = os.path.splitext(os.path.basename(member))
                if name not in needed or suffix not in ("", ".bin"):
                    continue
                if name in found:
                    raise ValueError(f"it holds {name} twice")
                try:
                    parse = self._parse_binary if suffix else self._parse_pickled
                    found[name] = self._examples(*parse(content))
                except Exception as error:  # a damaged pickle can raise anything
                    kind = type(error).__name__
                    raise ValueError(f"{name}: {kind}: {error}") from error
            if missing := sorted(needed - set(found)):
                raise ValueError(f"it lacks {', '.join(missing)}")
        splits = {}
        for split, names in self.batches.items():
            images, labels = zip(*(found[name] for name in names), strict=True)
            splits[split] = (
                np.concatenate(images),
                {
                    feature: np.concatenate([each[feature] for each in labels])
                    for feature in self.keys
                },
            )
        return splits

    def _parse_binary(self, content: bytes) -> Examples:
        """Parse records of the label bytes and 3,072 bytes of red, green, blue."""
        values, first = np.frombuffer(content, np.uint8), len(self.keys)
        if values.size == 0 or values.size % (first + _IMAGE_BYTES):
            raise ValueError(
                f"{values.size} bytes are no whole number of records of "
                f"{first + _IMAGE_BYTES} bytes"
            )
        records = values.reshape(-1, first + _IMAGE_BYTES)
        labels = {feature: records[:, k] for k, feature in enumerate(self.keys)}
        return records[:, first:], labels

    def _parse_pickled(self, content: bytes) -> Examples:
        """Parse a pickled dictionary with ``data`` [N, 3072] and a list per label."""
        batch = unpickling.load(content, self.instructions)
        labels = {feature: batch[key] for feature, key in self.keys.items()}
        for values in labels.values():
            # A list of lists could be a huge array that takes few instructions.
            if type(values) is not list or not {*map(type, values)} <= {int, float}:
                raise TypeError("its labels are no list of numbers")
        if not isinstance(batch[b"data"], np.ndarray):
            raise TypeError("its data is no array")
        return batch[b"data"], {k: np.asarray(values) for k, values in labels.items()}

    def _examples(self, pixels: np.ndarray, labels: Labels) -> Examples:
        """Check a batch, and turn its color planes into images."""
        for feature, values in labels.items():
            if pixels.shape != (values.size, _IMAGE_BYTES):
                raise ValueError(
                    f"data {list(pixels.shape)} for {values.size} labels; expected "
                    f"[{values.size}, {_IMAGE_BYTES}]"
                )
            check_labels(feature, values, self.spec)
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images), {
            feature: values.astype(np.int64) for feature, values in labels.items()
        }


def _names(stem: str, binary: str, python: str) -> tuple[dict[str, str]]:
    """Give the SHA-256 of the two archives their names."""
    return ({f"{stem}-binary.tar.gz": binary, f"{stem}-python.tar.gz": python},)


CIFAR10 = Archive(
    DATASETS["cifar10"],
    _names(
        "cifar-10",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    ),
    batches={
        "train": tuple(f"data_batch_{k}" for k in range(1, 6)),
        "test": ("test_batch",),
    },
    keys={"label": b"labels"},
    # A batch has 31 million; pickled by Python 3 for Python 2, 46 million.
    largest_member=64 << 20,
    instructions=200_000,
)
CIFAR100 = Archive(
    DATASETS["cifar100"],
    _names(
        "cifar-100",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
    ),
    batches={"train": ("train",), "test": ("test",)},
    keys={"coarse_label": b"coarse_labels", "label": b"fine_labels"},
    # All 50,000 images are one batch.
    largest_member=320 << 20,
    instructions=1_000_000,
)


def _members(file: IO[bytes], largest: int) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of an archive.

    ``tarfile`` itself would read as much as an extended header announces.
    """
    with gzip.open(file) as unzipped:

        def read(size: int) -> bytes:
            content = unzipped.read(size)
            if unzipped.tell() > LARGEST_CONTENT:
                raise ValueError(
                    f"decompressed it has more than {LARGEST_CONTENT:,} bytes, the "
                    "limit"
                )
            return content

        count = 0
        while (header := read(tarfile.BLOCKSIZE)).strip(b"\0"):
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            _check_member(member, largest)
            if (count := count + 1) > MOST_MEMBERS:
                raise ValueError(f"it holds more than {MOST_MEMBERS} members")
            content = read(member.size)
            if len(content) < member.size:
                raise ValueError(f"it ends within {member.name[:80]!r}")
            read(-member.size % tarfile.BLOCKSIZE)  # padding
            if member.type in _PLAIN:
                yield member.name, content
            elif b"size=" in content or b"GNU.sparse" in content:
                raise ValueError("an extended header changes the size of a member")
        while read(1 << 20):  # gzip compares its checksum at the very end
            pass


def _check_member(member: tarfile.TarInfo, largest: int) -> None:
    """Refuse a member that no archive of a data set has, even if it is not needed."""
    name, path = member.name[:80], PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"it holds {name!r}, which leads out of it")
    if member.type not in _PLAIN | _EXTENSIONS:
        raise ValueError(
            f"it holds {name!r}, which is neither a plain file nor a directory"
        )
    limit = LARGEST_EXTENSION if member.type in _EXTENSIONS else largest
    if not 0 <= member.size <= limit:
        raise ValueError(
            f"it holds {name!r} of {member.size:,} bytes; the limit is {limit:,}"
        )
