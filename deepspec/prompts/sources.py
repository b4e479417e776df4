"""Where prompts come from: rows of files and data sets, streamed, in an order that never
changes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.run import Run
from deepspec.config.data import DatasetSource, DemoSource, FileSource, PromptSource
from deepspec.errors import DataError
from deepspec.storage.store import canonical_json

log = logging.getLogger(__name__)

COLUMNS = ("messages", "conversations", "turns", "prompt")  # that a conversation is looked for in


def read_source(run: Run, source: PromptSource) -> Iterator[Mapping[str, Any]]:
    """The source's rows, one at a time, in an order that never changes.

    The column that the source names stands under a known name. `source` is the run's, or the same
    with the commit to read.

    Raises:
        DataError: the source cannot be read, or its first row has no conversation in a column that
            is known.
    """
    column = None if isinstance(source, DemoSource) else source.column
    for number, row in enumerate(_rows(run, source)):
        if number == 0 and not (row.keys() & ({column} if column else {*COLUMNS})):
            what = f"the first row has no column {column or ' or '.join(COLUMNS)}, only {', '.join(sorted(row)) or 'none'}"
            raise DataError(
                what,
                where=f"prompts.source {source}",
                fix="name the one that holds the conversation in prompts.source.column",
            )
        yield _renamed(row, column) if column else row


def _renamed(row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    value = row.get(column)
    rest = {key: row[key] for key in row if key not in COLUMNS and key != column}
    return {**rest, "prompt" if isinstance(value, str) else "messages": value}


def _rows(run: Run, source: PromptSource) -> Iterator[Mapping[str, Any]]:
    match source:
        case DemoSource():
            demo = run.artifact("demo")
            return read_file(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return (row for path in paths for row in read_file(path))
        case DatasetSource():
            return read_dataset(source)


def read_file(path: str) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL or Parquet file, streamed.

    Raises:
        DataError: the file is missing or empty, or a line is not a JSON object (its number is
            named).
    """
    return (row for _, row in read_places(path))


def read_places(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows as `read_file` has them, each with its place in words: the file, and the line or
    the Parquet row from 1.
    """
    if path.endswith(".parquet"):
        yield from (
            (f"{path}, row {number}", row)
            for number, row in enumerate(_read_parquet(path), start=1)
        )
        return
    number = 0
    try:
        with fsspec.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _json_row(line, place)
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


def _json_row(line: str, where: str) -> Mapping[str, Any]:
    fix = "every line must be one JSON object with `messages`, `conversations`, `turns` or `prompt`"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}", where=where, fix=fix
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"the line holds a {type(row).__name__}, not an object", where=where, fix=fix
        )
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


def is_on_hub(source: DatasetSource) -> bool:
    return not Path(source.name).is_dir()


def pinned(source: DatasetSource, artifact: Artifact, *, setting: str) -> DatasetSource:
    """The source with a commit to read: a run that goes on must not read a newer one than its
    artifact began with.

    The commit stands in the artifact's `source.json`; `setting` is what a user would write to name
    it, up to the commit.
    """
    if not is_on_hub(source) or source.revision:
        return source
    path = artifact.path("source.json")
    with suppress(FileNotFoundError):
        return _at(source, json.loads(artifact.store.read(path))["revision"])
    revision = newest_revision(source)
    if not artifact.store.write_new(
        path, canonical_json({"name": source.name, "revision": revision})
    ):
        # another worker was first
        return _at(source, json.loads(artifact.store.read(path))["revision"])
    log.warning(
        "data set %s is not pinned; its newest commit is read: %s%s", source.name, setting, revision
    )
    return _at(source, revision)


def _at(source: DatasetSource, revision: str) -> DatasetSource:
    return source.model_copy(update={"revision": revision})


def newest_revision(source: DatasetSource) -> str:
    """The newest commit of a data set on the hub.

    Raises:
        DataError: there is no such data set, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(source.name).sha)
    except _hub_errors() as error:
        raise _not_loaded(source, error) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client and `datasets` raise: wrong names, no network, servers that fail."""
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # handed on when it is asked for: that of its own client

    return OSError, ValueError, httpx.HTTPError


def _not_loaded(source: DatasetSource, error: Exception) -> DataError:
    where = f"data set {source.name}, split {source.split}, revision {source.revision}"
    return DataError(
        f"cannot be loaded: {error}",
        where=where,
        fix="check name, subset, split and revision, and the network",
    )


def read_dataset(
    source: DatasetSource, *, files: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set on the hub, or in a local folder, streamed; with `files` those of these
    files, whatever the split.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    on_hub = is_on_hub(source)
    folder = f"hf://datasets/{source.name}@{source.revision}" if on_hub else source.name
    rows: Iterable[Mapping[str, Any]]
    # In the shared cache `datasets` tells folders with a card apart by their last name only, and
    # took one for another.
    with TemporaryDirectory() as cache:
        place = {"revision": source.revision} if on_hub else {"cache_dir": cache}
        try:
            if files:
                rows = (row for file in files for row in read_file(f"{folder}/{file}"))
            else:
                rows = datasets.load_dataset(
                    source.name, source.subset, split=source.split, streaming=True, **place
                )
            yield from rows  # read as it is asked for, so this may fail as well
        except _hub_errors() as error:
            raise _not_loaded(source, error) from None
