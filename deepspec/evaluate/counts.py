"""Metrics from raw counts, as defined in the project's algorithms page.

Counts are kept as sums, so that any set of prompts (a benchmark, a domain, a bootstrap resample) is
a weighted sum of theirs, divided once. U units (prompts or groups of them), K positions of a block.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]


class Sums(NamedTuple):
    """Sums over rounds and rows: one set of them (no leading axis), or one per unit or resample."""

    rounds: Array  # [U]
    committed: Array  # [U] bonus included; a round that ended on an accepted stop token has none
    proposed: Array  # [U]
    reached: Array  # [U, K] rounds that proposed at least k
    tried: Array  # [U, K] of those, the ones that had accepted the k - 1 before it
    accepted: Array  # [U, K] rounds whose first k were all accepted
    num_tokens: Array  # [U] of speculative decoding, as the three kinds of seconds without a prefix
    plain_tokens: Array  # [U]
    seconds: Array  # [U]
    plain_seconds: Array  # [U]
    draft_seconds: Array  # [U]
    verify_seconds: Array  # [U]

    def acceptance_length(self) -> Array:
        """Committed tokens per round, the target's bonus token included (the paper's tau)."""
        return ratio(self.committed, self.rounds)

    def prefix_acceptance(self) -> Array:
        """At k: rounds whose first k tokens were all accepted / rounds that proposed at least k."""
        return ratio(self.accepted, self.reached)

    def conditional_acceptance(self) -> Array:
        """At k: of the rounds that accepted the first k - 1 and proposed a k-th, those that
        accepted it (the paper's Figure 2).

        Tokens after an accepted stop token were dropped: such a round tried the next position, and
        did not accept it.
        """
        return ratio(self.accepted, self.tried)

    def verify_rate(self) -> Array:
        """Committed tokens / (proposed tokens + rounds): the useful share of verified positions."""
        return ratio(self.committed, self.proposed + self.rounds)

    def tokens_per_s(self) -> Array:
        """New tokens per second of speculative decoding."""
        return ratio(self.num_tokens, self.seconds)

    def plain_tokens_per_s(self) -> Array:
        """New tokens per second of plain decoding."""
        return ratio(self.plain_tokens, self.plain_seconds)

    def speedup(self) -> Array:
        """Seconds per token of plain decoding / of speculative decoding.

        Per token, because at a temperature above 0 the two answers differ in length.
        """
        return ratio(self.tokens_per_s(), self.plain_tokens_per_s())


def add_up(units: Iterable[Rows], positions: int = 0) -> Sums:
    """The sums of each unit's rows: a prompt's turns, or the prompts that were decoded together.

    `positions` is the longest proposal, K; 0 where no measure at a position is wanted.
    """
    return Sums(*map(np.stack, zip(*(_of_unit(rows, positions) for rows in units), strict=True)))


def _of_unit(rows: Rows, positions: int) -> Sums:
    proposed, accepted, committed = (
        np.array([count for row in rows for count in row[name]], dtype=np.float64)
        for name in ("proposed", "accepted", "committed")
    )
    k = np.arange(1, positions + 1)
    reached = proposed[:, None] >= k
    tried = reached & (accepted[:, None] >= k - 1)
    kept = reached & (accepted[:, None] >= k)
    columns = Sums._fields[6:]  # the others are those of the rows, from num_tokens on
    return Sums(
        np.asarray(float(len(proposed))),
        committed.sum(),
        proposed.sum(),
        *(rounds.sum(axis=0, dtype=np.float64) for rounds in (reached, tried, kept)),
        *np.array([[row[name] for name in columns] for row in rows], dtype=np.float64).sum(axis=0),
    )


def ratio(above: Array, below: Array) -> Array:
    """The quotient; NaN where the divisor is 0."""
    unknown = np.full(np.broadcast(above, below).shape, np.nan)
    return np.divide(above, below, out=unknown, where=np.asarray(below) != 0)
