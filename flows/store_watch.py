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
from deepspec.artifacts.status import SHARDED, StageStatus
from deepspec.errors import DeepSpecError
from flows.stage_progress import Board

log = logging.getLogger(__name__)

LOOK_S = 3.0  # between two looks into the store
# share of the time that is spent on it: a listing of 10,000 records takes a while
MOST_LOOKING = 0.05


class Watch:
    """Tells a board of the shards that others commit: a listing of names at each look, and each
    new record read once.
    """

    def __init__(
        self, artifact: Artifact, todo: StageStatus, board: Board, *, look_s: float = LOOK_S
    ) -> None:
        self.artifact, self.board, self.look_s, self.took_s = artifact, board, look_s, 0.0
        # The stale record of a shard that is made again is there already: that one is seen at the
        # end.
        self.left = (
            set(todo.missing) - set(artifact.record_shards())
            if todo.stage in SHARDED
            else set[int]()
        )

    def look(self) -> None:
        """May raise what the store raises."""
        if not self.left:
            return
        started = time.monotonic()
        new = sorted(self.left & set(self.artifact.record_shards()))
        self._tell(new)
        self.left -= set(new)
        self.took_s = time.monotonic() - started

    def _tell(self, shards: Sequence[int]) -> None:
        for record in self.artifact.read_records(shards).values():
            fields = record.model_dump(
                include={"shard", "rows", "tokens", "num_bytes", "seconds", "rejected"}
            )
            self.board.hear({"event": "shard", "stage": self.artifact.key.stage, **fields})

    @property
    def pause_s(self) -> float:
        return max(self.look_s, self.took_s / MOST_LOOKING)


@contextlib.contextmanager
def watching_store(watch: Watch) -> Iterator[None]:
    """Within the block, and a last time at its end, the watch's board hears of what is
    committed.
    """
    ended = threading.Event()

    def look() -> None:
        try:
            watch.look()
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
