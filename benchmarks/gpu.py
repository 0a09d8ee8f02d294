"""All measurements on a GPU in one command, the most important first.

    python -m benchmarks.gpu --minutes 25
    python -m benchmarks.gpu --tiny        # the whole queue on a CPU, on tiny nets
    python -m benchmarks.gpu --table

A queue of jobs, each in its own process, so that a failure affects no other job: it
leaves a row with the last line of its error. Rows are appended to
``benchmarks/results/gpu.jsonl``. The same command resumes where it stopped: a job with
a row of status "ok" is not run again, failed jobs come after those never tried, and no
job is started for which too little time is left.

We train in bfloat16 as ``fit`` does: several steps per dispatch, on a data set in the
device's memory, with every batch gathered, cropped and mirrored inside the step.
PyTorch trains under bfloat16 autocast, channels_last, with its fused SGD, on one
normalized batch that stays on the device. Both wait once for the same number of steps.
This needs jax, flax, optax, numpy, pytest and torch, but not the packages of the
command line.

Jobs: "tests/FILE" (its fast tests that need one device, products in full float32),
"peak" (matrix product and copy), "train/NET/BATCH/CONTESTANT", and
"pipeline/NET/BATCH": gathering, normalizing and augmenting in comparison with one
normalized batch, in turns, as a share of a step; and, if CIFAR-10 is available
(``TFDS_DATA_DIR``), "accuracy/RECIPE/SEED" and "study/NAME", which add their lines to
``results`` (``benchmarks.studies page`` makes the page). These two save their state
when the time is over and resume next time, so half an hour is enough to make progress.
The model's FLOPs are six per multiply-add of ``layer_table``.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import peers
from benchmarks.cpu import read_rows
from benchmarks.measure import RESULTS, append, interleaved, summary
from flax_resnetv2.data.batch import Batch, Split, epoch_order, gather_batch
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.modules import create_model
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.model.semantics import HE2016
from flax_resnetv2.training.augment import AugmentConfig, positions
from flax_resnetv2.training.step import make_train_step

ROOT = Path(__file__).parent.parent
MARK = "RESULT "
"""Prefix of the line in which a job's process returns its row."""
AUGMENT = AugmentConfig(mean=peers.PIXELS.mean, std=peers.PIXELS.std)
EAGER, COMPILED = "torch-eager", "torch-compile-"
TESTS = {
    "ops": "tests/model/test_ops.py",
    "model": "tests/model/test_modules.py",
    "training": "tests/training/test_step.py",
    "augment": "tests/training/test_augment.py",
}
"""Test files by the name of the job that runs them."""
GRACE = 60
"""Seconds that a job has for saving."""
ACCURACY = (
    ("cifar10-accurate", 5),
    ("cifar10-he2016-resnet164-paper", 5),
    ("cifar10-atienza-resnet56v2-book", 3),
    ("cifar10-atienza-resnet164v2-book", 3),
)
"""Recipes and their numbers of seeds, after ``cifar10-fast``."""
STUDIES = "stride", "order", "shortcut", "bridges", "reduction", "stacks", "decay"
"""The most important first."""

