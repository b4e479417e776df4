"""The prompts stage: rows of any source become shards of conversations with stable ids.

A prompt keeps the user's and system's messages of its row; the source's answers are dropped, since
the target answers itself. Rows that cannot be used go to the rejects with a reason: none is lost
without a trace.
"""

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import require_sealed
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.side_files import put_rejects
from deepspec.artifacts.tables import write_table
from deepspec.config.data import DatasetSource, PromptsConfig
from deepspec.errors import DataError
from deepspec.messages import parse_messages
from deepspec.process.events import Report, silent
from deepspec.prompts.benchmarks import benchmark_digests, read_benchmark
from deepspec.prompts.rows import DUPLICATE, Prompt, Rejected, SeenPrompts, make_prompt
from deepspec.prompts.sources import pin_revision, read_source

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
NOT_WORDS = re.compile(r"[\W_]+")
BENCHMARK = "benchmark"  # like DUPLICATE, a reason that is not the row's fault


class PromptShard(NamedTuple):
    """Prompts of consecutive rows, and what was rejected among them."""

    prompts: list[Prompt]
    rejects: list[dict[str, Any]]

    def dropped(self) -> dict[str, int]:
        """How many rows were rejected on purpose, by reason."""
        reasons = Counter(reject["reason"] for reject in self.rejects)
        return {reason: reasons[reason] for reason in (DUPLICATE, BENCHMARK)}


def run_prompts(run: Run, report: Report = silent) -> Artifact:
    """Read the source once, committing each shard that is missing, and seal.

    The source is read in order and shards are cut by row, so a run that was killed makes the same
    shards again.

    Raises:
        DataError: the source cannot be read, is empty, or has too many unusable rows.
    """
    settings = run.config.prompts
    inputs = require_sealed(run, "prompts") | benchmark_digests(run, "prompts")
    benchmarks = benchmark_texts(run)
    artifact = run.create("prompts")
    source = settings.source
    if isinstance(source, DatasetSource):
        source = pin_revision(source, artifact, setting="prompts.source.revision=")
    committed = artifact.records()
    totals = Counter({"rows": 0, "rejected": 0, DUPLICATE: 0, BENCHMARK: 0})
    progress = {"event": "progress", "stage": "prompts", "total": None, "unit": "shards"}
    number = -1
    for number, shard in enumerate(cut_shards(settings, read_source(run, source), benchmarks)):
        totals["rows"] += len(shard.prompts)
        totals["rejected"] += len(shard.rejects)
        totals.update(shard.dropped())
        if number not in committed:
            _commit(artifact, number, shard)
        report({**progress, "done": number + 1, **totals})
    _check_share(settings, totals)
    artifact.seal(inputs=inputs, shards=range(number + 1))
    return artifact


def cut_shards(
    settings: PromptsConfig, rows: Iterable[Mapping[str, Any]], benchmarks: Mapping[str, str]
) -> Iterator[PromptShard]:
    """Shards of `shard_rows` prompts, up to the limit; the last one may be shorter."""
    num_prompts = 0
    seen = SeenPrompts(settings)
    shard = PromptShard([], [])
    for number, row in enumerate(rows):
        prompt = make_prompt(row, settings)
        if isinstance(prompt, Prompt):
            prompt = seen.add(prompt)
        if isinstance(prompt, Prompt) and (benchmark := _benchmark_in(prompt.messages, benchmarks)):
            prompt = Rejected(BENCHMARK, f"it is a prompt of {benchmark}")
        if isinstance(prompt, Rejected):
            shard.rejects.append({"row": number, **prompt._asdict()})
            continue
        shard.prompts.append(prompt)
        num_prompts += 1
        if len(shard.prompts) == settings.shard_rows:
            yield shard
            shard = PromptShard([], [])
        if num_prompts == settings.limit:
            break
    if shard.prompts or shard.rejects:
        yield shard


def _commit(artifact: Artifact, number: int, shard: PromptShard) -> None:
    started = time.monotonic()
    put_rejects(artifact, number, shard.rejects)
    rows = [prompt._asdict() for prompt in shard.prompts]
    counts = Counts(rows=len(rows), rejected=len(shard.rejects), counts=shard.dropped())
    with artifact.store.staged() as local:
        write_table(pa.Table.from_pylist(rows, SCHEMA), local)
        seconds = time.monotonic() - started
        artifact.commit(number, local, counts, upstream=None, seconds=seconds)


def _check_share(settings: PromptsConfig, totals: Mapping[str, int]) -> None:
    where = f"prompts.source {settings.source}"
    if totals["rows"] == 0:
        raise DataError(
            "the source holds no usable prompt",
            where=where,
            fix="see the reasons in the artifact's rejects",
        )
    # rows that were dropped on purpose are not the source's fault
    unusable = totals["rejected"] - totals[DUPLICATE] - totals[BENCHMARK]
    share = unusable / (totals["rows"] + totals["rejected"])
    if share > settings.max_rejected:
        raise DataError(
            f"{unusable} rows ({share:.1%}) were rejected,"
            f" prompts.max_rejected is {settings.max_rejected:.1%}",
            where=where,
            fix="see the artifact's rejects; correct the rows or raise the limit",
        )


def benchmark_texts(run: Run) -> dict[str, str]:
    """The turns of the benchmarks in `prompts.decontaminate`, normalised, each with its benchmark.

    Of a known benchmark also the bare problems, as a training set may have them without the
    benchmark's wording (trap A7).

    Raises:
        DataError: a benchmark cannot be read, or has a line without turns.
    """
    benchmark_of = {
        normalised(text): name
        for name in run.config.prompts.decontaminate
        for turns, problem in read_benchmark(run, name)
        for text in (*turns, problem or "")
    }
    # a turn without a word in it would match every other such message
    benchmark_of.pop("", None)
    return benchmark_of


def _benchmark_in(messages: str, benchmark_of: Mapping[str, str]) -> str | None:
    """The benchmark, if any, that contains one of the user's messages (JSON) of a prompt."""
    if not benchmark_of:
        return None
    users = (message for message in parse_messages(messages) if message.role == "user")
    found = (benchmark_of.get(normalised(message.content)) for message in users)
    return next(filter(None, found), None)


def normalised(text: str) -> str:
    """The text as bare words, without case, punctuation, spacing and encoding of accents."""
    return NOT_WORDS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
