"""The errors that reach a person as one clear message instead of a traceback.

A message is a small letter: the rule, the value received, the legal choices, the
repair. ``cli`` prints it and leaves with the exit code below; as a library all are
ordinary exceptions.
"""


class UsageError(ValueError):
    """What was asked for cannot be done as asked. Exit code 2."""


class RunError(RuntimeError):
    """The request was right, but the run could not finish (no network). Exit code 1."""


class Stopped(RuntimeError):
    """A signal asked the run to stop, and all of it is saved. Exit code 75, which
    means "try again" (EX_TEMPFAIL): the same command goes on."""
