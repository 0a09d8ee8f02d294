"""A trained net for other programs, in the format that the file's suffix names.

- ``.safetensors``: the arrays under their paths; ``Predictor.find`` and ``predict.py``
  read it.
- ``.stablehlo``: a program that ``jax.export.deserialize`` loads where only JAX is
  installed, for CPU, GPU and TPU.
- ``.onnx``: a graph for ONNX runtimes, made by jax2onnx (see ``INSTALL``).

Programs take stored images, uint8 [N, H, W, C] with any N, and normalize them as in
training. They return probabilities float [N, classes], or an encoder's latent vectors
[N, K].
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
"""Platforms of a StableHLO program."""
INSTALL = (
    "pip install 'onnx>=1.20' 'onnx-ir>=1.1' && "
    "pip install --no-deps 'jax2onnx>=0.17.1,<0.18'"
)
"""Installs what ``.onnx`` needs. The dependencies of jax2onnx would downgrade Orbax,
which only its examples use."""


def export(
    source: str | Path,
    path: str | Path,
    *,
    checkpoint: CheckpointChoice = "newest",
    card: bool = False,
) -> None:
    """Write a trained net in the format that the suffix of ``path`` names.

    Args:
        source: a run directory, an exported file, or a net that the package ships.
        path: ends in one of ``FORMATS``.
        checkpoint: which checkpoint of a run.
        card: also write a model card next to it, with the suffix ``.md``.

    Raises:
        UsageError: the suffix is unknown, there is no such net, the file is not
            writable, or the package that writes this format is not installed.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UsageError(
            f"to={path} must end in one of {', '.join(FORMATS)}, which names the format"
        )
    net = modelfile.open_net(source, checkpoint)
    content = FORMATS[path.suffix](net)
    try:
        write_whole(path, content)
        if card:
            write_whole(path.with_suffix(".md"), modelcard.card(net, path.stem))
    except OSError as error:
        raise UsageError(
            f"to={path} cannot be written ({error.strerror}); choose another place"
        ) from error


def to_stablehlo(net: TrainedNet) -> bytes:
    """Serialize the net's program, with its variables as constants.

    >>> program = jax.export.deserialize(bytearray(content))
    >>> program.call(images)  # uint8 [N, H, W, C], any N
    """
    program, shape = _program(net)
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("n"), *shape), "uint8")
    exported = jax.export.export(jax.jit(program), platforms=PLATFORMS)(images)
    return bytes(exported.serialize())


def to_onnx(net: TrainedNet) -> bytes:
    """Convert the net to an ONNX graph from ``images`` to ``answer``, with any N.

    Raises:
        UsageError: jax2onnx is not installed.
    """
    # It warns about converters for packages that are not needed here.
    logging.getLogger("jax2onnx.plugins.plugin_system").setLevel(logging.CRITICAL)
    try:
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise UsageError(
            f".onnx needs the package {error.name}, which is not installed; run "
            f"{INSTALL}, or choose .stablehlo"
        ) from error
    program, shape = _program(net)
    graph = to_onnx(
        program,
        [jax.ShapeDtypeStruct(("n", *shape), "uint8")],
        input_names=["images"],
        output_names=["answer"],
    )
    return graph.SerializeToString()


def _program(net: TrainedNet) -> tuple[Callable, tuple[int, ...]]:
    """Return a function of stored images, and the shape of one image.

    It uses standard operations, because the fast kernels depend on this platform.
    """
    plain = replace(net.model.execution, backward="automatic", remat="nothing")
    predictor = Predictor.from_net(net._replace(model=net.model.clone(execution=plain)))

    def program(images: jax.Array) -> jax.Array:
        probabilities, latents = predictor.forward(predictor.variables, images)
        return latents if probabilities is None else probabilities

    return program, predictor.image_shape


FORMATS: dict[str, Callable[[TrainedNet], bytes]] = {
    ".safetensors": modelfile.pack,
    ".stablehlo": to_stablehlo,
    ".onnx": to_onnx,
}
"""The function that encodes a net for each suffix."""
