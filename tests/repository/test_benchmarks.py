"""The measurements measure the same net, in turns, and a queue that fails goes on.

PyTorch and Keras are no dependencies of the tests: ``python -m benchmarks.peers``
compares them.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    cpu,
    gpu,
    jobs,
    operations,
    options,
    peers,
    startup,
    studies,
    textbook,
    together,
)
from benchmarks.measure import RESULTS, append, interleaved, read_rows, summary
from flax_resnetv2 import ARTICLE, HE2016, PRESETS, RECIPES, Architecture, Execution
from flax_resnetv2.cli import train as train_command
from flax_resnetv2.errors import Stopped, UsageError
from flax_resnetv2.reports.sweep_table import compare
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import check_config
from tests.support import tiny

SIZE = (9, 9, 3)
"""Odd, so that padding to both sides differs from padding to one."""


ONE_UNIT = Architecture(units=(1,), widths=(4,), strides=(1,), stem_width=4)
"""Where a training step is compiled."""


def task_of(name, batch=4):
    return peers.Task(name, peers.PARITY[name], SIZE, batch)


def both_logits(task, variables):
    """Ours and the plain ones, not compiled apart from their operations."""
    images = jnp.asarray(task.images())
    ours = peers.create_model(task.architecture)
    plain = peers.PlainLinen(task.plan)
    return [
        jax.jit(lambda v, net=net: net.apply(v, images, train=False))(v)
        for net, v in ((ours, variables), (plain, peers._renamed(variables)))
    ]


@pytest.mark.parametrize("name", peers.PARITY)
def test_plain_linen_is_the_same_net(name):
    task = task_of(name)
    expected, got = both_logits(task, peers.draw_variables(task, stir=True))
    np.testing.assert_allclose(
        got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )


def test_the_compared_nets_are_of_both_versions():
    assert {ARTICLE, HE2016} <= {a.semantics for a in peers.PARITY.values()}


def test_plain_linen_trains_alike():
    task = peers.Task("one unit", ONE_UNIT, tiny.SHAPE, batch=4)
    logits, losses = peers.difference(task, peers.plain_linen, steps=2)
    assert logits <= peers.TOLERANCE["linen"][0]
    assert losses <= peers.TOLERANCE["linen"][1]


def test_another_net_under_a_presets_name_is_refused():
    wrong = peers.Task("he2016-resnet20", tiny.SMALL, tiny.SHAPE, batch=2)
    with pytest.raises(RuntimeError, match=r"he2016-resnet20: \d+ parameters, not 219"):
        peers.plain_linen(wrong, peers.draw_variables(wrong))


@pytest.mark.parametrize(
    "change", [{"head": "latent"}, {"bridge": True}, {"hidden": (8,)}]
)
def test_a_net_that_rivals_do_not_build_is_refused(change):
    with pytest.raises(ValueError, match="rivals have a"):
        _ = peers.Task("odd", Architecture(**change)).plan


def test_flops_are_twice_the_multiply_adds():
    task = peers.Task("one unit", ONE_UNIT, tiny.SHAPE, batch=4)
    convolutions = 9 * 3 * 4 + 4 * 2 + 9 * 2 * 2 + 2 * 4
    assert task.flops == 2 * (64 * convolutions + 4 * 10)
    assert peers.Task.of_preset("article").parameters == PRESETS["article"].parameters


def test_rivals_take_turns():
    seen = []
    runs = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    seconds = interleaved(runs, rounds=3, warmup=1)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert [len(s) for s in seconds.values()] == [3, 3]


def test_each_measured_option_is_one_that_a_person_may_give():
    config, seen = RECIPES["quickstart"].config, set()
    for name, changes in options.OPTIONS.items():
        changed = options.changed(config, changes)
        check_config(changed)
        seen.add(changed)
        words = [f"{p}.{f}" for p, fields in changes.items() for f in fields]
        if name != options.PLAIN:
            assert [name.split()[0].replace("-", "_")] == words
        else:
            assert changed == config
    assert len(seen) == len(options.OPTIONS)


def test_the_options_table_says_what_a_step_takes_more():
    row = {
        "option": "train.clip-norm 1",
        "seconds": 0.0525,
        "more": 0.05,
        "error": 0.01,
    }
    assert options.format_row(row) == "| `--train.clip-norm 1` | 52.5 ms | +5% ± 1% |"
    plain = row | {"option": options.PLAIN}
    assert options.format_row(plain) == "| none | 52.5 ms |  |"


def test_a_summary_is_median_and_middle_half():
    assert summary([2.0, 1.0, 4.0]) == {"seconds": 2.0, "spread": 1.5, "rounds": 3}
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0])["spread"] == 1.0


def row_of(contestant, seconds, run="1", **more):
    row = {"net": "n", "batch": 4, "run": run, "mode": "train", "spread": 0.01}
    row["rounds"] = 3
    row |= {"contestant": contestant, "seconds": seconds, "first_seconds": seconds}
    return row | {"images_per_second": 4 / seconds, "flops_fraction": 0.5} | more


def test_the_cpu_table_joins_the_last_run():
    rows = [row_of("ours", 9.0), row_of("torch", 9.0)]
    rows += [row_of("ours", 1.0, "2"), row_of("torch", 2.0, "2")]
    text = cpu.table(rows)
    assert "| n, 4 | train | ours | 4 | 3 | 1.0% | 2.00 | - |" in text
    assert len(text.splitlines()) == 4


def python(name, code, estimate=0.0, timeout=20.0):
    return jobs.Job(name, (sys.executable, "-c", code), estimate, timeout)


def ok(name, **row):
    return python(name, f"print('noise'); print('RESULT {json.dumps(row)}')")


def statuses(path):
    return [(row["id"], row["status"]) for row in read_rows(path)]


def test_the_queue_goes_on_after_a_failure_and_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    broken = python("broken", "raise MemoryError('RESOURCE_EXHAUSTED: 80 GB')")
    run = lambda *given: jobs.run_queue(list(given), out, 60, 2, {"commit": "c"})  # noqa: E731
    run(broken, ok("a", x=1))
    assert statuses(out) == [("broken", "failed"), ("a", "ok")]
    failed, good = read_rows(out)
    assert failed["error"] == "MemoryError: RESOURCE_EXHAUSTED: 80 GB"
    assert failed["exit_code"] == 1
    assert good["x"] == 1
    assert good["commit"] == "c"
    # Again: what is done stays done, what failed comes after what is new.
    run(broken, ok("a", x=2), ok("b"))
    assert statuses(out)[2:] == [("b", "ok"), ("broken", "failed")]
    assert "3 jobs, 1 done before" in capsys.readouterr().out


def test_a_job_that_takes_too_long_is_ended_with_its_children(tmp_path):
    marker = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    row = jobs.run_job(python("slow", code, timeout=0.5))
    assert row["status"] == "failed"
    assert row["error"].startswith("ended after")
    # The queue's end is no fault of the job's.
    assert jobs.run_job(python("slow", code), left=0.3)["status"] == "cut"
    time.sleep(max(0, began + 3 - time.monotonic()))
    assert not marker.exists()


def test_a_job_is_not_started_when_too_little_time_is_left(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    jobs.run_queue([python("long", "", estimate=100), ok("short")], out, 30, 2)
    assert statuses(out) == [("short", "ok")]
    assert "left out: long" in capsys.readouterr().out


@pytest.mark.parametrize(("cuts", "order"), [(1, "abc"), (2, "acb")])
def test_a_job_that_was_cut_keeps_its_place_once(tmp_path, cuts, order):
    out = tmp_path / "rows.jsonl"
    for _ in range(cuts):
        append(out, {"id": "b", "status": "cut"})
    jobs.run_queue([ok(name) for name in "abc"], out, 60, 2)
    assert "".join(name for name, _ in statuses(out)[cuts:]) == order


def test_a_job_without_a_result_has_failed():
    assert jobs.run_job(python("mute", ""))["error"] == "no output"
    killed = jobs.run_job(python("killed", "import os; os.kill(os.getpid(), 9)"))
    assert killed["exit_code"] == -9


PROGRAM = """
import sys, time
from benchmarks import jobs

