"""What a result shows of the draft's confidence, before and after calibration.

N rounds, g block size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepspec.artifacts.results import (
    CalibrationSummary,
    ConfidenceMeasures,
    PositionCalibration,
    RoundCounts,
    SchedulerSummary,
    ThresholdPoint,
)
from deepspec.evaluate.calibration import Calibration
from deepspec.evaluate.counts import Rows
from deepspec.evaluate.reliability import measures
from deepspec.evaluate.rounds import Rounds, cut_below, headline, read_rounds, split_by_prompt
from deepspec.evaluate.simulate import simulate_policies
from deepspec.evaluate.speed_curve import SpeedCurve

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))


class ConfidenceSummary(NamedTuple):
    """The two parts of a summary that a result with confidences has."""

    calibration: CalibrationSummary
    scheduler: SchedulerSummary


def summarise_confidence(
    calibration: Calibration, rows: Rows, block_size: int, curve: SpeedCurve
) -> ConfidenceSummary:
    """Calibration and policies on the prompts that `fit_calibration` left out.

    Both would look too good on the prompts that the temperatures were fitted on.
    """
    _, before = split_by_prompt(read_rounds(headline(rows), block_size))
    after = before.calibrated(calibration.temperatures)
    summary = CalibrationSummary(
        positions=_positions(per_position(before), per_position(after)),
        cumulative=_positions(cumulative(before), cumulative(after)),
        temperatures=calibration.temperatures,
        thresholds=threshold_sweep(after),
        fitted_on=RoundCounts(rounds=calibration.rounds, prompts=calibration.prompts),
        reported_on=RoundCounts(rounds=len(after.accepted), prompts=after.num_prompts),
    )
    return ConfidenceSummary(summary, simulate_policies(after, curve))


def per_position(rounds: Rounds) -> list[ConfidenceMeasures]:
    """Each slot's confidence against its acceptance, over the rounds that reached it."""
    found = []
    for slot, confidence in enumerate(rounds.confidence.T):
        reached = rounds.accepted >= slot
        found.append(measures(confidence[reached], rounds.accepted[reached] > slot))
    return found


def cumulative(rounds: Rounds) -> list[ConfidenceMeasures]:
    """The product up to each slot against acceptance of all slots up to it, over all rounds."""
    survival = np.cumprod(rounds.confidence, axis=1)
    return [measures(chance, rounds.accepted > slot) for slot, chance in enumerate(survival.T)]


def _positions(
    before: Sequence[ConfidenceMeasures], after: Sequence[ConfidenceMeasures]
) -> list[PositionCalibration]:
    return [
        PositionCalibration(position=position, before=raw, after=mended)
        for position, (raw, mended) in enumerate(zip(before, after, strict=True), start=1)
    ]


def threshold_sweep(
    rounds: Rounds, thresholds: Sequence[float] = THRESHOLDS
) -> list[ThresholdPoint]:
    """What cutting each block at the first confidence below a threshold would have given (the
    paper's Figure 5).

    A replay: a round that would have been cut still ends where it ended, so the next one begins
    further on than it would have. Figures are exact for each recorded round and assume that rounds
    begun elsewhere are like those.
    """
    found, count = [], len(rounds.accepted)
    for threshold in thresholds:
        proposed = cut_below(rounds.confidence, threshold)
        total = float(proposed.sum())
        committed = float(np.minimum(rounds.accepted, proposed).sum() + count)
        found.append(
            ThresholdPoint(
                threshold=threshold,
                acceptance_length=committed / count,
                verify_rate=committed / (total + count),
                proposed_per_round=total / count,
            )
        )
    return found
