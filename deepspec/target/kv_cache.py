"""The target's key-value cache: one length per row, so that rejected tokens can be taken back.

B batch, q new tokens of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec.model.kv_cache import LayerCache


class TargetCache:
    """Keys and values of every layer with a length per row; taking a row back is lowering its
    length.

    Stands in for transformers' Cache: the attention layers call nothing but `update`.
    """

    def __init__(self, layers: Sequence[LayerCache], capacity: int, device: torch.device) -> None:
        self.layers, self.capacity = layers, capacity
        self.lengths = [0] * (layers[0].rows if layers else 0)
        # row t sees keys 0..t
        self.causal = torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril()
        self.positions = torch.arange(capacity, device=device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].write(keys, values, self.lengths)

    def put(self, rows: Sequence[int], fresh: TargetCache) -> None:
        """Give these rows to other sequences, prefilled in a cache of their own."""
        for layer, of_fresh in zip(self.layers, fresh.layers, strict=True):
            layer.put(rows, of_fresh, max(fresh.lengths))
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length

    def reset(self) -> None:
        """Forget all rows: what is written next overwrites them."""
        self.lengths = [0] * len(self.lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def step(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions [B, q] of the next `num_tokens` of each row, and which keys they see [B, 1,
        q, longest row + q].
        """
        longest = max(self.lengths) + num_tokens
        if min(self.lengths) + num_tokens == longest:
            start = longest - num_tokens
            return self.positions[start:longest][None], self.causal[start:longest, :longest][
                None, None
            ]
        starts = torch.tensor(self.lengths, device=self.positions.device)
        positions = starts[:, None] + self.positions[:num_tokens]
        return positions, self.causal[positions][:, None, :, :longest]
