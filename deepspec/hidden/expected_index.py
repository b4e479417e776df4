"""The index of a cache before any of it is captured: answers rendered as capture renders them.

A small Arrow file per shard in the hidden artifact (`planned/`), named by the answers that it was
made from: made once, resumed where it was left, and used again by every later start.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import last_hidden_spans
from deepspec.cache.index import (
    EXPECTED_SCHEMA,
    ExpectedIndex,
    column_values,
    decode_rows,
    encode_rows,
)
from deepspec.config.data import HiddenConfig
from deepspec.errors import DamagedData, TransientError
from deepspec.hidden.sequences import CaptureRow, capture_order, capture_rows
from deepspec.target.chat import Chat

log = logging.getLogger(__name__)

FOLDER = "planned"
POLL_S = 1.0


def write_expected_index(
    stage: ShardedStage, chat: Chat, settings: HiddenConfig, *, shards: Sequence[int] | None = None
) -> None:
    """Render the shards of answers (None: all) that are not rendered yet."""
    artifact, answers = stage.artifact, stage.upstream
    todo = unrendered(artifact, answers.records(shards))
    began = time.monotonic()
    for done, record in enumerate(todo, start=1):
        rendered = _rendered(record.shard, answers.rows(record), chat, settings)
        artifact.write(_name(record), rendered)
        if done % 100 == 0 or done == len(todo):
            message = "stage=hidden rendered %d of %d shards of answers in %.0f s"
            log.info(message, done, len(todo), time.monotonic() - began)


def unrendered(artifact: Artifact, answers: Mapping[int, Record]) -> list[Record]:
    """The shards of answers that are not rendered yet."""
    found = {f"{FOLDER}/{name}" for name in artifact.names(FOLDER)}
    return [record for record in answers.values() if _name(record) not in found]


def read_expected_index(stage: ShardedStage) -> ExpectedIndex:
    """The index over all rendered shards.

    Raises:
        TransientError: one of them was removed meanwhile.
    """
    artifact = stage.artifact
    names = [artifact.path(_name(record)) for record in stage.upstream.records().values()]
    shards = [pa.RecordBatch.from_pylist([], schema=EXPECTED_SCHEMA)]
    for name, data in zip(names, artifact.store.read_many(names), strict=True):
        if data is None:
            raise TransientError(
                "a part of the expected index is gone",
                where=name,
                fix="run it again: it is made anew",
            )
        shards.append(decode_rows(data))
    index = pa.concat_batches(shards)
    return ExpectedIndex(*(column_values(index, name) for name in ExpectedIndex._fields))


def kept_spans(row: CaptureRow, settings: HiddenConfig) -> np.ndarray:
    """The runs [n, 2] (start, length) of positions whose final hidden state is kept."""
    return last_hidden_spans(row.loss_mask if settings.last_hidden == "supervised" else [])


def row_reader(
    answers: Artifact, chat: Chat, settings: HiddenConfig, index: ExpectedIndex, *, num_tables: int
) -> Callable[[int], CaptureRow]:
    """Gives the rows of a run by their number in the index, each rendered when it is asked for.

    A rank need not render what others train on. The function raises DamagedData where the index
    does not fit the answers.
    """
    records = answers.records()

    @lru_cache(num_tables)
    def table(shard: int) -> pa.Table:
        return read_table(answers.fetch_shard(records[shard]))

    def read_row(number: int) -> CaptureRow:
        shard, sample_id = int(index.shard[number]), int(index.sample_id[number])
        answer = table(shard).slice(int(index.answer[number]), 1).to_pylist()
        for row in capture_rows(answer, chat, settings).rows:
            if row.sample_id == sample_id and len(row.input_ids) == index.num_tokens[number]:
                return row
        raise DamagedData(
            f"sample {sample_id:016x} is not in shard {shard} of the answers as the index has it",
            where=answers.url,
            fix=f"remove the folder {FOLDER!r} of the hidden artifact: it is made again",
        )

    return read_row


def _name(record: Record) -> str:
    return f"{FOLDER}/{record.shard:05d}-{record.checksum[:12]}.arrow"


def _rendered(
    shard: int, answers: Sequence[dict[str, object]], chat: Chat, settings: HiddenConfig
) -> bytes:
    """The rows that capture makes of a shard of answers, in order, each with its answer's place."""
    rows = [
        (row, answer)
        for answer, fields in enumerate(answers)
        for row in capture_rows([fields], chat, settings).rows
    ]
    rows.sort(key=lambda found: capture_order(found[0]))
    entries = [
        {
            "sample_id": row.sample_id,
            "shard": shard,
            "row": place,
            "num_tokens": len(row.input_ids),
            "num_supervised": sum(row.loss_mask),
            "num_last": int(kept_spans(row, settings)[:, 1].sum()),
            "held_out": int(row.held_out),
            "answer": answer,
        }
        for place, (row, answer) in enumerate(rows)
    ]
    return encode_rows(entries, EXPECTED_SCHEMA)
