"""Shards answered by servers several at a time: a server must not wait for the slowest conversation
of a shard.

Every conversation goes on by itself, and new shards are begun as long as fewer conversations are
open than the servers take at once. Whole shards are handed out in the order in which they become
whole. What is in memory is bounded by the shards that are open, whatever the size of the data set;
after a kill the journal knows all that was answered of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from deepspec.answers.journal import Journal, open_journal, request_key
from deepspec.answers.progress import Meter
from deepspec.answers.server_engine import OpenAIEngine
from deepspec.artifacts.shard_loop import FULL, Work
from deepspec.artifacts.status import ShardedStage
from deepspec.artifacts.tables import read_table
from deepspec.config.run import RunConfig
from deepspec.errors import DataError, DeepSpecError, TransientError
from deepspec.target.conversation import (
    FAILED,
    AnswerRequest,
    Conversation,
    Failed,
    Outcome,
    Refused,
    Turn,
)

log = logging.getLogger(__name__)

BACKLOG = 2  # open conversations for every request that may be in flight
OPEN_SHARDS = 8  # at most, where that many hold enough conversations
LOOK_S = 0.5  # between two looks at whether it is time to report


class Ahead:
    """The shards to do, as a collection whose iterator yields each once it is answered; `take`
    then gives its conversations.
    """

    def __init__(
        self,
        config: RunConfig,
        stage: ShardedStage,
        meter: Meter,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`check` is called now and then while nothing is ready, to end the wait by an error."""
        self.config, self.stage, self.meter, self.check = config, stage, meter, check
        self.engine = OpenAIEngine(config, meter)
        self._most_open = (
            BACKLOG * len(self.engine.pool.endpoints) * config.resources.servers.requests
        )
        self._ended: SimpleQueue[tuple[Work, list[Conversation] | Exception]] = SimpleQueue()
        self._taken: dict[int, list[Conversation] | Exception] = {}
        self._open_rows = self._open_shards = 0
        self._room = asyncio.Event()
        self._working: Future[None] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._working is not None:
            self._working.cancel()
        self.engine.close()

    def __len__(self) -> int:
        return len(self.stage.todo)

    def __iter__(self) -> Iterator[Work]:
        self._working = self.engine.start(self._work())
        for _ in self.stage.todo:
            work, self._taken[work.shard] = self._next()
            self.meter.tell()
            yield work
            # not before: after a full disk the shard is taken again, or it may not be taken at all
            del self._taken[work.shard]
            self.engine.call(self._let_go)
        self.meter.tell(now=True)

    def _next(self) -> tuple[Work, list[Conversation] | Exception]:
        while True:
            try:
                return self._ended.get(
                    timeout=min(LOOK_S, self.config.resources.servers.progress_s)
                )
            except Empty:
                self.meter.tell()
                if self.check is not None:
                    self.check()
                if self._working is not None and self._working.done():
                    # it never ends before the last shard, unless with an error
                    self._working.result()

    def take(self, work: Work) -> list[Conversation]:
        """The conversations of the shard that was yielded last.

        Raises:
            DeepSpecError: what it ended with.
        """
        found = self._taken[work.shard]
        if isinstance(found, DeepSpecError):
            raise found
        # of the store or the journal, while it was answered: of no use to take it once more
        if isinstance(found, OSError):
            what = f"{type(found).__name__}: {found}"
            raise TransientError(
                what, where=f"shard {work.shard}", fix="it is tried again by itself"
            ) from found
        if isinstance(found, Exception):
            log.error("shard=%d", work.shard, exc_info=found)
            raise DataError(
                f"{type(found).__name__}: {found}", where=f"shard {work.shard}", fix="see the log"
            ) from found
        return found

    def _let_go(self) -> None:
        self._open_shards -= 1
        self._room.set()

    async def _work(self) -> None:
        """Begin shard after shard as there is room, until all have ended."""
        async with asyncio.TaskGroup() as group:
            for work in self.stage.todo:
                while self._open_shards and (
                    self._open_rows >= self._most_open
                    or self._open_shards >= self._shards_at_most(work)
                ):
                    self._room.clear()
                    await self._room.wait()
                if not self._open_rows:
                    self.engine.pool.starts()
                self._open_shards += 1
                self._open_rows += work.upstream.rows
                group.create_task(self._shard(work))

    def _shards_at_most(self, work: Work) -> int:
        return max(OPEN_SHARDS, BACKLOG * self._most_open // max(work.upstream.rows, 1))

    async def _shard(self, work: Work) -> None:
        found: list[Conversation] | Exception
        left = work.upstream.rows
        try:
            rows = await asyncio.to_thread(self._rows, work)
            journal = open_journal(self.stage.artifact, work.shard)
            found = [Conversation(row, self.config.answers) for row in rows]
            async with asyncio.TaskGroup() as group:
                for conversation in found:
                    group.create_task(self._converse(conversation, journal))
                left = 0  # from here on every conversation gives its own place back
        except ExceptionGroup as errors:
            found = _first(errors)
        except Exception as error:  # noqa: BLE001  (handed to whoever takes the shard)
            found = error
        self._give_back(left)
        self._ended.put((work, found))

    def _rows(self, work: Work) -> list[dict[str, Any]]:
        return read_table(self.stage.upstream.fetch_shard(work.upstream)).to_pylist()

    def _give_back(self, rows: int) -> None:
        self._open_rows -= rows
        self._room.set()

    async def _converse(self, conversation: Conversation, journal: Journal) -> None:
        try:
            while (request := conversation.next_request()) is not None:
                conversation.hear(await self._answer(request, journal))
            self.meter.rows += 1
        finally:
            self._give_back(1)

    async def _answer(self, request: AnswerRequest, journal: Journal) -> Outcome:
        """What the journal knows, or else what a server says, noted in the journal."""
        key = request_key(request)
        known = known_outcome(journal, key, row_runs=self.config.resources.servers.row_runs)
        if known is not None:
            return known
        outcome = await self.engine.ask(request)
        self.meter.heard(outcome)
        # it costs the server nothing to refuse again, and it may have been set up wrongly
        if not isinstance(outcome, Refused):
            await self._note(journal, key, outcome)
        return outcome

    async def _note(self, journal: Journal, key: str, outcome: Turn | Failed) -> None:
        """Into the journal, as soon as its disk has room for it."""
        while True:
            try:
                return journal.note(key, type(outcome).__name__, outcome._asdict())
            except OSError as error:
                if error.errno not in FULL:
                    raise
                log.warning(
                    "the disk of the journal is full; an answer waits to be noted in %s",
                    journal.path,
                )
                await asyncio.sleep(self.config.resources.storage.space_poll_s)


def known_outcome(journal: Journal, key: str, *, row_runs: int) -> Turn | Refused | None:
    """The outcome of an earlier run, if it was final: a row that failed in `row_runs` runs is
    refused in the next one.
    """
    for kind, fields in journal.notes(key):
        if kind == Turn.__name__:
            return Turn(**fields)
    failures = [fields["detail"] for _, fields in journal.notes(key)]
    if len(failures) < row_runs:
        return None
    return Refused(
        FAILED, f"no answer in {len(failures)} runs, the last time because {failures[-1]}"
    )


def _first(errors: ExceptionGroup[Exception]) -> Exception:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
