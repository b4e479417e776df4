"""The losses: three terms for block drafters (DSpark eq. 9-12), soft cross-entropy for Eagle3; counted positions only.

All probabilities are float32. N counted slots, M blocks, g block size, D hidden size, V vocabulary, r Markov rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config import LossConfig
from deepspec.model.backbone import softcap

Metrics = dict[str, tuple[Tensor, Tensor]]


class Vocabulary(NamedTuple):
    """What turns states into logits: softcap(lm_head n) + W2 f."""

    lm_head: Tensor  # [V, D], frozen
    markov_w2: Tensor | None  # [V, r]
    softcap: float | None

    def draft_logits(self, states: Tensor, features: Tensor | None) -> Tensor:
        """Raw float32 logits [N, V] of normed draft states [N, D] and Markov features [N, r]."""
        logits = softcap(F.linear(states, self.lm_head), self.softcap).float()
        return logits if self.markov_w2 is None or features is None else logits + F.linear(features, self.markov_w2)

    def target_logits(self, states: Tensor) -> Tensor:
        """Raw float32 logits [N, V] of the target's final states [N, D]; carries no gradient."""
        return softcap(F.linear(states.detach().to(self.lm_head.dtype), self.lm_head.detach()), self.softcap).float()


class Slots(NamedTuple):
    """The counted slots of a batch, flattened, and where they sit in their blocks."""

    states: Tensor  # [N, D] the draft's final-normed states
    features: Tensor | None  # [N, r] what W2 turns into the Markov bias
    confidence: Tensor | None  # [N] logits of the confidence head
    target_states: Tensor  # [N, D] z at the position before the predicted token; zeros where not stored
    labels: Tensor  # [N] long
    weights: Tensor  # [N] float32
    counted: Tensor  # [M, g] bool, N of them True, in the order of the slots


class LossOutput(NamedTuple):
    """Sums, not means: the loop adds them over micro-batches and ranks and divides once."""

    numerator: Tensor  # all terms by their weights, with graph
    denominator: Tensor  # what every term is divided by, float32
    numerators: dict[str, Tensor]  # by term, without their weights, with graph
    metrics: Metrics  # (sum, count) float32 each, detached


class Deviation(NamedTuple):
    cross_entropy: Tensor  # [N] -log p_draft(label)
    total_variation: Tensor  # [N] |p_draft - p_target|_1, in [0, 2]


