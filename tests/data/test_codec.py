"""Codecs of hidden states: what is lossless is so for every bit, what is not stays within its bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from deepspec.data import codec as codec_module
from deepspec.data import columns as columns_module
from deepspec.data.codec import channel_scale, make_codec
from deepspec.data.columns import Codec
from deepspec.errors import ArtifactMismatch, ConfigError

TOKENS, LAYERS, HIDDEN = 600, 3, 512
MASSIVE_TOKENS = 2  # the first ones, like the first tokens of a text in a real model
MASSIVE_CHANNELS = 3  # the first ones of the outlier channels
CHOICES = [("raw", "none"), ("lossless", "none"), ("int8", "none"), ("int8", "zstd"), ("fp8", "none"), ("fp8", "zstd")]


def llm_like(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """States as a large model has them: unequal channels, a few up to 60 times the rest, and two massive tokens."""
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


@pytest.fixture(scope="module")
def states() -> Tensor:
    return llm_like()


@pytest.fixture(scope="module")
def scale() -> Tensor:
    return channel_scale(llm_like(tokens=300, seed=1))


def make(name: str, scale: Tensor | None = None, compression: str = "none", tensor: str = "context", **size: int) -> Codec:
    sizes: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": HIDDEN, **size}
    return make_codec(name, tensor=tensor, compression=compression, channel_scale=scale, **sizes)  # type: ignore[arg-type]


def round_trip(codec: Codec, states: Tensor) -> Tensor:
    buffers = codec.compress(codec.quantize(states))
    return codec.dequantize(codec.expand(buffers, len(states))).view(states.shape)


def error(original: Tensor, decoded: Tensor, *dims: int) -> Tensor:
    """Norm of the error over the norm of the original, along `dims`."""
    difference, original = decoded.double() - original.double(), original.double()
    return (difference.square().sum(dims) / original.square().sum(dims)).sqrt()


def bits(states: Tensor) -> Tensor:
    return states.reshape(-1).view(torch.int16)


@pytest.mark.parametrize("name", ["raw", "lossless"])
@pytest.mark.parametrize("scaled", ["with", "without"])
def test_every_one_of_the_65536_bit_patterns_comes_back(name: str, scaled: str):
    """NaNs with their payloads, infinities, both zeros and denormals included, under any channel scale."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = torch.stack([patterns.view(-1, 1, 64), patterns.flip(0).view(-1, 1, 64)], dim=1).view(-1, 2, 64)
    scale = torch.logspace(-38, 38, 128).view(2, 64) if scaled == "with" else None
    codec = make(name, scale, num_layers=2, hidden_size=64)
    assert torch.equal(bits(round_trip(codec, every)), bits(every))


def test_lossless_needs_less_than_seven_tenths_and_the_channel_scale_helps(states: Tensor, scale: Tensor):
    sizes = {
        known: sum(len(part) for part in codec.compress(codec.quantize(states)))
        for known, codec in (("scale", make("lossless", scale)), ("none", make("lossless")))
    }
    assert 2 * states.numel() / sizes["scale"] > 1.42
    assert sizes["scale"] < sizes["none"]


@pytest.mark.parametrize(("name", "worst_layer", "worst_token"), [("int8", 0.009, 0.03), ("fp8", 0.03, 0.04)])
def test_lossy_codecs_stay_within_their_bounds(states: Tensor, scale: Tensor, name: str, worst_layer: float, worst_token: float):
    decoded = round_trip(make(name, scale), states)
    ordinary = slice(MASSIVE_TOKENS, None)
    assert error(states, decoded, 0, 2).max() < worst_layer
    assert error(states[ordinary], decoded[ordinary], 0).max() < {"int8": 0.012, "fp8": 0.04}[name]  # per channel
    assert error(states, decoded, 2).max() < worst_token


def test_without_the_channel_scale_outliers_ruin_ordinary_channels(states: Tensor, scale: Tensor):
    ordinary = slice(MASSIVE_TOKENS, None)
    worst = {
        known: float(error(states[ordinary], round_trip(make("int8", given), states)[ordinary], 0).max())
        for known, given in (("scale", scale), ("ones", torch.ones(LAYERS, HIDDEN)))
    }
    assert worst["ones"] > 0.3 > 0.012 > worst["scale"]


