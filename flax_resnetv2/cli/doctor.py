"""What a run would find and do, without doing it: the findings of the doctor.

Every part may be broken, so each is looked at by itself, and what it raises becomes a
finding.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_resnetv2.cli.installed import (
    Finding,
    packages,
    plugins,
    python,
    reason,
    requirements,
)
from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.datasets import (
    DataConfig,
    Dataset,
    data_dir,
    describe,
    find,
    folder_of,
    hold_out,
    label_feature,
)
from flax_resnetv2.data.decoded_cache import SPLITS, find_decoded
from flax_resnetv2.data.folder import Folder, find_decoded_folder, list_folder
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.data.tfds_records import (
    Label,
    Part,
    Records,
    label_of,
    parts,
    split_sizes,
)
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run import run_directory, tracing, validate
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import amount, memory_limit, size_of, step_cost
from flax_resnetv2.system import files, runtime
from flax_resnetv2.training.step import train_state_shapes

_ACCELERATORS = {
    "an NVIDIA GPU": ("nvidia[0-9]*", "cuda", "cuda13"),
    "a TPU": ("accel[0-9]*", "tpu", "tpu"),
}
"""What the driver puts into /dev, JAX's name, and the extra of the package jax."""


def examine(
    config: Config,
    command: str,
    workdir: Path | None = None,
    keep_programs: bool = True,
    profile: str | None = None,
) -> Iterator[Finding]:
    """Look at everything that a run needs, and then at the run.

    Args:
        config: the run.
        command: that would start it, as "train.py quickstart".
        workdir: its directory; None: a new one below runs/.
        keep_programs: whether it keeps compiled programs.
        profile: the steps that it traces, as "20:30".
    """
    # The accelerator's memory stays with a run that goes on beside this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    problems = set()
    for about, look, *arguments in (
        ("python", python),
        ("packages", packages),
        ("devices", devices),
        ("programs", programs, keep_programs),
        ("data", data, config.data),
    ):
        for finding in _safely(about, look, *arguments):
            yield finding
            if finding.level == "problem":
                problems.add(finding.about)
    if missing := sorted(problems & {"data", "devices"}):
        text = f"{command} would not start: see {' and '.join(missing)} above"
        yield Finding("problem", "run", text)
    else:
        yield from _safely("run", run, config, command, workdir, profile)


def devices(dev: Path = Path("/dev")) -> Iterator[Finding]:
    """Do the devices of JAX work, and does the machine have others?"""
    try:
        found = jax.local_devices()
        for device in found:
            jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    except Exception as error:
        told = os.environ.get("JAX_PLATFORMS")
        text = f"JAX cannot use its devices ({reason(error)}; {plugins()})"
        repair = "install the plugin in the version of jax, and look at the driver"
        if told:
            text += f" where JAX_PLATFORMS={told}"
            repair += ", or unset JAX_PLATFORMS"
        yield Finding("problem", "devices", f"{text}; {repair}")
        return
    name, kind = found[0].platform, found[0].device_kind
    name += f" ({kind})" if kind != name else ""
    limit = memory_limit(found[0])
    memory = f", {amount(limit, 'B')} of memory for each" if limit else ""
    yield Finding("ok", "devices", f"{len(found)} {name}{memory}; {plugins()}")
    if found[0].platform == "cpu":
        yield from _unused(dev)


def _unused(dev: Path) -> Iterator[Finding]:
    """Accelerators of the machine, where JAX computes on the CPU."""
    hiding = [
        f"{name}={os.environ[name]}"
        for name, pattern in (
            ("JAX_PLATFORMS", "cpu.*"),
            ("CUDA_VISIBLE_DEVICES", "|-1"),
        )
        if re.fullmatch(pattern, os.environ.get(name, "unset"))
    ]
    versions = next((r[3:] for r in requirements() if re.match(r"jax\W", r)), "")
    for device, (pattern, backend, extra) in _ACCELERATORS.items():
        if not any(dev.glob(pattern)):
            continue
        text = f"the machine has {device}, but JAX computes on the CPU"
        if hiding:
            text += f", as {' and '.join(hiding)} says; unset it to use {device}"
            yield Finding("note", "accelerator", text)
            continue
        try:
            jax.devices(backend)
        except RuntimeError as error:
            text += f" ({reason(error)}; {plugins()})"
        text += f'; pip install --upgrade "jax[{extra}]{versions}"'
        if extra == "cuda13":
            text += ", or cuda12 where nvidia-smi names a driver before 580"
        yield Finding("problem", "accelerator", text)


