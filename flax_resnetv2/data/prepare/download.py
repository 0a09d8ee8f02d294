"""Fetching an archive over HTTP: with limits of time, going on where it broke off."""

import errno
import hashlib
import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from flax_resnetv2.errors import RunError, UsageError

TIMEOUT = 8
"""Seconds without a byte after which a download gives up."""
LARGEST = 256 << 20
"""Bytes of a download; the official archives have up to 170 million."""

_GZIP = b"\x1f\x8b"
_LOCAL = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")
}
"""Errors of the disk here, not of the connection."""


def check_url(url: str) -> None:
    """Refuse what is no address before anything is written."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"data.url={url} is no address to download from; give one that begins "
            "with http:// or https://, or a local file by --data.archive PATH"
        )


def download_file(url: str, directory: Path, title: str, local: str) -> Path:
    """Fetch ``url`` with a progress bar, going on where an earlier try stopped.

    Args:
        url: of an archive, or of another file that gzip wrote.
        directory: receives it.
        title: what it is, for the bar.
        local: the files that can be given instead, for a message.

    Raises:
        RunError: no connection, it broke off, or something else than an archive came;
            names the other ways.
        OSError: the disk is full or cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # A mirror's bytes are never appended to another's.
    digest = hashlib.sha256(url.encode()).hexdigest()[:8]
    path = directory / f"{title.lower()}-{digest}.gz"
    partial = path.with_suffix(".partial")
    if path.exists():
        return path
    have = partial.stat().st_size if partial.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        try:
            with _open(request) as answer:
                _save(answer, partial, have, title)
        except urllib.error.HTTPError as error:
            error.close()  # it is the answer, too
            # 416: nothing is left to send, so all of it is here.
            if error.code != 416 or not have:
                raise
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "errno", None) in _LOCAL:
            raise
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        have = partial.stat().st_size if partial.exists() else 0
        raise RunError(
            f"cannot download {url} ({reason}); ways on: --data.archive PATH with "
            f"local {local}, --data.url MIRROR, --data.dir DIR "
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


def _save(answer: Any, partial: Path, have: int, title: str) -> None:
    """Append what comes, or begin again where the server does not do ranges."""
    from rich.progress import (
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn as Speed,
    )

    resumed = answer.status == 206 and have > 0
    have = have if resumed else 0
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    # Before the file is opened: a page must not take the place of what has come.
    chunk = answer.read(len(_GZIP))
    if not resumed and chunk != _GZIP:
        raise ValueError(
            f"what came is no archive but {answer.headers.get_content_type()}; a "
            "network that asks for a login answers so"
        )
    columns = (title, DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns) as bar, partial.open("ab" if resumed else "wb") as file:
        live = bar.console.is_terminal
        task = bar.add_task("", total=total, completed=have)
        told = time.monotonic()
        while chunk:
            file.write(chunk)
            have += len(chunk)
            if max(have, total or 0) > LARGEST:
                file.truncate(0)
                raise ValueError(f"it has more than {LARGEST:,} bytes, the limit")
            bar.update(task, completed=have)
            if not live and time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"downloaded {have:,} of {total or 0:,} bytes", flush=True)
            # What has come, even if little: a connection that stalls loses nothing.
            chunk = answer.read1(1 << 16)
    if total is not None and have < total:
        raise OSError(f"the connection broke off at {have:,} of {total:,} bytes")
