"""What every draft is to the training loop and to decoding, and the tensors that pass between them.

B batch (rows), T tokens, S samples, g block size, m captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import LossConfig
from deepspec.model.execution import Execution
from deepspec.model.kv_cache import LayerCache
from deepspec.model.layers import Rotation
from deepspec.model.loss import LossOutput
from deepspec.model.spec import DraftSpec


class TrainBatch(NamedTuple):
    """Samples of one micro-batch, packed one behind the other; behind the last there may be
    fill, which no loss counts.
    """

    input_ids: Tensor  # [T] long
    loss_mask: Tensor  # [T] bool
    lengths: Tensor  # [S] long, tokens of each sample
    context: Tensor  # [T, m * D]
    last_hidden: Tensor  # [T, D] after the target's final norm; zeros where not stored
    seeds: tuple[int, ...]  # of each sample's random choices


class Proposal(NamedTuple):
    tokens: Tensor  # [B, g] long
    # [B, g, V] float32, the very distributions the tokens were drawn from; None at temperature 0
    probs: Tensor | None
    # [B, g] float32 in (0, 1): chance of acceptance, given that all before it are accepted
    confidence: Tensor | None


class DraftCache:
    """A draft's keys and values of the verified tokens, with a length per row.

    Positions behind a row's length hold leftovers, which the next write replaces.
    """

    def __init__(self, layers: Sequence[LayerCache], lengths: list[int], table: Rotation) -> None:
        self.layers, self.lengths, self.table = layers, lengths, table
        self.last_output: Tensor | None = None  # [B, D] Eagle3 goes on from its own last output

    def put(self, rows: Sequence[int], fresh: DraftCache) -> None:
        """Give these rows to other prompts, prefilled in a cache of their own."""
        for layer, of_fresh in zip(self.layers, fresh.layers, strict=True):
            layer.put(rows, of_fresh, max(fresh.lengths))
        for row, length in zip(rows, fresh.lengths, strict=True):
            self.lengths[row] = length
        if self.last_output is not None and fresh.last_output is not None:
            # it may have been made in inference mode, or be somebody's view
            self.last_output = self.last_output.clone()
            self.last_output[rows] = fresh.last_output

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths = [self.lengths[row] for row in rows]
        self.last_output = self.last_output[rows] if self.last_output is not None else None

    def reset(self) -> None:
        """Forget all rows: what is written next overwrites them."""
        self.lengths = [0] * len(self.lengths)

    def rotation(self, num_new: int) -> Rotation:
        """Of the next `num_new` positions of every row: [n, 1, E], or [B, n, 1, E] where rows
        differ in length.
        """
        start = self.lengths[0]
        cos, sin = self.table
        if all(length == start for length in self.lengths):
            return Rotation(cos[start : start + num_new], sin[start : start + num_new])
        places = self._starts(cos.device) + torch.arange(num_new, device=cos.device)
        return Rotation(cos[places], sin[places])

    def mask(self, num_new: int) -> Tensor | None:
        """Which keys a row's new positions see, all of them alike [B, 1, 1, longest + n]; None
        where rows are of one length.
        """
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        device = self.table.cos.device
        return (torch.arange(longest + num_new, device=device) < self._starts(device) + num_new)[
            :, None, None
        ]

    def _starts(self, device: torch.device) -> Tensor:
        return torch.tensor(self.lengths, device=device)[:, None]


class Drafter(Protocol):
    """The protocol that DFlash, DSpark and Eagle3 satisfy."""

    spec: DraftSpec
    execution: Execution

    @property
    def block_size(self) -> int: ...

    @property
    def num_context_features(self) -> int: ...

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each of `LossOutput.numerators`."""
        ...

    def configure_loss(self, settings: LossConfig) -> None: ...

    def plan(self, batch: TrainBatch) -> Any:
        """Everything about a batch's loss that needs no forward pass; random choices follow
        from `batch.seeds`.
        """
        ...

    def denominators(self, plan: Any) -> dict[str, Tensor]:
        """What each of `LossOutput.numerators` is divided by, once summed over the optimizer
        step.
        """
        ...

    def loss(self, batch: TrainBatch, plan: Any) -> LossOutput:
        """Forward pass and loss sums; a batch with nothing to learn from gives zeros that still
        have a graph.
        """
        ...

    def new_cache(self, rows: int, capacity: int) -> DraftCache:
        """Empty cache for rows of at most `capacity` verified tokens; room for a block comes on
        top.
        """
        ...

    def prefill(
        self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """Append the first counts[b] positions of `context` [B, T, m * D] to row b.

        `next_tokens` [B, T] is the token that follows each position; block drafters do not look at
        it.
        """
        ...

    def accept(
        self, cache: DraftCache, context: Tensor, next_tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """The same after a round of verification; what the proposal left behind is overwritten."""
        ...

    def propose(
        self, cache: DraftCache, anchor: Tensor, sampling: SamplingConfig, uniforms: Tensor | None
    ) -> Proposal:
        """Draft the tokens behind `anchor` [B] long, which sits at position lengths[b];
        `uniforms` [B, g] unless greedy.
        """
        ...
