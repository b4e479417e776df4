"""The commit rule: folders named by fingerprint, shards committed one by one, the record written
last.

A shard is finished when its record exists. The record names the data file it vouches for; the
file's name carries its checksum, so a second worker at the same shard, or a second try of it, never
touches bytes that a record stands for.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ValidationError

from deepspec import __version__
from deepspec.artifacts.records import (
    ArtifactInfo,
    ArtifactKey,
    Counts,
    FileEntry,
    Manifest,
    Record,
    describe,
    index_file,
    read_records_table,
    records_table,
)
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.storage.store import Store, canonical_json, file_checksum, pretty_json

RECORDS = "records.arrow"
RECORD_NAME = re.compile(r"(\d{5,})\.json")
ModelT = TypeVar("ModelT", bound=BaseModel)


class Artifact:
    """One folder of the store. Resume is set subtraction: what is wanted minus `records()`."""

    def __init__(self, store: Store, key: ArtifactKey) -> None:
        self.store, self.key, self.folder = store, key, key.folder
        self.url = f"{store.url.rstrip('/')}/{key.folder}"

    def path(self, relative: str) -> str:
        self.store.path(relative)  # refuses a way out of the artifact before the prefix hides it
        return f"{self.folder}/{relative}"

    def create(self, run: Mapping[str, Any]) -> None:
        """Write `artifact.json`, or compare with the one that is there.

        Raises:
            ArtifactMismatch: the folder was made by another recipe.
        """
        info = self.info()
        if info is None:
            fields = {**self.key._asdict(), "code_version": __version__, "run": dict(run)}
            data = pretty_json(ArtifactInfo.model_validate(fields).model_dump(mode="json"))
            if self.store.write_new(self.path("artifact.json"), data):
                return
            # another worker was first
            info = ArtifactInfo.model_validate_json(self.store.read(self.path("artifact.json")))
        if what := info.mismatch(self.key):
            raise ArtifactMismatch(
                what,
                where=f"{self.url}/artifact.json",
                fix="use another store, or remove that folder",
            )

    def info(self) -> ArtifactInfo | None:
        return self._read("artifact.json", ArtifactInfo)

    def commit(
        self, shard: int, local: Path, counts: Counts, *, upstream: str | None, seconds: float = 0.0
    ) -> Record:
        """Publish a staged file as shard `shard`; `describe` and `put` in one."""
        return self.put(
            describe(self.key, shard, local, counts, upstream=upstream).taking(seconds),
            local,
            counts.index_rows,
        )

    def put(self, record: Record, local: Path, index_rows: bytes) -> Record:
        """Publish a shard: data first, then its index rows if it has any, the record last; may be
        called again after a full disk.

        Of several workers that made the same shard one writes its record; the others find an equal
        one, which is fine.

        Raises:
            ArtifactMismatch: the shard was committed before with other contents.
        """
        existing = self.record(record.shard)
        if existing is not None and existing.upstream == record.upstream:
            return self._same(existing, record)
        # in a local store the file is moved, and a call before this one may have got that far
        if local.exists():
            self.store.publish(local, self.path(record.file), checksum=record.checksum)
        if index_rows:
            self.store.write(self.path(index_file(record)), index_rows)
        written = self._put_record(record, replaced=existing)
        self.store.remove(self.path(f"failures/{record.shard:05d}.json"))
        return written

    def _put_record(self, record: Record, *, replaced: Record | None) -> Record:
        """Write the record if nobody else did meanwhile. The artifact is no longer sealed: its
        manifest knew other shards.
        """
        relative, data = (
            self.path(f"records/{record.shard:05d}.json"),
            pretty_json(record.model_dump()),
        )
        winner = self.record(record.shard)
        # it may even have sealed the artifact by now
        if winner is not None and winner.upstream == record.upstream:
            return self._same(winner, record)
        self.store.remove(self.path("manifest.json"))
        if replaced is None and not self.store.write_new(relative, data):
            winner = self.record(record.shard)
            if winner is not None and winner.upstream == record.upstream:
                return self._same(winner, record)
        elif replaced is None:
            return record
        self.store.write(relative, data)  # in place of one that is stale, or torn
        return record

    def _same(self, existing: Record, record: Record) -> Record:
        if existing.content() != record.content():
            what = f"shard {record.shard} is already committed with other contents ({existing.file}, now {record.file})"
            raise ArtifactMismatch(
                what, where=self.url, fix=f"remove records/{record.shard:05d}.json to replace it"
            )
        return existing

    def record(self, shard: int) -> Record | None:
        return self.read_records([shard]).get(shard)

    def records(self, asked: Iterable[int] | None = None) -> dict[int, Record]:
        """The committed ones of the shards asked for (None: all); a record that cannot be read
        counts as absent, and is made again.

        One listing says which there are. While they are those of the manifest, its table has them
        all; else each is read.
        """
        shards, sealed = self.record_shards(), self.sealed_records()
        wanted = sorted(set(shards) if asked is None else set(shards) & set(asked))
        return (
            {shard: sealed[shard] for shard in wanted}
            if list(sealed) == shards
            else self.read_records(wanted)
        )

    def record_shards(self) -> list[int]:
        """Shards that have a record, readable or not."""
        names = self.store.names(self.path("records"))
        return sorted(int(name.split(".")[0]) for name in names if RECORD_NAME.fullmatch(name))

    def sealed_records(self) -> dict[int, Record]:
        """Those of the manifest, or none where it is missing or its table is damaged."""
        manifest = self.manifest()
        if manifest is None or not manifest.totals["shards"]:
            return {}
        (data,) = self.store.read_many([self.path(RECORDS)])
        whole = data is not None and xxhash.xxh3_128_hexdigest(data) == manifest.records.checksum
        return read_records_table(data) if data is not None and whole else {}

    def read_records(self, shards: Sequence[int]) -> dict[int, Record]:
        """The records of these shards from their own files, those that are there, whole, and of
        this artifact.
        """
        found = {}
        for shard, data in zip(
            shards,
            self.store.read_many([self.path(f"records/{shard:05d}.json") for shard in shards]),
            strict=True,
        ):
            with suppress(ValidationError):
                record = Record.model_validate_json(data or b"")
                if (record.artifact, record.shard) == (self.key.fingerprint, shard):
                    found[shard] = record
        return found

    def fetch_shard(self, record: Record) -> Path:
        """A local file with the shard's data, checked against its record.

        Raises:
            DamagedData: the bytes are not those that were committed.
        """
        fix = f"run `python -m deepspec verify`, then the stage {self.key.stage!r} again"
        return self._fetch_checked(
            record.file, record.checksum, f"shard {record.shard} is damaged ({record.file})", fix
        )

    def fetch_file(self, name: str) -> Path:
        """A local copy of one of the sealed files, checked against the manifest.

        Raises:
            DamagedData: the bytes are not those that were sealed.
        """
        manifest = self.manifest()
        if manifest is None:
            raise ArtifactMismatch(
                "the artifact is not finished",
                where=self.url,
                fix=f"run the stage {self.key.stage!r} first",
            )
        fix = f"run `python -m deepspec verify`, then the stage {self.key.stage!r} again"
        return self._fetch_checked(name, manifest.files[name].checksum, f"{name} is damaged", fix)

    def _fetch_checked(self, name: str, checksum: str, what: str, fix: str) -> Path:
        for attempt in range(2):
            local = self.store.fetch(self.path(name), checksum)
            if file_checksum(local) == checksum:
                return local
            if self.store.is_local or attempt:
                break
            local.unlink(missing_ok=True)  # it may be no more than the local copy that is damaged
        raise DamagedData(what, where=self.url, fix=fix)

    def fetch_folder(self, name: str) -> Path:
        """A local folder with the sealed files under `name/`, called as they are there (a
        fetched file has its version in its name).
        """
        manifest = self.manifest()
        if self.store.is_local or manifest is None:
            return Path(self.store.root) / self.path(name)
        folder = self.store.scratch / "folders" / manifest.digest
        for file, entry in manifest.files.items():
            if file.startswith(f"{name}/"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileExistsError):
                    (folder / file).hardlink_to(self.store.fetch(self.path(file), entry.checksum))
        return folder / name

    def put_file(self, local: Path, relative: str) -> None:
        """Copy one more file into the artifact (`local` stays where it is)."""
        with self.store.staged() as staged:
            shutil.copyfile(local, staged)
            self.store.publish(staged, self.path(relative))

    def seal(
        self,
        *,
        shards: Iterable[int] = (),
        files: Sequence[str] = (),
        inputs: Mapping[str, str],
        committed: Mapping[int, Record] | None = None,
    ) -> Manifest:
        """Write the manifest: the records of `shards`, further `files` with checksums, and the
        inputs' manifest digests.

        Whoever has read the records already hands them over as `committed`.

        Raises:
            KeyError: a shard without a record; callers seal only when nothing is missing.
        """
        committed = self.records() if committed is None else committed
        records = tuple(committed[shard] for shard in sorted(shards))
        entries = {name: _entry(self.store.fetch(self.path(name))) for name in sorted(files)}
        totals = {
            "shards": len(records),
            "rows": sum(r.rows for r in records),
            "tokens": sum(r.tokens for r in records),
            "rejected": sum(r.rejected for r in records),
            "num_bytes": sum(r.num_bytes for r in records)
            + sum(entry.num_bytes for entry in entries.values()),
        }
        table = records_table(records)
        self.store.write(self.path(RECORDS), table)
        listed = FileEntry(num_bytes=len(table), checksum=xxhash.xxh3_128_hexdigest(table))
        manifest = Manifest(
            stage=self.key.stage,
            fingerprint=self.key.fingerprint,
            records=listed,
            files=entries,
            inputs=dict(inputs),
            totals=totals,
        )
        manifest = manifest.model_copy(update={"digest": self.digest(records, manifest)})
        self.store.write(self.path("manifest.json"), pretty_json(manifest.model_dump(mode="json")))
        return manifest

    def digest(self, records: Iterable[Record], manifest: Manifest) -> str:
        """xxh3_128 over everything that an equal artifact made elsewhere has in common with
        this one.
        """
        shared = manifest.model_dump(include={"stage", "fingerprint", "files", "inputs", "totals"})
        return xxhash.xxh3_128_hexdigest(
            canonical_json({**shared, "records": [record.content() for record in records]})
        )

    def manifest(self) -> Manifest | None:
        return self._read("manifest.json", Manifest)

    def _read(self, relative: str, model: type[ModelT]) -> ModelT | None:
        try:
            return model.model_validate_json(self.store.read(self.path(relative)))
        except FileNotFoundError:
            return None
        except ValidationError:
            raise DamagedData(
                "the file is not what it should be",
                where=f"{self.url}/{relative}",
                fix="remove it and run again",
            ) from None


def _entry(local: Path) -> FileEntry:
    return FileEntry(num_bytes=local.stat().st_size, checksum=file_checksum(local))
