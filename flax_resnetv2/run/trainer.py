"""A run on its devices: the one place with ``pmap``.

The state is whole on every device, and so is a data set in memory: each device takes
its share of every batch (see ``augment.positions``). Of a data set that is streamed
each device is given its share. Of many processes each places them on its own devices,
and the mapped axis goes over the devices of all.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnetv2.data.datasets import (
    Dataset,
    Split,
    epoch_order,
    evaluation_order,
    fetch,
)
from flax_resnetv2.data.streaming import EvaluationRow, Row, TrainingRow, batches
from flax_resnetv2.model.weights import from_file
from flax_resnetv2.run.build import create_net, create_objective
from flax_resnetv2.run.config import Config
from flax_resnetv2.training.augment import Batch, positions
from flax_resnetv2.training.optimizers import make_schedule
from flax_resnetv2.training.step import (
    Metrics,
    TrainState,
    create_train_state,
    make_eval_step,
    make_train_step,
    train_state_shapes,
)

AXIS = "devices"
"""The mapped axis."""
Executor = Literal["pmap", "jit"]
"""What maps a step over the devices: ``jax.pmap``, or ``jax.jit`` of ``shard_map`` over
arrays with a ``NamedSharding``. Both compute the same."""


class Run:
    """What a run holds besides its state: model, compiled steps, placed data.

    Args:
        config, dataset: what is run.
        devices: local ones; of many processes each gives all of its own.
        executor: see ``Executor``.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        devices: list[jax.Device],
        executor: Executor = "pmap",
    ) -> None:
        train = config.train
        self.config, self.dataset, self.devices = config, dataset, devices
        self.executor = executor
        self.count = len(devices) * jax.process_count()
        """Devices of all processes."""
        self.images = dataset.splits["train"].images
        self.steps_per_epoch = self.images // train.batch_size
        self.schedule = jax.jit(make_schedule(train, self.steps_per_epoch))
        self.streams = not dataset.in_memory()
        """Whether batches come from disk."""
        self.one_by_one = self.streams or devices[0].platform == "cpu"
        """XLA's CPU convolutions take a slow path inside a loop; elsewhere one
        dispatch runs all steps up to the next line of metrics."""
        # Evaluation fills its batches up, so any device count divides them.
        self.eval_batch = -(-train.eval_batch_size // self.count) * self.count
        self.axis = AXIS if self.count > 1 else None
        """What is summed over; one device has nobody to sum with."""
        self.model = create_net(
            config, dataset.image_shape, self.axis if train.sync_batch_norm else None
        )
        self.objective = create_objective(config, self.model)
        everyone = devices if jax.process_count() == 1 else jax.devices()
        self._mesh = Mesh(np.asarray(everyone), (AXIS,))
        here = Mesh(np.asarray(devices), (AXIS,))
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._here = NamedSharding(here, PartitionSpec())
        self._shared = NamedSharding(
            self._mesh if executor == "jit" else here, PartitionSpec(AXIS)
        )
        self._splits: dict[str, Split] = {}
        self._order: tuple[int, Any] = (-1, None)
        self._reader: tuple[int, Any] = (-1, None)
        """The next step, and the batches from there on."""
        train_step, eval_step = self._train_step(), self._eval_step()
        if not self.streams:
            train_step, eval_step = self._chunk(train_step), self._gather(eval_step)
        self.train_step = self.parallel(train_step, donate=True, shared=self.streams)
        """Of the state (given away) and a batch, or a split, an order and a number of
        steps."""
        self._eval = self.parallel(eval_step, shared=self.streams)

    def close(self) -> None:
        """End what reads ahead."""
        if self._reader[1] is not None:
            self._reader[1].close()
        self._reader = (-1, None)

    def train(
        self, state: TrainState, done: int, steps: int
    ) -> tuple[TrainState, Metrics]:
        """Train for some steps after step ``done``, of one epoch.

        Args:
            state: is given away.
            done: equal to ``state.step``, without waiting for it.
            steps: 1 where steps go ``one_by_one``.
        """
        if self.streams:
            return self.train_step(state, self._next(done))
        order = self.order(done // self.steps_per_epoch)
        at = self.place(jnp.int32(steps))
        return self.train_step(state, self.split("train"), order, at)

    def place(self, tree: Any) -> Any:
        """Put arrays whole on every device, as the executor gives them back."""
        tree = jax.device_put(tree, self._here)
        return self.everywhere(tree) if self.executor == "jit" else tree

    def everywhere(self, tree: Any) -> Any:
        """The same arrays, known as lying on the devices of all processes; no copy."""
        return _assemble(tree, self._everywhere)

    def as_placed(self, tree: Any) -> Any:
        """The way back from ``everywhere``."""
        return tree if self.executor == "jit" else _assemble(tree, self._here)

    def share(self, rows: Row) -> Batch:
        """Put rows of a batch on the devices, as many on each."""

        def put(rows: np.ndarray) -> jax.Array:
            if self.executor == "jit":
                return jax.make_array_from_process_local_data(self._shared, rows)
            count = len(self.devices)
            rows = rows.reshape(count, len(rows) // count, *rows.shape[1:])
            return jax.device_put(rows, self._shared)

        return jax.tree.map(put, Batch(*rows))

    def split(self, name: str) -> Split:
        """The arrays of a split on the devices, placed once."""
        if name not in self._splits:
            self._splits[name] = self.place(self.dataset.splits[name])
        return self._splits[name]

    def order(self, epoch: int) -> jax.Array:
        """The order of an epoch on the devices, computed once."""
        if self._order[0] != epoch:
            batch, seed = self.config.train.batch_size, self.config.seed
            placed = self.place(epoch_order(self.images, batch, seed, epoch))
            self._order = epoch, placed
        return self._order[1]

    def initial_state(self) -> TrainState:
        """Initial state, from the seed and the weights that the run starts from."""
        key, variables = jax.random.key(self.config.seed), None
        if self.config.weights is not None:
            variables = from_file(
                self.config.weights, self.model, classifier="leave", key=key
            )
        return self.place(
            create_train_state(
                self.model,
                self.config.train,
                key,
                self.config.augment.input_shape(self.dataset.image_shape),
                self.steps_per_epoch,
                variables,
            )
        )

    def state_shapes(self) -> TrainState:
        """What a state consists of, lying everywhere, without its numbers."""
        shape = self.config.augment.input_shape(self.dataset.image_shape)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=self._everywhere),
            train_state_shapes(self.model, self.config.train, shape),
        )

    def describe(self, state: TrainState) -> str:
        """Say in one line what is about to run."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        done, count = int(state.step), self.count
        many = jax.process_count()
        return (
            f"{self.dataset.name}: {self.images:,} training images "
            + ("read from disk" if self.streams else "in memory")
            + f", {parameters:,} "
            f"parameters, {count} {self.devices[0].platform} "
            + ("device" if count == 1 else "devices")
            + (f" of {many} processes" if many > 1 else "")
            + (f"; going on after step {done:,}" if done else "")
        )

    def evaluate(
        self, state: TrainState, name: str, stop: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """Sums over a whole split; None: ``stop`` became true on the way."""
        variables, found = state.variables(), []
        with closing(self._batches(name)) as all_of_it:
            for batch in all_of_it:
                if stop():
                    return None
                found.append(self._eval(variables, *batch))
                # No further ahead of the devices, or ``stop`` would come late.
                jax.block_until_ready(found[-2:-1])
        return add_up(found)

    def parallel(
        self, function: Callable, donate: bool = False, shared: bool = False
    ) -> Callable:
        """The seam: run ``function(first, *rest)`` on all devices at once.

        Arguments and results are whole on every device; ``first`` may be given away,
        and the rest may be ``shared``: a device is given its rows.
        """
        if self.executor == "jit":
            whole = PartitionSpec()
            mapped = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(whole, PartitionSpec(AXIS)) if shared else whole,
                out_specs=whole,
                check_vma=False,  # as pmap: sums make the results equal
            )
            return jax.jit(mapped, donate_argnums=(0,) if donate else ())
        mapped = jax.pmap(
            # pmap wants one argument with a mapped axis: each device gets its number.
            lambda number, first, rest: function(first, *rest),
            axis_name=AXIS,
            in_axes=(0, None, 0 if shared else None),
            out_axes=None,
            devices=self.devices if jax.process_count() == 1 else None,
            donate_argnums=(1,) if donate else (),
        )
        numbers = np.arange(len(self.devices))
        return lambda first, *rest: mapped(numbers, first, rest)

    def _next(self, done: int) -> Batch:
        """The batch of the step after ``done``."""
        if self._reader[0] != done:
            self.close()
            train, augment = self.config.train, self.config.augment
            records = self.dataset.splits["train"]
            row = TrainingRow(
                records, train.batch_size, self.config.seed, augment.crop_scale
            )
            last = train.epochs * self.steps_per_epoch
            self._reader = done, self._read(row, train.batch_size, done, last)
        _, reader = self._reader
        rows = next(reader)
        self._reader = done + 1, reader
        return self.share(rows)

    def _batches(self, name: str) -> Iterator[tuple]:
        """What one evaluation step after the other takes."""
        split, batch = self.dataset.splits[name], self.eval_batch
        if not self.streams:
            order = evaluation_order(split.images, batch)
            placed = self.place(order)
            for start in range(0, len(order), batch):
                yield self.split(name), placed, self.place(jnp.int32(start))
            return
        row = EvaluationRow(split, self.config.augment.test_crop)
        with closing(self._read(row, batch, 0, -(-split.images // batch))) as reader:
            for rows in reader:
                yield (self.share(rows),)

    def _read(self, row: Callable, batch: int, first: int, last: int) -> Any:
        processes = jax.process_count()
        return batches(
            row,
            batch // processes,
            first,
            last,
            workers=self.config.data.workers,
            part=(jax.process_index(), processes),
        )

    def _train_step(self) -> Callable:
        config = self.config
        return make_train_step(
            self.model,
            config.train,
            config.augment,
            seed=config.seed,
            steps_per_epoch=self.steps_per_epoch,
            axis_name=self.axis,
            objective=self.objective,
        )

    def _chunk(self, step: Callable) -> Callable:
        """``step`` on images in memory, as many times as is said."""
        batch_size = self.config.train.batch_size

        def chunk(state, split, order, steps):
            def one(state):
                first = state.step % self.steps_per_epoch * batch_size
                share = batch_size // self.count
                places = first + positions(share, self.axis)
                return step(state, fetch(split, order, places))

            def more(_, carry):
                state, sums = carry
                state, metrics = one(state)
                return state, jax.tree.map(jnp.add, sums, metrics)

            if self.one_by_one:
                return one(state)
            shapes = jax.eval_shape(one, state)[1]
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            return lax.fori_loop(0, steps, more, (state, zeros))

        return chunk

    def _eval_step(self) -> Callable:
        return make_eval_step(
            self.model,
            self.config.augment,
            axis_name=self.axis,
            objective=self.objective,
        )

    def _gather(self, step: Callable) -> Callable:
        """``step`` on images in memory."""
        share = self.eval_batch // self.count

        def one(variables, split, order, start):
            places = start + positions(share, self.axis)
            return step(variables, fetch(split, order, places))

        return one


def add_up(metrics: list[Metrics], before: Metrics | None = None) -> Metrics:
    """Sum trees of device numbers on the host, in float64: the one place that waits.

    One after the other, and after ``before``: a run that was stopped between two of
    them gives the same bits.
    """
    return jax.tree.map(
        lambda *leaves: reduce(operator.add, map(float, leaves)),
        *([] if before is None else [before]),
        *jax.device_get(metrics),
    )


def one_of_all(flag: bool) -> bool:
    """Whether ``flag`` is true in any process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def the_first_says(flag: bool) -> bool:
    """What ``flag`` is in the first process; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))


def _assemble(tree: Any, sharding: NamedSharding) -> Any:
    """Replicated arrays under another sharding of the same copies."""
    return jax.tree.map(
        lambda x: jax.make_array_from_single_device_arrays(
            x.shape, sharding, [shard.data for shard in x.addressable_shards]
        ),
        tree,
    )
