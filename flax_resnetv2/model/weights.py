"""Published weights of Keras, timm and Big Transfer, read and written.

>>> model = create_model("keras-resnet50v2")
>>> variables = from_keras("resnet50v2_weights_tf_dim_ordering_tf_kernels.h5", model)

A file is loaded completely or not at all: it must have exactly the tensors of the net,
or an error lists what either side lacks. Nothing in a file is executed.
"""

import contextlib
import logging
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import weight_layouts
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.model.weight_layouts import HEAD, WeightLayout
from flax_resnetv2.system.files import unreadable
from flax_resnetv2.validation import check_choice

Tensors = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]
LISTED = 4
"""Names of each kind that an error lists."""
_KERAS, _TIMM, _BIT = (".keras", ".h5"), (".safetensors",), (".npz",)
_ALL = _KERAS + _TIMM + _BIT
_CONVERT = (
    "a .pth is a pickle, which may run code; convert it where torch is installed: "
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('x.pth', "
    "weights_only=True), 'x.safetensors')\""
)

_logger = logging.getLogger(__name__)


def from_file(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights of Keras, timm or Big Transfer, depending on the file's suffix.

    Args:
        path: a file as of ``from_keras``, ``from_timm`` or ``from_bit``.
        model: the net of a preset of that library, or one with another head.
        classifier: "leave" leaves the file's classifier out, and the model's own head
            is initialized.
        key: random key of that head; None: key 0.

    Returns:
        ``params`` and ``batch_stats``, in the model's ``param_dtype``.

    Raises:
        UsageError: the file does not exist, is damaged, or holds another net.
    """
    check_file(path)
    suffix = Path(path).suffix
    read = {_TIMM[0]: from_timm, _BIT[0]: from_bit}.get(suffix, from_keras)
    return read(path, model, classifier=classifier, key=key)


def check_file(
    path: str | Path, suffixes: tuple[str, ...] = _ALL, repair: str = _CONVERT
) -> None:
    """Refuse a file that cannot be opened or has another suffix, without reading it."""
    if Path(path).suffix not in suffixes:
        raise UsageError(f"{path} must be a file {' or '.join(suffixes)}; {repair}")
    if reason := unreadable(path):
        raise UsageError(f"{path} cannot be opened ({reason}); give the path of a file")


def from_keras(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights of ``keras.applications.ResNet50V2``, ``101V2`` or ``152V2``.

    The file is ``.keras``, ``.weights.h5``, or the ``.h5`` of keras.applications. Other
    arguments, results and errors are as of ``from_file``.
    """
    tensors = _read_keras(Path(path))
    return _import(tensors, path, model, weight_layouts.KERAS, classifier, key)


def from_timm(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights of timm's ``resnetv2_*``, which include Big Transfer's.

    The file is ``.safetensors``. Other arguments, results and errors are as of
    ``from_file``.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    with _reading(path, _TIMM, _CONVERT, SafetensorError):
        tensors = load_file(path)
    counts = "num_batches_tracked"
    tensors = {n: t for n, t in tensors.items() if not n.endswith(counts)}
    return _import(tensors, path, model, weight_layouts.timm(model), classifier, key)


def from_bit(
    path: str | Path,
    model: ResNetV2,
    *,
    classifier: Literal["read", "leave"] = "read",
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Read weights that Big Transfer published.

    The file is ``.npz``, for example BiT-M-R50x1.npz. Other arguments, results and
    errors are as of ``from_file``.
    """
    with (
        _reading(path, _BIT, "use the .npz that Big Transfer published"),
        open(path, "rb") as file,
        np.load(file, allow_pickle=False) as stored,
    ):
        tensors = dict(stored)
    return _import(tensors, path, model, weight_layouts.BIT, classifier, key)


def to_keras(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Return the variables under Keras's names: "conv1_conv/kernel" and so on."""
    return _export(variables, weight_layouts.KERAS)


def to_timm(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Return the variables under timm's names, without num_batches_tracked."""
    return _export(variables, weight_layouts.timm(model))


def to_bit(variables: dict[str, Any], model: ResNetV2) -> Tensors:
    """Return the variables under Big Transfer's names."""
    return _export(variables, weight_layouts.BIT)


def _export(variables: dict[str, Any], layout: WeightLayout) -> Tensors:
    arrays = flatten_dict(jax.tree.map(np.asarray, variables))
    return {  # Contiguous, because file formats ignore strides.
        layout.tensor(leaf): np.ascontiguousarray(layout.theirs(leaf, array))
        for leaf, array in arrays.items()
    }


_IMAGE = (32, 32, 3)
"""Any size: parameters of a net with a pooled head do not depend on the images."""


def _import(
    tensors: Tensors,
    path: str | Path,
    model: ResNetV2,
    layout: WeightLayout,
    classifier: Literal["read", "leave"],
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """Return all of the model's variables from a file's tensors, or refuse them."""
    check_choice("classifier", classifier, ("read", "leave"))
    dtype, new_head = model.execution.param_dtype, classifier == "leave"
    if new_head:
        if not model.plan.head.pooled:
            raise UsageError(
                "head_input='flattened' makes a head whose size depends on the images, "
                "which are unknown here; choose head_input='pooled'"
            )
        prefix = layout.outside[HEAD]
        tensors = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
        _logger.warning(
            "%s: the classifier of the file is left out, the model's head is new", path
        )
    init = partial(model.init, jax.random.key(0), train=False)
    images = jax.ShapeDtypeStruct((1, *_IMAGE), dtype)
    leaves = flatten_dict(jax.eval_shape(init, images))
    head = {k for k in leaves if new_head and k[1] == "head" and k[2] != "norm"}
    wanted = {layout.tensor(leaf): leaf for leaf in leaves if leaf not in head}
    shapes = {
        name: layout.theirs(leaf, np.empty(leaves[leaf].shape)).shape
        for name, leaf in wanted.items()
    }
    _compare(path, layout, shapes, {name: t.shape for name, t in tensors.items()})
    found = {
        leaf: jnp.asarray(layout.ours(leaf, tensors[name]), dtype)
        for name, leaf in wanted.items()
    }
    if head:
        key = jax.random.key(0) if key is None else key
        drawn = flatten_dict(init_in_one_draw(model, key, _IMAGE))
        found |= {leaf: drawn[leaf] for leaf in head}
    return unflatten_dict(found)


def _compare(
    path: str | Path, layout: WeightLayout, wanted: Shapes, found: Shapes
) -> None:
    """Refuse a file of another net, and list the differences."""
    differences = {
        "only in the model": wanted.keys() - found.keys(),
        "only in the file": found.keys() - wanted.keys(),
        "of another shape": {
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        },
    }
    texts = []
    for kind, names in differences.items():
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        if names:
            texts.append(f"{kind}: {', '.join(sorted(names)[:LISTED])}{more}; ")
    if texts:
        raise UsageError(
            f"{path} holds another net than the model (names of {layout.library}); "
            f"{''.join(texts)}nothing was loaded; choose the preset of this file, or "
            "classifier='leave' if only the classifier differs"
        )


def _read_keras(path: Path) -> Tensors:
    """Read {"layer/variable": array} from any file that Keras writes."""
    import h5py

    with _reading(path, _KERAS, "save it in Keras as .keras or .weights.h5"):
        if path.suffix == ".keras":
            with (
                zipfile.ZipFile(path) as archive,
                archive.open("model.weights.h5") as file,
                h5py.File(file) as h5,
            ):
                return _keras_3(h5, path)
        with h5py.File(path) as h5:
            return _keras_3(h5, path) if "layers" in h5 else _keras_classic(h5)


_VARIABLES = {
    1: ("kernel",),
    2: ("kernel", "bias"),
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
}
"""Variables of a Keras layer by their number; four are batch normalization's."""


def _keras_3(h5: Any, path: Path) -> Tensors:
    """Read a file of Keras 3, which numbers the variables of a layer."""
    tensors = {}
    for layer in h5["layers"].values():
        variables = layer.get("vars", {})
        if not len(variables):
            continue
        if "name" not in variables.attrs:
            raise UsageError(
                f"{path} does not name its layers (an older Keras 3 wrote it); load it "
                "in a current Keras and save it again"
            )
        # The layers of other nets keep their numbers, and are refused later.
        names = _VARIABLES.get(len(variables), tuple(variables))
        for number, name in enumerate(names):
            tensor = np.asarray(variables[str(number)])
            tensors[f"{variables.attrs['name']}/{name}"] = tensor
    return tensors


def _keras_classic(h5: Any) -> Tensors:
    """Read a file of keras.applications: [model_weights/]layer/layer/kernel:0."""
    import h5py

    tensors = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            layer, *_, variable = name.split("/")
            tensors[f"{layer}/{variable.removesuffix(':0')}"] = np.asarray(node)

    h5.get("model_weights", h5).visititems(note)
    return tensors


@contextlib.contextmanager
def _reading(
    path: str | Path, suffixes: tuple[str, ...], repair: str, *errors: type[Exception]
) -> Iterator[None]:
    """Check the path; turn what damaged files raise, and ``errors``, into one line."""
    check_file(path, suffixes, repair)
    try:
        yield
    except UsageError:
        raise
    except (
        *(EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError),
        *(zipfile.BadZipFile, zlib.error, *errors),
    ) as error:
        # Only the first sentence: NumPy's second one explains how to run a pickle.
        lines = str(error).splitlines() or [type(error).__name__]
        raise UsageError(
            f"{path} is damaged, or not in the format of its suffix "
            f"({lines[0].split('. ')[0]}); download it again"
        ) from error
