"""Arrays and functions on the devices of a run: the only file with ``pmap``.

State and in-memory data are replicated, and each device gathers its share of every
batch (see ``augment.positions``). Streamed batches are sharded. Each of several
processes places arrays on its own devices; the mapped axis spans the devices of all.
"""

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
"""Name of the mapped axis."""
Executor = Literal["pmap", "jit"]
"""What runs a step on all devices: ``jax.pmap``, or ``jax.jit`` of ``shard_map`` over
arrays with a ``NamedSharding``. Both compute the same bits."""


class Placement:
    """Replicates and shards arrays over devices, and maps functions over them.

    Args:
        devices: local devices; with several processes, all of this process.
        executor: see ``Executor``.
    """

    def __init__(self, devices: list[jax.Device], executor: Executor = "pmap") -> None:
        self.devices, self.executor = devices, executor
        self.single_process = jax.process_count() == 1
        self.count = len(devices) * jax.process_count()
        """Number of devices of all processes."""
        self.axis = AXIS if self.count > 1 else None
        """The axis to sum over; None on a single device."""
        everyone = devices if self.single_process else jax.devices()
        self._mesh = Mesh(np.asarray(everyone), (AXIS,))
        here = Mesh(np.asarray(devices), (AXIS,))
        self.global_sharding = NamedSharding(self._mesh, PartitionSpec())
        """Replicated over the devices of all processes."""
        self._local_sharding = NamedSharding(here, PartitionSpec())
        self._batch_sharding = NamedSharding(
            self._mesh if executor == "jit" else here, PartitionSpec(AXIS)
        )

    def replicate(self, tree: Any) -> Any:
        """Copy arrays to every device, with the sharding that ``map`` returns."""
        tree = jax.device_put(tree, self._local_sharding)
        return self.as_global(tree) if self.executor == "jit" else tree

    def as_global(self, tree: Any) -> Any:
        """View replicated arrays as replicated over all processes, without a copy."""
        return _with_sharding(tree, self.global_sharding)

    def as_local(self, tree: Any) -> Any:
        """Undo ``as_global``: view arrays with the sharding of ``replicate``."""
        if self.executor == "jit":
            return tree
        return _with_sharding(tree, self._local_sharding)

    def shard(self, tree: Any) -> Any:
        """Split the rows [B, ...] of host arrays evenly over the devices."""

        def put(x: np.ndarray) -> jax.Array:
            if self.executor == "jit":
                return jax.make_array_from_process_local_data(self._batch_sharding, x)
            count = len(self.devices)
            x = x.reshape(count, len(x) // count, *x.shape[1:])
            return jax.device_put(x, self._batch_sharding)

        return jax.tree.map(put, tree)

    def map(
        self, function: Callable, donate: bool = False, sharded: bool = False
    ) -> Callable:
        """Compile ``function(first, *rest)`` to run on all devices at once.

        Args:
            function: pure; its results must be equal on all devices.
            donate: let the compiled function reuse the memory of ``first``.
            sharded: whether the rest is sharded, or replicated like ``first``.
        """
        if self.executor == "jit":
            whole = PartitionSpec()
            mapped = jax.shard_map(
                lambda first, rest: function(first, *rest),
                mesh=self._mesh,
                in_specs=(whole, PartitionSpec(AXIS) if sharded else whole),
                out_specs=whole,
                check_vma=False,  # like pmap, which does not check that outputs agree
            )
            mapped = jax.jit(mapped, donate_argnums=(0,) if donate else ())
            return lambda first, *rest: mapped(first, rest)
        mapped = jax.pmap(
            # pmap needs one argument with a mapped axis, hence the device's number.
            lambda number, first, rest: function(first, *rest),
            axis_name=AXIS,
            in_axes=(0, None, 0 if sharded else None),
            out_axes=None,
            devices=self.devices if self.single_process else None,
            donate_argnums=(1,) if donate else (),
        )
        numbers = np.arange(len(self.devices))
        return lambda first, *rest: mapped(numbers, first, rest)


def sum_on_host(metrics: list[Any], before: Any = None) -> Any:
    """Sum trees of device scalars on the host, in float64; waits for the devices.

    Adds one tree after the other to ``before``, so that a run that was interrupted
    between two of them gets the same bits.
    """
    return jax.tree.map(
        lambda *leaves: reduce(operator.add, map(float, leaves)),
        *([] if before is None else [before]),
        *jax.device_get(metrics),
    )


def _with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    """View replicated arrays under another sharding of the same copies."""
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shard.data for shard in x.addressable_shards]
        ),
        tree,
    )