def programs(keep: bool) -> Iterator[Finding]:
    """Can compiled programs be kept?"""
    if not keep:
        yield Finding("note", "programs", "are not kept: --no-compilation-cache")
        return
    directory, size = runtime.program_cache(), 0
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):  # another run may clear it meanwhile
            size += path.stat().st_size
    if files.writable(directory):
        text = f"compiled programs are kept in {directory}: {amount(size, 'B')}"
        yield Finding("ok", "programs", text)
    else:
        text = f"{directory} cannot be written, so every run compiles again"
        repair = "make it writable, or name another in JAX_COMPILATION_CACHE_DIR"
        yield Finding("note", "programs", f"{text}; {repair}")


def data(config: DataConfig) -> Iterator[Finding]:
    """Where is the data set, or how would it come there?"""
    if (path := folder_of(config)) is not None:
        yield from _folder(list_folder(path), config)
        return
    root = data_dir(config)
    if directory := find(config):
        sizes = split_sizes(directory).items()
        counts = ", ".join(f"{count:,} {split}" for split, count in sizes)
        yield Finding("ok", "data", f"{directory}: array_record; images: {counts}")
        for note in describe(config).notes:
            yield Finding("note", "data", note)
        if kept := find_decoded(directory, label_feature(config), config.image_size):
            text = f"decoded images are kept in {kept}"
            yield Finding("ok", "data", f"{text}: {amount(kept.stat().st_size, 'B')}")
        else:
            yield Finding("note", "data", "the images will be decoded, once")
        return
    known = DATASETS[config.name]
    # The records are no larger than the pixels, and these are kept decoded, too.
    size = 2 * size_of(_stand_in(config).splits)
    source = "draws it"
    official = write_tfds.SOURCES[known.stored]
    if known.source != "drawn":
        url = official.url if config.url is None else config.url
        write_tfds.check_source(known.stored, config.archive, url)
        source = f"prepares it from {config.archive}"
        if config.archive is None:
            source = f"downloads {amount(official.size, 'B')} from {url}"
            size += official.size
    write_tfds.check_place(root / known.stored / official.version)
    if not files.writable(root):
        text = f"{config.name} is not in {root}, which cannot be written"
        yield Finding("problem", "data", f"{text}; choose a writable --data.dir")
        return
    text = f"{config.name} is not in {root}: the run {source} and keeps it there"
    yield Finding("note", "data", text)
    yield _room("data", root, size, config.name, "--data.dir")


def _folder(folder: Folder, config: DataConfig) -> Iterator[Finding]:
    facts = describe(config)
    counts = ", ".join(
        f"{count:,} {split}" for split, count in facts.num_images.items()
    )
    text = f"{folder.root}: {len(facts.class_names)} classes; images: {counts}"
    yield Finding("ok", "data", text)
    for note in facts.notes:
        yield Finding("note", "data", note)
    if kept := find_decoded_folder(folder, config.image_size):
        text = f"decoded images are kept in {kept}"
        yield Finding("ok", "data", f"{text}: {amount(kept.stat().st_size, 'B')}")
        return
    yield Finding("note", "data", "the images will be decoded, once")
    what = "the decoded images"
    yield _room("data", files.user_cache(), facts.size, what, "XDG_CACHE_HOME")


