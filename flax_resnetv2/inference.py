"""A trained net on new images.

>>> predictor = Predictor.from_run("runs/quickstart-1")
>>> predictor(images).argmax(-1)
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flax_resnetv2.augment import AugmentConfig, normalise
from flax_resnetv2.errors import UsageError
from flax_resnetv2.images import careful, read_image, square, stretched
from flax_resnetv2.model import ResNetV2
from flax_resnetv2.restored import Which, restore
from flax_resnetv2.training import evaluated


class Predictor:
    """Class probabilities of stored images, normalised as in training."""

    def __init__(
        self,
        model: ResNetV2,
        variables: dict[str, Any],
        normalisation: AugmentConfig,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        square: bool = False,
        multi_label: bool = False,
    ) -> None:
        """Take a net apart from any run.

        Args:
            model, variables: a classifier and its parameters and statistics.
            normalisation: with ``mean`` and ``std``, and perhaps ``test_flip`` and
                ``test_crop``.
            class_names: one for each logit.
            image_shape: (height, width, channels) of the images it was trained on.
            square: these were the central squares of larger ones (``data.size``), so
                ``load`` cuts the same out; else it scales an image as a whole.
            multi_label: each class is there or not, whatever the others: a sigmoid
                gives the probabilities, not the softmax of all.
        """
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self._square, self._share = square, normalisation.test_crop
        self._variables = variables
        self._apply = jax.jit(
            partial(_probabilities, model, normalisation, multi_label)
        )

    @classmethod
    def from_run(cls, workdir: str | Path, checkpoint: Which = "newest") -> "Predictor":
        """Load a checkpoint of a run that ``train.py`` made, or is making.

        Args:
            workdir: the run's directory.
            checkpoint: the newest whole one, or the best on the split "validation".

        Raises:
            UsageError: ``workdir`` is no run directory, or has no such checkpoint.
            RunError: the checkpoints are damaged.
        """
        config, facts, _, model, variables = restore(workdir, checkpoint)
        if config.architecture.head != "classifier":
            raise UsageError(
                f"{workdir} is a run of an autoencoder, which knows no classes; see "
                "python -m flax_resnetv2 reconstruct"
            )
        return cls(
            model,
            variables,
            config.augment,
            facts["class_names"],
            tuple(facts["image_shape"]),
            square=config.data.size is not None or bool(config.data.stream),
            # Runs of earlier versions have one class for each image.
            multi_label=facts.get("multi_label", False),
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Give probabilities [N, classes] for uint8 images [N, H, W, C].

        Raises:
            UsageError: images of another shape or type than in training.
        """
        if images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            raise UsageError(
                f"images must be uint8 {['N', *self.image_shape]}; got {images.dtype} "
                f"{list(images.shape)}; see Predictor.load"
            )
        return np.asarray(self._apply(self._variables, images))

    def load(self, path: str | Path) -> np.ndarray:
        """Read an image file as uint8 [H, W, C], brought to the size trained on.

        Of an animation it is the first frame, turned as its camera says; what is
        transparent has the colour that is stored there; 16 bits become 8.

        Raises:
            UsageError: not a file, not an image, cut short, or too large.
        """
        height, width, channels = self.image_shape
        fit = stretched(height, width)
        if self._square:
            fit = square(height, self._share)
        with careful():
            return read_image(path, path, channels, fit)


def _probabilities(
    model: ResNetV2,
    normalisation: AugmentConfig,
    multi_label: bool,
    variables: Any,
    images: jax.Array,
) -> jax.Array:
    images = normalise(images, normalisation, model.execution.param_dtype)
    logits, _ = evaluated(model, variables, images, normalisation.test_flip)
    return jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)
