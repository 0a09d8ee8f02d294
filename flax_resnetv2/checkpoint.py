"""Checkpoints of a training state, through orbax.

>>> with Checkpointer("runs/a/checkpoints", keep=2) as checkpoints:
...     checkpoints.save(390, state)
...     state = checkpoints.restore(checkpoints.latest(), like=state)
"""

from pathlib import Path
from typing import Any

import jax


class Checkpointer:
    """Saves whole states by step and gives them back; keeps the newest ``keep``.

    Saving is asynchronous and atomic: a checkpoint is listed when it is complete.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        """Use ``directory``, making it where it does not exist."""
        # Imported here: it costs a third of a second, and evaluation needs none of it.
        import orbax.checkpoint as ocp

        self._args = ocp.args
        self._manager = ocp.CheckpointManager(
            Path(directory).absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint; None: there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to save ``state``; it may be used and given away at once."""
        self._manager.save(step, args=self._args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """Read the state of ``step``, each array shaped and placed as in ``like``.

        Args:
            step: one that was saved.
            like: a state of arrays, or of ``jax.ShapeDtypeStruct`` with shardings.
        """
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        return self._manager.restore(step, args=self._args.StandardRestore(target))

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.close()
