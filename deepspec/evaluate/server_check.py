"""What is checked of the two servers of an evaluation before the first prompt is measured."""

from typing import NamedTuple

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Stored
from deepspec.errors import ArtifactMismatch, ConfigError
from deepspec.evaluate.engine_client import EngineClient, Question
from deepspec.evaluate.engine_counters import OF_DRAFT
from deepspec.storage.store import pretty_json

ENGINE = "engine.json"


class ServedBy(Stored):
    """`engine.json` of a served evaluation: what all of its units were served by."""

    engine: str
    version: str | None
    """None where the servers do not report one."""
    num_speculative_tokens: int
    """Tokens that the draft proposes per round, by the engine's counters."""
    draft_sampling: str


class ServerFacts(NamedTuple):
    """What a server reports about itself."""

    version: str | None
    num_speculative_tokens: int  # 0 of a plain one


def check_server(server: EngineClient, question: Question, *, max_positions: int) -> ServerFacts:
    """Learn what the server is and takes; it has answered the question once then.

    `max_positions` are those of the target, where the server does not list its own.

    Raises:
        ConfigError: it serves another model, or lacks what an evaluation reads.
        ArtifactMismatch: it renders prompts in another way.
        DataError: it does not return tokens.
    """
    server.max_positions = server.max_tokens() or max_positions
    version = server.version()
    server.ask(question._replace(fields={**question.fields, "max_tokens": 1}))
    counts, missing = server.counts()
    if absent := [name for name in missing if name not in OF_DRAFT]:
        raise ConfigError(
            f"{server.what} does not count what an evaluation reads: {', '.join(absent)}",
            where=f"{server.root}/metrics",
            fix="evaluate with a vLLM server that was started without --disable-log-stats",
        )
    if missing and server.side == "draft":
        raise ConfigError(
            f"{server.what} does not draft: it has no {', '.join(missing)}",
            where=f"{server.root}/metrics",
            fix="start it with --speculative-config, as the card of the exported draft has it",
        )
    if not missing and server.side == "plain":
        raise ConfigError(
            f"{server.what} has a draft, so that it shows no plain decoding",
            where=f"{server.root}/metrics",
            fix="start it without --speculative-config",
        )
    return ServerFacts(version, len(counts.accepted_at))


def require_same_engine(artifact: Artifact, found: ServedBy) -> None:
    """Record what serves this artifact, or compare it with what served its earlier units.

    Raises:
        ArtifactMismatch: they differ; nothing is mixed.
    """
    if artifact.store.write_new(artifact.path(ENGINE), pretty_json(found.model_dump())):
        return
    before = artifact.document(ENGINE, ServedBy)
    if before is not None and before != found:
        was, now = (one.model_dump() for one in (before, found))
        differing = [f"{key}: {was[key]}, now {now[key]}" for key in now if was[key] != now[key]]
        raise ArtifactMismatch(
            f"its units so far were served by another engine ({'; '.join(differing)})",
            where=f"{artifact.url}/{ENGINE}",
            fix="serve with that one, or remove the folder to begin anew",
        )
