"""Several runs in one table and one figure, from their own records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import scores
from flax_resnetv2.reports import formats
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.config import Config, differences


class RunRecord(NamedTuple):
    """The records of a run directory."""

    name: str
    config: Config
    lines: list[dict[str, Any]]
    """The lines of ``metrics.jsonl``."""
    last: dict[str, dict[str, Any]]
    """The newest line of each split."""
    parameters: int
    multi_label: bool


def read_run(workdir: str | Path) -> RunRecord:
    """Read the records of a run.

    Raises:
        UsageError: ``workdir`` is not a run directory, has no metrics yet, or is
            damaged.
    """
    config = run_directory.load_config(workdir)
    summary = run_directory.load_dataset_summary(workdir)
    lines = run_directory.read_metrics(workdir)
    if not lines:
        raise UsageError(f"{workdir} has no line of metrics yet; train there first")
    last = {line["split"]: line for line in lines}
    parameters = count_parameters(config, tuple(summary["image_shape"]))
    multi_label = summary["multi_label"]
    return RunRecord(str(workdir), config, lines, last, parameters, multi_label)


def to_markdown(runs: Sequence[RunRecord]) -> str:
    """Return a table with one row per run; differences are relative to the first."""
    head = ["run", "differences", "parameters", "epoch", "validation", "test"]
    head += ["training loss", "images/s", "seconds"]
    rows = []
    for run in runs:
        changes = "; ".join(differences(runs[0].config, run.config).values())
        train, last = run.last.get("train"), run.lines[-1]
        rows.append(
            [
                formats.one_line(run.name),
                "(reference)" if run is runs[0] else formats.one_line(changes),
                f"{run.parameters:,}",
                f"{last['epoch']:g}",
                *(_score(run, split) for split in ("validation", "test")),
                f"{train['loss']:.3f}" if train else "",
                f"{train['images_per_second']:,.0f}" if train else "",
                f"{last['seconds']:,.0f}",
            ]
        )
    note = """
Scores are those of the last evaluation. The 95 % interval (Wilson) in parentheses
reflects the number of images only, not the variation between seeds; a sweep measures
that."""
    return "\n".join([*formats.markdown_table(head, rows, text_columns=2), note])


def _score(run: RunRecord, split: str) -> str:
    """Return the accuracy with its interval, or the squared error, for a table cell."""
    line = run.last.get(split, {})
    if "accuracy" not in line:
        return f"squared error {line['squared_error']:.4f}" if line else ""
    text = f"{line['accuracy']:.2%}"
    if bounds := scores.interval(line, run.multi_label):
        text += f" ({100 * bounds[0]:.2f} to {100 * bounds[1]:.2f})"
    return text


@formats.plain_style()
def draw_runs(runs: Sequence[RunRecord]) -> bytes:
    """Draw training loss and test score of every run over the epochs, as PNG."""
    figure = formats.new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    metrics = set()
    for number, run in enumerate(runs):
        color = f"C{number % 10}"
        train = [x for x in run.lines if x["split"] == "train"]
        test = [x for x in run.lines if x["split"] == "test"]
        epochs, losses = [x["epoch"] for x in train], [x["loss"] for x in train]
        left.plot(
            epochs, losses, color=color, label=formats.label(run.name), linewidth=1
        )
        if test:
            metric = "accuracy" if "accuracy" in test[0] else "squared_error"
            metrics.add(metric.replace("_", " "))
            epochs, values = [x["epoch"] for x in test], [x[metric] for x in test]
            right.plot(epochs, values, "o-", color=color, markersize=3)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"test {' or '.join(sorted(metrics))}")
    for axes in (left, right):
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
    font = {"family": formats.font_families(), "size": 8}
    figure.legend(loc="outside upper center", ncols=min(len(runs), 3), prop=font)
    return formats.encode(figure, "png")
