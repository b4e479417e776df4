"""The prompts stage: rows of any source become shards of conversations with stable ids.

A prompt row keeps the user and system messages; what the assistant said in the source is dropped, since the target
answers anew. Rows that cannot be used go to the rejects with a reason; nothing vanishes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from deepspec.artifact import Artifact
from deepspec.aside import put_rejects
from deepspec.config import DatasetSource, DemoSource, FileSource, PromptsConfig, RunConfig
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
    ]
)
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Rejected(NamedTuple):
    reason: str
    detail: str


class Prompt(NamedTuple):
    id: int
    held_out: bool
    domain: str | None
    messages: str


def run_prompts(config: RunConfig, report: Report = silent) -> Artifact:
    """Read the source once, committing each shard that is not there yet, and seal.

    The source is read in order and shards are cut by row, so a run that was killed makes the same shards again.

    Raises:
        DataError: a source that cannot be read, is empty, or has too many unusable rows.
    """
    artifact = artifact_of(config, "prompts")
    inputs = require_sealed(config, "prompts")
    artifact.create(config.model_dump(mode="json"))
    committed = artifact.records()
    totals = {"rows": 0, "rejected": 0}
    shard = -1
    for shard, (prompts, rejects) in enumerate(_shards(config, read_source(config))):
        started = time.monotonic()
        totals = {"rows": totals["rows"] + len(prompts), "rejected": totals["rejected"] + len(rejects)}
        if shard not in committed:
            put_rejects(artifact, shard, rejects)
            with artifact.store.staged() as local:
                write_table(pa.Table.from_pylist([prompt._asdict() for prompt in prompts], SCHEMA), local)
                counts = Counts(rows=len(prompts), rejected=len(rejects))
                artifact.commit(shard, local, counts, upstream=None, seconds=time.monotonic() - started)
        report({"event": "progress", "stage": "prompts", "done": shard + 1, "total": None, "unit": "shards", **totals})
    _check_share(config, totals)
    artifact.seal(inputs=inputs, shards=range(shard + 1))
    return artifact


def _check_share(config: RunConfig, totals: Mapping[str, int]) -> None:
    where = f"prompts.source {config.prompts.source}"
    if totals["rows"] == 0:
        raise DataError("the source holds no usable prompt", where=where, fix="see the rejects beside the artifact for the reasons")
    share = totals["rejected"] / (totals["rows"] + totals["rejected"])
    if share > config.prompts.max_rejected:
        what = f"{totals['rejected']} rows ({share:.1%}) were rejected, prompts.max_rejected is {config.prompts.max_rejected:.1%}"
        raise DataError(what, where=where, fix="see the rejects beside the artifact; correct the rows or raise the limit")


def _shards(config: RunConfig, rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[list[Prompt], list[dict[str, Any]]]]:
    """Cut the source into shards of `shard_rows` prompts; a row seen before is dropped into the rejects."""
    limit, kept, seen = config.prompts.limit, 0, set[int]()
    prompts: list[Prompt] = []
    rejects: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        prompt = make_prompt(row, config.prompts)
        if isinstance(prompt, Prompt) and prompt.id in seen:
            prompt = Rejected("duplicate", "an equal conversation came before")
        if isinstance(prompt, Rejected):
            rejects.append({"row": number, "reason": prompt.reason, "detail": prompt.detail})
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
        kept += 1
        if len(prompts) == config.prompts.shard_rows:
            yield prompts, rejects
            prompts, rejects = [], []
        if kept == limit:
            break
    if prompts or rejects:
        yield prompts, rejects


def make_prompt(row: Mapping[str, Any], settings: PromptsConfig) -> Prompt | Rejected:
    """A row as a prompt: roles checked, assistant turns dropped, id = hash of what is left."""
    messages = _messages(row)
    if isinstance(messages, Rejected):
        return messages
    roles = [message["role"] for message in messages]
    turns = [role for role in roles if role != "system"]
    if "system" in roles[1:]:
        return Rejected("system_not_first", f"roles are {roles}")
    if not turns or turns[0] != "user" or any(first == second for first, second in pairwise(turns)):
        return Rejected("roles_out_of_order", f"roles are {roles}")
    kept = [message for message in messages if message["role"] != "assistant"]
    content = canonical_json(kept)
    number = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    draw = int.from_bytes(hashlib.sha256(f"{settings.seed}:{number}".encode()).digest()[:8], "big") / 2**64
    domain = row.get("domain")
    return Prompt(number, draw < settings.held_out, str(domain) if domain is not None else None, content.decode())


def _messages(row: Mapping[str, Any]) -> list[dict[str, str]] | Rejected:
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
        if not isinstance(content, str) or not content.strip():
            return Rejected("empty_message", f"the {speaker} message has no text")
        messages.append({"role": SPEAKERS[speaker], "content": content})
    return messages


def read_source(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """The source's rows, one at a time, in an order that never changes."""
    match config.prompts.source:
        case DemoSource():
            demo = artifact_of(config, "demo")
            return read_file(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return (row for path in paths for row in read_file(path))
        case DatasetSource() as source:
            return _read_dataset(source)


def read_file(path: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL or Parquet file, streamed.

    Raises:
        DataError: the file is missing or empty, or a line is not a JSON object (its number is named).
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    number = 0
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(line, f"{path}, line {number}")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=path, fix="check the path and that the file is UTF-8 text") from None
    if number == 0:
        raise DataError("the file is empty", where=path, fix="give a file with one JSON object per line")


def _json_row(line: str, where: str) -> Mapping[str, Any]:
    fix = "every line must be one JSON object with `messages`, `conversations`, `turns` or `prompt`"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where, fix=fix) from None
    if not isinstance(row, dict):
        raise DataError(f"the line holds a {type(row).__name__}, not an object", where=where, fix=fix)
    return row


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=path, fix="check the path and the file") from None


def _read_dataset(source: DatasetSource) -> Iterator[Mapping[str, Any]]:
    import datasets

    where = f"data set {source.name}, split {source.split}, revision {source.revision}"
    try:
        if Path(source.name).is_dir():
            rows = datasets.load_dataset(source.name, source.subset, split=source.split)
        else:
            rows = datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision, streaming=True)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be loaded: {error}", where=where, fix="check name, subset, split and revision") from None
    yield from rows
