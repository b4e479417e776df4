"""Distributions, draws from them, and lossless verification.

Speculative sampling: Leviathan 2023, Chen 2023.

All probabilities are float32, and the tensor a token was drawn from is the one its verification
sees. B rows, g draft tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.config.data import SamplingConfig
from deepspec.model.host_copy import HOST, row_numbers, send


class Verdict(NamedTuple):
    """How far the target accepts each row's draft, and the token with which it goes on."""

    num_accepted: Tensor  # [B] long, draft tokens accepted
    next_token: Tensor  # [B] long, the target's own token that follows them


def distribution(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Probabilities [..., V] float32 that tokens are drawn from, of raw logits of any float dtype.

    Temperature (above 0) first, then top-k, top-p on what is left, min-p.
    """
    scaled = logits.float() if sampling.temperature == 1 else logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = scaled.topk(sampling.top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    kept = probs = scaled.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # mass of the likelier tokens alone: the one that crosses top_p is kept
        ordered.masked_fill_(ordered.cumsum(-1) - ordered >= sampling.top_p, 0.0)
        kept = torch.empty_like(probs).scatter_(-1, order, ordered)
    if sampling.min_p > 0:
        kept = kept.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs if kept is probs else kept / kept.sum(-1, keepdim=True)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """One token id per distribution [...] long, by inverse CDF.

    `probs` [..., V] have any positive sum, `uniforms` [...] are in [0, 1).

    A row's token depends on its own distribution and number only, and always has probability above
    zero.
    """
    cumulative = probs.double().cumsum(-1)
    total = cumulative[..., -1:]
    wanted = uniforms.to(probs.device, torch.float64).unsqueeze(-1) * total
    # The product may round up to the total itself, and no token lies beyond that.
    wanted = torch.minimum(wanted, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)


class DrawnTokens(NamedTuple):
    """Chosen tokens and the distributions that they were drawn from."""

    tokens: Tensor  # [...] long
    # [..., V] float32, the distributions they were drawn from; None where they are the likeliest
    probs: Tensor | None


def choose_tokens(logits: Tensor, sampling: SamplingConfig, uniforms: Tensor | None) -> DrawnTokens:
    """One token per row of logits [..., V], drawn with its number of `uniforms` [...] in [0, 1).

    The likeliest where there are no numbers, and at temperature 0.
    """
    if uniforms is None or sampling.temperature == 0:
        return DrawnTokens(logits.argmax(-1), None)
    probs = distribution(logits, sampling)
    return DrawnTokens(draw(probs, uniforms), probs)


def stacked(slots: Sequence[DrawnTokens]) -> DrawnTokens:
    """The draws of one slot after the other [B] as those of a block [B, g]."""
    probs = [slot.probs for slot in slots if slot.probs is not None]
    tokens = torch.stack([slot.tokens for slot in slots], 1)
    return DrawnTokens(tokens, torch.stack(probs, 1) if probs else None)


def verify_tokens(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    sampling: SamplingConfig,
    uniforms: Tensor | None,
    num_proposed: Tensor | None = None,
) -> Verdict:
    """Accept a prefix of each row's draft tokens; the output is distributed as the target's own.

    Args:
        draft_tokens: [B, g] long.
        draft_probs: [B, g, V], the very distributions they were drawn from; None: each was certain.
        target_logits: [B, g + 1, V] raw logits of the target after anchor and draft tokens.
        sampling: the target's; at temperature 0 only likeliest tokens are compared.
        uniforms: [B, g + 1] in [0, 1): one per acceptance test, the last for the token that
            follows.
        num_proposed: [B] long, how many of the g tokens count, for rows that proposed fewer.
    """
    num_slots = draft_tokens.shape[1]
    if sampling.temperature == 0 or uniforms is None:
        likeliest = target_logits.argmax(-1)
        num_accepted = _num_accepted(draft_tokens == likeliest[:, :num_slots], num_proposed)
        return Verdict(num_accepted, likeliest.gather(1, num_accepted[:, None])[:, 0])
    target_probs = distribution(target_logits, sampling)
    uniforms = uniforms.to(target_logits.device)
    if draft_probs is None:
        draft_probs = F.one_hot(draft_tokens, target_probs.shape[-1]).float()
    of_draft = draft_probs.gather(-1, draft_tokens[..., None])[..., 0]
    of_target = target_probs[:, :num_slots].gather(-1, draft_tokens[..., None])[..., 0]
    # u < p / q as a product: a token of probability 0 is never accepted, one with p >= q always is.
    num_accepted = _num_accepted(uniforms[:, :num_slots] * of_draft < of_target, num_proposed)
    following = _following(target_probs, draft_probs, num_accepted, num_proposed)
    return Verdict(num_accepted, draw(following, uniforms[:, num_slots]))


def _num_accepted(accepted: Tensor, num_proposed: Tensor | None) -> Tensor:
    """How many tokens come before the first that is not accepted, or not proposed [B]."""
    if num_proposed is not None:
        slots = torch.arange(accepted.shape[1], device=accepted.device)
        accepted = accepted & (slots < num_proposed[:, None])
    return accepted.cumprod(1).sum(1)


def _following(
    target_probs: Tensor, draft_probs: Tensor, num_accepted: Tensor, num_proposed: Tensor | None
) -> Tensor:
    """Unnormalised distribution [B, V] of the token after the accepted ones.

    It is max(p - q, 0), or p where nothing was rejected.
    """
    num_slots = draft_probs.shape[1]
    rows = torch.arange(len(num_accepted), device=num_accepted.device)
    wanted = target_probs[rows, num_accepted]
    if num_slots == 0:
        return wanted
    limit = num_slots if num_proposed is None else num_proposed
    rejected = (num_accepted < limit)[:, None]
    residual = (wanted - draft_probs[rows, num_accepted.clamp(max=num_slots - 1)]).clamp(min=0.0)
    # p = q up to rounding leaves no mass: the rejection itself was rounding, and p is right.
    return torch.where(rejected & (residual.sum(-1, keepdim=True) > 0), residual, wanted)


class UniformStream:
    """Uniform numbers in [0, 1), one stream per row, sent to the device many at a time.

    What a row gets depends on its seed and on how many it took before.
    """

    CHUNK = 512

    def __init__(self, seeds: Sequence[int], device: torch.device = HOST) -> None:
        self._sources = [_source(seed) for seed in seeds]
        self._device = device
        self._numbers = torch.empty(len(seeds), 0, dtype=torch.float64, device=device)
        self._next = 0

    def take(self, num: int) -> Tensor:
        """The next `num` numbers of every row [B, num] float64."""
        if self._next + num > self._numbers.shape[1]:
            drawn = np.stack([source.random(max(num, self.CHUNK)) for source in self._sources])
            fresh = send(drawn, self._device)
            self._numbers = torch.cat([self._numbers[:, self._next :], fresh], dim=1)
            self._next = 0
        self._next += num
        return self._numbers[:, self._next - num : self._next]

    def start(self, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Restart rows with other seeds; returns the first number of each [n] float64.

        The other rows keep their place.
        """
        for row, seed in zip(rows, seeds, strict=True):
            self._sources[row] = _source(seed)
        left = self._numbers.shape[1] - self._next
        drawn = send(np.stack([self._sources[row].random(1 + left) for row in rows]), self._device)
        # numbers already handed out are views of the old tensor
        self._numbers = self._numbers.clone()
        self._numbers[row_numbers(tuple(rows), self._device), self._next :] = drawn[:, 1:]
        return drawn[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        self._sources = [self._sources[row] for row in rows]
        self._numbers = self._numbers[row_numbers(tuple(rows), self._device)]


def _source(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed % 2**64))