LIKE_RESNET50 = Architecture(
    units=(3, 4, 6, 3),
    widths=(256, 512, 1024, 2048),
    strides=(1, 2, 2, 2),
    reduction=4,
    stem_width=64,
    stem_kernel=7,
    stem_stride=2,
    stem_pool=True,
    num_classes=1000,
    # PyTorch has no other padding of its own: with "same" it would pay for a copy.
    semantics=replace(HE2016, padding="symmetric"),
)
_TINY = Architecture(
    units=(1, 1), widths=(8, 16), strides=(1, 2), reduction=4, stem_width=8,
    semantics=HE2016,
)  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A net of the table, and its data."""

    architecture: Architecture
    image_shape: tuple[int, int, int]
    images: int
    """Number of random images in the data set on the device."""
    steps: int
    """Steps per dispatch."""


NETS = {
    name: Net(PRESETS[name].architecture, (32, 32, 3), 50_000, steps)
    for name, steps in (
        ("he2016-resnet20", 50),
        ("he2016-resnet164", 20),
        ("he2016-resnet1001", 5),
    )
} | {"resnet50-sized": Net(LIKE_RESNET50, (224, 224, 3), 4096, 10)}
TINY_NETS = {
    "tiny": Net(_TINY, (16, 16, 3), 64, 2),
    "tiny-pooled": Net(
        replace(
            LIKE_RESNET50,
            units=(1, 1),
            widths=(8, 16),
            strides=(1, 2),
            stem_width=8,
            num_classes=10,
        ),
        (32, 32, 3),
        64,
        2,
    ),
}


@dataclass(frozen=True)
class Job:
    """One process of the queue."""

    id: str
    command: tuple[str, ...]
    """The command; it prints ``MARK`` and a JSON object, or fails."""
    estimate: float
    """Seconds that must be left to start it."""
    timeout: float
    """Seconds after which it is terminated."""
    saves: bool = False
    """Whether it saves on SIGTERM and later resumes."""


def run_queue(
    jobs: list[Job], out: Path, seconds: float, about: dict[str, Any] | None = None
) -> None:
    """Run the jobs without a row of status "ok" in ``out``, as long as time is left.

    Args:
        jobs: the most important first.
        out: file of JSON lines; every job that was started appends one: "ok",
            "failed" (with "error"), or "cut" if the queue's time was over first.
        seconds: for all of them together.
        about: fields for every row.
    """
    end = time.monotonic() + seconds
    rows = read_rows(out)
    tries = Counter(row["id"] for row in rows)
    status = {row["id"]: row["status"] for row in rows}
    waiting = [job for job in jobs if status.get(job.id) != "ok"]
    # One cut once keeps its place; cut again, it may be longer than any run.
    waiting.sort(
        key=lambda j: status.get(j.id) == "failed" or (tries[j.id] > 1 and not j.saves)
    )
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} done before", flush=True)
    for job in waiting:
        left = end - time.monotonic()
        if left < job.estimate:
            print(f"{job.id}: not started, {left:.0f} s left", flush=True)
            continue
        print(f"{job.id}: started, {left:.0f} s left", flush=True)
        row = run_job(job, left)
        peak = _value(read_rows(out), "peak", "bfloat16_flops")
        if peak and "model_flops" in row:
            row["fraction_of_peak"] = round(row["model_flops"] / peak, 4)
        append(out, {"benchmark": "gpu"} | row | (about or {}))


def run_job(job: Job, left: float = math.inf) -> dict[str, Any]:
    """Run one job in its own process group; return its row, whatever happens."""
    began, limit = time.monotonic(), min(job.timeout, left)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(limit - GRACE if job.saves else limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            if job.saves:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:
            # The whole group: compilers' workers would hold the device.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    seconds = round(time.monotonic() - began, 1)
    row = {"id": job.id, "status": "ok", "job_seconds": seconds}
    found = [line for line in text.splitlines() if line.startswith(MARK)]
    if process.returncode == 0 and found:
        return row | json.loads(found[-1].removeprefix(MARK))
    if timed_out and left < job.timeout:
        return row | {"status": "cut", "error": f"time over after {seconds} s"}
    if timed_out:
        return row | {"status": "failed", "error": f"ended after {seconds} s"}
    return row | {
        "status": "failed",
        "exit_code": process.returncode,
        "error": last_error(text) or "no output",
    }


def last_error(text: str) -> str:
    """Return the last line that names an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = re.compile(r"\w(Error|Exception)\b|RESOURCE_EXHAUSTED|^(E |FAILED)")
    errors = [line for line in lines if telling.search(line)]
    return (errors or lines or [""])[-1][:500]


