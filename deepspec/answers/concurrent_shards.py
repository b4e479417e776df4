"""Shards answered by servers, several at a time: no server waits for a shard's slowest row.

Every conversation proceeds on its own, and new shards are begun while fewer conversations are open
than the servers take at once. Shards are handed out as they become complete. Memory is bounded by
the shards that are open, whatever the size of the data set; after a kill the journal has all that
was answered of them.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from typing import NamedTuple

from deepspec.answers.answered_shard import AnsweredShard, open_conversations
from deepspec.answers.journal import Journal, journal_path, request_key
from deepspec.answers.read_prompts import DifferingPrompts
from deepspec.answers.server_engine import Reply, ServerEngine
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.shard_loop import Work
from deepspec.artifacts.system_errors import DISK_FULL
from deepspec.errors import DataError, DeepSpecError, TransientError
from deepspec.target.conversation import AnswerRequest, Conversation, Failed, Refused, Turn

log = logging.getLogger(__name__)

BACKLOG = 2  # open conversations for every request that may be in flight
OPEN_SHARDS = 8  # at most, where that many hold enough conversations
LOOK_S = 0.5  # between two looks at whether it is time to report


class _Kept(NamedTuple):
    """What is kept of a shard while it is answered."""

    journal: Journal
    differing: DifferingPrompts


class ConcurrentShards:
    """The stage's shards, each yielded with its answers once all its conversations have ended."""

    repeatable = False  # servers sample anew

    def __init__(
        self, engine: ServerEngine, stage: ShardedStage, check: Callable[[], None] | None = None
    ) -> None:
        """`check` is called now and then during a wait, and may end it by an error."""
        self._engine = engine
        self._progress = engine.progress
        self._servers = engine.servers
        self._stage = stage
        self._check = check
        self._most_open = BACKLOG * len(self._servers.endpoints) * self._servers.requests
        self._complete: SimpleQueue[AnsweredShard] = SimpleQueue()
        self._open_rows = 0
        self._open_shards = 0
        self._room = asyncio.Event()
        self._answering = engine.portal.start_task_soon(self._answer_shards)

    def close(self) -> None:
        """Nothing is requested any more."""
        self._answering.cancel()

    def __len__(self) -> int:
        return len(self._stage.todo)

    def __iter__(self) -> Iterator[AnsweredShard]:
        for _ in self._stage.todo:
            yield self._next_complete()
            # only now: while its user writes a shard, its conversations are still in memory
            self._engine.portal.start_task_soon(partial(self._close, shards=1))
        self._progress.publish()

    def _next_complete(self) -> AnsweredShard:
        while True:
            try:
                return self._complete.get(timeout=min(LOOK_S, self._servers.progress_s))
            except Empty:
                if self._check is not None:
                    self._check()
                if self._answering.done():
                    self._answering.result()  # before the last shard it ends only by an error
            finally:
                self._progress.publish_if_due()

    def _close(self, *, rows: int = 0, shards: int = 0) -> None:
        self._open_rows -= rows
        self._open_shards -= shards
        self._room.set()

    async def _answer_shards(self) -> None:
        """Begin shard after shard as there is room, until all have ended."""
        async with asyncio.TaskGroup() as group:
            for work in self._stage.todo:
                while not self._has_room_for(work):
                    self._room.clear()
                    await self._room.wait()
                if not self._open_rows:
                    self._engine.pool.note_idle()
                self._open_shards += 1
                self._open_rows += work.upstream.rows
                group.create_task(self._answer_shard(work))

    def _has_room_for(self, work: Work) -> bool:
        shards = max(OPEN_SHARDS, BACKLOG * self._most_open // max(work.upstream.rows, 1))
        busy = self._open_rows >= self._most_open or self._open_shards >= shards
        return not self._open_shards or not busy

    async def _answer_shard(self, work: Work) -> None:
        result: list[Conversation] | Exception
        rows_to_close = work.upstream.rows
        try:
            settings = self._engine.config.answers
            result = await asyncio.to_thread(open_conversations, self._stage, work, settings)
            kept = _Kept(
                Journal(journal_path(self._stage.artifact, work.shard)),
                DifferingPrompts(
                    num_rows=len(result), max_share=self._servers.max_differing_prompts
                ),
            )
            async with asyncio.TaskGroup() as group:
                for conversation in result:
                    group.create_task(self._converse(conversation, kept))
                rows_to_close = 0  # each conversation closes its own
        except ExceptionGroup as errors:
            result = errors.exceptions[0]
        except Exception as error:  # noqa: BLE001  (raised where the shard's answers are used)
            result = error
        self._close(rows=rows_to_close)
        conversations = partial(_conversations, work.shard, result)
        self._complete.put(AnsweredShard(work.shard, work.made_from, conversations))

    async def _converse(self, conversation: Conversation, kept: _Kept) -> None:
        try:
            while (request := conversation.next_request()) is not None:
                reply = await self._answer(request, kept)
                conversation.receive(reply.outcome, limit=reply.limit)
            self._progress.rows += 1
        finally:
            self._close(rows=1)

    async def _answer(self, request: AnswerRequest, kept: _Kept) -> Reply:
        """The outcome that the journal has, or else a server's, which is added to the journal."""
        key = request_key(request)
        known = kept.journal.final_outcome(key, row_runs=self._servers.row_runs)
        if known is not None:
            return Reply(known)
        reply = await self._engine.ask(request)
        outcome = reply.outcome
        self._progress.count(outcome)
        if reply.difference is not None:
            kept.differing.add(request.id, reply.difference)
        # What may be due to a server that is set up wrongly is not kept: a refusal, which costs the
        # server nothing to repeat, and an answer to another prompt, unless all are accepted.
        wrong = reply.difference is not None and self._servers.max_differing_prompts < 1
        if not isinstance(outcome, Refused) and not wrong:
            await self._add_to_journal(kept.journal, key, outcome)
        return reply

    async def _add_to_journal(self, journal: Journal, key: str, outcome: Turn | Failed) -> None:
        """Append the outcome, as soon as the journal's disk has room for it."""
        while True:
            try:
                return journal.append(key, outcome)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                log.warning("the journal's disk is full; an answer waits for %s", journal.path)
                await asyncio.sleep(self._engine.config.resources.storage.space_poll_s)


def _conversations(shard: int, result: list[Conversation] | Exception) -> list[Conversation]:
    if isinstance(result, list):
        return result
    if isinstance(result, DeepSpecError):
        raise result
    what, where = f"{type(result).__name__}: {result}", f"shard {shard}"
    if isinstance(result, OSError):
        # Of the store or the journal. Raised as it is, a full disk would be taken for that of the
        # shard being written, which is then written again from the same answers.
        raise TransientError(what, where=where, fix="it is tried again by itself") from result
    log.error("shard=%d", shard, exc_info=result)
    raise DataError(what, where=where, fix="see the log") from result
