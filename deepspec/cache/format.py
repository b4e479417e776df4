"""What a sample of the hidden-state cache is, in memory and as one row of an Arrow record batch.

A captured tensor is stored as the columns of its codec (`codecs.py`), everything else as it is.
Lists have 64-bit offsets, so no sample is too long (trap C7). T tokens, m captured layers, D hidden
size, T' tokens whose final hidden state is kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from deepspec.cache.codec_base import Codec, Column
from deepspec.cache.codecs import make_codec
from deepspec.errors import ArtifactMismatch
from deepspec.model.host_copy import send

FORMAT, VERSION = "deepspec.hidden", 1
TOKEN_BYTES = 4 + 1  # its id, and whether it is supervised
INCOMPRESSIBLE = 128  # zstd makes what it cannot compress larger by a fraction of this
# of an Arrow message, its padding, its spans and its index row: some 900 where a sample has few
# spans
FRAME_BYTES = 2048
Count = TypeVar("Count", int, np.ndarray)


class EncodedTensor(NamedTuple):
    """A captured tensor as its codec stores it."""

    codec: Codec
    parts: tuple[Tensor, ...]  # one per column of the codec, each [T, bytes] uint8

    def decode(self, *, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
        """The tensor, [T, layers * D] bfloat16, decoded on the device."""
        device = torch.device(device)
        return self.codec.dequantize([send(part, device) for part in self.parts], out=out)

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes in memory."""
        return sum(part.nbytes for part in self.parts)


class HiddenSample(NamedTuple):
    """The token ids of one sample and what the target computed over them."""

    sample_id: int
    input_ids: Tensor  # [T] int32
    loss_mask: Tensor  # [T] uint8, 1 where the target generated the token
    context: EncodedTensor  # [T, m * D]
    last_hidden: EncodedTensor  # [T', D], after the final norm
    last_spans: Tensor  # [n, 2] int32: start and length of the runs that `last_hidden` covers

    def place_last_hidden(self, out: Tensor) -> None:
        """Write the final hidden states to their places in `out` [>= T, D]; others stay."""
        kept, taken = self.last_hidden.decode(device=out.device), 0
        for start, length in self.last_spans.tolist():
            out[start : start + length] = kept[taken : taken + length]
            taken += length

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in memory."""
        return (
            self.context.num_bytes + self.last_hidden.num_bytes + TOKEN_BYTES * len(self.input_ids)
        )


def last_hidden_spans(loss_mask: Sequence[bool]) -> np.ndarray:
    """Runs [n, 2] (start, length) of the loss mask dilated by one position on each side.

    These are all positions whose final hidden state any algorithm reads: block drafters read from
    the first to the last but one token of a supervised run, Eagle3 one position later, a next-token
    loss one earlier.
    """
    mask = np.concatenate([[False], np.asarray(loss_mask, dtype=bool), [False]])
    wide = (mask[1:-1] | mask[2:] | mask[:-2]).astype(np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wide, [0]])))
    return np.stack([edges[::2], edges[1::2] - edges[::2]], axis=1).astype(np.int32)


@dataclass(frozen=True)
class Layout:
    """The two codecs of a cache, and what its schema records of the states' origin."""

    context: Codec
    last_hidden: Codec
    metadata: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def schema(self) -> pa.Schema:
        """The schema, the same bytes for every shard of a cache.

        So a sample is decoded without opening its shard.
        """
        captured = {"context": self.context, "last_hidden": self.last_hidden}
        codecs = {
            tensor: {
                "name": codec.name,
                "num_layers": codec.num_layers,
                "hidden_size": codec.hidden_size,
                "compression": codec.compression,
            }
            for tensor, codec in captured.items()
        }
        fields = [
            _field("sample_id", pa.uint64()),
            _field("input_ids", _list_of(pa.int32())),
            _field("loss_mask", _list_of(pa.uint8())),
            *(
                _codec_field(tensor, column)
                for tensor, codec in captured.items()
                for column in codec.columns
            ),
            _field("last_spans", _list_of(pa.int32())),
        ]
        own = {"format": FORMAT, "version": str(VERSION), "byteorder": "little"}
        return pa.schema(
            fields, metadata={**self.metadata, **own, "codecs": json.dumps(codecs, sort_keys=True)}
        )

    @classmethod
    def of(cls, schema_file: bytes, scales: Mapping[str, Tensor]) -> "Layout":
        """The layout that `schema.arrow` describes; `scales` are the static channel scales of the
        codecs that have one.

        Raises:
            ArtifactMismatch: the schema has another format version.
        """
        schema = pa.ipc.read_schema(pa.py_buffer(schema_file))
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        found = f"{metadata.get('format')} version {metadata.get('version')}"
        wanted = f"{FORMAT} version {VERSION}"
        if found != wanted:
            raise ArtifactMismatch(
                f"the cache has format {found}, this reads {wanted}",
                where="schema.arrow",
                fix="capture again, or use the DeepSpec version that wrote it",
            )
        codecs = {
            tensor: make_codec(**choice, channel_scale=scales.get(tensor))
            for tensor, choice in json.loads(metadata["codecs"]).items()
        }
        return cls(**codecs, metadata=metadata)

    def most_bytes(self, num_tokens: Count, num_last: Count) -> Count:
        """Bytes of a sample (or each of several) in a shard and its index rows, at most."""
        context, last = (
            sum(column.token_bytes for column in codec.columns)
            for codec in (self.context, self.last_hidden)
        )
        plain = num_tokens * (context + TOKEN_BYTES) + num_last * last
        return plain + plain // INCOMPRESSIBLE + FRAME_BYTES

    def encode(self, sample: HiddenSample) -> pa.RecordBatch:
        """One row around the sample's tensors, without a copy; entropy coding is done here."""
        values = [
            pa.py_buffer(sample.input_ids.numpy()),
            pa.py_buffer(sample.loss_mask.numpy()),
            *self.context.compress(sample.context.parts),
            *self.last_hidden.compress(sample.last_hidden.parts),
            pa.py_buffer(sample.last_spans.numpy()),
        ]
        columns = map(_one_row, self.schema.types[1:], values)
        return pa.RecordBatch.from_arrays(
            [pa.array([sample.sample_id], pa.uint64()), *columns], schema=self.schema
        )

    def decode(self, message: pa.Buffer | memoryview | bytes) -> HiddenSample:
        """The sample of one message, sharing its memory wherever the codec stores plain bytes."""
        sample_id, input_ids, loss_mask, *captured, last_spans = column_buffers(
            pa.ipc.read_record_batch(message, self.schema)
        )
        spans = np.frombuffer(last_spans, np.int32).reshape(-1, 2)
        num_tokens, num_last = len(input_ids) // 4, int(spans[:, 1].sum())
        num_columns = len(self.context.columns)
        context = self.context.expand(captured[:num_columns], num_tokens)
        last_hidden = self.last_hidden.expand(captured[num_columns:], num_last)
        return HiddenSample(
            sample_id=int(np.frombuffer(sample_id, np.uint64, 1)[0]),
            input_ids=torch.from_numpy(np.frombuffer(input_ids, np.int32)),
            loss_mask=torch.from_numpy(np.frombuffer(loss_mask, np.uint8)),
            context=EncodedTensor(self.context, context),
            last_hidden=EncodedTensor(self.last_hidden, last_hidden),
            last_spans=torch.from_numpy(spans),
        )


