"""A training sample as it will be captured, its supervised tokens marked, to debug a draft by."""

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
    """The sequences that capture makes of one row of the answers: a headline, then the tokens.

    Raises:
        ConfigError: there is no such shard or row.
    """
    artifact = run.artifact("answers")
    record = artifact.record(shard)
    if record is None:
        there = ", ".join(map(str, sorted(artifact.record_shards())[:20])) or "none"
        raise ConfigError(
            f"shard {shard} of the answers is not committed; of those that are: {there}",
            where=artifact.url,
            fix=f"run `{run.command('answers')} --shards {shard}`",
        )
    if not 0 <= row < record.rows:
        raise ConfigError(
            f"shard {shard} has {record.rows} rows, there is no row {row}",
            where=artifact.url,
            fix=f"give --row 0 to {record.rows - 1}",
        )
    (answer,) = read_table(artifact.fetch_shard(record)).slice(row, 1).to_pylist()
    chat = load_chat(run)
    found = capture_rows([answer], chat, run.config.hidden)
    numbers = {sequence_id(answer["id"], number): number for number in range(len(answer["turns"]))}
    # Capture orders them by length.
    for sample in sorted(found.rows, key=lambda sample: numbers[sample.sample_id]):
        tokens, supervised = len(sample.input_ids), sum(sample.loss_mask)
        purpose = "held out" if sample.held_out else "for training"
        yield Text(
            f"row {answer['id']:016x}, {answer['domain'] or 'no domain'}, {purpose}, "
            f"sequence {numbers[sample.sample_id]}: {tokens} tokens, "
            f"{supervised} supervised ({supervised / tokens:.0%})",
            style="bold",
        )
        yield _marked(sample, chat, colours=colours)
    for reject in found.rejects:
        reason = f"{reject['reason']} ({reject['detail']})"
        yield Text(f"sequence {reject['sequence']} is left out: {reason}", style="bold red")


def _marked(sample: CaptureRow, chat: Chat, *, colours: bool) -> Text:
    """The tokens as text; runs of one kind are decoded together, so that characters stay whole."""
    text = Text()
    start = 0
    for supervised, run in groupby(sample.loss_mask):
        end = start + len(list(run))
        part = str(chat.tokenizer.decode(sample.input_ids[start:end], skip_special_tokens=False))
        if supervised and not colours:
            part = f"{BEGIN}{part}{END}"
        text.append(part, style="bold green" if supervised else "dim")
        start = end
    return text
