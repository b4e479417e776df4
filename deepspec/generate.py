"""Plain autoregressive decoding of the target, batched: how answers are made and what speed-ups are measured against."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.config import SamplingConfig
from deepspec.model.sampling import UniformStream, distribution, draw
from deepspec.target import Target, TargetCache


class Decode(NamedTuple):
    """How answers are decoded, plainly or speculatively."""

    sampling: SamplingConfig
    max_new_tokens: int
    stop_ids: Collection[int]  # tokens that end an answer


@torch.inference_mode()
def generate(target: Target, prompts: Sequence[Sequence[int]], settings: Decode, *, seeds: Sequence[int]) -> list[list[int]]:
    """New token ids of each prompt, the stop token included where one came before the limit.

    Row b draws from its own stream `seeds[b]`, so what it says does not depend on who shares its batch (up to the
    rounding of batched arithmetic).
    """
    sampling, max_new_tokens, stop_ids = settings
    uniforms = None if sampling.temperature == 0 else UniformStream(seeds)
    cache = target.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens)
    last_hidden = prefill(target, cache, prompts)[1]
    answers: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    while True:
        tokens = choose_tokens(target.logits(last_hidden), sampling, uniforms)
        for row, token in enumerate(tokens.tolist()):
            if row in running:
                answers[row].append(token)
                if token in stop_ids or len(answers[row]) == max_new_tokens:
                    running.discard(row)
        if not running:
            return answers
        last_hidden = target.forward(tokens[:, None], cache).last_hidden[:, -1]
        cache.lengths = [length + 1 for length in cache.lengths]


def prefill(target: Target, cache: TargetCache, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Run the prompts through the target into the cache.

    Returns:
        their context features [B, T, m * D] (right-padded) and the final hidden state of each one's last token [B, D].
    """
    output = target.forward(pad_right(prompts, target.device), cache)
    cache.lengths = [len(prompt) for prompt in prompts]
    last = torch.tensor([length - 1 for length in cache.lengths], device=target.device)
    return output.context, output.last_hidden[torch.arange(len(prompts), device=target.device), last]


def choose_tokens(logits: Tensor, sampling: SamplingConfig, uniforms: UniformStream | None) -> Tensor:
    """One token id per row of `logits` [B, V]: the likeliest where `uniforms` is None, else drawn."""
    if uniforms is None:
        return logits.argmax(dim=-1)
    return draw(distribution(logits, sampling), uniforms.take(1)[:, 0].to(logits.device))


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids [B, T] long, zero behind the end of each row."""
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded.to(device)
