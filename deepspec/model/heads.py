"""DSpark's two heads.

The Markov head biases a slot's logits by the token before it; the confidence head predicts
acceptance.

Every Markov head is a low-rank bias W2 f, where f [.., r] depends on its kind (eq. 5-6).
N any leading shape, g block size, D hidden size, r Markov rank, V vocabulary.
"""

import torch
from torch import Tensor, nn

from deepspec.config.data import SamplingConfig
from deepspec.config.draft import ConfidenceConfig, MarkovConfig
from deepspec.model.sampling import DrawnTokens, choose_tokens, stacked
from deepspec.model.spec import DraftSpec


class MarkovHead(nn.Module):
    """Tensor names are the published ones; only those of the chosen kind exist."""

    def __init__(self, spec: DraftSpec, config: MarkovConfig) -> None:
        super().__init__()
        rank, self.kind = config.rank, config.kind
        self.markov_w1 = nn.Embedding(spec.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, spec.vocab_size, bias=False)
        if config.kind == "gated":
            self.gate_proj = nn.Linear(spec.hidden_size + rank, rank)
        elif config.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + spec.hidden_size, 3 * rank)

    def features(self, states: Tensor, previous: Tensor) -> Tensor:
        """The f [N, g, r] of whole blocks: states [N, g, D], embedded previous tokens [N, g, r]."""
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
        """The f [N, r] of one slot, and the state that the next slot's step receives.

        A block's first slot receives None.
        """
        if self.kind == "vanilla":
            return previous, None
        if self.kind == "gated":
            gate = self.gate_proj(torch.cat([state, previous.to(state.dtype)], -1))
            return torch.sigmoid(gate) * previous, None
        if carried is None:
            carried = torch.zeros_like(previous)
        joint = self.joint_proj(torch.cat([carried, previous, state], -1))
        gate, candidate, output = joint.chunk(3, dim=-1)
        carried = torch.lerp(torch.tanh(candidate), carried.to(gate.dtype), torch.sigmoid(gate))
        return torch.tanh(output), carried


def sample_block(
    head: MarkovHead,
    states: Tensor,
    logits: Tensor,
    *,
    anchor: Tensor,
    sampling: SamplingConfig,
    uniforms: Tensor | None,
) -> DrawnTokens:
    """Draw a block left to right, each slot's logits biased by the token drawn before it.

    Args:
        head: the Markov head.
        states: normed states [B, g, D].
        logits: base logits [B, g, V].
        anchor: the token before the first slot [B] long.
        sampling: how tokens are drawn.
        uniforms: [B, g] in [0, 1); None takes the likeliest tokens.
    """
    token, carried = anchor, None
    drawn = []
    for slot, (state, base) in enumerate(zip(states.unbind(1), logits.unbind(1), strict=True)):
        feature, carried = head.step(state, head.markov_w1(token), carried)
        biased = torch.addmm(base, feature, head.markov_w2.weight.t())
        numbers = None if uniforms is None else uniforms[:, slot]
        drawn.append(choose_tokens(biased, sampling, numbers))
        token = drawn[-1].tokens
    return stacked(drawn)


class ConfidenceHead(nn.Module):
    """Logit of the chance that a slot's token is accepted, given all before it are (eq. 7)."""

    def __init__(self, spec: DraftSpec, config: ConfidenceConfig) -> None:
        super().__init__()
        self.with_markov, self.detach = config.markov_features, config.detach
        rank = spec.markov.rank if spec.markov and self.with_markov else 0
        self.proj = nn.Linear(spec.hidden_size + rank, 1)

    def forward(self, states: Tensor, previous: Tensor | None) -> Tensor:
        """Logits [N] of normed states [N, D] and the embedded tokens before them [N, r].

        The tokens are not read by a head without Markov features.
        """
        if self.with_markov and previous is not None:
            states = torch.cat([states, previous.to(states.dtype)], -1)
        if self.detach:  # its loss then stops here and does not reach the backbone
            states = states.detach()
        return self.proj(states).squeeze(-1)
