"""One run, as one frozen value: its parts, its rules, and its JSON form.

Each part lives beside the code that reads it; this module only composes them.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass
from typing import Annotated, Any

from flax_resnetv2.data.datasets import DataConfig, known_shape
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.decoder_plan import AutoencoderConfig
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.optimizers import TrainConfig, check_train
from flax_resnetv2.validation import Count, Range, check, check_dataclass, shown

_OF_LABELS = (
    *("augment.mixup", "augment.cutmix", "augment.test_flip", "train.label_smoothing"),
    *("train.trainable", "target_accuracy", "weights"),
)
"""Fields that an autoencoder has no use for."""
_OF_LATENTS = ("architecture.latent_variance", "autoencoder")
"""Fields that a classifier has no use for."""
SMALLEST_STD = 1e-6
"""Of a channel that is divided by it."""
SCHEMA = 2
"""Version of ``config.json`` and of exported nets. Raised when a field is renamed or
means something else."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's numbers, and how often it reports."""

    architecture: Architecture = Architecture()
    """What the net is."""
    execution: Execution = Execution()
    """How it is computed."""
    data: DataConfig = DataConfig()
    """Which images."""
    augment: AugmentConfig = AugmentConfig()
    """What is done to them."""
    weights: str | None = None
    """Start from this file of weights that others published (.keras, .h5, .safetensors,
    .npz), under a classifier drawn anew; None: all is drawn from the seed."""
    train: TrainConfig = TrainConfig()
    """How the net learns."""
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    """What a latent head is trained with."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Of initial parameters, data order and augmentation."""
    log_every: Count = 50
    """Steps between two lines of training metrics."""
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch always has one."""
    target_accuracy: Annotated[float, Range(0, 1, above=True)] | None = None
    """End the run after the first evaluation that reaches this accuracy on the split
    "validation", or, without one, on "test", whose accuracy is then selected by it;
    None: train for all epochs."""
    checkpoint_every: Count = 1
    """Epochs between two checkpoints; the last epoch always has one."""
    checkpoint_steps: Count | None = None
    """Steps between two checkpoints, beside those at the ends of epochs; None: none."""
    keep_checkpoints: Count = 2
    """How many of the newest stay; with data.validation, the one that did best on it
    stays too."""


def check_config(config: Config) -> None:
    """Check what needs neither data nor devices; ``plan`` checks the architecture.

    Raises:
        UsageError: a field is out of its range.
    """
    check_dataclass(config, Config)
    check_train(config.train)
    check_head(config)
    if config.execution.batch_norm_axis is not None:
        raise UsageError(
            f"execution.batch_norm_axis={shown(config.execution.batch_norm_axis)} is "
            "set by fit; leave it out, and choose --train.sync-batch-norm or "
            "--train.no-sync-batch-norm"
        )
    scale = config.augment.crop_scale
    if scale is not None and scale[0] > scale[1]:
        raise UsageError(
            f"augment.crop_scale={shown(scale)} must be the least share and the "
            "largest, as 0.08 1"
        )
    if (shape := known_shape(config.data)) is not None:
        check_shape(config, shape)


def check_head(config: Config) -> None:
    """Refuse a head that nothing trains, and what has no meaning for it.

    Raises:
        UsageError: naming the field.
    """
    head, default = config.architecture.head, Config()
    if head == "none":
        raise UsageError(
            "architecture.head='none' gives maps, which nothing is trained on; choose "
            "'classifier', or 'latent' for an autoencoder"
        )
    for path in _OF_LABELS if head == "latent" else _OF_LATENTS:
        value, usual = config, default
        for name in path.split("."):
            value, usual = getattr(value, name), getattr(usual, name)
        if value != usual:
            raise UsageError(
                f"{path}={shown(value)} has no use where architecture.head={head!r}; "
                f"leave it at {shown(usual)}, or choose another head"
            )


def check_shape(config: Config, shape: tuple[int, int, int]) -> None:
    """Check what the size of the images decides.

    Args:
        config: the run.
        shape: (height, width, channels) of its images.

    Raises:
        UsageError: a field is out of its range.
    """
    side, channels = min(config.augment.input_shape(shape)[:2]), shape[2]
    for name in ("crop_padding", "cutout"):
        value = getattr(config.augment, name)
        check(f"augment.{name}", value, Annotated[int, Range(0, side)])
    mean, std = config.augment.mean, config.augment.std
    if (mean is None) != (std is None):
        raise UsageError(
            f"augment.mean={shown(mean)} and augment.std={shown(std)} are given both "
            "or not at all"
        )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise UsageError(
                f"augment.{name}={shown(values)} must be {channels} numbers, one for "
                f"each channel of {config.data.name}"
            )
    share = Annotated[float, Range(0, 1)]
    positive = Annotated[float, Range(SMALLEST_STD, 1)]
    check("augment.mean", mean, tuple[share, ...] | None)
    check("augment.std", std, tuple[positive, ...] | None)


def to_json(config: Config) -> str:
    """Write ``config`` as indented JSON with a schema number."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read what ``to_json`` wrote.

    Raises:
        UsageError: not JSON, another schema, a field that does not exist, or a value
            that its field cannot have.
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
        # ValueError also for a number of more than 4300 digits.
        raise UsageError(f"not a configuration in JSON: {error}") from error
    check_dataclass(config, Config)
    return config


def differences(old: Config, new: Config) -> dict[str, str]:
    """Say which fields differ: {"train.epochs": "train.epochs: 10 -> 20"}."""

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


def _build(kind: Any, value: Any, path: str) -> Any:
    """JSON value -> the dataclass ``kind``; lists become tuples."""
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
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise UsageError(
            f"unknown field {', '.join(shown(path + name) for name in unknown)} in a "
            f"configuration; {kind.__name__} has {', '.join(hints)}"
        )
    return kind(**{k: _build(hints[k], v, f"{path}{k}.") for k, v in value.items()})
