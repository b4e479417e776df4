"""Reading ahead: in order, within the budget, and errors where the result would have been."""

import threading
import time
import weakref
from collections import deque

import numpy as np
import pytest

from deepspec.cache.prefetch import BufferPool, read_ahead


def test_results_come_in_order_whoever_is_done_first():
    jobs = [
        (1, lambda number=number: time.sleep(0.02 * (5 - number)) or number) for number in range(6)
    ]
    assert list(read_ahead(jobs, max_bytes=4, threads=4)) == list(range(6))


def test_no_more_is_on_its_way_than_the_budget_allows():
    running, most, lock = 0, 0, threading.Lock()

    def job() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)

    for _ in read_ahead([(10, job)] * 20, max_bytes=30, threads=8):
        with lock:
            running -= 1
    assert most <= 3


def test_a_job_larger_than_the_budget_runs_by_itself():
    assert list(read_ahead([(100, lambda: 1), (100, lambda: 2)], max_bytes=10, threads=2)) == [1, 2]


def test_an_error_comes_in_its_place():
    def broken() -> int:
        raise OSError("gone")

    found = read_ahead([(1, lambda: 1), (1, broken), (1, lambda: 3)], max_bytes=10, threads=2)
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_buffers_are_used_again():
    pool = BufferPool(max_bytes=1 << 20)
    first = pool.take(100_000)
    pool.give(first)
    assert pool.take(120_000) is first
    assert isinstance(pool.take(120_000), np.ndarray)


def test_what_nobody_uses_stays_within_its_bound_whatever_the_sizes():
    """Each size kept as many buffers as ever were in use at once: real lengths under a budget
    of 512 MB left 3.6 GB lying.
    """
    budget, alive = 16 << 20, dict[int, int]()
    pool, in_use = BufferPool(max_bytes=budget), deque[np.ndarray]()
    lengths = np.random.default_rng(0).lognormal(np.log(300_000), 1.0, 2000).astype(int)
    lengths = np.concatenate([np.sort(lengths), lengths])  # each size has its peak, then all mixed
    most_in_use = most_alive = 0
    for length in lengths:
        while in_use and sum(map(len, in_use)) + length > budget:
            pool.give(in_use.popleft())
            assert pool.free_bytes <= budget
        buffer = pool.take(int(length))
        if id(buffer) not in alive:
            alive[id(buffer)] = len(buffer)
            weakref.finalize(buffer, alive.pop, id(buffer))
        in_use.append(buffer)
        most_in_use, most_alive = (
            max(most_in_use, sum(map(len, in_use))),
            max(most_alive, sum(alive.values())),
        )
        del buffer
    assert most_alive <= most_in_use + budget


def test_the_buffers_that_lay_unused_longest_go_first():
    pool = BufferPool(max_bytes=4 << 16)
    small, large, small_again = pool.take(1), pool.take(2 << 16), pool.take(1)
    for buffer in (small, large, small_again):
        pool.give(buffer)
    pool.give(pool.take(1))  # `small_again`, still the last one given
    pool.give(np.empty(1 << 16, dtype=np.uint8))
    assert pool.free_bytes == 4 << 16
    assert pool.take(2 << 16) is large
    pool.take(1)
    assert pool.take(1) is small_again and pool.take(1) is not small
    # larger than all that may lie there: it pushes nothing out
    pool.give(np.empty(8 << 16, dtype=np.uint8))
    assert pool.free_bytes == 0
