"""The compiled steps of a run over placed data: training, evaluation, initial state."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_resnetv2.data.batch import (
    Batch,
    Split,
    epoch_order,
    evaluation_order,
    gather_batch,
)
from flax_resnetv2.data.datasets import Dataset
from flax_resnetv2.data.streaming import EvaluationRow, TrainingRow, batches
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.model.weights import from_file
from flax_resnetv2.run.build import create_objective
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import StepCost, step_cost
from flax_resnetv2.run.placement import Placement, sum_on_host
from flax_resnetv2.training.augment import positions
from flax_resnetv2.training.evaluation import make_eval_step
from flax_resnetv2.training.objective import Metrics
from flax_resnetv2.training.optimizers import make_schedule
from flax_resnetv2.training.random_streams import initial_key
from flax_resnetv2.training.step import (
    TrainState,
    create_train_state,
    make_train_step,
    train_state_shapes,
)


class Trainer:
    """Everything a run holds besides its state: model, compiled steps, placed data.

    Args:
        config, dataset, model: as ``validate`` returns them.
        placement: the devices.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: ResNetV2 | Autoencoder,
        placement: Placement,
    ) -> None:
        train, axis = config.train, placement.axis
        self.config, self.dataset, self.placement = config, dataset, placement
        self.num_images = dataset.splits["train"].num_images
        self.steps_per_epoch = self.num_images // train.batch_size
        self.schedule = jax.jit(make_schedule(train, self.steps_per_epoch))
        self.streams = not dataset.in_memory()
        """Whether batches are read from disk."""
        on_cpu = placement.devices[0].platform == "cpu"
        self.one_by_one = self.streams or on_cpu
        """Dispatch single steps, because XLA's CPU convolutions are slow inside a loop.
        Otherwise one dispatch does all steps up to the next event."""
        # Evaluation pads its batches, so any number of devices divides them.
        self.eval_batch = -(-train.eval_batch_size // placement.count) * placement.count
        norm_axis = axis if train.sync_batch_norm else None
        execution = replace(model.execution, batch_norm_axis=norm_axis)
        self.model = model.clone(execution=execution)
        self._input_shape = config.augment.input_shape(dataset.image_shape)
        self._splits: dict[str, Split] = {}
        self._order: tuple[int, Any] = (-1, None)
        """An epoch, and its order on the devices."""
        self._reader: tuple[int, Any] = (-1, None)
        """The next step, and an iterator over the batches from there on."""
        steps = {"axis_name": axis, "objective": create_objective(config, model)}
        train_step = make_train_step(
            *(self.model, train, config.augment),
            seed=config.seed,
            steps_per_epoch=self.steps_per_epoch,
            **steps,
        )
        eval_step = make_eval_step(self.model, config.augment, **steps)
        if not self.streams:
            train_step = self._gather_train(train_step)
            eval_step = self._gather_eval(eval_step)
        self.train_step = placement.map(train_step, donate=True, sharded=self.streams)
        """Compiled: donates the state; takes a batch, or (split, order, steps)."""
        self._eval_step = placement.map(eval_step, sharded=self.streams)

    def close(self) -> None:
        """Stop reading batches ahead."""
        if self._reader[1] is not None:
            self._reader[1].close()
        self._reader = (-1, None)

    def train(
        self, state: TrainState, done: int, steps: int
    ) -> tuple[TrainState, Metrics]:
        """Train for some steps of one epoch.

        Args:
            state: donated.
            done: the value of ``state.step``, known without waiting for the device.
            steps: their number; 1 if ``one_by_one``.
        """
        if self.streams:
            return self.train_step(state, self._next_batch(done))
        order = self.order(done // self.steps_per_epoch)
        count = self.placement.replicate(jnp.int32(steps))
        return self.train_step(state, self.split("train"), order, count)

    def split(self, name: str) -> Split:
        """Return a split's arrays on the devices, placed once."""
        if name not in self._splits:
            self._splits[name] = self.placement.replicate(self.dataset.splits[name])
        return self._splits[name]

    def order(self, epoch: int) -> jax.Array:
        """Return the order of an epoch on the devices, computed once."""
        if self._order[0] != epoch:
            batch, seed = self.config.train.batch_size, self.config.seed
            order = epoch_order(self.num_images, batch, seed, epoch)
            self._order = epoch, self.placement.replicate(order)
        return self._order[1]

    def initial_state(self) -> TrainState:
        """Create the initial state from the seed, and from the run's ``weights``."""
        config, key, variables = self.config, initial_key(self.config.seed), None
        if config.weights is not None:
            variables = from_file(
                config.weights, self.model, classifier="leave", key=key
            )
        shape, steps = self._input_shape, self.steps_per_epoch
        return self.placement.replicate(
            create_train_state(self.model, config.train, key, shape, steps, variables)
        )

    def state_shapes(self) -> TrainState:
        """Return the state's shapes, dtypes and global sharding, without its arrays."""
        sharding = self.placement.global_sharding
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
            train_state_shapes(self.model, self.config.train, self._input_shape),
        )

    def cost(self) -> StepCost:
        """Predict what a step costs, with the state and data on each device."""
        parts = self.config.train.accumulation_steps
        cost = step_cost(self.model, self._input_shape, parts)
        return cost.plus_resident(self.state_shapes(), self.dataset.in_memory())

    def describe(self, state: TrainState) -> str:
        """Return one line about what is going to run."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        done, count = int(state.step), self.placement.count
        source = "read from disk" if self.streams else "in memory"
        platform = self.placement.devices[0].platform
        devices = f"{count} {platform} device{'s' * (count > 1)}"
        if (processes := jax.process_count()) > 1:
            devices += f" of {processes} processes"
        return (
            f"{self.dataset.name}: {self.num_images:,} training images {source}, "
            f"{parameters:,} parameters, {devices}"
            + (f"; resuming after step {done:,}" if done else "")
        )

    def evaluate(
        self, state: TrainState, name: str, stop: Callable[[], bool] = lambda: False
    ) -> Metrics | None:
        """Sum the metrics over a whole split; None if ``stop`` became true midway."""
        variables, found = state.variables(), []
        with closing(self._eval_batches(name)) as eval_batches:
            for batch in eval_batches:
                if stop():
                    return None
                found.append(self._eval_step(variables, *batch))
                # Stay at most two batches ahead of the devices, to notice ``stop``.
                jax.block_until_ready(found[-2:-1])
        return sum_on_host(found)

    def _next_batch(self, done: int) -> Batch:
        """Read the batch of the step after ``done``."""
        if self._reader[0] != done:
            self.close()
            train, split = self.config.train, self.dataset.splits["train"]
            scale = self.config.augment.crop_scale
            row = TrainingRow(split, train.batch_size, self.config.seed, scale)
            last = train.epochs * self.steps_per_epoch
            self._reader = done, self._read(row, train.batch_size, done, last)
        _, reader = self._reader
        rows = next(reader)
        self._reader = done + 1, reader
        return self.placement.shard(Batch(*rows))

    def _eval_batches(self, name: str) -> Iterator[tuple]:
        """Yield the arguments of each evaluation step."""
        split, batch = self.dataset.splits[name], self.eval_batch
        replicate = self.placement.replicate
        if not self.streams:
            order = evaluation_order(split.num_images, batch)
            placed = replicate(order)
            for start in range(0, len(order), batch):
                yield self.split(name), placed, replicate(jnp.int32(start))
            return
        row = EvaluationRow(split, self.config.augment.test_crop)
        last = -(-split.num_images // batch)
        with closing(self._read(row, batch, 0, last)) as reader:
            for rows in reader:
                yield (self.placement.shard(Batch(*rows)),)

    def _read(self, row: Callable, batch: int, first: int, last: int) -> Any:
        """Read this process's rows of the batches from ``first`` to ``last``."""
        processes = jax.process_count()
        part, workers = (jax.process_index(), processes), self.config.data.workers
        return batches(row, batch // processes, first, last, workers=workers, part=part)

    def _gather_train(self, step: Callable) -> Callable:
        """Make ``step`` gather its batches from memory, and repeat it."""
        batch_size, axis = self.config.train.batch_size, self.placement.axis
        share = batch_size // self.placement.count

        def one(state, split, order):
            first = state.step % self.steps_per_epoch * batch_size
            at = first + positions(share, axis)
            return step(state, gather_batch(split, order, at))

        def several(state, split, order, steps):
            def more(_, carry):
                state, sums = carry
                state, metrics = one(state, split, order)
                return state, jax.tree.map(jnp.add, sums, metrics)

            if self.one_by_one:
                return one(state, split, order)
            shapes = jax.eval_shape(one, state, split, order)[1]
            zeros = jax.tree.map(jnp.zeros_like, shapes)
            return lax.fori_loop(0, steps, more, (state, zeros))

        return several

    def _gather_eval(self, step: Callable) -> Callable:
        """Make ``step`` gather its batch from memory."""
        share, axis = self.eval_batch // self.placement.count, self.placement.axis

        def one(variables, split, order, start):
            at = start + positions(share, axis)
            return step(variables, gather_batch(split, order, at))

        return one
