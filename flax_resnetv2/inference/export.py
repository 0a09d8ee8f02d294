"""A trained net for other programs: one file, in the format that its suffix names.

- ``.safetensors``: for this package, ``Predictor.from_file`` and ``predict.py``; the
  arrays under their paths, for whatever else.
- ``.stablehlo``: a program that ``jax.export.deserialize`` reads where only JAX is
  installed, for CPU, GPU and TPU.
- ``.onnx``: a graph for ONNX runtimes (made by jax2onnx: see ``INSTALL``).

Programs take stored images, uint8 [N, H, W, C] of any N, normalize them as in training
and give probabilities float [N, classes]; of an encoder, its vectors [N, K].
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import modelcard, modelfile
from flax_resnetv2.inference.predictor import Predictor
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet
from flax_resnetv2.system.files import write_whole

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""For which a StableHLO program is made."""
INSTALL = (
    "pip install 'onnx>=1.20' 'onnx-ir>=1.1' && "
    "pip install --no-deps 'jax2onnx>=0.17.1,<0.18'"
)
"""For ONNX. With its dependencies jax2onnx would replace Orbax by one too old, which it
needs for examples only."""


def export(
    source: str | Path,
    path: str | Path,
    *,
    checkpoint: CheckpointChoice = "newest",
    card: bool = False,
) -> None:
    """Write a trained net as the suffix of ``path`` says.

    Args:
        source: a run's directory, a file of ``modelfile``, or a net of the package.
        path: ends in one of ``FORMATS``.
        checkpoint: which one of a run.
        card: write a card beside it, with the suffix ``.md``.

    Raises:
        UsageError: another suffix, no such net, the file cannot be written, or what
            writes this format is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(
            f"to={path} must end in one of {', '.join(FORMATS)}, which says the format"
        )
    net = modelfile.open_net(source, checkpoint)
    content = FORMATS[path.suffix](net)
    try:
        write_whole(path, content)
        if card:
            text = modelcard.card(net, path.stem)
            write_whole(path.with_suffix(".md"), text)
    except OSError as error:
        raise UsageError(
            f"to={path} cannot be written ({error.strerror}); choose another place"
        ) from error


def to_stablehlo(net: TrainedNet) -> bytes:
    """Serialize the net's program, with its variables inside.

    >>> program = jax.export.deserialize(bytearray(content))
    >>> program.call(images)  # uint8 [N, H, W, C], any N
    """
    answer, shape = _program(net)
    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, *shape), "uint8")
    made = jax.export.export(jax.jit(answer), platforms=PLATFORMS)(images)
    return bytes(made.serialize())


def to_onnx(net: TrainedNet) -> bytes:
    """Write the net as an ONNX graph of the input ``images``, of any N.

    Raises:
        UsageError: jax2onnx is not installed.
    """
    # It looks for converters of packages that are not needed here.
    logging.getLogger("jax2onnx.plugins.plugin_system").setLevel(logging.CRITICAL)
    try:
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise UsageError(
            f".onnx needs the package {error.name}, which is not installed; run "
            f"{INSTALL}, or choose .stablehlo"
        ) from error
    answer, shape = _program(net)
    graph = to_onnx(
        answer,
        [jax.ShapeDtypeStruct(("n", *shape), "uint8")],
        input_names=["images"],
        output_names=["answer"],
    )
    return graph.SerializeToString()


def _program(net: TrainedNet) -> tuple[Callable, tuple[int, ...]]:
    """A function of stored images alone, and the shape of one.

    By the textbook operations: those that are fast here choose by the platform, which
    has no meaning elsewhere.
    """
    plain = replace(net.model.execution, backward="automatic", remat="nothing")
    predictor = Predictor.of(net._replace(model=net.model.clone(execution=plain)))

    def answer(images: jax.Array) -> jax.Array:
        probabilities, latents = predictor.traced(images)
        return latents if probabilities is None else probabilities

    return answer, predictor.image_shape


FORMATS: dict[str, Callable[[TrainedNet], bytes]] = {
    ".safetensors": modelfile.pack,
    ".stablehlo": to_stablehlo,
    ".onnx": to_onnx,
}
"""What writes a suffix."""
