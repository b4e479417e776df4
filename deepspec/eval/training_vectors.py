"""Training cases of the reference vectors: masks, labels, forward states and logits; the losses are in `loss_vectors.py`.

B batch, T tokens, A anchors, g block size, S training-time-test steps, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.eval.cases import Case, Check, distance, regret, relative, worst
from deepspec.eval.loss_vectors import LOSS, gradient_checks, loss_check, loss_settings, metrics_check
from deepspec.model.anchors import Anchors, BlockPlan, block_mask
from deepspec.model.backbone import softcap
from deepspec.model.block import BlockDraft
from deepspec.model.draft import TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.loss import deviation

OUTPUT = 1e-5  # absolute
# Where float32 rounds more than that, no two orders of summation agree to 1e-5 (Gemma's unscaled attention, Eagle3's
# residual stream over seven steps). How much it rounds is measured on the case itself, against our own float64 pass,
# so that a wrong number gains nothing by it; two results that are each that far off differ by twice as much, and a half
# more is for the order of summation of another machine.
ROUNDING_FACTOR = 3.0


def check_block_case(case: Case) -> list[Check]:
    """A DFlash or DSpark training case: everything that the reference computed, from its own anchors."""
    tensors, fields = case.tensors(), case.fields
    draft = case.draft(fields["config"], fields["weights"], fields["state_dict"])
    if not isinstance(draft, BlockDraft):
        return [Check("algorithm", 1.0, note=f"the config describes {draft.spec.algorithm}")]
    draft.configure_loss(loss_settings(fields["loss_args"]))
    batch = batch_of(tensors)
    plan = draft.plan_for(batch, Anchors(tensors["anchor_positions"].long(), tensors["block_keep_mask"].bool()))
    checks = [*_plan_checks(draft, plan, batch, tensors), *_forward_checks(draft, plan, batch, tensors)]
    output = draft.loss(batch, plan)
    loss = output.numerator / output.denominator.clamp(min=1e-9)
    loss.backward()
    metrics = {f"accept@{slot}": f"accept_rate@{slot}" for slot in range(draft.block_size)} | {"tau": "tau_probabilistic"}
    metrics |= {name: name for name in ("confidence_bias", "confidence_abs_error")}
    names = {**metrics, "ce": "ce_loss"} if draft.loss_settings.ce > 0 else metrics
    return [
        *checks,
        loss_check(output, loss, fields["scalars"]),
        metrics_check(output.metrics, fields, names),
        *gradient_checks(draft, case),
    ]


def check_eagle3_case(case: Case) -> list[Check]:
    """An Eagle3 training case: every step's states and logits, step losses and gradients."""
    tensors, fields = case.tensors(), case.fields
    draft = case.draft(fields["config"], fields["weights"], fields["state_dict"])
    if not isinstance(draft, Eagle3Draft):
        return [Check("algorithm", 1.0, note=f"the config describes {draft.spec.algorithm}")]
    batch = batch_of(tensors)
    plan = draft.plan(batch)
    # The reference divides by the padded width of its batch; here padding leaves no trace, each sample has its own length.
    plan = plan._replace(weights=torch.full_like(plan.weights, 1.0 / batch.input_ids.shape[1]))
    output = draft.loss(batch, plan)
    loss = output.numerator / output.denominator.clamp(min=1e-9)
    loss.backward()
    found = {"loss": loss.item()} | {name: (value / output.denominator).item() for name, value in output.numerators.items()}
    wanted = {"loss": fields["scalars"]["loss"]} | {f"ce@{step}": value for step, value in enumerate(fields["step_losses"])}
    steps = range(draft.spec.ttt_length)
    names = {f"accept@{step}": f"accept_rate@{step}" for step in steps} | {f"accuracy@{step}": f"accuracy@{step}" for step in steps}
    return [
        *_step_checks(draft, batch, tensors),
        worst("loss terms", {name: relative(found[name], value) for name, value in wanted.items()}, LOSS),
        metrics_check(output.metrics, fields, names | {"tau": "tau_probabilistic"}),
        *gradient_checks(draft, case),
    ]


def batch_of(tensors: dict[str, Tensor]) -> TrainBatch:
    """The case's inputs; a mask [B, T] says where rows end, any other shape is the blocks' own."""
    input_ids, mask = tensors["input_ids"].long(), tensors.get("attention_mask")
    full = torch.full((len(input_ids),), input_ids.shape[1])
    return TrainBatch(
        input_ids=input_ids,
        loss_mask=tensors["loss_mask"].bool(),
        lengths=mask.sum(-1).long() if mask is not None and mask.shape == input_ids.shape else full,
        context=tensors["target_hidden_states"].float(),
        last_hidden=tensors["target_last_hidden_states"].float(),
        seeds=tuple(range(len(input_ids))),
    )


