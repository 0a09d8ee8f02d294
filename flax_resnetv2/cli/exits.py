"""How a command reports to the shell: log lines, error messages and exit codes."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import rich
from rich.console import Console

from flax_resnetv2.cli.installed import unusable_devices
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.system import runtime
from flax_resnetv2.system.files import printable

LOGGER = logging.getLogger("flax_resnetv2")
_UNWRITTEN = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO


def guarded(
    work: Callable[[], int | None],
    log: Console | None = None,
    needs_reader: bool = True,
) -> int:
    """Run a command: show the package's log and turn its errors into exit codes.

    Args:
        work: the command; it may return an exit code.
        log: where log lines go; None: rich's global console on standard output.
        needs_reader: end when nobody reads standard output any more, or go on.

    Returns:
        0 done; 1 failed run; 2 bad use; 75 stopped by a signal with everything saved;
        130 ended by Ctrl-C before there was anything to save; 141 ended because nobody
        reads its output.
    """
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook's is not
        sys.stdout.reconfigure(errors="backslashreplace")
    if not needs_reader:
        with contextlib.redirect_stdout(_Unread(sys.stdout)):
            return guarded(work, log)
    runtime.silence_orbax()
    console, handler = log or rich.get_console(), logging.Handler()
    # Plain lines, above the progress bar if there is one.
    handler.emit = lambda record: console.out(
        _plain(handler.format(record)), highlight=False
    )
    level, LOGGER.propagate = LOGGER.level, False
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        _check_directory()
        with jax.transfer_guard("allow"):
            return work() or 0
    except UsageError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"failed: {error}"
    except Stopped as stopped:
        code, message = 75, f"stopped {stopped}"
    except KeyboardInterrupt:
        code, message = 130, "ended by Ctrl-C"
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except Exception as error:
        # The package names every file of its own that cannot be written.
        if getattr(error, "errno", None) in _UNWRITTEN and error.filename is None:
            _discard_output()
            reason = error.strerror
            code, message = 1, f"failed: standard output cannot be written ({reason})"
        # A file that this user may not read, write or list, wherever it is met.
        elif isinstance(error, OSError) and error.filename is not None:
            code = 1
            message = f"failed: {error.filename} cannot be used ({error.strerror}); "
            message += "repair that, or name another"
        # Whatever needs JAX first meets its devices, and fails in its own way.
        elif (problem := unusable_devices()) is not None:
            code, message = 2, f"error: {problem}"
        else:
            raise
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = True
    print(_plain(message), file=sys.stderr)
    return code


def _open_closed_streams() -> None:
    """Lead streams that the shell closed nowhere, or a file could get their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _check_directory() -> None:
    """Refuse, by ``UsageError``, to start in a directory that has been removed."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the current directory cannot be used ({error.strerror}); change to one "
            "that exists"
        ) from error


def _plain(text: str) -> str:
    """Return lines in which names of files can do nothing to a terminal."""
    return "\n".join(map(printable, text.split("\n")))


class _Unread:
    """Standard output of a command that goes on when nobody reads it any more."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        with self._dropped():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        with self._dropped():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            _discard_output()


def _discard_output() -> None:
    """Lead standard output nowhere, so that nothing fails when Python flushes it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
