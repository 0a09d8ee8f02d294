"""What a person sees of a run while it goes, and the lines it leaves behind."""

import json
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn as Remaining,
)

from flax_resnetv2.run.run_directory import read_metrics
from flax_resnetv2.run.tensorboard import TensorBoard
from flax_resnetv2.system.files import write_whole

MEANS = {
    "loss": "loss",
    "correct": "accuracy",
    "correct_top5": "top5",
    "squared_error": "squared_error",
    "kl": "kl",
}
"""Sums over images, and what their mean is called in a line."""


class Reporter:
    """Writes ``metrics.jsonl`` and shows progress: a live bar, or plain lines.

    Args:
        workdir: where ``metrics.jsonl`` is; lines after step ``done`` are dropped, so
            that a run that goes on has each step once.
        began: ``time.perf_counter()`` at the start of the run.
        total: steps of the whole run.
        done: steps done before.
        batch_size: images in a step.
        flops: of training on one image.
        peak: FLOP/s of all devices together; None: unknown.
        silent: only remember: another process shows and writes.
        tensorboard: write ``tensorboard/`` too.
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
        """Open the file and the bar."""
        self._flops, self._peak = flops, peak
        self.last: dict[str, dict[str, float]] = {}
        """The newest line of each split."""
        self._began, self._total, self._batch = began, total, batch_size
        self._step, self._time, self._compiled = done, time.perf_counter(), False
        kept = [line for line in read_metrics(workdir) if line["step"] <= done]
        for line in kept:
            self.last[line["split"]] = line
            # Seconds of training count on.
            self._began = began - line["seconds"]
        self._file = None
        if not silent:
            path = workdir / "metrics.jsonl"
            wanted = "".join(json.dumps(line) + "\n" for line in kept)
            if not path.exists() or path.read_bytes() != wanted.encode():
                write_whole(path, wanted)
            self._file = path.open("a", buffering=1)
        self._tensorboard = None
        if tensorboard and not silent:
            self._tensorboard = TensorBoard(workdir / "tensorboard", kept)
        self._console = Console(highlight=False, quiet=silent)
        self._bar = None
        if self._console.is_terminal and not silent:
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                Remaining(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=done)

    def __enter__(self) -> "Reporter":
        """Show the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bar away and close the file."""
        if self._bar:
            self._bar.stop()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, soft_wrap=True, markup=False)

    def sync(self) -> None:
        """Have all lines on disk, as a checkpoint that follows them will be."""
        if self._file:
            os.fsync(self._file.fileno())

    def dispatched(self) -> None:
        """Rates count from the first time on: then the step is compiled."""
        if not self._compiled:
            self._time, self._compiled = time.perf_counter(), True

    def progress(self, done: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._task, completed=done)

    def training(
        self, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> None:
        """Record the mean training metrics since the line before."""
        now = time.perf_counter()
        rate = (done - self._step) * self._batch / (now - self._time)
        self._step, self._time = done, now
        if self._peak:
            more["flops_utilization"] = rate * self._flops / self._peak
        line = self._record("train", done, epoch, sums, images_per_second=rate, **more)
        text = f"{_told(line)}  {rate:,.0f} images/s"
        if self._peak:
            text += f"  {line['flops_utilization']:.1%} of peak FLOP/s"
        self.progress(done)
        if self._bar:
            self._bar.update(self._task, description=text)
        else:
            left = (self._total - done) * self._batch / rate
            self.say(f"step {done:,}/{self._total:,}  {text}  {_clock(left)} left")

    def evaluation(
        self, split: str, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """Record the metrics of a whole split; give the line."""
        line = self._record(split, done, epoch, sums, **more)
        counted = ""
        if "correct" in sums:
            counted = f" ({sums['correct']:,.0f} of {sums['count']:,.0f})"
        self.say(
            f"epoch {epoch:g}  {split} {_told(line, digits=4)}{counted}"
            + (f"  top 5 {line['top5']:.4f}" if "top5" in line else "")
        )
        # The next training line's rate is of training alone.
        self._time = time.perf_counter()
        return line

    def _record(
        self, split: str, done: int, epoch: float, sums: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        line = {
            "step": done,
            "epoch": round(epoch, 6),
            "split": split,
            **{
                name: float(sums[key] / sums["count"])
                for key, name in MEANS.items()
                if key in sums
            },
            "count": int(sums["count"]),
            **more,
            "seconds": round(time.perf_counter() - self._began, 3),
        }
        if self._file:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._tensorboard:
            self._tensorboard.write(line)
        self.last[split] = line
        return line


def _told(line: dict[str, Any], digits: int = 3) -> str:
    """What a training reaches, in words."""
    text = f"loss {line['loss']:.3f}"
    for name in ("accuracy", "squared_error", "kl"):
        if name in line:
            text += f"  {name.replace('_', ' ')} {line[name]:.{digits}f}"
    return text


def _clock(seconds: float) -> str:
    """12 s, 3 min, 1.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
