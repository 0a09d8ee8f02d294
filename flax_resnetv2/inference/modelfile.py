"""A trained net in one file, with all that is needed to use it.

A ``.safetensors`` file: the variables under their paths ("params/stem/conv/kernel"),
and as metadata the run's configuration, what it knew of its data, its last test, and
where it was trained. Reading one executes nothing.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnetv2.data.datasets import DataConfig
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import check_config, from_json, to_json
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore

KEY = "flax_resnetv2"
"""Of the metadata."""
TRAINED = Path(__file__).with_name("trained")
"""Nets that come with the package, each with its card."""


def shipped() -> list[str]:
    """Names of the nets that come with the package."""
    return sorted(path.stem for path in TRAINED.glob("*.safetensors"))


def find(name: str | Path) -> Path:
    """The file of an exported net: its path, or that of a net of the package.

    Raises:
        UsageError: there is neither.
    """
    if os.path.isfile(name):  # also of a name that is too long
        return Path(name)
    if str(name) in shipped():
        return TRAINED / f"{name}.safetensors"
    raise UsageError(
        f"{name} is not a run directory, an exported net (.safetensors) or a net of "
        f"the package ({', '.join(shipped())}); give one of these, as runs/quickstart-1"
    )


def pack(net: TrainedNet) -> bytes:
    """Write a net as the content of a file."""
    from safetensors.numpy import save

    # Where the images lay is nobody's concern.
    nowhere = {name: getattr(DataConfig(), name) for name in ("dir", "archive", "url")}
    data = replace(net.config.data, **nowhere)
    config = replace(net.config, data=data, weights=None)
    record = {
        "config": json.loads(to_json(config)),
        "dataset": {k: v for k, v in net.facts.items() if k != "checksums"},
        "step": net.step,
        "test": net.test,
        "environment": net.environment,
    }
    tensors = {
        "/".join(leaf): np.ascontiguousarray(array)
        for leaf, array in flatten_dict(net.variables).items()
    }
    return save(tensors, {KEY: json.dumps(record, sort_keys=True)})


def open_net(name: str | Path, checkpoint: CheckpointChoice = "newest") -> TrainedNet:
    """Load a run's checkpoint, an exported file, or a net of the package.

    Args:
        name: a directory, a file, or one of ``shipped()``.
        checkpoint: which one of a run.

    Raises:
        UsageError: there is no such thing, or it cannot be used.
        RunError: the checkpoints are damaged.
    """
    if os.path.isdir(name):  # also of a name that is too long
        return restore(name, checkpoint)
    return load(find(name))


def load(path: str | Path) -> TrainedNet:
    """Read what ``pack`` wrote, all of it or nothing.

    Raises:
        UsageError: the file cannot be read, is no net of this package or of another
            version, or its tensors are not those of its configuration.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(
            f"{path} cannot be read ({reason}); give a whole .safetensors file that "
            "python -m flax_resnetv2 export wrote"
        ) from error
    if KEY not in metadata:
        raise UsageError(
            f"{path} was not written by python -m flax_resnetv2 export; weights that "
            "others published are read by from_timm, from_keras and from_bit"
        )
    try:
        record = json.loads(metadata[KEY])
        config = from_json(json.dumps(record["config"]))
        check_config(config)
        facts = record["dataset"]
        shape = tuple(facts["image_shape"])
        model = create_net(config, shape)
        rest = record["step"], record["test"], record["environment"]
    except (ValueError, TypeError, KeyError) as error:  # UsageError is a ValueError
        raise UsageError(f"{path} cannot be used ({error}); export it again") from error
    images = jax.ShapeDtypeStruct(
        (1, *config.augment.input_shape(shape)), model.execution.param_dtype
    )
    wanted = jax.eval_shape(
        lambda x: model.init(jax.random.key(0), x, train=False), images
    )
    wanted = {"/".join(k): (v.shape, v.dtype) for k, v in flatten_dict(wanted).items()}
    found = {k: (v.shape, v.dtype) for k, v in tensors.items()}
    if wanted != found:
        missing = sorted(set(wanted.items()) - set(found.items()))[:3]
        other = sorted(set(found.items()) - set(wanted.items()))[:3]
        raise UsageError(
            f"{path} does not hold the tensors of its configuration; missing: "
            f"{missing}; unknown: {other}; export it again"
        )
    variables = unflatten_dict(
        {tuple(name.split("/")): value for name, value in tensors.items()}
    )
    step, test, environment = rest
    return TrainedNet(
        config, facts, step, model, jax.device_put(variables), test, environment
    )
