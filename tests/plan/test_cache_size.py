"""Bytes of a cache: by hand on small numbers, and against the sizes that were worked out for
Qwen3-4B.
"""

import pytest

from deepspec.config.data import HiddenConfig
from deepspec.plan.cache_size import (
    bytes_by_codec,
    cache_bytes,
    codecs_name,
    is_assumed,
    layer_bytes,
)
from deepspec.plan.parts import Shape, TokenCounts

QWEN3_4B = Shape(num_captured=5, width=2560, vocab_size=151_936)
TOKENS, SAMPLES = 1.24e9, 1.3e6
PUBLISHED = TokenCounts(SAMPLES, TOKENS, TOKENS * 2 / 3, TOKENS * 2 / 3 + 2 * SAMPLES)


def settings(codec: str, last: str | None = None, compression: str = "none") -> HiddenConfig:
    return HiddenConfig(codec=codec, last_codec=last, compression=compression)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chosen", "terabytes"),
    [
        (settings("raw"), 36.0),
        (settings("lossless"), 24.8),
        (settings("int8", "raw"), 20.4),
        (settings("fp8", "raw"), 20.1),
        (settings("int8"), 18.3),
        (settings("fp8"), 18.1),
    ],
)
def test_the_published_training_set_takes_what_was_worked_out_for_it(
    chosen: HiddenConfig, terabytes: float
):
    assert cache_bytes(PUBLISHED, chosen, QWEN3_4B) / 1e12 == pytest.approx(terabytes, abs=0.06)


def test_bytes_of_one_token_by_hand():
    """Two layers of width 8 and one kept last state: raw 2 * 16 + 16, int8 a scale of 2 bytes a
    group, fp8 one a layer.
    """
    one, shape = TokenCounts(samples=0, tokens=1, supervised=1, kept_last=1), Shape(2, 8, 100)
    assert cache_bytes(one, settings("raw"), shape) == 32 + 16 + 5
    assert cache_bytes(one, settings("int8"), shape) == 2 * (8 + 2) + (8 + 2) + 5
    without = settings("fp8").model_copy(update={"last_hidden": "none"})
    assert cache_bytes(one, without, shape) == 2 * (8 + 2) + 5
    assert cache_bytes(one._replace(samples=1), settings("raw"), shape) == 53 + 780


def test_scales_of_int8_stand_for_the_largest_group_that_divides_the_width():
    int8 = settings("int8")
    assert layer_bytes("int8", int8, 2560) == 2560 + 2 * 20  # groups of 128
    assert layer_bytes("int8", int8, 96) == 96 + 2  # one group
    assert layer_bytes("int8", int8, 200) == 200 + 2 * 2  # two of 100


def test_only_codes_are_compressed():
    packed = settings("int8", compression="zstd")
    assert layer_bytes("int8", packed, 128) == pytest.approx(0.945 * 128 + 2)
    mixed = settings("int8", "raw", "zstd")
    assert layer_bytes("raw", mixed, 128) == 2 * 128


def test_the_last_state_follows_the_codec_but_not_into_fp8():
    assert codecs_name(settings("fp8")) == "fp8, last int8"
    assert codecs_name(settings("int8")) == "int8"
    assert codecs_name(settings("int8", "raw", "zstd")) == "int8, last raw + zstd"
    assert codecs_name(settings("raw").model_copy(update={"last_hidden": "none"})) == "raw"


def test_every_codec_is_compared_with_the_one_chosen():
    chosen = settings("int8", "raw")
    sizes = bytes_by_codec(PUBLISHED, chosen, QWEN3_4B)
    assert sizes[codecs_name(chosen)] == cache_bytes(PUBLISHED, chosen, QWEN3_4B)
    codecs = {name.split(",")[0].split(" ")[0] for name in sizes}
    assert codecs == {"raw", "lossless", "int8", "fp8"}
    assert sizes["int8 + zstd"] < sizes["int8"] < sizes["lossless"] < sizes["raw"]
    assert [name for name in sizes if is_assumed(name)] == [
        "lossless",
        "int8 + zstd",
        "fp8, last int8 + zstd",
    ]
