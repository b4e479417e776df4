"""What crashed or raced writers left in a store: found by `orphans`, which touches nothing, taken
away by `remove`.

Safe beside running workers and trainers. Nothing is an orphan before a grace period is over, which
begins when it was written or, for the old file of a shard that was made again, with the new record:
until then a trainer may read by the old manifest. `orphans` lists files before it reads the
records, so that one committed in between counts as named. A file's name follows from its bytes, so
a resumed capture may put an orphan to use later still: `remove` looks at each file and its shard's
record again before it takes the file. What stays open is the moment between that look and the
removal (remotely, up to `RELIST_S` and the time of a listing more).
"""

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import psutil

from deepspec.storage.store import Entry, Store, Upload

log = logging.getLogger(__name__)

GRACE_S = 24 * 3600.0
# the age at which `remove` lists a remote folder again: to do so for each of 10,000 files would
# take hours
RELIST_S = 1.0
DATA_FOLDERS = ("shards", "rows")
NOT_STAGES = {".staged", "quarantine", "claims"}
# what `check_writable` and `plan` write at the root, and leave there if they are killed
PROBE = ".probe-"

Kind = Literal["shard", "staged", "upload", "quarantine"]


class Orphan(NamedTuple):
    """Something that no record stands for; `path` is relative to the store, or absolute for a file
    of its scratch folder.

    `grace_s` is the age that it had to have, and must still have when it is removed.
    """

    kind: Kind
    path: str
    num_bytes: int
    age_s: float
    upload_id: str = ""
    grace_s: float = GRACE_S


def orphans(store: Store, *, grace_s: float = GRACE_S) -> list[Orphan]:
    """Everything older than `grace_s` that no record of the store names, oldest first."""
    now = time.time()
    found = [
        *_unnamed(store, now),
        *_staged(store, now),
        *_probes(store, now),
        *_uploads(store, now),
        *_quarantine(store, now),
    ]
    old = [orphan._replace(grace_s=grace_s) for orphan in found if orphan.age_s >= grace_s]
    return sorted(old, key=lambda orphan: -orphan.age_s)


def remove(store: Store, found: Iterable[Orphan]) -> int:
    """Take away those that still are orphans; returns the bytes that are free again (unknown,
    counted as 0, for uploads).
    """
    num_bytes, modified = 0, _Modified(store)
    for orphan in found:
        if orphan.kind == "upload":
            store.abort_upload(Upload(orphan.path, orphan.upload_id, 0.0))
        elif Path(orphan.path).is_absolute():
            Path(orphan.path).unlink(missing_ok=True)
        elif _is_old(orphan, modified) and not (
            orphan.kind == "shard" and _is_named_now(store, orphan.path)
        ):
            store.remove(orphan.path)
        else:
            log.info(
                "kept path=%s: it was written, named or removed since it was found", orphan.path
            )
            continue
        num_bytes += orphan.num_bytes
    return num_bytes


def remove_abandoned(store: Store) -> None:
    """Take away what processes of this machine that run no more were writing, whatever its age."""
    for path in store.spool.glob(f"{os.uname().nodename}-*"):
        if not _is_being_written(path.name):
            path.unlink(missing_ok=True)


