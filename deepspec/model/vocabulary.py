"""What turns the states of a draft, and of its target, into logits over the vocabulary."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Vocabulary(NamedTuple):
    """softcap(lm_head n) + W2 f, of normed states n and Markov features f."""

    lm_head: Tensor  # [V, D], frozen
    markov_w2: Tensor | None  # [V, r]
    softcap: float | None

    def logits(self, states: Tensor, features: Tensor | None = None) -> Tensor:
        """Raw float32 logits [N, V] of states [N, D], with the bias of Markov features [N, r]."""
        logits = softcap(F.linear(states, self.lm_head), self.softcap).float()
        if self.markov_w2 is None or features is None:
            return logits
        return logits + F.linear(features, self.markov_w2)


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`, or the logits themselves without a cap (Gemma)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
