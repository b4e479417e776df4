"""A file that is written past the page cache, hashed on the way, while its owner already prepares
the next bytes.

At tens of terabytes the page cache only gets in the way: written pages are not read again soon, and
copying them costs as much CPU as everything else together. Bytes are gathered in a few aligned
buffers; a thread of its own writes each full one. Where the file system refuses direct I/O (tmpfs,
some network mounts), or a disk is faster behind the cache, the same code writes through it.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import xxhash

ALIGNMENT = 4096  # of memory, offsets and lengths in direct I/O, for every disk there is
BUFFER_BYTES, NUM_BUFFERS = 8 << 20, 4
Writes = Literal["direct", "buffered"]


class _Full(NamedTuple):
    buffer: np.ndarray
    num_bytes: int
    offset: int


class HashingSink:
    """A write-only binary file for pyarrow, with the digests of the whole and of the message being
    written.

    Raises:
        OSError: from `write` or at the end of the block, when the disk refused bytes handed over
            earlier.
    """

    closed = False  # pyarrow asks

    def __init__(self, path: Path, *, writes: Writes = "direct") -> None:
        self.fd = open_new(path, writes)
        self.num_bytes, self._message_start, self._handed_over = 0, 0, 0
        self._whole, self._message = xxhash.xxh3_128(), xxhash.xxh3_64()
        self._free, self._full = queue.SimpleQueue[np.ndarray](), queue.SimpleQueue[_Full | None]()
        for _ in range(NUM_BUFFERS):
            self._free.put(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8))
        self._current, self._used = self._free.get(), 0
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._write_behind, name="sink", daemon=True)
        self._thread.start()

    def start_message(self, start: int) -> None:
        """The next message begins at byte `start`, which may lie ahead: pyarrow writes the
        file's header with the first one.
        """
        self._message.reset()
        self._message_start = start

    def message_digest(self) -> int:
        return self._message.intdigest()

    def digest(self) -> str:
        """xxh3_128 of all bytes so far, as 32 hex digits."""
        return self._whole.hexdigest()

    def write(self, data: Any) -> int:
        array = np.frombuffer(data, dtype=np.uint8)
        self._whole.update(array.data)
        self._message.update(array[max(0, self._message_start - self.num_bytes) :].data)
        self.num_bytes += len(array)
        taken = 0
        while taken < len(array):
            count = min(len(array) - taken, BUFFER_BYTES - self._used)
            self._current[self._used : self._used + count] = array[taken : taken + count]
            taken, self._used = taken + count, self._used + count
            if self._used == BUFFER_BYTES:
                self._hand_over(BUFFER_BYTES)
                self._current, self._used = self._free.get(), 0
        return len(array)

    def flush(self) -> None:
        """Nothing to do: pyarrow flushes after every message, and bytes go to the disk when a
        buffer is full.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._used:
                # what is too much is cut off below
                self._hand_over(-(-self._used // ALIGNMENT) * ALIGNMENT)
            self._full.put(None)
            self._thread.join()
            if kind is None and self._failure is not None:
                raise self._failure
            os.ftruncate(self.fd, self.num_bytes)
        finally:
            os.close(self.fd)

    def _hand_over(self, num_bytes: int) -> None:
        if self._failure is not None:
            raise self._failure
        self._full.put(_Full(self._current, num_bytes, self._handed_over))
        self._handed_over += num_bytes

    def _write_behind(self) -> None:
        while (full := self._full.get()) is not None:
            try:
                if self._failure is None:
                    write_all(self.fd, full.buffer.data[: full.num_bytes], full.offset)
            except OSError as error:
                self._failure = error
            self._free.put(full.buffer)


def open_new(path: Path, writes: Writes) -> int:
    """A descriptor of a new file; `direct` goes through the page cache all the same where the
    file system has no other way.
    """
    flags = os.O_CREAT | os.O_RDWR | os.O_TRUNC
    try:
        return os.open(
            path, flags | (getattr(os, "O_DIRECT", 0) if writes == "direct" else 0), 0o644
        )
    except OSError:
        return os.open(path, flags, 0o644)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
