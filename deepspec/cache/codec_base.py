"""The frame of every codec: a tensor of hidden states is stored as a few columns of bytes.

`quantize` and `dequantize` run where the states are (the GPU, if there is one); `compress` and
`expand` run on the host, in threads, because zstd releases the interpreter. What the columns hold
is the business of `codecs.py`. T tokens, n tokens of a chunk, L layers, D hidden size, W = L * D.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from deepspec.errors import ArtifactMismatch

CodecName = Literal["raw", "lossless", "int8", "fp8"]
Compression = Literal["none", "zstd"]

# On a CPU, what one pass writes is still in the cache when the next one reads it (2 MB of float32),
# and a pass is long enough for the interpreter not to matter: 2^16 is half as fast, 2^18 to 2^20
# are alike. On a GPU, 128 MB of float32.
CHUNK_VALUES, DEVICE_CHUNK_VALUES = 1 << 19, 1 << 25


class Column(NamedTuple):
    """One column of a codec."""

    suffix: str  # after the tensor's name
    dtype: str  # of one value, by torch's name; little-endian
    shape: tuple[int, ...]  # of one token's entry
    # fixed-size entries, or one zstd frame of all of them
    storage: Literal["tokens", "frame"] = "tokens"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's entry, before zstd."""
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, eq=False)
class Codec:
    """One tensor's way into a few columns of bytes [T, token_bytes] and back; T may be 0.

    `quantize` expects finite values (capture refuses all others before); `raw` and `lossless` keep
    every bit of any.
    """

    num_layers: int
    hidden_size: int
    compression: Compression = "none"
    channel_scale: Tensor | None = None  # float32 [L, D]
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    name: ClassVar[CodecName]
    scratch_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    @property
    def width(self) -> int:
        """Values of a token: layers times hidden size."""
        return self.num_layers * self.hidden_size

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """What is stored, the main column first; made once: readers ask for every sample."""
        raise NotImplementedError

    def _codes(self, dtype: str) -> Column:
        """The main column: one value per channel."""
        shape = (self.num_layers, self.hidden_size)
        return Column("", dtype, shape, "frame" if self.compression == "zstd" else "tokens")

    def _encode(self, states: Tensor, parts: Sequence[Tensor]) -> None:
        """Write a chunk of states, bfloat16 [n, W], into its rows of the columns."""
        raise NotImplementedError

    def _decode(self, parts: Sequence[Tensor], out: Tensor, scratch: Sequence[Tensor]) -> None:
        """Write a chunk's states to `out`, bfloat16 [n, W]; `scratch` is [n, W] of each of
        `scratch_dtypes`.
        """
        raise NotImplementedError

    def quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        """The columns of `states` [T, L, D] (or [T, W]) as uint8 [T, token_bytes], on the same
        device.

        States of another dtype are rounded to bfloat16 first.
        """
        states = self._rows(states)
        parts = tuple(
            states.new_empty(len(states), column.token_bytes, dtype=torch.uint8)
            for column in self.columns
        )
        for chunk, *stored in self._chunks(states, *parts):
            self._encode(chunk, stored)
        return parts

    def compress(self, parts: Sequence[Tensor]) -> list[pa.Buffer]:
        """What is stored of host tensors that `quantize` made: frames, and views that share the
        tensors' memory.
        """
        return [
            pa.py_buffer(part.numpy())
            if column.storage == "tokens"
            else _zstd().compress(part.numpy())
            for column, part in zip(self.columns, parts, strict=True)
        ]

    def expand(self, buffers: Sequence[pa.Buffer], num_tokens: int) -> tuple[Tensor, ...]:
        """The parts again, on the host; what is not in a frame shares the buffer's memory and
        must not be written to.
        """
        parts = []
        for column, buffer in zip(self.columns, buffers, strict=True):
            num_bytes = num_tokens * column.token_bytes
            if column.storage == "frame":
                buffer = _zstd().decompress(buffer, decompressed_size=num_bytes)
            values = np.frombuffer(buffer, np.uint8, count=num_bytes)
            parts.append(torch.from_numpy(values.reshape(num_tokens, column.token_bytes)))
        return tuple(parts)

    def dequantize(self, parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """The states, bfloat16 [T, W], on the parts' device; into `out` (contiguous, of that
        shape) where given.
        """
        if out is None:
            out = torch.empty(
                len(parts[0]), self.width, dtype=torch.bfloat16, device=parts[0].device
            )
        rows = self._chunk_rows(out.device)
        scratch = [torch.empty_like(out[:rows], dtype=dtype) for dtype in self.scratch_dtypes]
        for chunk, *stored in self._chunks(out, *parts):
            self._decode(stored, chunk, [room[: len(chunk)] for room in scratch])
        return out

    def _rows(self, states: Tensor) -> Tensor:
        return states.to(torch.bfloat16).reshape(len(states), self.width).contiguous()

    def _chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The same few rows of all tensors at a time."""
        rows = self._chunk_rows(tensors[0].device)
        return zip(*(tensor.split(rows) for tensor in tensors), strict=True)

    def _chunk_rows(self, device: torch.device) -> int:
        return max(1, (CHUNK_VALUES if device.type == "cpu" else DEVICE_CHUNK_VALUES) // self.width)

    def _per_channel(self, device: torch.device) -> Tensor:
        """What the codec knows of each channel, [W], copied to the device once."""
        if device not in self._on_device:
            self._on_device[device] = self._from_scale().reshape(self.width).to(device)
        return self._on_device[device]

    def _from_scale(self) -> Tensor:
        if self.channel_scale is None:
            raise ArtifactMismatch(
                f"the codec {self.name} cannot work without the scale of each channel",
                where="hidden.codec",
                fix="measure it with `channel_scale` on the first tokens, or read it with the "
                "cache",
            )
        return self.channel_scale


def _zstd() -> pa.Codec:
    # level 3 makes exponents larger, in twice the time
    return pa.Codec("zstd", compression_level=1)
