"""The arithmetic of a plan: by hand on small numbers, and against the sizes that were worked
out for Qwen3-4B.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec.errors import StoreError
from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.arithmetic import (
    CODECS,
    Codecs,
    Fit,
    Shape,
    TokenCounts,
    bytes_by_codec,
    choose_codecs,
    hidden_bytes,
    histogram,
    layer_bytes,
    put_requests,
    puts_per_file,
    relative_error,
    require_fit,
    room,
    shard_notes,
    training_flops,
)
from deepspec.storage.s3_client import PART_BYTES
from deepspec.storage.store import Store
from deepspec.storage.urls import open_store

QWEN3_4B = Shape(num_captured=5, width=2560, vocab_size=151_936)
TOKENS, SAMPLES = 1.24e9, 1.3e6
PUBLISHED = TokenCounts(SAMPLES, TOKENS, TOKENS * 2 / 3, TOKENS * 2 / 3 + 2 * SAMPLES)


@pytest.mark.parametrize(
    ("codecs", "terabytes"),
    [
        (Codecs("raw", "raw", "none"), 36.0),
        (Codecs("lossless", "lossless", "none"), 24.8),
        (Codecs("int8", "raw", "none"), 20.4),
        (Codecs("fp8", "raw", "none"), 20.1),
        (Codecs("int8", "int8", "none"), 18.3),
        (Codecs("fp8", "int8", "none"), 18.1),
    ],
    ids=str,
)
def test_the_published_training_set_takes_what_was_worked_out_for_it(
    codecs: Codecs, terabytes: float
):
    assert hidden_bytes(PUBLISHED, codecs, QWEN3_4B) / 1e12 == pytest.approx(terabytes, abs=0.06)


def test_bytes_of_one_token_by_hand():
    """Two layers of width 8 and one kept last state: raw 2 * 16 + 16, int8 a scale of 2 bytes a
    group, fp8 one a layer.
    """
    one, shape = TokenCounts(samples=0, tokens=1, supervised=1, kept_last=1), Shape(2, 8, 100)
    assert hidden_bytes(one, Codecs("raw", "raw", "none"), shape) == 32 + 16 + 5
    assert hidden_bytes(one, Codecs("int8", "int8", "none"), shape) == 2 * (8 + 2) + (8 + 2) + 5
    assert hidden_bytes(one, Codecs("fp8", None, "none"), shape) == 2 * (8 + 2) + 5
    assert hidden_bytes(one._replace(samples=1), Codecs("raw", "raw", "none"), shape) == 53 + 780


def test_scales_of_int8_stand_for_the_largest_group_that_divides_the_width():
    assert layer_bytes("int8", 2560) == 2560 + 2 * 20  # groups of 128
    assert layer_bytes("int8", 96) == 96 + 2  # one group
    assert layer_bytes("int8", 200) == 200 + 2 * 2  # two of 100


def test_the_last_state_follows_the_codec_but_not_into_fp8():
    assert choose_codecs("fp8", None, "none", last_hidden="supervised").last == "int8"
    assert choose_codecs("int8", None, "none", last_hidden="supervised").last == "int8"
    assert choose_codecs("int8", "raw", "none", last_hidden="supervised").last == "raw"
    assert choose_codecs("raw", "raw", "none", last_hidden="none").last is None


def test_every_codec_is_compared_with_the_one_chosen():
    chosen = Codecs("int8", "raw", "none")
    sizes = bytes_by_codec(PUBLISHED, chosen, QWEN3_4B)
    assert sizes[str(chosen)] == hidden_bytes(PUBLISHED, chosen, QWEN3_4B)
    assert {name.split(",")[0].split(" ")[0] for name in sizes} == set(CODECS)
    assert sizes["int8 + zstd"] < sizes["int8"] < sizes["lossless"] < sizes["raw"]


def test_quantiles_and_bins_of_lengths():
    found = histogram([*range(1, 101)])
    assert (found.p5, found.p50, found.p95, found.max) == (6, 51, 96, 100)
    assert sum(found.bins) == 100
    assert histogram([]).max == 0
    assert histogram([7]).p50 == 7


def test_the_error_of_a_sample_shrinks_with_its_root():
    assert relative_error([5.0] * 10) == 0
    assert relative_error([5.0]) == 0
    assert relative_error([1.0, 3.0]) == pytest.approx(1.96 * (2**0.5 / 2**0.5) / 2)
    assert relative_error([1.0, 3.0] * 100) == pytest.approx(
        relative_error([1.0, 3.0]) / 10, rel=0.35
    )


def test_requests_by_hand():
    """Ten shards of three parts: (3 + create + complete) + rows + record each; once: one small
    file and five more.
    """
    assert puts_per_file(1000) == 1
    assert puts_per_file(2 * PART_BYTES + 1) == 3 + 2
    assert (
        put_requests(10, shard_bytes=2 * PART_BYTES + 1, frozen_bytes=1000) == 10 * (5 + 2) + 1 + 5
    )


def test_flops_of_training_by_hand():
    counts = TokenCounts(samples=10, tokens=0, supervised=0, kept_last=0)
    assert (
        training_flops(counts, Shape(1, 4, 50), trainable=100, slots=2, positions=7)
        == 6 * (100 * 7 + 50 * 4 * 2) * 10
    )


def test_shards_out_of_proportion_are_pointed_out():
    assert shard_notes(100, shard_bytes=1e9, shard_rows=128) == []
    assert "shard_rows to about 32" in shard_notes(100, shard_bytes=8e9, shard_rows=128)[0]
    assert "shard_rows to about 12800" in shard_notes(10_000, shard_bytes=2e7, shard_rows=128)[0]
    # small shards of a small cache hurt nobody
    assert shard_notes(10, shard_bytes=1e5, shard_rows=96) == []


def test_a_store_without_room_is_refused_with_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10e9)
    store = open_store(str(tmp_path))
    assert room(8e9, store, min_free_gb=2).fits
    with pytest.raises(StoreError, match=r"need 8.50 GB .* keeps 2.00 GB, but 10.0 GB are free"):
        require_fit(room(8.5e9, store, min_free_gb=2), where=store.url, fix="")


def test_a_store_without_a_limit_holds_anything():
    assert room(1e18, open_store("memory://plan"), min_free_gb=5).fits
    assert Fit(1e18, None, 0).fits


def test_numbers_read_well():
    assert [human_bytes(size) for size in (0, 720, 36e12, 1.56e9, 999.9e3)] == [
        "0 B",
        "720 B",
        "36.0 TB",
        "1.56 GB",
        "1.00 MB",
    ]
    assert [human_count(count) for count in (0.779, 960, 1.24e9)] == ["0.779", "960", "1.24 G"]
    assert [human_hours(hours) for hours in (0.5 / 3600, 0.5, 30, 24 * 30)] == [
        "0.5 s",
        "30.0 min",
        "30.0 h",
        "30.0 days",
    ]
