"""Checkpoints: everything a run needs to go on exactly, safetensors and JSON only, its record written last."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import nn

from deepspec.artifact import Artifact
from deepspec.errors import DamagedData
from deepspec.model.checkpoint import save_draft
from deepspec.store import file_checksum, pretty_json
from deepspec.train.optim import optimizer_tensors, restore_optimizer

KEEP = 2  # the newest one, and one to fall back on should it turn out damaged; the best one is kept as well


class CheckpointRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    step: int
    files: dict[str, str] = {}
    """Checksum of each file beside the record."""
    loss: float = 0.0
    acceptance_length: float | None = None
    """Over held-out samples; None where it was not measured."""
    since_best: int = 0
    """Measured checkpoints in a row, this one included, that were no better than one before them."""


def save_checkpoint(artifact: Artifact, draft: Any, optimizer: torch.optim.Optimizer, record: CheckpointRecord) -> None:
    """Write the state after `record.step` optimizer steps; it counts once its record is there, completed with its files."""
    folder = f"checkpoints/{record.step:08d}"
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        save_draft(draft, local)
        save_file(optimizer_tensors(optimizer, trainable(draft)), local / "optimizer.safetensors")
        files = {path.name: file_checksum(path) for path in sorted(local.iterdir())}
        for name in files:
            artifact.put_file(local / name, f"{folder}/{name}")
    put_record(artifact, record.model_copy(update={"files": files}))
    records = checkpoint_records(artifact)
    best = best_checkpoint(records)
    for old in list(records)[:-KEEP]:
        if best is None or old != best.step:
            artifact.store.remove(artifact.path(f"checkpoints/{old:08d}"))


def put_record(artifact: Artifact, record: CheckpointRecord) -> None:
    artifact.store.write(artifact.path(f"checkpoints/{record.step:08d}/record.json"), pretty_json(record.model_dump()))


def checkpoint_records(artifact: Artifact) -> dict[int, CheckpointRecord]:
    """All complete checkpoints by step, ascending."""
    return {step: _record(artifact, step) for step in checkpoint_steps(artifact)}


def best_checkpoint(records: Mapping[int, CheckpointRecord]) -> CheckpointRecord | None:
    """The one with the longest acceptance, of equal ones the latest; None where none was measured (trap D9)."""
    measured = [record for record in records.values() if record.acceptance_length is not None]
    return max(measured, key=lambda record: (record.acceptance_length or 0.0, record.step), default=None)


def _record(artifact: Artifact, step: int) -> CheckpointRecord:
    return CheckpointRecord.model_validate_json(artifact.store.read(artifact.path(f"checkpoints/{step:08d}/record.json")))


def checkpoint_steps(artifact: Artifact) -> list[int]:
    """Steps of all complete checkpoints, ascending."""
    names = [name for name in artifact.store.names(artifact.path("checkpoints")) if name.isdigit()]
    return [int(name) for name in names if artifact.store.exists(artifact.path(f"checkpoints/{name}/record.json"))]


def resume(artifact: Artifact, draft: Any, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest complete checkpoint into draft and optimizer; returns the steps done (0: there is none).

    Raises:
        DamagedData: its bytes are not those that were saved.
    """
    steps = checkpoint_steps(artifact)
    if not steps:
        return 0
    record = _record(artifact, steps[-1])
    load_draft_weights(artifact, record, draft)
    restore_optimizer(optimizer, trainable(draft), load_file(_whole(artifact, record, "optimizer.safetensors")))
    return record.step


def load_draft_weights(artifact: Artifact, record: CheckpointRecord, draft: Any) -> None:
    """The checkpoint's weights into the draft, on the device that it is on.

    Raises:
        DamagedData: they are not those that were saved.
    """
    weights = load_file(_whole(artifact, record, "model.safetensors"), device=str(next(draft.parameters()).device))
    draft.load_state_dict(weights, strict=True)


def _whole(artifact: Artifact, record: CheckpointRecord, name: str) -> Path:
    folder = f"checkpoints/{record.step:08d}"
    local = artifact.store.fetch(artifact.path(f"{folder}/{name}"))
    if file_checksum(local) != record.files[name]:
        fix = "remove that folder to go on from the checkpoint before it"
        raise DamagedData(f"the checkpoint's {name} is damaged", where=f"{artifact.url}/{folder}", fix=fix)
    return local


def trainable(draft: nn.Module) -> Mapping[str, nn.Parameter]:
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


def append_metrics(artifact: Artifact, history: list[dict[str, Any]]) -> None:
    """Rewrite metrics.jsonl, one line per logged step; the steps behind a resumed checkpoint are written once."""
    artifact.store.write(artifact.path("metrics.jsonl"), "".join(json.dumps(line) + "\n" for line in history).encode())


def read_metrics(artifact: Artifact, before: int) -> list[dict[str, Any]]:
    """Logged steps up to `before`, so that a resumed run continues the file."""
    try:
        lines = artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return []
    return [entry for entry in map(json.loads, lines) if entry["step"] <= before]
