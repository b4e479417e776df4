"""Cases in the format of the reference vectors, made from drafts of this project: other heads,
families and paddings.

B rows, W padded width, A anchors a row, K anchors in all.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.config.draft import LossConfig
from deepspec.model.block_draft import BlockDraft
from deepspec.model.config_json import config_from_spec
from deepspec.model.drafter import Drafter, TrainBatch
from deepspec.model.eagle3 import Eagle3Draft
from tests.model.drafts import plain_logits
from tests.vectors.block_outputs import block_outputs
from tests.vectors.loss import plain_terms
from tests.vectors.training import Rows, batch_of, target_places


def write_block_case(
    draft: BlockDraft, batch: TrainBatch, settings: LossConfig, folder: Path
) -> None:
    """The format does not record where rows of blocks end: they are read as tokens without loss up
    to the padded width.
    """
    draft.configure_loss(settings)
    inputs = _inputs(batch)
    batch = batch_of(inputs, Rows.of(inputs))
    plan = draft.plan(batch)
    states, logits, confidence = block_outputs(draft, plan, batch.context)
    counted = plan.counted
    target = plain_logits(draft.vocabulary(), batch.last_hidden[target_places(plan)])
    output = draft.loss(batch, plan)
    rates = 1 - 0.5 * plain_terms(logits[counted], target, plan.labels[counted]).tv
    width, size, positions = (
        len(batch.input_ids) // len(batch.lengths),
        draft.block_size,
        plan.anchors - plan.samples.starts,
    )
    per_row = torch.bincount(plan.anchors // width, minlength=len(batch.lengths))

    def by_row(values: Tensor) -> Tensor:
        return pad_sequence(values.detach().split(per_row.tolist()), batch_first=True)

    keep = by_row(torch.ones_like(positions)).bool()
    num_rows, num_blocks = keep.shape
    before = torch.arange(width) < by_row(positions)[..., None]
    own = (
        torch.eye(num_blocks, dtype=torch.bool).repeat_interleave(size, 1).expand(num_rows, -1, -1)
    )
    tensors = inputs | {
        "anchor_positions": by_row(positions).int(),
        "block_keep_mask": keep.byte(),
        "output_hidden": by_row(states).flatten(1, 2),
        "attention_mask": torch.cat([before, own], -1).repeat_interleave(size, 1)[:, None].byte(),
        "draft_logits_row0": by_row(logits)[:1],
        "draft_logsumexp": by_row(logits.logsumexp(-1)),
        "draft_argmax": by_row(logits.argmax(-1)).int(),
        "target_ids": by_row(plan.labels).int(),
        "eval_mask": by_row(counted).byte(),
        "accept_rate": by_row(torch.zeros(counted.shape).masked_scatter(counted, rates)),
    }
    tensors |= {} if confidence is None else {"confidence_pred": by_row(confidence)}
    arguments = {
        "loss_decay_gamma": settings.decay,
        "ce_loss_alpha": settings.ce,
        "l1_loss_alpha": settings.tv,
    }
    names = {"ce": "ce_loss", "tv": "l1_loss", "confidence": "confidence_loss"}
    scalars = {f"{names[name]}_num": value.item() for name, value in output.numerators.items()}
    scalars |= {f"{names[name]}_den": output.denominator.item() for name in output.numerators}
    fields = {
        "loss_args": arguments | {"confidence_head_alpha": settings.confidence},
        "scalars": scalars,
    }
    _write(draft, output.numerator / output.denominator, fields, tensors, folder)


def write_eagle3_case(draft: Eagle3Draft, batch: TrainBatch, folder: Path) -> None:
    """As the reference does, the loss is divided by the padded width."""
    num_rows, num_tokens = len(batch.lengths), int(batch.lengths.max())
    every = draft.plan(batch._replace(loss_mask=torch.ones_like(batch.loss_mask)))
    steps = []
    with torch.no_grad():
        for states in draft.step_states(batch.context, every):
            stored = torch.zeros(len(batch.input_ids), draft.spec.hidden_size)
            stored[every.places] = states
            steps.append(_padded(stored, batch.lengths))
    logits = draft.logits(draft.norm(torch.stack(steps)))
    plan = draft.plan(batch)
    output = draft.loss(batch, plan._replace(weights=torch.full_like(plan.weights, 1 / num_tokens)))
    tensors = _inputs(batch) | {
        "attention_mask": (torch.arange(num_tokens) < batch.lengths[:, None]).byte(),
        "step_hidden": torch.stack(steps),
        "step0_logits_row0": logits[0, 0],
        "step_logsumexp": logits.logsumexp(-1),
        "step_argmax": logits.argmax(-1).int(),
    }
    fields = {
        "loss_args": {},
        "scalars": {},
        "step_losses": [(value / num_rows).item() for value in output.numerators.values()],
    }
    _write(draft, output.numerator / num_rows, fields, tensors, folder)


def _padded(values: Tensor, lengths: Tensor) -> Tensor:
    """[T, ...] packed -> [B, W, ...]."""
    return pad_sequence(values.split(lengths.tolist()), batch_first=True)


def _inputs(batch: TrainBatch) -> dict[str, Tensor]:
    tensors = {
        "input_ids": batch.input_ids.int(),
        "loss_mask": batch.loss_mask.byte(),
        "target_hidden_states": batch.context,
        "target_last_hidden_states": batch.last_hidden,
    }
    return {name: _padded(tensor, batch.lengths) for name, tensor in tensors.items()}


def _write(
    draft: Drafter, loss: Tensor, fields: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> None:
    draft.zero_grad()
    loss.backward()
    grads = {
        name: parameter.grad.double().flatten()
        for name, parameter in draft.named_parameters()
        if parameter.grad is not None
    }
    waves = {
        name: (grad * torch.arange(len(grad), dtype=torch.float64).cos()).sum().item()
        for name, grad in grads.items()
    }
    fields["scalars"]["loss"] = loss.item()
    fields |= {
        "config": config_from_spec(draft.spec),
        "weights": ["odd.weights"],
        "state_dict": {name: list(tensor.shape) for name, tensor in draft.state_dict().items()},
        "metrics": {},
        "grads": {
            "total_norm": torch.cat(list(grads.values())).norm().item(),
            "norms": {name: grad.norm().item() for name, grad in grads.items()},
            "cos_projection": waves,
        },
    }
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in draft.state_dict().items()},
        folder / "odd.weights",
    )
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        folder / "any.safetensors",
    )
    (folder / "any.json").write_text(json.dumps(fields))
