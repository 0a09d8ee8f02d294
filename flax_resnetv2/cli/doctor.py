"""The checks of ``python -m flax_resnetv2 doctor``: what a run would find and do.

Nothing is trained, prepared or downloaded. Every part of the machine may be broken, so
an exception in one check becomes a finding and the other checks go on.
"""

import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from flax_resnetv2.cli import installed
from flax_resnetv2.cli.installed import Finding, reason
from flax_resnetv2.cli.train import TrainCommand, parse
from flax_resnetv2.data import datasets, decoded_cache, folder, tfds_records
from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.datasets import DataConfig, Dataset, describe
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run import run_directory, tracing, validate
from flax_resnetv2.run.cost import amount, memory_limit, size_of, step_cost
from flax_resnetv2.system import files, memory, runtime
from flax_resnetv2.training.step import train_state_shapes

_ACCELERATORS = {
    "an NVIDIA GPU": ("nvidia[0-9]*", "cuda", "cuda13"),
    "a TPU": ("accel[0-9]*", "tpu", "tpu"),
}
"""Files of the driver in /dev, name of JAX's backend, extra of the package jax."""


def doctor(words: list[str], /) -> int:
    """Check what train.py would find and do; exit with 1 if there is a problem."""
    # Flags without a recipe are for quickstart.
    if not words or re.match(r"--(?!help$)", words[0]):
        words = ["quickstart", *words]
    command = parse(words, "python -m flax_resnetv2 doctor", doctor.__doc__)
    return installed.print_findings(examine(command, shlex.join(["train.py", *words])))


def examine(command: TrainCommand, line: str) -> Iterator[Finding]:
    """Check the machine, the data set and the run that ``line`` would start."""
    # A run that is training on the accelerator keeps its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    checks = {
        "python": installed.python,
        "packages": installed.packages,
        "devices": devices,
        "programs": lambda: programs(command.runtime.compilation_cache),
        "data": lambda: data(command.config.data),
        "run": lambda: run(command, line),
    }
    problems = set()
    for about, check in checks.items():
        if about == "run" and (missing := sorted(problems & {"data", "devices"})):
            text = f"{line} would not start: see {' and '.join(missing)} above"
            yield Finding("problem", "run", text)
            return
        try:
            for finding in check():
                if finding.level == "problem":
                    problems.add(finding.about)
                yield finding
        except Exception as error:
            problems.add(about)
            text = f"cannot be checked ({reason(error)}); repair the problems above"
            if isinstance(error, UsageError):
                text = str(error)
            yield Finding("problem", about, text)


def devices(dev: Path = Path("/dev")) -> Iterator[Finding]:
    """Check that JAX's devices work, and that no accelerator is left unused."""
    if (problem := installed.unusable_devices()) is not None:
        yield Finding("problem", "devices", problem)
        return
    found = jax.local_devices()
    name, kind = found[0].platform, found[0].device_kind
    name += f" ({kind})" if kind != name else ""
    limit = memory_limit(found[0])
    each = f", {amount(limit, 'B')} of memory each" if limit else ""
    text = f"{len(found)} {name}{each}; {installed.plugins()}"
    yield Finding("ok", "devices", text)
    if found[0].platform == "cpu":
        yield from _unused_accelerators(dev)


def _unused_accelerators(dev: Path) -> Iterator[Finding]:
    """Find accelerators of the machine where JAX computes on the CPU."""
    hides = {"JAX_PLATFORMS": "cpu.*", "CUDA_VISIBLE_DEVICES": "|-1"}
    hiding = [
        f"{name}={os.environ[name]}"
        for name, pattern in hides.items()
        if re.fullmatch(pattern, os.environ.get(name, "unset"))
    ]
    jax_line = [r for r in installed.requirements() if re.match(r"jax\W", r)]
    versions = jax_line[0].removeprefix("jax") if jax_line else ""
    for device, (pattern, backend, extra) in _ACCELERATORS.items():
        if not any(dev.glob(pattern)):
            continue
        text = f"the machine has {device}, but JAX computes on the CPU"
        if hiding:
            text += f" because of {' and '.join(hiding)}; unset it to use {device}"
            yield Finding("note", "accelerator", text)
            continue
        try:
            jax.devices(backend)
        except RuntimeError as error:
            text += f" ({reason(error)}; {installed.plugins()})"
        text += f'; pip install --upgrade "jax[{extra}]{versions}"'
        if extra == "cuda13":
            text += ", or cuda12 if nvidia-smi shows a driver before 580"
        yield Finding("problem", "accelerator", text)


def programs(keep: bool) -> Iterator[Finding]:
    """Check that compiled programs can be kept for later runs."""
    directory, size = runtime.program_cache(), 0
    if not keep:
        yield Finding("note", "programs", "are not kept: --no-compilation-cache")
    elif not files.writable(directory):
        text = f"{directory} cannot be written, so every run compiles again; make it "
        text += "writable, or set JAX_COMPILATION_CACHE_DIR to another"
        yield Finding("note", "programs", text)
    else:
        for path in directory.glob("*"):
            with contextlib.suppress(OSError):  # another run may delete it meanwhile
                size += path.stat().st_size
        text = f"compiled programs are kept in {directory}: {amount(size, 'B')}"
        yield Finding("ok", "programs", text)


