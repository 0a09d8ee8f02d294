"""All measurements on a GPU in one command, the most important first.

    python -m benchmarks.gpu --minutes 13
    python -m benchmarks.gpu --tiny        # the whole queue on a CPU, on tiny nets
    python -m benchmarks.gpu --plan        # what it would do in that time
    python -m benchmarks.gpu --table

A queue of jobs (``benchmarks.jobs``), each in its own process. First all programs are
compiled at once, ours and PyTorch's, one process for each core, and files of tests run
beside them; then the programs run one after the other with nothing beside. Rows are
appended to ``benchmarks/results/gpu.jsonl``. The same command resumes where it
stopped: a job with a row of status "ok" is not run again, failed jobs come after those
never tried, and compiled programs are in ``build/gpu-cache``.

We train in bfloat16 as ``fit`` does: several steps per dispatch, on a data set in the
device's memory, with every batch gathered, cropped and mirrored inside the step.
PyTorch trains under bfloat16 autocast, channels_last, with its fused SGD, on one
normalized batch that stays on the device. Both wait once for the same number of steps.
This needs jax, flax, optax, numpy, pytest and torch, but not the packages of the
command line.

Jobs: "train/NET/BATCH/CONTESTANT" (contestants: ``VARIANTS`` and PyTorch's; our
"ours-fixed" trains on one normalized batch, so what it saves is the data pipeline),
"profile/NET/BATCH/CONTESTANT" (kernels of the same program by time), "tests/FILE" (its
tests that need one device, products in full float32), "peak" (matrix product and copy),
and "compile/NET/BATCH/CONTESTANT": compiled alone without a cache, and timed, because
XLA chooses kernels by trying them, and a busy device could mislead it; "recompile/..."
does that with the choices kept in a file. If CIFAR-10 is available
(``TFDS_DATA_DIR``), "accuracy/RECIPE/SEED" and "study/NAME" add their lines to
``results`` (``benchmarks.studies page`` makes the page). These two save their state
when the time is over and resume next time, so a quarter of an hour is enough to make
progress. The model's FLOPs are six per multiply-add of ``layer_table``.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import peers
from benchmarks.jobs import GRACE, MARK, ROOT, Job, plan, run_job, run_queue, serve
from benchmarks.measure import RESULTS, interleaved, read_rows, summary, usable_cores
from flax_resnetv2.data.batch import Batch, Split, epoch_order, gather_batch
from flax_resnetv2.model import ops
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.modules import create_model
from flax_resnetv2.model.presets import PRESETS
from flax_resnetv2.model.semantics import HE2016
from flax_resnetv2.training.augment import AugmentConfig, positions
from flax_resnetv2.training.step import make_train_step

CACHE = ROOT / "build" / "gpu-cache"
"""Compiled programs, ours and Inductor's, and the kernels that XLA chose."""
AUGMENT = AugmentConfig(mean=peers.PIXELS.mean, std=peers.PIXELS.std)
EAGER, COMPILED = "torch-eager", "torch-compile-"
TESTS = {
    "ops": "tests/model/test_ops.py",
    "model": "tests/model/test_modules.py",
    "training": "tests/training/test_step.py",
    "augment": "tests/training/test_augment.py",
}
"""Test files by the name of the job that runs them."""
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
class Variant:
    """One way to run our step."""

    execution: dict[str, Any] = field(default_factory=dict)
    """Changed fields of ``Execution``."""
    xla: tuple[str, ...] = ()
    """Flags of XLA's GPU compiler."""
    patch: Callable[[], Any] | None = None
    """Changes the package before the step is traced; tried here before it is built."""
    pipeline: bool = True
    """Gather and augment every batch, or train on one normalized batch."""


def _one_pass() -> None:
    """Read a map once for its moments: sums of x - s and its square, s any pixel."""

    def moments(x: jax.Array, axis_name: str | None = None) -> tuple:
        wide = ops.widened(x)
        near = lax.stop_gradient(wide[:1, :1, :1])
        centered = wide - near
        mean = centered.mean(ops.SPACE)
        variance = jnp.square(centered).mean(ops.SPACE) - jnp.square(mean)
        return mean + near[0, 0, 0], variance

    ops.plain_moments = moments


