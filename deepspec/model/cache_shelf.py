"""Caches for decoding: on a GPU of fixed size, with graphs, and lent again to a batch that fits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from deepspec.model.graphs import GraphMemory
from deepspec.model.kv_cache import GROWTH
from deepspec.model.row_cache import RowCache

Cache = TypeVar("Cache", bound=RowCache)
Make = Callable[[int, int], Cache]  # for so many rows of so many positions


class _Kept(NamedTuple):
    rows: int
    capacity: int
    cache: RowCache


class CacheShelf:
    """The caches of a target and its draft; without graphs each is made anew."""

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        self._memory = GraphMemory(device) if graphs else None
        self._kept: dict[Make[RowCache], _Kept] = {}

    def turn_off_graphs(self) -> None:
        """Have caches that grow, and steps that are launched kernel by kernel."""
        self.release()
        self._memory = None

    def make(self, make: Make[Cache], rows: int, capacity: int) -> Cache:
        """A new cache, with graphs where there are any."""
        cache = make(rows, capacity)
        if self._memory is not None:
            cache.use_graphs(self._memory)
        return cache

    @contextmanager
    def lend(self, make: Make[Cache], rows: int, capacity: int) -> Iterator[Cache]:
        """An empty cache; the one that `make` made before, with its graphs, where it fits."""
        if self._memory is None:
            yield make(rows, capacity)
            return
        kept = self._kept.pop(make, None)
        if kept is None or kept.rows != rows or kept.capacity < capacity:
            kept = None  # its memory is free before more is taken
            capacity = -(-capacity // GROWTH) * GROWTH
            kept = _Kept(rows, capacity, self.make(make, rows, capacity))
        kept.cache.restore()
        yield kept.cache  # type: ignore[misc]  # what this `make` makes
        self._kept[make] = kept  # not after an error: memory may have run out

    def release(self) -> None:
        """Give all caches that are kept back to the device's memory."""
        self._kept.clear()
        if self._memory is not None:
            self._memory.clear()
