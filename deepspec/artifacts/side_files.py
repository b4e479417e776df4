"""What a stage sets aside beside an artifact: rows and shards that did not make it, each with
the reason.
"""

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspec.artifacts.artifact import Artifact
from deepspec.errors import DeepSpecError
from deepspec.storage.store import pretty_json


def put_rejects(
    artifact: Artifact, shard: int, rows: Iterable[Mapping[str, Any]], *, made: str = ""
) -> None:
    """Rows that failed for good, each with its `reason`; written before the shard's record.

    Where a shard made twice may differ, `made` is the checksum of the one that they belong to, and
    part of their name as of its.
    """
    if lines := "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows):
        artifact.write(f"rejects/{shard:05d}{made and f'-{made[:12]}'}.jsonl", lines.encode())


def quarantine(artifact: Artifact, shard: int, local: Path) -> str:
    """Keep what was written of a shard that must not be committed, for somebody to look at;
    returns where it is.
    """
    name = f"quarantine/{shard:05d}.arrow"
    artifact.store.publish(local, artifact.path(name))
    return f"{artifact.url}/{name}"


def folder_beside(artifact: Artifact, name: str) -> Path:
    """A local folder for what belongs to an artifact but not into it (journals, logs): beside
    it, or under `scratch` for a bucket.
    """
    store = artifact.store
    return (
        Path(store.root) / artifact.folder / name
        if store.is_local
        else store.scratch / name / artifact.folder
    )


def put_failure(artifact: Artifact, shard: int, error: DeepSpecError) -> None:
    """Record why a shard is missing; a later commit of the shard removes the note."""
    fields = {**error.to_json(), "host": socket.gethostname()}
    artifact.write(f"failures/{shard:05d}.json", pretty_json(fields))


def failures(artifact: Artifact) -> dict[int, str]:
    """Why each shard that failed is missing."""
    names = artifact.names("failures")
    # one may be gone: committed since
    notes = artifact.store.read_many([artifact.path(f"failures/{name}") for name in names])
    return {
        int(name.split(".")[0]): json.loads(note)["what"]
        for name, note in zip(names, notes, strict=True)
        if note
    }
