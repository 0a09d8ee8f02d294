"""Writing ordinary TFDS directories without TensorFlow.

CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST from their official files, local or
downloaded, and the embedded shapes. TFDS itself opens the result: the builders are
TFDS's own, given PNG bytes, and array_record files, because its readers and its image
encoder are what needs TensorFlow.
"""

import contextlib
import errno
import fcntl
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_resnetv2.data import shapes
from flax_resnetv2.data.catalog import DATASETS, DatasetSpec
from flax_resnetv2.data.prepare import download
from flax_resnetv2.data.prepare.cifar_archive import (
    ARCHIVES,
    Archive,
    Examples,
    check_sum,
    find_archive,
    read_archive,
)
from flax_resnetv2.data.prepare.mnist_files import (
    IDX_FILES,
    IdxFiles,
    find_files,
    read_files,
)
from flax_resnetv2.errors import RunError, UsageError


@dataclass(frozen=True)
class Source:
    """How a data set is written here: as the TFDS builder of its name would."""

    version: str
    description: str
    homepage: str = ""
    citation: str = ""
    url: str = ""
    """The official address of the archive, or of the directory of the files."""
    size: int = 0
    """Bytes of what is there."""
    identified: bool = True
    """Each record has a feature "id"."""


_KRIZHEVSKY = """@TECHREPORT{Krizhevsky09learningmultiple,
    author = {Alex Krizhevsky},
    title = {Learning multiple layers of features from tiny images},
    institution = {},
    year = {2009}
}"""
_LECUN = """@article{lecun2010mnist,
    title = {MNIST handwritten digit database},
    author = {LeCun, Yann and Cortes, Corinna and Burges, CJ},
    journal = {ATT Labs [Online]. Available: http://yann.lecun.com/exdb/mnist},
    volume = {2},
    year = {2010}
}"""
_XIAO = """@article{xiao2017fashion,
    title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
             Algorithms},
    author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
    journal = {arXiv:1708.07747},
    year = {2017}
}"""
_CIFAR = "https://www.cs.toronto.edu/~kriz/"

SOURCES = {
    "cifar10": Source(
        "3.0.2",
        "CIFAR-10: 60,000 color images of 32x32 pixels, 6,000 in each of ten classes; "
        "50,000 to train on and 10,000 to test.",
        _CIFAR + "cifar.html",
        _KRIZHEVSKY,
        _CIFAR + "cifar-10-binary.tar.gz",
        170_052_171,
    ),
    "cifar100": Source(
        "3.0.2",
        "CIFAR-100: 60,000 color images of 32x32 pixels, 600 in each of 100 classes, "
        "which 20 coarse classes gather; 50,000 to train on and 10,000 to test.",
        _CIFAR + "cifar.html",
        _KRIZHEVSKY,
        _CIFAR + "cifar-100-binary.tar.gz",
        168_513_733,
    ),
    "mnist": Source(
        "3.0.1",
        "The MNIST database of handwritten digits: 70,000 gray images of 28x28 pixels; "
        "60,000 to train on and 10,000 to test.",
        "http://yann.lecun.com/exdb/mnist/",
        _LECUN,
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        11_594_722,
        identified=False,
    ),
    "fashion_mnist": Source(
        "3.0.1",
        "Fashion-MNIST: 70,000 gray images of 28x28 pixels of ten kinds of clothes; "
        "60,000 to train on and 10,000 to test.",
        "https://github.com/zalandoresearch/fashion-mnist",
        _XIAO,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        30_878_645,
        identified=False,
    ),
    shapes.NAME: Source(
        "1.0.0", "Ten shapes on 32x32 pixels, drawn by flax_resnetv2.data.shapes."
    ),
}
"""By the name among TFDS data sets."""

_FORMS = {**ARCHIVES, **IDX_FILES}
"""What the official files are."""

_NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def prepare(
    name: str,
    root: Path,
    *,
    archive: str | None = None,
    url: str | None = None,
    accept_checksum: bool = False,
) -> None:
    """Write ``root/NAME/VERSION`` from local files or a download.

    Args:
        name: of a data set with official files, as "cifar10".
        root: a directory of TFDS data sets.
        archive: a local official archive, or a directory with the files.
        url: a mirror of the official address; None: that address.
        accept_checksum: take files with another SHA-256.

    Raises:
        UsageError: a file is missing, another one, or damaged; ``root`` cannot be
            written.
        RunError: the download failed (what has arrived is kept and gone on with), or
            the disk is full.
    """
    source, form = SOURCES[name], _FORMS[name]
    url = source.url if url is None else url
    local = check_source(name, archive, url)
    directory = root / name / source.version
    check_place(directory)

    # A local one is read before anything is made: refused, it leaves nothing.
    splits = local and _read(form, local, accept_checksum)
    with _writing(root, name), _alone(directory) as wanted:
        if not wanted:
            return
        fetched = {}
        if splits is None:
            for address in _addresses(form, url):
                fetched[address] = download.download_file(
                    address, root / "downloads", form.known.title, form.names
                )
            try:
                splits = _read(form, fetched, accept_checksum)
            except UsageError:
                for path in fetched.values():
                    path.unlink()  # or every later run would meet the same file
                raise
        _write(
            root,
            form.known,
            source,
            {split: lambda s=split: splits[s] for split in splits},
        )
        for path in fetched.values():
            path.unlink()


def check_source(name: str, archive: str | None, url: str) -> dict[str, Path] | None:
    """Refuse what a data set cannot come from; arguments as of ``prepare``.

    Returns:
        The local files, by how they are told.

    Raises:
        UsageError: no such file, or no address.
    """
    download.check_url(url)
    if archive is None:
        return None
    form = _FORMS[name]
    if isinstance(form, Archive):
        return {archive: find_archive(archive, form)}
    return {str(path): path for path in find_files(archive, form)}


def _addresses(form: Archive | IdxFiles, url: str) -> list[str]:
    if isinstance(form, Archive):
        return [url]
    return [f"{url.rstrip('/')}/{name}" for name in form.sha256]


def _read(
    form: Archive | IdxFiles, files: dict[str, Path], accept_checksum: bool
) -> dict[str, Examples]:
    """Read official files, given by how they are told, in the order of ``form``."""
    one = isinstance(form, Archive)
    if not accept_checksum:
        for (said, path), official in zip(files.items(), form.sha256, strict=not one):
            expected = form.sha256 if one else {official: form.sha256[official]}
            check_sum(path, said, expected)
    paths = list(files.values())
    return read_archive(paths[0], form) if one else read_files(paths, form)


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
    """Write ``root/embedded_shapes/1.0.0``: the images of ``shapes.draw_shapes``.

    Raises:
        UsageError: ``root`` cannot be written.
        RunError: the disk is full.
    """
    source = SOURCES[shapes.NAME]
    directory = root / shapes.NAME / source.version
    with _writing(root, shapes.NAME), _alone(directory) as wanted:
        if not wanted:
            return
        _write(
            root,
            DATASETS[shapes.NAME],
            source,
            {split: functools.partial(_drawn, split) for split in shapes.PER_CLASS},
        )


def _drawn(split: str) -> Examples:
    images, labels = shapes.draw_shapes(split)
    return images, {"label": labels}


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
    known: DatasetSpec,
    source: Source,
    splits: dict[str, Callable[[], Examples]],
) -> None:
    """Have TFDS write a data set; it appears under its name when it is whole."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A data set of labeled images, given as arrays."""

        VERSION = tfds.core.Version(source.version)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=source.description,
                features=tfds.features.FeaturesDict(
                    ({"id": tfds.features.Text()} if source.identified else {})
                    | {"image": tfds.features.Image(shape=known.image_shape)}
                    | {
                        feature: tfds.features.ClassLabel(names=list(names))
                        for feature, names in known.classes.items()
                    }
                ),
                supervised_keys=("image", "label"),
                homepage=source.homepage or None,
                citation=source.citation or None,
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            images, labels = splits[split]()
            for index, image in enumerate(images):
                yield (
                    index,
                    ({"id": f"{split}_{index:05d}"} if source.identified else {})
                    | {"image": io.BytesIO(_png(image))}
                    | {
                        feature: int(values[index])
                        for feature, values in labels.items()
                    },
                )

    # TFDS takes the name of a data set from its class.
    Builder.name = known.stored
    Builder.pkg_dir_path = None
    print(f"preparing {known.stored} in {root} (once)", flush=True)
    tfds.disable_progress_bar()
    # TFDS announces a download of unknown size, whatever is written.
    with contextlib.redirect_stdout(io.StringIO()):
        builder = Builder(data_dir=root, file_format="array_record")
        builder.download_and_prepare()


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    gray = image.shape[-1] == 1
    Image.fromarray(image[..., 0] if gray else image).save(buffer, "PNG")
    return buffer.getvalue()
