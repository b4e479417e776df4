"""How long a run's training samples are: from its answers where there are some, else from its
prompts, else from its source.

A sample of rows goes through the very function that cuts them for capture, so templates, turns and
`hidden.max_length` count as they will. Answers that do not exist yet are as long as the source's
own, or as long as assumed.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import last_hidden_spans
from deepspec.config.data import HiddenConfig
from deepspec.errors import DataError
from deepspec.hidden.sequences import capture_rows
from deepspec.plan.arithmetic import Number, TokenCounts, relative_error
from deepspec.plan.assumed_answers import AssumedAnswers, assistant_texts
from deepspec.plan.parts import PER_PROMPTS, SampleSize, Workload
from deepspec.plan.source_rows import count_source_rows
from deepspec.prompts.rows import Prompt, make_prompt
from deepspec.prompts.sources import read_source
from deepspec.target.chat import Chat

Item = TypeVar("Item")
SAMPLE_SHARDS = 8  # that a sample is spread over
UNCUT = 2**31  # tokens; a max_length that cuts nothing


class _Rows(NamedTuple):
    """A sample of rows as the answers stage would write them, and the number of such rows."""

    answers: list[dict[str, Any]]
    sampled: int  # prompts that were read
    prompts: Number | None
    origin: str
    answers_from: str
    answer_tokens: float | None = None  # in all rows, where the records have them


def sample_workload(run: Run, chat: Chat, *, num_rows: int) -> Workload:
    """Tokens of the whole run, estimated from about `num_rows` of its prompts.

    Raises:
        DataError: the source cannot be read or holds nothing usable.
    """
    rows = (
        _from_answers(run, num_rows)
        or _from_prompts(run, chat, num_rows)
        or _from_source(run, chat, num_rows)
    )
    per_answer = [_sizes(answer, chat, run.config.hidden) for answer in rows.answers]
    sizes = tuple(size for found in per_answer for size in found)
    total = rows.prompts.value if rows.prompts else PER_PROMPTS
    counts = TokenCounts(
        samples=len(sizes),
        tokens=sum(size.tokens for size in sizes),
        supervised=sum(size.supervised for size in sizes),
        kept_last=sum(size.kept_last for size in sizes),
    ).scaled(total / max(rows.sampled, 1))
    is_whole = rows.prompts is not None and rows.sampled >= total
    if rows.answer_tokens and not is_whole:
        counts = _with_known_answers(counts, rows, total)
    has_answers = rows.answer_tokens is not None
    tokens = [sum(size.tokens for size in found) for found in per_answer]
    return Workload(
        prompts=rows.prompts,
        counts=counts,
        origin="exact" if is_whole and has_answers else rows.origin,
        answers_from=rows.answers_from,
        has_answers=has_answers,
        error=0.0 if is_whole else relative_error(tokens),
        sizes=sizes,
    )


def _with_known_answers(counts: TokenCounts, rows: _Rows, total: float) -> TokenCounts:
    """The estimate with the records' answer tokens: the sample's are a little more or less."""
    turns = [turn for answer in rows.answers for turn in answer["turns"]]
    sampled = sum(turn["num_tokens"] for turn in turns) * total / rows.sampled
    added = counts.supervised * ((rows.answer_tokens or sampled) / max(sampled, 1) - 1)
    return counts._replace(
        tokens=counts.tokens + added,
        supervised=counts.supervised + added,
        kept_last=counts.kept_last + added,
    )


def _sizes(answer: Mapping[str, Any], chat: Chat, settings: HiddenConfig) -> list[SampleSize]:
    """The training samples that capture makes of one answered row."""
    rows = capture_rows([dict(answer)], chat, settings).rows
    uncut = {row.sample_id: len(row.input_ids) for row in rows}
    if settings.max_length in uncut.values():
        whole = settings.model_copy(update={"max_length": UNCUT})
        rows_uncut = capture_rows([dict(answer)], chat, whole).rows
        uncut = {row.sample_id: len(row.input_ids) for row in rows_uncut}
    return [
        SampleSize(
            tokens=len(row.input_ids),
            supervised=sum(row.loss_mask),
            kept_last=int(last_hidden_spans(row.loss_mask)[:, 1].sum()),
            uncut_tokens=uncut[row.sample_id],
        )
        for row in rows
    ]


def _from_answers(run: Run, num_rows: int) -> _Rows | None:
    """Answers that are committed, scaled to all prompts; their records have the exact tokens."""
    artifact = run.artifact("answers")
    records = list(artifact.records().values())
    prompts = list(run.artifact("prompts").records().values())
    answered, total = sum(each.rows for each in records), sum(each.rows for each in prompts)
    if not answered or not total:
        return None
    answers = list(_spread(artifact, num_rows))
    seen = answered + sum(record.rejected for record in records)
    sampled = round(len(answers) * seen / answered)
    there = "all" if len(records) == len(prompts) else f"{len(records)} of {len(prompts)} shards"
    return _Rows(
        answers,
        sampled=sampled,
        prompts=Number(total, "exact"),
        origin=f"sample of {sampled} answers",
        answers_from=f"{there} committed",
        answer_tokens=sum(record.tokens for record in records) * total / seen,
    )


def _from_prompts(run: Run, chat: Chat, num_rows: int) -> _Rows | None:
    """Prompts that are committed, with answers as long as those in the source."""
    artifact = run.artifact("prompts")
    rows = list(_spread(artifact, num_rows))
    if not rows:
        return None
    assumed = AssumedAnswers(chat, _source_answers(run, num_rows), limit=_answer_limit(run))
    total = sum(record.rows for record in artifact.records().values())
    return _Rows(
        [assumed.answered(row["id"], row["messages"]) for row in rows],
        sampled=len(rows),
        prompts=Number(total, "exact" if artifact.manifest() else "so far, not sealed"),
        origin=f"sample of {len(rows)} prompts",
        answers_from=assumed.origin,
    )


def _answer_limit(run: Run) -> int:
    return run.config.answers.max_new_tokens


def _spread(artifact: Artifact, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows evenly spread over a few evenly spread shards; all rows where there are no more."""
    records = list(artifact.records().values())
    total = sum(record.rows for record in records)
    if total <= num_rows:
        for record in records:
            yield from read_table(artifact.fetch_shard(record)).to_pylist()
        return
    # of small shards as many as it takes
    chosen = _evenly(records, max(SAMPLE_SHARDS, -(-num_rows * len(records) // total)))
    for index, record in enumerate(chosen):
        wanted = num_rows * (index + 1) // len(chosen) - num_rows * index // len(chosen)
        table = read_table(artifact.fetch_shard(record))
        yield from table.take(_evenly(range(len(table)), wanted)).to_pylist()


def _evenly(items: Sequence[Item], count: int) -> list[Item]:
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _from_source(run: Run, chat: Chat, num_rows: int) -> _Rows:
    """The source's first usable rows.

    Raises:
        DataError: no row is usable.
    """
    settings = run.config.prompts
    wanted = min(num_rows, settings.limit or num_rows)
    found: dict[int, tuple[Prompt, tuple[str, ...]]] = {}
    read, is_whole = 0, True
    for read, row in enumerate(read_source(run, settings.source), start=1):
        prompt = make_prompt(row, settings)
        if isinstance(prompt, Prompt):
            found.setdefault(prompt.id, (prompt, assistant_texts(row)))
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
    texts = [text for _, answers in found.values() for text in answers]
    assumed = AssumedAnswers(chat, texts, limit=_answer_limit(run))
    whole = Number(len(found), "source, all usable")
    return _Rows(
        [assumed.answered(prompt.id, prompt.messages) for prompt, _ in found.values()],
        sampled=len(found),
        prompts=whole if is_whole else _source_prompts(run, len(found) / read),
        origin=f"first {len(found)} of source",
        answers_from=assumed.origin,
    )


def _source_prompts(run: Run, usable: float) -> Number | None:
    limit, rows = run.config.prompts.limit, count_source_rows(run)
    if rows is None:
        return Number(limit, "limit; length unknown") if limit else None
    if limit and limit <= rows * usable:
        return Number(limit, "prompts.limit")
    share = "" if usable == 1 else f", {usable:.1%} usable"
    return Number(round(rows * usable), f"rows of the source{share}")


def _source_answers(run: Run, num_rows: int) -> list[str]:
    try:
        rows = islice(read_source(run, run.config.prompts.source), num_rows)
        return [text for row in rows for text in assistant_texts(row)]
    except (DataError, OSError):
        return []  # the prompts are committed: the source may be gone
