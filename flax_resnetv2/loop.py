"""The one impure loop: time, files, devices. ``fit`` trains what a ``Config`` says.

The only module that knows ``pmap``. State and data set are whole on every device; each
device takes its share of every batch (see ``data.positions``).
"""

import contextlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnetv2.augment import positions
from flax_resnetv2.checkpoint import Checkpointer
from flax_resnetv2.config import Config, check_config, differences, load_config, to_json
from flax_resnetv2.data import (
    IMAGE_SHAPES,
    Dataset,
    Split,
    epoch_order,
    evaluation_order,
    fetch,
    open_dataset,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import ResNetV2, create_model
from flax_resnetv2.preflight import (
    Needs,
    amount,
    memory_limit,
    needs,
    peak_flops,
)
from flax_resnetv2.report import Reporter
from flax_resnetv2.training import (
    Metrics,
    TrainState,
    create_train_state,
    make_eval_step,
    make_schedule,
    make_train_step,
)

AXIS = "devices"


def fit(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    profile: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Train as ``config`` says, or go on where ``workdir`` stands.

    Args:
        config: the run.
        workdir: receives ``config.json``, ``dataset.json``, ``environment.json``,
            ``metrics.jsonl`` and ``checkpoints/``.
        devices: which local devices share the work; None: all.
        profile: (first, end): ``workdir/profile`` receives a trace of the steps from
            first up to, but without, end.

    Returns:
        The last evaluation on "test": ``loss``, ``accuracy``, ``count``.

    Raises:
        UsageError: the configuration, the data set and the devices do not fit
            together, the devices' memory cannot hold the run, or ``workdir`` holds a
            run of another configuration.
        RunError: the data set could not be had.
    """
    began, workdir = time.perf_counter(), Path(workdir)
    devices = list(devices or jax.local_devices())
    config, dataset = _agree(config, workdir, devices)
    _write_records(config, dataset, workdir, devices)
    run = _Run(config, dataset, devices)
    total = config.train.epochs * run.steps_per_epoch
    with Checkpointer(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        state = run.initial_state()
        if (step := checkpoints.latest()) is not None:
            state = checkpoints.restore(step, like=state)
        done = int(state.step)
        _check_profile(profile, done, total)
        needed = run.needs(state)
        needed.check(config.train.batch_size, len(devices), memory_limit(devices[0]))
        peak = peak_flops(devices[0])
        with Reporter(
            workdir,
            began,
            total,
            done,
            config.train.batch_size,
            flops=needed.flops,
            peak=peak and peak * len(devices),
        ) as report:
            report.say(f"{workdir}: {run.describe(state)}")
            report.say(run.describe_needs(needed))
            tracer = _Tracer(profile, workdir / "profile", report)
            while done < total:
                epoch = done // run.steps_per_epoch
                state, done = _train_epoch(run, state, done, report, tracer)
                last = done == total
                if last or (epoch + 1) % config.evaluate_every == 0:
                    _evaluate_all(run, state, done, report)
                if last or (epoch + 1) % config.checkpoint_every == 0:
                    checkpoints.save(done, state)
            return report.last["test"]


def _train_epoch(
    run: "_Run", state: TrainState, done: int, report: Reporter, tracer: "_Tracer"
) -> tuple[TrainState, int]:
    """Train to the end of the epoch that step ``done`` begins or stands in."""
    config, per_epoch = run.config, run.steps_per_epoch
    epoch = done // per_epoch
    order = run.place(
        epoch_order(run.images, config.train.batch_size, config.seed, epoch)
    )
    pending: list[Metrics] = []
    while done < (epoch + 1) * per_epoch:
        border = min(
            (done // config.log_every + 1) * config.log_every, (epoch + 1) * per_epoch
        )
        tracer.at(done)
        steps = 1 if run.one_by_one else tracer.border(done, border) - done
        state, metrics = run.train(state, run.split("train"), order, jnp.int32(steps))
        pending.append(metrics)
        done += steps
        tracer.until(done, state)
        if done == border:
            sums = _add_up(pending)
            pending = []
            norms = sums.pop("gradient_norm")
            report.training(
                done,
                done / per_epoch,
                sums,
                learning_rate=float(run.schedule(done - 1)),
                gradient_norm={k: float(v / sums["steps"]) for k, v in norms.items()},
            )
        else:
            report.progress(done)
    return state, done


class _Tracer:
    """Writes a trace of some steps with ``jax.profiler``."""

    def __init__(
        self, steps: tuple[int, int] | None, directory: Path, report: Reporter
    ) -> None:
        self._first, self._end = steps or (-1, -1)
        self._directory, self._report, self._running = directory, report, False

    def border(self, done: int, border: int) -> int:
        """The end of the chunk that begins at ``done``, at ``border`` at the latest."""
        ahead = [step for step in (self._first, self._end) if step > done]
        return min([border, *ahead])

    def at(self, done: int) -> None:
        """Begin, if the step after ``done`` steps is the first to be seen."""
        if done == self._first:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def until(self, done: int, state: TrainState) -> None:
        """End, if ``done`` steps are the last to be seen."""
        if done == self._end and self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            self._report.say(
                f"trace of the steps from {self._first} to {done - 1} in "
                f"{self._directory}: open its .trace.json.gz with ui.perfetto.dev"
            )


def _check_profile(profile: tuple[int, int] | None, done: int, total: int) -> None:
    if profile is not None and not done <= profile[0] < profile[1] <= total:
        first, end = profile
        raise UsageError(
            f"profile={first}:{end} must be FIRST:END with {done} <= FIRST < END <= "
            f"{total}, the steps that this run has before it; choose for example "
            f"{min(done + 20, total - 1)}:{min(done + 30, total)}"
        )


def _evaluate_all(run: "_Run", state: TrainState, done: int, report: Reporter) -> None:
    """Evaluate every split but the training one, each image once."""
    for name in ("validation", "test"):
        if name in run.dataset.splits:
            sums = run.evaluate(state, name)
            ratios = sums.pop("residual_ratio")
            report.evaluation(
                name,
                done,
                done / run.steps_per_epoch,
                sums,
                residual_ratio={
                    stack: [
                        float(units[f"unit{k}"] / sums["count"])
                        for k in range(1, len(units) + 1)
                    ]
                    for stack, units in ratios.items()
                },
            )


class _Run:
    """What a run holds besides its state: model, compiled steps, placed data."""

    def __init__(
        self, config: Config, dataset: Dataset, devices: list[jax.Device]
    ) -> None:
        train = config.train
        self.config, self.dataset, self.devices = config, dataset, devices
        self.images = len(dataset.splits["train"].label)
        self.steps_per_epoch = self.images // train.batch_size
        self.schedule = jax.jit(make_schedule(train, self.steps_per_epoch))
        self.one_by_one = devices[0].platform == "cpu"
        """XLA's CPU convolutions take a slow path inside a loop; elsewhere one
        dispatch runs all steps up to the next line of metrics."""
        # Evaluation fills its batches up, so any device count divides them.
        self.eval_batch = -(-train.eval_batch_size // len(devices)) * len(devices)
        self.axis = AXIS if len(devices) > 1 else None
        """What is summed over; one device has nobody to sum with."""
        self.model = _model(config, dataset, self.axis)
        self._replicated = NamedSharding(
            Mesh(np.asarray(devices), (AXIS,)), PartitionSpec()
        )
        self._splits: dict[str, Split] = {}
        self.train = self._parallel(self._train_chunk(), donate=True)
        self._eval = self._parallel(self._eval_batch())

    def place(self, tree: Any) -> Any:
        """Put arrays whole on every device, as ``pmap`` gives them back."""
        return jax.device_put(tree, self._replicated)

    def split(self, name: str) -> Split:
        """The arrays of a split on the devices, placed once."""
        if name not in self._splits:
            self._splits[name] = self.place(self.dataset.splits[name])
        return self._splits[name]

    def initial_state(self) -> TrainState:
        """Initial state from the seed."""
        return self.place(
            create_train_state(
                self.model,
                self.config.train,
                jax.random.key(self.config.seed),
                self.dataset.image_shape,
                self.steps_per_epoch,
            )
        )

    def describe(self, state: TrainState) -> str:
        """Say in one line what is about to run."""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        done, count = int(state.step), len(self.devices)
        return (
            f"{self.dataset.name}: {self.images:,} training images, {parameters:,} "
            f"parameters, {count} {self.devices[0].platform} "
            + ("device" if count == 1 else "devices")
            + (f"; going on after step {done:,}" if done else "")
        )

    def needs(self, state: TrainState) -> Needs:
        """What a step takes of a device."""
        splits = self.dataset.splits.values()
        return needs(
            self.config.architecture,
            self.config.execution,
            self.dataset.image_shape,
            state_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            data_bytes=sum(array.nbytes for split in splits for array in split),
        )

    def describe_needs(self, needed: Needs) -> str:
        """Say in one line what a step takes."""
        share = self.config.train.batch_size // len(self.devices)
        limit = memory_limit(self.devices[0])
        flops = needed.flops * self.config.train.batch_size
        return (
            f"a step: {amount(flops, 'FLOP')}, at least "
            f"{amount(needed.bytes(share), 'B')} of memory on each device"
            + (f", which has {amount(limit, 'B')}" if limit else "")
        )

    def evaluate(self, state: TrainState, name: str) -> Metrics:
        """Sums over a whole split."""
        split = self.split(name)
        order = evaluation_order(len(split.label), self.eval_batch)
        placed, variables = self.place(order), state.variables()
        return _add_up(
            [
                self._eval(variables, split, placed, jnp.int32(start))
                for start in range(0, len(order), self.eval_batch)
            ]
        )

    def _parallel(self, function: Callable, donate: bool = False) -> Callable:
        """The seam: run ``function(first, *rest)`` on all devices at once.

        Arguments and results are whole on every device; ``first`` may be given away.
        """
        mapped = jax.pmap(
            # pmap wants one argument with a mapped axis: each device gets its number.
            lambda number, first, rest: function(first, *rest),
            axis_name=AXIS,
            in_axes=(0, None, None),
            out_axes=None,
            devices=self.devices,
            donate_argnums=(1,) if donate else (),
        )
        numbers = np.arange(len(self.devices))
        return lambda first, *rest: mapped(numbers, first, rest)

    def _train_chunk(self) -> Callable:
        config = self.config
        share = config.train.batch_size // len(self.devices)
        step = make_train_step(
            self.model,
            config.train,
            config.augment,
            seed=config.seed,
            steps_per_epoch=self.steps_per_epoch,
            axis_name=self.axis,
        )

        def chunk(state, split, order, steps):
            def one(state):
                first = state.step % self.steps_per_epoch * config.train.batch_size
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

    def _eval_batch(self) -> Callable:
        step = make_eval_step(self.model, self.config.augment, axis_name=self.axis)
        share = self.eval_batch // len(self.devices)

        def one(variables, split, order, start):
            places = start + positions(share, self.axis)
            return step(variables, fetch(split, order, places))

        return one


def _model(config: Config, dataset: Dataset, axis: str | None) -> ResNetV2:
    axis = axis if config.train.sync_batch_norm else None
    execution = replace(config.execution, batch_norm_axis=axis)
    return create_model(config.architecture, execution, dataset.image_shape)


def _add_up(metrics: list[Metrics]) -> Metrics:
    """Sum trees of device numbers on the host, in float64: the one place that waits."""
    return jax.tree.map(
        lambda *leaves: np.asarray(leaves, np.float64).sum(), *jax.device_get(metrics)
    )


def _agree(
    config: Config, workdir: Path, devices: list[jax.Device]
) -> tuple[Config, Dataset]:
    """Everything that can be refused, cheapest first; the configuration filled in."""
    check_config(config)
    # Planned before anything is read, so that a mistake costs no waiting.
    create_model(
        config.architecture, config.execution, IMAGE_SHAPES.get(config.data.name)
    )
    _check_devices(config, len(devices))
    if (workdir / "config.json").exists():
        _check_same(load_config(workdir), config, workdir)
    dataset = open_dataset(config.data)
    return _resolve(config, dataset), dataset


def _resolve(config: Config, dataset: Dataset) -> Config:
    """Fill in what only the data set knows, and check that the two fit."""
    classes, asked = len(dataset.class_names), config.architecture.num_classes
    if classes != asked:
        raise UsageError(
            f"architecture.num_classes={asked}, but {dataset.name} has {classes} "
            f"classes; set --architecture.num_classes {classes}"
        )
    images, batch = len(dataset.splits["train"].label), config.train.batch_size
    if batch > images:
        raise UsageError(
            f"train.batch_size={batch} is more than the {images} training images of "
            f"{dataset.name}; choose one from 1 to {images}"
        )
    if config.augment.mean is None:
        mean, std = dataset.channel_statistics()
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
    return config


def _check_devices(config: Config, count: int) -> None:
    batch = config.train.batch_size
    if batch % count:
        below, above = batch // count * count, (batch // count + 1) * count
        choices = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"train.batch_size={batch} cannot be shared equally by {count} devices; "
            f"choose a multiple of {count}, as {choices}"
        )


def _check_same(old: Config, new: Config, workdir: Path) -> None:
    """A run goes on only as itself; None means "as the data set says" and is equal."""
    if new.augment.mean is None:
        new = replace(
            new,
            augment=replace(new.augment, mean=old.augment.mean, std=old.augment.std),
        )
    if changed := differences(old, new):
        raise UsageError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give the same flags to go on with it, or another --workdir"
        )


def _write_records(
    config: Config, dataset: Dataset, workdir: Path, devices: list[jax.Device]
) -> None:
    """Write what a run is: its configuration, its data set, its environment."""
    facts = {
        "name": dataset.name,
        "image_shape": dataset.image_shape,
        "class_names": dataset.class_names,
        "images": {name: len(s.label) for name, s in dataset.splits.items()},
    }
    records = {
        "config.json": to_json(config),
        "dataset.json": json.dumps(facts, indent=2) + "\n",
        "environment.json": json.dumps(_environment(devices), indent=2) + "\n",
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in records.items():
            (workdir / name).write_text(text)
    except OSError as error:
        raise UsageError(
            f"workdir={workdir} cannot be written ({error.strerror}); choose another "
            "--workdir"
        ) from error


def _environment(devices: list[jax.Device]) -> dict[str, Any]:
    """Commit, versions and devices."""
    commit = None
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {
        "commit": commit or None,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "machine": platform.machine(),
    }
