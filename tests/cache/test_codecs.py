"""What the four codecs promise: lossless is so for every bit, and lossy stays within its bounds."""

import pytest
import torch
from torch import Tensor

from deepspec.cache.codecs import channel_scale
from deepspec.config.data import HiddenConfig
from deepspec.errors import ArtifactMismatch
from tests.cache.states import (
    HIDDEN,
    LAYERS,
    MASSIVE_TOKENS,
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


@pytest.mark.parametrize("name", ["raw", "lossless"])
@pytest.mark.parametrize("scaled", ["with", "without"])
def test_every_one_of_the_65536_bit_patterns_comes_back(name: str, scaled: str):
    """NaNs with their payloads, infinities, both zeros and denormals included, under any
    channel scale.
    """
    patterns = (
        torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    )
    every = torch.stack([patterns.view(-1, 1, 64), patterns.flip(0).view(-1, 1, 64)], dim=1).view(
        -1, 2, 64
    )
    scale = torch.logspace(-38, 38, 128).view(2, 64) if scaled == "with" else None
    codec = make(name, scale, num_layers=2, hidden_size=64)
    assert torch.equal(bits(round_trip(codec, every)), bits(every))


def test_lossless_needs_less_than_seven_tenths_and_the_channel_scale_helps(
    states: Tensor, scale: Tensor
):
    sizes = {
        known: sum(len(part) for part in codec.compress(codec.quantize(states)))
        for known, codec in (("scale", make("lossless", scale)), ("none", make("lossless")))
    }
    assert 2 * states.numel() / sizes["scale"] > 1.42
    assert sizes["scale"] < sizes["none"]


@pytest.mark.parametrize(
    ("name", "worst_layer", "worst_token"), [("int8", 0.009, 0.03), ("fp8", 0.03, 0.04)]
)
def test_lossy_codecs_stay_within_their_bounds(
    states: Tensor, scale: Tensor, name: str, worst_layer: float, worst_token: float
):
    decoded = round_trip(make(name, scale), states)
    ordinary = slice(MASSIVE_TOKENS, None)
    assert error(states, decoded, 0, 2).max() < worst_layer
    # per channel
    assert error(states[ordinary], decoded[ordinary], 0).max() < {"int8": 0.012, "fp8": 0.04}[name]
    assert error(states, decoded, 2).max() < worst_token


def test_without_the_channel_scale_outliers_ruin_ordinary_channels(states: Tensor, scale: Tensor):
    ordinary = slice(MASSIVE_TOKENS, None)
    worst = {
        known: float(
            error(states[ordinary], round_trip(make("int8", given), states)[ordinary], 0).max()
        )
        for known, given in (("scale", scale), ("ones", torch.ones(LAYERS, HIDDEN)))
    }
    assert worst["ones"] > 0.3 > 0.012 > worst["scale"]


def test_a_scale_of_what_is_usual_keeps_massive_tokens_from_spoiling_all_others(states: Tensor):
    """The root mean square follows the two massive tokens, and their channels lose their detail
    in the other 598.
    """
    first = llm_like(tokens=300, seed=1)
    ordinary = slice(MASSIVE_TOKENS, None)
    decoded = {
        "usual": round_trip(make("int8", channel_scale(first)), states),
        "rms": round_trip(make("int8", first.float().square().mean(dim=0).sqrt()), states),
    }
    worst = {
        kind: float(error(states[ordinary], found[ordinary], 0).max())
        for kind, found in decoded.items()
    }
    assert worst["rms"] > 5 * worst["usual"]
    # the worst token
    assert error(states, decoded["rms"], 2).max() > 1.3 * error(states, decoded["usual"], 2).max()


def test_an_unscaled_fp8_cast_would_lose_the_outliers(states: Tensor):
    loud = states * 20  # peaks of some 10^5, as large models have been seen to have
    cast = loud.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert error(loud, cast, 0, 1, 2) > 0.5
    assert error(loud, round_trip(make("fp8"), loud), 0, 1, 2) < 0.03


def test_the_last_hidden_state_is_never_fp8():
    assert HiddenConfig(codec="fp8").codec_of_last_hidden == "int8"
    with pytest.raises(ValueError, match="last_codec"):
        HiddenConfig.model_validate({"last_codec": "fp8"})


@pytest.mark.parametrize("name", ["raw", "lossless"])
def test_compression_is_of_eight_bit_codes_alone(name: str):
    assert make(name, compression="zstd").compression == "none"


def test_int8_without_a_scale_names_its_columns_and_does_nothing_else(states: Tensor):
    codec = make("int8")
    assert [column.suffix for column in codec.columns] == ["", "_scale"]
    with pytest.raises(ArtifactMismatch, match="scale of each channel"):
        codec.quantize(states)


def test_fp8_bits_decode_to_what_torch_makes_of_them():
    """All 256 codes but the two NaNs, which `quantize` never writes; scale 1."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)[
        None
    ]
    codec = make("fp8", num_layers=1, hidden_size=254)
    decoded = codec.dequantize((codes, torch.ones(1, 1, dtype=torch.bfloat16).view(torch.uint8)))
    assert torch.equal(bits(decoded), bits(codes.view(torch.float8_e4m3fn).to(torch.bfloat16)))


def test_fp8_scales_reach_from_the_largest_to_the_smallest_values():
    states = torch.tensor([[3e38, 1e38], [1e-30, 5e-31], [7e5, 7e5]]).bfloat16()[:, None]
    assert (
        error(states, round_trip(make("fp8", num_layers=1, hidden_size=2), states), 1, 2).max()
        < 0.04
    )


def test_bytes_per_token_follow_from_the_sizes():
    width = LAYERS * HIDDEN
    token_bytes = {
        name: [column.token_bytes for column in make(name).columns]
        for name in ("raw", "lossless", "int8", "fp8")
    }
    assert token_bytes == {
        "raw": [2 * width],
        "lossless": [width, width],
        "int8": [width, 2 * width // 128],
        "fp8": [width, 2 * LAYERS],
    }


@pytest.mark.parametrize(
    ("hidden_size", "groups"), [(2560, 20), (96, 1), (32, 1), (192, 2), (131, 131)]
)
def test_a_group_divides_the_hidden_size(hidden_size: int, groups: int):
    codec = make("int8", torch.ones(1, hidden_size), num_layers=1, hidden_size=hidden_size)
    assert codec.columns[1].shape == (1, groups)
    states = torch.randn(9, 1, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert error(states, round_trip(codec, states), 0, 1, 2) < 0.01


def test_fp8_never_writes_a_nan_where_the_scale_itself_is_rounded_coarsely():
    """5.8e-38 / 448 is 1.4 of bfloat16's smallest step: stored as 1, which makes the value 627
    scales.
    """
    states = torch.full((1, 1, 2), 5.8e-38).bfloat16()
    codes, _ = make("fp8", num_layers=1, hidden_size=2).quantize(states)
    assert bool(torch.isfinite(codes.view(torch.float8_e4m3fn).float()).all())


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_the_codes_of_a_token_without_a_state_are_zeros(name: str, scale: Tensor):
    for part in make(name, scale).quantize(torch.zeros(2, LAYERS, HIDDEN)):
        assert not part.any()


def test_a_channel_that_is_mostly_zero_has_the_scale_of_what_it_is_otherwise(states: Tensor):
    sparse = states.float()
    sparse[:, 0, 5] = 0
    sparse[::50, 0, 5] = 300.0
    assert float(channel_scale(sparse)[0, 5]) == pytest.approx(300 / 50**0.5)


def test_the_scale_of_no_tokens_is_one_and_of_a_silent_channel_that_of_its_layer(states: Tensor):
    assert torch.equal(channel_scale(states[:0]), torch.ones(LAYERS, HIDDEN))
    silent = states.clone()
    silent[:, 0, 5], silent[:, 1] = 0, 0
    scale = channel_scale(silent)
    assert scale[0, 5] == scale[0].median()
    assert torch.equal(scale[1], torch.ones(HIDDEN))
    assert bool((scale > 0).all())
