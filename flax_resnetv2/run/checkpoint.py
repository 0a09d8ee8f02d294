"""Checkpoints of a training state, through orbax, each with checksums of its arrays.

>>> with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
...     checkpoints.save(390, state)
...     step, state, notes = checkpoints.restore_newest(like=state)

Orbax writes a checkpoint whole or not at all, but does not see a bit that flips
afterwards. The checksums do.
"""

import contextlib
import copy
import errno
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnetv2.errors import RunError

_logger = logging.getLogger(__name__)


class DamagedError(RunError):
    """A checkpoint whose files are not what was written."""


class Checkpointer:
    """Saves whole states by step and gives them back.

    Saving is asynchronous and atomic: a checkpoint is listed when it is complete. Of
    many processes each has one, all on the same directory, and all call the same.
    """

    def __init__(self, directory: str | Path, keep: int | None = None) -> None:
        """Use a directory.

        Args:
            directory: made where it does not exist.
            keep: how many of the newest stay; None: only reading, which changes nothing
                in a directory that another process writes.
        """
        # Imported here: it costs a third of a second, and evaluation needs none of it.
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        class Keep(checkpoint_managers.PreservationPolicy):
            """The newest, and the best."""

            def should_preserve(
                _, checkpoints: Sequence[Any], *, context: Any
            ) -> list[bool]:
                old = len(checkpoints) - (keep or 0)
                return [
                    place >= old or checkpoint.step == self._best
                    for place, checkpoint in enumerate(checkpoints)
                ]

        self._directory = Path(directory).absolute()
        self._writes, self._best = keep is not None, None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._newest: int | None = None
        """The step that was given to save last."""
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=Keep(),
                create=self._writes,
                read_only=not self._writes,
                # What a killed process began to write.
                cleanup_tmp_directories=self._writes,
            ),
        )

    def steps(self) -> list[int]:
        """The steps of all checkpoints, rising; the last may be on its way to disk."""
        begun = [] if self._newest is None else [self._newest]
        return sorted({*self._manager.all_steps(), *begun})

    def latest(self) -> int | None:
        """The last of ``steps``; None: there is none."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Any, notes: Any = None, best: int | None = None
    ) -> None:
        """Begin to save ``state``; it may be used and given away at once.

        Args:
            step: newer than all others.
            state: arrays; each process has every array whole.
            notes: JSON values that belong to it.
            best: a step whose checkpoint stays beside the newest.

        Raises:
            RunError: this one, or the one before it, cannot be written.
        """
        self._finish_writing()
        if (last := self.latest()) is not None and step <= last:
            raise ValueError(f"step {step} is not newer than {last}")
        # A copy: the caller's may change while it is written.
        record = {"notes": copy.deepcopy(notes), "arrays": _checksums(state)}
        record["record"] = _checksum_of(record)
        alone = jax.process_count() == 1
        if alone:
            state = jax.tree.map(lambda x: np.array(x.addressable_data(0)), state)
        items = self._args.Composite(
            state=self._args.StandardSave(state), record=self._args.JsonSave(record)
        )
        self._best, self._newest = best, step
        # Orbax takes a third of a millisecond for each array before it goes on by
        # itself: a thread has that time. Many processes meet in it, in order.
        self._writing = self._thread.submit(self._manager.save, step, args=items)
        if not alone:
            self._finish_writing()

    def notes(self, step: int) -> Any:
        """Read the notes of ``step`` alone; raises as ``restore``."""
        return self._record(step)["notes"]

    def restore(self, step: int, like: Any) -> tuple[Any, Any]:
        """Read the state and the notes of ``step``.

        Args:
            step: one that was saved.
            like: a state of arrays, or of ``jax.ShapeDtypeStruct`` with shardings: how
                each array is shaped and where it lies.

        Raises:
            DamagedError: it is not, bit for bit, what was saved.
            RunError: it is of other arrays than ``like``.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        record = self._record(step)
        if other := sorted(set(record["arrays"]) ^ set(_paths(like))):
            raise RunError(
                f"{self._directory / str(step)} is of another net, or another version "
                f"of this package: {', '.join(other[:3])} is on one side only; go on "
                "with the version that wrote it, or train in another --workdir"
            )
        items = self._args.Composite(state=self._args.StandardRestore(target))
        state = None
        with self._damaged(step):
            state = self._manager.restore(step, args=items).state
            found, said = _checksums(state), record["arrays"].items()
            if other := [path for path, value in said if found[path] != value]:
                raise ValueError(f"{', '.join(other[:3])}: another checksum")
        return state, record["notes"]

    def restore_newest(self, like: Any) -> tuple[int, Any, Any] | None:
        """Read the newest whole checkpoint; damaged ones are said, and moved aside
        unless this is for reading only.

        Returns:
            Its step, state and notes; None: there is no checkpoint.

        Raises:
            RunError: there are some, and none is whole or of the same arrays.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state, notes = self.restore(step, like)
            except DamagedError as error:
                if not self._writes and not (self._directory / str(step)).exists():
                    # The run that goes on has a newer one.
                    self._manager.reload()
                    return self.restore_newest(like)
                damaged[step] = error
                continue
            for other, error in damaged.items():
                _logger.warning("%s; going on from step %d", error, step)
                if self._writes:
                    self._set_aside(other)
            return step, state, notes
        if damaged:
            reasons = "; ".join(map(str, damaged.values()))
            raise RunError(
                f"no checkpoint of {self._directory} is whole: {reasons}; bring back a "
                "copy, or train in another --workdir"
            )
        return None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:
            try:
                self.close()
            except RunError as second:  # the first error is the cause
                _logger.warning("%s", second)
        # Where another process has died, waiting for it would take minutes.

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self.wait()
        except RunError:
            with contextlib.suppress(Exception):  # it says the same once more
                self._manager.close()
            raise
        self._manager.close()

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises as ``close``."""
        self._finish_writing()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def _finish_writing(self) -> None:
        """Wait for the thread; what it began may still be on its way to disk."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except Exception as error:  # of many kinds, from several libraries
            self._newest = None
            raise self._unwritten(error) from error

    def _record(self, step: int) -> dict[str, Any]:
        """What lies beside the arrays, if it is what was written."""
        items, record = self._args.Composite(record=self._args.JsonRestore()), {}
        with self._damaged(step):
            record = dict(self._manager.restore(step, args=items).record)
            if record.pop("record", None) != _checksum_of(record):
                raise ValueError("its record has another checksum")
        return record

    @contextlib.contextmanager
    def _damaged(self, step: int) -> Iterator[None]:
        """Turn what damaged files raise, in any process, into ``DamagedError``."""
        reason = None
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # not of the files
        except OSError as error:
            if error.errno not in (None, errno.ENOENT):
                raise  # as of a disk that does not answer: the files may be whole
            reason = _reason(error)
        except Exception as error:  # of as many kinds as files can be damaged
            reason = _reason(error)
        # All processes must go the same way.
        if np.any(multihost_utils.process_allgather(np.asarray(reason is not None))):
            where, reason = self._directory / str(step), reason or "for another process"
            raise DamagedError(f"{where} is damaged ({reason})")

    def _set_aside(self, step: int) -> None:
        """Take a directory out of the list; its bytes stay to be looked at."""
        if jax.process_index() == 0:
            path = self._directory / str(step)
            number = 1
            while (aside := path.with_name(f"damaged-{step}-{number}")).exists():
                number += 1
            os.rename(path, aside)
        multihost_utils.sync_global_devices(f"{step} is set aside")
        self._manager.reload()

    def _unwritten(self, error: Exception) -> RunError:
        whole = [
            int(path.name) for path in self._directory.glob("*") if path.name.isdigit()
        ]
        reason = _reason(error)
        newest = f"the newest is of step {max(whole):,}" if whole else "there is none"
        room = re.search("No space|quota|File too large", reason)
        return RunError(
            f"a checkpoint cannot be written in {self._directory} ({reason}); "
            f"{newest}; "
            + ("make room" if room else "see to it")
            + ", and give the same command to go on from there"
        )


def best_step(scores: dict[str, float], steps: list[int]) -> int | None:
    """Of ``steps`` the one with the highest score, the first of equals; None: none.

    Args:
        scores: by step, which is a text, as in JSON.
        steps: to choose from.
    """
    known = [step for step in sorted(steps) if str(step) in scores]
    return max(known, key=lambda step: scores[str(step)], default=None)


def _reason(error: Exception) -> str:
    """The cause in a few words: what the system said, where it said something."""
    text = str(error)
    if said := re.search(r"([^:\n]+?) \[os_error_code", text):
        return said[1].strip()
    return (text.splitlines() or [""])[0][:200] or repr(error)


def _checksum(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def _checksum_of(record: dict[str, Any]) -> str:
    return _checksum(json.dumps(record, sort_keys=True).encode())


def _checksums(state: Any) -> dict[str, str]:
    """CRC-32 of the bytes of each array."""
    leaves = jax.tree.leaves(state)
    return {
        path: _checksum(np.ascontiguousarray(leaf.addressable_data(0)))
        for path, leaf in zip(_paths(state), leaves, strict=True)
    }


def _paths(state: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state)]
