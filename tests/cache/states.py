"""Made hidden states like those of large models, and what the tests of codecs do with them."""

from typing import Any

import torch
from torch import Tensor

from deepspec.cache.codec_base import Codec
from deepspec.cache.codecs import make_codec

TOKENS, LAYERS, HIDDEN = 600, 3, 512
MASSIVE_TOKENS = 2  # the first ones, like the first tokens of a text in a real model
MASSIVE_CHANNELS = 3  # the first ones of the outlier channels
CHOICES = [
    ("raw", "none"),
    ("lossless", "none"),
    ("int8", "none"),
    ("int8", "zstd"),
    ("fp8", "none"),
    ("fp8", "zstd"),
]


def llm_like(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """States as a large model has them: unequal channels, a few up to 60 times the rest, and
    two massive tokens.
    """
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(LAYERS, HIDDEN, generator=generator) * 0.5)
    scale[:, :8] *= torch.empty(8).uniform_(10, 60, generator=generator)
    scale = scale[:, torch.randperm(HIDDEN, generator=generator)]
    generator.manual_seed(seed)
    loudness = torch.exp(torch.randn(tokens, 1, 1, generator=generator) * 0.2)
    states = torch.randn(tokens, LAYERS, HIDDEN, generator=generator) * scale * loudness
    states[:MASSIVE_TOKENS, :, outliers(scale)[:MASSIVE_CHANNELS]] *= 200
    return states.bfloat16()


def outliers(scale: Tensor) -> Tensor:
    return scale.sum(dim=0).argsort(descending=True)[:8]


def make(name: str, scale: Tensor | None = None, compression: str = "none", **size: int) -> Codec:
    sizes: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": HIDDEN, **size}
    return make_codec(name, compression=compression, channel_scale=scale, **sizes)  # type: ignore[arg-type]


def round_trip(codec: Codec, states: Tensor) -> Tensor:
    buffers = codec.compress(codec.quantize(states))
    return codec.dequantize(codec.expand(buffers, len(states))).view(states.shape)


def error(original: Tensor, decoded: Tensor, *dims: int) -> Tensor:
    """Norm of the error over the norm of the original, along `dims`."""
    difference, original = decoded.double() - original.double(), original.double()
    return (difference.square().sum(dims) / original.square().sum(dims)).sqrt()


def bits(states: Tensor) -> Tensor:
    return states.reshape(-1).view(torch.int16)
