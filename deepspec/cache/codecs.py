"""How hidden states are stored: raw bfloat16, lossless at two thirds of it, int8 or fp8 at half of
it.

T tokens, n tokens of a chunk, L layers, D hidden size, W = L * D, G groups of channels.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from deepspec.cache.codec_base import Codec, CodecName, Column, Compression

GROUP_SIZE = 128  # channels that share a scale, at most: its 2 bytes are then 1.6 % of the codes
INT8_MAX, FP8_MAX = 127, 448
# nine in ten values of a normal x of deviation 1 have |x| below 1.645
USUAL_SHARE, NORMAL_QUANTILE = 0.9, 1.645
# of the layer's median scale: a channel that sleeps at first must not drown its group later
WEAKEST_CHANNEL = 2.0**-8


class RawCodec(Codec):
    """The bfloat16 bytes as they are; reading them back is a view."""

    name = "raw"

    @cached_property
    @override
    def columns(self) -> tuple[Column, ...]:
        return (self._codes("bfloat16"),)

    @override
    def quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        return (self._rows(states).view(torch.uint8),)

    @override
    def dequantize(self, parts: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        states = parts[0].view(torch.bfloat16)
        return states if out is None else out.copy_(states)


class LosslessCodec(Codec):
    """Sign and mantissa as they are, the exponents as a zstd frame: about 1.46 times smaller, every
    bit kept.

    The sign is as good as random, so it leaves the exponents' byte. Of every exponent its channel's
    usual one is subtracted (modulo 256, so any scale is safe, none too): all channels then share
    one narrow distribution.
    """

    name = "lossless"
    scratch_dtypes = (torch.uint8, torch.int16)

    @cached_property
    @override
    def columns(self) -> tuple[Column, ...]:
        codes = self._codes("uint8")
        return (codes, codes._replace(suffix="_exponent", storage="frame"))

    def _from_scale(self) -> Tensor:
        if self.channel_scale is None:
            return torch.zeros(self.width, dtype=torch.uint8)
        return ((self.channel_scale.float().view(torch.int32) >> 23) & 0xFF).to(torch.uint8)

    def _encode(self, states: Tensor, parts: Sequence[Tensor]) -> None:
        bits = states.view(torch.int16)
        parts[0].copy_((bits & 0x7F) | ((bits >> 8) & 0x80))
        parts[1].copy_((bits >> 7) & 0xFF).sub_(self._per_channel(states.device))

    def _decode(self, parts: Sequence[Tensor], out: Tensor, scratch: Sequence[Tensor]) -> None:
        exponent, shifted = scratch
        torch.add(parts[1], self._per_channel(out.device), out=exponent)
        shifted.copy_(exponent).bitwise_left_shift_(7)
        # Read as int8, the sign is spread over the upper byte; the mask (0x807F) leaves it in bit
        # 15 only.
        out.view(torch.int16).copy_(parts[0].view(torch.int8)).bitwise_and_(
            0x807F - 0x10000
        ).bitwise_or_(shifted)


class Int8Codec(Codec):
    """Symmetric int8: a static scale per channel, then a bfloat16 scale per token and group of
    channels.

    A group is as many channels of one layer as divide D, at most 128 (128 for every target, 96 for
    the demo). Without the static scale one outlier channel takes the whole range of its group and
    ruins the 127 ordinary ones.
    """

    name = "int8"
    scratch_dtypes = (torch.float32,)

    @cached_property
    def group_size(self) -> int:
        """Channels that share a scale."""
        return max(size for size in range(1, GROUP_SIZE + 1) if self.hidden_size % size == 0)

    @cached_property
    @override
    def columns(self) -> tuple[Column, ...]:
        scales = (self.num_layers, self.hidden_size // self.group_size)
        return (self._codes("int8"), Column("_scale", "bfloat16", scales))

    def _encode(self, states: Tensor, parts: Sequence[Tensor]) -> None:
        # [n, G, group]
        groups = (
            states.float()
            .div_(self._per_channel(states.device))
            .unflatten(-1, (-1, self.group_size))
        )
        scale = _stored_scale(groups, largest=INT8_MAX, part=parts[1])
        groups.div_(scale[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)
        parts[0].view(torch.int8).copy_(groups.flatten(1))

    def _decode(self, parts: Sequence[Tensor], out: Tensor, scratch: Sequence[Tensor]) -> None:
        # float32 between int8 and bfloat16: faster on a CPU than bfloat16 products, and rounded
        # once.
        values = scratch[0].copy_(parts[0].view(torch.int8))
        scale = parts[1].view(torch.bfloat16).float()
        values.unflatten(-1, (-1, self.group_size)).mul_(scale[..., None])
        out.copy_(values.mul_(self._per_channel(out.device)))


class Fp8Codec(Codec):
    """float8 e4m3 with a bfloat16 scale per token and layer; for the context only.

    There is no way to it without the scale: a plain cast cuts off what lies above 448 (84 % error
    on outliers).
    """

    name = "fp8"
    scratch_dtypes = (torch.int16, torch.float32)

    @cached_property
    @override
    def columns(self) -> tuple[Column, ...]:
        return (self._codes("float8_e4m3fn"), Column("_scale", "bfloat16", (self.num_layers,)))

    def _encode(self, states: Tensor, parts: Sequence[Tensor]) -> None:
        layers = states.float().unflatten(-1, (self.num_layers, -1))  # [n, L, D]
        scale = _stored_scale(layers, largest=FP8_MAX, part=parts[1])
        # whether the cast saturates or makes NaN is torch's choice
        layers.div_(scale[..., None]).clamp_(-FP8_MAX, FP8_MAX)
        parts[0].view(torch.float8_e4m3fn).copy_(layers.flatten(1))

    def _decode(self, parts: Sequence[Tensor], out: Tensor, scratch: Sequence[Tensor]) -> None:
        # torch's own cast from float8 runs at 0.3 GB/s on a CPU. The same bits at the right place
        # of a float16 are the value divided by 256 (the exponents' biases are 7 and 15), which
        # processors convert in hardware.
        half, values = scratch
        half.copy_(parts[0].view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(0xBF80 - 0x10000)
        values.copy_(half.view(torch.float16))
        scale = parts[1].view(torch.bfloat16).float() * 256
        values.unflatten(-1, (self.num_layers, -1)).mul_(scale[..., None])
        out.copy_(values)


CODECS = {kind.name: kind for kind in (RawCodec, LosslessCodec, Int8Codec, Fp8Codec)}
LOSSY = ("int8", "fp8")


def make_codec(
    name: CodecName,
    *,
    num_layers: int,
    hidden_size: int,
    compression: Compression = "none",
    channel_scale: Tensor | None = None,
) -> Codec:
    """The codec of one tensor; `compression` applies to int8 and fp8; the others have none.

    Without `channel_scale` lossless compresses a little less; int8 gives its columns and nothing
    else.
    """
    kind = CODECS[name]
    return kind(num_layers, hidden_size, compression if name in LOSSY else "none", channel_scale)


def channel_scale(states: Tensor) -> Tensor:
    """How large each channel of `states` [T, L, D] usually is: float32 [L, D], positive; of a
    sample of some 2,000 tokens.

    From the magnitude that nine in ten tokens stay below: massive tokens are rarer and do not move
    it, and they would the root mean square. (The median is as robust, but blind to a channel's
    tails: 5 % more error on a trained model.)
    """
    if not len(states):
        return torch.ones(states.shape[1:], device=states.device)
    size = states.float().abs()
    scale = size.kthvalue(math.ceil(USUAL_SHARE * len(size)), dim=0).values / NORMAL_QUANTILE
    # a channel that is mostly zero
    scale = torch.where(scale > 0, scale, size.square().mean(dim=0).sqrt())
    awake = torch.where(scale > 0, scale, torch.nan)
    usual = awake.nanmedian(dim=-1, keepdim=True).values.nan_to_num(nan=1.0)  # [L, 1]
    return torch.where(scale > 0, scale, usual).maximum(usual * WEAKEST_CHANNEL)


def _stored_scale(values: Tensor, *, largest: int, part: Tensor) -> Tensor:
    """Store the scale [n, ...] that brings `values` [n, ..., k] to at most `largest`; returned
    as it will be read, 1 for zeros.
    """
    scale = (values.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    part.view(torch.bfloat16).copy_(scale)
    return torch.where(scale > 0, scale, 1).float()
