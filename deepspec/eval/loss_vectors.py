"""Losses of the reference vectors: terms, metrics and gradients of a training case, and the loss by itself on given logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepspec.config import LossConfig
from deepspec.eval.cases import Case, Check, relative, worst
from deepspec.model.linear_loss import Targets
from deepspec.model.loss import LossOutput, Slots, terms

LOSS, GRADIENT = 1e-5, 1e-4  # relative
TERMS = {"ce": "ce_loss", "tv": "l1_loss", "confidence": "confidence_loss"}
Metrics = dict[str, tuple[Tensor, Tensor]]


def check_loss_case(case: Case) -> list[Check]:
    """The loss by itself on given logits, in every setting that the case lists."""
    tensors, checks = case.tensors(), []
    for variant, wanted in case.fields["variants"].items():
        settings = loss_settings(wanted["loss_args"])
        logits, confidence = tensors["draft_logits"].clone().requires_grad_(), tensors["confidence_pred"].clone().requires_grad_()
        slots = _given_slots(tensors, settings, confidence if wanted["uses_confidence"] else None, empty=wanted["scalars"]["loss"] == 0)
        mask = slots.counted.view(tensors["eval_mask"].shape)
        output = terms(slots, logits[mask], tensors["aligned_target_logits"][mask], settings)
        loss = output.numerator / output.denominator.clamp(min=1e-9)
        loss.backward()
        gradients = {}
        for name, tensor in (("logits", logits), ("conf", confidence)):
            if wanted.get(f"grad_{name}_norm") is not None:
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                gradients[f"{name} norm"] = relative(grad.norm().item(), wanted[f"grad_{name}_norm"], floor=1e-9)
                if f"grad_{name}.{variant}" in tensors:
                    gradients[f"{name} in full"] = _share(grad, tensors[f"grad_{name}.{variant}"])
        terms_check = loss_check(output, loss, wanted["scalars"])
        checks += [terms_check._replace(quantity=f"{variant}: loss terms"), worst(f"{variant}: gradients", gradients, GRADIENT)]
    return checks


def _given_slots(tensors: dict[str, Tensor], settings: LossConfig, confidence: Tensor | None, *, empty: bool) -> Slots:
    """The slots of a loss-only case; where the loss is 0 the reference masked all of them out."""
    counted = tensors["eval_mask"].bool() & (not empty)
    places = torch.arange(counted.shape[-1])
    by_slot = torch.ones(len(places)) if settings.decay is None else torch.exp(-places / settings.decay)
    return Slots(
        states=torch.empty(0),
        features=None,
        confidence=None if confidence is None else confidence[counted],
        targets=Targets(torch.ones(1, 1), torch.zeros(int(counted.sum()), dtype=torch.long)),
        labels=tensors["target_ids"].long()[counted],
        weights=by_slot.expand(counted.shape)[counted],
        counted=counted.flatten(0, 1),
    )


def loss_settings(arguments: dict[str, Any]) -> LossConfig:
    weights = {"ce": "ce_loss_alpha", "tv": "l1_loss_alpha", "confidence": "confidence_head_alpha"}
    return LossConfig(decay=arguments.get("loss_decay_gamma"), **{ours: arguments.get(theirs) or 0.0 for ours, theirs in weights.items()})


def loss_check(output: LossOutput, loss: Tensor, scalars: dict[str, float]) -> Check:
    """Numerator and denominator of each term, and the loss; terms that the reference left out have a denominator of 0."""
    errors = {"loss": relative(loss.item(), scalars["loss"])}
    for name, numerator in output.numerators.items():
        if scalars.get(f"{TERMS[name]}_den"):
            errors[f"{name} numerator"] = relative(numerator.item(), scalars[f"{TERMS[name]}_num"])
            errors[f"{name} denominator"] = relative(output.denominator.item(), scalars[f"{TERMS[name]}_den"])
    return worst("loss terms", errors, LOSS)


def metrics_check(metrics: Metrics, fields: dict[str, Any], names: dict[str, str]) -> Check:
    """Acceptance metrics, as far as both sides have them; they are shares, so a small one is compared absolutely."""
    wanted, errors = fields.get("metrics", {}), {}
    for ours, theirs in names.items():
        if ours in metrics and f"train/{theirs}" in wanted:
            total, count = metrics[ours]
            errors[ours] = relative((total / count.clamp(min=1e-9)).item(), wanted[f"train/{theirs}"], floor=0.1)
    return worst("metrics", errors, LOSS)


def gradient_checks(draft: nn.Module, case: Case) -> list[Check]:
    """Norm and cosine projection of every gradient, and the stored gradients in full."""
    grads, tensors = case.fields["grads"], case.tensors()
    found = {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}
    norms, projections, whole = {}, {}, {}
    floor = 1e-4 * grads["total_norm"]  # a gradient that is all but 0 consists of the rounding of larger ones
    for name in sorted({*found, *grads["norms"]}):
        if name not in found:
            norms[name] = float("inf")
            continue
        parameter, norm = found[name], grads["norms"].get(name, 0.0)
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = grad.double().flatten()
        projection = (flat * torch.arange(len(flat), dtype=torch.float64).cos()).sum().item()
        norms[name] = relative(flat.norm().item(), norm, floor=floor)
        # A projection may nearly cancel out; its rounding is that of the gradient's own size.
        projections[name] = relative(projection, grads["cos_projection"].get(name, 0.0), floor=max(0.02 * norm, floor))
        if f"grad.{name}" in tensors:
            whole[name] = _share(grad, tensors[f"grad.{name}"])
    named = {"gradient norms": norms, "gradient projections": projections, "gradients in full": whole}
    return [worst(quantity, errors, GRADIENT) for quantity, errors in named.items()]


def _share(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    if found.shape != wanted.shape:
        return float("inf")
    return (found - wanted).norm().item() / max(wanted.norm().item(), 1e-9)
