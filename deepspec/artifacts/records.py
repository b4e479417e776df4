"""What the store writes about data: keys, records, manifests. Pure values; the rules are in
`artifact.py`.
"""

import socket
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, Self

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deepspec.storage.store import canonical_json, file_checksum


class Stored(BaseModel):
    """A document of the store; a field that this version does not know is ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ArtifactInput(Stored):
    """An artifact by what names it."""

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
    format: int = 1

    @property
    def folder(self) -> str:
        """The artifact's folder in the store."""
        return f"{self.stage}/{self.name}-{self.fingerprint}"

    def as_input(self) -> ArtifactInput:
        """The artifact as another one names it."""
        return ArtifactInput(stage=self.stage, name=self.name, fingerprint=self.fingerprint)


class ArtifactInfo(ArtifactInput):
    """`artifact.json`: written before the first shard and compared on resume."""

    recipe: dict[str, Any]
    inputs: tuple[ArtifactInput, ...]
    format: int = 1
    code_version: str
    run: dict[str, Any] = {}
    """The whole run's configuration as first given; information, not part of the comparison."""

    def mismatch(self, key: ArtifactKey) -> str:
        """How what is there differs from what a run wants, in words; empty where it does not."""
        for field in ("format", "stage", "fingerprint", "recipe", "inputs"):
            found, wanted = getattr(self, field), getattr(key, field)
            if found != wanted:
                difference = _difference(found, wanted)
                return f"the artifact's {field} is not that of this run ({difference})"
        return ""


def inside(name: str) -> str:
    """The name of a file, refused where it leads out of its artifact."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} leads outside the artifact")
    return name


InsideName = Annotated[str, AfterValidator(inside)]


class Record(Stored):
    """One committed shard; `artifact` is the artifact's fingerprint, `upstream` the checksum of
    the shard that it was made from.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    artifact: str
    shard: int
    file: InsideName
    num_bytes: int
    checksum: str
    rows: int
    tokens: int = 0
    rejected: int = 0
    upstream: str | None = None
    counts: dict[str, float] = {}
    index_checksum: str = ""
    """Of the shard's file of index rows; empty where it has none."""
    scales_checksum: str = Field(default="", alias="made_with")
    """Of the codecs' channel scales, without which the shard cannot be read; empty without any.
    On disk the field has its older name.
    """
    host: str = ""
    seconds: float = 0.0
    digest: str = ""
    """Over the content: a record with a flipped bit does not fit it, and counts as absent."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.digest and self.digest != self.content_digest():
            raise ValueError("the record does not fit its digest")
        return self

    def content(self) -> dict[str, Any]:
        """What an equal shard made elsewhere or at another time has in common with this one."""
        return self.model_dump(exclude={"host", "seconds", "digest"})

    def content_digest(self) -> str:
        """xxh3_64 over the content."""
        return xxhash.xxh3_64_hexdigest(canonical_json(self.content()))

    def with_digest(self) -> "Record":
        """The record with its digest, as it is written."""
        return self.model_copy(update={"digest": self.content_digest()})


def new_record(
    key: ArtifactKey,
    shard: int,
    local: Path,
    counts: "Counts",
    *,
    upstream: str | None,
    seconds: float,
) -> Record:
    """The record that a staged file will have as shard `shard` of the artifact."""
    checksum = counts.checksum or file_checksum(local)
    fields = counts._asdict() | {"checksum": checksum}
    index_rows = fields.pop("index_rows")
    return Record(
        artifact=key.fingerprint,
        shard=shard,
        file=f"shards/{shard:05d}-{checksum[:12]}.arrow",
        num_bytes=local.stat().st_size,
        upstream=upstream,
        index_checksum=xxhash.xxh3_128_hexdigest(index_rows) if index_rows else "",
        host=socket.gethostname(),
        seconds=round(seconds, 3),
        **fields,
    ).with_digest()


def totals_of(records: Collection[Record]) -> dict[str, int]:
    """What the shards of these records add up to."""
    fields = ("rows", "tokens", "rejected", "num_bytes")
    sums = {name: sum(getattr(record, name) for record in records) for name in fields}
    return {"shards": len(records), **sums}


class FileEntry(Stored):
    """A sealed file of an artifact."""

    num_bytes: int
    checksum: str


class Manifest(Stored):
    """A sealed artifact: its files, the inputs' digests, and one digest over all of it.

    The records are in a table of their own, so that opening an artifact of 10,000 shards parses
    none of them.
    """

    stage: str
    fingerprint: str
    records: FileEntry
    """`records.arrow`. It also holds who made a shard and when, so it is not in the digest."""
    files: dict[InsideName, FileEntry]
    inputs: dict[str, str]
    totals: dict[str, int]
    digest: str = ""

    def digest_with(self, records: Iterable[Record]) -> str:
        """xxh3_128 over everything that an equal artifact made elsewhere has in common with it."""
        shared = self.model_dump(include={"stage", "fingerprint", "files", "inputs", "totals"})
        content = {**shared, "records": [record.content() for record in records]}
        return xxhash.xxh3_128_hexdigest(canonical_json(content))


def file_entry(local: Path) -> FileEntry:
    """The entry of a local file."""
    return FileEntry(num_bytes=local.stat().st_size, checksum=file_checksum(local))


def sealed_manifest(
    key: ArtifactKey,
    records: Collection[Record],
    table: bytes,
    *,
    files: Mapping[str, FileEntry],
    inputs: Mapping[str, str],
) -> Manifest:
    """The manifest of these records, the bytes of their table, and these files."""
    totals = totals_of(records)
    totals["num_bytes"] += sum(entry.num_bytes for entry in files.values())
    manifest = Manifest(
        stage=key.stage,
        fingerprint=key.fingerprint,
        records=FileEntry(num_bytes=len(table), checksum=xxhash.xxh3_128_hexdigest(table)),
        files=dict(files),
        inputs=dict(inputs),
        totals=totals,
    )
    return manifest.model_copy(update={"digest": manifest.digest_with(records)})


class Counts(NamedTuple):
    """What is known of a shard once it is made; the names are those of the record."""

    rows: int
    tokens: int = 0
    rejected: int = 0
    counts: Mapping[str, float] = {}
    checksum: str = ""
    """xxh3_128 of the file, if it was computed while writing."""
    index_rows: bytes = b""
    """Where the shard's rows lie, for stages whose rows are read one by one."""
    scales_checksum: str = ""
    """As in the record."""


def index_file(record: Record) -> str:
    """The file with the shard's index rows."""
    return f"rows/{PurePosixPath(record.file).name}"


def _difference(found: object, wanted: object) -> str:
    """How two values of an artifact's identity differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        return ", ".join(f"{key}: {_difference(found.get(key), wanted.get(key))}" for key in keys)
    return f"{found!r} there, {wanted!r} here"