def _products() -> None:
    """Compute 1x1 convolutions as products of matrices, as on the CPU."""
    fastest = ops._fastest

    def choose(size: int, stride: int, plain: Any, product: Any, *rest: Any) -> Any:
        if size == 1:
            return product(*rest[1:])
        return fastest(size, stride, plain, product, *rest)

    ops._fastest = choose


VARIANTS = {
    "ours": Variant(),
    "ours-fixed": Variant(pipeline=False),
    "ours-remat-nothing": Variant({"remat": "nothing"}),
    "ours-remat-units": Variant({"remat": "units"}),
    "ours-automatic": Variant({"remat": "nothing", "backward": "automatic"}),
    "ours-one-pass": Variant(patch=_one_pass),
    "ours-products": Variant(patch=_products),
    "ours-products-one-pass": Variant(patch=lambda: (_one_pass(), _products())),
    "ours-buffers": Variant(xla=("--xla_gpu_enable_command_buffer=+WHILE",)),
    "ours-conv-fusion": Variant(
        xla=("--xla_gpu_experimental_enable_conv_fusion=true",)
    ),
}
"""Our contestants by name."""


def queue(tiny: bool) -> list[Job]:
    """Return all jobs, the most important first."""
    eager, default = EAGER, COMPILED + "default"
    graphs = COMPILED + "reduce-overhead"
    tuned = COMPILED + "max-autotune-no-cudagraphs"
    rivals = "ours", eager, default
    tried = (
        *("ours-products-one-pass", "ours-one-pass", "ours-products"),
        *("ours-buffers", "ours-conv-fusion"),
        *("ours-remat-nothing", "ours-automatic"),
    )
    n20, n164, n1001, big = (
        "he2016-resnet20", "he2016-resnet164", "he2016-resnet1001", "resnet50-sized",
    )  # fmt: skip
    if tiny:
        first = [("tiny", 8, ("ours", "ours-fixed", eager))]
        later = [("tiny", 8, (default, *tried)), ("tiny-pooled", 8, ("ours",))]
        apart = [("tiny", 8, "ours")]
    else:
        first = [
            (n164, 128, ("ours", "ours-fixed", eager, default, graphs)),
            (big, 128, ("ours", "ours-fixed", eager, default)),
            (n20, 128, ("ours", "ours-fixed", eager, default, graphs)),
        ]
        apart = [(n20, 128, "ours"), (n164, 128, "ours"), (n164, 128, default)]
        later = [
            (n164, 128, tried),
            (big, 128, (*tried, graphs)),
            (n164, 512, rivals),
            (big, 256, rivals),
            (n20, 512, rivals),
            (n20, 128, tried[:4]),
            (n164, 256, rivals),
            (n164, 1024, rivals),
            (n20, 1024, rivals),
            (n1001, 128, ("ours", eager, "ours-remat-nothing", "ours-remat-units")),
            (n164, 128, (tuned, "ours-remat-units")),
            (big, 128, (tuned,)),
            (big, 512, rivals),
            (n1001, 512, ("ours-remat-units",)),
        ]
    profiled = {(net, batch, name) for net, batch, _ in first for name in rivals}

    def programs(plan: Iterable[tuple[str, int, Iterable[str]]]) -> list[Job]:
        return [
            _program(net, batch, name, tiny, (net, batch, name) in profiled)
            for net, batch, names in plan
            for name in names
        ]

    files = list(TESTS)[-1:] if tiny else TESTS
    jobs = programs(first)
    jobs += [_job(f"tests/{f}", tiny, 0, beside=100) for f in files]
    jobs.append(_job("peak", tiny, 20))
    jobs += programs(later[:2])
    for net, batch, name in apart:
        jobs += [
            replace(
                _job(f"{kind}/{net}/{batch}/{name}", tiny, 70),
                environment=environment(name, Path(net) / str(batch), kind),
            )
            for kind in ("compile", "recompile")
            if kind == "compile" or "torch" not in name
        ]
    if not tiny:
        jobs += [_accuracy_job("cifar10-fast", seed) for seed in range(5)]
    jobs += programs(later[2:])
    if not tiny:
        jobs += [
            _accuracy_job(recipe, seed) for recipe, n in ACCURACY for seed in range(n)
        ]
        jobs += [
            replace(_job(f"study/{name}", tiny, 180), timeout=math.inf, saves=True)
            for name in STUDIES
        ]
    return jobs


