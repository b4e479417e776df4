"""The shards of a cache of which only some are on the disk: which are to be there, what is there,
where its rows are, and deleting it.
"""

import fcntl
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import IO, NamedTuple

import numpy as np

from deepspec.artifacts import gc
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record, index_file
from deepspec.artifacts.side_files import folder_beside
from deepspec.cache.format import Layout
from deepspec.cache.index import ExpectedIndex, column_values, read_rows
from deepspec.cache.sample_order import Window
from deepspec.cache.source import SampleRange
from deepspec.errors import ArtifactMismatch, StoreError
from deepspec.formatting import human_bytes
from deepspec.hidden.expected_index import FOLDER

log = logging.getLogger(__name__)


# On top of its samples: the schema twice and the list of messages.
SHARD_BYTES = 1 << 16


class RollingPlan(NamedTuple):
    """The shards that training needs, in the order in which it does.

    Of the windows from its place on, they are as many shards as fit. So a start after a crash, or
    with shards left by another training, needs no rule of its own.
    """

    samples: SampleRange
    most_bytes: Mapping[int, int]  # of each shard
    max_bytes: int  # of all shards together

    def window_end(self, place: int) -> int:
        """Where the window that `place` is in ends: until then the same shards are needed."""
        return next(self.samples.order.windows(place)).end

    def needed(self, place: int, sizes: Mapping[int, int]) -> dict[int, None]:
        """The shards to have on the disk when training is at `place`, in the order of their use.

        Args:
            place: A place of the line; at the end of the range nothing is needed.
            sizes: Bytes of those shards that are there; others are taken to be as large as they
                can be.
        """
        found = dict[int, None]()
        total = 0
        if place >= self.samples.end:  # which may lie within a window
            return found
        for window in self._windows(place, self.samples.end):
            for shard in window.shards:
                if shard in found:
                    continue
                total += sizes.get(shard, self.most_bytes[shard])
                if total > self.max_bytes:
                    return found
                found[shard] = None
        return found

    def most_bytes_of_a_step(self) -> int:
        """Bytes that the windows of any one step take together at most."""
        step, end = self.samples.step_samples, self.samples.end
        most = 0
        for window in self._windows(self.samples.start, end):
            step_end = min(end, -(-window.end // step) * step)
            shards = {
                shard for other in self._windows(window.start, step_end) for shard in other.shards
            }
            most = max(most, sum(self.most_bytes[shard] for shard in shards))
        return most

    def _windows(self, place: int, end: int) -> Iterator[Window]:
        return takewhile(lambda window: window.start < end, self.samples.order.windows(place))


def shard_bytes(index: ExpectedIndex, layout: Layout) -> dict[int, int]:
    """Bytes that each shard takes at most, with its index rows."""
    sizes = layout.most_bytes(index.num_tokens.astype(np.int64), index.num_last.astype(np.int64))
    totals = np.bincount(index.shard, weights=sizes)
    return {shard: int(totals[shard]) + SHARD_BYTES for shard in np.unique(index.shard).tolist()}


class ShardRows(NamedTuple):
    """Where the rows of a committed shard are."""

    file: str
    offset: np.ndarray
    num_bytes: np.ndarray
    checksum: np.ndarray


class CommittedShards:
    """The shards that are there now, looked up when they are needed."""

    def __init__(self, stage: ShardedStage, index: ExpectedIndex) -> None:
        self.artifact = stage.artifact
        self.index = index
        self._answers = stage.upstream.records()
        self._shards: dict[int, ShardRows] = {}
        self._lock = threading.Lock()

    def find(self, shard: int) -> ShardRows | None:
        """The shard's rows; None while it is not committed.

        Raises:
            ArtifactMismatch: it holds other samples than are expected.
        """
        with self._lock:  # one look serves all threads that wait for the same shard
            found = self._shards.get(shard) or self._look(shard)
            if found:
                self._shards[shard] = found
            return found

    def forget(self, shard: int) -> None:
        """Look the shard up again: it was deleted."""
        self._shards.pop(shard, None)

    def _look(self, shard: int) -> ShardRows | None:
        record = self.artifact.record(shard)
        if record is None or record.upstream != self._answers[shard].checksum:
            return None
        (rows,) = read_rows(self.artifact, [record])
        if rows is None:
            return None  # being deleted
        # Training takes a sample by its number.
        start, end = np.searchsorted(self.index.shard, [shard, shard + 1])
        for name in ("sample_id", "num_tokens", "num_supervised", "held_out"):
            if not np.array_equal(column_values(rows, name), getattr(self.index, name)[start:end]):
                raise ArtifactMismatch(
                    f"shard {shard} holds other samples than were expected ({name})",
                    where=self.artifact.url,
                    fix=f"remove the folder {FOLDER!r} there: it is made again",
                )
        columns = (column_values(rows, name) for name in ("offset", "num_bytes", "checksum"))
        return ShardRows(record.file, *columns)


class RollingShards:
    """The shards that are there, held by one process at a time.

    Deleting removes the record first, so that what a crash leaves is no shard, but files that no
    record names; `open` removes them.
    """

    def __init__(self, stage: ShardedStage) -> None:
        self.artifact = stage.artifact
        self.sizes: dict[int, int] = {}  # bytes of each committed shard, its index rows included
        self._answers = stage.upstream.records()
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Take stock; files that no record names, or made from other answers, are removed.

        Raises:
            StoreError: another training uses these shards up.
        """
        self._lock = self._exclusive()
        store, path = self.artifact.store, self.artifact.path
        gc.remove_abandoned(store)
        records = self.artifact.records()
        whole = {shard: record for shard, record in records.items() if self._is_whole(record)}
        for shard in set(self.artifact.record_shards()) - set(whole):
            store.remove(path(f"records/{shard:05d}.json"))
        named = {name for record in whole.values() for name in _files(record)}
        for folder in gc.DATA_FOLDERS:
            for name in store.names(path(folder)):
                if f"{folder}/{name}" not in named:
                    store.remove(path(f"{folder}/{name}"))
        self.sizes = {shard: self._size(record) for shard, record in whole.items()}
        total = human_bytes(sum(self.sizes.values()))
        log.info("stage=train rolling: %d shards are there, %s of them", len(whole), total)

    def close(self) -> None:
        """Let another process have the shards."""
        if self._lock:
            self._lock.close()

    def add(self, shards: Sequence[int]) -> list[int]:
        """Note those of the shards that have records; returns the others."""
        found = self.artifact.read_records(shards)
        self.sizes |= {shard: self._size(record) for shard, record in found.items()}
        return [shard for shard in shards if shard not in found]

    def delete(self, shard: int) -> None:
        """Remove the shard, its record first."""
        record = self.artifact.record(shard)
        names = _files(record) if record else ()
        for name in (f"records/{shard:05d}.json", *names):
            self.artifact.remove(name)
        del self.sizes[shard]
        log.info("stage=train shard=%d was used up", shard)

    def is_sealed(self) -> bool:
        """Whether all of it was captured by hand meanwhile; then nothing of it is deleted."""
        return self.artifact.manifest() is not None

    def _size(self, record: Record) -> int:
        return record.num_bytes + self.artifact.store.size(self.artifact.path(index_file(record)))

    def _is_whole(self, record: Record) -> bool:
        answers, store = self._answers.get(record.shard), self.artifact.store
        is_current = answers is not None and record.upstream == answers.checksum
        return is_current and all(store.exists(self.artifact.path(name)) for name in _files(record))

    def _exclusive(self) -> IO[str]:
        """The lock of these shards on this machine; it ends with the process, however that ends."""
        folder = folder_beside(self.artifact, "logs")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "rolling.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise StoreError(
                "another training uses up the shards of this cache",
                where=self.artifact.url,
                fix="wait for it; or train this one with resources.training.source=online, or in "
                "a store of its own",
            ) from None
        return lock


def _files(record: Record) -> tuple[str, str]:
    return record.file, index_file(record)
