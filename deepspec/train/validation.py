"""Acceptance while training: the draft drafts along held-out answers, without a target.

What the target generated is known: a drafted token counts as accepted where it is the target's own.
At temperature 0 of the answers that is exactly greedy decoding; where they were sampled it is a
lower bound that rises and falls with what decoding will accept.

B samples, T tokens, m captured layers, D hidden size.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepspec.cache.index import ExpectedIndex, Index
from deepspec.cache.source import Source
from deepspec.config.data import SamplingConfig
from deepspec.errors import OutOfMemory
from deepspec.model.drafter import Drafter
from deepspec.model.memory import Pieces
from deepspec.train.distributed import World

ROWS = 8  # samples drafted along together
GREEDY = SamplingConfig(temperature=0.0)


class Answers(NamedTuple):
    """Held-out samples side by side, padded on the right."""

    input_ids: Tensor  # [B, T] long
    loss_mask: list[list[bool]]
    context: Tensor  # [B, T, m * D]


def acceptance_numbers(index: Index | ExpectedIndex, count: int) -> list[int]:
    """The first `count` held-out samples by their id, in whatever order shards were captured."""
    held_out = np.flatnonzero((index.held_out == 1) & (index.num_supervised > 1))
    return held_out[np.argsort(index.sample_id[held_out])][:count].tolist()


def held_out_acceptance(
    draft: Drafter, source: Source, numbers: Sequence[int], world: World
) -> float:
    """Tokens committed per round over these samples, shared out to all ranks; 0 without a round."""
    own = numbers[world.rank :: world.size]
    total = torch.zeros(2, dtype=torch.float64)
    was_training = draft.training
    draft.eval()
    measure = Pieces(
        lambda rows: draft_along(draft, load_answers(source, rows, world.device)),
        size=len,
        too_large=partial(_too_large, source),
    )
    for first in range(0, len(own), ROWS):
        for measured in measure(own[first : first + ROWS]):
            total += measured
    draft.train(was_training)  # trap D8
    committed, rounds = world.sum(total.to(world.device)).tolist()
    return committed / rounds if rounds else 0.0


def _too_large(source: Source, number: int) -> OutOfMemory:
    return OutOfMemory(
        f"a held-out answer of {source.index.num_tokens[number]} tokens cannot be drafted along, "
        "the memory of the device does not suffice",
        where=f"sample {source.index.sample_id[number]:016x}",
        fix="set train.acceptance_samples to 0, which measures no checkpoint and keeps the last",
    )


def load_answers(source: Source, numbers: Sequence[int], device: torch.device) -> Answers:
    """These samples of the source, side by side."""
    length = max(int(source.index.num_tokens[number]) for number in numbers)
    width = source.layout.context.width
    input_ids = torch.zeros(len(numbers), length, dtype=torch.long)
    context = torch.zeros(len(numbers), length, width, dtype=torch.bfloat16, device=device)
    masks = []
    for row, number in enumerate(numbers):
        sample = source[number]
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        sample.context.decode(device=device, out=context[row, :end])
        masks.append(sample.loss_mask.bool().tolist())
    return Answers(input_ids.to(device), masks, context)


@torch.no_grad()
def draft_along(draft: Drafter, answers: Answers) -> Tensor:
    """Rounds of drafting from the first to the last token of every answer.

    Returns:
        float64 [2]: tokens committed, the target's own one of each round included, and rounds.
    """
    rows, length = answers.input_ids.shape
    ids, masks = answers.input_ids.tolist(), [[*mask, False] for mask in answers.loss_mask]
    cache = draft.new_cache(rows, length)
    following = answers.input_ids.roll(-1, dims=1)
    known = [0] * rows  # tokens of each row that the draft's cache holds
    anchors = [next_anchor(mask, 0) for mask in masks]
    committed = rounds = 0
    while running := {row: at for row, at in enumerate(anchors) if at is not None}:
        reached = [running.get(row, start) for row, start in enumerate(known)]
        counts = [end - start for start, end in zip(known, reached, strict=True)]
        context = _cut(answers.context, known, counts)
        draft.extend(cache, context, _cut(following, known, counts), counts)
        known = reached
        newest = [row[place] for row, place in zip(ids, known, strict=True)]
        newest_ids = torch.tensor(newest, device=answers.input_ids.device)
        drafted = draft.propose(cache, newest_ids, GREEDY, None).tokens.tolist()
        for row, anchor in running.items():
            answer = ids[row][anchor + 1 : masks[row].index(False, anchor)]
            pairs = list(zip(drafted[row], answer, strict=False))  # neither beyond the other's end
            matched = next((at for at, (ours, its) in enumerate(pairs) if ours != its), len(pairs))
            committed += matched + (matched < len(answer))
            anchors[row] = next_anchor(masks[row], anchor + matched + 1)
        rounds += len(running)
    return torch.tensor([committed, rounds], dtype=torch.float64)


def next_anchor(mask: Sequence[bool], place: int) -> int | None:
    """The first position from `place` on that can be drafted from.

    It belongs to an answer, and so does the position after it.
    """
    return next((at for at in range(place, len(mask) - 1) if mask[at] and mask[at + 1]), None)


def _cut(values: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`values` [B, T, ...] from each row's start on, as many positions as the largest count."""
    offsets = torch.arange(max(1, *counts), device=values.device)
    places = torch.tensor(starts, device=values.device)[:, None] + offsets
    rows = torch.arange(len(starts), device=values.device)[:, None]
    return values[rows, places.clamp(max=values.shape[1] - 1)]
