"""The evidence: recipes and studies, run on real CIFAR-10, as one page.

    python -m benchmarks.studies run stride order --minutes 60
    python -m benchmarks.studies add cifar10-cpu-hour runs/hour
    python -m benchmarks.studies page

``run`` sweeps each study's overrides over paired seeds; it goes on where it stopped.
``add`` takes over finished runs of a recipe. Both put lines into
``results/*.jsonl``: a line a run, with its scores on all test images after the last
epoch, versions, device and commit. ``page`` makes ``results/README.md`` and its plots
of these lines and of what is written below, the same bytes again; no number on it is
typed by hand.
"""

import argparse
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from benchmarks.cpu import read_rows
from flax_resnetv2 import RECIPES, comparison, rundir, scores, sweep
from flax_resnetv2.errors import UsageError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUNS = ROOT / "build" / "studies"
SMALL = (
    "cifar10-he2016-resnet20 --architecture.stem-stride 2 --train.epochs 4 "
    "--evaluate-every 4 --checkpoint-every 4"
)
"""The protocol for a CPU: the whole training set four times, at half the resolution,
about two minutes a run on two cores."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """A question, and what is compared to answer it."""

    question: str
    overrides: dict[str, str]
    """Flags, by what the page calls them; with the first the others are compared."""
    why: str
    """What is known of it, and from where."""


_UNIT = "--architecture.semantics."
STUDIES = {
    "stride": Study(
        "Does the stride belong on layer 1 or on layer 2?",
        {"on layer 1, the 1x1": "", "on layer 2, the 3x3": f"{_UNIT}stride-layer 2"},
        "He et al. 2016 stride the 1x1, which throws three of four pixels away "
        "unread; most later code strides the 3x3, which costs more multiply-adds.",
    ),
    "order": Study(
        "What did pre-activation change at this depth?",
        {
            "pre-activation, version 2": "",
            "post-activation, version 1": f"{_UNIT}order post "
            f"{_UNIT}shortcut-input raw {_UNIT}no-final-norm {_UNIT}stem-norm "
            f"{_UNIT}no-first-layer-exception",
        },
        "He et al. 2016 report gains that grow with depth (110 layers and more).",
    ),
    "bridges": Study(
        "What does a bridge around each whole stack give?",
        {"none": "", "around each stack": "--architecture.bridge True"},
        "The article proposes it without a number. Here a bridge is a 1x1 convolution "
        "wherever shapes differ.",
    ),
    "decay": Study(
        "Adam with an L2 term, or AdamW?",
        {
            "AdamW": "--train.optimizer adamw --train.learning-rate 0.003 "
            "--train.weight-decay 0.05",
            "Adam with L2": "--train.optimizer adam_l2 --train.learning-rate 0.003 "
            "--train.weight-decay 1e-4",
        },
        "Loshchilov & Hutter 2019 decouple the decay. Each has a usual rate and decay "
        "here; neither was tuned.",
    ),
    "shortcut": Study(
        "Should shortcuts that change shape read raw or pre-activated maps, and with "
        "what kernel?",
        {
            "pre-activated, 1x1": "",
            "raw, 1x1": f"{_UNIT}shortcut-input raw",
            "pre-activated, 3x3": f"{_UNIT}shortcut-kernel 3",
        },
        "Published nets differ (docs/weights.md).",
    ),
    "reduction": Study(
        "Which depth reduction is possible in the bottleneck?",
        {
            "4": "",
            "2": "--architecture.reduction 2",
            "8": "--architecture.reduction 8",
            "8, twice the units": "--architecture.reduction 8 "
            "--architecture.units 4 4 4",
        },
        "The article says it should be investigated. At 8 with twice the units the "
        "multiply-adds come nearer to those at 4: see the column.",
    ),
    "stacks": Study(
        "Do four or five stacks help?",
        {
            "3": "",
            "4": "--architecture.units 2 2 2 2 --architecture.widths 32 64 128 256 "
            "--architecture.strides 1 2 2 2",
            "5": "--architecture.units 2 2 2 2 2 --architecture.widths 16 32 64 128 "
            "256 --architecture.strides 1 2 2 2 1",
        },
        "The article gives three to five stacks without a comparison.",
    ),
}


def run(names: Sequence[str], minutes: float) -> None:
    """Run studies for so many minutes in all, and take their lines over.

    They are one sweep, so that what several compare with is run once; what has its
    lines in ``results`` is not run again.
    """
    lines = read_rows(RESULTS / "studies.jsonl")
    have = {(x["override"], x["seed"]) for x in lines if x["words"] == SMALL}
    known: list[str] = []
    if (RUNS / "sweep.json").exists():
        known = [override.words for override in sweep.load_sweep(RUNS).overrides]
    asked = [
        flags
        for name in names
        for flags in STUDIES[name].overrides.values()
        if any((flags, seed) not in have for seed in SEEDS)
    ]
    if not asked:
        return
    varied = [f"--vary={flags}" for flags in dict.fromkeys([*known, *asked])]
    words = [*SMALL.split(), *varied, "--seeds", *map(str, SEEDS)]
    command = [sys.executable, "-m", "flax_resnetv2", "sweep", *words]
    process = subprocess.Popen([*command, "--workdir", str(RUNS)], cwd=ROOT)
    try:
        process.wait(60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # it saves, and goes on next time
        process.wait()
    keep("studies", [x | {"words": SMALL} for x in sweep.read_lines(RUNS)])


def keep(name: str, new: Sequence[dict[str, Any]]) -> None:
    """Put lines of finished runs into a file of results, each run once."""
    path = RESULTS / f"{name}.jsonl"

    def which(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["words"], line["override"], line["seed"], *line["devices"]

    done = [line for line in new if line["status"] == "done"]
    lines = {which(line): line for line in [*read_rows(path), *done]}
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    rundir.write_whole(path, text)


def add(recipe: str, directories: Sequence[Path]) -> None:
    """Take over finished runs of a recipe as it is.

    Raises:
        UsageError: a run is of another configuration, or not finished.
    """
    lines = []
    for directory in directories:
        config, metrics = rundir.load_config(directory), rundir.read_metrics(directory)
        rundir.check_same(directory, replace(RECIPES[recipe].config, seed=config.seed))
        if metrics[-1]["epoch"] != config.train.epochs:
            raise UsageError(f"{directory} is not finished; train there further first")
        line = {"words": recipe, "override": "", "seed": config.seed, "status": "done"}
        lines.append(line | sweep.outcome(directory))
    keep("recipes", lines)


def verdict(rows: Sequence[comparison.Row]) -> list[str]:
    """Say of each override what its differences can tell; numbers only of ``rows``."""
    said = []
    for row in rows[1:]:
        d = row.difference
        if d is None or d.spread is None:
            said.append(f"{row.name}: too few runs to tell.")
            continue
        half = d.spread * stats.t.ppf(0.975, d.n - 1)
        low, high = 100 * (d.mean - half), 100 * (d.mean + half)
        between = f"between {low:+.2f} and {high:+.2f} points at 95 % (n = {d.n})"
        if low > 0 or high < 0:
            better = "better" if low > 0 else "worse"
            said.append(f"{row.name}: {better}, {between}.")
        else:
            said.append(f"{row.name}: no difference beyond noise, {between}.")
    return said


def page() -> dict[str, str | bytes]:
    """Make the page and its plots from the lines: file name to contents."""
    files: dict[str, str | bytes] = {}
    text = [
        "# Results",
        "",
        *_wrapped(
            "Made by `python -m benchmarks.studies page` from the lines beside it (one "
            "a run). Every accuracy is of the final epoch on all 10,000 test images of "
            "CIFAR-10; nothing was selected on them."
        ),
        "",
        "## Recipes",
        "",
        *_recipes(read_rows(RESULTS / "recipes.jsonl")),
    ]
    text += ["## Studies", ""]
    text += [f"All runs: `train.py {SMALL}`, and the flags of each row.", ""]
    lines, missing = read_rows(RESULTS / "studies.jsonl"), []
    for name, study in STUDIES.items():
        called = {flags: label for label, flags in study.overrides.items()}
        some = [
            line | {"override": called[line["override"]]}
            for line in lines
            if line["words"] == SMALL and line["override"] in called
        ]
        rows = comparison.compare(list(study.overrides), some)
        if not all(row.accuracy for row in rows):
            missing.append(name)
            continue
        files[f"{name}.png"] = comparison.draw(study.question, rows)
        text += [f"### {study.question}", "", *_wrapped(study.why), ""]
        table = comparison.to_markdown(SMALL, rows, SEEDS, some).splitlines()
        # Without the seconds: other work ran beside some of the runs.
        text += [
            line.replace("`", "").rsplit("|", 2)[0] + "|"
            for line in table
            if line.startswith("|")
        ]
        text += ["", *(f"- {said}" for said in verdict(rows)), ""]
        for label, flags in study.overrides.items():
            text += [f"- {label}: `{flags}`"] if flags else []
        text += ["", f"![accuracy by seed]({name}.png)", "", _where(some), ""]
    if missing:
        text += ["Not run yet: " + ", ".join(missing) + ".", ""]
    text += [
        "## How to read it",
        "",
        *_wrapped(
            "± is the sample standard deviation over seeds (n - 1). A difference is to "
            "the first row, paired by seed; there ± is the standard error, and the "
            "interval below is Student's. A difference within noise is none that was "
            "shown, not one that was shown to be none. Beside single runs stands "
            "Wilson's interval at 95 %, of the images alone."
        ),
    ]
    files["README.md"] = "\n".join(text).rstrip() + "\n"
    return files


def write_page() -> None:
    """Write what ``page`` makes."""
    for name, contents in page().items():
        rundir.write_whole(RESULTS / name, contents)


def _recipes(lines: Sequence[dict[str, Any]]) -> list[str]:
    head = ["recipe", "n", "test accuracy, %", "epochs", "parameters", "seconds"]
    head += ["device", "versions", "commit"]
    table = [head, ["---", "---:", "---:", "---:", "---:", "---:", "---", "---", "---"]]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["words"], _device(line)), []).append(line)
    for (words, device), some in groups.items():
        found = [100 * line["test"]["accuracy"] for line in some]
        if len(found) > 1:
            accuracy = f"{fmean(found):.2f} ± {stdev(found):.2f}"
        else:
            low, high = scores.interval(some[0]["test"], False)
            accuracy = f"{found[0]:.2f} ({100 * low:.2f} to {100 * high:.2f})"
        # Beside other runs on its device a run takes longer than it would.
        seconds = [line["seconds"] for line in some if line.get("alone", True)]
        versions = some[0]["versions"]
        table.append(
            [
                f"`{words}`",
                str(len(some)),
                accuracy,
                str(some[0]["epochs"]),
                f"{some[0]['parameters']:,}",
                f"{fmean(seconds):,.0f}" if seconds else "",
                device,
                ", ".join(
                    f"{name} {versions[name]}"
                    for name in ("jax", "flax", "torch")
                    if name in versions
                ),
                ", ".join(sorted({f"`{line['commit'][:7]}`" for line in some})),
            ]
        )
    rows = ["| " + " | ".join(cells) + " |" for cells in table]
    return [
        *rows,
        "",
        *_wrapped(
            "Seconds are those of whole runs: compiling, training, testing, saving."
        ),
        "",
    ]


def _device(line: dict[str, Any]) -> str:
    kinds = line["devices"]
    return f"{len(kinds)} x {kinds[0]}"


def _where(lines: Sequence[dict[str, Any]]) -> str:
    places = sorted(
        {
            f"{_device(x)}, jax {x['versions']['jax']}, commit `{x['commit'][:7]}`"
            for x in lines
        }
    )
    return f"Run on {'; '.join(places)}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, break_on_hyphens=False)


def main() -> None:
    """Run studies, take runs over, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__.split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run studies, or go on with them")
    running.add_argument("names", nargs="+", choices=STUDIES)
    running.add_argument("--minutes", type=float, default=600, help="for all of them")
    adding = commands.add_parser("add", help="take finished runs of a recipe over")
    adding.add_argument("recipe", choices=RECIPES)
    adding.add_argument("workdirs", nargs="+", type=Path)
    commands.add_parser("page", help="write results/README.md and its plots")
    given = parser.parse_args()
    if given.command == "run":
        run(given.names, given.minutes)
    elif given.command == "add":
        add(given.recipe, given.workdirs)
    write_page()


if __name__ == "__main__":
    main()
