"""Several runs side by side: a table, and their curves, from their own records."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import scores
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.run.config import Config, differences


class RunRecord(NamedTuple):
    """What a run's directory says of it."""

    name: str
    config: Config
    lines: list[dict[str, Any]]
    parameters: int
    multi_label: bool

    def last(self, split: str) -> dict[str, Any]:
        """The newest line of a split; empty: there is none."""
        return next((x for x in reversed(self.lines) if x["split"] == split), {})


def read_run(workdir: str | Path) -> RunRecord:
    """Read the records of a run.

    Raises:
        UsageError: it is none, has no line yet, or is damaged.
    """
    config, facts = (
        run_directory.load_config(workdir),
        run_directory.load_dataset_summary(workdir),
    )
    lines = run_directory.read_metrics(workdir)
    if not lines:
        raise UsageError(f"{workdir} has no line of metrics yet; train there first")
    parameters = count_parameters(config, tuple(facts["image_shape"]))
    several = facts.get("multi_label", False)
    return RunRecord(str(workdir), config, lines, parameters, several)


def to_markdown(runs: Sequence[RunRecord]) -> str:
    """Lay runs side by side; what differs is told against the first."""
    head = ["run", "what differs", "parameters", "epoch", "validation", "test"]
    head += ["training loss", "images/s", "seconds"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for run in runs:
        changes = "; ".join(differences(runs[0].config, run.config).values())
        train, last = run.last("train"), run.lines[-1]
        rows.append(
            [
                run.name,
                "(the first)" if run is runs[0] else changes.replace("|", "\\|"),
                f"{run.parameters:,}",
                f"{last['epoch']:g}",
                *(_score(run, split) for split in ("validation", "test")),
                f"{train['loss']:.3f}" if train else "",
                f"{train['images_per_second']:,.0f}" if train else "",
                f"{last['seconds']:,.0f}",
            ]
        )
    text = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join(
        [
            *text,
            "",
            "Scores are of the last evaluation; in brackets the 95 % interval (Wilson)",
            "of one run's test images, which knows nothing of other seeds: for that,",
            "run a sweep.",
        ]
    )


def _score(run: RunRecord, split: str) -> str:
    line = run.last(split)
    if "accuracy" not in line:
        return f"squared error {line['squared_error']:.4f}" if line else ""
    text = f"{line['accuracy']:.2%}"
    if (bounds := scores.interval(line, run.multi_label)) is None:
        return text
    low, high = bounds
    return f"{text} ({100 * low:.2f} to {100 * high:.2f})"


def draw_runs(runs: Sequence[RunRecord]) -> bytes:
    """Draw every run's training loss and its test score over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = set()
    for number, run in enumerate(runs):
        train = [x for x in run.lines if x["split"] == "train"]
        test = [x for x in run.lines if x["split"] == "test"]
        color = f"C{number % 10}"
        points = [(x["epoch"], x["loss"]) for x in train]
        left.plot(*zip(*points, strict=True), color=color, label=run.name, linewidth=1)
        if test:
            kind = "accuracy" if "accuracy" in test[0] else "squared_error"
            kinds.add(kind.replace("_", " "))
            points = [(x["epoch"], x[kind]) for x in test]
            right.plot(*zip(*points, strict=True), "o-", color=color, markersize=3)
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel=f"test {' or '.join(sorted(kinds))}")
    for place in (left, right):
        place.grid(color="0.93")
        place.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(runs), 3), fontsize=8)
    file = io.BytesIO()
    # Without the version of matplotlib in it.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
