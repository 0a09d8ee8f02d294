"""The results of a sweep as a table and a figure; pure.

Accuracies are those of the final epoch, not of the best one. Differences are paired by
seed: runs of one seed share the initial order of the data and the random keys, so much
of their common random variation cancels.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from flax_resnetv2.reports import formats
from flax_resnetv2.reports.formats import one_line

NOTE = """\
Accuracy is that of the final epoch, ± the sample standard deviation (n - 1) over
seeds. Differences are from the first override, paired by seed, ± their standard error
(standard deviation / √n). Selecting an override by its test accuracy biases that
accuracy: select on `--data.validation`.
"""


@dataclass(frozen=True)
class Spread:
    """Mean and dispersion of n numbers."""

    mean: float
    spread: float | None
    """Sample standard deviation, or standard error of the mean; None for n = 1."""
    n: int

    def text(self, sign: str = "") -> str:
        """Format as percent: 93.42 ± 0.21; with ``sign="+"``, +0.42 ± 0.21."""
        mean = format(100 * self.mean, f"{sign}.2f")
        return mean if self.spread is None else f"{mean} ± {100 * self.spread:.2f}"


@dataclass(frozen=True)
class Row:
    """The results of one override."""

    name: str
    accuracy: dict[int, float]
    """Accuracy on the split "test", by seed."""
    test: Spread | None
    """Spread of ``accuracy``; None if no run has finished."""
    validation: Spread | None
    """Spread of the accuracy on the split "validation"; None without that split."""
    difference: Spread | None
    """Difference of test accuracy from the first override, over their common seeds,
    with its standard error; None for the first override and without common seeds."""
    parameters: int | None
    multiply_adds: int | None
    seconds: float | None
    """Mean duration of a run."""


def compare(names: Sequence[str], lines: Sequence[dict[str, Any]]) -> list[Row]:
    """Return one row per override name, from the lines of ``sweep.jsonl``."""
    rows: list[Row] = []
    for name in names:
        # Sorted, because the rounding of a sum depends on the order of its terms.
        done = sorted(
            (x for x in lines if (x["override"], x["status"]) == (name, "done")),
            key=lambda line: line["seed"],
        )
        accuracy = {line["seed"]: line["test"]["accuracy"] for line in done}
        validation = [x["validation"]["accuracy"] for x in done if x["validation"]]
        first = rows[0].accuracy if rows else {}
        differences = [accuracy[k] - first[k] for k in accuracy if k in first]
        rows.append(
            Row(
                name,
                accuracy,
                _spread(list(accuracy.values())),
                _spread(validation),
                _spread(differences, of_the_mean=True),
                done[0]["parameters"] if done else None,
                done[0]["multiply_adds"] if done else None,
                fmean(line["seconds"] for line in done) if done else None,
            )
        )
    return rows


def _spread(values: list[float], of_the_mean: bool = False) -> Spread | None:
    """Return the mean with standard deviation (n - 1), or the mean's standard error."""
    if not values:
        return None
    n = len(values)
    spread = stdev(values) if n > 1 else None
    if of_the_mean and spread is not None:
        spread /= math.sqrt(n)
    return Spread(fmean(values), spread, n)


def to_markdown(
    shared: str,
    rows: Sequence[Row],
    seeds: Sequence[int],
    lines: Sequence[dict[str, Any]],
) -> str:
    """Return the page of a sweep: the table, failed runs, devices and versions.

    Args:
        shared: the flags of all runs.
        rows, lines: of ``compare``, and what they were computed from.
        seeds: seeds of each override.
    """
    head = ["override", "n", "validation accuracy, %", "test accuracy, %"]
    head += ["difference, points", "parameters", "multiply-adds", "seconds per run"]
    cells = [_cells(row) for row in rows]
    if not any(row.validation for row in rows):
        head.pop(2)
        cells = [row[:2] + row[3:] for row in cells]
    done = sum(len(row.accuracy) for row in rows)
    text = [
        f"# `{one_line(shared)}`",
        "",
        f"{done} of {len(rows) * len(seeds)} runs are done; seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        *formats.markdown_table(head, cells),
        "",
        NOTE,
    ]
    failed = [
        f"- `{one_line(x['override'])}`, seed {x['seed']}: {one_line(x['reason'])}"
        for x in lines
        if x["status"] == "failed"
    ]
    if failed:
        text += ["Failed:", "", *failed, ""]
    if machines := sorted({_machine(x) for x in lines if x["status"] == "done"}):
        warning = ", so times and even results may not be comparable"
        text += [f"Run on{warning if len(machines) > 1 else ''}:", "", *machines, ""]
    return "\n".join(text)


def _cells(row: Row) -> list[str]:
    """Return the cells of a row, with that of the validation accuracy."""
    difference = ""
    if row.difference:
        difference = row.difference.text("+")
        if row.difference.n != len(row.accuracy):
            difference += f" (n = {row.difference.n})"
    costs = (row.parameters, row.multiply_adds, row.seconds)
    return [
        f"`{one_line(row.name)}`",
        str(len(row.accuracy)),
        row.validation.text() if row.validation else "",
        row.test.text() if row.test else "",
        difference,
        *("" if cost is None else f"{cost:,.0f}" for cost in costs),
    ]


def _machine(line: dict[str, Any]) -> str:
    """Return the devices, versions and commit of a run, as an item of a list."""
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
    kinds = line["devices"]
    devices = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    return (
        f"- {devices} ({line['platform']}); Python {line['python']}, {versions}; "
        f"commit {line['commit'] or 'unknown'}"
    )


@formats.plain_style()
def draw_sweep(shared: str, rows: Sequence[Row]) -> bytes:
    """Draw the accuracy of every run and the means of the overrides, as PNG.

    Each override has a row, each seed a dot; a thin line joins the dots of a seed.
    """
    figure = formats.new_figure(8, 1.5 + 0.55 * len(rows))
    axes = figure.subplots()
    for seed in sorted({seed for row in rows for seed in row.accuracy}):
        at = [(row.accuracy.get(seed), y) for y, row in enumerate(rows)]
        known = [(100 * x, y) for x, y in at if x is not None]
        axes.plot(*zip(*known, strict=True), color="0.85", linewidth=0.8, zorder=1)
    for y, row in enumerate(rows):
        dots = [100 * x for x in row.accuracy.values()]
        axes.scatter(dots, [y] * len(dots), color="C0", alpha=0.7, s=28, zorder=2)
        if row.test:
            mean = 100 * row.test.mean
            axes.plot([mean] * 2, [y - 0.25, y + 0.25], color="C3", linewidth=2)
            at, style = (mean, y - 0.25), {"color": "C3", "fontsize": 8}
            style |= {"ha": "center", "va": "bottom", "textcoords": "offset points"}
            axes.annotate(f"{mean:.2f}", at, (0, 2), **style)
    names = ["\n".join(textwrap.wrap(formats.label(row.name), 38)) for row in rows]
    axes.set_yticks(range(len(rows)), names, family="monospace", fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel("test accuracy of the final epoch, % (dot: a seed, bar: the mean)")
    axes.set_title("\n".join(textwrap.wrap(formats.label(shared), 90)), fontsize=9)
    axes.grid(axis="x", color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    return formats.encode(figure, "png")
