"""The draft at both ends of training: fresh, for the cache's target, and sealed, as the best checkpoint has it."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from deepspec.artifact import Artifact
from deepspec.config import RunConfig
from deepspec.data.source import Source
from deepspec.errors import ArtifactMismatch
from deepspec.model.checkpoint import build_draft, save_draft
from deepspec.model.spec import DraftSpec
from deepspec.train.state import best_checkpoint, checkpoint_records, load_draft_weights

log = logging.getLogger(__name__)


def make_draft(config: RunConfig, cache: Source) -> Any:
    """A fresh draft for the cache's target, its embedding and lm_head read from beside the shards.

    Raises:
        ArtifactMismatch: the cache was captured from another target or other layers than the draft reads.
    """
    artifact = cache.artifact
    target_config = json.loads(artifact.store.read(artifact.path("target/config.json")))
    spec = DraftSpec.from_target(target_config, config.draft, layer_ids=config.target.layer_ids, mask_token_id=config.target.mask_token_id)
    wanted = spec.hidden_size * len(spec.target_layer_ids)
    if cache.layout.context.width != wanted:
        what = f"the cache holds {cache.layout.context.width} context features a token, the draft reads {wanted}"
        raise ArtifactMismatch(what, where=artifact.url, fix="capture again with this run's target.layer_ids")
    frozen = load_file(cache.file("frozen.safetensors"))
    draft = build_draft(spec, embed=frozen["embed_tokens.weight"], lm_head=frozen["lm_head.weight"], seed=config.train.seed)
    draft.configure_loss(config.loss)
    return draft


def seal_draft(artifact: Artifact, draft: Any, inputs: dict[str, str]) -> None:
    """Write the best checkpoint's draft (the last one's, where none was measured) and the manifest."""
    records = checkpoint_records(artifact)
    chosen = best_checkpoint(records) or records[max(records)]
    load_draft_weights(artifact, chosen, draft)
    with tempfile.TemporaryDirectory() as scratch:
        save_draft(draft, Path(scratch))
        names = sorted(path.name for path in Path(scratch).iterdir())
        for name in names:
            artifact.put_file(Path(scratch) / name, f"draft/{name}")
    artifact.seal(files=[*(f"draft/{name}" for name in names), "metrics.jsonl"], inputs=inputs)
    log.info("stage=train sealed with the draft of step %d of %d: %s/draft", chosen.step, max(records), artifact.url)
