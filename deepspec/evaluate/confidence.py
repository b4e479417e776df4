"""What a result shows of the draft's confidence: how good it is before and after calibration, and
what every policy would give in tokens per second, on its recorded rounds served again to R requests
at once.

N rounds, R requests, S steps, g block size.
"""

from collections.abc import Callable, Sequence

import numpy as np

from deepspec.artifacts.results import (
    CalibrationSummary,
    ConfidenceMeasures,
    PositionCalibration,
    RoundCounts,
    SchedulerSummary,
    SimulatedServing,
    ThresholdPoint,
)
from deepspec.evaluate.calibration import Calibration, measures
from deepspec.evaluate.counts import Rows
from deepspec.evaluate.rounds import Rounds, cut_below, headline, read_rounds, split_by_prompt
from deepspec.evaluate.scheduler import Fixed, Policy, Scheduled, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIMULATED_THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
MIN_ROUNDS, MIN_STEPS = 4096, 64  # of one simulation: at one request, and at very many


def summarise_confidence(
    calibration: Calibration, rows: Rows, block_size: int, curve: SpeedCurve
) -> tuple[CalibrationSummary, SchedulerSummary]:
    """Calibration and policies on the prompts that `fit_calibration` left out.

    Both would look too good on the prompts that the temperatures were fitted on.
    """
    _, before = split_by_prompt(read_rounds(headline(rows), block_size))
    after = before.calibrated(calibration.temperatures)
    summary = CalibrationSummary(
        positions=_positions(per_position, before, after),
        cumulative=_positions(cumulative, before, after),
        temperatures=calibration.temperatures,
        thresholds=threshold_sweep(after),
        fitted_on=RoundCounts(rounds=calibration.rounds, prompts=calibration.prompts),
        reported_on=RoundCounts(rounds=len(after.accepted), prompts=after.num_prompts),
    )
    return summary, simulate_policies(after, curve)


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
    measure: Callable[[Rounds], list[ConfidenceMeasures]], before: Rounds, after: Rounds
) -> list[PositionCalibration]:
    both = zip(measure(before), measure(after), strict=True)
    return [
        PositionCalibration(position=position, before=raw, after=mended)
        for position, (raw, mended) in enumerate(both, start=1)
    ]


def threshold_sweep(rounds: Rounds) -> list[ThresholdPoint]:
    """What cutting each block at the first confidence below each threshold would have given (the
    paper's Figure 5).

    A replay: a round that would have been cut still ends where it ended, so the next one begins
    further on than it would have. Figures are exact for each recorded round and assume that rounds
    begun elsewhere are like those.
    """
    found, count = [], len(rounds.accepted)
    for threshold in THRESHOLDS:
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


def simulate(
    rounds: Rounds, policy: Policy, curve: SpeedCurve, *, requests: int
) -> SimulatedServing:
    """Serve `rounds` to so many requests at once; a step takes the curve's seconds at all tokens
    verified together.

    Requests begin at places evenly apart and walk through the rounds in order, prompt after prompt
    and around, so every policy meets the same rounds at the same steps. A replay: a round cut short
    still ends where it was recorded to end, and the draft's own time is in no figure.
    """
    num_rounds, block_size = rounds.confidence.shape
    steps = max(MIN_STEPS, -(-max(MIN_ROUNDS, num_rounds) // requests))
    starts = np.arange(requests) * num_rounds // requests
    places = (np.arange(steps)[:, None] + starts) % num_rounds  # [S, R]
    running = np.ones(requests, dtype=np.bool_)
    verified = np.stack([policy(rounds.confidence[step], running) for step in places])
    committed = int((np.minimum(rounds.accepted[places], verified) + 1).sum())
    throughput = committed / float(curve.seconds(requests + verified.sum(axis=1)).sum())
    return SimulatedServing(
        requests=requests,
        throughput=throughput,
        per_user=throughput / requests,
        verified_per_round=float(verified.mean()),
        lengths=(np.bincount(verified.ravel(), minlength=block_size + 1) / verified.size).tolist(),
    )


def simulate_policies(
    rounds: Rounds, curve: SpeedCurve, *, requests: Sequence[int] = REQUESTS
) -> SchedulerSummary:
    """Full, every fixed length, thresholds and the scheduler, at each number of requests.

    The rounds are calibrated: every policy takes their confidences as they are.
    """
    block_size = rounds.confidence.shape[1]
    policies: dict[str, Policy] = {
        "full": Fixed(block_size),
        **{f"fixed@{length}": Fixed(length) for length in range(block_size + 1)},
        **{f"threshold@{threshold:g}": Threshold(threshold) for threshold in SIMULATED_THRESHOLDS},
        "scheduled": Scheduled(curve),
    }
    found = {
        name: [simulate(rounds, policy, curve, requests=number) for number in requests]
        for name, policy in policies.items()
    }
    return SchedulerSummary(requests=list(requests), policies=found, curve=curve.points())
