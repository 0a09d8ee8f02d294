"""Measured accuracies: recipes and studies on CIFAR-10, collected on one page.

    python -m benchmarks.studies run stride order --minutes 60
    python -m benchmarks.studies run stride order --protocol full    # for a GPU
    python -m benchmarks.studies train cifar10-cpu-hour --seed 1
    python -m benchmarks.studies add cifar10-cpu-hour runs/hour
    python -m benchmarks.studies page

``run`` sweeps the overrides of studies over paired seeds, ``train`` trains an unchanged
recipe; both resume where they stopped, and save on SIGTERM. ``add`` adds finished runs
of a recipe. All write lines into ``results/*.jsonl``, one per run, with its scores on
all test images after the last epoch, versions, device and commit. ``page`` makes
``results/README.md`` and its plots, and the table of results in the ``README.md`` of
the project, from these lines and from the texts below, reproducibly; no number of
theirs is typed by hand.
"""

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from benchmarks.measure import read_rows
from flax_resnetv2 import RECIPES
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import modelfile, scores
from flax_resnetv2.reports import sweep, sweep_table
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import count_parameters
from flax_resnetv2.system import files

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
RUNS = ROOT / "build" / "studies"
BEGIN, END = "<!-- begin of results -->", "<!-- end of results -->"
"""Around the table in the README."""
INCLUDED = "cifar10-resnet20"
"""The net in the package whose accuracy the README states."""


@dataclass(frozen=True)
class Protocol:
    """How the runs of studies are trained."""

    words: str
    """Arguments of ``train.py``."""
    seeds: tuple[int, ...]
    about: str


PROTOCOLS = {
    "small": Protocol(
        "cifar10-he2016-resnet20 --architecture.stem-stride 2 --train.epochs 4 "
        "--evaluate-every 4 --checkpoint-every 4",
        (0, 1, 2, 3, 4),
        "The protocol for a CPU: four epochs at half the resolution, about two minutes "
        "per run on two cores.",
    ),
    "full": Protocol(
        "cifar10-he2016-resnet20 --execution.dtype bfloat16 --evaluate-every 30 "
        "--checkpoint-every 10",
        (0, 1, 2, 3, 4),
        "The protocol for a GPU: 30 epochs at full resolution.",
    ),
}


@dataclass(frozen=True)
class Study:
    """A question, and the runs that are compared to answer it."""

    question: str
    overrides: dict[str, str]
    """Flags by their name on the page; the others are compared with the first."""
    why: str
    """What is known already, with its source."""
    reading: str
    """Our conclusion from the runs of the CPU protocol; the tables have the numbers."""


_UNIT = "--architecture.semantics."


def _stacks(widths: str, strides: str) -> str:
    """Return the flags for stacks of two units."""
    units = " ".join("2" for _ in strides.split())
    return (
        f"--architecture.units {units} --architecture.widths {widths} "
        f"--architecture.strides {strides}"
    )


