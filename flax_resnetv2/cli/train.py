"""The commands ``train.py RECIPE [--field value ...]``, ``predict.py NET IMAGE ...``.

Every flag is a field of ``Config`` and every help text its docstring. Exit codes: 0
done, 2 bad use, 1 failed run, 75 stopped by a signal with all of it saved, 130 ended by
Ctrl-C before there was anything to save; with one message and no traceback.
"""

import io
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.placement import Executor
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.system import distributed, runtime


@dataclass(frozen=True)
class TrainCommand(Config):
    """Train a ResNet V2. The same command with the same --workdir goes on."""

    workdir: str | None = None
    """Directory of the run; None: a new runs/RECIPE-N."""
    compilation_cache: bool = True
    """Keep compiled programs for the next run: in JAX_COMPILATION_CACHE_DIR, or in the
    user's cache directory, as ~/.cache/flax_resnetv2/xla, which may be deleted."""
    profile: str | None = None
    """FIRST:END, as 20:30: write a trace of these steps to WORKDIR/profile."""
    report: bool = True
    """Write WORKDIR/report.html at the end: curves, mistakes, the net. (Of several
    processes none does; python -m flax_resnetv2 report WORKDIR makes up for it.)"""
    tensorboard: bool = False
    """Write WORKDIR/tensorboard too, for TensorBoard."""
    deterministic: bool = False
    """The same bits run to run on GPUs too, which costs speed; see
    docs/reliability.md."""
    executor: Executor = "pmap"
    """What maps a step over the devices; both compute the same."""
    distributed: bool = False
    """This is one of several processes that SLURM, Open MPI, Kubernetes or a TPU pod
    started; elsewhere the three flags below say what these know."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    processes: int | None = None
    """How many there are."""
    process: int | None = None
    """Which one this is, from 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``: a recipe, changed by flags, trained by ``fit``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    recipe, config, command = parse(
        arguments,
        prog="train.py",
        description="Train a ResNet V2 by a recipe; RECIPE --help lists every field.",
    )

    def work() -> None:
        from flax_resnetv2.run.tracing import parse_steps

        profile, chosen = parse_steps(command.profile), command.workdir
        if chosen == "":
            raise UsageError("workdir='' names no directory; give --workdir DIR")
        many = check_processes(command)
        runtime.tune()
        if command.deterministic:
            runtime.make_deterministic()
        if command.compilation_cache:
            runtime.cache_compilations()
        if many:
            distributed.init_distributed(
                command.coordinator, command.processes, command.process
            )
        from flax_resnetv2.run.loop import fit
        from flax_resnetv2.run.run_directory import new_workdir

        with nullcontext(chosen) if chosen else new_workdir(recipe) as workdir:
            result = fit(
                config,
                workdir,
                profile=profile,
                executor=command.executor,
                tensorboard=command.tensorboard,
            )
        if distributed.is_first_process():
            # Reading a checkpoint would take all of several processes.
            if command.report and not many:
                _write_page(workdir)
            what = "accuracy" if "accuracy" in result else "loss"
            print(
                f"test {what} {result[what]:.4f} of {result['count']:,} images;"
                f" {result['seconds']:.0f} s; in {workdir}"
            )

    try:
        code = guarded(work)
    except Exception:  # of this package's own: one of several must not leave in order
        if not distributed.is_multi_process():
            raise
        traceback.print_exc()
        code = 1
    if code not in (0, 75):
        distributed.exit_without_peers(code)
    return code


def _write_page(workdir: str | Path) -> None:
    """Write the page on a run that is done; what prevents it undoes nothing."""
    from flax_resnetv2.reports.run_page import write_page

    try:
        # What there is to say of the data was said when the run began.
        with redirect_stdout(io.StringIO()):
            write_page(workdir)
    except Exception as error:  # whatever it is, the run is done
        reason = (str(error).splitlines() or [""])[0] or repr(error)
        print(
            f"no report.html ({reason}); see to it, and run python -m flax_resnetv2 "
            f"report {workdir}",
            file=sys.stderr,
        )


def check_processes(command: TrainCommand) -> bool:
    """Whether there are several processes; all of them must be told the same run."""
    said = [command.coordinator, command.processes, command.process]
    if said.count(None) not in (0, 3):
        raise UsageError(
            f"coordinator={said[0]}, processes={said[1]} and process={said[2]} are "
            "given all or not at all; without them --distributed asks the cluster"
        )
    many = command.distributed or command.processes is not None
    if many and command.workdir is None:
        raise UsageError(
            "workdir=None: several processes need one directory that all of them see; "
            "give --workdir DIR"
        )
    if command.processes is not None:
        if command.processes < 1 or not 0 <= command.process < command.processes:
            raise UsageError(
                f"process={command.process} must be from 0 to below processes="
                f"{command.processes}, which must be 1 or above"
            )
        found = re.fullmatch(r".+:(\d+)", command.coordinator)
        if not found or not 0 < int(found[1]) < 2**16:
            raise UsageError(
                f"coordinator={command.coordinator} must be HOST:PORT with a PORT from "
                "1 to 65535, as 10.0.0.1:1234"
            )
    return many


def parse(
    arguments: list[str], prog: str, description: str, kind: type = TrainCommand
) -> tuple[str, Config, Any]:
    """Read a recipe and what changes it: its name, the run, all that was said."""
    import tyro

    names = [f.name for f in fields(Config)]
    command = tyro.extras.overridable_config_cli(
        {
            name: (
                recipe.description,
                kind(**{n: getattr(recipe.config, n) for n in names}),
            )
            for name, recipe in RECIPES.items()
        },
        prog=prog,
        description=description,
        args=arguments,
    )
    config = Config(**{name: getattr(command, name) for name in names})
    # tyro takes an underscore for a hyphen.
    words = [word.replace("_", "-") for word in arguments]
    return next(word for word in words if word in RECIPES), config, command
