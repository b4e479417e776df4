"""The arithmetic of a plan: by hand on small numbers, and against the sizes that were worked
out for Qwen3-4B.
"""

from pathlib import Path

import pytest

from deepspec.errors import StoreError
from deepspec.formatting import human_bytes, human_count, human_hours
from deepspec.plan.arithmetic import (
    Fit,
    Shape,
    TokenCounts,
    histogram,
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
