"""Sweeps: what is planned, what is run again, what the table says."""

import fcntl
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flax_resnetv2 import RECIPES, RunError, UsageError
from flax_resnetv2.cli import tools
from flax_resnetv2.errors import Stopped
from flax_resnetv2.reports import sweep, sweep_table
from flax_resnetv2.reports.sweep import (
    join,
    load_sweep,
    plan_sweep,
    read_lines,
    run_sweep,
)

BASE = RECIPES["quickstart"].config


def train(**changes):
    return replace(BASE, train=replace(BASE.train, **changes))


FEW, FEWER = (
    ("--train.epochs 3", train(epochs=3)),
    ("--train.epochs 2", train(epochs=2)),
)


def planned(varied=(("", BASE), FEW), seeds=(0, 1), base=BASE):
    return plan_sweep(["quickstart"], base, varied, seeds)


# The plan


def test_the_queue_goes_seed_by_seed():
    assert [(o.words, seed) for o, seed in planned().queue()] == [
        *(("", 0), ("--train.epochs 3", 0)),
        *(("", 1), ("--train.epochs 3", 1)),
    ]


def test_directories_say_the_override():
    reduction = replace(BASE.architecture, reduction=4)
    varied = [
        ("", BASE),
        ("--train.epochs 3 --train.no-nesterov", train(epochs=3, nesterov=False)),
        ("--architecture.reduction=4", replace(BASE, architecture=reduction)),
        ("--train.lr-drops .5 .6", train(lr_drops=(0.5, 0.6))),
        ("--train.lr-drops .5_.6", train(lr_drops=(0.5, 0.7))),
    ]
    found = [o.directory for o in planned(varied).overrides]
    assert found[:4] == [
        "unchanged",
        "train.epochs_3_train.no-nesterov",
        "architecture.reduction=4",
        "train.lr-drops_.5_.6",
    ]
    assert found[4].startswith("train.lr-drops_.5_.6-")


@pytest.mark.parametrize(
    ("varied", "seeds", "words"),
    [
        ([("", BASE)], (0, 0), r"seeds=\(0, 0\) must be different numbers"),
        ([("", BASE)], (), r"seeds=\(\) must be different numbers, at least one"),
        ([("", BASE)], (-1,), "seeds=-1 must be .* from 0 to 4294967295"),
        (
            [FEW, ("--train.epochs=3", train(epochs=3))],
            (0,),
            "'--train.epochs=3' and --vary '--train.epochs 3' train the same",
        ),
        (
            [("", BASE), ("--log-every 3", replace(BASE, log_every=3))],
            (0,),
            "train the same",
        ),
        (
            [("--train.ema-decay 2", train(ema_decay=2.0))],
            (0,),
            "--vary '--train.ema-decay 2': train.ema_decay=2",
        ),
    ],
)
def test_what_cannot_be_planned(varied, seeds, words):
    with pytest.raises(UsageError, match=words):
        planned(varied, seeds)


def test_every_net_is_planned_before_the_first_run():
    wrong = replace(BASE, architecture=replace(BASE.architecture, reduction=3))
    with pytest.raises(UsageError, match=r"--vary 'x': .*reduction=3 does not divide"):
        planned([("", BASE), ("x", wrong)])


def test_seeds_and_overrides_may_be_added():
    old = planned()
    new = planned([FEWER, ("--train.epochs=3", FEW[1]), ("", BASE)], (2, 1, 0))
    found = join(old, new, Path("s"))
    # Known by the words, and in the directory, of the first time.
    assert [(o.words, o.directory) for o in found.overrides] == [
        ("--train.epochs 2", "train.epochs_2"),
        ("--train.epochs 3", "train.epochs_3"),
        ("", "unchanged"),
    ]
    assert found.seeds == (2, 1, 0)


