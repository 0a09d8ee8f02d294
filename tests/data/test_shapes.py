"""The drawn shapes: the same everywhere, balanced, and not for linear models."""

import hashlib

import numpy as np
import pytest

from benchmarks.linear_baseline import softmax_regression
from flax_resnetv2 import UsageError
from flax_resnetv2.data.shapes import SHAPE_CLASSES, draw_shapes

GOLDEN = {
    "train": "1799bedb6bcdf565c16db8e405662abdb031f20562b7dd90d857d6cc76de69e9",
    "test": "63ffbefec914a5d3f547326370195d896a77976621b65dfae44a95b4b3a9bcc2",
}


@pytest.fixture(scope="module")
def splits():
    return {split: draw_shapes(split) for split in ("train", "test")}


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 2_000)])
def test_images_and_labels(splits, split, count):
    images, labels = splits[split]
    assert images.shape == (count, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [count // 10] * 10
    assert len(SHAPE_CLASSES) == 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_bit_is_the_same_on_every_machine(splits, split):
    images, labels = splits[split]
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == GOLDEN[split], "if the drawing was meant to change: new GOLDEN"


def test_no_test_image_is_a_training_image(splits):
    train = {image.tobytes() for image in splits["train"][0]}
    assert len(train) == 10_000
    assert not any(image.tobytes() in train for image in splits["test"][0])


def test_an_unknown_split_is_refused():
    with pytest.raises(UsageError, match=r"'validation' .*'train', 'test'"):
        draw_shapes("validation")


def test_a_linear_model_learns_little(splits):
    """At half the size, from half of the images; the benchmark takes all."""
    (images, labels), (test_images, test_labels) = splits["train"], splits["test"]
    result = softmax_regression(
        images[::2, ::2, ::2], labels[::2], test_images[:, ::2, ::2], test_labels
    )
    assert result["test_accuracy"] <= 0.5
    assert result["best_test_accuracy"] <= 0.5
    # It did learn: the bound is no matter of an unfinished descent.
    assert result["fall_in_last_window"] < 1e-3
