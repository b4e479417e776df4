"""Writing a shard of the hidden-state cache: one message a sample, its place and checksums
noted as it goes by.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pyarrow as pa

from deepspec.cache.format import HiddenSample, Layout, column_checksums
from deepspec.cache.index import encode_rows
from deepspec.cache.sink import HashingSink, Writes

MAGIC_BYTES = 8  # "ARROW1" and two bytes of padding stand before the schema message


class Encoded(NamedTuple):
    """A sample as it will be written, and its index row as far as that is known before."""

    batch: pa.RecordBatch
    row: dict[str, Any]


class Written(NamedTuple):
    checksum: str  # xxh3_128 of the file
    index_rows: bytes


class ShardWriter:
    """Writes samples one after the other; `finish` closes the file. Used as a block, which leaves
    no thread behind.

    `encode` may run in several threads at once (entropy coding is slower than a disk), `write` in
    one.
    """

    def __init__(
        self, path: Path, layout: Layout, shard: int, *, writes: Writes = "direct"
    ) -> None:
        self.layout, self.shard, self.schema = layout, shard, layout.schema()
        self.rows: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self.sink = self._stack.enter_context(HashingSink(path, writes=writes))
        self._writer = pa.ipc.new_file(pa.PythonFile(self.sink, mode="w"), self.schema)
        # pyarrow writes the schema with the first batch, so the first offset cannot be asked of the
        # sink.
        self._offset = MAGIC_BYTES + len(self.schema.serialize())

    def append(self, sample: HiddenSample, *, held_out: int) -> None:
        self.write(self.encode(sample, held_out=held_out))

    def encode(self, sample: HiddenSample, *, held_out: int) -> Encoded:
        batch = self.layout.encode(sample, self.schema)
        row = {
            "sample_id": sample.sample_id,
            "shard": self.shard,
            "num_tokens": len(sample.input_ids),
            "num_supervised": int(sample.loss_mask.sum()),
            "num_last": int(sample.last_spans[:, 1].sum()),
            "held_out": held_out,
            "column_checksums": column_checksums(batch),
        }
        return Encoded(batch, row)

    def write(self, encoded: Encoded) -> None:
        self.sink.start_message(self._offset)
        self._writer.write_batch(encoded.batch)
        end = self.sink.num_bytes
        place = {
            "row": len(self.rows),
            "offset": self._offset,
            "num_bytes": end - self._offset,
            "checksum": self.sink.message_digest(),
        }
        self.rows.append({**encoded.row, **place})
        self._offset = end

    def finish(self) -> Written:
        self._writer.close()
        self._stack.close()
        return Written(self.sink.digest(), encode_rows(self.rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)


class Background:
    """Runs jobs in order in a thread of its own; the caller waits only while too many bytes wait
    with them.

    Raises:
        Exception: what a job raised, from the next `submit` or at the end of the block; later jobs
            are not run.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.stalled_s = max_bytes, 0.0
        self._waiting, self._room = 0, threading.Condition()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="background")
        self._failed: Future[None] | None = None

    def submit(self, job: Callable[[], None], *, num_bytes: int) -> None:
        began = time.monotonic()
        with self._room:
            self._room.wait_for(
                lambda: (
                    self._failed or not self._waiting or self._waiting + num_bytes <= self.max_bytes
                )
            )
            self.stalled_s += time.monotonic() - began
            self._raise()
            self._waiting += num_bytes
        future = self._pool.submit(lambda: None if self._failed else job())
        future.add_done_callback(lambda done: self._done(done, num_bytes))

    def _done(self, future: Future[None], num_bytes: int) -> None:
        with self._room:
            self._waiting -= num_bytes
            if future.exception() is not None:
                self._failed = self._failed or future
            self._room.notify()

    def _raise(self) -> None:
        if self._failed is not None:
            self._failed.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self._raise()
