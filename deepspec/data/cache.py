"""The hidden-state cache: Arrow shards of one record batch a sample, found by offset through one index.

A shard is an Arrow IPC file that any Arrow reader opens. Reading for training never opens it that way: the index holds
the offset and length of every sample's message, so a sample is one read of exactly its bytes, checked before decoding.
T tokens, m captured layers, D hidden size, T' tokens whose final hidden state is kept.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from deepspec.artifact import Artifact
from deepspec.errors import ArtifactMismatch, DamagedData
from deepspec.records import Record, index_file

INDEX_DTYPE = np.dtype(
    [
        ("sample_id", "<u8"), ("shard", "<u4"), ("row", "<u4"), ("num_tokens", "<u4"), ("num_supervised", "<u4"),
        ("held_out", "<u4"), ("num_last", "<u4"), ("offset", "<u8"), ("num_bytes", "<u8"), ("checksum", "<u8"),
    ]
)  # fmt: skip
# Decoded tensors share memory that must not be written to; nothing here does.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
FOOTER_MAGIC = 8  # "ARROW1" and two bytes of padding stand before the schema message


class HiddenSample(NamedTuple):
    sample_id: int
    input_ids: Tensor  # [T] int32
    loss_mask: Tensor  # [T] uint8, 1 where the target generated the token
    context: Tensor  # [T, m * D] bfloat16
    last_hidden: Tensor  # [T', D] bfloat16, after the final norm
    last_spans: Tensor  # [n, 2] int32: start and length of the runs that `last_hidden` covers

    def full_last_hidden(self) -> Tensor:
        """The final hidden states at their places, zeros elsewhere: [T, D]."""
        full = torch.zeros(len(self.input_ids), self.last_hidden.shape[-1], dtype=self.last_hidden.dtype)
        taken = 0
        for start, length in self.last_spans.tolist():
            full[start : start + length] = self.last_hidden[taken : taken + length]
            taken += length
        return full


@dataclass(frozen=True)
class Layout:
    """Sizes of a cache's rows and the settings recorded in its schema."""

    context_width: int
    hidden_size: int
    metadata: dict[str, str] = field(default_factory=dict)

    def schema(self) -> pa.Schema:
        def rows(kind: pa.DataType) -> pa.DataType:
            return pa.large_list(pa.field("item", kind, nullable=False))

        fields = [
            pa.field("sample_id", pa.uint64(), nullable=False),
            pa.field("input_ids", rows(pa.int32()), nullable=False),
            pa.field("loss_mask", rows(pa.uint8()), nullable=False),
            pa.field("context", rows(pa.binary(2 * self.context_width)), nullable=False),
            pa.field("last_hidden", rows(pa.binary(2 * self.hidden_size)), nullable=False),
            pa.field("last_spans", rows(pa.int32()), nullable=False),
        ]
        fixed = {
            "format": "deepspec.hidden",
            "version": "1",
            "context_width": str(self.context_width),
            "hidden_size": str(self.hidden_size),
        }
        return pa.schema(fields, metadata={**self.metadata, **fixed, "dtype": "bfloat16", "byteorder": "little"})

    @classmethod
    def of(cls, schema: pa.Schema) -> Layout:
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.get("format") != "deepspec.hidden" or metadata.get("version") != "1":
            what = f"the cache has format {metadata.get('format')} version {metadata.get('version')}, this reads deepspec.hidden version 1"
            raise ArtifactMismatch(what, where="schema.arrow", fix="capture again, or use the DeepSpec version that wrote it")
        return cls(int(metadata["context_width"]), int(metadata["hidden_size"]), metadata)


def last_hidden_spans(loss_mask: Sequence[bool]) -> np.ndarray:
    """Runs [n, 2] (start, length) of the loss mask dilated by one position on each side.

    These are all positions whose final hidden state any algorithm reads: block drafters read from the first to the last
    but one token of a supervised run, Eagle3 one position later, a next-token loss one earlier.
    """
    mask = np.concatenate([[False], np.asarray(loss_mask, dtype=bool), [False]])
    wide = (mask[1:-1] | mask[2:] | mask[:-2]).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wide, [0]])))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1).astype(np.int32)


class ShardWriter:
    """Writes samples one after the other and remembers where each one's message lies."""

    def __init__(self, sink: IO[bytes] | pa.NativeFile, layout: Layout, shard: int) -> None:
        self.sink, self.layout, self.shard = sink, layout, shard
        self.schema = layout.schema()
        self.writer = pa.ipc.new_file(sink, self.schema)
        self.entries: list[tuple[int, ...]] = []
        # The schema message is written with the first batch, so the first offset cannot be asked of the sink.
        self.offset = FOOTER_MAGIC + len(self.schema.serialize())

    def append(self, sample: HiddenSample, *, held_out: bool) -> None:
        batch = encode(sample, self.schema)
        checksum = _message_checksum(batch)
        self.writer.write_batch(batch)
        end = self.sink.tell()
        num_supervised = int(sample.loss_mask.sum())
        self.entries.append(
            (
                sample.sample_id, self.shard, len(self.entries), len(sample.input_ids), num_supervised, int(held_out),
                len(sample.last_hidden), self.offset, end - self.offset, checksum,
            )
        )  # fmt: skip
        self.offset = end

    def close(self) -> bytes:
        """Finish the file; returns the shard's index rows."""
        self.writer.close()
        return np.array(self.entries, dtype=INDEX_DTYPE).tobytes()


