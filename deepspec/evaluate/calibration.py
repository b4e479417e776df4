"""Calibrated confidence: a temperature for each slot, fitted by sequential temperature scaling, and
how well probabilities fit what happened: calibration error, AUROC, Brier score, and the bins of a
reliability diagram.

The confidence of slot k is the chance that its token is accepted given that all before it are;
their product up to k is the chance that the first k are all accepted. N rounds, g block size.
"""

import logging

import numpy as np

from deepspec.artifacts.records import Stored
from deepspec.artifacts.results import ConfidenceMeasures, ReliabilityBin
from deepspec.evaluate.counts import Rows
from deepspec.evaluate.rounds import (
    Bools,
    Floats,
    Ints,
    Rounds,
    headline,
    read_rounds,
    split_by_prompt,
    tempered,
)

log = logging.getLogger(__name__)

# Rounds that reached a slot; the ECE of fewer is mostly noise, and its minimum lies anywhere.
MIN_TESTED = 200
BINS = 10  # of equal width, over [0, 1]
GRID_STEPS, GRID_LIMIT = 161, 5.0  # temperatures tried: 1/5 to 5 in equal ratios


class Calibration(Stored):
    """`calibration.json`: a temperature for each slot [g], and what they were fitted on."""

    temperatures: list[float]
    rounds: int
    prompts: int
    benchmarks: list[str]
    sampling_temperature: float
    grid: dict[str, float]
    """The temperatures that were tried."""
    bins: int = BINS


def fit_temperatures(rounds: Rounds) -> list[float]:
    """One temperature per slot: each minimises the ECE of the product up to it, the earlier ones
    fixed.

    A slot that fewer than `MIN_TESTED` rounds reached keeps temperature 1.
    """
    grid = np.exp(np.linspace(-np.log(GRID_LIMIT), np.log(GRID_LIMIT), GRID_STEPS)).round(6)
    # Of equally good ones the nearest to 1 is taken.
    grid = grid[np.argsort(np.abs(np.log(grid)), kind="stable")]
    found = np.ones(rounds.confidence.shape[1])
    survival = np.ones(len(rounds.accepted))
    for slot, confidence in enumerate(rounds.confidence.T):
        if np.count_nonzero(rounds.accepted >= slot) < MIN_TESTED:
            break  # Nor did more rounds reach the slots behind it.
        errors = [
            expected_calibration_error(
                survival * tempered(confidence, 1.0 / temperature), rounds.accepted > slot
            )
            for temperature in grid
        ]
        found[slot] = grid[np.argmin(errors)]
        survival *= tempered(confidence, 1.0 / found[slot])
    temperatures: list[float] = found.tolist()
    return temperatures


def fit_calibration(rows: Rows, block_size: int) -> Calibration | None:
    """Temperatures fitted on half of the prompts of a result's rows.

    None, and a line in the log, where there is too little to fit on.
    """
    chosen = headline(rows)
    fitted, _ = split_by_prompt(read_rounds(chosen, block_size))
    num_rounds = len(fitted.accepted)
    if num_rounds < MIN_TESTED:
        has_confidence = any(row["confidence"] for row in chosen)
        why = "too few whole rounds to fit on" if has_confidence else "the draft has no confidence"
        log.info("no calibration: %s (rounds=%d of %d needed)", why, num_rounds, MIN_TESTED)
        return None
    return Calibration(
        temperatures=fit_temperatures(fitted),
        rounds=num_rounds,
        prompts=fitted.num_prompts,
        benchmarks=list(dict.fromkeys(row["benchmark"] for row in chosen)),
        sampling_temperature=chosen[0]["temperature"],
        grid={"low": 1 / GRID_LIMIT, "high": GRID_LIMIT, "steps": GRID_STEPS},
    )


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
