"""Training cases of the reference vectors: masks, labels, forward states and logits; the losses are
in `loss.py`.

The reference pads its rows; here they are packed. `Rows` holds which of its places are real. B
batch, W padded width, A anchors a row, K anchors kept, g block size, S training-time-test steps, D
hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.model.anchors import BlockPlan, Eagle3Plan, Samples
from deepspec.model.block_draft import BlockDraft
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.target.conformance import Check, distance
from tests.model.drafts import plain_logits
from tests.vectors.block_outputs import block_outputs
from tests.vectors.cases import Case, logit_gap, relative, worst
from tests.vectors.loss import (
    LOSS,
    ROUNDING_FACTOR,
    gradient_checks,
    loss_check,
    loss_settings,
    metrics_check,
    plain_terms,
)

OUTPUT = 1e-5  # absolute


def check_block_case(case: Case) -> list[Check]:
    """A DFlash or DSpark training case: everything that the reference computed, from its own
    anchors.
    """
    tensors, fields = case.tensors(), case.fields
    draft = case.draft(fields["config"], fields["weights"], fields["state_dict"])
    if not isinstance(draft, BlockDraft):
        return [Check("algorithm", 1.0, note=f"the config describes {draft.spec.algorithm}")]
    draft.configure_loss(loss_settings(fields["loss_args"]))
    rows = Rows.of(tensors)
    batch, keep = batch_of(tensors, rows), tensors["block_keep_mask"].bool()
    starts = Samples.of(batch.lengths).starts[:, None]
    plan = draft.plan_for(batch, (starts + tensors["anchor_positions"].long())[keep])
    checks = [
        *_plan_checks(draft, plan, rows, tensors),
        *_forward_checks(draft, plan, batch, tensors),
    ]
    output = draft.loss(batch, plan)
    loss = output.numerator / output.denominator.clamp(min=1e-9)
    loss.backward()
    metrics = {f"accept@{slot}": f"accept_rate@{slot}" for slot in range(draft.block_size)} | {
        "tau": "tau_probabilistic"
    }
    metrics |= {name: name for name in ("confidence_bias", "confidence_abs_error")}
    names = {**metrics, "ce": "ce_loss"} if draft.loss_settings.ce > 0 else metrics
    return [
        *checks,
        loss_check(output, loss, fields["scalars"]),
        metrics_check(output.metrics, fields, names),
        *gradient_checks(draft, _exactly(draft, batch, plan), case),
    ]


def check_eagle3_case(case: Case) -> list[Check]:
    """An Eagle3 training case: every step's states and logits, step losses and gradients."""
    tensors, fields = case.tensors(), case.fields
    draft = case.draft(fields["config"], fields["weights"], fields["state_dict"])
    if not isinstance(draft, Eagle3Draft):
        return [Check("algorithm", 1.0, note=f"the config describes {draft.spec.algorithm}")]
    rows = Rows.of(tensors)
    batch = batch_of(tensors, rows)
    plan = draft.plan(batch)
    # The reference divides by the padded width of its batch; here there is no padding, each sample
    # has its own length.
    plan = plan._replace(weights=torch.full_like(plan.weights, 1.0 / rows.real.shape[1]))
    output = draft.loss(batch, plan)
    loss = output.numerator / output.denominator.clamp(min=1e-9)
    loss.backward()
    found = {"loss": loss.item()} | {
        name: (value / output.denominator).item() for name, value in output.numerators.items()
    }
    wanted = {"loss": fields["scalars"]["loss"]} | {
        f"ce@{step}": value for step, value in enumerate(fields["step_losses"])
    }
    steps = range(draft.spec.ttt_length)
    names = {f"accept@{step}": f"accept_rate@{step}" for step in steps} | {
        f"accuracy@{step}": f"accuracy@{step}" for step in steps
    }
    return [
        *_step_checks(draft, batch, rows, tensors),
        worst(
            "loss terms",
            {name: relative(found[name], value) for name, value in wanted.items()},
            LOSS,
        ),
        metrics_check(output.metrics, fields, names | {"tau": "tau_probabilistic"}),
        *gradient_checks(draft, _exactly(draft, batch, plan), case),
    ]


class Rows(NamedTuple):
    real: Tensor  # [B, W] bool, which of the padded places hold a token

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Rows":
        """A mask [B, W] shows where rows end, any other shape is the blocks' own."""
        ids, mask = tensors["input_ids"], tensors.get("attention_mask")
        return cls(
            mask.bool()
            if mask is not None and mask.shape == ids.shape
            else torch.ones_like(ids, dtype=torch.bool)
        )


def batch_of(tensors: dict[str, Tensor], rows: Rows) -> TrainBatch:
    """The case's inputs, packed."""
    real = rows.real
    return TrainBatch(
        input_ids=tensors["input_ids"][real].long(),
        loss_mask=tensors["loss_mask"][real].bool(),
        lengths=real.sum(-1),
        context=tensors["target_hidden_states"][real].float(),
        last_hidden=tensors["target_last_hidden_states"][real].float(),
        seeds=tuple(range(len(real))),
    )


def target_places(plan: BlockPlan) -> Tensor:
    """Where the target's state for each counted slot is [N]."""
    return plan.targets.distinct[plan.targets.of_slot]


def _exactly(draft: Drafter, batch: TrainBatch, plan: BlockPlan | Eagle3Plan) -> Drafter:
    """The draft in float64, with the gradients of the same loss."""
    exact = copy.deepcopy(draft).double()
    exact.zero_grad()
    output = exact.loss(
        batch._replace(context=batch.context.double(), last_hidden=batch.last_hidden.double()), plan
    )
    (output.numerator / output.denominator.clamp(min=1e-9)).backward()
    return exact


