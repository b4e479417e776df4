"""Runs that were asked for some shards only: which of them there is work on."""

from __future__ import annotations

from collections.abc import Sequence

from deepspec.artifacts.lineage import artifact_of
from deepspec.artifacts.status import (
    SHARDED,
    StageStatus,
    choose,
    missing_shards,
    require_sealed,
    upstream_records,
)
from deepspec.config.run import RunConfig

# the stages of each flow, of which a run has some or all
STAGES_OF = {
    "pipeline": ("demo", "prompts", "answers", "hidden", "train", "evaluate"),
    "prepare": ("demo", "prompts", "answers", "hidden"),
    "regenerate": ("answers",),
    "capture": ("hidden",),
    "train": ("train",),
    "evaluate": ("evaluate",),
}
# the flow of this stage alone
FLOW_OF = {"answers": "regenerate", "hidden": "capture", "train": "train", "evaluate": "evaluate"}
SELECTABLE = (*SHARDED, "evaluate")


def selected(config: RunConfig, status: StageStatus, asked: Sequence[int]) -> StageStatus:
    """The status of a stage as far as the asked shards go: of what is missing, only these.

    Stages that have no shards to choose from, and those that nothing is made of, stay as they are.

    Raises:
        ArtifactMismatch: a stage before it is not finished.
        ConfigError: there is no such shard. Units of an evaluation that has no result yet are known
            to its child alone.
    """
    stage = status.stage
    if not asked or stage not in SELECTABLE or status.in_training:
        return status
    digests = require_sealed(config, stage)
    if stage in SHARDED:
        known = set(choose(asked, upstream_records(config, stage), stage))
        return status._replace(missing=[shard for shard in status.missing if shard in known])
    artifact = artifact_of(config, stage)
    if status.sealed:
        choose(asked, artifact.records(), stage)
    draft = digests[f"train/{artifact_of(config, 'train').key.fingerprint}"]
    return status._replace(
        missing=[] if status.sealed else missing_shards(artifact, dict.fromkeys(asked, draft))
    )
