"""The commands ``train.py RECIPE [--field value ...]``, ``predict.py RUN IMAGE ...``,
``python -m flax_resnetv2 show PRESET``, ``python -m flax_resnetv2 doctor [RECIPE]``.

Every flag is a field of ``Config`` and every help text its docstring. Exit codes: 0
done, 2 bad use, 1 failed run; the last two with one message and no traceback.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from flax_resnetv2 import process
from flax_resnetv2.config import RECIPES, Config
from flax_resnetv2.errors import RunError, UsageError


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


def train(arguments: Sequence[str] | None = None) -> int:
    """Run ``train.py``: a recipe, changed by flags, trained by ``fit``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    recipe, config, command = _parse(
        arguments,
        prog="train.py",
        description="Train a ResNet V2 by a recipe; RECIPE --help lists every field.",
    )

    def work() -> None:
        process.tune()
        if command.compilation_cache:
            process.cache_compilations()
        from flax_resnetv2.loop import fit
        from flax_resnetv2.rundir import new_workdir
        from flax_resnetv2.tracing import parse_steps

        profile = parse_steps(command.profile)

        chosen = command.workdir
        with nullcontext(chosen) if chosen else new_workdir(recipe) as workdir:
            result = fit(config, workdir, profile=profile)
        print(
            f"test accuracy {result['accuracy']:.4f} of {result['count']:,} images; "
            f"{result['seconds']:.0f} s; in {workdir}"
        )

    return _guarded(work)


def _parse(
    arguments: list[str], prog: str, description: str
) -> tuple[str, Config, TrainCommand]:
    """Read a recipe and what changes it: its name, the run, all that was said."""
    import tyro

    names = [f.name for f in fields(Config)]
    command = tyro.extras.overridable_config_cli(
        {
            name: (
                recipe.description,
                TrainCommand(**{n: getattr(recipe.config, n) for n in names}),
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
    ) -> None:
        """Say what is on images.

        Args:
            run: A run directory that train.py made.
            images: Image files.
            top: How many classes to print for each.
        """
        from flax_resnetv2.inference import Predictor

        if not images:
            raise UsageError("no image given; name at least one PNG or JPEG file")
        predictor = Predictor.from_run(run)
        pixels = np.stack([predictor.load(path) for path in images])
        for path, row in zip(images, predictor(pixels), strict=True):
            best = np.argsort(-row)[:top]
            says = ", ".join(f"{predictor.class_names[k]} {row[k]:.1%}" for k in best)
            print(f"{path}: {says}")

    return _guarded(lambda: tyro.cli(main, prog="predict.py", args=arguments))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m flax_resnetv2``: ``show`` or ``doctor``."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["doctor"]:
        return _doctor(arguments[1:])

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

    commands = {"show": show, "doctor": doctor}
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


def _guarded(work: Callable[[], None]) -> int:
    """Turn the project's two errors into a message and an exit code."""
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0
