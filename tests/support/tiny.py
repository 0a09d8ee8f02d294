"""The smallest nets and data sets that still have every part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnetv2 import Architecture, Config, TrainConfig
from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.catalog import DatasetSummary
from flax_resnetv2.data.datasets import DataConfig, Dataset
from flax_resnetv2.run import validate
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.placement import Placement
from flax_resnetv2.run.trainer import Trainer
from flax_resnetv2.training.augment import AugmentConfig

NET = Architecture(
    units=(2, 1), widths=(8, 16), strides=(1, 2), stem_width=8, num_classes=4
)
SMALL = replace(NET, units=(1, 1), widths=(4, 8), stem_width=4)
"""Where a test compiles often."""
SHAPE = (8, 8, 3)


@contextmanager
def textbook() -> Iterator[None]:
    """Let formulas of a test promote ranks; as a decorator, those of a function."""
    with jax.numpy_rank_promotion("allow"):
        yield


def dataset(train=50, test=23):
    """Images whose brightness shows their class, 8x8."""

    def split(seed, count):
        rng = np.random.default_rng(seed)
        label = rng.integers(0, 4, count).astype(np.int32)
        image = rng.integers(0, 128, (count, *SHAPE)) + label[:, None, None, None] * 32
        return Split(image.astype(np.uint8), label)

    splits = {"train": split(0, train), "test": split(1, test)}
    return Dataset("tiny", tuple("abcd"), splits)


def config(**train):
    """Two epochs of six steps on ``dataset``."""
    defaults = {
        "epochs": 2,
        "batch_size": 8,
        "eval_batch_size": 8,
        "schedule": "cosine",
        "learning_rate": 0.05,
    }
    return Config(
        architecture=NET,
        data=DataConfig(name="embedded_shapes"),
        augment=AugmentConfig(crop_padding=1),
        train=TrainConfig(**(defaults | train)),
        log_every=1,
    )


def patch_dataset(patch, dataset):
    """Make ``validate`` find ``dataset`` whatever the configuration names."""
    counts = {name: split.num_images for name, split in dataset.splits.items()}
    summary = DatasetSummary(dataset.image_shape, dataset.class_names, counts)
    patch.setattr(validate, "describe", lambda _: summary)
    patch.setattr(validate, "open_dataset", lambda _: dataset)


def trainer_of(config, data, devices, executor="pmap"):
    """A ``Trainer`` of a configuration that is filled in."""
    model = create_net(config, data.image_shape)
    return Trainer(config, data, model, Placement(devices, executor))


def variables_of(model, shape=(2, *SHAPE), seed=0):
    """Variables from a seed, with scales, biases and statistics unlike their start."""
    images = jnp.zeros(shape, model.execution.param_dtype)
    # Only the shapes: compiling an initialization would take longer than the test.
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(seed), images, train=False)
    )
    rng = np.random.default_rng(seed)

    def stir(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            value = rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5
        elif name in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(size=leaf.shape) * 0.3
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map_with_path(stir, variables)


def images_of(count=2, shape=SHAPE, dtype="float32", seed=5):
    """Normal numbers [count, *shape]."""
    values = np.random.default_rng(seed).normal(size=(count, *shape))
    return jnp.asarray(values, dtype)


__all__ = [
    "NET",
    "SHAPE",
    "SMALL",
    "config",
    "dataset",
    "images_of",
    "patch_dataset",
    "replace",
    "trainer_of",
    "variables_of",
]
