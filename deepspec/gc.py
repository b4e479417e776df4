"""What crashed or raced writers left in a store: found by `orphans`, which touches nothing, taken away by `remove`.

Safe beside running workers: nothing is an orphan before it is older than a grace period, and the records are read after the
files were listed, so that a file whose record is written in between counts as named.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from deepspec.store import Entry, Store, Upload

log = logging.getLogger(__name__)

GRACE_S = 24 * 3600.0
DATA_FOLDERS = ("shards", "rows")
NOT_STAGES = {".staged", "quarantine"}

Kind = Literal["shard", "staged", "upload", "quarantine"]


class Orphan(NamedTuple):
    """Something that no record stands for; `path` is relative to the store, or absolute for a file of its scratch folder."""

    kind: Kind
    path: str
    num_bytes: int
    age_s: float
    upload_id: str = ""


def orphans(store: Store, *, grace_s: float = GRACE_S) -> list[Orphan]:
    """Everything older than `grace_s` that no record of the store names, oldest first."""
    now = time.time()
    found = [*_unnamed(store, now), *_staged(store, now), *_uploads(store, now), *_quarantine(store, now)]
    return sorted((orphan for orphan in found if orphan.age_s >= grace_s), key=lambda orphan: -orphan.age_s)


def remove(store: Store, found: Iterable[Orphan]) -> int:
    """Take these away; returns the bytes that are free again (unknown, counted as 0, for uploads)."""
    num_bytes = 0
    for orphan in found:
        if orphan.kind == "upload":
            store.abort_upload(Upload(orphan.path, orphan.upload_id, 0.0))
        elif Path(orphan.path).is_absolute():
            Path(orphan.path).unlink(missing_ok=True)
        else:
            store.remove(orphan.path)
        num_bytes += orphan.num_bytes
    return num_bytes


def _unnamed(store: Store, now: float) -> Iterator[Orphan]:
    for stage in store.names(""):
        for artifact in store.names(stage) if stage not in NOT_STAGES else ():
            folder = f"{stage}/{artifact}"
            files = [(f"{part}/{entry.name}", entry) for part in DATA_FOLDERS for entry in store.entries(f"{folder}/{part}")]
            named = _named(store, folder) if files else None
            if named is not None:
                yield from (_orphan("shard", f"{folder}/{name}", entry, now) for name, entry in files if name not in named)


def _named(store: Store, folder: str) -> set[str] | None:
    """The files that the artifact's records stand for, each shard's rows among them; None if a record cannot be read."""
    names = [f"{folder}/records/{name}" for name in store.names(f"{folder}/records") if name.endswith(".json")]
    try:
        files = {str(json.loads(data)["file"]) for data in store.read_many(names) if data is not None}
    except (ValueError, KeyError, TypeError):
        log.warning("artifact=%s has a record that cannot be read: nothing of it is taken away before `verify` went over it", folder)
        return None
    return files | {f"rows/{PurePosixPath(file).name}" for file in files}


def _staged(store: Store, now: float) -> Iterator[Orphan]:
    """Files that were being written: in the store's own folder, or in the scratch folder of this machine."""
    for path in store.spool.glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:  # published since
            continue
        if not _is_being_written(path.name):
            name = f"{store.spool.name}/{path.name}" if store.is_local else str(path)
            yield _orphan("staged", name, Entry(path.name, status.st_size, status.st_mtime), now)


def _is_being_written(name: str) -> bool:
    """Whether the process that `host-pid-uuid` names runs on this machine; of another machine only the age can tell."""
    host, _, rest = name.rpartition("-")[0].rpartition("-")
    if host != os.uname().nodename or not rest.isdigit():
        return False
    return Path(f"/proc/{rest}").exists()


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
