"""DSpark's two heads: the Markov head biases a slot's logits by the token before it, the confidence
head foresees acceptance.

Every Markov head is a low-rank bias W2 f, where f [.., r] depends on its kind (eq. 5-6).
N any leading shape, g block size, D hidden size, r Markov rank, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import MarkovConfig
from deepspec.model.sampling import distribution, draw
from deepspec.model.spec import DraftSpec


class MarkovHead(nn.Module):
    """Tensor names are the published ones; only those of the chosen kind exist."""

    def __init__(self, config: MarkovConfig, *, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        rank = config.rank
        self.kind, self.rank = config.kind, rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, vocab_size, bias=False)
        if config.kind == "gated":
            self.gate_proj = nn.Linear(hidden_size + rank, rank)
        elif config.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def features(self, states: Tensor, previous: Tensor) -> Tensor:
        """The f [N, g, r] of whole blocks: normed states [N, g, D] and the tokens before each
        slot embedded [N, g, r].
        """
        if self.kind != "rnn":
            return self.step(states, previous, None)[0]
        carried, steps = None, []
        for state, token in zip(states.unbind(-2), previous.unbind(-2), strict=True):
            feature, carried = self.step(state, token, carried)
            steps.append(feature)
        return torch.stack(steps, dim=-2)

    def step(
        self, state: Tensor, previous: Tensor, carried: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The f [N, r] of one slot and what the next slot's step is to be given; None carries
        nothing into a block's first.
        """
        if self.kind == "vanilla":
            return previous, None
        if self.kind == "gated":
            return torch.sigmoid(
                self.gate_proj(torch.cat([state, previous.to(state.dtype)], -1))
            ) * previous, None
        if carried is None:
            carried = torch.zeros_like(previous)
        joint = self.joint_proj(torch.cat([carried, previous, state], -1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        carried = torch.lerp(torch.tanh(candidate), carried.to(gate.dtype), torch.sigmoid(gate))
        return torch.tanh(output), carried


class Sampled(NamedTuple):
    tokens: Tensor  # [B, g] long
    probs: Tensor | None  # [B, g, V] float32, None when greedy
    previous: Tensor  # [B, g, r] the embedded tokens before each slot


def sample_block(
    head: MarkovHead,
    states: Tensor,
    logits: Tensor,
    *,
    anchor: Tensor,
    sampling: SamplingConfig,
    uniforms: Tensor | None,
) -> Sampled:
    """Draw a block left to right, each slot's logits biased by the token drawn before it.

    Args:
        head: the Markov head.
        states: normed states [B, g, D].
        logits: base logits [B, g, V].
        anchor: the token before the first slot [B] long.
        sampling: how tokens are drawn.
        uniforms: [B, g] in [0, 1); None takes the likeliest token.
    """
    w1, w2 = head.markov_w1.weight, head.markov_w2.weight.t()
    token, carried = anchor, None
    tokens, probs, previous = [], [], []
    for slot, (state, base) in enumerate(zip(states.unbind(1), logits.unbind(1), strict=True)):
        embedded = w1[token]
        feature, carried = head.step(state, embedded, carried)
        biased = torch.addmm(base, feature, w2)
        if uniforms is None:
            token = biased.argmax(-1)
        else:
            probs.append(distribution(biased, sampling))
            token = draw(probs[-1], uniforms[:, slot])
        tokens.append(token)
        previous.append(embedded)
    return Sampled(
        torch.stack(tokens, 1), torch.stack(probs, 1) if probs else None, torch.stack(previous, 1)
    )


class ConfidenceHead(nn.Module):
    """Logit of the chance that the target accepts a slot's token, given all slots before it
    accepted (eq. 7).
    """

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.with_markov = spec.confidence is not None and spec.confidence.markov_features
        rank = spec.markov.rank if spec.markov and self.with_markov else 0
        self.proj = nn.Linear(spec.hidden_size + rank, 1)

    def forward(self, states: Tensor, previous: Tensor | None) -> Tensor:
        """Normed states [N, D] and, if configured so, embedded tokens before them [N, r] ->
        logits [N].
        """
        inputs = (
            torch.cat([states, previous.to(states.dtype)], -1)
            if self.with_markov and previous is not None
            else states
        )
        return self.proj(inputs).squeeze(-1)
