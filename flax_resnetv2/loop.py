"""The one impure loop: time, files, devices. ``fit`` trains what a ``Config`` says."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_resnetv2 import process, rundir, weights
from flax_resnetv2.checkpoint import Checkpointer
from flax_resnetv2.config import Config, check_config
from flax_resnetv2.data import IMAGE_SHAPES, Dataset, open_dataset
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.model import create_model
from flax_resnetv2.parallel import Executor, Run, add_up, one_of_all
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
    executor: Executor = "pmap",
) -> dict[str, float]:
    """Train as ``config`` says, or go on where ``workdir`` stands.

    Of many processes (``jax.distributed``) all call it with the same arguments, on a
    directory that all see; the first writes what is written once.

    Args:
        config: the run.
        workdir: receives ``config.json``, ``dataset.json``, ``environment.json``,
            ``metrics.jsonl`` and ``checkpoints/``.
        devices: which local devices share the work; None: all.
        profile: (first, end): ``workdir/profile`` receives a trace of the steps from
            first up to, but without, end.
        executor: what maps a step over the devices, "pmap" or "jit".

    Returns:
        The last evaluation on "test": ``loss``, ``accuracy``, ``count``.

    Raises:
        UsageError: the configuration, the data set and the devices do not fit
            together, the devices' memory cannot hold the run, or ``workdir`` holds a
            run of another configuration, or is in use.
        RunError: the data set could not be had, the loss is not finite, a file cannot
            be written, or another process is gone.
        Stopped: SIGTERM or SIGINT came; the same call goes on.
    """
    began, workdir = time.perf_counter(), Path(workdir)
    devices = list(devices or jax.local_devices())
    batch, count = config.train.batch_size, len(devices) * jax.process_count()
    config, dataset = agree(config, workdir, count)
    input_shape = config.augment.input_shape(dataset.image_shape)
    needed = needs(config.architecture, config.execution, input_shape)
    limit, peak = memory_limit(devices[0]), peak_flops(devices[0])
    needed.check(batch, count, limit)
    process.touch_memory(needed.image_bytes * batch)
    run = Run(config, dataset, devices, executor)
    needed = needed.beside(run.state_shapes(), dataset.splits)
    needed.check(batch, count, limit)
    begun, total = rundir.has_begun(workdir), config.train.epochs * run.steps_per_epoch
    if not begun:
        # Whatever can be refused is refused before there is a directory.
        check_steps(profile, 0, total)
        state, done, window = run.initial_state(), 0, _Window()
    first = jax.process_index() == 0
    rundir.make_directory(workdir)
    with (
        rundir.locked(workdir) if first else contextlib.nullcontext(),
        _explained(workdir),
        # Around the checkpoints: a signal does not cut the last one off.
        process.Stop() as stop,
        Checkpointer(workdir / "checkpoints", config.keep_checkpoints) as checkpoints,
    ):
        changed = rundir.check_same(workdir, config)
        if begun:
            found = checkpoints.restore_newest(like=run.state_shapes())
            if found is None:
                state, done, window = run.initial_state(), 0, _Window()
            else:
                done, state, notes = found
                state, window = run.as_placed(state), _Window(notes["metrics"])
            check_steps(profile, done, total)
        if first:
            rundir.write_records(workdir, config, dataset, devices, done)
        with Reporter(
            workdir,
            began,
            total,
            done,
            batch,
            flops=needed.flops,
            peak=peak and peak * count,
            silent=not first,
        ) as report:
            report.say(f"{workdir}: {run.describe(state)}")
            for change in changed:
                report.say(f"changed: {change}")
            report.say(needed.describe(batch, count, limit))
            tracer = Tracer(profile, workdir / "profile")
            _train(run, state, window, checkpoints, report, tracer, stop)
            return report.last["test"]


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    """Say what the system, XLA or another process's end did to a run."""
    try:
        yield
    except OSError as error:  # the data are in memory: only the run's files are left
        raise RunError(
            f"{error.filename or workdir} cannot be written ({error.strerror}); the "
            f"newest checkpoint in {workdir} is whole; make room, and give the same "
            "command to go on from there"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise RunError(
                f"the devices' memory is too small for this run ({reason}); give a "
                "smaller --train.batch-size or --train.eval-batch-size, or "
                "--execution.remat units, in another --workdir"
            ) from error
        if jax.process_count() > 1:
            raise RunError(
                f"another process of this run is gone ({reason}); start all of them "
                "again, and they go on from the newest checkpoint"
            ) from error
        raise


@dataclass
class _Window:
    """Training metrics since the last line of the log."""

    sums: Metrics | None = None
    """On the host."""
    pending: list[Metrics] = field(default_factory=list)
    """On the devices."""

    def add(self, metrics: Metrics) -> None:
        self.pending.append(metrics)
        # No further ahead of the devices: a signal or an error would come late.
        jax.block_until_ready(self.pending[-2:-1])

    def total(self) -> Metrics | None:
        """Everything on the host; this waits for the devices."""
        if self.pending:
            self.sums, self.pending = add_up(self.pending, self.sums), []
        return self.sums


def _train(
    run: Run,
    state: TrainState,
    window: _Window,
    checkpoints: Checkpointer,
    report: Reporter,
    tracer: Tracer,
    stop: process.Stop,
) -> None:
    """Go from ``state`` to the end of the run.

    What is due after a step depends on the step and on what is there already, so that a
    run that goes on makes up for what the one before it could not do any more.
    """
    config, per_epoch = run.config, run.steps_per_epoch
    total, done = config.train.epochs * per_epoch, int(state.step)

    def due(every: int) -> bool:
        epoch, rest = divmod(done, per_epoch)
        return done == total or (done > 0 and rest == 0 and epoch % every == 0)

    while True:
        stopping = one_of_all(stop.asked is not None)
        if not stopping and due(config.evaluate_every):
            stopping = not _evaluate_all(run, state, done, report, checkpoints, stop)
        if stopping or due(config.checkpoint_every) or _inside(done, config):
            _save(run, state, done, window, checkpoints, report)
        if stopping:
            checkpoints.wait()
            raise Stopped(
                f"asked to ({stop.asked or 'another process'}) after step {done:,} of "
                f"{total:,}; all is saved, and the same command goes on"
            )
        if done == total:
            return
        border = _border(done, config, per_epoch)
        tracer.before(done)
        steps = 1 if run.one_by_one else tracer.border(done, border) - done
        state, metrics = run.train(
            state,
            run.split("train"),
            run.order(done // per_epoch),
            run.place(jnp.int32(steps)),
        )
        report.dispatched()
        stop.listen()
        window.add(metrics)
        done += steps
        if said := tracer.after(done, state):
            report.say(said)
        if done % config.log_every == 0 or done % per_epoch == 0:
            _log(run, done, window, checkpoints, report)
            window = _Window()
        else:
            report.progress(done)


def _inside(done: int, config: Config) -> bool:
    """Whether a checkpoint is due that does not wait for the end of an epoch."""
    every = config.checkpoint_steps
    return every is not None and done > 0 and done % every == 0


def _border(done: int, config: Config, per_epoch: int) -> int:
    """The next step after which something is due."""
    every = [config.log_every, per_epoch, config.checkpoint_steps or per_epoch]
    return min((done // n + 1) * n for n in every)


def _log(
    run: Run, done: int, window: _Window, checkpoints: Checkpointer, report: Reporter
) -> None:
    sums = dict(window.total())
    _check_finite(sums, done, checkpoints)
    norms, steps = sums.pop("gradient_norm"), sums["steps"]
    report.training(
        done,
        done / run.steps_per_epoch,
        sums,
        learning_rate=float(run.schedule(done - 1)),
        gradient_norm={k: v / steps for k, v in norms.items()},
    )


def _save(
    run: Run,
    state: TrainState,
    done: int,
    window: _Window,
    checkpoints: Checkpointer,
    report: Reporter,
) -> None:
    """Save, unless that is done; a state that is not finite is never saved."""
    if checkpoints.latest() == done:
        return
    sums = window.total()
    if sums is not None:
        _check_finite(sums, done, checkpoints)
    report.sync()
    notes = {"metrics": sums}
    best = rundir.best_step(report.validation, [*checkpoints.steps(), done])
    checkpoints.save(done, run.everywhere(state), notes, best)


def _check_finite(sums: Metrics, done: int, checkpoints: Checkpointer) -> None:
    if sums["finite_steps"] < sums["steps"]:
        # Nothing is finite again after the first that is not.
        bad = done - int(sums["steps"]) + int(sums["finite_steps"]) + 1
        raise _diverged(f"the loss or its gradient at step {bad:,}", checkpoints)


def _diverged(what: str, checkpoints: Checkpointer) -> RunError:
    last = checkpoints.latest()
    return RunError(
        f"{what} is not a finite number; "
        + ("no checkpoint" if last is None else f"the checkpoint of step {last:,}")
        + " was saved before it; the same command would come to the same, so begin "
        "another run with a lower --train.learning-rate or more --train.warmup-epochs"
    )


def _evaluate_all(
    run: Run,
    state: TrainState,
    done: int,
    report: Reporter,
    checkpoints: Checkpointer,
    stop: process.Stop,
) -> bool:
    """Evaluate every split but the training one, each image once, unless that is done.

    Returns:
        False: a signal came on the way.
    """

    def stopping() -> bool:
        # Many processes would have to agree, batch by batch.
        return stop.asked is not None and jax.process_count() == 1

    for name in ("validation", "test"):
        there = report.last.get(name, {}).get("step") == done
        if name not in run.dataset.splits or not one_of_all(not there):
            continue
        sums = run.evaluate(state, name, stopping)
        if sums is None:
            return False
        if not math.isfinite(sums["loss"]):
            raise _diverged(f"the {name} loss after step {done:,}", checkpoints)
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
    return True


def agree(config: Config, workdir: Path, devices: int) -> tuple[Config, Dataset]:
    """Everything that can be refused, cheapest first; the configuration filled in."""
    check_config(config)
    # Planned before anything is read, so that a mistake costs no waiting.
    shape = IMAGE_SHAPES.get(config.data.name)
    shape = shape and config.augment.input_shape(shape)
    create_model(config.architecture, config.execution, shape)
    check_devices(config, devices)
    if not process.writable(workdir):
        raise UsageError(
            f"workdir={workdir} cannot be written, or made; choose another --workdir"
        )
    rundir.check_same(workdir, config)
    check_weights(config, workdir)
    dataset = open_dataset(config.data)
    return resolve(config, dataset), dataset


def check_weights(config: Config, workdir: Path) -> None:
    """Refuse weights that a new run could not open."""
    if config.weights is None or (workdir / "config.json").exists():
        return
    try:
        weights.check_file(config.weights)
    except UsageError as error:
        raise UsageError(f"weights={error}; name it by --weights FILE") from error


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


def check_devices(config: Config, count: int) -> None:
    """Refuse a batch that ``count`` devices cannot share equally."""
    batch = config.train.batch_size
    if batch % count:
        below, above = batch // count * count, (batch // count + 1) * count
        choices = f"{below} or {above}" if below else str(above)
        raise UsageError(
            f"train.batch_size={batch} cannot be shared equally by {count} devices; "
            f"choose a multiple of {count}, as {choices}"
        )
