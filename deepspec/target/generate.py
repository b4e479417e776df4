"""Plain autoregressive decoding of the target, batched, as answers are made with it.

B rows of a batch, T tokens, m captured layers, D hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.config.data import SamplingConfig
from deepspec.model.host_copy import row_numbers, send
from deepspec.model.sampling import UniformStream, choose_tokens
from deepspec.target.decoding_cache import TargetCache
from deepspec.target.model import Target


class Decode(NamedTuple):
    """How answers are decoded, plainly or speculatively."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop_ids: Collection[int]  # tokens that end an answer
    batch_size: int | None = None  # prompts at a time; None is all of them


class BatchSlots:
    """Which prompt each row of a batch works on; finished rows take waiting prompts.

    This is continuous batching. Rows are filled once a quarter of them is free: prompts then share
    a forward pass, as answers do.
    """

    def __init__(self, num_prompts: int, batch_size: int | None) -> None:
        self.num_rows = min(batch_size or num_prompts, num_prompts)
        self.running: dict[int, int] = {}  # row: its prompt
        self.waiting = deque(range(num_prompts))

    def admit(self) -> dict[int, int]:
        """Give free rows to waiting prompts; returns the new prompts by row."""
        free = [row for row in range(self.num_rows) if row not in self.running]
        if len(free) < max(1, self.num_rows // 4):
            return {}
        admitted = {row: self.waiting.popleft() for row in free[: len(self.waiting)]}
        self.running |= admitted
        return admitted

    def compact(self) -> list[int]:
        """Drop finished rows once no prompt waits and at least half of the rows are finished.

        Returns:
            the rows to keep, which are renumbered in this order; none where nothing changes.
        """
        rows = sorted(self.running)
        if self.waiting or not rows or 2 * len(rows) > self.num_rows:
            return []
        self.num_rows = len(rows)
        self.running = {number: self.running[row] for number, row in enumerate(rows)}
        return rows


class Prefilled(NamedTuple):
    """New prompts of a batch, after their pass through the target."""

    rows: list[int]
    prompts: list[Sequence[int]]
    context: Tensor  # [n, T, m * D] features of the prompts, right-padded
    first: Tensor  # [n] long, the first token of each answer


class TargetBatch:
    """The target's side of a batch: its slots, each row's last token and random stream."""

    def __init__(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]],
        settings: Decode,
        *,
        seeds: Sequence[int],
    ) -> None:
        self.target = target
        self.slots = BatchSlots(len(prompts), settings.batch_size)
        self.prompts = prompts
        self.seeds = seeds
        self.sampling = settings.sampling
        self.capacity = max(map(len, prompts)) + settings.max_new_tokens
        greedy = settings.sampling.temperature == 0
        unset = [0] * self.slots.num_rows  # seeds, until a prompt is admitted
        self.uniforms = None if greedy else UniformStream(unset, target.device)
        self.tokens = torch.zeros(self.slots.num_rows, dtype=torch.long, device=target.device)

    def start(self, admitted: Mapping[int, int], cache: TargetCache) -> Prefilled:
        """Run new prompts through the target into their rows; draw their first tokens."""
        rows = list(admitted)
        prompts = [self.prompts[prompt] for prompt in admitted.values()]
        if len(rows) == self.slots.num_rows:
            cache.reset()
            context, last_hidden = prefill(self.target, cache, prompts)
        else:
            fresh = self.target.new_cache(len(rows), max(map(len, prompts)))
            context, last_hidden = prefill(self.target, fresh, prompts)
            cache.put(rows, fresh)
        uniforms = None
        if self.uniforms:
            seeds = [self.seeds[prompt] for prompt in admitted.values()]
            uniforms = self.uniforms.start(rows, seeds)
        first = choose_tokens(self.target.logits(last_hidden), self.sampling, uniforms).tokens
        numbers = row_numbers(tuple(rows), first.device)
        self.tokens = self.tokens.index_copy(0, numbers, first)
        return Prefilled(rows, prompts, context, first)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows alone, in this order."""
        self.tokens = self.tokens[row_numbers(tuple(rows), self.tokens.device)]
        if self.uniforms:
            self.uniforms.keep(rows)


@torch.inference_mode()
def generate(
    target: Target, prompts: Sequence[Sequence[int]], settings: Decode, *, seeds: Sequence[int]
) -> list[list[int]]:
    """New token ids of each prompt, the stop token included where one came before the limit.

    Prompt b draws from its own stream `seeds[b]`, so that its answer does not depend on the other
    prompts of its batch (up to the rounding of batched arithmetic).
    """
    batch = TargetBatch(target, prompts, settings, seeds=seeds)
    slots = batch.slots
    answers: list[list[int]] = [[] for _ in prompts]

    def add(tokens: Mapping[int, int]) -> None:  # by row
        for row, token in tokens.items():
            answer = answers[slots.running[row]]
            answer.append(token)
            if token in settings.stop_ids or len(answer) == settings.max_new_tokens:
                del slots.running[row]

    def step(tokens: Tensor, uniforms: Tensor | None) -> tuple[Tensor]:
        last_hidden = target.forward(tokens[:, None], cache).last_hidden[:, -1]
        return (choose_tokens(target.logits(last_hidden), settings.sampling, uniforms).tokens,)

    with target.shelf.lend(target.new_cache, slots.num_rows, batch.capacity) as cache:
        while True:
            while admitted := slots.admit():
                first = batch.start(admitted, cache).first.tolist()
                add(dict(zip(admitted, first, strict=True)))
            if not slots.running:
                return answers
            if kept := slots.compact():
                cache.keep(kept)
                batch.keep(kept)
            uniforms = batch.uniforms.take(1)[:, 0] if batch.uniforms else None
            inputs = batch.tokens, uniforms
            (batch.tokens,) = cache.run("token", step, inputs, num_new=1, variant=settings.sampling)
            for row in slots.running:
                cache.lengths[row] += 1
            tokens = batch.tokens.tolist()  # the only wait for the device in a step
            add({row: tokens[row] for row in slots.running})


def prefill(
    target: Target, cache: TargetCache, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Run the prompts through the target into the cache.

    Returns:
        their context features [B, T, m * D], right-padded, and the final hidden state of each one's
            last token [B, D].
    """
    cache.counts = [len(prompt) for prompt in prompts]
    output = target.forward(pad_right(prompts, target.device), cache)
    cache.lengths, cache.counts = cache.counts, None
    rows = torch.arange(len(prompts), device=target.device)
    last = row_numbers(tuple(cache.lengths), target.device) - 1
    return output.context, output.last_hidden[rows, last]


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, T] long, padded with zeros to the longest row."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return send(pad_sequence(tensors, batch_first=True), device)