class Program:
    facts = {"steps": 2, "batch": 4, "flops_per_step": 6}

    def __init__(self):
        print("noise")
        time.sleep(COMPILING)

    def warm(self):
        return {}

    def run(self):
        began = time.time()
        time.sleep(0.05)
        return {"seconds": 2.0, "began": began}

    def memory(self):
        return {"peak_bytes": None, "at": time.time()}

    def profile(self):
        raise MemoryError("RESOURCE_EXHAUSTED")

jobs.serve(Program)
"""


def program(name, compiling=0.0, **more):
    code = PROGRAM.replace("COMPILING", str(compiling))
    job = python(name, code, estimate=2.0)
    return replace(job, program=True, beside=3.0, **more)


def test_programs_compile_together_and_then_run_one_by_one(tmp_path):
    out = tmp_path / "rows.jsonl"
    beside = replace(ok("tests/x"), beside=1.0)
    began = time.time()
    given = [
        program("train/a", 1.5, also=("profile",)),
        program("train/b", 1.5),
        beside,
        ok("alone"),
    ]
    jobs.run_queue(given, out, 60, 3)
    rows = {row["id"]: row for row in read_rows(out)}
    assert statuses(out) == [
        ("tests/x", "ok"),
        ("train/a", "ok"),
        ("profile/a", "failed"),
        ("train/b", "ok"),
        ("alone", "ok"),
    ]
    assert rows["train/b"]["seconds"] == 1.0
    assert rows["train/b"]["images_per_second"] == 4.0
    assert rows["train/b"]["model_flops"] == 6.0
    assert rows["profile/a"]["error"] == "MemoryError: RESOURCE_EXHAUSTED"
    # Nothing is timed before all are compiled.
    assert rows["train/b"]["at"] > began + 1.5


def test_a_program_that_is_not_ready_in_its_turn_is_cut(tmp_path):
    out = tmp_path / "rows.jsonl"
    began = time.monotonic()
    jobs.run_queue([program("slow", 60.0), program("fast")], out, 12, 2)
    assert statuses(out) == [("slow", "cut"), ("fast", "ok")]
    assert time.monotonic() - began < 14


def test_a_program_that_ends_leaves_its_error(tmp_path):
    out = tmp_path / "rows.jsonl"
    broken = replace(
        python("broken", "raise RuntimeError('no device')"), program=True, beside=1.0
    )
    jobs.run_queue([broken, program("good")], out, 30, 2)
    assert statuses(out) == [("broken", "failed"), ("good", "ok")]
    assert read_rows(out)[0]["error"] == "RuntimeError: no device"


def test_the_plan_is_what_there_is_time_for():
    given = [program("a"), program("b"), python("long", "", 50.0), ok("short")]
    # Compiling takes 3 s for both on two cores, and each runs for 2.
    assert jobs.duration(given[:2], cores=2) == 7.0
    assert jobs.duration(given[:2], cores=1) == 10.0
    chosen, left_out = jobs.choose(given, seconds=20, cores=2)
    assert [job.id for job in chosen] == ["a", "b", "short"]
    assert [job.id for job in left_out] == ["long"]
    text = jobs.plan(given, 20, 2)
    assert "3 of 4 jobs in about 7 of 20 s on 2 cores" in text
    assert text.endswith("left out: long")


def test_kernels_are_added_up_by_name_and_kind():
    kernels = [
        ("loop_fusion.1", 0.0, 2e6),
        ("loop_fusion.22", 1e6, 2e6),  # in part beside the first
        ("sm90_xmma_fprop_nhwc", 5e6, 4e6),
        ("MemcpyD2D", 9e6, 1e6),
    ]
    found = gpu.kernel_table(kernels, steps=2, most=2)
    assert found == {
        "busy": 4.0,
        "gaps": 1.0,
        "launches": 2.0,
        "kinds": {"convolution": 2.0, "copy": 0.5, "elementwise": 2.0},
        "kernels": [["loop_fusion", 1.0, 2.0], ["sm90_xmma_fprop_nhwc", 0.5, 2.0]],
    }


@pytest.mark.parametrize("small", [False, True])
def test_the_queue_names_nets_that_there_are_once(small):
    found = gpu.queue(small)
    names = [job.id for job in found]
    assert len(set(names)) == len(names)
    measured = [n for n in names if n.startswith(("train/", "compile/"))]
    contestants = {name.split("/")[3] for name in measured}
    assert small or contestants >= {*gpu.VARIANTS, gpu.EAGER}
    nets = gpu.TINY_NETS if small else gpu.NETS
    assert {name.split("/")[1] for name in measured} == set(nets)
    assert all(0 < job.estimate + job.beside < job.timeout for job in found)


def test_the_gpu_table_joins_contestants(tmp_path):
    out = tmp_path / "rows.jsonl"
    for name, seconds in (
        ("ours", 1.0),
        (gpu.EAGER, 3.0),
        (gpu.COMPILED + "default", 2.0),
    ):
        row = row_of(name, seconds, compile_seconds=1.5, peak_bytes=None)
        append(out, row | {"id": f"train/n/4/{name}", "status": "ok"})
    append(out, {"id": "tests/ops", "status": "failed", "error": "1 bad"})
    alone = row_of("ours", 1.0, compile_seconds=1.5, lower_seconds=0.25)
    append(out, alone | {"id": "compile/n/4/ours", "status": "ok"})
    text = gpu.table(read_rows(out))
    assert "| n | 4 | ours | 4 | 1.0% | 1000.00 | 3.00 | 2.00 | 1.8 |" in text
    assert "- tests/ops: failed, 1 bad" in text


def test_several_steps_are_one_program_with_the_pipeline_inside():
    net = gpu.Net(ONE_UNIT, tiny.SHAPE, images=16, steps=3)
    task = peers.Task("one unit", ONE_UNIT, tiny.SHAPE, batch=4)
    run, facts = gpu.our_chunk(task, net, peers.Execution(), pipeline=True)
    run()
    run()  # on, with the state that the first one gave back
    assert facts["compile_seconds"] > 0


def test_the_alternatives_table_compares_with_the_default():
    rows = [row_of("ours", 2.0), row_of("ours-remat-units", 4.0)]
    text = cpu.table([row | {"benchmark": "alternatives"} for row in rows])
    assert "of the default" in text
    assert "| ours-remat-units |" in text
    assert "| 0.50 |" in text


def test_operations_are_added_up_by_kind():
    def product(x):
        with jax.named_scope("stack1/unit2/layer3"):
            return jnp.tanh(x @ x)

    text = jax.jit(product).lower(jnp.ones([64, 64])).compile().as_text()
    kinds = operations.describe(text)
    name = next(n for n, kind in kinds.items() if kind.startswith("dot f32[64,64]"))
    assert kinds[name] == "dot f32[64,64], layer3 forward"
    events = [{"ph": "X", "name": name, "dur": 1500}] * 4
    events += [{"ph": "X", "name": "unknown", "dur": 9}, {"ph": "M", "name": name}]
    [row] = operations.costs(text, events, steps=2)
    assert row["seconds"] == pytest.approx(0.003)
    assert row["calls"] == 2
    assert "| dot f32[64,64], layer3 forward | 2 | 3 |" in operations.table(0.01, [row])


def test_the_table_of_starts_takes_the_last_cold_and_the_median_warm_one():
    parts = ("imports", "data", "state", "lower", "compile", "step")

    def row(kind, seconds):
        return {"recipe": "r", "kind": kind, "seconds": seconds} | dict.fromkeys(
            parts, 1.0
        )

    rows = [row("cold", 99.0), row("warm", 98.0), row("cold", 9.0)]
    rows += [row("warm", s) for s in (5.0, 3.0, 4.0)]
    lines = startup.table(rows).splitlines()[2:]
    assert [line.split(" | ")[1:3] for line in lines] == [
        ["cold", "9.0"],
        ["warm", "4.0"],
    ]


def test_seeds_in_one_program_are_the_seeds_one_by_one(float64):
    config = replace(
        tiny.config(ema_decay=0.9),
        architecture=tiny.SMALL,
        execution=Execution(dtype="float64"),
    )
    step, states, batches = together.prepare(config, tiny.SHAPE, range(2))
    alone, joined = jax.jit(step), jax.jit(jax.vmap(step))
    stacked, seeds = together.stack(states), jnp.arange(2)
    for _ in range(2):
        stacked, _ = joined(seeds, stacked, together.stack(batches))
        rows = zip(seeds, states, batches, strict=True)
        states = [alone(*row)[0] for row in rows]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=1e-10),
        *(stacked, together.stack(states)),
    )


def test_neither_torch_nor_keras_nor_the_command_line_is_loaded():
    code = "import sys, benchmarks.gpu; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    # (flax itself loads rich.)
    assert "jax" in loaded
    assert not {"torch", "keras", "tyro", "tensorflow_datasets"} & set(loaded)


# The evidence


def run_line(override, seed, accuracy, **more):
    score = {"accuracy": accuracy, "loss": 1.0, "count": 10_000}
    versions = {"jax": "1", "flax": "2"}
    return {
        "words": "w",
        "override": override,
        "seed": seed,
        "status": "done",
        "test": score,
        "validation": None,
        "seconds": 9.0,
        "parameters": 5,
        "multiply_adds": 7,
        "devices": ["cpu"],
        "versions": versions,
        "commit": "abcdefghij",
    } | more


def test_the_page_of_results_is_made_of_the_committed_lines():
    for name, contents in studies.page().items():
        path = studies.RESULTS / name
        if name.endswith(".md"):
            assert path.read_text() == contents
        else:  # another matplotlib draws other pixels
            assert path.read_bytes()[:24] == contents[:24]  # PNG, and its size


def test_a_verdict_is_a_students_interval_of_paired_differences():
    lines = [run_line("a", seed, 0.5 + 0.01 * seed) for seed in range(3)]
    lines += [
        run_line("b", s, 0.6 + 0.01 * s + 0.001 * (s == 1), multiply_adds=21)
        for s in range(3)
    ]
    lines += [run_line("c", s, 0.5 + 0.02 * (s == 1)) for s in range(3)]
    lines += [run_line("d", 0, 0.9)]
    better, noise, few = studies.conclude(compare(["a", "b", "c", "d"], lines))
    # Differences 10, 10.1, 10: mean 10.033, standard error 0.0333, t = 4.303.
    assert better == (
        "b: better, between +9.89 and +10.18 points at 95 % (n = 3), at 3.00 times the "
        "multiply-adds."
    )
    # 0, 1, -2: mean -0.333, standard error 0.882.
    assert noise == (
        "c: within noise, between -4.13 and +3.46 points at 95 % (n = 3), at the same "
        "cost."
    )
    assert few == "d: too few runs to tell, at the same cost."


def test_a_run_is_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    studies.keep("x", [run_line("a", 0, 0.5), run_line("a", 1, 0.6)])
    again = [run_line("a", 1, 0.7), run_line("a", 2, 0.1, status="failed")]
    studies.keep("x", again)
    rows = read_rows(tmp_path / "x.jsonl")
    assert [(r["seed"], r["test"]["accuracy"]) for r in rows] == [(0, 0.5), (1, 0.7)]


def test_a_short_log_has_a_line_an_epoch():
    def line(epoch, split, loss, accuracy, count):
        told = {"epoch": epoch, "split": split, "loss": loss, "seconds": 10 * epoch}
        return told | {"accuracy": accuracy, "count": count}

    metrics = [
        line(0.5, "train", 2.0, 0.25, 30),
        line(1.0, "train", 1.0, 0.75, 10),
        line(2.0, "train", 0.5, 0.875, 40),
        line(2.0, "test", 0.6, 0.8, 20),
    ]
    assert studies.short_log(metrics) == (
        "epoch 1  loss 1.7500  accuracy 0.3750  10 s\n"
        "epoch 2  loss 0.5000  accuracy 0.8750  test 0.8000  20 s\n"
    )


@pytest.mark.parametrize("name", studies.STUDIES)
@pytest.mark.parametrize("protocol", studies.PROTOCOLS)
def test_what_a_study_compares_can_be_trained(name, protocol):
    for override in studies.STUDIES[name].overrides.values():
        words = [*studies.PROTOCOLS[protocol].words.split(), *override.split()]
        config = train_command.parse(words, "x", "y").config
        check_config(config)
        create_net(config, (32, 32, 3))


def test_the_numbers_of_the_readme_are_made_from_lines():
    readme = (studies.ROOT / "README.md").read_text()
    table = readme.split(f"{studies.BEGIN}\n")[1].split(f"{studies.END}\n")[0]
    assert table.splitlines() == studies.readme_table()
    some = [x for x in read_rows(studies.RESULTS / "recipes.jsonl")
            if x["words"] == "quickstart"]  # fmt: skip
    assert {x["commit"] for x in some} == {some[0]["commit"]}
    accuracy, seconds = studies._accuracy(some), studies._seconds(some)
    told = f"{accuracy} % test accuracy (n = {len(some)}) after {seconds} seconds"
    assert told in " ".join(readme.split())
    linear = read_rows(RESULTS / "linear_baseline.jsonl")[-1]
    assert f"A linear model reaches {100 * linear['test_accuracy']:.2f} %." in readme


def test_a_dirty_tree_is_said_where_its_number_stands():
    line = {"commit": "e86f336dbab0-dirty", "seconds": 3.0}
    assert studies._commits([line]) == "`e86f336`, uncommitted changes"
    both = studies._commits([line, line | {"commit": "e86f336dbab0"}])
    assert both == "`e86f336`, `e86f336`, uncommitted changes"
    beside = line | {"alone": False, "seconds": 9.0}
    assert studies._seconds([line, beside], " s") == "3 s (n = 1)"
    assert studies._seconds([beside]) == "9, other work beside"


def test_what_has_its_lines_is_not_run_again(tmp_path, monkeypatch):
    words, seeds = studies.PROTOCOLS["small"].words, studies.PROTOCOLS["small"].seeds
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "RUNS", tmp_path / "runs")
    first, raw, wide, narrow = studies.STUDIES["shortcut"].overrides.values()
    lines = [run_line(first, seed, 0.5, words=words) for seed in seeds]
    lines += [run_line(raw, seed, 0.5, words=words) for seed in seeds[1:]]
    lines += [run_line(narrow, seed, 0.5, words=words) for seed in seeds]
    lines += [run_line(wide, seeds[1], 0.5, words=words)]
    studies.keep("studies", lines)
    asked = []

    def note(command, seconds):
        asked.append([w.removeprefix("--vary=") for w in command if "--vary" in w])
        return 75 * (len(asked) == 2)  # the second is told to stop

    monkeypatch.setattr(studies, "_let_run", note)
    assert not studies.run(["shortcut"], "small")
    assert asked == [[raw, wide], [wide]]
    studies.keep("studies", [run_line(raw, seeds[0], 0.5, words=words)])
    studies.keep("studies", [run_line(wide, seed, 0.5, words=words) for seed in seeds])
    assert studies.run(["shortcut"], "small")
    assert len(asked) == 2


TRAINING = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE))
print("ready", flush=True)
time.sleep(30)
"""


