"""The losses over the vocabulary without its logits: lm_head, Markov bias and all terms in chunks
of a few slots.

A chunk's logits live while it is worked on; their gradient is formed in the same pass, from the
coefficients that the terms will have in the sum. Nothing of size slots x vocabulary is kept, and
the target's distribution is computed once for every position, not once for every slot that looks at
it. All probabilities are float32.

With p the draft's and q the target's distribution of a slot, d = p - q, s = sign(d), and one-hot
label y, the gradients by the slot's logits are: cross-entropy p - y; soft cross-entropy d; total
variation p (s - <p, s>).

N slots, U target positions, D hidden size, V vocabulary, r Markov rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec.model.layers import softcap

# logits in memory at a time: 16 or 128 MB of float32, three times
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
MIN_CHUNK = 16  # slots, below which a matrix product is no longer worth its name


class Vocabulary(NamedTuple):
    """What turns states into logits: softcap(lm_head n) + W2 f."""

    lm_head: Tensor  # [V, D], frozen
    markov_w2: Tensor | None  # [V, r]
    softcap: float | None

    def draft_logits(self, states: Tensor, features: Tensor | None) -> Tensor:
        """Raw float32 logits [N, V] of normed draft states [N, D] and Markov features [N, r]."""
        logits = softcap(F.linear(states, self.lm_head), self.softcap).float()
        return (
            logits
            if self.markov_w2 is None or features is None
            else logits + F.linear(features, self.markov_w2)
        )

    def target_logits(self, states: Tensor) -> Tensor:
        """Raw float32 logits [N, V] of the target's final states [N, D]; carries no gradient."""
        return softcap(
            F.linear(states.detach().to(self.lm_head.dtype), self.lm_head.detach()), self.softcap
        ).float()


class Targets(NamedTuple):
    """The target's final states, each once, and which of them a slot is compared with."""

    states: Tensor  # [U, D]
    of_slot: Tensor  # [N] long

    @classmethod
    def gathered(cls, hidden: Tensor, places: Tensor) -> Targets:
        """Those at `places` [N] of `hidden` [P, D]."""
        distinct, of_slot = torch.unique(places, return_inverse=True)
        return cls(hidden[distinct], of_slot)


class Coefficients(NamedTuple):
    """What each term of a slot counts in the sum, [N] float32; None leaves the term out."""

    hard: Tensor | None = None  # cross-entropy to the label
    soft: Tensor | None = None  # cross-entropy to the target's distribution
    distance: Tensor | None = None  # total variation to the target's distribution


class Scores(NamedTuple):
    """The sum with its graph, and what was measured at each slot, [N] float32 without one."""

    total: Tensor
    cross_entropy: Tensor  # -log p(label); 0 where there are no labels
    soft_cross_entropy: Tensor  # -<q, log p>; 0 where it has no coefficient
    total_variation: Tensor  # |p - q|_1, in [0, 2]
    hits: Tensor  # 1 where both have the same likeliest token; 0 where soft has no coefficient


def score(
    states: Tensor,
    features: Tensor | None,
    vocabulary: Vocabulary,
    targets: Targets,
    *,
    labels: Tensor | None,
    coefficients: Coefficients,
) -> Scores:
    """Score the draft's normed states [N, D], with Markov features [N, r], against labels [N]
    and the target.
    """
    w2 = vocabulary.markov_w2 if features is not None else None
    order = targets.of_slot.argsort(stable=True)  # slots of one position side by side
    work = _Work(vocabulary.softcap, targets.states, targets.of_slot, labels, coefficients, order)
    return Scores(*_Score.apply(states, features, w2, vocabulary.lm_head, work))


