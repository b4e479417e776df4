"""Keeps on the disk what training needs next, and no more than `resources.training.rolling_gb`: captures
ahead of it, deletes behind it.

Which shards these are follows from the order of training and the place that it has reached: of the
windows from that place on, as many shards as fit. All others are deleted, those of them that are
missing are captured. So a start after a crash, or with shards that somebody else left, needs no
rule of its own.

When is a shard behind? `reached(place)` is called by the first rank when it begins a step. What
ended the step before was a sum over all ranks, so each of them has had every sample of it in a
batch on its device; no thread reads them any more. Threads that read ahead are at later places. The
shard may come again at one of those, but only a shard that is kept for it is sure to be there: a
reader that is further ahead finds the file gone (or unlinked while it reads, which does no harm),
and waits until it is captured again. Deleting removes the record first, so that what is left of a
crash is no shard, but a file that no record names; the next start takes it away.
"""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import transient_system_errors
from deepspec.cache.format import Layout
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.source import SampleRange
from deepspec.errors import ChildFailed, DeepSpecError, StoreError
from deepspec.formatting import human_bytes
from deepspec.hidden.rolling_shards import RollingShards
from deepspec.hidden.rolling_workers import CaptureWorker, worker_gpus
from deepspec.process.launch import Scope, scope
from deepspec.process.shard_ranges import deal, shard_list

log = logging.getLogger(__name__)

# beyond its samples: the schema twice and the list of messages
SHARD_BYTES = 1 << 16


