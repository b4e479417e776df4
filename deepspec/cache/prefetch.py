"""Reading ahead with threads: results in order, as many on their way as fit a budget of bytes.

Threads and not worker processes: preadv, hashing and copying all release the interpreter's lock,
while a process would have to hand 30 MB a sample through shared memory, whose page faults cost more
than the reading (measured: 0.17 of memcpy).
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

# of tiny samples a budget in bytes alone would let thousands queue before the first one is used
MAX_JOBS_AHEAD = 1024
SMALLEST_BUFFER = 1 << 16

T = TypeVar("T")


def read_ahead(
    jobs: Iterable[tuple[int, Callable[[], T]]], *, max_bytes: int, threads: int = 1
) -> Iterator[T]:
    """Results of the jobs (size in bytes, what to call) in their order.

    A result counts against the budget until the next one is asked for; one that alone is larger
    than it is read by itself.
    """
    waiting, ahead = deque[tuple[int, Future[T]]](), 0
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="read-ahead")
    try:
        for num_bytes, run in jobs:
            while waiting and (ahead + num_bytes > max_bytes or len(waiting) >= MAX_JOBS_AHEAD):
                size, future = waiting.popleft()
                yield future.result()
                ahead -= size
            waiting.append((num_bytes, pool.submit(run)))
            ahead += num_bytes
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_buffered(
    reads: Iterable[tuple[int, int, Callable[[np.ndarray], T]]], *, max_bytes: int, threads: int
) -> Iterator[T]:
    """Results of reads (size in bytes, room, what to call with a buffer of that room) in their
    order, read ahead.

    A result may share the memory of its buffer, which is used again once the next one is asked for.
    """
    pool = BufferPool(max_bytes)

    def run(room: int, read: Callable[[np.ndarray], T]) -> tuple[T, np.ndarray]:
        buffer = pool.take(room)
        return read(buffer), buffer

    jobs = ((num_bytes, partial(run, room, read)) for num_bytes, room, read in reads)
    for result, buffer in read_ahead(jobs, max_bytes=max_bytes, threads=threads):
        yield result
        pool.give(buffer)


class BufferPool:
    """Memory that is used again: fresh pages cost more than the copy into them.

    What nobody uses takes `max_bytes` at most. Without a bound each size would keep as many buffers
    as ever were in use at once, and sizes have their peaks at different times: real lengths under a
    budget of 512 MB left 3.6 GB lying.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.free_bytes = max_bytes, 0
        # By size, and in each size those given back last on the right, with the count of buffers
        # given back before.
        self._free: defaultdict[int, deque[tuple[int, np.ndarray]]] = defaultdict(deque)
        self._num_given = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray:
        """A buffer of at least so many bytes, an old one where there is one."""
        size = max(SMALLEST_BUFFER, 1 << max(0, num_bytes - 1).bit_length()) if num_bytes else 0
        with self._lock:
            if free := self._free[size]:
                self.free_bytes -= size
                return free.pop()[1]
        return np.empty(size, dtype=np.uint8)

    def give(self, buffer: np.ndarray) -> None:
        """Leave the buffer for the next one who asks for its size; those that lay unused
        longest go if there are too many.
        """
        if len(buffer) > self.max_bytes:
            return
        with self._lock:
            self._free[len(buffer)].append((self._num_given, buffer))
            self._num_given += 1
            self.free_bytes += len(buffer)
            while self.free_bytes > self.max_bytes:
                oldest = min(
                    (free for free in self._free.values() if free), key=lambda free: free[0][0]
                )
                self.free_bytes -= len(oldest.popleft()[1])