def environment(contestant: str, choices: Path, kind: str = "train") -> dict[str, str]:
    """Return the environment variables of a program's process.

    Args:
        contestant: ours, with its flags of XLA, or PyTorch's.
        choices: path in ``CACHE`` of the file of the kernels that XLA chose.
        kind: "train" takes what is in caches and adds to them; "compile" uses none and
            writes ``choices``; "recompile" reads ``choices``.
    """
    flags = list(VARIANTS[contestant].xla) if contestant in VARIANTS else []
    if kind == "train":
        return {
            "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "torch"),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",
            "XLA_FLAGS": " ".join(flags),
        }
    file = CACHE / "choices" / f"{str(choices).replace('/', '-')}.txt"
    verb = (
        "dump_autotune_results_to"
        if kind == "compile"
        else "load_autotune_results_from"
    )
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "XLA_FLAGS": " ".join([*flags, f"--xla_gpu_{verb}={file}"]),
    }


def _program(net: str, batch: int, name: str, tiny: bool, profiled: bool) -> Job:
    # Seconds of one core. Eager compiles nothing, Inductor takes longer than XLA.
    compiling = {"he2016-resnet20": 45, "he2016-resnet1001": 400}.get(net, 90)
    factor = 0.2 if name == EAGER else 1.5 if "torch" in name else 1
    job = f"train/{net}/{batch}/{name}"
    return Job(
        job,
        _command(job, tiny, "--program"),
        estimate=9,
        timeout=max(6 * factor * compiling, 300),
        beside=factor * (10 if tiny else compiling),
        program=True,
        environment=environment(name, Path(net)),
        also=("profile",) if profiled else (),
    )


def _accuracy_job(recipe: str, seed: int) -> Job:
    job = _job(f"accuracy/{recipe}/{seed}", tiny=False, estimate=2 * GRACE)
    return replace(job, timeout=math.inf, saves=True)


def _job(name: str, tiny: bool, estimate: float, beside: float = 0) -> Job:
    timeout = max(2 * (estimate + beside), 120)
    return Job(name, _command(name, tiny), estimate, timeout, beside=beside)


def _command(name: str, tiny: bool, flag: str = "--job") -> tuple[str, ...]:
    python = sys.executable, "-m", "benchmarks.gpu"
    return (*python, *["--tiny"] * tiny, flag, name)


def perform(name: str, tiny: bool) -> dict[str, Any]:
    """Run the job ``name`` in this process and return its row."""
    kind, *rest = name.split("/")
    if kind == "tests":
        return run_tests(TESTS[rest[0]], tiny)
    if kind == "peak":
        return measure_peak(tiny)
    if kind in ("accuracy", "study"):
        return gather_evidence(kind, *rest)
    (CACHE / "choices").mkdir(parents=True, exist_ok=True)
    program = Program(name, tiny)  # to compile it, and to time it afterwards
    program.warm()
    timed = summary([program.run()["seconds"] for _ in range(5)])
    row = program.facts | timed | program.memory()
    row["seconds"] /= row["steps"]
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


