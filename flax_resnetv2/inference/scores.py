"""What can be said of answers to labeled images; pure numbers.

Probabilities are float [N, K], labels int [N].
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


def wilson(correct: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Give the interval in which the true share lies, as Wilson 1927 has it.

    Args:
        correct, count: successes of so many independent trials.
        z: how many standard deviations; 1.96 is 95 %.
    """
    share, extra = correct / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / count + extra / count / 4) / (1 + extra)
    # Rounding aside, no share is outside of [0, 1].
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(
    line: Mapping[str, float], multi_label: bool
) -> tuple[float, float] | None:
    """Give Wilson's interval of a line of metrics (``accuracy``, ``count``).

    Returns:
        None: an image has no answer, or several, which are not independent.
    """
    if "accuracy" not in line or multi_label:
        return None
    return wilson(line["accuracy"] * line["count"], line["count"])


def confusion(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count images by class and answer, int [K, K]: a row for each true class."""
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


class Calibration(NamedTuple):
    """Whether a net is right as often as it says."""

    confidence: np.ndarray
    """Mean probability of the answer, by bin; NaN where no image is."""
    accuracy: np.ndarray
    """Share of right answers."""
    images: np.ndarray
    """How many."""
    error: float
    """Expected calibration error: the mean difference of the two over the images."""


def calibration(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = 15
) -> Calibration:
    """Compare confidence and accuracy in bins of equal width (Guo et al. 2017)."""
    sure, answer = probabilities.max(1), probabilities.argmax(1)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, sure, bins) / count
        accuracy = np.bincount(place, answer == labels, bins) / count
    apart = np.abs(np.nan_to_num(confidence) - np.nan_to_num(accuracy))
    return Calibration(
        confidence, accuracy, count, float((apart * count).sum() / len(labels))
    )


def worst(probabilities: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the wrong answers that the net was surest of, surest first."""
    answer = probabilities.argmax(1)
    wrong = np.flatnonzero(answer != labels)
    order = np.argsort(-probabilities[wrong, answer[wrong]], kind="stable")
    return wrong[order[:count]]
