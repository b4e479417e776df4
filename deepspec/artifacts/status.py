"""What a run has of each stage, and what a finished one has to show."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepspec.artifacts.missing import (
    chosen_shards,
    inputs_match,
    missing,
    missing_units,
    require_sealed,
    trains_without_cache,
    wanted_shards,
)
from deepspec.artifacts.records import totals_of
from deepspec.artifacts.results import EvaluationSummary, read_summary
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import failures
from deepspec.artifacts.stages import STAGES
from deepspec.errors import ArtifactMismatch


class StageStatus(NamedTuple):
    """How far a stage is."""

    stage: str
    artifact_url: str
    committed: int
    missing: list[int]
    rows: int
    tokens: int
    rejected_rows: int
    num_bytes: int
    sealed: bool
    failures: dict[int, str]
    truncated_share: float | None = None
    """Of the answers, those that ran into their limit; None where none are counted."""
    in_training: bool = False
    """Whether training makes what it needs of this stage by itself: nothing is missing, and
    nothing will be sealed.
    """


def stage_status(run: Run, stage: str) -> StageStatus:
    """The stage as the store has it now."""
    artifact = run.artifact(stage)
    manifest, records = artifact.manifest(), artifact.records()
    left = missing(run, stage)
    counts = [record.counts for record in records.values()]
    turns = sum(count.get("turns", 0) for count in counts)
    truncated = sum(count.get("truncated", 0) for count in counts)
    totals = totals_of(records.values())
    return StageStatus(
        stage=stage,
        artifact_url=artifact.url,
        committed=len(records),
        missing=left,
        rows=totals["rows"],
        tokens=totals["tokens"],
        rejected_rows=totals["rejected"],
        num_bytes=(manifest.totals if manifest else totals)["num_bytes"],
        sealed=manifest is not None and not left and inputs_match(run, stage, manifest),
        failures=failures(artifact),
        truncated_share=truncated / turns if turns else None,
        in_training=stage == "hidden" and trains_without_cache(run),
    )


def selected(run: Run, status: StageStatus, asked: Sequence[int]) -> StageStatus:
    """The status with only the asked ones (none: all) of the shards or units that are missing.

    A stage that cannot be made in part stays as it is.

    Raises:
        ArtifactMismatch: a stage before it is not finished.
        ConfigError: there is no such shard. The units of an evaluation without a result are known
            only once its benchmarks are read.
    """
    stage = status.stage
    if not asked or not STAGES[stage].is_selectable or status.in_training:
        return status
    require_sealed(run, stage)
    if STAGES[stage].is_sharded:
        chosen = set(chosen_shards(asked, wanted_shards(run, stage), stage))
        return status._replace(missing=[shard for shard in status.missing if shard in chosen])
    if status.sealed:
        chosen_shards(asked, run.artifact(stage).records(), stage)
        return status._replace(missing=[])
    return status._replace(missing=missing_units(run, stage, asked))


def results(run: Run) -> EvaluationSummary:
    """The summary that the evaluation wrote.

    Raises:
        ArtifactMismatch: there is none yet.
    """
    artifact = run.artifact("evaluate")
    if (found := read_summary(artifact)) is None:
        raise ArtifactMismatch(
            "there are no results yet", where=artifact.url, fix=f"run `{run.command('evaluate')}`"
        )
    return found


def stored_report(run: Run) -> str:
    """The evaluation's report as Markdown, or how to get it where an older version evaluated."""
    artifact = run.artifact("evaluate")
    try:
        return artifact.read("report.md").decode()
    except FileNotFoundError:
        command = f"{run.command('report')} --format markdown"
        return f"The results are in `{artifact.url}`; `{command}` shows them.\n"


def training_lines(run: Run) -> list[dict[str, Any]]:
    """What training logged up to its newest checkpoint; empty where there is none."""
    artifact = run.artifact("train")
    stored = artifact.store.read_if_there(artifact.path("metrics.jsonl")) or b""
    return [json.loads(line) for line in stored.splitlines()]