STUDIES = {
    "stride": Study(
        "Does the stride belong on layer 1 or on layer 2?",
        {"on layer 1, the 1x1": "", "on layer 2, the 3x3": f"{_UNIT}stride-layer 2"},
        "He et al. 2016 stride the 1x1 layer, which never reads three of four pixels; "
        "most later code strides the 3x3 layer, at the cost of more multiply-adds.",
        "Reading every pixel helps, for a tenth more multiply-adds.",
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
        "At 20 layers no difference was shown. These runs cannot tell whether depth "
        "decides.",
    ),
    "bridges": Study(
        "Does a bridge around each whole stack help?",
        {"none": "", "around each stack": "--architecture.bridge True"},
        "The article proposes it without a measurement. Here a bridge is a 1x1 "
        "convolution, because every stack changes the shape.",
        "In a net this shallow, a sixth more multiply-adds gained nothing. "
        "Zhang et al. (RoR, arXiv 1608.02908) report gains in deep nets, with "
        "stochastic depth.",
    ),
    "decay": Study(
        "Adam with an L2 term, or AdamW?",
        {
            "AdamW": "--train.optimizer adamw --train.learning-rate 0.003 "
            "--train.weight-decay 0.05",
            "Adam with L2": "--train.optimizer adam_l2 --train.learning-rate 0.003 "
            "--train.weight-decay 1e-4",
        },
        "Loshchilov & Hutter 2019 decouple the decay. Both have their usual rate and "
        "decay here, untuned.",
        "Four epochs are too short for weight decay to matter much: this shows little "
        "more than that both train.",
    ),
    "shortcut": Study(
        "Should shortcuts that change shape read raw or pre-activated maps, and with "
        "what kernel?",
        {
            "pre-activated, 1x1": "",
            "raw, 1x1": f"{_UNIT}shortcut-input raw",
            "pre-activated, 3x3": f"{_UNIT}shortcut-kernel 3",
            "pre-activated, 3x3, narrower": f"{_UNIT}shortcut-kernel 3 "
            "--architecture.widths 40 80 160",
        },
        "Published nets differ (docs/weights.md). The article's author found that "
        "larger kernels converge faster. The narrower net has about the multiply-adds "
        "of the first.",
        "No difference between raw and pre-activated maps was shown. A 3x3 shortcut "
        "makes the largest difference of all, and most of it remains at equal "
        "multiply-adds: with strided 1x1 layers nothing else in a strided unit reads "
        "every pixel.",
    ),
    "reduction": Study(
        "Which depth reduction is possible in the bottleneck?",
        {
            "reduction 4": "",
            "reduction 2": "--architecture.reduction 2",
            "reduction 8": "--architecture.reduction 8",
            "reduction 2, narrower": "--architecture.reduction 2 "
            "--architecture.widths 38 76 152",
            "reduction 8, wider": "--architecture.reduction 8 "
            "--architecture.widths 96 192 384",
        },
        "The article says that this should be investigated. All nets have equal depth; "
        "the narrower and the wider one have about the multiply-adds of the first.",
        "More maps inside the bottleneck help as much as their multiply-adds do: at "
        "equal multiply-adds no difference between 2 and 8 was shown. The papers' 4 is "
        "as good as the book's 2.",
    ),
    "stacks": Study(
        "Do four or five stacks help?",
        {
            "3 stacks": "",
            "4 stacks": _stacks("32 64 128 256", "1 2 2 2"),
            "5 stacks": _stacks("16 32 64 128 256", "1 2 2 2 1"),
            "4 stacks, wider": _stacks("56 112 224 448", "1 2 2 2"),
        },
        "The article names three to five stacks without a comparison. The nets of 4 "
        "and 5 stacks have about the parameters of the first net, the wider net of 4 "
        "stacks has its multiply-adds.",
        "More stacks did not help: at half the resolution, the first stacks become "
        "narrow, and the last ones have maps of 2x2 pixels. Larger images may give "
        "another answer.",
    ),
}


def run(names: Sequence[str], protocol: str, minutes: float = math.inf) -> bool:
    """Run studies for at most ``minutes``, and store their lines.

    Runs that several studies share are done once, and runs with a line in ``results``
    are not repeated. Seeds are run one after the other, so that studies that end early
    still have complete pairs.

    Returns:
        Whether every run is done.
    """
    how, end = PROTOCOLS[protocol], time.monotonic() + 60 * minutes
    asked = {
        flags: None for name in names for flags in STUDIES[name].overrides.values()
    }
    for seed in how.seeds:
        lines = read_rows(RESULTS / "studies.jsonl")
        have = {(x["override"], x["seed"]) for x in lines if x["words"] == how.words}
        missing = [flags for flags in asked if (flags, seed) not in have]
        if not missing:
            continue
        if time.monotonic() > end:
            return False
        directory = RUNS / protocol / f"seed-{seed}"
        if (directory / "sweep.json").exists():  # a sweep only grows
            known = (o.words for o in sweep.load_sweep(directory).overrides)
            missing = list(dict.fromkeys([*known, *missing]))
        command = [sys.executable, "-m", "flax_resnetv2", "sweep", *how.words.split()]
        command += [f"--vary={flags}" for flags in missing]
        command += ["--seeds", str(seed), "--workdir", str(directory)]
        code = _let_run(command, end - time.monotonic())
        keep("studies", [x | {"words": how.words} for x in sweep.read_lines(directory)])
        if code:
            return False
    return True


