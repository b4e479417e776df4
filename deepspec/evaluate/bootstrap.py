"""Intervals by the bootstrap: what was drawn (prompts, or groups that were decoded together) is
drawn again, with replacement.

Each benchmark is resampled by itself, so that the mix of benchmarks stays what it is; pooled and
averaged numbers follow from the same resamples. R resamples, P prompts or groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import numpy as np
import xxhash

from deepspec.evaluate.counts import Array, Clock, Tally

RESAMPLES = 1000
LEVEL = 0.95
SumsT = TypeVar("SumsT", Tally, Clock)


def weights(num_units: int, *, key: Hashable, resamples: int = RESAMPLES) -> Array:
    """How often each unit was drawn in each resample [R, P]; the same for equal keys, whoever
    asks.
    """
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(repr(key).encode()))
    drawn = (
        rng.integers(0, num_units, (resamples, num_units))
        + num_units * np.arange(resamples)[:, None]
    )
    return (
        np.bincount(drawn.ravel(), minlength=resamples * num_units)
        .reshape(resamples, num_units)
        .astype(np.float64)
    )


def resampled(sums: SumsT, drawn: Array) -> SumsT:
    """The sums of every resample: [P, ...] becomes [R, ...]."""
    return type(sums)(*(drawn @ part for part in sums))


def total(sums: SumsT) -> SumsT:
    """Over the leading axis: all prompts, or all groups, together."""
    return type(sums)(*(part.sum(axis=0) for part in sums))


def pooled(parts: Iterable[SumsT]) -> SumsT:
    """Several benchmarks as one: equal resamples (or totals) are added."""
    found = list(parts)
    return type(found[0])(*(sum(columns) for columns in zip(*found, strict=True)))


def interval(values: Array) -> list[float] | None:
    """The middle 95 % of what the resamples gave; None where none of them gave a number."""
    known = np.atleast_1d(values)[~np.isnan(np.atleast_1d(values))]
    return (
        [float(edge) for edge in np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
        if len(known)
        else None
    )


def intervals(shares: Array) -> list[list[float] | None]:
    """The same for the share at each position: [R, K]; None too where all resamples agree.

    They can only repeat what was seen: of one round, or of rounds that all went the same way, they
    would claim to be certain.
    """
    found = [interval(column) for column in shares.T]
    return [known if known and known[0] < known[1] else None for known in found]
