"""Reading back what is committed: every damaged file is named, and its shard made missing so that the next run redoes it."""

from __future__ import annotations

from collections.abc import Iterator

from deepspec.artifact import Artifact
from deepspec.config import RunConfig
from deepspec.errors import DamagedData
from deepspec.lineage import artifact_of
from deepspec.store import file_checksum


def verify_stage(config: RunConfig, stage: str) -> Iterator[str]:
    """One line per damaged or missing file of the stage's artifact."""
    artifact = artifact_of(config, stage)
    for shard, record in artifact.records().items():
        try:
            artifact.fetch_shard(record)
        except (DamagedData, FileNotFoundError) as error:
            artifact.store.remove(artifact.path(f"records/{shard:05d}.json"))
            yield f"{artifact.url}: shard {shard}: {error}; its record is removed, run the stage {stage!r} again"
    yield from _damaged_files(artifact)


def _damaged_files(artifact: Artifact) -> Iterator[str]:
    manifest = artifact.manifest()
    for name, entry in (manifest.files if manifest else {}).items():
        try:
            found = file_checksum(artifact.store.fetch(artifact.path(name)))
        except FileNotFoundError:
            found = "no such file"
        if found != entry.checksum:
            artifact.store.remove(artifact.path("manifest.json"))
            artifact.store.remove(artifact.path(name))  # or the stage would take it for done
            todo = f"it is removed, run the stage {artifact.key.stage!r} again"
            yield f"{artifact.url}/{name}: damaged ({found}, not {entry.checksum}); {todo}"
