"""The loss of block drafters: three terms (DSpark eq. 9-12), into which only counted slots enter.

N counted slots, K blocks, g block size, D hidden size, r Markov rank.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.model.chunked_loss import Coefficients, Vocabulary, score
from deepspec.model.targets import Targets

Metrics = dict[str, tuple[Tensor, Tensor]]


class Slots(NamedTuple):
    """The counted slots of a batch, flattened, and where they sit in their blocks."""

    states: Tensor  # [N, D] the draft's final-normed states
    features: Tensor | None  # [N, r] what W2 turns into the Markov bias
    confidence: Tensor | None  # [N] logits of the confidence head
    targets: Targets  # z at the position before the predicted token; zeros where not stored
    labels: Tensor  # [N] long
    weights: Tensor  # [N] float32
    numbers: Tensor  # [N] long, among all K * g
    shape: tuple[int, int]  # K, g


class LossOutput(NamedTuple):
    """Sums, not means: the loop adds them over micro-batches and ranks and divides once."""

    numerator: Tensor  # all terms by their weights, with graph
    denominator: Tensor  # what every term is divided by, float32
    numerators: dict[str, Tensor]  # by term, without their weights, detached
    metrics: Metrics  # (sum, count) float32 each, detached

    def plus(self, other: Self) -> Self:
        """The sums over both, the numerator without its graph."""
        metrics = self.metrics | other.metrics
        for name in self.metrics.keys() & other.metrics:  # a batch without slots has none
            (total, count), (more, others) = self.metrics[name], other.metrics[name]
            metrics[name] = total + more, count + others
        numerators = {name: sums + other.numerators[name] for name, sums in self.numerators.items()}
        return self._replace(
            numerator=self.numerator.detach() + other.numerator.detach(),
            denominator=self.denominator + other.denominator,
            numerators=numerators,
            metrics=metrics,
        )


def block_loss(slots: Slots, vocabulary: Vocabulary, factors: Mapping[str, float]) -> LossOutput:
    """CE, TV and CONF of the counted slots, as far as `factors` has a factor for the term."""
    scores = score(
        slots.states,
        slots.features,
        vocabulary,
        slots.targets,
        labels=slots.labels,
        coefficients=Coefficients(
            **{term: factors[term] * slots.weights for term in ("ce", "tv") if term in factors}
        ),
    )
    return with_confidence(slots, scores.total, {"ce": scores.ce, "tv": scores.tv}, factors)


def with_confidence(
    slots: Slots, total: Tensor, measured: dict[str, Tensor], factors: Mapping[str, float]
) -> LossOutput:
    """The loss and its metrics, given CE and TV of each slot and their weighted sum `total`.

    The graph is that of `total` and of the confidence head, which learns the acceptance rate.
    """
    acceptance = 1.0 - 0.5 * measured["tv"].detach()  # eq. 8
    if slots.confidence is not None and "confidence" in factors:
        bce = F.binary_cross_entropy_with_logits(
            slots.confidence.float(), acceptance, reduction="none"
        )
        total = total + factors["confidence"] * (slots.weights * bce).sum()
        measured = measured | {"confidence": bce}
    numerators = {name: (slots.weights * measured[name].detach()).sum() for name in factors}
    denominator = slots.weights.sum()
    metrics: Metrics = {name: (numerator, denominator) for name, numerator in numerators.items()}
    metrics |= acceptance_metrics(acceptance, slots)
    return LossOutput(total, denominator, numerators, metrics)


def acceptance_metrics(acceptance: Tensor, slots: Slots) -> Metrics:
    """Mean acceptance rate of slot j as `accept@j`, expected acceptance length as `tau`, and errors
    of the confidence head.

    Slots whose target state is not stored are left out.
    """
    known = slots.targets.states.any(-1)[slots.targets.places.of_slot]
    rates, counts = torch.zeros(2, *slots.shape, device=acceptance.device)
    rates.view(-1)[slots.numbers] = acceptance * known
    counts.view(-1)[slots.numbers] = known.float()
    by_slot = zip(rates.sum(0).unbind(), counts.sum(0).unbind(), strict=True)
    metrics: Metrics = {f"accept@{slot}": pair for slot, pair in enumerate(by_slot)}
    blocks = counts[:, 0].sum()  # every block with a counted slot counts its first
    metrics["tau"] = (blocks + rates.cumprod(-1).sum(), blocks)
    if slots.confidence is not None:
        weights = slots.weights * known
        error = weights * (torch.sigmoid(slots.confidence.detach().float()) - acceptance)
        metrics["confidence_bias"] = (error.sum(), weights.sum())
        metrics["confidence_abs_error"] = (error.abs().sum(), weights.sum())
    return metrics


def zero_loss(draft: nn.Module, names: Iterable[str]) -> LossOutput:
    """Zero, with a gradient of zero for every trainable parameter.

    On an empty batch all ranks then step together.
    """
    trained = (parameter for parameter in draft.parameters() if parameter.requires_grad)
    zero = torch.stack([(parameter * 0.0).sum() for parameter in trained]).sum()
    return LossOutput(zero, zero.detach(), dict.fromkeys(names, zero), {})
