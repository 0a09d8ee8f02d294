"""Read data sets that TFDS prepared as array_record, without TensorFlow."""

import contextlib
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flax_resnetv2.data.catalog import TEST_EVERY
from flax_resnetv2.data.decoding import Resize, read_image, read_squares, strict_pillow
from flax_resnetv2.errors import UsageError

USUAL_LABELS = ("label", "attributes")
"""Features to learn; the first that a data set has is used."""
_CHUNK = 1024
"""Records in memory at the same time, as files."""


def find_prepared(name: str, root: Path) -> Path | None:
    """Return root/name/VERSION of the newest version that is readable here, if any.

    Refuses a data set that is incomplete, or in a format that needs TensorFlow.
    """
    versions = [
        path.parent
        for path in root.glob(f"{name}/*/dataset_info.json")
        # While TFDS writes a version, its directory has a longer name.
        if re.fullmatch(r"[0-9]+(\.[0-9]+)*", path.parent.name)
    ]
    versions.sort(key=lambda x: [int(n) for n in x.name.split(".")], reverse=True)
    for directory in versions:
        file_format, shards = _description(directory)
        if file_format != "array_record":
            continue
        for split, lengths in shards.items():
            expected = len(lengths)
            pattern = f"*-{split}.array_record-*-of-{expected:05d}"
            if missing := expected - len(list(directory.glob(pattern))):
                raise UsageError(
                    f"{directory} lacks {missing} of {expected} record files of the "
                    f"split {split!r}; remove it to have it prepared again, or give "
                    "another --data.dir"
                )
        return directory
    if versions:
        raise UsageError(
            f"{versions[0]} is in the format {_description(versions[0])[0]}, which "
            "only TensorFlow reads; array_record is needed: give an empty --data.dir "
            "to have the data set prepared again, or prepare it where TensorFlow is "
            f"with tfds build {name} --file_format=array_record"
        )
    return None


class StoredSplit(NamedTuple):
    """The records of a split."""

    name: str
    """The split of TFDS that contains them."""
    indices: range | np.ndarray
    """Their indices in that split, ascending."""


def stored_splits(directory: Path) -> dict[str, StoredSplit]:
    """Return the records of "train" and "test"; ``UsageError`` without a "train".

    "test" is TFDS's split of that name, or else "validation" (ImageNet's test labels
    are not public), or else every tenth record of "train", which "train" then lacks.
    """
    splits = {k: StoredSplit(k, range(n)) for k, n in split_sizes(directory).items()}
    if "train" not in splits:
        raise UsageError(
            f"{directory} has no split 'train'; it has "
            f"{', '.join(map(repr, splits)) or 'none'}; choose another --data.name"
        )
    train = splits["train"]
    for test in ("test", "validation"):
        if test in splits:
            return {"train": train, "test": splits[test]}
    tested = train.indices[TEST_EVERY - 1 :: TEST_EVERY]
    kept = np.setdiff1d(train.indices, tested)
    return {"train": StoredSplit("train", kept), "test": StoredSplit("train", tested)}


def notes(directory: Path) -> tuple[str, ...]:
    """Return which records are test images, unless they are the split "test"."""
    tested = stored_splits(directory)["test"].name
    if tested == "train":
        return ("every tenth record is tested on, as there is no split but train",)
    return () if tested == "test" else (f"the split {tested} is tested on",)


class LabelFeature(NamedTuple):
    """The feature of a record that the net learns."""

    name: str
    class_names: tuple[str, ...]
    multi_label: bool
    """Whether it is a group of flags, one per class, instead of one class."""


def label_of(directory: Path, name: str | None = None) -> LabelFeature:
    """Describe a label, by default the first of ``USUAL_LABELS``, or refuse it."""
    with reading(directory):
        features = dict(_builder(directory).info.features.items())
        if name is None:
            name = next((f for f in USUAL_LABELS if f in features), None)
        found = features.get(name)
        if hasattr(found, "num_classes"):
            return LabelFeature(name, tuple(found.names), multi_label=False)
        flags = dict(found.items()) if hasattr(found, "items") else {}
        if flags and all(np.dtype(flag.np_dtype) == bool for flag in flags.values()):
            # TFDS does not keep the order in which they were written.
            return LabelFeature(name, tuple(sorted(flags)), multi_label=True)
    raise UsageError(
        f"{directory} has no feature 'label' of one class and no 'attributes' of "
        f"several; it has {', '.join(features)}; choose a data set for classification"
    )


def image_shape_of(directory: Path) -> tuple[int | None, int | None, int]:
    """Return (height, width, channels) of the images; None for a side that varies."""
    with reading(directory):
        features = dict(_builder(directory).info.features.items())
        shape = features["image"].shape if "image" in features else ()
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise UsageError(
            f"{directory} has no feature 'image' of 1 or 3 channels; choose a data set "
            "for image classification"
        )
    return shape


