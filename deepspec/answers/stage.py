"""The answers stage: the target answers every prompt anew, so that a draft learns what its target
would say.

Every assistant turn is regenerated on the conversation so far as regenerated. An engine is anything
with the `answer` method below; the in-process one is the default and needs nothing but the target.
Servers are asked for several shards at a time (`ahead.py`), so that they never run dry at the end
of one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from deepspec.answers.progress import Meter
from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.shard_loop import Work, work_through
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.status import ShardedStage, open_sharded, seal_if_whole
from deepspec.artifacts.tables import read_table, write_table
from deepspec.config.run import RunConfig
from deepspec.errors import ConfigError, DataError, TransientError
from deepspec.process.events import Report, silent
from deepspec.storage.store import file_checksum
from deepspec.target.conversation import (
    FAILED,
    AnswerRequest,
    Conversation,
    Failed,
    Outcome,
    Refused,
)

log = logging.getLogger(__name__)

TURN = pa.struct(
    [
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("token_ids", pa.large_list(pa.int32())),  # null where the engine gives text only
        # stop: the target ended the turn; length: the limit did
        pa.field("finish_reason", pa.string(), nullable=False),
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
        # one for each answer that the conversation waits for
        pa.field("turns", pa.large_list(TURN), nullable=False),
    ]
)


class Engine(Protocol):
    """Where answers come from, a shard at a time; made as `Class(config)`."""

    def answer(
        self, requests: Sequence[AnswerRequest], *, shard: int
    ) -> Iterable[tuple[AnswerRequest, Outcome]]:
        """Each request with its outcome, in whatever order they come; raises TransientError if
        the shard should be tried again.
        """


def run_answers(
    config: RunConfig, *, shards: Sequence[int] | None = None, report: Report = silent
) -> Artifact:
    """Answer the missing shards of prompts (all, or of those asked for), and seal when none is
    missing.
    """
    stage = open_sharded(config, "answers", shards)
    if stage.todo:
        meter = Meter(stage.todo, report, every_s=config.resources.servers.progress_s)
        if config.answers.engine == "openai":
            ask_servers(config, stage, meter)
        else:
            ask_engine(config, stage, meter)
    seal_if_whole(config, "answers")
    return stage.artifact


def ask_engine(config: RunConfig, stage: ShardedStage, meter: Meter) -> None:
    """Answer the stage's shards one by one. No journal: with rows left out, an engine would
    batch, and so round, the others differently.
    """
    engine = make_engine(config)

    def make(work: Work, local: Path) -> Counts:
        rows = read_table(stage.upstream.fetch_shard(work.upstream)).to_pylist()
        return commit_ready(
            stage.artifact,
            work,
            local,
            answer_rows(rows, engine, config, shard=work.shard, meter=meter),
            config,
        )

    work_through(config, stage.artifact, stage.todo, make, meter.report)


def ask_servers(config: RunConfig, stage: ShardedStage, meter: Meter) -> None:
    """Answer the stage's shards with the engine `openai`, and journal what is not committed yet."""
    from deepspec.answers.concurrent_shards import Ahead
    from deepspec.answers.journal import remove_committed
    from deepspec.answers.managed_server import serving

    with ExitStack() as stack:
        stack.callback(remove_committed, stage.artifact)
        check = None
        if config.resources.servers.start != "none":
            config, check = stack.enter_context(serving(config, stage.artifact))
        ahead = stack.enter_context(Ahead(config, stage, meter, check))

        def make(work: Work, local: Path) -> Counts:
            return commit_ready(stage.artifact, work, local, ahead.take(work), config)

        work_through(config, stage.artifact, ahead, make, meter.report, repeatable=False)


def make_engine(config: RunConfig) -> Engine:
    name = config.answers.engine
    if name == "transformers":
        from deepspec.answers.local_engine import TransformersEngine

        return TransformersEngine(config)
    module, _, attribute = name.partition(":")
    try:
        engine: Engine = getattr(importlib.import_module(module), attribute)(config)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the engine cannot be imported: {error}",
            where="answers.engine",
            fix="give package.module:Class",
        ) from None
    return engine


def answer_rows(
    rows: Sequence[Mapping[str, Any]],
    engine: Engine,
    config: RunConfig,
    *,
    shard: int,
    meter: Meter | None = None,
) -> list[Conversation]:
    """The rows as conversations that are over; all that wait for an answer are given to the
    engine together.
    """
    conversations = {row["id"]: Conversation(row, config.answers) for row in rows}
    while requests := [
        request for found in conversations.values() if (request := found.next_request()) is not None
    ]:
        for request, outcome in engine.answer(requests, shard=shard):
            conversations[request.id].hear(outcome)
            if meter is not None:
                meter.heard(outcome)
                meter.rows += conversations[request.id].next_request() is None
                meter.tell()
    return list(conversations.values())


def commit_ready(
    artifact: Artifact,
    work: Work,
    local: Path,
    conversations: Sequence[Conversation],
    config: RunConfig,
) -> Counts:
    """Write what was answered to `local` and what was not to the rejects.

    Raises:
        TransientError: rows got no answer this time.
        DataError: more rows than `resources.servers.max_refused` were refused; a server that refuses nearly
            everything is set up wrongly, and its shard must not count as done.
    """
    refused = [(found, found.ended) for found in conversations if isinstance(found.ended, Refused)]
    failed = [found.ended for found in conversations if isinstance(found.ended, Failed)]
    if failed:
        what = f"{len(failed)} of {len(conversations)} rows got no answer, the first because {failed[0].detail}"
        raise TransientError(
            what,
            where=f"shard {work.shard}",
            fix="it is tried again by itself; rows that were answered are kept",
        )
    faults = [ended for _, ended in refused if ended.reason.startswith(("http_", FAILED))]
    if len(faults) > config.resources.servers.max_refused * len(conversations):
        what = f"{len(faults)} of {len(conversations)} rows were refused, the first because: {faults[0].detail}"
        fix = "correct resources.servers.endpoints and resources.servers.model_name, or raise resources.servers.max_refused"
        raise DataError(what, where="answers", fix=fix)
    answered = [
        {**found.row, "turns": [turn._asdict() for turn in found.turns]}
        for found in conversations
        if found.ended is None
    ]
    write_table(pa.Table.from_pylist(answered, SCHEMA), local)
    rejects = [{"id": f"{found.row['id']:016x}", **ended._asdict()} for found, ended in refused]
    put_rejects(artifact, work.shard, rejects, made=file_checksum(local))
    turns = [turn for row in answered for turn in row["turns"]]
    extra = {
        "turns": len(turns),
        "truncated": sum(turn["finish_reason"] == "length" for turn in turns),
    }
    return Counts(
        rows=len(answered),
        tokens=sum(turn["num_tokens"] for turn in turns),
        rejected=len(refused),
        extra=extra,
    )
