"""A trained net on new images.

>>> predictor = Predictor.find("cifar10-resnet20")  # it comes with the package
>>> predictor(images).argmax(-1)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from flax_resnetv2.data.images import careful, read_image, square, stretched
from flax_resnetv2.errors import UsageError
from flax_resnetv2.inference import modelfile
from flax_resnetv2.model.modules import Latent, ResNetV2
from flax_resnetv2.run.trained import CheckpointChoice, TrainedNet, restore
from flax_resnetv2.training.augment import AugmentConfig, normalize
from flax_resnetv2.training.step import eval_forward


class Answer(NamedTuple):
    """What a net says of N images."""

    probabilities: np.ndarray | None
    """float [N, classes]; None: it is an encoder."""
    latents: np.ndarray
    """float [N, K]: what the classifier reads, or, of an encoder, its vectors (of a
    variational one their means)."""


class Predictor:
    """Class probabilities and latent vectors of stored images, normalized as in
    training."""

    def __init__(
        self,
        model: ResNetV2,
        variables: dict[str, Any],
        normalization: AugmentConfig,
        class_names: Sequence[str],
        image_shape: tuple[int, int, int],
        square: bool = False,
        multi_label: bool = False,
    ) -> None:
        """Take a net apart from any run.

        Args:
            model, variables: a net and its parameters and statistics.
            normalization: with ``mean`` and ``std``, and perhaps ``test_flip`` and
                ``test_crop``.
            class_names: one for each logit; of an encoder none.
            image_shape: (height, width, channels) of the images it was trained on.
            square: these were the central squares of larger ones (``data.image_size``), so
                ``load`` cuts the same out; else it scales an image as a whole.
            multi_label: each class is there or not, whatever the others: a sigmoid
                gives the probabilities, not the softmax of all.
        """
        self.model, self.variables = model, variables
        self.normalization = normalization
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.multi_label = multi_label
        self._square, self._share = square, normalization.test_crop
        self._apply = jax.jit(self._answer)

    @classmethod
    def from_run(
        cls, workdir: str | Path, checkpoint: CheckpointChoice = "newest"
    ) -> "Predictor":
        """Load a checkpoint of a run that ``train.py`` made, or is making.

        Args:
            workdir: the run's directory.
            checkpoint: the newest whole one, or the best on the split "validation".

        Raises:
            UsageError: ``workdir`` is no run directory, or has no such checkpoint.
            RunError: the checkpoints are damaged.
        """
        return cls.of(restore(workdir, checkpoint))

    @classmethod
    def from_file(cls, path: str | Path) -> "Predictor":
        """Load what ``python -m flax_resnetv2 export`` wrote as ``.safetensors``.

        Raises:
            UsageError: the file cannot be used; see ``modelfile.load``.
        """
        return cls.of(modelfile.load(path))

    @classmethod
    def find(
        cls,
        name: str | Path,
        checkpoint: CheckpointChoice = "newest",
        test_flip: bool | None = None,
    ) -> "Predictor":
        """Load a run's checkpoint, an exported file, or a net of the package.

        Args:
            name: a directory, a file, or one of ``modelfile.shipped()``.
            checkpoint: which one of a run.
            test_flip: answer by an image and its mirror image; None: as in training.

        Raises:
            UsageError: there is no such thing, or it cannot be used.
            RunError: the checkpoints are damaged.
        """
        net = modelfile.open_net(name, checkpoint)
        if test_flip is not None:
            augment = replace(net.config.augment, test_flip=test_flip)
            net = net._replace(config=replace(net.config, augment=augment))
        return cls.of(net)

    @classmethod
    def of(cls, net: TrainedNet) -> "Predictor":
        """Take a net with what its run knew of the images."""
        config, facts = net.config, net.facts
        encodes = config.architecture.head != "classifier"
        return cls(
            # Of an autoencoder the net alone, which reads the same variables.
            ResNetV2(net.model.plan, net.model.execution),
            net.variables,
            config.augment,
            () if encodes else facts["class_names"],
            tuple(facts["image_shape"]),
            square=config.data.image_size is not None or bool(config.data.stream),
            # Runs of earlier versions have one class for each image.
            multi_label=facts.get("multi_label", False),
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Give probabilities [N, classes] for uint8 images [N, H, W, C].

        Raises:
            UsageError: images of another shape or type than in training, or the net is
                an encoder.
        """
        probabilities, _ = self.answer(images)
        if probabilities is None:
            raise UsageError(
                "the net is an encoder, which knows no classes; ask for its latents"
            )
        return probabilities

    def latents(self, images: np.ndarray) -> np.ndarray:
        """Give latent vectors [N, K] for uint8 images [N, H, W, C]; see ``Answer``.

        Raises:
            UsageError: images of another shape or type than in training.
        """
        return self.answer(images).latents

    def answer(self, images: np.ndarray, batch_size: int | None = None) -> Answer:
        """Give all that the net says of uint8 images [N, H, W, C].

        Args:
            images: in one shape; ``load`` brings files to it.
            batch_size: so many at once, by one compiled program; None: all.

        Raises:
            UsageError: images of another shape or type than in training.
        """
        if images.shape[1:] != self.image_shape or images.dtype != np.uint8:
            raise UsageError(
                f"images must be uint8 {['N', *self.image_shape]}; got {images.dtype} "
                f"{list(images.shape)}; see Predictor.load"
            )
        size = batch_size or max(len(images), 1)
        found = [
            self._batch(images[first : first + size], size)
            for first in range(0, max(len(images), 1), size)
        ]
        if found[0].probabilities is None:
            return Answer(None, np.concatenate([x.latents for x in found]))
        return Answer(*map(np.concatenate, zip(*found, strict=True)))

    def _batch(self, images: np.ndarray, size: int) -> Answer:
        """Of at most ``size`` images, filled up to that number."""
        missing = [(0, size - len(images)), (0, 0), (0, 0), (0, 0)]
        answer = self._apply(self.variables, np.pad(images, missing))
        return Answer(
            *(None if x is None else np.asarray(x)[: len(images)] for x in answer)
        )

    def read(
        self, files: Iterable[str | Path | IO[bytes]], batch_size: int
    ) -> Iterator[tuple[list[str], Answer, list[UsageError]]]:
        """Answer image files batch by batch, holding one batch in memory.

        Yields:
            names of the files that could be read, the answer, and why others could not.
        """
        names, pixels, errors = [], [], []
        for file in files:
            try:
                pixels.append(self.load(file))
                names.append(_name(file))
            except UsageError as error:
                errors.append(error)
            if len(names) == batch_size:
                yield names, self.answer(np.stack(pixels), batch_size), errors
                names, pixels, errors = [], [], []
        if names or errors:
            images = np.stack(pixels) if pixels else np.zeros((0, *self.image_shape))
            yield names, self.answer(images.astype(np.uint8), batch_size), errors

    def load(self, file: str | Path | IO[bytes]) -> np.ndarray:
        """Read an image file as uint8 [H, W, C], brought to the size trained on.

        Of an animation it is the first frame, turned as its camera says; what is
        transparent has the color that is stored there; 16 bits become 8.

        Raises:
            UsageError: not a file, not an image, cut short, or too large.
        """
        height, width, channels = self.image_shape
        fit = stretched(height, width)
        if self._square:
            fit = square(height, self._share)
        with careful():
            return read_image(file, _name(file), channels, fit)

    def traced(self, images: jax.Array) -> Answer:
        """``answer`` for anybody's ``jit``; the variables become constants there."""
        return Answer(*self._answer(self.variables, images))

    def _answer(
        self, variables: dict[str, Any], images: jax.Array
    ) -> tuple[jax.Array | None, jax.Array]:
        config, dtype = self.normalization, self.model.execution.param_dtype
        outputs, sown = eval_forward(
            self.model, variables, normalize(images, config, dtype), config.test_flip
        )
        if self.model.plan.head.kind == "latent":
            return None, outputs.mean if isinstance(outputs, Latent) else outputs
        probabilities = jax.nn.sigmoid if self.multi_label else jax.nn.softmax
        return probabilities(outputs), sown["intermediates"]["head"]["features"][0]


def _name(file: str | Path | IO[bytes]) -> str:
    """For messages."""
    return str(file if isinstance(file, str | Path) else getattr(file, "name", file))
