"""Progress of work whose events do not reach this process: the shards that appear in the store are
added as they do.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.status import StageStatus
from deepspec.errors import DeepSpecError
from flows.stage_progress import StageProgress

log = logging.getLogger(__name__)

POLL_S = 3.0  # between two looks into the store
# share of the time that is spent on looking: a listing of 10,000 records takes a while
MOST_LOOKING = 0.05


class StoreWatch:
    """Adds the shards that others commit to a stage's progress: a listing of names at each look,
    and each new record read once.
    """

    def __init__(
        self,
        artifact: Artifact,
        todo: StageStatus,
        progress: StageProgress,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        self.artifact, self.progress, self.poll_s = artifact, progress, poll_s
        self._took_s = 0.0
        self._left = set[int]()
        if STAGES[todo.stage].is_sharded:
            # A shard that is made again has its stale record: it is counted at the end.
            self._left = set(todo.missing) - set(artifact.record_shards())

    def poll(self) -> None:
        """Look once; may raise what the store raises."""
        if not self._left:
            return
        started = time.monotonic()
        new = self._left & set(self.artifact.record_shards())
        for record in self.artifact.read_records(sorted(new)).values():
            self.progress.add_record(record)
        self._left -= new
        self._took_s = time.monotonic() - started

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next look."""
        return max(self.poll_s, self._took_s / MOST_LOOKING)


@contextlib.contextmanager
def watching_store(watch: StoreWatch) -> Iterator[None]:
    """Looks within the block as often as the watch allows, and a last time at its end."""
    ended = threading.Event()

    def look() -> None:
        try:
            watch.poll()
        except (DeepSpecError, OSError) as error:  # the progress stands still, and no more
            log.warning("the store cannot be read for progress: %s", error)

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
