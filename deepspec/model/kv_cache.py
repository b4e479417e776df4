"""Keys and values of one attention layer, preallocated, with rows of different lengths.

Lengths live with the caller: taking a row back means lowering its length, and what stood behind it
is overwritten. B rows, n new positions, H key-value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from deepspec.errors import DeepSpecError


class LayerCache:
    """Room for `capacity` positions in each of `rows` rows; memory is taken at the first write."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.keys: Tensor | None = None  # [B, H, capacity, E]
        self.values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put row b's `keys` and `values` [B, H, n, E] at its positions lengths[b] .. lengths[b] +
        n - 1.

        Returns:
            views of all keys and values up to the end of the longest row [B, H, max(lengths) + n,
            E]; what a row holds behind its own end is finite, and for the caller to mask.

        Raises:
            DeepSpecError: the longest row does not fit.
        """
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(keys), self._allocate(values)
        start, end = lengths[0], max(lengths) + keys.shape[2]
        if end > self.capacity:
            fix = "ask for a cache as long as prompt, answer and one block together"
            raise DeepSpecError(
                f"a row of {end} positions does not fit a cache of {self.capacity}", fix=fix
            )
        # no index tensors: a decode round at batch 1 is all overhead
        if len(lengths) == 1 or min(lengths) == max(lengths):
            self.keys[:, :, start:end] = keys
            self.values[:, :, start:end] = values
        else:
            rows, positions = _places(tuple(lengths), keys.shape[2], keys.device)
            self.keys[rows, :, positions] = keys.transpose(1, 2)
            self.values[rows, :, positions] = values.transpose(1, 2)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def read(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Views of the first `num_positions` keys and values of every row, once something has
        been written.
        """
        if self.keys is None or self.values is None:
            raise DeepSpecError(
                "nothing has been written to this cache", fix="prefill before drafting"
            )
        return self.keys[:, :, :num_positions], self.values[:, :, :num_positions]

    def put(self, rows: Sequence[int], fresh: LayerCache, num_positions: int) -> None:
        """Take over the first `num_positions` of all rows of another cache into these rows."""
        if fresh.keys is None or fresh.values is None:
            return
        if self.keys is None or self.values is None:
            self.keys, self.values = self._allocate(fresh.keys), self._allocate(fresh.values)
        self.keys[rows, :, :num_positions] = fresh.keys[:, :, :num_positions]
        self.values[rows, :, :num_positions] = fresh.values[:, :, :num_positions]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.rows = len(rows)
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros: a masked slot's weight is 0, and 0 times uninitialised memory may be NaN.
        return torch.zeros(
            self.rows,
            like.shape[1],
            self.capacity,
            like.shape[3],
            dtype=like.dtype,
            device=like.device,
        )


@lru_cache(maxsize=8)  # all layers of a round ask for the same places
def _places(lengths: tuple[int, ...], num_new: int, device: torch.device) -> tuple[Tensor, Tensor]:
    starts = torch.tensor(lengths, device=device)
    return torch.arange(len(lengths), device=device)[:, None], starts[:, None] + torch.arange(
        num_new, device=device
    )
