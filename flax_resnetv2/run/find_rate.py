"""The learning rate to start with: the range test of Smith 2015, arXiv 1506.01186.

A new net trains for some steps while the rate rises exponentially. The loss falls, then
diverges. A tenth of the rate at the lowest smoothed loss is a good peak rate.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax

from flax_resnetv2.errors import RunError, UsageError
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import memory_limit
from flax_resnetv2.run.placement import Placement, sum_on_host
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import validate
from flax_resnetv2.training.step import TrainState
from flax_resnetv2.validation import Range, check_arguments

_logger = logging.getLogger(__name__)

DIVERGED = 4.0
"""The test ends when the smoothed loss exceeds its minimum by this factor."""
_SMOOTHING = 0.9
"""Decay per step of the exponential average of the loss."""

Steps = Annotated[int, Range(10, 100_000)]
Rate = Annotated[float, Range(0, 1e6, above=True)]


@jax.transfer_guard("allow")
def find_rate(
    config: Config,
    directory: str | Path,
    *,
    steps: Steps = 100,
    highest: Rate = 10.0,
    devices: Sequence[jax.Device] | None = None,
) -> float:
    """Train while the rate rises, and suggest a ``train.learning_rate``.

    Args:
        config: the run to find a rate for; its schedule and rate are ignored.
        directory: receives ``rates.jsonl``, one line per step (``step``,
            ``learning_rate``, ``loss``, ``smoothed``), and ``learning_rate.png``. It
            must not contain a run.
        steps: number of steps over which the rate rises.
        highest: the last rate; the first is a millionth of it.
        devices: local devices that share each batch; None: all of them.

    Raises:
        UsageError: as ``fit``, or ``directory`` contains a run.
        RunError: the loss was never a finite number, or was lowest at the end.
    """
    check_arguments(find_rate, {"steps": steps, "highest": highest})
    directory, devices = Path(directory), list(devices or jax.local_devices())
    if run_directory.is_run(directory):
        raise UsageError(
            f"workdir={directory} holds a run, which find-rate does not change; choose "
            "another --workdir"
        )
    placement, limit = Placement(devices), memory_limit(devices[0])
    config, dataset, model = validate(config, directory, placement.count, limit)
    per_epoch = dataset.splits["train"].num_images // config.train.batch_size
    train = replace(
        config.train,
        schedule="exponential",
        learning_rate=highest,
        epochs=steps // per_epoch + 1,
        warmup_epochs=steps / per_epoch,
    )
    trainer = Trainer(replace(config, train=train), dataset, model, placement)
    trainer.cost().check(config.train.batch_size, placement.count, limit)
    state = trainer.initial_state()  # the last that can be refused
    run_directory.make_directory(directory)
    lines = []
    with (directory / "rates.jsonl").open("w", buffering=1) as file, closing(trainer):
        for line in _raise_rate(trainer, state, steps):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
    lowest = min(lines, key=lambda line: line["smoothed"], default=None)
    if lowest is None:
        raise RunError(
            "the loss of the first step is not a finite number; check the "
            "normalization (--augment.mean, --augment.std) and the weights"
        )
    # At the lowest loss itself training is about to diverge.
    rate = lowest["learning_rate"] / 10
    try:
        _draw(lines, rate, directory / "learning_rate.png")
    except Exception as error:  # of the user's settings of matplotlib
        _logger.warning("learning_rate.png was not drawn (%s)", error)
    if lowest["step"] == steps - 1:
        raise RunError(
            f"the loss was still falling at the highest rate, {highest:g}; give a "
            "higher --highest, or more --steps"
        )
    return rate


def _raise_rate(
    trainer: Trainer, state: TrainState, steps: int
) -> Iterator[dict[str, float]]:
    """Train, and yield a line per step until the loss has diverged."""
    lowest, average = math.inf, 0.0
    for step in range(steps):
        state, metrics = trainer.train(state, step, 1)
        sums = sum_on_host([metrics])
        loss = sums["loss"] / sums["count"]
        if not math.isfinite(loss):
            return
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        # Correct for the average's initial value of 0.
        smoothed = average / (1 - _SMOOTHING ** (step + 1))
        rate = float(trainer.schedule(step))
        yield {"step": step, "learning_rate": rate, "loss": loss, "smoothed": smoothed}
        lowest = min(lowest, smoothed)
        if smoothed > DIVERGED * lowest:
            return


def _draw(lines: list[dict], rate: float, path: Path) -> None:
    """Draw the losses over the rate, and the suggested rate."""
    from matplotlib.figure import Figure

    rates, losses, smoothed = (
        [line[key] for line in lines] for key in ("learning_rate", "loss", "smoothed")
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="learning rate", ylabel="training loss"
    )
    axes.plot(rates, losses, ".", color="0.7", label="loss of a step")
    axes.plot(rates, smoothed, color="C0", label="smoothed")
    axes.axvline(rate, color="C1", label=f"suggested: {rate:.2g}")
    low, high = min(smoothed), max(smoothed)
    axes.set_ylim(0.8 * low, min(1.2 * high, 2 * DIVERGED * low))
    axes.legend()
    figure.savefig(path, dpi=120)