class Program:
    """A contestant's training steps, compiled: what ``jobs.serve`` asks.

    Attributes:
        facts: net, batch, contestant, steps per run, FLOPs of a step, and what
            compiling told.
    """

    def __init__(self, name: str, tiny: bool) -> None:
        """Compile "train/NET/BATCH/CONTESTANT"."""
        _, net_name, batch, contestant = name.split("/")
        net = (TINY_NETS if tiny else NETS)[net_name]
        task = peers.Task(
            net_name, net.architecture, net.image_shape, int(batch), dtype="bfloat16"
        )
        self._torch = contestant.startswith("torch")
        make = self._compile_torch if self._torch else self._compile_ours
        facts = make(task, net, contestant, "cpu" if tiny else "cuda")
        self.facts = {
            "net": net_name,
            "batch": task.batch,
            "contestant": contestant,
            "steps": net.steps,
            "flops_per_step": 3 * task.flops * task.batch,
        } | facts

    def _compile_ours(
        self, task: peers.Task, net: Net, contestant: str, device: str
    ) -> dict[str, Any]:
        variant = VARIANTS[contestant]
        if variant.patch is not None:
            variant.patch()
        execution = Execution(dtype=task.dtype, **variant.execution)
        self._run, facts = our_chunk(task, net, execution, variant.pipeline)
        return facts

    def _compile_torch(
        self, task: peers.Task, net: Net, contestant: str, device: str
    ) -> dict[str, Any]:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        mode = None
        if contestant.startswith(COMPILED):
            mode = contestant.removeprefix(COMPILED)
        rival = peers.pytorch(task, device=device, compile_mode=mode)
        self._run = lambda: rival.train(net.steps)
        # cuDNN's kernels are tried only when nothing else runs; a recorded graph keeps
        # its kernels, so it is made anew then, from Inductor's cache.
        torch.backends.cudnn.benchmark = False
        self._record_again = mode == "reduce-overhead"
        began = time.perf_counter()
        if mode is not None:
            rival.train(1)
        compiling = time.perf_counter() - began
        if device == "cuda":
            torch.cuda.empty_cache()
        name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
        return {"compile_seconds": round(compiling, 3), "torch_device": name}

    def warm(self) -> dict[str, Any]:
        """Run twice."""
        if self._torch:
            import torch

            torch.backends.cudnn.benchmark = True
            if self._record_again:
                torch._dynamo.reset()
        for _ in range(2):
            self._run()
        return {}

    def run(self) -> dict[str, float]:
        """Time one run, to the end of its last step."""
        began = time.perf_counter()
        self._run()
        return {"seconds": time.perf_counter() - began}

    def memory(self) -> dict[str, int | None]:
        """Return the largest memory that was in use."""
        if self._torch:
            import torch

            on = torch.cuda.is_available()
            return {"peak_bytes": torch.cuda.max_memory_allocated() if on else None}
        stats = jax.local_devices()[0].memory_stats() or {}
        return {"peak_bytes": stats.get("peak_bytes_in_use")}

    def profile(self) -> dict[str, Any]:
        """Trace one run; return its kernels by time."""
        began = time.perf_counter()
        kernels = (_torch_kernels if self._torch else _xla_kernels)(self._run)
        traced = time.perf_counter() - began
        facts = {k: self.facts[k] for k in ("net", "batch", "contestant", "steps")}
        return (
            facts
            | {"traced_seconds": traced}
            | kernel_table(kernels, self.facts["steps"])
        )