class _Work(NamedTuple):
    softcap: float | None
    target_states: Tensor
    of_slot: Tensor
    labels: Tensor | None
    coefficients: Coefficients
    order: Tensor


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        features: Tensor | None,
        w2: Tensor | None,
        lm_head: Tensor,
        work: _Work,
    ) -> tuple[Tensor, ...]:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        with torch.autocast(kind, enabled=False):
            chunks = _Chunks(
                states,
                features,
                w2,
                lm_head,
                work,
                dtype=dtype,
                needs_gradient=any(ctx.needs_input_grad[:3]),
            )
            rows = max(MIN_CHUNK, CHUNK_ELEMENTS.get(kind, CHUNK_ELEMENTS["cuda"]) // len(lm_head))
            for first in range(0, len(states), rows):
                chunks.add(work.order[first : first + rows])
        ctx.save_for_backward(chunks.to_states, chunks.to_features, chunks.to_w2)
        measured = (chunks.cross_entropy, chunks.soft, chunks.distance, chunks.hits)
        ctx.mark_non_differentiable(*measured)
        return (chunks.total(), *measured)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = [
            None if part is None else part * gradients[0].to(part.dtype)
            for part in ctx.saved_tensors
        ]
        return (*saved, None, None)


class _Chunks:
    """What is gathered chunk by chunk: the terms of each slot, and the gradient of their sum."""

    def __init__(  # noqa: PLR0913 - the inputs of the autograd function, as they are
        self,
        states: Tensor,
        features: Tensor | None,
        w2: Tensor | None,
        lm_head: Tensor,
        work: _Work,
        *,
        dtype: torch.dtype,
        needs_gradient: bool,
    ) -> None:
        self.states, self.features, self.work, self.dtype = states, features, work, dtype
        self.lm_head = lm_head.to(dtype)
        self.w2 = None if w2 is None else w2.to(dtype)
        self.cross_entropy, self.soft, self.distance, self.hits = states.new_zeros(
            4, len(states), dtype=torch.float32
        ).unbind(0)
        self.to_states = torch.zeros_like(states) if needs_gradient else None
        self.to_features = (
            torch.zeros_like(features) if needs_gradient and features is not None else None
        )
        # All chunks add to it, and in bfloat16 (DeepSpeed's weights) each would round it anew.
        # Autograd casts it at the end.
        self.to_w2 = (
            torch.zeros_like(w2, dtype=torch.float32) if needs_gradient and w2 is not None else None
        )

    def total(self) -> Tensor:
        found, coefficients = (self.cross_entropy, self.soft, self.distance), self.work.coefficients
        terms = [
            (weight * term).sum()
            for weight, term in zip(coefficients, found, strict=True)
            if weight is not None
        ]
        return torch.stack(terms).sum() if terms else self.cross_entropy.new_zeros(())

    def add(self, slots: Tensor) -> None:
        """Score the slots with these numbers; they look at consecutive target positions."""
        work = self.work
        base = F.linear(self.states[slots].to(self.dtype), self.lm_head)
        slope = None
        if work.softcap is not None:
            base = softcap(base, work.softcap)
            slope = (
                1 - (base.float() / work.softcap).square_() if self.to_states is not None else None
            )
        logits = base.float()
        del base
        if self.w2 is not None and self.features is not None:
            logits += F.linear(self.features[slots].to(self.dtype), self.w2)
        gradient = self._terms(slots, logits, self._target(slots))
        if gradient is not None:
            self._backward(slots, gradient, slope)

    def _target(self, slots: Tensor) -> Tensor:
        """The target's distribution at each slot [n, V], computed once for every position among
        them.
        """
        of_slot = self.work.of_slot[slots]
        first, last = int(of_slot[0]), int(of_slot[-1])
        logits = F.linear(self.work.target_states[first : last + 1].to(self.dtype), self.lm_head)
        return softcap(logits, self.work.softcap).float().softmax(-1)[of_slot - first]

    def _terms(self, slots: Tensor, logits: Tensor, target: Tensor) -> Tensor | None:
        """Fill in the slots' terms; their gradient by the logits [n, V], which both inputs are
        used up for.
        """
        work, labels = (
            self.work,
            None if self.work.labels is None else self.work.labels[slots, None],
        )
        hard, soft, distance = (
            None if weight is None else weight[slots, None] for weight in work.coefficients
        )
        log_sum = logits.logsumexp(-1, keepdim=True)
        if labels is not None:
            self.cross_entropy[slots] = (log_sum - logits.gather(-1, labels))[:, 0]
        if soft is not None:
            self.soft[slots] = log_sum[:, 0] - _dot(target, logits)
            self.hits[slots] = (logits.argmax(-1) == target.argmax(-1)).float()
        draft = logits.sub_(log_sum).exp_()
        difference = torch.sub(draft, target, out=target)
        self.distance[slots] = torch.linalg.vector_norm(difference, 1, dim=-1)
        if self.to_states is None:
            return None
        if distance is None:
            gradient = difference.mul_(soft) if soft is not None else difference.zero_()
            gradient = gradient if hard is None else gradient.add_(draft.mul_(hard))
        else:
            sign = torch.sign(difference) if soft is not None else difference.sign_()
            by_draft = sign.sub_(_dot(draft, sign)[:, None]).mul_(distance)
            by_draft = by_draft if hard is None else by_draft.add_(hard)
            gradient = by_draft.mul_(draft)
            gradient = gradient if soft is None else gradient.add_(difference.mul_(soft))
        if hard is not None and labels is not None:
            gradient.scatter_add_(-1, labels, -hard)
        return gradient

    def _backward(self, slots: Tensor, gradient: Tensor, slope: Tensor | None) -> None:
        if (
            self.w2 is not None
            and self.features is not None
            and self.to_features is not None
            and self.to_w2 is not None
        ):
            by_logits = gradient.to(self.dtype)
            self.to_features[slots] = (by_logits @ self.w2).to(self.features.dtype)
            self.to_w2 += by_logits.T @ self.features[slots].to(self.dtype)
        if slope is not None:
            gradient = gradient.mul_(slope)
        if self.to_states is not None:
            self.to_states[slots] = (gradient.to(self.dtype) @ self.lm_head).to(self.states.dtype)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    """Row by row, [n, V] twice -> [n], without their product in memory."""
    return torch.bmm(first[:, None], second[:, :, None])[:, 0, 0]
