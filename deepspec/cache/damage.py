"""Where in a damaged shard the damage is: which rows, and which column of each."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import xxhash

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Record
from deepspec.cache.format import column_checksums
from deepspec.cache.index import read_rows
from deepspec.cache.reader import SCHEMA

MAX_NAMED = 8


def locate_damage(artifact: Artifact, record: Record) -> list[str]:
    """`row 3, column context`, ... for the messages of a shard that differ from their checksums.

    When every row is whole it is the header or footer.
    """
    (rows,) = read_rows(artifact, [record])
    if rows is None:
        return ["its index rows are damaged, too"]
    found = list(_damaged_rows(artifact, record, rows.to_pylist()))
    more = [f"and {len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else []
    return [*found[:MAX_NAMED], *more] or ["its header or footer"]


def _damaged_rows(artifact: Artifact, record: Record, rows: list[dict[str, Any]]) -> Iterator[str]:
    schema = pa.ipc.read_schema(pa.py_buffer(artifact.read(SCHEMA)))
    path = artifact.path(record.file)
    size = artifact.store.size(path)
    for row in rows:
        end = row["offset"] + row["num_bytes"]
        if end > size:
            yield f"row {row['row']} and what follows is cut off"
            return
        message = artifact.store.read_range(path, row["offset"], end)
        if xxhash.xxh3_64_intdigest(message) != row["checksum"]:
            yield f"row {row['row']}, {_damaged_column(message, schema, row['column_checksums'])}"


def _damaged_column(message: Any, schema: pa.Schema, checksums: list[int]) -> str:
    try:
        found = column_checksums(pa.ipc.read_record_batch(message, schema))
    except (pa.ArrowException, OSError, ValueError):
        return "message header"
    wrong = [
        name
        for name, one, other in zip(schema.names, found, checksums, strict=True)
        if one != other
    ]
    return f"column {', '.join(wrong)}" if wrong else "message header or padding"
