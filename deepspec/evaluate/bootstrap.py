"""Intervals by the bootstrap: units (prompts, or groups decoded together) are drawn again with
replacement.

Each benchmark is resampled by itself, so that the mix of benchmarks stays what it is; pooled and
averaged numbers follow from the same resamples. R resamples, U units, K positions of a block.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import xxhash

from deepspec.artifacts.results import Interval
from deepspec.evaluate.counts import Array, Clock, Tally

RESAMPLES = 1000
LEVEL = 0.95
SumsT = TypeVar("SumsT", Tally, Clock)


@dataclass(frozen=True)
class Resampled(Generic[SumsT]):
    """The sums of some units: of all of them, and of every resample."""

    num_units: int
    varies: bool  # False where every resample is the whole: one unit does not show how units differ
    total: SumsT
    drawn: SumsT  # each [R, ...]

    def interval(self, measure: Callable[[SumsT], Array]) -> Interval | None:
        """The interval of a number; None where the resamples do not show one."""
        return interval(measure(self.drawn)) if self.varies else None


def resample(units: SumsT, *, key: Hashable) -> Resampled[SumsT]:
    """Resample sums [U, ...]; equal keys draw the same units."""
    kind, num_units = type(units), len(units[0])
    drawn = weights(num_units, key=key)
    total = kind(*(part.sum(axis=0) for part in units))
    return Resampled(num_units, num_units > 1, total, kind(*(drawn @ part for part in units)))


def pool(parts: Sequence[Resampled[SumsT]]) -> Resampled[SumsT]:
    """Several benchmarks as one: totals are added, and so are equal resamples."""
    return Resampled(
        sum(part.num_units for part in parts),
        any(part.varies for part in parts),
        _added([part.total for part in parts]),
        _added([part.drawn for part in parts]),
    )


def _added(parts: Sequence[SumsT]) -> SumsT:
    return type(parts[0])(*(np.asarray(sum(same)) for same in zip(*parts, strict=True)))


def weights(num_units: int, *, key: Hashable, resamples: int = RESAMPLES) -> Array:
    """How often each unit is drawn in each resample [R, U]; the same wherever the key is equal."""
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(repr(key).encode()))
    drawn = rng.integers(0, num_units, (resamples, num_units))
    # Resample r counts in bins of its own, so that one bincount does all of them.
    bins = drawn + num_units * np.arange(resamples)[:, None]
    counts = np.bincount(bins.ravel(), minlength=bins.size)
    return counts.reshape(bins.shape).astype(np.float64)


def mean_of(values: Iterable[Array]) -> Array:
    """The mean of the benchmarks' values, resample by resample; one without any does not count."""
    known = [value for value in values if not np.isnan(value).all()]
    return np.asarray(sum(known) / len(known)) if known else np.asarray(np.nan)


def interval(values: Array) -> Interval | None:
    """The middle 95 % of what the resamples gave; None where none of them gave a number."""
    known = np.atleast_1d(values)[~np.isnan(np.atleast_1d(values))]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(shares: Array) -> list[Interval | None]:
    """The same for the share at each position [R, K]; None too where all resamples agree.

    They can only repeat what was seen: of one round, or of rounds that all went the same way, they
    would claim to be certain.
    """
    found = [interval(column) for column in shares.T]
    return [known if known and known[0] < known[1] else None for known in found]
