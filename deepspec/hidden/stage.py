"""The hidden stage: answers run through the target once, its hidden states written as Arrow shards.

The target's next forward pass runs while the last one's states are brought to the host, encoded,
hashed and written, and the shard before is committed. ExpectedRows are written in the order they are
computed (by length, so that a batch wastes little), a row's shard and place being in the index.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage, open_sharded, seal_if_whole
from deepspec.artifacts.records import Counts, Record
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Work, work_through
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import EncodedTensor, HiddenSample, Layout
from deepspec.cache.index import INDEX, write_index
from deepspec.cache.shard_writer import Background, EncodedSample, ShardWriter
from deepspec.config.run import RunConfig
from deepspec.hidden.checks import StateChecks, kept_positions
from deepspec.hidden.expected_index import kept_spans, write_expected_index
from deepspec.hidden.metadata import (
    check_scales,
    lacks_metadata,
    metadata_files,
    scales_checksum,
    write_metadata,
)
from deepspec.hidden.sequences import CaptureRow, capture_rows, token_batches
from deepspec.process.events import Report, silent
from deepspec.target.chat import Chat, load_chat, target_folder
from deepspec.target.generate import pad_right
from deepspec.target.loading import load_target
from deepspec.target.model import Target, TargetOutput

log = logging.getLogger(__name__)


def run_capture(
    run: Run,
    *,
    shards: Sequence[int] | None = None,
    purpose: Literal["cache", "rolling", "index"] = "cache",
    report: Report = silent,
) -> Artifact:
    """Capture the missing shards (all, or of those asked for), and seal when none is missing.

    Shards for a `rolling` training are used up by it: all of them need not fit, and what is there
    is never sealed. Only which samples there are is an `index`, which trainings without a cache
    need first.
    """
    config = run.config
    stage = open_sharded(run, "hidden", shards)
    if purpose == "index":
        write_expected_index(config, stage, load_chat(run), shards=shards)
        return stage.artifact
    if stage.todo or lacks_metadata(config, stage.artifact):
        chat = load_chat(run)
        target = load_target(
            config.target,
            folder=target_folder(run),
            device=config.resources.devices.type,
            attention="fastest",
        )
        layout = write_metadata(config, stage, chat, target, report)
        work_through(
            run,
            stage.artifact,
            stage.todo,
            Capture(config, stage, chat, target, layout).shard,
            report,
        )

    def finish(records: list[Record]) -> None:
        check_scales(stage.artifact, scales_checksum(config, stage.artifact), records)
        write_index(stage.artifact, records)

    if purpose == "cache":
        seal_if_whole(run, "hidden", files=(*metadata_files(config), INDEX), before=finish)
    return stage.artifact


class Capture:
    """The target, loaded once for all shards of a lane, and the way its states are stored."""

    def __init__(
        self, config: RunConfig, stage: ShardedStage, chat: Chat, target: Target, layout: Layout
    ) -> None:
        self.config, self.stage, self.chat, self.target, self.layout = (
            config,
            stage,
            chat,
            target,
            layout,
        )
        self.host, self.scales_checksum = (
            HostCopy(target.device),
            scales_checksum(config, stage.artifact),
        )
        self.checks = StateChecks(target, config.resources.checks)

    def shard(self, work: Work, local: Path) -> Counts:
        """Write one shard.

        Raises:
            DamagedData: the states are not what they should be; the file holds what there is of
                them.
        """
        resources = self.config.resources
        answers = read_table(self.stage.upstream.fetch_shard(work.upstream)).to_pylist()
        rows, left_out = capture_rows(answers, self.chat, self.config.hidden)
        self.checks.begin(len(rows))
        with ShardWriter(local, self.layout, work.shard) as writer:
            # Several samples are encoded at a time, and written in their order; the bytes that wait
            # at either place are counted.
            with (
                ThreadPoolExecutor(resources.devices.encode_threads) as encoders,
                Background(resources.memory.write_buffer_mb * 1_000_000) as background,
            ):
                for row, states in self.states(rows):
                    sample = self.sample(row, states)
                    self.checks.look(row, states, sample)
                    encoded = encoders.submit(self.encoding(writer, sample, held_out=row.held_out))
                    background.submit(partial(_write, writer, encoded), num_bytes=sample.num_bytes)
            written = writer.finish()
        self.checks.settle()
        put_rejects(self.stage.artifact, work.shard, left_out)
        log.info("shard=%d the target waited %.2f s for the disk", work.shard, background.stalled_s)
        tokens, supervised = (
            sum(len(row.input_ids) for row in rows),
            sum(sum(row.loss_mask) for row in rows),
        )
        return Counts(
            rows=len(rows),
            tokens=tokens,
            rejected=len(left_out),
            extra={"supervised": supervised},
            checksum=written.checksum,
            index_rows=written.index_rows,
            scales_checksum=self.scales_checksum,
        )

    def encoding(
        self, writer: ShardWriter, sample: HiddenSample, *, held_out: bool
    ) -> Callable[[], EncodedSample]:
        """The job that brings a sample to the host and encodes it."""
        ready = self.host.ready()

        def encode() -> EncodedSample:
            context, last_hidden = (
                self.host.bring(stored, ready) for stored in (sample.context, sample.last_hidden)
            )
            return writer.encode(
                sample._replace(context=context, last_hidden=last_hidden), held_out=int(held_out)
            )

        return encode

    def states(self, rows: Sequence[CaptureRow]) -> Iterator[tuple[CaptureRow, TargetOutput]]:
        """Each row with its own states, [T, m * D] and [T, D]: packed where the attention
        kernel can, else in padded batches.
        """
        for batch in token_batches(rows, self.config.resources.memory.batch_tokens):
            if self.target.packs:
                yield from zip(
                    batch, self.target.forward_packed([row.input_ids for row in batch]), strict=True
                )
                continue
            output = self.target.forward(
                pad_right([row.input_ids for row in batch], self.target.device)
            )
            for index, row in enumerate(batch):
                yield (
                    row,
                    TargetOutput(
                        output.context[index, : len(row.input_ids)],
                        output.last_hidden[index, : len(row.input_ids)],
                    ),
                )

    def sample(self, row: CaptureRow, states: TargetOutput) -> HiddenSample:
        """The row as it will be stored, quantized where the target runs: a GPU then sends half
        the bytes to the host.
        """
        spans = torch.from_numpy(kept_spans(row, self.config.hidden))
        last = states.last_hidden[kept_positions(spans).to(states.last_hidden.device)]
        context, last_hidden = self.layout.context, self.layout.last_hidden
        return HiddenSample(
            sample_id=row.sample_id,
            input_ids=torch.tensor(row.input_ids, dtype=torch.int32),
            loss_mask=torch.tensor(row.loss_mask, dtype=torch.uint8),
            context=EncodedTensor(
                context,
                context.quantize(states.context.bfloat16().unflatten(1, (context.num_layers, -1))),
            ),
            last_hidden=EncodedTensor(last_hidden, last_hidden.quantize(last.bfloat16()[:, None])),
            last_spans=spans,
        )


def _write(writer: ShardWriter, encoded: Future[EncodedSample]) -> None:
    writer.write(encoded.result())


class HostCopy:
    """Brings captured tensors to the host beside the target's forward passes.

    On a GPU the copy has a stream of its own, which waits for the states and not for what was
    started after them, and pinned memory, which PyTorch keeps and uses again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(self) -> torch.cuda.Event | None:
        """A mark behind the work that the caller has started so far."""
        return torch.cuda.current_stream().record_event() if self.stream else None

    def bring(self, stored: EncodedTensor, ready: torch.cuda.Event | None) -> EncodedTensor:
        """`stored` on the host; returns when it is there. Called in the background."""
        if self.stream is None or ready is None:
            return stored
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            parts = tuple(
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(
                    part, non_blocking=True
                )
                for part in stored.parts
            )
        self.stream.synchronize()
        return stored._replace(parts=parts)