def queue(tiny: bool) -> list[Job]:
    """Return all jobs, the most important first."""
    ours, eager, default = "ours", EAGER, COMPILED + "default"
    graphs = COMPILED + "reduce-overhead"
    tuned = COMPILED + "max-autotune-no-cudagraphs"
    every = (ours, eager, default, graphs, tuned)
    kept, units = "ours-remat-nothing", "ours-remat-units"
    n20, n164, n1001, big = (
        "he2016-resnet20", "he2016-resnet164", "he2016-resnet1001", "resnet50-sized",
    )  # fmt: skip
    if tiny:
        plan = [
            ("tiny", 8, (*every, kept, units)),
            ("tiny-pooled", 8, (ours, eager, default)),
            ("tiny", 8, None),
            ("tiny-pooled", 8, None),
        ]
    else:
        plan = [
            (n164, 128, (ours, eager, default, graphs)),
            (n164, 512, (ours, eager, default)),
            (big, 128, (ours, eager, default)),
            (big, 256, (ours, eager, default)),
            (n20, 128, (ours, eager, default, graphs)),
            (n20, 512, (ours, eager, default)),
            (n1001, 128, (ours, eager, kept, units)),
            (n164, 128, None),
            (big, 128, None),
            (n20, 128, None),
            (n164, 128, (tuned, kept, units)),
            (big, 128, (tuned, graphs)),
            (n164, 256, (ours, eager, default)),
            (n164, 1024, (ours, eager, default)),
            (n20, 1024, (ours, eager, default)),
            (n20, 256, (ours, eager, default)),
            (big, 512, (ours, eager, default)),
            (n1001, 256, (ours, units, eager)),
            (n1001, 512, (units,)),
            (n1001, 128, (default,)),
            (n1001, 1024, (units,)),
            (big, 1024, (ours, units)),
        ]
    seconds = {n20: 45, n164: 90, n1001: 240, big: 75}
    files = list(TESTS)[-1:] if tiny else TESTS
    jobs = [*(_job(f"tests/{f}", tiny, 90) for f in files), _job("peak", tiny, 45)]
    if not tiny:
        jobs += [_accuracy_job("cifar10-fast", seed) for seed in range(5)]
    for net, batch, contestants in plan:
        estimate = seconds.get(net, 10)
        if contestants is None:
            jobs.append(_job(f"pipeline/{net}/{batch}", tiny, 1.5 * estimate))
        for name in contestants or ():
            # Seconds: eager compiles nothing, Inductor takes longer than XLA.
            factor = {ours: 1, eager: 0.6}.get(name, 2 if "torch" in name else 1)
            job = f"train/{net}/{batch}/{name}"
            jobs.append(_job(job, tiny, factor * estimate))
    if not tiny:
        jobs += [
            _accuracy_job(recipe, seed) for recipe, n in ACCURACY for seed in range(n)
        ]
        jobs += [
            replace(_job(f"study/{name}", tiny, 180), timeout=math.inf, saves=True)
            for name in STUDIES
        ]
    return jobs


def _accuracy_job(recipe: str, seed: int) -> Job:
    job = _job(f"accuracy/{recipe}/{seed}", tiny=False, estimate=2 * GRACE)
    return replace(job, timeout=math.inf, saves=True)


def _job(name: str, tiny: bool, estimate: float) -> Job:
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", name]
    return Job(name, (*command, *["--tiny"] * tiny), estimate, max(2 * estimate, 120))


def perform(name: str, tiny: bool) -> dict[str, Any]:
    """Run the job ``name`` in this process and return its row."""
    kind, *rest = name.split("/")
    if kind == "tests":
        return run_tests(TESTS[rest[0]], tiny)
    if kind == "peak":
        return measure_peak(tiny)
    if kind in ("accuracy", "study"):
        return gather_evidence(kind, *rest)
    net, batch = (TINY_NETS if tiny else NETS)[rest[0]], int(rest[1])
    task = peers.Task(
        rest[0], net.architecture, net.image_shape, batch, dtype="bfloat16"
    )
    row = {"net": rest[0], "batch": batch}
    if kind == "pipeline":
        return row | measure_pipeline(task, net)
    contestant = rest[2]
    measure = measure_torch if contestant.startswith("torch") else measure_ours
    row |= {"contestant": contestant} | measure(task, net, contestant, tiny)
    row["images_per_second"] = round(batch / row["seconds"], 1)
    row["model_flops"] = 3 * task.flops * batch / row["seconds"]
    return row


