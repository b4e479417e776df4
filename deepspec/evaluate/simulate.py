"""Recorded rounds served again, to R requests at once, under every policy: what each would give in
tokens per second.

N rounds, R requests, S steps, g block size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepspec.evaluate.calibration import calibrated
from deepspec.evaluate.rounds import Floats, Ints, Rounds, headline, read_rounds, split_by_prompt
from deepspec.evaluate.scheduler import Policy, Scheduled, Threshold
from deepspec.evaluate.speed_curve import SpeedCurve

log = logging.getLogger(__name__)

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.2, 0.4, 0.6, 0.8)
MIN_ROUNDS, MIN_STEPS = 4096, 64  # of one simulation: at one request, and at very many


class Fixed(NamedTuple):
    """The first so many slots of every block; 0 is plain decoding."""

    length: int

    def verify_lengths(self, confidence: Floats, running: Any) -> Ints:
        return np.where(running, self.length, 0)


class Simulated(NamedTuple):
    requests: int
    throughput: float  # tokens per second, all requests together
    per_user: float  # tokens per second of one request
    verified_per_round: float  # draft tokens verified, the anchor not counted
    lengths: list[float]  # [g + 1] share of rounds in which so many were verified


def simulate(rounds: Rounds, policy: Policy, curve: SpeedCurve, *, requests: int) -> Simulated:
    """Serve `rounds` to so many requests at once; a step takes the curve's seconds at all tokens
    verified together.

    Requests begin at places evenly apart and walk through the rounds in order, prompt after prompt
    and around, so every policy meets the same rounds at the same steps. A replay: a round cut short
    still ends where it was recorded to end, and the draft's own time is in no figure.
    """
    steps = max(MIN_STEPS, -(-max(MIN_ROUNDS, len(rounds.accepted)) // requests))
    # [S, R]
    places = (
        np.arange(steps)[:, None] + np.arange(requests) * len(rounds.accepted) // requests
    ) % len(rounds.accepted)
    running = np.ones(requests, dtype=np.bool_)
    verified = np.stack(
        [policy.verify_lengths(rounds.confidence[step], running) for step in places]
    )
    committed = int((np.minimum(rounds.accepted[places], verified) + 1).sum())
    throughput = committed / float(curve.seconds(requests + verified.sum(axis=1)).sum())
    shares = np.bincount(verified.ravel(), minlength=rounds.confidence.shape[1] + 1) / verified.size
    return Simulated(
        requests, throughput, throughput / requests, float(verified.mean()), shares.tolist()
    )


def policies(block_size: int, curve: SpeedCurve) -> dict[str, Policy]:
    """Full, every fixed length, thresholds, and the scheduler, by name; all of them believe the
    confidences they are given.
    """
    named: dict[str, Policy] = {"full": Fixed(block_size)}
    named |= {f"fixed@{length}": Fixed(length) for length in range(block_size + 1)}
    named |= {f"threshold@{threshold:g}": Threshold(threshold) for threshold in THRESHOLDS}
    return {**named, "scheduled": Scheduled(curve)}


def compare_policies(
    rounds: Rounds, curve: SpeedCurve, *, requests: Sequence[int] = REQUESTS
) -> dict[str, list[Simulated]]:
    """Every policy at each number of requests, over calibrated rounds."""
    named = policies(rounds.confidence.shape[1], curve)
    return {
        name: [simulate(rounds, policy, curve, requests=number) for number in requests]
        for name, policy in named.items()
    }


def scheduler_summary(
    rows: Sequence[Mapping[str, Any]],
    block_size: int,
    curve: SpeedCurve,
    temperatures: Sequence[float] | None,
    *,
    requests: Sequence[int] = REQUESTS,
) -> dict[str, Any] | None:
    """What every policy would give on a result's rows; None, and the log says so, without rounds
    that told their confidence.

    Simulated on the prompts that `fit_calibration` leaves out, since the scheduler would look too
    good on the others.
    """
    _, rounds = split_by_prompt(read_rounds(headline(rows), block_size))
    if not len(rounds.accepted):
        log.info("no simulation of the scheduler: there are no whole rounds with confidences")
        return None
    mended = Rounds(calibrated(rounds.confidence, temperatures), rounds.accepted, rounds.prompt)
    found = compare_policies(mended, curve, requests=requests)
    return {
        "requests": list(requests),
        "policies": {name: [point._asdict() for point in points] for name, points in found.items()},
    }
