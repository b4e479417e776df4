"""Hidden states computed while training asks for them: the target runs beside the draft, and no
state is ever written.

What training is about to need is rendered by threads, run through the target in batches of
`resources.memory.batch_tokens`, and quantized as capture does it, `resources.memory.prefetch_mb` ahead. Every
rank has a target of its own on its own device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from safetensors.torch import load

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.cache.format import HiddenSample, Layout
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.prefetch import read_ahead
from deepspec.cache.reader import SCALES, SCHEMA, read_schema
from deepspec.cache.source import Source
from deepspec.config.run import RunConfig
from deepspec.hidden.expected_index import (
    POLL_S,
    ExpectedRows,
    await_expected_index,
    read_expected_index,
    unrendered,
    write_expected_index,
)
from deepspec.hidden.metadata import codec_files, lacks_metadata, write_metadata
from deepspec.hidden.rolling_workers import render_in_children
from deepspec.hidden.sequences import CaptureRow, token_batches
from deepspec.hidden.stage import Capture
from deepspec.process.events import Report
from deepspec.target.chat import load_chat, target_folder
from deepspec.target.loading import load_target

log = logging.getLogger(__name__)

ROWS_AHEAD = 256  # rendered and waiting for the target


class OnlineStates(Source):
    """The target and the rows that it is to be run over; used by the thread that reads ahead
    and by the main one.
    """

    def __init__(self, capture: Capture, index: ExpectedIndex, rows: ExpectedRows) -> None:
        self.capture, self.index, self.rows = capture, index, rows
        self.artifact, self.layout = capture.stage.artifact, capture.layout
        self._target_is_free = threading.Lock()  # what it taps is kept in one place

    def __getitem__(self, number: int) -> HiddenSample:
        return self._computed([self.rows[number]])[0]

    def stream(
        self, numbers: Iterable[int], *, max_bytes: int, threads: int
    ) -> Iterator[HiddenSample]:
        rows = read_ahead(
            ((1, partial(self.rows.__getitem__, number)) for number in numbers),
            max_bytes=ROWS_AHEAD,
            threads=threads,
        )
        batches = token_batches(rows, self.capture.config.resources.memory.batch_tokens)
        for samples in read_ahead(
            ((self._num_bytes(batch), partial(self._computed, batch)) for batch in batches),
            max_bytes=max_bytes,
        ):
            yield from samples

    def file(self, name: str) -> Path:
        return self.artifact.store.fetch(self.artifact.path(name))

    def _num_bytes(self, batch: list[CaptureRow]) -> int:
        return sum(self.layout.most_bytes(len(row.input_ids), len(row.input_ids)) for row in batch)

    def _computed(self, batch: list[CaptureRow]) -> list[HiddenSample]:
        with self._target_is_free:
            return [self.capture.sample(row, states) for row, states in self.capture.states(batch)]


def open_online(run: Run, *, is_first: bool, report: Report) -> OnlineStates:
    """The source, once the first process has rendered all answers and written what stands beside
    the shards.

    Raises:
        FidelityTooLow: the codec loses more of this target's states than `resources.checks.fidelity`
            allows.
    """
    stage = open_unsealed(run)
    return compute_online(
        run, stage, shared_index(run, stage, is_first=is_first), is_first=is_first, report=report
    )


def compute_online(
    run: Run, stage: ShardedStage, index: ExpectedIndex, *, is_first: bool, report: Report
) -> OnlineStates:
    """The source over an index that is known, the target loaded; the first process writes what
    stands beside the shards.
    """
    config = run.config
    chat = load_chat(run)
    target = load_target(
        config.target,
        folder=target_folder(run),
        device=config.resources.devices.type,
        attention="fastest",
    )
    if is_first:
        write_metadata(config, stage, chat, target, report)
    await_metadata(config, stage.artifact)
    capture = Capture(config, stage, chat, target, read_layout(config, stage.artifact))
    return OnlineStates(capture, index, ExpectedRows(config, stage, chat, index))


def open_unsealed(run: Run) -> ShardedStage:
    """The hidden artifact, created or compared, of which training makes what it needs by itself."""
    return ShardedStage(run.create("hidden"), run.upstream("hidden"), [])


def shared_index(run: Run, stage: ShardedStage, *, is_first: bool) -> ExpectedIndex:
    """The index of samples, which the first process makes where it is missing and all others
    wait for.
    """
    config = run.config
    if is_first:
        render_in_children(
            run,
            stage.artifact,
            [record.shard for record in unrendered(stage.artifact, stage.upstream.records())],
        )
        write_expected_index(config, stage, load_chat(run))
    await_expected_index(stage)
    return read_expected_index(stage)


def await_metadata(config: RunConfig, artifact: Artifact) -> None:
    """Return when another process has written what stands beside the shards."""
    while lacks_metadata(config, artifact):
        time.sleep(POLL_S)


def read_layout(config: RunConfig, artifact: Artifact) -> Layout:
    """The layout that a capture has written beside its shards; there need be no manifest yet."""
    scales = (
        load(artifact.store.read(artifact.path(SCALES))) if SCALES in codec_files(config) else {}
    )
    return Layout.of(read_schema(artifact.store.read(artifact.path(SCHEMA))), scales)
