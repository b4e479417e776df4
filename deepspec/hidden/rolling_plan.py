"""Which shards a rolling training has on the disk, from its order and the place it has reached.

Of the windows from that place on, they are as many shards as fit. So a start after a crash, or with
shards left by another training, needs no rule of its own.
"""

from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from deepspec.cache.format import Layout
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.sample_order import Window
from deepspec.cache.source import SampleRange

# On top of its samples: the schema twice and the list of messages.
SHARD_BYTES = 1 << 16


class RollingPlan(NamedTuple):
    """The shards that training needs, in the order in which it does."""

    samples: SampleRange
    most_bytes: Mapping[int, int]  # of each shard
    max_bytes: int  # of all shards together

    def window_end(self, place: int) -> int:
        """Where the window that `place` is in ends: until then the same shards are needed."""
        return next(self.samples.order.windows(place)).end

    def needed(self, place: int, sizes: Mapping[int, int]) -> dict[int, None]:
        """The shards to have on the disk when training is at `place`, in the order of their use.

        Args:
            place: A place of the line; at the end of the range nothing is needed.
            sizes: Bytes of those shards that are there; others are taken to be as large as they
                can be.
        """
        found = dict[int, None]()
        total = 0
        if place >= self.samples.end:  # which may lie within a window
            return found
        for window in self._windows(place, self.samples.end):
            for shard in window.shards:
                if shard in found:
                    continue
                total += sizes.get(shard, self.most_bytes[shard])
                if total > self.max_bytes:
                    return found
                found[shard] = None
        return found

    def most_bytes_of_a_step(self) -> int:
        """Bytes that the windows of any one step take together at most."""
        step, end = self.samples.step_samples, self.samples.end
        most = 0
        for window in self._windows(self.samples.start, end):
            step_end = min(end, -(-window.end // step) * step)
            shards = {
                shard for other in self._windows(window.start, step_end) for shard in other.shards
            }
            most = max(most, sum(self.most_bytes[shard] for shard in shards))
        return most

    def _windows(self, place: int, end: int) -> Iterator[Window]:
        return takewhile(lambda window: window.start < end, self.samples.order.windows(place))


def shard_bytes(index: ExpectedIndex, layout: Layout) -> dict[int, int]:
    """Bytes that each shard takes at most, with its index rows."""
    sizes = layout.most_bytes(index.num_tokens.astype(np.int64), index.num_last.astype(np.int64))
    totals = np.bincount(index.shard, weights=sizes)
    return {shard: int(totals[shard]) + SHARD_BYTES for shard in np.unique(index.shard).tolist()}
