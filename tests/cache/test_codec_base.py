"""What all codecs have in common: columns, memory that is shared, any number of tokens, rows of
a batch.
"""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from deepspec.cache import codec_base as columns_module
from deepspec.cache import codecs as codec_module
from deepspec.cache.codecs import channel_scale
from tests.cache.states import (
    CHOICES,
    HIDDEN,
    LAYERS,
    TOKENS,
    bits,
    error,
    llm_like,
    make,
    round_trip,
)


@pytest.fixture(scope="module")
def states() -> Tensor:
    return llm_like()


@pytest.fixture(scope="module")
def scale() -> Tensor:
    return channel_scale(llm_like(tokens=300, seed=1))


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_columns_say_what_quantize_makes(
    states: Tensor, scale: Tensor, name: str, compression: str
):
    codec = make(name, scale, compression)
    parts = codec.quantize(states)
    assert [tuple(part.shape) for part in parts] == [
        (TOKENS, column.token_bytes) for column in codec.columns
    ]
    for column, buffer in zip(codec.columns, codec.compress(parts), strict=True):
        if column.storage == "tokens":
            assert buffer.size == TOKENS * column.token_bytes
        else:
            assert buffer.size < TOKENS * column.token_bytes


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_zstd_changes_the_size_and_nothing_else(states: Tensor, scale: Tensor, name: str):
    plain, packed = make(name, scale), make(name, scale, "zstd")
    assert torch.equal(bits(round_trip(plain, states)), bits(round_trip(packed, states)))
    assert sum(map(len, packed.compress(packed.quantize(states)))) < sum(
        map(len, plain.compress(plain.quantize(states)))
    )


@pytest.mark.parametrize(("name", "compression"), CHOICES)
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token_round_trip(
    states: Tensor, scale: Tensor, name: str, compression: str, tokens: int
):
    decoded = round_trip(make(name, scale, compression), states[2 : 2 + tokens])
    assert decoded.shape == (tokens, LAYERS, HIDDEN)
    assert torch.allclose(decoded.float(), states[2 : 2 + tokens].float(), rtol=0.1, atol=3)


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_zeros_stay_zeros(name: str, compression: str):
    """A dead channel (also in the tokens of the scale), a dead layer, and tokens without any
    state.
    """
    states = llm_like()
    states[:, 0, 5], states[:, 1], states[7] = 0, 0, 0
    decoded = round_trip(make(name, channel_scale(states), compression), states)
    assert bool(torch.isfinite(decoded).all())
    assert bool((decoded[states == 0] == 0).all())


@pytest.mark.parametrize(("name", "compression"), CHOICES)
def test_states_decode_into_rows_of_a_batch(
    states: Tensor, scale: Tensor, name: str, compression: str
):
    codec = make(name, scale, compression)
    batch = torch.full((2, TOKENS + 10, LAYERS * HIDDEN), 3.0, dtype=torch.bfloat16)
    parts = codec.quantize(states)
    given = codec.dequantize(parts, out=batch[1, 4 : 4 + TOKENS])
    assert given.data_ptr() == batch[1, 4].data_ptr()
    assert torch.equal(bits(batch[1, 4 : 4 + TOKENS]), bits(codec.dequantize(parts)))
    assert bool(
        (batch[0] == 3).all() and (batch[1, :4] == 3).all() and (batch[1, 4 + TOKENS :] == 3).all()
    )


def test_raw_states_are_never_copied(states: Tensor):
    codec = make("raw")
    parts = codec.quantize(states)
    (buffer,) = codec.compress(parts)
    decoded = codec.dequantize(codec.expand([buffer], TOKENS))
    assert states.data_ptr() == parts[0].data_ptr() == buffer.address == decoded.data_ptr()


def test_uncompressed_columns_share_the_memory_of_an_unaligned_message(
    states: Tensor, scale: Tensor
):
    """Arrow's messages put columns at any multiple of eight bytes."""
    codec = make("int8", scale)
    stored = [buffer.to_pybytes() for buffer in codec.compress(codec.quantize(states))]
    message = pa.py_buffer(b"12345678" + b"".join(stored))
    views = [message.slice(8, len(stored[0])), message.slice(8 + len(stored[0]))]
    parts = codec.expand(views, TOKENS)
    assert [part.data_ptr() for part in parts] == [view.address for view in views]
    assert torch.equal(bits(codec.dequantize(parts)), bits(round_trip(codec, states)))


@pytest.mark.parametrize("name", ["lossless", "int8", "fp8"])
def test_chunks_do_not_show(
    states: Tensor, scale: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
):
    whole = round_trip(make(name, scale), states)
    # 600 tokens do not divide by 7
    monkeypatch.setattr(columns_module, "CHUNK_VALUES", 7 * LAYERS * HIDDEN)
    assert torch.equal(bits(round_trip(make(name, scale), states)), bits(whole))


def test_states_of_another_precision_are_rounded_to_bfloat16(states: Tensor, scale: Tensor):
    fine = states.float() * 1.001
    assert torch.equal(bits(round_trip(make("lossless", scale), fine)), bits(fine.bfloat16()))


def test_nothing_in_a_codec_moves_tensors_to_another_device():
    """`quantize` and `dequantize` run where the states are; only `expand` and `compress` are of
    the host.
    """
    source = "".join(
        Path(module.__file__).read_text(encoding="utf-8")
        for module in (codec_module, columns_module)
    )
    assert (
        ".cpu(" not in source
        and ".cuda(" not in source
        and ".item(" not in source
        and ".tolist(" not in source
    )


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
