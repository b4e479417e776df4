"""The answers stage: the target answers every prompt anew, so that a draft learns what its target would say.

Every assistant turn is regenerated on the conversation so far as regenerated. An engine is anything with the `answer`
method below; the in-process one is the default and needs nothing but the target.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from deepspec.artifact import Artifact
from deepspec.aside import put_rejects
from deepspec.config import RunConfig
from deepspec.data.chat import Message, parse_messages, parse_tools
from deepspec.data.journal import Journal, open_journal, remove_committed, request_key
from deepspec.data.tables import read_table, write_table
from deepspec.errors import ConfigError, DataError, TransientError
from deepspec.events import Report, silent
from deepspec.records import Counts
from deepspec.stages import open_sharded, seal_if_whole
from deepspec.work import Work, work_through

log = logging.getLogger(__name__)

FAILED = "failed"  # the reason of a row that no run got an answer to

TURN = pa.struct(
    [
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("token_ids", pa.large_list(pa.int32())),  # null where the engine gives text only
        pa.field("finish_reason", pa.string(), nullable=False),  # stop: the target ended the turn; length: the limit did
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("endpoint", pa.string()),  # the server; null in process
        pa.field("served_model", pa.string()),  # what the server says that it is
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("id", pa.uint64(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("messages", pa.large_string(), nullable=False),  # JSON, as in the prompts
        pa.field("tools", pa.large_string()),  # JSON, as in the prompts; null where there are none
        pa.field("turns", pa.large_list(TURN), nullable=False),  # one for each answer that the conversation waits for
    ]
)


class Request(NamedTuple):
    """One answer to make: the conversation up to the user's message, and the seed of this answer's random stream."""

    id: int
    turn: int
    messages: list[Message]
    seed: int
    tools: list[dict[str, Any]] | None = None


class Turn(NamedTuple):
    text: str
    token_ids: list[int] | None
    finish_reason: str
    num_tokens: int
    num_prompt_tokens: int
    seed: int
    endpoint: str | None = None
    served_model: str | None = None


class Refused(NamedTuple):
    """A request that will never be answered: the row goes to the rejects with this reason."""

    reason: str
    detail: str


class Failed(NamedTuple):
    """A request that got no answer this time, after every attempt; the row is tried again in a later run."""

    detail: str


Outcome = Turn | Refused | Failed


class Engine(Protocol):
    """Where answers come from; made as `Class(config)`."""

    keeps_journal: bool
    """Whether answers are kept as they come, for a run that is killed. An engine whose batches follow from the whole shard
    says no: with some of the rows gone it would batch, and so round, the others differently."""

    def answer(self, requests: Sequence[Request], *, shard: int) -> Iterable[tuple[Request, Outcome]]:
        """Each request with its outcome, in whatever order they come; raises TransientError if the shard should be tried again."""


def run_answers(config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent) -> Artifact:
    """Answer the missing shards of prompts (all, or of those asked for), and seal when none is missing."""
    stage = open_sharded(config, "answers", shards)
    if stage.todo:
        engine = make_engine(config)

        def make(work: Work, local: Path) -> Counts:
            rows = read_table(stage.upstream.fetch_shard(work.upstream)).to_pylist()
            journal = open_journal(stage.artifact, work.shard) if engine.keeps_journal else None
            answered, rejects = answer_rows(rows, engine, config, shard=work.shard, journal=journal)
            _check_share(rejects, len(rows), config)
            put_rejects(stage.artifact, work.shard, rejects)
            write_table(pa.Table.from_pylist(answered, SCHEMA), local)
            return _counts(answered, rejects)

        try:
            work_through(config, stage.artifact, stage.todo, make, report)
        finally:
            remove_committed(stage.artifact)
    seal_if_whole(config, "answers")
    return stage.artifact


def make_engine(config: RunConfig) -> Engine:
    name = config.answers.engine
    if name == "transformers":
        from deepspec.data.engines import TransformersEngine

        return TransformersEngine(config)
    if name == "openai":
        from deepspec.data.openai_engine import OpenAIEngine

        return OpenAIEngine(config)
    module, _, attribute = name.partition(":")
    try:
        engine: Engine = getattr(importlib.import_module(module), attribute)(config)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"the engine cannot be imported: {error}", where="answers.engine", fix="give package.module:Class") from None
    return engine


def answer_rows(
    rows: Sequence[Mapping[str, Any]], engine: Engine, config: RunConfig, *, shard: int, journal: Journal | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with all their turns answered, and the rows that were refused or dropped, with the reason.

    What the journal knows from a run that was killed is not asked again.

    Raises:
        TransientError: rows got no answer this time; all that did are in the journal.
    """
    settings, conversations = config.answers, {row["id"]: parse_messages(row["messages"]) for row in rows}
    tools = {row["id"]: parse_tools(row.get("tools")) for row in rows}
    turns: dict[int, list[Turn]] = {row["id"]: [] for row in rows}
    rejects: dict[int, Refused] = {}
    failed: dict[int, Failed] = {}

    def waiting(turn: int) -> Iterator[Request]:
        for row in (row for row in conversations if row not in rejects and row not in failed):
            conversation = conversation_so_far(conversations[row], [done.text for done in turns[row]])
            if conversation is not None:
                yield Request(row, turn, conversation, stream_seed(settings.seed, row, turn), tools[row])

    number = 0
    while requests := list(waiting(number)):
        for request, outcome in _outcomes(requests, engine, shard, journal, row_runs=config.resources.row_runs):
            if isinstance(outcome, Failed):
                failed[request.id] = outcome
            elif isinstance(outcome, Refused):
                rejects[request.id] = outcome
            elif outcome.finish_reason == "length" and settings.truncated == "drop":
                rejects[request.id] = Refused("truncated", f"the answer of turn {number} ran into {settings.max_new_tokens} tokens")
            else:
                turns[request.id].append(outcome)
        number += 1
    if failed:
        what = f"{len(failed)} of {len(rows)} rows got no answer, the first because {next(iter(failed.values())).detail}"
        raise TransientError(what, where=f"shard {shard}", fix="it is tried again by itself; rows that were answered are kept")
    answered = [{**row, "turns": [turn._asdict() for turn in turns[row["id"]]]} for row in rows if row["id"] not in rejects]
    left_out = [(row["id"], rejects[row["id"]]) for row in rows if row["id"] in rejects]
    return answered, [{"id": f"{row:016x}", "reason": refused.reason, "detail": refused.detail} for row, refused in left_out]


