"""Block drafters reproduce the reference implementation's numbers: states, logits, labels, loss terms, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.model.anchors import Anchors, block_mask
from deepspec.model.loss import Slots, terms
from tests.model.vectors import batch_of, check_gradients, read_case, read_draft

CASES = ["qwen3_dspark_vanilla", "qwen3_dspark_gated", "qwen3_dflash", "gemma4_dspark_vanilla"]
TERMS = {"ce": "ce_loss", "tv": "l1_loss", "confidence": "confidence_loss"}
# Gemma's unscaled attention amplifies rounding: the reference itself is 1.4e-5 away from its own float64 result.
NOISE = {"gemma4_dspark_vanilla": 4.0}


def settings_of(arguments: dict[str, Any]) -> LossConfig:
    return LossConfig(
        ce=arguments["ce_loss_alpha"],
        tv=arguments["l1_loss_alpha"],
        confidence=arguments["confidence_head_alpha"],
        decay=arguments["loss_decay_gamma"],
    )


@pytest.mark.parametrize("name", CASES)
def test_the_block_drafters_reproduce_the_reference(name: str) -> None:
    case, tensors = read_case(name)
    draft, batch = read_draft(case["config"], case["weights"], case["state_dict"]), batch_of(tensors)
    assert {key: list(value.shape) for key, value in draft.state_dict().items()} == case["state_dict"]
    draft.configure_loss(settings_of(case["loss_args"]))
    keep = tensors["block_keep_mask"].bool()
    plan = draft.plan_for(batch, Anchors(tensors["anchor_positions"].long(), keep))

    counted = tensors["eval_mask"].bool()
    assert torch.equal(plan.counted, counted)
    assert torch.equal(plan.labels[counted], tensors["target_ids"].long()[counted])
    mask = block_mask(plan.anchors, num_tokens=batch.input_ids.shape[1], block_size=draft.block_size)
    kept_rows = keep.repeat_interleave(draft.block_size, 1)
    assert torch.equal(mask[:, 0][kept_rows], tensors["attention_mask"][:, 0].bool()[kept_rows])

    states = draft.block_states(batch.context, plan)
    wanted = tensors["output_hidden"].view_as(states)
    torch.testing.assert_close(states[keep], wanted[keep], rtol=0, atol=1e-5 * NOISE.get(name, 1.0))
    _check_logits(draft, plan, states, tensors, atol=1e-5 * NOISE.get(name, 1.0))

    output = draft.loss(batch, plan)
    for term, numerator in output.numerators.items():
        assert numerator.item() == pytest.approx(case["scalars"][f"{TERMS[term]}_num"], rel=1e-5)
        assert draft.denominators(plan)[term].item() == pytest.approx(case["scalars"][f"{TERMS[term]}_den"], rel=1e-5)
    loss = output.numerator / output.denominator
    assert loss.item() == pytest.approx(case["scalars"]["loss"], rel=1e-5)
    _check_metrics(output.metrics, case["metrics"])
    loss.backward()
    check_gradients(draft, case, tensors)


def _check_logits(draft: Any, plan: Any, states: Tensor, tensors: dict[str, Tensor], *, atol: float) -> None:
    head, kept = draft.markov_head, plan.anchors.keep
    features = previous = None
    if head is not None:
        previous = head.markov_w1(plan.previous)
        features = head.features(states, previous)
    logits = draft.vocabulary().draft_logits(states, features)
    if "draft_logits" in tensors:
        torch.testing.assert_close(logits[kept], tensors["draft_logits"][kept], rtol=1e-5, atol=atol)
    torch.testing.assert_close(logits.logsumexp(-1)[kept], tensors["draft_logsumexp"][kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits.argmax(-1)[kept], tensors["draft_argmax"].long()[kept])
    if draft.confidence_head is not None:
        confidence = draft.confidence_head(states, previous)
        torch.testing.assert_close(confidence[kept], tensors["confidence_pred"][kept], rtol=0, atol=1e-5)


def _check_metrics(metrics: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, float]) -> None:
    means = {name: (total / count).item() for name, (total, count) in metrics.items()}
    names = {f"accept@{slot}": f"train/accept_rate@{slot}" for slot in range(7)}
    names |= {"tau": "train/tau_probabilistic", "ce": "train/ce_loss"}
    names |= {name: f"train/{name}" for name in ("confidence_bias", "confidence_abs_error") if name in means}
    for ours, theirs in names.items():
        assert means[ours] == pytest.approx(wanted[theirs], rel=1e-5), ours


VARIANTS = ["dspark", "dspark_no_decay", "dflash", "ce_only_conf", "l1_only", "all_masked"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_alone_reproduces_the_reference(variant: str) -> None:
    case, tensors = read_case("dspark_loss_only")
    wanted = case["variants"][variant]
    settings = settings_of(wanted["loss_args"])
    logits, confidence = tensors["draft_logits"].requires_grad_(), tensors["confidence_pred"].requires_grad_()
    counted = torch.zeros_like(tensors["eval_mask"].bool()) if variant == "all_masked" else tensors["eval_mask"].bool()
    slot_weights = torch.ones(7) if settings.decay is None else torch.exp(-torch.arange(7) / settings.decay)
    target = tensors["aligned_target_logits"][counted]
    slots = Slots(
        states=torch.empty(0),
        features=None,
        confidence=confidence[counted] if wanted["uses_confidence"] else None,
        target_states=torch.ones(len(target), 1),
        labels=tensors["target_ids"].long()[counted],
        weights=slot_weights.expand(counted.shape)[counted],
        counted=counted.flatten(0, 1),
    )
    output = terms(slots, logits[counted], target, settings)
    loss = output.numerator / output.denominator.clamp(min=1e-9)
    assert loss.item() == pytest.approx(wanted["scalars"]["loss"], rel=1e-5)
    for name, numerator in output.numerators.items():
        if wanted["scalars"][f"{TERMS[name]}_den"]:
            assert numerator.item() == pytest.approx(wanted["scalars"][f"{TERMS[name]}_num"], rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(wanted["grad_logits_norm"], rel=1e-4)
    if f"grad_logits.{variant}" in tensors:
        torch.testing.assert_close(logits.grad, tensors[f"grad_logits.{variant}"], rtol=1e-4, atol=1e-8)
    if wanted["grad_conf_norm"] is not None:
        assert confidence.grad is not None
        assert confidence.grad.norm().item() == pytest.approx(wanted["grad_conf_norm"], rel=1e-4)
