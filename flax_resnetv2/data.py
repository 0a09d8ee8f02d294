"""Data sets in memory, and the pure path from a data set to a ``Batch``.

``open_dataset`` reads what TFDS prepared, or prepares it, without TensorFlow. The whole
split then lives on every device; the epoch's order is an array, and ``fetch`` gathers
a batch inside the compiled step.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnetv2.augment import Batch
from flax_resnetv2.catalog import DATASETS, Facts
from flax_resnetv2.decoded import Arrays, read_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.fields import Range, shown
from flax_resnetv2.folder import list_folder, read_folder
from flax_resnetv2.process import user_cache
from flax_resnetv2.records import (
    USUAL_LABELS,
    find_prepared,
    image_shape_of,
    label_of,
    notes,
    parts,
)

PREPARED = [n for n, known in DATASETS.items() if known.source in ("archive", "files")]
"""What is prepared here from official files."""
PADDING = -1
"""In an order: a place of the batch that holds no image."""


@dataclass(frozen=True)
class DataConfig:
    """Which images, and where they are."""

    name: str = "cifar10"
    """cifar10, cifar100, cifar100_coarse (its 20 classes), mnist, fashion_mnist,
    celeba, or embedded_shapes, which the project draws itself; folder:PATH, of a folder
    in which every sub-folder is a class; or another that TFDS prepared, by its name
    there."""
    dir: str | None = None
    """Directory of TFDS data sets. None: TFDS_DATA_DIR, then TFDS's own default; for
    embedded_shapes the user's cache directory."""
    archive: str | None = None
    """Prepare the data set from this local official archive (as
    cifar-10-binary.tar.gz), or this directory with the four files of MNIST, instead of
    downloading it."""
    url: str | None = None
    """Download it from this mirror of the official address."""
    accept_checksum: bool = False
    """Accept an archive whose SHA-256 is not the official one."""
    size: Annotated[int, Range(1, 1024)] | None = None
    """Bring every image to a square of this side as it is read: the shorter side is
    scaled to it, the middle cut out. None: as stored, where all are alike; a folder
    needs it."""
    validation: Annotated[int, Range(0, 2**31)] = 0
    """Take the last so many training images out of training, as the split
    "validation"."""


class Split(NamedTuple):
    """All images of a split, in the order of their records."""

    image: np.ndarray | jax.Array
    """uint8 [N, H, W, C]"""
    label: np.ndarray | jax.Array
    """int32 [N], or uint8 [N, K]: which of K attributes are there"""


@dataclass(frozen=True)
class Dataset:
    """Splits "train" and "test", and "validation" if asked for."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]

    @property
    def multi_label(self) -> bool:
        """Each class is there or not, whatever the others."""
        return self.splits["train"].label.ndim == 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.splits["train"].image.shape[1:]

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of the training split, in [0, 1].

        Exact: counted in whole numbers, so that they do not depend on an order of
        summation.
        """
        image = self.splits["train"].image
        counted = np.zeros((image.shape[-1], 256), np.int64)
        # A few images at a time stay in the processor's cache: ten times as fast.
        for first in range(0, len(image), 64):
            for channel, counts in enumerate(counted):
                pixels = image[first : first + 64, ..., channel].ravel()
                counts += np.bincount(pixels, minlength=256)
        mean, std = [], []
        values = np.arange(256) / 255
        for counts in counted:
            average = float(counts @ values / counts.sum())
            spread = float(counts @ (values - average) ** 2 / counts.sum())
            mean.append(average)
            std.append(spread**0.5)
        return tuple(mean), tuple(std)


def describe(config: DataConfig) -> Facts:
    """Say what is known of a data set without reading it.

    Raises:
        UsageError: there is no such data set.
    """
    if (path := folder_of(config)) is not None:
        return list_folder(path).facts(_side(config))
    if (known := DATASETS.get(config.name)) is not None:
        return Facts(known_shape(config), known.class_names, known.images)
    directory = find(config)
    height, width, channels = image_shape_of(directory)
    if config.size is not None or None in (height, width):
        height = width = _side(config)
    return Facts(
        (height, width, channels),
        label_of(directory).names,
        {split: len(part.places) for split, part in parts(directory).items()},
        notes(directory),
    )


def known_shape(config: DataConfig) -> tuple[int, int, int] | None:
    """(height, width, channels) of the images; None: only ``describe`` knows.

    Raises:
        UsageError: the name is none, or needs a ``size``.
    """
    if folder_of(config) is not None:
        return (_side(config), _side(config), 3)
    if (known := DATASETS.get(config.name)) is not None:
        side, channels = config.size, known.image_shape[2]
        return known.image_shape if side is None else (side, side, channels)
    if not re.fullmatch(r"[a-z]\w*(/[\w.+-]*\w)?", config.name, re.ASCII):
        raise UsageError(
            f"data.name={shown(config.name)} is no name of a data set; choose one of "
            f"{', '.join(DATASETS)}, folder:PATH, or one that TFDS prepared"
        )
    return None


def find(config: DataConfig) -> Path | None:
    """Find where the data set is prepared; None: a run prepares it first.

    Raises:
        UsageError: only TFDS itself can prepare it, or what is there is broken.
    """
    known, root = DATASETS.get(config.name), data_dir(config)
    stored = config.name if known is None else known.stored
    directory = find_prepared(stored, root)
    if directory is None and (known is None or known.source == "tfds"):
        raise UsageError(
            f"data.name={config.name} is none of {', '.join(PREPARED)} and folder:PATH,"
            f" and not prepared in {root}; TFDS prepares it once, with TensorFlow, in "
            "an environment of its own: python -m venv tf && tf/bin/pip install "
            "tensorflow-datasets tensorflow array_record && tf/bin/tfds build "
            f"{stored} --file_format=array_record --data_dir={root}"
        )
    return directory


