"""Local copies of remote ranges: bounded, shared, and never trusted."""

import multiprocessing
from pathlib import Path

from deepspec.cache.local_copies import LocalCopies

MB = 1 << 20


def content(number: int) -> bytes:
    return bytes([number % 251]) * MB


def test_what_was_put_is_got_and_nothing_else(tmp_path: Path):
    cache = LocalCopies(tmp_path, 100 * MB)
    cache.put("shard 1", 3 * MB, memoryview(content(1)))
    found = cache.get("shard 1", 3 * MB, MB)
    assert found is not None
    assert found.tobytes() == content(1)
    assert cache.get("shard 1", 0, MB) is None
    assert cache.get("shard 1", 3 * MB, MB // 2) is None
    assert cache.get("shard 2", 3 * MB, MB) is None


def test_a_range_far_behind_takes_only_its_own_bytes(tmp_path: Path):
    cache = LocalCopies(tmp_path, 100 * MB)
    cache.put("shard", 4000 * MB, memoryview(content(1)))
    assert cache.num_bytes() <= 2 * MB


def test_the_shards_used_longest_ago_make_room(tmp_path: Path):
    import os

    cache = LocalCopies(tmp_path, 10 * MB)
    for number in range(10):
        cache.put(f"shard {number}", 0, memoryview(content(number)))
        os.utime(cache._paths(f"shard {number}")[1], (number, number))
    assert cache.get("shard 0", 0, MB) is not None  # used now
    cache.put("shard 10", 0, memoryview(content(10)))
    assert cache.num_bytes() <= 10 * MB
    assert cache.get("shard 0", 0, MB) is not None
    assert cache.get("shard 1", 0, MB) is None


def test_bytes_that_no_list_names_go_first(tmp_path: Path):
    """A process killed between its two files left them: counted but never evicted, in the end
    they pushed out every good copy.
    """
    for number in range(9):
        (tmp_path / f"{number:032x}.data").write_bytes(content(number))
    cache = LocalCopies(tmp_path, 10 * MB)
    for number in range(6):
        cache.put(f"shard {number}", 0, memoryview(content(number)))
    assert cache.num_bytes() <= 10 * MB
    assert [number for number in range(6) if cache.get(f"shard {number}", 0, MB) is None] == []


def fill(folder: Path, first: int) -> None:
    cache = LocalCopies(folder, 20 * MB)
    for number in range(first, first + 60):
        key = f"shard {number % 40}"
        found = cache.get(key, 0, MB)
        # A race may leave a listed range of zeros, which its reader's checksum refuses; never
        # somebody else's bytes.
        assert found is None or bytes(found) in (content(number % 40), bytes(MB))
        cache.put(key, 0, memoryview(content(number % 40)))


def test_several_processes_share_it_within_its_bound(tmp_path: Path):
    processes = [
        multiprocessing.get_context("fork").Process(target=fill, args=(tmp_path, first))
        for first in (0, 13, 26)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert LocalCopies(tmp_path, 20 * MB).num_bytes() <= 23 * MB  # each may be one look late


def test_a_folder_that_cannot_be_written_only_means_that_nothing_is_kept(tmp_path: Path):
    cache = LocalCopies(tmp_path / "cache", 10 * MB)
    data, _ = cache._paths("shard")
    data.mkdir()
    cache.put("shard", 0, memoryview(content(1)))
    assert cache.get("shard", 0, MB) is None
