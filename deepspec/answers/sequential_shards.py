"""Shards answered one after the other by an engine that is given all requests of a shard at once.

There is no journal of single answers: with some rows left out, an engine would batch, and so round,
the others differently.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from deepspec.answers.answered_shard import AnsweredShard, open_conversations
from deepspec.answers.progress import AnswerProgress
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.shard_loop import Work
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


@dataclass(frozen=True)
class SequentialShards:
    """The stage's shards, each answered when its conversations are first needed."""

    repeatable = False  # how many rows share a pass, and so round alike, depends on free memory

    engine: Engine
    stage: ShardedStage
    settings: AnswersConfig
    progress: AnswerProgress

    def __len__(self) -> int:
        return len(self.stage.todo)

    def __iter__(self) -> Iterator[AnsweredShard]:
        for work in self.stage.todo:
            yield AnsweredShard(work.shard, work.made_from, partial(self._answer, work))

    def _answer(self, work: Work) -> list[Conversation]:
        """The conversations, ended; the engine is given all that need an answer together."""
        conversations = open_conversations(self.stage, work, self.settings)
        of_row = {conversation.row["id"]: conversation for conversation in conversations}
        while requests := [
            request
            for conversation in conversations
            if (request := conversation.next_request()) is not None
        ]:
            for request, outcome in self.engine.answer(requests, shard=work.shard):
                conversation = of_row[request.id]
                conversation.receive(outcome)
                self.progress.count(outcome)
                self.progress.rows += conversation.next_request() is None
                self.progress.publish_if_due()
        return conversations
