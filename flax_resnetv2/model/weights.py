"""Weights that others published, for the nets of ``presets``; and back to their names.

>>> model = create_model("keras-resnet50v2")
>>> variables = from_keras("resnet50v2_weights_tf_dim_ordering_tf_kernels.h5", model)

All or nothing: every tensor of the net has one of the file, and the other way round, or
an error lists both sides' rest. Nothing that a file contains is executed.
"""

import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import weight_names
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.model.weight_names import HEAD, Leaf, WeightLayout
from flax_resnetv2.validation import check_choice

Tensors = dict[str, np.ndarray]
SHOWN = 4
"""Names of each kind that an error lists."""

_logger = logging.getLogger(__name__)


def from_file(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights by the kind of their file: Keras's, timm's or Big Transfer's.

    Args:
        path: as ``from_keras``, ``from_timm`` or ``from_bit`` reads it.
        model: of a fitting preset, or with another head.
        classifier: as of ``from_keras``.
        key: as of ``from_keras``.
    """
    check_file(path)
    read = next(f for f, kinds in _KINDS.items() if Path(path).suffix in kinds)
    return read(path, model, classifier=classifier, key=key)


def check_file(path: str | Path) -> None:
    """Refuse what ``from_file`` would not open, without opening it.

    Raises:
        UsageError: no file, or one of another kind.
    """
    kinds = tuple(kind for some in _KINDS.values() for kind in some)
    _check_file(Path(path), kinds, _CONVERT)


def from_keras(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights of ``keras.applications.ResNet50V2``, ``101V2`` or ``152V2``.

    Args:
        path: ``.keras``, ``.weights.h5``, or the ``.h5`` of keras.applications.
        model: of a preset keras-*, or with another head.
        classifier: "leave" the file's out: the model keeps its own head, drawn anew.
        key: of that head; None: key 0.

    Returns:
        ``params`` and ``batch_stats``, in the model's dtype of parameters.

    Raises:
        UsageError: not such a file, a damaged one, or one of another net.
    """
    found = _read_keras(Path(path))
    return _import(found, path, model, weight_names.keras, classifier, key)


def from_timm(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights of timm's ``resnetv2_*``, Big Transfer's among them.

    Args:
        path: ``.safetensors``.
        model: of a preset timm-* or bit-*, or with another head.
        classifier: as of ``from_keras``.
        key: as of ``from_keras``.
    """
    found = _read_timm(Path(path))
    return _import(found, path, model, weight_names.timm, classifier, key)


def from_bit(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights that Big Transfer published.

    Args:
        path: ``.npz``, as BiT-M-R50x1.npz.
        model: of a preset bit-*, or with another head.
        classifier: as of ``from_keras``.
        key: as of ``from_keras``.
    """
    found = _read_npz(Path(path))
    return _import(found, path, model, weight_names.bit, classifier, key)


_KINDS = {
    from_keras: (".keras", ".h5"),
    from_timm: (".safetensors",),
    from_bit: (".npz",),
}
_CONVERT = (
    "a .pth is a pickle, which may run code; convert it where torch is: python -c "
    "\"import torch, safetensors.torch as s; s.save_file(torch.load('x.pth', "
    "weights_only=True), 'x.safetensors')\""
)


def to_keras(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Name the variables as Keras does: "conv1_conv/kernel" and so on."""
    return _export(variables, weight_names.keras(model))


def to_timm(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Name the variables as timm's state_dict does, without num_batches_tracked."""
    return _export(variables, weight_names.timm(model))


def to_bit(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Name the variables as Big Transfer's files do."""
    return _export(variables, weight_names.bit(model))


def _export(variables: dict[str, Any], dialect: WeightLayout) -> Tensors:
    # A copy: files want arrays that lie as they say.
    return {
        dialect.tensor(leaf): np.ascontiguousarray(
            dialect.theirs(leaf, np.asarray(array))
        )
        for leaf, array in flatten_dict(variables).items()
    }


def _import(
    found: Tensors,
    path: str | Path,
    model: ResNetV2,
    dialect_of: Callable[[ResNetV2], WeightLayout],
    classifier: Literal["read", "leave"],
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Our variables from their tensors, all of them or an error."""
    check_choice("classifier", classifier, ("read", "leave"))
    dialect, dtype = dialect_of(model), np.dtype(model.execution.param_dtype)
    shapes = flatten_dict(_shapes(model))
    if classifier == "leave":
        if not model.plan.head.pooled:
            raise UsageError(
                "head_input='flattened' makes a head whose size depends on the images, "
                "which are not known here; choose head_input='pooled'"
            )
        left = {leaf for leaf in shapes if _is_head(leaf)}
        theirs = dialect.module(HEAD)
        found = {n: t for n, t in found.items() if not n.startswith(theirs)}
        _logger.warning(
            "%s: the classifier of the file is left out; the model's head is new", path
        )
    else:
        left = set()
    wanted = {
        dialect.tensor(leaf): (leaf, dialect.theirs(leaf, np.empty(s.shape)).shape)
        for leaf, s in shapes.items()
        if leaf not in left
    }
    _compare(
        path,
        dialect.name,
        {name: shape for name, (_, shape) in wanted.items()},
        {name: tensor.shape for name, tensor in found.items()},
    )
    leaves = {
        leaf: jnp.asarray(dialect.ours(leaf, found[name]), dtype)
        for name, (leaf, _) in wanted.items()
    }
    if left:
        key = jax.random.key(0) if key is None else key
        drawn = flatten_dict(init_in_one_draw(model, key, _IMAGE))
        leaves |= {leaf: drawn[leaf] for leaf in left}
    return unflatten_dict(leaves)


_IMAGE = (32, 32, 3)
"""Parameters of a net with a pooled head do not depend on the images' size."""


def _shapes(model: ResNetV2) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, *_IMAGE), model.execution.param_dtype)
    return jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )


def _is_head(leaf: Leaf) -> bool:
    """Of the fully connected layers, which belong to a task."""
    return leaf[1] == "head" and leaf[2] != "norm"


def _compare(
    path: str | Path,
    dialect: str,
    wanted: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> None:
    """Refuse a file that is not the net's, with the rest of both sides."""
    rest = {
        "the model has, the file has not": wanted.keys() - found.keys(),
        "the file has, the model has not": found.keys() - wanted.keys(),
    }
    said = [f"{what}: {_some(names)}" for what, names in rest.items() if names]
    differing = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if differing:
        said.append(f"of another shape: {_some(differing)}")
    if said:
        raise UsageError(
            f"{path} holds another net than the model, in {dialect}'s names; "
            + "; ".join(said)
            + "; nothing was loaded; choose the preset of this file, or "
            "classifier='leave' if only the classifier differs"
        )


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _read_keras(path: Path) -> Tensors:
    """{"layer/variable": array} of any file that Keras writes."""
    import h5py

    save = "save it in Keras as .keras or .weights.h5"
    _check_file(path, _KINDS[from_keras], save)
    try:
        if path.suffix == ".keras":
            with (
                zipfile.ZipFile(path) as archive,
                archive.open("model.weights.h5") as file,
                h5py.File(file) as h5,
            ):
                return _keras_3(h5, path)
        with h5py.File(path) as h5:
            return _keras_3(h5, path) if "layers" in h5 else _keras_classic(h5)
    except (OSError, KeyError, RuntimeError, *_BROKEN) as error:
        raise _damaged(path, error) from error


_BROKEN = (ValueError, zipfile.BadZipFile, zlib.error)
"""What zip files and numbers in them raise."""
_VARIABLES = {
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
    1: ("kernel",),
}
"""Of a Keras layer, by their count: convolution or dense, batch normalization."""


def _keras_3(h5: Any, path: Path) -> Tensors:
    """Keras 3 numbers a layer's variables, and says its name beside them."""
    tensors = {}
    for layer in h5["layers"].values():
        variables = layer.get("vars", {})
        if not len(variables):
            continue
        if "name" not in variables.attrs:
            raise UsageError(
                f"{path} does not name its layers (an older Keras 3 wrote it); load it "
                "in Keras of now and save it again"
            )
        # Others keep their numbers, and are no net of ours.
        names = _VARIABLES.get(len(variables), tuple(variables))
        for number, name in enumerate(names):
            tensors[f"{variables.attrs['name']}/{name}"] = np.asarray(
                variables[str(number)]
            )
    return tensors


def _keras_classic(h5: Any) -> Tensors:
    """keras.applications' files: layer/layer/kernel:0, perhaps below model_weights."""
    import h5py

    tensors = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            layer, *_, variable = name.split("/")
            tensors[f"{layer}/{variable.removesuffix(':0')}"] = np.asarray(node)

    h5.get("model_weights", h5).visititems(note)
    return tensors


def _read_timm(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    _check_file(path, _KINDS[from_timm], _CONVERT)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error
    return {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}


def _read_npz(path: Path) -> Tensors:
    published = "take the .npz that Big Transfer published"
    _check_file(path, _KINDS[from_bit], published)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (OSError, EOFError, KeyError, TypeError, *_BROKEN) as error:
        raise _damaged(path, error) from error


def _check_file(path: Path, suffixes: tuple[str, ...], repair: str) -> None:
    if path.suffix not in suffixes:
        raise UsageError(
            f"{path} is not of the kind {' or '.join(suffixes)} that is read here; "
            f"{repair}"
        )
    if not os.path.isfile(path):  # also of a name that is too long
        raise UsageError(f"{path} is not there, or no file; give the path of one")


def _damaged(path: Path, error: Exception) -> UsageError:
    # The first sentence: NumPy's second one is how to run the code of a pickle.
    reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
    return UsageError(
        f"{path} is damaged, or of another kind than its name says ({reason}); fetch "
        "it again"
    )
