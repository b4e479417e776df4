"""The losses: three terms for block drafters (DSpark eq. 9-12), soft cross-entropy for Eagle3;
counted positions only.

All probabilities are float32. N counted slots, M blocks, g block size, D hidden size, V vocabulary,
r Markov rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.config.draft import LossConfig
from deepspec.model.chunked_loss import Coefficients, Targets, Vocabulary, score

Metrics = dict[str, tuple[Tensor, Tensor]]


class Slots(NamedTuple):
    """The counted slots of a batch, flattened, and where they sit in their blocks."""

    states: Tensor  # [N, D] the draft's final-normed states
    features: Tensor | None  # [N, r] what W2 turns into the Markov bias
    confidence: Tensor | None  # [N] logits of the confidence head
    targets: Targets  # z at the position before the predicted token; zeros where not stored
    labels: Tensor  # [N] long
    weights: Tensor  # [N] float32
    counted: Tensor  # [M, g] bool, N of them True, in the order of the slots


class LossOutput(NamedTuple):
    """Sums, not means: the loop adds them over micro-batches and ranks and divides once."""

    numerator: Tensor  # all terms by their weights, with graph
    denominator: Tensor  # what every term is divided by, float32
    numerators: dict[str, Tensor]  # by term, without their weights, detached
    metrics: Metrics  # (sum, count) float32 each, detached


class Deviation(NamedTuple):
    cross_entropy: Tensor  # [N] -log p_draft(label)
    total_variation: Tensor  # [N] |p_draft - p_target|_1, in [0, 2]


def deviation(draft_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Deviation:
    """How far the draft is from the label and from the target at each slot; logits [N, V]
    float32, the target's detached.
    """
    log_probs = draft_logits.log_softmax(-1)
    distance = (log_probs.exp() - target_logits.detach().softmax(-1)).abs().sum(-1)
    return Deviation(-log_probs.gather(-1, labels[:, None])[:, 0], distance)


def block_loss(slots: Slots, vocabulary: Vocabulary, settings: LossConfig) -> LossOutput:
    """CE, TV and CONF numerators and metrics of the counted slots; a term of weight 0 is left
    out.
    """
    coefficients = Coefficients(
        hard=settings.ce * slots.weights if settings.ce > 0 else None,
        distance=settings.tv * slots.weights if settings.tv > 0 else None,
    )
    scores = score(
        slots.states,
        slots.features,
        vocabulary,
        slots.targets,
        labels=slots.labels,
        coefficients=coefficients,
    )
    return _put_together(
        slots, scores.total, Deviation(scores.cross_entropy, scores.total_variation), settings
    )


def terms(
    slots: Slots, draft_logits: Tensor, target_logits: Tensor, settings: LossConfig
) -> LossOutput:
    """The same loss of given logits [N, V], by the plain formula."""
    slot = deviation(draft_logits, target_logits, slots.labels)
    total = settings.ce * slot.cross_entropy + settings.tv * slot.total_variation
    return _put_together(slots, (slots.weights * total).sum(), slot, settings)


def _put_together(slots: Slots, total: Tensor, slot: Deviation, settings: LossConfig) -> LossOutput:
    """`total` is the sum of CE and TV by their weights, with graph; what was measured at the
    slots is used without one.
    """
    acceptance = 1.0 - 0.5 * slot.total_variation.detach()  # eq. 8
    by_slot = {"ce": (settings.ce, slot.cross_entropy), "tv": (settings.tv, slot.total_variation)}
    if slots.confidence is not None and settings.confidence > 0:
        logits = slots.confidence.float()
        by_slot["confidence"] = (
            settings.confidence,
            F.binary_cross_entropy_with_logits(logits, acceptance, reduction="none"),
        )
        total = total + settings.confidence * (slots.weights * by_slot["confidence"][1]).sum()
    numerators = {
        name: (slots.weights * loss.detach()).sum()
        for name, (weight, loss) in by_slot.items()
        if weight > 0
    }
    denominator = slots.weights.sum()
    metrics: Metrics = {name: (numerator, denominator) for name, numerator in numerators.items()}
    metrics |= acceptance_metrics(acceptance, slots)
    return LossOutput(total, denominator, numerators, metrics)


def acceptance_metrics(acceptance: Tensor, slots: Slots) -> Metrics:
    """`accept@j`, the mean acceptance rate of slot j; `tau`, the tokens a round is expected to
    commit; the head's errors.

    Slots whose target state is not stored are left out.
    """
    known = slots.targets.states.any(-1)[slots.targets.of_slot]
    rates = torch.zeros(slots.counted.shape, device=acceptance.device)
    rates[slots.counted] = acceptance * known
    counts = torch.zeros_like(rates)
    counts[slots.counted] = known.float()
    metrics: Metrics = {
        f"accept@{j}": pair
        for j, pair in enumerate(zip(rates.sum(0).unbind(), counts.sum(0).unbind(), strict=True))
    }
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
    places: Tensor  # [N] long, which of the target's final states its distribution is to match
    weights: Tensor  # [N] float32
    counted: Tensor  # [P] bool, N of them True, in their order


def step_losses(
    steps: Sequence[Scored],
    vocabulary: Vocabulary,
    hidden: Tensor,
    weights: Mapping[str, float],
    denominator: Tensor,
) -> LossOutput:
    """Soft cross-entropy to the target's distribution, step by step, and how often the target would
    accept.

    Steps look at the same positions of `hidden` [P, D], one shifted against the other, so that they
    are scored together.
    """
    targets = Targets.gathered(hidden, torch.cat([scored.places for scored in steps]))
    soft = torch.cat(
        [weight * scored.weights for weight, scored in zip(weights.values(), steps, strict=True)]
    )
    states = torch.cat([scored.states for scored in steps])
    scores = score(
        states, None, vocabulary, targets, labels=None, coefficients=Coefficients(soft=soft)
    )
    sizes = [len(scored.places) for scored in steps]
    numerators: dict[str, Tensor] = {}
    metrics: Metrics = {}
    rates = []
    by_step = zip(
        *(
            part.split(sizes)
            for part in (scores.soft_cross_entropy, scores.total_variation, scores.hits)
        ),
        strict=True,
    )
    for number, (name, scored, (entropy, distance, hits)) in enumerate(
        zip(weights, steps, by_step, strict=True)
    ):
        numerators[name] = (scored.weights * entropy).sum()
        metrics[name] = (numerators[name], denominator)
        accepted, count = 1.0 - 0.5 * distance, scored.counted.float().sum()
        metrics |= {
            f"accept@{number}": (accepted.sum(), count),
            f"accuracy@{number}": (hits.sum(), count),
        }
        rates.append(
            torch.zeros(scored.counted.shape, device=accepted.device).masked_scatter(
                scored.counted, accepted
            )
        )
    starts = steps[0].counted
    tau = starts + torch.stack(rates).cumprod(0).sum(0)
    metrics["tau"] = ((tau * starts).sum(), starts.float().sum())
    return LossOutput(scores.total, denominator, numerators, metrics)


def zero_loss(draft: nn.Module, names: Iterable[str]) -> LossOutput:
    """Zero, with a gradient of zero for every trainable parameter, so that all ranks step
    together on an empty batch.
    """
    zero = torch.stack(
        [(parameter * 0.0).sum() for parameter in draft.parameters() if parameter.requires_grad]
    ).sum()
    return LossOutput(zero, zero.detach(), dict.fromkeys(names, zero), {})
