"""Speculative decoding, batched: the draft proposes a block, the target verifies it in one pass,
losslessly.

Every row has its own length in both caches; rejected tokens are taken back by not moving the length
past them. Rows whose answers are finished take the prompts that wait. B rows, g block size, m
captured layers, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepspec.evaluate.clock import PhaseClock, Seconds
from deepspec.evaluate.scheduler import Policy
from deepspec.model.drafter import DraftCache, Drafter, Proposal
from deepspec.model.host_copy import receive, send
from deepspec.model.sampling import verify_tokens
from deepspec.target.decoding_cache import TargetCache
from deepspec.target.generate import BatchSlots, Decode, Prefilled, TargetBatch, pad_right
from deepspec.target.model import Target


class Trace(NamedTuple):
    """What became of one prompt: its new tokens, and per round what was proposed and accepted."""

    token_ids: list[int]
    proposed: list[int]  # tokens that the target verified
    accepted: list[int]
    # Tokens that each round added: one more than accepted, unless an accepted stop token ended it.
    committed: list[int]
    # Of every token that was drafted, verified or not; empty where the draft has no such head.
    confidence: list[list[float]]


class Decoding:
    """The answers of all prompts, as the running rows add to them."""

    def __init__(self, slots: BatchSlots, settings: Decode) -> None:
        self.slots, self.settings = slots, settings
        self.traces = [Trace([], [], [], [], []) for _ in slots.waiting]

    def start(self, tokens: Sequence[int], admitted: Mapping[int, int]) -> None:
        """Add each admitted prompt's first token, which comes from its own forward pass and belongs
        to no round.
        """
        for token, (row, prompt) in zip(tokens, admitted.items(), strict=True):
            self._extend(row, prompt, [token])

    def note(self, *confidence: Sequence[list[float]]) -> None:
        """Keep the confidence of a round's tokens, if any; called before they are committed."""
        for of_rows in confidence:
            for row, prompt in self.slots.running.items():
                self.traces[prompt].confidence.append(of_rows[row])

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
            stop_ids = self.settings.stop_ids
            stop = next((index for index, token in enumerate(kept) if token in stop_ids), None)
            if stop is None:
                added = [*kept, following[row]]
            else:
                # An accepted stop token ends the answer: what follows it is dropped, and there is
                # no bonus token.
                kept = added = kept[: stop + 1]
            trace.proposed.append(lengths[row])
            trace.accepted.append(len(kept))
            trace.committed.append(len(added))
            if self._extend(row, prompt, added):
                counts[row] = num_accepted + 1
        return counts

    def _extend(self, row: int, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether the row continues."""
        ids = self.traces[prompt].token_ids
        ids.extend(tokens[: self.settings.max_new_tokens - len(ids)])
        if len(ids) < self.settings.max_new_tokens and ids[-1] not in self.settings.stop_ids:
            return True
        del self.slots.running[row]
        return False


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
    """Decode the prompts; `policy` decides how much of a block is verified, None: all of it.

    At temperature 0 the tokens are those of greedy decoding, else distributed as the target's.
    Prompt b draws from its own stream `seeds[b]`, of which every round takes the same number:
    nothing depends on what else is in its batch.
    """
    clock, block = PhaseClock(target.device), draft.block_size
    rows = TargetBatch(target, prompts, settings, seeds=seeds)
    slots = rows.slots
    decoding = Decoding(slots, settings)
    sizes, shelf = (slots.num_rows, rows.capacity + block + 1), target.shelf
    with (
        shelf.lend(target.new_cache, *sizes) as cache,
        shelf.lend(draft.new_cache, *sizes) as draft_cache,
    ):
        while True:
            while admitted := slots.admit():
                started = rows.start(admitted, cache)
                first = started.first.tolist()
                _start_draft(draft, draft_cache, started, first, alone=len(first) == slots.num_rows)
                decoding.start(first, admitted)
            if not slots.running:
                return decoding.traces, clock.read()
            if kept := slots.compact():
                for part in (cache, draft_cache, rows):
                    part.keep(kept)
            with clock.phase("draft"):
                uniforms = rows.uniforms.take(block) if rows.uniforms else None
                proposal = draft.propose(draft_cache, rows.tokens, rows.sampling, uniforms)
            lengths = _lengths(proposal, policy, decoding)
            inputs = torch.cat([rows.tokens[:, None], proposal.tokens[:, : max(lengths)]], dim=1)
            with clock.phase("verify"):
                context, *verdict = _verify(rows, cache, inputs, proposal, lengths)
            known = [] if proposal.confidence is None else [proposal.confidence]
            tokens, accepted, next_tokens, *confidence = receive(proposal.tokens, *verdict, *known)
            clock.settle()
            decoding.note(*confidence)
            counts = decoding.commit(tokens, lengths, accepted, next_tokens)
            cache.lengths = [sum(both) for both in zip(cache.lengths, counts, strict=True)]
            num_accepted, rows.tokens = verdict
            following = inputs.roll(-1, dims=1).scatter_(
                1, num_accepted[:, None], rows.tokens[:, None]
            )
            with clock.phase("draft"):
                draft.extend(draft_cache, context, following, counts)


def _start_draft(
    draft: Drafter,
    draft_cache: DraftCache,
    started: Prefilled,
    first: Sequence[int],
    *,
    alone: bool,
) -> None:
    """Give the draft the features of newly admitted prompts, and the token after each position.

    `first` are the first tokens of their answers.
    """
    counts = [len(prompt) for prompt in started.prompts]
    pairs = zip(started.prompts, first, strict=True)
    shifted = [[*prompt[1:], token] for prompt, token in pairs]
    following = pad_right(shifted, started.first.device)
    if alone:
        draft_cache.reset()
        draft.extend(draft_cache, started.context, following, counts)
    else:
        fresh = draft.new_cache(len(counts), max(counts))
        draft.extend(fresh, started.context, following, counts)
        draft_cache.put(started.rows, fresh)


def _lengths(proposal: Proposal, policy: Policy | None, decoding: Decoding) -> list[int]:
    """How many of each row's tokens the target is to verify [B]."""
    num_rows, block = proposal.tokens.shape
    if proposal.confidence is None or policy is None:
        return [block] * num_rows
    running = np.zeros(num_rows, dtype=bool)
    running[list(decoding.slots.running)] = True
    lengths: list[int] = policy(proposal.confidence.float().cpu().numpy(), running).tolist()
    return lengths


def _verify(
    rows: TargetBatch,
    cache: TargetCache,
    inputs: Tensor,
    proposal: Proposal,
    lengths: Sequence[int],
) -> Sequence[Tensor]:
    """Features [B, n, m * D] of `inputs` [B, n], the anchor and what is verified, and how many of
    them are accepted, and the token that follows, [B] long each.
    """
    target, sampling = rows.target, rows.sampling

    def step(
        inputs: Tensor, probs: Tensor | None, draws: Tensor | None, limits: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        context, last_hidden = target.forward(inputs, cache)
        logits = target.logits(last_hidden)
        return context, *verify_tokens(inputs[:, 1:], probs, logits, sampling, draws, limits)

    block, width = proposal.tokens.shape[1], max(lengths)
    draws = None
    if rows.uniforms:
        # The last number is for the token that follows, however few are verified.
        drawn = rows.uniforms.take(block + 1)
        draws = torch.cat([drawn[:, :width], drawn[:, block:]], 1)
    probs = proposal.probs[:, :width] if proposal.probs is not None else None
    limits = None if min(lengths) == width else send(lengths, target.device)
    return cache.run(
        "verify", step, (inputs, probs, draws, limits), num_new=width + 1, variant=sampling
    )
