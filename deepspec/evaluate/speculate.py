"""Speculative decoding, batched: the draft proposes a block, the target verifies it in one pass,
losslessly.

Every row keeps its own length in both caches; taking back rejected tokens is not moving a length
forward. Rows whose answers are finished take the prompts that wait. B rows, g block size, m
captured layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from deepspec.model.drafter import DraftCache, Drafter, Proposal
from deepspec.model.sampling import Verdict, verify
from deepspec.target.generate import BatchSlots, Decode, Prefilled, TargetBatch, pad_right
from deepspec.target.model import Target, TargetOutput

# (confidence [B, g] float32, running [B] bool) -> how many of each row's tokens the target is to
# verify [B], 0 to g
Policy = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Trace(NamedTuple):
    """What became of one prompt: its new tokens, and per round what was proposed and accepted."""

    token_ids: list[int]
    proposed: list[int]  # tokens that the target verified
    accepted: list[int]
    # tokens each round added; one more than accepted unless the round ended on an accepted stop
    # token
    committed: list[int]
    # of every token that was drafted, verified or not; empty where the draft has no such head
    confidence: list[list[float]]


class Seconds(NamedTuple):
    """Wall-clock of one batch, with what of it went into drafting and into the target's
    verification.
    """

    total: float
    draft: float
    verify: float


class Decoding:
    """The answers of all prompts, as the rows at work add to them."""

    def __init__(self, slots: BatchSlots, settings: Decode) -> None:
        self.max_new_tokens, self.stop_ids, self.slots = (
            settings.max_new_tokens,
            settings.stop_ids,
            slots,
        )
        self.traces = [Trace([], [], [], [], []) for _ in slots.waiting]

    def start(self, tokens: Sequence[int], admitted: Mapping[int, int]) -> None:
        """The first token of each newly admitted prompt comes from its own forward pass and
        belongs to no round.
        """
        for token, (row, prompt) in zip(tokens, admitted.items(), strict=True):
            self._extend(row, prompt, [token])

    def note(self, confidence: Sequence[list[float]]) -> None:
        """Keep what the draft said of a round's tokens, before they are verified."""
        for row, prompt in self.slots.running.items():
            self.traces[prompt].confidence.append(confidence[row])

    def commit(
        self,
        proposal: Sequence[list[int]],
        lengths: Sequence[int],
        accepted: Sequence[int],
        following: Sequence[int],
    ) -> list[int]:
        """Add a round's tokens to every running row, lengths[row] of whose proposal were verified.

        Returns:
            how many positions of each row's cache stay; 0 where the row has finished.
        """
        counts = [0] * len(accepted)
        for row, prompt in list(self.slots.running.items()):
            trace, num_accepted = self.traces[prompt], accepted[row]
            kept = proposal[row][:num_accepted]
            stop = next((index for index, token in enumerate(kept) if token in self.stop_ids), None)
            if stop is None:
                added = [*kept, following[row]]
            else:
                # an accepted stop token ends the answer: what follows it is dropped, and there is
                # no bonus token
                kept = added = kept[: stop + 1]
            trace.proposed.append(lengths[row])
            trace.accepted.append(len(kept))
            trace.committed.append(len(added))
            if self._extend(row, prompt, added):
                counts[row] = num_accepted + 1
        return counts

    def _extend(self, row: int, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether the row goes on."""
        ids = self.traces[prompt].token_ids
        ids.extend(tokens[: self.max_new_tokens - len(ids)])
        goes_on = len(ids) < self.max_new_tokens and ids[-1] not in self.stop_ids
        if not goes_on:
            del self.slots.running[row]
        return goes_on


@torch.inference_mode()
def speculate(
    target: Target,
    draft: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: Decode,
    *,
    seeds: Sequence[int],
    policy: Policy | None = None,
) -> tuple[list[Trace], Seconds]:
    """Decode the prompts; `policy` says how much of a block is verified, None all of it.

    At temperature 0 the tokens are those of greedy decoding, else distributed as the target's.
    Prompt b draws from its own stream `seeds[b]`, of which every round takes the same number:
    nothing depends on who shares its batch.
    """
    clock, slots = _Clock(target.device), BatchSlots(len(prompts), settings.batch_size)
    rows, block = TargetBatch(target, slots, prompts, seeds, settings), draft.block_size
    decoding, cache = Decoding(slots, settings), rows.new_cache(room=block + 1)
    draft_cache = draft.new_cache(slots.num_rows, rows.capacity + block + 1)
    while True:
        while admitted := slots.admit():
            started = rows.start(admitted, cache)
            _start_draft(draft, draft_cache, started, alone=len(admitted) == slots.num_rows)
            decoding.start(started.first.tolist(), admitted)
        if not slots.running:
            return decoding.traces, clock.read()
        if kept := slots.compact():
            for part in (cache, draft_cache, rows):
                part.keep(kept)
        clock.lap()
        proposal = draft.propose(
            draft_cache,
            rows.tokens,
            rows.sampling,
            rows.uniforms.take(block) if rows.uniforms else None,
        )
        clock.draft += clock.lap()
        lengths = _lengths(proposal, policy, decoding)
        inputs = torch.cat([rows.tokens[:, None], proposal.tokens[:, : max(lengths)]], dim=1)
        clock.lap()
        output = target.forward(inputs, cache)
        verdict = _verify(rows, output, proposal, lengths)
        clock.verify += clock.lap()
        counts = decoding.commit(
            proposal.tokens.tolist(),
            lengths,
            verdict.num_accepted.tolist(),
            verdict.next_token.tolist(),
        )
        cache.lengths = [
            length + count for length, count in zip(cache.lengths, counts, strict=True)
        ]
        following = inputs.roll(-1, dims=1).scatter_(
            1, verdict.num_accepted[:, None], verdict.next_token[:, None]
        )
        clock.lap()
        draft.extend(draft_cache, output.context, following, counts)
        clock.draft += clock.lap()
        rows.tokens = verdict.next_token


def _start_draft(
    draft: Drafter, draft_cache: DraftCache, started: Prefilled, *, alone: bool
) -> None:
    """Give the draft the features of newly admitted prompts, and the token after each position."""
    counts = [len(prompt) for prompt in started.prompts]
    shifted = [
        [*prompt[1:], token]
        for prompt, token in zip(started.prompts, started.first.tolist(), strict=True)
    ]
    following = pad_right(shifted, started.first.device)
    if alone:
        draft_cache.reset()
        draft.extend(draft_cache, started.context, following, counts)
    else:
        fresh = draft.new_cache(len(counts), max(counts))
        draft.extend(fresh, started.context, following, counts)
        draft_cache.put(started.rows, fresh)


def _lengths(proposal: Proposal, policy: Policy | None, decoding: Decoding) -> list[int]:
    """How many of each row's tokens the target is to verify [B]; what the draft says of them is
    kept on the way.
    """
    num_rows, block = proposal.tokens.shape
    if proposal.confidence is None:
        return [block] * num_rows
    decoding.note(proposal.confidence.tolist())
    if policy is None:
        return [block] * num_rows
    running = np.zeros(num_rows, dtype=bool)
    running[list(decoding.slots.running)] = True
    lengths: list[int] = policy(proposal.confidence.float().cpu().numpy(), running).tolist()
    return lengths


def _verify(
    rows: TargetBatch, output: TargetOutput, proposal: Proposal, lengths: Sequence[int]
) -> Verdict:
    logits, block, width = (
        rows.target.logits(output.last_hidden),
        proposal.tokens.shape[1],
        max(lengths),
    )
    draws = rows.uniforms.take(block + 1) if rows.uniforms else None
    if draws is not None:  # the last number is for the token that follows, however few are verified
        draws = torch.cat([draws[:, :width], draws[:, block:]], 1)
    probs = proposal.probs[:, :width] if proposal.probs is not None else None
    limits = None if min(lengths) == width else torch.tensor(lengths, device=logits.device)
    return verify(proposal.tokens[:, :width], probs, logits, rows.sampling, draws, limits)


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
