"""Writing ordinary TFDS directories without TensorFlow.

CIFAR-10 from its official archive, local or downloaded, and the embedded shapes. TFDS
itself opens the result: the builders are TFDS's own, given PNG bytes, and array_record
files, because its CIFAR reader and its image encoder are what needs TensorFlow.
"""

import contextlib
import errno
import fcntl
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_resnetv2 import download, embedded
from flax_resnetv2.archive import (
    CIFAR10_CLASSES,
    Examples,
    check_sum,
    find_archive,
    read_archive,
)
from flax_resnetv2.errors import RunError, UsageError

VERSIONS = {"cifar10": "3.0.2", embedded.NAME: "1.0.0"}
"""Of the data sets that are written here."""

_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def prepare_cifar10(
    root: Path,
    *,
    archive: str | None = None,
    url: str | None = None,
    accept_checksum: bool = False,
) -> None:
    """Write ``root/cifar10/3.0.2`` from a local archive or a download.

    Args:
        root: a directory of TFDS data sets.
        archive: a local cifar-10-binary.tar.gz or cifar-10-python.tar.gz.
        url: a mirror of cifar-10-binary.tar.gz; None: the official address.
        accept_checksum: take an archive with another SHA-256.

    Raises:
        UsageError: the archive is missing, another one, or damaged; ``root`` cannot be
            written.
        RunError: the download failed (what has arrived is kept and gone on with), or
            the disk is full.
    """
    url = download.CIFAR10_URL if url is None else url
    local = check_source(archive, url)
    directory = root / "cifar10" / VERSIONS["cifar10"]
    check_place(directory)

    def read(path: Path) -> dict[str, Examples]:
        if not accept_checksum:
            check_sum(path, archive or url)
        return read_archive(path)

    # A local one is read before anything is made: refused, it leaves nothing.
    splits = None if local is None else read(local)
    with _writing(root, "cifar10"), _alone(directory) as wanted:
        if not wanted:
            return
        if local is None:
            path = download.fetch(url, root / "downloads")
            try:
                splits = read(path)
            except UsageError:
                path.unlink()  # or every later run would meet the same file
                raise
        _write(
            root,
            name="cifar10",
            version=VERSIONS["cifar10"],
            description=(
                "CIFAR-10: 60,000 colour images of 32x32 pixels, 6,000 in each of ten "
                "classes; 50,000 to train on and 10,000 to test."
            ),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=(
                "@TECHREPORT{Krizhevsky09learningmultiple,\n"
                "    author = {Alex Krizhevsky},\n"
                "    title = {Learning multiple layers of features from tiny images},\n"
                "    institution = {},\n"
                "    year = {2009}\n}"
            ),
            names=CIFAR10_CLASSES,
            splits={split: lambda s=split: splits[s] for split in splits},
        )
        if local is None:
            path.unlink()


def check_source(archive: str | None, url: str) -> Path | None:
    """Refuse what CIFAR-10 cannot come from; arguments as of ``prepare_cifar10``.

    Returns:
        The path of the local archive.

    Raises:
        UsageError: no such file, or no address.
    """
    download.check_url(url)
    return None if archive is None else find_archive(archive)


def check_place(directory: Path) -> None:
    """Refuse a directory root/name/version that holds something else.

    Raises:
        UsageError: it exists and has no description of a data set.
    """
    if directory.exists() and not (directory / "dataset_info.json").exists():
        raise UsageError(
            f"{directory} holds no dataset_info.json, so it is no data set; remove "
            "it to have the data set prepared, or give another --data.dir"
        )


def prepare_embedded(root: Path) -> None:
    """Write ``root/embedded_shapes/1.0.0``: the images of ``embedded.draw``.

    Raises:
        UsageError: ``root`` cannot be written.
        RunError: the disk is full.
    """
    directory = root / embedded.NAME / VERSIONS[embedded.NAME]
    with _writing(root, embedded.NAME), _alone(directory) as wanted:
        if not wanted:
            return
        _write(
            root,
            name=embedded.NAME,
            version=VERSIONS[embedded.NAME],
            description="Ten shapes on 32x32 pixels, drawn by flax_resnetv2.embedded.",
            homepage="",
            citation="",
            names=embedded.CLASSES,
            splits={
                split: functools.partial(embedded.draw, split)
                for split in embedded.PER_CLASS
            },
        )


@contextlib.contextmanager
def _writing(root: Path, name: str) -> Iterator[None]:
    """Say what the system refused in one line; TFDS has removed what it began."""
    try:
        yield
    except (UsageError, RunError):
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: of array_record
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        if any(os.strerror(number) in reason for number in _NO_ROOM):
            raise RunError(
                f"{name} cannot be prepared in {root}: there is no room ({reason}); "
                "make room, or choose another --data.dir"
            ) from error
        raise UsageError(
            f"{name} is not prepared in {root}, and cannot be written there "
            f"({reason}); choose a writable --data.dir"
        ) from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Let one process at a time prepare root/name/version.

    Yields:
        Whether it is still to be written: another process may have done it meanwhile.

    Raises:
        UsageError: something else than a data set has its place.
    """
    lock = directory.parents[1] / "downloads" / f".{directory.parent.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    # The kernel opens the lock of a process that is killed.
    with _locked(lock, f"waiting for another process that prepares {directory}"):
        try:
            check_place(directory)
            yield not directory.exists()
        finally:
            lock.unlink(missing_ok=True)


def _locked(lock: Path, waiting: str) -> IO[str]:
    """Open a file that no other process has open by this function."""
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            return file
        # Whoever held it has removed it: a third process may have a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()


def _write(
    root: Path,
    *,
    name: str,
    version: str,
    description: str,
    homepage: str,
    citation: str,
    names: tuple[str, ...],
    splits: dict[str, Callable[[], Examples]],
) -> None:
    """Have TFDS write a data set; it appears under its name when it is whole."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A data set of labelled images, given as arrays."""

        VERSION = tfds.core.Version(version)

        def _info(self) -> tfds.core.DatasetInfo:
            shape = (embedded.SIZE, embedded.SIZE, 3)
            return tfds.core.DatasetInfo(
                builder=self,
                description=description,
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(shape=shape),
                        "label": tfds.features.ClassLabel(names=list(names)),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage=homepage or None,
                citation=citation or None,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            images, labels = splits[split]()
            for index, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield (
                    index,
                    {
                        "id": f"{split}_{index:05d}",
                        "image": io.BytesIO(_png(image)),
                        "label": int(label),
                    },
                )

    # TFDS takes the name of a data set from its class.
    Builder.name = name
    Builder.pkg_dir_path = None
    print(f"preparing {name} in {root} (once)", flush=True)
    tfds.disable_progress_bar()
    # TFDS announces a download of unknown size, whatever is written.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Builder(data_dir=root, file_format="array_record")
        builder.download_and_prepare()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
