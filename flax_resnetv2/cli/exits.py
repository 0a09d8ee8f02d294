"""How a command reports to the shell: log lines, error messages and exit codes."""

import logging
import sys
from collections.abc import Callable

import rich
from rich.console import Console

from flax_resnetv2.cli.installed import unusable_devices
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.system import runtime

LOGGER = logging.getLogger("flax_resnetv2")


def guarded(work: Callable[[], int | None], log: Console | None = None) -> int:
    """Run a command: show the package's log and turn its errors into exit codes.

    Args:
        work: the command; it may return an exit code.
        log: where log lines go; None: rich's global console on standard output.

    Returns:
        0 done; 1 failed run; 2 bad use; 75 stopped by a signal with everything saved;
        130 ended by Ctrl-C before there was anything to save.
    """
    runtime.silence_orbax()
    console, handler = log or rich.get_console(), logging.Handler()
    # Plain lines, above the progress bar if there is one.
    handler.emit = lambda record: console.out(handler.format(record), highlight=False)
    level, LOGGER.propagate = LOGGER.level, False
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(handler)
    try:
        return work() or 0
    except UsageError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"failed: {error}"
    except Stopped as stopped:
        code, message = 75, f"stopped {stopped}"
    except KeyboardInterrupt:
        code, message = 130, "ended by Ctrl-C"
    except Exception:
        # Whatever needs JAX first meets its devices, and fails in its own way.
        if (problem := unusable_devices()) is None:
            raise
        code, message = 2, f"error: {problem}"
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = True
    print(message, file=sys.stderr)
    return code
