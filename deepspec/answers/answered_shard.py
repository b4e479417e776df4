"""A shard of answers: how it is handed over by an engine, and how it is stored."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Counts
from deepspec.artifacts.shard_loop import Todo, Work
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.config.data import AnswersConfig
from deepspec.errors import DataError, TransientError
from deepspec.prompts.stage import SCHEMA as PROMPTS
from deepspec.storage.store import file_checksum
from deepspec.target.conversation import FAILED, Conversation, Failed, Refused, Turn

TURN_FIELDS = [
    pa.field("text", pa.large_string(), nullable=False),
    pa.field("token_ids", pa.large_list(pa.int32())),  # null where the engine gives text only
    # stop: the target ended the turn; length: the limit did
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("num_tokens", pa.int32(), nullable=False),
    pa.field("num_prompt_tokens", pa.int32(), nullable=False),
    pa.field("seed", pa.int64(), nullable=False),
    pa.field("endpoint", pa.string()),  # the server; null in process
    pa.field("served_model", pa.string()),  # the name in the server's reply
]
# what the target read; null where its template gives that for the row as stored
PROMPT_IDS = pa.field("prompt_token_ids", pa.large_list(pa.int32()))


class AnsweredShard(NamedTuple):
    """One shard with its answers, and which prompts they belong to."""

    shard: int
    made_from: str
    """The checksum of the prompts."""
    conversations: Callable[[], list[Conversation]]
    """All of its conversations, ended; raises what the shard failed with, at every call."""


class AnsweredShards(Todo[AnsweredShard], Protocol):
    """The shards to do, each yielded once its answers can be had."""

    repeatable: bool
    """Whether a shard answered twice has the same answers."""


def open_conversations(
    stage: ShardedStage, work: Work, settings: AnswersConfig
) -> list[Conversation]:
    """The conversations of a shard of prompts, none of them answered yet."""
    rows = stage.upstream.rows(work.upstream)
    return [Conversation(row, settings) for row in rows]


def write_answers(
    artifact: Artifact, answered: AnsweredShard, local: Path, *, max_refused: float
) -> Counts:
    """Write the answered rows to `local`, and the refused ones to the artifact's rejects.

    Raises:
        TransientError: rows got no answer this time.
        DataError: servers refused more than the share `max_refused` of the rows; a server that
            refuses nearly everything is set up wrongly, and its shard must not count as done.
        DeepSpecError: what the shard failed with.
    """
    conversations = answered.conversations()
    failed = [found.ended for found in conversations if isinstance(found.ended, Failed)]
    if failed:
        raise TransientError(
            f"{len(failed)} of {len(conversations)} rows got no answer;"
            f" the first error: {failed[0].detail}",
            where=f"shard {answered.shard}",
            fix="it is tried again by itself; rows that were answered are kept",
        )
    refused = [(found, found.ended) for found in conversations if isinstance(found.ended, Refused)]
    counted = ("http_", FAILED, "template")  # what a wrong setting does to all rows alike
    by_servers = [end.detail for _, end in refused if end.reason.startswith(counted)]
    if len(by_servers) > max_refused * len(conversations):
        raise DataError(
            f"{len(by_servers)} of {len(conversations)} rows were refused;"
            f" the first error: {by_servers[0]}",
            where="answers",
            fix="correct endpoints and model_name in resources.servers, or raise max_refused there",
        )
    answered_ones = [found for found in conversations if found.ended is None]
    rows = [
        {**found.row, "turns": [turn._asdict() for turn in found.turns]} for found in answered_ones
    ]
    turns = [turn for found in answered_ones for turn in found.turns]
    write_table(pa.Table.from_pylist(rows, _schema(turns)), local)
    rejects = [{"id": f"{found.row['id']:016x}", **end._asdict()} for found, end in refused]
    put_rejects(artifact, answered.shard, rejects, made=file_checksum(local))
    truncated = sum(turn.finish_reason == "length" for turn in turns)
    return Counts(
        rows=len(rows),
        tokens=sum(turn.num_tokens for turn in turns),
        rejected=len(refused),
        counts={"turns": len(turns), "truncated": truncated},
    )


def _schema(turns: Iterable[Turn]) -> pa.Schema:
    """A row of prompts with a turn for each place of the conversation where the target answers.

    Prompt ids are a field only where a turn has any, so that other shards are those of old.
    """
    has_ids = any(turn.prompt_token_ids is not None for turn in turns)
    turn = pa.struct([*TURN_FIELDS, PROMPT_IDS] if has_ids else TURN_FIELDS)
    return PROMPTS.append(pa.field("turns", pa.large_list(turn), nullable=False))
