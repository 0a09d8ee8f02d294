"""Statistics of predictions on labeled images, as pure functions of arrays.

Probabilities are float [N, K], labels int [N].
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


def wilson(correct: float, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval (1927) of ``correct`` out of ``count``."""
    z = 1.959964  # standard deviations
    share, extra = correct / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / count + extra / count / 4) / (1 + extra)
    # Rounding can leave [0, 1].
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(
    line: Mapping[str, float], multi_label: bool
) -> tuple[float, float] | None:
    """Return the 95 % Wilson interval of the accuracy in a line of metrics.

    None if there is no accuracy, or several labels per image: not independent trials.
    """
    if "accuracy" not in line or multi_label:
        return None
    return wilson(line["accuracy"] * line["count"], line["count"])


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count images by true class (rows) and predicted class (columns), int [K, K]."""
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


class Calibration(NamedTuple):
    """Confidence and accuracy of predictions, by bins of confidence."""

    confidence: np.ndarray
    """Mean probability of the predicted class in each bin; NaN in an empty bin."""
    accuracy: np.ndarray
    """Share of correct predictions in each bin; NaN in an empty bin."""
    images: np.ndarray
    """Number of images in each bin."""
    error: float
    """Expected calibration error: mean over images of abs(confidence - accuracy)."""


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15
) -> Calibration:
    """Compare confidence and accuracy in bins of equal width (Guo et al. 2017)."""
    sure, predicted = probabilities.max(1), probabilities.argmax(1)
    bin_of = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bin_of, sure, bins) / count
        accuracy = np.bincount(bin_of, predicted == labels, bins) / count
    gap = np.abs(np.nan_to_num(confidence) - np.nan_to_num(accuracy))
    return Calibration(
        confidence, accuracy, count, float((gap * count).sum() / len(labels))
    )


def worst(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the most confident errors, most confident first."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    order = np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")
    return wrong[order[:count]]