def read_split(
    directory: Path, split: str, label: str | None = None, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read "train" or "test" in the order of the records.

    Args:
        directory, split: as of ``stored_splits``.
        label: as of ``label_of``.
        size: side of the central squares that are read; None: the images have one size.

    Returns:
        Images uint8 [N, H, W, C] and labels int32 [N], or uint8 [N, K] of K attributes.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    feature, labels = label_of(directory, label), []
    stored, indices = stored_splits(directory)[split]
    with reading(directory, f"the split {stored!r} of "):
        source = _source(directory, stored)
        # TFDS reads as many records as the description counts.
        paths = directory.glob(f"*-{stored}.array_record-*")
        count = sum(ArrayRecordReader(str(path)).num_records() for path in paths)
        if count != len(source):
            raise ValueError(f"it has {count} records, described as {len(source)}")

        def files() -> Iterator[bytes]:
            for first in range(0, len(indices), _CHUNK):
                chunk = [int(index) for index in indices[first : first + _CHUNK]]
                for record in source.__getitems__(chunk):
                    labels.append(record[feature.name])
                    yield record["image"]

        if size is None:
            images = _read_alike(files(), len(indices))
        else:
            named = ((io.BytesIO(f), f"image {k}") for k, f in enumerate(files()))
            channels = image_shape_of(directory)[2]
            images = read_squares(named, len(indices), channels, size)
        return images, _label_array(labels, feature)


def _label_array(labels: list[Any], feature: LabelFeature) -> np.ndarray:
    """Return labels as of ``read_split``, and refuse one that has no class."""
    if feature.multi_label:
        rows = [[label[name] for name in feature.class_names] for label in labels]
        return np.asarray(rows, np.uint8)
    numbers, count = np.asarray(labels, np.int32), len(feature.class_names)
    if unknown := set(numbers.tolist()) - set(range(count)):
        raise ValueError(f"the label {min(unknown)} of {count} classes")
    return numbers


@dataclass(frozen=True, eq=False)
class Records:
    """The images of a split that are read from their records one by one."""

    directory: Path
    stored: StoredSplit
    label: LabelFeature
    image_shape: tuple[int, int, int]
    """Shape of an image after resizing, (height, width, channels)."""

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.stored.indices)

    @property
    def multi_label(self) -> bool:
        """Whether an image has several labels instead of one class."""
        return self.label.multi_label

    def take(self, first: int, count: int) -> "Records":
        """Return ``count`` images from ``first`` on."""
        indices = self.stored.indices[first : first + count]
        return replace(self, stored=self.stored._replace(indices=indices))

    def read(self, index: int, resize: Resize) -> tuple[np.ndarray, np.ndarray]:
        """Read an image, uint8 ``image_shape``, and its label as of ``read_split``."""
        split, record_index = self.stored.name, int(self.stored.indices[index])
        name = f"image {record_index} of the split {split!r} of "
        with reading(self.directory, name):
            record = _shared_source(self.directory, split)[record_index]
            (label,) = _label_array([record[self.label.name]], self.label)
        file, channels = io.BytesIO(record["image"]), self.image_shape[2]
        return read_image(file, f"{name}{self.directory}", channels, resize), label

    def checksum(self) -> int:
        """CRC-32 of the indices, and of the names and sizes of the record files."""
        files = sorted(self.directory.glob(f"*-{self.stored.name}.array_record-*"))
        found = [(path.name, path.stat().st_size) for path in files]
        indices = np.asarray(self.stored.indices, np.int64)
        return zlib.crc32(indices, zlib.crc32(repr(found).encode()))


def _builder(directory: Path) -> Any:
    """Have TFDS read the description of a data set."""
    import tensorflow_datasets as tfds

    for path in directory.iterdir():  # errors of array_record do not name a cause
        if path.is_file():
            path.open("rb").close()
    return tfds.builder_from_directory(directory)


def _source(directory: Path, split: str) -> Any:
    """Open a split for random access; each record has its image as a file."""
    import tensorflow_datasets as tfds

    # Pillow decodes small PNG files faster than TFDS does without OpenCV.
    skip = {"image": tfds.decode.SkipDecoding()}
    return _builder(directory).as_data_source(split, decoders=skip)


_shared_source = lru_cache(maxsize=4)(_source)


@contextlib.contextmanager
def reading(directory: Path, part: str = "") -> Iterator[None]:
    """Turn exceptions about a damaged data set into a ``UsageError``."""
    try:
        yield
    except Exception as error:  # the readers raise anything
        # TFDS asks for TensorFlow where it does not understand a description.
        other = isinstance(error, ImportError) and error.name != "tensorflow"
        if other or isinstance(error, UsageError | MemoryError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        repair = "remove it to have the data set prepared again, or restore a copy"
        if isinstance(error, OSError) and error.strerror:
            reason = f"{error.strerror}: {error.filename}"
            repair = "repair that, or give another --data.dir"
        message = f"{part}{directory} cannot be read ({reason}); {repair}"
        raise UsageError(message) from error


def _read_alike(files: Iterator[bytes], count: int) -> np.ndarray:
    """Decode images of one size, all gray or all RGB: uint8 [count, H, W, C]."""
    from PIL import Image

    images = first = None
    with strict_pillow():
        for index, file in enumerate(files):
            image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG"))
            kind = f"{image.mode} of {image.width}x{image.height} pixels"
            first = first or kind
            if kind != first or image.mode not in ("L", "RGB"):
                raise ValueError(
                    f"image {index} is {kind}, the first {first}; all must be alike, "
                    "of mode L or RGB"
                )
            pixels = np.atleast_3d(image)
            if images is None:
                images = np.empty((count, *pixels.shape), np.uint8)
            images[index] = pixels
    if images is None:
        raise ValueError("it has no images")
    return images


def split_sizes(directory: Path) -> dict[str, int]:
    """Return the number of images of each split, according to the description."""
    _, shards = _description(directory)
    return {split: sum(lengths) for split, lengths in shards.items()}


def _description(directory: Path) -> tuple[str, dict[str, list[int]]]:
    """Return the file format, and the lengths of the record files of each split."""
    path = directory / "dataset_info.json"
    try:
        fields = json.loads(path.read_text())
        shards = {
            split["name"]: [int(length) for length in split["shardLengths"]]
            for split in fields.get("splits", [])
        }
        return fields.get("fileFormat", "tfrecord"), shards  # left out: the default
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); repair that, or give another "
            "--data.dir"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a description of a data set ({error}); remove {directory} "
            "to have it prepared again"
        ) from error
