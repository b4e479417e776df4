"""The losses over the vocabulary without all of its logits: they are scored a few slots at a time.

A chunk's logits live while it is scored, and the gradient of the sum is formed in the same pass,
from the coefficients that the terms have in it. Nothing of size slots x vocabulary is kept, and the
target's distribution is computed once for every position, not once for every slot that is compared
with it. All probabilities are float32.

N slots, n of them in a chunk, U target positions, D hidden size, V vocabulary, r Markov rank.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.model.execution import compute_dtype
from deepspec.model.targets import Targets

# logits of a chunk: 16 or 128 MB of float32, in memory up to six times
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
MIN_CHUNK = 16  # slots; smaller matrix products waste the device


class Vocabulary(NamedTuple):
    """Logits of a draft are softcap(lm_head n) + W2 f, of normed states n and Markov features f.

    Its target's are the same without the features.
    """

    lm_head: Tensor  # [V, D], frozen
    markov_w2: Tensor | None  # [V, r]
    cap: float | None


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(logits / cap)`, or the logits themselves without a cap (Gemma)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


class Coefficients(NamedTuple):
    """The factor of each slot's terms in the sum, [N] float32; None leaves the term out."""

    ce: Tensor | None = None  # cross-entropy to the label
    soft_ce: Tensor | None = None  # cross-entropy to the target's distribution
    tv: Tensor | None = None  # total variation to the target's distribution


class Scores(NamedTuple):
    """The sum with its graph, and what was measured at each slot, [N] float32 without one."""

    total: Tensor
    ce: Tensor  # -log p(label); 0 where there are no labels
    soft_ce: Tensor  # -<q, log p>; 0 where it has no coefficient
    tv: Tensor  # |p - q|_1, in [0, 2]
    hits: (
        Tensor  # 1 where p and q have the same likeliest token; 0 where soft_ce has no coefficient
    )


def score(
    states: Tensor,
    features: Tensor | None,
    vocabulary: Vocabulary,
    targets: Targets,
    *,
    labels: Tensor | None,
    coefficients: Coefficients,
) -> Scores:
    """Score normed draft states [N, D], with Markov features [N, r], against labels [N] and target.

    Gradients flow into the states, the features and W2.
    """
    chunks = _Chunks(states, features, vocabulary, targets, labels, coefficients)
    w2 = vocabulary.markov_w2 if features is not None else None
    return Scores(*_Score.apply(states, features, w2, chunks))


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, features: Tensor | None, w2: Tensor | None, chunks: "_Chunks"
    ) -> tuple[Tensor, ...]:
        if any(ctx.needs_input_grad):
            chunks.prepare_gradients()
        with torch.autocast(states.device.type, enabled=False):  # the chunks choose their dtypes
            total = chunks.add_all()
        ctx.save_for_backward(chunks.to_states, chunks.to_features, chunks.to_w2)
        ctx.mark_non_differentiable(*chunks.measured)
        return (total, *chunks.measured)

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = [
            None if part is None else part * by_total.to(part.dtype) for part in ctx.saved_tensors
        ]
        return (*saved, None)


