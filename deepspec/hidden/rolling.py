"""Hidden states from shards that are captured ahead of training and deleted behind it
(`feeder.py`), as a rank reads them.

A shard is read as soon as its record exists, and waited for before. Where one is deleted under a
reader that runs ahead of what is on the disk, its file is gone, and the reader waits for it to be
captured again.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record, index_file
from deepspec.artifacts.run import Run
from deepspec.cache.format import EncodedTensor, HiddenSample, Layout
from deepspec.cache.index import ExpectedIndex, column_values, read_index_rows
from deepspec.cache.prefetch import read_buffered
from deepspec.cache.source import SampleRange, Source
from deepspec.errors import ArtifactMismatch, DamagedData, TransientError
from deepspec.formatting import human_bytes
from deepspec.hidden.expected_index import FOLDER
from deepspec.hidden.metadata import lacks_metadata
from deepspec.hidden.online import (
    await_metadata,
    compute_online,
    open_unsealed,
    read_layout,
    shared_index,
)
from deepspec.hidden.rolling_capture import RollingCapture
from deepspec.process.events import Report
from deepspec.storage.local import read_into

log = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks for the record of a shard that is waited for


class _Shard(NamedTuple):
    """Where the rows of a committed shard lie."""

    file: str
    offset: np.ndarray
    num_bytes: np.ndarray
    checksum: np.ndarray


class RollingStates(Source):
    """Shards that come and go; `kept` are samples that are needed again and again, in memory."""

    def __init__(
        self,
        run: Run,
        stage: ShardedStage,
        index: ExpectedIndex,
        layout: Layout,
        kept: Mapping[int, HiddenSample],
    ) -> None:
        self.run, self.stage, self.artifact = run, stage, stage.artifact
        self.index, self.layout, self.schema = index, layout, layout.schema()
        self._kept, self._answers = kept, stage.upstream.records()
        self._shards: dict[int, _Shard] = {}
        self._looking, self._closed = threading.Lock(), threading.Event()
        self._feeder: RollingCapture | None = None
        self._progress: Callable[[], object] = bool

    def on_progress(self, progress: Callable[[], object]) -> None:
        self._progress = progress
        if self._feeder:
            self._feeder.progress = progress

    def __getitem__(self, number: int) -> HiddenSample:
        kept = self._kept.get(number)
        return (
            self._read(number, np.empty(self._room(number), dtype=np.uint8))
            if kept is None
            else kept
        )

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        reads = (
            (self._most_bytes(number), self._room(number), partial(self._read, number))
            for number in numbers
        )
        return read_buffered(reads, max_bytes=max_bytes, threads=threads)

    def file(self, name: str) -> Path:
        return self.artifact.store.fetch(self.artifact.path(name))

    def release(self, place: int) -> None:
        if self._feeder:
            self._feeder.release(place)

    def close(self) -> None:
        self._closed.set()
        if self._feeder:
            self._feeder.close()

    def _most_bytes(self, number: int) -> int:
        return self.layout.most_bytes(
            int(self.index.num_tokens[number]), int(self.index.num_last[number])
        )

    def _room(self, number: int) -> int:
        return self._most_bytes(number) if self.artifact.store.is_local else 0

    def _read(self, number: int, buffer: np.ndarray) -> HiddenSample:
        """Sample `number`, once its shard is there; its tensors share the memory of `buffer`.

        Raises:
            DamagedData: the bytes are not those that were committed.
        """
        shard, row = int(self.index.shard[number]), int(self.index.row[number])
        while True:
            found = self._awaited(shard)
            try:
                message = self._message(found, row, buffer)
            except FileNotFoundError:  # used up, and not captured again yet
                self._shards.pop(shard, None)
                continue
            if xxhash.xxh3_64_intdigest(message) != int(found.checksum[row]):
                what = f"row {row} of shard {shard} is damaged"
                raise DamagedData(
                    what,
                    where=f"{self.artifact.url}/{found.file}",
                    fix=f"remove records/{shard:05d}.json there",
                )
            return self.layout.decode(message, self.schema)

    def _message(self, shard: _Shard, row: int, buffer: np.ndarray) -> memoryview:
        offset, num_bytes, store = (
            int(shard.offset[row]),
            int(shard.num_bytes[row]),
            self.artifact.store,
        )
        if not store.is_local:
            return memoryview(
                store.read_range(self.artifact.path(shard.file), offset, offset + num_bytes)
            )
        # Opened for each read: a file that is held open keeps its bytes on the disk after it was
        # deleted.
        opened = os.open(store.path(self.artifact.path(shard.file)), os.O_RDONLY)
        try:
            room = buffer.data[:num_bytes]
            return room[: read_into(opened, room, offset)]
        finally:
            os.close(opened)

    def _awaited(self, shard: int) -> _Shard:
        """The shard, once it is committed.

        Raises:
            DeepSpecError: why it never will be.
            TransientError: the source was closed meanwhile.
        """
        while True:
            with self._looking:  # one look serves all threads that wait for the same shard
                found = self._shards.get(shard) or self._look(shard)
            if found:
                return found
            if self._feeder:
                self._feeder.check()
            else:  # the first rank, which has them captured, notices when no more of them come
                self._progress()
            if self._closed.wait(POLL_S):
                raise TransientError(
                    f"training ended while shard {shard} was waited for", where=self.artifact.url
                )

    def _look(self, shard: int) -> _Shard | None:
        record = self.artifact.record(shard)
        if record is None or record.upstream != self._answers[shard].checksum:
            return None
        (data,) = self.artifact.store.read_many([self.artifact.path(index_file(record))])
        # being deleted
        if data is None or xxhash.xxh3_128_hexdigest(data) != record.index_checksum:
            return None
        self._shards[shard] = found = self._compared(record, data)
        return found

    def _compared(self, record: Record, data: bytes) -> _Shard:
        """The shard's rows, which must be those that were planned: training takes a sample by
        its number.
        """
        batch = read_index_rows(data).combine_chunks().to_batches()[0]
        start, end = np.searchsorted(self.index.shard, [record.shard, record.shard + 1])
        for name in ("sample_id", "num_tokens", "num_supervised", "held_out"):
            if not np.array_equal(column_values(batch, name), getattr(self.index, name)[start:end]):
                what = f"shard {record.shard} holds other samples than were planned ({name})"
                raise ArtifactMismatch(
                    what,
                    where=self.artifact.url,
                    fix=f"remove the folder {FOLDER!r} there: it is made again",
                )
        return _Shard(
            record.file,
            *(column_values(batch, name) for name in ("offset", "num_bytes", "checksum")),
        )


class FedStates(RollingStates):
    """The first rank's: what all ranks read is captured and deleted from here."""

    def begin(self, course: SampleRange) -> None:
        """Begin to capture.

        Raises:
            StoreError: `resources.training.rolling_gb` cannot hold what one step needs, or another training
                uses these shards.
        """
        self._feeder = RollingCapture(self.run, self.stage, self.index, self.layout, course)
        self._feeder.start()


