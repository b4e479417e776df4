"""Where training blocks start and what they predict.

The samples of a batch lie one after the other in one packed row: T tokens in all, S samples, K
anchors, g block size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Samples(NamedTuple):
    """Where each sample lies in the row."""

    starts: Tensor  # [S] long
    ends: Tensor  # [S] long, exclusive

    @classmethod
    def of(cls, lengths: Tensor) -> "Samples":
        """Samples of these lengths [S], packed from the start of the row without gaps."""
        ends = lengths.cumsum(0)
        return cls(ends - lengths, ends)

    def holding(self, places: Tensor) -> "Samples":
        """The bounds of the sample that each place [N] is in; fill belongs to the last sample."""
        numbers = torch.searchsorted(self.ends, places, right=True).clamp(max=len(self.ends) - 1)
        return Samples(self.starts[numbers], self.ends[numbers])


class BlockPlan(NamedTuple):
    """Everything about a batch's blocks that needs no forward pass; one block per anchor."""

    anchors: Tensor  # [K] long, where in the row each is, ascending
    # [K] of the sample that it belongs to; all zero for fill, of which nothing counts
    samples: Samples
    positions: Tensor  # [T] long, of every token within its own sample
    anchor_tokens: Tensor  # [K] long
    labels: Tensor  # [K, g] long, what slot j of a block predicts: the token at its anchor + 1 + j
    counted: Tensor  # [K, g] bool, a contiguous prefix of each block
    weights: Tensor  # [K, g] float32, 0 where not counted

    @property
    def previous(self) -> Tensor:
        """Token [K, g] before each slot's own, which the Markov head reads in training."""
        return torch.cat([self.anchor_tokens[:, None], self.labels[:, :-1]], dim=-1)

    @property
    def places(self) -> Tensor:
        """Where the position before each counted slot's label is [N]: the anchor's for slot 0."""
        blocks, slots = self.counted.nonzero(as_tuple=True)
        return self.anchors[blocks] + slots


def anchor_candidates(loss_mask: Tensor, lengths: Tensor) -> Tensor:
    """Which places may be anchors [T]: they and the next token are in an answer (mask [T] bool).

    Both belong to one sample.
    """
    pairs = F.pad(loss_mask[:-1] & loss_mask[1:], (0, 1))
    # a sample's last token: the one after it is another sample's
    pairs[lengths.cumsum(0) - 1] = False
    return pairs


def sample_anchors(
    loss_mask: Tensor, lengths: Tensor, *, num_anchors: int, seeds: Sequence[int]
) -> Tensor:
    """Up to `num_anchors` anchors per sample [K], uniformly without replacement, ascending.

    Sample s draws from seeds[s] alone.
    """
    drawn, sizes = [], lengths.tolist()
    candidates = anchor_candidates(loss_mask, lengths).cpu()[: sum(sizes)].split(sizes)
    start = 0
    for of_sample, seed in zip(candidates, seeds, strict=True):
        positions = of_sample.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        chosen = positions[torch.randperm(len(positions), generator=generator)[:num_anchors]]
        drawn.append(start + chosen.sort().values)
        start += len(of_sample)
    return torch.cat(drawn or [torch.empty(0, dtype=torch.long)]).to(loss_mask.device)


def positions_within(lengths: Tensor, num_tokens: int) -> Tensor:
    """The position [T] of every token within its own sample; fill continues the last one."""
    places = torch.arange(num_tokens, device=lengths.device)
    return places - Samples.of(lengths).holding(places).starts


def plan_blocks(
    input_ids: Tensor,
    loss_mask: Tensor,
    lengths: Tensor,
    *,
    anchors: Tensor,
    block_size: int,
    decay: float | None,
) -> BlockPlan:
    """What each slot predicts, and which slots count.

    Those count that are inside the sample and in an answer, and whose earlier slots all count.

    Slot j weighs exp(-j / decay), or 1 where `decay` is None.
    """
    slots = torch.arange(block_size, device=input_ids.device)
    samples = Samples.of(lengths).holding(anchors)
    wanted = anchors[:, None] + 1 + slots  # [K, g]
    places = wanted.minimum(samples.ends[:, None] - 1)
    counted = (loss_mask[places] & (wanted < samples.ends[:, None])).cumprod(-1).bool()
    weights = counted.float() if decay is None else counted * torch.exp(-slots / decay)
    positions = positions_within(lengths, len(input_ids))
    return BlockPlan(
        anchors, samples, positions, input_ids[anchors], input_ids[places], counted, weights
    )


def filled(plan: BlockPlan, multiple: int) -> BlockPlan:
    """The plan filled up to a multiple of blocks that count nothing; shapes then repeat."""
    room = -len(plan.anchors) % multiple
    if room == 0:
        return plan
    longer = {
        name: F.pad(value, (0,) * (2 * value.ndim - 1) + (room,))
        for name, value in plan._asdict().items()
        if name not in ("samples", "positions")
    }
    samples = Samples(*(F.pad(bound, (0, room)) for bound in plan.samples))
    return BlockPlan(samples=samples, positions=plan.positions, **longer)
