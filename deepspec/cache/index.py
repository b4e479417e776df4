"""Where every sample of a cache lies: one Arrow file for all of them, mapped into memory and used
column by column.

Opening it reads nothing but its footer; ranks on one machine share the pages that they look at. 1.3
million samples are 73 MB on disk. No value is converted on the way (pyarrow's `to_numpy` would
import pandas).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Record, index_file
from deepspec.errors import DamagedData

INDEX = "index.arrow"


class ExpectedIndex(NamedTuple):
    """One entry per sample, ordered by shard and row: what the `Index` of the sealed cache will
    hold, as far as it is known.
    """

    sample_id: np.ndarray  # uint64
    shard: np.ndarray  # uint32
    row: np.ndarray  # uint32
    num_tokens: np.ndarray  # uint32
    num_supervised: np.ndarray  # uint32
    num_last: np.ndarray  # uint32
    held_out: np.ndarray  # uint8
    answer: np.ndarray  # uint32, the row of the shard of answers that the sample is rendered from


class Index(NamedTuple):
    """One entry per sample, ordered by shard and row."""

    sample_id: np.ndarray  # uint64
    shard: np.ndarray  # uint32
    row: np.ndarray  # uint32
    num_tokens: np.ndarray  # uint32
    num_supervised: np.ndarray  # uint32
    num_last: np.ndarray  # uint32, positions whose final hidden state is kept
    held_out: np.ndarray  # uint8
    offset: np.ndarray  # uint64, of the sample's message in its shard
    num_bytes: np.ndarray  # uint64, of the message
    checksum: np.ndarray  # uint64, xxh3_64 of the message


# Of the columns above; all others are uint32.
TYPES = {
    "held_out": pa.uint8(),
    **dict.fromkeys(("sample_id", "offset", "num_bytes", "checksum"), pa.uint64()),
}
INDEX_SCHEMA, EXPECTED_SCHEMA = (
    pa.schema([pa.field(name, TYPES.get(name, pa.uint32()), nullable=False) for name in names])
    for names in (Index._fields, ExpectedIndex._fields)
)
# What a shard's own file of rows has on top: a checksum per column, to name the column that was
# damaged.
ROWS_SCHEMA = INDEX_SCHEMA.append(
    pa.field("column_checksums", pa.large_list(pa.uint64()), nullable=False)
)


def encode_rows(rows: Sequence[Mapping[str, object]], schema: pa.Schema = ROWS_SCHEMA) -> bytes:
    """A shard's index rows as an Arrow IPC file of one record batch."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(list(rows), schema=schema))
    return bytes(sink.getvalue())


def decode_rows(data: bytes) -> pa.RecordBatch:
    """The index rows of a shard, as `encode_rows` wrote them."""
    return pa.ipc.open_file(data).get_batch(0)


def read_rows(artifact: Artifact, records: Sequence[Record]) -> Iterator[pa.RecordBatch | None]:
    """The index rows of each shard; None where they are missing or do not match its record."""
    files = [artifact.path(index_file(record)) for record in records]
    for record, data in zip(records, artifact.store.read_many(files), strict=True):
        if data is None or xxhash.xxh3_128_hexdigest(data) != record.index_checksum:
            yield None
        else:
            yield decode_rows(data)


def write_index(artifact: Artifact, records: Sequence[Record]) -> None:
    """`index.arrow`: the index rows of all shards, in shard order.

    Raises:
        DamagedData: a shard's file of rows is missing or does not match its record.
    """
    shards = [pa.RecordBatch.from_pylist([], schema=INDEX_SCHEMA)]
    for record, rows in zip(records, read_rows(artifact, records), strict=True):
        if rows is None:
            raise DamagedData(
                f"the index rows of shard {record.shard} are damaged",
                where=f"{artifact.url}/{index_file(record)}",
                fix=f"remove records/{record.shard:05d}.json there and run the stage 'hidden' "
                "again",
            )
        shards.append(rows.select(INDEX_SCHEMA.names))
    with artifact.store.staged() as local:
        with pa.OSFile(str(local), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
            # One record batch: every column is then one run of bytes in the file.
            writer.write_batch(pa.concat_batches(shards))
        artifact.store.publish(local, artifact.path(INDEX))


def map_index(local: Path) -> Index:
    """The index over the mapped file; nothing is read until it is looked at."""
    batch = _map_batch(local)
    return Index(*(column_values(batch, name) for name in Index._fields))


class ShardFiles:
    """The file name of each shard, over the mapped table of records."""

    def __init__(self, local: Path) -> None:
        batch = _map_batch(local)
        self._shards = column_values(batch, "shard")
        self._files = batch.column("file")

    def __getitem__(self, shard: int) -> str:
        return str(self._files[int(np.searchsorted(self._shards, shard))])


def _map_batch(local: Path) -> pa.RecordBatch:
    with pa.memory_map(str(local)) as source:
        return pa.ipc.open_file(source).get_batch(0)


def column_values(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A column of unsigned integers, without a copy."""
    column = batch.column(name)
    return np.frombuffer(
        column.buffers()[1] or b"", dtype=f"u{column.type.bit_width // 8}", count=len(column)
    )
