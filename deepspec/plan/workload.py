"""How long a run's training samples are: from its answers where there are some, else from its
prompts, else its source.

A sample of rows goes through the very function that cuts them for capture, so templates, turns and
`hidden.max_length` count as they will. Answers that are not there yet are as long as the source's
own, or as long as assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import fsspec

from deepspec.artifacts.records import Record
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import last_hidden_spans
from deepspec.config.data import DatasetSource, DemoSource, FileSource
from deepspec.config.run import RunConfig
from deepspec.errors import DataError
from deepspec.hidden.sequences import capture_rows
from deepspec.plan.arithmetic import Number, TokenCounts, relative_error
from deepspec.plan.assumed_answers import StandIns, assistant_texts
from deepspec.plan.forecast import PER_PROMPTS, SampleSize, Workload
from deepspec.prompts.data_sets import is_on_hub, read_dataset
from deepspec.prompts.rows import Prompt, make_prompt
from deepspec.prompts.sources import read_source
from deepspec.target.chat import Chat

SAMPLE_SHARDS = 8  # that a sample is spread over
UNCUT = 2**31  # tokens; a max_length that cuts nothing


class _Rows(NamedTuple):
    """A sample of rows as the answers stage would write them, and how many such rows there are
    in all.
    """

    answers: list[dict[str, Any]]
    sampled: int  # prompts looked at
    prompts: Number | None
    origin: str
    answers_from: str
    answer_tokens: float | None = None  # in all rows, where the records say


def sample_workload(run: Run, chat: Chat, *, num_rows: int) -> Workload:
    """Tokens of the whole run, estimated from about `num_rows` of its prompts.

    Raises:
        DataError: the source cannot be read or holds nothing usable.
    """
    config = run.config
    rows = (
        _from_answers(run, num_rows)
        or _from_prompts(run, chat, num_rows)
        or _from_source(run, chat, num_rows)
    )
    per_answer = [_sizes(answer, chat, config) for answer in rows.answers]
    sizes = tuple(size for found in per_answer for size in found)
    sampled = TokenCounts(
        len(sizes),
        *(float(sum(column)) for column in list(zip(*sizes, strict=True))[:3])
        if sizes
        else (0.0,) * 3,
    )
    total = rows.prompts.value if rows.prompts else PER_PROMPTS
    counts = sampled.scaled(total / max(rows.sampled, 1))
    whole = rows.prompts is not None and rows.sampled >= total
    if rows.answer_tokens and not whole:
        counts = _with_known_answers(counts, rows, total)
    has_answers = rows.answer_tokens is not None
    known = "exact" if whole and has_answers else rows.origin
    error = (
        0.0
        if whole
        else relative_error([sum(size.tokens for size in found) for found in per_answer])
    )
    return Workload(rows.prompts, counts, known, rows.answers_from, has_answers, error, sizes)


def _with_known_answers(counts: TokenCounts, rows: _Rows, total: float) -> TokenCounts:
    """The estimate with its answer tokens set right: the sample's were a little more or less
    than the records'.
    """
    sampled = (
        sum(turn["num_tokens"] for answer in rows.answers for turn in answer["turns"])
        * total
        / rows.sampled
    )
    added = counts.supervised * ((rows.answer_tokens or sampled) / max(sampled, 1) - 1)
    return TokenCounts(
        counts.samples, counts.tokens + added, counts.supervised + added, counts.kept_last + added
    )


def _sizes(answer: Mapping[str, Any], chat: Chat, config: RunConfig) -> list[SampleSize]:
    """The training samples that capture makes of one answered row."""
    rows = capture_rows([dict(answer)], chat, config.hidden).rows
    uncut = [len(row.input_ids) for row in rows]
    if any(length == config.hidden.max_length for length in uncut):
        uncut_settings = config.hidden.model_copy(update={"max_length": UNCUT})
        whole = {
            row.sample_id: row for row in capture_rows([dict(answer)], chat, uncut_settings).rows
        }
        uncut = [len(whole[row.sample_id].input_ids) for row in rows]
    return [
        SampleSize(
            len(row.input_ids),
            sum(row.loss_mask),
            int(last_hidden_spans(row.loss_mask)[:, 1].sum()),
            length,
        )
        for row, length in zip(rows, uncut, strict=True)
    ]


def _from_answers(run: Run, num_rows: int) -> _Rows | None:
    """Answers that are committed, scaled to all prompts; their records know the answer tokens
    exactly.
    """
    records, prompts = run.artifact("answers").records(), _committed_prompts(run)
    answered = sum(record.rows for record in records.values())
    if not answered or not prompts:
        return None
    answers = list(_spread(run, "answers", num_rows))
    total = sum(record.rows for record in prompts.values())
    seen = answered + sum(record.rejected for record in records.values())
    sampled = seen if len(answers) == answered else round(len(answers) * seen / answered)
    tokens = sum(record.tokens for record in records.values()) * total / seen
    there = "all" if len(records) == len(prompts) else f"{len(records)} of {len(prompts)} shards"
    return _Rows(
        answers,
        sampled,
        Number(total, "exact"),
        f"sample of {sampled} answers",
        f"{there} committed",
        tokens,
    )


def _from_prompts(run: Run, chat: Chat, num_rows: int) -> _Rows | None:
    """Prompts that are committed, with answers as long as those in the source."""
    config = run.config
    records = _committed_prompts(run)
    total = sum(record.rows for record in records.values())
    if not total:
        return None
    sealed = run.artifact("prompts").manifest() is not None
    stand_ins = StandIns(config, chat, _source_answers(run, num_rows))
    rows = list(_spread(run, "prompts", num_rows))
    answers = [stand_ins.answered(row["id"], row["messages"], ()) for row in rows]
    prompts = Number(total, "exact") if sealed else Number(total, "so far, not sealed")
    return _Rows(answers, len(rows), prompts, f"sample of {len(rows)} prompts", stand_ins.origin)


def _committed_prompts(run: Run) -> dict[int, Record]:
    return run.artifact("prompts").records()


def _spread(run: Run, stage: str, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows evenly spread over a few evenly spread shards of a stage; all rows where there are
    no more.
    """
    artifact = run.artifact(stage)
    records = list(artifact.records().values())
    total = sum(record.rows for record in records)
    if total > num_rows:
        # small shards: as many as it takes
        records = _evenly(records, max(SAMPLE_SHARDS, -(-num_rows * len(records) // total)))
    for index, record in enumerate(records):
        wanted = num_rows * (index + 1) // len(records) - num_rows * index // len(records)
        table = read_table(artifact.fetch_shard(record))
        places = list(range(len(table)))
        yield from table.take(places if total <= num_rows else _evenly(places, wanted)).to_pylist()


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    return (
        [items[index * len(items) // count] for index in range(count)]
        if len(items) > count
        else list(items)
    )


def _from_source(run: Run, chat: Chat, num_rows: int) -> _Rows:
    """The source's first usable rows; how many there are in all is what the source says, if it
    does.

    Raises:
        DataError: no row is usable.
    """
    config = run.config
    wanted = min(num_rows, config.prompts.limit or num_rows)
    ended, seen, read, found = False, set[int](), 0, list[tuple[Prompt, tuple[str, ...]]]()
    for read, row in enumerate(read_source(run, run.config.prompts.source), start=1):
        prompt = make_prompt(row, config.prompts)
        if isinstance(prompt, Prompt) and prompt.id not in seen:
            seen.add(prompt.id)
            found.append((prompt, assistant_texts(row)))
        if len(found) == wanted or read == 100 * wanted:
            break
    else:
        ended = True
    if not found:
        fix = "rows carry `messages`, `conversations`, `turns` or `prompt`; see the prompts stage's rejects for reasons"
        raise DataError(
            f"none of the source's first {read} rows is usable",
            where=f"prompts.source {config.prompts.source}",
            fix=fix,
        )
    stand_ins = StandIns(config, chat, [text for _, texts in found for text in texts])
    answers = [stand_ins.answered(prompt.id, prompt.messages, texts) for prompt, texts in found]
    prompts = (
        Number(len(found), "source, all usable")
        if ended
        else _source_prompts(run, len(found) / read)
    )
    return _Rows(answers, len(found), prompts, f"first {len(found)} of source", stand_ins.origin)


def _source_prompts(run: Run, usable: float) -> Number | None:
    config = run.config
    limit, rows = config.prompts.limit, count_source_rows(run)
    if rows is None:
        return Number(limit, "limit; length unknown") if limit else None
    if limit and limit <= rows * usable:
        return Number(limit, "prompts.limit")
    return Number(
        round(rows * usable),
        "rows of the source" if usable == 1 else f"rows of the source, {usable:.1%} usable",
    )


def count_source_rows(run: Run) -> int | None:
    """Rows of the source, of files without parsing them; None where that cannot be known."""
    config = run.config
    match config.prompts.source:
        case DemoSource():
            demo = run.artifact("demo")
            return _count_rows(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return sum(_count_rows(path) for path in paths)
        case DatasetSource() as source:
            return _dataset_rows(source)


def _count_rows(path: str) -> int:
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        with fsspec.open(path, "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    with fsspec.open(path, "rb") as lines:
        return sum(1 for line in lines if line.strip())


def _dataset_rows(source: DatasetSource) -> int | None:
    import datasets

    if not is_on_hub(source):
        return sum(1 for _ in read_dataset(source))
    try:
        splits = (
            datasets.load_dataset_builder(
                source.name, source.subset, revision=source.revision
            ).info.splits
            or {}
        )
    except (OSError, ValueError):
        return None  # the rows themselves were readable; only their number is unknown
    return int(splits[source.split].num_examples) or None if source.split in splits else None


def _source_answers(run: Run, num_rows: int) -> list[str]:
    try:
        return [
            text
            for row in islice(read_source(run, run.config.prompts.source), num_rows)
            for text in assistant_texts(row)
        ]
    except (DataError, OSError):
        return []  # the prompts are committed: the source may be gone