def _xla_kernels(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Trace ``run``; return (kernel, start, duration) in nanoseconds."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    on_gpu = any(plane.name.startswith("/device:GPU") for plane in planes)
    wanted = ("/device:GPU", "Stream") if on_gpu else ("/host:CPU", "tf_XLA")
    return [
        (event.name, event.start_ns, event.duration_ns)
        for plane in planes
        if plane.name.startswith(wanted[0])
        for line in plane.lines
        if line.name.startswith(wanted[1])
        for event in line.events
    ]


def _torch_kernels(run: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """Trace ``run``; return (kernel, start, duration) in nanoseconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as traced:
        run()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return [
        (e.name, 1e3 * e.time_range.start, 1e3 * e.time_range.elapsed_us())
        for e in traced.events()
        if e.device_type == wanted
    ]


KINDS = {
    "copy": r"memcpy|memset|copy|transpose|nchwtonhwc|nhwctonchw",
    "convolution": r"conv|cudnn|xmma|implicit|wgrad|dgrad|fprop|winograd",
    "product": r"gemm|cutlass|nvjet|cublas|matmul|dot",
    "reduction": r"reduc|_red_|norm",
}
"""Kinds of kernels by what their names contain; the first that fits counts."""


def kernel_table(
    kernels: list[tuple[str, float, float]], steps: int, most: int = 15
) -> dict[str, Any]:
    """Return how the time of a step is spent, in milliseconds.

    Args:
        kernels: (name, start, duration) in nanoseconds.
        steps: number of steps that were traced.
        most: number of kernels in the list.

    Returns:
        "busy": time in which at least one kernel ran; "gaps": the rest between the
        first and the last; "launches": kernels a step; "kinds": time by ``KINDS``;
        "kernels": [name, launches, time] of the longest.
    """
    busy, end = 0.0, -math.inf
    for _, start, duration in sorted(kernels, key=lambda kernel: kernel[1]):
        busy += max(start + duration - max(start, end), 0.0)
        end = max(end, start + duration)
    span = end - min((start for _, start, _ in kernels), default=end)
    by_name: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, float] = defaultdict(float)
    per_step = 1e-6 / steps
    for name, _, duration in kernels:
        # Numbers at the end tell copies of one kernel apart.
        by_name[re.sub(r"[._]\d+$", "", name)].append(duration)
        found = (k for k, part in KINDS.items() if re.search(part, name.lower()))
        kinds[next(found, "elementwise")] += duration
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "busy": round(busy * per_step, 4),
        "gaps": round((span - busy) * per_step, 4),
        "launches": round(len(kernels) / steps, 1),
        "kinds": {k: round(v * per_step, 4) for k, v in sorted(kinds.items())},
        "kernels": [
            [name[:90], round(len(v) / steps, 2), round(sum(v) * per_step, 4)]
            for name, v in longest
        ],
    }


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
    peak = good.get("peak", {})
    for (net, batch), group in groups.items():
        eager = group.get(EAGER, {}).get("seconds")
        compiled = [r["seconds"] for n, r in group.items() if COMPILED in n]
        for name, row in group.items():
            seconds, memory = row["seconds"], row["peak_bytes"]
            alone = good.get(f"compile/{net}/{batch}/{name}")
            cells = [
                net,
                str(batch),
                name,
                f"{row['images_per_second']:,.0f}",
                f"{row['spread']:.1%}",
                f"{1000 * seconds:.2f}",
                f"{eager / seconds:.2f}" if eager else "-",
                f"{min(compiled) / seconds:.2f}" if compiled else "-",
                f"{_compiling(alone):.1f}" if alone else "-",
                f"{memory / 1e9:.1f}" if memory else "-",
                f"{row['model_flops'] / peak['bfloat16_flops']:.1%}" if peak else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for (net, batch), group in groups.items():
        if {"ours", "ours-fixed"} <= set(group):
            share = 1 - group["ours-fixed"]["seconds"] / group["ours"]["seconds"]
            lines.append(
                f"- {net}, {batch}: the data pipeline takes {share:.1%} of a step"
            )
    for name, row in good.items():
        if name.partition("/")[0] in ("compile", "recompile"):
            step = f"{1000 * row['seconds']:.2f} ms a step"
            lines.append(f"- {name}: {_compiling(row):.1f} s, then {step}")
        if name.startswith("profile/"):
            kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in row["kinds"].items())
            lines.append(
                f"- {name}: {row['busy']:.2f} ms of kernels a step ({kinds}), gaps "
                f"{row['gaps']:.2f}, {row['launches']:.0f} launches"
            )
    if peak:
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


def _compiling(row: dict[str, Any]) -> float:
    """Return the seconds of lowering and compiling."""
    return row.get("lower_seconds", 0.0) + row["compile_seconds"]


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
    parser.add_argument("--minutes", type=float, default=13, help="for all jobs")
    parser.add_argument("--out", type=Path, help="receives the rows")
    parser.add_argument("--tiny", action="store_true", help="tiny nets on the CPU")
    parser.add_argument("--only", default="", help="jobs that match this expression")
    parser.add_argument("--commit", help="where git cannot say it")
    parser.add_argument("--plan", action="store_true", help="print the plan only")
    parser.add_argument("--cores", type=int, help="plan for so many cores")
    parser.add_argument("--table", action="store_true", help="print the table only")
    parser.add_argument("--job", help="do this one job here and print its row")
    parser.add_argument("--program", help="compile this program, and answer the queue")
    given = parser.parse_args()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if given.tiny:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if given.program:
        serve(lambda: Program(given.program, given.tiny))
        return
    if given.job:
        print(MARK + json.dumps(perform(given.job, given.tiny)))
        return
    default = ROOT / "build" / "gpu-tiny.jsonl" if given.tiny else RESULTS / "gpu.jsonl"
    out = given.out or default
    jobs = [job for job in queue(given.tiny) if re.search(given.only, job.id)]
    cores = given.cores or usable_cores()
    if given.plan:
        print(plan(jobs, 60 * given.minutes, cores))
        return
    if not given.table:
        run_queue(jobs, out, 60 * given.minutes, cores, _about(given.commit))
    print(table(read_rows(out)))


if __name__ == "__main__":
    main()
