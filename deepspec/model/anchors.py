"""Plans: everything about a batch's loss that needs no forward pass.

For a block drafter, where training blocks start and what they predict; for Eagle3, where each step
of its training-time test is scored. The samples of a batch lie one after the other in one packed
row: T tokens in all, S samples, K anchors, g block size, P scored places. Plans are made on the
host, so that a device which is sent one is never asked for a number of it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.model.attention import BlockVisibility
from deepspec.model.drafter import TrainBatch
from deepspec.model.targets import TargetPlaces


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
    """The blocks of a batch, one per anchor; then maybe fill, of which nothing counts."""

    anchors: Tensor  # [K] long, where in the row each is, ascending; 0 for fill
    samples: Samples  # [K] of the sample that it belongs to
    positions: Tensor  # [T] long, of every token within its own sample
    anchor_tokens: Tensor  # [K] long
    labels: Tensor  # [K, g] long, what slot j of a block predicts: the token at its anchor + 1 + j
    counted: Tensor  # [K, g] bool, a contiguous prefix of each block
    weights: Tensor  # [K, g] float32, 0 where not counted
    slots: Tensor  # [N] long, the counted ones among all K * g
    targets: TargetPlaces  # of each counted slot: the position before its label, its anchor first
    visibility: BlockVisibility  # an anchor's own state is not known yet

    @property
    def previous(self) -> Tensor:
        """Token [K, g] before each slot's own, which the Markov head reads in training."""
        return torch.cat([self.anchor_tokens[:, None], self.labels[:, :-1]], dim=-1)


class Eagle3Plan(NamedTuple):
    """The places that some step is scored at, and which of them each step is scored at."""

    # [P] long, in the packed row, ascending (then fill, which no step counts)
    places: Tensor
    starts: Tensor  # [P] long, where the sample of each begins
    positions: Tensor  # [T] long, of every token within its own sample
    next_tokens: Tensor  # [T] long, the token after each of the row
    tokens: Tensor  # [steps, P] long, the newest token that each step reads
    counted: Tensor  # [steps, P] bool
    steps: Tensor  # [N] long, where `counted` is True, step by step
    columns: Tensor  # [N] long
    num_scored: tuple[int, ...]  # at each step
    targets: TargetPlaces  # [N] step s at t is to match p_{t+1+s}
    visibility: BlockVisibility
    # [P] float32, one over the length of its sample: the loss is a mean per sample, not per token
    weights: Tensor
    num_samples: Tensor  # float32


def sample_anchors(batch: TrainBatch, num_anchors: int) -> Tensor:
    """Up to `num_anchors` anchors per sample [K], uniformly without replacement, ascending.

    An anchor and the token after it are in an answer, and belong to one sample. Sample s draws from
    batch.seeds[s] alone.
    """
    _, mask, lengths = on_host(batch)
    candidates = F.pad(mask[:-1] & mask[1:], (0, 1))
    # a sample's last token: the one after it is another sample's
    candidates[lengths.cumsum(0) - 1] = False
    sizes = lengths.tolist()
    drawn = [torch.empty(0, dtype=torch.long)]
    start = 0
    by_sample = candidates[: sum(sizes)].split(sizes)
    for of_sample, seed in zip(by_sample, batch.seeds, strict=True):
        positions = of_sample.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed)
        chosen = positions[torch.randperm(len(positions), generator=generator)[:num_anchors]]
        drawn.append(start + chosen.sort().values)
        start += len(of_sample)
    return torch.cat(drawn)


def plan_blocks(
    batch: TrainBatch,
    anchors: Tensor,
    *,
    block_size: int,
    decay: float | None,
    num_queries: int | None = None,
    multiple: int = 1,
) -> BlockPlan:
    """What each slot of the anchors' blocks predicts, and which slots count.

    A block has `block_size` slots, whatever its layout, and `num_queries` inputs (None: as many),
    of which the last ones are the slots.

    Those count that are inside the sample and in an answer, and whose earlier slots all count.

    Slot j weighs exp(-j / decay), or 1 where `decay` is None. The blocks are filled up to a
    multiple of `multiple`, so that shapes repeat.
    """
    (ids, mask, lengths), num_blocks = on_host(batch), len(anchors)
    anchors = F.pad(anchors.cpu(), (0, -num_blocks % multiple))
    slots, tokens = torch.arange(block_size), torch.arange(len(ids))
    all_samples = Samples.of(lengths)
    samples = all_samples.holding(anchors)
    wanted = anchors[:, None] + 1 + slots  # [K, g]
    places = wanted.minimum(samples.ends[:, None] - 1)
    counted = (mask[places] & (wanted < samples.ends[:, None])).cumprod(-1).bool()
    counted[num_blocks:] = False
    weights = counted.float() if decay is None else counted * torch.exp(-slots / decay)
    positions = tokens - all_samples.holding(tokens).starts
    return BlockPlan(
        anchors,
        samples,
        positions,
        anchor_tokens=ids[anchors],
        labels=ids[places],
        counted=counted,
        weights=weights,
        slots=counted.flatten().nonzero()[:, 0],
        targets=TargetPlaces.of((anchors[:, None] + slots)[counted]),
        visibility=BlockVisibility(samples.starts, anchors, num_queries or block_size),
    )


def plan_steps(batch: TrainBatch, *, num_steps: int, multiple: int) -> Eagle3Plan:
    """Step s scores position t where t + s is supervised and not its sample's last token.

    The places are filled up to a multiple of `multiple`, so that shapes repeat.
    """
    ids, mask, lengths = on_host(batch)
    tokens, steps = torch.arange(len(ids)), torch.arange(num_steps)
    samples = Samples.of(lengths).holding(tokens)
    ahead = tokens + steps[:, None]  # [steps, T]
    counted = mask[ahead.clamp(max=len(ids) - 1)] & (ahead < samples.ends - 1)
    places = counted.any(0).nonzero()[:, 0]
    fill = (0, -len(places) % multiple)
    return plan_places(batch, F.pad(places, fill), F.pad(counted[:, places], fill))


def plan_places(batch: TrainBatch, places: Tensor, counted: Tensor) -> Eagle3Plan:
    """The plan that scores step s at those places [P] of which `counted` [steps, P] is True."""
    ids, _, lengths = on_host(batch)
    tokens, numbers = torch.arange(len(ids)), torch.arange(len(counted))
    all_samples = Samples.of(lengths)
    samples = all_samples.holding(places)
    steps, columns = counted.nonzero(as_tuple=True)
    newest = (places + 1 + numbers[:, None]).clamp(max=len(ids) - 1)
    return Eagle3Plan(
        places=places,
        starts=samples.starts,
        positions=tokens - all_samples.holding(tokens).starts,
        next_tokens=ids.roll(-1),
        tokens=ids[newest],
        counted=counted,
        steps=steps,
        columns=columns,
        num_scored=tuple(counted.sum(1).tolist()),
        # a counted position has t + s before the last token, so its target is there
        targets=TargetPlaces.of(places[columns] + 1 + steps),
        visibility=BlockVisibility(samples.starts, places + 1, 1),
        weights=1.0 / (samples.ends - samples.starts),
        num_samples=torch.tensor(float(len(lengths))),
    )


def on_host(batch: TrainBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, loss mask and lengths of a batch, wherever they are, on the host."""
    return batch.input_ids.cpu(), batch.loss_mask.cpu(), batch.lengths.cpu()