def train(recipe: str, seed: int, minutes: float = math.inf) -> dict[str, Any] | None:
    """Train an unchanged recipe for at most ``minutes``.

    Returns:
        Its stored line, or None if it is not finished.
    """
    directory = RUNS.parent / "recipes" / f"{recipe}-{seed}"
    command = [sys.executable, "train.py", recipe, "--seed", str(seed)]
    if _let_run([*command, "--workdir", str(directory)], 60 * minutes):
        return None
    (line,) = add(recipe, [directory])
    return line


def _let_run(command: Sequence[str], seconds: float) -> int:
    """Run a command, and send it SIGTERM when the time is over or SIGTERM arrives.

    Returns:
        Its exit code; 75 if it exits with 0 after SIGTERM arrived.
    """
    process, told = subprocess.Popen(command, cwd=ROOT), False

    def tell(*_: object) -> None:
        nonlocal told
        told = True
        process.terminate()

    # A handler, so that this process outlives the signal and takes lines over.
    before = signal.signal(signal.SIGTERM, tell)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(None if seconds == math.inf else max(0, seconds))
        if process.poll() is None:
            process.terminate()
        return process.wait() or (75 if told else 0)
    finally:
        signal.signal(signal.SIGTERM, before)


def keep(name: str, new: Sequence[dict[str, Any]]) -> None:
    """Add the lines of finished runs to a file of results, one line per run."""
    path = RESULTS / f"{name}.jsonl"

    def which(line: dict[str, Any]) -> tuple[Any, ...]:
        return line["words"], line["override"], line["seed"], *line["devices"]

    done = [line for line in new if line["status"] == "done"]
    lines = {which(line): line for line in [*read_rows(path), *done]}
    text = "".join(json.dumps(line) + "\n" for line in lines.values())
    files.write_whole(path, text)


def add(recipe: str, directories: Sequence[Path]) -> list[dict[str, Any]]:
    """Add finished runs of an unchanged recipe to the results.

    Returns:
        Their lines.

    Raises:
        UsageError: a run has another configuration, or is not finished.
    """
    lines = []
    for directory in directories:
        config, metrics = (
            run_directory.load_config(directory),
            run_directory.read_metrics(directory),
        )
        run_directory.check_same(
            directory, replace(RECIPES[recipe].config, seed=config.seed)
        )
        if metrics[-1]["epoch"] != config.train.epochs:
            raise UsageError(f"{directory} is not finished; train there further first")
        line = {"words": recipe, "override": "", "seed": config.seed, "status": "done"}
        lines.append(line | sweep.outcome(directory))
        keep_log(recipe, config.seed, short_log(metrics))
    keep("recipes", lines)
    return lines


def keep_log(recipe: str, seed: int, text: str) -> None:
    """Store the short log of a run."""
    directory = RESULTS / "logs"
    directory.mkdir(exist_ok=True)
    files.write_whole(directory / f"{recipe.replace(' ', '-')}-{seed}.txt", text)


def short_log(metrics: Sequence[dict[str, Any]]) -> str:
    """Return a run's metrics, one line per epoch: training means and test scores."""
    text = ""
    for epoch in range(1, math.ceil(metrics[-1]["epoch"]) + 1):
        some = [line for line in metrics if epoch - 1 < line["epoch"] <= epoch]
        trained = [line for line in some if line["split"] == "train"]
        count = sum(line["count"] for line in trained)
        text += f"epoch {epoch}"
        for name in ("loss", "accuracy"):
            mean = sum(line[name] * line["count"] for line in trained) / count
            text += f"  {name} {mean:.4f}"
        for line in some:
            if line["split"] != "train":
                text += f"  {line['split']} {line['accuracy']:.4f}"
        text += f"  {some[-1]['seconds']:.0f} s\n"
    return text


def interval(row: sweep_table.Row) -> tuple[float, float] | None:
    """Return Student's 95 % interval of a mean difference, in points; None if n < 2."""
    d = row.difference
    if d is None or d.spread is None:
        return None
    half = d.spread * stats.t.ppf(0.975, d.n - 1)
    return 100 * (d.mean - half), 100 * (d.mean + half)


def verdict(row: sweep_table.Row) -> str:
    """Return whether an override is better, worse or within noise."""
    found = interval(row)
    if found is None:
        return "too few runs to tell"
    low, high = found
    if low <= 0 <= high:
        return "within noise"
    return "better" if low > 0 else "worse"