def test_a_scale_from_medians_keeps_massive_tokens_from_spoiling_all_others(states: Tensor):
    """The root mean square follows the two massive tokens, and their channels lose their detail in the other 598."""
    first = llm_like(tokens=300, seed=1)
    ordinary = slice(MASSIVE_TOKENS, None)
    decoded = {
        "median": round_trip(make("int8", channel_scale(first)), states),
        "rms": round_trip(make("int8", first.float().square().mean(dim=0).sqrt()), states),
    }
    worst = {kind: float(error(states[ordinary], found[ordinary], 0).max()) for kind, found in decoded.items()}
    assert worst["rms"] > 5 * worst["median"]
    assert error(states, decoded["rms"], 2).max() > 1.3 * error(states, decoded["median"], 2).max()  # the worst token


def test_an_unscaled_fp8_cast_would_lose_the_outliers(states: Tensor):
    loud = states * 20  # peaks of some 10^5, as large models have been seen to have
    cast = loud.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert error(loud, cast, 0, 1, 2) > 0.5
    assert error(loud, round_trip(make("fp8"), loud), 0, 1, 2) < 0.03


def test_the_last_hidden_state_is_never_fp8():
    with pytest.raises(ConfigError, match="distribution"):
        make("fp8", tensor="last_hidden", num_layers=1)


def test_raw_states_take_no_compression():
    with pytest.raises(ConfigError, match="not compressed"):
        make("raw", compression="zstd")


def test_int8_without_a_scale_names_its_columns_and_does_nothing_else(states: Tensor):
    codec = make("int8")
    assert [column.suffix for column in codec.columns()] == ["", "_scale"]
    with pytest.raises(ArtifactMismatch, match="scale of each channel"):
        codec.quantize(states)


def test_fp8_bits_decode_to_what_torch_makes_of_them():
    """All 256 codes but the two NaNs, which `quantize` never writes; scale 1."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)[None]
    codec = make("fp8", num_layers=1, hidden_size=254)
    decoded = codec.dequantize((codes, torch.ones(1, 1, dtype=torch.bfloat16).view(torch.uint8)))
    assert torch.equal(bits(decoded), bits(codes.view(torch.float8_e4m3fn).to(torch.bfloat16)))


def test_fp8_scales_reach_from_the_largest_to_the_smallest_values():
    states = torch.tensor([[3e38, 1e38], [1e-30, 5e-31], [7e5, 7e5]]).bfloat16()[:, None]
    assert error(states, round_trip(make("fp8", num_layers=1, hidden_size=2), states), 1, 2).max() < 0.04


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_columns_say_what_quantize_makes(states: Tensor, scale: Tensor, name: str, compression: str):
    codec = make(name, scale, compression)
    parts = codec.quantize(states)
    assert [tuple(part.shape) for part in parts] == [(TOKENS, column.token_bytes) for column in codec.columns()]
    for column, buffer in zip(codec.columns(), codec.compress(parts), strict=True):
        if column.storage == "tokens":
            assert buffer.size == TOKENS * column.token_bytes
        else:
            assert buffer.size < TOKENS * column.token_bytes


def test_bytes_per_token_follow_from_the_sizes():
    width = LAYERS * HIDDEN
    token_bytes = {name: [column.token_bytes for column in make(name).columns()] for name in ("raw", "lossless", "int8", "fp8")}
    assert token_bytes == {
        "raw": [2 * width],
        "lossless": [width, width],
        "int8": [width, 2 * width // 128],
        "fp8": [width, 2 * LAYERS],
    }


@pytest.mark.parametrize(("hidden_size", "groups"), [(2560, 20), (96, 1), (32, 1), (192, 2), (131, 131)])
def test_a_group_divides_the_hidden_size(hidden_size: int, groups: int):
    codec = make("int8", torch.ones(1, hidden_size), num_layers=1, hidden_size=hidden_size)
    assert codec.columns()[1].shape == (1, groups)
    states = torch.randn(9, 1, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert error(states, round_trip(codec, states), 0, 1, 2) < 0.01


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_zstd_changes_the_size_and_nothing_else(states: Tensor, scale: Tensor, name: str):
    plain, packed = make(name, scale), make(name, scale, "zstd")
    assert torch.equal(bits(round_trip(plain, states)), bits(round_trip(packed, states)))
    assert sum(map(len, packed.compress(packed.quantize(states)))) < sum(map(len, plain.compress(plain.quantize(states))))


@pytest.mark.parametrize(("name", "compression"), CHOICES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token_round_trip(states: Tensor, scale: Tensor, name: str, compression: str, tokens: int):
    decoded = round_trip(make(name, scale, compression), states[2 : 2 + tokens])
    assert decoded.shape == (tokens, LAYERS, HIDDEN)
    assert torch.allclose(decoded.float(), states[2 : 2 + tokens].float(), rtol=0.1, atol=3)


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_zeros_stay_zeros(name: str, compression: str):
    """A dead channel (also in the tokens of the scale), a dead layer, and tokens without any state."""
    states = llm_like()
    states[:, 0, 5], states[:, 1], states[7] = 0, 0, 0
    decoded = round_trip(make(name, channel_scale(states), compression), states)
    assert bool(torch.isfinite(decoded).all())
    assert bool((decoded[states == 0] == 0).all())


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_states_decode_into_rows_of_a_batch(states: Tensor, scale: Tensor, name: str, compression: str):
    codec = make(name, scale, compression)
    batch = torch.full((2, TOKENS + 10, LAYERS * HIDDEN), 3.0, dtype=torch.bfloat16)
    parts = codec.quantize(states)
    given = codec.dequantize(parts, out=batch[1, 4 : 4 + TOKENS])
    assert given.data_ptr() == batch[1, 4].data_ptr()
    assert torch.equal(bits(batch[1, 4 : 4 + TOKENS]), bits(codec.dequantize(parts)))
    assert bool((batch[0] == 3).all() and (batch[1, :4] == 3).all() and (batch[1, 4 + TOKENS :] == 3).all())


def test_raw_states_are_never_copied(states: Tensor):
    codec = make("raw")
    parts = codec.quantize(states)
    (buffer,) = codec.compress(parts)
    decoded = codec.dequantize(codec.expand([buffer], TOKENS))
    assert states.data_ptr() == parts[0].data_ptr() == buffer.address == decoded.data_ptr()


def test_uncompressed_columns_share_the_memory_of_an_unaligned_message(states: Tensor, scale: Tensor):
    """Arrow's messages put columns at any multiple of eight bytes."""
    codec = make("int8", scale)
    stored = [buffer.to_pybytes() for buffer in codec.compress(codec.quantize(states))]
    message = pa.py_buffer(b"12345678" + b"".join(stored))
    views = [message.slice(8, len(stored[0])), message.slice(8 + len(stored[0]))]
    parts = codec.expand(views, TOKENS)
    assert [part.data_ptr() for part in parts] == [view.address for view in views]
    assert torch.equal(bits(codec.dequantize(parts)), bits(round_trip(codec, states)))


