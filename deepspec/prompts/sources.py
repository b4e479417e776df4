"""Where prompts come from: rows of files and data sets, in an order that never changes.

A data set is read from a local folder, or from the Hugging Face hub at one commit.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

JSONL_FIX = (
    "every line must be one JSON object with `messages`, `conversations`, `turns` or `prompt`"
)
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
            columns = ", ".join(sorted(row)) or "none"
            raise DataError(
                f"the first row has no column {' or '.join(wanted)}, only {columns}",
                where=f"prompts.source {source}",
                fix="name the column that holds the conversation in prompts.source.column",
            )
        if column:
            value = row.get(column)
            rest = {key: row[key] for key in row if key not in COLUMNS and key != column}
            row = {**rest, "prompt" if isinstance(value, str) else "messages": value}
        yield row


def _rows(run: Run, source: PromptSource) -> Iterator[Mapping[str, Any]]:
    match source:
        case DemoSource():
            demo = run.artifact("demo")
            return read_file(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return (row for path in paths for row in read_file(path))
        case DatasetSource():
            return read_dataset(source)


def is_on_hub(source: DatasetSource) -> bool:
    """Whether the data set is a name on the hub, not a local folder."""
    return not Path(source.name).is_dir()


def pin_revision(source: DatasetSource, artifact: Artifact, *, setting: str) -> DatasetSource:
    """The source with a commit to read, which is the same each time the artifact is resumed.

    The commit is kept in the artifact's `source.json`. `setting` is what a user would write before
    the commit to set it.
    """
    if not is_on_hub(source) or source.revision:
        return source
    path = artifact.path("source.json")
    if not artifact.store.exists(path):
        newest = newest_revision(source)
        content = canonical_json({"name": source.name, "revision": newest})
        if artifact.store.write_new(path, content):  # else another worker was first
            setting += newest
            log.warning("data set %s is not pinned; the newest is read: %s", source.name, setting)
    return source.model_copy(update={"revision": json.loads(artifact.store.read(path))["revision"]})


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


def read_dataset(
    source: DatasetSource, *, files: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """Rows of a data set, streamed; with `files` those of these files, whatever the split.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    on_hub = is_on_hub(source)
    folder = f"hf://datasets/{source.name}@{source.revision}" if on_hub else source.name
    rows: Iterable[Mapping[str, Any]]
    # A cache of its own: in the shared one `datasets` tells folders with a card apart by their last
    # name only, and took one for another.
    with TemporaryDirectory() as cache:
        place = {"revision": source.revision} if on_hub else {"cache_dir": cache}
        try:
            if files:
                rows = (row for file in files for row in read_file(f"{folder}/{file}"))
            else:
                rows = datasets.load_dataset(
                    source.name, source.subset, split=source.split, streaming=True, **place
                )
            yield from rows  # read lazily, so this may fail as well
        except _hub_errors() as error:
            raise _not_loaded(source, error) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the hub's client and `datasets` raise: wrong names, no network, servers that fail."""
    # the module whose client it uses, which is httpx or one that replaces it
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    return OSError, ValueError, httpx.HTTPError


def _not_loaded(source: DatasetSource, error: Exception) -> DataError:
    return DataError(
        f"cannot be loaded: {error}",
        where=f"data set {source.name}, split {source.split}, revision {source.revision}",
        fix="check name, subset, split and revision, and the network",
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
        raise DataError(
            f"not JSON: {error.msg} at column {error.colno}", where=place, fix=JSONL_FIX
        ) from None
    if not isinstance(row, dict):
        raise DataError(
            f"the line holds a {type(row).__name__}, not an object", where=place, fix=JSONL_FIX
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
