"""``fit``: the training loop and everything impure around it: clock, files, signals."""

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
from flax_resnetv2.run.checkpoint import Checkpointer, best_step
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import memory_limit, peak_flops
from flax_resnetv2.run.metrics_log import Reporter
from flax_resnetv2.run.placement import Executor, Placement, sum_on_host
from flax_resnetv2.run.tracing import Tracer, check_steps
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import validate
from flax_resnetv2.system import distributed
from flax_resnetv2.system.files import write_whole
from flax_resnetv2.system.runtime import touch_memory
from flax_resnetv2.system.signals import Stop
from flax_resnetv2.training.objective import Metrics
from flax_resnetv2.training.step import TrainState
from flax_resnetv2.validation import check_choice


@jax.transfer_guard("allow")  # placing and fetching arrays is its work
def fit(
    config: Config,
    workdir: str | Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    profile: tuple[int, int] | None = None,
    executor: Executor = "pmap",
    tensorboard: bool = False,
) -> dict[str, float]:
    """Start a run, or resume the one in ``workdir``, and train to its end.

    With several processes (``jax.distributed``), all call ``fit`` with the same
    arguments on a shared directory.

    Args:
        config: the run.
        workdir: the run directory. Receives ``config.json``, ``dataset.json``,
            ``environment.json``, ``metrics.jsonl`` and ``checkpoints/``.
        devices: local devices that share each batch; None: all of them.
        profile: (first, end): write a trace of the steps from first up to, but not
            including, end to ``workdir/profile``.
        executor: what maps a step over the devices, "pmap" or "jit".
        tensorboard: also write the metrics to ``workdir/tensorboard``.

    Returns:
        The last evaluation on "test": ``loss``, ``accuracy`` (for an autoencoder
        ``squared_error`` and ``kl``, see ``Autoencoding``), ``count``; and
        ``epochs_to`` if the run ended at ``config.target_accuracy``.

    Raises:
        UsageError: configuration, data set, devices and their memory do not fit
            together, or ``workdir`` is in use or holds another run.
        RunError: the data set could not be downloaded, the loss became infinite or
            NaN, a file cannot be written, or another process died.
        Stopped: SIGTERM or SIGINT came; the same call resumes the run.
    """
    began, workdir = time.perf_counter(), Path(workdir)
    devices = list(devices or jax.local_devices())
    if jax.process_count() > 1 and len(devices) < jax.local_device_count():
        raise UsageError(
            f"devices={devices} are not all devices of this process; with several "
            "processes, each must use all of its own"
        )
    check_choice("executor", executor, get_args(Executor))
    found_again = _restore_records(workdir)
    placement = Placement(devices, executor)
    batch, limit = config.train.batch_size, memory_limit(devices[0])
    config, dataset, model = validate(config, workdir, placement.count, limit)
    trainer = Trainer(config, dataset, model, placement)
    cost = trainer.cost()
    cost.check(batch, placement.count, limit)
    touch_memory(cost.image_bytes * (batch // cost.parts))
    total = config.train.epochs * trainer.steps_per_epoch
    first, peak = distributed.is_first_process(), peak_flops(devices[0])
    with _explained(workdir):
        training = None
        if not run_directory.has_begun(workdir):
            # Everything that can be refused is refused before the directory exists.
            check_steps(profile, 0, total)
            training = _Training(trainer, trainer.initial_state())
        run_directory.make_directory(workdir)
        with (
            run_directory.locked(workdir) if first else contextlib.nullcontext(),
            # Before the checkpoints, so that no signal interrupts writing the last one.
            Stop() as stop,
            Checkpointer(workdir / "checkpoints", config.keep_checkpoints) as kept,
            contextlib.closing(trainer),
        ):
            notes = [f"changed: {x}" for x in run_directory.check_same(workdir, config)]
            notes += [*found_again, *run_directory.check_numerics(workdir)]
            if training is None:
                training = _resumed(trainer, kept)
            done = training.done
            if profile and profile[0] < done < total:
                notes.append(f"not traced: step {profile[0]} is done already")
                profile = None
            check_steps(profile, done, total)
            if done > total:
                raise UsageError(
                    f"train.epochs={config.train.epochs} is less than this run has "
                    f"done: {done // trainer.steps_per_epoch}; give that or more"
                )
            if first:
                run_directory.write_records(workdir, config, dataset, devices, done)
            with (
                Reporter(
                    *(workdir, began, total, done, batch),
                    flops=cost.flops,
                    peak=peak and peak * placement.count,
                    silent=not first,
                    tensorboard=tensorboard,
                ) as report,
                Tracer(profile, workdir / "profile") as tracer,
            ):
                report.say(f"{workdir}: {trainer.describe(training.state)}")
                notes += training.missing_lines(report)
                for text in [*notes, cost.describe(batch, placement.count, limit)]:
                    report.say(text)
                training.run(kept, report, tracer, stop)
                result = report.last["test"]
                ended = training.epochs_to
                return result if ended is None else {**result, "epochs_to": ended}


@contextlib.contextmanager
def _explained(workdir: Path) -> Iterator[None]:
    """Turn errors of files, of XLA and of other processes into a ``RunError``."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise RunError(
            f"{error.filename or workdir} cannot be used ({error.strerror or error}); "
            + ("free some space" if full else "repair that")
            + ", and give the same command to resume from the newest checkpoint"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise RunError(
                f"the devices' memory is too small for this run ({reason}); give a "
                "smaller --train.batch-size or --train.eval-batch-size, or "
                "--train.accumulation-steps 2, or --execution.remat units, in another "
                "--workdir"
            ) from error
        if jax.process_count() > 1:
            raise RunError(
                f"the processes cannot continue together ({reason}); if one of them "
                "died, start all again, and they resume from the newest checkpoint"
            ) from error
        raise


@dataclass(frozen=True)
class EventSchedule:
    """After which numbers of steps something besides training is due."""

    config: Config
    per_epoch: int
    """Steps per epoch."""

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.config.train.epochs * self.per_epoch

    def line(self, done: int) -> bool:
        """Whether a line of training metrics is due after ``done`` steps."""
        return done % self.config.log_every == 0 or done % self.per_epoch == 0

    def evaluation(self, done: int) -> bool:
        """Whether an evaluation of every split is due after ``done`` steps."""
        return self._epoch_ended(done, self.config.evaluate_every)

    def checkpoint(self, done: int) -> bool:
        """Whether a checkpoint is due after ``done`` steps."""
        steps = self.config.checkpoint_steps
        inside = steps is not None and done > 0 and done % steps == 0
        return inside or self._epoch_ended(done, self.config.checkpoint_every)

    def next_event(self, done: int) -> int:
        """Return the next number of steps after which something is due."""
        every = self.config.log_every, self.per_epoch, self.config.checkpoint_steps
        return min((done // n + 1) * n for n in every if n is not None)

    def _epoch_ended(self, done: int, every: int) -> bool:
        epoch, rest = divmod(done, self.per_epoch)
        return done == self.total or (done > 0 and rest == 0 and epoch % every == 0)


class _Training:
    """A run in progress: its state, and the notes that are saved with it."""

    def __init__(self, trainer: Trainer, state: TrainState, notes: Any = None) -> None:
        self.trainer, self.state, self.done = trainer, state, int(state.step)
        self.due = EventSchedule(trainer.config, trainer.steps_per_epoch)
        notes = notes or {"metrics": None, "validation": {}}
        self._sums: Metrics | None = notes["metrics"]
        """Training metrics since the last line, on the host."""
        self._pending: list[Metrics] = []
        """Training metrics not yet fetched from the devices."""
        self._validation: dict[str, float] = notes["validation"]
        """Accuracy on "validation" (for an autoencoder, minus the loss) by step; steps
        are strings, as in JSON."""
        self.epochs_to: float | None = None
        """Set when the run ends at its target accuracy."""

    def run(
        self, checkpoints: Checkpointer, report: Reporter, tracer: Tracer, stop: Stop
    ) -> None:
        """Train to the end.

        What is due after a step depends on the step number and on what exists already,
        so a resumed run makes up for what the interrupted one could not do.
        """
        while True:
            stopping = distributed.any_process(stop.requested is not None)
            if not stopping and self.due.evaluation(self.done):
                stopping = not self._evaluate(checkpoints, report, stop)
            ended = not stopping and self._at_target(report)
            if stopping or ended or self.due.checkpoint(self.done):
                self._save(checkpoints, report)
            if stopping:
                checkpoints.wait()
                raise Stopped(
                    f"by {stop.requested or 'a signal to another process'} after step "
                    f"{self.done:,} of {self.due.total:,}; everything is saved, and "
                    "the same command resumes the run"
                )
            if ended:
                self.epochs_to = self._epoch
                report.say(
                    f"target_accuracy={self.trainer.config.target_accuracy} is reached "
                    f"on {self._target_split!r}: the run ends; epochs_to "
                    f"{self.epochs_to:g}"
                )
            if ended or self.done >= self.due.total:
                return
            self._step(report, tracer)
            stop.listen()
            if self.due.line(self.done):
                self._log(checkpoints, report)
            else:
                report.progress(self.done)

    def missing_lines(self, report: Reporter) -> list[str]:
        """Say if ``metrics.jsonl`` ends before this state; no kill leaves it so.

        What is lost cannot be computed again; scores on "validation" are in the
        checkpoint.
        """
        steps = range(self.done, 0, -1)
        due = next((step for step in steps if self.due.line(step)), 0)
        last = report.last.get("train", {}).get("step", 0)
        if last >= due:
            return []
        scores = [f"{value:.4f} at {step}" for step, value in self._validation.items()]
        known = f" (scores on validation: {', '.join(scores)})" if scores else ""
        return [
            f"metrics.jsonl was cut short: it ends at step {last:,}, the checkpoint is "
            f"of step {self.done:,}; the lines between are lost{known}"
        ]

    @property
    def _epoch(self) -> float:
        return self.done / self.trainer.steps_per_epoch

    @property
    def _target_split(self) -> str:
        """The split on which a target accuracy ends the run."""
        splits = self.trainer.dataset.splits
        return "validation" if "validation" in splits else "test"

    def _reaches(self, split: str, accuracy: float) -> bool:
        target = self.trainer.config.target_accuracy
        return target is not None and split == self._target_split and accuracy >= target

    def _at_target(self, report: Reporter) -> bool:
        """Whether an evaluation after this step ends the run."""
        if not self.due.evaluation(self.done):
            return False
        line = report.last.get(self._target_split, {})
        reached = self._reaches(self._target_split, line.get("accuracy", 0.0))
        return distributed.broadcast_from_first(reached and line["step"] == self.done)

    def _step(self, report: Reporter, tracer: Tracer) -> None:
        """Do one step, or all steps up to the next event."""
        tracer.before(self.done)
        event = tracer.next_event(self.done, self.due.next_event(self.done))
        steps = 1 if self.trainer.one_by_one else event - self.done
        self.state, metrics = self.trainer.train(self.state, self.done, steps)
        report.dispatched()
        self._pending.append(metrics)
        # Stay close to the devices, or signals and errors would be noticed late.
        jax.block_until_ready(self._pending[-2:-1])
        self.done += steps
        if note := tracer.after(self.done, self.state):
            report.say(note)

    def _training_sums(self, checkpoints: Checkpointer) -> Metrics | None:
        """Return the training metrics since the last line; wait for the devices."""
        if self._pending:
            self._sums, self._pending = sum_on_host(self._pending, self._sums), []
        sums = self._sums
        if sums is not None and sums["finite_steps"] < sums["steps"]:
            # After a step that is not finite, none is.
            bad = self.done - int(sums["steps"]) + int(sums["finite_steps"]) + 1
            raise _diverged(f"the loss or its gradient at step {bad:,}", checkpoints)
        return sums

    def _log(self, checkpoints: Checkpointer, report: Reporter) -> None:
        sums, self._sums = self._training_sums(checkpoints), None
        norms = {k: v / sums["steps"] for k, v in sums["gradient_norm"].items()}
        rate = float(self.trainer.schedule(self.done - 1))
        more = {"learning_rate": rate, "gradient_norm": norms}
        report.training(self.done, self._epoch, sums, **more)

    def _save(self, checkpoints: Checkpointer, report: Reporter) -> None:
        """Save, unless this step is saved; a state that is not finite never is."""
        if checkpoints.latest() == self.done:
            return
        sums = self._training_sums(checkpoints)
        notes = {"metrics": sums, "validation": self._validation}
        if distributed.is_first_process():  # whose notes are the ones that are stored
            notes["records"] = run_directory.read_records(report.workdir)
        report.sync()
        best = best_step(self._validation, [*checkpoints.steps(), self.done])
        state = self.trainer.placement.as_global(self.state)
        checkpoints.save(self.done, state, notes, best)

    def _evaluate(
        self, checkpoints: Checkpointer, report: Reporter, stop: Stop
    ) -> bool:
        """Evaluate each split but the training one, unless this step is evaluated.

        Returns:
            False if a signal interrupted it.
        """
        # Several processes would have to agree after every batch.
        single = jax.process_count() == 1
        for split in ("validation", "test"):
            is_done = report.last.get(split, {}).get("step") == self.done
            missing = split not in self.trainer.dataset.splits
            if missing or distributed.broadcast_from_first(is_done):
                continue
            sums = self.trainer.evaluate(
                self.state, split, lambda: single and stop.requested is not None
            )
            if sums is None:
                return False
            if not math.isfinite(sums["loss"]):
                what = f"the {split} loss after step {self.done:,}"
                raise _diverged(what, checkpoints)
            more = {}
            if self._reaches(split, sums.get("correct", 0.0) / sums["count"]):
                more["epochs_to"] = self._epoch
            more["residual_ratio"] = {
                stack: [
                    float(units[f"unit{k}"] / sums["count"])
                    for k in range(1, len(units) + 1)
                ]
                for stack, units in sums.pop("residual_ratio").items()
            }
            line = report.evaluation(split, self.done, self._epoch, sums, **more)
            if split == "validation":
                self._validation[str(self.done)] = line.get("accuracy", -line["loss"])
        return True


def _restore_records(workdir: Path) -> list[str]:
    """Write records that a run has lost again, from its newest checkpoint.

    Returns:
        A line for each.

    Raises:
        RunError: no checkpoint has them.
    """
    lost = run_directory.lost_records(workdir)
    if not distributed.broadcast_from_first(bool(lost)):
        return []
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        records = checkpoints.records()
    lost = [name for name in lost if name in records]
    if distributed.is_first_process():
        for name in lost:
            write_whole(workdir / name, records[name])
    return [f"{name} was missing: restored from a checkpoint" for name in lost]


def _resumed(trainer: Trainer, checkpoints: Checkpointer) -> _Training:
    """Resume from the newest whole checkpoint, or start if there is none yet."""
    found = checkpoints.restore_newest(like=trainer.state_shapes())
    if found is None:
        return _Training(trainer, trainer.initial_state())
    _, state, notes = found
    return _Training(trainer, trainer.placement.as_local(state), notes)


def _diverged(what: str, checkpoints: Checkpointer) -> RunError:
    checkpoints.wait()  # a checkpoint that is being written counts
    last = checkpoints.latest()
    return RunError(
        f"{what} is not a finite number; "
        + ("no checkpoint" if last is None else f"the checkpoint of step {last:,}")
        + " was saved before it; the same command would give the same result, so start "
        "another run with a lower --train.learning-rate or more --train.warmup-epochs"
    )
