"""One run, as one frozen value: its parts, its JSON form, and the recipes.

Each part lives beside the code that reads it; this module only composes them.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, replace
from typing import Annotated, Any

from flax_resnetv2.architecture import Architecture, Execution
from flax_resnetv2.augment import AugmentConfig
from flax_resnetv2.data import DataConfig, known_shape
from flax_resnetv2.errors import UsageError
from flax_resnetv2.fields import Count, Range, check, check_dataclass, shown
from flax_resnetv2.presets import PRESETS
from flax_resnetv2.training import TrainConfig, check_train

SCHEMA = 1
"""Of ``config.json``: raised when a stored configuration no longer means the same."""


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
    if config.architecture.head != "classifier":
        raise UsageError(
            f"architecture.head={config.architecture.head!r} gives no logits to train "
            "on; choose 'classifier'"
        )
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
    check("augment.mean", mean, tuple[Annotated[float, Range(0, 1)], ...] | None)
    check("augment.std", std, tuple[Annotated[float, Range(1e-6, 1)], ...] | None)


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
                f"schema={shown(schema)} of a configuration; known is {SCHEMA}"
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


@dataclass(frozen=True)
class Recipe:
    """A configuration under a name, and what it is for in one line."""

    config: Config
    description: str


_ONE_CYCLE = TrainConfig(
    epochs=30,
    learning_rate=0.4,
    weight_decay=5e-4,
    schedule="one_cycle",
    label_smoothing=0.1,
)
_PAPER = TrainConfig(epochs=164, nesterov=False, warmup_epochs=1.0)

_QUICKSTART = Config(
    # Half the resolution from the stem on: a minute on two CPU cores.
    architecture=Architecture(
        units=(2, 2, 2), widths=(32, 64, 128), stem_width=32, stem_stride=2
    ),
    data=DataConfig(name="embedded_shapes"),
    train=replace(_ONE_CYCLE, epochs=8, batch_size=64, learning_rate=0.2),
)

# Big Transfer's recipe in small: a low rate, no decay, images scaled up (its 128 crops
# of 160), and few epochs.
_TRANSFER = Config(
    augment=AugmentConfig(resize=128, crop_padding=16),
    train=TrainConfig(
        epochs=10,
        learning_rate=0.01,
        weight_decay=0.0,
        schedule="cosine",
        warmup_epochs=0.5,
        nesterov=False,
    ),
)
# Goyal et al. 2017, arXiv 1706.02677, without their batches of 8192.
_IMAGENET = Config(
    execution=Execution(dtype="bfloat16"),
    data=DataConfig(name="imagenet2012", size=224, stream=True),
    augment=AugmentConfig(
        crop_padding=0,
        crop_scale=(0.08, 1.0),
        test_crop=0.875,
        # As everybody has them; counted over the whole of it once.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    train=TrainConfig(
        epochs=90,
        batch_size=256,
        eval_batch_size=256,
        warmup_epochs=5.0,
        drops=(1 / 3, 2 / 3, 8 / 9),
    ),
)
_PUBLISHED = {
    "keras-resnet50v2": "resnet50v2_weights_tf_dim_ordering_tf_kernels_notop.h5",
    "timm-resnetv2-50": "model.safetensors",
    "bit-r50x1": "BiT-M-R50x1.npz",
}
"""Names under which the weights are published."""


def _recipes() -> dict[str, Recipe]:
    recipes = {
        "quickstart": Recipe(
            _QUICKSTART, "a small net of the article on ten drawn shapes; no download"
        )
    }
    for name, preset in PRESETS.items():
        if preset.architecture.num_classes != 10:
            continue  # a net for ImageNet
        about = f"{preset.architecture.depth} layers, {preset.parameters:,} parameters"
        config = Config(architecture=preset.architecture, train=_ONE_CYCLE)
        recipes[f"cifar10-{name}"] = Recipe(config, f"{about}; CIFAR-10, one cycle")
        if name in ("he2016-resnet164", "he2016-resnet1001"):
            recipes[f"cifar10-{name}-paper"] = Recipe(
                replace(config, train=_PAPER), f"{about}; CIFAR-10, as He et al. train"
            )
    recipes |= _others()
    for name in ("keras-resnet50v2", "timm-resnetv2-50", "bit-r50x1"):
        preset = PRESETS[name]
        recipes[f"cifar10-transfer-{name}"] = Recipe(
            replace(
                _TRANSFER,
                architecture=replace(preset.architecture, num_classes=10),
                weights=_PUBLISHED[name],
            ),
            "from published weights (--weights FILE) to CIFAR-10, scaled to 128x128",
        )
    return recipes


def _others() -> dict[str, Recipe]:
    """The recipes of the data sets beside CIFAR-10."""
    recipes = {}
    short = replace(_ONE_CYCLE, epochs=15, learning_rate=0.2)
    # Digits are not themselves when mirrored.
    digits = AugmentConfig(crop_padding=2, flip=False)
    for data, title, names, augment, train in (
        (
            "cifar100",
            "CIFAR-100",
            ("article", "he2016-resnet164"),
            AugmentConfig(),
            _ONE_CYCLE,
        ),
        (
            "cifar100_coarse",
            "the 20 coarse classes of CIFAR-100",
            ("article",),
            AugmentConfig(),
            _ONE_CYCLE,
        ),
        ("mnist", "MNIST", ("article",), digits, short),
        (
            "fashion_mnist",
            "Fashion-MNIST",
            ("article",),
            replace(digits, flip=True),
            _ONE_CYCLE,
        ),
    ):
        for name in names:
            architecture = replace(PRESETS[name].architecture, num_classes=None)
            config = Config(
                architecture, data=DataConfig(name=data), augment=augment, train=train
            )
            recipes[f"{data.replace('_', '-')}-{name}"] = Recipe(
                config, f"{architecture.depth} layers; {title}, one cycle"
            )
    recipes["celeba-article"] = Recipe(
        Config(
            # Half the resolution from the stem on: 64x64 -> 8x8.
            replace(PRESETS["article"].architecture, num_classes=None, stem_stride=2),
            data=DataConfig(name="celeba", size=64),
            train=replace(
                _ONE_CYCLE, epochs=15, learning_rate=0.2, label_smoothing=0.0
            ),
        ),
        "29 layers; the 40 attributes of CelebA, which TFDS prepared; one cycle",
    )
    for name in ("he2016-resnet200", "keras-resnet50v2", "timm-resnetv2-50"):
        preset = PRESETS[name]
        recipes[f"imagenet-{name}"] = Recipe(
            replace(_IMAGENET, architecture=preset.architecture),
            f"{preset.architecture.depth} layers; ImageNet 2012, which TFDS prepared, "
            "90 epochs",
        )
    recipes["folder"] = Recipe(
        Config(
            replace(PRESETS["article"].architecture, num_classes=None, stem_stride=2),
            data=DataConfig(name="folder:images", size=64),
            train=replace(_ONE_CYCLE, learning_rate=0.1, batch_size=64),
        ),
        "29 layers; your own images: --data.name folder:PATH, a class a sub-folder",
    )
    return recipes


RECIPES: dict[str, Recipe] = _recipes()
"""What ``train.py`` can be told to do, by name."""
