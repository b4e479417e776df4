"""The target's key-value cache: each row has a length, so that rejected tokens can be taken back.

B rows, q new tokens of each row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepspec.model.kv_cache import LayerCache, RowCache


class TargetCache(RowCache):
    """Takes the place of transformers' Cache, of which attention layers call only `update`."""

    def __init__(self, layers: Sequence[LayerCache], capacity: int, device: torch.device) -> None:
        super().__init__(layers, layers[0].rows if layers else 0)
        self.capacity = capacity
        # row t sees keys 0 to t
        self.causal = torch.ones(capacity, capacity, dtype=torch.bool, device=device).tril()
        self.positions = torch.arange(capacity, device=device)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, q, E] of a layer; returns all of that layer's."""
        return self.layers[layer_idx].write(keys, values, self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest row (part of transformers' interface)."""
        return max(self.lengths)

    def step(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions and visible keys of the next `num_tokens` tokens of each row.

        Returns:
            positions [B, q] (or [1, q] where all rows are equally long) and the mask
            [B, 1, q, longest row + q], bool.
        """
        end = max(self.lengths) + num_tokens
        if min(self.lengths) + num_tokens == end:
            new = slice(end - num_tokens, end)
            return self.positions[new][None], self.causal[new, :end][None, None]
        starts = torch.tensor(self.lengths, device=self.positions.device)
        positions = starts[:, None] + self.positions[:num_tokens]
        return positions, self.causal[positions][:, None, :, :end]