def deviation(draft_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Deviation:
    """How far the draft is from the label and from the target at each slot; logits [N, V] float32, the target's detached."""
    log_probs = draft_logits.log_softmax(-1)
    distance = (log_probs.exp() - target_logits.detach().softmax(-1)).abs().sum(-1)
    return Deviation(-log_probs.gather(-1, labels[:, None])[:, 0], distance)


def block_loss(slots: Slots, vocabulary: Vocabulary, settings: LossConfig) -> LossOutput:
    """CE, TV and CONF numerators and metrics of the counted slots; a term of weight 0 is left out."""
    logits = vocabulary.draft_logits(slots.states, slots.features)
    return terms(slots, logits, vocabulary.target_logits(slots.target_states), settings)


def terms(slots: Slots, draft_logits: Tensor, target_logits: Tensor, settings: LossConfig) -> LossOutput:
    """The loss of given logits [N, V]; the one place where the terms are put together."""
    needs_distance = settings.tv > 0
    slot = deviation(draft_logits, target_logits, slots.labels)
    if not needs_distance:  # still measured, but nothing to learn from
        slot = slot._replace(total_variation=slot.total_variation.detach())
    acceptance = 1.0 - 0.5 * slot.total_variation.detach()  # eq. 8
    by_slot = {"ce": (settings.ce, slot.cross_entropy), "tv": (settings.tv, slot.total_variation)}
    if slots.confidence is not None:
        logits = slots.confidence.float()
        by_slot["confidence"] = (settings.confidence, F.binary_cross_entropy_with_logits(logits, acceptance, reduction="none"))
    numerators = {name: (slots.weights * loss).sum() for name, (weight, loss) in by_slot.items() if weight > 0}
    numerator = draft_logits.new_zeros(()) + sum(by_slot[name][0] * total for name, total in numerators.items())
    denominator = slots.weights.sum()
    metrics: Metrics = {name: (total.detach(), denominator) for name, total in numerators.items()}
    metrics |= acceptance_metrics(acceptance, slots)
    return LossOutput(numerator, denominator, numerators, metrics)


def acceptance_metrics(acceptance: Tensor, slots: Slots) -> Metrics:
    """`accept@j`, the mean acceptance rate of slot j; `tau`, the tokens a round is expected to commit; the head's errors.

    Slots whose target state is not stored are left out.
    """
    known = slots.target_states.any(-1)
    rates = torch.zeros(slots.counted.shape, device=acceptance.device)
    rates[slots.counted] = acceptance * known
    counts = torch.zeros_like(rates)
    counts[slots.counted] = known.float()
    metrics: Metrics = {f"accept@{j}": pair for j, pair in enumerate(zip(rates.sum(0).unbind(), counts.sum(0).unbind(), strict=True))}
    blocks = counts[:, 0].sum()  # every block with a counted slot counts its first
    metrics["tau"] = (blocks + rates.cumprod(-1).sum(), blocks)
    if slots.confidence is not None:
        weights = slots.weights * known
        error = weights * (torch.sigmoid(slots.confidence.detach().float()) - acceptance)
        metrics["confidence_bias"] = (error.sum(), weights.sum())
        metrics["confidence_abs_error"] = (error.abs().sum(), weights.sum())
    return metrics


class Scored(NamedTuple):
    """The positions that one training-time-test step of Eagle3 is scored at."""

    states: Tensor  # [N, D] the draft's normed states
    target_states: Tensor  # [N, D] z whose distribution they are to match
    weights: Tensor  # [N] float32
    counted: Tensor  # [B, P] bool, N of them True, in their order


def step_losses(steps: Sequence[Scored], vocabulary: Vocabulary, weights: Mapping[str, float], denominator: Tensor) -> LossOutput:
    """Soft cross-entropy to the target's distribution, step by step, and how often the target would accept."""
    numerators: dict[str, Tensor] = {}
    metrics: Metrics = {}
    rates = []
    for number, (name, scored) in enumerate(zip(weights, steps, strict=True)):
        logits = vocabulary.draft_logits(scored.states, None)
        log_probs, target = logits.log_softmax(-1), vocabulary.target_logits(scored.target_states).softmax(-1)
        numerators[name] = -(scored.weights * (target * log_probs).sum(-1)).sum()
        metrics[name] = (numerators[name].detach(), denominator)
        accepted = 1.0 - 0.5 * (log_probs.detach().exp() - target).abs().sum(-1)
        hits, count = (logits.argmax(-1) == target.argmax(-1)).float(), scored.counted.float().sum()
        metrics |= {f"accept@{number}": (accepted.sum(), count), f"accuracy@{number}": (hits.sum(), count)}
        rates.append(torch.zeros(scored.counted.shape, device=accepted.device).masked_scatter(scored.counted, accepted))
    starts = steps[0].counted
    tau = starts + torch.stack(rates).cumprod(0).sum(0)
    metrics["tau"] = ((tau * starts).sum(), starts.float().sum())
    total = torch.stack([weights[name] * numerator for name, numerator in numerators.items()]).sum()
    return LossOutput(total, denominator, numerators, metrics)


def zero_loss(draft: nn.Module, names: Iterable[str]) -> LossOutput:
    """Zero, with a gradient of zero for every trainable parameter, so that all ranks step together on an empty batch."""
    zero = torch.stack([(parameter * 0.0).sum() for parameter in draft.parameters() if parameter.requires_grad]).sum()
    return LossOutput(zero, zero.detach(), dict.fromkeys(names, zero), {})
