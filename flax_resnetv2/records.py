"""Reading what TFDS prepared, without TensorFlow: array_record in, NumPy arrays out."""

import contextlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnetv2.errors import UsageError


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


def read_split(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole split in the order of its records.

    Returns:
        Images uint8 [N, H, W, C] and labels int32 [N].

    Raises:
        UsageError: the split does not exist, its files are damaged or cannot be read,
            its images are not alike, or a label has no class.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    builder = _builder(directory)
    if split not in builder.info.splits:
        raise UsageError(
            f"{directory} has no split {split!r}; it has "
            f"{', '.join(map(repr, builder.info.splits))}"
        )
    # PIL decodes small PNG files faster than TFDS's own decoder does without OpenCV.
    skip = {"image": tfds.decode.SkipDecoding()}
    with reading(directory, f"the split {split!r} of "):
        source = builder.as_data_source(split, decoders=skip)
        # TFDS reads as many as the description says, of however many there are.
        paths = directory.glob(f"*-{split}.array_record-*")
        stored = sum(ArrayRecordReader(str(path)).num_records() for path in paths)
        if stored != len(source):
            raise ValueError(f"it has {stored} records, described as {len(source)}")
        records = source.__getitems__(range(len(source)))
        images = _decode([record["image"] for record in records])
        labels = np.asarray([record["label"] for record in records], np.int32)
        count = builder.info.features["label"].num_classes
        if strange := set(labels.tolist()) - set(range(count)):
            raise ValueError(f"the label {min(strange)} of {count} classes")
    return images, labels


def class_names(directory: Path) -> tuple[str, ...]:
    """Give the names of the labels, in their order."""
    builder = _builder(directory)
    with reading(directory):
        return tuple(builder.info.features["label"].names)


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
    except Exception as error:  # foreign readers raise anything
        if isinstance(error, OSError) and error.strerror:
            raise UsageError(
                f"{part}{directory} cannot be read ({error.strerror}: "
                f"{error.filename}); see to it, or give another --data.dir"
            ) from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{part}{directory} cannot be read ({reason}); remove it to have the data "
            "set prepared again"
        ) from error


def _decode(files: Sequence[bytes]) -> np.ndarray:
    """Decode images of one size and mode, uint8 [N, H, W, C].

    Raises:
        ValueError: there is none, or they differ from the first, or from 8 bits a
            channel in grey or red, green, blue.
        OSError: one is no image, or cut short.
    """
    from PIL import Image

    images: list[np.ndarray] = []
    first = None
    # PIL warns of an image of 90 million pixels, and goes on.
    with warnings.catch_warnings(
        action="error", category=Image.DecompressionBombWarning
    ):
        for file in files:
            image = Image.open(io.BytesIO(file))
            kind = image.mode, *image.size
            first = first or kind
            if kind != first or image.mode not in ("L", "RGB"):
                raise ValueError(
                    f"image {len(images)} is {_in_words(kind)}, the first "
                    f"{_in_words(first)}; all must be alike, of mode L or RGB"
                )
            images.append(np.asarray(image))
    # A grey image has no channel axis of its own.
    return np.stack(images).reshape(len(images), *images[0].shape[:2], -1)


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
