"""Writing ordinary TFDS directories without TensorFlow.

CIFAR-10 from its official archive, local or downloaded, and the embedded shapes. TFDS
itself opens the result: the builders are TFDS's own, given PNG bytes, and array_record
files, because its CIFAR reader and its image encoder are what needs TensorFlow.
"""

import codecs
import contextlib
import fcntl
import functools
import gzip
import hashlib
import http.client
import io
import os
import pickle
import queue
import tarfile
import threading
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from flax_resnetv2 import embedded
from flax_resnetv2.errors import RunError, UsageError

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
"""The official address."""
ARCHIVE_BYTES = 170_052_171
"""Of what is there."""
VERSIONS = {"cifar10": "3.0.2", embedded.NAME: "1.0.0"}
"""Of the data sets that are written here."""
CIFAR10_SHA256 = {
    "cifar-10-binary.tar.gz": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    "cifar-10-python.tar.gz": (
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ),
}
"""Of the two official archives; TFDS and Keras publish them too."""
TIMEOUT = 8
"""Seconds without a byte after which a download gives up."""

_CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer",
    "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_IMAGE_BYTES = 3 * 32 * 32
_BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}

Examples = tuple[np.ndarray, np.ndarray]
"""Images uint8 [N, 32, 32, 3] and labels [N]."""


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
        UsageError: the archive is missing, another one, or damaged.
        RunError: the download failed; what has arrived is kept and gone on with.
    """
    check_source(archive, url)
    url = url or CIFAR10_URL
    with _alone(root / "cifar10" / VERSIONS["cifar10"]) as wanted:
        if not wanted:
            return
        if archive is not None:
            path = Path(archive).expanduser()
        else:
            path = _download(url, root / "downloads")
        try:
            if not accept_checksum:
                _check_sum(path, archive or url)
            splits = _read_archive(path)
        except UsageError:
            if archive is None:  # or every later run would meet the same file
                path.unlink()
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
            names=_CIFAR10_CLASSES,
            splits={split: lambda s=split: splits[s] for split in splits},
        )
        if archive is None:
            path.unlink()


def check_source(archive: str | None, url: str | None) -> None:
    """Refuse what CIFAR-10 cannot come from; arguments as of ``prepare_cifar10``.

    Raises:
        UsageError: no such file, or no address.
    """
    if archive is not None and not Path(archive).expanduser().is_file():
        raise UsageError(
            f"data.archive={archive} is not a file; give a local copy of "
            f"{' or '.join(CIFAR10_SHA256)}"
        )
    if url and not url.startswith(("http://", "https://")):
        raise UsageError(
            f"data.url={url} is no address to download from; give one that begins "
            "with http:// or https://, or a local file by --data.archive PATH"
        )


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
    """Write ``root/embedded_shapes/1.0.0``: the images of ``embedded.draw``."""
    with _alone(root / embedded.NAME / VERSIONS[embedded.NAME]) as wanted:
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
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {directory}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            pass
        check_place(directory)
        yield not directory.exists()


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


def _check_sum(path: Path, source: str) -> None:
    """Refuse an archive that is neither official one."""
    with path.open("rb") as file:
        received = hashlib.file_digest(file, "sha256").hexdigest()
    if received not in CIFAR10_SHA256.values():
        expected = " or ".join(f"{v} ({k})" for k, v in CIFAR10_SHA256.items())
        raise UsageError(
            f"{source} has the SHA-256 {received}; expected {expected}; if you trust "
            "the file, add --data.accept_checksum"
        )


def _read_archive(path: Path) -> dict[str, Examples]:
    """Read either official archive, told apart by what is in it; nothing is unpacked.

    Raises:
        UsageError: it is neither, or damaged.
    """
    wanted = {name for names in _BATCHES.values() for name in names}
    found: dict[str, Examples] = {}
    try:
        with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                stem, suffix = os.path.splitext(os.path.basename(member.name))
                if member.isfile() and stem in wanted and suffix in ("", ".bin"):
                    read = _read_binary if suffix else _read_pickled
                    found[stem] = read(stem, tar.extractfile(member))
            while file.read(1 << 20):  # gzip compares its checksum at the very end
                pass
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UsageError(
            f"{path} is damaged or no CIFAR-10 archive ({error}); fetch it again"
        ) from error
    if missing := sorted(wanted - set(found)):
        raise UsageError(
            f"{path} is no CIFAR-10 archive: it lacks {', '.join(missing)}; give "
            f"{' or '.join(CIFAR10_SHA256)}"
        )
    return {
        split: tuple(
            np.concatenate(parts)
            for parts in zip(*(found[name] for name in names), strict=True)
        )
        for split, names in _BATCHES.items()
    }


def _read_binary(name: str, file: IO[bytes]) -> Examples:
    """Records of a label byte and 3,072 bytes of red, green, blue."""
    values = np.frombuffer(file.read(), np.uint8)
    if values.size == 0 or values.size % (_IMAGE_BYTES + 1):
        raise UsageError(
            f"{name} of the archive has {values.size} bytes, which are no whole number "
            f"of records of {_IMAGE_BYTES + 1} bytes; fetch the archive again"
        )
    records = values.reshape(-1, _IMAGE_BYTES + 1)
    return _examples(name, records[:, 1:], records[:, 0])


def _read_pickled(name: str, file: IO[bytes]) -> Examples:
    """A pickled dictionary with ``data`` [N, 3072] and ``labels``."""
    try:
        # NumPy 2.4.0 warns of the whole numbers that Python 2 wrote for booleans.
        with warnings.catch_warnings(action="ignore"):
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        return _examples(name, np.asarray(batch[b"data"]), np.asarray(batch[b"labels"]))
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UsageError(
            f"{name} of the archive is not a batch of CIFAR-10 ({error!r}); fetch the "
            "archive again"
        ) from error


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and nothing else: a pickle can name any function to call."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return np._core.multiarray._reconstruct
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _examples(name: str, pixels: np.ndarray, labels: np.ndarray) -> Examples:
    """Planes of colour -> images; refuse what cannot be CIFAR-10."""
    if pixels.shape != (labels.size, _IMAGE_BYTES) or pixels.dtype != np.uint8:
        raise UsageError(
            f"{name} of the archive has data {pixels.dtype} {list(pixels.shape)} for "
            f"{labels.size} labels; expected uint8 [{labels.size}, {_IMAGE_BYTES}]"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UsageError(
            f"{name} of the archive has labels {labels.dtype} {list(labels.shape)}; "
            f"expected whole numbers [{labels.size}]"
        )
    for label in (labels.min(), labels.max()):
        if not 0 <= label < len(_CIFAR10_CLASSES):
            raise UsageError(
                f"{name} of the archive has the label {label}; CIFAR-10 has 0 to 9"
            )
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)


def _download(url: str, directory: Path) -> Path:
    """Fetch ``url`` with a progress bar, going on where an earlier try stopped.

    Raises:
        RunError: no connection, or it broke off; names the other ways.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # A mirror's bytes are never appended to another's.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = directory / f"cifar-10-{digest}.tar.gz"
    partial = path.with_suffix(".partial")
    if path.exists():
        return path
    have = partial.stat().st_size if partial.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        try:
            with _open(request) as answer:
                _save(answer, partial, have)
        except urllib.error.HTTPError as error:
            error.close()  # it is the answer, too
            # 416: nothing is left to send, so all of it is here.
            if error.code != 416 or not have:
                raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        have = partial.stat().st_size if partial.exists() else 0
        raise RunError(
            f"cannot download {url} ({reason}); ways on: --data.archive PATH with a "
            f"local {' or '.join(CIFAR10_SHA256)}, --data.url MIRROR, --data.dir DIR "
            "with a data set that TFDS prepared, or the recipe quickstart, which needs "
            "no data" + (f"; {have:,} bytes are kept" if have else "")
        ) from error
    return partial.rename(path)


def _open(request: urllib.request.Request) -> Any:
    """Open an address within two timeouts.

    In a thread: looking up a name heeds no timeout, and each of the addresses of a
    name has a timeout of its own.
    """
    outcome: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            outcome.put(urllib.request.urlopen(request, timeout=TIMEOUT))
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        answer = outcome.get(timeout=2 * TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer within {2 * TIMEOUT} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _save(answer: Any, partial: Path, have: int) -> None:
    """Append what comes, or begin again where the server does not do ranges."""
    from rich.progress import DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    resumed = answer.status == 206
    have = have if resumed else 0
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    columns = ("CIFAR-10", DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns) as bar, partial.open("ab" if resumed else "wb") as file:
        live = bar.console.is_terminal
        task = bar.add_task("", total=total, completed=have)
        told = time.monotonic()
        # What has come, even if little: a connection that stalls loses nothing.
        while chunk := answer.read1(1 << 16):
            file.write(chunk)
            have += len(chunk)
            bar.update(task, completed=have)
            if not live and time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"downloaded {have:,} of {total or 0:,} bytes", flush=True)
    if total is not None and have < total:
        raise OSError(f"the connection broke off at {have:,} of {total:,} bytes")
