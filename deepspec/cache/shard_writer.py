"""Writing a shard of the hidden-state cache, one message a sample, hashed on the way."""

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import xxhash
from typing_extensions import Buffer, override

from deepspec.cache.format import HiddenSample, Layout, column_checksums
from deepspec.cache.index import encode_rows

MAGIC_BYTES = 8  # "ARROW1" and two bytes of padding stand before the schema message


class EncodedSample(NamedTuple):
    """A sample as it will be written, and the part of its index row that is known before."""

    batch: pa.RecordBatch
    row: dict[str, Any]


class WrittenShard(NamedTuple):
    """What the record of a shard needs of it."""

    checksum: str  # xxh3_128 of the file
    index_rows: bytes


class HashedFile(io.FileIO):
    """A new file that hashes what is written: all of it, and the current message."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.num_bytes = 0
        self._message_start = 0
        self._whole, self._message = xxhash.xxh3_128(), xxhash.xxh3_64()

    def start_message(self, start: int) -> None:
        """The next message begins at byte `start`.

        That may lie ahead: pyarrow writes the file's header with the first message.
        """
        self._message.reset()
        self._message_start = start

    def message_digest(self) -> int:
        """xxh3_64 of the bytes since the last `start_message`."""
        return self._message.intdigest()

    def digest(self) -> str:
        """xxh3_128 of all bytes so far, as 32 hex digits."""
        return self._whole.hexdigest()

    @override
    def write(self, data: Buffer) -> int:
        """Write all of `data`, however many calls of the system that takes."""
        left = memoryview(data)
        num_bytes = len(left)
        self._whole.update(left)
        self._message.update(left[max(0, self._message_start - self.num_bytes) :])
        self.num_bytes += num_bytes
        while left:
            left = left[super().write(left) :]
        return num_bytes


class ShardWriter:
    """Writes samples one after the other; `finish` closes the file. Used as a block.

    `encode` may run in several threads at once (entropy coding is slower than a disk), `write` in
    one.
    """

    def __init__(self, path: Path, layout: Layout, shard: int) -> None:
        self.layout, self.shard = layout, shard
        self.rows: list[dict[str, Any]] = []
        self.file = HashedFile(path)
        self._writer = pa.ipc.new_file(pa.PythonFile(self.file, mode="w"), layout.schema)
        # pyarrow writes the schema with the first batch, so the file does not show the first offset
        # yet.
        self._offset = MAGIC_BYTES + len(layout.schema.serialize())

    def encode(self, sample: HiddenSample, *, held_out: int) -> EncodedSample:
        """The sample as `write` takes it."""
        batch = self.layout.encode(sample)
        row = {
            "sample_id": sample.sample_id,
            "shard": self.shard,
            "num_tokens": len(sample.input_ids),
            "num_supervised": int(sample.loss_mask.sum()),
            "num_last": int(sample.last_spans[:, 1].sum()),
            "held_out": held_out,
            "column_checksums": column_checksums(batch),
        }
        return EncodedSample(batch, row)

    def write(self, encoded: EncodedSample) -> None:
        """Write a sample as the next row of the shard."""
        self.file.start_message(self._offset)
        self._writer.write_batch(encoded.batch)
        end = self.file.num_bytes
        self.rows.append(
            {
                **encoded.row,
                "row": len(self.rows),
                "offset": self._offset,
                "num_bytes": end - self._offset,
                "checksum": self.file.message_digest(),
            }
        )
        self._offset = end

    def finish(self) -> WrittenShard:
        """Write the footer and close the file; `publish` brings it to the disk."""
        self._writer.close()
        self.file.close()
        return WrittenShard(self.file.digest(), encode_rows(self.rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


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
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], None], *, num_bytes: int) -> None:
        """Run the job after all earlier ones; returns once there is room for its bytes."""
        began = time.monotonic()
        with self._room:
            self._room.wait_for(
                lambda: (
                    self._error or not self._waiting or self._waiting + num_bytes <= self.max_bytes
                )
            )
            self.stalled_s += time.monotonic() - began
            if self._error:
                raise self._error
            self._waiting += num_bytes
        future = self._pool.submit(lambda: None if self._error else job())
        future.add_done_callback(lambda done: self._done(done, num_bytes))

    def _done(self, future: Future[None], num_bytes: int) -> None:
        with self._room:
            self._waiting -= num_bytes
            self._error = self._error or future.exception()
            self._room.notify()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None and self._error:
            raise self._error
