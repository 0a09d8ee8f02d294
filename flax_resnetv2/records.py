"""Reading what TFDS prepared, without TensorFlow: array_record in, NumPy arrays out."""

import io
import json
import re
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
    formats = {directory: _description(directory)["fileFormat"] for directory in found}
    for directory in found:
        if formats[directory] == "array_record":
            _check_files(directory)
            return directory
    if found:
        raise UsageError(
            f"{found[0]} is in the format {formats[found[0]]}, which only TensorFlow "
            "reads; array_record is needed: give an empty --data.dir to have the data "
            "set prepared again, or prepare it where TensorFlow is with "
            f"tfds build {name} --file_format=array_record"
        )
    return None


def read_split(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole split in the order of its records.

    Returns:
        Images uint8 [N, H, W, C] and labels int32 [N].

    Raises:
        UsageError: the split does not exist, or its files are damaged.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    builder = tfds.builder_from_directory(directory)
    if split not in builder.info.splits:
        raise UsageError(
            f"{directory} has no split {split!r}; it has "
            f"{', '.join(map(repr, builder.info.splits))}"
        )
    # PIL decodes small PNG files faster than TFDS's own decoder does without OpenCV.
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split, decoders=skip)
        records = source.__getitems__(range(len(source)))
        images = np.stack(
            [np.asarray(Image.open(io.BytesIO(r["image"]))) for r in records]
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"the split {split!r} of {directory} cannot be read ({reason}); remove it "
            "to have the data set prepared again"
        ) from error
    # A grey image has no channel axis of its own.
    images = images.reshape(*images.shape[:3], -1)
    return images, np.asarray([r["label"] for r in records], np.int32)


def class_names(directory: Path) -> tuple[str, ...]:
    """Give the names of the labels, in their order."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    return tuple(builder.info.features["label"].names)


def split_sizes(directory: Path) -> dict[str, int]:
    """Count the images of each split, as the description does."""
    splits = _description(directory).get("splits", [])
    return {s["name"]: sum(map(int, s["shardLengths"])) for s in splits}


def _description(directory: Path) -> dict[str, Any]:
    """Read ``dataset_info.json``, or say that it is broken."""
    path = directory / "dataset_info.json"
    try:
        description = json.loads(path.read_text())
        # TFDS leaves the format out where it is its old default.
        return {"fileFormat": "tfrecord", **description}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise UsageError(
            f"{path} is not a description of a data set ({error}); remove {directory} "
            "to have it prepared again"
        ) from error


def _check_files(directory: Path) -> None:
    """Refuse a directory that lacks a record file its description counts."""
    for split in _description(directory).get("splits", []):
        expected = len(split["shardLengths"])
        pattern = f"*-{split['name']}.array_record-*-of-{expected:05d}"
        present = len(list(directory.glob(pattern)))
        if present != expected:
            raise UsageError(
                f"{directory} lacks {expected - present} of {expected} record files of "
                f"the split {split['name']!r}; remove it to have it prepared again, or "
                "give another --data.dir"
            )
