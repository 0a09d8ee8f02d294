"""The command ``train.py RECIPE [--field value ...]``.

Every flag is a field of ``TrainCommand``, and every help text is its docstring.
"""

import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resnetv2.cli.exits import LOGGER, guarded
from flax_resnetv2.cli.installed import reason
from flax_resnetv2.errors import UsageError
from flax_resnetv2.reports.run_page import write_page
from flax_resnetv2.run import loop
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.placement import Executor
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.run_directory import new_workdir
from flax_resnetv2.run.tracing import parse_steps
from flax_resnetv2.system import distributed, runtime
from flax_resnetv2.system.files import expand_home, home, user_cache
from flax_resnetv2.validation import Count, Range, check


@dataclass(frozen=True)
class RuntimeOptions:
    """Settings that are not part of the run's configuration."""

    report: bool = True
    """Write WORKDIR/report.html at the end; runs of several processes write none."""
    tensorboard: bool = False
    """Also write the metrics to WORKDIR/tensorboard."""
    compilation_cache: bool = True
    """Keep compiled programs for later runs, in JAX_COMPILATION_CACHE_DIR or
    ~/.cache/flax_resnetv2/xla; the directory may be deleted at any time."""
    deterministic: bool = False
    """Make GPU results reproducible bit for bit, at some cost in speed."""
    profile: str | None = None
    """Write a trace of these steps, FIRST:END as in 20:30, to WORKDIR/profile."""
    executor: Executor = "pmap"
    """JAX transformation that runs a step on all devices; both compute the same."""


@dataclass(frozen=True)
class ProcessOptions:
    """One training run on several processes; give each the same other flags."""

    distributed: bool = False
    """Join the processes that SLURM, Open MPI, Kubernetes or a TPU pod started. On
    other clusters set the next three flags instead."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Index of this process, from 0."""


@dataclass(frozen=True)
class RecipeCommand:
    """The flags of every command that takes a recipe."""

    recipe: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""
    workdir: str | None = None
    """Run directory; a run that is there is resumed. None creates runs/RECIPE-N."""
    config: Annotated[Config, tyro.conf.arg(name="")] = Config()


@dataclass(frozen=True)
class TrainCommand(RecipeCommand):
    """The flags of ``train.py``; those of the last two fields have no prefix."""

    runtime: tyro.conf.OmitArgPrefixes[RuntimeOptions] = RuntimeOptions()
    multi_process: tyro.conf.OmitArgPrefixes[ProcessOptions] = ProcessOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``; return the exit code."""
    words = expand_home(sys.argv[1:] if arguments is None else arguments)
    try:
        code = guarded(lambda: _train(words), needs_reader=False)
    except Exception:  # a fault of this package: the other processes must end too
        if not distributed.is_multi_process():
            raise
        traceback.print_exc()
        code = 1
    if code not in (0, 75):
        distributed.exit_without_peers(code)
    return code


def _train(words: list[str]) -> None:
    """Prepare the process, train, write the report and print the result."""
    about = "Train a ResNet V2 by a recipe; RECIPE --help lists every field."
    command = parse(words, "train.py", about)
    options, group = command.runtime, command.multi_process
    profile = parse_steps(options.profile)
    directory = open_workdir(command)
    is_one_of_many = check_processes(group)
    if is_one_of_many and command.workdir is None:
        raise UsageError(
            "workdir=None: several processes need one directory that all of them see; "
            "give --workdir DIR"
        )
    if (cache := user_cache()).parent == Path(tempfile.gettempdir()):
        LOGGER.info("%s cannot be written, so caches are kept in %s", home(), cache)
        os.environ.setdefault("MPLCONFIGDIR", str(cache / "matplotlib"))
    runtime.tune()
    if options.deterministic:
        runtime.make_deterministic()
    if options.compilation_cache:
        runtime.cache_compilations()
    if is_one_of_many:
        distributed.init_distributed(group.coordinator, group.processes, group.process)
    with directory as workdir:
        result = loop.fit(
            command.config,
            workdir,
            profile=profile,
            executor=options.executor,
            tensorboard=options.tensorboard,
        )
    if not distributed.is_first_process():
        return
    # Reading a checkpoint of several processes would take all of them.
    if options.report and not is_one_of_many:
        LOGGER.setLevel(logging.WARNING)  # notes on the data set were shown before
        try:
            write_page(workdir)
        except Exception as error:  # the run is complete without it
            print(
                f"report.html was not written ({reason(error)}); to write it, run "
                f"python -m flax_resnetv2 report {workdir}",
                file=sys.stderr,
            )
    metric = "accuracy" if "accuracy" in result else "loss"
    print(
        f"test {metric} {result[metric]:.4f} of {result['count']:,} images;"
        f" {result['seconds']:.0f} s; in {workdir}"
    )


def open_workdir(command: RecipeCommand, suffix: str = "") -> AbstractContextManager:
    """Return the directory that --workdir names, or a new one in runs/."""
    if command.workdir == "":
        raise UsageError("workdir='' names no directory; give --workdir DIR")
    if command.workdir is None:
        return new_workdir(command.recipe + suffix)
    return nullcontext(command.workdir)


def check_processes(group: ProcessOptions) -> bool:
    """Return whether this is one of several processes; refuse impossible options."""
    coordinator, processes, process = group.coordinator, group.processes, group.process
    if [coordinator, processes, process].count(None) not in (0, 3):
        raise UsageError(
            f"coordinator={coordinator}, processes={processes} and process={process} "
            "must be set together; set all three, or only --distributed"
        )
    if processes is None:
        return group.distributed
    check("processes", processes, Count)
    check("process", process, Annotated[int, Range(0, processes - 1)])
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        raise UsageError(
            f"coordinator={coordinator} must be HOST:PORT with a PORT from 1 to 65535, "
            "as 10.0.0.1:1234"
        )
    return True


def parse(words: list[str], prog: str, about: str, kind: type = TrainCommand) -> Any:
    """Read ``RECIPE [--field value ...]`` as a ``kind`` of ``RecipeCommand``."""
    if words and words[0] in RECIPES:  # the flags of one, in half the time of all
        name, recipe = words[0], RECIPES[words[0]]
        return tyro.cli(
            kind,
            default=kind(recipe=name, config=recipe.config),
            args=words[1:],
            prog=f"{prog} {name}",
            description=recipe.description,
            config=(tyro.conf.AvoidSubcommands,),
        )
    commands = {
        name: (recipe.description, kind(recipe=name, config=recipe.config))
        for name, recipe in RECIPES.items()
    }
    return tyro.extras.overridable_config_cli(
        commands, prog=prog, description=about, args=words
    )