def test_what_decides_no_number_may_change():
    quiet = replace(BASE, log_every=99)
    found = join(planned([("", BASE)]), planned([("", quiet)], base=quiet), Path("s"))
    assert found.config == quiet


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (planned(seeds=(1, 2)), r"\(seeds: without 0\)"),
        (planned([("", BASE), FEWER]), r"\(without --vary '--train.epochs 3'\)"),
        (
            planned([("", train(ema_decay=0.9))], base=train(ema_decay=0.9)),
            r"\(train.ema_decay: 0.0 -> 0.9\)",
        ),
    ],
)
def test_another_sweep_is_refused(new, words, tmp_path):
    (tmp_path / "sweep.json").write_text(sweep._to_json(planned()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=f"holds another sweep {words}; seeds and"):
        run_sweep(new, tmp_path)
    (tmp_path / ".lock").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_plan_is_read_as_it_was_written(tmp_path):
    (tmp_path / "sweep.json").write_text(sweep._to_json(planned()))
    assert load_sweep(tmp_path) == planned()


def test_a_directory_that_is_another_thing_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(UsageError, match="holds a run; give a sweep another"):
        run_sweep(planned(), tmp_path)
    with pytest.raises(UsageError, match=r"is not a sweep's directory \(no sweep.json"):
        load_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"words": []}')
    with pytest.raises(UsageError, match=r"sweep.json cannot be used \('overrides'\)"):
        load_sweep(tmp_path)


# The table


def line(override, seed, accuracy, seconds=10.0, **more):
    return {
        "override": override,
        "seed": seed,
        "status": "done",
        "reason": None,
        "test": {"loss": 1.0, "accuracy": accuracy, "count": 2000},
        "validation": None,
        "steps": 10,
        "epochs": 2,
        "seconds": seconds,
        "parameters": 5474,
        "multiply_adds": 223552,
        "commit": "abc",
        "python": "3.11.7",
        "versions": {"jax": "0.10.2"},
        "platform": "cpu",
        "devices": ["cpu", "cpu"],
        **more,
    }


def failed(override, seed, reason):
    facts = {"override": override, "seed": seed, "status": "failed"}
    return facts | {"reason": reason}


LINES = [
    *(line("a", 0, 0.90), line("b", 0, 0.91), line("a", 1, 0.92, seconds=12.0)),
    *(line("b", 1, 0.94), line("a", 2, 0.94), failed("b", 2, "no | network")),
]


def test_the_table_has_the_expected_numbers():
    a, b, c = sweep_table.compare(["a", "b", "c"], LINES)
    assert a.accuracy == {0: 0.90, 1: 0.92, 2: 0.94}
    assert (a.test.mean, a.test.spread) == pytest.approx((0.92, 0.02))
    assert a.difference is None
    # Paired: +0.01 and +0.02, whose standard deviation is 0.01 / sqrt 2.
    assert (b.difference.mean, b.difference.spread) == pytest.approx((0.015, 0.005))
    assert b.difference.n == 2
    assert a.seconds == pytest.approx(32 / 3)
    assert (c.accuracy, c.test, c.difference, c.parameters) == ({}, None, None, None)
    page = sweep_table.to_markdown("quickstart", [a, b, c], (0, 1, 2), LINES)
    assert "5 of 9 runs are done; seeds 0, 1, 2." in page
    assert "| `a` | 3 | 92.00 ± 2.00 |  | 5,474 | 223,552 | 11 |" in page
    assert "| `b` | 2 | 92.50 ± 2.12 | +1.50 ± 0.50 | 5,474 | 223,552 | 10 |" in page
    assert "| `c` | 0 |  |  |  |  |  |" in page
    assert "- `b`, seed 2: no \\| network" in page
    assert "- 2 x cpu (cpu); Python 3.11.7, jax 0.10.2; commit abc" in page
    assert "may not be comparable" not in page


def test_one_seed_has_no_deviation():
    a, b = sweep_table.compare(["a", "b"], LINES[:2])
    assert (a.test.text(), b.difference.text("+")) == ("90.00", "+1.00")


def test_a_difference_over_fewer_seeds_says_how_many():
    rows = sweep_table.compare(["b", "a"], LINES)
    page = sweep_table.to_markdown("x", rows, (0, 1, 2), LINES)
    assert "| -1.50 ± 0.50 (n = 2) |" in page


