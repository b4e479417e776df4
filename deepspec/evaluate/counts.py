"""Metrics from raw counts, as defined in the project's algorithms page; nothing here knows how a
token was made.

Counts are kept as sums, so that any set of prompts (a benchmark, a domain, a bootstrap resample) is
a weighted sum of theirs, divided once. P prompts (or resamples), K positions of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]


class Tally(NamedTuple):
    """Sums over rounds: one set of them (no leading axis), or one per prompt or resample."""

    rounds: Array  # [P]
    committed: Array  # [P] bonus included; a round that ended on an accepted stop token has none
    proposed: Array  # [P]
    reached: Array  # [P, K] rounds that proposed at least k
    tried: Array  # [P, K] of those, the ones that had accepted the k - 1 before it
    accepted: Array  # [P, K] rounds whose first k were all accepted


class Clock(NamedTuple):
    """Tokens and seconds of both ways of decoding, summed likewise: [P]."""

    tokens: Array
    plain_tokens: Array
    seconds: Array
    plain_seconds: Array
    draft_seconds: Array
    verify_seconds: Array


def tally(prompts: Sequence[Rows], positions: int) -> Tally:
    """The sums of each prompt's rounds, whatever number of rows (turns) it has; `positions` is
    the longest proposal, K.
    """
    return _stacked([reduce(_added, (_of_row(row, positions) for row in rows)) for rows in prompts])


def clock(groups: Sequence[Rows]) -> Clock:
    """The sums of each group of prompts that was decoded together."""
    columns = (
        "num_tokens",
        "plain_tokens",
        "seconds",
        "plain_seconds",
        "draft_seconds",
        "verify_seconds",
    )
    return Clock(
        *np.array(
            [[sum(row[name] for row in rows) for rows in groups] for name in columns],
            dtype=np.float64,
        )
    )


def longest_proposal(rows: Rows) -> int:
    return max((proposed for row in rows for proposed in row["proposed"]), default=0)


def acceptance_length(sums: Tally) -> Array:
    """Committed tokens per round, the target's bonus token included, over all rounds of all
    prompts (the paper's tau).
    """
    return ratio(sums.committed, sums.rounds)


def prefix_acceptance(sums: Tally) -> Array:
    """At k: rounds whose first k draft tokens were all accepted / rounds that proposed at least
    k.
    """
    return ratio(sums.accepted, sums.reached)


def conditional_acceptance(sums: Tally) -> Array:
    """At k: of the rounds that accepted the first k - 1 and proposed a k-th, those that accepted it
    (the paper's Figure 2).

    Tokens behind an accepted stop token were dropped: such a round tried the next position, and did
    not accept it.
    """
    return ratio(sums.accepted, sums.tried)


def verify_rate(sums: Tally) -> Array:
    """Committed tokens / (proposed tokens + rounds): the share of verified positions that were
    of use.
    """
    return ratio(sums.committed, sums.proposed + sums.rounds)


def tokens_per_s(times: Clock) -> Array:
    return ratio(times.tokens, times.seconds)


def plain_tokens_per_s(times: Clock) -> Array:
    return ratio(times.plain_tokens, times.plain_seconds)


def speedup(times: Clock) -> Array:
    """Seconds per token of plain decoding / of speculative decoding: at a temperature the two
    answers differ in length.
    """
    return ratio(tokens_per_s(times), plain_tokens_per_s(times))


def ratio(above: Array, below: Array) -> Array:
    """The quotient; not a number where there is nothing to divide by."""
    return np.divide(
        above,
        below,
        out=np.full(np.broadcast(above, below).shape, np.nan),
        where=np.asarray(below) != 0,
    )


def _of_row(row: Mapping[str, Any], positions: int) -> Tally:
    proposed, accepted = (
        np.asarray(row[name], dtype=np.int64)[:, None] for name in ("proposed", "accepted")
    )
    k = np.arange(1, positions + 1)
    reached = proposed >= k
    counts = (
        len(proposed),
        sum(row["committed"]),
        proposed.sum(),
        reached.sum(0),
        (reached & (accepted >= k - 1)).sum(0),
    )
    return Tally(
        *(
            np.asarray(count, dtype=np.float64)
            for count in (*counts, (reached & (accepted >= k)).sum(0))
        )
    )


def _added(one: Tally, other: Tally) -> Tally:
    return Tally(*map(add, one, other))


def _stacked(parts: Sequence[Tally]) -> Tally:
    return Tally(*map(np.stack, zip(*parts, strict=True)))
