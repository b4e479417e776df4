"""Benchmark prompts: the demo's held-out ones, or any JSONL file with `turns` on each line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from deepspec.config import BenchmarkConfig, RunConfig
from deepspec.data.chat import Chat, Message
from deepspec.data.sources import read_file
from deepspec.errors import DataError
from deepspec.lineage import artifact_of

SLICE_PROMPTS = 10  # prompts of one unit of evaluation: what is lost at most when a run is killed


class Benchmark(NamedTuple):
    name: str
    prompts: list[str]


class Unit(NamedTuple):
    """A slice of a benchmark at one temperature: evaluated, recorded and resumed as one shard."""

    number: int
    benchmark: str
    temperature: float
    first: int
    prompts: list[str]


class RenderedPrompt(NamedTuple):
    input_ids: list[int]
    digest: str  # of the ids: shows when two runs rendered the same prompt differently


def load_benchmarks(config: RunConfig) -> list[Benchmark]:
    """All benchmarks of the run, every one checked before the first is used.

    Raises:
        DataError: a file that is missing, empty, or has a line without turns.
    """
    return [_load(config, settings) for settings in config.evaluate.benchmarks]


def _load(config: RunConfig, settings: BenchmarkConfig) -> Benchmark:
    path = settings.name
    if path.startswith("demo/"):
        demo = artifact_of(config, "demo")
        path = str(demo.store.fetch(demo.path(f"benchmarks/{path.removeprefix('demo/')}.jsonl")))
    prompts = []
    for number, row in enumerate(read_file(path), start=1):
        turns = row.get("turns")
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns or not isinstance(turns[0], str) or not turns[0].strip():
            fix = 'each line must be {"turns": ["the first user message", ...]}'
            raise DataError("the line has no turns", where=f"{path}, row {number}", fix=fix)
        prompts.append(turns[0])
    if settings.limit is not None and settings.limit < len(prompts):
        chosen = np.random.default_rng(config.evaluate.seed).permutation(len(prompts))[: settings.limit]
        prompts = [prompts[index] for index in sorted(chosen.tolist())]
    return Benchmark(Path(settings.name).stem, prompts)


def make_units(config: RunConfig, benchmarks: Sequence[Benchmark]) -> list[Unit]:
    """The run's units in a fixed order; their numbers are shard numbers."""
    units: list[Unit] = []
    for temperature in config.evaluate.temperatures:
        for benchmark in benchmarks:
            for first in range(0, len(benchmark.prompts), SLICE_PROMPTS):
                units.append(Unit(len(units), benchmark.name, temperature, first, benchmark.prompts[first : first + SLICE_PROMPTS]))
    return units


def render(chat: Chat, prompt: str) -> RenderedPrompt:
    ids = chat.render([Message("user", prompt)])
    return RenderedPrompt(ids, xxhash.xxh3_64_hexdigest(json.dumps(ids).encode()))
