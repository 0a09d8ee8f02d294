"""Read images from disk ahead of their step, for data sets larger than the memory.

A batch is a function of the seed and the step, so a resumed run sees the same batches.
Grain reads ahead, in threads or in worker processes.

>>> records = Records(directory, stored_splits(directory)["train"],
...                   label_of(directory), (224, 224, 3))
>>> row = TrainingRow(records, batch_size=256, seed=0, scale=(0.08, 1.0))
>>> for image, label, mask in batches(row, share=256, first=0, last=5004, workers=8):
...     ...
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from flax_resnetv2.data.batch import epoch_order
from flax_resnetv2.data.decoding import center_crop, random_resized_crop
from flax_resnetv2.data.folder import Files
from flax_resnetv2.data.tfds_records import Records
from flax_resnetv2.errors import RunError, UsageError

Row = tuple[np.ndarray, np.ndarray, np.bool_]
"""A row of a ``Batch``: image uint8 [H, W, C], label, mask."""
_CROPS = 0x7061727473
"""Separates the random numbers of crops from other uses of the seed."""

SHARED_MEMORY = Path("/dev/shm")
"""Where worker processes leave their batches, on Linux."""
HELD = 4
"""Batches that each worker process has there at once."""

_epoch_order = lru_cache(maxsize=2)(epoch_order)


@dataclass(frozen=True)
class TrainingRow:
    """Reads the row at a position; positions count over all steps of a run."""

    records: Records | Files
    batch_size: int
    """Images of a step, over all devices."""
    seed: int
    scale: tuple[float, float] | None = None
    """As of ``random_resized_crop``; None: crop the central square."""

    def __call__(self, position: int) -> Row:
        """Read a row."""
        count, side = self.records.num_images, self.records.image_shape[0]
        per_epoch = count // self.batch_size * self.batch_size
        epoch, rest = divmod(position, per_epoch)
        resize = center_crop(side)
        if self.scale is not None:
            rng = np.random.default_rng([self.seed, position, _CROPS])
            resize = random_resized_crop(side, self.scale, rng)
        order = _epoch_order(count, self.batch_size, self.seed, epoch)
        return *self.records.read(int(order[rest]), resize), np.True_


@dataclass(frozen=True)
class EvaluationRow:
    """Reads the row at a position: each image once, then padding."""

    records: Records | Files
    scale: float = 1.0
    """Share of the shorter side that ``center_crop`` keeps."""

    def __call__(self, position: int) -> Row:
        """Read a row."""
        exists = position < self.records.num_images
        resize = center_crop(self.records.image_shape[0], self.scale)
        # Any image will do as padding, because the mask excludes it.
        row = self.records.read(position if exists else 0, resize)
        return *row, np.bool_(exists)


def batches(
    row: Callable[[int], Row],
    share: int,
    first: int,
    last: int,
    *,
    workers: int,
    part: tuple[int, int] = (0, 1),
) -> Any:
    """Read batches in their order, ahead of their use.

    Args:
        row: reads the row at a position in the batches of all processes.
        share: rows of a batch that this process reads.
        first, last: the first batch, and the one after the last.
        workers: worker processes that read for this process; 0: threads do.
        part: (index of this process, number of processes).

    Returns:
        An iterator of (images uint8 [share, H, W, C], labels, mask bool [share]);
        its ``close()`` stops reading ahead. It raises ``RunError`` if a worker is
        killed, and what ``row`` raises.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read a flag
        flags.FLAGS.mark_as_parsed()
    positions = grain.MapDataset.range(first * share, last * share)
    rows = positions.map(partial(_global_position, share=share, part=part)).map(row)
    # Prefetch batches instead of rows, so that only a few are in memory.
    threads = 1 if workers else os.cpu_count()
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    read = rows.batch(share, drop_remainder=True).to_iter_dataset(ahead)
    if workers:
        # On a quick exit, Python's tracker frees the shared memory before grain does,
        # and would warn about it.
        sys.warnoptions.append("ignore:resource_tracker")
        processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        read = read.mp_prefetch(processes, worker_init_fn=_ignore_interrupts)
        read = read.map(_copy)
    return _explained(iter(read))


def check_shared_memory(workers: int, size: int) -> None:
    """Refuse, by ``UsageError``, workers whose batches of ``size`` bytes cannot fit."""
    if not workers or not SHARED_MEMORY.is_dir():
        return
    needed, free = workers * HELD * size, shutil.disk_usage(SHARED_MEMORY).free
    if not os.access(SHARED_MEMORY, os.W_OK):
        reason = "cannot be written"
    elif needed > free:
        reason = f"has {free / 1e6:,.0f} MB free of the {needed / 1e6:,.0f} MB needed"
    else:
        return
    raise UsageError(
        f"data.workers={workers} share their batches in {SHARED_MEMORY}, which "
        f"{reason}; choose fewer, or --data.workers 0 to read in threads, or enlarge "
        "it (docker run --shm-size)"
    )


def _explained(reader: Any) -> Iterator[Row]:
    """Turn grain's error about a worker that was killed into a ``RunError``."""
    with closing(reader):
        try:
            yield from reader
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            code = str(error).partition("exit code ")[2].partition(".")[0]
            raise RunError(
                f"a process that reads images was killed (exit code {code}); the "
                f"memory, or {SHARED_MEMORY}, was too small: choose fewer "
                "--data.workers, or 0 to read in threads, and give the same command "
                "to resume"
            ) from error


def _global_position(position: int, share: int, part: tuple[int, int]) -> int:
    """Turn a position in the batches of one process into one in those of all."""
    (batch, rest), (index, processes) = divmod(position, share), part
    return (batch * processes + index) * share + rest


def _copy(rows: Row) -> Row:
    """Copy rows out of the memory that the processes share, which frees it."""
    return tuple(np.array(x) for x in rows)


def _ignore_interrupts(_worker: int, _workers: int) -> None:
    """Leave Ctrl-C to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