def run(
    config: Config, command: str, workdir: Path | None, profile: str | None = None
) -> Iterator[Finding]:
    """What would the run take, and do, or why would it be refused?"""
    devices, train, place = jax.local_devices(), config.train, workdir or Path("runs")
    limit = memory_limit(devices[0])
    try:
        config, model = validate.validate_static(config, place, len(devices), limit)
        dataset = _stand_in(config.data)
        if config.data.stream:
            dataset = _on_disk(dataset)
        validate.check_fits(config, dataset)
        steps = dataset.splits["train"].num_images // train.batch_size
        # How far a run in workdir has come, only opening its checkpoints would say.
        tracing.check_steps(tracing.parse_steps(profile), 0, steps * train.epochs)
        shape = config.augment.input_shape(dataset.image_shape)
        state = train_state_shapes(model, train, shape)
        cost = step_cost(model, shape, train.accumulation_steps)
        cost = cost.plus_resident(state, dataset.in_memory())
        cost.check(train.batch_size, len(devices), limit)
    except UsageError as error:
        yield Finding("problem", "run", f"{command} would be refused: {error}")
        return
    text = cost.describe(train.batch_size, len(devices), limit)
    free, share = _free_memory(), train.batch_size // len(devices)
    if devices[0].platform != "cpu" or free is None:
        yield Finding("ok", "memory", text)
    elif cost.bytes(share) * len(devices) <= free:
        yield Finding("ok", "memory", f"{text}; {amount(free, 'B')} are free")
    else:
        text += f", but only {amount(free, 'B')} are free; end other programs, or "
        yield Finding("problem", "memory", f"{text}choose a smaller --train.batch-size")
    if files.writable(place):
        # A new checkpoint is written before the oldest one goes.
        count = config.keep_checkpoints + 1 + (config.data.validation > 0)
        what = f"{count} checkpoints in {place}"
        yield _room("disk", place, count * size_of(state), what, "--workdir")
    else:
        text = f"{place} cannot be written; choose another --workdir"
        yield Finding("problem", "disk", text)
    each = f", {share} on each of {len(devices)} devices" if len(devices) > 1 else ""
    where = f"in a new directory of {place}"
    if workdir is not None:
        new = not run_directory.is_run(workdir)
        where = f"in {workdir}" + ("" if new else ", going on with the run there")
    yield Finding(
        "ok",
        "run",
        f"{command}: {cost.parameters:,} parameters, {train.epochs} epochs of "
        f"{steps:,} steps, {train.batch_size} images a step{each}; {where}",
    )


def _safely(
    about: str, look: Callable[..., Iterable[Finding]], *arguments: Any
) -> Iterator[Finding]:
    """Turn whatever is raised into a finding."""
    try:
        yield from look(*arguments)
    except UsageError as error:
        yield Finding("problem", about, str(error))
    except Exception as error:
        text = f"cannot be looked at ({reason(error)}); repair what is said above"
        yield Finding("problem", about, text)


def _on_disk(dataset: Dataset) -> Dataset:
    """The same stand-in, its images not in memory."""
    label = Label("label", dataset.class_names, dataset.splits["train"].label.ndim > 1)
    splits = {
        name: Records(Path(), Part(name, range(s.num_images)), label, s.image_shape)
        for name, s in dataset.splits.items()
    }
    return replace(dataset, splits=splits)


def _stand_in(config: DataConfig) -> Dataset:
    """The data set as to sizes and classes: its arrays are views of one number."""
    facts = describe(config)
    sizes, names = facts.num_images, facts.class_names
    if folder_of(config) is None and (directory := find(config)):
        sizes = {split: len(part.places) for split, part in parts(directory).items()}
        names = label_of(directory, label_feature(config)).names
    shape = facts.image_shape
    splits = {
        split: Split(
            np.broadcast_to(np.uint8(0), (sizes[split], *shape)),
            np.broadcast_to(np.int32(0), sizes[split]),
        )
        for split in SPLITS
    }
    return Dataset(config.name, names, hold_out(splits, config))


def _room(about: str, place: Path, size: int, what: str, flag: str) -> Finding:
    """Compare the free part of a disk with what is to be written."""
    free = shutil.disk_usage(files.nearest_existing(place)).free
    text = f"{what}: up to {amount(size, 'B')}; {amount(free, 'B')} are free"
    if size <= free:
        return Finding("ok", about, text)
    return Finding("problem", about, f"{text}; make room, or choose another {flag}")


def _free_memory() -> int | None:
    """Bytes that the system can give without taking them from others, where known."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()
        )
        return int(found[1]) * 1024 if found else None
    return None
