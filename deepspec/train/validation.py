"""Acceptance while training: the draft really drafts along held-out answers, the cached tokens in
the target's place.

What the target generated is known, so no target is needed: a drafted token counts as accepted where
it is the target's own. At temperature 0 of the answers that is exactly greedy decoding; where they
were sampled it is a lower bound that rises and falls with what decoding will accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepspec.cache.index import ExpectedIndex, Index
from deepspec.cache.source import Source
from deepspec.config.data import SamplingConfig
from deepspec.model.drafter import Drafter
from deepspec.train.distributed import World

ROWS = 8  # samples drafted along together
GREEDY = SamplingConfig(temperature=0.0)


class RoundCounts(NamedTuple):
    committed: int  # tokens, the target's own one of each round included
    rounds: int


def acceptance_numbers(index: Index | ExpectedIndex, count: int) -> list[int]:
    """The first `count` held-out samples by their id, so that it does not matter in which order
    the shards were captured.
    """
    held_out = np.flatnonzero((index.held_out == 1) & (index.num_supervised > 1))
    return held_out[np.argsort(index.sample_id[held_out])][:count].tolist()


class Answers(NamedTuple):
    """Held-out samples side by side, padded on the right."""

    input_ids: Tensor  # [B, T] long
    loss_mask: list[list[bool]]
    context: Tensor  # [B, T, m * D]


def held_out_acceptance(
    draft: Drafter, cache: Source, numbers: Sequence[int], world: World
) -> float:
    """Tokens committed per round over these samples of the cache, shared out to all ranks; 0
    where there is no round.
    """
    own = own_share(numbers, world)
    total = torch.zeros(2, dtype=torch.float64)
    was_training = draft.training
    draft.eval()
    for first in range(0, len(own), ROWS):
        total += torch.tensor(
            draft_along(draft, load_answers(cache, own[first : first + ROWS], world.device)),
            dtype=torch.float64,
        )
    draft.train(was_training)  # trap D8
    committed, rounds = world.sum(total.to(world.device)).tolist()
    return committed / rounds if rounds else 0.0


def own_share(numbers: Sequence[int], world: World) -> list[int]:
    """Those that this rank drafts along."""
    return list(numbers)[world.rank :: world.size]


def load_answers(cache: Source, numbers: Sequence[int], device: torch.device) -> Answers:
    length = max(int(cache.index.num_tokens[number]) for number in numbers)
    input_ids = torch.zeros(len(numbers), length, dtype=torch.long)
    context = torch.zeros(
        len(numbers), length, cache.layout.context.width, dtype=torch.bfloat16, device=device
    )
    masks = []
    for row, number in enumerate(numbers):
        sample = cache[number]
        input_ids[row, : len(sample.input_ids)] = sample.input_ids
        sample.context.decode(device=device, out=context[row, : len(sample.input_ids)])
        masks.append([bool(kept) for kept in sample.loss_mask.tolist()])
    return Answers(input_ids.to(device), masks, context)


@torch.no_grad()
def draft_along(draft: Drafter, answers: Answers) -> RoundCounts:
    """Rounds of drafting from the first to the last token of every answer."""
    rows, length = answers.input_ids.shape
    ids, block = answers.input_ids.tolist(), draft.block_size
    cache = draft.new_cache(rows, length)
    following = answers.input_ids.roll(-1, dims=1)
    known, anchors = [0] * rows, [next_anchor(mask, 0) for mask in answers.loss_mask]
    committed = rounds = 0
    while any(anchor is not None for anchor in anchors):
        counts = [
            0 if anchor is None else anchor - start
            for anchor, start in zip(anchors, known, strict=True)
        ]
        draft.extend(
            cache, _cut(answers.context, known, counts), _cut(following, known, counts), counts
        )
        known = [start + count for start, count in zip(known, counts, strict=True)]
        here = torch.tensor(
            [ids[row][place] for row, place in enumerate(known)], device=answers.input_ids.device
        )
        drafted = draft.propose(cache, here, GREEDY, None).tokens.tolist()
        for row, anchor in enumerate(anchors):
            if anchor is None:
                continue
            left = answer_end(answers.loss_mask[row], anchor) - anchor - 1
            matched = leading_matches(
                drafted[row], ids[row][anchor + 1 : anchor + 1 + min(left, block)]
            )
            committed += matched + (matched < left)
            rounds += 1
            anchors[row] = next_anchor(answers.loss_mask[row], anchor + matched + 1)
    return RoundCounts(committed, rounds)


def next_anchor(mask: Sequence[bool], place: int) -> int | None:
    """The first position from `place` on that belongs to an answer, as the one after it does:
    from there can be drafted.
    """
    return next((at for at in range(place, len(mask) - 1) if mask[at] and mask[at + 1]), None)


def answer_end(mask: Sequence[bool], place: int) -> int:
    """The position behind the answer that `place` is in."""
    return next((at for at in range(place, len(mask)) if not mask[at]), len(mask))


def leading_matches(drafted: Sequence[int], answer: Sequence[int]) -> int:
    together = zip(drafted, answer, strict=False)
    return next(
        (at for at, (ours, theirs) in enumerate(together) if ours != theirs),
        min(len(drafted), len(answer)),
    )


def _cut(values: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`values` [B, T, ...] from each row's start on, as many positions as the longest count
    needs.
    """
    places = torch.tensor(starts, device=values.device)[:, None] + torch.arange(
        max(1, *counts), device=values.device
    )
    rows = torch.arange(len(starts), device=values.device)[:, None]
    return values[rows, places.clamp(max=values.shape[1] - 1)]
