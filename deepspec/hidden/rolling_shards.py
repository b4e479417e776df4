"""The shards of a cache of which only some are on the disk at a time: what is there, how large
it is, and taking it away.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Sequence
from typing import IO

from deepspec.artifacts import gc
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record, index_file
from deepspec.artifacts.side_files import folder_beside
from deepspec.errors import StoreError
from deepspec.formatting import human_bytes

log = logging.getLogger(__name__)


class RollingShards:
    """`sizes` are the bytes of each shard that has a record, its index rows included. One
    process at a time has it.
    """

    def __init__(self, stage: ShardedStage) -> None:
        self.artifact, self._answers = stage.artifact, stage.upstream.records()
        self.sizes: dict[int, int] = {}
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Take stock; what no record names, or was made from other answers, is removed.

        Raises:
            StoreError: another training uses these shards up.
        """
        self._lock = self._alone()
        store, path = self.artifact.store, self.artifact.path
        gc.remove_abandoned(store)
        fits = {
            shard: record
            for shard, record in self.artifact.records().items()
            if self._is_whole(record)
        }
        for shard in set(self.artifact.record_shards()) - set(fits):
            store.remove(path(f"records/{shard:05d}.json"))
        named = {name for record in fits.values() for name in (record.file, index_file(record))}
        for folder in gc.DATA_FOLDERS:
            for name in store.names(path(folder)):
                if f"{folder}/{name}" not in named:
                    store.remove(path(f"{folder}/{name}"))
        self.sizes = {shard: self._size(record) for shard, record in fits.items()}
        log.info(
            "stage=train rolling: %d shards are there, %s of them",
            len(fits),
            human_bytes(sum(self.sizes.values())),
        )

    def close(self) -> None:
        if self._lock:
            self._lock.close()

    def add(self, shards: Sequence[int]) -> list[int]:
        """Take note of those of the shards that have records; returns the others."""
        found = self.artifact.read_records(shards)
        self.sizes |= {shard: self._size(record) for shard, record in found.items()}
        return [shard for shard in shards if shard not in found]

    def delete(self, shard: int) -> None:
        """The record first: what a crash leaves is then no shard, but files that no record
        names, which `open` removes.
        """
        record = self.artifact.record(shard)
        self.artifact.store.remove(self.artifact.path(f"records/{shard:05d}.json"))
        for name in (record.file, index_file(record)) if record else ():
            self.artifact.store.remove(self.artifact.path(name))
        del self.sizes[shard]
        log.info("stage=train shard=%d was used up", shard)

    def is_sealed(self) -> bool:
        """Whether somebody has captured all of it by hand: then nothing of it is deleted any
        more.
        """
        return self.artifact.manifest() is not None

    def _size(self, record: Record) -> int:
        return record.num_bytes + self.artifact.store.size(self.artifact.path(index_file(record)))

    def _is_whole(self, record: Record) -> bool:
        answers, exists = self._answers.get(record.shard), self.artifact.store.exists
        is_current = answers is not None and record.upstream == answers.checksum
        return is_current and all(
            exists(self.artifact.path(name)) for name in (record.file, index_file(record))
        )

    def _alone(self) -> IO[str]:
        """Hold the lock of these shards, which ends with the process, however that ends; it
        knows of this machine only.
        """
        folder = folder_beside(self.artifact, "logs")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "rolling.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            fix = "wait for it; or train this one with resources.training.source=online, or in a store of its own"
            raise StoreError(
                "another training uses up the shards of this cache",
                where=self.artifact.url,
                fix=fix,
            ) from None
        return lock
