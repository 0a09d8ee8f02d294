"""The commands ``python -m flax_resnetv2 COMMAND ...``.

Each is a function in ``COMMANDS`` whose docstring is its help. Most have typed
arguments; those that take a recipe and its flags get the words of the command line.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

import flax_resnetv2.reports.sweep as sweeps
from flax_resnetv2.cli import train
from flax_resnetv2.cli.doctor import doctor
from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference.export import export as export_net
from flax_resnetv2.inference.serve import make_server
from flax_resnetv2.model import layer_table
from flax_resnetv2.model.drawing import draw_net
from flax_resnetv2.model.planning import plan
from flax_resnetv2.model.presets import get_preset
from flax_resnetv2.reports import compare_runs, reconstruction, run_page
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.find_rate import find_rate as suggest_rate
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.trained import CheckpointChoice
from flax_resnetv2.system import runtime
from flax_resnetv2.system.files import expand_home


def show(
    preset: str,
    /,
    image_shape: tuple[int, int, int] | None = None,
    layers: bool = False,
    svg: str | None = None,
) -> None:
    """Show the units, sizes and costs of a preset net.

    Args:
        preset: Name of the net, for example article-figure.
        image_shape: Height, width and channels of the input; None takes 224 224 3 for
            nets with 1000 classes and 32 32 3 for others.
        layers: Print one row per layer instead of one per unit.
        svg: Also draw the net into this file.
    """
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
    for name, (size, stride) in layer_table.receptive_field(net).items():
        print(f"{name}: sees {size} x {size} pixels, one value every {stride}")
    if svg is not None:
        _write_drawing("svg", svg, draw_net(net, shape).encode())


@dataclass(frozen=True)
class RateCommand(train.RecipeCommand):
    """The flags of ``find-rate``."""

    workdir: str | None = None
    """Directory for rates.jsonl and learning_rate.png, which must not hold a run. None
    creates runs/RECIPE-rate-N."""
    steps: int = 100
    """Training steps during which the rate rises, from highest / 1,000,000."""
    highest: float = 10.0
    """Learning rate at the last step."""


def find_rate(words: list[str], /) -> None:
    """Suggest a learning rate by training a recipe while the rate rises."""
    prog, about = "python -m flax_resnetv2 find-rate", find_rate.__doc__
    command = train.parse(words, prog, about, RateCommand)
    runtime.tune()
    with train.open_workdir(command, "-rate") as directory:
        rate = suggest_rate(
            command.config, directory, steps=command.steps, highest=command.highest
        )
    print(
        f"--train.learning-rate {rate:.2g}; the loss was lowest at {10 * rate:.2g}; "
        f"drawn in {directory}/learning_rate.png"
    )


@dataclass(frozen=True)
class SweepCommand:
    """Train a recipe under each override and seed, and compare.

    sweep RECIPE --workdir DIR [--field value ...] --vary OVERRIDE ... --seeds ... also
    takes every flag of train.py RECIPE, for all runs. Each run is a process of its own.
    The same command resumes the sweep and repeats runs that failed; seeds and overrides
    may be added.
    """

    workdir: str
    """Directory of the sweep."""
    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """One override in quotes, for example "--train.epochs 3 --train.ema-decay 0.9", or
    "" for the recipe itself. May be repeated; all are compared with the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each override."""
    report: bool = False
    """Train nothing; write sweep.md and sweep.png of the finished runs in --workdir."""


def sweep(words: list[str], /) -> None:
    """Train a recipe under each override and seed, and compare."""
    # tyro reads a value that begins with a hyphen only after an equals sign.
    joined = "\0".join(["", *words]).replace("\0--vary\0", "\0--vary=")
    words, prog = joined.split("\0")[1:], "python -m flax_resnetv2 sweep"
    command, rest = tyro.cli(
        SweepCommand, prog=prog, args=words, return_unknown_args=True
    )
    workdir = Path(command.workdir)
    if command.report:
        print(sweeps.report(sweeps.load_sweep(workdir), workdir))
        return
    shared = train.parse(rest, prog, "Flags of every run of a sweep.")
    if train.check_processes(shared.multi_process):
        raise UsageError(
            "a run of a sweep is one process; leave --distributed and --processes out"
        )
    overrides = [text.strip() for text in command.vary or ("",)]
    varied = [(text, _override(shared, text)) for text in overrides]
    usual = RECIPES[shared.recipe].config.seed
    if changed := {config.seed for _, config in varied} - {usual}:
        raise UsageError(
            f"seed={changed.pop()} cannot be set in a sweep; give all seeds by --seeds"
        )
    planned = sweeps.plan_sweep(rest, shared.config, varied, command.seeds)
    sweeps.run_sweep(planned, workdir)


def _override(shared: train.TrainCommand, text: str) -> Config:
    """Return the shared configuration with the flags in ``text``."""
    try:
        words = expand_home(shlex.split(text))
    except ValueError as error:
        raise UsageError(
            f"--vary {text!r} cannot be read ({error}); give flags of train.py, as "
            "'--train.epochs 3'"
        ) from error
    try:
        return tyro.cli(
            Config,
            default=shared.config,
            args=words,
            prog=f"train.py {shared.recipe}",
            config=(tyro.conf.AvoidSubcommands,),
        )
    except SystemExit as ended:  # tyro has told the reason
        raise UsageError(
            f"--vary {text!r} is not made of flags that change the recipe; the reason "
            "stands above"
        ) from ended


def report(run: str, /, checkpoint: CheckpointChoice = "newest") -> None:
    """Write a report on a run as one HTML file: curves, mistakes and the net.

    Args:
        run: A run directory of train.py; receives report.html.
        checkpoint: Checkpoint that classifies the test images: the newest, or the best
            on the split "validation".
    """
    print(f"written to {run_page.write_page(run, checkpoint)}")


def compare(runs: tuple[str, ...], /, png: str | None = None) -> None:
    """Compare runs: differing settings, results and curves.

    Args:
        runs: Run directories of train.py.
        png: Also draw the curves into this file.
    """
    if not runs:
        raise UsageError("no run given; name run directories, as runs/*")
    records = [compare_runs.read_run(run) for run in runs]
    print(compare_runs.to_markdown(records))
    if png is not None:
        _write_drawing("png", png, compare_runs.draw_runs(records))


def reconstruct(
    run: str, /, images: int = 10, checkpoint: CheckpointChoice = "newest"
) -> None:
    """Draw test images next to their reconstructions by an autoencoder.

    Args:
        run: A run directory of train.py, for example of the recipe
            quickstart-autoencoder; receives reconstructions.png.
        images: Number of images.
        checkpoint: The newest checkpoint, or the best on the split "validation".
    """
    path = reconstruction.reconstruct(run, images=images, checkpoint=checkpoint)
    print(f"drawn in {path}")


def export(
    net: str, /, to: str, checkpoint: CheckpointChoice = "newest", card: bool = False
) -> None:
    """Write a trained net to one file, for this package or for other programs.

    Args:
        net: A run directory of train.py, or the name of a net in the package.
        to: The file; its suffix chooses the format: .safetensors for predict.py,
            .stablehlo for jax.export without this package, .onnx for ONNX runtimes
            (needs jax2onnx).
        checkpoint: The newest checkpoint, or the best on the split "validation".
        card: Also write a model card (.md) from the records of the run.
    """
    export_net(net, to, checkpoint=checkpoint, card=card)
    print(f"written to {to}: {Path(to).stat().st_size:,} bytes")


def serve(net: str, /, port: int = 8000, host: str = "127.0.0.1") -> None:
    """Serve a web page that classifies an image and shows the net's maps.

    Args:
        net: A run directory of train.py, an exported .safetensors file, or the name of
            a net in the package.
        port: Port of the page; 0 takes a free one.
        host: Address to listen on; 127.0.0.1 is reachable from this machine only.
    """
    with make_server(net, host=host, port=port) as server:
        address = f"http://{host}:{server.server_address[1]}/"
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def _write_drawing(flag: str, path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise UsageError(
            f"{flag}={path} cannot be written ({error.strerror}); choose another"
        ) from error
    print(f"drawn in {path}")


BY_RECIPE = (doctor, find_rate, sweep)
"""Commands that take the words of ``train.py``."""
COMMANDS: dict[str, Callable[..., int | None]] = {
    command.__name__.replace("_", "-"): command
    for command in (show, *BY_RECIPE, report, compare, reconstruct, export, serve)
}
"""Every command by its name, in the order of --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m flax_resnetv2``; return the exit code."""
    words = expand_home(sys.argv[1:] if arguments is None else arguments)
    command = COMMANDS.get(words[0]) if words else None
    if command in BY_RECIPE:
        return guarded(lambda: command(words[1:]))
    return guarded(
        lambda: tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="python -m flax_resnetv2", args=words
        )
    )
