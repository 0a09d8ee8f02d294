"""The commands ``train.py RECIPE [--field value ...]``, ``predict.py RUN IMAGE ...``,
``python -m flax_resnetv2 show PRESET``, ``python -m flax_resnetv2 doctor [RECIPE]``,
``python -m flax_resnetv2 find-rate RECIPE``,
``python -m flax_resnetv2 sweep RECIPE --vary OVERRIDE ... --seeds SEED ...``.

Every flag is a field of ``Config`` and every help text its docstring. Exit codes: 0
done, 2 bad use, 1 failed run, 75 stopped by a signal with all of it saved, 130 ended by
Ctrl-C before there was anything to save; with one message and no traceback.
"""

import io
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flax_resnetv2 import process
from flax_resnetv2.config import RECIPES, Config
from flax_resnetv2.errors import RunError, Stopped, UsageError
from flax_resnetv2.parallel import Executor


@dataclass(frozen=True)
class RateCommand(Config):
    """Train while the learning rate rises, and say which to choose."""

    workdir: str | None = None
    """Directory for rates.jsonl and learning_rate.png, no run's; None: a new
    runs/RECIPE-rate-N."""
    steps: int = 100
    """Steps over which the rate rises, from a millionth of the highest."""
    highest: float = 10.0
    """Where it ends."""


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