def test_validation_has_a_column_and_other_places_are_said():
    scores = {"loss": 1.0, "accuracy": 0.5, "count": 10}
    lines = [line("a", 0, 0.9, validation=scores), line("a", 1, 0.9, commit="def")]
    page = sweep_table.to_markdown(
        "x", sweep_table.compare(["a"], lines), (0, 1), lines
    )
    assert "| n | validation accuracy, % | test accuracy, % |" in page
    assert "| `a` | 2 | 50.00 | 90.00 ± 0.00 |" in page
    assert "Run on, so times and even results may not be comparable:" in page


def test_the_same_lines_in_any_order_give_the_same_bytes():
    def pages(lines):
        rows = sweep_table.compare(["a", "b", "c"], lines)
        page = sweep_table.to_markdown("x", rows, (0, 1, 2), lines)
        return page, sweep_table.draw_sweep("quickstart", rows)

    mixed = [json.loads(json.dumps(x)) for x in LINES]
    random.Random(0).shuffle(mixed)
    assert pages(LINES) == pages(mixed)
    assert pages(LINES)[1].startswith(b"\x89PNG")
    assert pages(LINES)[1] != pages(LINES[:3])[1]


# The lines


def test_the_newest_line_of_a_run_counts_and_a_damaged_one_does_not(tmp_path):
    lines = [failed("a", 0, "no network"), line("a", 0, 0.5), line("c", 0, 0.6)]
    first, *rest = map(json.dumps, lines)
    damaged = '{"override": "b", "se'
    (tmp_path / "sweep.jsonl").write_text("\n".join([first, damaged, *rest]))
    assert read_lines(tmp_path) == lines[1:]


# The queue; children that are no training, for their ends

ENDS = """
import os, sys
seed = sys.argv[sys.argv.index("--seed") + 1]
print("something")
if seed == "0":
    print("failed: no network", file=sys.stderr)
    sys.exit(1)
os.kill(os.getpid(), 9)
"""


def test_a_failed_run_is_recorded_and_the_queue_goes_on(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "flax_resnetv2")
    monkeypatch.setattr(sweep, "_CHILD", ENDS)
    with pytest.raises(
        RunError, match=r"2 of 2 runs \(\(unchanged\), seed 0; .* seed 1"
    ):
        run_sweep(planned([("", BASE)]), tmp_path)
    assert read_lines(tmp_path) == [
        failed("", 0, "no network"),
        failed("", 1, "ended by SIGKILL"),
    ]
    page = (tmp_path / "sweep.md").read_text()
    assert "0 of 2 runs are done" in page
    assert "- `(unchanged)`, seed 0: no network" in page
    assert (tmp_path / "unchanged" / "seed-0.log").read_text() == (
        "train.py quickstart --no-report --seed 0 --workdir "
        f"{tmp_path / 'unchanged' / 'seed-0'}\n"
        "something\nfailed: no network\n"
    )
    assert caplog.text.count("failed:") == 2


STOPS = """
import sys
open(sys.argv[sys.argv.index("--workdir") + 1] + ".began", "a").write("x")
sys.exit(75)
"""


def test_finished_runs_are_not_repeated_and_a_stopped_one_is_begun_again(
    tmp_path, monkeypatch
):
    """In its directory, where train.py resumes it."""
    monkeypatch.setattr(sweep, "_CHILD", STOPS)
    (tmp_path / "sweep.jsonl").write_text(json.dumps(line("", 0, 0.5)) + "\n")
    for times in (1, 2):
        with pytest.raises(Stopped, match=r"run 2 of 2: \(unchanged\), seed 1"):
            run_sweep(planned([("", BASE)]), tmp_path)
        began = {path.name: path.read_text() for path in tmp_path.rglob("*.began")}
        assert began == {"seed-1.began": "x" * times}
    assert read_lines(tmp_path) == [line("", 0, 0.5)]


# The command

TINY = (
    "quickstart --architecture.units 1 --architecture.widths 8 --train.epochs 2 "
    "--architecture.strides 1 --architecture.stem-width 8 --checkpoint-steps 10"
)


