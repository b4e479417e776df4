"""Losses of the reference vectors: terms, metrics and gradients of a training case, and the
loss by itself on given logits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepspec.config.draft import LossConfig
from deepspec.model.loss import LossOutput, Slots, with_confidence
from deepspec.model.targets import TargetPlaces, Targets
from deepspec.target.conformance import Check
from tests.vectors.cases import Case, relative, worst

LOSS, GRADIENT = 1e-5, 1e-4  # relative
# Where float32 rounds more than that, no two orders of summation agree to 1e-5 (Gemma's unscaled
# attention, Eagle3's residual stream over seven steps). How much it rounds is measured on the case
# itself, against our own float64 pass, so that a wrong number gains nothing by it; two results that
# are each that far off differ by twice as much, and a half more is for the order of summation of
# another machine.
ROUNDING_FACTOR = 3.0
TERMS = {"ce": "ce_loss", "tv": "l1_loss", "confidence": "confidence_loss"}
Metrics = dict[str, tuple[Tensor, Tensor]]


class Terms(NamedTuple):
    ce: Tensor  # [N] -log p_draft(label)
    tv: Tensor  # [N] |p_draft - p_target|_1, in [0, 2]


def plain_terms(draft_logits: Tensor, target_logits: Tensor, labels: Tensor) -> Terms:
    """The terms of given logits [N, V] float32, by the plain formula."""
    log_probs = draft_logits.log_softmax(-1)
    distance = (log_probs.exp() - target_logits.detach().softmax(-1)).abs().sum(-1)
    return Terms(-log_probs.gather(-1, labels[:, None])[:, 0], distance)


def plain_loss(
    slots: Slots, draft_logits: Tensor, target_logits: Tensor, settings: LossConfig
) -> LossOutput:
    """The loss of given logits [N, V], by the plain formula."""
    found = plain_terms(draft_logits, target_logits, slots.labels)
    total = settings.ce * found.ce + settings.tv * found.tv
    factors = {"ce": settings.ce, "tv": settings.tv}
    if slots.confidence is not None:
        factors["confidence"] = settings.confidence
    factors = {name: factor for name, factor in factors.items() if factor > 0}
    return with_confidence(slots, (slots.weights * total).sum(), found._asdict(), factors)


def check_loss_case(case: Case) -> list[Check]:
    """The loss by itself on given logits, in every setting that the case lists."""
    tensors, checks = case.tensors(), []
    aligned = tensors["aligned_target_logits"]
    for variant, wanted in case.fields["variants"].items():
        settings = loss_settings(wanted["loss_args"])
        logits, confidence = (
            tensors["draft_logits"].clone().requires_grad_(),
            tensors["confidence_pred"].clone().requires_grad_(),
        )
        slots = _given_slots(
            tensors,
            settings,
            confidence if wanted["uses_confidence"] else None,
            empty=wanted["scalars"]["loss"] == 0,
        )
        given = (all_slots.flatten(0, -2)[slots.numbers] for all_slots in (logits, aligned))
        output = plain_loss(slots, *given, settings)
        loss = output.numerator / output.denominator.clamp(min=1e-9)
        loss.backward()
        gradients = {}
        for name, tensor in (("logits", logits), ("conf", confidence)):
            if wanted.get(f"grad_{name}_norm") is not None:
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                gradients[f"{name} norm"] = relative(
                    grad.norm().item(), wanted[f"grad_{name}_norm"], floor=1e-9
                )
                if f"grad_{name}.{variant}" in tensors:
                    gradients[f"{name} in full"] = _share(grad, tensors[f"grad_{name}.{variant}"])
        terms_check = loss_check(output, loss, wanted["scalars"])
        checks += [
            terms_check._replace(quantity=f"{variant}: loss terms"),
            worst(f"{variant}: gradients", gradients, GRADIENT),
        ]
    return checks


def _given_slots(
    tensors: dict[str, Tensor], settings: LossConfig, confidence: Tensor | None, *, empty: bool
) -> Slots:
    """The slots of a loss-only case; where the loss is 0 the reference masked all of them out."""
    counted = tensors["eval_mask"].bool() & (not empty)
    numbers = counted.flatten().nonzero()[:, 0]
    places = torch.arange(counted.shape[-1])
    by_slot = (
        torch.ones(len(places)) if settings.decay is None else torch.exp(-places / settings.decay)
    )
    return Slots(
        states=torch.empty(0),
        features=None,
        confidence=None if confidence is None else confidence[counted],
        targets=Targets(torch.ones(1, 1), TargetPlaces.of(torch.zeros_like(numbers))),
        labels=tensors["target_ids"].long()[counted],
        weights=by_slot.expand(counted.shape)[counted],
        numbers=numbers,
        shape=(counted[..., 0].numel(), counted.shape[-1]),
    )


def loss_settings(arguments: dict[str, Any]) -> LossConfig:
    weights = {"ce": "ce_loss_alpha", "tv": "l1_loss_alpha", "confidence": "confidence_head_alpha"}
    return LossConfig(
        decay=arguments.get("loss_decay_gamma"),
        **{ours: arguments.get(theirs) or 0.0 for ours, theirs in weights.items()},
    )


def loss_check(output: LossOutput, loss: Tensor, scalars: dict[str, float]) -> Check:
    """Numerator and denominator of each term, and the loss; terms that the reference left out
    have a denominator of 0.
    """
    errors = {"loss": relative(loss.item(), scalars["loss"])}
    for name, numerator in output.numerators.items():
        if scalars.get(f"{TERMS[name]}_den"):
            errors[f"{name} numerator"] = relative(numerator.item(), scalars[f"{TERMS[name]}_num"])
            errors[f"{name} denominator"] = relative(
                output.denominator.item(), scalars[f"{TERMS[name]}_den"]
            )
    return worst("loss terms", errors, LOSS)


def metrics_check(metrics: Metrics, fields: dict[str, Any], names: dict[str, str]) -> Check:
    """Acceptance metrics, as far as both sides have them; they are shares, so a small one is
    compared absolutely.
    """
    wanted, errors = fields.get("metrics", {}), {}
    for ours, theirs in names.items():
        if ours in metrics and f"train/{theirs}" in wanted:
            total, count = metrics[ours]
            errors[ours] = relative(
                (total / count.clamp(min=1e-9)).item(), wanted[f"train/{theirs}"], floor=0.1
            )
    return worst("metrics", errors, LOSS)


def gradient_checks(draft: nn.Module, exact: nn.Module, case: Case) -> list[Check]:
    """Norm and cosine projection of every gradient, and the stored gradients in full; `exact`
    has them in float64.
    """
    grads, tensors = case.fields["grads"], case.tensors()
    found = {
        name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad
    }
    precise = dict(exact.named_parameters())
    norms, projections, whole, rounding = {}, {}, {}, 0.0
    # a gradient that is all but 0 consists of the rounding of larger ones
    floor = 1e-4 * grads["total_norm"]
    for name in sorted({*found, *grads["norms"]}):
        if name not in found:
            norms[name] = float("inf")
            continue
        parameter, norm = found[name], grads["norms"].get(name, 0.0)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        projection, of_exact = _projection(grad), precise[name].grad
        norms[name] = relative(grad.double().norm().item(), norm, floor=floor)
        # A projection may nearly cancel out; its rounding is that of the gradient's own size.
        projection_floor = max(0.02 * norm, floor)
        projections[name] = relative(
            projection, grads["cos_projection"].get(name, 0.0), floor=projection_floor
        )
        if of_exact is not None:
            rounding = max(
                rounding, relative(projection, _projection(of_exact), floor=projection_floor)
            )
        if f"grad.{name}" in tensors:
            whole[name] = _share(grad, tensors[f"grad.{name}"])
    return [
        worst("gradient norms", norms, GRADIENT),
        worst("gradient projections", projections, max(GRADIENT, ROUNDING_FACTOR * rounding)),
        worst("gradients in full", whole, GRADIENT),
    ]


def _projection(grad: Tensor) -> float:
    flat = grad.double().flatten()
    return (
        (flat * torch.arange(len(flat), dtype=torch.float64, device=flat.device).cos()).sum().item()
    )


def _share(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    if found.shape != wanted.shape:
        return float("inf")
    return (found - wanted).norm().item() / max(wanted.norm().item(), 1e-9)
