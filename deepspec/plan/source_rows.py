"""How many rows a run's source has, as far as that can be known without reading them all."""

import fsspec
import pyarrow.parquet as pq

from deepspec.artifacts.run import Run
from deepspec.config.data import DatasetSource, FileSource
from deepspec.prompts.data_sets import is_on_hub, read_dataset


def count_source_rows(run: Run) -> int | None:
    """Rows of the source, of files without parsing them; None where that cannot be known."""
    match run.config.prompts.source:
        case DatasetSource() as source:
            return _dataset_rows(source)
        case FileSource(paths=paths):
            return sum(map(_file_rows, paths))
    demo = run.artifact("demo")
    return _file_rows(str(demo.store.fetch(demo.path("prompts.jsonl"))))


def _file_rows(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        if path.endswith(".parquet"):
            return int(pq.ParquetFile(file).metadata.num_rows)
        return sum(1 for line in file if line.strip())


def _dataset_rows(source: DatasetSource) -> int | None:
    import datasets

    if not is_on_hub(source):
        return sum(1 for _ in read_dataset(source))
    try:
        builder = datasets.load_dataset_builder(
            source.name, source.subset, revision=source.revision
        )
    except (OSError, ValueError):
        return None  # the rows themselves were readable; only their number is unknown
    split = (builder.info.splits or {}).get(source.split)
    return int(split.num_examples) or None if split else None
