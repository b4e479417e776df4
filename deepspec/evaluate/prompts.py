"""Benchmarks as an evaluation takes them: a number of prompts of each, cut into units, rendered
turn by turn.
"""

import json
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import xxhash

from deepspec.artifacts.run import Run
from deepspec.config.benchmarks import DEMO, Domain, find_benchmark, short_name
from deepspec.config.evaluate import BenchmarkConfig
from deepspec.config.run import RunConfig
from deepspec.messages import Message
from deepspec.prompts.benchmarks import read_benchmark
from deepspec.target.chat import Chat

SLICE_PROMPTS = 10  # prompts of one unit: the most that is lost when a run is killed
SLICE_BATCHES = 4  # times a batch size above 1: its batch is then full most of the time
DOMAIN_OF_DEMO: dict[str, Domain] = dict(zip(DEMO, ("math", "code", "chat"), strict=True))

Turns = tuple[str, ...]  # the user's messages of a conversation


class Benchmark(NamedTuple):
    """The prompts that a run takes of a benchmark."""

    name: str
    domain: Domain
    prompts: list[Turns]


class Unit(NamedTuple):
    """A slice of a benchmark at one temperature and batch size (of servers, at so many requests in
    flight): one shard of the result.
    """

    number: int
    benchmark: str
    domain: Domain
    temperature: float
    batch_size: int
    prompts: dict[int, Turns]  # by their number in the benchmark


class RenderedPrompt(NamedTuple):
    """A conversation as the target reads it."""

    input_ids: list[int]
    digest: str  # of the ids: shows when two runs rendered the same prompt differently


def load_benchmarks(run: Run) -> list[Benchmark]:
    """All benchmarks of the run, every one checked; known ones are put into the store if needed.

    Raises:
        DataError: a file that is missing, empty, or has a line without turns; a data set that is
            neither stored nor reachable.
    """
    return [_load(run, settings) for settings in run.config.evaluate.benchmarks]


def _load(run: Run, settings: BenchmarkConfig) -> Benchmark:
    known = find_benchmark(settings.name)
    prompts = [prompt.turns for prompt in read_benchmark(run, settings.name)]
    limit = settings.limit or (known.num_prompts if known else None)
    if limit is not None and limit < len(prompts):
        chosen = np.random.default_rng(run.config.evaluate.seed).permutation(len(prompts))[:limit]
        prompts = [prompts[index] for index in sorted(chosen.tolist())]
    if settings.turns == "first":
        prompts = [turns[:1] for turns in prompts]
    domain = settings.domain or (
        known.domain if known else DOMAIN_OF_DEMO.get(settings.name, "other")
    )
    return Benchmark(short_name(settings.name), domain, prompts)


def make_units(config: RunConfig, benchmarks: Sequence[Benchmark]) -> list[Unit]:
    """The run's units in a fixed order; their numbers are shard numbers."""
    units: list[Unit] = []
    for temperature, size in product(config.evaluate.temperatures, config.evaluate.sizes):
        together = SLICE_PROMPTS if size == 1 else SLICE_BATCHES * size
        for name, domain, prompts in benchmarks:
            numbered = [*enumerate(prompts)]
            for first in range(0, len(numbered), together):
                of_unit = dict(numbered[first : first + together])
                units.append(Unit(len(units), name, domain, temperature, size, of_unit))
    return units


def messages_of(turns: Turns, answers: Sequence[str] = ()) -> list[Message]:
    """The conversation up to the turn after so many answers, which are the target's own."""
    messages = [Message("user", turns[0])]
    for answer, turn in zip(answers, turns[1:], strict=False):
        messages += [Message("assistant", answer), Message("user", turn)]
    return messages


def render_turns(chat: Chat, turns: Turns, answers: Sequence[str] = ()) -> RenderedPrompt:
    """That conversation as the target reads it."""
    ids = chat.render(messages_of(turns, answers))
    return RenderedPrompt(ids, xxhash.xxh3_64_hexdigest(json.dumps(ids).encode()))


def too_long(num_tokens: int, *, max_positions: int, max_new_tokens: int) -> str:
    """Why a prompt of so many tokens leaves no room for a whole answer; empty where it does."""
    if num_tokens <= max_positions - max_new_tokens:
        return ""
    room = f"the target takes {max_positions}, of which evaluate.max_new_tokens keeps"
    return f"the prompt has {num_tokens} tokens; {room} {max_new_tokens} for the answer"