def column_buffers(batch: pa.RecordBatch) -> list[pa.Buffer]:
    """The value bytes of every column of a one-row batch, which its last buffer holds."""
    return [column.buffers()[-1] or b"" for column in batch.columns]


def column_checksums(batch: pa.RecordBatch) -> list[int]:
    """xxh3_64 of each column's value bytes, to find the damaged one of a message."""
    return [xxhash.xxh3_64_intdigest(buffer) for buffer in column_buffers(batch)]


def _field(name: str, kind: pa.DataType, metadata: dict[str, str] | None = None) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata=metadata)


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.large_list(_field("item", kind))


def _codec_field(tensor: str, column: Column) -> pa.Field:
    """The field of one column of a tensor's codec."""
    name = tensor + column.suffix
    metadata = {"dtype": column.dtype, "shape": json.dumps(column.shape)}
    if column.storage == "frame":
        return _field(name, pa.large_binary(), {**metadata, "frame": "zstd"})
    return _field(name, _list_of(pa.binary(column.token_bytes)), metadata)


def _one_row(kind: pa.DataType, raw: pa.Buffer) -> pa.Array:
    """One row of a list or binary column, its values being the buffer itself."""
    if pa.types.is_large_binary(kind):
        offsets = pa.py_buffer(np.array([0, raw.size], dtype=np.int64))
        return pa.Array.from_buffers(kind, 1, [None, offsets, raw])
    count = raw.size // (kind.value_type.bit_width // 8)
    values = pa.Array.from_buffers(kind.value_type, count, [None, raw])
    return pa.LargeListArray.from_arrays([0, count], values, type=kind)
