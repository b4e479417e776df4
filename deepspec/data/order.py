"""The order in which training sees a cache: a function of (seed, epoch) alone, so any number of ranks can share it.

A global random order over tens of terabytes would touch every shard all the time; no local cache and no disk likes that.
So the shards are shuffled, a window of them at a time is taken, and the samples of the window are shuffled together.
Only the windows that are looked at are ever computed: an epoch of 1.3 million samples costs nothing to enter.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class WindowedOrder:
    """Sample numbers of every epoch. `numbers` [n] are those to train on, ascending; `shards` [n] the shard of each."""

    def __init__(self, numbers: np.ndarray, shards: np.ndarray, *, window_shards: int, seed: int) -> None:
        self.seed, self.window_shards = seed, window_shards
        self.num_samples = len(numbers)
        # An index is ordered by shard, so the samples of a shard lie together: one slice each.
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        self._groups = np.split(numbers, starts[1:])
        self._sizes = np.diff(starts, append=len(shards))
        self._epoch = lru_cache(maxsize=2)(self._shuffled_shards)
        self._window = lru_cache(maxsize=2)(self._shuffled_window)

    def at(self, place: int) -> tuple[int, int]:
        """(epoch, sample number) at a place of the line on which all epochs lie one behind the other."""
        epoch, within = divmod(place, self.num_samples)
        _, ends = self._epoch(epoch)
        window = int(np.searchsorted(ends, within, side="right"))
        start = int(ends[window - 1]) if window else 0
        return epoch, int(self._window(epoch, window)[within - start])

    def _shuffled_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and behind how many samples each window ends."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._groups))
        ends = np.cumsum(self._sizes[order])
        last = np.minimum(np.arange(self.window_shards, len(order) + self.window_shards, self.window_shards), len(order)) - 1
        return order, ends[last]

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._epoch(epoch)
        chosen = order[window * self.window_shards : (window + 1) * self.window_shards]
        samples = np.concatenate([self._groups[group] for group in chosen])
        return np.random.default_rng([self.seed, epoch, window]).permutation(samples)
