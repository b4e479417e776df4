"""Whole remote objects, a block at a time and a few ahead: to be hashed, or copied to a file."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import xxhash

from deepspec.storage.store import Buffer

BLOCK_BYTES, BLOCKS_AHEAD = 8 << 20, 4


def read_blocks(read_range: Callable[[int, int], Buffer], num_bytes: int) -> Iterator[Buffer]:
    """The object's bytes in order, `BLOCKS_AHEAD` ranged reads in flight."""
    waiting = deque[Future[Buffer]]()
    with ThreadPoolExecutor(BLOCKS_AHEAD) as pool:
        for start in range(0, num_bytes, BLOCK_BYTES):
            waiting.append(pool.submit(read_range, start, min(start + BLOCK_BYTES, num_bytes)))
            if len(waiting) > BLOCKS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def hash_blocks(blocks: Iterable[Buffer], copy: BinaryIO | None = None) -> str:
    """xxh3_128 of the blocks as 32 hex digits; they are on the disk afterwards, too, in `copy`."""
    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block)
        if copy is not None:
            copy.write(block)
    if copy is not None:
        copy.flush()
        os.fsync(copy.fileno())
    return digest.hexdigest()
