"""Where prompts come from: rows of files and data sets, streamed, in an order that never changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa

from deepspec.config import DatasetSource, DemoSource, FileSource, RunConfig
from deepspec.errors import DataError
from deepspec.lineage import artifact_of

COLUMNS = ("messages", "conversations", "turns", "prompt")  # that a conversation is looked for in


def read_source(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    """The source's rows, one at a time, in an order that never changes; a `column` that was named stands under a known name.

    Raises:
        DataError: the source cannot be read, or its first row has no conversation in a column that is known.
    """
    source = config.prompts.source
    column = None if isinstance(source, DemoSource) else source.column
    for number, row in enumerate(_rows(config)):
        if number == 0 and not (row.keys() & ({column} if column else {*COLUMNS})):
            what = f"the first row has no column {column or ' or '.join(COLUMNS)}, only {', '.join(sorted(row)) or 'none'}"
            raise DataError(what, where=f"prompts.source {source}", fix="name the one that holds the conversation in prompts.source.column")
        yield _renamed(row, column) if column else row


def _renamed(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    value = row.get(column)
    rest = {key: row[key] for key in row if key not in COLUMNS and key != column}
    return {**rest, "prompt" if isinstance(value, str) else "messages": value}


def _rows(config: RunConfig) -> Iterator[Mapping[str, Any]]:
    match config.prompts.source:
        case DemoSource():
            demo = artifact_of(config, "demo")
            return read_file(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return (row for path in paths for row in read_file(path))
        case DatasetSource() as source:
            return _read_dataset(source)


def read_file(path: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL or Parquet file, streamed.

    Raises:
        DataError: the file is missing or empty, or a line is not a JSON object (its number is named).
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    number = 0
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(line, f"{path}, line {number}")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=path, fix="check the path and that the file is UTF-8 text") from None
    if number == 0:
        raise DataError("the file is empty", where=path, fix="give a file with one JSON object per line")


def _json_row(line: str, where: str) -> Mapping[str, Any]:
    fix = "every line must be one JSON object with `messages`, `conversations`, `turns` or `prompt`"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where, fix=fix) from None
    if not isinstance(row, dict):
        raise DataError(f"the line holds a {type(row).__name__}, not an object", where=where, fix=fix)
    return row


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot be read as Parquet: {error}", where=path, fix="check the path and the file") from None


def is_on_hub(source: DatasetSource) -> bool:
    return not Path(source.name).is_dir()


def newest_revision(source: DatasetSource) -> str:
    """The newest commit of a data set on the hub.

    Raises:
        DataError: there is no such data set, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.name).sha)
    except (OSError, ValueError) as error:  # the hub's own errors are of both kinds
        raise _not_loaded(source, error) from None


def _not_loaded(source: DatasetSource, error: Exception) -> DataError:
    where = f"data set {source.name}, split {source.split}, revision {source.revision}"
    return DataError(f"cannot be loaded: {error}", where=where, fix="check name, subset, split and revision")


def _read_dataset(source: DatasetSource) -> Iterator[Mapping[str, Any]]:
    import datasets

    try:
        if not is_on_hub(source):
            rows = datasets.load_dataset(source.name, source.subset, split=source.split)
        else:
            rows = datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision, streaming=True)
        yield from rows  # read as it is asked for, so this may fail as well
    except (OSError, ValueError) as error:
        raise _not_loaded(source, error) from None
