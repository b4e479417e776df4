"""The prompts stage: rows of any source become shards of conversations with stable ids.

A prompt row keeps the user and system messages; what the assistant said in the source is dropped, since the target
answers anew. Rows that cannot be used go to the rejects with a reason; nothing vanishes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import pyarrow as pa

from deepspec.artifact import Artifact
from deepspec.aside import put_rejects
from deepspec.config import DatasetSource, PromptsConfig, RunConfig
from deepspec.data.contamination import BenchmarkPrompts
from deepspec.data.sources import is_on_hub, newest_revision, read_source
from deepspec.data.tables import write_table
from deepspec.errors import DataError
from deepspec.events import Report, silent
from deepspec.lineage import artifact_of
from deepspec.records import Counts
from deepspec.stages import require_sealed
from deepspec.store import canonical_json

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.uint64(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("messages", pa.large_string(), nullable=False),  # JSON: [{role, content, ...}], assistant turns left out
        pa.field("tools", pa.large_string()),  # JSON: what the target may call; null where there are none
    ]
)
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "function": "tool", "observation": "tool"}  # fmt: skip


DUPLICATE, BENCHMARK = "duplicate", "benchmark"  # reasons that are no fault of a row


class Rejected(NamedTuple):
    reason: str
    detail: str


class Prompt(NamedTuple):
    id: int
    held_out: bool
    domain: str | None
    messages: str
    tools: str | None = None


def run_prompts(config: RunConfig, report: Report = silent) -> Artifact:
    """Read the source once, committing each shard that is not there yet, and seal.

    The source is read in order and shards are cut by row, so a run that was killed makes the same shards again.

    Raises:
        DataError: a source that cannot be read, is empty, or has too many unusable rows.
    """
    artifact = artifact_of(config, "prompts")
    inputs = require_sealed(config, "prompts")
    artifact.create(config.model_dump(mode="json"))
    config = _pinned(config, artifact)
    committed = artifact.records()
    totals = {"rows": 0, "rejected": 0, DUPLICATE: 0, BENCHMARK: 0}
    shard = -1
    for shard, (prompts, rejects) in enumerate(_shards(config, read_source(config))):
        started = time.monotonic()
        dropped = {reason: sum(reject["reason"] == reason for reject in rejects) for reason in (DUPLICATE, BENCHMARK)}
        for name, number in {"rows": len(prompts), "rejected": len(rejects), **dropped}.items():
            totals[name] += number
        if shard not in committed:
            put_rejects(artifact, shard, rejects)
            with artifact.store.staged() as local:
                write_table(pa.Table.from_pylist([prompt._asdict() for prompt in prompts], SCHEMA), local)
                counts = Counts(rows=len(prompts), rejected=len(rejects), extra=dropped)
                artifact.commit(shard, local, counts, upstream=None, seconds=time.monotonic() - started)
        report({"event": "progress", "stage": "prompts", "done": shard + 1, "total": None, "unit": "shards", **totals})
    _check_share(config, totals)
    artifact.seal(inputs=inputs, shards=range(shard + 1))
    return artifact


def _pinned(config: RunConfig, artifact: Artifact) -> RunConfig:
    """The run with a commit to read: a run that goes on must not read a newer one than its first shards came from."""
    source = config.prompts.source
    if not isinstance(source, DatasetSource) or not is_on_hub(source) or source.revision:
        return config
    path = artifact.path("source.json")
    with suppress(FileNotFoundError):
        return _at(config, source, json.loads(artifact.store.read(path))["revision"])
    revision = newest_revision(source)
    log.warning("data set %s is not pinned; its newest commit is read: prompts.source.revision=%s", source.name, revision)
    artifact.store.write(path, canonical_json({"name": source.name, "revision": revision}))
    return _at(config, source, revision)


def _at(config: RunConfig, source: DatasetSource, revision: str) -> RunConfig:
    pinned = source.model_copy(update={"revision": revision})
    return config.model_copy(update={"prompts": config.prompts.model_copy(update={"source": pinned})})


def _check_share(config: RunConfig, totals: Mapping[str, int]) -> None:
    where = f"prompts.source {config.prompts.source}"
    if totals["rows"] == 0:
        raise DataError("the source holds no usable prompt", where=where, fix="see the rejects beside the artifact for the reasons")
    unusable = totals["rejected"] - totals[DUPLICATE] - totals[BENCHMARK]  # what was dropped on purpose is no fault of the source
    share = unusable / (totals["rows"] + totals["rejected"])
    if share > config.prompts.max_rejected:
        what = f"{unusable} rows ({share:.1%}) were rejected, prompts.max_rejected is {config.prompts.max_rejected:.1%}"
        raise DataError(what, where=where, fix="see the rejects beside the artifact; correct the rows or raise the limit")


def _shards(config: RunConfig, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Prompt], list[dict[str, Any]]]]:
    """Cut the source into shards of `shard_rows` prompts."""
    limit, kept, seen, benchmarks = config.prompts.limit, 0, Seen(config.prompts), BenchmarkPrompts(config.prompts.decontaminate)
    prompts: list[Prompt] = []
    rejects: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        prompt = make_prompt(row, config.prompts)
        if isinstance(prompt, Prompt):
            prompt = seen.named(prompt)
        if isinstance(prompt, Prompt) and (file := benchmarks.match(prompt.messages)):
            prompt = Rejected(BENCHMARK, f"it is a prompt of {file}")
        if isinstance(prompt, Rejected):
            rejects.append({"row": number, "reason": prompt.reason, "detail": prompt.detail})
            continue
        prompts.append(prompt)
        kept += 1
        if len(prompts) == config.prompts.shard_rows:
            yield prompts, rejects
            prompts, rejects = [], []
        if kept == limit:
            break
    if prompts or rejects:
        yield prompts, rejects


class Seen:
    """Which conversations came before, by id: 1.3 million take about 100 MB, whatever they hold."""

    def __init__(self, settings: PromptsConfig) -> None:
        self._keep = settings.duplicates == "keep"
        self._ids, self._again = set[int](), Counter[int]()

    def named(self, prompt: Prompt) -> Prompt | Rejected:
        """The prompt, with an id of its own where an equal one came before and both are kept."""
        if prompt.id not in self._ids:
            self._ids.add(prompt.id)
            return prompt
        if not self._keep:
            return Rejected(DUPLICATE, "an equal conversation came before")
        self._again[prompt.id] += 1
        return prompt._replace(id=_hash(f"{prompt.id}:{self._again[prompt.id]}".encode()))


def make_prompt(row: Mapping[str, Any], settings: PromptsConfig) -> Prompt | Rejected:
    """A row as a prompt: roles checked, assistant turns dropped, id = hash of what is left."""
    messages = _messages(row)
    if isinstance(messages, Rejected):
        return messages
    if (wrong := _order(messages)) is not None:
        return wrong
    tools = _tools(row.get("tools"))
    if isinstance(tools, Rejected):
        return tools
    kept = [
        message
        for message, following in zip(messages, [*messages[1:], None], strict=True)
        # What the assistant said is said anew, but for its calls of tools: their results are theirs alone.
        if message["role"] != "assistant" or (following is not None and following["role"] == "tool")
    ]
    content = canonical_json(kept)
    number = _hash(content + (tools or "").encode())
    draw = _hash(f"{settings.seed}:{number}".encode()) / 2**64
    domain = row.get("domain")
    return Prompt(number, draw < settings.held_out, str(domain) if domain is not None else None, content.decode(), tools)


def _hash(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _order(messages: Sequence[Mapping[str, Any]]) -> Rejected | None:
    """Why these messages are no conversation: system only first, then user and assistant in turn, tools after their call."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return Rejected("system_not_first", f"roles are {roles}")
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
    if not turns or turns[0] != "user" or any(second not in follows[first] for first, second in pairwise(turns)):
        return Rejected("roles_out_of_order", f"roles are {roles}")
    return None


