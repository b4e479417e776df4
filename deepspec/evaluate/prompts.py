"""Benchmarks as an evaluation takes them: so many prompts of each, cut into units, rendered
turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import xxhash

from deepspec.config.benchmarks import DEMO, Domain, find_benchmark, short_name
from deepspec.config.evaluate import BenchmarkConfig
from deepspec.config.run import RunConfig
from deepspec.messages import Message
from deepspec.prompts.benchmarks import read_benchmark
from deepspec.target.chat import Chat

SLICE_PROMPTS = 10  # prompts of one unit of evaluation: what is lost at most when a run is killed
# times the batch size, where it is larger than 1: a batch is then full for most of the time
SLICE_BATCHES = 4
DOMAIN_OF_DEMO: dict[str, Domain] = dict(zip(DEMO, ("math", "code", "chat"), strict=True))

Turns = tuple[str, ...]  # what the user says in a conversation, one by one


class Benchmark(NamedTuple):
    name: str
    domain: Domain
    prompts: list[Turns]


class Unit(NamedTuple):
    """A slice of a benchmark at one temperature and batch size: evaluated, recorded and resumed
    as one shard.
    """

    number: int
    benchmark: str
    domain: Domain
    temperature: float
    batch_size: int
    first: int
    prompts: list[Turns]


class RenderedPrompt(NamedTuple):
    input_ids: list[int]
    digest: str  # of the ids: shows when two runs rendered the same prompt differently


class Fitting(NamedTuple):
    """Prompts by number: those that fit into the target, and why the others do not."""

    usable: dict[int, RenderedPrompt]
    skipped: dict[int, str]


def load_benchmarks(config: RunConfig) -> list[Benchmark]:
    """All benchmarks of the run, every one checked before the first is used; known ones are put
    into the store if need be.

    Raises:
        DataError: a file that is missing, empty, or has a line without turns; a data set that is
            neither stored nor reachable.
    """
    return [_load(config, settings) for settings in config.evaluate.benchmarks]


def _load(config: RunConfig, settings: BenchmarkConfig) -> Benchmark:
    known = find_benchmark(settings.name)
    prompts = [prompt.turns for prompt in read_benchmark(config, settings.name)]
    limit = settings.limit or (known.num_prompts if known else None)
    if limit is not None and limit < len(prompts):
        chosen = np.random.default_rng(config.evaluate.seed).permutation(len(prompts))[:limit]
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
    for temperature, size in product(config.evaluate.temperatures, config.evaluate.batch_sizes):
        together = SLICE_PROMPTS if size == 1 else SLICE_BATCHES * size
        for name, domain, prompts in benchmarks:
            for first in range(0, len(prompts), together):
                units.append(
                    Unit(
                        len(units),
                        name,
                        domain,
                        temperature,
                        size,
                        first,
                        prompts[first : first + together],
                    )
                )
    return units


def render(chat: Chat, turns: Turns, answers: Sequence[str] = ()) -> RenderedPrompt:
    """The conversation up to the turn that comes after as many answers; the target's own
    answers stand in between.
    """
    messages = [Message("user", turns[0])]
    for answer, turn in zip(answers, turns[1:], strict=False):
        messages += [Message("assistant", answer), Message("user", turn)]
    ids = chat.render(messages)
    return RenderedPrompt(ids, xxhash.xxh3_64_hexdigest(json.dumps(ids).encode()))


def split_fitting(
    prompts: Mapping[int, RenderedPrompt], *, max_positions: int, max_new_tokens: int
) -> Fitting:
    """Tell the prompts apart that leave room for a whole answer in the target's `max_positions`
    tokens from those that do not.
    """
    limit, usable, skipped = (
        max_positions - max_new_tokens,
        dict[int, RenderedPrompt](),
        dict[int, str](),
    )
    for number, prompt in prompts.items():
        if (length := len(prompt.input_ids)) <= limit:
            usable[number] = prompt
        else:
            room = f"the target takes {max_positions}, of which evaluate.max_new_tokens keeps {max_new_tokens} for the answer"
            skipped[number] = f"the prompt has {length} tokens; {room}"
    return Fitting(usable, skipped)
