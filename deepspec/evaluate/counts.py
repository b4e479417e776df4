"""Metrics from raw counts, as defined in the project's algorithms page.

Counts are kept as sums, so that any set of prompts (a benchmark, a domain, a bootstrap resample) is
a weighted sum of theirs, divided once. U prompts or groups of them, K positions of a block.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]


class Tally(NamedTuple):
    """Sums over rounds: one set of them (no leading axis), or one per prompt or resample."""

    rounds: Array  # [U]
    committed: Array  # [U] bonus included; a round that ended on an accepted stop token has none
    proposed: Array  # [U]
    reached: Array  # [U, K] rounds that proposed at least k
    tried: Array  # [U, K] of those, the ones that had accepted the k - 1 before it
    accepted: Array  # [U, K] rounds whose first k were all accepted


class Clock(NamedTuple):
    """Tokens and seconds of both ways of decoding, summed likewise: [U]."""

    num_tokens: Array
    plain_tokens: Array
    seconds: Array
    plain_seconds: Array
    draft_seconds: Array
    verify_seconds: Array


def tally(prompts: Sequence[Rows], positions: int) -> Tally:
    """The sums of each prompt's rounds, over all of its rows (turns).

    `positions` is the longest proposal, K.
    """
    parts = [_of_prompt(rows, positions) for rows in prompts]
    return Tally(*map(np.stack, zip(*parts, strict=True)))


def _of_prompt(rows: Rows, positions: int) -> Tally:
    proposed, accepted, committed = (
        np.array([count for row in rows for count in row[name]], dtype=np.float64)
        for name in ("proposed", "accepted", "committed")
    )
    k = np.arange(1, positions + 1)
    reached = proposed[:, None] >= k
    tried = reached & (accepted[:, None] >= k - 1)
    kept = reached & (accepted[:, None] >= k)
    return Tally(
        np.asarray(float(len(proposed))),
        committed.sum(),
        proposed.sum(),
        *(rounds.sum(axis=0, dtype=np.float64) for rounds in (reached, tried, kept)),
    )


def clock(groups: Sequence[Rows]) -> Clock:
    """The sums of each group of prompts that was decoded together."""
    sums = [[sum(row[name] for row in rows) for rows in groups] for name in Clock._fields]
    return Clock(*np.array(sums, dtype=np.float64))


def longest_proposal(rows: Rows) -> int:
    """The most tokens that one round proposed; 0 without rounds."""
    return max((proposed for row in rows for proposed in row["proposed"]), default=0)


def acceptance_length(sums: Tally) -> Array:
    """Committed tokens per round, the target's bonus token included (the paper's tau)."""
    return ratio(sums.committed, sums.rounds)


def prefix_acceptance(sums: Tally) -> Array:
    """At k: rounds whose first k tokens were all accepted / rounds that proposed at least k."""
    return ratio(sums.accepted, sums.reached)


def conditional_acceptance(sums: Tally) -> Array:
    """At k: of the rounds that accepted the first k - 1 and proposed a k-th, those that accepted it
    (the paper's Figure 2).

    Tokens after an accepted stop token were dropped: such a round tried the next position, and did
    not accept it.
    """
    return ratio(sums.accepted, sums.tried)


def verify_rate(sums: Tally) -> Array:
    """Committed tokens / (proposed tokens + rounds): the useful share of verified positions."""
    return ratio(sums.committed, sums.proposed + sums.rounds)


def tokens_per_s(times: Clock) -> Array:
    """New tokens per second of speculative decoding."""
    return ratio(times.num_tokens, times.seconds)


def plain_tokens_per_s(times: Clock) -> Array:
    """New tokens per second of plain decoding."""
    return ratio(times.plain_tokens, times.plain_seconds)


def speedup(times: Clock) -> Array:
    """Seconds per token of plain decoding / of speculative decoding.

    Per token, because at a temperature above 0 the two answers differ in length.
    """
    return ratio(tokens_per_s(times), plain_tokens_per_s(times))


def ratio(above: Array, below: Array) -> Array:
    """The quotient; NaN where the divisor is 0."""
    unknown = np.full(np.broadcast(above, below).shape, np.nan)
    return np.divide(above, below, out=unknown, where=np.asarray(below) != 0)