def run_tests(file: str, tiny: bool) -> dict[str, Any]:
    """Run a file's fast tests that need one device; fail if one of them fails."""
    # By default the products of a GPU are too coarse for float32 tolerances.
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if not tiny:
        environment.pop("JAX_PLATFORMS", None)
    chosen = ["-m", "not exhaustive", "-k", "not device", "-q", "--tb=short", file]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *chosen],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [done.stderr[-300:]]
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode:
        print(done.stdout)
        # Last, so that the row's error says it all.
        print(f"FAILED {lines[-1]} {'; '.join(failures)}")
        sys.exit(1)
    return {"summary": lines[-1], "matmul_precision": "highest"}


def gather_evidence(kind: str, name: str, seed: str = "0") -> dict[str, Any]:
    """Train a recipe or the runs of a study, or resume; add their lines to ``results``.

    Raises:
        Stopped: it is not finished yet.
    """
    # These need what train.py needs; the other jobs do not.
    from benchmarks import studies
    from flax_resnetv2.errors import Stopped

    found: dict[str, Any] | None
    if kind == "study":
        found = {} if studies.run([name], "full") else None
    else:
        found = studies.train(name, int(seed))
    if found is None:
        raise Stopped(f"{kind}/{name} is not finished")
    return {key: found[key] for key in ("test", "epochs", "seconds") if key in found}


def measure_peak(tiny: bool) -> dict[str, Any]:
    """Measure FLOP/s of matrix products and bytes/s (read and written) of copies."""
    size, repeats = (256, 3) if tiny else (8192, 10)
    rng, row = np.random.default_rng(0), {"size": size}
    for label, dtype, precision in (
        ("bfloat16", "bfloat16", "default"),
        ("float32", "float32", "default"),
        ("float32_highest", "float32", "highest"),
    ):
        a, b = (jnp.asarray(rng.normal(size=(size, size)), dtype) for _ in range(2))

        @jax.jit
        def product(a, b, precision=precision):
            # A chain, so that no product can be left out; scaled to stay finite.
            def more(_, a):
                return jnp.matmul(a, b, precision=precision) * size**-0.5

            return lax.fori_loop(0, repeats, more, a)

        seconds = _timed(lambda f=product, a=a, b=b: jax.block_until_ready(f(a, b)))
        row[f"{label}_flops"] = 2 * size**3 * repeats / min(seconds)
    for dtype in ("bfloat16", "float32"):
        x = jnp.ones(2**20 if tiny else 2**29, dtype)
        copy = jax.jit(lambda x: x + jnp.ones([], x.dtype))
        seconds = _timed(lambda f=copy, x=x: jax.block_until_ready(f(x)))
        row[f"{dtype}_bandwidth"] = 2 * x.nbytes / min(seconds)
        del x
    return row


def measure_ours(
    task: peers.Task, net: Net, contestant: str, tiny: bool
) -> dict[str, Any]:
    """Measure our training step, including the data pipeline."""
    execution = Execution(dtype=task.dtype)
    if remat := contestant.removeprefix("ours").removeprefix("-remat-"):
        execution = replace(execution, remat=remat)
    run, facts = our_chunk(task, net, execution, pipeline=True)
    row = _steps(run, net.steps) | facts
    stats = jax.local_devices()[0].memory_stats() or {}
    return row | {"peak_bytes": stats.get("peak_bytes_in_use")}


