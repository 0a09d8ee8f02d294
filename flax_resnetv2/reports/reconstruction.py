"""Reconstructions of an autoencoder next to the test images, drawn as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.datasets import open_dataset
from flax_resnetv2.data.streaming import EvaluationRow
from flax_resnetv2.errors import UsageError
from flax_resnetv2.reports import formats
from flax_resnetv2.run.run_directory import load_config
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.system.files import write_whole
from flax_resnetv2.training.augment import normalize
from flax_resnetv2.validation import Range, check_arguments


def reconstruct(
    workdir: str | Path,
    *,
    images: Annotated[int, Range(1, 50)] = 10,
    checkpoint: CheckpointChoice = "newest",
) -> Path:
    """Draw test images above their reconstructions by the run's autoencoder.

    Args:
        workdir: the run directory; receives ``reconstructions.png``.
        images: number of images; for a variational autoencoder also the number of
            latent vectors drawn from N(0, 1) and decoded.
        checkpoint: which checkpoint of the run.

    Returns:
        The path of the drawing.

    Raises:
        UsageError: as of ``restore``, or the run does not train an autoencoder.
    """
    check_arguments(reconstruct, {"images": images})
    if load_config(workdir).architecture.head != "latent":
        raise UsageError(
            f"{workdir} is a run of a classifier, which decodes no images; give one of "
            "an autoencoder, for example of train.py quickstart-autoencoder"
        )
    path = Path(workdir) / "reconstructions.png"
    write_whole(path, draw_reconstructions(restore(workdir, checkpoint), images))
    return path


def draw_reconstructions(net: TrainedNet, count: int) -> bytes:
    """Draw ``count`` test images and their reconstructions as PNG."""
    config, augment = net.config, net.config.augment
    split = open_dataset(config.data).splits["test"]
    indices, dtype = (
        range(min(count, split.num_images)),
        net.model.execution.param_dtype,
    )
    stored, _ = read_images(split, indices, augment.test_crop)
    normalized = normalize(jnp.asarray(stored), augment, dtype)
    apply = jax.jit(lambda v, x: net.model.apply(v, x, train=False).image)
    rows = {"test images": normalized}
    rows["reconstructions"] = apply(net.variables, normalized)
    if config.architecture.latent_variance:
        shape = (len(stored), config.architecture.latent)
        vectors = jax.random.normal(jax.random.key(0), shape)
        decode = jax.jit(lambda v, z: net.model.apply(v, z, method="decode"))
        rows["samples from N(0, 1)"] = decode(net.variables, vectors)
    mean, std = np.array(augment.mean), np.array(augment.std)
    return draw_rows(
        {name: (np.asarray(x) * std + mean).clip(0, 1) for name, x in rows.items()}
    )


@formats.plain_style()
def draw_rows(rows: dict[str, np.ndarray]) -> bytes:
    """Draw named rows of images [N, H, W, C], with values from 0 to 1, as PNG."""
    count = max(map(len, rows.values()))
    figure = formats.new_figure(1 + 0.9 * count, 1.15 * len(rows))
    grid = figure.subplots(len(rows), count, squeeze=False)
    for row, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(row, images, strict=True):
            image = image.squeeze(-1) if image.shape[-1] == 1 else image
            # The color map and its limits apply to images of one channel.
            axes.imshow(image, "gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=8)
    return formats.encode(figure, "png")


def read_images(
    split: Any, indices: Sequence[int], crop: float
) -> tuple[np.ndarray, np.ndarray]:
    """Read images uint8 [N, H, W, C] and labels of a split, in memory or on disk.

    Args:
        split: one of ``Dataset.splits``.
        indices: which images.
        crop: ``augment.test_crop`` of the run; applies to images on disk.
    """
    if isinstance(split, Split):
        return split.image[indices], split.label[indices]
    row = EvaluationRow(split, crop)
    images, labels = zip(*(row(int(k))[:2] for k in indices), strict=True)
    return np.stack(images), np.stack(labels)