def encode(sample: HiddenSample, schema: pa.Schema) -> pa.RecordBatch:
    """One row that wraps the sample's tensors without copying them."""
    values = (sample.input_ids, sample.loss_mask, sample.context, sample.last_hidden, sample.last_spans)
    columns: list[pa.Array] = [pa.array([sample.sample_id], pa.uint64())]
    for tensor, column in zip(values, list(schema)[1:], strict=True):
        kind = column.type.value_type
        count = tensor.numel() if pa.types.is_integer(kind) else len(tensor)
        raw = pa.py_buffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        items = pa.Array.from_buffers(kind, count, [None, raw])
        offsets = pa.py_buffer(np.array([0, count], dtype=np.int64))
        columns.append(pa.Array.from_buffers(column.type, 1, [None, offsets], children=[items]))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _message_checksum(batch: pa.RecordBatch) -> int:
    return xxhash.xxh3_64_intdigest(batch.serialize())


def decode(message: pa.Buffer | bytes, schema: pa.Schema, layout: Layout) -> HiddenSample:
    """The tensors of one sample, sharing the message's memory."""
    batch = pa.ipc.read_record_batch(pa.py_buffer(message), schema)

    def tensor(column: int, dtype: type, width: int) -> Tensor:
        listed = batch.column(column)
        items = listed.values
        values: np.ndarray = np.frombuffer(items.buffers()[1], dtype=dtype, count=len(items) * max(width, 1))
        return torch.from_numpy(values.reshape(-1, width) if width else values)

    sample_id = int(np.frombuffer(batch.column(0).buffers()[1], np.uint64, 1)[0])
    context = tensor(3, np.int16, layout.context_width).view(torch.bfloat16)
    last_hidden = tensor(4, np.int16, layout.hidden_size).view(torch.bfloat16)
    spans = tensor(5, np.int32, 0).view(-1, 2)
    return HiddenSample(sample_id, tensor(1, np.int32, 0), tensor(2, np.uint8, 0), context, last_hidden, spans)


def write_index(artifact: Artifact, records: Iterable[Record]) -> None:
    """`index.arrow`: the index rows of all shards as one column of fixed-size binary, in shard order."""
    data = b"".join(artifact.store.read(artifact.path(index_file(record))) for record in records)
    kind = pa.binary(INDEX_DTYPE.itemsize)
    rows = pa.Array.from_buffers(kind, len(data) // INDEX_DTYPE.itemsize, [None, pa.py_buffer(data)])
    schema = pa.schema([pa.field("row", kind, nullable=False)], metadata={"columns": repr(INDEX_DTYPE.descr)})
    with artifact.store.staged() as local:
        with pa.OSFile(str(local), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_arrays([rows], schema=schema))
        artifact.store.publish(local, artifact.path("index.arrow"))


def read_index(local: Path) -> np.ndarray:
    """The index as a structured array over the mapped file; nothing is read until it is looked at."""
    with pa.memory_map(str(local)) as source:
        rows = pa.ipc.open_file(source).get_batch(0).column(0)
    return np.frombuffer(rows.buffers()[1], dtype=INDEX_DTYPE, count=len(rows))


class HiddenCache:
    """A sealed cache, opened by its manifest and index alone; `cache[i]` reads sample i of the index."""

    def __init__(self, artifact: Artifact) -> None:
        manifest = artifact.manifest()
        if manifest is None:
            fix = "run `python -m deepspec hidden` until nothing is missing"
            raise ArtifactMismatch("the hidden states are not finished", where=artifact.url, fix=fix)
        self.artifact, self.manifest = artifact, manifest
        self.schema = pa.ipc.read_schema(pa.py_buffer(artifact.store.read(artifact.path("schema.arrow"))))
        self.layout = Layout.of(self.schema)
        self.index = read_index(artifact.store.fetch(artifact.path("index.arrow")))
        self.files = {record.shard: record.file for record in manifest.records}
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> HiddenSample:
        entry = self.index[number]
        message = self._message(int(entry["shard"]), int(entry["offset"]), int(entry["num_bytes"]))
        if len(message) != entry["num_bytes"] or xxhash.xxh3_64_intdigest(message) != entry["checksum"]:
            shard, row = int(entry["shard"]), int(entry["row"])
            fix = f"remove records/{shard:05d}.json there and run the stage 'hidden' again"
            raise DamagedData(f"row {row} of shard {shard} is damaged", where=f"{self.artifact.url}/{self.files[shard]}", fix=fix)
        return decode(message, self.schema, self.layout)

    def _message(self, shard: int, offset: int, num_bytes: int) -> bytes:
        path = self.artifact.path(self.files[shard])
        if not self.artifact.store.is_local:
            return bytes(self.artifact.store.fs.cat_file(self.artifact.store.path(path), start=offset, end=offset + num_bytes))
        if shard not in self._open:
            self._open[shard] = os.open(self.artifact.store.path(path), os.O_RDONLY)
        return os.pread(self._open[shard], num_bytes, offset)
