"""Whether a configuration, a data set, the devices and a directory fit together.

Everything that can be refused is refused here, cheapest first, before there is an
array; and what was left open is filled in.
"""

from dataclasses import replace
from pathlib import Path

import jax

from flax_resnetv2.data.catalog import Facts
from flax_resnetv2.data.datasets import Dataset, describe, open_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import weights
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import SMALLEST_STD, Config, check_config, check_shape
from flax_resnetv2.run.cost import check_images
from flax_resnetv2.system import runtime

IN_MEMORY = 4
"""Images take at most one part in so many of a device's memory, or stay on disk."""


def agree(
    config: Config, workdir: Path, devices: int, limit: int | None
) -> tuple[Config, Dataset]:
    """Everything that can be refused, cheapest first; the configuration filled in.

    Args:
        config, workdir: of the run.
        devices: how many share a batch.
        limit: bytes of memory of one of them; None: unknown.

    Raises:
        UsageError: it is refused.
    """
    config = agree_unread(config, workdir, devices, limit)
    if not runtime.writable(workdir):
        raise UsageError(
            f"workdir={workdir} cannot be written, or made; choose another --workdir"
        )
    dataset = open_dataset(config.data)
    run_directory.check_data(workdir, dataset)
    return resolve(config, dataset), dataset


def agree_unread(
    config: Config, workdir: Path, devices: int, limit: int | None
) -> Config:
    """The part of ``agree`` before any image is read: a mistake costs no waiting."""
    check_config(config)
    facts = describe(config.data)
    config = fill_in(config, facts)
    check_shape(config, facts.image_shape)
    create_net(config, facts.image_shape)
    check_devices(config, devices)
    run_directory.check_same(workdir, config)
    config = in_memory_or_not(run_directory.as_begun(workdir, config), facts, limit)
    check_weights(config, facts.image_shape, workdir)
    return config


def in_memory_or_not(config: Config, facts: Facts, limit: int | None) -> Config:
    """Decide where images are to be, if that is left open.

    Args:
        config: of the run.
        facts: of its data set.
        limit: bytes of memory of a device; None: unknown.

    Raises:
        UsageError: they are to be in memory, and do not fit.
    """
    stream = config.data.stream
    if stream is None:
        stream = limit is not None and facts.size * IN_MEMORY > limit
    if not stream:
        count = sum(facts.images.values())
        check_images(config.data.name, count, facts.size, jax.local_devices()[0])
    return replace(config, data=replace(config.data, stream=stream))


def check_weights(
    config: Config, image_shape: tuple[int, int, int], workdir: Path
) -> None:
    """Refuse weights that a new run could not open or use."""
    if config.weights is None or run_directory.is_run(workdir):
        return
    known, channels = len(weights.NORMALISATION.mean), image_shape[2]
    if channels != known:
        raise UsageError(
            f"weights={config.weights} are for images of {known} channels, and those "
            f"of {config.data.name} have {channels}; leave the weights out"
        )
    try:
        weights.check_file(config.weights)
    except UsageError as error:
        raise UsageError(f"weights={error}; name it by --weights FILE") from error


def fill_in(config: Config, data: Facts | Dataset) -> Config:
    """Fill in the number of classes where it was left to the data set."""
    if config.architecture.num_classes is not None:
        return config
    classes = len(data.class_names)
    architecture = replace(config.architecture, num_classes=classes)
    return replace(config, architecture=architecture)


def resolve(config: Config, dataset: Dataset) -> Config:
    """Fill in what only the data set knows, and check that the two fit."""
    config = fill_in(config, dataset)
    check_fits(config, dataset)
    if config.augment.mean is None:
        if config.weights is not None:
            known = weights.NORMALISATION
            mean, std = known.mean, known.std
        else:
            mean, std = dataset.channel_statistics()
            # A channel that never changes stays 0.
            std = tuple(value if value > SMALLEST_STD else 1.0 for value in std)
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
        check_shape(config, dataset.image_shape)
    return config


def check_fits(config: Config, dataset: Dataset) -> None:
    """Refuse a configuration for other data."""
    classes, asked = len(dataset.class_names), config.architecture.num_classes
    if config.architecture.head == "classifier" and classes != asked:
        raise UsageError(
            f"architecture.num_classes={asked}, but {dataset.name} has {classes} "
            f"classes; set --architecture.num_classes {classes}"
        )
    cut = config.augment.crop_scale, config.augment.test_crop
    if dataset.in_memory() and cut != (None, 1.0):
        raise UsageError(
            f"augment.crop_scale={cut[0]} and augment.test_crop={cut[1]} are for "
            "images that stay on disk; add --data.stream True, or leave them out"
        )
    images, batch = dataset.splits["train"].images, config.train.batch_size
    if batch > images:
        raise UsageError(
            f"train.batch_size={batch} is more than the {images} training images of "
            f"{dataset.name}; choose one from 1 to {images}"
        )


def check_devices(config: Config, count: int) -> None:
    """Refuse a batch that ``count`` devices cannot share equally, part by part."""
    batch, parts = config.train.batch_size, config.train.accumulate
    unit = count * parts
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        choices = f"{below} or {above}" if below else str(above)
        each = "" if parts == 1 else f" in train.accumulate={parts} parts each"
        raise UsageError(
            f"train.batch_size={batch} cannot be shared equally by {count} devices"
            f"{each}; choose a multiple of {unit}, as {choices}"
        )
