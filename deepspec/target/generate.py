"""Plain autoregressive decoding of the target, batched: how answers are made and what speed-ups
are measured against.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.sampling import UniformStream, distribution, draw
from deepspec.target.kv_cache import TargetCache
from deepspec.target.model import Target


class Decode(NamedTuple):
    """How answers are decoded, plainly or speculatively."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop_ids: Collection[int]  # tokens that end an answer
    batch_size: int | None = None  # prompts at a time; None is all of them


class BatchSlots:
    """Which prompt each row of a batch works on; rows that are done take the prompts that wait
    (continuous batching).

    Rows are filled once a quarter of them is free: prompts then share a forward pass, as answers
    do.
    """

    def __init__(self, num_prompts: int, batch_size: int | None) -> None:
        self.num_rows = min(batch_size or num_prompts, num_prompts)
        self.running: dict[int, int] = {}  # the prompt of each row that is at work
        self.waiting = deque(range(num_prompts))

    def admit(self) -> dict[int, int]:
        """Seat prompts that wait, by row; nobody while only few rows are free."""
        free = [row for row in range(self.num_rows) if row not in self.running]
        if len(free) < max(1, self.num_rows // 4):
            return {}
        admitted = {row: self.waiting.popleft() for row in free[: len(self.waiting)]}
        self.running |= admitted
        return admitted

    def compact(self) -> list[int]:
        """The rows to go on with alone, under new numbers, once nobody waits and half of them
        are done; none: go on with all.
        """
        rows = sorted(self.running)
        if self.waiting or not rows or 2 * len(rows) > self.num_rows:
            return []
        self.num_rows, self.running = (
            len(rows),
            {number: self.running[row] for number, row in enumerate(rows)},
        )
        return rows


class Prefilled(NamedTuple):
    """What running prompts through the target gives."""

    rows: list[int]
    prompts: list[Sequence[int]]
    context: Tensor  # [n, T, m * D] features of the prompts, right-padded
    first: Tensor  # [n] long, the first token of each answer


class TargetBatch:
    """The target's side of a batch: who is seated, its cache, and each row's last token and
    stream of chance.
    """

    def __init__(
        self,
        target: Target,
        slots: BatchSlots,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        settings: Decode,
    ) -> None:
        self.target, self.slots, self.prompts, self.seeds, self.sampling = (
            target,
            slots,
            prompts,
            seeds,
            settings.sampling,
        )
        self.capacity = max(map(len, prompts)) + settings.max_new_tokens
        self.uniforms = (
            None if settings.sampling.temperature == 0 else UniformStream([0] * slots.num_rows)
        )
        self.tokens = torch.zeros(slots.num_rows, dtype=torch.long, device=target.device)

    def new_cache(self, *, room: int = 0) -> TargetCache:
        """For prompts, answers and `room` more tokens."""
        return self.target.new_cache(self.slots.num_rows, self.capacity + room)

    def start(self, admitted: Mapping[int, int], cache: TargetCache) -> Prefilled:
        """Run newly seated prompts through the target, into their rows of the cache; draw their
        first tokens.
        """
        rows, prompts = list(admitted), [self.prompts[prompt] for prompt in admitted.values()]
        if len(rows) == self.slots.num_rows:
            cache.reset()
            context, last_hidden = prefill(self.target, cache, prompts)
        else:
            fresh = self.target.new_cache(len(rows), max(map(len, prompts)))
            context, last_hidden = prefill(self.target, fresh, prompts)
            cache.put(rows, fresh)
        numbers = (
            self.uniforms.start(rows, [self.seeds[prompt] for prompt in admitted.values()])
            if self.uniforms
            else None
        )
        first = choose_tokens(self.target.logits(last_hidden), self.sampling, numbers)
        self.tokens = self.tokens.index_copy(0, torch.tensor(rows, device=first.device), first)
        return Prefilled(rows, prompts, context, first)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self.tokens = self.tokens[list(rows)]
        if self.uniforms:
            self.uniforms.keep(rows)


@torch.inference_mode()
def generate(
    target: Target, prompts: Sequence[Sequence[int]], settings: Decode, *, seeds: Sequence[int]
) -> list[list[int]]:
    """New token ids of each prompt, the stop token included where one came before the limit.

    Prompt b draws from its own stream `seeds[b]`, so what it says does not depend on who shares its
    batch (up to the rounding of batched arithmetic).
    """
    slots = BatchSlots(len(prompts), settings.batch_size)
    rows = TargetBatch(target, slots, prompts, seeds, settings)
    cache = rows.new_cache()
    answers: list[list[int]] = [[] for _ in prompts]

    def add(tokens: Sequence[int], working: Mapping[int, int]) -> None:
        for token, (row, prompt) in zip(tokens, working.items(), strict=True):
            answers[prompt].append(token)
            if token in settings.stop_ids or len(answers[prompt]) == settings.max_new_tokens:
                del slots.running[row]

    while True:
        while admitted := slots.admit():
            add(rows.start(admitted, cache).first.tolist(), admitted)
        if not slots.running:
            return answers
        if kept := slots.compact():
            cache.keep(kept)
            rows.keep(kept)
        last_hidden = target.forward(rows.tokens[:, None], cache).last_hidden[:, -1]
        cache.lengths = [
            length + (row in slots.running) for row, length in enumerate(cache.lengths)
        ]
        numbers = rows.uniforms.take(1)[:, 0] if rows.uniforms else None
        rows.tokens = choose_tokens(target.logits(last_hidden), settings.sampling, numbers)
        working = dict(slots.running)
        tokens = rows.tokens.tolist()
        add([tokens[row] for row in working], working)


def prefill(
    target: Target, cache: TargetCache, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Run the prompts through the target into the cache.

    Returns:
        their context features [B, T, m * D] (right-padded) and the final hidden state of each one's
            last token [B, D].
    """
    output = target.forward(pad_right(prompts, target.device), cache)
    cache.lengths = [len(prompt) for prompt in prompts]
    last = torch.tensor([length - 1 for length in cache.lengths], device=target.device)
    return output.context, output.last_hidden[
        torch.arange(len(prompts), device=target.device), last
    ]


def choose_tokens(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor | None) -> Tensor:
    """One token id per row of `logits` [B, V]: the likeliest where `uniforms` is None, else
    drawn with its number [B].
    """
    if uniforms is None:
        return logits.argmax(dim=-1)
    return draw(distribution(logits, sampling), uniforms.to(logits.device))


def pad_right(
    rows: Sequence[Sequence[int]], device: torch.device, *, length: int | None = None
) -> Tensor:
    """Token ids [B, T] long, zero behind the end of each row; as long as the longest where
    `length` is None.
    """
    padded = torch.zeros(len(rows), length or max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded.to(device)
