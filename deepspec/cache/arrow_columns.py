"""The columns of a shard in Arrow's terms: fields, rows around existing memory, and their bytes."""

import json

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from deepspec.cache.codec_base import Column

EMPTY = pa.py_buffer(b"")


def column_buffers(batch: pa.RecordBatch) -> dict[str, pa.Buffer]:
    """The value bytes of every column of a one-row batch, which its last buffer holds."""
    return {
        name: column.buffers()[-1] or EMPTY
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }


def column_checksums(batch: pa.RecordBatch) -> list[int]:
    """xxh3_64 of each column's value bytes, to find the damaged one of a message."""
    return [xxhash.xxh3_64_intdigest(buffer) for buffer in column_buffers(batch).values()]


def list_field(name: str, kind: pa.DataType, metadata: dict[str, str] | None = None) -> pa.Field:
    """A column of one list a sample, with 64-bit offsets."""
    return pa.field(
        name,
        pa.large_list(pa.field("item", kind, nullable=False)),
        nullable=False,
        metadata=metadata,
    )


def codec_field(tensor: str, column: Column) -> pa.Field:
    """The field of one column of a tensor's codec."""
    metadata = {"dtype": column.dtype, "shape": json.dumps(column.shape)}
    if column.storage == "frame":
        return pa.field(
            tensor + column.suffix,
            pa.large_binary(),
            nullable=False,
            metadata={**metadata, "frame": "zstd"},
        )
    return list_field(tensor + column.suffix, pa.binary(column.token_bytes), metadata)


def tensor_bytes(tensor: Tensor) -> pa.Buffer:
    """The tensor's memory."""
    return pa.py_buffer(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def one_row(kind: pa.DataType, raw: pa.Buffer) -> pa.Array:
    """One row of a list or binary column, its values being the buffer itself."""
    if pa.types.is_large_binary(kind):
        return pa.Array.from_buffers(kind, 1, [None, _offsets(raw.size), raw])
    count = raw.size // (kind.value_type.bit_width // 8)
    items = pa.Array.from_buffers(kind.value_type, count, [None, raw])
    return pa.Array.from_buffers(kind, 1, [None, _offsets(count)], children=[items])


def _offsets(count: int) -> pa.Buffer:
    return pa.py_buffer(np.array([0, count], dtype=np.int64))
