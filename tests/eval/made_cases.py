"""Cases in the format of the reference vectors, made from drafts of this project: other heads, families and paddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.config import LossConfig
from deepspec.eval.training_vectors import block_outputs
from deepspec.model.anchors import block_mask
from deepspec.model.backbone import softcap
from deepspec.model.block import BlockDraft
from deepspec.model.checkpoint import Draft
from deepspec.model.draft import TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from deepspec.model.loss import deviation


def write_block_case(draft: BlockDraft, batch: TrainBatch, settings: LossConfig, folder: Path) -> None:
    draft.configure_loss(settings)
    plan = draft.plan(batch)
    states, logits, confidence = block_outputs(draft, plan, batch.context)
    counted, keep = plan.counted, plan.anchors.keep
    target = draft.vocabulary().target_logits(plan.of_slots(batch.last_hidden))
    output = draft.loss(batch, plan)
    rates = 1 - 0.5 * deviation(logits[counted], target, plan.labels[counted]).total_variation
    tensors = _inputs(batch) | {
        "anchor_positions": plan.anchors.positions.int(), "block_keep_mask": keep.byte(), "output_hidden": states.flatten(1, 2),
        "attention_mask": block_mask(plan.anchors, num_tokens=batch.input_ids.shape[1], block_size=draft.block_size).byte(),
        "draft_logits_row0": logits[:1], "draft_logsumexp": logits.logsumexp(-1), "draft_argmax": logits.argmax(-1).int(),
        "target_ids": plan.labels.int(), "eval_mask": counted.byte(),
        "accept_rate": torch.zeros(counted.shape).masked_scatter(counted, rates),
    }  # fmt: skip
    tensors |= {} if confidence is None else {"confidence_pred": confidence}
    arguments = {"loss_decay_gamma": settings.decay, "ce_loss_alpha": settings.ce, "l1_loss_alpha": settings.tv}
    names = {"ce": "ce_loss", "tv": "l1_loss", "confidence": "confidence_loss"}
    scalars = {f"{names[name]}_num": value.item() for name, value in output.numerators.items()}
    scalars |= {f"{names[name]}_den": output.denominator.item() for name in output.numerators}
    fields = {"loss_args": arguments | {"confidence_head_alpha": settings.confidence}, "scalars": scalars}
    _write(draft, output.numerator / output.denominator, fields, tensors, folder)


def write_eagle3_case(draft: Eagle3Draft, batch: TrainBatch, folder: Path) -> None:
    """As the reference does, the loss is divided by the padded width."""
    num_rows, num_tokens = batch.input_ids.shape
    every = draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    steps = [torch.zeros(num_rows, num_tokens, draft.spec.hidden_size) for _ in every.counted]
    with torch.no_grad():
        for stored, states in zip(steps, draft.step_states(batch, every), strict=True):
            stored[torch.arange(num_rows)[:, None], every.positions] = states
    logits = softcap(draft.lm_head(draft.norm(torch.stack(steps))), draft.spec.logit_softcap)
    plan = draft.plan(batch)
    output = draft.loss(batch, plan._replace(weights=torch.full_like(plan.weights, 1 / num_tokens)))
    tensors = _inputs(batch) | {
        "attention_mask": (torch.arange(num_tokens) < batch.lengths[:, None]).byte(), "step_hidden": torch.stack(steps),
        "step0_logits_row0": logits[0, 0], "step_logsumexp": logits.logsumexp(-1), "step_argmax": logits.argmax(-1).int(),
    }  # fmt: skip
    fields = {"loss_args": {}, "scalars": {}, "step_losses": [(value / num_rows).item() for value in output.numerators.values()]}
    _write(draft, output.numerator / num_rows, fields, tensors, folder)


def _inputs(batch: TrainBatch) -> dict[str, Tensor]:
    return {
        "input_ids": batch.input_ids.int(), "loss_mask": batch.loss_mask.byte(),
        "target_hidden_states": batch.context, "target_last_hidden_states": batch.last_hidden,
    }  # fmt: skip


def _write(draft: Draft, loss: Tensor, fields: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    draft.zero_grad()
    loss.backward()
    grads = {name: parameter.grad.double().flatten() for name, parameter in draft.named_parameters() if parameter.grad is not None}
    waves = {name: (grad * torch.arange(len(grad), dtype=torch.float64).cos()).sum().item() for name, grad in grads.items()}
    fields["scalars"]["loss"] = loss.item()
    fields |= {
        "config": draft.spec.to_config(), "weights": ["odd.weights"],
        "state_dict": {name: list(tensor.shape) for name, tensor in draft.state_dict().items()},
        "metrics": {}, "grads": {
            "total_norm": torch.cat(list(grads.values())).norm().item(),
            "norms": {name: grad.norm().item() for name, grad in grads.items()}, "cos_projection": waves,
        },
    }  # fmt: skip
    save_file({name: tensor.detach().contiguous() for name, tensor in draft.state_dict().items()}, folder / "odd.weights")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "any.safetensors")
    (folder / "any.json").write_text(json.dumps(fields))
