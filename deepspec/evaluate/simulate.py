"""Recorded rounds served again, to R requests at once, under every policy: what each would give in
tokens per second.

N rounds, R requests, S steps, g block size.
"""

from collections.abc import Sequence

import numpy as np

from deepspec.artifacts.results import SchedulerSummary, SimulatedServing
from deepspec.evaluate.rounds import Rounds
from deepspec.evaluate.scheduler import Fixed, Policy, Scheduled, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
MIN_ROUNDS, MIN_STEPS = 4096, 64  # of one simulation: at one request, and at very many


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
        **{f"threshold@{threshold:g}": Threshold(threshold) for threshold in THRESHOLDS},
        "scheduled": Scheduled(curve),
    }
    found = {
        name: [simulate(rounds, policy, curve, requests=number) for number in requests]
        for name, policy in policies.items()
    }
    return SchedulerSummary(requests=list(requests), policies=found, curve=curve.points())
