"""The draft at both ends of training: fresh for the source's target, and sealed when it is done."""

import json
import logging
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import load_file

from deepspec.artifacts.artifact import Artifact
from deepspec.cache.source import Source
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch
from deepspec.hidden.metadata import CONFIG, TENSORS
from deepspec.model.checkpoint import FROZEN, build_draft, load_draft, read_spec
from deepspec.model.drafter import Drafter
from deepspec.model.execution import Execution, compiles
from deepspec.model.spec import DraftSpec
from deepspec.target.loading import DTYPES
from deepspec.train.checkpoint_files import (
    CheckpointRecord,
    best_checkpoint,
    checkpoint_records,
    save_checkpoint,
    whole_file,
)
from deepspec.train.metrics_log import MetricsLog
from deepspec.train.strategy import Strategy

log = logging.getLogger(__name__)

# of a spec, what weights fit whatever it is
NOT_IN_WEIGHTS = {
    "layout",
    "block_size",
    "num_anchors",
    "ttt_length",
    "step_loss_decay",
    "initializer_range",
    "confidence",  # whether its loss stops at the head; tensors that differ are refused
    "text_config",
}


def make_draft(config: RunConfig, source: Source, device: torch.device) -> Drafter:
    """The run's draft before its first step, for the target whose states the source gives.

    The frozen embedding and lm_head come from the source; `cache_check` compares them with the run.
    They stay in the target's dtype where training computes in it, all other weights are float32:
    fresh ones, or those of `train.start_from`.

    Raises:
        ArtifactMismatch: the draft to start from has other layers or heads, or is none.
    """
    target = json.loads(source.file(CONFIG).read_bytes())
    spec = DraftSpec.from_target(
        # which the cache leaves out, so that equal states are equal wherever the target was
        target | {"_name_or_path": config.target.model},
        config.draft,
        layer_ids=config.target.layer_ids,
        mask_token_id=config.target.mask_token_id,
    )
    frozen = load_file(source.file(TENSORS))
    draft = build_draft(
        spec,
        embed=frozen["embed_tokens.weight"],
        lm_head=frozen["lm_head.weight"],
        seed=config.train.seed,
    )
    if config.train.start_from is not None:
        _start_from(Path(config.train.start_from), draft)
    compute_dtype = DTYPES[config.train.compute_dtype]
    if all(tensor.dtype == compute_dtype for tensor in frozen.values()):
        draft.hold_frozen(compute_dtype)
    draft.configure_loss(config.loss)
    draft.execution = Execution(
        compile=compiles(config, device), recompute=config.resources.memory.recompute
    )
    return draft.to(device)


def _start_from(folder: Path, draft: Drafter) -> None:
    """Give the draft the weights in the folder; embedding and lm_head stay the target's."""
    spec, wanted = read_spec(folder), draft.spec
    both = {
        field.name: (getattr(spec, field.name), getattr(wanted, field.name))
        for field in fields(spec)
        if field.name not in NOT_IN_WEIGHTS
    }
    if differing := [f"{name} {a}, here {b}" for name, (a, b) in both.items() if a != b]:
        raise ArtifactMismatch(
            f"the draft to start from is another one than the run's: {'; '.join(differing)}",
            where=str(folder),
            fix="give the run the values of that draft, or leave train.start_from out",
        )
    frozen = {name: draft.state_dict()[name] for name in FROZEN}
    draft.load_state_dict(load_draft(folder, shared=frozen).state_dict() | frozen)
    log.info("stage=train starts from the weights in %s", folder)


def save_untrained(artifact: Artifact, strategy: Strategy, inputs: dict[str, str]) -> None:
    """Write the draft as it is as the only checkpoint: training has no steps."""
    record = CheckpointRecord(step=0, inputs=inputs)
    save_checkpoint(artifact, strategy, draft=strategy.whole(), record=record)
    MetricsLog(artifact, first=0, is_writer=strategy.world.is_first).write()


def seal_draft(artifact: Artifact, inputs: dict[str, str]) -> None:
    """Make the best checkpoint's draft (without any measured, the last one's) the artifact's.

    Raises:
        DamagedData: its bytes are not those that were saved.
    """
    records = checkpoint_records(artifact)
    chosen = best_checkpoint(records) or records[max(records)]
    files = {
        f"draft/{name}": whole_file(artifact, chosen, name)
        for name in ("config.json", "model.safetensors")
    }
    for name, local in files.items():
        artifact.put_file(local, name)
    artifact.seal(files=[*files, "metrics.jsonl"], inputs=inputs)
    message = "stage=train sealed with the draft of step %d of %d: %s/draft"
    log.info(message, chosen.step, max(records), artifact.url)