@dataclass
class _Chunks:
    """What is gathered chunk by chunk: the terms of each slot, and the gradient of their sum."""

    states: Tensor
    features: Tensor | None
    vocabulary: Vocabulary
    targets: Targets
    labels: Tensor | None
    coefficients: Coefficients
    to_states: Tensor | None = None
    to_features: Tensor | None = None
    to_w2: Tensor | None = None

    def __post_init__(self) -> None:
        self.dtype = compute_dtype(self.states)
        lm_head, w2, self.cap = self.vocabulary
        self.lm_head = lm_head.to(self.dtype)
        self.w2 = None if w2 is None else w2.to(self.dtype)
        self.measured = self.states.new_zeros(4, len(self.states), dtype=torch.float32).unbind(0)

    def prepare_gradients(self) -> None:
        """Gradients are formed as well."""
        self.to_states = torch.zeros_like(self.states)
        if self.features is not None and self.w2 is not None:
            self.to_features = torch.zeros_like(self.features)
            # All chunks add to it, and in bfloat16 (DeepSpeed's weights) each would round it anew.
            # Autograd casts it at the end.
            self.to_w2 = torch.zeros_like(self.w2, dtype=torch.float32)

    def add_all(self) -> Tensor:
        """Score all slots, those of one target position side by side; returns their sum."""
        elements = CHUNK_ELEMENTS.get(self.states.device.type, CHUNK_ELEMENTS["cuda"])
        size = max(MIN_CHUNK, elements // len(self.lm_head))
        order, in_order = self.targets.places.order, self.targets.places.in_order
        for first in range(0, len(order), size):
            self.add(order[first : first + size], in_order[first : first + size])
        by_term = zip(self.coefficients, self.measured[:3], strict=True)
        sums = [(weight * term).sum() for weight, term in by_term if weight is not None]
        return sum(sums, self.measured[0].new_zeros(()))

    def add(self, slots: Tensor, positions: np.ndarray) -> None:
        """Score the slots with these numbers [n]; their target positions [n] are ascending."""
        logits, slope = self._logits(slots)
        first, last = int(positions[0]), int(positions[-1])
        p, difference = self._measure(slots, logits, self._target(slots, first=first, last=last))
        del logits  # two such tensors less while the gradient is formed
        if self.to_states is None:
            return
        gradient = self._gradient(slots, p, difference)
        if (
            self.features is not None
            and self.w2 is not None
            and self.to_features is not None
            and self.to_w2 is not None
        ):
            by_bias = gradient.to(self.dtype)
            self.to_features[slots] = (by_bias @ self.w2).to(self.features.dtype)
            self.to_w2 += by_bias.T @ self.features[slots].to(self.dtype)
            del by_bias
        if slope is not None:
            gradient = gradient * slope
        by_states = gradient.to(self.dtype) @ self.lm_head
        self.to_states[slots] = by_states.to(self.states.dtype)

    def _logits(self, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """The draft's logits [n, V], and the slope of the softcap where there is one."""
        cap, slope = self.cap, None
        logits = softcap(F.linear(self.states[slots].to(self.dtype), self.lm_head), cap).float()
        if cap is not None:
            slope = 1 - (logits / cap).square()  # d cap tanh(x / cap) / dx = 1 - tanh(x / cap)^2
        if self.features is not None and self.w2 is not None:
            bias = F.linear(self.features[slots].to(self.dtype), self.w2)
            logits = (logits + bias).float()  # float64 weights have float32 logits as well
        return logits, slope

    def _target(self, slots: Tensor, *, first: int, last: int) -> Tensor:
        """The target's distribution q at each slot [n, V], computed once for every position.

        The host knows the first and the last position, and need not ask the device for them.
        """
        states = self.targets.states[first : last + 1].to(self.dtype)
        logits = softcap(F.linear(states, self.lm_head), self.cap)
        return logits.float().softmax(-1)[self.targets.places.of_slot[slots] - first]

    def _measure(self, slots: Tensor, logits: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Fill in what is measured at the slots; returns p and p - q [n, V]."""
        ce, soft_ce, tv, hits = self.measured
        log_sum = logits.logsumexp(-1, keepdim=True)
        p = (logits - log_sum).exp_()  # in place of the difference alone
        difference = p - q
        if self.labels is not None:
            label = self.labels[slots, None]
            ce[slots] = (log_sum - logits.gather(-1, label))[:, 0]  # -log p(y)
        if self.coefficients.soft_ce is not None:
            soft_ce[slots] = log_sum[:, 0] - _dot(q, logits)  # -<q, log p>
            hits[slots] = (logits.argmax(-1) == q.argmax(-1)).float()
        tv[slots] = torch.linalg.vector_norm(difference, 1, dim=-1)  # |p - q|_1
        return p, difference

    def _gradient(self, slots: Tensor, p: Tensor, difference: Tensor) -> Tensor:
        """Gradient of the slots' sum by their logits [n, V].

        With one-hot label y and s = sign(p - q), it is p - y of the cross-entropy, p - q of the
        soft cross-entropy, and p (s - <p, s>) of the total variation.
        """
        ce, soft_ce, tv = (
            None if weight is None else weight[slots, None] for weight in self.coefficients
        )
        factor = ce  # of p
        if tv is not None:
            sign = difference.sign()
            by_tv = tv * (sign - _dot(p, sign)[:, None])  # tv: s - <p, s>
            factor = by_tv if ce is None else by_tv + ce  # ce: the p of p - y
        gradient = torch.zeros_like(p) if factor is None else factor * p
        if soft_ce is not None:
            by_soft_ce = soft_ce * difference  # soft_ce: p - q
            gradient = by_soft_ce if factor is None else gradient + by_soft_ce
        if ce is not None and self.labels is not None:
            gradient.scatter_add_(-1, self.labels[slots, None], -ce)  # ce: the -y of p - y
        return gradient


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Row by row, [n, V] twice -> [n], without their product in memory."""
    return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]
