"""A folder of images in which every sub-folder is a class.

Images may have any size and mode; each is cropped and scaled to a square as it is read.
Nothing is ever written into the folder.
"""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flax_resnetv2.data.catalog import TEST_EVERY, DatasetSummary
from flax_resnetv2.data.decoded_cache import (
    Decoded,
    DecodedCache,
    cache_path,
    fingerprint,
)
from flax_resnetv2.data.decoding import Resize, read_image, read_squares
from flax_resnetv2.errors import UsageError

SUFFIXES = {
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
}
"""Suffixes of image files, in lower case."""
TRAIN_FOLDERS = ("train", "training")
"""Names of a folder of training images, in lower case."""
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "eval")
"""Names of a folder of test images next to it; the first that exists is used."""
WRAPPERS = ("images", "data", "dataset")
"""Names of a folder in which both may lie."""


@dataclass(frozen=True)
class Folder:
    """The list of the images in a folder."""

    root: Path
    class_names: tuple[str, ...]
    """Names of the sub-folders, sorted."""
    files: dict[str, tuple[tuple[Path, int], ...]]
    """Path and class of each image of "train" and "test", in the order of the split."""
    notes: tuple[str, ...]
    """Which files were ignored, and which images are test images."""

    def summary(self, size: int) -> DatasetSummary:
        """Describe the data set with images of ``size`` x ``size`` pixels."""
        counts = {split: len(files) for split, files in self.files.items()}
        return DatasetSummary((size, size, 3), self.class_names, counts, self.notes)

    def cache(self, size: int) -> DecodedCache:
        """Return the cache of the decoded images, in the user's cache directory."""
        root = self.root.resolve()
        files = [
            (path, (split, str(path), label))
            for split, files in self.files.items()
            for path, label in files
        ]
        try:
            text = fingerprint(files, size, str(root))
        except OSError as error:
            raise UsageError(
                f"{error.filename} cannot be read ({error.strerror}); remove it, or "
                "make it readable"
            ) from error
        # The names of a hundred thousand files need not be stored themselves.
        source = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        return DecodedCache(source, [cache_path(root, f"folder-{root.name}-{size}")])

    def read(self, size: int) -> Decoded:
        """Read all images as squares, decoded now or earlier."""

        def decode() -> Decoded:
            arrays = {}
            for split, files in self.files.items():
                named = ((path, path) for path, _ in files)
                labels = np.asarray([label for _, label in files], np.int32)
                arrays[split] = read_squares(named, len(files), 3, size), labels
            return arrays, self.class_names

        return self.cache(size).get(decode)


@dataclass(frozen=True, eq=False)
class Files:
    """The images of a split that are read from their folder one by one."""

    files: tuple[tuple[Path, int], ...]
    """Path and class of each image, in the order of the split."""
    image_shape: tuple[int, int, int]
    """Shape of an image after resizing, (height, width, channels)."""
    multi_label: Literal[False] = False

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.files)

    def take(self, first: int, count: int) -> "Files":
        """Return ``count`` images from ``first`` on."""
        return replace(self, files=self.files[first : first + count])

    def read(self, index: int, resize: Resize) -> tuple[np.ndarray, np.ndarray]:
        """Read an image, uint8 ``image_shape``, and its label, int32."""
        path, label = self.files[index]
        image = read_image(path, path, self.image_shape[2], resize)
        return image, np.asarray(label, np.int32)

    def checksum(self) -> int:
        """CRC-32 of the names, classes and sizes of the files in their order."""
        found = [(path.name, k, path.stat().st_size) for path, k in self.files]
        return zlib.crc32(repr(found).encode(errors="surrogateescape"))