def _tools(value: Any) -> str | Rejected | None:
    """The row's tools as JSON, given as a list or (as Parquet needs) as JSON text of one."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or None
    except json.JSONDecodeError as error:
        return Rejected("bad_tools", f"tools are not JSON: {error.msg}")
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        return Rejected("bad_tools", "tools are not a list of objects")
    return canonical_json(tools).decode() if tools else None


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | Rejected:
    """The conversation of a row in any of the four shapes that sources use."""
    if isinstance(row.get("prompt"), str):
        entries: Any = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row.get("turns"), Sequence):
        entries = [part for turn in row["turns"] for part in ({"role": "user", "content": turn}, {"role": "assistant", "content": "-"})]
    else:
        entries = row.get("messages", row.get("conversations"))
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        return Rejected("no_messages", f"columns are {sorted(row)}")
    messages = []
    for entry in entries:
        speaker = entry.get("role", entry.get("from")) if isinstance(entry, Mapping) else None
        content = entry.get("content", entry.get("value")) if isinstance(entry, Mapping) else None
        if speaker not in SPEAKERS:
            return Rejected("unknown_role", f"role {speaker!r}")
        more = {key: entry[key] for key in ("tool_calls", "tool_call_id", "name") if entry.get(key)}
        if "tool_calls" in more:
            content = content or ""
        elif not isinstance(content, str) or not content.strip():
            return Rejected("empty_message", f"the {speaker} message has no text")
        messages.append({"role": SPEAKERS[speaker], "content": content, **more})
    return messages
