"""Write ordinary TFDS directories without TensorFlow.

CIFAR-10, CIFAR-100, MNIST and Fashion-MNIST come from their official files, local or
downloaded; the embedded shapes are drawn. TFDS's own builders write them, but receive
PNG files and write array_record, because only TFDS's image encoder and its default
format need TensorFlow.
"""

import contextlib
import errno
import fcntl
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from flax_resnetv2.data import shapes
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.decoding import to_png
from flax_resnetv2.data.prepare import download
from flax_resnetv2.data.prepare.cifar_archive import CIFAR10, CIFAR100
from flax_resnetv2.data.prepare.mnist_files import FASHION_MNIST, MNIST
from flax_resnetv2.data.prepare.verified_files import Examples
from flax_resnetv2.errors import RunError, UsageError

_logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """Where a data set comes from."""

    version: str
    """The version of TFDS's builder."""
    url: str = ""
    """The official address of the archive, or of the directory of the files."""
    size: int = 0
    """Bytes of the download."""


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
SOURCES = {
    "cifar10": Source("3.0.2", f"{_CIFAR}cifar-10-binary.tar.gz", 170_052_171),
    "cifar100": Source("3.0.2", f"{_CIFAR}cifar-100-binary.tar.gz", 168_513_733),
    "mnist": Source(
        "3.0.1", "https://storage.googleapis.com/cvdf-datasets/mnist/", 11_594_722
    ),
    "fashion_mnist": Source(
        "3.0.1",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        30_878_645,
    ),
    shapes.NAME: Source("1.0.0"),
}
"""By the name in TFDS."""
_OFFICIAL = {x.spec.stored: x for x in (CIFAR10, CIFAR100, MNIST, FASHION_MNIST)}


def prepare(
    name: str,
    root: Path,
    *,
    archive: str | None = None,
    url: str | None = None,
    accept_checksum: bool = False,
) -> None:
    """Write ``root/NAME/VERSION`` from official files, local or downloaded.

    ``archive``, ``url`` and ``accept_checksum`` are as of ``DataConfig``.

    Raises:
        UsageError: a file is missing, wrong or damaged; ``root`` is not writable.
        RunError: the download failed (the next call resumes it), or the disk is full.
    """
    official, downloads = _OFFICIAL[name], {}
    url = SOURCES[name].url if url is None else url
    local = check_source(name, archive, url)
    check_directory(root / name / SOURCES[name].version)

    def read(paths: dict[str, Path]) -> dict[str, Examples]:
        if not accept_checksum:
            official.check(paths)
        return official.read(list(paths.values()))

    def fetch() -> dict[str, Examples]:
        for address in official.urls(url):
            downloads[address] = download.download_file(
                address, root / "downloads", official.spec.title, official.names
            )
        try:
            return read(downloads)
        except UsageError:
            for path in downloads.values():
                path.unlink()  # or every later run would find the same wrong file
            raise

    # Local files are read before any directory is made: a wrong one leaves nothing.
    splits = local and read(local)
    _write_once(name, root, fetch if splits is None else lambda: splits)
    for path in downloads.values():
        path.unlink()


def check_source(name: str, archive: str | None, url: str) -> dict[str, Path] | None:
    """Refuse an archive that does not exist, or an address that is not HTTP.

    Returns:
        The local files by their names in a message; None: there is no ``archive``.
    """
    download.check_url(url)
    if archive is None:
        return None
    paths = _OFFICIAL[name].find(archive)
    return {archive if len(paths) == 1 else str(path): path for path in paths}


def check_directory(directory: Path) -> None:
    """Refuse an existing root/NAME/VERSION that has no description of a data set."""
    if directory.exists() and not (directory / "dataset_info.json").exists():
        raise UsageError(
            f"{directory} holds no dataset_info.json, so it is no data set; remove "
            "it to have the data set prepared, or give another --data.dir"
        )


def prepare_embedded(root: Path) -> None:
    """Write ``root/embedded_shapes/VERSION``: the images of ``shapes.draw_shapes``."""

    def draw() -> dict[str, Examples]:
        drawn = {split: shapes.draw_shapes(split) for split in shapes.PER_CLASS}
        return {split: (x, {"label": labels}) for split, (x, labels) in drawn.items()}

    _write_once(shapes.NAME, root, draw)


def _write_once(name: str, root: Path, load: Callable[[], dict[str, Examples]]) -> None:
    """Write a data set, unless another process has written it meanwhile."""
    directory = root / name / SOURCES[name].version
    lock = root / "downloads" / f".{name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        # The system releases the lock of a process that is killed.
        with _locked(lock, f"waiting for another process that prepares {directory}"):
            try:
                check_directory(directory)
                if not directory.exists():
                    _write(name, root, load())
            finally:
                lock.unlink(missing_ok=True)
    except (UsageError, RunError):
        raise
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        full = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
        if any(os.strerror(number) in reason for number in full):
            raise RunError(
                f"{name} cannot be prepared in {root}: there is no room ({reason}); "
                "make room, or choose another --data.dir"
            ) from error
        raise UsageError(
            f"{name} is not prepared in {root}, and cannot be written there "
            f"({reason}); choose a writable --data.dir"
        ) from error


def _locked(lock: Path, waiting: str) -> IO[str]:
    """Open a file that only one process at a time can open in this way."""
    while True:
        file = lock.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.info(waiting)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            return file
        # The last holder has removed the file, and a third process may have a new one.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()


def _write(name: str, root: Path, splits: dict[str, Examples]) -> None:
    """Have TFDS write a data set; the directory gets its name when it is complete."""
    import tensorflow_datasets as tfds

    spec = DATASETS[name]

    drawn = name == shapes.NAME
    base = tfds.core.GeneratorBasedBuilder if drawn else tfds.builder_cls(name)

    class Builder(base, skip_registration=True):
        """TFDS's own builder, if it has one, with examples that are given as arrays."""

        VERSION = tfds.core.Version(SOURCES[name].version)

        def _info(self) -> tfds.core.DatasetInfo:
            if not drawn:
                return super()._info()
            features = {
                "image": tfds.features.Image(shape=spec.image_shape),
                "label": tfds.features.ClassLabel(num_classes=len(spec.class_names)),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Ten shapes, drawn by flax_resnetv2.data.shapes.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
            for feature, names in spec.classes.items():
                self.info.features[feature].names = list(names)
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            images, labels = splits[split]
            for index, image in enumerate(images):
                record: dict[str, Any] = {"image": io.BytesIO(to_png(image))}
                record |= {feature: int(x[index]) for feature, x in labels.items()}
                if "id" in self.info.features:
                    record["id"] = f"{split}_{index:05d}"
                yield index, record

        def _log_download_bytes(self) -> None:
            """Print nothing; TFDS would announce a download, even without one."""

        _log_download_done = _log_download_bytes

    # TFDS takes the name of a data set from its class.
    Builder.name, Builder.pkg_dir_path = name, None
    _logger.info("preparing %s in %s (once)", name, root)
    tfds.disable_progress_bar()
    Builder(data_dir=root, file_format="array_record").download_and_prepare()
