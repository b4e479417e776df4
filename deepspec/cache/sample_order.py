"""The order in which training sees a cache: a function of (seed, epoch) alone, so any number of
ranks can share it.

A global random order over tens of terabytes would touch every shard all the time; no local cache
and no disk likes that. So the shards are shuffled, a window of them at a time is taken, and the
samples of the window are shuffled together. A window may be passed several times in a row, each
time in another order, so that its shards are needed once in as many epochs. Only the windows that
are looked at are ever computed: an epoch of 1.3 million samples costs nothing to enter.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Shards that are needed together, from the place `start` of the line until `end`."""

    start: int
    end: int
    shards: tuple[int, ...]


class WindowedOrder:
    """Sample numbers of every epoch. `numbers` [n] are those to train on, ascending; `shards` [n]
    the shard of each.

    `passes` epochs in a row are one round through the shards: each window is passed so many times
    before the next one comes.
    """

    def __init__(
        self,
        numbers: np.ndarray,
        shards: np.ndarray,
        *,
        window_shards: int,
        seed: int,
        passes: int = 1,
    ) -> None:
        self.seed, self.window_shards, self.passes = seed, window_shards, passes
        self.num_samples = len(numbers)
        # An index is ordered by shard, so the samples of a shard lie together: one slice each.
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        self._groups = np.split(numbers, starts[1:])
        self._shards = shards[starts]
        self._sizes = np.diff(starts, append=len(shards))
        self._epoch = lru_cache(maxsize=2)(self._shuffled_shards)
        self._window = lru_cache(maxsize=2)(self._shuffled_window)

    def at(self, place: int) -> tuple[int, int]:
        """(epoch, sample number) at a place of the line on which all epochs lie one behind the
        other.
        """
        around, within = divmod(place, self.num_samples * self.passes)
        first = around * self.passes
        _, ends = self._epoch(first)
        window = int(np.searchsorted(ends * self.passes, within, side="right"))
        start, end = (int(ends[window - 1]) if window else 0), int(ends[window])
        again, inside = divmod(within - start * self.passes, end - start)
        return first + again, int(self._window(first + again, window)[inside])

    def windows(self, place: int) -> Iterator[Window]:
        """Those of the line without end, from the one that `place` lies in."""
        line = self.num_samples * self.passes
        for around in count(place // line):
            windows, ends = self._epoch(around * self.passes)
            start = around * line
            for groups, end in zip(windows, start + ends * self.passes, strict=True):
                if end > place:
                    yield Window(start, int(end), tuple(self._shards[groups].tolist()))
                start = int(end)

    def _shuffled_shards(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The windows of shards of the epochs from this one on, and behind how many samples of
        one of them each window ends.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._groups))
        windows = np.split(order, range(self.window_shards, len(order), self.window_shards))
        return windows, np.cumsum([self._sizes[groups].sum() for groups in windows])

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        windows, _ = self._epoch(epoch - epoch % self.passes)
        samples = np.concatenate([self._groups[group] for group in windows[window]])
        return np.random.default_rng([self.seed, epoch, window]).permutation(samples)
