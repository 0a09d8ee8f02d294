"""A trained net on new images.

>>> predictor = Predictor.find("cifar10-resnet20")  # a net that the package ships
>>> predictor(images).argmax(-1)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from flax_resnetv2.data.decoding import center_crop, read_image, stretch, strict_pillow
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import modelfile
from flax_resnetv2.model.modules import Latent, ResNetV2
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet
from flax_resnetv2.training.augment import AugmentConfig, normalize
from flax_resnetv2.training.evaluation import eval_forward


class Prediction(NamedTuple):
    """The outputs of a net for N images."""

    probabilities: np.ndarray | None
    """float [N, classes]; None for an encoder."""
    latents: np.ndarray
    """float [N, K]: the input of the classifier, or the latent vectors of an encoder
    (their means, if it is variational)."""


@dataclass(eq=False)
class Predictor:
    """Class probabilities and latent vectors of stored images.

    Images are normalized as in training.
    """

    model: ResNetV2
    variables: dict[str, Any]
    """Parameters and batch statistics of the net."""
    normalization: AugmentConfig
    """Its ``mean``, ``std``, ``resize``, ``test_flip`` and ``test_crop`` are used."""
    class_names: Sequence[str]
    """One per logit; empty for an encoder."""
    image_shape: tuple[int, int, int]
    """(height, width, channels) of the images that the net was trained on."""
    square: bool = False
    """``load`` crops the central square of an image, as ``data.image_size`` does;
    otherwise it scales the whole image."""
    multi_label: bool = False
    """Each class has an independent probability (sigmoid); otherwise the probabilities
    of all classes sum to 1 (softmax)."""

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names)
        self._compiled = jax.jit(self.forward)

    @classmethod
    def find(
        cls,
        name: str | Path,
        checkpoint: CheckpointChoice = "newest",
        test_flip: bool | None = None,
    ) -> "Predictor":
        """Load a trained net; arguments and errors as of ``modelfile.open_net``.

        Args:
            name: a run directory, an exported file, or a net that the package ships.
            checkpoint: which checkpoint of a run.
            test_flip: average the logits of each image and its mirror image; None: as
                in training.
        """
        net = modelfile.open_net(name, checkpoint)
        if test_flip is not None:
            augment = replace(net.config.augment, test_flip=test_flip)
            net = net._replace(config=replace(net.config, augment=augment))
        return cls.from_net(net)

    @classmethod
    def from_net(cls, net: TrainedNet) -> "Predictor":
        """Take the net and the data set's classes and image shape from a run."""
        config, summary = net.config, net.summary
        encodes = config.architecture.head != "classifier"
        return cls(
            # The encoder of an autoencoder reads the same variables.
            ResNetV2(net.model.plan, net.model.execution),
            net.variables,
            config.augment,
            () if encodes else summary["class_names"],
            tuple(summary["image_shape"]),
            square=config.data.image_size is not None or bool(config.data.stream),
            multi_label=summary["multi_label"],
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return probabilities [N, classes] of uint8 images [N, H, W, C].

        Raises:
            UsageError: as of ``predict``, or the net is an encoder.
        """
        probabilities = self.predict(images).probabilities
        if probabilities is None:
            raise UsageError(
                "the net is an encoder, which has no classes; use Predictor.latents"
            )
        return probabilities

    def latents(self, images: np.ndarray) -> np.ndarray:
        """Return latent vectors [N, K] of images; arguments as of ``predict``."""
        return self.predict(images).latents

    @jax.transfer_guard("allow")
    def predict(self, images: np.ndarray, batch_size: int | None = None) -> Prediction:
        """Return probabilities and latent vectors of uint8 images [N, H, W, C].

        Args:
            images: all of ``image_shape``; ``load`` brings image files to it.
            batch_size: images per call of the compiled net; None: all at once.

        Raises:
            UsageError: the images have another shape or type.
        """
        if images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            raise UsageError(
                f"images must be uint8 {['N', *self.image_shape]}; got {images.dtype} "
                f"{list(images.shape)}; see Predictor.load"
            )
        count, batches = len(images), []
        size = batch_size or max(count, 1)
        for first in range(0, max(count, 1), size):
            batch = images[first : first + size]
            # One compiled program serves all batches: the last one is padded.
            batch = np.pad(batch, [(0, size - len(batch)), (0, 0), (0, 0), (0, 0)])
            batches.append(jax.device_get(self._compiled(self.variables, batch)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)

    def load(self, file: str | Path | IO[bytes]) -> np.ndarray:
        """Read an image file as uint8 [H, W, C] of ``image_shape``.

        Reads the first frame of an animation, applies the EXIF orientation, ignores
        transparency and reduces 16 bits to 8.

        Raises:
            UsageError: not a file, not an image, truncated, or too large.
        """
        height, width, channels = self.image_shape
        resize = stretch(height, width)
        if self.square:
            resize = center_crop(height, self.normalization.test_crop)
        name = file if isinstance(file, str | Path) else getattr(file, "name", file)
        with strict_pillow():
            return read_image(file, name, channels, resize)

    def top_classes(
        self, probabilities: np.ndarray, count: int
    ) -> list[tuple[str, float]]:
        """Return the most probable classes of one image from its row [classes]."""
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [(self.class_names[k], float(probabilities[k])) for k in order]

    def forward(self, variables: dict[str, Any], images: jax.Array) -> Prediction:
        """Compute ``predict`` of images [N, H, W, C]; pure, for use inside ``jit``."""
        config, dtype = self.normalization, self.model.execution.param_dtype
        outputs, sown = eval_forward(
            self.model, variables, normalize(images, config, dtype), config.test_flip
        )
        if self.model.plan.head.kind == "latent":
            latents = outputs.mean if isinstance(outputs, Latent) else outputs
            return Prediction(None, latents)
        features = sown["intermediates"]["head"]["features"][0]
        activation = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
        return Prediction(activation(outputs), features)
