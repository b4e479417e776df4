"""Where the rows of shards are that are captured and deleted while they are read."""

import threading
from typing import NamedTuple

import numpy as np
import xxhash

from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record, index_file
from deepspec.cache.index import ExpectedIndex, column_values, read_index_rows
from deepspec.errors import ArtifactMismatch
from deepspec.hidden.expected_index import FOLDER


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
        (data,) = self.artifact.store.read_many([self.artifact.path(index_file(record))])
        if data is None or xxhash.xxh3_128_hexdigest(data) != record.index_checksum:
            return None  # being deleted
        return self._compared(record, data)

    def _compared(self, record: Record, data: bytes) -> ShardRows:
        """The shard's rows, which must be those expected: training takes a sample by its number."""
        batch = read_index_rows(data).combine_chunks().to_batches()[0]
        start, end = np.searchsorted(self.index.shard, [record.shard, record.shard + 1])
        for name in ("sample_id", "num_tokens", "num_supervised", "held_out"):
            if not np.array_equal(column_values(batch, name), getattr(self.index, name)[start:end]):
                raise ArtifactMismatch(
                    f"shard {record.shard} holds other samples than were expected ({name})",
                    where=self.artifact.url,
                    fix=f"remove the folder {FOLDER!r} there: it is made again",
                )
        columns = (column_values(batch, name) for name in ("offset", "num_bytes", "checksum"))
        return ShardRows(record.file, *columns)
