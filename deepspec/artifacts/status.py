"""What is done, and what is missing.

The store alone says what is done: a shard is missing while it has no record, or a record made from
an upstream shard that has since been replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.lineage import STAGES, artifact_of, stages_of, upstream_of
from deepspec.artifacts.records import Manifest, Record
from deepspec.artifacts.results import EvaluationSummary, read_summary
from deepspec.artifacts.shard_loop import Work
from deepspec.artifacts.side_files import failures
from deepspec.config.run import RunConfig
from deepspec.errors import ArtifactMismatch, ConfigError

__all__ = ["STAGES", "StageStatus", "results", "stage_status", "stages_of"]

SHARDED = ("answers", "hidden")  # their shard numbers are those of the stage before


class StageStatus(NamedTuple):
    stage: str
    artifact_url: str
    fingerprint: str
    committed: int
    missing: list[int]
    rows: int
    tokens: int
    rejected_rows: int
    num_bytes: int
    seconds: float
    sealed: bool
    failures: dict[int, str]
    upstream_sealed: bool
    truncated_share: float | None = None
    """Of the answers, those that ran into their limit; None where none are counted."""
    in_training: bool = False
    """Whether training makes what it needs of this stage by itself: nothing is missing, and
    nothing will be sealed.
    """


def upstream_records(config: RunConfig, stage: str) -> dict[int, Record]:
    """Committed shards of the stage before, by number."""
    return artifact_of(config, upstream_of(config, stage)[0]).records()


def missing_shards(artifact: Artifact, wanted: Mapping[int, str]) -> list[int]:
    """Shards without a record, or whose record was made from something other than `wanted`
    (shard: upstream checksum).
    """
    records = artifact.records(wanted)
    return [
        shard
        for shard, upstream in wanted.items()
        if shard not in records or records[shard].upstream != upstream
    ]


def trains_without_cache(config: RunConfig) -> bool:
    """Whether training makes the hidden states that it needs; a cache that is sealed is read
    whatever `resources.training.source` says.
    """
    return (
        config.resources.training.source != "cache"
        and artifact_of(config, "hidden").manifest() is None
    )


def inputs_of(config: RunConfig, stage: str) -> tuple[str, ...]:
    """The stages that `stage` reads: those before it, or before the hidden states where
    training makes them by itself.
    """
    return upstream_of(
        config, "hidden" if stage == "train" and trains_without_cache(config) else stage
    )


def require_sealed(config: RunConfig, stage: str) -> dict[str, str]:
    """The manifest digests of everything that `stage` reads, by `stage/fingerprint`.

    Raises:
        ArtifactMismatch: one of them is not finished.
    """
    digests = {}
    for upstream in inputs_of(config, stage):
        artifact = artifact_of(config, upstream)
        manifest = artifact.manifest()
        if manifest is None:
            what = f"the stage {stage!r} reads {upstream!r}, which is not finished"
            raise ArtifactMismatch(
                what,
                where=artifact.url,
                fix=f"run `python -m deepspec {upstream} {config.typed}` first",
            )
        digests[f"{upstream}/{artifact.key.fingerprint}"] = manifest.digest
    return digests


def stage_status(config: RunConfig, stage: str) -> StageStatus:
    artifact = artifact_of(config, stage)
    manifest, records = artifact.manifest(), artifact.records()
    upstream_manifests = [artifact_of(config, name).manifest() for name in inputs_of(config, stage)]
    missing, in_training = list[int](), stage == "hidden" and trains_without_cache(config)
    if stage in SHARDED and not in_training:
        missing = missing_shards(
            artifact,
            {shard: record.checksum for shard, record in upstream_records(config, stage).items()},
        )
    elif not in_training and (manifest is None or len(records) < manifest.totals["shards"]):
        missing = [0]
    turns = sum(record.counts.get("turns", 0) for record in records.values())
    sealed = manifest is not None and not missing and _inputs_match(config, stage, manifest)
    return StageStatus(
        stage=stage,
        artifact_url=artifact.url,
        fingerprint=artifact.key.fingerprint,
        committed=len(records),
        missing=missing,
        rows=sum(record.rows for record in records.values()),
        tokens=sum(record.tokens for record in records.values()),
        rejected_rows=sum(record.rejected for record in records.values()),
        num_bytes=manifest.totals["num_bytes"]
        if manifest
        else sum(record.num_bytes for record in records.values()),
        seconds=sum(record.seconds for record in records.values()),
        sealed=sealed,
        failures=failures(artifact),
        upstream_sealed=all(found is not None for found in upstream_manifests),
        truncated_share=sum(record.counts.get("truncated", 0) for record in records.values())
        / turns
        if turns
        else None,
        in_training=in_training,
    )


def _inputs_match(config: RunConfig, stage: str, manifest: Manifest) -> bool:
    """Whether the artifact was sealed over the inputs as they are now: a redone shard makes
    everything after it stale.

    A draft that was trained without a cache names what its hidden states were made from; a cache
    made since changes nothing.
    """
    without_cache = stage == "train" and not any(
        name.startswith("hidden/") for name in manifest.inputs
    )
    return all(
        (found := artifact_of(config, name)).manifest() is None
        or manifest.inputs.get(f"{name}/{found.key.fingerprint}") == _digest(found)
        for name in upstream_of(config, "hidden" if without_cache else stage)
    )


def _digest(artifact: Artifact) -> str | None:
    manifest = artifact.manifest()
    return manifest.digest if manifest else None


def results(config: RunConfig) -> EvaluationSummary:
    """The summary that the evaluation wrote.

    Raises:
        ArtifactMismatch: there is none yet.
    """
    artifact = artifact_of(config, "evaluate")
    if (found := read_summary(artifact)) is None:
        fix = f"run `python -m deepspec evaluate {config.typed}`"
        raise ArtifactMismatch("there are no results yet", where=artifact.url, fix=fix)
    return found


def report_text(config: RunConfig) -> str:
    """The evaluation's report as Markdown, or how to get it where an older version evaluated."""
    artifact = artifact_of(config, "evaluate")
    try:
        return artifact.store.read(artifact.path("report.md")).decode()
    except FileNotFoundError:
        return f"The results are in `{artifact.url}`; `python -m deepspec report {config.typed} --format markdown` shows them.\n"


