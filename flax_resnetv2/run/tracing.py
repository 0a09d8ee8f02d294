"""A trace of some training steps, by ``jax.profiler``."""

import re
from pathlib import Path
from typing import Any

import jax

from flax_resnetv2.errors import UsageError

Steps = tuple[int, int]
"""The first step to be seen, and the first that is not seen any more."""


def parse_steps(text: str | None) -> Steps | None:
    """Read "20:30" as (20, 30).

    Raises:
        UsageError: the text is not of this form.
    """
    if text is None:
        return None
    if not (found := re.fullmatch(r"(\d+):(\d+)", text)):
        raise UsageError(
            f"profile={text!r} must be FIRST:END, two step numbers, as 20:30"
        )
    first, end = int(found[1]), int(found[2])
    if first >= end:
        raise UsageError(
            f"profile={text!r} must be FIRST:END with FIRST below END, as 20:30"
        )
    return first, end


def check_steps(steps: Steps | None, done: int, total: int) -> None:
    """Refuse steps that a run, having done ``done`` of ``total``, does not come to.

    Raises:
        UsageError: with steps that it does come to.
    """
    if steps is None or done <= steps[0] < steps[1] <= total:
        return
    first, end = steps
    if done == total:
        raise UsageError(
            f"profile={first}:{end}: this run is finished, no step is left to be "
            "traced; give another --workdir"
        )
    raise UsageError(
        f"profile={first}:{end} must be FIRST:END with {done} <= FIRST < END <= "
        f"{total}, the steps that this run has before it; choose for example "
        f"{min(done + 20, total - 1)}:{min(done + 30, total)}"
    )


class Tracer:
    """Writes a trace of ``steps`` into ``directory``."""

    def __init__(self, steps: Steps | None, directory: Path) -> None:
        """See ``steps``; None: nothing."""
        self._first, self._end = steps or (-1, -1)
        self._directory, self._running = directory, False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:  # or the next trace of this process could not begin
            jax.profiler.stop_trace()

    def next_event(self, done: int, border: int) -> int:
        """The end of the chunk that begins at ``done``, at ``border`` at the latest."""
        ahead = [step for step in (self._first, self._end) if step > done]
        return min([border, *ahead])

    def before(self, done: int) -> None:
        """Begin, if the step after ``done`` steps is the first to be seen."""
        if done == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, done: int, state: Any) -> str | None:
        """End, if ``done`` steps are the last to be seen; say where the trace is."""
        if done != self._end or not self._running:
            return None
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._running = False
        return (
            f"trace of the steps from {self._first} to {done - 1} in "
            f"{self._directory}: open its .trace.json.gz with ui.perfetto.dev"
        )