def folder_of(config: DataConfig) -> str | None:
    """PATH of the data set folder:PATH; None: it is another."""
    word, colon, path = config.name.partition(":")
    return path if colon and word == "folder" else None


def _side(config: DataConfig) -> int:
    if config.size is None:
        raise UsageError(
            f"data.size=None must be a number for {config.name}, whose images may be "
            "of any size; give the side that they are brought to, as --data.size 64"
        )
    return config.size


def open_dataset(config: DataConfig) -> Dataset:
    """Read the data set that ``config`` names; prepare it first where it is not there.

    Raises:
        UsageError: a directory does not exist or cannot be read without TensorFlow, an
            archive is another one, fields contradict each other, ``validation`` leaves
            nothing to train on.
        RunError: the download failed, the disk is full.
    """
    given = _sources(config)
    if (path := folder_of(config)) is not None:
        folder, side = list_folder(path), _side(config)
        for note in folder.notes:
            print(f"{config.name}: {note}")
        return _dataset(config, *read_folder(folder, side))
    directory = find(config)
    if directory is not None and given:
        print(f"{directory} is prepared already and used; not used: {given}")
    if directory is None:
        from flax_resnetv2 import preparation

        known, root = DATASETS[config.name], data_dir(config)
        if known.source == "drawn":
            preparation.prepare_embedded(root)
        else:
            preparation.prepare(
                known.stored,
                root,
                archive=config.archive,
                url=config.url,
                accept_checksum=config.accept_checksum,
            )
        directory = find(config)
    for note in describe(config).notes:
        print(f"{config.name}: {note}")
    return _dataset(
        config, *read_dataset(directory, label_feature(config), config.size)
    )


def _dataset(
    config: DataConfig, arrays: Arrays, class_names: tuple[str, ...]
) -> Dataset:
    splits = {name: Split(*pair) for name, pair in arrays.items()}
    return Dataset(config.name, class_names, hold_out(splits, config))


def label_feature(config: DataConfig) -> str | None:
    """The feature of a record to learn; None: the usual one."""
    known = DATASETS.get(config.name)
    return None if known is None or known.label in USUAL_LABELS else known.label


def hold_out(splits: dict[str, Split], config: DataConfig) -> dict[str, Split]:
    """Take the split "validation" out of "train", if ``config`` asks for it.

    Raises:
        UsageError: nothing is left to train on.
    """
    train, held_out = splits["train"], config.validation
    if not 0 <= held_out < len(train.label):
        raise UsageError(
            f"data.validation={held_out} must leave images to train on; {config.name} "
            f"has {len(train.label)}; choose from 0 to {len(train.label) - 1}"
        )
    if not held_out:
        return splits
    kept = Split(train.image[:-held_out], train.label[:-held_out])
    taken = Split(train.image[-held_out:], train.label[-held_out:])
    return {**splits, "train": kept, "validation": taken}


def data_dir(config: DataConfig) -> Path:
    """Where to look. A directory that was said must exist; a default may be made.

    Raises:
        UsageError: it is said, and no directory.
    """
    said = config.dir
    source = "data.dir"
    if said is None and config.name == "embedded_shapes":
        return user_cache() / "tensorflow_datasets"
    if said is None:
        said, source = os.environ.get("TFDS_DATA_DIR") or None, "TFDS_DATA_DIR"
    if said is None:
        return Path.home() / "tensorflow_datasets"
    root = Path(os.path.expanduser(said))
    # os.path says of a name that is too long, too, that it is none.
    if not said or not os.path.isdir(root):
        raise UsageError(
            f"{source}={said} is not a directory; give a directory that holds (or is "
            f"to hold) TFDS data sets; to have {config.name} prepared there, create it "
            f"first: mkdir -p {said}"
        )
    return root


def epoch_order(count: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``count`` images without its tail, int32 [steps * batch_size].

    A function of (seed, epoch) alone: the step number is the whole resume position.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[: count - count % batch_size].astype(np.int32)


def evaluation_order(count: int, batch_size: int) -> np.ndarray:
    """Every image once, filled up with ``PADDING`` to whole batches, int32."""
    order = np.full(-(-count // batch_size) * batch_size, PADDING, np.int32)
    order[:count] = np.arange(count)
    return order


def fetch(split: Split, order: jax.Array, places: jax.Array) -> Batch:
    """Gather the images at ``order[places]``; pure, runs inside a compiled step.

    Args:
        split: arrays on the device.
        order: int32 [M], of ``epoch_order`` or ``evaluation_order``.
        places: int32 [B].
    """
    index = order[places]
    mask = index != PADDING
    index = jnp.where(mask, index, 0)
    return Batch(split.image[index], split.label[index], mask)


def _sources(config: DataConfig) -> str:
    """Name the fields that say what to prepare from, or refuse them together."""
    fields = {"archive": config.archive, "url": config.url}
    given = [f"data.{name}={said}" for name, said in fields.items() if said is not None]
    if len(given) == 2:
        raise UsageError(f"{' and '.join(given)} are two sources; give one of them")
    if config.accept_checksum:
        given.append("data.accept_checksum")
    if given and config.name not in PREPARED:
        known = DATASETS.get(config.name)
        drawn = known is not None and known.source == "drawn"
        how = "drawn" if drawn else "read as it is"
        raise UsageError(
            f"{' and '.join(given)}: {config.name} is {how} and has no archive; leave "
            "it out, or choose --data.name cifar10"
        )
    return " and ".join(given)
