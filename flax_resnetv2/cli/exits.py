"""Exit codes: how an error of this package reaches the shell."""

import sys
from collections.abc import Callable

from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.system import runtime


def guarded(work: Callable[[], None]) -> int:
    """Turn the project's errors into a message and an exit code."""
    runtime.silence_orbax()
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"stopped {stopped}", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        return 130
    return 0
