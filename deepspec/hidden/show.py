"""A training sample as it will be captured, with the supervised tokens marked: where debugging
a draft begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.text import Text

from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table
from deepspec.errors import ConfigError
from deepspec.hidden.sequences import CaptureRow, capture_rows, sequence_id
from deepspec.target.chat import Chat, load_chat

BEGIN, END = "⟦", "⟧"  # around what is supervised, where colours would be lost


def show_sample(run: Run, *, shard: int, row: int, colours: bool) -> Iterator[Text]:
    """The sequences that capture makes of one row of the answers; each a headline, then its tokens
    as text.

    Raises:
        ConfigError: there is no such shard or row.
    """
    config = run.config
    artifact = run.artifact("answers")
    record = artifact.record(shard)
    if record is None:
        there = ", ".join(map(str, sorted(artifact.record_shards())[:20])) or "none"
        fix = f"run `{run.command('answers')} --shards {shard}`"
        raise ConfigError(
            f"shard {shard} of the answers is not committed; of those that are: {there}",
            where=artifact.url,
            fix=fix,
        )
    if not 0 <= row < record.rows:
        fix = f"give --row 0 to {record.rows - 1}"
        raise ConfigError(
            f"shard {shard} has {record.rows} rows, there is no row {row}",
            where=artifact.url,
            fix=fix,
        )
    (answer,) = read_table(artifact.fetch_shard(record)).slice(row, 1).to_pylist()
    chat = load_chat(run)
    found = capture_rows([answer], chat, config.hidden)
    numbers = {sequence_id(answer["id"], number): number for number in range(len(answer["turns"]))}
    # capture wants them by length
    for sample in sorted(found.rows, key=lambda sample: numbers[sample.sample_id]):
        yield Text(_headline(answer, sample, numbers[sample.sample_id]), style="bold")
        yield _marked(sample, chat, colours=colours)
    for reject in found.rejects:
        yield Text(
            f"sequence {reject['sequence']} is left out: {reject['reason']} ({reject['detail']})",
            style="bold red",
        )


def _headline(answer: dict[str, object], sample: CaptureRow, number: int) -> str:
    tokens, supervised = len(sample.input_ids), sum(sample.loss_mask)
    place = "held out" if sample.held_out else "for training"
    row = f"row {answer['id']:016x}, {answer['domain'] or 'no domain'}, {place}, sequence {number}"
    return f"{row}: {tokens} tokens, {supervised} supervised ({supervised / tokens:.0%})"


def _marked(sample: CaptureRow, chat: Chat, *, colours: bool) -> Text:
    """Runs of tokens of one kind are decoded together, so that characters of several tokens
    stay whole.
    """
    text, place = Text(), 0
    for supervised, run in groupby(sample.loss_mask):
        ids = sample.input_ids[place : (place := place + len(list(run)))]
        said = str(chat.tokenizer.decode(ids, skip_special_tokens=False))
        text.append(
            said if colours or not supervised else f"{BEGIN}{said}{END}",
            style="bold green" if supervised else "dim",
        )
    return text
