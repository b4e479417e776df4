"""The index of a cache before any of it is captured: the answers render_rows as capture renders them,
without the target.

A small Arrow file per shard in the hidden artifact (`planned/`), named by the answers that it was
made from: made once, taken up where it was left, and used again by every later start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.missing import ShardedStage
from deepspec.artifacts.records import Record
from deepspec.artifacts.tables import read_table
from deepspec.cache.format import last_hidden_spans
from deepspec.cache.index import (
    ROWS_AT_A_TIME,
    TYPES,
    ExpectedIndex,
    column_values,
    read_index_rows,
)
from deepspec.config.data import HiddenConfig
from deepspec.config.run import RunConfig
from deepspec.errors import DamagedData, TransientError
from deepspec.hidden.sequences import CaptureRow, capture_rows, in_order
from deepspec.target.chat import Chat

log = logging.getLogger(__name__)

FOLDER = "planned"
POLL_S = 1.0


SCHEMA = pa.schema(
    [pa.field(name, TYPES.get(name, pa.uint32()), nullable=False) for name in ExpectedIndex._fields]
)


def write_expected_index(
    config: RunConfig, stage: ShardedStage, chat: Chat, *, shards: Sequence[int] | None = None
) -> None:
    """Render the shards of answers (all, or those asked for) that were not before."""
    records = stage.upstream.records(shards)
    todo = unrendered(stage.artifact, records)
    began = time.monotonic()
    for done, record in enumerate(todo, start=1):
        rows = render_rows(
            read_table(stage.upstream.fetch_shard(record)).to_pylist(), chat, config.hidden
        )
        stage.artifact.store.write(
            stage.artifact.path(_name(record)), _encode(record.shard, rows, config.hidden)
        )
        if done % 100 == 0 or done == len(todo):
            log.info(
                "stage=hidden render_rows %d of %d shards of answers in %.0f s",
                done,
                len(todo),
                time.monotonic() - began,
            )


def unrendered(artifact: Artifact, records: Mapping[int, Record]) -> list[Record]:
    """The shards of answers that are not render_rows yet."""
    found = set(artifact.store.names(artifact.path(FOLDER)))
    return [record for record in records.values() if _name(record).partition("/")[2] not in found]


def await_expected_index(stage: ShardedStage) -> None:
    """Return when another process has render_rows all shards; there is no limit to how long that
    may take.
    """
    records = stage.upstream.records()
    while unrendered(stage.artifact, records):
        time.sleep(POLL_S)


def read_expected_index(stage: ShardedStage) -> ExpectedIndex:
    """The index over all render_rows shards.

    Raises:
        TransientError: one of them was removed meanwhile.
    """
    names, tables = (
        [stage.artifact.path(_name(record)) for record in stage.upstream.records().values()],
        [SCHEMA.empty_table()],
    )
    for start in range(0, len(names), ROWS_AT_A_TIME):
        for name, data in zip(
            names[start:],
            stage.artifact.store.read_many(names[start : start + ROWS_AT_A_TIME]),
            strict=False,
        ):
            if data is None:
                raise TransientError(
                    "a part of the planned index is gone",
                    where=name,
                    fix="run it again: it is made anew",
                )
            tables.append(read_index_rows(data))
    whole = pa.concat_tables(tables).combine_chunks()
    batch = (whole.to_batches() or [pa.RecordBatch.from_pylist([], schema=SCHEMA)])[0]
    return ExpectedIndex(*(column_values(batch, name) for name in ExpectedIndex._fields))


def render_rows(
    answers: Sequence[dict[str, object]], chat: Chat, settings: HiddenConfig
) -> list[tuple[CaptureRow, int]]:
    """The rows that capture makes of a shard of answers, in its order, each with the number of
    its answer.
    """
    rows = [
        (row, number)
        for number, answer in enumerate(answers)
        for row in capture_rows([answer], chat, settings).rows
    ]
    return sorted(rows, key=lambda found: in_order(found[0]))


def kept_spans(row: CaptureRow, settings: HiddenConfig) -> np.ndarray:
    """The runs [n, 2] (start, length) of positions whose final hidden state is kept."""
    return last_hidden_spans(row.loss_mask if settings.last_hidden == "supervised" else [])


class ExpectedRows:
    """The rows of a run by number, each render_rows when it is asked for: a rank need not render
    what others train on.
    """

    def __init__(
        self, config: RunConfig, stage: ShardedStage, chat: Chat, index: ExpectedIndex
    ) -> None:
        self.settings, self.upstream, self.chat, self.index = (
            config.hidden,
            stage.upstream,
            chat,
            index,
        )
        self._records = stage.upstream.records()
        self._table = lru_cache(2 * config.train.window_shards)(
            lambda shard: read_table(self.upstream.fetch_shard(self._records[shard]))
        )

    def __getitem__(self, number: int) -> CaptureRow:
        """Row `number` of the index.

        Raises:
            DamagedData: the index does not fit the answers.
        """
        shard, answer, sample_id = (
            int(column[number])
            for column in (self.index.shard, self.index.answer, self.index.sample_id)
        )
        for row in capture_rows(
            self._table(shard).slice(answer, 1).to_pylist(), self.chat, self.settings
        ).rows:
            if (row.sample_id, len(row.input_ids)) == (
                sample_id,
                int(self.index.num_tokens[number]),
            ):
                return row
        what = f"sample {sample_id:016x} is not what shard {shard} of the answers says"
        raise DamagedData(
            what,
            where=self.upstream.url,
            fix=f"remove the folder {FOLDER!r} of the hidden artifact: it is made again",
        )


def _name(record: Record) -> str:
    return f"{FOLDER}/{record.shard:05d}-{record.checksum[:12]}.arrow"


def _encode(shard: int, rows: Sequence[tuple[CaptureRow, int]], settings: HiddenConfig) -> bytes:
    entries = []
    for place, (row, answer) in enumerate(rows):
        num_last = int(kept_spans(row, settings)[:, 1].sum())
        values = (
            row.sample_id,
            shard,
            place,
            len(row.input_ids),
            sum(row.loss_mask),
            num_last,
            int(row.held_out),
            answer,
        )
        entries.append(dict(zip(ExpectedIndex._fields, values, strict=True)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(entries, schema=SCHEMA))
    return bytes(sink.getvalue())
