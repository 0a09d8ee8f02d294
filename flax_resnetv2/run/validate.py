"""Whether configuration, data set, devices and run directory fit together.

Everything that can be refused is refused here, cheapest checks first, before any array
exists. What the configuration leaves open is filled in. The net is planned once, and
the run uses this plan.
"""

import math
from dataclasses import replace
from pathlib import Path

import jax

from flax_resnetv2.data import streaming
from flax_resnetv2.data.catalog import DatasetSummary
from flax_resnetv2.data.datasets import Dataset, describe, open_dataset
from flax_resnetv2.errors import UsageError
from flax_resnetv2.model import weights
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.run import cost, run_directory
from flax_resnetv2.run.build import create_net
from flax_resnetv2.run.config import SMALLEST_STD, Config, check_config, check_shape
from flax_resnetv2.system import files, memory
from flax_resnetv2.training.augment import NORMALIZATION

IN_MEMORY = 4
"""Images are streamed if they need more than a device's memory divided by this."""


def validate(
    config: Config, workdir: Path, devices: int, limit: int | None
) -> tuple[Config, Dataset, ResNetV2 | Autoencoder]:
    """Check everything, fill in the configuration, open the data set, plan the net.

    Args:
        config, workdir: the run and its directory.
        devices: the number of devices that share a batch.
        limit: memory of one device in bytes; None: unknown.

    Raises:
        UsageError: something does not fit.
        RunError: the data set could not be downloaded or prepared.
    """
    config, model = validate_static(config, workdir, devices, limit)
    if not files.writable(workdir):
        raise UsageError(
            f"workdir={workdir} cannot be written or created; choose another --workdir"
        )
    dataset = open_dataset(config.data)
    run_directory.check_data(workdir, dataset)
    return fill_in(config, dataset), dataset, model


def validate_static(
    config: Config, workdir: Path, devices: int, limit: int | None
) -> tuple[Config, ResNetV2 | Autoencoder]:
    """Check and fill in what needs no image; arguments as of ``validate``."""
    check_config(config)
    summary = describe(config.data)
    config = fill_in_classes(config, summary)
    check_shape(config, summary.image_shape)
    model = create_net(config, summary.image_shape)
    _check_devices(config, devices)
    run_directory.check_path(workdir)
    run_directory.check_same(workdir, config)
    run_directory.check_numerics(workdir)
    config = run_directory.fill_in_from_run(workdir, config)
    config = _choose_streaming(config, summary, limit)
    if config.data.stream:
        rows = config.train.batch_size // jax.process_count()
        size = rows * math.prod(summary.image_shape)
        streaming.check_shared_memory(config.data.workers, size)
    _check_weights(config, summary.image_shape, workdir)
    return config, model


def _check_devices(config: Config, count: int) -> None:
    """Refuse a batch that ``count`` devices cannot share equally, part by part."""
    batch, parts = config.train.batch_size, config.train.accumulation_steps
    unit = count * parts
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        choices = f"{below} or {above}" if below else str(above)
        each = "" if parts == 1 else f" in train.accumulation_steps={parts} parts each"
        raise UsageError(
            f"train.batch_size={batch} cannot be shared equally by {count} devices"
            f"{each}; choose a multiple of {unit}, as {choices}"
        )


def _choose_streaming(
    config: Config, summary: DatasetSummary, limit: int | None
) -> Config:
    """Decide whether to stream images if it is open; else refuse what cannot fit."""
    stream, size, device = config.data.stream, summary.size, jax.local_devices()[0]
    if stream is None:
        stream = limit is not None and size * IN_MEMORY > limit
    for where, available in (
        ("this machine", memory.machine_memory()),
        (f"each device ({device.device_kind})", cost.memory_limit(device)),
    ):
        if not stream and available is not None and size > available:
            raise UsageError(
                f"data.name={config.data.name} has "
                f"{sum(summary.num_images.values()):,} images, which need "
                f"{cost.amount(size, 'B')} of memory, and {where} has "
                f"{cost.amount(available, 'B')}; add --data.stream True, or choose a "
                "smaller --data.image-size"
            )
    return replace(config, data=replace(config.data, stream=stream))


def _check_weights(
    config: Config, image_shape: tuple[int, int, int], workdir: Path
) -> None:
    """Refuse ``weights`` that a new run could not open or use."""
    if config.weights is None or run_directory.is_run(workdir):
        return
    if image_shape[2] != 3:
        raise UsageError(
            f"weights={config.weights} are for images of 3 channels, and those of "
            f"{config.data.name} have {image_shape[2]}; leave the weights out"
        )
    try:
        weights.check_file(config.weights)
    except UsageError as error:
        raise UsageError(f"weights={error}; name it by --weights FILE") from error


def fill_in_classes(config: Config, data: DatasetSummary | Dataset) -> Config:
    """Take the number of classes from the data set if it is open."""
    if config.architecture.num_classes is not None:
        return config
    classes = len(data.class_names)
    architecture = replace(config.architecture, num_classes=classes)
    return replace(config, architecture=architecture)


def fill_in(config: Config, dataset: Dataset) -> Config:
    """Fill in what only the data set knows; errors as of ``check_fits``."""
    config = fill_in_classes(config, dataset)
    check_fits(config, dataset)
    if config.augment.mean is None:
        mean, std = NORMALIZATION.mean, NORMALIZATION.std
        if config.weights is None:
            mean, std = dataset.channel_statistics()
            # A constant channel stays 0.
            std = tuple(value if value > SMALLEST_STD else 1.0 for value in std)
        config = replace(config, augment=replace(config.augment, mean=mean, std=std))
        check_shape(config, dataset.image_shape)
    return config


def check_fits(config: Config, dataset: Dataset) -> None:
    """Raise ``UsageError`` if classes, crops or batch size do not fit the data set."""
    classes, asked = len(dataset.class_names), config.architecture.num_classes
    if config.architecture.head == "classifier" and classes != asked:
        raise UsageError(
            f"architecture.num_classes={asked}, but {dataset.name} has {classes} "
            f"classes; set --architecture.num_classes {classes}"
        )
    crops = config.augment.crop_scale, config.augment.test_crop
    if dataset.in_memory() and crops != (None, 1.0):
        raise UsageError(
            f"augment.crop_scale={crops[0]} and augment.test_crop={crops[1]} need "
            "images that are streamed from disk; add --data.stream True, or leave them "
            "out"
        )
    images, batch = dataset.splits["train"].num_images, config.train.batch_size
    if batch > images:
        raise UsageError(
            f"train.batch_size={batch} is more than the {images} training images of "
            f"{dataset.name}; choose one from 1 to {images}"
        )
