"""What the store writes about data: keys, records, manifests. Pure values; the rules are in `artifact.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict


class Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ArtifactInput(Stored):
    stage: str
    name: str
    fingerprint: str


class ArtifactKey(NamedTuple):
    """What decides an artifact's content, and so its folder: `<stage>/<name>-<fingerprint>`."""

    stage: str
    name: str
    fingerprint: str
    recipe: dict[str, Any]
    inputs: tuple[ArtifactInput, ...]

    @property
    def folder(self) -> str:
        return f"{self.stage}/{self.name}-{self.fingerprint}"

    def as_input(self) -> ArtifactInput:
        return ArtifactInput(stage=self.stage, name=self.name, fingerprint=self.fingerprint)


class ArtifactInfo(Stored):
    """`artifact.json`: written before the first shard and compared on resume."""

    stage: str
    name: str
    fingerprint: str
    recipe: dict[str, Any]
    inputs: tuple[ArtifactInput, ...]
    code_version: str
    run: dict[str, Any] = {}
    """The whole run's configuration as first given; information, not part of the comparison."""


class Record(Stored):
    """One committed shard. `upstream` is the checksum of the shard it was made from."""

    shard: int
    file: str
    num_bytes: int
    checksum: str
    rows: int
    tokens: int = 0
    rejected: int = 0
    upstream: str | None = None
    counts: dict[str, float] = {}
    host: str = ""
    seconds: float = 0.0

    def content(self) -> dict[str, Any]:
        """What an equal shard made elsewhere or at another time has in common with this one."""
        return self.model_dump(exclude={"host", "seconds"})


class FileEntry(Stored):
    num_bytes: int
    checksum: str


class Manifest(Stored):
    """A sealed artifact: every record and file, the inputs' digests, and one digest over all of it."""

    stage: str
    fingerprint: str
    records: tuple[Record, ...]
    files: dict[str, FileEntry]
    inputs: dict[str, str]
    totals: dict[str, int]
    digest: str


class Counts(NamedTuple):
    rows: int
    tokens: int = 0
    rejected: int = 0
    extra: Mapping[str, float] = {}
    index_rows: bytes = b""
    """Where the shard's rows lie, for stages whose rows are read one by one."""


def index_file(record: Record) -> str:
    return f"rows/{PurePosixPath(record.file).name}"
