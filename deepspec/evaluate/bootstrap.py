"""Intervals by the bootstrap: units (prompts, or groups decoded together) are drawn again with
replacement.

Each benchmark is resampled by itself, so that the mix of benchmarks stays what it is; pooled and
averaged numbers follow from the same resamples. R resamples, U units, K positions of a block.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from deepspec.artifacts.results import Interval
from deepspec.evaluate.counts import Array, Sums

RESAMPLES = 1000
LEVEL = 0.95


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