def _plan_checks(draft: BlockDraft, plan: BlockPlan, batch: TrainBatch, tensors: dict[str, Tensor]) -> list[Check]:
    counted, keep = tensors["eval_mask"].bool(), plan.anchors.keep.repeat_interleave(draft.block_size, 1)
    mask = block_mask(plan.anchors, num_tokens=batch.input_ids.shape[1], block_size=draft.block_size)
    seen = tensors["attention_mask"][:, 0].bool()
    wrong = {
        "counted slots": int((plan.counted != counted).sum()),
        "labels": int((plan.labels != tensors["target_ids"].long())[counted].sum()),
        "attention mask": int((mask[:, 0] != seen)[keep].sum()),
    }
    return [worst("masks and labels that differ", {name: float(count) for name, count in wrong.items()}, 0.0)]


class BlockOutputs(NamedTuple):
    states: Tensor  # [B, A, g, D]
    logits: Tensor  # [B, A, g, V]
    confidence: Tensor | None  # [B, A, g]


def block_outputs(draft: BlockDraft, plan: BlockPlan, context: Tensor) -> BlockOutputs:
    """States, logits and confidence logits of blocks whose slots are given the labels as their previous tokens."""
    states, head = draft.block_states(context, plan), draft.markov_head
    previous = None if head is None else head.markov_w1(plan.previous)
    features = None if head is None or previous is None else head.features(states, previous)
    confidence = None if draft.confidence_head is None else draft.confidence_head(states, previous)
    return BlockOutputs(states, draft.vocabulary().draft_logits(states, features), confidence)


@torch.no_grad()
def _forward_checks(draft: BlockDraft, plan: BlockPlan, batch: TrainBatch, tensors: dict[str, Tensor]) -> list[Check]:
    found, exact = block_outputs(draft, plan, batch.context), block_outputs(copy.deepcopy(draft).double(), plan, batch.context.double())
    keep, logits = plan.anchors.keep, found.logits
    states = _output("output states", found.states[keep], tensors["output_hidden"].view_as(found.states)[keep], exact.states[keep])
    rounding = distance(logits[keep], exact.logits[keep])
    target, counted = draft.vocabulary().target_logits(plan.of_slots(batch.last_hidden)), plan.counted
    rates = 1 - 0.5 * deviation(logits[counted], target, plan.labels[counted]).total_variation
    compared: dict[str, Callable[[Tensor], float]] = {
        "draft_logits": lambda wanted: distance(logits[keep], wanted[keep]),
        "draft_logits_row0": lambda wanted: distance(logits[:1][keep[:1]], wanted[keep[:1]]),
        "draft_logsumexp": lambda wanted: distance(logits.logsumexp(-1)[keep], wanted[keep]),
        "draft_argmax": lambda wanted: regret(logits[keep], wanted[keep]),
        "aligned_target_logsumexp": lambda wanted: distance(target.logsumexp(-1), wanted[counted]),
        "aligned_target_argmax": lambda wanted: regret(target, wanted[counted]),
    }
    errors = {name: measure(tensors[name]) for name, measure in compared.items() if name in tensors}
    checks = [states, worst("logits", errors, _allowed(rounding))]
    checks += [Check("acceptance rates", distance(rates, tensors["accept_rate"][counted]), OUTPUT)]
    if found.confidence is not None and exact.confidence is not None:
        checks += [_output("confidence", found.confidence[keep], tensors["confidence_pred"][keep], exact.confidence[keep])]
    return checks


@torch.no_grad()
def _step_checks(draft: Eagle3Draft, batch: TrainBatch, tensors: dict[str, Tensor]) -> list[Check]:
    every, exact = draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask))), copy.deepcopy(draft).double()
    doubled = exact.step_states(batch._replace(context=batch.context.double()), every)
    cap, rounding = draft.spec.logit_softcap, {"states": 0.0, "logits": 0.0}
    errors: dict[str, dict[str, float]] = {"states": {}, "logits": {}}
    for step, (states, more_exact) in enumerate(zip(draft.step_states(batch, every), doubled, strict=True)):
        counted, at = every.counted[step], every.positions[every.counted[step]]
        rows = counted.nonzero()[:, 0]
        logits = softcap(draft.lm_head(draft.norm(states[counted])), cap)
        precise = softcap(exact.lm_head(exact.norm(more_exact[counted])), cap)
        rounding["states"] = max(rounding["states"], distance(states[counted], more_exact[counted]))
        rounding["logits"] = max(rounding["logits"], distance(logits, precise))
        errors["states"][f"step {step}"] = distance(states[counted], tensors["step_hidden"][step][rows, at])
        of_step = [
            distance(logits.logsumexp(-1), tensors["step_logsumexp"][step][rows, at]),
            regret(logits, tensors["step_argmax"][step][rows, at]),
        ]
        for row in range(len(batch.input_ids)):
            stored = tensors.get(f"step{step}_logits_row{row}")
            of_step += [] if stored is None else [distance(logits[rows == row], stored[at[rows == row]])]
        errors["logits"][f"step {step}"] = max(of_step)
    return [worst(f"step {kind}", errors[kind], _allowed(rounding[kind])) for kind in errors]


def _output(quantity: str, found: Tensor, wanted: Tensor, exact: Tensor) -> Check:
    return Check(quantity, distance(found, wanted), _allowed(distance(found, exact)))


def _allowed(rounding: float) -> float:
    return max(OUTPUT, ROUNDING_FACTOR * rounding)
