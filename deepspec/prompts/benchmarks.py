"""The prompts of a benchmark: a known one from the store, into which it is read from the hub once;
or a file's.

A known benchmark is an artifact of one shard, named by its data set, revision and wording and by
nothing of the run: who evaluates (or looks for benchmark prompts among training prompts) with the
same store reads the same prompts without a network.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.tables import read_table, write_table
from deepspec.config.benchmarks import BenchmarkSet, find_benchmark, turns_of
from deepspec.config.data import DatasetSource
from deepspec.config.run import RunConfig
from deepspec.errors import DataError
from deepspec.prompts.sources import pinned, read_dataset, read_places

log = logging.getLogger(__name__)

SCHEMA = pa.schema([("turns", pa.list_(pa.large_string())), ("problem", pa.large_string())])
SHARD = 0  # a benchmark has only one


class BenchmarkPrompt(NamedTuple):
    turns: tuple[str, ...]  # what the user says, one by one
    problem: str | None = None  # the data set's own text, without the words around it


def read_benchmark(run: Run, name: str) -> list[BenchmarkPrompt]:
    """All prompts of a benchmark, in the order of its data set or file.

    Raises:
        DataError: a file that is missing, empty, or has a line without turns; a data set that is
            neither stored nor reachable.
    """
    if known := find_benchmark(name):
        artifact = stored_benchmark(run, known)
        rows = read_table(artifact.fetch_shard(artifact.records()[SHARD])).to_pylist()
        return [BenchmarkPrompt(tuple(row["turns"]), row["problem"]) for row in rows]
    path = name
    if name.startswith("demo/"):
        demo = run.artifact("demo")
        path = str(demo.store.fetch(demo.path(f"benchmarks/{name.removeprefix('demo/')}.jsonl")))
    prompts = [BenchmarkPrompt(_turns(row, place)) for place, row in read_places(path)]
    if not prompts:
        raise DataError(
            "the file is empty",
            where=path,
            fix='give {"turns": ["the first user message", ...]} on each line',
        )
    return prompts


def _turns(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    turns = row.get("turns")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise DataError(
            "the line has no turns",
            where=place,
            fix='each line must be {"turns": ["the first user message", ...]}',
        )
    return tuple(turns)


def stored_benchmark(run: Run, benchmark: BenchmarkSet) -> Artifact:
    """The benchmark's artifact, made and sealed first if the store does not have it.

    Raises:
        DataError: it is not there and the data set cannot be read.
    """
    config = run.config
    artifact = run.benchmark(benchmark)
    if artifact.record(SHARD) is None:
        _commit(config, benchmark, artifact)
    # its prompts are there: a worker that was killed between the two, or `verify`, needs no network
    if artifact.manifest() is None:
        artifact.seal(inputs={}, shards=[SHARD])
    return artifact


def _commit(config: RunConfig, benchmark: BenchmarkSet, artifact: Artifact) -> None:
    artifact.create(config.model_dump(mode="json"))
    started = time.monotonic()
    try:
        rows = [_stored(benchmark, row) for row in _hub_rows(benchmark, artifact)]
        if not rows:
            raise DataError(
                "the data set has no rows",
                where=f"data set {benchmark.dataset}",
                fix="check its split and files",
            )
    except DataError as error:
        fix = f'{error.fix}; or give its prompts as a JSONL file in its place, {{"turns": [...]}} on each line'
        raise DataError(
            f"benchmark {benchmark.name}: {error.what}", where=error.where, fix=fix
        ) from None
    with artifact.store.staged() as local:
        write_table(pa.Table.from_pylist(rows, SCHEMA), local)
        artifact.commit(
            SHARD, local, Counts(rows=len(rows)), upstream=None, seconds=time.monotonic() - started
        )
    log.info("benchmark=%s prompts=%d artifact=%s", benchmark.name, len(rows), artifact.url)


def _stored(benchmark: BenchmarkSet, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "turns": turns_of(benchmark, row),
        "problem": row[benchmark.problem] if benchmark.problem else None,
    }


def _hub_rows(benchmark: BenchmarkSet, artifact: Artifact) -> Iterator[Mapping[str, Any]]:
    unpinned = DatasetSource(
        kind="dataset",
        name=benchmark.dataset,
        subset=benchmark.subset,
        split=benchmark.split,
        revision=benchmark.revision,
    )
    return read_dataset(
        pinned(unpinned, artifact, setting=f"{benchmark.name}@"), files=benchmark.files
    )


def benchmark_digests(run: Run, stage: str) -> dict[str, str]:
    """The manifest digests of the known benchmarks that the stage reads, by
    `benchmarks/fingerprint`.
    """
    artifacts = [stored_benchmark(run, benchmark) for benchmark in run.known_benchmarks(stage)]
    found = {
        f"benchmarks/{artifact.key.fingerprint}": artifact.manifest() for artifact in artifacts
    }
    return {name: manifest.digest for name, manifest in found.items() if manifest is not None}
