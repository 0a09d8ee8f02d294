"""A picture of what an autoencoder makes of images: as they were, and as decoded."""

import io
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from flax_resnetv2.data.datasets import open_dataset
from flax_resnetv2.data.streaming import EvaluationRow
from flax_resnetv2.errors import UsageError
from flax_resnetv2.run.run_directory import load_config
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.system.files import write_whole
from flax_resnetv2.training.augment import AugmentConfig, normalize
from flax_resnetv2.validation import Range, check_arguments

Shown = Annotated[int, Range(1, 50)]


def reconstruct(
    workdir: str | Path, *, images: Shown = 10, checkpoint: CheckpointChoice = "newest"
) -> Path:
    """Draw test images of a run beside what its autoencoder makes of them.

    Args:
        workdir: the run's directory; receives ``reconstructions.png``.
        images: how many; of a variational one also as many that are decoded from
            vectors drawn from N(0, 1).
        checkpoint: which one.

    Returns:
        The picture's path.

    Raises:
        UsageError: as ``restore``, or the run trains no autoencoder.
    """
    check_arguments(reconstruct, {"images": images})
    if load_config(workdir).architecture.head != "latent":
        raise UsageError(
            f"{workdir} is a run of a classifier, which makes no images; give one of "
            "an autoencoder, as train.py quickstart-autoencoder makes"
        )
    path = Path(workdir) / "reconstructions.png"
    write_whole(path, picture(restore(workdir, checkpoint), images))
    return path


def picture(run: TrainedNet, images: int) -> bytes:
    """The same as a PNG, of an autoencoder's run."""
    stored = _first_images(run, images)
    normalized = normalize(
        jnp.asarray(stored), run.config.augment, run.model.execution.param_dtype
    )
    made = jax.jit(lambda v, x: run.model.apply(v, x, train=False).image)
    shown = {
        "test images": normalized,
        "made again": made(run.variables, normalized),
    }
    if run.config.architecture.latent_variance:
        vectors = jax.random.normal(
            jax.random.key(0), (len(stored), run.config.architecture.latent)
        )
        decode = jax.jit(lambda v, z: run.model.apply(v, z, method="decode"))
        shown["drawn from N(0, 1)"] = decode(run.variables, vectors)
    return draw_rows({k: _pixels(v, run.config.augment) for k, v in shown.items()})


def draw_rows(rows: dict[str, np.ndarray]) -> bytes:
    """Draw rows of images [N, H, W, C], from 0 to 1, under their names, as a PNG."""
    from matplotlib.figure import Figure

    count = max(map(len, rows.values()))
    figure = Figure((1 + 0.9 * count, 1.15 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for place, image in zip(line, images, strict=True):
            gray = image.shape[-1] == 1
            place.imshow(
                image[..., 0] if gray else image,
                cmap="gray" if gray else None,
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            place.set_xticks([])
            place.set_yticks([])
            place.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8)
    file = io.BytesIO()
    # Without the version of matplotlib in it.
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _first_images(run: TrainedNet, count: int) -> np.ndarray:
    """The first images of the split "test", uint8 [N, H, W, C]."""
    dataset = open_dataset(run.config.data)
    split = dataset.splits["test"]
    count = min(count, split.num_images)
    if dataset.in_memory():
        return np.asarray(split.image[:count])
    row = EvaluationRow(split, run.config.augment.test_crop)
    return np.stack([row(place)[0] for place in range(count)])


def _pixels(images: jax.Array, config: AugmentConfig) -> np.ndarray:
    """Normalized images [N, H, W, C] -> from 0 to 1."""
    plain = np.asarray(images) * np.array(config.std) + np.array(config.mean)
    return plain.clip(0, 1)
