"""What a sweep found, from its lines: a table, and a picture; pure.

Accuracies are of the final epoch, not of the best one. A difference is taken seed by
seed: runs of one seed begin with the same order of the data and the same keys, so that
much of what they share by chance cancels.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Mean of n numbers, with what is behind ±."""

    mean: float
    spread: float | None
    """None: n is 1."""
    n: int

    def text(self, sign: str = "") -> str:
        """In percent: 93.42 ± 0.21."""
        mean = format(100 * self.mean, f"{sign}.2f")
        return mean if self.spread is None else f"{mean} ± {100 * self.spread:.2f}"


@dataclass(frozen=True)
class Row:
    """What is known of one override."""

    name: str
    accuracy: dict[int, float]
    """On the test set, by seed."""
    test: Spread | None
    """Of these; None: no run is done yet."""
    validation: Spread | None
    """The same on that split; None: there is none."""
    difference: Spread | None
    """Test accuracy above the first override's, over the seeds that both have, with its
    standard error; None: this is the first, or there is no such seed."""
    parameters: int | None
    multiply_adds: int | None
    seconds: float | None
    """Mean time of a run."""


def compare(names: Sequence[str], lines: Sequence[dict[str, Any]]) -> list[Row]:
    """Lay the lines of a sweep's runs side by side, a row for each override.

    Args:
        names: overrides, in order.
        lines: of ``sweep.jsonl``, one for each run.
    """
    rows: list[Row] = []
    for name in names:
        # In one order, whenever they were run: sums are rounded.
        done = sorted(
            (x for x in lines if (x["override"], x["status"]) == (name, "done")),
            key=lambda line: line["seed"],
        )
        accuracy = {line["seed"]: line["test"]["accuracy"] for line in done}
        validated = [x["validation"]["accuracy"] for x in done if x["validation"]]
        above = None
        if rows:
            first = rows[0].accuracy
            above = [accuracy[seed] - first[seed] for seed in accuracy if seed in first]
        rows.append(
            Row(
                name,
                accuracy,
                _spread(list(accuracy.values())),
                _spread(validated),
                _spread(above or [], of_the_mean=True),
                done[0]["parameters"] if done else None,
                done[0]["multiply_adds"] if done else None,
                fmean(line["seconds"] for line in done) if done else None,
            )
        )
    return rows


def _spread(values: list[float], of_the_mean: bool = False) -> Spread | None:
    """Mean and sample standard deviation (n - 1), or the mean's standard error."""
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
    """Write ``rows`` as a page, with what failed or is left, and where it was run.

    Args:
        shared: what all runs were told.
        rows: of ``compare``.
        seeds: of each override.
        lines: what the rows were made of.
    """
    validated = any(row.validation for row in rows)
    head = ["override", "n", "test accuracy, %", "difference, points"]
    head[2:2] = ["validation accuracy, %"] if validated else []
    head += ["parameters", "multiply-adds", "seconds a run"]
    table = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [_code(row.name), str(len(row.accuracy))]
        if validated:
            cells.append(row.validation.text() if row.validation else "")
        cells.append(row.test.text() if row.test else "")
        cells.append("")
        if row.difference:
            cells[-1] = row.difference.text("+")
            if row.difference.n != len(row.accuracy):
                cells[-1] += f" (n = {row.difference.n})"
        for number in (row.parameters, row.multiply_adds, row.seconds):
            cells.append("" if number is None else f"{number:,.0f}")
        table.append(cells)
    done = sum(len(row.accuracy) for row in rows)
    failed = [line for line in lines if line["status"] == "failed"]
    text = [
        f"# {_code(shared)}",
        "",
        f"{done} of {len(rows) * len(seeds)} runs are done; seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        *("| " + " | ".join(cells) + " |" for cells in table),
        "",
        "Accuracy is that of the final epoch; ± is the sample standard deviation over",
        "seeds (n - 1). A difference is to the first override, paired by seed; there ±",
        "is the standard error (standard deviation of the differences / √n). What was",
        "chosen by the test set is not measured by it: choose on `--data.validation`.",
        "",
    ]
    if failed:
        text += ["Failed:", ""]
        text += [
            f"- {_code(x['override'])}, seed {x['seed']}: {_escaped(x['reason'])}"
            for x in failed
        ]
        text.append("")
    if places := sorted({_place(x) for x in lines if x["status"] == "done"}):
        one = "Run on:"
        several = "Run on, so that times and even results may not compare:"
        text += [one if len(places) == 1 else several, ""]
        text += [f"- {place}" for place in places] + [""]
    return "\n".join(text)


def _place(line: dict[str, Any]) -> str:
    """Where a run was computed, and by what."""
    versions = ", ".join(f"{k} {v}" for k, v in line["versions"].items())
    kinds = line["devices"]
    named = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
    return (
        f"{named} ({line['platform']}); Python {line['python']}, {versions}; "
        f"commit {line['commit'] or 'unknown'}"
    )


def _code(text: str) -> str:
    return f"`{_escaped(text)}`"


def _escaped(text: str) -> str:
    """On one line, and no border of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def draw_sweep(shared: str, rows: Sequence[Row]) -> bytes:
    """Draw every run's accuracy and the overrides' means, as a PNG.

    A row for each override, a dot for each seed; a thin line joins a seed's dots.
    """
    from matplotlib.figure import Figure

    figure = Figure((8, 1.5 + 0.55 * len(rows)), dpi=120, layout="constrained")
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
            axes.annotate(
                f"{mean:.2f}",
                (mean, y - 0.25),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color="C3",
                fontsize=8,
            )
    names = ["\n".join(textwrap.wrap(row.name, 38)) for row in rows]
    axes.set_yticks(range(len(rows)), names, family="monospace", fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel("test accuracy of the final epoch, % (dot: a seed, bar: the mean)")
    axes.set_title("\n".join(textwrap.wrap(shared, 90)), fontsize=9)
    axes.grid(axis="x", color="0.93")
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    # Without the version of matplotlib in it.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