def _outcomes(
    requests: Sequence[Request], engine: Engine, shard: int, journal: Journal | None, *, row_runs: int
) -> Iterable[tuple[Request, Outcome]]:
    """What the journal knows, then what the engine says, noted in the journal as it comes."""
    if journal is None:
        yield from engine.answer(requests, shard=shard)
        return
    keys = {request.id: request_key(request.messages, seed=request.seed, tools=request.tools) for request in requests}
    known = {request.id: outcome for request in requests if (outcome := _known(journal, keys[request.id], row_runs)) is not None}
    yield from ((request, known[request.id]) for request in requests if request.id in known)
    for request, told in engine.answer([request for request in requests if request.id not in known], shard=shard):
        if not isinstance(told, Refused):  # it costs the server nothing to refuse again, and it may have been set up wrongly
            journal.note(keys[request.id], type(told).__name__, told._asdict())
        yield request, told


def _check_share(rejects: Sequence[Mapping[str, Any]], num_rows: int, config: RunConfig) -> None:
    """A server that refuses nearly everything is set up wrongly; its shard must not count as done."""
    refused = [reject for reject in rejects if reject["reason"].startswith(("http_", FAILED))]
    if len(refused) > config.resources.max_refused * num_rows:
        what = f"{len(refused)} of {num_rows} rows were refused, the first because: {refused[0]['detail']}"
        fix = "correct resources.endpoints and served_model, or raise resources.max_refused"
        raise DataError(what, where="answers", fix=fix)


def _known(journal: Journal, key: str, row_runs: int) -> Turn | Refused | None:
    """The outcome of an earlier run, if it was final: a row that failed in `row_runs` runs is refused in the next one."""
    for kind, fields in journal.notes(key):
        if kind == Turn.__name__:
            return Turn(**fields)
    failures = [fields["detail"] for _, fields in journal.notes(key)]
    if len(failures) < row_runs:
        return None
    return Refused(FAILED, f"no answer in {len(failures)} runs, the last time because {failures[-1]}")


def conversation_so_far(messages: Sequence[Message], answers: Sequence[str]) -> list[Message] | None:
    """The messages up to the first place that waits for an answer, answers in the places before; None when all are answered.

    An answer belongs behind a user's message or a tool's result, unless the source's own call of a tool follows there.
    """
    conversation, given = [], iter(answers)
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        conversation.append(message)
        if message.role in ("user", "tool") and (following is None or following.role == "user"):
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
