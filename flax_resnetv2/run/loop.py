"""The one impure loop: time, files, devices. ``fit`` trains what a ``Config`` says."""

import contextlib
import errno
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax

from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import count_needs
from flax_resnetv2.run.checkpoint import Checkpointer, best_step
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import memory_limit, peak_flops
from flax_resnetv2.run.metrics_log import Reporter
from flax_resnetv2.run.tracing import Tracer, check_steps
from flax_resnetv2.run.trainer import Executor, Run, add_up, one_of_all, the_first_says
from flax_resnetv2.run.validate import agree
from flax_resnetv2.system import runtime
from flax_resnetv2.system.runtime import Stop
from flax_resnetv2.training.step import Metrics, TrainState
from flax_resnetv2.validation import check_choice


def fit(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    profile: tuple[int, int] | None = None,
    executor: Executor = "pmap",
    tensorboard: bool = False,
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
        tensorboard: write the lines of metrics to ``workdir/tensorboard`` too.

    Returns:
        The last evaluation on "test": ``loss``, ``accuracy`` (of an autoencoder
        ``squared_error`` and ``kl``, see ``Autoencoding``), ``count``, and
        ``epochs_to`` where the run ended by ``config.target_accuracy``.

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
    if jax.process_count() > 1 and len(devices) < jax.local_device_count():
        raise UsageError(
            f"devices={devices} are not all of this process; of several processes each "
            "gives all of its own"
        )
    check_choice("executor", executor, get_args(Executor))
    batch, count = config.train.batch_size, len(devices) * jax.process_count()
    limit, peak = memory_limit(devices[0]), peak_flops(devices[0])
    config, dataset = agree(config, workdir, count, limit)
    needed = count_needs(config, dataset.image_shape)
    needed.check(batch, count, limit)
    runtime.touch_memory(needed.image_bytes * (batch // needed.parts))
    run = Run(config, dataset, devices, executor)
    needed = needed.beside(run.state_shapes(), dataset.in_memory())
    needed.check(batch, count, limit)
    begun, total = (
        run_directory.has_begun(workdir),
        config.train.epochs * run.steps_per_epoch,
    )
    first = jax.process_index() == 0
    with _explained(workdir):
        training = None
        if not begun:
            # Whatever can be refused is refused before there is a directory.
            check_steps(profile, 0, total)
            training = _Training(run, run.initial_state())
        run_directory.make_directory(workdir)
        with (
            run_directory.locked(workdir) if first else contextlib.nullcontext(),
            # Around the checkpoints: a signal does not cut the last one off.
            Stop() as stop,
            Checkpointer(workdir / "checkpoints", config.keep_checkpoints) as kept,
            contextlib.closing(run),
        ):
            said = [f"changed: {x}" for x in run_directory.check_same(workdir, config)]
            if training is None:
                training = _resumed(run, kept)
                done = training.done
                if profile and profile[0] < done < total:
                    said.append(f"not traced: step {profile[0]} is done already")
                    profile = None
                check_steps(profile, done, total)
                if done > total:
                    raise UsageError(
                        f"train.epochs={config.train.epochs} is less than this run has "
                        f"done: {done // run.steps_per_epoch}; give that or more"
                    )
            if first:
                run_directory.write_records(
                    workdir, config, dataset, devices, training.done
                )
            with (
                Reporter(
                    workdir,
                    began,
                    total,
                    training.done,
                    batch,
                    flops=needed.flops,
                    peak=peak and peak * count,
                    silent=not first,
                    tensorboard=tensorboard,
                ) as report,
                Tracer(profile, workdir / "profile") as tracer,
            ):
                report.say(f"{workdir}: {run.describe(training.state)}")
                for text in [*said, needed.describe(batch, count, limit)]:
                    report.say(text)
                training.go(kept, report, tracer, stop)
                if training.epochs_to is None:
                    return report.last["test"]
                return {**report.last["test"], "epochs_to": training.epochs_to}


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    """Say what the system, XLA or another process's end did to a run."""
    try:
        yield
    except OSError as error:  # the data are in memory: only the run's files are left
        room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RunError(
            f"{error.filename or workdir} cannot be used ({error.strerror or error}); "
            + ("make room" if room else "see to it")
            + ", and give the same command to go on from the newest checkpoint"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise RunError(
                f"the devices' memory is too small for this run ({reason}); give a "
                "smaller --train.batch-size or --train.eval-batch-size, or "
                "--train.accumulate 2, or --execution.remat units, in another "
                "--workdir"
            ) from error
        if jax.process_count() > 1:
            raise RunError(
                f"the processes cannot go on together ({reason}); if one of them is "
                "gone, start all again, and they go on from the newest checkpoint"
            ) from error
        raise


@dataclass(frozen=True)
class Due:
    """What is due after how many steps; never between them."""

    config: Config
    per_epoch: int
    """Steps of an epoch."""

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.train.epochs * self.per_epoch

    def line(self, done: int) -> bool:
        """Training metrics."""
        return done % self.config.log_every == 0 or done % self.per_epoch == 0

    def evaluation(self, done: int) -> bool:
        """An evaluation of every split."""
        return self._ended(done, self.config.evaluate_every)

    def checkpoint(self, done: int) -> bool:
        """A checkpoint."""
        steps = self.config.checkpoint_steps
        inside = steps is not None and done > 0 and done % steps == 0
        return inside or self._ended(done, self.config.checkpoint_every)

    def border(self, done: int) -> int:
        """The next step after which something is due."""
        every = [self.config.log_every, self.per_epoch]
        if self.config.checkpoint_steps is not None:
            every.append(self.config.checkpoint_steps)
        return min((done // n + 1) * n for n in every)

    def _ended(self, done: int, every: int) -> bool:
        epoch, rest = divmod(done, self.per_epoch)
        return done == self.total or (done > 0 and rest == 0 and epoch % every == 0)


class _Training:
    """A run under way: its state, and what a checkpoint keeps beside it."""

    def __init__(self, run: Run, state: TrainState, notes: Any = None) -> None:
        self.run, self.state, self.done = run, state, int(state.step)
        self.due = Due(run.config, run.steps_per_epoch)
        notes = notes or {"metrics": None, "validation": {}}
        self._sums: Metrics | None = notes["metrics"]
        """Training metrics since the last line, on the host."""
        self._pending: list[Metrics] = []
        """The same on the devices."""
        self._validation: dict[str, float] = notes["validation"]
        """Accuracy on that split, or minus an autoencoder's loss, by step (as JSON has
        it, a text)."""
        self.epochs_to: float | None = None
        """Set where the run ended by its target."""

    def go(
        self, checkpoints: Checkpointer, report: Reporter, tracer: Tracer, stop: Stop
    ) -> None:
        """Go to the end of the run.

        What is done after a step depends on the step and on what is there already, so
        that a run that goes on makes up for what the one before it could not do.
        """
        while True:
            stopping = one_of_all(stop.asked is not None)
            if not stopping and self.due.evaluation(self.done):
                stopping = not self._evaluate(checkpoints, report, stop)
            ended = not stopping and self._at_target(report)
            if stopping or ended or self.due.checkpoint(self.done):
                self._save(checkpoints, report)
            if stopping:
                checkpoints.wait()
                raise Stopped(
                    f"by {stop.asked or 'a signal to another process'} after step "
                    f"{self.done:,} of {self.due.total:,}; all is saved, and the same "
                    "command goes on"
                )
            if ended:
                self.epochs_to = self.done / self.run.steps_per_epoch
                report.say(
                    f"target_accuracy={self.run.config.target_accuracy} is reached on "
                    f"{self._decides!r}: the run ends; epochs_to {self.epochs_to:g}"
                )
            if ended or self.done >= self.due.total:
                return
            self._step(report, tracer)
            stop.listen()
            if self.due.line(self.done):
                self._log(checkpoints, report)
            else:
                report.progress(self.done)

    @property
    def _decides(self) -> str:
        """The split whose accuracy may end the run."""
        return "validation" if "validation" in self.run.dataset.splits else "test"

    def _reaches(self, name: str, accuracy: float) -> bool:
        target = self.run.config.target_accuracy
        return target is not None and name == self._decides and accuracy >= target

    def _at_target(self, report: Reporter) -> bool:
        """Whether the evaluation after this step ends the run."""
        if self.run.config.target_accuracy is None or not self.due.evaluation(
            self.done
        ):
            return False
        line = report.last.get(self._decides, {})
        there = line.get("step") == self.done
        return the_first_says(there and self._reaches(self._decides, line["accuracy"]))

    def _step(self, report: Reporter, tracer: Tracer) -> None:
        """One step, or as many as nothing is due between."""
        tracer.before(self.done)
        border = tracer.border(self.done, self.due.border(self.done))
        steps = 1 if self.run.one_by_one else border - self.done
        self.state, metrics = self.run.train(self.state, self.done, steps)
        report.dispatched()
        self._pending.append(metrics)
        # No further ahead of the devices: a signal or an error would come late.
        jax.block_until_ready(self._pending[-2:-1])
        self.done += steps
        if said := tracer.after(self.done, self.state):
            report.say(said)

    def _add_up(self, checkpoints: Checkpointer) -> Metrics | None:
        """Training metrics since the last line; this waits for the devices."""
        if self._pending:
            self._sums, self._pending = add_up(self._pending, self._sums), []
        sums = self._sums
        if sums is not None and sums["finite_steps"] < sums["steps"]:
            # Nothing is finite again after the first that is not.
            bad = self.done - int(sums["steps"]) + int(sums["finite_steps"]) + 1
            raise _diverged(f"the loss or its gradient at step {bad:,}", checkpoints)
        return sums

    def _log(self, checkpoints: Checkpointer, report: Reporter) -> None:
        sums = dict(self._add_up(checkpoints))
        self._sums = None
        norms, steps = sums.pop("gradient_norm"), sums["steps"]
        report.training(
            self.done,
            self.done / self.run.steps_per_epoch,
            sums,
            learning_rate=float(self.run.schedule(self.done - 1)),
            gradient_norm={k: v / steps for k, v in norms.items()},
        )

    def _save(self, checkpoints: Checkpointer, report: Reporter) -> None:
        """Save, unless that is done; a state that is not finite is never saved."""
        if checkpoints.latest() == self.done:
            return
        notes = {"metrics": self._add_up(checkpoints), "validation": self._validation}
        report.sync()
        best = best_step(self._validation, [*checkpoints.steps(), self.done])
        checkpoints.save(self.done, self.run.everywhere(self.state), notes, best)

    def _evaluate(
        self, checkpoints: Checkpointer, report: Reporter, stop: Stop
    ) -> bool:
        """Evaluate every split but the training one, unless that is done.

        Returns:
            False: a signal came on the way.
        """

        def stopping() -> bool:
            # Many processes would have to agree, batch by batch.
            return stop.asked is not None and jax.process_count() == 1

        for name in ("validation", "test"):
            there = report.last.get(name, {}).get("step") == self.done
            if name not in self.run.dataset.splits or the_first_says(there):
                continue
            sums = self.run.evaluate(self.state, name, stopping)
            if sums is None:
                return False
            if not math.isfinite(sums["loss"]):
                what = f"the {name} loss after step {self.done:,}"
                raise _diverged(what, checkpoints)
            ratios, more = sums.pop("residual_ratio"), {}
            epochs = self.done / self.run.steps_per_epoch
            if "correct" in sums and self._reaches(
                name, sums["correct"] / sums["count"]
            ):
                more["epochs_to"] = epochs
            line = report.evaluation(
                name,
                self.done,
                epochs,
                sums,
                **more,
                residual_ratio={
                    stack: [
                        float(units[f"unit{k}"] / sums["count"])
                        for k in range(1, len(units) + 1)
                    ]
                    for stack, units in ratios.items()
                },
            )
            if name == "validation":
                score = line.get("accuracy", -line["loss"])
                self._validation[str(self.done)] = score
        return True


def _resumed(run: Run, checkpoints: Checkpointer) -> _Training:
    """From the newest whole checkpoint, or from the beginning if there is none yet."""
    found = checkpoints.restore_newest(like=run.state_shapes())
    if found is None:
        return _Training(run, run.initial_state())
    _, state, notes = found
    return _Training(run, run.as_placed(state), notes)


def _diverged(what: str, checkpoints: Checkpointer) -> RunError:
    checkpoints.wait()  # what is being saved counts when it is there
    last = checkpoints.latest()
    return RunError(
        f"{what} is not a finite number; "
        + ("no checkpoint" if last is None else f"the checkpoint of step {last:,}")
        + " was saved before it; the same command would come to the same, so begin "
        "another run with a lower --train.learning-rate or more --train.warmup-epochs"
    )
