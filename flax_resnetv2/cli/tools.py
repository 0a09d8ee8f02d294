"""The commands ``python -m flax_resnetv2 COMMAND ...`` beside training itself.

Each is a function of its words, which gives the exit code, and whose docstring's first
line is its help; ``COMMANDS`` lists them. Exit codes are those of ``cli``.
"""

import io
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.cli.train import TrainCommand, check_processes, parse
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.config import Config
from flax_resnetv2.system import runtime


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


def show(arguments: list[str]) -> int:
    """Say what a net consists of."""
    import tyro

    def main(
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
        from flax_resnetv2.model import layer_table
        from flax_resnetv2.model.drawing import draw_net
        from flax_resnetv2.model.planning import plan
        from flax_resnetv2.model.presets import get_preset

        found = get_preset(preset)
        architecture = found.architecture
        side = 224 if architecture.num_classes == 1000 else 32
        shape = image_shape or (side, side, 3)
        net = plan(architecture, shape)
        rows = layer_table.layer_table(net, shape)
        if not layers:
            rows = layer_table.fold(layer_table.unit_table(net, shape))
        print(f"{preset}: {architecture.depth} layers; {found.source}")
        print(layer_table.format_table(rows))
        for name, field in layer_table.receptive_field(net).items():
            print(
                f"{name}: sees {field.side} x {field.side} pixels, one value every "
                f"{field.stride}"
            )
        if svg is not None:
            try:
                Path(svg).write_text(draw_net(net, shape), encoding="utf-8")
            except OSError as error:
                raise UsageError(
                    f"svg={svg} cannot be written ({error.strerror}); choose another"
                ) from error
            print(f"drawn in {svg}")

    prog = "python -m flax_resnetv2 show"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


def doctor(arguments: list[str]) -> int:
    """Say what train.py would find and do, and what stands in its way.

    It takes what train.py takes, and gives 1 if there is a problem.
    """
    from flax_resnetv2.cli.doctor import examine
    from flax_resnetv2.cli.installed import tell

    # Flags without a recipe are for quickstart.
    if not arguments or re.match(r"--(?!help$)", arguments[0]):
        arguments = ["quickstart", *arguments]
    _, config, command = parse(
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


def find_rate(arguments: list[str]) -> int:
    """Say which learning rate to choose, by training while it rises."""
    recipe, config, command = parse(
        arguments,
        prog="python -m flax_resnetv2 find-rate",
        description="Train by a recipe while the learning rate rises.",
        kind=RateCommand,
    )

    def work() -> None:
        from flax_resnetv2.run.find_rate import find_rate
        from flax_resnetv2.run.run_directory import new_workdir

        runtime.tune()
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

    return guarded(work)


def sweep(arguments: list[str]) -> int:
    """Train a recipe under each override and seed, and compare."""
    import tyro

    def main(
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
            vary: One override, quoted, as "--train.epochs 3 --train.ema-decay 0.9", or "" for
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
        main, prog=prog, args=joined, return_unknown_args=True
    )

    def work() -> None:
        from flax_resnetv2.reports import sweep

        if only_report:
            print(sweep.report(sweep.load_sweep(workdir), workdir))
            return
        about = "Train a recipe under each override and seed, and compare."
        _, config, command = parse(rest, prog, about)
        _check_shared(rest, command)
        columns = [(words, _override(rest, words, command)) for words in varied]
        sweep.run_sweep(sweep.plan_sweep(rest, config, columns, seeds), workdir)

    return guarded(work)


def _check_shared(words: list[str], command: TrainCommand) -> None:
    """Refuse what runs of a sweep cannot share."""
    if _sets_seed(words):
        raise UsageError(
            "--seed of a sweep; give all of them by --seeds, as --seeds 0 1"
        )
    if check_processes(replace(command, workdir="")):
        raise UsageError(
            "a sweep's run is one process; leave --distributed and --processes out"
        )


def _override(rest: list[str], words: str, shared: TrainCommand) -> Config:
    """The configuration of an override's runs, but for the seed."""
    said = io.StringIO()
    try:
        more = shlex.split(words)
        with redirect_stdout(said), redirect_stderr(said):
            _, config, command = parse([*rest, *more], "train.py", "")
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


def reconstruct(arguments: list[str]) -> int:
    """Draw test images beside what an autoencoder makes of them."""
    import tyro

    def main(
        run: tyro.conf.Positional[str],
        images: int = 10,
        checkpoint: Literal["newest", "best"] = "newest",
    ) -> None:
        """Draw test images beside what an autoencoder makes of them.

        Args:
            run: A run directory of train.py, as of the recipe quickstart-autoencoder;
                receives reconstructions.png.
            images: How many.
            checkpoint: The newest, or the best on the split "validation".
        """
        from flax_resnetv2.reports.reconstruction import reconstruct

        print(f"drawn in {reconstruct(run, images=images, checkpoint=checkpoint)}")

    prog = "python -m flax_resnetv2 reconstruct"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


def export(arguments: list[str]) -> int:
    """Write a trained net into one file, for this package or for other programs."""
    import tyro

    def main(
        net: tyro.conf.Positional[str],
        to: str,
        checkpoint: Literal["newest", "best"] = "newest",
        card: bool = False,
    ) -> None:
        """Write a trained net into one file, for this package or for other programs.

        Args:
            net: A run directory of train.py, or a net that comes with the package.
            to: The file; .safetensors is for predict.py, .stablehlo for jax.export
                without this package, .onnx for ONNX runtimes (needs jax2onnx).
            checkpoint: The newest, or the best on the split "validation".
            card: Write a model card (.md) beside it, from the run's records.
        """
        from flax_resnetv2.inference.export import export

        export(net, to, checkpoint=checkpoint, card=card)
        print(f"written to {to}: {Path(to).stat().st_size:,} bytes")

    prog = "python -m flax_resnetv2 export"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


def report(arguments: list[str]) -> int:
    """Write a page on a run: curves, mistakes, the net, all in one file."""
    import tyro

    def main(
        run: tyro.conf.Positional[str],
        checkpoint: Literal["newest", "best"] = "newest",
    ) -> None:
        """Write a page on a run: curves, mistakes, the net, all in one file.

        Args:
            run: A run directory of train.py; receives report.html.
            checkpoint: Which answers the test images: the newest, or the best on the
                split "validation".
        """
        from flax_resnetv2.reports.run_page import write_page

        print(f"written to {write_page(run, checkpoint)}")

    prog = "python -m flax_resnetv2 report"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


def compare(arguments: list[str]) -> int:
    """Lay several runs side by side: what differs, their scores, their curves."""
    import tyro

    def main(
        runs: tyro.conf.Positional[tuple[str, ...]], png: str | None = None
    ) -> None:
        """Lay several runs side by side: what differs, their scores, their curves.

        Args:
            runs: Run directories of train.py.
            png: Draw their curves into this file.
        """
        from flax_resnetv2.reports import compare_runs
        from flax_resnetv2.system.files import write_whole

        if not runs:
            raise UsageError("no run given; name run directories, as runs/*")
        found = [compare_runs.read_run(run) for run in runs]
        print(compare_runs.to_markdown(found))
        if png is not None:
            try:
                write_whole(Path(png), compare_runs.draw_runs(found))
            except OSError as error:
                raise UsageError(
                    f"png={png} cannot be written ({error.strerror}); choose another"
                ) from error
            print(f"drawn in {png}")

    prog = "python -m flax_resnetv2 compare"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


def serve(arguments: list[str]) -> int:
    """Open a page on this machine: drop an image, see the answer and the maps."""
    import tyro

    def main(
        net: tyro.conf.Positional[str], port: int = 8000, host: str = "127.0.0.1"
    ) -> None:
        """Open a page on this machine: drop an image, see the answer and the maps.

        Args:
            net: A run directory of train.py, an exported .safetensors file, or a net
                that comes with the package.
            port: Where the page is; 0: any free one.
            host: Which address listens; 127.0.0.1 is for this machine alone.
        """
        from flax_resnetv2.inference.serve import make_server

        with make_server(net, host=host, port=port) as server:
            address = f"http://{host}:{server.server_address[1]}/"
            print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()

    prog = "python -m flax_resnetv2 serve"
    return guarded(lambda: tyro.cli(main, prog=prog, args=arguments))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "show": show,
    "doctor": doctor,
    "find-rate": find_rate,
    "sweep": sweep,
    "report": report,
    "compare": compare,
    "reconstruct": reconstruct,
    "export": export,
    "serve": serve,
}
"""What ``python -m flax_resnetv2`` can be told to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m flax_resnetv2``."""
    import tyro

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])

    def listed(command: Callable) -> Callable:
        def nothing() -> None:
            pass

        nothing.__doc__ = command.__doc__
        return nothing

    # Help, or the refusal of a command that is none.
    tyro.extras.subcommand_cli_from_dict(
        {name: listed(command) for name, command in COMMANDS.items()},
        prog="python -m flax_resnetv2",
        args=arguments,
    )
    return 0
