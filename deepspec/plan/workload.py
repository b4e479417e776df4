"""How long a run's training samples are: from its answers where there are some, else from its
prompts, else from its source.

A sample of rows goes through the very function that cuts them for capture, so templates, turns and
`hidden.max_length` count as they will. Answers that do not exist yet are as long as the source's
own, or as long as assumed.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow.parquet as pq

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import last_hidden_spans
from deepspec.config.data import DatasetSource, FileSource, HiddenConfig
from deepspec.errors import DataError
from deepspec.hidden.sequences import capture_rows
from deepspec.plan.assumed_answers import answered, assistant_texts
from deepspec.plan.parts import PER_PROMPTS, Number, SampleSize, TokenCounts, Workload
from deepspec.prompts.rows import Prompt, make_prompt
from deepspec.prompts.sources import is_on_hub, read_dataset, read_source
from deepspec.target.chat import Chat, load_chat

SAMPLE_SHARDS = 8  # that a sample is spread over
UNCUT = 2**31  # tokens; a max_length that cuts nothing


class _Rows(NamedTuple):
    """A sample of rows as the answers stage would write them, and the number of such rows."""

    answers: list[dict[str, Any]]
    sampled: int  # prompts that were read
    prompts: Number | None
    origin: str
    answers_from: str
    # Answer tokens in all rows, as their records have them, to those expected from the sample.
    answer_ratio: float | None = None


def sample_workload(run: Run, *, num_rows: int) -> Workload:
    """Tokens of the whole run, estimated from about `num_rows` of its prompts.

    Raises:
        DataError: the source cannot be read or holds nothing usable.
    """
    chat = load_chat(run)
    rows = (
        _from_answers(run, num_rows)
        or _from_prompts(run, chat, num_rows)
        or _from_source(run, chat, num_rows)
    )
    per_prompt = [_sizes(answer, chat, run.config.hidden) for answer in rows.answers]
    sizes = tuple(size for found in per_prompt for size in found)
    total = PER_PROMPTS if rows.prompts is None else rows.prompts
    scale = total / max(rows.sampled, 1)
    samples = TokenCounts(
        samples=len(sizes),
        tokens=sum(size.tokens for size in sizes),
        supervised=sum(size.supervised for size in sizes),
        kept_last=sum(size.kept_last for size in sizes),
    )
    counts = samples.scaled(scale)
    has_answers = rows.answer_ratio is not None
    if rows.answer_ratio is not None:
        added = counts.supervised * (rows.answer_ratio - 1)
        counts = TokenCounts(counts.samples, *(count + added for count in counts[1:]))
    is_whole = rows.prompts is not None and scale <= 1
    return Workload(
        prompts=rows.prompts,
        counts=counts,
        origin="exact" if is_whole and has_answers else rows.origin,
        answers_from=rows.answers_from,
        has_answers=has_answers,
        error=0.0
        if is_whole
        else relative_error([sum(size.tokens for size in found) for found in per_prompt]),
        sizes=sizes,
    )


def relative_error(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a sum scaled from this sample, relative to it."""
    if len(values) < 2 or not any(values):
        return 0.0
    return float(1.96 * np.std(values, ddof=1) / len(values) ** 0.5 / np.mean(values))


def _sizes(answer: dict[str, Any], chat: Chat, settings: HiddenConfig) -> list[SampleSize]:
    """The training samples that capture makes of one answered row."""
    whole = settings.model_copy(update={"max_length": UNCUT})
    uncut = {row.sample_id: len(row.input_ids) for row in capture_rows([answer], chat, whole).rows}
    return [
        SampleSize(
            tokens=len(row.input_ids),
            supervised=sum(row.loss_mask),
            kept_last=int(last_hidden_spans(row.loss_mask)[:, 1].sum()),
            uncut_tokens=uncut[row.sample_id],
        )
        for row in capture_rows([answer], chat, settings).rows
    ]


def _from_answers(run: Run, num_rows: int) -> _Rows | None:
    """Answers that are committed, scaled to all prompts; their records have the exact tokens."""
    artifact = run.artifact("answers")
    records = artifact.records().values()
    prompts = run.artifact("prompts").records().values()
    num_answers, total = sum(each.rows for each in records), sum(each.rows for each in prompts)
    if not num_answers or not total:
        return None
    answers = list(_spread(artifact, num_rows))
    seen = num_answers + sum(record.rejected for record in records)
    found = sum(turn["num_tokens"] for answer in answers for turn in answer["turns"])
    expected = found * num_answers / len(answers)
    sampled = round(len(answers) * seen / num_answers)
    there = "all" if len(records) == len(prompts) else f"{len(records)} of {len(prompts)} shards"
    return _Rows(
        answers,
        sampled=sampled,
        prompts=Number(total, "exact"),
        origin=f"sample of {sampled} answers",
        answers_from=f"{there} committed",
        answer_ratio=sum(record.tokens for record in records) / max(expected, 1),
    )