def conclude(rows: Sequence[sweep_table.Row]) -> list[str]:
    """Return a sentence about each override of a study."""
    said = []
    for row in rows[1:]:
        found, between = interval(row), ""
        if found and row.difference:
            low, high = found
            between = f", between {low:+.2f} and {high:+.2f} points at 95 % "
            between += f"(n = {row.difference.n})"
        said.append(f"{row.name}: {verdict(row)}{between}{_cost(rows[0], row)}.")
    return said


def _cost(first: sweep_table.Row, row: sweep_table.Row) -> str:
    """Return the cost of an override relative to the first."""
    times = [
        f"{there / here:.2f} times the {what}"
        for what, here, there in (
            ("multiply-adds", first.multiply_adds, row.multiply_adds),
            ("parameters", first.parameters, row.parameters),
        )
        if here and there and f"{there / here:.2f}" != "1.00"
    ]
    return f", at {' and '.join(times)}" if times else ", at the same cost"


def page() -> dict[str, str | bytes]:
    """Make the page and its plots from the lines: file name to contents."""
    files: dict[str, str | bytes] = {}
    text = [
        "# Results",
        "",
        *_wrapped(
            "`python -m benchmarks.studies page` makes this page from the lines in "
            "this directory, one per run. Every accuracy is that of the final epoch on "
            "all test images (10,000 for CIFAR-10); nothing was selected on them. "
            "`logs/` has one line per epoch."
        ),
        "",
        "## Recipes",
        "",
        *_recipes(read_rows(RESULTS / "recipes.jsonl")),
    ]
    text += ["## Studies", ""]
    text += [f"- `train.py {how.words}`: {how.about}" for how in PROTOCOLS.values()]
    text += ["", "| study | compared | with | difference, points (95 %) | n | | cost |"]
    text += ["| --- | --- | --- | ---: | ---: | --- | ---: |"]
    lines, missing, sections = read_rows(RESULTS / "studies.jsonl"), [], []
    for name, study in STUDIES.items():
        for protocol, how in PROTOCOLS.items():
            which = name if protocol == "small" else f"{name}-{protocol}"
            some = _of_study(lines, study, how)
            rows = sweep_table.compare(list(study.overrides), some)
            first, *others = rows
            if not first.accuracy or not any(row.accuracy for row in others):
                missing.append(which)
                continue
            missing += [f"{which}: {row.name}" for row in rows if not row.accuracy]
            rows = [row for row in rows if row.accuracy]
            files[f"{which}.png"] = sweep_table.draw_sweep(study.question, rows)
            text += [f"| {which} | {_summary(row, rows[0])} |" for row in rows[1:]]
            sections += _section(which, study, how, rows, some)
    text += [""]
    if missing:
        text += [*_wrapped("Not run yet: " + "; ".join(missing) + "."), ""]
    text += sections
    text += [
        "## How to read it",
        "",
        *_wrapped(
            "*Cost* is the ratio of multiply-adds. After an accuracy, ± is the sample "
            "standard deviation over seeds (n - 1). A difference is relative to the "
            "first row, paired by seed; after it, ± is the standard error, and the "
            "interval is Student's. *Within noise* means that no difference was shown, "
            "not that there is none; at 95 %, one of twenty comparisons of equal nets "
            "seems to show a difference by chance. Single runs have Wilson's 95 % "
            "interval, which covers only the choice of the test images."
        ),
    ]
    files["README.md"] = "\n".join(text).rstrip() + "\n"
    return files


def _of_study(
    lines: Sequence[dict[str, Any]], study: Study, how: Protocol
) -> list[dict[str, Any]]:
    """Return a study's lines of one protocol, with the names of its overrides."""
    called = {flags: label for label, flags in study.overrides.items()}
    return [
        line | {"override": called[line["override"]]}
        for line in lines
        if line["words"] == how.words
        and line["override"] in called
        and line["seed"] in how.seeds
    ]


def _summary(row: sweep_table.Row, first: sweep_table.Row) -> str:
    """Return an override's cells in the table of all studies."""
    found, d, cells = interval(row), row.difference, ["", "0"]
    if d:
        between = f" ({found[0]:+.2f} to {found[1]:+.2f})" if found else ""
        cells = [f"{100 * d.mean:+.2f}{between}", str(d.n)]
    cost = (row.multiply_adds or 0) / (first.multiply_adds or 1)
    cells = [row.name, first.name, *cells, verdict(row), f"{cost:.2f}"]
    return " | ".join(cells)


