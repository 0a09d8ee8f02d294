"""The one impure loop: time, files, devices. ``fit`` trains what a ``Config`` says."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_resnetv2 import process, rundir, weights
from flax_resnetv2.checkpoint import Checkpointer
from flax_resnetv2.config import Config, check_config
from flax_resnetv2.data import IMAGE_SHAPES, Dataset, epoch_order, open_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import create_model
from flax_resnetv2.parallel import Run, add_up
from flax_resnetv2.preflight import memory_limit, needs, peak_flops
from flax_resnetv2.report import Reporter
from flax_resnetv2.tracing import Tracer, check_steps
from flax_resnetv2.training import Metrics, TrainState


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
    config, dataset = agree(config, workdir, devices)
    input_shape = config.augment.input_shape(dataset.image_shape)
    needed = needs(config.architecture, config.execution, input_shape)
    limit, peak = memory_limit(devices[0]), peak_flops(devices[0])
    needed.check(config.train.batch_size, len(devices), limit)
    process.touch_memory(needed.image_bytes * config.train.batch_size)
    rundir.make_directory(workdir)
    run = Run(config, dataset, devices)
    total = config.train.epochs * run.steps_per_epoch
    with Checkpointer(workdir / "checkpoints", config.keep_checkpoints) as checkpoints:
        if (step := checkpoints.latest()) is None:
            state = run.initial_state()
        else:
            state = checkpoints.restore(step, like=run.state_shapes())
        done = int(state.step)
        needed = needed.beside(state, dataset.splits)
        needed.check(config.train.batch_size, len(devices), limit)
        check_steps(profile, done, total)
        rundir.write_records(workdir, config, dataset, devices)
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
            report.say(needed.describe(config.train.batch_size, len(devices), limit))
            tracer = Tracer(profile, workdir / "profile")
            while done < total:
                epoch = done // run.steps_per_epoch
                state, done = _train_epoch(run, state, done, report, tracer)
                last = done == total
                if last or (epoch + 1) % config.evaluate_every == 0:
                    _evaluate_all(run, state, done, report)
                if last or (epoch + 1) % config.checkpoint_every == 0:
                    checkpoints.save(done, state)
            if "test" not in report.last:  # the lines of a finished run are gone
                _evaluate_all(run, state, done, report)
            return report.last["test"]


def _train_epoch(
    run: Run, state: TrainState, done: int, report: Reporter, tracer: Tracer
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
        tracer.before(done)
        steps = 1 if run.one_by_one else tracer.border(done, border) - done
        state, metrics = run.train(state, run.split("train"), order, jnp.int32(steps))
        report.dispatched()
        pending.append(metrics)
        done += steps
        if said := tracer.after(done, state):
            report.say(said)
        if done == border:
            sums = add_up(pending)
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


def _evaluate_all(run: Run, state: TrainState, done: int, report: Reporter) -> None:
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


def agree(
    config: Config, workdir: Path, devices: list[jax.Device]
) -> tuple[Config, Dataset]:
    """Everything that can be refused, cheapest first; the configuration filled in."""
    check_config(config)
    # Planned before anything is read, so that a mistake costs no waiting.
    shape = IMAGE_SHAPES.get(config.data.name)
    shape = shape and config.augment.input_shape(shape)
    create_model(config.architecture, config.execution, shape)
    _check_devices(config, len(devices))
    rundir.check_same(workdir, config)
    if config.weights is not None and not (workdir / "config.json").exists():
        try:
            weights.check_file(config.weights)
        except UsageError as error:
            raise UsageError(f"weights={error} by --weights FILE") from error
    dataset = open_dataset(config.data)
    return resolve(config, dataset), dataset


def resolve(config: Config, dataset: Dataset) -> Config:
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
        if config.weights is not None:
            known = weights.NORMALISATION
            mean, std = known.mean, known.std
        else:
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
