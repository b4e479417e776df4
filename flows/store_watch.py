"""Progress of work that is done where its events cannot be heard: the shards that appear in the
store are told of as they do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextvars import copy_context

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus
from deepspec.errors import DeepSpecError
from flows.stage_progress import StageProgress

log = logging.getLogger(__name__)

LOOK_S = 3.0  # between two looks into the store
# share of the time that is spent on it: a listing of 10,000 records takes a while
MOST_LOOKING = 0.05


class StoreWatch:
    """Tells a progress of the shards that others commit: a listing of names at each look, and each
    new record read once.
    """

    def __init__(
        self,
        artifact: Artifact,
        todo: StageStatus,
        progress: StageProgress,
        *,
        poll_s: float = LOOK_S,
    ) -> None:
        self.artifact, self.progress, self.poll_s, self.took_s = artifact, progress, poll_s, 0.0
        # The stale record of a shard that is made again is there already: that one is seen at the
        # end.
        self.left = (
            set(todo.missing) - set(artifact.record_shards())
            if STAGES[todo.stage].is_sharded
            else set[int]()
        )

    def poll(self) -> None:
        """May raise what the store raises."""
        if not self.left:
            return
        started = time.monotonic()
        new = sorted(self.left & set(self.artifact.record_shards()))
        self._report(new)
        self.left -= set(new)
        self.took_s = time.monotonic() - started

    def _report(self, shards: Sequence[int]) -> None:
        for record in self.artifact.read_records(shards).values():
            fields = record.model_dump(
                include={"shard", "rows", "tokens", "num_bytes", "seconds", "rejected"}
            )
            self.progress.on_event({"event": "shard", "stage": self.artifact.key.stage, **fields})

    @property
    def pause_s(self) -> float:
        return max(self.poll_s, self.took_s / MOST_LOOKING)


@contextlib.contextmanager
def watching_store(watch: StoreWatch) -> Iterator[None]:
    """Within the block, and a last time at its end, the watch's progress hears of what is
    committed.
    """
    ended = threading.Event()

    def look() -> None:
        try:
            watch.poll()
        except (DeepSpecError, OSError) as error:  # no more than the bar stands still
            log.warning("the store could not be looked at: %s", error)

    def look_until_ended() -> None:
        while not ended.wait(watch.pause_s):
            look()

    thread = threading.Thread(target=copy_context().run, args=(look_until_ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()
