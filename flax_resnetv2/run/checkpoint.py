"""Checkpoints of a training state, written by orbax, with checksums of all arrays.

>>> with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
...     checkpoints.save(390, state)
...     step, state, notes = checkpoints.restore_newest(like=state)

Orbax writes a checkpoint completely or not at all, but does not notice bits that change
afterwards. The checksums do.
"""

import contextlib
import copy
import errno
import itertools
import json
import logging
import re
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnetv2.errors import RunError
from flax_resnetv2.system.distributed import any_process

_logger = logging.getLogger(__name__)


class DamagedError(RunError):
    """The files of a checkpoint are not what was written."""


class Checkpointer:
    """Saves and restores whole training states, each under its step number.

    Saving is asynchronous and atomic. With several processes, each creates one on the
    same directory, and all make the same calls.

    Args:
        directory: created if it does not exist.
        keep: number of newest checkpoints to keep; None: read only, and change nothing
            in a directory that another process may be writing.
    """

    def __init__(self, directory: str | Path, keep: int | None = None) -> None:
        # Imported here: it takes a third of a second, and evaluation does not need it.
        import orbax.checkpoint as ocp

        self._directory = Path(directory).absolute()
        self._keep, self._best = keep, None
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._newest: int | None = None
        """The step of the last ``save``."""
        self._failures = 0
        """Errors of writing; all after the first have its cause."""
        self._args, writes = ocp.args, keep is not None
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=SimpleNamespace(should_preserve=self._kept),
                create=writes,
                read_only=not writes,
                cleanup_tmp_directories=writes,  # of a process that was killed
            ),
        )

    def _kept(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell orbax which checkpoints to keep: the newest, and the best."""
        old = len(checkpoints) - (self._keep or 0)
        return [n >= old or c.step == self._best for n, c in enumerate(checkpoints)]

    def steps(self) -> list[int]:
        """Return the sorted steps of all checkpoints; the last may still be written."""
        return sorted({*self._manager.all_steps(), self._newest} - {None})

    def latest(self) -> int | None:
        """Return the last of ``steps``, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, state: Any, notes: Any = None, best: int | None = None
    ) -> None:
        """Start to save ``state``; its buffers may be donated at once.

        Args:
            step: greater than all others.
            state: replicated arrays.
            notes: JSON values to store with it.
            best: a step to keep in addition to the newest.

        Raises:
            RunError: this checkpoint, or the one before it, cannot be written.
        """
        self._finish_writing()
        if (last := self.latest()) is not None and step <= last:
            raise ValueError(f"step {step} is not newer than {last}")
        # A copy, because the caller may change the notes while they are written.
        record = {"notes": copy.deepcopy(notes), "arrays": _checksums(state)}
        record["record"] = _checksum_of(record)
        single = jax.process_count() == 1
        if single:
            state = jax.tree.map(lambda x: np.array(x.addressable_data(0)), state)
        items = self._args.Composite(
            state=self._args.StandardSave(state), record=self._args.JsonSave(record)
        )
        self._best, self._newest = best, step
        # Orbax blocks for a third of a millisecond per array, so it runs in a thread.
        # Several processes synchronize in ``save``, and must do so in the same order.
        self._writing = self._thread.submit(self._manager.save, step, args=items)
        if not single:
            self._finish_writing()

    def notes(self, step: int) -> Any:
        """Read only the notes of ``step``; raises as ``restore``."""
        return self._record(step)["notes"]

    def records(self) -> dict[str, str]:
        """Return the run's records from the newest checkpoint that has a copy.

        Raises:
            RunError: there are checkpoints, and none can be read or has a copy.
        """
        steps = self.steps()
        for step in reversed(steps):
            with contextlib.suppress(DamagedError):
                if found := self.notes(step).get("records"):
                    return found
        if steps:
            raise RunError(
                f"no checkpoint of {self._directory} has a copy of the run's records; "
                "restore config.json and dataset.json from a copy, or train in another "
                "--workdir"
            )
        return {}

    def restore(self, step: int, like: Any) -> tuple[Any, Any]:
        """Read the state and the notes of ``step``.

        ``like`` is a state of arrays, or jax.ShapeDtypeStructs, with the same structure
        and shapes, and the shardings to restore to.

        Raises:
            DamagedError: it is not, bit for bit, what was saved.
            RunError: its arrays are not those of ``like``.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        record = self._record(step)
        if other := sorted(set(record["arrays"]) ^ set(_by_path(like))):
            raise RunError(
                f"{self._directory / str(step)} is of another net, or another version "
                f"of this package: {', '.join(other[:3])} is on one side only; resume "
                "with the version that wrote it, or train in another --workdir"
            )
        items = self._args.Composite(state=self._args.StandardRestore(target))
        state = None
        with self._damaged(step):
            state = self._manager.restore(step, args=items).state
            found, stored = _checksums(state), record["arrays"].items()
            if other := [path for path, value in stored if found[path] != value]:
                raise ValueError(f"{', '.join(other[:3])}: another checksum")
        return state, record["notes"]

    def restore_newest(self, like: Any) -> tuple[int, Any, Any] | None:
        """Return step, state and notes of the newest whole checkpoint, if any.

        Logs damaged ones and, unless read only, renames them to "damaged-STEP-N".

        Raises:
            RunError: all checkpoints are damaged, or have other arrays than ``like``.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state, notes = self.restore(step, like)
            except DamagedError as error:
                if self._keep is None and not (self._directory / str(step)).exists():
                    # The run that is writing here has a newer one.
                    self._manager.reload()
                    return self.restore_newest(like)
                damaged[step] = error
                continue
            for other, error in damaged.items():
                _logger.warning("%s; resuming from step %d", error, step)
                if self._keep is not None:
                    self._set_aside(other)
            return step, state, notes
        if damaged:
            reasons = "; ".join(map(str, damaged.values()))
            raise RunError(
                f"all checkpoints of {self._directory} are damaged: {reasons}; restore "
                "one from a copy, or train in another --workdir"
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
                if self._failures < 2:
                    _logger.warning("%s", second)
        # If another process has died, waiting for it would take minutes.

    def close(self) -> None:
        """Wait until everything is on disk, and close orbax; raises as ``save``."""
        try:
            self.wait()
        except RunError:
            with contextlib.suppress(Exception):  # it repeats the same error
                self._manager.close()
            raise
        self._manager.close()

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises as ``save``."""
        self._finish_writing()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

    def _finish_writing(self) -> None:
        """Wait for the thread; orbax may still be writing what it started."""
        writing, self._writing = self._writing, None
        if error := writing and writing.exception():
            self._newest = None
            raise self._unwritten(error) from error

    def _record(self, step: int) -> dict[str, Any]:
        """Read and check the notes and checksums stored with the arrays."""
        items, record = self._args.Composite(record=self._args.JsonRestore()), {}
        with self._damaged(step):
            record = dict(self._manager.restore(step, args=items).record)
            if record.pop("record", None) != _checksum_of(record):
                raise ValueError("its record has another checksum")
        return record

    @contextlib.contextmanager
    def _damaged(self, step: int) -> Iterator[None]:
        """Turn errors from damaged files, in any process, into ``DamagedError``."""
        reason = None
        try:
            yield
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # not from the files
        except Exception as error:  # damaged files cause errors of many types
            reason = _reason(error)
            if re.search("EACCES|EPERM|Permission denied", str(error)):
                raise RunError(
                    f"{self._directory / str(step)} cannot be read ({reason}); let "
                    "this user read it"
                ) from error
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise  # for example of a failing disk: the files may be whole
        # All processes must take the same branch.
        if any_process(reason is not None):
            where, reason = self._directory / str(step), reason or "for another process"
            raise DamagedError(f"{where} is damaged ({reason})")

    def _set_aside(self, step: int) -> None:
        """Rename a damaged checkpoint, so that it is no longer listed."""
        if jax.process_index() == 0:
            path = self._directory / str(step)
            asides = (path.with_name(f"damaged-{step}-{n}") for n in itertools.count(1))
            path.rename(next(aside for aside in asides if not aside.exists()))
        multihost_utils.sync_global_devices(f"{step} is set aside")
        self._manager.reload()

    def _unwritten(self, error: BaseException) -> RunError:
        self._failures += 1
        # Not ``self.steps()``, which may include the one that failed.
        steps = [int(p.name) for p in self._directory.glob("*") if p.name.isdigit()]
        newest = f"the newest is of step {max(steps):,}" if steps else "there is none"
        reason = _reason(error)
        full = re.search("No space|quota|File too large", reason)
        return RunError(
            f"a checkpoint cannot be written in {self._directory} ({reason}); {newest};"
            f" {'free some space' if full else 'repair that'}, and give the same "
            "command to resume from there"
        )


def best_step(scores: dict[str, float], steps: list[int]) -> int | None:
    """Return the one of ``steps`` with the highest score, the first of equals, or None.

    The keys of ``scores`` are strings, as in JSON.
    """
    known = [step for step in sorted(steps) if str(step) in scores]
    return max(known, key=lambda step: scores[str(step)], default=None)


def _reason(error: BaseException) -> str:
    """Summarize an error: the system's own message, if it contains one."""
    text = str(error)
    if found := re.search(r"([^:\n]+?) \[os_error_code", text):
        return found[1].strip()
    return (text.splitlines() or [""])[0][:200] or repr(error)


def _checksum(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def _checksum_of(record: dict[str, Any]) -> str:
    return _checksum(json.dumps(record, sort_keys=True).encode())


def _checksums(state: Any) -> dict[str, str]:
    """Return the CRC-32 of the bytes of each array."""
    return {
        path: _checksum(np.ascontiguousarray(leaf.addressable_data(0)))
        for path, leaf in _by_path(state).items()
    }


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}