class _Modified:
    """When a file of the store was last written: asked of a local file itself, of a listing not
    older than `RELIST_S` elsewhere.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._listed: dict[str, tuple[float, dict[str, float]]] = {}

    def of(self, path: str) -> float | None:
        """In unix seconds; None for a file that is not there."""
        if self.store.is_local:
            try:
                return Path(self.store.path(path)).stat().st_mtime
            except FileNotFoundError:
                return None
        folder, _, name = path.rpartition("/")
        listed_at, times = self._listed.get(folder, (float("-inf"), {}))
        if time.monotonic() - listed_at > RELIST_S:
            times = {entry.name: entry.modified for entry in self.store.entries(folder)}
            self._listed[folder] = (time.monotonic(), times)
        return times.get(name)


def _is_old(orphan: Orphan, modified: _Modified) -> bool:
    written = modified.of(orphan.path)
    return written is not None and time.time() - written >= orphan.grace_s


def _is_named_now(store: Store, path: str) -> bool:
    """Whether the record of the file's shard stands for it, or cannot be read, which leaves
    that open.
    """
    file = PurePosixPath(path)
    (data,) = store.read_many([f"{file.parent.parent}/records/{_shard_of(file.name)}.json"])
    try:
        return data is not None and PurePosixPath(json.loads(data)["file"]).name == file.name
    except (ValueError, KeyError, TypeError):
        return True


def _unnamed(store: Store, now: float) -> Iterator[Orphan]:
    for stage in store.names(""):
        for artifact in store.names(stage) if stage not in NOT_STAGES else ():
            folder = f"{stage}/{artifact}"
            files = [
                (f"{part}/{entry.name}", entry)
                for part in DATA_FOLDERS
                for entry in store.entries(f"{folder}/{part}")
            ]
            records = (
                [
                    entry
                    for entry in store.entries(f"{folder}/records")
                    if entry.name.endswith(".json")
                ]
                if files
                else []
            )
            named = _named(store, folder, records)
            if named is None:
                continue
            recorded = {entry.name.removesuffix(".json"): entry.modified for entry in records}
            for name, entry in files:
                if name not in named:
                    since = max(entry.modified, recorded.get(_shard_of(entry.name), 0.0))
                    yield _orphan("shard", f"{folder}/{name}", entry._replace(modified=since), now)


def _shard_of(name: str) -> str:
    """The digits that a shard's files and its record begin with."""
    return name.partition("-")[0]


def _named(store: Store, folder: str, records: Iterable[Entry]) -> set[str] | None:
    """The files that these records of the artifact stand for, each shard's rows among them;
    None if one cannot be read.
    """
    names = [f"{folder}/records/{entry.name}" for entry in records]
    try:
        files = {
            str(json.loads(data)["file"]) for data in store.read_many(names) if data is not None
        }
    except (ValueError, KeyError, TypeError):
        what = (
            "artifact=%s has a record that cannot be read: nothing of it is removed before `verify`"
        )
        log.warning(what, folder)
        return None
    return files | {f"rows/{PurePosixPath(file).name}" for file in files}


def _staged(store: Store, now: float) -> Iterator[Orphan]:
    """Files that were being written: in the store's own folder, or in the scratch folder of
    this machine.
    """
    for path in store.spool.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # published since
            continue
        if not _is_being_written(path.name):
            name = f"{store.spool.name}/{path.name}" if store.is_local else str(path)
            yield _orphan("staged", name, Entry(path.name, status.st_size, status.st_mtime), now)


def _probes(store: Store, now: float) -> Iterator[Orphan]:
    for entry in store.entries(""):
        if entry.name.startswith(PROBE):
            yield _orphan("staged", entry.name, entry, now)


def _is_being_written(name: str) -> bool:
    """Whether the process that `host-pid-uuid` names runs on this machine; of another machine
    only the age can tell.
    """
    host, _, rest = name.rpartition("-")[0].rpartition("-")
    if host != os.uname().nodename or not rest.isdigit():
        return False
    return psutil.pid_exists(int(rest))


def _uploads(store: Store, now: float) -> Iterator[Orphan]:
    for upload in store.stale_uploads(float("inf")):
        yield Orphan("upload", upload.key, 0, now - upload.started, upload.upload_id)


def _quarantine(store: Store, now: float) -> Iterator[Orphan]:
    """Every `quarantine` folder: of the store, of a stage, of an artifact."""
    folders = [""]
    for stage in store.names(""):
        if stage not in NOT_STAGES:
            folders += [f"{stage}/", *(f"{stage}/{artifact}/" for artifact in store.names(stage))]
    for folder in folders:
        for entry in store.entries(f"{folder}quarantine"):
            yield _orphan("quarantine", f"{folder}quarantine/{entry.name}", entry, now)


def _orphan(kind: Kind, path: str, entry: Entry, now: float) -> Orphan:
    return Orphan(kind, path, entry.num_bytes, now - entry.modified)