def command(workdir, cache):
    words = [*TINY.split(), "--workdir", str(workdir), "--seeds", "7"]
    return subprocess.Popen(
        [sys.executable, "-m", "flax_resnetv2", "sweep", *words],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(what, seconds=120):
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def starts(run):
    path = run / "environment.json"
    return [start["step"] for start in json.loads(path.read_text())]


def is_free(workdir):
    with (workdir / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_sweep_that_was_killed_and_stopped_goes_on(tmp_path, capsys):
    workdir, cache = tmp_path / "sweep", tmp_path / "cache"
    run = workdir / "unchanged" / "seed-7"

    life = command(workdir, cache)
    wait_for((run / "checkpoints" / "20").exists)
    life.kill()
    life.communicate()
    # The run hears of it, saves and leaves; until then the directory is in use.
    wait_for(lambda: is_free(workdir))
    assert "everything is saved" in run.with_suffix(".log").read_text()

    life = command(workdir, cache)
    wait_for(lambda: len(starts(run)) == 2)
    seen = starts(run)[-1]
    wait_for((run / "checkpoints" / str(seen // 10 * 10 + 20)).exists)
    life.send_signal(signal.SIGTERM)
    output = life.communicate()[0]
    assert life.returncode == 75, output
    assert "stopped by SIGTERM in run 1 of 1: (unchanged), seed 7; everything" in output
    assert read_lines(workdir) == []

    life = command(workdir, cache)
    output = life.communicate()[0]
    assert life.returncode == 0, output
    [line] = read_lines(workdir)
    assert (line["seed"], line["status"], line["steps"]) == (7, "done", 312)
    assert line["test"]["count"] == 2000
    first, second, third = starts(run)
    assert first == 0
    assert 20 <= second < second + 10 < third

    # Finished: the same command and --report write the same, and run nothing.
    before = {p: p.read_bytes() for p in workdir.glob("sweep.*")}
    assert len(before) == 4
    for words in ([*TINY.split(), "--seeds", "7"], ["--report"]):
        assert tools.main(["sweep", *words, "--workdir", str(workdir)]) == 0
        assert capsys.readouterr().out == (workdir / "sweep.md").read_text() + "\n"
    assert {p: p.read_bytes() for p in workdir.glob("sweep.*")} == before
    assert len(starts(run)) == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--vary '\"'", "cannot be read (No closing quotation)"),
        ("--vary '--seed 3'", "give all seeds by --seeds"),
        ("--vary '--architecture.reduction 3'", "reduction=3 does not divide width"),
        ("--vary '' --vary '--train.epochs 8'", "train the same; leave one"),
        ("--seed 3", "give all seeds by --seeds"),
        ("--seeds 1 1", "seeds=(1, 1) must be different numbers"),
        ("--distributed", "leave --distributed and --processes out"),
        (
            "--architecture.head latent --train.label-smoothing 0",
            "architecture.head='latent' has no accuracy, which a sweep compares",
        ),
        ("--report", "is not a sweep's directory (no sweep.json)"),
    ],
)
def test_bad_uses_are_a_line_and_change_nothing(
    flags, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["sweep", "quickstart", "--workdir", "s", *shlex.split(flags)]
    assert tools.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--nope", "Unrecognized options: --nope"),
        ("--train.epochs=x", "Error parsing --train.epochs: invalid literal"),
        ("cifar10-article", "Unrecognized options: cifar10-article"),
        ("--workdir b", "Unrecognized options: --workdir"),
        ("--executor=jit", "Unrecognized options: --executor=jit"),
    ],
)
def test_an_override_of_other_flags_is_refused_as_by_train(
    override, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    code = tools.main(["sweep", "quickstart", "--workdir", "s", "--vary", override])
    assert code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.splitlines()[-1].startswith(f"error: --vary {override!r} is not made")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_leaves_the_classes_to_its_data_set():
    config = RECIPES["cifar100-article"].config
    assert config.architecture.num_classes is None
    planned = sweep.plan_sweep(["cifar100-article"], config, [("", config)], (0,))
    assert planned.overrides[0].config == config
