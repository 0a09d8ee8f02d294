"""Reading what TFDS prepared, without TensorFlow: array_record in, NumPy arrays out."""

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

from flax_resnetv2.data.images import Fit, careful, read_image, read_squares
from flax_resnetv2.errors import UsageError

USUAL_LABELS = ("label", "attributes")
"""Features that are learned, the first that is there."""
TENTH = 10
"""One image of so many is tested on, where a data set does not say which."""
_AT_ONCE = 1024
"""Records."""


def find_prepared(name: str, root: Path) -> Path | None:
    """Find the newest version of a data set that is readable without TensorFlow.

    Args:
        name: of the data set, as "cifar10".
        root: a directory of TFDS data sets.

    Returns:
        The directory root/name/version; None: no version is there.

    Raises:
        UsageError: what is there is broken, or in a format that needs TensorFlow.
    """
    # Other names are of directories that TFDS is writing, or was when it was killed.
    found = sorted(
        (
            path.parent
            for path in root.glob(f"{name}/*/dataset_info.json")
            if re.fullmatch(r"[0-9]+(\.[0-9]+)*", path.parent.name)
        ),
        key=lambda directory: [int(part) for part in directory.name.split(".")],
        reverse=True,
    )
    described = {directory: _described(directory) for directory in found}
    for directory, (file_format, shards) in described.items():
        if file_format == "array_record":
            _check_files(directory, shards)
            return directory
    if found:
        raise UsageError(
            f"{found[0]} is in the format {described[found[0]][0]}, which only "
            "TensorFlow reads; array_record is needed: give an empty --data.dir to "
            "have the data set prepared again, or prepare it where TensorFlow is with "
            f"tfds build {name} --file_format=array_record"
        )
    return None


class Part(NamedTuple):
    """Where the images of a split of ours are stored."""

    split: str
    """Of TFDS."""
    places: range | np.ndarray
    """Of the records there, rising."""


def parts(directory: Path) -> dict[str, Part]:
    """Say which records are the splits "train" and "test".

    "test" is TFDS's own one, or else its "validation" (as of ImageNet, whose test
    labels are not public), or else every tenth record of "train", which then lacks it.

    Raises:
        UsageError: there is no split "train".
    """
    sizes = split_sizes(directory)
    if "train" not in sizes:
        raise UsageError(
            f"{directory} has no split 'train'; it has "
            f"{', '.join(map(repr, sizes)) or 'none'}; choose another --data.name"
        )
    whole = {name: Part(name, range(size)) for name, size in sizes.items()}
    for test in ("test", "validation"):
        if test in whole:
            return {"train": whole["train"], "test": whole[test]}
    count = sizes["train"]
    tenth = range(TENTH - 1, count, TENTH)
    return {
        "train": Part("train", np.setdiff1d(np.arange(count), tenth)),
        "test": Part("train", tenth),
    }


def notes(directory: Path) -> tuple[str, ...]:
    """Say what a person may not expect of the splits."""
    tested = parts(directory)["test"].split
    if tested == "train":
        return ("every tenth record is tested on, as there is no split but train",)
    return () if tested == "test" else (f"the split {tested} is tested on",)


class Label(NamedTuple):
    """What a record says that the net learns."""

    feature: str
    names: tuple[str, ...]
    """Of the classes."""
    multi: bool
    """Every one is there or not (features of bool); else it is one of them."""


def label_of(directory: Path, feature: str | None = None) -> Label:
    """Describe a feature of a data set; None: the first of ``USUAL_LABELS``.

    Raises:
        UsageError: it does not exist, or is no label of this kind.
    """
    builder = _builder(directory)
    with reading(directory):
        features = dict(builder.info.features.items())
        if feature is None:
            feature = next((f for f in USUAL_LABELS if f in features), None)
        found = features.get(feature)
        if hasattr(found, "num_classes"):
            return Label(feature, tuple(found.names), multi=False)
        # TFDS gives them in another order than they were written.
        each = dict(found.items()) if hasattr(found, "items") else {}
        if each and all(np.dtype(flag.np_dtype) == bool for flag in each.values()):
            return Label(feature, tuple(sorted(each)), multi=True)
    raise UsageError(
        f"{directory} has no feature 'label' of one class and no 'attributes' of "
        f"several; it has {', '.join(features)}; choose a data set for classification"
    )


