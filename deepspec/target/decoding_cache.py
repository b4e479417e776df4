"""The cache of a target that decodes: transformers' Cache as its layers and its masks use it.

B rows of a batch, q new tokens of each row, K keys that a layer reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from deepspec.model.host_copy import row_starts
from deepspec.model.kv_cache import latest_positions
from deepspec.model.row_cache import RowCache
from deepspec.target.attention import KeyMask


class TargetCache(RowCache):
    """Takes the place of transformers' Cache, of which attention layers call only `update`.

    Each row has a length of its own, so that rejected tokens can be taken back. The model's own
    code asks for the mask of each kind of layer; `key_mask` makes it.
    """

    def __init__(
        self, windows: Sequence[int], rows: int, capacity: int, device: torch.device
    ) -> None:
        super().__init__(windows, rows, capacity)
        self.positions = torch.arange(capacity, device=device)
        self._step = self.positions[None], self.positions[None, None, None] >= 0
        # of the step under way, by the kind of layer
        self._masks: dict[tuple[int | None, bool], KeyMask] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that keys and values take so far."""
        pairs = [layer.pair for layer in self.layers if layer.pair]
        return sum(part.nbytes for pair in pairs for part in pair)

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, q, E] of a layer; returns all of that layer's."""
        return self.write(self.layers[layer_idx], keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The length of the longest row (part of transformers' interface)."""
        return max(self.lengths)

    def get_query_offset(self, layer_idx: int = 0) -> Self:
        """The cache, since rows have lengths of their own (part of transformers' interface, which
        gives it to the function that makes masks).
        """
        return self

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys of the longest row, and where they start (part of transformers' interface)."""
        return self.end(query_length), 0

    def step(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Positions of the next `num_tokens` tokens of each row, and the keys that they see.

        Returns:
            positions [B, q] (or [1, q] where all rows are equally long) and the mask
            [B, 1, q, longest row + q], bool, in a graph of its extent.
        """
        end = self.end(num_tokens)
        if self.device_step is not None:
            positions = self.device_step.starts + self.positions[:num_tokens]
        elif min(self.lengths) + num_tokens == end:
            positions = self.positions[None, end - num_tokens : end]
        else:
            starts = row_starts(tuple(self.lengths), self.positions.device)
            positions = starts + self.positions[:num_tokens]
        self._step = positions, (self.positions[:end] <= positions[:, :, None])[:, None]
        self._masks.clear()
        return self._step

    def key_mask(
        self,
        mask_function: Callable[..., Tensor],
        *,
        local_size: int | None,
        is_sliding: bool,
        is_causal: bool,
    ) -> KeyMask:
        """The keys that the tokens of the last `step` see in one kind of layer, made once a step.

        `mask_function` is transformers': of row, head, query and key it returns whether the query
        sees the key. `local_size` is the window, or the chunk, of layers that see no more.
        """
        kind = local_size, is_sliding
        if kind not in self._masks:
            positions, causal = self._step
            if is_causal:
                visible = causal
            elif is_sliding and any(layer.window for layer in self.layers):
                visible = self.window_mask(positions, causal)
            else:
                rows = torch.arange(len(positions), device=positions.device)
                keys = self.positions[: causal.shape[-1]]
                queries = positions[:, None, :, None]
                visible = mask_function(rows[:, None, None, None], rows[:1], queries, keys)
            self._masks[kind] = KeyMask(visible, window=local_size or 0 if is_sliding else 0)
        return self._masks[kind]

    def window_mask(self, positions: Tensor, causal: Tensor) -> Tensor:
        """The keys that `positions`, and `causal`, of `step` see in layers with a window.

        They are [B, 1, q, K], of the K keys that `update` returns there.
        """
        layer = next(layer for layer in self.layers if layer.window)
        num_tokens, end = positions.shape[1], causal.shape[-1]
        slots = layer.slots_after(self.lengths, num_tokens)
        if end <= slots or not max(self.lengths):
            near = self.positions[:end] > positions[:, :, None] - layer.window
            return causal & near[:, None]
        keys = latest_positions(positions[:, -1:] + 1, slots)[:, None]
        distance = positions[:, :, None] - keys
        return ((keys >= 0) & (distance >= 0) & (distance < layer.window))[:, None]