def _section(
    name: str,
    study: Study,
    how: Protocol,
    rows: Sequence[sweep_table.Row],
    lines: Sequence[dict[str, Any]],
) -> list[str]:
    """Return a study's section: question, table, conclusion, flags and plot."""
    text = [f"### {name}: {study.question}", "", *_wrapped(study.why), ""]
    table = sweep_table.to_markdown(how.words, rows, how.seeds, lines).splitlines()
    # Without the seconds: other work ran beside some of the runs.
    text += [
        line.replace("`", "").rsplit("|", 2)[0] + "|"
        for line in table
        if line.startswith("|")
    ]
    text += ["", *(f"- {said}" for said in conclude(rows)), ""]
    if how is PROTOCOLS["small"]:
        text += [*_wrapped(study.reading), ""]
    for label, flags in study.overrides.items():
        text += [f"- {label}: `{flags}`"] if flags else []
    return [*text, "", f"![accuracy by seed]({name}.png)", "", _where(lines), ""]


def write_page() -> None:
    """Write the page and its plots, and the table of the project's README."""
    for name, contents in page().items():
        files.write_whole(RESULTS / name, contents)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(f"{BEGIN}\n")
    _, after = rest.split(f"{END}\n")
    table = "".join(f"{line}\n" for line in readme_table())
    files.write_whole(readme, f"{before}{BEGIN}\n{table}{END}\n{after}")


def readme_table() -> list[str]:
    """Return the table of the README: recipes that were run, and the included net."""
    head = ["command", "parameters", "epochs", "test accuracy, %", "time"]
    head += ["device", "commit"]
    table = [head, ["---", *["---:"] * 2, *["---"] * 4]]
    for words, some in _by_recipe(read_rows(RESULTS / "recipes.jsonl")):
        recipe, _, other = words.partition(" in ")
        command = f"`python train.py {recipe}`"
        if other:
            command = f"`python -m benchmarks.textbook {recipe}`, in {other}"
        table.append([command, *_measured(some), _versions(some[0]), _commits(some)])
    net = modelfile.load(modelfile.locate(INCLUDED))
    line = {
        "test": net.test,
        "epochs": f"{net.test['epoch']:g}",
        "parameters": count_parameters(net.config, tuple(net.summary["image_shape"])),
        "seconds": net.test["seconds"],
        "alone": False,  # other work ran on the machine
        **net.environment,
    }
    card = f"flax_resnetv2/inference/trained/{INCLUDED}.md"
    text = f"`{INCLUDED}`, which comes along ([model card]({card}))"
    table.append([text, *_measured([line]), _versions(line), _commits([line])])
    return ["| " + " | ".join(cells) + " |" for cells in table]


def _by_recipe(
    lines: Sequence[dict[str, Any]],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Group the lines of runs that differ only in their seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["words"], _device(line)), []).append(line)
    return [(words, some) for (words, _), some in groups.items()]


