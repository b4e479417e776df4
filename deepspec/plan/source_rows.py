"""How many rows a run's source has, as far as that can be known without reading them all."""

import fsspec

from deepspec.artifacts.run import Run
from deepspec.config.data import DatasetSource, DemoSource, FileSource
from deepspec.prompts.data_sets import is_on_hub, read_dataset


def count_source_rows(run: Run) -> int | None:
    """Rows of the source, of files without parsing them; None where that cannot be known."""
    match run.config.prompts.source:
        case DemoSource():
            demo = run.artifact("demo")
            return _count_rows(str(demo.store.fetch(demo.path("prompts.jsonl"))))
        case FileSource(paths=paths):
            return sum(_count_rows(path) for path in paths)
        case DatasetSource() as source:
            return _dataset_rows(source)


def _count_rows(path: str) -> int:
    if path.endswith(".parquet"):
        import pyarrow.parquet as pq

        with fsspec.open(path, "rb") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    with fsspec.open(path, "rb") as lines:
        return sum(1 for line in lines if line.strip())


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
