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
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
        Orphan(kind, path, entry.num_bytes, now - entry.modified, grace_s=grace_s)
        for kind, path, entry in (*_unnamed(store), *_staged(store), *_quarantine(store))
    ]
    found += [
        Orphan("upload", upload.key, 0, now - upload.started, upload.upload_id)
        for upload in store.unfinished_uploads()
    ]
    old = [orphan for orphan in found if orphan.age_s >= grace_s]
    return sorted(old, key=lambda orphan: -orphan.age_s)


def remove(store: Store, found: Iterable[Orphan]) -> int:
    """Take away those that still are orphans; returns the bytes that are free again (unknown,
    counted as 0, for uploads).
    """
    num_bytes, age_s = 0, _ages(store)
    for orphan in found:
        if orphan.kind == "upload":
            store.abort_upload(Upload(orphan.path, orphan.upload_id, 0.0))
        elif Path(orphan.path).is_absolute():
            Path(orphan.path).unlink(missing_ok=True)
        elif age_s(orphan.path) >= orphan.grace_s and not (
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


def _ages(store: Store) -> Callable[[str], float]:
    """Gives how many seconds ago a file of the store was written; minus infinity for one that is
    not there. A local file itself is asked, elsewhere a listing not older than `RELIST_S`.
    """
    listed: dict[str, tuple[float, dict[str, float]]] = {}

    def age_s(path: str) -> float:
        modified = float("inf")
        if store.is_local:
            with suppress(FileNotFoundError):
                modified = Path(store.path(path)).stat().st_mtime
        else:
            folder, _, name = path.rpartition("/")
            listed_at, times = listed.get(folder, (float("-inf"), {}))
            if time.monotonic() - listed_at > RELIST_S:
                times = {entry.name: entry.modified for entry in store.entries(folder)}
                listed[folder] = (time.monotonic(), times)
            modified = times.get(name, modified)
        return time.time() - modified

    return age_s


def _is_named_now(store: Store, path: str) -> bool:
    """Whether the record of the file's shard stands for it, or cannot be read, which leaves
    that open.
    """
    folder, part, name = path.rsplit("/", 2)
    named = _named(store, folder, [_record_of(name)])
    return named is None or f"{part}/{name}" in named


def _artifact_folders(store: Store) -> list[str]:
    stages = [stage for stage in store.names("") if stage not in NOT_STAGES]
    return [f"{stage}/{artifact}" for stage in stages for artifact in store.names(stage)]


def _unnamed(store: Store) -> Iterator[tuple[Kind, str, Entry]]:
    for folder in _artifact_folders(store):
        files = [
            (f"{part}/{entry.name}", entry)
            for part in DATA_FOLDERS
            for entry in store.entries(f"{folder}/{part}")
        ]
        if not files:
            continue
        entries = store.entries(f"{folder}/records")
        recorded = {entry.name: entry.modified for entry in entries if entry.name.endswith(".json")}
        named = _named(store, folder, recorded)
        if named is None:
            continue
        for name, entry in files:
            if name not in named:
                since = max(entry.modified, recorded.get(_record_of(entry.name), 0.0))
                yield "shard", f"{folder}/{name}", entry._replace(modified=since)


def _record_of(name: str) -> str:
    """The record of the shard whose data or rows have this name: it begins with its digits."""
    return f"{name.partition('-')[0]}.json"


def _named(store: Store, folder: str, records: Iterable[str]) -> set[str] | None:
    """The files that these records of the artifact stand for, each shard's rows among them;
    None if one cannot be read.
    """
    found = store.read_many([f"{folder}/records/{name}" for name in records])
    try:
        files = {str(json.loads(data)["file"]) for data in found if data is not None}
    except (ValueError, KeyError, TypeError):
        what = (
            "artifact=%s has a record that cannot be read: nothing of it is removed before `verify`"
        )
        log.warning(what, folder)
        return None
    return files | {f"rows/{PurePosixPath(file).name}" for file in files}


def _staged(store: Store) -> Iterator[tuple[Kind, str, Entry]]:
    """Files that were being written: in the store's own folder, or in the scratch folder of
    this machine; and what killed checks left at the root.
    """
    for path in store.spool.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # published since
            continue
        if not _is_being_written(path.name):
            name = f"{store.spool.name}/{path.name}" if store.is_local else str(path)
            yield "staged", name, Entry(path.name, status.st_size, status.st_mtime)
    for entry in store.entries(""):
        if entry.name.startswith(PROBE):
            yield "staged", entry.name, entry


def _is_being_written(name: str) -> bool:
    """Whether the process that `host-pid-uuid` names runs on this machine; files of another
    machine are judged by their age alone.
    """
    host, _, rest = name.rpartition("-")[0].rpartition("-")
    return host == os.uname().nodename and rest.isdigit() and psutil.pid_exists(int(rest))


def _quarantine(store: Store) -> Iterator[tuple[Kind, str, Entry]]:
    """What every `quarantine` folder holds: of the store, of a stage, of an artifact."""
    artifacts = [PurePosixPath(folder) for folder in _artifact_folders(store)]
    for parent in {PurePosixPath(), *(folder.parent for folder in artifacts), *artifacts}:
        folder = str(parent / "quarantine")
        for entry in store.entries(folder):
            yield "quarantine", f"{folder}/{entry.name}", entry