def test_a_run_of_evidence_ends_when_its_time_is_over():
    command = [sys.executable, "-c", TRAINING.replace("CODE", "75")]
    assert studies._let_run(command, 2) == 75


@pytest.mark.parametrize("code", [75, 0])
def test_a_run_of_evidence_is_told_to_save(code):
    """And nothing is begun after it, though it may just have ended well."""
    command = [sys.executable, "-c", TRAINING.replace("CODE", str(code))]
    code = (
        f"import math; from benchmarks import studies; "
        f"print('saved', studies._let_run({command!r}, math.inf))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=gpu.ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "saved 75\n"


def test_a_job_that_saves_is_told_before_it_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "GRACE", 10)
    kept = replace(python("a", TRAINING.replace("CODE", "75")), saves=True)
    began = time.monotonic()
    assert jobs.run_job(kept, left=12)["status"] == "cut"
    assert time.monotonic() - began < 10
    # However often it was cut, it keeps its place.
    out = tmp_path / "rows.jsonl"
    for _ in range(3):
        append(out, {"id": "b", "status": "cut"})
    given = [ok("a"), replace(ok("b"), saves=True), ok("c")]
    jobs.run_queue(given, out, 60, 2)
    assert statuses(out)[3:] == [("a", "ok"), ("b", "ok"), ("c", "ok")]


