"""Where training blocks start, what they predict, and what they may see.

B batch, T tokens, A anchors, g block size. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Anchors(NamedTuple):
    positions: Tensor  # [B, A] long, ascending in each row; 0 where not kept
    keep: Tensor  # [B, A] bool, False fills up rows with fewer anchors


class BlockPlan(NamedTuple):
    """Everything about a batch's blocks that needs no forward pass."""

    anchors: Anchors
    anchor_tokens: Tensor  # [B, A] long
    labels: Tensor  # [B, A, g] long, what slot j of block a predicts: the token at a + 1 + j
    counted: Tensor  # [B, A, g] bool, a contiguous prefix of each block
    weights: Tensor  # [B, A, g] float32, 0 where not counted

    @property
    def previous(self) -> Tensor:
        """Token [B, A, g] before each slot's own, as the Markov head is taught with."""
        return torch.cat([self.anchor_tokens[..., None], self.labels[..., :-1]], dim=-1)

    def of_slots(self, values: Tensor) -> Tensor:
        """`values` [B, T, D] at those places [N, D]."""
        return values.flatten(0, 1)[self.places(values.shape[1])]

    def places(self, num_tokens: int) -> Tensor:
        """Where in [B * T] the position before each counted slot's label is [N]: the anchor's for slot 0."""
        rows, blocks, slots = self.counted.nonzero(as_tuple=True)
        return rows * num_tokens + self.anchors.positions[rows, blocks] + slots


def anchor_candidates(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    """Positions [B, T] that may be anchors: they and the token after them belong to an answer (mask [B, T] bool)."""
    positions = torch.arange(loss_mask.shape[1] - 1, device=loss_mask.device)
    pairs = loss_mask[:, :-1] & loss_mask[:, 1:] & (positions + 1 < lengths[:, None])
    return torch.nn.functional.pad(pairs, (0, 1))


def sample_anchors(loss_mask: Tensor, lengths: Tensor, *, num_anchors: int, seeds: Sequence[int]) -> Anchors:
    """Up to `num_anchors` anchors per sample, uniformly without replacement, ascending; row b draws from seeds[b] alone."""
    drawn = []
    for candidates, seed in zip(anchor_candidates(loss_mask, lengths).cpu(), seeds, strict=True):
        positions = candidates.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        drawn.append(positions[torch.randperm(len(positions), generator=generator)[:num_anchors]].sort().values)
    filled = torch.nn.utils.rnn.pad_sequence(drawn or [torch.empty(0, dtype=torch.long)], batch_first=True)[: len(drawn)]
    counts = torch.tensor([len(positions) for positions in drawn])
    keep = torch.arange(filled.shape[1]) < counts[:, None]
    return Anchors(filled.to(loss_mask.device), keep.to(loss_mask.device))


def plan_blocks(
    input_ids: Tensor, loss_mask: Tensor, lengths: Tensor, *, anchors: Anchors, block_size: int, decay: float | None
) -> BlockPlan:
    """What each slot predicts, and which count: inside the sample, in an answer, and all slots before it count.

    Slot j weighs exp(-j / decay), or 1 where `decay` is None.
    """
    slots = torch.arange(block_size, device=input_ids.device)
    wanted = anchors.positions[:, :, None] + 1 + slots  # [B, A, g]
    inside = (wanted < lengths[:, None, None]) & anchors.keep[:, :, None]
    places = wanted.clamp(max=input_ids.shape[1] - 1).flatten(1)
    labels = input_ids.gather(1, places).view_as(wanted)
    counted = (loss_mask.gather(1, places).view_as(wanted) & inside).cumprod(-1).bool()
    weights = counted.float() if decay is None else counted * torch.exp(-slots / decay)
    return BlockPlan(anchors, input_ids.gather(1, anchors.positions), labels, counted, weights)


def block_mask(anchors: Anchors, *, num_tokens: int, block_size: int) -> Tensor:
    """What each block slot sees (DSpark eq. 3) [B, 1, A * g, T + A * g] bool: context before its anchor, and its own block."""
    num_rows, num_blocks = anchors.positions.shape
    before = torch.arange(num_tokens, device=anchors.positions.device) < anchors.positions[:, :, None]  # [B, A, T]
    own = torch.eye(num_blocks, dtype=torch.bool, device=before.device).repeat_interleave(block_size, 1)  # [A, A * g]
    seen = torch.cat([before, own.expand(num_rows, -1, -1)], dim=-1)
    return seen.repeat_interleave(block_size, 1)[:, None]
