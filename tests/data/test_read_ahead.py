"""Reading ahead: in order, within the budget, and errors where the result would have been."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from deepspec.data.read_ahead import BufferPool, read_ahead


def test_results_come_in_order_whoever_is_done_first():
    jobs = [(1, lambda number=number: time.sleep(0.02 * (5 - number)) or number) for number in range(6)]
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
    pool = BufferPool()
    first = pool.take(100_000)
    pool.give(first)
    assert pool.take(120_000) is first
    assert isinstance(pool.take(120_000), np.ndarray)