def our_chunk(
    task: peers.Task, net: Net, execution: Execution, pipeline: bool
) -> tuple[Callable[[], Any], dict[str, float]]:
    """Compile ``net.steps`` steps as one program, as ``fit`` does on a GPU.

    Args:
        task, net, execution: the net, its data and how it runs.
        pipeline: gather and augment every batch, or train on one normalized batch.

    Returns:
        A function that continues training and waits, and facts about the program.
    """
    model = create_model(task.architecture, execution, task.image_shape)
    state = peers.training_state(model, task)
    augmentation = AUGMENT if pipeline else peers.PIXELS
    per_epoch = net.images // task.batch
    step = make_train_step(
        model, peers.TRAIN, augmentation, seed=0, steps_per_epoch=per_epoch
    )
    rng, classes = np.random.default_rng(0), task.architecture.num_classes
    pixels = rng.integers(0, 256, (net.images, *task.image_shape), np.uint8)
    split = jax.device_put(
        Split(pixels, rng.integers(0, classes, net.images, np.int32))
    )
    order = jnp.asarray(epoch_order(net.images, task.batch, 0, 0))

    def chunk(state: Any, split: Split, order: jax.Array) -> tuple[Any, Any]:
        fixed = Batch(
            split.image[: task.batch],
            split.label[: task.batch],
            jnp.ones(task.batch, bool),
        )

        def one(state: Any) -> tuple[Any, Any]:
            places = state.step % per_epoch * task.batch + positions(task.batch, None)
            return step(
                state, gather_batch(split, order, places) if pipeline else fixed
            )

        def more(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, metrics = one(carry[0])
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        shapes = jax.eval_shape(one, state)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return lax.fori_loop(0, net.steps, more, (state, zeros))

    program, facts = peers.compiled(chunk, state, split, order, donate=(0,))

    def run() -> None:
        nonlocal state
        state, metrics = program(state, split, order)
        jax.block_until_ready((state, metrics))

    return run, facts


def measure_torch(
    task: peers.Task, net: Net, contestant: str, tiny: bool
) -> dict[str, Any]:
    """Measure PyTorch's training step on a batch that stays on the device."""
    import torch

    if not tiny and not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    mode = contestant.removeprefix(COMPILED) if COMPILED in contestant else None
    device = "cpu" if tiny else "cuda"
    rival = peers.pytorch(task, device=device, compile_mode=mode)
    first, second = _timed(lambda: rival.train(1), tries=2, warmup=0)
    row = _steps(lambda: rival.train(net.steps), net.steps)
    row["compile_seconds"] = round(first - second, 3)
    row["peak_bytes"] = None if tiny else torch.cuda.max_memory_allocated()
    row["torch_device"] = "cpu" if tiny else torch.cuda.get_device_name()
    return row


def measure_pipeline(task: peers.Task, net: Net) -> dict[str, Any]:
    """Measure our training step with and without its data pipeline, in turns."""
    execution = Execution(dtype=task.dtype)
    runs = {
        name: our_chunk(task, net, execution, pipeline=name == "pipeline")[0]
        for name in ("pipeline", "fixed")
    }
    seconds = interleaved(runs, rounds=10, warmup=2)
    row = {name: summary(s)["seconds"] / net.steps for name, s in seconds.items()}
    spread = {f"{name}_spread": summary(s)["spread"] for name, s in seconds.items()}
    share = 1 - row["fixed"] / row["pipeline"]
    return row | spread | {"pipeline_share": round(share, 4), "steps": net.steps}


def _steps(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Return median and spread of one step, from several runs of ``steps`` steps."""
    once = _timed(run, tries=2, warmup=1)[-1]
    tries = min(max(int(12 / once), 4), 15)
    row = summary(_timed(run, tries, warmup=0))
    return row | {"seconds": row["seconds"] / steps, "steps": steps}


def _timed(run: Callable[[], Any], tries: int = 5, warmup: int = 2) -> list[float]:
    return interleaved({"run": run}, tries, warmup)["run"]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the newest successful rows as Markdown, and then the failed jobs."""
    good = {row["id"]: row for row in rows if row["status"] == "ok"}
    lines = [
        "| net | batch | | images/s | spread | ms a step | of eager "
        "| of the best compiled | compile, s | GB | of peak FLOP/s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in good.values():
        if row["id"].startswith("train/"):
            group = groups.setdefault((row["net"], row["batch"]), {})
            group[row["contestant"]] = row
    for (net, batch), group in groups.items():
        eager = group.get(EAGER, {}).get("seconds")
        compiled = [r["seconds"] for n, r in group.items() if COMPILED in n]
        for name, row in group.items():
            seconds, memory = row["seconds"], row["peak_bytes"]
            cells = [
                net,
                str(batch),
                name,
                f"{row['images_per_second']:,.0f}",
                f"{row['spread']:.1%}",
                f"{1000 * seconds:.2f}",
                f"{eager / seconds:.2f}" if eager else "-",
                f"{min(compiled) / seconds:.2f}" if compiled else "-",
                f"{row.get('lower_seconds', 0) + row['compile_seconds']:.1f}",
                f"{memory / 1e9:.1f}" if memory else "-",
                f"{row['fraction_of_peak']:.1%}" if "fraction_of_peak" in row else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for row in good.values():
        if row["id"].startswith("pipeline/"):
            lines.append(
                f"- {row['id']}: {1000 * row['pipeline']:.2f} ms a step, "
                f"{1000 * row['fixed']:.2f} on one batch: {row['pipeline_share']:.1%}"
            )
    if "peak" in good:
        peak = good["peak"]
        lines += [
            f"- {key.removesuffix('_flops')} products: {peak[key] / 1e12:.1f} TFLOP/s"
            for key in peak
            if key.endswith("_flops")
        ]
        lines.append(f"- copies: {peak['float32_bandwidth'] / 1e9:.0f} GB/s")
    for name, row in good.items():
        if name.startswith("tests/"):
            lines.append(f"- {name}: {row['summary']}")
        if name.startswith("accuracy/"):
            accuracy = f"{row['test']['accuracy']:.2%} after {row['epochs']} epochs"
            lines.append(f"- {name}: {accuracy}, {row['seconds']:.0f} s")
    last = {row["id"]: row for row in rows}
    lines += [
        f"- {name}: {row['status']}, {row['error']}"
        for name, row in last.items()
        if name not in good
    ]
    return "\n".join(lines)


def _value(rows: list[dict[str, Any]], job: str, key: str) -> Any:
    found = [r[key] for r in rows if r["id"] == job and r["status"] == "ok"]
    return found[-1] if found else None


def _about(commit: str | None) -> dict[str, Any]:
    """Find device, versions and commit in a child process, so this one uses no GPU."""
    code = "import json; from benchmarks.measure import provenance as p"
    job = Job(
        "provenance",
        (sys.executable, "-c", f"{code}; print({MARK!r} + json.dumps(p()))"),
        estimate=0,
        timeout=120,
    )
    row = run_job(job)
    if row["status"] != "ok":
        row = {"no_provenance": row["error"]}
    about = {k: v for k, v in row.items() if k not in ("id", "status", "job_seconds")}
    return about | ({"commit": commit} if commit else {})


def main() -> None:
    """Run the queue, one of its jobs, or print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=25, help="for all jobs")
    parser.add_argument("--out", type=Path, help="receives the rows")
    parser.add_argument("--tiny", action="store_true", help="tiny nets on the CPU")
    parser.add_argument("--only", default="", help="jobs whose id has this in it")
    parser.add_argument("--commit", help="where git cannot say it")
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--job", help="do this one job here and print its row")
    given = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # Seconds of compiling are those of a first start.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    if given.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if given.job:
        print(MARK + json.dumps(perform(given.job, given.tiny)))
        return
    default = ROOT / "build" / "gpu-tiny.jsonl" if given.tiny else RESULTS / "gpu.jsonl"
    out = given.out or default
    if not given.table:
        jobs = [job for job in queue(given.tiny) if given.only in job.id]
        run_queue(jobs, out, 60 * given.minutes, _about(given.commit))
    print(table(read_rows(out)))


if __name__ == "__main__":
    main()
