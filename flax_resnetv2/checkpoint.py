"""Checkpoints of a training state, through orbax, each with checksums of its arrays.

>>> with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
...     checkpoints.save(390, state)
...     step, state, notes = checkpoints.restore_newest(like=state)

Orbax writes a checkpoint whole or not at all, but does not see a bit that flips
afterwards. The checksums do.
"""

import json
import logging
import os
import re
import zlib
from collections.abc import Sequence
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
        """The steps of all complete checkpoints, rising."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None: there is none."""
        return self._manager.latest_step()

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
        self._best = best
        record = {"notes": notes, "arrays": _checksums(state)}
        record["record"] = _checksum(json.dumps(record, sort_keys=True).encode())
        items = self._args.Composite(
            state=self._args.StandardSave(state), record=self._args.JsonSave(record)
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # of many kinds, from several libraries
            raise self._unwritten(error) from error

    def restore(self, step: int, like: Any) -> tuple[Any, Any]:
        """Read the state and the notes of ``step``.

        Args:
            step: one that was saved.
            like: a state of arrays, or of ``jax.ShapeDtypeStruct`` with shardings: how
                each array is shaped and where it lies.

        Raises:
            DamagedError: it is not, bit for bit, what was saved.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        items = self._args.Composite(
            state=self._args.StandardRestore(target), record=self._args.JsonRestore()
        )
        reason, state, record = None, None, {}
        try:
            restored = self._manager.restore(step, args=items)
            state, record = restored.state, dict(restored.record)
            reason = _difference(state, record)
        except Exception as error:  # of as many kinds as files can be damaged
            reason = _reason(error)
        # All processes must go the same way.
        if np.any(multihost_utils.process_allgather(np.asarray(reason is not None))):
            where = self._directory / str(step)
            raise DamagedError(
                f"{where} is damaged ({reason or 'for another process'})"
            )
        return state, record["notes"]

    def restore_newest(self, like: Any) -> tuple[int, Any, Any] | None:
        """Read the newest whole checkpoint; damaged ones are said, and moved aside
        unless this is for reading only.

        Returns:
            Its step, state and notes; None: there is no checkpoint.

        Raises:
            RunError: there are some, and none is whole.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state, notes = self.restore(step, like)
            except DamagedError as error:
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
                "copy, or remove the directory to train from the beginning"
            )
        return None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        # Where another process has died, waiting for it would take minutes.
        if kind is None or jax.process_count() == 1:
            self.close()

    def close(self) -> None:
        """Wait until everything is on disk.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self._manager.close()
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Wait until what was saved is on disk; raises as ``close``."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(error) from error

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
        return RunError(
            f"a checkpoint cannot be written in {self._directory} ({reason}); "
            f"{newest}; make room, and give the same command to go on from there"
        )


def _reason(error: Exception) -> str:
    """The cause in a few words: what the system said, where it said something."""
    text = str(error)
    if said := re.search(r"([^:\n]+?) \[os_error_code", text):
        return said[1].strip()
    return (text.splitlines() or [""])[0][:200] or repr(error)


def _checksum(data: Any) -> str:
    return f"{zlib.crc32(data):08x}"


def _checksums(state: Any) -> dict[str, str]:
    """CRC-32 of the bytes of each array."""
    return {
        jax.tree_util.keystr(path): _checksum(
            np.ascontiguousarray(leaf.addressable_data(0))
        )
        for path, leaf in jax.tree.leaves_with_path(state)
    }


def _difference(state: Any, record: dict[str, Any]) -> str | None:
    """Why a state is not what its record says; None: it is."""
    said = record.pop("record", None)
    if said != _checksum(json.dumps(record, sort_keys=True).encode()):
        return "its record has another checksum"
    found = _checksums(state)
    other = [path for path, value in record["arrays"].items() if found[path] != value]
    return f"{', '.join(other[:3])}: another checksum" if other else None
