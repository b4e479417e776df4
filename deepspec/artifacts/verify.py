"""Reading back what is committed: every damaged file is named, and its shard made missing so that
the next run redoes it.

Shards are read by several threads (hashing and reading release the interpreter's lock), each once
and front to back: 10,000 shards of 2 GB take as long as the disk or the line needs for their bytes.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import xxhash

from deepspec.artifacts.artifact import RECORDS, Artifact
from deepspec.artifacts.records import Record, index_file
from deepspec.artifacts.run import Run
from deepspec.errors import DamagedData

Locate = Callable[[Artifact, Record], list[str]]
"""Finds out what in a damaged shard is damaged, for stages whose rows have checksums of their
own.
"""


def verify_all(run: Run, locate: Mapping[str, Locate]) -> Iterator[str]:
    """One line per damaged or missing file of the run's stages, and of the known benchmarks that
    they read; `locate` is by stage.
    """
    stages = (run.artifact(stage.name) for stage in run.stages)
    known = [found for stage in run.stages for found in stage.known_benchmarks(run.config)]
    num_threads = run.config.resources.devices.read_threads
    for artifact in chain(stages, map(run.benchmark, dict.fromkeys(known))):
        found = locate.get(artifact.key.stage)
        yield from verify_artifact(artifact, found, num_threads=num_threads)


def verify_artifact(
    artifact: Artifact, locate: Locate | None, *, num_threads: int
) -> Iterator[str]:
    """One line per damaged or missing file; what is damaged is removed, to be made again."""
    yield from _damaged_manifest(artifact)
    yield from _damaged_records(artifact)
    records = artifact.records().values()
    with ThreadPoolExecutor(num_threads) as pool:
        damage = pool.map(partial(_damage, artifact, locate), records)
        for record, found in zip(records, damage, strict=True):
            if found:
                yield from _made_missing(artifact, record.shard, found, judged=record)
    yield from _damaged_files(artifact)


def _damaged_manifest(artifact: Artifact) -> Iterator[str]:
    """A manifest that does not fit its digest; the shards are as they were, so sealing again is
    all there is to do.
    """
    try:
        manifest = artifact.manifest()
        # none where their table is damaged, which is found below
        records = artifact.sealed_records()
        whole = (
            manifest is None
            or len(records) < manifest.totals["shards"]
            or manifest.digest == manifest.digest_with(records.values())
        )
    except DamagedData:
        whole = False
    if not whole:
        artifact.remove("manifest.json")
        again = f"it is removed, run the stage {artifact.key.stage!r} again"
        yield f"{artifact.url}/manifest.json is damaged; {again}"


def _damaged_records(artifact: Artifact) -> Iterator[str]:
    """Records that do not fit their digest, or that the sealed table knows otherwise, or not at
    all.
    """
    names = artifact.record_shards()
    sealed, found = artifact.sealed_records(), artifact.read_records(names)
    for shard in sorted({*names, *sealed}):
        why = ""
        if shard not in found:
            why = "its record is missing" if shard not in names else "its record is damaged"
        elif sealed and found[shard] != sealed.get(shard):
            why = "its record is not the one that was sealed"
        if why:
            yield from _made_missing(artifact, shard, why, judged=found.get(shard))


def _damage(artifact: Artifact, locate: Locate | None, record: Record) -> str:
    """What is wrong with a shard; read from the store itself, not from a local copy."""
    try:
        whole = artifact.store.checksum(artifact.path(record.file)) == record.checksum
    except FileNotFoundError:
        return f"{record.file} is gone"
    except OSError as error:  # a bad sector: the commonest way for a disk to lose data
        return f"{record.file} cannot be read ({error.strerror})"
    if not whole:
        places = locate(artifact, record) if locate else []
        return f"{record.file} is damaged" + (f": {'; '.join(places)}" if places else "")
    if record.index_checksum:
        rows = artifact.store.read_if_there(artifact.path(index_file(record)))
        if rows is None or xxhash.xxh3_128_hexdigest(rows) != record.index_checksum:
            return f"{index_file(record)} is damaged"
    return ""


def _made_missing(
    artifact: Artifact, shard: int, why: str, *, judged: Record | None
) -> Iterator[str]:
    """Remove the record, unless another run has made the shard again since it was read."""
    if artifact.record(shard) == judged:
        artifact.remove(f"records/{shard:05d}.json")
        again = f"its record is removed, run the stage {artifact.key.stage!r} again"
        yield f"{artifact.url}: shard {shard}: {why}; {again}"


def _damaged_files(artifact: Artifact) -> Iterator[str]:
    """What stands beside the shards; removed, or the stage would take it for done."""
    manifest = artifact.manifest()
    entries = {**manifest.files, RECORDS: manifest.records} if manifest else {}
    for name, entry in entries.items():
        try:
            found = artifact.store.checksum(artifact.path(name))
        except FileNotFoundError:
            found = "no such file"
        if found != entry.checksum:
            artifact.remove("manifest.json")
            artifact.remove(name)
            todo = f"it is removed, run the stage {artifact.key.stage!r} again"
            yield f"{artifact.url}/{name}: damaged ({found}, not {entry.checksum}); {todo}"