def list_folder(path: str) -> Folder:
    """List the images of a folder.

    If there is one of ``TRAIN_FOLDERS``, its sub-folders are the classes, and the first
    of ``TEST_FOLDERS`` next to it holds the test images in the same way; upper and
    lower case are the same, and both may lie in one sub-folder together. Otherwise
    every tenth image of each class, sorted by name, is a test image.

    Raises:
        UsageError: the folder cannot be read or trained on, or has a link out of it.
    """

    def refused(reason: str) -> UsageError:
        return UsageError(f"data.name=folder:{path} {reason}")

    root = Path(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        raise refused(
            "names no folder; give folder:PATH of one in which every sub-folder is a "
            "class"
        )
    ignored: Counter[str] = Counter()
    train, test, notes = _find_splits(root)
    train_images = _classes(root, train or root, ignored)
    names = tuple(train_images)
    if len(names) < 2:
        raise refused(
            f"has {len(names)} classes ({', '.join(names)}); give a folder with two "
            "sub-folders of images or more"
        )
    if empty := [name for name, images in train_images.items() if not images]:
        raise refused(
            f"has no image of {', '.join(empty[:9])}; add some "
            f"({' '.join(sorted(SUFFIXES))}), or remove the sub-folder"
        )
    if test is not None:
        test_images = _classes(root, test, ignored)
        if unknown := sorted(set(test_images) - set(names)):
            raise refused(
                f"has {', '.join(unknown[:9])} to test on but not to train on; give "
                "both the same sub-folders"
            )
    else:
        test_images, every = {}, slice(TEST_EVERY - 1, None, TEST_EVERY)
        for name, images in train_images.items():
            test_images[name] = images[every]
            del images[every]
        notes.append(
            f"every tenth image of a class is tested on, as {root} has no "
            "sub-folders train and test"
        )
    parent = train or root
    inside = (
        {
            x.relative_to(parent / name).parts[0]
            for x in images
            if x.parent != parent / name
        }
        for name, images in train_images.items()
    )
    if repeated := set.intersection(*inside):
        notes.append(
            f"every class has sub-folders {', '.join(sorted(repeated)[:9])}; if those "
            "are the classes, name the folder that they lie in"
        )
    splits = {"train": train_images, "test": test_images}
    files = {split: _shuffled(root, names, x) for split, x in splits.items()}
    if not files["test"]:
        raise refused(
            "has no image to test on; give ten of a class or more, or sub-folders "
            "train and test"
        )
    if ignored:
        kinds = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(5))
        notes.append(f"left out as no images: {kinds}")
    shown = ", ".join(names[:20]) + ", …" * (len(names) > 20)
    notes.append(f"{len(names)} classes: {shown}")
    return Folder(root, names, files, tuple(notes))


def _find_splits(root: Path) -> tuple[Path | None, Path | None, list[str]]:
    """Find the folders of training and test images; say what is left out."""
    beside = _folders(root)
    wrappers = [path for path in beside if path.name.lower() in WRAPPERS]
    for parent in (root, *wrappers):
        folders = _folders(parent)
        by_name = {path.name.lower(): path for path in reversed(folders)}
        train, test = (
            next((by_name[name] for name in names if name in by_name), None)
            for names in (TRAIN_FOLDERS, TEST_FOLDERS)
        )
        if train is None or (parent != root and test is None):
            continue
        others = [path.name for path in folders if path not in (train, test)]
        if parent != root:
            others += [path.name for path in beside if path != parent]
        notes = []
        if others:
            notes.append(f"left out next to train and test: {', '.join(others[:9])}")
        return train, test, notes
    return None, None, []


def _folders(directory: Path) -> list[Path]:
    return [path for path in _entries(directory) if path.is_dir()]


def _entries(directory: Path) -> list[Path]:
    """List a directory, sorted, without hidden entries and without linked folders."""
    try:
        found = sorted(x for x in directory.iterdir() if not x.name.startswith("."))
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be read ({error.strerror}); make it readable"
        ) from error
    for path in found:
        if path.is_symlink() and path.is_dir():  # it could lead out, or in circles
            raise UsageError(
                f"{path} is a link to a folder; copy what is in it there, or name the "
                "folder itself"
            )
    return found


def _classes(root: Path, parent: Path, ignored: Counter[str]) -> dict[str, list[Path]]:
    """Return the sorted images of each sub-folder, and count the other files."""
    return {
        folder.name: sorted(_images(root, folder, ignored))
        for folder in _entries(parent)
        if folder.is_dir()
    }


def _images(root: Path, directory: Path, ignored: Counter[str]) -> Iterator[Path]:
    """Yield the images below a directory at any depth."""
    for path in _entries(directory):
        if path.is_dir():
            yield from _images(root, path, ignored)
        elif path.suffix.lower() not in SUFFIXES or _is_special(path):
            ignored[path.suffix.lower() or "without a suffix"] += 1
        elif path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise UsageError(
                f"{path} is a link that leads out of {root}; copy the image there"
            )
        else:
            yield path


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device; reading it could wait for ever."""
    return path.exists() and not path.is_file()


def _shuffled(
    root: Path, names: tuple[str, ...], images: dict[str, list[Path]]
) -> tuple[tuple[Path, int], ...]:
    """Mix the classes, because ``data.validation`` holds out the last images.

    The order depends on the names only, so it is the same on every machine.
    """

    def digest(item: tuple[Path, int]) -> bytes:
        name = item[0].relative_to(root).as_posix()
        return hashlib.sha256(os.fsencode(name)).digest()

    found = [(path, names.index(name)) for name in images for path in images[name]]
    return tuple(sorted(found, key=digest))
