"""One run as one frozen value: its parts, its rules, and its JSON form.

Each part is defined in the module that uses it; this module only combines them.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any

from flax_resnetv2.data.datasets import DataConfig, known_shape
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.decoder_plan import AutoencoderConfig
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.optimizers import TrainConfig, check_train
from flax_resnetv2.validation import Count, Range, check, check_dataclass, shown

_UNUSED = {
    "classifier": ("architecture.latent_variance", "autoencoder"),
    "latent": (
        *("augment.mixup", "augment.cutmix", "augment.test_flip", "target_accuracy"),
        *("train.label_smoothing", "train.trainable", "weights"),
    ),
}
"""Fields that have no meaning for a head."""
SMALLEST_STD = 1e-6
"""Smallest standard deviation of a channel that images are divided by."""
SCHEMA = 2
"""Version of ``config.json`` and of exported nets. Increased when a field is renamed or
changes its meaning."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run's numbers, and how often it reports."""

    train: TrainConfig = TrainConfig()
    """How the net is trained."""
    data: DataConfig = DataConfig()
    """The data set."""
    augment: AugmentConfig = AugmentConfig()
    """Normalization and augmentation of images."""
    architecture: Architecture = Architecture()
    """The units, widths, strides and semantics of the net."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of initial parameters, data order and augmentation."""
    weights: str | None = None
    """Start from this file of published weights (.keras, .h5, .safetensors, .npz), with
    a new classifier; None draws all parameters from the seed."""
    target_accuracy: Annotated[float, Range(0, 1, above=True)] | None = None
    """End the run after the first evaluation that reaches this accuracy on the split
    "validation", or on "test" without that split (the test accuracy is then a selected
    one); None trains for all epochs."""
    log_every: Count = 50
    """Steps between two lines of training metrics."""
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch always has one."""
    checkpoint_every: Count = 1
    """Epochs between two checkpoints; the last epoch always has one."""
    checkpoint_steps: Count | None = None
    """Steps between two further checkpoints within epochs; None saves none there."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep. With data.validation, the checkpoint with
    the best validation accuracy is kept, too."""
    execution: Execution = Execution()
    """How the net is computed; it does not change the net itself."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """Decoder and loss, for a latent head."""


def check_config(config: Config) -> None:
    """Check what needs neither data nor devices; raise ``UsageError``.

    ``plan`` checks the architecture.
    """
    check_dataclass(config, Config)
    check_train(config.train)
    head, axis = config.architecture.head, config.execution.batch_norm_axis
    if head == "none":
        raise UsageError(
            "architecture.head='none' returns feature maps, which cannot be trained; "
            "choose 'classifier', or 'latent' for an autoencoder"
        )
    for path in _UNUSED[head]:
        value, default = attrgetter(path)(config), attrgetter(path)(Config())
        if value != default:
            raise UsageError(
                f"{path}={shown(value)} has no use where architecture.head={head!r}; "
                f"leave it at {shown(default)}, or choose another head"
            )
    if axis is not None:
        raise UsageError(
            f"execution.batch_norm_axis={shown(axis)} is set by fit; leave it out, and "
            "choose --train.sync-batch-norm or --train.no-sync-batch-norm"
        )
    scale = config.augment.crop_scale
    if scale is not None and scale[0] > scale[1]:
        raise UsageError(
            f"augment.crop_scale={shown(scale)} must be the smallest share and the "
            "largest, as 0.08 1"
        )
    if (shape := known_shape(config.data)) is not None:
        check_shape(config, shape)


def check_shape(config: Config, shape: tuple[int, int, int]) -> None:
    """Check what depends on the image shape (height, width, channels)."""
    side, channels = min(config.augment.input_shape(shape)[:2]), shape[2]
    for name in ("crop_padding", "cutout"):
        value = getattr(config.augment, name)
        check(f"augment.{name}", value, Annotated[int, Range(0, side)])
    mean, std = config.augment.mean, config.augment.std
    if (mean is None) != (std is None):
        raise UsageError(
            f"augment.mean={shown(mean)} and augment.std={shown(std)} must be given "
            "together, or neither of them"
        )
    for name, values, low in (("mean", mean, 0), ("std", std, SMALLEST_STD)):
        if values is not None and len(values) != channels:
            raise UsageError(
                f"augment.{name}={shown(values)} must be {channels} numbers, one for "
                f"each channel of {config.data.name}"
            )
        each = Annotated[float, Range(low, 1)]
        check(f"augment.{name}", values, tuple[each, ...] | None)


def to_json(config: Config) -> str:
    """Return ``config`` as indented JSON with a schema number."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read what ``to_json`` wrote.

    Raises:
        UsageError: not JSON, another schema, an unknown field, or a value that its
            field cannot have.
    """
    try:
        values = json.loads(text)
        schema = values.pop("schema", None) if isinstance(values, dict) else None
        if type(schema) is not int or schema != SCHEMA:
            raise UsageError(
                f"schema={shown(schema)} of a configuration, but this version reads "
                f"only {SCHEMA}; use the version that wrote it, or train again"
            )
        config = _build(Config, values, "")
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        # Numbers of more than 4300 digits raise ValueError, too.
        raise UsageError(f"not a configuration in JSON: {error}") from error
    check_dataclass(config, Config)
    return config


def _build(kind: Any, value: Any, path: str) -> Any:
    """Build the dataclass ``kind`` from JSON; lists become tuples."""
    if not dataclasses.is_dataclass(kind):
        if isinstance(value, list):
            return tuple(_build(None, item, path) for item in value)
        return value
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict):
        raise UsageError(
            f"{path.rstrip('.')}={shown(value)} of a configuration must be an object "
            f"with the fields {', '.join(hints)}"
        )
    if unknown := sorted(set(value) - set(hints)):
        raise UsageError(
            f"unknown field {', '.join(shown(path + name) for name in unknown)} in a "
            f"configuration; {kind.__name__} has {', '.join(hints)}"
        )
    return kind(**{k: _build(hints[k], v, f"{path}{k}.") for k, v in value.items()})


def differences(old: Config, new: Config) -> dict[str, str]:
    """Return the fields that differ, {"train.epochs": "train.epochs: 10 -> 20"}."""

    def flat(value: Any, path: str) -> dict[str, Any]:
        if not dataclasses.is_dataclass(value):
            return {path: value}
        leaves = {}
        for f in dataclasses.fields(value):
            leaves |= flat(getattr(value, f.name), f"{path}.{f.name}".lstrip("."))
        return leaves

    before, after = flat(old, ""), flat(new, "")
    return {
        field: f"{field}: {value} -> {after[field]}"
        for field, value in before.items()
        if value != after[field]
    }
