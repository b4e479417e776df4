"""The commit rule: shards are committed one by one into a folder, the record of each last.

A shard is finished when its record exists. The record names its data file, whose name holds the
checksum: a second worker or try at the same shard never touches bytes that a record vouches for.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from pydantic import BaseModel, ValidationError

from deepspec import __version__
from deepspec.artifacts.folder import StoreFolder
from deepspec.artifacts.records import (
    ArtifactInfo,
    ArtifactKey,
    Counts,
    Manifest,
    Record,
    file_entry,
    index_file,
    new_record,
    sealed_manifest,
)
from deepspec.artifacts.records_table import read_records_table, records_table
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.storage.store import Store, file_checksum, pretty_json

RECORDS = "records.arrow"
RECORD_NAME = re.compile(r"(\d{5,})\.json")
ModelT = TypeVar("ModelT", bound=BaseModel)


class Artifact(StoreFolder):
    """One folder of the store. Resume is set subtraction: what is wanted minus `records()`."""

    def __init__(self, store: Store, key: ArtifactKey) -> None:
        super().__init__(store, key.folder)
        self.key = key

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
            info = self.info()  # another worker was first
        if info is not None and (what := info.mismatch(self.key)):
            fix = "use another store, or remove that folder"
            raise ArtifactMismatch(what, where=f"{self.url}/artifact.json", fix=fix)

    def info(self) -> ArtifactInfo | None:
        """`artifact.json`; None where there is no artifact."""
        return self.document("artifact.json", ArtifactInfo)

    def commit(
        self, shard: int, local: Path, counts: Counts, *, upstream: str | None, seconds: float = 0.0
    ) -> Record:
        """Publish a staged file as shard `shard`."""
        record = new_record(self.key, shard, local, counts, upstream=upstream, seconds=seconds)
        return self.put(record, local, counts.index_rows)

    def put(self, record: Record, local: Path, index_rows: bytes) -> Record:
        """Publish a shard: data, index rows if it has any, and the record last.

        May be called again after a full disk. Only one of several workers at a shard writes its
        record.

        Raises:
            ArtifactMismatch: the shard was committed before with other contents.
        """
        if committed := self._committed(record):
            return committed
        if local.exists():  # a local store moves it, and a call before this one may have done so
            self.store.publish(local, self.path(record.file), checksum=record.checksum)
        if index_rows:
            self.write(index_file(record), index_rows)
        written = self._put_record(record)
        self.remove(f"failures/{record.shard:05d}.json")
        return written

    def _put_record(self, record: Record) -> Record:
        """Write the record unless another worker did meanwhile, which may even have sealed."""
        if committed := self._committed(record):
            return committed
        self.remove("manifest.json")  # it knew other shards
        relative = self.path(f"records/{record.shard:05d}.json")
        data = pretty_json(record.model_dump())
        if not self.store.write_new(relative, data):
            if committed := self._committed(record):
                return committed
            self.store.write(relative, data)  # in place of one that is stale, or torn
        return record

    def _committed(self, record: Record) -> Record | None:
        """The record that the shard has already, made from the same; None for a stale one."""
        existing = self.record(record.shard)
        if existing is None or existing.upstream != record.upstream:
            return None
        if existing.content() == record.content():
            return existing
        files = f"{existing.file}, now {record.file}"
        raise ArtifactMismatch(
            f"shard {record.shard} is already committed with other contents ({files})",
            where=self.url,
            fix=f"remove records/{record.shard:05d}.json to replace it",
        )

    def record(self, shard: int) -> Record | None:
        """The record of one shard; None where there is none that can be read."""
        return self.read_records([shard]).get(shard)

    def records(self, asked: Iterable[int] | None = None) -> dict[int, Record]:
        """The records of the asked shards (None: all) that are committed, by shard.

        One listing gives their numbers. While these are those of the manifest, its table has all
        records; else each is read. A record that cannot be read counts as absent.
        """
        shards, sealed = self.record_shards(), self.sealed_records()
        wanted = sorted(shards if asked is None else set(shards) & set(asked))
        if list(sealed) != shards:
            return self.read_records(wanted)
        return {shard: sealed[shard] for shard in wanted}

    def record_shards(self) -> list[int]:
        """Shards that have a record, readable or not."""
        found = map(RECORD_NAME.fullmatch, self.names("records"))
        return sorted(int(match[1]) for match in found if match)

    def sealed_records(self) -> dict[int, Record]:
        """Those of the manifest, or none where it is missing or its table is damaged."""
        manifest = self.manifest()
        if manifest is None or not manifest.totals["shards"]:
            return {}
        (data,) = self.store.read_many([self.path(RECORDS)])
        if data is None or xxhash.xxh3_128_hexdigest(data) != manifest.records.checksum:
            return {}
        return read_records_table(data)

    def read_records(self, shards: Sequence[int]) -> dict[int, Record]:
        """The records of these shards that are there, whole, and of this artifact."""
        found = {}
        names = [self.path(f"records/{shard:05d}.json") for shard in shards]
        for shard, data in zip(shards, self.store.read_many(names), strict=True):
            with suppress(ValidationError):
                record = Record.model_validate_json(data or b"")
                if (record.artifact, record.shard) == (self.key.fingerprint, shard):
                    found[shard] = record
        return found

    def fetch_shard(self, record: Record) -> Path:
        """A local file with the shard's data; DamagedData where it does not fit its record."""
        what = f"shard {record.shard} is damaged ({record.file})"
        return self._fetch_checked(record.file, record.checksum, what)

    def rows(self, record: Record) -> list[dict[str, Any]]:
        """All rows of a shard that is a table; DamagedData as above."""
        from deepspec.artifacts.tables import read_table  # imports pyarrow

        return read_table(self.fetch_shard(record)).to_pylist()

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
        return self._fetch_checked(name, manifest.files[name].checksum, f"{name} is damaged")

    def _fetch_checked(self, name: str, checksum: str, what: str) -> Path:
        for attempt in range(2):
            local = self.store.fetch(self.path(name), checksum)
            if file_checksum(local) == checksum:
                return local
            if self.store.is_local or attempt:
                break
            local.unlink(missing_ok=True)  # only the local copy may be damaged
        fix = f"run `python -m deepspec verify`, then the stage {self.key.stage!r} again"
        raise DamagedData(what, where=self.url, fix=fix)

    def fetch_folder(self, name: str) -> Path:
        """A local folder with the sealed files under `name/`."""
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

    def seal(
        self,
        *,
        shards: Iterable[int] = (),
        files: Sequence[str] = (),
        inputs: Mapping[str, str],
        committed: Mapping[int, Record] | None = None,
    ) -> Manifest:
        """Write the manifest of these shards, further `files`, and the inputs' manifest digests.

        `committed` are the records, where the caller has read them.

        Raises:
            KeyError: a shard without a record.
        """
        committed = self.records() if committed is None else committed
        records = tuple(committed[shard] for shard in sorted(shards))
        entries = {name: file_entry(self.store.fetch(self.path(name))) for name in sorted(files)}
        table = records_table(records)
        self.write(RECORDS, table)
        manifest = sealed_manifest(self.key, records, table, files=entries, inputs=inputs)
        self.write("manifest.json", pretty_json(manifest.model_dump(mode="json")))
        return manifest

    def manifest(self) -> Manifest | None:
        """The manifest; None where the artifact is not sealed."""
        return self.document("manifest.json", Manifest)

    def document(self, relative: str, model: type[ModelT]) -> ModelT | None:
        """The file as its model reads it; None where there is none, DamagedData if it is torn."""
        try:
            return model.model_validate_json(self.read(relative))
        except FileNotFoundError:
            return None
        except ValidationError:
            raise DamagedData(
                "the file is damaged", where=f"{self.url}/{relative}", fix="remove it and run again"
            ) from None
