"""Progress of work that is done where its events cannot be heard: the shards that appear in the store are told of as they do."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextvars import copy_context

from deepspec.config import RunConfig
from deepspec.errors import DeepSpecError
from deepspec.lineage import artifact_of, upstream_of
from flows.board import Board

log = logging.getLogger(__name__)

WATCH_S = 5.0


@contextlib.contextmanager
def watching_store(board: Board, config: RunConfig, stage: str, missing: Sequence[int], *, pause_s: float = WATCH_S) -> Iterator[None]:
    """Within the block, and a last time at its end, the board hears of each of the missing shards that is committed by then."""
    wanted = artifact_of(config, upstream_of(config, stage)[0]).records(missing)
    watch = _Watch(board, config, stage, {shard: record.checksum for shard, record in wanted.items()})
    ended = threading.Event()
    thread = threading.Thread(target=copy_context().run, args=(watch.look_until, ended, pause_s), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        watch.look()


class _Watch:
    """The shards that are still expected, each with the checksum of the one that it is to be made from."""

    def __init__(self, board: Board, config: RunConfig, stage: str, wanted: Mapping[int, str]) -> None:
        self.board, self.artifact, self.wanted = board, artifact_of(config, stage), dict(wanted)

    def look_until(self, ended: threading.Event, pause_s: float) -> None:
        while not ended.wait(pause_s):
            self.look()

    def look(self) -> None:
        """One listing, and the records of those that are new (or still the stale ones of before)."""
        try:
            found = self.artifact.read_records([shard for shard in self.artifact.record_shards() if shard in self.wanted])
        except (DeepSpecError, OSError) as error:  # no more than the bar stands still
            log.warning("the store could not be looked at: %s", error)
            return
        for shard, record in found.items():
            if record.upstream == self.wanted[shard]:
                del self.wanted[shard]
                counted = record.model_dump(include={"rows", "tokens", "num_bytes", "rejected"})
                self.board.hear({"event": "shard", "stage": self.artifact.key.stage, "shard": shard, **counted})
