"""The metrics of a run: ``metrics.jsonl``, TensorBoard, log lines, a progress bar."""

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import rich.progress

from flax_resnetv2.run.run_directory import read_metrics
from flax_resnetv2.system.files import write_whole

_logger = logging.getLogger(__name__)
_MEANS = {
    "loss": "loss",
    "correct": "accuracy",
    "correct_top5": "top5",
    "squared_error": "squared_error",
    "kl": "kl",
}
"""Metrics that are summed over images, and the names of their means."""


class Reporter:
    """Writes ``metrics.jsonl``, logs each line, and shows a progress bar.

    The bar replaces the log lines of training, if rich's global console is a terminal
    and the log shows INFO.

    Args:
        workdir: the run directory. Lines after step ``done`` are removed.
        began: ``time.perf_counter()`` at the start of the run.
        total, done: steps of the whole run, and steps done before.
        batch_size: images per step.
        flops: FLOPs of training on one image.
        peak: FLOP/s of all devices together; None: unknown.
        silent: write and log nothing, because another process does.
        tensorboard: also write ``tensorboard/``.
    """

    def __init__(
        self,
        workdir: Path,
        began: float,
        total: int,
        done: int,
        batch_size: int,
        flops: float = 0.0,
        peak: float | None = None,
        silent: bool = False,
        tensorboard: bool = False,
    ) -> None:
        self.workdir, self._flops, self._peak = workdir, flops, peak
        self.last: dict[str, dict[str, Any]] = {}
        """The newest line of each split."""
        self._began, self._total, self._batch = began, total, batch_size
        self._step, self._time, self._compiled = done, time.perf_counter(), False
        kept = [line for line in read_metrics(workdir) if line["step"] <= done]
        for line in kept:
            self.last[line["split"]] = line
            # A resumed run continues the count of seconds.
            self._began = began - line["seconds"]
        self._file = self._tensorboard = None
        if not silent:
            path = workdir / "metrics.jsonl"
            wanted = "".join(json.dumps(line) + "\n" for line in kept)
            if not path.exists() or path.read_bytes() != wanted.encode():
                write_whole(path, wanted)
            self._file = path.open("a", buffering=1)
        if not silent and tensorboard:
            from tensorboardX import SummaryWriter

            shutil.rmtree(workdir / "tensorboard", ignore_errors=True)
            self._tensorboard = SummaryWriter(str(workdir / "tensorboard"))
            for line in kept:
                self._write_scalars(line)
        console = rich.get_console()
        shown = console.is_terminal and _logger.isEnabledFor(logging.INFO)
        self._bar = rich.progress.Progress(
            "step",
            rich.progress.MofNCompleteColumn(),
            rich.progress.BarColumn(),
            rich.progress.TimeRemainingColumn(),
            "{task.description}",
            console=console,
            disable=silent or not shown,
        )
        self._task = self._bar.add_task("compiling", total=total, completed=done)

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for file in (self._file, self._tensorboard):
            if file is not None:
                file.close()

    def say(self, text: str) -> None:
        """Log one line."""
        if self._file:
            _logger.info(text)

    def sync(self) -> None:
        """Force all lines to disk, before a checkpoint that follows them."""
        if self._file:
            os.fsync(self._file.fileno())

    def dispatched(self) -> None:
        """Start measuring rates after the first call, when the step is compiled."""
        if not self._compiled:
            self._time, self._compiled = time.perf_counter(), True

    def progress(self, done: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=done)

    def training(
        self, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> None:
        """Record the mean training metrics since the previous line."""
        now = time.perf_counter()
        rate = (done - self._step) * self._batch / (now - self._time)
        self._step, self._time = done, now
        if self._peak:
            more["flops_utilization"] = rate * self._flops / self._peak
        line = self._record("train", done, epoch, sums, images_per_second=rate, **more)
        text = f"{_summary(line)}  {rate:,.0f} images/s"
        if self._peak:
            text += f"  {line['flops_utilization']:.1%} of peak FLOP/s"
        self._bar.update(self._task, completed=done, description=text)
        if self._bar.disable:
            left = _clock((self._total - done) * self._batch / rate)
            self.say(f"step {done:,}/{self._total:,}  {text}  {left} left")

    def evaluation(
        self, split: str, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Record the metrics of a whole split; return the line."""
        line = self._record(split, done, epoch, sums, **more)
        text = f"epoch {epoch:g}  {split} {_summary(line, digits=4)}"
        if "correct" in sums:
            text += f" ({sums['correct']:,.0f} of {sums['count']:,.0f})"
        if "top5" in line:
            text += f"  top 5 {line['top5']:.4f}"
        self.say(text)
        # The rate of the next training line excludes this evaluation.
        self._time = time.perf_counter()
        return line

    def _record(
        self, split: str, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Make and write a line: means, ``more``, and the time."""
        line = {
            "step": done,
            "epoch": round(epoch, 6),
            "split": split,
            **{
                name: float(sums[key] / sums["count"])
                for key, name in _MEANS.items()
                if key in sums
            },
            "count": int(sums["count"]),
            **more,
            "seconds": round(time.perf_counter() - self._began, 3),
        }
        if self._file:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._tensorboard:
            self._write_scalars(line)
        self.last[split] = line
        return line

    def _write_scalars(self, line: dict[str, Any]) -> None:
        """Write numbers as "test/accuracy", "test/residual_ratio/stack1/unit1"."""
        numbers = {k: v for k, v in line.items() if k not in ("step", "split")}
        for path, value in jax.tree.leaves_with_path(numbers):
            # Dictionaries have keys; lists have indices, and units count from 1.
            parts = [getattr(p, "key", None) or f"unit{p.idx + 1}" for p in path]
            name = "/".join([line["split"], *parts])
            self._tensorboard.add_scalar(name, value, line["step"])


def _summary(line: dict[str, Any], digits: int = 3) -> str:
    """Format the loss and the other metrics of a line."""
    text = f"loss {line['loss']:.3f}"
    for name in ("accuracy", "squared_error", "kl"):
        if name in line:
            text += f"  {name.replace('_', ' ')} {line[name]:.{digits}f}"
    return text


def _clock(seconds: float) -> str:
    """Format a duration: 12 s, 3 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
