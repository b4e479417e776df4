"""The prompts stage: rows of any source become shards of conversations with stable ids.

A prompt row keeps the user and system messages; what the assistant said in the source is dropped,
since the target answers anew. Rows that cannot be used go to the rejects with a reason; nothing
vanishes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import require_sealed
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.config.data import DatasetSource, PromptsConfig, PromptSource
from deepspec.errors import DataError
from deepspec.process.events import Report, silent
from deepspec.prompts.benchmarks import benchmark_digests
from deepspec.prompts.contamination import BenchmarkPrompts
from deepspec.prompts.rows import DUPLICATE, Prompt, Rejected, Seen, make_prompt
from deepspec.prompts.sources import pinned, read_source

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.uint64(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
        pa.field("domain", pa.string()),
        # JSON: [{role, content, ...}], assistant turns left out
        pa.field("messages", pa.large_string(), nullable=False),
        # JSON: what the target may call; null where there are none
        pa.field("tools", pa.large_string()),
    ]
)
BENCHMARK = "benchmark"  # like DUPLICATE, a reason that is no fault of a row


def run_prompts(run: Run, report: Report = silent) -> Artifact:
    """Read the source once, committing each shard that is not there yet, and seal.

    The source is read in order and shards are cut by row, so a run that was killed makes the same
    shards again.

    Raises:
        DataError: a source that cannot be read, is empty, or has too many unusable rows.
    """
    settings = run.config.prompts
    inputs = require_sealed(run, "prompts")
    benchmarks = BenchmarkPrompts(run)
    inputs |= benchmark_digests(run, "prompts")
    artifact = run.create("prompts")
    rows = read_source(run, _source(run, artifact))
    committed = artifact.records()
    totals = {"rows": 0, "rejected": 0, DUPLICATE: 0, BENCHMARK: 0}
    shard = -1
    for shard, (prompts, rejects) in enumerate(_shards(settings, rows, benchmarks)):
        started = time.monotonic()
        dropped = {
            reason: sum(reject["reason"] == reason for reject in rejects)
            for reason in (DUPLICATE, BENCHMARK)
        }
        for name, number in {"rows": len(prompts), "rejected": len(rejects), **dropped}.items():
            totals[name] += number
        if shard not in committed:
            put_rejects(artifact, shard, rejects)
            with artifact.store.staged() as local:
                write_table(
                    pa.Table.from_pylist([prompt._asdict() for prompt in prompts], SCHEMA), local
                )
                counts = Counts(rows=len(prompts), rejected=len(rejects), extra=dropped)
                artifact.commit(
                    shard, local, counts, upstream=None, seconds=time.monotonic() - started
                )
        report(
            {
                "event": "progress",
                "stage": "prompts",
                "done": shard + 1,
                "total": None,
                "unit": "shards",
                **totals,
            }
        )
    _check_share(settings, totals)
    artifact.seal(inputs=inputs, shards=range(shard + 1))
    return artifact


def _source(run: Run, artifact: Artifact) -> PromptSource:
    """The run's source; of a data set, the commit to read."""
    source = run.config.prompts.source
    if not isinstance(source, DatasetSource):
        return source
    return pinned(source, artifact, setting="prompts.source.revision=")


def _check_share(settings: PromptsConfig, totals: Mapping[str, int]) -> None:
    where = f"prompts.source {settings.source}"
    if totals["rows"] == 0:
        raise DataError(
            "the source holds no usable prompt",
            where=where,
            fix="see the rejects beside the artifact for the reasons",
        )
    # what was dropped on purpose is no fault of the source
    unusable = totals["rejected"] - totals[DUPLICATE] - totals[BENCHMARK]
    share = unusable / (totals["rows"] + totals["rejected"])
    if share > settings.max_rejected:
        what = f"{unusable} rows ({share:.1%}) were rejected, prompts.max_rejected is {settings.max_rejected:.1%}"
        raise DataError(
            what,
            where=where,
            fix="see the rejects beside the artifact; correct the rows or raise the limit",
        )


def _shards(
    settings: PromptsConfig, rows: Iterable[Mapping[str, Any]], benchmarks: BenchmarkPrompts
) -> Iterator[tuple[list[Prompt], list[dict[str, Any]]]]:
    """Cut the source into shards of `shard_rows` prompts."""
    limit, kept, seen = settings.limit, 0, Seen(settings)
    prompts: list[Prompt] = []
    rejects: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        prompt = make_prompt(row, settings)
        if isinstance(prompt, Prompt):
            prompt = seen.named(prompt)
        if isinstance(prompt, Prompt) and (benchmark := benchmarks.match(prompt.messages)):
            prompt = Rejected(BENCHMARK, f"it is a prompt of {benchmark}")
        if isinstance(prompt, Rejected):
            rejects.append({"row": number, "reason": prompt.reason, "detail": prompt.detail})
            continue
        prompts.append(prompt)
        kept += 1
        if len(prompts) == settings.shard_rows:
            yield prompts, rejects
            prompts, rejects = [], []
        if kept == limit:
            break
    if prompts or rejects:
        yield prompts, rejects
