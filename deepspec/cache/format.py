"""What a sample of the hidden-state cache is, in memory and as one row of an Arrow record batch.

A captured tensor is stored as the columns of its codec (`codecs.py`), everything else as it is.
Lists have 64-bit offsets, so no sample is too long (trap C7). T tokens, m captured layers, D hidden
size, T' tokens whose final hidden state is kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deepspec.cache.arrow_columns import (
    codec_field,
    column_buffers,
    list_field,
    one_row,
    tensor_bytes,
)
from deepspec.cache.codec_base import Codec
from deepspec.cache.codecs import make_codec
from deepspec.errors import ArtifactMismatch

FORMAT, VERSION = "deepspec.hidden", 1
TOKEN_BYTES = 4 + 1  # its id, and whether it is supervised
INCOMPRESSIBLE = 128  # zstd makes what it cannot compress larger by a fraction of this
# of an Arrow message, its padding, its spans and its index row: some 900 where a sample has few
# spans
FRAME_BYTES = 2048
Count = TypeVar("Count", int, np.ndarray)
# columns other than the two captured tensors
PLAIN = ("sample_id", "input_ids", "loss_mask", "last_spans")


class EncodedTensor(NamedTuple):
    """A captured tensor as its codec stores it."""

    codec: Codec
    parts: tuple[Tensor, ...]  # one per column of the codec, each [T, bytes] uint8

    def decode(self, *, device: torch.device | str = "cpu", out: Tensor | None = None) -> Tensor:
        """The tensor, [T, layers * D] bfloat16, decoded on the device."""
        return self.codec.dequantize([part.to(device) for part in self.parts], out=out)

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes in memory."""
        return sum(part.numel() * part.element_size() for part in self.parts)


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
        return self.context.num_bytes + self.last_hidden.num_bytes + 5 * len(self.input_ids)


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

    def schema(self) -> pa.Schema:
        """The schema, the same bytes for every shard of a cache.

        So a sample is decoded without opening its shard.
        """
        fields = [
            pa.field("sample_id", pa.uint64(), nullable=False),
            list_field("input_ids", pa.int32()),
            list_field("loss_mask", pa.uint8()),
            *(codec_field("context", column) for column in self.context.columns()),
            *(codec_field("last_hidden", column) for column in self.last_hidden.columns()),
            list_field("last_spans", pa.int32()),
        ]
        own = {"format": FORMAT, "version": str(VERSION), "byteorder": "little"}
        codecs = {"context": _described(self.context), "last_hidden": _described(self.last_hidden)}
        return pa.schema(
            fields, metadata={**self.metadata, **own, "codecs": json.dumps(codecs, sort_keys=True)}
        )

    @classmethod
    def of(cls, schema: pa.Schema, scales: Mapping[str, Tensor]) -> "Layout":
        """The layout that a schema describes; `scales` are the static channel scales of the codecs
        that have one.

        Raises:
            ArtifactMismatch: the schema is of another format version.
        """
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            found = f"{metadata.get('format')} version {metadata.get('version')}"
            what = f"the cache has format {found}, this reads {FORMAT} version {VERSION}"
            fix = "capture again, or use the DeepSpec version that wrote it"
            raise ArtifactMismatch(what, where="schema.arrow", fix=fix)
        codecs = json.loads(metadata["codecs"])
        context = make_codec(
            **codecs["context"], tensor="context", channel_scale=scales.get("context")
        )
        last_hidden = make_codec(
            **codecs["last_hidden"], tensor="last_hidden", channel_scale=scales.get("last_hidden")
        )
        return cls(context, last_hidden, metadata)

    def most_bytes(self, num_tokens: Count, num_last: Count) -> Count:
        """Bytes of a sample (or each of several) in a shard and its index rows, at most."""
        context, last = (
            sum(column.token_bytes for column in codec.stored)
            for codec in (self.context, self.last_hidden)
        )
        plain = num_tokens * (context + TOKEN_BYTES) + num_last * last
        return plain + plain // INCOMPRESSIBLE + FRAME_BYTES

    def encode(self, sample: HiddenSample, schema: pa.Schema) -> pa.RecordBatch:
        """One row around the sample's tensors, without a copy; entropy coding is done here."""
        captured = {
            name: iter(stored.codec.compress(stored.parts))
            for name, stored in self._captured(sample).items()
        }
        columns: list[pa.Array] = []
        for entry in schema:
            if entry.name == "sample_id":
                columns.append(pa.array([sample.sample_id], pa.uint64()))
            elif entry.name in PLAIN:
                columns.append(one_row(entry.type, tensor_bytes(getattr(sample, entry.name))))
            else:
                columns.append(one_row(entry.type, next(captured[_tensor_of(entry.name)])))
        return pa.RecordBatch.from_arrays(columns, schema=schema)

    def decode(self, message: pa.Buffer | memoryview | bytes, schema: pa.Schema) -> HiddenSample:
        """The sample of one message, sharing its memory wherever the codec stores plain bytes."""
        buffers = column_buffers(pa.ipc.read_record_batch(pa.py_buffer(message), schema))
        plain = {name: buffers.pop(name) for name in PLAIN}
        spans = np.frombuffer(plain["last_spans"], np.int32).reshape(-1, 2)
        tokens, kept = plain["input_ids"].size // 4, int(spans[:, 1].sum())
        return HiddenSample(
            sample_id=int(np.frombuffer(plain["sample_id"], np.uint64, 1)[0]),
            input_ids=_tensor(plain["input_ids"], np.int32),
            loss_mask=_tensor(plain["loss_mask"], np.uint8),
            context=_expanded(self.context, "context", buffers, tokens),
            last_hidden=_expanded(self.last_hidden, "last_hidden", buffers, kept),
            last_spans=torch.from_numpy(spans),
        )

    def _captured(self, sample: HiddenSample) -> dict[str, EncodedTensor]:
        return {"context": sample.context, "last_hidden": sample.last_hidden}


def _described(codec: Codec) -> dict[str, Any]:
    """What `make_codec` needs to make it again, the static scales apart."""
    sizes = {"num_layers": codec.num_layers, "hidden_size": codec.hidden_size}
    return {"name": codec.name, **sizes, "compression": codec.compression}


def _expanded(
    codec: Codec, tensor: str, buffers: Mapping[str, pa.Buffer], num_tokens: int
) -> EncodedTensor:
    return EncodedTensor(
        codec,
        codec.expand([buffers[tensor + column.suffix] for column in codec.stored], num_tokens),
    )


def _tensor_of(column: str) -> str:
    return "last_hidden" if column.startswith("last_hidden") else "context"


def _tensor(buffer: pa.Buffer, dtype: Any) -> Tensor:
    return torch.from_numpy(np.frombuffer(buffer, dtype=dtype))
