"""A trace of some training steps, by ``jax.profiler``."""

import re
from pathlib import Path
from typing import Any

import jax

from flax_resnetv2.errors import UsageError

Steps = tuple[int, int]
"""The first step that is traced, and the first after it that is not."""


def parse_steps(text: str | None) -> Steps | None:
    """Read "20:30" as (20, 30), or raise ``UsageError``."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        rule = "FIRST below END" if found else "two step numbers"
        raise UsageError(f"profile={text!r} must be FIRST:END, {rule}, as 20:30")
    return int(found[1]), int(found[2])


def check_steps(steps: Steps | None, done: int, total: int) -> None:
    """Refuse, by ``UsageError``, steps that do not follow ``done`` of ``total``."""
    if steps is None or done <= steps[0] < steps[1] <= total:
        return
    first, end = steps
    if done == total:
        raise UsageError(
            f"profile={first}:{end}: this run is finished and has no step left to "
            "trace; give another --workdir"
        )
    raise UsageError(
        f"profile={first}:{end} must be FIRST:END with {done} <= FIRST < END <= "
        f"{total}, the steps that this run still has to do; choose for example "
        f"{min(done + 20, total - 1)}:{min(done + 30, total)}"
    )


class Tracer:
    """Writes a trace of ``steps``, if any, to ``directory``."""

    def __init__(self, steps: Steps | None, directory: Path) -> None:
        self._first, self._end = steps or (-1, -1)
        self._directory, self._running = directory, False

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:  # or this process could not start another trace
            jax.profiler.stop_trace()

    def next_event(self, done: int, limit: int) -> int:
        """Return the step after ``done`` at which a trace starts or ends, or limit."""
        return min([limit, *(s for s in (self._first, self._end) if s > done)])

    def before(self, done: int) -> None:
        """Start the trace, if ``done`` steps come before it."""
        if done == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, done: int, state: Any) -> str | None:
        """End the trace, if ``done`` steps complete it; return where it is."""
        if done != self._end or not self._running:
            return None
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        self._running = False
        return (
            f"trace of the steps from {self._first} to {done - 1} in "
            f"{self._directory}: open its .trace.json.gz with ui.perfetto.dev"
        )
