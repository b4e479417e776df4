"""The records of a sealed artifact as one Arrow IPC file, a row a shard.

So that a reader need not ask for 10,000 files.
"""

import json
from collections.abc import Iterable

from deepspec.artifacts.records import Record


def records_table(records: Iterable[Record]) -> bytes:
    """The table's bytes, in the order of the records."""
    import pyarrow as pa  # a command that reads no table starts faster without it

    integers = dict.fromkeys(("shard", "num_bytes", "rows", "tokens", "rejected"), pa.uint64())
    columns = [field.alias or name for name, field in Record.model_fields.items()]
    types = dict.fromkeys(columns, pa.string()) | integers | {"seconds": pa.float64()}
    rows = [
        {**record.model_dump(), "counts": json.dumps(record.counts, sort_keys=True)}
        for record in records
    ]
    table = pa.Table.from_pylist(rows, pa.schema(list(types.items())))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def read_records_table(data: bytes) -> dict[int, Record]:
    """The records of a table, by shard."""
    import pyarrow as pa

    return {
        row["shard"]: Record.model_validate({**row, "counts": json.loads(row["counts"])})
        for row in pa.ipc.open_file(pa.py_buffer(data)).read_all().to_pylist()
    }
