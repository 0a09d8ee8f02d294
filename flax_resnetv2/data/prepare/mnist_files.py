"""Read the four files of MNIST, or of Fashion-MNIST, which have the same names."""

import contextlib
import gzip
import math
from pathlib import Path
from typing import IO

import numpy as np

from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.prepare.verified_files import (
    Examples,
    OfficialFiles,
    check_labels,
    reading,
)

LARGEST = 64 << 20
"""Bytes of a decompressed file; the largest official one has 47 million."""
_NAMES = [
    f"{split}-{kind}-ubyte.gz"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
_UINT8 = 8
"""The type code of bytes in the IDX format."""


class IdxFiles(OfficialFiles):
    """Images and labels to train on, images and labels to test on."""

    def read(self, paths: list[Path]) -> dict[str, Examples]:
        """Read the splits "train" and "test" from the four files, or refuse them."""
        splits = {}
        for k, split in ((0, "train"), (2, "test")):
            with _reading(paths[k], _NAMES[k]) as file:
                images = _read_array(file, 3)
                if images.shape[1:] != self.spec.image_shape[:2]:
                    raise ValueError(f"images of {list(images.shape[1:])} pixels")
            with _reading(paths[k + 1], _NAMES[k + 1]) as file:
                labels = _read_array(file, 1)
                if len(images) != len(labels):
                    raise ValueError(f"{len(labels)} labels of {len(images)} images")
                check_labels("label", labels, self.spec)
            splits[split] = images[..., None], {"label": labels.astype(np.int64)}
        return splits


def _idx_files(name: str, *sha256: str) -> IdxFiles:
    files = tuple({name: sha} for name, sha in zip(_NAMES, sha256, strict=True))
    return IdxFiles(DATASETS[name], files)


MNIST = _idx_files(
    "mnist",
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
FASHION_MNIST = _idx_files(
    "fashion_mnist",
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)


def _reading(path: Path, name: str) -> contextlib.AbstractContextManager[IO[bytes]]:
    return reading(path, f"{name} is damaged or another file", "fetch it again")


def _read_array(file: IO[bytes], axes: int) -> np.ndarray:
    """Read the IDX format: type, number of axes, their lengths, and bytes."""
    with gzip.open(file) as unzipped:
        content = unzipped.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"decompressed it has more than {LARGEST:,} bytes, the limit")
    header = 4 * (1 + axes)
    if content[:4] != bytes([0, 0, _UINT8, axes]) or len(content) < header:
        raise ValueError(f"it does not begin as one of {axes} axes of bytes")
    shape = np.frombuffer(content[4:header], ">u4").tolist()
    if len(content) - header != math.prod(shape):
        raise ValueError(f"{len(content) - header} bytes for the shape {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
