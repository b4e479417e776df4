"""Rows of JSONL and Parquet files, streamed, each with its place for error messages."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
import pyarrow as pa

from deepspec.errors import DataError

JSONL_FIX = (
    "every line must be one JSON object with `messages`, `conversations`, `turns` or `prompt`"
)


def read_file(path: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL or Parquet file (a local path or a URL).

    Raises:
        DataError: the file is missing or empty, or a line is not a JSON object (it is named).
    """
    return (row for _, row in located_rows(path))


def located_rows(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of `read_file`, each with its place: the file, and its line or row from 1."""
    if path.endswith(".parquet"):
        for number, row in enumerate(_read_parquet(path), start=1):
            yield f"{path}, row {number}", row
        return
    number = 0
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _parse_line(line, place)
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read: {error}",
            where=path,
            fix="check the path and that the file is UTF-8 text",
        ) from None
    if number == 0:
        raise DataError(
            "the file is empty", where=path, fix="give a file with one JSON object per line"
        )


def _parse_line(line: str, place: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at column {error.colno}"
        raise DataError(what, where=place, fix=JSONL_FIX) from None
    if not isinstance(row, dict):
        what = f"the line holds a {type(row).__name__}, not an object"
        raise DataError(what, where=place, fix=JSONL_FIX)
    return row


def _read_parquet(path: str) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    try:
        with fsspec.open(path, "rb") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise DataError(
            f"cannot be read as Parquet: {error}", where=path, fix="check the path and the file"
        ) from None
