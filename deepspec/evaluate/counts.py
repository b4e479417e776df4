"""Metrics from raw counts, as defined in the project's algorithms page, and their intervals by the
bootstrap.

Counts are kept as sums, so that any set of units (prompts, or groups decoded together: those of a
benchmark, of a domain, of a resample) is a weighted sum of theirs, divided once. For an interval,
units are drawn again with replacement, each benchmark by itself, so that the mix of benchmarks
stays what it is; pooled and averaged numbers follow from the same resamples.

R resamples, U units, K positions of a block.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from deepspec.artifacts.results import Interval

Array = NDArray[np.float64]
Rows = Sequence[Mapping[str, Any]]
RESAMPLES = 1000
LEVEL = 0.95


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


def drawn_by(rows: Rows) -> Literal["prompt", "group"]:
    """What of these rows is drawn for an interval of acceptance: prompts, with all their turns, or
    groups where a server counted the rounds of a group together.
    """
    counted_together = any("request_seconds" in row and row["batch_size"] > 1 for row in rows)
    return "group" if counted_together else "prompt"


def ratio(above: Array, below: Array) -> Array:
    """The quotient; NaN where the divisor is 0."""
    unknown = np.full(np.broadcast(above, below).shape, np.nan)
    return np.divide(above, below, out=unknown, where=np.asarray(below) != 0)


class Resampled(NamedTuple):
    """The sums of some units: of all of them, and of every resample."""

    num_units: int
    varies: bool  # False where every resample is the whole: one unit does not show how units differ
    sums: Sums  # each [1 + R, ...], of all units first

    def interval(self, values: Array) -> Interval | None:
        """The interval of a measure [1 + R]; None where the resamples do not show one."""
        return interval(values) if self.varies else None


def resample(units: Sums, *, key: Hashable) -> Resampled:
    """Resample sums [U, ...]; equal keys draw the same units."""
    num_units = len(units.rounds)
    drawn = weights(num_units, key=key)
    sums = Sums(*(np.concatenate([part.sum(axis=0)[None], drawn @ part]) for part in units))
    return Resampled(num_units, num_units > 1, sums)


def pool(parts: Sequence[Resampled]) -> Resampled:
    """Several benchmarks as one: totals are added, and so are equal resamples."""
    return Resampled(
        sum(part.num_units for part in parts),
        any(part.varies for part in parts),
        Sums(*(np.asarray(sum(same)) for same in zip(*(part.sums for part in parts), strict=True))),
    )


def weights(num_units: int, *, key: Hashable) -> Array:
    """How often each unit is drawn in each resample [R, U]; the same wherever the key is equal."""
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(repr(key).encode()))
    drawn = rng.integers(0, num_units, (RESAMPLES, num_units))
    # Resample r counts in bins of its own, so that one bincount does all of them.
    bins = drawn + num_units * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(bins.ravel(), minlength=bins.size)
    return counts.reshape(bins.shape).astype(np.float64)


def mean_of(values: Sequence[Array]) -> Array:
    """The mean of the benchmarks' measures, each [1 + R]; one without any number does not count."""
    known = [value for value in values if not np.isnan(value).all()]
    return np.asarray(np.mean(known or values, axis=0))


def number(values: Array) -> Any:
    """A measure [1 + R, ...] of all units, as a float or a list of them.

    0 where nothing was decoded: the counts alongside it tell that apart.
    """
    return np.nan_to_num(values[0]).tolist()


def interval(values: Array) -> Interval | None:
    """The middle 95 % of what the resamples gave, of a measure [1 + R]; None where none of them
    gave a number.
    """
    known = values[1:][~np.isnan(values[1:])]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(shares: Array) -> list[Interval | None]:
    """The same for the share at each position [1 + R, K]; None too where all resamples agree.

    They can only repeat what was seen: of one round, or of rounds that all went the same way, they
    would claim to be certain.
    """
    found = [interval(column) for column in shares.T]
    return [known if known and known[0] < known[1] else None for known in found]


def quantile(values: Sequence[float], share: float) -> float | None:
    """The least of `values` that at least this share of them does not exceed; None of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None