def test_the_queue_trains_recipes_and_keeps_their_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "RESULTS", tmp_path)
    monkeypatch.setattr(studies, "RUNS", tmp_path / "studies")
    commands = []

    def note(command, seconds):
        commands.append(command)
        return 75 * (len(commands) == 1)

    monkeypatch.setattr(studies, "_let_run", note)
    with pytest.raises(Stopped, match="not finished"):
        gpu.perform("accuracy/cifar10-fast/1", tiny=False)
    line = run_line("", 1, 0.94, words="cifar10-fast", epochs=40)
    monkeypatch.setattr(studies, "add", lambda *_: [line])
    row = gpu.perform("accuracy/cifar10-fast/1", tiny=False)
    assert row == {key: line[key] for key in ("test", "epochs", "seconds")}
    assert commands[1][1:5] == ["train.py", "cifar10-fast", "--seed", "1"]
    done = {"id": "accuracy/cifar10-fast/1", "status": "ok"} | row
    assert "cifar10-fast/1: 94.00% after 40 epochs, 9 s" in gpu.table([done])


@pytest.mark.parametrize("recipe", ["cifar10-fast", "cifar10-vae"])
def test_the_textbook_loop_refuses_what_it_does_not_have(recipe):
    with pytest.raises(UsageError, match="choose cifar10-cpu-hour"):
        textbook.check(RECIPES[recipe].config)
    textbook.check(RECIPES["cifar10-cpu-hour"].config)
