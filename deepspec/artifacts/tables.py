"""Small Arrow tables on disk, for prompts, answers and results."""

from pathlib import Path

import pyarrow as pa


def write_table(table: pa.Table, local: Path) -> None:
    """The table as an Arrow IPC file; equal tables give equal bytes."""
    with pa.OSFile(str(local), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_table(local: Path) -> pa.Table:
    """The table of an Arrow IPC file, mapped."""
    with pa.memory_map(str(local)) as source:
        return pa.ipc.open_file(source).read_all()