def _plan_checks(
    draft: BlockDraft, plan: BlockPlan, rows: Rows, tensors: dict[str, Tensor]
) -> list[Check]:
    keep, counted = tensors["block_keep_mask"].bool(), tensors["eval_mask"].bool()
    width, size = rows.real.shape[1], draft.block_size
    context, blocks = (
        tensors["attention_mask"][:, 0]
        .bool()
        .unflatten(1, (-1, size))
        .split([width, keep.shape[1] * size], -1)
    )
    positions = torch.arange(width)
    sees = (positions < (plan.anchors - plan.samples.starts)[:, None])[:, None]  # [K, 1, W]
    own = (
        torch.eye(keep.shape[1], dtype=torch.bool)
        .repeat_interleave(size, 1)[:, None]
        .expand_as(blocks[0])
    )
    wrong = {
        "counted slots": int((plan.counted != counted[keep]).sum()) + int(counted[~keep].sum()),
        "labels": int((plan.labels != tensors["target_ids"].long()[keep])[plan.counted].sum()),
        "attention mask": int((sees != context[keep]).sum()) + int((own != blocks)[keep].sum()),
    }
    return [
        worst(
            "masks and labels that differ",
            {name: float(count) for name, count in wrong.items()},
            0.0,
        )
    ]


@torch.no_grad()
def _forward_checks(
    draft: BlockDraft, plan: BlockPlan, batch: TrainBatch, tensors: dict[str, Tensor]
) -> list[Check]:
    found, exact = (
        block_outputs(draft, plan, batch.context),
        block_outputs(copy.deepcopy(draft).double(), plan, batch.context.double()),
    )
    keep, logits = tensors["block_keep_mask"].bool(), found.logits
    wanted_states = tensors["output_hidden"].unflatten(1, (-1, draft.block_size))[keep]
    states = _output("output states", found.states, wanted_states, exact.states)
    rounding = distance(logits, exact.logits)
    target = plain_logits(draft.vocabulary(), batch.last_hidden[target_places(plan)])
    counted = plan.counted
    rates = 1 - 0.5 * plain_terms(logits[counted], target, plan.labels[counted]).tv
    in_row0 = int(keep[0].sum())
    compared: dict[str, Callable[[Tensor], float]] = {
        "draft_logits": lambda wanted: distance(logits, wanted[keep]),
        "draft_logits_row0": lambda wanted: distance(logits[:in_row0], wanted[0][keep[0]]),
        "draft_logsumexp": lambda wanted: distance(logits.logsumexp(-1), wanted[keep]),
        "draft_argmax": lambda wanted: logit_gap(logits, wanted[keep]),
        "aligned_target_logsumexp": lambda wanted: distance(
            target.logsumexp(-1), wanted[keep][counted]
        ),
        "aligned_target_argmax": lambda wanted: logit_gap(target, wanted[keep][counted]),
    }
    errors = {name: measure(tensors[name]) for name, measure in compared.items() if name in tensors}
    checks = [states, worst("logits", errors, _allowed(rounding))]
    checks += [
        Check("acceptance rates", distance(rates, tensors["accept_rate"][keep][counted]), OUTPUT)
    ]
    if found.confidence is not None and exact.confidence is not None:
        checks += [
            _output(
                "confidence", found.confidence, tensors["confidence_pred"][keep], exact.confidence
            )
        ]
    return checks


@torch.no_grad()
def _step_checks(
    draft: Eagle3Draft, batch: TrainBatch, rows: Rows, tensors: dict[str, Tensor]
) -> list[Check]:
    every, exact = (
        draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask))),
        copy.deepcopy(draft).double(),
    )
    doubled = exact.step_states(batch.context.double(), every)
    rounding = {"states": 0.0, "logits": 0.0}
    errors: dict[str, dict[str, float]] = {"states": {}, "logits": {}}
    for step, (states, more_exact) in enumerate(
        zip(draft.step_states(batch.context, every), doubled, strict=True)
    ):
        counted, at = every.counted[step], every.places[every.counted[step]]
        logits = draft.logits(draft.norm(states[counted]))
        precise = exact.logits(exact.norm(more_exact[counted]))
        rounding["states"] = max(rounding["states"], distance(states[counted], more_exact[counted]))
        rounding["logits"] = max(rounding["logits"], distance(logits, precise))
        wanted = {
            name: tensors[f"step_{name}"][step][rows.real][at]
            for name in ("hidden", "logsumexp", "argmax")
        }
        errors["states"][f"step {step}"] = distance(states[counted], wanted["hidden"])
        of_step = [
            distance(logits.logsumexp(-1), wanted["logsumexp"]),
            logit_gap(logits, wanted["argmax"]),
        ]
        for row, (start, end) in enumerate(
            zip(*(bounds.tolist() for bounds in Samples.of(batch.lengths)), strict=True)
        ):
            stored, in_row = tensors.get(f"step{step}_logits_row{row}"), (at >= start) & (at < end)
            of_step += (
                [] if stored is None else [distance(logits[in_row], stored[at[in_row] - start])]
            )
        errors["logits"][f"step {step}"] = max(of_step)
    return [worst(f"step {kind}", errors[kind], _allowed(rounding[kind])) for kind in errors]


def _output(quantity: str, found: Tensor, wanted: Tensor, exact: Tensor) -> Check:
    return Check(quantity, distance(found, wanted), _allowed(distance(found, exact)))


def _allowed(rounding: float) -> float:
    return max(OUTPUT, ROUNDING_FACTOR * rounding)
