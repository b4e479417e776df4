"""The answers stage: the target answers every prompt anew, so that a draft learns what its target would say.

Every assistant turn is regenerated on the conversation so far as regenerated. An engine is anything with the `answer`
method below; the in-process one is the default and needs nothing but the target.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from deepspec.artifact import Artifact
from deepspec.aside import put_rejects
from deepspec.config import AnswersConfig, RunConfig
from deepspec.data.chat import Message, parse_messages
from deepspec.data.tables import read_table, write_table
from deepspec.errors import ConfigError
from deepspec.events import Report, silent
from deepspec.records import Counts
from deepspec.stages import open_sharded, seal_if_whole
from deepspec.work import Work, work_through

log = logging.getLogger(__name__)

TURN = pa.struct(
    [
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("token_ids", pa.large_list(pa.int32())),  # null where the engine gives text only
        pa.field("finish_reason", pa.string(), nullable=False),  # stop: the target ended the turn; length: the limit did
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("id", pa.uint64(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("messages", pa.large_string(), nullable=False),  # JSON, as in the prompts
        pa.field("turns", pa.large_list(TURN), nullable=False),  # one for each user message
    ]
)


class Request(NamedTuple):
    """One answer to make: the conversation up to the user's message, and the seed of this answer's random stream."""

    id: int
    turn: int
    messages: list[Message]
    seed: int


class Turn(NamedTuple):
    text: str
    token_ids: list[int] | None
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int


class Refused(NamedTuple):
    """A request that will never be answered: the row goes to the rejects with this reason."""

    reason: str
    detail: str


class Engine(Protocol):
    """Where answers come from; made as `Class(config)`."""

    def answer(self, requests: Sequence[Request], *, shard: int) -> list[Turn | Refused]:
        """One outcome per request, in their order; raises TransientError if the shard should be tried again."""


def run_answers(config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent) -> Artifact:
    """Answer the missing shards of prompts (all, or of those asked for), and seal when none is missing."""
    stage = open_sharded(config, "answers", shards)
    if stage.todo:
        engine = make_engine(config)

        def make(work: Work, local: Path) -> Counts:
            rows = read_table(stage.upstream.fetch_shard(work.upstream)).to_pylist()
            answered, rejects = answer_rows(rows, engine, config.answers, shard=work.shard)
            put_rejects(stage.artifact, work.shard, rejects)
            write_table(pa.Table.from_pylist(answered, SCHEMA), local)
            return _counts(answered, rejects)

        work_through(config, stage.artifact, stage.todo, make, report)
    seal_if_whole(config, "answers")
    return stage.artifact


def make_engine(config: RunConfig) -> Engine:
    name = config.answers.engine
    if name == "transformers":
        from deepspec.data.engines import TransformersEngine

        return TransformersEngine(config)
    module, _, attribute = name.partition(":")
    try:
        engine: Engine = getattr(importlib.import_module(module), attribute)(config)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the engine cannot be imported: {error}", where="answers.engine", fix="give package.module:Class") from None
    return engine


def answer_rows(
    rows: Sequence[Mapping[str, Any]], engine: Engine, settings: AnswersConfig, *, shard: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with all their turns answered, and the rows that were refused or dropped, with the reason."""
    users = {row["id"]: parse_messages(row["messages"]) for row in rows}
    turns: dict[int, list[Turn]] = {row["id"]: [] for row in rows}
    rejects: dict[int, Refused] = {}
    number = 0
    while requests := _requests(users, turns, rejects, seed=settings.seed, turn=number):
        for request, outcome in zip(requests, engine.answer(requests, shard=shard), strict=True):
            if isinstance(outcome, Turn) and outcome.finish_reason == "length" and settings.truncated == "drop":
                outcome = Refused("truncated", f"the answer of turn {number} ran into {settings.max_new_tokens} tokens")
            if isinstance(outcome, Refused):
                rejects[request.id] = outcome
            else:
                turns[request.id].append(outcome)
        number += 1
    answered = [{**row, "turns": [turn._asdict() for turn in turns[row["id"]]]} for row in rows if row["id"] not in rejects]
    return answered, [{"id": f"{row:016x}", "reason": refused.reason, "detail": refused.detail} for row, refused in rejects.items()]


def _requests(
    users: Mapping[int, Sequence[Mapping[str, Any]]],
    turns: Mapping[int, Sequence[Turn]],
    rejects: Mapping[int, Refused],
    *,
    seed: int,
    turn: int,
) -> list[Request]:
    requests = []
    for row, messages in users.items():
        conversation = conversation_so_far(messages, [done.text for done in turns[row]])
        if row not in rejects and conversation is not None:
            requests.append(Request(row, turn, conversation, stream_seed(seed, row, turn)))
    return requests


def conversation_so_far(messages: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> list[Message] | None:
    """The messages up to the first unanswered user message, answers in their places; None when all are answered."""
    conversation, given = [], iter(answers)
    for message in messages:
        conversation.append(Message(message["role"], message["content"]))
        if message["role"] == "user":
            answer = next(given, None)
            if answer is None:
                return conversation
            conversation.append(Message("assistant", answer))
    return None


def stream_seed(seed: int, row: int, turn: int) -> int:
    """The seed of one answer's random stream (63 bits): chance belongs to the sample, not to the batch it lands in."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}:{turn}".encode()).digest()[:8], "big") >> 1


def _counts(answered: Sequence[Mapping[str, Any]], rejects: Sequence[Mapping[str, Any]]) -> Counts:
    turns = [turn for row in answered for turn in row["turns"]]
    extra = {"turns": len(turns), "truncated": sum(turn["finish_reason"] == "length" for turn in turns)}
    return Counts(rows=len(answered), tokens=sum(turn["num_tokens"] for turn in turns), rejected=len(rejects), extra=extra)
