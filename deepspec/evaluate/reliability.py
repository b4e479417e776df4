"""How well probabilities fit what happened: calibration error, AUROC, Brier score, and the bins of
a reliability diagram.

Every function takes probabilities [N] with labels [N].
"""

import numpy as np

from deepspec.artifacts.results import ConfidenceMeasures, ReliabilityBin
from deepspec.evaluate.rounds import Bools, Floats, Ints

BINS = 10  # of equal width, over [0, 1]


def expected_calibration_error(probability: Floats, label: Bools) -> float:
    """Mean distance between probability and frequency over the bins, weighted by their counts."""
    excess = np.bincount(_bins(probability), weights=probability - label, minlength=BINS)
    return float(np.abs(excess).sum() / len(label))


def auroc(probability: Floats, label: Bools) -> float | None:
    """Chance that an accepted slot has a higher probability than a rejected one, ties half.

    None where all labels are alike.
    """
    positives, negatives = probability[label], np.sort(probability[~label])
    if not len(positives) or not len(negatives):
        return None
    lower = np.searchsorted(negatives, positives)
    lower_or_equal = np.searchsorted(negatives, positives, side="right")
    return float(np.mean(lower + lower_or_equal) / (2 * len(negatives)))


def reliability(probability: Floats, label: Bools) -> list[ReliabilityBin]:
    """Counts, mean probability and share accepted per bin; None where it is empty."""
    places = _bins(probability)
    counts = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means, shares = (
            np.bincount(places, weights=values, minlength=BINS) / counts
            for values in (probability, label)
        )
    return [
        ReliabilityBin(
            low=number / BINS,
            high=(number + 1) / BINS,
            count=int(count),
            confidence=float(means[number]) if count else None,
            accepted=float(shares[number]) if count else None,
        )
        for number, count in enumerate(counts)
    ]


def _bins(probability: Floats) -> Ints:
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def measures(probability: Floats, label: Bools) -> ConfidenceMeasures:
    """All of the above, and the Brier score: the mean squared distance of the probabilities from
    the labels. None for what nothing was measured of.
    """
    is_known = len(label) > 0
    return ConfidenceMeasures(
        ece=expected_calibration_error(probability, label) if is_known else None,
        auroc=auroc(probability, label),
        brier=float(np.mean((probability - label) ** 2)) if is_known else None,
        count=len(label),
        bins=reliability(probability, label),
    )
