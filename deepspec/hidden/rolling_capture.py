"""Keeps on the disk what training needs next (`RollingPlan`): captures it, deletes what was used.

When is a shard used up? `release(place)` is called by the first rank when it begins a step. What
ended the step before was a sum over all ranks, so each of them has had every sample of it in a
batch on its device; no thread reads them any more. Threads that read ahead are at later places. The
shard may come again at one of those, but only a shard that is kept for it is sure to be there: a
reader that is further ahead finds the file gone (or unlinked while it reads, which does no harm),
and waits until it is captured again.
"""

import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.run import Run
from deepspec.artifacts.system_errors import transient_system_errors
from deepspec.cache.format import Layout
from deepspec.cache.index import ExpectedIndex
from deepspec.cache.source import SampleRange
from deepspec.errors import ChildFailed, DeepSpecError, StoreError
from deepspec.formatting import human_bytes
from deepspec.hidden.rolling_shards import RollingPlan, RollingShards, shard_bytes
from deepspec.hidden.rolling_workers import CaptureWorker, make_workers
from deepspec.process.scopes import Scope, scope
from deepspec.process.shard_ranges import deal, shard_list

log = logging.getLogger(__name__)

_is_alive = threading.Thread.is_alive


class RollingCapture:
    """A thread that captures and deletes, and one for each worker that is at work."""

    def __init__(
        self,
        run: Run,
        stage: ShardedStage,
        index: ExpectedIndex,
        layout: Layout,
        samples: SampleRange,
    ) -> None:
        self.run = run
        self.shards = RollingShards(stage)
        max_bytes = round(run.config.resources.training.rolling_gb * 1e9)
        self.plan = RollingPlan(samples, shard_bytes(index, layout), max_bytes)
        self.progress: Callable[[], object] = bool  # called with every shard that is there
        self._lock = threading.Lock()  # of the four below
        self._place = samples.start
        self._window_end = 0
        self._in_capture: set[int] = set()
        self._idle = make_workers(run)
        self._news, self._ended = threading.Event(), threading.Event()
        self._errors = list[DeepSpecError]()
        self._children: Scope | None = None
        self._main = threading.Thread(target=self._run, name="rolling capture", daemon=True)
        self._workers = list[threading.Thread]()

    def start(self) -> None:
        """Take stock of the shards that are there, and begin.

        Raises:
            StoreError: the windows of one step do not fit into `resources.training.rolling_gb`, or
                another training uses these shards.
        """
        most, config = self.plan.most_bytes_of_a_step(), self.run.config
        if most > self.plan.max_bytes:
            raise StoreError(
                f"a step at the border of two windows needs {human_bytes(most)} of hidden states, "
                f"resources.training.rolling_gb holds {human_bytes(self.plan.max_bytes)} "
                f"(train.window_shards {config.train.window_shards}, "
                f"prompts.shard_rows {config.prompts.shard_rows})",
                where="resources.training.rolling_gb",
                fix=f"set resources.training.rolling_gb to {most / 1e9:.3g} or more, lower "
                "train.window_shards, or use resources.training.source=online",
            )
        self.shards.open()
        self._main.start()

    def release(self, place: int) -> None:
        """Note that training needs nothing before this place of the line any more.

        Raises:
            DeepSpecError: capture has failed for good.
        """
        self.check()
        with self._lock:
            self._place = place
            if place >= self._window_end:
                self._news.set()

    def check(self) -> None:
        """Raise the error for which nothing will be captured any more, if there is one."""
        if self._errors:
            raise self._errors[0]
        if not (self._main.is_alive() or self._ended.is_set() or self.shards.is_sealed()):
            raise ChildFailed(
                "the thread that has shards captured has ended; why is in the log",
                where=self.shards.artifact.url,
            )

    def close(self) -> None:
        """End all workers, and delete the shards of a training that is done."""
        self._ended.set()
        self._news.set()
        if self._children:
            self._children.close()
        if self._main.is_alive():
            self._main.join()
        for worker in self._workers:
            worker.join()
        if self._place >= self.plan.samples.end and not self.shards.is_sealed():
            for shard in list(self.shards.sizes):
                self.shards.delete(shard)
        self.shards.close()

    def _run(self) -> None:
        resources = self.run.config.resources
        try:
            with (
                transient_system_errors("the shards that training uses up"),
                scope(resources.runner.patience_s) as self._children,
            ):
                while not (self._ended.is_set() or self._errors or self.shards.is_sealed()):
                    self._turn()
                    self._news.wait()
                    self._news.clear()
                # Leaving the scope would end what they still capture.
                while not self._ended.is_set() and any(map(_is_alive, self._workers)):
                    self._ended.wait(1.0)
        except DeepSpecError as error:
            self._errors.append(error)

    def _turn(self) -> None:
        """Delete what is not needed, and start what is needed and missing."""
        with self._lock:
            self._window_end = self.plan.window_end(self._place)
            needed = self.plan.needed(self._place, self.shards.sizes)
            used_up = [shard for shard in self.shards.sizes if shard not in needed]
        for shard in used_up:
            self.shards.delete(shard)
        with self._lock:
            known = self.shards.sizes.keys() | self._in_capture
            missing = [shard for shard in needed if shard not in known]
            # One that was captured and passed, and is not noted yet, still is on the disk.
            if missing and self._idle and not self._in_capture - needed.keys():
                most = self.run.config.resources.runner.shards_per_task
                size = min(most, -(-len(missing) // len(self._idle)))
                for group in deal(missing, size)[: len(self._idle)]:
                    self._begin(self._idle.pop(), group)

    def _begin(self, worker: CaptureWorker, group: Sequence[int]) -> None:
        self._in_capture |= set(group)
        log.info("stage=train capturing shards=%s", shard_list(group))
        context = contextvars.copy_context()  # that of the scope, which ends the child
        arguments = (self._capture, worker, group)
        thread = threading.Thread(target=context.run, args=arguments, name="capture", daemon=True)
        self._workers = [*filter(_is_alive, self._workers), thread]
        thread.start()

    def _capture(self, worker: CaptureWorker, group: Sequence[int]) -> None:
        def left() -> list[int]:
            return [shard for shard in group if shard in self._in_capture]

        try:
            with transient_system_errors(f"capture of shards {shard_list(group)}"):
                worker.capture(left, self._on_event, self._ended)
                self._committed(left())
        except DeepSpecError as error:
            self._errors.append(error)
        finally:
            with self._lock:
                self._in_capture -= set(group)
                self._idle.append(worker)
            self._news.set()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "shard":
            self._committed([event["shard"]])

    def _committed(self, shards: Sequence[int]) -> None:
        with self._lock:
            lost = self.shards.add(shards)
            self._in_capture -= set(shards)
        self._news.set()
        self.progress()
        if lost:
            raise ChildFailed(
                f"capture ended well and left no record of shards {shard_list(lost)}",
                where=self.shards.artifact.url,
            )
