"""Shards answered one after the other by an engine that is given all requests of a shard at once.

There is no journal of single answers: with some rows left out, an engine would batch, and so round,
the others differently.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

from deepspec.answers.answered_shard import AnsweredShard
from deepspec.answers.progress import AnswerProgress
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.shard_loop import Work
from deepspec.artifacts.tables import read_table
from deepspec.config.data import AnswersConfig
from deepspec.target.conversation import AnswerRequest, Conversation, Outcome


class Engine(Protocol):
    """Answers the requests of one shard at a time; made as `Class(config)`, with a `RunConfig`."""

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterable[tuple[AnswerRequest, Outcome]]:
        """Each request with its outcome, in any order.

        Raises:
            TransientError: the shard should be tried again.
        """


class SequentialShards:
    """The stage's shards, each answered when its conversations are first needed."""

    repeatable = True

    def __init__(
        self, engine: Engine, stage: ShardedStage, settings: AnswersConfig, progress: AnswerProgress
    ) -> None:
        self.engine = engine
        self.stage = stage
        self.settings = settings
        self.progress = progress

    def __len__(self) -> int:
        return len(self.stage.todo)

    def __iter__(self) -> Iterator[AnsweredShard]:
        for work in self.stage.todo:
            yield AnsweredShard(work.shard, work.upstream, partial(self._answer, work))

    def _answer(self, work: Work) -> list[Conversation]:
        rows = read_table(self.stage.upstream.fetch_shard(work.upstream)).to_pylist()
        conversations = {row["id"]: Conversation(row, self.settings) for row in rows}
        return answer_all(conversations, self.engine, self.progress, shard=work.shard)


def answer_all(
    conversations: Mapping[int, Conversation],
    engine: Engine,
    progress: AnswerProgress,
    *,
    shard: int,
) -> list[Conversation]:
    """The conversations, ended; the engine is given all that need an answer together."""
    while requests := [
        request
        for conversation in conversations.values()
        if (request := conversation.next_request()) is not None
    ]:
        for request, outcome in engine.answer(requests, shard=shard):
            conversation = conversations[request.id]
            conversation.receive(outcome)
            progress.count(outcome)
            progress.rows += conversation.next_request() is None
            progress.publish_if_due()
    return list(conversations.values())
