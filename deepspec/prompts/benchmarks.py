"""The prompts of a benchmark: a known one from the store, or those of a file.

A known benchmark is read from the hub once, into an artifact of one shard. It is named by its data
set, revision and wording and by nothing of the run, so every run with this store reads the same
prompts, for evaluation or decontamination, without a network.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from deepspec.artifacts.artifact import Artifact
from deepspec.artifacts.records import Counts
from deepspec.artifacts.run import Run
from deepspec.artifacts.stages import STAGES
from deepspec.artifacts.tables import write_table
from deepspec.config.benchmarks import BenchmarkSet, find_benchmark, turns_of
from deepspec.config.data import DatasetSource
from deepspec.errors import DataError
from deepspec.prompts.sources import located_rows, pin_revision, read_dataset

log = logging.getLogger(__name__)

SCHEMA = pa.schema([("turns", pa.list_(pa.large_string())), ("problem", pa.large_string())])
SHARD = 0  # a benchmark has only one
TURNS_FIX = 'give {"turns": ["the first user message", ...]} on each line'


class BenchmarkPrompt(NamedTuple):
    """One prompt of a benchmark."""

    turns: tuple[str, ...]  # the user's messages, one by one
    problem: str | None = None  # the data set's own text, without the benchmark's wording


def read_benchmark(run: Run, name: str) -> list[BenchmarkPrompt]:
    """All prompts of a benchmark, in the order of its data set or file.

    Raises:
        DataError: a file is missing, empty, or has a line without turns; a data set is neither
            stored nor reachable.
    """
    if known := find_benchmark(name):
        artifact = stored_benchmark(run, known)
        rows = artifact.rows(artifact.records()[SHARD])
        return [BenchmarkPrompt(tuple(row["turns"]), row["problem"]) for row in rows]
    path = name
    if name.startswith("demo/"):
        demo = run.artifact("demo")
        path = str(demo.store.fetch(demo.path(f"benchmarks/{name.removeprefix('demo/')}.jsonl")))
    prompts = [BenchmarkPrompt(_turns(row, place)) for place, row in located_rows(path)]
    if not prompts:
        raise DataError("the file is empty", where=path, fix=TURNS_FIX)
    return prompts


def _turns(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    turns = row.get("turns")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise DataError("the line has no turns", where=place, fix=TURNS_FIX)
    return tuple(turns)


def stored_benchmark(run: Run, benchmark: BenchmarkSet) -> Artifact:
    """The benchmark's artifact, made and sealed first if the store does not have it.

    Raises:
        DataError: the store does not have it, and the data set cannot be read.
    """
    artifact = run.benchmark(benchmark)
    if artifact.record(SHARD) is None:
        artifact.create(run.config.model_dump(mode="json"))
        _commit(benchmark, artifact)
    # The prompts are there: after a kill between the two, or in `verify`, no network is needed.
    if artifact.manifest() is None:
        artifact.seal(inputs={}, shards=[SHARD])
    return artifact


def _commit(benchmark: BenchmarkSet, artifact: Artifact) -> None:
    started = time.monotonic()
    place = benchmark.model_dump(include={"subset", "split", "revision"})
    source = DatasetSource(kind="dataset", name=benchmark.dataset, **place)
    try:
        source = pin_revision(source, artifact, setting=f"{benchmark.name}@")
        rows = [
            {
                "turns": turns_of(benchmark, row),
                "problem": row[benchmark.problem] if benchmark.problem else None,
            }
            for row in read_dataset(source, files=benchmark.files)
        ]
        if not rows:
            raise DataError(
                "the data set has no rows",
                where=f"data set {benchmark.dataset}",
                fix="check its split and files",
            )
    except DataError as error:
        raise DataError(
            f"benchmark {benchmark.name}: {error.what}",
            where=error.where,
            fix=f"{error.fix}; or replace it by a JSONL file of its prompts: {TURNS_FIX}",
        ) from None
    with artifact.store.staged() as local:
        write_table(pa.Table.from_pylist(rows, SCHEMA), local)
        seconds = time.monotonic() - started
        artifact.commit(SHARD, local, Counts(rows=len(rows)), upstream=None, seconds=seconds)
    log.info("benchmark=%s prompts=%d artifact=%s", benchmark.name, len(rows), artifact.url)


def benchmark_digests(run: Run, stage: str) -> dict[str, str]:
    """The manifest digest of each known benchmark that the stage reads.

    Keys are `benchmarks/fingerprint`; a benchmark that is not stored yet is stored first.
    """
    digests = {}
    for benchmark in STAGES[stage].known_benchmarks(run.config):
        artifact = stored_benchmark(run, benchmark)
        if (manifest := artifact.manifest()) is not None:
            digests[f"benchmarks/{artifact.key.fingerprint}"] = manifest.digest
    return digests