class RollingCapture:
    """A thread that captures and deletes, and one for each lane that is at work."""

    def __init__(
        self,
        run: Run,
        stage: ShardedStage,
        index: ExpectedIndex,
        layout: Layout,
        course: SampleRange,
    ) -> None:
        config = run.config
        self.config, self.shelf, self.course = config, RollingShards(stage), course
        self.max_bytes = round(config.resources.training.rolling_gb * 1e9)
        self.most_bytes = shard_bytes(index, layout)
        self._news = threading.Condition()
        self._place, self._window_end, self._moved = course.start, 0, True
        self._in_capture: set[int] = set()
        self._idle = [
            CaptureWorker(run, stage.artifact, gpu, number=number)
            for number, gpu in enumerate(worker_gpus(config))
        ]
        self._ended, self._error = threading.Event(), list[DeepSpecError]()
        self._children: Scope | None = None
        self.progress: Callable[[], object] = bool  # called with every shard that is there
        self._threads = [threading.Thread(target=self._run, name="feeder", daemon=True)]

    def start(self) -> None:
        """Take what is there, and begin.

        Raises:
            StoreError: the windows of one step do not fit into `resources.training.rolling_gb`, or another
                training uses these shards.
        """
        self._require_room()
        self.shelf.open()
        self._threads[0].start()

    def release(self, place: int) -> None:
        """Training needs nothing before this place of the line any more.

        Raises:
            DeepSpecError: capture has failed for good.
        """
        self.check()
        with self._news:
            self._place = place
            if place >= self._window_end:
                self._moved = True
                self._news.notify()

    def check(self) -> None:
        """Raise the error for which nothing will be captured any more."""
        if self._error:
            raise self._error[0]
        if not (self._threads[0].is_alive() or self._ended.is_set() or self.shelf.is_sealed()):
            raise ChildFailed(
                "the thread that has shards captured has ended; why is in the log",
                where=self.shelf.artifact.url,
            )

    def close(self) -> None:
        """End all lanes; returns when nothing of them runs."""
        self._ended.set()
        with self._news:
            self._news.notify()
        if self._children:
            self._children.close()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        if self._place >= self.course.end and not self.shelf.is_sealed():
            for shard in list(self.shelf.sizes):
                self.shelf.delete(shard)
        self.shelf.close()

    def near(self, place: int) -> dict[int, None]:
        """The shards that are to be on the disk when training is at `place`, in the order in
        which it needs them.
        """
        found, total = dict[int, None](), 0
        if place >= self.course.end:  # which may lie within a window
            return found
        for window in takewhile(
            lambda window: window.start < self.course.end, self.course.order.windows(place)
        ):
            for shard in window.shards:
                if shard in found:
                    continue
                total += self.shelf.sizes.get(shard, self.most_bytes[shard])
                if total > self.max_bytes:
                    return found
                found[shard] = None
        return found

    def _run(self) -> None:
        try:
            with (
                transient_system_errors("the shards that training uses up"),
                scope(self.config.resources.runner.stop_s) as self._children,
            ):
                while not self._ended.is_set() and not self._error and not self.shelf.is_sealed():
                    self._turn()
                while not self._ended.is_set() and any(
                    thread.is_alive() for thread in self._threads[1:]
                ):
                    self._ended.wait(1.0)  # leaving the scope would end what they still capture
        except DeepSpecError as error:
            self._error.append(error)

    def _turn(self) -> None:
        """Delete what is not needed soon, start what is and is missing, and wait until
        something happens.
        """
        with self._news:
            self._moved, self._window_end = False, next(self.course.order.windows(self._place)).end
            near = self.near(self._place)
            gone = [shard for shard in self.shelf.sizes if shard not in near]
        for shard in gone:
            self.shelf.delete(shard)
        with self._news:
            missing = [
                shard
                for shard in near
                if shard not in self.shelf.sizes and shard not in self._in_capture
            ]
            # A shard that was captured but not heard of, and passed already, is still on the disk.
            if missing and self._idle and not self._in_capture - near.keys():
                size = min(
                    self.config.resources.runner.shards_per_task,
                    -(-len(missing) // len(self._idle)),
                )
                for group in deal(missing, size)[: len(self._idle)]:
                    self._begin(self._idle.pop(), group)
            self._news.wait_for(lambda: self._moved or self._ended.is_set())

    def _begin(self, lane: CaptureWorker, group: Sequence[int]) -> None:
        self._in_capture |= set(group)
        log.info("stage=train capturing shards=%s", shard_list(group))
        context = contextvars.copy_context()  # that of the scope, which ends the child
        thread = threading.Thread(
            target=context.run, args=(self._capture, lane, group), name="capture lane", daemon=True
        )
        self._threads = [
            self._threads[0],
            *(each for each in self._threads[1:] if each.is_alive()),
            thread,
        ]
        thread.start()

    def _capture(self, lane: CaptureWorker, group: Sequence[int]) -> None:
        try:
            with transient_system_errors(f"capture of shards {shard_list(group)}"):
                lane.capture(
                    lambda: [shard for shard in group if shard in self._in_capture],
                    self._heard,
                    self._ended,
                )
                self._committed([shard for shard in group if shard in self._in_capture])
        except DeepSpecError as error:
            self._error.append(error)
        finally:
            with self._news:
                self._in_capture -= set(group)
                self._idle.append(lane)
                self._moved = True
                self._news.notify()

    def _heard(self, event: dict[str, Any]) -> None:
        if event["event"] == "shard":
            self._committed([event["shard"]])

    def _committed(self, shards: Sequence[int]) -> None:
        with self._news:
            lost = self.shelf.add(shards)
            self._in_capture -= set(shards)
            self._moved = True
            self._news.notify()
        self.progress()
        if lost:
            raise ChildFailed(
                f"capture ended well and left no record of shards {shard_list(lost)}",
                where=self.shelf.artifact.url,
            )

    def _require_room(self) -> None:
        """Raise StoreError unless the windows that any one step touches fit together."""
        step, end = self.course.step_samples, self.course.end
        most = 0
        for window in takewhile(
            lambda window: window.start < end, self.course.order.windows(self.course.start)
        ):
            step_end = min(end, -(-window.end // step) * step)
            together = [
                other
                for other in takewhile(
                    lambda other: other.start < end, self.course.order.windows(window.start)
                )
                if other.start < step_end
            ]
            most = max(
                most,
                sum(
                    self.most_bytes[shard]
                    for shard in {shard for each in together for shard in each.shards}
                ),
            )
        if most > self.max_bytes:
            train, rows = self.config.train, self.config.prompts.shard_rows
            what = f"a step at the border of two windows needs {human_bytes(most)} of hidden states, resources.training.rolling_gb holds "
            what += f"{human_bytes(self.max_bytes)} (train.window_shards {train.window_shards}, prompts.shard_rows {rows})"
            fix = f"set resources.training.rolling_gb to {most / 1e9:.3g} or more, lower train.window_shards, or use resources.training.source=online"
            raise StoreError(what, where="resources.training.rolling_gb", fix=fix)


def shard_bytes(index: ExpectedIndex, layout: Layout) -> dict[int, int]:
    """Bytes that each shard takes at most, with its index rows."""
    sizes = layout.most_bytes(index.num_tokens.astype(np.int64), index.num_last.astype(np.int64))
    totals = np.bincount(index.shard, weights=sizes)
    return {shard: int(totals[shard]) + SHARD_BYTES for shard in np.unique(index.shard).tolist()}
