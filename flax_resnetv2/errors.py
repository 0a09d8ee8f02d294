"""Errors that a person sees as one clear message instead of a traceback.

A message states the rule, the value received, the legal choices and the repair. ``cli``
prints it and exits with the code below. In a library call they are ordinary exceptions.
"""


class UsageError(ValueError):
    """The request cannot be fulfilled as given. Exit code 2."""


class RunError(RuntimeError):
    """The request was valid, but the run failed (no network, say). Exit code 1."""


class Stopped(RuntimeError):
    """A signal stopped the run, and its state is saved. Exit code 75 (EX_TEMPFAIL, "try
    again"): the same command resumes the run."""
