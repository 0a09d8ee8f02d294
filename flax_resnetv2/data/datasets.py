"""Data sets, and the pure path from a data set to a ``Batch``.

``open_dataset`` reads what TFDS prepared, or prepares it, without TensorFlow. The whole
split then lives on every device; the epoch's order is an array, and ``fetch`` gathers
a batch inside the compiled step. Or its images stay on disk (see ``streaming``).
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.catalog import DATASETS, DatasetSummary
from flax_resnetv2.data.decoded_cache import Decoded, read_dataset
from flax_resnetv2.data.folder import Files, list_folder, read_folder
from flax_resnetv2.data.images import square
from flax_resnetv2.data.tfds_records import (
    USUAL_LABELS,
    Records,
    find_prepared,
    image_shape_of,
    label_of,
    notes,
    parts,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.system.files import user_cache
from flax_resnetv2.validation import Range, shown

STATISTICS_OF = 4096
"""Images on disk from which the statistics of channels are taken."""
PREPARED = [n for n, known in DATASETS.items() if known.source in ("archive", "files")]
"""What is prepared here from official files."""


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
    image_size: Annotated[int, Range(1, 1024)] | None = None
    """Bring every image to a square of this side as it is read: the shorter side is
    scaled to it, the middle cut out. None: as stored, where all are alike; a folder
    needs it."""
    validation: Annotated[int, Range(0, 2**31)] = 0
    """Take the last so many training images out of training, as the split
    "validation"."""
    stream: bool | None = None
    """Leave the images on disk and read them ahead of their step; None: if they take
    more than a quarter of a device's memory (without ``fit``: never)."""
    workers: Annotated[int, Range(0, 1024)] = 0
    """Processes that read streamed images; 0: threads of this one, as many as it has
    cores, which is faster until they get into each other's way."""


@dataclass(frozen=True)
class Dataset:
    """Splits "train" and "test", and "validation" if asked for."""

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split] | dict[str, Records] | dict[str, Files]
    """Of images in memory, or of images that stay on disk."""

    @property
    def multi_label(self) -> bool:
        """Each class is there or not, whatever the others."""
        return self.splits["train"].multi_label

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.splits["train"].image_shape

    def in_memory(self) -> dict[str, Split]:
        """What lies on every device."""
        return {k: s for k, s in self.splits.items() if isinstance(s, Split)}

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel of the training split, in [0, 1].

        Exact: counted in whole numbers, so that they do not depend on an order of
        summation. Of images on disk a few thousand are counted, evenly spread.
        """
        train = self.splits["train"]
        image = train.image if isinstance(train, Split) else _some(train)
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


def _some(split: Records | Files) -> np.ndarray:
    """Some of the images on disk, evenly spread, uint8 [N, H, W, C]."""
    count, fit = min(STATISTICS_OF, split.num_images), square(split.image_shape[0])
    at = [k * split.num_images // count for k in range(count)]
    return np.stack([split.read(k, fit)[0] for k in at])


def describe(config: DataConfig) -> DatasetSummary:
    """Say what is known of a data set without reading it.

    Raises:
        UsageError: there is no such data set.
    """
    if (path := folder_of(config)) is not None:
        return list_folder(path).facts(_side(config))
    if (known := DATASETS.get(config.name)) is not None:
        return DatasetSummary(known_shape(config), known.class_names, known.num_images)
    directory = find(config)
    height, width, channels = image_shape_of(directory)
    if config.image_size is not None or None in (height, width):
        height = width = _side(config)
    return DatasetSummary(
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
        side, channels = config.image_size, known.image_shape[2]
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
    if config.image_size is None:
        raise UsageError(
            f"data.image_size=None must be a number for {config.name}, whose images may be "
            "of any size; give the side that they are brought to, as --data.image-size 64"
        )
    return config.image_size


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
        if config.stream:
            shape = (side, side, 3)
            splits = {k: Files(files, shape) for k, files in folder.files.items()}
            return _dataset(config, splits, folder.class_names)
        return _dataset(config, *_placed(read_folder(folder, side)))
    directory = find(config)
    if directory is not None and given:
        print(f"{directory} is prepared already and used; not used: {given}")
    if directory is None:
        from flax_resnetv2.data.prepare import write_tfds

        known, root = DATASETS[config.name], data_dir(config)
        if known.source == "drawn":
            write_tfds.prepare_embedded(root)
        else:
            write_tfds.prepare(
                known.stored,
                root,
                archive=config.archive,
                url=config.url,
                accept_checksum=config.accept_checksum,
            )
        directory = find(config)
    for note in describe(config).notes:
        print(f"{config.name}: {note}")
    if config.stream:
        return _on_disk(config, directory)
    decoded = read_dataset(directory, label_feature(config), config.image_size)
    return _dataset(config, *_placed(decoded))


def _placed(decoded: Decoded) -> tuple[dict[str, Split], tuple[str, ...]]:
    arrays, class_names = decoded
    return {name: Split(*pair) for name, pair in arrays.items()}, class_names


def _dataset(
    config: DataConfig, splits: dict[str, Any], class_names: tuple[str, ...]
) -> Dataset:
    return Dataset(config.name, class_names, hold_out(splits, config))


def _on_disk(config: DataConfig, directory: Path) -> Dataset:
    told = label_of(directory, label_feature(config))
    shape = describe(config).image_shape
    if shape[0] != shape[1]:
        raise UsageError(
            f"data.stream={config.stream}: images of {shape[0]}x{shape[1]} pixels are "
            "read from disk as squares; add --data.image-size SIDE"
        )
    splits = {
        name: Records(directory, part, told, shape)
        for name, part in parts(directory).items()
    }
    return _dataset(config, splits, told.names)


def label_feature(config: DataConfig) -> str | None:
    """The feature of a record to learn; None: the usual one."""
    known = DATASETS.get(config.name)
    return None if known is None or known.label in USUAL_LABELS else known.label


def hold_out(splits: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Take the split "validation" out of "train", if ``config`` asks for it.

    Raises:
        UsageError: nothing is left to train on.
    """
    train, held_out = splits["train"], config.validation
    if not 0 <= held_out < train.num_images:
        raise UsageError(
            f"data.validation={held_out} must leave images to train on; {config.name} "
            f"has {train.num_images}; choose from 0 to {train.num_images - 1}"
        )
    if not held_out:
        return splits
    kept = train.num_images - held_out
    return {
        **splits,
        "train": train.take(0, kept),
        "validation": train.take(kept, held_out),
    }


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