def _from_prompts(run: Run, chat: Chat, num_rows: int) -> _Rows | None:
    """Prompts that are committed, with answers as long as those in the source."""
    artifact = run.artifact("prompts")
    rows = list(_spread(artifact, num_rows))
    if not rows:
        return None
    texts: list[str] = []
    with suppress(DataError, OSError):  # the prompts are committed: the source may be gone
        source = islice(read_source(run, run.config.prompts.source), num_rows)
        texts = [text for row in source for text in assistant_texts(row)]
    prompts = [(row["id"], row["messages"]) for row in rows]
    answers, origin = answered(prompts, texts, chat, limit=run.config.answers.max_new_tokens)
    total = sum(record.rows for record in artifact.records().values())
    return _Rows(
        answers,
        sampled=len(rows),
        prompts=Number(total, "exact" if artifact.manifest() else "so far, not sealed"),
        origin=f"sample of {len(rows)} prompts",
        answers_from=origin,
    )


def _spread(artifact: Artifact, num_rows: int) -> Iterator[dict[str, Any]]:
    """About as many rows, evenly spread over evenly spread shards; all where there are no more."""
    records = [record for record in artifact.records().values() if record.rows]
    total = sum(record.rows for record in records)
    records = records[:: max(1, min(len(records) // SAMPLE_SHARDS, total // num_rows))]
    step = max(1, sum(record.rows for record in records) // num_rows)
    for record in records:
        table = read_table(artifact.fetch_shard(record))
        yield from table.take(np.arange(0, len(table), step)).to_pylist()


def _from_source(run: Run, chat: Chat, num_rows: int) -> _Rows:
    """The source's first usable rows.

    Raises:
        DataError: no row is usable.
    """
    settings = run.config.prompts
    wanted = min(num_rows, settings.limit or num_rows)
    found: dict[int, str] = {}
    texts: list[str] = []
    read, is_whole = 0, True
    for read, row in enumerate(read_source(run, settings.source), start=1):
        prompt = make_prompt(row, settings)
        if isinstance(prompt, Prompt) and prompt.id not in found:
            found[prompt.id] = prompt.messages
            texts += assistant_texts(row)
        if len(found) == wanted or read == 100 * wanted:
            is_whole = False
            break
    if not found:
        raise DataError(
            f"none of the source's first {read} rows is usable",
            where=f"prompts.source {settings.source}",
            fix="rows carry `messages`, `conversations`, `turns` or `prompt`; the prompts stage's "
            "rejects have the reasons",
        )
    answers, origin = answered(found.items(), texts, chat, limit=run.config.answers.max_new_tokens)
    whole = Number(len(found), "source, all usable")
    return _Rows(
        answers,
        sampled=len(found),
        prompts=whole if is_whole else _source_prompts(run, len(found) / read),
        origin=f"first {len(found)} of source",
        answers_from=origin,
    )


def _source_prompts(run: Run, usable: float) -> Number | None:
    limit, rows = run.config.prompts.limit, count_source_rows(run)
    if rows is None:
        return Number(limit, "limit; length unknown") if limit else None
    if limit and limit <= rows * usable:
        return Number(limit, "prompts.limit")
    share = "" if usable == 1 else f", {usable:.1%} usable"
    return Number(round(rows * usable), f"rows of the source{share}")


def count_source_rows(run: Run) -> int | None:
    """Rows of the source, of files without parsing them; None where that cannot be known."""
    match run.config.prompts.source:
        case DatasetSource() as source:
            return _dataset_rows(source)
        case FileSource(paths=paths):
            return sum(map(_file_rows, paths))
    demo = run.artifact("demo")
    return _file_rows(str(demo.store.fetch(demo.path("prompts.jsonl"))))


def _file_rows(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        if path.endswith(".parquet"):
            return int(pq.ParquetFile(file).metadata.num_rows)
        return sum(1 for line in file if line.strip())


def _dataset_rows(source: DatasetSource) -> int | None:
    import datasets

    if not is_on_hub(source):
        return sum(1 for _ in read_dataset(source))
    try:
        builder = datasets.load_dataset_builder(
            source.name, source.subset, revision=source.revision
        )
    except (OSError, ValueError):
        return None  # the rows themselves were readable; only their number is unknown
    split = (builder.info.splits or {}).get(source.split)
    return int(split.num_examples) or None if split else None
