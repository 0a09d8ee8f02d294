"""Open a data set by its configuration, in memory or on disk.

``open_dataset`` reads what TFDS prepared, or prepares it, without TensorFlow. A split
in memory is later copied to every device, and ``gather_batch`` gathers its batches
inside the compiled step; a split on disk is read ahead (see ``streaming``).
"""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.catalog import DATASETS, DatasetSummary
from flax_resnetv2.data.decoded_cache import read_dataset
from flax_resnetv2.data.decoding import center_crop
from flax_resnetv2.data.folder import Files, list_folder
from flax_resnetv2.data.tfds_records import (
    USUAL_LABELS,
    Records,
    find_prepared,
    image_shape_of,
    label_of,
    notes,
    stored_splits,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.system.files import home, user_cache
from flax_resnetv2.validation import Range, shown

_logger = logging.getLogger(__name__)

SAMPLED = 4096
"""Images on disk from which the statistics of the channels are computed."""
PREPARED = [n for n, spec in DATASETS.items() if spec.source == "official files"]
"""Data sets that are prepared here from official files."""


@dataclass(frozen=True)
class DataConfig:
    """Which data set to use, and where it is."""

    name: str = "cifar10"
    """cifar10, cifar100, cifar100_coarse (the 20 coarse classes), mnist, fashion_mnist,
    celeba; embedded_shapes, which the project draws; folder:PATH, a folder in which
    every sub-folder is a class; or the TFDS name of a data set that TFDS prepared."""
    dir: str | None = None
    """Directory of TFDS data sets. None: TFDS_DATA_DIR, or else TFDS's own default; for
    embedded_shapes, the user's cache directory."""
    archive: str | None = None
    """Prepare the data set from this local official archive (as
    cifar-10-binary.tar.gz), or this directory with the four files of MNIST, instead of
    downloading it."""
    url: str | None = None
    """Download the data set from this mirror of the official address."""
    accept_checksum: bool = False
    """Accept an archive whose SHA-256 is not the official one."""
    image_size: Annotated[int, Range(1, 1024)] | None = None
    """Crop the central square of each image and scale it to this side. None: use the
    images as stored, which must have one size; a folder needs a value."""
    validation: Annotated[int, Range(0, 2**31)] = 0
    """Hold out this many images from the end of the training split, as the split
    "validation"."""
    stream: bool | None = None
    """Leave the images on disk and read them ahead of their step. None: if they need
    more than a quarter of a device's memory; without ``fit``, never."""
    workers: Annotated[int, Range(0, 1024)] = 0
    """Number of processes that read streamed images. 0: threads of this process, one
    per core, which is faster until they compete for the interpreter."""


@dataclass(frozen=True)
class Dataset:
    """An open data set with splits "train", "test" and, if asked for, "validation"."""

    name: str
    class_names: tuple[str, ...]
    """Names in the order of the logits."""
    splits: dict[str, Split] | dict[str, Records] | dict[str, Files]
    """Images in memory, or images that stay on disk."""

    @property
    def multi_label(self) -> bool:
        """Whether an image has several labels instead of one class."""
        return self.splits["train"].multi_label

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image, (height, width, channels)."""
        return self.splits["train"].image_shape

    def in_memory(self) -> dict[str, Split]:
        """Return the splits in memory, which every device will hold."""
        return {k: s for k, s in self.splits.items() if isinstance(s, Split)}

    def channel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel of "train", in [0, 1].

        Pixel values are counted as integers, so the result does not depend on an order
        of summation. For images on disk, 4,096 evenly spaced ones are used.
        """
        train = self.splits["train"]
        image = train.image if isinstance(train, Split) else _sample(train)
        counted = np.zeros((image.shape[-1], 256), np.int64)
        # Chunks that fit into the processor's cache are ten times as fast.
        for first in range(0, len(image), 64):
            for channel, counts in enumerate(counted):
                pixels = image[first : first + 64, ..., channel].ravel()
                counts += np.bincount(pixels, minlength=256)
        mean, std = [], []
        values = np.arange(256) / 255
        for counts in counted:
            average = float(counts @ values / counts.sum())
            variance = float(counts @ (values - average) ** 2 / counts.sum())
            mean.append(average)
            std.append(variance**0.5)
        return tuple(mean), tuple(std)


def _sample(split: Records | Files) -> np.ndarray:
    """Read evenly spaced images: uint8 [N, H, W, C]."""
    count, resize = min(SAMPLED, split.num_images), center_crop(split.image_shape[0])
    indices = [k * split.num_images // count for k in range(count)]
    return np.stack([split.read(index, resize)[0] for index in indices])


def describe(config: DataConfig) -> DatasetSummary:
    """Describe a data set without reading its images, or refuse its name."""
    if (path := folder_of(config)) is not None:
        return list_folder(path).summary(_image_size(config))
    if (spec := DATASETS.get(config.name)) is not None:
        return DatasetSummary(known_shape(config), spec.class_names, spec.num_images)
    directory = prepared_directory(config)
    height, width, channels = image_shape_of(directory)
    if config.image_size is not None or None in (height, width):
        height = width = _image_size(config)
    splits = stored_splits(directory)
    return DatasetSummary(
        (height, width, channels),
        label_of(directory).class_names,
        {name: len(split.indices) for name, split in splits.items()},
        notes(directory),
    )


def known_shape(config: DataConfig) -> tuple[int, int, int] | None:
    """Return (height, width, channels) of an image, if no file is needed for that."""
    side, spec = config.image_size, DATASETS.get(config.name)
    if folder_of(config) is not None:
        return (_image_size(config), _image_size(config), 3)
    if spec is not None:
        return spec.image_shape if side is None else (side, side, spec.image_shape[2])
    if not re.fullmatch(r"[a-z]\w*(/[\w.+-]*\w)?", config.name, re.ASCII):
        raise UsageError(
            f"data.name={shown(config.name)} is no name of a data set; choose one of "
            f"{', '.join(DATASETS)}, folder:PATH, or one that TFDS prepared"
        )
    return None


def prepared_directory(config: DataConfig) -> Path | None:
    """Return the directory of the prepared data set; None: a run will prepare it."""
    spec, root = DATASETS.get(config.name), data_dir(config)
    stored = config.name if spec is None else spec.stored
    directory = find_prepared(stored, root)
    if directory is None and (spec is None or spec.source == "tfds"):
        raise UsageError(
            f"data.name={config.name} is none of {', '.join(PREPARED)} and folder:PATH,"
            f" and not prepared in {root}; TFDS prepares it once, with TensorFlow, in "
            "an environment of its own: python -m venv tf && tf/bin/pip install "
            "tensorflow-datasets tensorflow array_record && tf/bin/tfds build "
            f"{stored} --file_format=array_record --data_dir={root}"
        )
    return directory


def folder_of(config: DataConfig) -> str | None:
    """Return PATH if the data set is folder:PATH."""
    kind, colon, path = config.name.partition(":")
    return path if colon and kind == "folder" else None


def _image_size(config: DataConfig) -> int:
    if config.image_size is None:
        raise UsageError(
            f"data.image_size=None must be a number for {config.name}, whose images "
            "may be of any size; give the side that they are scaled to, as "
            "--data.image-size 64"
        )
    return config.image_size


def open_dataset(config: DataConfig) -> Dataset:
    """Open the data set that ``config`` names, and prepare it first if necessary.

    Raises:
        UsageError: a directory does not exist or cannot be read without TensorFlow, an
            archive is wrong, fields contradict each other, or ``validation`` leaves
            nothing to train on.
        RunError: the download failed, or the disk is full.
    """
    given, folder = _sources(config), None
    if (path := folder_of(config)) is not None:
        folder = list_folder(path)
        summary = folder.summary(_image_size(config))
    else:
        directory, label = prepared_directory(config), label_feature(config)
        if directory is None:
            directory = _prepare(config)
        elif given:
            _logger.info("%s is prepared already; not used: %s", directory, given)
        summary = describe(config)
    for note in summary.notes:
        _logger.info("%s: %s", config.name, note)
    shape = summary.image_shape
    if not config.stream:
        if folder is not None:
            arrays, names = folder.read(shape[0])
        else:
            arrays, names = read_dataset(directory, label, config.image_size)
        splits = {split: Split(*pair) for split, pair in arrays.items()}
    elif folder is not None:
        names = folder.class_names
        splits = {split: Files(files, shape) for split, files in folder.files.items()}
    elif shape[0] == shape[1]:
        feature, stored = label_of(directory, label), stored_splits(directory)
        names = feature.class_names
        splits = {k: Records(directory, x, feature, shape) for k, x in stored.items()}
    else:
        raise UsageError(
            f"data.stream={config.stream}: images of {shape[0]}x{shape[1]} pixels are "
            "read from disk as squares; add --data.image-size SIDE"
        )
    return Dataset(config.name, names, hold_out(splits, config))


def _prepare(config: DataConfig) -> Path:
    """Prepare the data set, and return its directory."""
    from flax_resnetv2.data.prepare import write_tfds

    spec, root = DATASETS[config.name], data_dir(config)
    if spec.source == "drawing":
        write_tfds.prepare_embedded(root)
    else:
        write_tfds.prepare(
            spec.stored,
            root,
            archive=config.archive,
            url=config.url,
            accept_checksum=config.accept_checksum,
        )
    return prepared_directory(config)


def label_feature(config: DataConfig) -> str | None:
    """Return the feature of a record to learn; None: the usual one."""
    spec = DATASETS.get(config.name)
    return None if spec is None or spec.label in USUAL_LABELS else spec.label


def hold_out(splits: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    """Split "validation" off the end of "train", if ``config`` asks for it."""
    train, held_out = splits["train"], config.validation
    if not 0 <= held_out < train.num_images:
        raise UsageError(
            f"data.validation={held_out} must leave images to train on; {config.name} "
            f"has {train.num_images}; choose from 0 to {train.num_images - 1}"
        )
    if not held_out:
        return splits
    kept = train.num_images - held_out
    held = {"train": train.take(0, kept), "validation": train.take(kept, held_out)}
    return {**splits, **held}


def data_dir(config: DataConfig) -> Path:
    """Return the directory of TFDS data sets; only a default may not exist yet."""
    path, source = config.dir, "data.dir"
    if path is None and config.name == "embedded_shapes":
        return user_cache() / "tensorflow_datasets"
    if path is None:
        path, source = os.environ.get("TFDS_DATA_DIR") or None, "TFDS_DATA_DIR"
    if path is None:
        return home() / "tensorflow_datasets"
    root = Path(os.path.expanduser(path))
    # Unlike Path.is_dir, os.path.isdir returns False for a name that is too long.
    if not path or not os.path.isdir(root):
        raise UsageError(
            f"{source}={path} is not a directory; give a directory that holds (or is "
            f"to hold) TFDS data sets; to have {config.name} prepared there, create it "
            f"first: mkdir -p {path}"
        )
    return root


def _sources(config: DataConfig) -> str:
    """Name the fields that say what to prepare from, after checking them together."""
    fields = {"data.archive": config.archive, "data.url": config.url}
    given = [f"{name}={x}" for name, x in fields.items() if x is not None]
    if len(given) == 2:
        raise UsageError(f"{' and '.join(given)} are two sources; give one of them")
    if config.accept_checksum:
        given.append("data.accept_checksum")
    if given and config.name not in PREPARED:
        how = "drawn" if config.name == "embedded_shapes" else "read as it is"
        raise UsageError(
            f"{' and '.join(given)}: {config.name} is {how} and has no archive; leave "
            "it out, or choose --data.name cifar10"
        )
    return " and ".join(given)
