"""The reference vectors, read as this project's own types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepspec.model.checkpoint import Draft, empty_draft, load_tensors
from deepspec.model.draft import TrainBatch
from deepspec.model.spec import DraftSpec

FOLDER = Path(__file__).parents[2].parent / "shared" / "reference-vectors"


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not FOLDER.is_dir():
        pytest.skip(f"reference vectors are not at {FOLDER}")
    return json.loads((FOLDER / f"{name}.json").read_text()), load_file(FOLDER / f"{name}.safetensors")


def read_draft(config: dict[str, Any], names: list[str], state_dict: dict[str, list[int]] | None = None) -> Draft:
    """The draft of a case in float32; later weight files add to or override earlier ones."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= load_file(FOLDER / name)
    if state_dict is not None:  # a file may hold tensors for more cases than one
        tensors = {name: tensor for name, tensor in tensors.items() if name in state_dict}
    draft = empty_draft(DraftSpec.from_config(config))
    load_tensors(draft, tensors, dtype=torch.float32, where=str(names))
    return draft


def batch_of(tensors: dict[str, Tensor]) -> TrainBatch:
    input_ids = tensors["input_ids"].long()
    real = tensors["attention_mask"].sum(-1).long() if tensors.get("attention_mask", input_ids[None]).dim() == 2 else None
    return TrainBatch(
        input_ids=input_ids,
        loss_mask=tensors["loss_mask"].bool(),
        lengths=torch.full((len(input_ids),), input_ids.shape[1]) if real is None else real,
        context=tensors["target_hidden_states"].float(),
        last_hidden=tensors["target_last_hidden_states"].float(),
        seeds=tuple(range(len(input_ids))),
    )


def check_gradients(draft: torch.nn.Module, case: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Norm and cosine projection of every gradient to 1e-4, and the stored gradients in full."""
    grads = {name: parameter.grad for name, parameter in draft.named_parameters() if parameter.requires_grad}
    assert set(grads) == set(case["grads"]["norms"])
    for name, norm in case["grads"]["norms"].items():
        grad = grads[name].double().flatten()
        projection = (grad * torch.arange(len(grad), dtype=torch.float64).cos()).sum()
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4), name
        # A projection may nearly cancel out; its rounding is that of the gradient's own size.
        assert projection.item() == pytest.approx(case["grads"]["cos_projection"][name], rel=1e-4, abs=2e-6 * norm), name
        if f"grad.{name}" in tensors:
            torch.testing.assert_close(grads[name], tensors[f"grad.{name}"], rtol=1e-4, atol=1e-6 * max(1.0, norm))
