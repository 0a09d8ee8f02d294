"""Which learning rate to begin with: the range test of Smith 2015, 1506.01186.

A new net trains for some steps while the rate rises exponentially. At first the loss
falls faster and faster, then it grows beyond all bounds; a tenth of the rate at which
the smoothed loss was lowest is a good highest rate of a schedule.
"""

import json
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
from flax_resnetv2.run.cost import memory_limit, step_cost
from flax_resnetv2.run.placement import Placement, sum_on_host
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.run.validate import validate
from flax_resnetv2.training.step import TrainState
from flax_resnetv2.validation import Range, check_arguments

DIVERGED = 4.0
"""The test ends when the smoothed loss is so many times its lowest value."""
_KEEP = 0.9
"""Share of the smoothed loss that stays at a step."""

Steps = Annotated[int, Range(10, 100_000)]
Rate = Annotated[float, Range(0, 1e6, above=True)]


def find_rate(
    config: Config,
    directory: str | Path,
    *,
    steps: Steps = 100,
    highest: Rate = 10.0,
    devices: Sequence[jax.Device] | None = None,
) -> float:
    """Train while the rate rises, and say which to choose.

    Args:
        config: the run to find a rate for; its schedule and rate do not matter.
        directory: receives ``rates.jsonl``, a line a step (``step``,
            ``learning_rate``, ``loss``, ``smoothed``), and ``learning_rate.png``. No
            run's.
        steps: over which the rate rises.
        highest: where it ends; it begins at a millionth.
        devices: which local devices share the work; None: all.

    Returns:
        The suggested ``train.learning_rate``.

    Raises:
        UsageError: as ``fit``, or ``directory`` is a run's.
        RunError: the loss was never a finite number, or was lowest at the end.
    """
    check_arguments(find_rate, {"steps": steps, "highest": highest})
    directory, devices = Path(directory), list(devices or jax.local_devices())
    if run_directory.is_run(directory):
        raise UsageError(
            f"workdir={directory} holds a run, which find-rate leaves alone; choose "
            "another --workdir"
        )
    limit = memory_limit(devices[0])
    placement = Placement(devices)
    config, dataset, model = validate(config, directory, placement.count, limit)
    per_epoch = dataset.splits["train"].num_images // config.train.batch_size
    train = replace(
        config.train,
        schedule="exponential",
        learning_rate=highest,
        epochs=steps // per_epoch + 1,
        warmup_epochs=steps / per_epoch,
    )
    run = Trainer(replace(config, train=train), dataset, model, placement)
    shape = config.augment.input_shape(dataset.image_shape)
    cost = step_cost(model, shape, train.accumulation_steps)
    cost = cost.plus_resident(run.state_shapes(), dataset.in_memory())
    cost.check(config.train.batch_size, placement.count, limit)
    state = run.initial_state()  # the last that can be refused
    run_directory.make_directory(directory)
    with (directory / "rates.jsonl").open("w", buffering=1) as file, closing(run):
        lines = []
        for line in _rise(run, state, steps):
            lines.append(line)
            file.write(json.dumps(line) + "\n")
    lowest = min(lines, key=lambda line: line["smoothed"], default=None)
    if lowest is None:
        raise RunError(
            "the loss of the first step is not a finite number; look at the "
            "normalization (--augment.mean, --augment.std) and the weights"
        )
    # At the rate itself training is about to diverge: not much later it would.
    rate = lowest["learning_rate"] / 10
    draw_rates(lines, rate, directory / "learning_rate.png")
    if lowest["step"] == steps - 1:
        raise RunError(
            f"the loss was still falling at the highest rate, {highest:g}; give a "
            "higher --highest, or more --steps"
        )
    return rate


def _rise(run: Trainer, state: TrainState, steps: int) -> Iterator[dict[str, float]]:
    """Train step by step, a line each, until the loss has diverged."""
    lowest, average = math.inf, 0.0
    for step in range(steps):
        state, metrics = run.train(state, step, 1)
        sums = sum_on_host([metrics])
        loss = sums["loss"] / sums["count"]
        if not math.isfinite(loss):
            return
        average = _KEEP * average + (1 - _KEEP) * loss
        # The average began at 0, which has less and less of a share.
        smoothed = average / (1 - _KEEP ** (step + 1))
        yield {
            "step": step,
            "learning_rate": float(run.schedule(step)),
            "loss": loss,
            "smoothed": smoothed,
        }
        lowest = min(lowest, smoothed)
        if smoothed > DIVERGED * lowest:
            return


def draw_rates(lines: list[dict], rate: float, path: Path) -> None:
    """Draw the losses over the rate, and the suggested one."""
    from matplotlib.figure import Figure

    rates = [line["learning_rate"] for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="learning rate", ylabel="training loss"
    )
    axes.plot(rates, [x["loss"] for x in lines], ".", color="0.7", label="a step")
    axes.plot(rates, [x["smoothed"] for x in lines], color="C0", label="smoothed")
    axes.axvline(rate, color="C1", label=f"suggested: {rate:.2g}")
    low, high = (f(x["smoothed"] for x in lines) for f in (min, max))
    axes.set_ylim(0.8 * low, min(1.2 * high, 2 * DIVERGED * low))
    axes.legend()
    figure.savefig(path, dpi=120)
