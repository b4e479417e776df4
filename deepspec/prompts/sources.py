"""Where prompts come from: rows of files and data sets, in an order that never changes."""

from collections.abc import Iterator, Mapping
from typing import Any

from deepspec.artifacts.run import Run
from deepspec.config.data import DatasetSource, DemoSource, FileSource, PromptSource
from deepspec.errors import DataError
from deepspec.prompts.data_sets import read_dataset
from deepspec.prompts.files import read_file

COLUMNS = ("messages", "conversations", "turns", "prompt")  # that may hold a conversation


def read_source(run: Run, source: PromptSource) -> Iterator[Mapping[str, Any]]:
    """The source's rows, streamed; a column that it names is renamed to a known one.

    `source` is the run's, or the same with the commit to read.

    Raises:
        DataError: the source cannot be read, or its first row has no column for a conversation.
    """
    column = None if isinstance(source, DemoSource) else source.column
    wanted = (column,) if column else COLUMNS
    for number, row in enumerate(_rows(run, source)):
        if number == 0 and not row.keys() & set(wanted):
            found = ", ".join(sorted(row)) or "none"
            raise DataError(
                f"the first row has no column {' or '.join(wanted)}, only {found}",
                where=f"prompts.source {source}",
                fix="name the column that holds the conversation in prompts.source.column",
            )
        yield _renamed(row, column) if column else row


def _rows(run: Run, source: PromptSource) -> Iterator[Mapping[str, Any]]:
    match source:
        case DemoSource():
            demo = run.artifact("demo")
            return read_file(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return (row for path in paths for row in read_file(path))
        case DatasetSource():
            return read_dataset(source)


def _renamed(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    value = row.get(column)
    rest = {key: row[key] for key in row if key not in COLUMNS and key != column}
    return {**rest, "prompt" if isinstance(value, str) else "messages": value}