def training_lines(config: RunConfig) -> list[dict[str, Any]]:
    """What the training logged up to its newest checkpoint; none if there is none."""
    artifact = artifact_of(config, "train")
    try:
        lines = artifact.store.read(artifact.path("metrics.jsonl")).decode().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def choose(asked: Sequence[int] | None, available: Iterable[int], stage: str) -> list[int]:
    """The asked shards (None: all), refused by name where there is no such shard to work on."""
    known = set(available)
    unknown = sorted(set(asked or ()) - known)
    if unknown:
        last = f"0 to {max(known)}" if known else "none"
        what = f"the stage {stage!r} has no shard {', '.join(map(str, unknown))}; there are {last}"
        raise ConfigError(
            what, where="--shards", fix="leave --shards out to do whatever is missing"
        )
    return sorted(known if asked is None else asked)


class ShardedStage(NamedTuple):
    """A stage whose shards are made from those of the stage before, ready to work."""

    artifact: Artifact
    upstream: Artifact
    todo: list[Work]


def open_sharded(config: RunConfig, stage: str, shards: Sequence[int] | None) -> ShardedStage:
    """The stage's artifact, created or compared, and the shards to make now.

    Raises:
        ArtifactMismatch: the folder belongs to another recipe, or the stage before is not finished.
        ConfigError: a shard that does not exist.
    """
    require_sealed(config, stage)
    artifact, upstream = (
        artifact_of(config, stage),
        artifact_of(config, upstream_of(config, stage)[0]),
    )
    records = upstream.records()
    asked = choose(shards, records, stage)
    artifact.create(config.model_dump(mode="json"))
    missing = missing_shards(artifact, {shard: records[shard].checksum for shard in asked})
    return ShardedStage(artifact, upstream, [Work(shard, records[shard]) for shard in missing])


def seal_if_whole(
    config: RunConfig,
    stage: str,
    *,
    files: Sequence[str] = (),
    before: Callable[[list[Record]], None] = lambda records: None,
) -> Manifest | None:
    """Seal the artifact if nothing is missing any more; whoever commits the last shard gets here.

    `before` is given all records and writes what is sealed with them. Two listings tell a lane that
    others still work.
    """
    artifact, upstream = (
        artifact_of(config, stage),
        artifact_of(config, upstream_of(config, stage)[0]),
    )
    if set(upstream.record_shards()) - set(artifact.record_shards()):
        return None
    wanted, records, inputs = upstream.records(), artifact.records(), require_sealed(config, stage)
    if any(
        shard not in records or records[shard].upstream != record.checksum
        for shard, record in wanted.items()
    ):
        return None
    manifest = artifact.manifest()
    if (
        manifest is not None
        and manifest.inputs == inputs
        and list(artifact.sealed_records()) == list(wanted)
    ):
        return manifest
    before([records[shard] for shard in wanted])
    return artifact.seal(shards=wanted, files=files, inputs=inputs, committed=records)