def image_shape_of(directory: Path) -> tuple[int | None, int | None, int]:
    """(height, width, channels) of the images; None where they differ.

    Raises:
        UsageError: there is no feature "image" of 1 or 3 channels.
    """
    builder = _builder(directory)
    with reading(directory):
        features = dict(builder.info.features.items())
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
    """Read a whole split in the order of its records.

    Args:
        directory: of ``find_prepared``.
        split: "train" or "test", see ``parts``.
        label: the feature to learn; None: see ``label_of``.
        size: side of the squares that the images are brought to; None: they must be
            alike.

    Returns:
        Images uint8 [N, H, W, C] and labels int32 [N], or uint8 [N, K] of K attributes.

    Raises:
        UsageError: the split does not exist, its files are damaged or cannot be read,
            its images are not alike, or a label has no class.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    builder, told = _builder(directory), label_of(directory, label)
    stored_split, places = parts(directory)[split]
    # PIL decodes small PNG files faster than TFDS's own decoder does without OpenCV.
    skip = {"image": tfds.decode.SkipDecoding()}
    labels = []
    with reading(directory, f"the split {stored_split!r} of "):
        source = builder.as_data_source(stored_split, decoders=skip)
        # TFDS reads as many as the description says, of however many there are.
        paths = directory.glob(f"*-{stored_split}.array_record-*")
        stored = sum(ArrayRecordReader(str(path)).num_records() for path in paths)
        if stored != len(source):
            raise ValueError(f"it has {stored} records, described as {len(source)}")

        def files() -> Iterator[bytes]:
            # The files of all images at once could be as large as the images.
            for first in range(0, len(places), _AT_ONCE):
                at = places[first : first + _AT_ONCE]
                for record in source.__getitems__([int(place) for place in at]):
                    labels.append(record[told.feature])
                    yield record["image"]

        if size is None:
            images = _alike(files(), len(places))
        else:
            named = ((io.BytesIO(f), f"image {k}") for k, f in enumerate(files()))
            channels = image_shape_of(directory)[2]
            images = read_squares(named, len(places), channels, size)
        return images, _numbers(labels, told)


def _numbers(labels: list[Any], told: Label) -> np.ndarray:
    """Labels as an array; refuse one that has no class."""
    if told.multi:
        rows = [[label[name] for name in told.names] for label in labels]
        return np.asarray(rows, np.uint8)
    numbers, count = np.asarray(labels, np.int32), len(told.names)
    if strange := set(numbers.tolist()) - set(range(count)):
        raise ValueError(f"the label {min(strange)} of {count} classes")
    return numbers


@dataclass(frozen=True, eq=False)
class Records:
    """Images that stay on disk, in the order of their records."""

    directory: Path
    part: Part
    label: Label
    image_shape: tuple[int, int, int]
    """(height, width, channels) of what is made of them: a square."""

    @property
    def num_images(self) -> int:
        """How many."""
        return len(self.part.places)

    @property
    def multi_label(self) -> bool:
        """Whether a label says of each class whether it is there."""
        return self.label.multi

    def take(self, first: int, images: int) -> "Records":
        """Some of them."""
        places = self.part.places[first : first + images]
        return replace(self, part=self.part._replace(places=places))

    def read(self, index: int, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        """Read an image, uint8 ``image_shape``, and its label as ``read_split`` does.

        Args:
            index: which.
            fit: brings it to its size.

        Raises:
            UsageError: the files are damaged or gone, it is no image, or of no class.
        """
        split, place = self.part.split, int(self.part.places[index])
        named = f"image {place} of the split {split!r} of "
        with reading(self.directory, named):
            record = _source(self.directory, split)[place]
            (label,) = _numbers([record[self.label.feature]], self.label)
        file, channels = io.BytesIO(record["image"]), self.image_shape[2]
        return read_image(file, f"{named}{self.directory}", channels, fit), label

    def checksum(self) -> int:
        """CRC-32 of which they are, and of the names and sizes of their files."""
        files = sorted(self.directory.glob(f"*-{self.part.split}.array_record-*"))
        found = [(path.name, path.stat().st_size) for path in files]
        places = np.asarray(self.part.places, np.int64)
        return zlib.crc32(places, zlib.crc32(repr(found).encode()))


@lru_cache(maxsize=4)
def _source(directory: Path, split: str) -> Any:
    """Opened once in each process that reads; images are given as files."""
    import tensorflow_datasets as tfds

    skip = {"image": tfds.decode.SkipDecoding()}
    return _builder(directory).as_data_source(split, decoders=skip)


def _builder(directory: Path) -> Any:
    """Have TFDS read the descriptions of a data set."""
    import tensorflow_datasets as tfds

    with reading(directory):
        for path in directory.iterdir():  # array_record has one word for all causes
            if path.is_file():
                path.open("rb").close()
        return tfds.builder_from_directory(directory)


@contextlib.contextmanager
def reading(directory: Path, part: str = "") -> Iterator[None]:
    """Turn what reading a damaged data set raises into one line."""
    try:
        yield
    except (UsageError, MemoryError):
        raise  # the data set is blamed already, or not to blame
    except Exception as error:  # foreign readers raise anything
        # TFDS asks for TensorFlow where it does not understand a description.
        if isinstance(error, ImportError) and error.name != "tensorflow":
            raise
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(
                f"{part}{directory} cannot be read ({error.strerror}: "
                f"{error.filename}); see to it, or give another --data.dir"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{part}{directory} cannot be read ({reason}); remove it to have the data "
            "set prepared again, or bring back a copy of one that TFDS prepared"
        ) from error


def _alike(files: Iterator[bytes], count: int) -> np.ndarray:
    """Decode images of one size and mode, uint8 [count, H, W, C].

    Raises:
        ValueError: there is none, or they differ from the first, or from 8 bits a
            channel in gray or red, green, blue.
        OSError: one is no image, or cut short.
    """
    from PIL import Image

    images, first = None, None
    with careful():
        for place, file in enumerate(files):
            image = Image.open(io.BytesIO(file))
            kind = image.mode, *image.size
            first = first or kind
            if kind != first or image.mode not in ("L", "RGB"):
                raise ValueError(
                    f"image {place} is {_in_words(kind)}, the first "
                    f"{_in_words(first)}; all must be alike, of mode L or RGB"
                )
            pixels = np.asarray(image)
            if images is None:
                # A gray image has no channel axis of its own.
                shape = (*pixels.shape[:2], pixels.size // (image.width * image.height))
                images = np.empty((count, *shape), np.uint8)
            images[place] = pixels.reshape(images.shape[1:])
    if images is None:
        raise ValueError("it has no images")
    return images


def _in_words(kind: tuple[str, int, int]) -> str:
    mode, width, height = kind
    return f"{mode} of {width}x{height} pixels"


def split_sizes(directory: Path) -> dict[str, int]:
    """Count the images of each split, as the description does."""
    _, shards = _described(directory)
    return {split: sum(lengths) for split, lengths in shards.items()}


def _described(directory: Path) -> tuple[str, dict[str, list[int]]]:
    """Read format and lengths of the files of each split from ``dataset_info.json``."""
    path = directory / "dataset_info.json"
    try:
        # TFDS leaves the format out where it is its old default.
        fields = {
            "fileFormat": "tfrecord",
            "splits": [],
            **json.loads(path.read_text()),
        }
        shards = {
            s["name"]: [int(length) for length in s["shardLengths"]]
            for s in fields["splits"]
        }
        return fields["fileFormat"], shards
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); see to it, or give another "
            "--data.dir"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"{path} is not a description of a data set ({error}); remove {directory} "
            "to have it prepared again"
        ) from error


def _check_files(directory: Path, shards: dict[str, list[int]]) -> None:
    """Refuse a directory that lacks a record file its description counts."""
    for split, lengths in shards.items():
        expected = len(lengths)
        pattern = f"*-{split}.array_record-*-of-{expected:05d}"
        present = len(list(directory.glob(pattern)))
        if present != expected:
            raise UsageError(
                f"{directory} lacks {expected - present} of {expected} record files of "
                f"the split {split!r}; remove it to have it prepared again, or "
                "give another --data.dir"
            )
