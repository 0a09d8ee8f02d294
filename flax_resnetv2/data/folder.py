"""A folder of images in which every sub-folder is a class.

Images may be of any size and mode; each is brought to a square as it is read. Nothing
is ever written into the folder.
"""

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flax_resnetv2.data.catalog import DatasetSummary
from flax_resnetv2.data.decoded_cache import FORMAT, Decoded, find_kept, keep
from flax_resnetv2.data.images import Fit, read_image, read_squares
from flax_resnetv2.data.tfds_records import TENTH
from flax_resnetv2.errors import UsageError
from flax_resnetv2.system.files import user_cache

SUFFIXES = {
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff"),
    ".webp",
}
"""Of files that are taken for images, in small letters."""
TESTS = ("test", "val", "validation")
"""Sub-folders beside "train" to test on, the first that is there."""


@dataclass(frozen=True)
class Folder:
    """The images of a folder, listed."""

    root: Path
    class_names: tuple[str, ...]
    """The sub-folders, by name."""
    files: dict[str, tuple[tuple[Path, int], ...]]
    """Path and class of each image of "train" and "test", in the order of the split."""
    notes: tuple[str, ...]
    """What was left out, and what the test images are."""

    def facts(self, size: int) -> DatasetSummary:
        """Say what its images are once they are squares of this side."""
        counts = {split: len(files) for split, files in self.files.items()}
        shape = (size, size, 3)
        return DatasetSummary(shape, self.class_names, counts, notes=self.notes)


