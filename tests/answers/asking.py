"""A shard of prompts answered by scripted servers, through the code that the stage runs."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pyarrow as pa

from deepspec.answers.answered_shard import write_answers
from deepspec.answers.concurrent_shards import ConcurrentShards
from deepspec.answers.journal import journal_path
from deepspec.answers.progress import AnswerProgress
from deepspec.answers.server_engine import ServerEngine, open_servers
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.shard_loop import Work
from deepspec.artifacts.tables import read_table, write_table
from deepspec.config.run import RunConfig
from deepspec.process.events import silent
from deepspec.prompts import stage as prompts
from deepspec.target.chat import load_chat
from tests.conftest import tiny_run


def server_run(store: Path, *urls: str, settings: tuple[str, ...] = ()) -> RunConfig:
    return tiny_run(
        store,
        "answers.engine=openai",
        f"resources.servers.endpoints={json.dumps(urls)}",
        "resources.servers.request_timeout_s=1",
        "resources.servers.max_refused=1",
        "resources.storage.space_poll_s=0.05",
        *settings,
    )


def row(number: int, *said: str) -> dict:
    return {
        "id": number,
        "held_out": False,
        "domain": None,
        "tools": None,
        "messages": json.dumps([{"role": "user", "content": s} for s in said]),
    }


def stage_of(config: RunConfig, *shards: list[dict]) -> ShardedStage:
    """The stage with these shards of prompts to do."""
    upstream, todo = Run(config).artifact("prompts"), []
    for number, rows in enumerate(shards):
        with upstream.store.staged() as local:
            write_table(pa.Table.from_pylist(rows, prompts.SCHEMA), local)
            todo.append(
                Work(number, upstream.commit(number, local, Counts(rows=len(rows)), upstream=None))
            )
    return ShardedStage(Run(config).artifact("answers"), upstream, todo)


def ask(
    config: RunConfig, *rows: dict, keep_journal: bool = False
) -> tuple[list[dict], list[dict]]:
    """One shard with these rows, answered by the run's servers: its rows and its rejects."""
    stage, rejects = stage_of(config, list(rows)), []
    if not keep_journal:
        journal_path(stage.artifact, 0).unlink(missing_ok=True)
    local = Path(config.store) / "answered"
    with concurrent(config, stage) as shards:
        for answered in shards:
            counts = write_answers(stage.artifact, answered, local, max_refused=1)
        if counts.rejected:
            (written,) = Path(config.store, stage.artifact.folder, "rejects").iterdir()
            rejects = [json.loads(line) for line in written.read_text().splitlines()]
        return read_table(local).to_pylist(), rejects


@contextmanager
def concurrent(config: RunConfig, stage: ShardedStage) -> Iterator[ConcurrentShards]:
    """The stage's shards, as the run's servers answer them."""
    with connect(config) as engine, closing(ConcurrentShards(engine, stage)) as shards:
        yield shards


def connect(config: RunConfig) -> AbstractContextManager[ServerEngine]:
    return open_servers(config, config.resources.servers, load_chat(Run(config)), no_progress())


def no_progress() -> AnswerProgress:
    return AnswerProgress([], silent, every_s=60)
