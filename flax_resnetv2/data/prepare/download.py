"""Download an official file over HTTP, with time limits, resuming where it stopped."""

import errno
import hashlib
import http.client
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flax_resnetv2.errors import RunError, UsageError

_logger = logging.getLogger(__name__)

TIMEOUT = 8
"""Seconds without a byte after which a download gives up."""
LARGEST = 256 << 20
"""Bytes of a download; the official archives have up to 170 million."""

_GZIP = b"\x1f\x8b"
_LOCAL = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
}
"""Errors of the local disk, not of the connection."""


def check_url(url: str) -> None:
    """Refuse an address that is not HTTP or HTTPS."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"data.url={url} is no address to download from; give one that begins "
            "with http:// or https://, or a local file by --data.archive PATH"
        )


def download_file(url: str, directory: Path, title: str, names: str) -> Path:
    """Download a gzip file into ``directory``, resuming an earlier attempt.

    ``title`` is for the progress bar; ``names``, for a message, are the local files
    that could be given instead.

    Raises:
        RunError: there is no connection, it broke off, or the answer is another file.
        OSError: the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Files of two mirrors have two names, so that their bytes are never mixed.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = directory / f"{title.lower()}-{digest}.gz"
    partial = path.with_suffix(".partial")
    if path.exists():
        return path

    def received() -> int:
        return partial.stat().st_size if partial.exists() else 0

    have = received()
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        try:
            with _open(request) as answer:
                _save(answer, partial, have, title)
        except urllib.error.HTTPError as error:
            error.close()  # the error is an open response, too
            # 416, range not satisfiable: the file is complete already.
            if error.code != 416 or not have:
                raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in _LOCAL:
            raise
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        kept = f"; {received():,} bytes are kept" if received() else ""
        raise RunError(
            f"cannot download {url} ({reason}); ways on: --data.archive PATH with "
            f"local {names}, --data.url MIRROR, --data.dir DIR with a data set that "
            f"TFDS prepared, or the recipe quickstart, which needs no data{kept}"
        ) from error
    return partial.rename(path)


def _open(request: urllib.request.Request) -> Any:
    """Open an address within two timeouts.

    In a thread, because name resolution ignores timeouts, and each address of a host
    has a timeout of its own.
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


def _save(answer: Any, partial: Path, have: int, title: str) -> None:
    """Append a response to ``partial``, or start over if the server ignores ranges."""
    import rich
    from rich import progress

    resumed = answer.status == 206 and have > 0
    have = have if resumed else 0
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    # Checked before the file is opened: a web page must not replace what was received.
    chunk = answer.read(len(_GZIP))
    if not resumed and chunk != _GZIP:
        raise ValueError(
            f"the answer is no archive but {answer.headers.get_content_type()}; a "
            "network that asks for a login answers so"
        )
    hidden = not rich.get_console().is_terminal
    columns = (
        title,
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with (
        progress.Progress(*columns, disable=hidden) as bar,
        partial.open("ab" if resumed else "wb") as file,
    ):
        task = bar.add_task("", total=total, completed=have)
        logged = time.monotonic()
        while chunk:
            file.write(chunk)
            have += len(chunk)
            if max(have, total or 0) > LARGEST:
                file.truncate(0)
                raise ValueError(f"it has more than {LARGEST:,} bytes, the limit")
            bar.update(task, completed=have)
            if hidden and time.monotonic() - logged > 10:
                logged = time.monotonic()
                _logger.info(
                    "downloaded %s of %s bytes", f"{have:,}", f"{total or 0:,}"
                )
            # read1 returns as soon as there is anything: a stalled connection loses
            # nothing.
            chunk = answer.read1(1 << 16)
    if total is not None and have < total:
        raise OSError(f"the connection broke off at {have:,} of {total:,} bytes")
