"""Lines of metrics for TensorBoard, without TensorFlow (by tensorboardX)."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes numbers as "test/accuracy", "train/gradient_norm/stack1", by step.

    Args:
        directory: begins anew, so that a run that goes on has each step once.
        lines: those of the run so far.
    """

    def __init__(self, directory: Path, lines: Sequence[dict[str, Any]]) -> None:
        from tensorboardX import SummaryWriter

        shutil.rmtree(directory, ignore_errors=True)
        self._writer = SummaryWriter(str(directory))
        for line in lines:
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write all numbers of a line."""
        for name, value in _numbers(line, line["split"]):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Have all on disk."""
        self._writer.close()


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in dicts and lists, with its path; units count from 1."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("step", "split"):
                yield from _numbers(inner, f"{name}/{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value, start=1):
            yield from _numbers(inner, f"{name}/unit{number}")
    else:
        yield name, value
