"""A trained net in one ``.safetensors`` file, with everything needed to use it.

The tensors are the variables under their paths ("params/stem/conv/kernel"). The
metadata hold the run's configuration, data set summary, last test metrics and
environment. Reading a file executes none of its content.
"""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import check_config, from_json, to_json
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.system.files import unreadable

KEY = "flax_resnetv2"
"""Key of the metadata."""
SUMMARY = ("name", "image_shape", "class_names", "multi_label", "num_images")
"""Fields of ``dataset.json`` that a file keeps."""
TRAINED = Path(__file__).with_name("trained")
"""Directory of the nets that the package ships, each with its model card."""


def shipped() -> list[str]:
    """Return the names of the nets that the package ships."""
    return sorted(path.stem for path in TRAINED.glob("*.safetensors"))


def locate(name: str | Path) -> Path:
    """Return the file of an exported net, given its path or the name of a shipped net.

    Raises:
        UsageError: there is neither.
    """
    if os.path.isfile(name):  # unlike Path.is_file, False for a name that is too long
        return Path(name)
    if str(name) in shipped():
        return TRAINED / f"{name}.safetensors"
    raise UsageError(
        f"{name} is not a run directory, an exported net (.safetensors) or a net of "
        f"the package ({', '.join(shipped())}): {unreadable(name)}; give one of these"
    )


def pack(net: TrainedNet) -> bytes:
    """Return the content of a ``.safetensors`` file that holds the net."""
    from safetensors.numpy import save

    # The file may be published, so it says nothing about places on this machine.
    data = replace(net.config.data, dir=None, archive=None, url=None)
    config = replace(net.config, data=data, weights=None)
    record = {
        "config": json.loads(to_json(config)),
        "dataset": {name: net.summary[name] for name in SUMMARY},
        "step": net.step,
        "test": net.test,
        "environment": net.environment,
    }
    tensors = flatten_dict(net.variables, sep="/")
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    return save(tensors, {KEY: json.dumps(record, sort_keys=True)})


@jax.transfer_guard("allow")
def open_net(name: str | Path, checkpoint: CheckpointChoice = "newest") -> TrainedNet:
    """Load a trained net from a run directory, an exported file or the package.

    Args:
        name: a directory, a file, or one of ``shipped()``.
        checkpoint: which checkpoint of a run.

    Raises:
        UsageError: there is no such net, or it is unusable.
        RunError: the checkpoints are damaged.
    """
    return restore(name, checkpoint) if os.path.isdir(name) else load(locate(name))


def load(path: str | Path) -> TrainedNet:
    """Read a file that ``pack`` made, either completely or not at all.

    Raises:
        UsageError: the file is unreadable, does not hold a net of this version of the
            package, or its tensors do not match its configuration.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        # The library says "No such file" where permission is missing, too.
        reason = unreadable(path) or " ".join(str(error).split())
        raise UsageError(
            f"{path} cannot be read ({reason}); give a whole .safetensors file that "
            "python -m flax_resnetv2 export wrote"
        ) from error
    if KEY not in metadata:
        raise UsageError(
            f"{path} was not written by python -m flax_resnetv2 export; read weights "
            "published by others with from_timm, from_keras or from_bit"
        )
    try:
        record = json.loads(metadata[KEY])
        config = from_json(json.dumps(record["config"]))
        check_config(config)
        summary = {name: record["dataset"][name] for name in SUMMARY}
        shape = tuple(summary["image_shape"])
        model = create_net(config, shape)
        step, test, environment = (record[k] for k in ("step", "test", "environment"))
    except (ValueError, TypeError, KeyError) as error:  # UsageError is a ValueError
        raise UsageError(f"{path} cannot be used ({error}); export it again") from error
    images = jax.ShapeDtypeStruct(
        (1, *config.augment.input_shape(shape)), model.execution.param_dtype
    )
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    shapes = flatten_dict(shapes, sep="/")
    expected = {name: (x.shape, x.dtype) for name, x in shapes.items()}
    found = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    if expected != found:
        missing = sorted(expected.items() - found.items())[:3]
        unknown = sorted(found.items() - expected.items())[:3]
        raise UsageError(
            f"{path} does not hold the tensors of its configuration; missing: "
            f"{missing}; unknown: {unknown}; export it again"
        )
    variables = jax.device_put(unflatten_dict(tensors, sep="/"))
    return TrainedNet(config, summary, step, model, variables, test, environment)