def open_rolling(
    run: Run, *, share: Callable[[ExpectedIndex], Sequence[int]], is_first: bool, report: Report
) -> RollingStates:
    """The source; the target is loaded only until this rank's `share` of held-out samples is in
    memory.

    Raises:
        FidelityTooLow: the codec loses more of this target's states than `resources.checks.fidelity`
            allows.
    """
    config = run.config
    stage = open_unsealed(run)
    index = shared_index(run, stage, is_first=is_first)
    numbers, kept = share(index), dict[int, HiddenSample]()
    if numbers or (is_first and lacks_metadata(config, stage.artifact)):
        online = compute_online(run, stage, index, is_first=is_first, report=report)
        samples = online.stream(
            iter(numbers),
            max_bytes=config.resources.memory.prefetch_mb * 1_000_000,
            threads=config.resources.devices.read_threads,
        )
        kept = {number: _on_host(sample) for number, sample in zip(numbers, samples, strict=True)}
        del online, samples
        gc.collect()  # the hooks that tap a target refer to it, and it to its model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.info(
            "stage=train kept %d held-out samples in memory (%s)",
            len(kept),
            human_bytes(sum(each.num_bytes for each in kept.values())),
        )
    await_metadata(config, stage.artifact)
    kind = FedStates if is_first else RollingStates
    return kind(run, stage, index, read_layout(config, stage.artifact), kept)


def _on_host(sample: HiddenSample) -> HiddenSample:
    """The sample in memory of its own: its tensors are parts of a whole batch's."""
    context, last = (
        EncodedTensor(stored.codec, tuple(part.to("cpu", copy=True) for part in stored.parts))
        for stored in (sample.context, sample.last_hidden)
    )
    return sample._replace(context=context, last_hidden=last)
