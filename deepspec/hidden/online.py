"""Hidden states computed while training reads them: no state is ever written.

What training needs next is rendered by threads, run through the target in batches of
`resources.memory.batch_tokens`, and quantized as capture does it, `resources.memory.prefetch_mb`
ahead. Every rank has a target of its own on its own device, next to the draft.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.cache.format import HiddenSample
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.prefetch import read_ahead
from deepspec.cache.source import Source
from deepspec.config.data import HiddenConfig
from deepspec.hidden.capture import Capture
from deepspec.hidden.expected_index import (
    POLL_S,
    read_expected_index,
    row_reader,
    unrendered,
    write_expected_index,
)
from deepspec.hidden.metadata import lacks_metadata, read_layout, write_metadata
from deepspec.hidden.rolling_workers import render_in_children
from deepspec.hidden.sequences import CaptureRow, token_batches
from deepspec.hidden.stage import load_capture_target
from deepspec.process.events import Report
from deepspec.target.chat import load_chat

ROWS_AHEAD = 256  # rendered and waiting for the target


@dataclass(eq=False)
class OnlineStates(Source):
    """The target, and the rows to run it over; used by the main thread and one that reads ahead."""

    artifact: Artifact
    capture: Capture
    index: ExpectedIndex
    row: Callable[[int], CaptureRow]  # of a number in the index
    computes = True

    def __post_init__(self) -> None:
        self.layout = self.capture.layout
        self._target_lock = threading.Lock()  # the states that it taps are kept in one place

    def __getitem__(self, number: int) -> HiddenSample:
        return self._computed([self.row(number)])[0]

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        """Samples in the order of the numbers, computed ahead."""
        rows = read_ahead(
            ((1, partial(self.row, number)) for number in numbers),
            max_bytes=ROWS_AHEAD,
            threads=threads,
        )
        batches = token_batches(rows, self.capture.batch_tokens)
        jobs = ((self._num_bytes(batch), partial(self._computed, batch)) for batch in batches)
        for samples in read_ahead(jobs, max_bytes=max_bytes):
            yield from samples

    def _num_bytes(self, batch: list[CaptureRow]) -> int:
        lengths = [len(row.input_ids) for row in batch]
        return sum(self.layout.most_bytes(length, length) for length in lengths)

    def _computed(self, batch: list[CaptureRow]) -> list[HiddenSample]:
        with self._target_lock:
            samples = []
            for row, states in self.capture.states(batch):
                with self.capture.fitting(row):
                    samples.append(self.capture.sample(row, states))
            return samples


def open_online(run: Run, *, is_first: bool, report: Report) -> OnlineStates:
    """The source, once the first process has rendered all answers and written the metadata.

    Raises:
        FidelityTooLow: the codec loses more of this target's states than
            `resources.checks.fidelity` allows.
    """
    stage = open_unsealed(run)
    index = shared_index(run, stage, is_first=is_first)
    return compute_online(run, stage, index, is_first=is_first, report=report)


def compute_online(
    run: Run, stage: ShardedStage, index: ExpectedIndex, *, is_first: bool, report: Report
) -> OnlineStates:
    """The source over a known index, the target loaded; the first process writes the metadata."""
    settings, chat = run.config.hidden, load_chat(run)
    target = load_capture_target(run, num_gpus=1)  # the others are of other ranks
    if is_first:
        write_metadata(run.config, stage, chat, target, report)
    await_metadata(stage.artifact, settings)
    layout = read_layout(stage.artifact, settings)
    capture = Capture(target, layout, settings, run.config.resources.memory.batch_tokens)
    num_tables = 2 * run.config.train.window_shards
    row = row_reader(stage.upstream, chat, settings, index, num_tables=num_tables)
    return OnlineStates(stage.artifact, capture, index, row)


def open_unsealed(run: Run) -> ShardedStage:
    """The hidden artifact, created or compared, of which training makes what it needs by itself."""
    return ShardedStage(run.create("hidden"), run.upstream("hidden"), [])


def shared_index(run: Run, stage: ShardedStage, *, is_first: bool) -> ExpectedIndex:
    """The index of samples, which the first process makes and all others wait for."""
    records = stage.upstream.records()
    if is_first:
        render_in_children(run, [record.shard for record in unrendered(stage.artifact, records)])
        write_expected_index(stage, load_chat(run), run.config.hidden)
    while unrendered(stage.artifact, records):  # another process is at it
        time.sleep(POLL_S)
    return read_expected_index(stage)


def await_metadata(artifact: Artifact, settings: HiddenConfig) -> None:
    """Return when another process has written the files of the cache that are not shards."""
    while lacks_metadata(artifact, settings):
        time.sleep(POLL_S)
