"""The draft at both ends of training: fresh for the source's target, and sealed when it is done."""

import json
import logging

import torch
from safetensors.torch import load_file

from deepspec.artifacts.artifact import Artifact
from deepspec.cache.source import Source
from deepspec.config.run import RunConfig
from deepspec.hidden.metadata import CONFIG, TENSORS
from deepspec.model.checkpoint import build_draft
from deepspec.model.drafter import Drafter
from deepspec.model.execution import Execution, compiles
from deepspec.model.spec import DraftSpec
from deepspec.target.loading import DTYPES
from deepspec.train.checkpoint_files import best_checkpoint, checkpoint_records, whole_file

log = logging.getLogger(__name__)


def make_draft(config: RunConfig, source: Source, device: torch.device) -> Drafter:
    """A fresh draft of the run on the device, for the target whose states the source gives.

    The frozen embedding and lm_head come from the source; `cache_check` compares them with the run.
    They stay in the target's dtype where training computes in it, all other weights are float32.
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
    compute_dtype = DTYPES[config.train.compute_dtype]
    if all(tensor.dtype == compute_dtype for tensor in frozen.values()):
        draft.hold_frozen(compute_dtype)
    draft.configure_loss(config.loss)
    draft.execution = Execution(
        compile=compiles(config, device), recompute=config.resources.memory.recompute
    )
    return draft.to(device)


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