def _measured(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return parameters, epochs, accuracy and time of runs for the README."""
    accuracy = _accuracy(lines)
    if len(lines) > 1:
        accuracy += f" (n = {len(lines)})"
    time = _seconds(lines, " s")
    return [f"{lines[0]['parameters']:,}", str(lines[0]["epochs"]), accuracy, time]


def _recipes(lines: Sequence[dict[str, Any]]) -> list[str]:
    head = ["recipe", "n", "test accuracy, %", "published", "epochs", "parameters"]
    head += ["seconds", "device", "commit"]
    table = [head, ["---", "---:", "---:", "---", *["---:"] * 2, *["---"] * 3]]
    for words, some in _by_recipe(lines):
        published = RECIPES[words].published if words in RECIPES else None
        table.append(
            [
                f"`{words}`",
                str(len(some)),
                _accuracy(some),
                published or "",
                str(some[0]["epochs"]),
                f"{some[0]['parameters']:,}",
                _seconds(some),
                _versions(some[0]),
                _commits(some),
            ]
        )
    rows = ["| " + " | ".join(cells) + " |" for cells in table]
    wait = ["| recipe not yet run to its end | published | epochs | parameters |"]
    wait += ["| --- | --- | ---: | ---: |"]
    for name, recipe in RECIPES.items():
        if recipe.published and name not in {line["words"] for line in lines}:
            parameters = count_parameters(recipe.config, (32, 32, 3))
            cells = f"`{name}`", recipe.published, str(recipe.config.train.epochs)
            wait.append(f"| {' | '.join(cells)} | {parameters:,} |")
    return [
        *rows,
        "",
        *wait,
        "",
        *_wrapped(
            "Seconds are those of whole runs: compiling, training, testing and saving. "
            "docs/recipes.md lists all recipes, also those that were not run."
        ),
        "",
    ]


def certificate(recipe: str) -> str:
    """Return a line with a recipe's measured accuracy and the device."""
    lines = [x for x in read_rows(RESULTS / "recipes.jsonl") if x["words"] == recipe]
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(_device(line), []).append(line)
    told = [
        f"{_accuracy(some)} %, n = {len(some)}, {device}"
        for device, some in groups.items()
    ]
    return "; ".join(told) or "not run"


def _accuracy(lines: Sequence[dict[str, Any]]) -> str:
    """Return the test accuracy of runs that differ in their seeds, in percent."""
    found = [100 * line["test"]["accuracy"] for line in lines]
    if len(found) > 1:
        return f"{fmean(found):.2f} ± {stdev(found):.2f}"
    low, high = scores.interval(lines[0]["test"], False)
    return f"{found[0]:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _commits(lines: Sequence[dict[str, Any]]) -> str:
    """Return the commits of runs, and whether the files differed from them."""
    found = {(line["commit"][:7], "dirty" in line["commit"]) for line in lines}
    return ", ".join(
        f"`{commit}`" + (", uncommitted changes" if dirty else "")
        for commit, dirty in sorted(found)
    )


def _seconds(lines: Sequence[dict[str, Any]], unit: str = "") -> str:
    """Return the mean time of runs; beside other work a run takes longer."""
    alone = [line["seconds"] for line in lines if line.get("alone", True)]
    if not alone:
        mean = fmean(line["seconds"] for line in lines)
        return f"{mean:,.0f}{unit}, other work beside"
    of = "" if len(alone) == len(lines) else f" (n = {len(alone)})"
    return f"{fmean(alone):,.0f}{unit}{of}"


def _versions(line: dict[str, Any]) -> str:
    """Return the device of a run and its main packages."""
    packages = [name for name in ("jax", "torch") if name in line["versions"]]
    found = (f"{name} {line['versions'][name]}" for name in packages)
    return ", ".join([_device(line), *found])


def _device(line: dict[str, Any]) -> str:
    kinds = line["devices"]
    return f"{len(kinds)} x {kinds[0]}"


def _where(lines: Sequence[dict[str, Any]]) -> str:
    places = sorted(
        {
            f"{_device(x)}, jax {x['versions']['jax']}, commit {_commits([x])}"
            for x in lines
        }
    )
    return f"Run on {'; '.join(places)}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 88, break_on_hyphens=False)


def main() -> None:
    """Run studies, add runs, or write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__.split("\n\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run studies, or resume them")
    running.add_argument("names", nargs="+", choices=STUDIES)
    running.add_argument("--protocol", choices=PROTOCOLS, default="small")
    training = commands.add_parser("train", help="train a recipe, or resume it")
    training.add_argument("recipe", choices=RECIPES)
    training.add_argument("--seed", type=int, default=0)
    for command in (running, training):
        command.add_argument(
            "--minutes", type=float, default=math.inf, help="time limit"
        )
    adding = commands.add_parser("add", help="add finished runs of a recipe")
    adding.add_argument("recipe", choices=RECIPES)
    adding.add_argument("workdirs", nargs="+", type=Path)
    commands.add_parser("page", help="write results/README.md and its plots")
    given = parser.parse_args()
    if given.command == "run":
        run(given.names, given.protocol, given.minutes)
    elif given.command == "train":
        train(given.recipe, given.seed, given.minutes)
    elif given.command == "add":
        add(given.recipe, given.workdirs)
    write_page()


if __name__ == "__main__":
    main()