def train(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``: a recipe, changed by flags, trained by ``fit``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    recipe, config, command = _parse(
        arguments,
        prog="train.py",
        description="Train a ResNet V2 by a recipe; RECIPE --help lists every field.",
    )

    def work() -> None:
        from flax_resnetv2.tracing import parse_steps

        profile, chosen = parse_steps(command.profile), command.workdir
        if chosen == "":
            raise UsageError("workdir='' names no directory; give --workdir DIR")
        many = _check_processes(command)
        process.tune()
        if command.deterministic:
            process.make_deterministic()
        if command.compilation_cache:
            process.cache_compilations()
        if many:
            process.join(command.coordinator, command.processes, command.process)
        from flax_resnetv2.loop import fit
        from flax_resnetv2.rundir import new_workdir

        with nullcontext(chosen) if chosen else new_workdir(recipe) as workdir:
            result = fit(config, workdir, profile=profile, executor=command.executor)
        if process.is_first():
            print(
                f"test accuracy {result['accuracy']:.4f} of {result['count']:,} images;"
                f" {result['seconds']:.0f} s; in {workdir}"
            )

    try:
        code = _guarded(work)
    except Exception:  # of this package's own: one of several must not leave in order
        if not process.is_one_of_several():
            raise
        traceback.print_exc()
        code = 1
    if code not in (0, 75):
        process.leave_others(code)
    return code


def _check_processes(command: TrainCommand) -> bool:
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


def _parse(
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


def predict(arguments: Sequence[str] | None = None) -> int:
    """Run ``predict.py``: print the likeliest classes of image files."""
    import tyro

    def main(
        run: tyro.conf.Positional[str],
        images: tyro.conf.Positional[tuple[str, ...]],
        top: int = 3,
        checkpoint: Literal["newest", "best"] = "newest",
    ) -> None:
        """Say what is on images.

        Args:
            run: A run directory that train.py made.
            images: Image files.
            top: How many classes to print for each.
            checkpoint: The newest, or the best on the split "validation".
        """
        from flax_resnetv2.inference import Predictor

        if not images:
            raise UsageError("no image given; name at least one PNG or JPEG file")
        if top < 1:
            raise UsageError(f"top={top} must be 1 or above")
        predictor = Predictor.from_run(run, checkpoint)
        pixels = np.stack([predictor.load(path) for path in images])
        for path, row in zip(images, predictor(pixels), strict=True):
            best = np.argsort(-row)[:top]
            says = ", ".join(f"{predictor.class_names[k]} {row[k]:.1%}" for k in best)
            print(f"{path}: {says}")

    return _guarded(lambda: tyro.cli(main, prog="predict.py", args=arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m flax_resnetv2``: show, doctor, find-rate or sweep."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["doctor"]:
        return _doctor(arguments[1:])
    if arguments[:1] == ["find-rate"]:
        return _find_rate(arguments[1:])
    if arguments[:1] == ["sweep"]:
        return _sweep(arguments[1:])

    def show(
        preset: tyro.conf.Positional[str],
        image_shape: tuple[int, int, int] | None = None,
        layers: bool = False,
        svg: str | None = None,
    ) -> None:
        """Say what a net consists of.

        Args:
            preset: Its name, as article-figure.
            image_shape: Height, width and channels; without: 224 224 3 for nets of
                1000 classes, 32 32 3 for others.
            layers: A row for each layer in place of each unit.
            svg: Draw it into this file.
        """
        from flax_resnetv2 import counting
        from flax_resnetv2.drawing import draw
        from flax_resnetv2.presets import get_preset

        found = get_preset(preset)
        architecture = found.architecture
        side = 224 if architecture.num_classes == 1000 else 32
        shape = image_shape or (side, side, 3)
        rows = counting.layer_table(architecture, shape)
        if not layers:
            rows = counting.fold(counting.unit_table(architecture, shape))
        print(f"{preset}: {architecture.depth} layers; {found.source}")
        print(counting.format_table(rows))
        for name, field in counting.receptive_field(architecture).items():
            print(
                f"{name}: sees {field.side} x {field.side} pixels, one value every "
                f"{field.stride}"
            )
        if svg is not None:
            try:
                Path(svg).write_text(draw(architecture, shape), encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"svg={svg} cannot be written ({error.strerror}); choose another"
                ) from error
            print(f"drawn in {svg}")

    def doctor() -> None:
        """Say what train.py would find and do, and what stands in its way.

        It takes what train.py takes: doctor [RECIPE] [--field value ...].
        """

    def find_rate() -> None:
        """Say which learning rate to choose, by training while it rises.

        It takes what train.py takes: find-rate RECIPE [--field value ...].
        """

    def sweep() -> None:
        """Train a recipe under each override and seed, and compare.

        sweep RECIPE --workdir DIR [--field value ...] --vary OVERRIDE ... --seeds ...
        """

    commands = {
        "show": show,
        "doctor": doctor,
        "find-rate": find_rate,
        "sweep": sweep,
    }
    return _guarded(
        lambda: tyro.extras.subcommand_cli_from_dict(
            commands, prog="python -m flax_resnetv2", args=arguments
        )
    )


def _doctor(arguments: list[str]) -> int:
    """Run ``python -m flax_resnetv2 doctor``: print findings; 1 if one is a problem."""
    from flax_resnetv2.doctor import examine
    from flax_resnetv2.installed import tell

    # Flags without a recipe are for quickstart.
    if not arguments or re.match(r"--(?!help$)", arguments[0]):
        arguments = ["quickstart", *arguments]
    _, config, command = _parse(
        arguments,
        prog="python -m flax_resnetv2 doctor",
        description="Say what train.py with the same words would find and do.",
    )
    return tell(
        examine(
            config,
            shlex.join(["train.py", *arguments]),
            None if command.workdir is None else Path(command.workdir),
            command.compilation_cache,
            command.profile,
        )
    )


def _find_rate(arguments: list[str]) -> int:
    """Run ``python -m flax_resnetv2 find-rate``: print a learning rate."""
    recipe, config, command = _parse(
        arguments,
        prog="python -m flax_resnetv2 find-rate",
        description="Train by a recipe while the learning rate rises.",
        kind=RateCommand,
    )

    def work() -> None:
        from flax_resnetv2.find_rate import find_rate
        from flax_resnetv2.rundir import new_workdir

        process.tune()
        chosen = command.workdir
        if chosen == "":
            raise UsageError("workdir='' names no directory; give --workdir DIR")
        with nullcontext(chosen) if chosen else new_workdir(f"{recipe}-rate") as place:
            rate = find_rate(
                config, place, steps=command.steps, highest=command.highest
            )
        print(
            f"--train.learning-rate {rate:.2g}; the loss was lowest at "
            f"{10 * rate:.2g}; drawn in {place}/learning_rate.png"
        )

    return _guarded(work)


def _sweep(arguments: list[str]) -> int:
    """Run ``python -m flax_resnetv2 sweep``."""
    import tyro

    def sweep(
        workdir: str,
        vary: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
        seeds: tuple[int, ...] = (0, 1, 2),
        report: bool = False,
    ) -> tuple[Path, tuple[str, ...], tuple[int, ...], bool]:
        """Train a recipe under each override and seed, and compare.

        sweep RECIPE --workdir DIR [--field value ...] --vary OVERRIDE ... --seeds ...
        takes every flag of train.py RECIPE too, for all runs. Each run is a process of
        its own. The same command goes on where it was, and tries again what failed;
        seeds and overrides may be added.

        Args:
            workdir: Directory of the sweep.
            vary: One override, quoted, as "--train.epochs 3 --train.ema 0.9", or "" for
                the recipe as it is; may be given again and again. The others are
                compared with the first.
            seeds: Of the runs of each override.
            report: Run nothing, but write sweep.md and sweep.png of what is done; of
                the other words only --workdir counts.
        """
        varied = tuple(words.strip() for words in vary) or ("",)
        return Path(workdir), varied, seeds, report

    joined = []
    for word in arguments:
        # A value that begins with a hyphen is one only behind an equals sign.
        if joined[-1:] == ["--vary"]:
            joined[-1] = f"--vary={word}"
        else:
            joined.append(word)
    prog = "python -m flax_resnetv2 sweep"
    (workdir, varied, seeds, only_report), rest = tyro.cli(
        sweep, prog=prog, args=joined, return_unknown_args=True
    )

    def work() -> None:
        from flax_resnetv2 import sweep

        if only_report:
            print(sweep.report(sweep.load_sweep(workdir), workdir))
            return
        about = "Train a recipe under each override and seed, and compare."
        _, config, command = _parse(rest, prog, about)
        _check_shared(rest, command)
        columns = [(words, _override(rest, words, command)) for words in varied]
        sweep.run_sweep(sweep.plan_sweep(rest, config, columns, seeds), workdir)

    return _guarded(work)


def _check_shared(words: list[str], command: TrainCommand) -> None:
    """Refuse what runs of a sweep cannot share."""
    if _sets_seed(words):
        raise UsageError(
            "--seed of a sweep; give all of them by --seeds, as --seeds 0 1"
        )
    if _check_processes(replace(command, workdir="")):
        raise UsageError(
            "a sweep's run is one process; leave --distributed and --processes out"
        )


def _override(rest: list[str], words: str, shared: TrainCommand) -> Config:
    """The configuration of an override's runs, but for the seed."""
    said = io.StringIO()
    try:
        more = shlex.split(words)
        with redirect_stdout(said), redirect_stderr(said):
            _, config, command = _parse([*rest, *more], "train.py", "")
    except ValueError as error:
        raise UsageError(f"--vary {words!r} cannot be read ({error})") from error
    except SystemExit as error:
        # A title, a rule, the reason, and, after another rule, advice.
        parts = re.split("[-─]{4,}", said.getvalue())
        reason = " ".join(parts[1].split()) if error.code else "it asks for help"
        raise UsageError(
            f"--vary {words!r} cannot be read ({reason}); give flags of train.py, as "
            "'--train.epochs 3'"
        ) from error
    own = {f.name for f in fields(TrainCommand)} - {f.name for f in fields(Config)}
    other = [name for name in own if getattr(command, name) != getattr(shared, name)]
    if _sets_seed(more):
        other.append("seed")
    if other:
        raise UsageError(
            f"--vary {words!r} sets {', '.join(sorted(other))}, which is no part of an "
            "override; leave it out"
        )
    return config


def _sets_seed(words: list[str]) -> bool:
    return any(word.partition("=")[0] == "--seed" for word in words)


def _guarded(work: Callable[[], None]) -> int:
    """Turn the project's errors into a message and an exit code."""
    process.quieten()
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"stopped {stopped}", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("ended by Ctrl-C", file=sys.stderr)
        return 130
    return 0
