"""What the store writes about data: keys, records, manifests. Pure values; the rules are in
`artifact.py`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, Self

import xxhash
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deepspec.storage.store import canonical_json, file_checksum


class Stored(BaseModel):
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
        return f"{self.stage}/{self.name}-{self.fingerprint}"

    def as_input(self) -> ArtifactInput:
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
                return (
                    f"the artifact's {field} is not that of this run ({_difference(found, wanted)})"
                )
        return ""


def inside(name: str) -> str:
    """The name of a file, refused where it leads out of its artifact."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name!r} leads outside the artifact")
    return name


InsideName = Annotated[str, AfterValidator(inside)]


class Record(Stored):
    """One committed shard of the artifact with this fingerprint. `upstream` is the checksum of
    the shard it was made from.
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
    """Over the content. A record in which a bit was flipped no longer fits it, and counts as
    absent.
    """

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.digest and self.digest != self.content_digest():
            raise ValueError("the record does not fit its digest")
        return self

    def content(self) -> dict[str, Any]:
        """What an equal shard made elsewhere or at another time has in common with this one."""
        return self.model_dump(exclude={"host", "seconds", "digest"})

    def content_digest(self) -> str:
        return xxhash.xxh3_64_hexdigest(canonical_json(self.content()))

    def with_digest(self) -> Record:
        """The record with its digest, as it is written."""
        return self.model_copy(update={"digest": self.content_digest()})

    def taking(self, seconds: float) -> Record:
        """The same record of a shard that took so long."""
        return self.model_copy(update={"seconds": round(seconds, 3)})


def describe(
    key: ArtifactKey, shard: int, local: Path, counts: Counts, *, upstream: str | None
) -> Record:
    """The record that a staged file will have as shard `shard` of the artifact."""
    checksum = counts.checksum or file_checksum(local)
    return Record(
        artifact=key.fingerprint,
        shard=shard,
        file=f"shards/{shard:05d}-{checksum[:12]}.arrow",
        num_bytes=local.stat().st_size,
        checksum=checksum,
        rows=counts.rows,
        tokens=counts.tokens,
        rejected=counts.rejected,
        upstream=upstream,
        counts=dict(counts.extra),
        index_checksum=xxhash.xxh3_128_hexdigest(counts.index_rows) if counts.index_rows else "",
        scales_checksum=counts.scales_checksum,
        host=socket.gethostname(),
    ).with_digest()


def records_table(records: Iterable[Record]) -> bytes:
    """The records of a sealed artifact as one Arrow IPC file, a row a shard, so that nobody
    need ask for 10,000 files.
    """
    import pyarrow as pa

    rows = [
        {**record.model_dump(), "counts": json.dumps(record.counts, sort_keys=True)}
        for record in records
    ]
    integers = dict.fromkeys(("shard", "num_bytes", "rows", "tokens", "rejected"), pa.uint64())
    columns = [field.alias or name for name, field in Record.model_fields.items()]
    kinds = {
        name: integers.get(name, pa.float64() if name == "seconds" else pa.string())
        for name in columns
    }
    table = pa.Table.from_pylist(rows, pa.schema(list(kinds.items())))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def read_records_table(data: bytes) -> dict[int, Record]:
    import pyarrow as pa

    rows = pa.ipc.open_file(pa.py_buffer(data)).read_all().to_pylist()
    return {
        row["shard"]: Record.model_validate({**row, "counts": json.loads(row["counts"])})
        for row in rows
    }


class FileEntry(Stored):
    num_bytes: int
    checksum: str


class Manifest(Stored):
    """A sealed artifact: its files, the inputs' digests, and one digest over all of it, every
    record included.

    The records themselves stand in a table of their own, so that opening an artifact of 10,000
    shards parses none of them.
    """

    stage: str
    fingerprint: str
    records: FileEntry
    """`records.arrow`; its checksum covers who made a shard and when as well, so it is not part
    of the digest.
    """
    files: dict[InsideName, FileEntry]
    inputs: dict[str, str]
    totals: dict[str, int]
    digest: str = ""


class Counts(NamedTuple):
    rows: int
    tokens: int = 0
    rejected: int = 0
    extra: Mapping[str, float] = {}
    checksum: str = ""
    """xxh3_128 of the file, where it was computed while writing; empty has it computed by
    reading.
    """
    index_rows: bytes = b""
    """Where the shard's rows lie, for stages whose rows are read one by one."""
    scales_checksum: str = ""
    """As in the record."""


def index_file(record: Record) -> str:
    return f"rows/{PurePosixPath(record.file).name}"


def _difference(found: object, wanted: object) -> str:
    """What is not the same about two values of an artifact's identity, in words."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
        return ", ".join(
            f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys
        )
    return f"{found!r} there, {wanted!r} here"
