"""Images that stay on disk: read, decoded and cut to size ahead of their step.

For data sets that do not fit into memory, as ImageNet. What a batch holds is a function
of the seed and the step, so a run that goes on gets the batches that one that was not
stopped gets. Grain reads ahead, in threads or in processes of its own.

>>> records = Records(directory, "train", 0, 1_281_167, (224, 224, 3))
>>> row = TrainingRow(records, batch_size=256, seed=0, scale=(0.08, 1.0))
>>> for image, label, mask in batches(row, share=256, first=0, last=5004, workers=8):
...     ...
"""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from flax_resnetv2.data.batch import epoch_order
from flax_resnetv2.data.folder import Files
from flax_resnetv2.data.images import random_part, square
from flax_resnetv2.data.tfds_records import Records

Row = tuple[np.ndarray, np.ndarray, np.bool_]
"""A row of a ``Batch``: image uint8 [H, W, C], label, and whether there is one."""

_PARTS = 0x7061727473
"""Keeps the draws of parts apart from other uses of the seed."""


@dataclass(frozen=True)
class TrainingRow:
    """place -> row; places count on over the steps of a whole run."""

    records: Records | Files
    batch_size: int
    """Images of a step, over all devices."""
    seed: int
    scale: tuple[float, float] | None = None
    """As ``random_part`` has it; None: the whole central square."""

    def __call__(self, place: int) -> Row:
        """Give the row at a place."""
        size, batch = self.records.num_images, self.batch_size
        epoch, rest = divmod(place, size // batch * batch)
        fit = square(self.records.image_shape[0])
        if self.scale is not None:
            draw = np.random.default_rng([self.seed, place, _PARTS])
            fit = random_part(self.records.image_shape[0], self.scale, draw)
        index = int(_order(size, batch, self.seed, epoch)[rest])
        return *self.records.read(index, fit), np.True_


@lru_cache(maxsize=2)
def _order(count: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    return epoch_order(count, batch_size, seed, epoch)


@dataclass(frozen=True)
class EvaluationRow:
    """place -> row: every image once, then rows that only fill the last batch up."""

    records: Records | Files
    share: float = 1.0
    """As ``square`` has it."""

    def __call__(self, place: int) -> Row:
        """Give the row at a place."""
        there = place < self.records.num_images
        fit = square(self.records.image_shape[0], self.share)
        # Any image fills a row up; the mask says that it does not count.
        return *self.records.read(place if there else 0, fit), np.bool_(there)


def batches(
    row: Callable[[int], Row],
    share: int,
    first: int,
    last: int,
    *,
    workers: int,
    part: tuple[int, int] = (0, 1),
) -> Any:
    """Read batches ahead of their use, in their order.

    Args:
        row: gives the row at a place of the batches of all processes, one after the
            other.
        share: rows of a batch that this process reads.
        first, last: the first batch, and the one before which it ends.
        workers: processes that read for this one; 0: its threads do.
        part: (number of this process, how many train): each reads its own rows.

    Returns:
        An iterator of (images uint8 [share, H, W, C], labels, mask bool [share]); its
        ``close()`` ends what reads ahead.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's processes ask for a flag of theirs
        flags.FLAGS.mark_as_parsed()
    rows = grain.MapDataset.range(first * share, last * share).map(
        _Mine(row, share, *part)
    )
    # As batches, not as images: of each a few are ready, and no more.
    threads = 1 if workers else os.cpu_count()
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    read = rows.batch(share, drop_remainder=True).to_iter_dataset(ahead)
    if workers:
        # A quick exit overtakes the thread in which grain frees what processes share;
        # Python's tracker frees the rest, and need not warn of it.
        sys.warnoptions.append("ignore:resource_tracker")
        processes = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        read = read.mp_prefetch(processes, worker_init_fn=_leave_signals).map(_copied)
    return iter(read)


@dataclass(frozen=True)
class _Mine:
    """Rows of one of several processes: its place -> the place in all batches."""

    row: Callable[[int], Row]
    share: int
    number: int
    processes: int

    def __call__(self, place: int) -> Row:
        batch, rest = divmod(place, self.share)
        return self.row((batch * self.processes + self.number) * self.share + rest)


def _copied(rows: Row) -> Row:
    """Free the memory that the processes share as soon as it is read."""
    return tuple(np.array(x) for x in rows)


def _leave_signals(_worker: int, _workers: int) -> None:
    """In a process that reads: Ctrl-C is for the one that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