def data(config: DataConfig) -> Iterator[Finding]:
    """Check that the data set is there, or could be prepared."""
    images = None
    if (path := datasets.folder_of(config)) is not None:
        images = folder.list_folder(path)
        sizes = describe(config).num_images
        text = f"{images.root}: {len(describe(config).class_names)} classes"
        decoded = images.cache(config.image_size).find()
    elif directory := datasets.prepared_directory(config):
        sizes, text = tfds_records.split_sizes(directory), f"{directory}: array_record"
        decoded = decoded_cache.dataset_cache(
            directory, datasets.label_feature(config), config.image_size
        ).find()
    else:
        yield from _missing_data(config)
        return
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.items())
    yield Finding("ok", "data", f"{text}; images: {counts}")
    yield from (Finding("note", "data", note) for note in describe(config).notes)
    if decoded:
        size = amount(decoded.stat().st_size, "B")
        yield Finding("ok", "data", f"decoded images are kept in {decoded}: {size}")
        return
    yield Finding("note", "data", "the images will be decoded once")
    cache = files.user_cache()
    if images is not None and files.writable(cache):
        size, about = describe(config).size, "the decoded images"
        yield _disk_space("data", cache, size, about, "XDG_CACHE_HOME")


def _missing_data(config: DataConfig) -> Iterator[Finding]:
    """Check that a run could prepare the data set."""
    root, known = datasets.data_dir(config), DATASETS[config.name]
    # Prepared records need no more than the pixels, which are kept decoded too.
    size = 2 * size_of(_without_images(config).splits)
    action, official = "draws it", write_tfds.SOURCES[known.stored]
    if known.source != "drawing":
        url = official.url if config.url is None else config.url
        write_tfds.check_source(known.stored, config.archive, url)
        action = f"prepares it from {config.archive}"
        if config.archive is None:
            action = f"downloads {amount(official.size, 'B')} from {url}"
            size += official.size
    write_tfds.check_directory(root / known.stored / official.version)
    text = f"{config.name} is not in {root}: the run {action} and keeps it there"
    yield Finding("note", "data", text)
    yield _disk_space("data", root, size, config.name, "--data.dir")


def run(command: TrainCommand, line: str) -> Iterator[Finding]:
    """Check the run against data set, devices, memory and disk."""
    config, devices = command.config, jax.local_devices()
    train, parent = config.train, Path(command.workdir or "runs")
    limit = memory_limit(devices[0])
    try:
        config, model = validate.validate_static(config, parent, len(devices), limit)
        dataset = _without_images(config.data, streamed=config.data.stream)
        validate.check_fits(config, dataset)
        steps = dataset.splits["train"].num_images // train.batch_size
        # Only opening its checkpoints would tell how far a run in workdir has come.
        profile = tracing.parse_steps(command.runtime.profile)
        tracing.check_steps(profile, 0, steps * train.epochs)
        shape = config.augment.input_shape(dataset.image_shape)
        state = train_state_shapes(model, train, shape)
        cost = step_cost(model, shape, train.accumulation_steps)
        cost = cost.plus_resident(state, dataset.in_memory())
        cost.check(train.batch_size, len(devices), limit)
    except UsageError as error:
        yield Finding("problem", "run", f"{line} would be refused: {error}")
        return
    text = cost.describe(train.batch_size, len(devices), limit)
    share, level = train.batch_size // len(devices), "ok"
    if devices[0].platform == "cpu" and (free := memory.free_memory()) is not None:
        text += f"; {amount(free, 'B')} are free"
        if cost.bytes(share) * len(devices) > free:
            text += "; end other programs, or choose a smaller --train.batch-size"
            level = "problem"
    yield Finding(level, "memory", text)
    # A new checkpoint is written before the oldest is deleted; the best one stays.
    count = config.keep_checkpoints + 1 + (config.data.validation > 0)
    about = f"{count} checkpoints in {parent}"
    yield _disk_space("disk", parent, count * size_of(state), about, "--workdir")
    each = f", {share} on each of {len(devices)} devices" if len(devices) > 1 else ""
    where = f"in {parent}" if command.workdir else "in a new directory of runs"
    if command.workdir and run_directory.is_run(parent):
        where += ", resuming the run there"
    text = f"{line}: {cost.parameters:,} parameters, {train.epochs} epochs of "
    text += f"{steps:,} steps, {train.batch_size} images per step{each}; {where}"
    yield Finding("ok", "run", text)


class _Streamed(Dataset):
    def in_memory(self) -> dict[str, Split]:
        return {}


def _without_images(config: DataConfig, streamed: bool = False) -> Dataset:
    """Return the data set with its sizes and classes, but without its images."""
    summary = describe(config)
    sizes, names = summary.num_images, summary.class_names
    is_folder = datasets.folder_of(config) is not None
    if not is_folder and (directory := datasets.prepared_directory(config)):
        stored = tfds_records.stored_splits(directory)
        sizes = {split: len(stored[split].indices) for split in stored}
        label = datasets.label_feature(config)
        names = tfds_records.label_of(directory, label).class_names
    splits = {}
    for split in decoded_cache.SPLITS:
        shape = sizes[split], *summary.image_shape
        image = np.broadcast_to(np.uint8(0), shape)  # a view of one number
        splits[split] = Split(image, np.broadcast_to(np.int32(0), sizes[split]))
    kind = _Streamed if streamed else Dataset
    return kind(config.name, names, datasets.hold_out(splits, config))


def _disk_space(about: str, place: Path, size: int, what: str, flag: str) -> Finding:
    """Check that ``place`` is writable and has room for ``what``, of ``size`` bytes."""
    if not files.writable(place):
        text = f"{place} cannot be written; choose another {flag}"
        return Finding("problem", about, text)
    free = shutil.disk_usage(files.nearest_existing(place)).free
    text = f"{what}: up to {amount(size, 'B')}; {amount(free, 'B')} are free"
    if size <= free:
        return Finding("ok", about, text)
    return Finding("problem", about, f"{text}; make room, or choose another {flag}")
