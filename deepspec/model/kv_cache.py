"""Keys and values of attention layers, preallocated, with rows of different lengths.

Taking tokens of a row back is lowering its length: what the row holds after its end is overwritten
by the next write. B rows, n new positions, H key-value heads, E head dimension.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from deepspec.errors import DeepSpecError


class LayerCache:
    """Room for `capacity` positions in each row; memory is taken at the first write."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        # [B, H, capacity, E] each
        self.pair: tuple[Tensor, Tensor] | None = None

    def write(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put row b's `keys` and `values` [B, H, n, E] at its positions from lengths[b] on.

        Returns:
            views of all keys and values up to the end of the longest row [B, H, max(lengths) + n,
            E]; what a row holds after its own end is finite, and for the caller to mask.

        Raises:
            DeepSpecError: the longest row does not fit.
        """
        start, num_new = lengths[0], keys.shape[2]
        end = max(lengths) + num_new
        if end > self.capacity:
            raise DeepSpecError(
                f"a row of {end} positions does not fit a cache of {self.capacity}",
                fix="allocate a cache as long as prompt, answer and one block together",
            )
        for stored, new in zip(self._allocated(keys, values), (keys, values), strict=True):
            # no index tensors where rows are alike: a decode round at batch 1 is all overhead
            if min(lengths) == max(lengths):
                stored[:, :, start:end] = new
            else:
                rows, positions = _places(tuple(lengths), num_new, new.device)
                stored[rows, :, positions] = new.transpose(1, 2)
        return self.read(end)

    def read(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Views of the first `num_positions` keys and values of every row.

        Raises:
            DeepSpecError: nothing has been written yet.
        """
        if self.pair is None:
            raise DeepSpecError("nothing has been written to this cache", fix="prefill it first")
        keys, values = self.pair
        return keys[:, :, :num_positions], values[:, :, :num_positions]

    def put(self, rows: Sequence[int], fresh: "LayerCache", num_positions: int) -> None:
        """Copy the first `num_positions` of all rows of another cache into these rows."""
        if fresh.pair is None:
            return
        for stored, new in zip(self._allocated(*fresh.pair), fresh.pair, strict=True):
            stored[rows, :, :num_positions] = new[:, :, :num_positions]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.rows = len(rows)
        if self.pair is not None:
            keys, values = self.pair
            self.pair = keys[rows], values[rows]

    def _allocated(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of all rows, of the type of these where there are none yet."""
        if self.pair is None:
            # Zeros: a masked slot's weight is 0, and 0 times uninitialised memory may be NaN.
            shape = (self.rows, keys.shape[1], self.capacity)
            self.pair = (
                keys.new_zeros(*shape, keys.shape[3]),
                values.new_zeros(*shape, values.shape[3]),
            )
        return self.pair


class RowCache:
    """The caches of all layers, with one length per row."""

    def __init__(self, num_layers: int, rows: int, capacity: int) -> None:
        self.layers = [LayerCache(rows, capacity) for _ in range(num_layers)]
        self.lengths = [0] * rows

    def put(self, rows: Sequence[int], fresh: Self) -> None:
        """Give these rows to other sequences, prefilled in a cache of their own."""
        for layer, of_fresh in zip(self.layers, fresh.layers, strict=True):
            layer.put(rows, of_fresh, max(fresh.lengths))
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def reset(self) -> None:
        """Empty all rows."""
        self.lengths = [0] * len(self.lengths)


@lru_cache(maxsize=8)  # all layers of a round write to the same places
def _places(lengths: tuple[int, ...], num_new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(lengths), device=device)[:, None]
    starts = torch.tensor(lengths, device=device)[:, None]
    return rows, starts + torch.arange(num_new, device=device)
