"""Paths and files: the user's cache, writable places, files written atomically."""

import contextlib
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path


def user_cache() -> Path:
    """Return this package's directory in the user's cache; it may not exist yet.

    It is in the system's temporary directory if the home directory cannot be written,
    as in some containers, and if no other user has made it there.
    """
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "flax_resnetv2"
    usual = home() / ".cache" / "flax_resnetv2"
    other = Path(tempfile.gettempdir()) / f"flax_resnetv2-{os.getuid()}"
    with contextlib.suppress(FileNotFoundError):
        if other.lstat().st_uid != os.getuid():
            return usual
    return usual if writable(usual) else other


def home() -> Path:
    """Return the user's home directory; / if there is none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the user id has no entry
        return Path("/")


def expand_home(words: Iterable[str]) -> list[str]:
    """Expand ~ and ~user in arguments of a command, also in ``--flag=~/a``.

    A shell expands it only at the start of a word.
    """
    start = re.compile(r"((?:--[^=]+=)?(?:folder:)?)(~[^/]*)")

    def expanded(found: re.Match) -> str:
        return found[1] + os.path.expanduser(found[2])

    return [
        start.sub(expanded, word, 1) if start.match(word) else word for word in words
    ]


def printable(text: str) -> str:
    """Escape control characters, and bytes of a file name that are not UTF-8.

    >>> printable("caf\\udce9\\n")
    'caf\\\\udce9\\\\n'
    """
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs")
        else c
        for c in text
    )


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or its nearest parent directory that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def writable(path: Path) -> bool:
    """Whether a directory is writable or could be created; creates nothing."""
    try:
        found = nearest_existing(path)
    except OSError:  # for example a name that is too long
        return False
    return found.is_dir() and os.access(found, os.W_OK | os.X_OK)


def unreadable(path: str | Path) -> str | None:
    """Return the system's reason why a file cannot be opened; None if it can."""
    try:
        if (
            not os.path.isfile(path)
            and not os.path.isdir(path)
            and os.path.exists(path)
        ):
            return "no regular file"  # opening a pipe would wait
        with open(path, "rb"):
            return None
    except OSError as error:
        return error.strerror
    except ValueError:  # a null byte
        return "no name of a file"


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: readers see the old content or the new, never a part.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    # Two processes may write the same file.
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine could leave it empty
        os.replace(new, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        new.unlink(missing_ok=True)