@dataclass(frozen=True, eq=False)
class Files:
    """Images that stay in their folder, in the order of a split."""

    files: tuple[tuple[Path, int], ...]
    """Path and class."""
    image_shape: tuple[int, int, int]
    """(height, width, channels) of what is made of them: a square."""
    multi_label: Literal[False] = False

    @property
    def num_images(self) -> int:
        """How many."""
        return len(self.files)

    def take(self, first: int, images: int) -> "Files":
        """Some of them."""
        return replace(self, files=self.files[first : first + images])

    def read(self, index: int, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
        """Read an image, uint8 ``image_shape``, and its label, int32.

        Args:
            index: which.
            fit: brings it to its size.

        Raises:
            UsageError: it cannot be read.
        """
        path, label = self.files[index]
        image = read_image(path, path, self.image_shape[2], fit)
        return image, np.asarray(label, np.int32)

    def checksum(self) -> int:
        """CRC-32 of their names, classes and sizes, in their order."""
        found = [(path.name, k, path.stat().st_size) for path, k in self.files]
        return zlib.crc32(repr(found).encode(errors="surrogateescape"))


def list_folder(said: str) -> Folder:
    """List the images of a folder.

    Where it has a sub-folder "train", classes are the sub-folders of that one, and the
    test images lie beside it in the same way (``TESTS``). Elsewhere every tenth image
    of each class, in the order of the names, is a test image.

    Raises:
        UsageError: it is no folder, has less than two classes, one without images, one
            to test on that is not there to train on, or a link that leads out of it.
    """
    root = Path(os.path.expanduser(said))
    if not said or not os.path.isdir(root):
        raise UsageError(
            f"data.name=folder:{said} names no folder; give folder:PATH of one in "
            "which every sub-folder is a class"
        )
    others: Counter[str] = Counter()
    inside, notes = _folders(root), []
    if "train" in inside:
        test = next((name for name in TESTS if name in inside), None)
        train = _classes(root, root / "train", others)
        notes += _left_out(sorted(set(inside) - {"train", test}))
    else:
        test, train = None, _classes(root, root, others)
    names = tuple(train)
    if len(names) < 2:
        raise UsageError(
            f"data.name=folder:{said} has {len(names)} classes ({', '.join(names)}); "
            "give a folder with two sub-folders of images or more"
        )
    if empty := [name for name, files in train.items() if not files]:
        raise UsageError(
            f"data.name=folder:{said} has no image of {', '.join(empty[:9])}; add some "
            f"({' '.join(sorted(SUFFIXES))}), or remove the sub-folder"
        )
    if test is not None:
        tests = _classes(root, root / test, others)
        if strange := sorted(set(tests) - set(names)):
            raise UsageError(
                f"data.name=folder:{said} has {', '.join(strange[:9])} to test on but "
                "not to train on; give both the same sub-folders"
            )
    else:
        tests = {name: files[TENTH - 1 :: TENTH] for name, files in train.items()}
        for files in train.values():
            del files[TENTH - 1 :: TENTH]
        notes.append(
            f"every tenth image of a class is tested on, as {root} has no "
            "sub-folders train and test"
        )
    files = {
        "train": _ordered(root, names, train),
        "test": _ordered(root, names, tests),
    }
    if not files["test"]:
        raise UsageError(
            f"data.name=folder:{said} has no image to test on; give ten of a class or "
            "more, or sub-folders train and test"
        )
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        notes.append(f"left out as no images: {kinds}")
    return Folder(root, names, files, tuple(notes))


def read_folder(folder: Folder, size: int) -> Decoded:
    """Read all images of a folder as squares, now or earlier.

    What was decoded is kept in the user's cache, and used while no file has changed.

    Raises:
        UsageError: an image cannot be read.
    """

    def decode() -> Decoded:
        arrays = {}
        for split, files in folder.files.items():
            named = ((path, path) for path, _ in files)
            arrays[split] = (
                read_squares(named, len(files), 3, size),
                np.asarray([label for _, label in files], np.int32),
            )
        return arrays, folder.class_names

    return keep(_fingerprint(folder, size), [_place(folder, size)], decode)


def find_decoded_folder(folder: Folder, size: int) -> Path | None:
    """Find the file that ``read_folder`` would use; None: it would decode."""
    return find_kept(_fingerprint(folder, size), [_place(folder, size)])


def _folders(directory: Path) -> list[str]:
    """Names of the sub-folders; hidden ones belong to programs."""
    names = sorted(
        path.name
        for path in _listed(directory)
        if not path.name.startswith(".") and path.is_dir()
    )
    for name in names:
        _check_no_link(directory / name)
    return names


def _listed(directory: Path) -> Iterator[Path]:
    try:
        yield from directory.iterdir()
    except OSError as error:
        raise UsageError(
            f"{directory} cannot be read ({error.strerror}); make it readable"
        ) from error


def _classes(root: Path, parent: Path, others: Counter[str]) -> dict[str, list[Path]]:
    """The images of each sub-folder, by name; counts what is none."""
    return {
        name: sorted(_images(root, parent / name, others)) for name in _folders(parent)
    }


def _images(root: Path, directory: Path, others: Counter[str]) -> Iterator[Path]:
    """Yield the images below a directory, however deep."""
    for path in _listed(directory):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            _check_no_link(path)
            yield from _images(root, path, others)
        elif path.suffix.lower() not in SUFFIXES:
            others[path.suffix.lower() or "without a suffix"] += 1
        else:
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise UsageError(
                    f"{path} is a link that leads out of {root}; copy the image there"
                )
            yield path


def _check_no_link(directory: Path) -> None:
    """A folder that is a link could lead out, or round in circles."""
    if directory.is_symlink():
        raise UsageError(
            f"{directory} is a link to a folder; copy what is in it there, or name the "
            "folder itself"
        )


def _left_out(names: list[str]) -> list[str]:
    return [f"left out beside train and test: {', '.join(names[:9])}"] if names else []


def _ordered(
    root: Path, names: tuple[str, ...], images: dict[str, list[Path]]
) -> tuple[tuple[Path, int], ...]:
    """Mix the classes, alike on every machine: the last images may be held out."""
    found = [(path, names.index(name)) for name in images for path in images[name]]

    def place(item: tuple[Path, int]) -> bytes:
        name = item[0].relative_to(root).as_posix()
        return hashlib.sha256(os.fsencode(name)).digest()

    return tuple(sorted(found, key=place))


def _fingerprint(folder: Folder, size: int) -> str:
    """Name, size and time of every file, in one line."""
    try:
        files = [
            (split, str(path), label, (s := path.stat()).st_size, s.st_mtime_ns)
            for split, listed in folder.files.items()
            for path, label in listed
        ]
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}); remove it, or see to "
            "it"
        ) from error
    # The names of a hundred thousand files need not be kept themselves.
    text = json.dumps([FORMAT, size, str(folder.root.resolve()), files])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _place(folder: Folder, size: int) -> Path:
    root = folder.root.resolve()
    whole = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return user_cache() / "decoded" / f"folder-{root.name}-{size}-{whole}.npz"
