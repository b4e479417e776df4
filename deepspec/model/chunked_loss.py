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

from deepspec.model.execution import compiled, compute_dtype
from deepspec.model.loss_terms import LogitGradient, SlotFacts, SlotTerms, slot_terms
from deepspec.model.memory import usable_bytes
from deepspec.model.targets import Targets

# Logits of a chunk, 16 or 128 MB in float32; memory is planned with these. A GPU with room, which
# then is no part of what a step must have, scores up to four times as many, to read lm_head less
# often: by arithmetic its matrix products then no longer wait for that.
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 25}
MOST_CHUNKS = 4  # of these sizes at a time
BYTES_PER_LOGIT = 24  # six float32 tensors where the terms are not compiled, two where they are
CHUNK_SHARE = 0.5  # of what is free on a GPU; the backward pass has to find room as well
MIN_CHUNK = 16  # slots; smaller matrix products waste the device


def chunk_elements(device: torch.device) -> int:
    """Logits that are scored at a time; on a GPU as many as half of its free memory holds.

    There it is a power of two, so that shapes repeat although the free memory varies.
    """
    planned = CHUNK_ELEMENTS[device.type]
    if device.type == "cpu":
        return planned
    fitting = int(CHUNK_SHARE * usable_bytes(device)) // BYTES_PER_LOGIT
    return min(MOST_CHUNKS * planned, 1 << max(fitting.bit_length() - 1, 0))


class Vocabulary(NamedTuple):
    """Logits of a draft are softcap(lm_head n) + W2 f, of normed states n and Markov features f.

    Its target's are the same without the features.
    """

    lm_head: Tensor  # [V, D], frozen
    markov_w2: Tensor | None  # [V, r]
    cap: float | None
    compile: bool = False  # whether the loss's terms are computed by a compiled function


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
    learning = [part.requires_grad for part in (states, features, w2) if part is not None]
    if torch.is_grad_enabled() and any(learning):
        chunks.prepare_gradients()
    return Scores(*_Score.apply(states, features, w2, chunks))


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, features: Tensor | None, w2: Tensor | None, chunks: "_Chunks"
    ) -> tuple[Tensor, ...]:
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
        w2 = self.vocabulary.markov_w2
        self.lm_head = self.vocabulary.lm_head.to(self.dtype)
        self.w2 = None if w2 is None else w2.to(self.dtype)
        # A row is not split up, which would store all of its numbers between the parts.
        whole = {"split_reductions": False}
        self.terms = compiled(slot_terms, **whole) if self.vocabulary.compile else slot_terms
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
        size = max(MIN_CHUNK, chunk_elements(self.states.device) // len(self.lm_head))
        order, in_order = self.targets.places.order, self.targets.places.in_order
        for first in range(0, len(order), size):
            self.add(order[first : first + size], in_order[first : first + size])
        by_term = zip(self.coefficients, self.measured[:3], strict=True)
        sums = [(weight * term).sum() for weight, term in by_term if weight is not None]
        return sum(sums, self.measured[0].new_zeros(()))

    def add(self, slots: Tensor, positions: np.ndarray) -> None:
        """Score the slots with these numbers [n]; their target positions [n] are ascending."""
        # The host knows the first and the last, and need not ask the device for them.
        first, last = int(positions[0]), int(positions[-1])
        factors = (None if factor is None else factor[slots] for factor in self.coefficients)
        label = None if self.labels is None else self.labels[slots]
        facts = SlotFacts(self.targets.places.of_slot[slots] - first, label, *factors)
        terms: SlotTerms = self.terms(
            self._scored(self.states[slots], self.lm_head),
            None
            if self.features is None or self.w2 is None
            else self._scored(self.features[slots], self.w2),
            self._scored(self.targets.states[first : last + 1], self.lm_head),
            facts,
            cap=self.vocabulary.cap,
            with_gradient=self.to_states is not None,
        )
        for kept, found in zip(self.measured, terms.measured, strict=True):
            if found is not None:
                kept[slots] = found
        if terms.gradient is not None:
            self._add_gradient(slots, terms.gradient)

    def _add_gradient(self, slots: Tensor, by: LogitGradient) -> None:
        """Carry the gradient of the slots' sum on to states, features and W2."""
        if (
            self.features is not None
            and self.w2 is not None
            and self.to_features is not None
            and self.to_w2 is not None
        ):
            self.to_features[slots] = (by.bias @ self.w2).to(self.features.dtype)
            self.to_w2 += by.bias.T @ self.features[slots].to(self.dtype)
        if self.to_states is not None:
            self.to_states[slots] = (by.scored @ self.lm_head).to(self.states.dtype)

    def _scored(self, states: Tensor, weight: Tensor) -> Tensor:
        """Products of states with the vocabulary [.., V], whose width is compiled in."""
        scored = F.linear(states.to(self.dtype), weight)
        if self.vocabulary.compile:
            torch._dynamo.mark_static(scored, 1)
        return scored
