"""What a run takes, before it starts: tokens, requests, FLOPs, and whether the store can hold it.

Pure arithmetic on numbers that were read or measured elsewhere (`workload.py`, `measure.py`); each
number carries where it comes from. All units are decimal.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepspec.errors import StoreError
from deepspec.formatting import human_bytes
from deepspec.storage.s3_client import part_bytes
from deepspec.storage.store import Store

MAX_SHARD_BYTES, MIN_SHARD_BYTES, GOOD_SHARD_BYTES = 4.5e9, 64e6, 2e9
HISTOGRAM_BINS = 32


class Number(NamedTuple):
    """A value and how it is known: exact, from a sample, measured here, or assumed."""

    value: float
    origin: str


class TokenCounts(NamedTuple):
    """Of all samples together; `kept_last` positions keep their final hidden state."""

    samples: float
    tokens: float
    supervised: float
    kept_last: float

    def scaled(self, factor: float) -> "TokenCounts":
        """The counts of so many times the samples."""
        return TokenCounts(*(factor * count for count in self))


class Shape(NamedTuple):
    """What of a target decides the size of its cache."""

    num_captured: int
    width: int
    vocab_size: int


class Histogram(NamedTuple):
    """Lengths of samples, in tokens."""

    p5: int
    p50: int
    p95: int
    max: int
    bins: tuple[int, ...]  # of equal width from 0 to max


class Fit(NamedTuple):
    """What must still be written, and the room for it; None is a store without a known limit."""

    needed_bytes: float
    free_bytes: float | None
    reserve_bytes: float

    @property
    def fits(self) -> bool:
        """Whether the reserve is still free afterwards."""
        return self.free_bytes is None or self.needed_bytes + self.reserve_bytes <= self.free_bytes


def histogram(lengths: Sequence[int]) -> Histogram:
    """Quantiles of the lengths (none: all zeros) and their distribution."""
    longest = max(lengths, default=0)
    bins, _ = np.histogram(lengths, HISTOGRAM_BINS, (0, max(longest, 1)))
    quantiles = np.quantile(lengths or [0], (0.05, 0.5, 0.95), method="higher")
    p5, p50, p95 = map(int, quantiles)
    return Histogram(p5, p50, p95, longest, tuple(map(int, bins)))


def relative_error(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a sum scaled from this sample, relative to it."""
    if len(values) < 2 or not any(values):
        return 0.0
    return float(1.96 * np.std(values, ddof=1) / math.sqrt(len(values)) / np.mean(values))


def puts_per_file(num_bytes: float) -> int:
    """Requests that upload one file: one, or its parts and two that open and complete them."""
    parts = math.ceil(num_bytes / part_bytes(math.ceil(num_bytes)))
    return 1 if parts <= 1 else parts + 2


def put_requests(num_shards: int, *, shard_bytes: float, frozen_bytes: float) -> int:
    """Requests that write a cache: per shard its data, its index rows and its record."""
    # once: artifact.json, schema, the target's config, index, manifest
    once = puts_per_file(frozen_bytes) + 5
    return num_shards * (puts_per_file(shard_bytes) + 2) + once


def training_flops(
    counts: TokenCounts, shape: Shape, *, trainable: int, slots: float, positions: float
) -> float:
    """FLOPs of one pass: 6 per trainable parameter and position, and per lm_head weight and slot.

    Rather too many: context tokens go through only a part of a block draft. The lm_head is frozen:
    two for the draft's forward pass, two back to its input, two for the target's own distribution.
    """
    return 6.0 * (trainable * positions + shape.vocab_size * shape.width * slots) * counts.samples


def shard_notes(num_shards: int, *, shard_bytes: float, shard_rows: int) -> list[str]:
    """Advice where shards are too large for one upload, or so small that requests dominate."""
    rows = max(1, int(shard_rows * GOOD_SHARD_BYTES / max(shard_bytes, 1)))
    rows -= rows % 8 if rows >= 8 else 0
    size, advice = human_bytes(shard_bytes), f"set prompts.shard_rows to about {rows}"
    if shard_bytes > MAX_SHARD_BYTES:
        return [f"a shard takes {size}, too much for one upload and one spool disk; {advice}"]
    if shard_bytes < MIN_SHARD_BYTES and num_shards * shard_bytes > GOOD_SHARD_BYTES:
        return [f"a shard takes only {size}: {advice} for fewer files and requests"]
    return []


def room(num_bytes: float, store: Store, *, min_free_gb: float) -> Fit:
    """Whether so many bytes fit into a store.

    Raises:
        StoreError: nothing can be written there.
    """
    store.check_writable()
    # a bucket has no end; its spool disk holds a few shards at a time
    free = store.free_bytes() if store.is_local else None
    return Fit(num_bytes, free, min_free_gb * 1e9)


def require_fit(fit: Fit, *, where: str, fix: str) -> None:
    """Raise the StoreError of a cache that does not fit."""
    if fit.fits or fit.free_bytes is None:
        return
    raise StoreError(
        f"the hidden states need {human_bytes(fit.needed_bytes)} and resources.storage.min_free_gb "
        f"keeps {human_bytes(fit.reserve_bytes)}, but {human_bytes(fit.free_bytes)} are free",
        where=where,
        fix=fix,
    )
