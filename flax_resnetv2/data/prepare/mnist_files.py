"""Reading the four files of MNIST, or of Fashion-MNIST, which have the same names.

They may come from anywhere, as an archive may (``archive``): nothing of them is written
to disk, and no more is read into memory than the data set needs.
"""

import gzip
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_resnetv2.data.catalog import DATASETS, DatasetSpec
from flax_resnetv2.data.prepare.cifar_archive import (
    Examples,
    Limited,
    check_labels,
    opened,
)
from flax_resnetv2.errors import UsageError

LARGEST = 64 << 20
"""Bytes of a file when decompressed; the largest official one has 47 million."""

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
"""Images and labels of each split."""
_UINT8 = 8
"""How the format calls it; other types are not in these files."""


@dataclass(frozen=True)
class IdxFiles:
    """The official files of a data set."""

    known: DatasetSpec
    sha256: Mapping[str, str]
    """Of each by its name; TFDS publishes them too."""

    @property
    def names(self) -> str:
        """The file names, as they are told."""
        *most, last = self.sha256
        return f"{', '.join(most)} and {last}"


MNIST = IdxFiles(
    DATASETS["mnist"],
    {
        "train-images-idx3-ubyte.gz": (
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
        ),
        "train-labels-idx1-ubyte.gz": (
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
        ),
    },
)
FASHION_MNIST = IdxFiles(
    DATASETS["fashion_mnist"],
    {
        "train-images-idx3-ubyte.gz": (
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
        ),
        "train-labels-idx1-ubyte.gz": (
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
        ),
        "t10k-images-idx3-ubyte.gz": (
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
        ),
        "t10k-labels-idx1-ubyte.gz": (
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
        ),
    },
)
IDX_FILES = {form.known.stored: form for form in (MNIST, FASHION_MNIST)}


def find_files(said: str, form: IdxFiles) -> list[Path]:
    """Give the paths of the four files of a local directory.

    Raises:
        UsageError: it is no directory, or lacks one of them.
    """
    directory = Path(os.path.expanduser(said))
    reason = "" if said and os.path.isdir(directory) else "it is not a directory"
    paths = [directory / name for name in form.sha256]
    if not reason and (gone := [p.name for p in paths if not os.path.isfile(p)]):
        reason = f"it lacks {', '.join(gone)}"
    if reason:
        raise UsageError(
            f"data.archive={said} cannot be used ({reason}); give a directory with "
            f"{form.names} of {form.known.title}"
        )
    return paths


def read_files(paths: list[Path], form: IdxFiles) -> dict[str, Examples]:
    """Read the four files.

    Args:
        paths: of the files in the order of ``form.sha256``.
        form: whose they are.

    Returns:
        The examples of the splits "train" and "test".

    Raises:
        UsageError: one cannot be read, is damaged, or is none of these files.
    """
    place, known = dict(zip(form.sha256, paths, strict=True)), form.known
    found = {}
    for split, (of_images, of_labels) in _FILES.items():
        images = _array(place[of_images], of_images, 3)
        labels = _array(place[of_labels], of_labels, 1)
        if images.shape[1:] != known.image_shape[:2]:
            raise _wrong(of_images, f"images of {list(images.shape[1:])} pixels")
        if len(images) != len(labels):
            raise _wrong(of_labels, f"{len(labels)} labels of {len(images)} images")
        check_labels(of_labels, "label", labels, known)
        found[split] = images[..., None], {"label": labels.astype(np.int64)}
    return found


def _array(path: Path, name: str, axes: int) -> np.ndarray:
    """Bytes behind a header of a type, the number of axes and their lengths."""
    try:
        with opened(path) as file, gzip.open(file) as unzipped:
            stream = Limited(unzipped, LARGEST)
            content = b"".join(iter(lambda: stream.read(1 << 20), b""))
    except UsageError:
        raise
    except Exception as error:  # of gzip and zlib
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _wrong(name, reason) from error
    header = 4 * (1 + axes)
    if content[:4] != bytes([0, 0, _UINT8, axes]) or len(content) < header:
        raise _wrong(name, f"it does not begin as one of {axes} axes of bytes")
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    if len(content) - header != math.prod(shape):
        raise _wrong(name, f"{len(content) - header} bytes for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _wrong(name: str, reason: str) -> UsageError:
    return UsageError(f"{name} is damaged or another file ({reason}); fetch it again")
