"""The hidden stage: answers run through the target once, its hidden states written as Arrow shards.

The target's next forward pass runs while the last one's states are brought to the host, encoded,
hashed and written, and the shard before is committed. Rows are written in the order in which they
are computed (by length, so that a batch wastes little); the index has each row's shard and place.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
from deepspec.cache.format import EncodedTensor, HiddenSample
from deepspec.cache.index import INDEX, write_index
from deepspec.cache.shard_writer import Background, EncodedSample, ShardWriter
from deepspec.config.resources import ResourcesConfig
from deepspec.hidden.capture import Capture
from deepspec.hidden.checks import StateChecks
from deepspec.hidden.expected_index import write_expected_index
from deepspec.hidden.metadata import (
    check_scales,
    lacks_metadata,
    metadata_files,
    scales_checksum,
    write_metadata,
)
from deepspec.hidden.sequences import CaptureRow, capture_rows
from deepspec.process.events import Report, silent
from deepspec.target.chat import Chat, load_chat, target_folder
from deepspec.target.gpu_room import require_room
from deepspec.target.loading import load_target
from deepspec.target.model import Target

log = logging.getLogger(__name__)


def run_capture(
    run: Run,
    *,
    shards: Sequence[int] | None = None,
    purpose: Literal["cache", "rolling", "index"] = "cache",
    report: Report = silent,
) -> Artifact:
    """Capture the missing shards (of `shards`; None: of all), and seal when none is missing.

    Args:
        run: The run.
        shards: Those to work on.
        purpose: `cache` keeps and seals them. A `rolling` training uses them up: all of them need
            not fit, and they are never sealed. `index` only writes down which samples there are,
            which a training without a cache needs first.
        report: Receives the events.
    """
    config, settings = run.config, run.config.hidden
    stage = open_sharded(run, "hidden", shards)
    if purpose == "index":
        write_expected_index(stage, load_chat(run), settings, shards=shards)
        return stage.artifact
    if stage.todo or lacks_metadata(stage.artifact, settings):
        num_gpus = config.resources.devices.gpus_per_lane
        chat, target = load_chat(run), load_capture_target(run, num_gpus=num_gpus)
        layout = write_metadata(config, stage, chat, target, report)
        capture = Capture(target, layout, settings, config.resources.memory.batch_tokens)
        make = ShardCapture(stage, capture, chat, config.resources).shard
        work_through(run, stage.artifact, stage.todo, make, report)

    def finish(records: list[Record]) -> None:
        check_scales(stage.artifact, settings, records)
        write_index(stage.artifact, records)

    if purpose == "cache":
        seal_if_whole(run, "hidden", files=(*metadata_files(settings), INDEX), before=finish)
    return stage.artifact


def load_capture_target(run: Run, *, num_gpus: int) -> Target:
    """The run's target, with the fastest attention: without a cache of keys and values.

    Raises:
        ConfigError: it does not fit, which is known before any weight is read.
    """
    require_room(run, "hidden")
    return load_target(
        run.config.target,
        folder=target_folder(run),
        device=run.config.resources.devices.type,
        num_gpus=num_gpus,
        attention="fastest",
    )


class HostCopy:
    """Copies tensors from a GPU in a stream of its own; on a CPU there is nothing to copy.

    The stream waits for the states and not for what was started after them. PyTorch keeps the
    pinned memory and uses it again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ready(self) -> torch.cuda.Event | None:
        """A mark after the work that the caller has started so far."""
        return torch.cuda.current_stream().record_event() if self.stream else None

    def bring(self, encoded: EncodedTensor, ready: torch.cuda.Event | None) -> EncodedTensor:
        """`encoded` on the host, waited for; called in the background."""
        if self.stream is None or ready is None:
            return encoded
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            parts = tuple(
                torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(
                    part, non_blocking=True
                )
                for part in encoded.parts
            )
        self.stream.synchronize()
        return encoded._replace(parts=parts)


@dataclass
class ShardCapture:
    """Captures one shard after the other, with a target that is loaded once."""

    stage: ShardedStage
    capture: Capture
    chat: Chat
    resources: ResourcesConfig

    def __post_init__(self) -> None:
        self.host = HostCopy(self.capture.target.device)
        self.scales_checksum = scales_checksum(self.stage.artifact, self.capture.settings)
        self.checks = StateChecks(self.capture.target, self.resources.checks)

    def shard(self, work: Work, local: Path) -> Counts:
        """Write one shard.

        Raises:
            DamagedData: the states are not what they should be; the file holds what there is of
                them.
        """
        answers = self.stage.upstream.rows(work.upstream)
        rows, rejects = capture_rows(answers, self.chat, self.capture.settings)
        self.checks.begin(len(rows))
        resources, layout = self.resources, self.capture.layout
        with ShardWriter(local, layout, work.shard) as writer:
            # Several samples are encoded at a time and written in their order; the bytes that wait
            # for either are counted.
            with (
                ThreadPoolExecutor(resources.devices.encode_threads) as encoders,
                Background(resources.memory.write_buffer_mb * 1_000_000) as background,
            ):
                for row, states in self.capture.states(rows):
                    with self.capture.fitting(row):
                        sample = self.capture.sample(row, states)
                        self.checks.add(row, states, sample)
                    encode = partial(self._encode, writer, sample, row, self.host.ready())
                    write = partial(_write, writer, encoders.submit(encode))
                    background.submit(write, num_bytes=sample.num_bytes)
            written = writer.finish()
        self.checks.finish()
        put_rejects(self.stage.artifact, work.shard, rejects)
        log.info("shard=%d the target waited %.2f s for the disk", work.shard, background.stalled_s)
        return Counts(
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in rows),
            rejected=len(rejects),
            counts={"supervised": sum(sum(row.loss_mask) for row in rows)},
            scales_checksum=self.scales_checksum,
            **written._asdict(),
        )

    def _encode(
        self,
        writer: ShardWriter,
        sample: HiddenSample,
        row: CaptureRow,
        ready: torch.cuda.Event | None,
    ) -> EncodedSample:
        """Bring a sample to the host and encode it."""
        context = self.host.bring(sample.context, ready)
        last_hidden = self.host.bring(sample.last_hidden, ready)
        on_host = sample._replace(context=context, last_hidden=last_hidden)
        return writer.encode(on_host, held_out=int(row.held_out))


def _write(writer: ShardWriter, encoded: Future[EncodedSample]) -> None:
    writer.write(encoded.result())
