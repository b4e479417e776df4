"""Speculative decoding, batched: the draft proposes a block, the target verifies it in one pass, losslessly.

Every row keeps its own length in both caches; taking back rejected tokens is not moving a length forward. B rows, g
block size, m captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepspec.config import SamplingConfig
from deepspec.generate import Decode, choose_tokens, prefill
from deepspec.model.draft import Proposal
from deepspec.model.sampling import UniformStream, Verdict, verify
from deepspec.target import Target, TargetOutput


class Trace(NamedTuple):
    """What became of one prompt: its new tokens, and per round how many were proposed and accepted."""

    token_ids: list[int]
    proposed: list[int]
    accepted: list[int]
    committed: list[int]  # tokens each round added; one more than accepted unless the round ended on an accepted stop token


class Seconds(NamedTuple):
    """Wall-clock of one batch, with what of it went into drafting and into the target's verification."""

    total: float
    draft: float
    verify: float


class Decoding:
    """The state of one batch while it is decoded."""

    def __init__(self, rows: int, settings: Decode) -> None:
        self.max_new_tokens, self.stop_ids = settings.max_new_tokens, settings.stop_ids
        self.traces = [Trace([], [], [], []) for _ in range(rows)]
        self.running = [True] * rows

    def start(self, tokens: Sequence[int]) -> None:
        """The first token of each row comes from the prompt's own forward pass and belongs to no round."""
        for row, token in enumerate(tokens):
            self._extend(row, [token])

    def commit(self, proposal: Sequence[Sequence[int]], accepted: Sequence[int], following: Sequence[int]) -> list[int]:
        """Add a round's tokens to every running row; returns how many positions of each row's cache stay."""
        counts = [0] * len(self.running)
        for row, (tokens, num_accepted) in enumerate(zip(proposal, accepted, strict=True)):
            if not self.running[row]:
                continue
            trace, kept = self.traces[row], list(tokens[:num_accepted])
            stop = next((index for index, token in enumerate(kept) if token in self.stop_ids), None)
            if stop is None:
                added = [*kept, following[row]]
            else:  # an accepted stop token ends the answer: what follows it is dropped, and there is no bonus token
                kept = added = kept[: stop + 1]
            trace.proposed.append(len(tokens))
            trace.accepted.append(len(kept))
            trace.committed.append(len(added))
            self._extend(row, added)
            counts[row] = num_accepted + 1 if self.running[row] else 0
        return counts

    def _extend(self, row: int, tokens: Sequence[int]) -> None:
        ids = self.traces[row].token_ids
        ids.extend(tokens[: self.max_new_tokens - len(ids)])
        self.running[row] = len(ids) < self.max_new_tokens and ids[-1] not in self.stop_ids


@torch.inference_mode()
def speculate(
    target: Target, draft: Any, prompts: Sequence[Sequence[int]], settings: Decode, *, seeds: Sequence[int]
) -> tuple[list[Trace], Seconds]:
    """Decode the prompts; at temperature 0 the tokens are those of greedy decoding, else distributed as the target's.

    Row b draws from its own stream `seeds[b]`.
    """
    clock, sampling = _Clock(target.device), settings.sampling
    uniforms = None if sampling.temperature == 0 else UniformStream(seeds)
    rows, block = len(prompts), draft.block_size
    capacity = max(map(len, prompts)) + settings.max_new_tokens + block + 1
    cache, draft_cache = target.new_cache(rows, capacity), draft.new_cache(rows, capacity)
    decoding = Decoding(rows, settings)

    context, last_hidden = prefill(target, cache, prompts)
    anchor = choose_tokens(target.logits(last_hidden), sampling, uniforms)
    decoding.start(anchor.tolist())
    draft.prefill(draft_cache, context, _shifted(prompts, anchor), [len(prompt) for prompt in prompts])
    while any(decoding.running):
        clock.lap()
        proposal = draft.propose(draft_cache, anchor, sampling, uniforms.take(block) if uniforms else None)
        clock.draft += clock.lap()
        inputs = torch.cat([anchor[:, None], proposal.tokens], dim=1)
        output = target.forward(inputs, cache)
        verdict = _verify(target, output, proposal, sampling, uniforms)
        clock.verify += clock.lap()
        counts = decoding.commit(proposal.tokens.tolist(), verdict.num_accepted.tolist(), verdict.next_token.tolist())
        following = inputs.roll(-1, dims=1).scatter_(1, verdict.num_accepted[:, None], verdict.next_token[:, None])
        draft.accept(draft_cache, output.context, following, counts)
        cache.lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
        anchor = verdict.next_token
    return decoding.traces, clock.read()


def _verify(target: Target, output: TargetOutput, proposal: Proposal, sampling: SamplingConfig, uniforms: UniformStream | None) -> Verdict:
    logits = target.logits(output.last_hidden)
    draws = uniforms.take(logits.shape[1]) if uniforms else None
    return verify(proposal.tokens, proposal.probs, logits, sampling, draws)


def _shifted(prompts: Sequence[Sequence[int]], anchor: Tensor) -> Tensor:
    """The token that follows each prompt position [B, T]; behind the last one comes the anchor."""
    shifted = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, (prompt, token) in enumerate(zip(prompts, anchor.tolist(), strict=True)):
        shifted[row, : len(prompt)] = torch.tensor([*prompt[1:], token])
    return shifted.to(anchor.device)


class _Clock:
    """Seconds by phase; on a GPU every reading waits for the work before it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.draft, self.verify = device, 0.0, 0.0
        self.started = self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self) -> float:
        before, self.last = self.last, self._now()
        return self.last - before

    def read(self) -> Seconds:
        return Seconds(self._now() - self.started, self.draft, self.verify)
