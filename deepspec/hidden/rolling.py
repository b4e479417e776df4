"""Hidden states from shards that are captured before training needs them and deleted afterwards.

This is how a rank reads them; the first one also has them captured (`rolling_capture`). A shard is
read as soon as its record exists, and waited for before. Where one is deleted under a reader that
runs ahead of what is on the disk, its file is gone, and the reader waits for it to be captured
again.
"""

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash

from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.cache.format import EncodedTensor, HiddenSample
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.prefetch import read_buffered
from deepspec.cache.source import SampleRange, Source
from deepspec.errors import DamagedData, TransientError
from deepspec.formatting import human_bytes
from deepspec.hidden.metadata import lacks_metadata, read_layout
from deepspec.hidden.online import await_metadata, compute_online, open_unsealed, shared_index
from deepspec.hidden.rolling_capture import RollingCapture
from deepspec.hidden.rolling_shards import CommittedShards, ShardRows
from deepspec.process.events import Report
from deepspec.storage.local import read_into

log = logging.getLogger(__name__)

POLL_S = 0.2  # between two looks for the record of a shard that is waited for


@dataclass(eq=False)
class RollingStates(Source):
    """Shards that come and go, and in memory the samples that are needed again and again."""

    run: Run
    stage: ShardedStage
    index: ExpectedIndex
    kept: Mapping[int, HiddenSample]
    is_first: bool

    def __post_init__(self) -> None:
        self.artifact = self.stage.artifact
        self.layout = read_layout(self.artifact, self.run.config.hidden)
        self._shards = CommittedShards(self.stage, self.index)
        self._closed = threading.Event()
        self._capture: RollingCapture | None = None
        self._progress: Callable[[], object] = bool

    def begin(self, samples: SampleRange) -> None:
        """Begin to capture, on the first rank.

        Raises:
            StoreError: `resources.training.rolling_gb` cannot hold what one step needs, or another
                training uses these shards.
        """
        if self.is_first:
            self._capture = RollingCapture(self.run, self.stage, self.index, self.layout, samples)
            self._capture.start()

    def on_progress(self, progress: Callable[[], object]) -> None:
        """Call `progress` with every shard that is captured, or while one is waited for."""
        self._progress = progress
        if self._capture:
            self._capture.progress = progress

    def release(self, place: int) -> None:
        """Note that no rank needs a sample before this place of the line any more."""
        if self._capture:
            self._capture.release(place)

    def close(self) -> None:
        """End capture; threads that wait for a shard get an error."""
        self._closed.set()
        if self._capture:
            self._capture.close()

    def __getitem__(self, number: int) -> HiddenSample:
        kept = self.kept.get(number)
        if kept is not None:
            return kept
        return self._read(number, np.empty(self._room(number), dtype=np.uint8))

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        """Samples in the order of the numbers, read ahead."""
        reads = (
            (self._most_bytes(number), self._room(number), partial(self._read, number))
            for number in numbers
        )
        return read_buffered(reads, max_bytes=max_bytes, threads=threads)

    def _most_bytes(self, number: int) -> int:
        num_tokens, num_last = self.index.num_tokens[number], self.index.num_last[number]
        return self.layout.most_bytes(int(num_tokens), int(num_last))

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
                self._shards.forget(shard)
                continue
            if xxhash.xxh3_64_intdigest(message) != int(found.checksum[row]):
                raise DamagedData(
                    f"row {row} of shard {shard} is damaged",
                    where=f"{self.artifact.url}/{found.file}",
                    fix=f"remove records/{shard:05d}.json there",
                )
            return self.layout.decode(message)

    def _message(self, shard: ShardRows, row: int, buffer: np.ndarray) -> memoryview:
        start, num_bytes = int(shard.offset[row]), int(shard.num_bytes[row])
        store, path = self.artifact.store, self.artifact.path(shard.file)
        if not store.is_local:
            return memoryview(store.read_range(path, start, start + num_bytes))
        # Opened for each read: an open file keeps its bytes on the disk after it was deleted.
        opened = os.open(store.path(path), os.O_RDONLY)
        try:
            room = buffer.data[:num_bytes]
            return room[: read_into(opened, room, start)]
        finally:
            os.close(opened)

    def _awaited(self, shard: int) -> ShardRows:
        """The shard, once it is committed.

        Raises:
            DeepSpecError: why it never will be.
            TransientError: the source was closed meanwhile.
        """
        while True:
            found = self._shards.find(shard)
            if found:
                return found
            if self._capture:
                self._capture.check()
            else:  # the first rank notices when no more shards come
                self._progress()
            if self._closed.wait(POLL_S):
                raise TransientError(
                    f"training ended while shard {shard} was waited for", where=self.artifact.url
                )


def open_rolling(
    run: Run, *, share: Callable[[ExpectedIndex], Sequence[int]], is_first: bool, report: Report
) -> RollingStates:
    """The source; the target is loaded only until this rank's held-out samples are in memory.

    Args:
        run: The run.
        share: Gives the numbers of the held-out samples that this rank measures drafts on.
        is_first: Whether this is the process that writes and captures for all.
        report: Receives the events.

    Raises:
        FidelityTooLow: the codec loses more of this target's states than
            `resources.checks.fidelity` allows.
    """
    resources, stage = run.config.resources, open_unsealed(run)
    index = shared_index(run, stage, is_first=is_first)
    numbers, kept = share(index), {}
    if numbers or (is_first and lacks_metadata(stage.artifact, run.config.hidden)):
        samples = compute_online(run, stage, index, is_first=is_first, report=report).stream(
            iter(numbers),
            max_bytes=resources.memory.prefetch_mb * 1_000_000,
            threads=resources.devices.read_threads,
        )
        kept = {number: _on_host(sample) for number, sample in zip(numbers, samples, strict=True)}
        del samples
        gc.collect()  # the hooks that tap a target refer to it, and it to its model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        size = human_bytes(sum(each.num_bytes for each in kept.values()))
        log.info("stage=train kept %d held-out samples in memory (%s)", len(kept), size)
    await_metadata(stage.artifact, run.config.hidden)
    return RollingStates(run, stage, index, kept=kept, is_first=is_first)


def _on_host(sample: HiddenSample) -> HiddenSample:
    """The sample in memory of its own: its tensors are parts of a whole batch's."""
    context, last_hidden = (
        EncodedTensor(each.codec, tuple(part.to("cpu", copy=True) for part in each.parts))
        for each in (sample.context, sample.last_hidden)
    )
    return sample._replace(context=context, last_hidden=last_hidden)