@pytest.mark.parametrize("name", ["lossless", "int8", "fp8"])
def test_chunks_do_not_show(states: Tensor, scale: Tensor, name: str, monkeypatch: pytest.MonkeyPatch):
    whole = round_trip(make(name, scale), states)
    monkeypatch.setattr(columns_module, "CHUNK_VALUES", 7 * LAYERS * HIDDEN)  # 600 tokens do not divide by 7
    assert torch.equal(bits(round_trip(make(name, scale), states)), bits(whole))


def test_states_of_another_precision_are_rounded_to_bfloat16(states: Tensor, scale: Tensor):
    fine = states.float() * 1.001
    assert torch.equal(bits(round_trip(make("lossless", scale), fine)), bits(fine.bfloat16()))


def test_the_scale_of_no_tokens_is_one_and_of_a_silent_channel_that_of_its_layer(states: Tensor):
    assert torch.equal(channel_scale(states[:0]), torch.ones(LAYERS, HIDDEN))
    silent = states.clone()
    silent[:, 0, 5], silent[:, 1] = 0, 0
    scale = channel_scale(silent)
    assert scale[0, 5] == scale[0].median()
    assert torch.equal(scale[1], torch.ones(HIDDEN))
    assert bool((scale > 0).all())


def test_nothing_in_a_codec_moves_tensors_to_another_device():
    """`quantize` and `dequantize` run where the states are; only `expand` and `compress` are of the host."""
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (codec_module, columns_module))
    assert ".cpu(" not in source and ".cuda(" not in source and ".item(" not in source and ".tolist(" not in source


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_a_gpu_makes_the_same_states(states: Tensor, scale: Tensor, name: str, compression: str):
    codec = make(name, scale, compression)
    on_gpu = codec.quantize(states.cuda())
    stored = codec.expand(codec.compress([part.cpu() for part in on_gpu]), TOKENS)
    decoded = codec.dequantize([part.cuda() for part in stored])
    assert decoded.is_cuda
    assert torch.equal(bits(decoded.cpu()), bits(codec.dequantize(stored)))
    assert error(states.flatten(1), decoded.cpu(), 0, 1) < 0.03
